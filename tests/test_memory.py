"""What a step reads and writes: the memory of arrays as they are now, kept alive until the step is over."""

from __future__ import annotations

import gc
import mmap

import numpy as np
import pytest

import fastlr

BACKENDS = ["numba", "numpy"]
LARGE = 2_000_000  # elements; more than an optimizer would keep alive for itself


def sgd(params, backend="numba", **options):
    return fastlr.SGD(params, **{"lr": 1.0, **options}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, LARGE])
def test_gradients_that_become_none(backend, size):
    """In every order, also after the arrays have died."""
    p = {"a": np.zeros(size), "b": np.zeros(size)}
    opt = sgd(p, backend)
    for a, b in [(1, 1), (1, 0), (0, 1), (0, 0), (1, 1), (0, 0), (1, 0)]:
        before = {k: x[0] for k, x in p.items()}
        opt.step({"a": np.ones(size) if a else None, "b": np.ones(size) if b else None})
        gc.collect()
        assert p["a"][0] == before["a"] - a
        assert p["b"][0] == before["b"] - b


class Convertible:
    """Something that makes a new array each time it is asked."""

    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return np.full((), self.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make", [np.float64, lambda x: np.full(4, x / 4).sum(), Convertible], ids=["scalar", "sum", "array"]
)
def test_what_is_converted_on_the_way_lives_until_the_step_is_over(backend, make):
    p = {"a": np.zeros(()), "b": np.zeros(())}
    opt = sgd(p, backend)
    one, two = make(1.0), make(2.0)
    for k in range(50):
        opt.step({"a": one if k % 2 else make(1.0), "b": two if k % 2 else make(2.0)})
        np.full(1000, 7.0)  # takes the place of what has died
    assert (float(p["a"]), float(p["b"])) == (-50.0, -100.0)


def test_arrays_of_jax_are_converted_anew():
    jax = pytest.importorskip("jax")
    p = {"a": np.zeros(3, np.float32)}
    opt = sgd(p)
    for k in range(5):
        opt.step({"a": jax.numpy.full(3, float(k))})
    assert p["a"].tolist() == [-10.0] * 3


@pytest.mark.parametrize("tree", [True, False])
def test_gradients_that_are_dropped_while_a_step_is_under_way(tree):
    """A schedule's function is called in the middle of a step, as any other thread may come in between."""
    given = {"a": np.ones(LARGE, np.float32)}
    held = [given["a"]]

    def lr(n):
        if n == 2:
            given["a"] = None
            held.clear()
            gc.collect()
        return 1.0

    p = {"a": np.zeros(LARGE, np.float32)} if tree else np.zeros(LARGE, np.float32)
    opt = sgd(p, lr=lr)
    for _ in range(3):
        if tree:
            opt.step(dict(given))
        else:
            opt.step(held.pop() if len(held) == 1 else np.ones(LARGE, np.float32))
            held.append(np.ones(LARGE, np.float32))
    assert (p["a"] if tree else p)[0] == -3.0


def resized(g):
    g.resize(2, refcheck=False)


def reshaped(g):
    g.shape = (3, 2)


def of_another_dtype(g):
    g.dtype = np.int64


def with_other_strides(g):
    g.strides = (0,) * g.ndim


def with_other_content(g):
    g.__setstate__((1, (2,), np.dtype(np.float64), False, np.full(2, 9.0).tobytes()))


CHANGES = [resized, reshaped, of_another_dtype, with_other_strides, with_other_content]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for the setters
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tree", [True, False])
def test_gradients_that_change_under_the_same_name(backend, change, tree):
    """The same object with other memory, shape, dtype or strides is refused, or read as it is now."""
    p = {"w": np.zeros(6)} if tree else np.zeros(6)
    opt = sgd(p, backend)
    g = np.ones(6)
    opt.step({"w": g} if tree else g)
    change(g)
    w = p["w"] if tree else p
    if change is with_other_strides:
        opt.step({"w": g} if tree else g)
        assert w.tolist() == (-1 - g).tolist()
    else:
        with pytest.raises((ValueError, TypeError), match="grads"):
            opt.step({"w": g} if tree else g)
        assert w.tolist() == [-1.0] * 6
    opt.step({"w": np.ones(6)} if tree else np.ones(6))
    assert w.tolist() == [-3.0 if change is with_other_strides else -2.0] * 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for the setters
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["params", "ema_out", "lr_scale"])
def test_the_callers_arrays_that_change_under_the_optimizer(backend, change, which):
    """Parameters and what goes along with them are never used where they were."""
    own = {"params": np.zeros(6), "ema_out": np.zeros(6), "lr_scale": np.ones(6)}
    opt = sgd({"w": own["params"]}, backend, ema=0.5, ema_out={"w": own["ema_out"]}, lr_scale={"w": own["lr_scale"]})
    g = {"w": np.ones(6)}
    opt.step(g)
    change(own[which])
    kept = {k: x.copy() for k, x in own.items()}
    with pytest.raises(RuntimeError, match=rf"{which}\['w'\] has changed.*rebuild"):
        opt.step(g)
    assert all(x.tobytes() == kept[k].tobytes() for k, x in own.items())


