"""The report: what it measures, what it shows, and what it refuses."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import fastlr
from fastlr import bench, cli
from fastlr.bench import candidates, measuring, report
from fastlr.options import EXAMPLES

KEYS = {"impl", "rule", "device", "dtype", "n", "leaves", "threads", "mode", "p10_s", "p50_s", "p90_s"}
KEYS |= {"ns_per_param", "gb_per_s", "compile_s", "commit", "date", "cpu", "versions"}


@pytest.fixture(scope="module")
def rows():
    return bench.run(sizes=[1_000], leaves=[1, 7], seconds=0.0, threads=1, quiet=True)


def test_every_optimizer_is_measured(rows):
    assert {row["rule"] for row in rows} == {name.lower() for name in fastlr.optimizers.__all__}
    for row in rows:
        assert KEYS <= row.keys()
        assert 0 < row["p10_s"] <= row["p50_s"] <= row["p90_s"]
        assert row["ns_per_param"] == pytest.approx(row["p50_s"] * 1e6)
    for rule in ("adam", "rmsprop", "sgd"):
        assert {"fastlr", "numpy", "roofline"} <= {row["impl"] for row in rows if row["rule"] == rule}
    adam = next(r for r in rows if r["rule"] == "adam" and r["impl"] == "fastlr")
    assert adam["gb_per_s"] * adam["p50_s"] * 1e9 == pytest.approx(28 * 1_000)
    assert json.loads(json.dumps(rows)) == rows


def test_torch_is_measured_where_it_has_a_fused_kernel(rows):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert {r["rule"] for r in rows if r["impl"] == "torch_fused"} == candidates.FUSED_IN_TORCH


@pytest.mark.parametrize("rule", sorted(candidates.BY_HAND))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [64, None])
def test_numpy_by_hand_is_right(rule, dtype, block):
    problem = candidates.Problem(rule, 1_003, 3, dtype, 1)
    by_hand, reference = candidates.numpy_candidate(problem, block), candidates.fastlr_candidate(problem, "numpy")
    for _ in range(10):
        by_hand.step()
        reference.step()
    np.testing.assert_allclose(by_hand.params(), reference.params(), rtol=0, atol=1e-6 if dtype == "float32" else 1e-13)


def test_a_wrong_answer_is_not_timed():
    def wrong(problem):
        candidate = candidates.fastlr_candidate(problem)
        candidate.params()[0] += 1.0
        return candidate

    problem = candidates.Problem("adam", 100, 1, "float32", 1)
    with pytest.raises(RuntimeError, match="fastlr does not agree with the reference on adam"):
        measuring.check(problem, wrong, "fastlr", candidates.fastlr_candidate)


@pytest.mark.parametrize(("kind", "leaves"), [("full", 1), ("full", 3), ("target", 10), ("options", 1)])
def test_whole_steps(kind, leaves):
    """Each is checked against the reference before it is timed, so that all do the same."""
    rows = bench.run(sizes=[1_000], leaves=[leaves], seconds=0.0, threads=1, quiet=True, step=kind)
    found = {row["impl"] for row in rows}
    expected = {
        "full": {"fastlr", "torch_calls", "optax", "roofline"},
        "target": {"fastlr", "torch_calls"},
        "options": {"fastlr", *(f"+ {name}" for name in EXAMPLES)},
    }[kind]
    missing = {n for n, module in (("torch_calls", "torch"), ("optax", "optax")) if find_spec(module) is None}
    assert found == expected - missing - ({"roofline"} if leaves > 1 else set())
    assert all(row["mode"] == kind and row["relative"] > 0 for row in rows)
    header, lines = report.option_table(rows) if kind == "options" else report.table(rows)
    assert len(lines) == len(rows) and all(len(line) == len(header) for line in lines)


def test_whole_steps_that_are_not_measured():
    with pytest.raises(ValueError, match="step 'full' is measured for adamw in float32, alone"):
        bench.run(["sgd"], [1_000], step="full", quiet=True)
    with pytest.raises(TypeError, match="step 'half' is not known; there are update, full, options, target"):
        bench.run(sizes=[1_000], step="half", quiet=True)


def test_in_a_loop():
    rows = bench.run(["sgd"], [1_000], in_loop=True, seconds=0.0, threads=1, quiet=True)
    assert {r["mode"] for r in rows} >= {"in_loop_matmul"}
    for row in rows:
        assert row["alone_p50_s"] > 0 and row["neighbour_p50_s"] > 0 and row["neighbour_alone_p50_s"] > 0
    _, lines = report.loop_table(rows)
    assert len(lines) == len(rows)


def test_competitors(monkeypatch):
    monkeypatch.setattr(bench, "competitors", [])
    monkeypatch.setattr(measuring, "competitors", bench.competitors)
    bench.add("mine", lambda n, dtype: np.zeros(n, dtype), lambda a: a.fill(1), 4, rules=["sgd"])
    rows = bench.run(["sgd", "adagrad"], [100], seconds=0.0, quiet=True)
    (row,) = [r for r in rows if r["impl"] == "mine"]
    assert row["rule"] == "sgd" and row["gb_per_s"] * row["p50_s"] * 1e9 == pytest.approx(400)
    for taken in ("mine", "fastlr", "roofline"):
        with pytest.raises(ValueError, match="there is an implementation called"):
            bench.add(taken, lambda n, dtype: None, lambda a: None, 4)


def test_command_line(capsys, tmp_path, monkeypatch):
    out = tmp_path / "new.json"
    arguments = ["bench", "--rules", "sgd", "--sizes", "1k", "--threads", "1", "--seconds", "0.01", "--json", str(out)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "sgd" in shown and "fastlr" in shown and "roofline" in shown and "rows written to" in shown
    assert cli.main([*arguments, "--compare", str(out)]) == 0
    assert "Changed since" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert cli.main(arguments) == 0
    assert "implementation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "adagard"], "rule 'adagard' is not known; there are lamb, lars, sgd"),
        (["--dtype", "float16"], "dtype 'float16' is not known"),
        (["--compare", "{file}"], "is not a file written by fastlr bench --json"),
        (["--compare", "missing.json"], "No such file"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--leaves", "9000", "--sizes", "100"], "nothing to measure"),
    ],
)
def test_command_line_refuses(arguments, message, capsys, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    arguments = [a.format(file=tmp_path / "x.json") for a in arguments]
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["0", "-1", "many", "1.5"])
def test_sizes_that_are_none(sizes, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--sizes", sizes])
    assert "is not a positive whole number" in capsys.readouterr().err


def test_sizes():
    assert cli._counts("1_000, 25M,1k,1e6") == [1_000, 25_000_000, 1_000, 1_000_000]


def test_info_and_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "fastlr", "info"], capture_output=True, text=True, check=True)
    for word in ("fastlr", "numba", "vector width", "threads", "kernel cache", "gpu"):
        assert word in done.stdout
    assert re.search(r"^gpu +(none: |<cuda:0)", done.stdout, re.M)


ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.skipif(not (ROOT / "bench" / "gpu.py").exists(), reason="the benchmark is not beside the tests")
def test_the_command_for_a_gpu_goes_through(tmp_path):
    """On an emulated device, with arrays that are far too small: what it prints means nothing, that it runs does."""
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("gpu-*.json")
    found = json.loads(file.read_text())
    assert found["system"]["gpu"] == "none: emulated" and "commit" in found["system"]
    modes = {row["mode"] for row in found["rows"]}
    assert modes == {"copy", "adam", "adam GPT-2", "adam ResNet-50", "full GPT-2", "full ResNet-50", "full"}
    assert {row["leaves"] for row in found["rows"]} == {1, 148, 161}
    readme = runpy.run_path(str(ROOT / "bench" / "readme.py"), run_name="readme")
    table = readme["gpu"](file)
    assert "| adam GPT-2 |" in table and "none: emulated, driver" in table
    assert "not yet run or timed on a GPU" in readme["gpu"](None)


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.skipif(not (ROOT / "bench" / "pytorch.py").exists(), reason="the benchmark is not beside the tests")
def test_the_benchmark_beside_pytorch_goes_through(tmp_path):
    """Tiny: candidates are checked against each other, and the README's table can be made of it."""
    command = [sys.executable, "-m", "bench.pytorch", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("torch-*.json")
    rows = json.loads(file.read_text())["rows"]
    by_case: dict[str, set[str]] = {}
    for row in rows:
        by_case.setdefault(row["case"], set()).add(row["impl"])
    assert len(by_case) == 6 and all("fastlr" in found and len(found) > 1 for found in by_case.values())
    readme = runpy.run_path(str(ROOT / "bench" / "readme.py"), run_name="readme")
    assert readme["torch_optimizers"](file).count("| many small tensors: AdamW |") == 1
