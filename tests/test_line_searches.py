"""Line search and L-BFGS, beside SciPy's on the standard test functions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastlr
from fastlr.kernels import vectors
from fastlr.kernels.sums import BLOCK

scipy_optimize = pytest.importorskip("scipy.optimize")


def rosenbrock(p):
    return float(scipy_optimize.rosen(p)), scipy_optimize.rosen_der(p)


def quadratic(p):
    scale = np.arange(1.0, p.size + 1)
    return float(p @ (scale * p)) / 2, scale * p


def beale(p):
    x, y = p
    a, b, c = 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3
    grads = [2 * a * (y - 1) + 2 * b * (y**2 - 1) + 2 * c * (y**3 - 1), 2 * a * x + 4 * b * x * y + 6 * c * x * y**2]
    return a * a + b * b + c * c, np.array(grads)


def powell(p):
    a, b, c, d = p
    r = np.array([a + 10 * b, np.sqrt(5) * (c - d), (b - 2 * c) ** 2, np.sqrt(10) * (a - d) ** 2])
    jacobian = np.array(
        [
            [1, 10, 0, 0],
            [0, 0, np.sqrt(5), -np.sqrt(5)],
            [0, 2 * (b - 2 * c), -4 * (b - 2 * c), 0],
            [2 * np.sqrt(10) * (a - d), 0, 0, -2 * np.sqrt(10) * (a - d)],
        ]
    )
    return float(r @ r), 2 * jacobian.T @ r


FUNCTIONS = {
    "rosenbrock": (rosenbrock, [-1.2, 1.0]),
    "rosenbrock of 20": (rosenbrock, np.tile([-1.2, 1.0], 10)),
    "quadratic of 50": (quadratic, np.linspace(-3, 4, 50)),
    "beale": (beale, [1.0, 1.0]),
    "powell": (powell, [3.0, -1.0, 0.0, 1.0]),
}


def counted(fun):
    calls = []

    def inner(p):
        calls.append(np.array(p))
        return fun(p)

    return inner, calls


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wolfe_beside_scipy(name):
    fun, start = FUNCTIONS[name]
    start = np.array(start, float)
    direction = -fun(start)[1]
    theirs = scipy_optimize.line_search(lambda p: fun(p)[0], lambda p: fun(p)[1], start, direction)
    inner, calls = counted(fun)
    params = start.copy()
    found = fastlr.line_search(inner, params, direction)
    assert found.success and found.evaluations == len(calls)
    np.testing.assert_allclose(params, start + found.step * direction, rtol=1e-14)
    f0, g0 = fun(start)
    f, g = fun(params)
    assert found.loss == f and np.array_equal(found.grads, g)
    assert f <= f0 + 1e-4 * found.step * (g0 @ direction)
    assert abs(g @ direction) <= 0.9 * abs(g0 @ direction)
    assert found.evaluations <= theirs[1] + theirs[2] + 3
    assert theirs[0] is None or 0.05 < found.step / theirs[0] < 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_armijo(name):
    fun, start = FUNCTIONS[name]
    start = np.array(start, float)
    f0, g0 = fun(start)
    params = start.copy()
    found = fastlr.line_search(fun, params, -g0, "armijo", first=4.0)
    assert found.success and fun(params)[0] <= f0 - 1e-4 * found.step * (g0 @ g0)


@pytest.mark.parametrize("method", ["wolfe", "armijo"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lbfgs_beside_scipy(name, method):
    fun, start = FUNCTIONS[name]
    theirs = scipy_optimize.minimize(fun, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-6, "ftol": 0})
    inner, calls = counted(fun)
    params = np.array(start, float)
    opt = fastlr.LBFGS(params, method=method)
    info = opt.minimize(inner, grad_tolerance=1e-6)
    assert info.loss <= theirs.fun + 1e-9 and np.abs(fun(params)[1]).max() <= 1e-6
    assert len(calls) <= 2 * theirs.nfev + 10
    assert info.step <= 2 * theirs.nit + 10


def test_digits_in_float32():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    buffer = fastlr.flatten({"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)})

    def fun(p):
        z = x @ p["w"] + p["b"]
        d = np.exp(z - z.max(1, keepdims=True))
        d /= d.sum(1, keepdims=True)
        loss = -np.log(d[np.arange(len(y)), y] + 1e-30).mean() + 1e-4 * float(np.sum(p["w"] ** 2))
        d[np.arange(len(y)), y] -= 1
        return loss, {"w": x.T @ d / np.float32(len(y)) + np.float32(2e-4) * p["w"], "b": d.mean(0)}

    opt = fastlr.LBFGS(buffer)
    losses = [opt.step(fun).loss for _ in range(40)]
    assert losses[-1] < 0.2 < 1.0 < losses[0] and all(b <= a for a, b in itertools.pairwise(losses))

    def fills(p):
        loss, grads = fun(p)
        opt.grads["w"], opt.grads["b"] = grads["w"], grads["b"]
        return loss

    assert opt.step(fills).loss <= losses[-1]


def test_saved_and_continued():
    fun, start = FUNCTIONS["rosenbrock of 20"]
    params = np.array(start, float)
    opt = fastlr.LBFGS(params, history=4)
    for _ in range(7):
        opt.step(fun)
    other = params.copy()
    again = fastlr.LBFGS(other, history=4)
    again.load_state_dict({k: v.copy() for k, v in opt.state_dict().items()})
    for _ in range(7):
        assert opt.step(fun) == again.step(fun)
    assert np.array_equal(params, other) and "4 remembered" in repr(opt)
    with pytest.raises(ValueError, match="it has no 'steps'"):
        again.load_state_dict({})
    with pytest.raises(ValueError, match="'grads' in the state is"):
        again.load_state_dict({**opt.state_dict(), "grads": np.zeros(3)})
    before = again.state_dict()
    for name, value in (
        ("steps", np.array(-1)),
        ("steps", np.array(2.0)),
        ("steps", np.array([1, 2])),
        ("loss", np.array("low")),
        ("loss", np.array([1.0, 2.0])),
        ("s", np.array(1.0)),
        ("s", before["s"][:1]),
        ("y", before["y"] * 0),
        ("y", before["y"] * np.nan),
    ):
        with pytest.raises(ValueError, match="in the state"):
            again.load_state_dict({**before, "steps": np.array(5), name: value})
        assert all(np.array_equal(before[k], v) for k, v in again.state_dict().items())


# What goes wrong is said, and undone


def test_no_descent():
    w = np.array([1.0, 2.0])
    found = fastlr.line_search(quadratic, w, np.array([1.0, 1.0]))
    assert not found.success and found.step == 0 and "no descent direction" in found.message
    assert w.tolist() == [1.0, 2.0] and found.evaluations == 1


@pytest.mark.parametrize("method", ["wolfe", "armijo"])
def test_not_a_number(method):
    w = np.array([1.0])
    always = fastlr.line_search(lambda p: (float("nan"), p), w, np.array([-1.0]), method)
    assert not always.success and "the loss at the start is nan" in always.message and w[0] == 1.0

    def cliff(p):  # defined near the start only
        return (float(p[0] ** 2), 2 * p) if abs(p[0]) < 2 else (float("nan"), p * np.nan)

    found = fastlr.line_search(cliff, w, np.array([-1.0]), method, first=64.0)
    assert found.success and abs(w[0]) < 1


@pytest.mark.parametrize("method", ["wolfe", "armijo"])
def test_an_exhausted_budget(method):
    w = np.array([1.0])

    def falls_for_ever(p):
        return (-float(p[0]) if method == "wolfe" else 10.0 + float(p[0] != 1.0)), -np.ones(1)

    found = fastlr.line_search(falls_for_ever, w, np.ones(1), method, max_evaluations=7)
    assert not found.success and found.evaluations == 7 and "no step was found in 7 evaluations" in found.message
    if method == "wolfe":
        assert "the parameters are at the best point seen" in found.message
        assert w[0] == 1.0 + found.step == 33.0 and found.loss == -33.0
    else:
        assert "the parameters are where they were" in found.message and w[0] == 1.0 and found.step == 0


def kinked(p):
    """L1 and L2 norms with a kink at the minimum: no step to it fulfils the Wolfe conditions."""
    return float(np.sum(np.abs(p - 1)) + 0.5 * np.sum(p**2)), np.sign(p - 1) + p


def support_vectors(seed):
    """A linear support vector machine: piecewise quadratic, with kinks everywhere."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((30, 3))
    y = np.sign(x @ rng.standard_normal(3) + 0.5 * rng.standard_normal(30))

    def fun(w):
        margin = 1 - y * (x @ w)
        slope = -(x * y[:, None])[margin > 0].sum(0) / 30
        return float(np.maximum(margin, 0).mean() + 0.01 * w @ w), slope + 0.02 * w

    return fun


