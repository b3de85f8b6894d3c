"""The README's code and the docstrings' examples run as they stand, and the map in CONTRIBUTING.md is up to date."""

from __future__ import annotations

import doctest
import importlib
import linecache
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import fastlr

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
MODULES = [
    "fastlr",
    *(m.name for m in pkgutil.walk_packages(fastlr.__path__, "fastlr.") if m.name != "fastlr.__main__"),
]


@pytest.mark.skipif(not BLOCKS, reason="the README is not beside the tests")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"block_{number}.py"
    script.write_text(BLOCKS[number])
    linecache.clearcache()
    if re.search(r"^import .*torch", BLOCKS[number], re.M):
        pytest.importorskip("torch")
    if BLOCKS[number].startswith("# on a machine with a GPU") and fastlr.gpu.driver.problem() is not None:
        compile(BLOCKS[number], str(script), "exec")
        pytest.skip("this block needs a GPU; it compiles")
    runpy.run_path(str(script))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, monkeypatch):
    monkeypatch.setattr(fastlr.step.threads, "_threads", None)
    if name == "fastlr.kernels.cuda":
        pytest.importorskip("numba_cuda")
    if name.startswith("fastlr.torch"):
        pytest.importorskip("torch")
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    fastlr.bench.competitors.clear()
    assert results.failed == 0


def test_public_names_are_documented():
    for name in fastlr.__all__:
        thing = getattr(fastlr, name)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name


@pytest.mark.parametrize("name", fastlr.optimizers.__all__)
def test_optimizers_state_what_readers_trip_over(name):
    doc = getattr(fastlr, name).__doc__
    for word in ("Args:", "Raises:", "Source:", "Example:", "lr:", "weight_decay", "State", "eps"):
        assert word in doc or (word == "eps" and name == "SGD") or (word == "State" and name == "AdamW"), word
    assert re.search(r"arXiv:|doi:|JMLR|lecture|ICLR", doc)
    assert ">>>" in doc


@pytest.mark.skipif(not (ROOT / "CONTRIBUTING.md").exists(), reason="CONTRIBUTING.md is not beside the tests")
def test_the_map_is_up_to_date():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    generated = runpy.run_path(str(ROOT / "bench" / "map.py"))["generated"]
    assert generated(text) == text, "run python bench/map.py"
