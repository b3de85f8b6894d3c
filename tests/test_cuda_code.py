"""The machine code of the kernels for GPUs: compiled for sm_80 and sm_90 here, without one, and read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install -e .[cuda13]")
pytest.importorskip("cuda.pathfinder")

import sass
from cases import CASES, PLAIN

import fastlr
from fastlr.kernels import caching, cuda, grid
from fastlr.kernels.finish import finish
from fastlr.kernels.notices import warn_once
from fastlr.kernels.storage import Storage

both = pytest.mark.parametrize("architecture", sass.ARCHITECTURES)


@both
@pytest.mark.parametrize(("name", "formats"), sass.UPDATES, ids=[" ".join(u) for u in sass.UPDATES])
def test_updates(name, formats, architecture):
    image, staged, storage = sass.update(name, formats, architecture)
    code = sass.read(image)
    columns, width = storage.columns(staged), grid.width_of(storage.columns(staged))
    size = [np.dtype(c).itemsize * width / 16 for c in columns]
    reads = range(2 + len(staged.states) + len(staged.inputs))
    assert code.loads == sum(int(size[k]) for k in reads)
    assert code.stores == sum(int(size[k]) for k in storage.written(staged))
    # All loads are under way before the first is used; or so few registers are that all threads of an SM have some.
    assert code.early or code.registers <= 32
    assert code.registers <= 64
    assert code.spilled == code.local == code.doubles == code.calls == 0
    recorded = json.loads(sass.BASELINE.read_text()).get(sass.key(architecture, name, formats))
    if recorded is not None:  # a new optimizer has no baseline yet
        assert code.instructions / width == pytest.approx(recorded, rel=0.1), "python tests/sass.py records a new one"


def compiled(staged, storage, name, architecture):
    makers = {
        "few": lambda t: grid.update(t, staged, storage, grid.Tuning(), True),
        "update": lambda t: grid.update(t, staged, storage, grid.Tuning(), False),
        "measure": lambda t: grid.measure(t, staged, storage, 0, grid.Tuning()),
        "finish": lambda t: finish(t, staged, storage),
    }
    return sass.read(cuda.compile_image(makers[name](cuda.TARGET), sass.ARCHITECTURES[architecture]))


@both
def test_the_kernel_of_a_plain_step(architecture):
    staged, storage = fastlr.Adam(np.zeros(1, np.float32)).rule, Storage("float32", "float32")
    code = compiled(staged, storage, "few", architecture)
    assert (code.loads, code.stores, code.early) == (4, 3, True)
    assert code.registers <= 64 and code.spilled == code.local == code.doubles == 0


@both
@pytest.mark.parametrize("case", [c for c in PLAIN if c.name in ("adamw", "lamb", "nadam")], ids=repr)
def test_measures_and_finish(case, architecture):
    staged = case.make(np.zeros(1, np.float32), clip_norm=1.0, skip_nonfinite=True, **case.settings).rule
    storage = Storage("float32", "float32")
    code = compiled(staged, storage, "measure", architecture)
    # As many vectors under way as there are registers for, and the loop over what is left; of the gradient, for LAMB of
    # the parameter as well.
    assert code.loads == (2 * 2 + 2 if case.name == "lamb" else 8 + 1)
    assert code.spilled == code.local == 0
    assert code.registers <= (80 if case.name == "lamb" else 64)  # two sums of four lanes each, in float64
    assert code.doubles > 0  # sums are float64 on purpose
    code = compiled(staged, storage, "finish", architecture)
    assert code.spilled <= 32 and code.registers <= 128  # one block, some microseconds; `pow` is a call


@both
def test_statistics_stay_in_registers(architecture):
    staged = fastlr.AdamW(np.zeros(1, np.float32), statistics=True, clip_norm=1.0, ema=0.9).rule
    code = compiled(staged, Storage("float32", "float32"), "update", architecture)
    assert (code.loads, code.stores, code.spilled, code.local) == (5, 4, 0, 0)
    assert code.registers <= 128


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float64(case):
    staged = case.make(np.zeros(1), **case.settings).rule
    code = compiled(staged, Storage("float64", "float64"), "update", "sm_90")
    assert code.loads == 2 + len(staged.states) and code.stores == 1 + len(staged.states)
    assert code.spilled == code.local == 0 and code.registers <= 72


def test_nothing_is_contracted():
    """A product and a sum stay two roundings; what is fused belongs to roots and divisions, of which SGD has none."""
    for name in ("sgd", "sgd-nesterov", "lars-decayed"):
        image, _, _ = sass.update(name, "float32", "sm_90")
        codes = [sass.opcode(i) for i in sass.disassembled(image)]
        assert "FMUL" in codes and not any(c.startswith("FFMA") for c in codes)


def test_the_cache_of_machine_code(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLR_CACHE_DIR", str(tmp_path))
    staged, storage = fastlr.SGD(np.zeros(1, np.float32)).rule, Storage("float32", "float32")

    def get(cc=(9, 0), tuning=None):
        tuning = tuning or grid.Tuning()
        content = (staged, storage, tuning)
        return cuda.image_of(lambda t: grid.update(t, staged, storage, tuning, True), "sgd", cc, content)

    def whole(content):
        return caching._MAGIC + hashlib.sha256(content).digest() + content

    first = get()
    (file,) = tmp_path.glob("sgd-*.kernel")
    assert first.log
    again = get()
    assert (again.code, again.entry, again.threads, again.log) == (first.code, first.entry, 256, "")
    get(cc=(8, 0))
    get(tuning=grid.Tuning(threads=128))
    assert len(list(tmp_path.glob("sgd-*.kernel"))) == 3
    for damaged in (file.read_bytes()[:-10], whole(b"hello"), whole(b"update\n256\nhello")):
        file.write_bytes(damaged)
        assert get().log, "it was compiled again"
        assert get().log == ""
    tmp_path.chmod(0o777)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="other users can write to it"):
        assert get().log


def test_the_simulator():
    """The kernels in Numba's simulator, where the threads of a block are threads that really wait for each other."""
    program = Path(__file__).with_name("simulated.py")
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(program.parent)}
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ kernels, the same bits", done.stdout)