def watched(fun):
    losses = []

    def inner(p):
        loss, grads = fun(p)
        losses.append(loss)
        return loss, grads

    return inner, losses


@pytest.mark.parametrize("method", ["wolfe", "armijo"])
def test_the_best_point_seen_is_kept(method):
    fun, losses = watched(lambda p: (float(abs(p[0] - 1)), np.sign(p - 1)))
    w = np.zeros(1)
    found = fastlr.line_search(fun, w, np.array([3.0]), method, c2=0.5)
    assert found.loss == min(losses) == abs(w[0] - 1) and w[0] == pytest.approx(3 * found.step)
    fun, losses = watched(kinked)
    w = np.array([0.3, 0.7])
    info = fastlr.LBFGS(w, method=method).minimize(fun)
    assert info.loss == min(losses) == kinked(w)[0] and info.evaluations == len(losses)
    assert info.loss == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("method", ["wolfe", "armijo"])
@pytest.mark.parametrize("seed", [0, 19, 25, 27, 44])
def test_kinks(seed, method):
    fun, losses = watched(support_vectors(seed))
    info = fastlr.LBFGS(np.zeros(3), method=method).minimize(fun)
    assert info.loss == min(losses) and info.message
    theirs = scipy_optimize.minimize(support_vectors(seed), np.zeros(3), jac=True, method="L-BFGS-B")
    assert info.loss < theirs.fun + 0.02


