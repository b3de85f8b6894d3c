"""The learning-rate range test: try rates from small to large, and see where the loss falls and where it explodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import checks, plots
from .optimizer import Optimizer
from .schedules import Schedule

__all__ = ["RangeTest", "evaluate", "find_lr"]


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test, and what it suggests.

    Attributes:
        lrs: the rates tried, rising.
        losses: the loss before the step with each rate.
        smoothed: the losses, averaged exponentially and corrected for bias.
        steepest: the rate at which the smoothed loss falls fastest over the logarithm of the rate, or None.
        valley: the rate two thirds into the longest stretch in which it falls, or None.
        minimum_tenth: a tenth of the rate at which it is lowest, or None.
        diverged: whether the test ended because the loss exploded.
        note: in words, what to think of the curve.
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    steepest: float | None
    valley: float | None
    minimum_tenth: float | None
    diverged: bool
    note: str

    @property
    def suggestion(self) -> float | None:
        """The rate to begin with: `valley`; None if the curve says nothing."""
        return self.valley

    def plot(self, path: str | Path | None = None) -> None:
        """Draw the curve.

        Args:
            path: a file ending in .png, .svg or .pdf; None: in the terminal.

        Raises:
            ImportError: if matplotlib, or plotext for the terminal, is missing.
        """
        curves = {"loss": (self.lrs, self.losses), "smoothed": (self.lrs, self.smoothed)}
        good = np.isfinite(self.losses)
        curves = {name: (x[good], y[good]) for name, (x, y) in curves.items()}
        labels = {"xlabel": "learning rate", "ylabel": "loss", "xscale": "log", "title": self.note}
        if path is None:
            plots.show(curves, **labels)
        else:
            plots.draw(curves, path, **labels)

    def __repr__(self) -> str:
        """The suggestions and the note."""
        shown = {name: getattr(self, name) for name in ("steepest", "valley", "minimum_tenth")}
        values = ", ".join(f"{k}={v:.3g}" if v is not None else f"{k}=None" for k, v in shown.items())
        return f"RangeTest({values}, {len(self.lrs)} rates: {self.note})"


def evaluate(fun: Callable[[Any], Any], params: Any) -> tuple[float, Any]:
    """Call a function of the parameters in either of its two forms.

    Args:
        fun: `fun(params) -> (loss, grads)`, or `fun(params) -> loss` after it has filled the gradients itself.
        params: the parameters.

    Returns:
        The loss as a float, and the gradients or None.

    Raises:
        TypeError: if it returns something else.
    """
    found = fun(params)
    loss, grads = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    try:
        return checks.real("the loss", loss), grads
    except TypeError as error:
        raise TypeError(f"the function must return (loss, grads), or a loss after filling opt.grads: {error}") from None


def find_lr(
    opt: Optimizer,
    fun: Callable[[Any], Any],
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    *,
    smoothing: float = 0.9,
    diverge: float = 4.0,
) -> RangeTest:
    """Run the range test with your own optimizer and your own step.

    The rate rises from `low` to `high` in equal ratios, one step each; it ends early when the loss is not finite or
    its average exceeds `diverge` times the lowest so far. Then parameters, states, counters, hyperparameters and
    `opt.grads` are restored, bit for bit. Groups keep the ratio of their rate to the optimizer's.

    Args:
        opt: the optimizer; any rule, on the CPU or a GPU.
        fun: `fun(params) -> (loss, grads)`, or `fun(params) -> loss` having filled `opt.grads`; for each call the next
            batch. It gets `opt.params`.
        low: first rate, > 0.
        high: last rate, > low.
        steps: rates to try, >= 5.
        smoothing: share of the average that is kept at each step, in [0, 1).
        diverge: how many times the lowest average the average may be, > 1.

    Returns:
        The curve and its suggestions.

    Raises:
        TypeError: if `fun` returns something else.
        ValueError: if an argument is out of range, or the optimizer's rule has no learning rate.

    Source: Smith 2017, arXiv:1506.01186, section 3.3.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([5.0, 5.0])
        >>> found = fastlr.find_lr(fastlr.SGD(w), lambda p: (float(p @ p), 2 * p), 1e-4, 10.0)
        >>> 0.05 < found.suggestion < 1.0, w
        (True, array([5., 5.]))
    """
    low = checks.number("low", low, 0.0, math.inf)
    high = checks.number("high", high, low, math.inf)
    if checks.real("smoothing", smoothing) != 0:
        smoothing = checks.number("smoothing", smoothing, 0.0, 1.0)
    diverge = checks.number("diverge", diverge, 1.0, math.inf)
    steps = checks.whole("steps", steps, 5)
    if "lr" not in opt.groups.names:
        raise ValueError(f"{type(opt).__name__} of rule {opt._source.name!r} has no lr to look for.")
    lrs = np.geomspace(low, high, steps)
    before = opt.snapshot()
    rates = {group: group.lr for group in opt.groups.values() if "lr" in group._values}
    base = opt.lr(opt.steps) if isinstance(opt.lr, Schedule) else opt.lr
    hyper = {g: dict(g._values) for g in (opt.groups.defaults, *opt.groups.values())}
    own = opt._gradients.own
    kept = None if own is None else opt._params.place.to_host(own)
    accumulated = opt._accumulated
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    try:
        for k, lr in enumerate(lrs):
            opt.lr = float(lr)
            for group, rate in rates.items():
                rate = rate(opt.steps) if isinstance(rate, Schedule) else rate
                group.lr = float(lr) * rate / base if np.all(base) else float(lr)
            loss, grads = evaluate(fun, opt.params)
            losses.append(loss)
            average = smoothing * average + (1 - smoothing) * loss
            smoothed.append(average / (1 - smoothing ** (k + 1)))
            if not math.isfinite(loss) or smoothed[-1] > diverge * max(min(smoothed), 1e-300):
                diverged = True
                break
            opt.step(grads)
    finally:
        for group, values in hyper.items():
            group._values.clear()
            group._values.update(values)
        opt.restore(before)
        if kept is not None:
            opt._params.place.copy(own, kept)
        elif opt._gradients.own is not None:
            opt._params.place.fill(opt._gradients.own, 0)
        opt._put(_accumulated=accumulated)
    return _read(lrs[: len(losses)], np.array(losses), np.array(smoothed), diverged)


def _read(lrs: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, diverged: bool) -> RangeTest:
    """What a curve suggests."""
    end = len(lrs) - 1 if diverged else len(lrs)  # without the loss that exploded
    curve, rates = smoothed[:end], lrs[:end]
    fell = end >= 5 and np.isfinite(curve).all() and curve.min() < curve[0] - 0.01 * max(abs(curve[0]), 1e-300)
    if not fell:
        if diverged:
            note = "the loss exploded without having fallen: try smaller rates"
        else:
            note = "the loss did not fall: try larger rates, or more steps"
        return RangeTest(lrs, losses, smoothed, None, None, None, diverged, note)
    lowest = int(curve.argmin())
    slope = np.gradient(curve, np.log(rates))
    steepest = float(rates[: lowest + 1][slope[: lowest + 1].argmin()])
    # The longest stretch in which each value is below all before it: how a valley is entered.
    longest, first, begin = 0, 0, 0
    for k in range(1, lowest + 1):
        if curve[k] >= curve[k - 1]:
            begin = k
        if k - begin > longest:
            longest, first = k - begin, begin
    valley = float(rates[first + round(longest * 2 / 3)])
    note = f"begin with {valley:.2g}" if diverged else f"begin with {valley:.2g}; the loss never exploded, go higher"
    return RangeTest(lrs, losses, smoothed, steepest, valley, float(rates[lowest]) / 10, diverged, note)