def test_arrays_that_become_read_only_are_not_written():
    w = np.zeros(3)
    opt = sgd(w)
    opt.step(np.ones(3))
    w.flags.writeable = False
    with pytest.raises(RuntimeError, match="params has changed: its writeable is False"):
        opt.step(np.ones(3))
    w.flags.writeable = True
    opt.step(np.ones(3))
    assert w.tolist() == [-2.0] * 3


def test_a_memory_map_cannot_be_closed_under_a_gradient(tmp_path):
    (tmp_path / "g").write_bytes(np.ones(4).tobytes())
    with open(tmp_path / "g", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        g = np.frombuffer(mapped)
        w = np.zeros(4)
        opt = sgd(w)
        opt.step(g)
        with pytest.raises(BufferError):
            mapped.close()
        opt.step(g)
        del g
        mapped.close()
        opt.step(np.ones(4))
    assert w.tolist() == [-3.0] * 4


@pytest.mark.parametrize("tree", [True, False])
def test_gradients_of_one_dtype_after_another(tree):
    p = {"w": np.zeros(3, np.float32)} if tree else np.zeros(3, np.float32)
    opt = sgd(p)
    for dtype in (np.float32, np.float16, np.float32, np.float16):
        g = np.ones(3, dtype)
        opt.step({"w": g} if tree else g)
    assert (p["w"] if tree else p).tolist() == [-4.0] * 3


def test_one_gradient_that_is_none_does_not_cost_a_row_a_leaf():
    p = {str(k): np.zeros(2) for k in range(50)}
    opt = sgd(p, "numpy")
    g = {k: np.ones(2) for k in p}
    opt.step({**g, "7": None})
    assert len(opt._stepper.rows) == 2
    opt.step(g)
    opt.step({**g, "7": None, "8": None})
    assert len(opt._stepper.rows) == 3
    assert p["7"].tolist() == [-1.0] * 2
    assert p["8"].tolist() == [-2.0] * 2
    assert p["9"].tolist() == [-3.0] * 2
    assert opt.state_dict()["step"].reshape(-1)[[7, 8, 9]].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda opt: opt.step(np.ones(4), grad_scale=2.0), ValueError),
        (lambda opt: opt.step({"no": np.ones(3)}, grad_scale=2.0), ValueError),
        (lambda opt: opt.step(np.ones(3), grad_scale=2.0, only="no"), ValueError),
        (lambda opt: opt.step(np.ones(3), grad_scale=2.0, stream=0), ValueError),
    ],
)
def test_a_refused_step_changes_nothing_the_kernel_included(bad, error):
    w = np.zeros(3)
    opt = sgd({"w": w}, "numpy", momentum=0.9)
    opt.step(np.ones(3))
    kernel, staged, plans = opt._stepper.kernel(), opt._stepper.program.staged, dict(opt._stepper.plans)
    before = opt.snapshot()
    with pytest.raises(error):
        bad(opt)
    after = opt.snapshot()
    assert (opt._stepper.kernel(), opt._stepper.program.staged, opt._stepper.plans) == (kernel, staged, plans)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_a_schedule_that_fails_changes_nothing_the_kernel_included():
    w = np.zeros(3)
    opt = sgd({"w": w}, "numpy", lr=lambda n: 1.0 if n == 0 else float("nan"))
    opt.step(np.ones(3))
    staged = opt._stepper.program.staged
    with pytest.raises(ValueError, match="lr must be"):
        opt.step(np.ones(3), grad_scale=2.0)
    assert opt._stepper.program.staged is staged
    assert w.tolist() == [-1.0] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for the setters
@pytest.mark.parametrize("change", CHANGES)
def test_states_are_not_read_from_or_into_arrays_that_have_changed(change, tmp_path):
    w = np.zeros(6)
    opt = sgd({"w": w}, "numpy", momentum=0.9)
    opt.step({"w": np.ones(6)})
    state = opt.snapshot()
    opt.save(tmp_path / "before.npz")
    change(w)
    kept = w.tobytes()
    for call in (
        opt.snapshot,
        opt.state_dict,
        lambda: opt.save(tmp_path / "after.npz"),
        lambda: opt.load(tmp_path / "before.npz"),
        lambda: opt.restore(state),
    ):
        with pytest.raises(RuntimeError, match=r"params\['w'\] has changed"):
            call()
    assert w.tobytes() == kept
    assert not (tmp_path / "after.npz").exists()


def test_gradients_that_are_refused_are_not_there_afterwards():
    w = np.zeros(2)
    opt = sgd({"w": w}, "numpy")
    with pytest.raises(ValueError, match="has shape"):
        opt.accumulate({"w": np.ones(3)})
    with pytest.raises(RuntimeError, match="nobody has used yet"):
        opt.step()
    opt.accumulate({"w": np.ones(2)})
    opt.step()
    assert w.tolist() == [-1.0] * 2
