"""Inexact line searches: how far to go along a direction by the Armijo or the strong Wolfe conditions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import arguments, checks
from ..arrays.buffers import FlatBuffer
from ..arrays.columns import Parameters
from ..arrays.places import HOST
from ..arrays.trees import is_container
from ..kernels import vectors
from ..step import threads
from .find_lr import evaluate

__all__ = ["ROUNDING", "FlatPoint", "LineSearch", "line_search", "search"]


@dataclass(frozen=True)
class LineSearch:
    """What a line search found.

    Attributes:
        step: the step length; without success that of the best point seen, 0 if that is the start.
        loss: at the parameters as they are now.
        grads: the gradient there, flat.
        evaluations: calls of the function.
        success: whether the conditions hold.
        message: in words.
    """

    step: float
    loss: float
    grads: np.ndarray
    evaluations: int
    success: bool
    message: str


ROUNDING = "the loss changes by less than its rounding"


class _EndedError(Exception):
    """The search ends without a step that meets the conditions; the message says why."""


class _Line:
    """A function along a line: `phi(a) = fun(start + a direction)`, and the best point seen on it.

    Attributes:
        start: the parameters there.
        evaluations: calls of the function.
        step: of the best point, which is the start or has a lower loss.
        loss: there.
        grads: there.
    """

    def __init__(self, fun: Callable[[Any], Any], flat: FlatPoint, direction: np.ndarray, budget: int) -> None:
        self._fun, self._flat, self._direction, self._budget = fun, flat, direction, budget
        self._eps = float(np.finfo(flat.data.dtype).eps)
        self.start, self.grads = flat.data.copy(), flat.g.copy()
        self.step, self.loss, self.evaluations = 0.0, math.nan, 0

    def _evaluate(self) -> tuple[float, float]:
        """The value and the slope where the parameters are."""
        self.evaluations += 1
        loss = self._flat.evaluate(self._fun)
        return loss, vectors.dot(self._flat.g, self._direction, self._flat.threads)

    def begin(self, loss: float | None) -> tuple[float, float]:
        """The value and the slope at the start; if the value is known, the gradient is as well."""
        if loss is None:
            loss, slope = self._evaluate()
            self.grads[:] = self._flat.g
        else:
            slope = vectors.dot(self._flat.g, self._direction, self._flat.threads)
        self.loss = loss
        return loss, slope

    def go(self, a: float) -> None:
        """Move the parameters to a step."""
        if a == 0:
            self._flat.data[:] = self.start
        else:
            vectors.combine(self._flat.data, self.start, a, self._direction, self._flat.threads)

    def __call__(self, a: float) -> tuple[float, float]:
        """The value and the slope at a step; the value is infinite where one of them is not finite.

        Raises:
            _EndedError: if no evaluations are left, or the step is beyond all floats.
        """
        if self.evaluations >= self._budget:
            raise _EndedError(f"no step was found in {self._budget} evaluations")
        if not math.isfinite(a):
            raise _EndedError("no step was found: the loss falls for as long as steps are floats")
        self.go(a)
        loss, slope = self._evaluate()
        if not (math.isfinite(loss) and math.isfinite(slope)):
            return math.inf, math.nan
        if loss < self.loss:
            self.step, self.loss, self.grads[:] = a, loss, self._flat.g
        return loss, slope

    def between(self, low: float, f: float, slope: float, high: float, wanted: float | None) -> float:
        """A step inside an interval, away from its ends; the middle if nothing better is proposed.

        Args:
            low: the end with the lower value.
            f: the value there.
            slope: the slope there.
            high: the other end.
            wanted: the step that is proposed, or None.

        Raises:
            _EndedError: if the values inside cannot be told from `f`, or there is no step inside.
        """
        first, last = min(low, high), max(low, high)
        a, margin = first + (last - first) / 2, 0.1 * (last - first)
        if wanted is not None and math.isfinite(wanted):
            a = min(max(wanted, first + margin), last - margin)
        if abs(slope * (high - low)) <= self._eps * abs(f) or not first < a < last:
            raise _EndedError(ROUNDING)
        return a


class FlatPoint:
    """Parameters as one flat vector, and the gradient there.

    Attributes:
        parameters: the parameters, checked.
        params: the same, as they were given.
        data: the vector, a view of the parameters.
        g: the gradient.
        lent: whether the user was given `g` to write gradients into.
        threads: how many threads work on the vectors.
    """

    def __init__(self, params: Any) -> None:
        self.parameters = Parameters(params)
        if self.parameters.place is not HOST:
            raise TypeError("line search and L-BFGS work on the CPU; move the parameters with .to('cpu').")
        if not self.parameters.is_flat:
            raise TypeError("params must be one array or a FlatBuffer; put a tree into one by fastlr.flatten(tree).")
        self.params = params
        self.data = params.data if isinstance(params, FlatBuffer) else params.reshape(-1)
        self.g = np.zeros_like(self.data)
        self.lent = False
        self.threads = threads.get_num_threads()

    def evaluate(self, fun: Callable[[Any], Any]) -> float:
        """The loss at the parameters as they are; its gradient goes to `g`.

        Raises:
            TypeError: if the function returns something else.
        """
        loss, grads = evaluate(fun, self.params)
        if grads is not None:
            self.take("grads", grads)
        elif not self.lent:
            raise TypeError("the function must return (loss, grads), or with LBFGS a loss after filling opt.grads.")
        return loss

    def take(self, name: str, grads: Any) -> None:
        """Copy a gradient, flat or in the parameters' structure, into `g`.

        Raises:
            TypeError: if it is not an array of numbers.
            ValueError: if it does not fit.
        """
        params = self.parameters
        if isinstance(grads, FlatBuffer):
            grads = params.data_of(name, grads)
        if params.is_array or not is_container(grads):
            array = checks.numeric(name, grads)
            shapes = {(params.size,): None, **({params.shapes[0]: None} if params.is_array else {})}
            if array.shape not in shapes:
                raise ValueError(f"{name} has shape {array.shape}, expected {' or '.join(map(str, shapes))}.")
            self.g[:] = array.reshape(-1)
            return
        arrays = []
        for path, leaf, shape in zip(params.paths, params.structure.leaves(grads, name), params.shapes, strict=True):
            called = checks.called(path, name)
            array = np.zeros(shape) if leaf is None else checks.numeric(called, leaf)
            if array.shape != shape:
                raise ValueError(f"{called} has shape {array.shape}, but the parameter has {shape}.")
            arrays.append(array)
        for part, array in zip(params.cut(self.g), arrays, strict=True):
            part[...] = array


def _cubic(a: float, fa: float, da: float, b: float, fb: float, db: float) -> float | None:
    """The minimum of the cubic through two values and slopes. Nocedal and Wright 2006, eq. 3.59."""
    d1 = da + db - 3 * (fa - fb) / (a - b)
    square = d1 * d1 - da * db
    if not square >= 0:
        return None
    d2 = math.copysign(math.sqrt(square), b - a)
    under = db - da + 2 * d2
    return b - (b - a) * (db + d2 - d1) / under if under != 0 else None


def _armijo(phi: _Line, f0: float, slope0: float, first: float, c1: float) -> tuple[float, float]:
    """Backtracking. Nocedal and Wright 2006, algorithm 3.1, with the interpolation of section 3.5."""
    a = first
    while True:
        f, slope = phi(a)
        if f <= f0 + c1 * a * slope0:
            return a, f
        wanted = _cubic(0.0, f0, slope0, a, f, slope) if math.isfinite(f) else None
        a = phi.between(0.0, f0, slope0, a, wanted)


def _wolfe(phi: _Line, f0: float, slope0: float, first: float, c1: float, c2: float) -> tuple[float, float]:
    """Strong Wolfe conditions. Nocedal and Wright 2006, algorithms 3.5 and 3.6."""

    def zoom(low: float, f_low: float, d_low: float, high: float, f_high: float, d_high: float) -> tuple[float, float]:
        while True:
            wanted = _cubic(low, f_low, d_low, high, f_high, d_high) if math.isfinite(f_high) else None
            a = phi.between(low, f_low, d_low, high, wanted)
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


def search(
    flat: FlatPoint,
    fun: Callable[[Any], Any],
    direction: np.ndarray,
    method: str,
    loss: float | None,
    first: float,
    c1: float,
    c2: float,
    budget: int,
) -> LineSearch:
    """A line search from where the parameters are; if the loss there is known, `flat.g` has the gradient.

    If anything is raised, the parameters are where they were.
    """
    phi = _Line(fun, flat, direction, budget)
    try:
        try:
            f0, slope0 = phi.begin(loss)
            if not math.isfinite(f0) or not math.isfinite(slope0):
                raise _EndedError(f"the loss at the start is {f0} and its slope {slope0}: nothing to search from")
            if not slope0 < 0:
                raise _EndedError(f"this is no descent direction: the slope along it is {slope0:.3g}, not negative")
            a, f = _armijo(phi, f0, slope0, first, c1) if method == "armijo" else _wolfe(phi, f0, slope0, first, c1, c2)
            return LineSearch(a, f, flat.g.copy(), phi.evaluations, True, "the conditions hold")
        except _EndedError as ended:
            phi.go(phi.step)
            flat.g[:] = phi.grads
            where = "at the best point seen" if phi.step else "where they were"
            message = f"{ended}; the parameters are {where}"
            return LineSearch(phi.step, phi.loss, phi.grads, phi.evaluations, False, message)
    except BaseException:
        flat.data[:] = phi.start
        raise


@arguments.answered
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
    is too long. If no step is found with which they hold, the parameters are left at the best point seen, that of the
    lowest loss, which may be the start, and `message` says why. If `fun` raises, they are where they were.

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
    first = checks.number("first", first, checks.POSITIVE)
    c1 = checks.number("c1", c1, checks.PROPER_FRACTION)
    c2 = checks.number("c2", c2, checks.Interval(c1, 1.0))
    budget = checks.count("max_evaluations", max_evaluations)
    flat = FlatPoint(params)
    flat.take("direction", direction)
    return search(flat, fun, flat.g.copy(), method, None, first, c1, c2, budget)
