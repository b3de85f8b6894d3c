"""Limited-memory BFGS: approximate Newton directions, with a line search along each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import arguments, checks
from ..exclusive import Exclusive, Users, exclusive
from ..kernels import vectors
from ..kernels.atomic import commit
from .line_search import ROUNDING, FlatPoint, search

__all__ = ["LBFGS", "LBFGSInfo"]


@dataclass(frozen=True)
class LBFGSInfo:
    """What an iteration of L-BFGS did, or `minimize` as a whole.

    Attributes:
        step: number of iterations made.
        loss: at the parameters as they are now.
        grad_norm: of the gradient there.
        lr: the step length along the direction; 0 if none was found.
        evaluations: calls of the function, in this iteration or in all.
        success: of an iteration, whether the parameters have moved or are where the gradient is zero; of `minimize`,
            whether it has come to an end by itself.
        message: in words.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    evaluations: int
    success: bool
    message: str


@dataclass(frozen=True)
class _Memory:
    """What L-BFGS remembers besides the parameters and the gradient.

    Attributes:
        steps: number of iterations made.
        loss: at the parameters, whose gradient is known then; None if it has to be found.
        s: changes of the parameters, the latest last.
        y: changes of the gradient.
    """

    steps: int = 0
    loss: float | None = None
    s: tuple[np.ndarray, ...] = ()
    y: tuple[np.ndarray, ...] = ()


