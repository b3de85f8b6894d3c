"""Compiled kernels on disk: found again, never stale, and no trouble makes a step fail."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import textwrap

import numba
import numpy as np
import pytest

import fastlr
from fastlr import info
from fastlr.kernels import caching
from fastlr.kernels.caching import Entry, KernelCache
from fastlr.kernels.notices import warn_once

posix = pytest.mark.skipif(os.name != "posix", reason="files belong to users in another way there")

STEP = """
import numpy as np, fastlr
p = np.ones(100, np.float32)
opt = fastlr.Adam(p, lr=0.1)
opt.step(np.ones(100, np.float32))
assert abs(p[0] - 0.9) < 1e-6
print("cached" if opt._stepper.kernel().cached else "compiled", opt._stepper.kernel().compile_s)
"""


def outcome(output: str) -> str:
    return output.split()[0]


def test_a_second_process_compiles_nothing(in_subprocess, tmp_path):
    assert outcome(in_subprocess(STEP, FASTLR_CACHE_DIR=str(tmp_path))) == "compiled"
    (file,) = tmp_path.glob("adam-*")
    assert file.suffix == ".kernel"
    before = file.stat().st_mtime_ns
    assert outcome(in_subprocess(STEP, FASTLR_CACHE_DIR=str(tmp_path))) == "cached"
    assert file.stat().st_mtime_ns == before


def test_a_second_step_compiles_nothing():
    opt = fastlr.Adam(np.ones(3))
    opt.step(np.ones(3))
    kernel = opt._stepper.kernel()
    opt.lr = 0.5
    opt.step(np.ones(3))
    other = fastlr.Adam({"a": np.ones(7), "b": np.ones(2)}, eps=1e-3, groups={"b": {"lr": 0.1}})
    other.step({"a": np.ones(7), "b": None})
    assert opt._stepper.kernel() is kernel and other._stepper.kernel() is kernel


RULE = """
import fastlr
@fastlr.rule
def mine(p, g, *, lr{argument}):
    return p - {factor} * lr * g
"""
USE = """
import sys; sys.path.insert(0, {folder!r})
import numpy as np, fastlr, my_rules
p = np.zeros(1)
fastlr.Optimizer(p, my_rules.mine, lr=1.0).step(np.ones(1))
print(p[0])
"""


def test_an_edited_rule_never_gets_the_old_kernel(in_subprocess, tmp_path):
    """In an imported module, as Numba's own cache gets wrong; even with the file's time and size unchanged."""
    source = tmp_path / "my_rules.py"
    for factor in ("2.0", "3.0", "2.0"):
        source.write_text(RULE.format(factor=factor, argument=""))
        os.utime(source, (1e9, 1e9))
        out = in_subprocess(
            USE.format(folder=str(tmp_path)), FASTLR_CACHE_DIR=str(tmp_path / "c"), PYTHONDONTWRITEBYTECODE="1"
        )
        assert float(out) == -float(factor)
    assert len(list((tmp_path / "c").glob("mine-*"))) == 2


def test_another_flag_never_gets_the_old_kernel(in_subprocess, tmp_path):
    program = """
import numpy as np, fastlr
def run(backend):
    out = []
    for settings in [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.5},
                     {"weight_decay": 0.5, "decoupled_weight_decay": True}]:
        for dtype in ("float32", "float64"):
            p = np.ones(3, dtype)
            opt = fastlr.Adam(p, lr=0.1, backend=backend, **settings)
            for g in (4.0, 1.0, -0.5):
                opt.step(np.full(3, g, dtype))
            out.append(p.tolist())
    return out
assert run("numba") == run("numpy")
"""
    for _ in range(2):
        in_subprocess(program, FASTLR_CACHE_DIR=str(tmp_path))


def test_kernels_of_several_processes_in_one(in_subprocess, tmp_path):
    """Numba's symbols count from one in each process: kernels must not be mistaken for one another."""
    one = "import numpy as np, fastlr; fastlr.{0}(np.ones(2){1}).step(np.ones(2))"
    settings = [("Adam", ", amsgrad=True"), ("AdamW", ""), ("RMSprop", ""), ("SGD", ", momentum=0.9"), ("Adagrad", "")]
    for name, arguments in settings:
        in_subprocess(one.format(name, arguments), FASTLR_CACHE_DIR=str(tmp_path))
    lines = [
        "import numpy as np, fastlr",
        *(
            f"a, b = np.ones(2), np.ones(2); x = fastlr.{n}(a{s}); y = fastlr.{n}(b{s}, backend='numpy')\n"
            "for g in (2.0, -1.0): x.step(np.full(2, g)); y.step(np.full(2, g))\n"
            f"assert x._stepper.kernel().cached and (a == b).all(), {n!r}"
            for n, s in settings
        ),
    ]
    in_subprocess("\n".join(lines), FASTLR_CACHE_DIR=str(tmp_path))


@posix
def test_a_folder_that_cannot_be_written(in_subprocess, tmp_path):
    (tmp_path / "file").write_text("")
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np, fastlr
    for make in (fastlr.Adam, fastlr.SGD):
        make(np.ones(3)).step(np.ones(3))