@pytest.mark.parametrize("method", ["wolfe", "armijo"])
def test_intervals_without_floats_inside(method):
    """More evaluations than the interval has numbers."""

    def kink(p):
        return float(abs(p[0] - 1 / 3)), np.where(p > 1 / 3, 2.0, -1.0)

    w = np.zeros(1)
    found = fastlr.line_search(kink, w, np.ones(1), method, max_evaluations=10_000)
    assert found.loss == abs(w[0] - 1 / 3) and found.evaluations < 100
    assert found.success == (method == "armijo")
    w = np.zeros(1)
    found = fastlr.line_search(
        lambda p: (1.0 + float(p[0] != 0), -np.ones(1)), w, np.ones(1), method, max_evaluations=10_000
    )
    assert not found.success and "the loss changes by less than its rounding" in found.message and w[0] == 0
    found = fastlr.line_search(lambda p: (-float(p[0]), -np.ones(1)), w, np.ones(1), max_evaluations=10_000)
    assert not found.success and found.evaluations < 1100 and np.isfinite(w[0])


def logistic(seed, dtype):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((500, 20)).astype(dtype)
    y = (x @ rng.standard_normal(20).astype(dtype) > 0).astype(dtype)
    half = dtype(0.005)

    def fun(w):
        z = x @ w
        loss = np.mean(np.logaddexp(dtype(0), z) - y * z) + half * (w @ w)
        return loss, x.T @ (1 / (1 + np.exp(-z)) - y) / dtype(500) + 2 * half * w

    return fun


@pytest.mark.parametrize("seed", range(6))
def test_float32_comes_to_an_end(seed):
    """Where the loss no longer falls by more than its rounding."""
    fun, losses = watched(logistic(seed, np.float32))
    info = fastlr.LBFGS(np.zeros(20, np.float32)).minimize(fun)
    exact = logistic(seed, np.float64)
    theirs = scipy_optimize.minimize(exact, np.zeros(20), jac=True, method="L-BFGS-B")
    assert info.success and info.evaluations == len(losses) <= 2 * theirs.nfev
    assert info.loss == pytest.approx(theirs.fun, rel=1e-5)


def test_a_function_that_is_at_its_minimum():
    fun, losses = watched(quadratic)
    w = np.full(3, 1e-9)
    opt = fastlr.LBFGS(w)
    for _ in range(2):
        info = opt.minimize(fun)
        assert info.success and info.message == "the gradient is small" and info.step == 0
    assert len(losses) == 1 and (w == 1e-9).all()


def test_limits_of_minimize():
    fun, start = FUNCTIONS["rosenbrock of 20"]
    for limit in (1, 2, 7, 30):
        inner, losses = watched(fun)
        w = np.array(start, float)
        info = fastlr.LBFGS(w).minimize(inner, max_evaluations=limit)
        assert len(losses) == info.evaluations == limit and not info.success
        assert info.message == f"the {limit} evaluations are used up"
        assert info.loss == fun(w)[0] == min(losses)
    info = fastlr.LBFGS(np.array(start, float)).minimize(fun, 3)
    assert not info.success and info.step == 3 and info.message == "the 3 iterations are used up"
    steps = [
        fastlr.LBFGS(np.array(start, float)).minimize(fun, loss_tolerance=tolerance, grad_tolerance=0).step
        for tolerance in (0.5, 1e-3, 0)
    ]
    assert steps[0] < steps[1] < steps[2]
    info = fastlr.LBFGS(np.array(start, float)).minimize(lambda p: (fun(p)[0] + 1.0, fun(p)[1]), loss_tolerance=0.01)
    assert info.success and info.message == "the loss no longer falls"