class LBFGS(Exclusive):
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
        max_evaluations: calls of the function at most in the line search of one iteration. Default 25.

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

    @arguments.answered
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
        self._flat = FlatPoint(params)
        self.history = checks.count("history", history)
        self.method = method
        self.c1 = checks.number("c1", c1, checks.PROPER_FRACTION)
        self.c2 = checks.number("c2", c2, checks.Interval(self.c1, 1.0))
        self.max_evaluations = checks.count("max_evaluations", max_evaluations)
        self._memory = _Memory()
        self._users: Users = {}

    @property
    def params(self) -> Any:
        """The parameters, as they were given."""
        return self._flat.params

    @property
    def grads(self) -> Any:
        """Gradients for a function to fill that returns the loss alone; an array, or a buffer like the parameters."""
        self._flat.lent = True
        return self._flat.parameters.tree(self._flat.g)

    @property
    def steps(self) -> int:
        """Number of iterations made."""
        return self._memory.steps

    def _direction(self) -> np.ndarray:
        """Algorithm 7.4: minus the approximate inverse Hessian times the gradient."""
        n, s, y = self._flat.threads, self._memory.s, self._memory.y
        q = self._flat.g.copy()
        count = len(s)
        if not count:
            return np.negative(q)
        rho = [1.0 / vectors.dot(a, b, n) for a, b in zip(s, y, strict=True)]
        alpha = [0.0] * count
        inner = vectors.dot(s[-1], q, n)
        for k in range(count - 1, -1, -1):
            alpha[k] = rho[k] * inner
            following = s[k - 1] if k else y[-1]
            inner = vectors.move_and_dot(q, q, -alpha[k], y[k], following, n)
        gamma = vectors.dot(s[-1], y[-1], n) / vectors.dot(y[-1], y[-1], n)  # eq. 7.20
        np.multiply(q, q.dtype.type(gamma), out=q)
        inner = vectors.dot(y[0], q, n)
        for k in range(count):
            beta = rho[k] * inner
            following = y[k + 1] if k + 1 < count else y[k]
            inner = vectors.move_and_dot(q, q, alpha[k] - beta, s[k], following, n)
        return np.negative(q, out=q)

    def step(self, fun: Callable[[Any], Any]) -> LBFGSInfo:
        """One iteration.

        Args:
            fun: `fun(params) -> (loss, grads)`, or `fun(params) -> loss` having filled `opt.grads`.

        Returns:
            What was done. If the line search ends without success the parameters are at the best point that it has
            seen. If that is where they were, what was remembered is forgotten, so that the next iteration begins with
            the gradient.

        Raises:
            TypeError: if `fun` returns something else.
            ValueError: if its gradient does not fit.
            RuntimeError: if another call of this optimizer is under way, in another thread or in `fun`.

        Whatever is raised, also by `fun`, the parameters and the optimizer are as they were before the iteration.
        """
        return self._iterate(fun, self.max_evaluations)

    @exclusive
    def _iterate(self, fun: Callable[[Any], Any], budget: int) -> LBFGSInfo:
        """One iteration, within a budget of calls of the function in its line search.

        Where the loss at the start is not known, it takes one call more; with a budget of 0 that is all.
        """
        flat, memory = self._flat, self._memory
        before, g = flat.data.copy(), flat.g.copy()
        try:
            new, info = self._moved(fun, budget)
            self._memory = new
        except BaseException:
            if self._memory is memory:
                commit([(flat.data, ..., before), (flat.g, ..., g)])
            raise
        return info

    def _moved(self, fun: Callable[[Any], Any], budget: int) -> tuple[_Memory, LBFGSInfo]:
        """Make an iteration; return what to remember, and what was done."""
        flat, memory, evaluations = self._flat, self._memory, 0
        loss = memory.loss
        if loss is None:
            loss, evaluations = flat.evaluate(fun), 1
            memory = replace(memory, loss=loss)
        before, g = flat.data.copy(), flat.g.copy()
        norm = math.sqrt(vectors.dot(g, g, flat.threads))
        if norm == 0.0 or not budget:
            message = "" if norm else "the gradient is zero"
            return memory, LBFGSInfo(memory.steps, loss, norm, 0.0, evaluations, not norm, message)
        first = 1.0 if memory.s else min(1.0, 1.0 / norm)
        found = search(flat, fun, self._direction(), self.method, loss, first, self.c1, self.c2, budget)
        evaluations += found.evaluations
        if not found.step:
            info = LBFGSInfo(memory.steps, loss, norm, 0.0, evaluations, False, found.message)
            return _Memory(memory.steps, loss), info
        s, y = flat.data - before, flat.g - g
        curvature, square = vectors.dot(s, y, flat.threads), vectors.dot(y, y, flat.threads)
        if curvature > np.finfo(s.dtype).eps * square > 0:  # else the approximation would not stay positive
            s_kept, y_kept = (*memory.s, s)[-self.history :], (*memory.y, y)[-self.history :]
            memory = replace(memory, s=s_kept, y=y_kept)
        memory = replace(memory, steps=memory.steps + 1, loss=found.loss)
        norm = math.sqrt(vectors.dot(flat.g, flat.g, flat.threads))
        return memory, LBFGSInfo(memory.steps, found.loss, norm, found.step, evaluations, True, found.message)

    @arguments.answered
    def minimize(
        self,
        fun: Callable[[Any], Any],
        max_steps: int = 1000,
        *,
        grad_tolerance: float = 1e-5,
        loss_tolerance: float | None = None,
        max_evaluations: int | None = None,
        callback: Callable[[LBFGSInfo], Any] | None = None,
    ) -> LBFGSInfo:
        """Iterate until the gradient is small or the loss no longer falls.

        Args:
            fun: as for `step`.
            max_steps: iterations at most, >= 1.
            grad_tolerance: how small the largest element of the gradient is to be, >= 0.
            loss_tolerance: the reduction of the loss in an iteration that counts as none, relative to the loss, >= 0.
                Default: ten times the spacing of floats of the parameters' dtype: 2e-15, in float32 1e-6.
            max_evaluations: calls of `fun` at most in all, >= 1. Default: no limit.
            callback: `callback(info)` is called after each iteration with its `LBFGSInfo`; if it returns True, that was
                the last. It may save, load or change the optimizer.

        Returns:
            The last iteration, with the evaluations of all; `success` says whether the gradient is small or the loss no
            longer falls, `message` what ended it.

        Raises:
            TypeError: if an argument is of the wrong kind, or as `step`.
            ValueError: if one is out of range, or as `step`.
            RuntimeError: as `step`.

        If `fun` or `callback` raises, everything is as it was before or after the iteration that is under way.
        """
        max_steps = checks.count("max_steps", max_steps)
        grad_tolerance = checks.number("grad_tolerance", grad_tolerance)
        if loss_tolerance is None:
            loss_tolerance = 10 * float(np.finfo(self._flat.data.dtype).eps)
        loss_tolerance = checks.number("loss_tolerance", loss_tolerance)
        if max_evaluations is not None:
            max_evaluations = checks.count("max_evaluations", max_evaluations)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function of an LBFGSInfo, got {checks.shown(callback)}.")

        def ended() -> tuple[bool, str] | None:
            largest = float(np.abs(self._flat.g).max(initial=0.0))
            if largest <= grad_tolerance:
                return True, "the gradient is small" if largest else "the gradient is zero"
            if info.success and before - info.loss <= loss_tolerance * max(abs(before), abs(info.loss)):
                return True, "the loss no longer falls"
            if not info.success and plain:  # the next iteration would be the same
                return ROUNDING in info.message, info.message
            if made == max_steps:
                return False, f"the {max_steps} iterations are used up"
            if max_evaluations is not None and total >= max_evaluations:
                return False, f"the {max_evaluations} evaluations are used up"
            return (False, "the callback has ended it") if told else None

        info = self._iterate(fun, 0)
        made, total, before, plain, told = 0, info.evaluations, math.inf, False, False
        while (end := ended()) is None:
            before, plain = info.loss, not self._memory.s
            left = self.max_evaluations if max_evaluations is None else max_evaluations - total
            info = self._iterate(fun, min(left, self.max_evaluations))
            made, total = made + 1, total + info.evaluations
            told = callback is not None and bool(callback(info))
        return replace(info, evaluations=total, success=end[0], message=end[1])

    @exclusive
    def forget(self) -> None:
        """Forget the loss and what was remembered: after the function or the parameters have changed."""
        self._memory = _Memory(self.steps)

    @exclusive
    def state_dict(self) -> dict[str, np.ndarray]:
        """What the optimizer knows besides the parameters, as copies in a flat dict of arrays."""
        memory = self._memory
        loss = np.array(math.nan if memory.loss is None else memory.loss)
        out = {"steps": np.array(memory.steps), "loss": loss, "grads": self._flat.g.copy()}
        empty = np.zeros((0, self._flat.data.size), self._flat.data.dtype)
        out["s"], out["y"] = (np.stack(v) if v else empty for v in (memory.s, memory.y))
        return out

    @exclusive
    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state_dict` returned; the parameters must be those it was taken at.

        Raises:
            ValueError: if it is something else; then nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"this is not the state of an LBFGS: {checks.shown(state)}.")
        size, dtype, threads = self._flat.data.size, self._flat.data.dtype, self._flat.threads
        try:
            parts = {k: checks.numeric(f"{k!r} in the state", state[k]) for k in ("steps", "loss", "grads", "s", "y")}
        except KeyError as error:
            raise ValueError(f"this is not the state of an LBFGS: it has no {error}.") from None
        except (TypeError, IndexError) as error:
            raise ValueError(f"this is not the state of an LBFGS: {error}") from None
        rows = (*parts["s"].shape[:1], size)
        expected = {"steps": ((), np.int64), "loss": ((), np.float64), "grads": ((size,), dtype)}
        for name, (shape, kind) in {**expected, "s": (rows, dtype), "y": (rows, dtype)}.items():
            if parts[name].shape != shape or parts[name].dtype != kind:
                raise ValueError(
                    f"{name!r} in the state is {parts[name].dtype} {parts[name].shape}, expected {np.dtype(kind)} "
                    f"{shape}."
                )
        steps, loss = checks.counted("steps in the state", int(parts["steps"])), float(parts["loss"])
        s, y = (tuple(row.copy() for row in parts[name][-self.history :]) for name in ("s", "y"))
        if not all(0 < vectors.dot(a, b, threads) < math.inf for a, b in zip(s, y, strict=True)):
            raise ValueError("'s' and 'y' in the state are damaged: along each kept step the gradient has to rise.")
        memory = _Memory(steps, None if math.isnan(loss) else loss, s, y)
        commit([(self._flat.g, ..., parts["grads"]), (self.__dict__, "_memory", memory)])

    def __repr__(self) -> str:
        """Its settings and what it updates."""
        p = self._flat.parameters
        return (
            f"<LBFGS(history={self.history}, method={self.method!r}) of {p.size} x {p.dtype}, {self.steps} steps, "
            f"{len(self._memory.s)} remembered>"
        )