assert len(caught) == 1, [str(w.message) for w in caught]
print(caught[0].category.__name__, caught[0].message)
"""
    out = in_subprocess(program, FASTLR_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert out.startswith("RuntimeWarning") and "cannot be used to keep compiled kernels" in out
    assert "Set FASTLR_CACHE_DIR to a folder that can be written" in out


@pytest.mark.parametrize("damage", ["cut short", "empty", "changed", "not ours"])
def test_a_damaged_file_is_compiled_again(damage, in_subprocess, tmp_path):
    in_subprocess(STEP, FASTLR_CACHE_DIR=str(tmp_path))
    (file,) = tmp_path.glob("adam-*")
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    file.write_bytes({"cut short": whole[:-100], "empty": b"", "changed": bytes(changed), "not ours": b"hello"}[damage])
    assert outcome(in_subprocess(STEP, FASTLR_CACHE_DIR=str(tmp_path))) == "compiled"
    assert outcome(in_subprocess(STEP, FASTLR_CACHE_DIR=str(tmp_path))) == "cached"


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps((1, 2, 3), 0), pickle.dumps(None, 0)])
def test_a_whole_file_that_nobody_understands_is_compiled_again(content, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLR_CACHE_DIR", str(tmp_path))
    entry = Entry("adam", "x")
    entry.write(content)
    assert entry.load(bytes) == content
    cache = KernelCache("adam", "x")
    assert cache.load_overload(None, numba.core.registry.cpu_target.target_context) is None and not cache.hit
    entry.write(b"good")
    assert entry.load(bytes) == b"good"


def planted(path, program="raise SystemExit(3)"):
    """A file that runs a program where it is unpickled, of the right name and with the right digest."""

    class Planted:
        def __reduce__(self):
            return exec, (program,)

    body = pickle.dumps(Planted())
    path.write_bytes(caching._MAGIC + hashlib.sha256(body).digest() + body)
    path.chmod(0o600)


def loaded(cache):
    return cache.load_overload(None, numba.core.registry.cpu_target.target_context)


def used_in_vain(*names):
    for name in names:
        cache = KernelCache(name, "x")
        assert loaded(cache) is None and not cache.hit
        cache._entry.write(b"hello")
        assert cache._entry.load(bytes) is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in a folder of this user's own, with something in it that says so when it is unpickled."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("FASTLR_CACHE_DIR", str(folder))
    warn_once.cache_clear()
    cache = KernelCache("adam", "x")
    planted(cache._entry.file)
    with pytest.raises(SystemExit):  # here it is run
        loaded(cache)
    return cache


def not_used(cache, *words):
    """Nothing is read from the folder and nothing written to it, and a warning says why, once."""
    with pytest.warns(RuntimeWarning) as caught:
        used_in_vain("adam", "sgd")
    (message,) = {str(w.message) for w in caught}
    assert len(caught) == 1 and all(word in message for word in words), message
    assert "Set FASTLR_CACHE_DIR to a folder of your own" in message and cache.cache_path in message
    assert "not used" in info._cache() and words[0] in info._cache()
    assert len(os.listdir(cache.cache_path)) == 1


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(mode, cache):
    os.chmod(cache.cache_path, mode)
    not_used(cache, "other users can write to it", f"mode {mode:04o}", "chmod go-w")


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_others_is_not_used(cache, monkeypatch):
    file = cache._entry.file
    os.chown(file, 12345, -1)
    assert loaded(cache) is None
    os.chown(file, 0, -1)
    os.chown(cache.cache_path, 12345, -1)
    not_used(cache, "it belongs to another user (uid 12345)")
    os.chown(cache.cache_path, 0, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(SystemExit):  # an administrator may fill a folder for everyone
        loaded(cache)


@posix
def test_a_file_that_others_can_write_to_is_replaced(cache):
    for mode in (0o660, 0o606):
        cache._entry.file.chmod(mode)
        assert loaded(cache) is None
    cache._entry.write(b"ours")
    assert cache._entry.load(bytes) == b"ours"
    assert cache._entry.file.stat().st_mode & 0o777 == 0o600


@posix
def test_a_link_to_a_file_is_not_followed(cache, tmp_path):
    os.rename(cache._entry.file, tmp_path / "elsewhere")
    cache._entry.file.symlink_to(tmp_path / "elsewhere")
    assert loaded(cache) is None
    cache._entry.write(b"ours")
    assert cache._entry.load(bytes) == b"ours" and not cache._entry.file.is_symlink()


@posix
def test_the_folder_is_made_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLR_CACHE_DIR", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        Entry("adam", "x").write(b"hello")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert Entry("adam", "x").load(bytes) == b"hello"


@posix
def test_without_a_home_kernels_are_not_kept(monkeypatch):
    for name in ("FASTLR_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no home directory. Set FASTLR_CACHE_DIR to a folder") as caught:
        used_in_vain("adam", "sgd")
    KernelCache("adam", "x").flush()
    assert len(caught) == 1
    assert "no home directory" in info._cache()


def test_eight_processes_fill_a_cold_cache(tmp_path):
    env = {**os.environ, "FASTLR_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", STEP], env=env, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    for process in running:
        process.communicate(timeout=240)
        assert process.returncode == 0
    assert len(list(tmp_path.glob("adam-*"))) == 1 and {f.suffix for f in tmp_path.iterdir()} == {".kernel"}


def test_spawned_processes_use_it(in_subprocess, tmp_path):
    source = tmp_path / "job.py"
    source.write_text(
        textwrap.dedent("""
        import multiprocessing
        import numpy as np, fastlr
        def work(k):
            p = np.zeros(4)
            opt = fastlr.SGD(p, lr=1.0)
            opt.step(np.full(4, float(k)))
            return p[0], opt._stepper.kernel().cached
        if __name__ == "__main__":
            work(0)
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                assert pool.map(work, [1, 2]) == [(-1.0, True), (-2.0, True)]
        """)
    )
    done = subprocess.run(
        [sys.executable, str(source)], env={**os.environ, "FASTLR_CACHE_DIR": str(tmp_path / "c")}, timeout=240
    )
    assert done.returncode == 0


def test_the_thread_count_is_not_in_the_key(in_subprocess, tmp_path):
    many = STEP.replace("lr=0.1", "lr=0.1, threads=2")
    assert outcome(in_subprocess(STEP, FASTLR_CACHE_DIR=str(tmp_path))) == "compiled"
    assert outcome(in_subprocess(many, FASTLR_CACHE_DIR=str(tmp_path))) == "cached"


def test_warmup_compiles_ahead(in_subprocess, tmp_path):
    program = "import fastlr; print(fastlr.warmup(fastlr.Adam, dtypes=['float32', 'float64'], amsgrad=True))"
    out = in_subprocess(program, FASTLR_CACHE_DIR=str(tmp_path))
    assert "Adam float32" in out and "Adam float64" in out
    assert len(list(tmp_path.glob("adam-*.kernel"))) == 2 and len(list(tmp_path.glob("arrays-*.kernel"))) == 1
    use = STEP.replace("lr=0.1", "lr=0.1, amsgrad=True")
    assert outcome(in_subprocess(use, FASTLR_CACHE_DIR=str(tmp_path))) == "cached"


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTLR_CACHE_DIR", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert caching.folder() == tmp_path / "numba" / "fastlr"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert caching.folder() == tmp_path / "xdg" / "fastlr"
    monkeypatch.setenv("FASTLR_CACHE_DIR", str(tmp_path / "own"))
    assert caching.folder() == tmp_path / "own"
    assert KernelCache("adam", "x").cache_path == str(tmp_path / "own")
    assert KernelCache("adam", "x")._entry.file != KernelCache("adam", "y")._entry.file


def test_numba_that_is_told_not_to_compile(in_subprocess):
    """NumPy takes over everywhere, and one warning says so."""
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np, fastlr
    for make in (fastlr.Adam, fastlr.LAMB):
        p, q = np.ones(100), np.ones(100)
        opt, other = make(p), make(q, backend="numpy")
        for _ in range(2): opt.step(q); other.step(q)
        assert (p == q).all() and p[0] < 1.0
    assert fastlr.warmup(fastlr.SGD)
    rate = fastlr.schedules.Cosine(1.0, steps=10)
    assert rate(np.arange(11))[10] == rate(10)
    w = np.array([3.0, 4.0])
    fastlr.LBFGS(w).minimize(lambda x: (float(np.sum(x**2)), 2 * x))
    assert abs(w).max() < 1e-4
    try:
        import torch, fastlr.torch
    except ImportError:
        pass
    else:
        leaf = torch.nn.Parameter(torch.ones(3))
        opt = fastlr.torch.SGD([leaf], lr=0.5)
        leaf.grad = torch.ones(3)
        opt.step(); opt.step()
        assert leaf.tolist() == [0.0] * 3
print([str(w.message) for w in caught if "NUMBA" in str(w.message)])
"""
    (line,) = in_subprocess(program, NUMBA_DISABLE_JIT="1").splitlines()
    assert line.count("NUMBA_DISABLE_JIT is set, so nothing is compiled: NumPy makes the steps") == 1


def test_import_compiles_nothing_and_is_quick(in_subprocess, tmp_path):
    program = """
import sys, time
import numba, numpy
began = time.perf_counter()
import fastlr
took = time.perf_counter() - began
assert not any(name in sys.modules for name in ("torch", "rich", "safetensors", "matplotlib"))
from numba.core.dispatcher import Dispatcher
import gc
ours = [x for x in gc.get_objects() if isinstance(x, Dispatcher) and x.py_func.__module__.startswith("fastlr")]
assert not any(x.overloads for x in ours)
print(took)
"""
    assert float(in_subprocess(program, FASTLR_CACHE_DIR=str(tmp_path))) < 5
    assert not list(tmp_path.iterdir())