def test_callback():
    fun, start = FUNCTIONS["rosenbrock of 20"]
    seen, states = [], []
    opt = fastlr.LBFGS(np.array(start, float))

    def callback(info):
        seen.append(info)
        states.append(opt.state_dict())
        assert info.loss == fun(opt.params)[0]
        return info.step == 5

    info = opt.minimize(fun, callback=callback)
    assert [i.step for i in seen] == [1, 2, 3, 4, 5] and int(states[-1]["steps"]) == 5
    assert not info.success and info.message == "the callback has ended it" and info.loss == seen[-1].loss
    assert info.evaluations == sum(i.evaluations for i in seen) + 1
    with pytest.raises(TypeError, match="callback must be a function of an LBFGSInfo, got 5"):
        opt.minimize(fun, callback=5)


class StopHereError(BaseException):
    """What no function expects."""


@pytest.mark.parametrize("method", ["wolfe", "armijo"])
def test_an_error_at_any_call_leaves_the_iteration_before(method):
    """And what follows is what would have been without it, bit for bit."""
    fun, start = FUNCTIONS["beale"]

    def run(fails_at):
        calls = [0]

        def inner(p):
            calls[0] += 1
            if calls[0] == fails_at:
                opt.grads[:] = np.nan
                raise StopHereError
            return fun(p)

        params = np.array(start, float)
        opt = fastlr.LBFGS(params, method=method)
        history = []
        for _ in range(8):
            before = params.copy(), opt.state_dict()
            try:
                opt.step(inner)
            except StopHereError:
                assert np.array_equal(params, before[0])
                for key, array in opt.state_dict().items():
                    assert np.array_equal(array, before[1][key], equal_nan=True), key
                opt.step(inner)
            history.append(params.copy())
        return history, calls[0]

    expected, calls = run(0)
    for k in range(1, calls + 1):
        assert np.array_equal(run(k)[0], expected)


def test_calls_inside_calls():
    params = np.array([-1.2, 1.0])
    opt = fastlr.LBFGS(params)
    expected = params.copy()
    fastlr.LBFGS(expected).step(rosenbrock)
    for call in (opt.forget, opt.state_dict, lambda: opt.step(rosenbrock), lambda: opt.load_state_dict({})):

        def inner(p, call=call):
            with pytest.raises(RuntimeError, match="this optimizer is in a step"):
                call()
            return rosenbrock(p)

        params[:] = -1.2, 1.0
        opt.forget()
        opt.step(inner)
        assert np.array_equal(params, expected)


def test_states_that_are_none():
    opt = fastlr.LBFGS(np.array([-1.2, 1.0]))
    for _ in range(4):
        opt.step(rosenbrock)
    good = opt.state_dict()
    bad = [{"steps": -1}, {"steps": 1.5}, {"steps": "x"}, {"loss": "x"}, {"loss": [1.0, 2.0]}, {"s": np.zeros(())}]
    bad += [{"s": 0 * good["s"]}, {"y": -good["y"]}, {"y": good["y"] * np.nan}, {"y": good["y"][1:]}]
    bad += [{"grads": good["grads"].astype(np.float32)}, {"grads": np.ma.array(good["grads"])}, {"s": [["a", "b"]]}]
    for state in ({**good, **change} for change in bad):
        with pytest.raises(ValueError, match="state"):
            opt.load_state_dict(state)
    for state in (None, np.zeros(3), [good]):
        with pytest.raises(ValueError, match="this is not the state of an LBFGS"):
            opt.load_state_dict(state)
    for key, array in opt.state_dict().items():
        assert np.array_equal(array, good[key])


def test_an_error_in_the_function():
    w = np.array([1.0, 1.0])

    def breaks(p):
        if p[0] != 1.0:
            raise KeyError("lost")
        return quadratic(p)

    with pytest.raises(KeyError, match="lost"):
        fastlr.line_search(breaks, w, -np.ones(2))
    assert w.tolist() == [1.0, 1.0]


def test_a_step_that_fails_forgets(monkeypatch):
    params = np.array([-1.2, 1.0])
    opt = fastlr.LBFGS(params, max_evaluations=20)
    for _ in range(5):
        opt.step(rosenbrock)
    at = params.copy()
    info = opt.step(lambda p: (float("inf"), np.zeros(2)))
    assert not info.success and info.lr == 0 and np.array_equal(params, at)
    assert opt.step(rosenbrock).success
    flat = fastlr.LBFGS(np.zeros(3)).minimize(lambda p: (0.0, np.zeros(3)))
    assert flat.success and flat.message == "the gradient is zero"


