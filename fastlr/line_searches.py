"""Step lengths by inexact line search, and limited-memory BFGS on top of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checks, threads
from .buffers import FlatBuffer
from .columns import Parameters
from .kernels import vectors
from .kernels.atomic import commit
from .places import HOST
from .range_test import evaluate

__all__ = ["LBFGS", "LBFGSInfo", "LineSearch", "line_search"]


@dataclass(frozen=True)
class LineSearch:
    """What a line search found.

    Attributes:
        step: the step length; 0 if none was accepted, and then the parameters are where they were.
        loss: at the parameters as they are now.
        grads: the gradient there, flat; None if it was not needed.
        evaluations: calls of the function.
        success: whether the conditions hold.
        message: in words.
    """

    step: float
    loss: float
    grads: np.ndarray | None
    evaluations: int
    success: bool
    message: str


class _Line:
    """A function along a line: `phi(a) = fun(start + a direction)`."""

    def __init__(self, fun: Callable[[Any], Any], place: _Flat, direction: np.ndarray, budget: int) -> None:
        self.fun, self.place, self.direction, self.budget = fun, place, direction, budget
        self.start = place.data.copy()
        self.evaluations = 0
        self.at = 0.0

    def go(self, a: float) -> None:
        """Put the parameters at a step."""
        vectors.combine(self.place.data, self.start, a, self.direction, self.place.threads)
        self.at = a

    def __call__(self, a: float) -> tuple[float, float]:
        """The value and the slope at a step; the gradient is in `place.g` afterwards."""
        if self.evaluations >= self.budget:
            raise _ExhaustedError
        self.go(a)
        self.evaluations += 1
        loss = self.place.evaluate(self.fun)
        slope = vectors.dot(self.place.g, self.direction, self.place.threads)
        return loss, slope


class _ExhaustedError(Exception):
    """No evaluations are left."""


class _Flat:
    """Parameters as one flat vector, and a gradient beside them."""

    def __init__(self, params: Any, grads: Any = None) -> None:
        self.parameters = Parameters(params)
        if self.parameters.place is not HOST:
            raise TypeError("line search and L-BFGS work on the CPU; move the parameters with .to('cpu').")
        if not self.parameters.is_flat:
            raise TypeError("params must be one array or a FlatBuffer; put a tree into one by fastlr.flatten(tree).")
        self.params = params
        self.data = params.data if isinstance(params, FlatBuffer) else params.reshape(-1)
        self.g = np.zeros_like(self.data) if grads is None else grads
        self.threads = threads.get_num_threads()

    def evaluate(self, fun: Callable[[Any], Any]) -> float:
        """The loss at the parameters as they are; its gradient goes to `g`."""
        loss, grads = evaluate(fun, self.params)
        if grads is not None:
            self.take(grads)
        return loss

    def take(self, grads: Any) -> None:
        """Copy a gradient of any of the forms that are allowed into `g`."""
        if isinstance(grads, FlatBuffer):
            grads = grads.data
        if isinstance(grads, np.ndarray) and grads.size == self.g.size:
            self.g[:] = grads.reshape(-1)
            return
        leaves = self.parameters.structure.leaves(grads)
        for place, path, leaf in zip(self.parameters.cut(self.g), self.parameters.paths, leaves, strict=True):
            array = np.asarray(0.0 if leaf is None else leaf)
            if leaf is not None and array.shape != place.shape:
                called = checks.called(path, "grads")
                raise ValueError(f"{called} has shape {array.shape}, but the parameter has {place.shape}.")
            place[...] = array


def _cubic(a: float, fa: float, da: float, b: float, fb: float, db: float) -> float | None:
    """The minimum of the cubic through two values and slopes. Nocedal and Wright 2006, eq. 3.59."""
    d1 = da + db - 3 * (fa - fb) / (a - b)
    square = d1 * d1 - da * db
    if not square >= 0:
        return None
    d2 = math.copysign(math.sqrt(square), b - a)
    under = db - da + 2 * d2
    return b - (b - a) * (db + d2 - d1) / under if under != 0 else None


def _between(a: float, b: float, wanted: float | None) -> float:
    """A point inside an interval, away from its ends; the middle if there is no better idea."""
    low, high = min(a, b), max(a, b)
    margin = 0.1 * (high - low)
    if wanted is None or not math.isfinite(wanted):
        return (a + b) / 2
    return min(max(wanted, low + margin), high - margin)


def _armijo(phi: _Line, f0: float, slope0: float, first: float, c1: float) -> tuple[float, float]:
    """Backtracking. Nocedal and Wright 2006, algorithm 3.1, with the interpolation of section 3.5."""
    a = first
    while True:
        f, slope = phi(a)
        if f <= f0 + c1 * a * slope0:
            return a, f
        wanted = _cubic(0.0, f0, slope0, a, f, slope) if math.isfinite(f) and math.isfinite(slope) else None
        a = _between(0.0, a, wanted)


def _wolfe(phi: _Line, f0: float, slope0: float, first: float, c1: float, c2: float) -> tuple[float, float]:
    """Strong Wolfe conditions. Nocedal and Wright 2006, algorithms 3.5 and 3.6."""

    def zoom(low: float, f_low: float, d_low: float, high: float, f_high: float, d_high: float) -> tuple[float, float]:
        while True:
            finite = math.isfinite(f_high) and math.isfinite(d_high)
            wanted = _cubic(low, f_low, d_low, high, f_high, d_high) if finite else None
            a = _between(low, high, wanted)
            f, d = phi(a)
            if not f <= f0 + c1 * a * slope0 or f >= f_low:
                high, f_high, d_high = a, f, d
                continue
            if abs(d) <= -c2 * slope0:
                return a, f
            if d * (high - low) >= 0:
                high, f_high, d_high = low, f_low, d_low
            low, f_low, d_low = a, f, d

    before, f_before, d_before = 0.0, f0, slope0
    a = first
    k = 0
    while True:
        f, d = phi(a)
        if not f <= f0 + c1 * a * slope0 or (k > 0 and f >= f_before):
            return zoom(before, f_before, d_before, a, f, d)
        if abs(d) <= -c2 * slope0:
            return a, f
        if d >= 0:
            return zoom(a, f, d, before, f_before, d_before)
        before, f_before, d_before = a, f, d
        a, k = 2 * a, k + 1


def _search(
    flat: _Flat,
    fun: Callable[[Any], Any],
    direction: np.ndarray,
    method: str,
    f0: float | None,
    first: float,
    c1: float,
    c2: float,
    budget: int,
) -> LineSearch:
    """A line search from where the parameters are; if `f0` is given, `flat.g` has the gradient there."""
    phi = _Line(fun, flat, direction, budget)
    slope0 = math.nan
    message = ""
    try:
        if f0 is None:
            f0, slope0 = phi(0.0)
        else:
            slope0 = vectors.dot(flat.g, direction, flat.threads)
        if not math.isfinite(f0) or not math.isfinite(slope0):
            message = f"the loss at the start is {f0} and its slope {slope0}: nothing to search from"
        elif not slope0 < 0:
            message = f"this is no descent direction: the slope along it is {slope0:.3g}, which must be negative"
        else:
            if method == "armijo":
                a, f = _armijo(phi, f0, slope0, first, c1)
            else:
                a, f = _wolfe(phi, f0, slope0, first, c1, c2)
            if phi.at != a:
                phi.go(a)
            return LineSearch(a, f, flat.g.copy(), phi.evaluations, True, "the conditions hold")
    except _ExhaustedError:
        message = f"no step was found in {budget} evaluations; the parameters are where they were"
    except BaseException:
        flat.data[:] = phi.start
        raise
    flat.data[:] = phi.start
    return LineSearch(0.0, float("nan") if f0 is None else f0, None, phi.evaluations, False, message)


def line_search(
    fun: Callable[[Any], Any],
    params: Any,
    direction: Any,
    method: str = "wolfe",
    *,
    first: float = 1.0,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_evaluations: int = 25,
) -> LineSearch:
    """Find how far to go in a direction, and go there.

    "armijo": the loss falls enough, `f(a) <= f(0) + c1 a f'(0)`, by backtracking from `first`. "wolfe": and the slope
    has become small, `abs(f'(a)) <= c2 abs(f'(0))` (the strong Wolfe conditions). Where the loss is not finite the step
    is too long. If no step is found, the parameters are as they were, and `message` says why.

    Args:
        fun: `fun(params) -> (loss, grads)`; the gradients in the parameters' structure or flat.
        params: a `FlatBuffer` or one array of float32 or float64, on the CPU; moved in place.
        direction: as the gradients.
        method: "armijo" or "wolfe".
        first: the step to try first, > 0.
        c1: in (0, 1).
        c2: in (c1, 1).
        max_evaluations: calls of `fun` at most, >= 1, the one at the start included.

    Returns:
        The step length, loss and gradient there, and how it went.

    Raises:
        TypeError: if the parameters are of another kind, or `fun` returns something else.
        ValueError: if an argument is out of range or does not fit.

    Source: Nocedal and Wright 2006, "Numerical Optimization", 2nd ed., algorithms 3.1, 3.5 and 3.6.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([4.0, 4.0])
        >>> found = fastlr.line_search(lambda p: (float(p @ p), 2 * p), w, -2 * w)
        >>> found.step, w
        (0.5, array([0., 0.]))
    """
    checks.choices("method", [method], ["armijo", "wolfe"])
    first = checks.number("first", first, 0.0, math.inf)
    c1 = checks.number("c1", c1, 0.0, 1.0)
    c2 = checks.number("c2", c2, c1, 1.0)
    budget = checks.count("max_evaluations", max_evaluations)
    flat = _Flat(params)
    flat.take(direction)
    return _search(flat, fun, flat.g.copy(), method, None, first, c1, c2, budget)


@dataclass(frozen=True)
class LBFGSInfo:
    """What an iteration of L-BFGS did.

    Attributes:
        step: number of iterations made.
        loss: at the parameters as they are now.
        grad_norm: of the gradient there.
        lr: the step length along the direction; 0 if none was found.
        evaluations: calls of the function in this iteration.
        success: whether the parameters have moved.
        message: in words.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    evaluations: int
    success: bool
    message: str


