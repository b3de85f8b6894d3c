"""The range test: it finds good rates, says so when there are none, and leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest

import fastlr


def quadratic(curvature):
    def fun(p):
        return float(np.sum(curvature * p**2) / 2), curvature * p

    return fun


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)


@pytest.mark.parametrize("curvature", [0.1, 1.0, 30.0])
def test_a_quadratic(curvature):
    """Gradient descent converges below 2 / curvature, fastest at 1 / curvature."""
    w = np.full(5, 3.0)
    found = fastlr.find_lr(fastlr.SGD(w, backend="numpy"), quadratic(curvature), 1e-6, 1e4, 200)
    assert found.diverged
    assert 0.02 / curvature < found.suggestion < 2 / curvature
    assert 0.02 / curvature < found.steepest < 2 / curvature
    assert found.minimum_tenth < 2 / curvature
    assert np.array_equal(w, np.full(5, 3.0)) and "begin with" in repr(found)


def test_digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    params = {"w": (0.01 * rng.standard_normal((64, 10))).astype(np.float32), "b": np.zeros(10, np.float32)}

    def fun(p):
        batch = rng.integers(0, len(x), 64)
        z = x[batch] @ p["w"] + p["b"]
        d = np.exp(z - z.max(1, keepdims=True))
        d /= d.sum(1, keepdims=True)
        loss = -np.log(d[np.arange(64), y[batch]]).mean()
        d[np.arange(64), y[batch]] -= 1
        return loss, {"w": x[batch].T @ d / 64, "b": d.mean(0)}

    opt = fastlr.SGD(params, momentum=0.9, backend="numpy")
    found = fastlr.find_lr(opt, fun, 1e-4, 100.0, 120)
    assert found.suggestion is not None and 0.003 < found.suggestion < 3

    def trained(lr):
        copy = {k: v.copy() for k, v in params.items()}
        opt = fastlr.SGD(copy, lr=lr, momentum=0.9, backend="numpy")
        return np.mean([opt.step(g) and loss for loss, g in (fun(copy) for _ in range(60))][-10:])

    assert trained(found.suggestion) < 0.7 * trained(found.suggestion / 100)


def test_everything_is_as_it_was(rng):
    tree = {"w": rng.standard_normal(30), "b": rng.standard_normal(4)}
    lr = fastlr.schedules.Cosine(0.1, 50)
    settings = {"clip_norm": 1.0, "ema": 0.9, "shadow": "float16", "skip_nonfinite": True}
    opt = fastlr.Adam(tree, lr=lr, groups={"b": {"lr": 0.01}}, backend="numpy", **settings)
    for _ in range(3):
        opt.step({k: rng.standard_normal(v.shape) for k, v in tree.items()})
    opt.grads["w"] = np.arange(30.0)
    before, shadow = opt.snapshot(), opt.shadow.data.copy()

    def fills(params):
        assert params is tree
        opt.grads["w"] = 10 * params["w"]
        opt.grads["b"] = params["b"]
        return float(sum(5 * np.sum(v**2) for v in params.values()))

    found = fastlr.find_lr(opt, fills, 1e-4, 1e3)
    assert len(found.lrs) > 20
    assert same(opt.snapshot(), before) and np.array_equal(opt.shadow.data, shadow)
    assert opt.lr == lr and opt.groups["b"].lr == 0.01
    assert np.array_equal(opt.grads["w"], np.arange(30.0)) and not opt.grads["b"].any()

    def breaks(params):
        opt.grads["w"] = params["w"]
        if fails.pop():
            raise KeyError("out of batches")
        return 1.0

    fails = [True, False, False]
    with pytest.raises(KeyError, match="out of batches"):
        fastlr.find_lr(opt, breaks)
    assert same(opt.snapshot(), before) and opt.lr == lr


def test_curves_that_say_nothing():
    flat = fastlr.find_lr(fastlr.SGD(np.ones(3), backend="numpy"), lambda p: (1.0, 0 * p))
    assert flat.suggestion is None and flat.steepest is None and "try larger rates" in flat.note
    bad = fastlr.find_lr(fastlr.SGD(np.ones(3), backend="numpy"), lambda p: (float("nan"), p))
    assert bad.suggestion is None and bad.diverged and "try smaller rates" in bad.note


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = fastlr.find_lr(fastlr.SGD(np.ones(3), backend="numpy"), quadratic(1.0), 1e-4, 1e2)
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"low": 0.0}, ValueError, "low must be above 0 and finite, got 0.0."),
        ({"low": 1.0, "high": 0.5}, ValueError, "high must be above 1 and finite, got 0.5."),
        ({"steps": 3}, ValueError, "steps must be at least 5, got 3."),
        ({"smoothing": 1.0}, ValueError, "smoothing must be between 0 and 1, exclusive, got 1.0."),
        ({"diverge": 1.0}, ValueError, "diverge must be above 1 and finite"),
    ],
)
def test_bad_input(settings, error, message):
    opt = fastlr.SGD(np.ones(3), backend="numpy")
    with pytest.raises(error) as raised:
        fastlr.find_lr(opt, quadratic(1.0), **settings)
    assert message in str(raised.value)
    with pytest.raises(TypeError, match=r"must return \(loss, grads\)"):
        fastlr.find_lr(opt, lambda p: "low")
