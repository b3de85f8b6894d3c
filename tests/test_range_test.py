"""The range test: it finds good rates, says so when there are none, and leaves nothing behind."""

from __future__ import annotations

import itertools

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


def noisy(shift, seed=0):
    """A quadratic with noise in loss and gradient, and a number added to the loss."""
    rng = np.random.default_rng(seed)

    def fun(p):
        return float(p @ p / 2 + shift + 0.05 * rng.standard_normal()), p + 0.3 * rng.standard_normal(p.size)

    return fun


def test_a_number_added_to_the_loss_changes_nothing():
    def run(fun):
        return fastlr.find_lr(fastlr.SGD(np.array([1.0, -1.0, 0.5]), backend="numpy"), fun, 1e-4, 100.0)

    expected = run(noisy(0.0))
    assert expected.diverged and 0.02 < expected.suggestion < 2
    for shift in (1.0, -1.12, -2.0, -100.0, 1000.0):
        found = run(noisy(shift))
        assert found.suggestion == expected.suggestion and len(found.lrs) == len(expected.lrs)
        assert found.note == expected.note

    def bounded(shift):  # it can fall, but not explode
        return lambda p: (float(np.tanh(p @ p)) + shift, 2 * p * (1 - np.tanh(p @ p) ** 2))

    first, second = run(bounded(0.0)), run(bounded(-0.7))
    assert first.suggestion == second.suggestion is not None and first.note == second.note


def test_noise_alone_says_nothing():
    rng = np.random.default_rng(0)
    said = [
        fastlr.find_lr(fastlr.SGD(np.zeros(1), backend="numpy"), lambda p: (3 + rng.standard_normal(), p))
        for _ in range(20)
    ]
    assert sum(one.suggestion is not None for one in said) <= 3 and sum(one.diverged for one in said) <= 3


def test_groups_keep_their_proportion():
    schedules = fastlr.schedules
    params = {name: np.zeros(1) for name in "abc"}
    ratios = []

    def fun(p):
        moved = {name: last[name] - p[name].item() for name in p}
        last.update({name: p[name].item() for name in p})
        if moved["a"]:
            ratios.append((moved["b"] / moved["a"], moved["c"] / moved["a"]))
        return 1.0, {name: np.ones(1) for name in p}

    warm = {name: schedules.Constant(lr).warmup(10) for name, lr in (("a", 1.0), ("b", 0.1))}
    for b, c, expected in (
        (warm["b"], 0.5, (0.1, 5.0)),
        (lambda n: 0.01 * (n + 1), schedules.Constant(0.2), (0.1, 2.0)),
    ):
        opt = fastlr.SGD(params, lr=warm["a"], groups={"b": {"lr": b}, "c": {"lr": c}}, backend="numpy")
        last = {name: p.item() for name, p in params.items()}
        fastlr.find_lr(opt, fun, 1e-3, 1.0, 8)
        np.testing.assert_allclose(ratios, [expected] * 7, rtol=1e-9)
        ratios.clear()


def test_a_rate_of_zero_is_said():
    w = {"a": np.ones(1), "b": np.ones(1)}
    for lr in (0.0, fastlr.schedules.Constant(1.0).warmup(10, first_at_start=True)):
        opt = fastlr.SGD(w, lr=lr, groups={"b": {"lr": 0.1}}, backend="numpy")
        with pytest.raises(ValueError, match="the optimizer's lr is 0 at step 0, so the rates of its groups have no"):
            fastlr.find_lr(opt, lambda p: (1.0, p))
        assert opt.lr == lr
        found = fastlr.find_lr(fastlr.SGD(np.ones(3), lr=lr, backend="numpy"), quadratic(1.0), 1e-4, 1e3)
        assert found.suggestion is not None  # no group has a ratio to keep


class StopHereError(BaseException):
    """What nobody expects."""


@pytest.mark.parametrize("own_gradients", [False, True])
def test_an_error_at_any_call_leaves_everything_as_it_was(own_gradients, rng):
    tree = {"w": rng.standard_normal(5), "b": rng.standard_normal(2)}
    lr = fastlr.schedules.Plateau(fastlr.schedules.Cosine(0.1, 50))
    settings = {"ema": 0.9, "shadow": "float16", "loss_scale": fastlr.LossScale(4.0, interval=2)}
    settings["groups"] = {"b": {"lr": lambda n: 0.01}}
    opt = fastlr.Adam(tree, lr=lr, backend="numpy", **settings)
    for _ in range(3):
        opt.step({k: rng.standard_normal(v.shape) for k, v in tree.items()})
    opt.observe(1.0)
    opt.accumulate({"w": np.ones(5), "b": None})
    before, shadow, function = opt.snapshot(), opt.shadow.data.copy(), opt.groups["b"].lr
    own, accumulated = opt.grads.data.copy(), opt._stepper.accumulation.received

    def fails(calls, wrong_shape):
        def fun(params):
            calls.pop()
            if not calls and not wrong_shape:
                raise StopHereError
            grads = {k: 10 * v if calls else v[1:] for k, v in params.items()}
            if own_gradients and calls:
                opt.grads["w"], opt.grads["b"] = grads["w"], grads["b"]
                return 1.0
            return 1.0, grads

        return fun

    for calls, wrong_shape in itertools.product((1, 2, 6), (False, True)):
        with pytest.raises((StopHereError, ValueError)):
            fastlr.find_lr(opt, fails([0] * calls, wrong_shape))
        assert same(opt.snapshot(), before) and np.array_equal(opt.shadow.data, shadow)
        assert opt.lr == lr and opt.groups["b"].lr is function
        assert np.array_equal(opt.grads.data, own) and opt._stepper.accumulation.received == accumulated


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = fastlr.find_lr(fastlr.SGD(np.ones(3), backend="numpy"), quadratic(1.0), 1e-4, 1e2)
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"low": 0.0}, ValueError, "low must be positive and finite, got 0.0."),
        ({"low": 1.0, "high": 0.5}, ValueError, "high must be above 1 and finite, got 0.5."),
        ({"steps": 3}, ValueError, "steps must be at least 5, got 3."),
        ({"smoothing": 1.0}, ValueError, "smoothing must be in [0, 1), got 1.0."),
        ({"diverge": 0.5}, ValueError, "diverge must be at least 1 and finite, got 0.5."),
    ],
)
def test_bad_input(settings, error, message):
    opt = fastlr.SGD(np.ones(3), backend="numpy")
    with pytest.raises(error) as raised:
        fastlr.find_lr(opt, quadratic(1.0), **settings)
    assert message in str(raised.value)
    with pytest.raises(TypeError, match=r"must return \(loss, grads\)"):
        fastlr.find_lr(opt, lambda p: "low")


def test_more_rates_than_anybody_tries_are_refused():
    opt = fastlr.SGD(np.ones(2), backend="numpy")
    with pytest.raises(ValueError, match=r"steps must be at most 1,000,000, got 9007199254740992\."):
        fastlr.find_lr(opt, lambda p: (1.0, p), 1e-5, 1.0, 2**53)