class LBFGS:
    """Limited-memory BFGS: steps along an approximate Newton direction, as long as a line search says.

    Each `step(fun)` is one iteration. The last `history` changes of parameters and gradients give the direction by the
    two-loop recursion, whose passes each update the vector and take the next inner product at once. Everything is
    flat, in the parameters' dtype; inner products are float64, in a fixed order. Full batches: the function must be the
    same from call to call.

    Args:
        params: a `FlatBuffer` or one array of float32 or float64, on the CPU; updated in place.
        history: how many changes are kept, >= 1. Default 10.
        method: of the line search, "wolfe" (default) or "armijo".
        c1: in (0, 1). Default 1e-4.
        c2: in (c1, 1). Default 0.9.
        max_evaluations: calls of the function at most in one iteration. Default 25.

    Raises:
        TypeError: if the parameters are of another kind.
        ValueError: if an argument is out of range.

    Source: Nocedal and Wright 2006, "Numerical Optimization", 2nd ed., algorithms 7.4 and 7.5, eq. 7.20.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([-1.2, 1.0])
        >>> def rosenbrock(p):
        ...     x, y = p
        ...     grads = np.array([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)])
        ...     return 100 * (y - x**2) ** 2 + (1 - x) ** 2, grads
        >>> info = fastlr.LBFGS(w).minimize(rosenbrock)
        >>> w.round(5), info.step < 60
        (array([1., 1.]), True)
    """

    def __init__(
        self,
        params: Any,
        *,
        history: int = 10,
        method: str = "wolfe",
        c1: float = 1e-4,
        c2: float = 0.9,
        max_evaluations: int = 25,
    ) -> None:
        checks.choices("method", [method], ["armijo", "wolfe"])
        self._flat = _Flat(params)
        self.history = checks.count("history", history)
        self.method = method
        self.c1 = checks.number("c1", c1, 0.0, 1.0)
        self.c2 = checks.number("c2", c2, self.c1, 1.0)
        self.max_evaluations = checks.count("max_evaluations", max_evaluations)
        self.steps = 0
        self._loss: float | None = None
        self._s: list[np.ndarray] = []
        self._y: list[np.ndarray] = []

    @property
    def params(self) -> Any:
        """The parameters, as they were given."""
        return self._flat.params

    @property
    def grads(self) -> Any:
        """Gradients for a function to fill that returns the loss alone; an array, or a buffer like the parameters."""
        return self._flat.parameters.tree(self._flat.g)

    def _direction(self) -> np.ndarray:
        """Algorithm 7.4: minus the approximate inverse Hessian times the gradient."""
        flat, n = self._flat, self._flat.threads
        q = flat.g.copy()
        count = len(self._s)
        if not count:
            return np.negative(q)
        rho = [1.0 / vectors.dot(s, y, n) for s, y in zip(self._s, self._y, strict=True)]
        alpha = [0.0] * count
        inner = vectors.dot(self._s[-1], q, n)
        for k in range(count - 1, -1, -1):
            alpha[k] = rho[k] * inner
            following = self._s[k - 1] if k else self._y[-1]
            inner = vectors.move_and_dot(q, q, -alpha[k], self._y[k], following, n)
        gamma = 1.0 / (rho[-1] * vectors.dot(self._y[-1], self._y[-1], n))  # eq. 7.20
        np.multiply(q, q.dtype.type(gamma), out=q)
        inner = vectors.dot(self._y[0], q, n)
        for k in range(count):
            beta = rho[k] * inner
            following = self._y[k + 1] if k + 1 < count else self._y[k]
            inner = vectors.move_and_dot(q, q, alpha[k] - beta, self._s[k], following, n)
        return np.negative(q, out=q)

    def step(self, fun: Callable[[Any], Any]) -> LBFGSInfo:
        """One iteration.

        Args:
            fun: `fun(params) -> (loss, grads)`, or `fun(params) -> loss` having filled `opt.grads`.

        Returns:
            What was done. If no step was found the parameters are as they were, and what was remembered is forgotten,
            so that the next iteration begins with the gradient.

        Raises:
            TypeError: if `fun` returns something else.
        """
        flat, evaluations = self._flat, 0
        if self._loss is None:
            self._loss, evaluations = flat.evaluate(fun), 1
        before, g = flat.data.copy(), flat.g.copy()
        norm = math.sqrt(vectors.dot(g, g, flat.threads))
        if norm == 0.0:
            return LBFGSInfo(self.steps, self._loss, 0.0, 0.0, evaluations, True, "the gradient is zero")
        direction = self._direction()
        first = 1.0 if self._s else min(1.0, 1.0 / norm)
        found = _search(flat, fun, direction, self.method, self._loss, first, self.c1, self.c2, self.max_evaluations)
        evaluations += found.evaluations
        if not found.success:
            flat.g[:] = g
            self._s.clear()
            self._y.clear()
            return LBFGSInfo(self.steps, self._loss, norm, 0.0, evaluations, False, found.message)
        self._loss = found.loss
        s, y = flat.data - before, flat.g - g
        curvature = vectors.dot(s, y, flat.threads)
        if curvature > np.finfo(s.dtype).eps * vectors.dot(y, y, flat.threads):  # else it would not stay positive
            self._s.append(s)
            self._y.append(y)
            del self._s[: -self.history], self._y[: -self.history]
        self.steps += 1
        norm = math.sqrt(vectors.dot(flat.g, flat.g, flat.threads))
        return LBFGSInfo(self.steps, found.loss, norm, found.step, evaluations, True, found.message)

    def minimize(self, fun: Callable[[Any], Any], max_steps: int = 1000, *, grad_tolerance: float = 1e-5) -> LBFGSInfo:
        """Iterate until the largest element of the gradient is small, nothing moves, or the steps are used up.

        Args:
            fun: as for `step`.
            max_steps: iterations at most, >= 1.
            grad_tolerance: how small, >= 0.

        Returns:
            The last iteration.
        """
        grad_tolerance = checks.within("grad_tolerance", grad_tolerance)
        failed = 0
        for _ in range(checks.count("max_steps", max_steps)):
            info = self.step(fun)
            failed = 0 if info.success else failed + 1
            if np.abs(self._flat.g).max(initial=0.0) <= grad_tolerance or info.grad_norm == 0 or failed == 2:
                break
        return info

    def forget(self) -> None:
        """Forget the loss and what was remembered: after the function or the parameters have changed."""
        self._loss = None
        self._s.clear()
        self._y.clear()

    def state_dict(self) -> dict[str, np.ndarray]:
        """What the optimizer knows beside the parameters, as copies in a flat dict of arrays."""
        loss = np.array(math.nan if self._loss is None else self._loss)
        out = {"steps": np.array(self.steps), "loss": loss, "grads": self._flat.g.copy()}
        empty = np.zeros((0, self._flat.data.size), self._flat.data.dtype)
        out["s"], out["y"] = (np.stack(v) if v else empty for v in (self._s, self._y))
        return out

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state_dict` returned; the parameters must be those it was taken at.

        Raises:
            ValueError: if it is something else; then nothing is changed.
        """
        size, dtype = self._flat.data.size, self._flat.data.dtype
        try:
            parts = {name: np.array(state[name]) for name in ("steps", "loss", "grads", "s", "y")}
        except KeyError as error:
            raise ValueError(f"this is not the state of an LBFGS: it has no {error}.") from None
        rows = (*parts["s"].shape[:1], size)
        expected = {"steps": ((), np.int64), "loss": ((), np.float64), "grads": ((size,), dtype)}
        for name, (shape, kind) in {**expected, "s": (rows, dtype), "y": (rows, dtype)}.items():
            if parts[name].shape != shape or parts[name].dtype != kind:
                raise ValueError(
                    f"{name!r} in the state is {parts[name].dtype} {parts[name].shape}, expected {np.dtype(kind)} "
                    f"{shape}."
                )
        steps, loss = checks.counted("steps in the state", int(parts["steps"])), float(parts["loss"])
        s, y = ([row.copy() for row in parts[name]][-self.history :] for name in ("s", "y"))
        if not all(vectors.dot(a, b, self._flat.threads) > 0 for a, b in zip(s, y, strict=True)):
            raise ValueError("'s' and 'y' in the state are damaged: along each kept step the gradient has to rise.")
        known = {"steps": steps, "_loss": None if math.isnan(loss) else loss, "_s": s, "_y": y}
        commit([(self._flat.g, ..., parts["grads"]), *((self.__dict__, name, value) for name, value in known.items())])

    def __repr__(self) -> str:
        """Its settings and what it updates."""
        p = self._flat.parameters
        return (
            f"<LBFGS(history={self.history}, method={self.method!r}) of {p.size} x {p.dtype}, {self.steps} steps, "
            f"{len(self._s)} remembered>"
        )