BAD = [
    (
        lambda: fastlr.line_search(quadratic, {"w": np.ones(2)}, np.ones(2)),
        TypeError,
        "put a tree into one by",
    ),
    (lambda: fastlr.line_search(quadratic, np.ones(2), np.ones(3)), ValueError, "direction has shape (3,)"),
    (
        lambda: fastlr.line_search(quadratic, np.ones(2), np.ones(2), "newton"),
        TypeError,
        "method 'newton'",
    ),
    (
        lambda: fastlr.line_search(quadratic, np.ones(2), np.ones(2), c1=0.5, c2=0.4),
        ValueError,
        "c2 must be in (0.5, 1)",
    ),
    (lambda: fastlr.line_search(lambda p: None, np.ones(2), np.ones(2)), TypeError, "must return (loss, grads)"),
    (
        lambda: fastlr.line_search(lambda p: 1.0, np.ones(2), np.ones(2)),
        TypeError,
        "the function must return (loss, grads)",
    ),
    (lambda: fastlr.LBFGS(np.ones(2)).step(lambda p: 1.0), TypeError, "or with LBFGS a loss after filling opt.grads"),
    (
        lambda: fastlr.LBFGS(np.ones((2, 3))).step(lambda p: (1.0, np.ones((3, 2)))),
        ValueError,
        "grads has shape (3, 2), expected (6,) or (2, 3).",
    ),
    (lambda: fastlr.LBFGS(np.ones(2)).step(lambda p: (1.0, p + 1j)), TypeError, "grads must be real numbers"),
    (lambda: fastlr.LBFGS(np.ones(2)).step(lambda p: (1.0, np.ma.array(p))), TypeError, "grads is a masked array"),
    (lambda: fastlr.line_search(quadratic, np.ones(2), np.ma.ones(2)), TypeError, "direction is a masked array"),
    (
        lambda: fastlr.LBFGS(fastlr.flatten({"a": np.ones(2)})).step(
            lambda p: (1.0, fastlr.flatten({"b": np.ones(2)}))
        ),
        ValueError,
        "grads was made from a different structure than params.",
    ),
    (
        lambda: fastlr.LBFGS(fastlr.flatten({"a": np.ones(2)})).step(lambda p: (1.0, {"a": np.ones((2, 1))})),
        ValueError,
        "grads['a'] has shape (2, 1), but the parameter has (2,).",
    ),
    (
        lambda: fastlr.LBFGS(np.ones(2)).minimize(quadratic, loss_tolerance=-1),
        ValueError,
        "loss_tolerance must be non-negative",
    ),
    (lambda: fastlr.LBFGS(np.ones(2)).minimize(quadratic, max_evaluations=0), ValueError, "max_evaluations must be at"),
    (lambda: fastlr.LBFGS(np.ones(2), history=0), ValueError, "history must be at least 1, got 0."),
    (lambda: fastlr.LBFGS(np.ones(2, int)), TypeError, "expected float32 or float64"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input(number):
    call, error, message = BAD[number]
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


# The passes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [0, 1, 127, 129, BLOCK, 40 * BLOCK + 3])
def test_passes(n, dtype, rng):
    x, y, z = (rng.standard_normal(n).astype(dtype) for _ in range(3))
    found = []
    for threads in (1, 2, 3):
        out = np.empty_like(x)
        inner = vectors.move_and_dot(out, x, 0.3, y, z, threads)
        assert np.array_equal(out, x + x.dtype.type(0.3) * y)
        found.append((inner, vectors.dot(x, y, threads)))
        expected = float(out.astype(np.float64) @ z.astype(np.float64))
        assert inner == pytest.approx(expected, rel=1e-11, abs=1e-11)
        vectors.combine(out, out, -0.3, y, threads)
        np.testing.assert_allclose(out, x, atol=1e-6)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["move_and_dot", "dot", "move"])
def test_passes_over_vectors_by_numpy_give_the_same_bits(name, rng):
    vectors_of = [rng.standard_normal(40_001).astype(np.float32) for _ in range(3)]
    results = []
    for run in (vectors._pass(name, "float32"), vectors._by_numpy(name)):
        x, y, z = map(np.copy, vectors_of)
        sums = np.zeros((3, 1))
        run(x, x, np.float32(0.3), y, z, sums, 0, 3)
        results.append((x.tobytes(), sums.tobytes()))
    assert results[0] == results[1]
