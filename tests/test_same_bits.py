"""The same bits everywhere: NumPy reference, any threads, any tiling, own arrays or flat, one group or many."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import gradients, same
from cases import CASES, ELEMENTWISE, PLAIN, Case

import fastlr
from fastlr.kernels.sums import BLOCK
from fastlr.step import plans

SIZES = [0, 1, 2, 7, 31, 33, 1009, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17]
STEPS = 4
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def trained(case: Case, start, grads, **options):
    params = start.copy()
    opt = case.make(params, **case.settings, **options)
    for g in grads:
        opt.step(g)
    return {"params": params, **opt.state}


@both_dtypes
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_numpy_and_compiled(case: Case, dtype, rng):
    assert case.make(np.zeros(1), **case.settings).rule.exact
    for n in SIZES if case in PLAIN else [1009]:
        start, grads = rng.standard_normal(n).astype(dtype), gradients(rng, n, dtype, STEPS)
        compiled, reference = trained(case, start, grads), trained(case, start, grads, backend="numpy")
        assert compiled.keys() == reference.keys()
        for name, value in compiled.items():
            assert value.dtype == dtype
            assert same(value, reference[name]), f"{name} differs at n={n}"


@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_threads_and_tiles(case: Case, rng, monkeypatch):
    n = 300_007
    start, grads = rng.standard_normal(n).astype(np.float32), gradients(rng, n, np.float32, STEPS)
    monkeypatch.setattr(plans, "_WORTH_WAKING", 0)
    expected = trained(case, start, grads, threads=1)
    reference = trained(case, start, grads, threads=2, backend="numpy")
    assert all(same(reference[name], expected[name]) for name in expected)
    for threads in (2, 4):
        got = trained(case, start, grads, threads=threads)
        assert all(same(got[name], expected[name]) for name in expected), f"{threads} threads"
    for tile in (1_000, 65_536, n + 1):
        monkeypatch.setattr(plans, "BLOCK", tile)
        got = trained(case, start, grads, threads=2)
        assert all(same(got[name], expected[name]) for name in expected), f"tiles of {tile}"


@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_own_arrays_flat_buffer_and_groups(case: Case, rng):
    shapes = {"a": (301,), "b": (7, 11), "c": (), "d": (0,), "e": (BLOCK + 5,), "f": (3,)}
    start = {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()}
    grads = [{k: np.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()} for _ in range(STEPS)]

    def run(params, groups, flat_gradients):
        opt = case.make(params, groups=groups, **case.settings)
        for g in grads:
            opt.step(np.concatenate([x.reshape(-1) for x in g.values()]) if flat_gradients else g)
        return np.concatenate([np.asarray(params[k]).reshape(-1) for k in shapes])

    lr = case.make(np.zeros(1), **case.settings).lr
    expected = run({k: v.copy() for k, v in start.items()}, None, False)
    for groups in (None, {"b": {"lr": lr}, "*": {"lr": lr}, "[ef]": {"lr": lr}}):
        for flat_gradients in (False, True):
            assert same(run({k: v.copy() for k, v in start.items()}, groups, flat_gradients), expected)
            assert same(run(fastlr.flatten(start), groups, flat_gradients), expected)


@both_dtypes
@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
def test_nan_reaches_only_its_own_element(case: Case, dtype, rng):
    start = rng.standard_normal(100).astype(dtype)
    clean = [rng.standard_normal(100).astype(dtype) for _ in range(3)]
    spoilt = [g.copy() for g in clean]
    spoilt[0][42] = np.nan
    a, b = trained(case, start, clean), trained(case, start, spoilt)
    others = np.arange(100) != 42
    assert np.isnan(b["params"][42])
    for name in a:
        assert same(a[name][others], b[name][others])


@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_gradients_are_only_read(case: Case, rng):
    params, g = rng.standard_normal(50), rng.standard_normal(50)
    before = g.copy()
    g.flags.writeable = False
    case.make(params, **case.settings).step(g)
    assert same(g, before)


@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
def test_order_of_elements_does_not_matter(case: Case, rng):
    start, grads = rng.standard_normal(1009).astype(np.float32), gradients(rng, 1009, np.float32, STEPS)
    order = rng.permutation(1009)
    a, b = trained(case, start, grads), trained(case, start[order], [g[order] for g in grads])
    assert all(same(a[name][order], b[name]) for name in a)


def test_centered_rmsprop_of_a_constant_gradient_stays_finite():
    """Rounding takes v - m**2 below zero there; PyTorch's float32 result can be NaN."""
    params = np.zeros(1000, np.float32)
    g = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    opt = fastlr.RMSprop(params, centered=True, alpha=0.5)
    for _ in range(60):
        opt.step(g)
    assert np.isfinite(params).all()
