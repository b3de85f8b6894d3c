"""pytest-benchmark suites: `pytest bench --benchmark-group-by=group`. They time; they assert nothing about time.

`fastlr bench` is the report against NumPy, PyTorch and the speed of memory; these follow one change through time
(`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cases import CASES, PLAIN, Case

import fastlr
from fastlr.bench.steps import FULL
from fastlr.options import EXAMPLES, with_trees


@pytest.mark.parametrize("n", [1_000, 100_000, 4_000_000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_step(benchmark, case: Case, dtype, n):
    """A step from `opt.grads` over one flat buffer."""
    benchmark.group = f"step {dtype} n={n}"
    rng = np.random.default_rng(0)
    opt = case.make(fastlr.flatten([rng.standard_normal(n).astype(dtype)]), **case.settings)
    opt.grads.data[:] = rng.standard_normal(n)
    opt.step()
    benchmark(opt.step)


@pytest.mark.parametrize("n", [1_000, 100_000, 4_000_000])
@pytest.mark.parametrize("option", ["none", *EXAMPLES, "all"])
def test_options(benchmark, option, n):
    """AdamW with each option by itself, and the whole step."""
    benchmark.group = f"options n={n}"
    settings = FULL.settings if option == "all" else {n: x for n, x in EXAMPLES.items() if n == option}
    params = fastlr.flatten([np.random.default_rng(0).standard_normal(n).astype(np.float32)])
    opt = fastlr.AdamW(params, **with_trees(settings, lambda x: params.like(np.full(n, x, np.float32))))
    opt.grads.data[:] = 0.1
    opt.step()
    benchmark(opt.step)


@pytest.mark.parametrize("leaves", [1, 10, 148, 3_000])
@pytest.mark.parametrize("fresh", [False, True], ids=["same arrays", "fresh arrays"])
def test_gradients_as_a_tree(benchmark, leaves, fresh):
    """What it costs to take the gradients: 100 elements a leaf."""
    benchmark.group = f"tree of {leaves}"
    params = {f"w{k}": np.zeros(100, np.float32) for k in range(leaves)}
    sets = [{k: np.ones(100, np.float32) for k in params} for _ in range(2)]
    opt = fastlr.Adam(params)
    turn = 0

    def step():
        nonlocal turn
        turn ^= fresh
        opt.step(sets[turn])

    step()
    benchmark(step)


@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_decide_for_ten_thousand_groups(benchmark, case: Case):
    """A population of 10,000 models of one parameter each: nearly all of it is `decide`."""
    fleet = fastlr.flatten({"w": np.ones(1)}, population=10_000)
    opt = case.make(fleet, **{**case.settings, "lr": np.geomspace(1e-5, 1e-1, 10_000)})
    opt.grads.data[:] = 1.0
    opt.step()
    benchmark(opt.step)


def test_a_new_rate_each_step(benchmark):
    """Setting `opt.lr` between steps, as a schedule does."""
    opt = fastlr.Adam(np.zeros(1_000, np.float32))
    g = np.ones(1_000, np.float32)

    def step():
        opt.lr = 1e-3
        opt.step(g)

    step()
    benchmark(step)


@pytest.mark.parametrize("what", ["numba alone", "import", "first step"])
def test_a_new_process(benchmark, what):
    """Seconds of a process that imports Numba, imports fastlr, or also makes a first step from a warm cache."""
    benchmark.group = "new process"
    program = {
        "numba alone": "import numba, numpy",
        "import": "import numba, numpy, fastlr",
        "first step": "import numba, numpy, fastlr; fastlr.Adam(numpy.ones(9)).step(numpy.ones(9))",
    }[what]
    benchmark.pedantic(
        subprocess.run, args=([sys.executable, "-c", program],), kwargs={"check": True}, rounds=5, warmup_rounds=1
    )
