"""The learning-rate range test: try rates from small to large, and see where the loss falls and where it diverges."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import arguments, checks, plots
from ..arrays.places import Place
from ..optimizer import Optimizer
from ..schedules import Schedule
from ..step.stepper import Accumulation

__all__ = ["RangeTest", "evaluate", "find_lr"]

_MAX_STEPS = 1_000_000  # with more, no test could tell neighboring rates apart


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
        note: how to read the curve, in words.
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
        """The rate to begin with: `valley`; None if the curve suggests none."""
        return self.valley

    def plot(self, path: str | Path | None = None) -> None:
        """Draw the curve.

        Args:
            path: a file ending in .png, .svg or .pdf; None: in the terminal.

        Raises:
            ImportError: if matplotlib, or plotext for the terminal, is missing.
        """
        good = np.isfinite(self.losses)
        curves = {name: (self.lrs[good], y[good]) for name, y in (("loss", self.losses), ("smoothed", self.smoothed))}
        plots.draw(curves, path, xlabel="learning rate", ylabel="loss", xscale="log", title=self.note)

    def __repr__(self) -> str:
        """The suggested rates and the note."""
        shown = {name: getattr(self, name) for name in ("steepest", "valley", "minimum_tenth")}
        values = ", ".join(f"{k}={v:.3g}" if v is not None else f"{k}=None" for k, v in shown.items())
        return f"RangeTest({values}, {len(self.lrs)} rates: {self.note})"


def evaluate(fun: Callable[[Any], Any], params: Any) -> tuple[float, Any]:
    """Call the user's function of the parameters, which may return gradients or fill them in itself.

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


@arguments.answered
def find_lr(
    opt: Any,
    fun: Callable[[Any], Any],
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    *,
    smoothing: float = 0.9,
    diverge: float = 1.0,
) -> RangeTest:
    """Run the range test with your own optimizer and your own step.

    The rate rises from `low` to `high` in equal ratios, one step each; it ends early when the loss is not finite or
    its average has risen by `diverge` times as much as it had fallen. Then parameters, states, counters,
    hyperparameters and `opt.grads` are restored, bit for bit, also if `fun` raises. Groups keep the ratio that their
    rate has to the optimizer's before the test. A number that is added to the loss changes nothing.

    Args:
        opt: the optimizer; any rule, on the CPU or a GPU, of fastlr or of `fastlr.torch`.
        fun: `fun(params) -> (loss, grads)`, or `fun(params) -> loss` having filled `opt.grads`; for each call the next
            batch. It gets `opt.params`. With `fastlr.torch` it clears the gradients, calls `backward` and returns the
            loss; what else it changes, such as the statistics of batch norm, stays changed.
        low: first rate, > 0.
        high: last rate, > low.
        steps: rates to try, from 5 to 1,000,000.
        smoothing: share of the average that is kept at each step, in [0, 1).
        diverge: how many times its fall the average may rise above its lowest value, >= 1. Default 1: up to where it
            came from.

    Returns:
        The curve and its suggestions.

    Raises:
        TypeError: if `fun` returns something else.
        ValueError: if an argument is out of range, the optimizer's rule has no learning rate, or its rate is 0 now, so
            that those of groups have no ratio to it.

    Source: Smith 2017, arXiv:1506.01186, section 3.3.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([5.0, 5.0])
        >>> found = fastlr.find_lr(fastlr.SGD(w), lambda p: (float(p @ p), 2 * p), 1e-4, 10.0)
        >>> 0.05 < found.suggestion < 1.0, w
        (True, array([5., 5.]))
    """
    low = checks.number("low", low, checks.POSITIVE)
    high = checks.number("high", high, checks.Interval(low))
    smoothing = checks.number("smoothing", smoothing, checks.RATE)
    diverge = checks.number("diverge", diverge, checks.AT_LEAST_ONE)
    steps = checks.whole("steps", steps, 5, _MAX_STEPS)
    lrs = np.geomspace(low, high, steps)
    trial = getattr(opt, "_trial", functools.partial(Trial, opt))()
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    try:
        for k, lr in enumerate(lrs):
            trial.set(float(lr))
            loss, grads = trial.evaluate(fun)
            losses.append(loss)
            average = smoothing * average + (1 - smoothing) * loss
            smoothed.append(average / (1 - smoothing ** (k + 1)))
            diverged = _exploded(np.array(losses), np.array(smoothed), diverge)
            if diverged:
                break
            trial.step(grads)
    finally:
        trial.restore()
    return _read(lrs[: len(losses)], np.array(losses), np.array(smoothed), diverged, smoothing)


class Trial:
    """What a range test needs of an optimizer: other rates for a while, then everything back as it was.

    Args:
        opt: the optimizer.

    Raises:
        ValueError: if it has no learning rate, or one of 0, to which those of groups have no ratio.
    """

    def __init__(self, opt: Optimizer) -> None:
        if "lr" not in opt.groups.names:
            raise ValueError(f"{type(opt).__name__} of rule {opt.rule.name!r} has no lr to look for.")
        self._opt, self._ratios, self._before = opt, _ratios(opt), opt.snapshot()
        place, grads = self._gradients()
        self._grads = None if grads.memory is None else place.download(grads.memory)
        self._received = grads.received

    def _gradients(self) -> tuple[Place, Accumulation]:
        """Where `opt.grads` is, and what it holds; reading `opt.grads` itself would allocate it."""
        stepper = self._opt._stepper
        return stepper.state.parameters.place, stepper.accumulation

    def set(self, lr: float) -> None:
        """Let the next step have a rate; groups keep their ratios."""
        self._opt.lr = lr
        for pattern, ratio in self._ratios.items():
            self._opt.groups[pattern].lr = lr * ratio

    def evaluate(self, fun: Callable[[Any], Any]) -> tuple[float, Any]:
        """Call the user's function with the parameters, as `evaluate` does."""
        return evaluate(fun, self._opt.params)

    def step(self, grads: Any) -> None:
        """Make a step."""
        self._opt.step(grads)

    def restore(self) -> None:
        """Put everything back as it was."""
        self._opt.restore(self._before)
        place, grads = self._gradients()
        if grads.memory is not None:
            if self._grads is None:
                place.fill(grads.memory, 0)
            else:
                place.upload(grads.memory, self._grads)
        grads.received = self._received


def _ratios(opt: Optimizer) -> dict[str, Any]:
    """For each pattern whose group has a learning rate of its own, the ratio of that rate now to the optimizer's."""

    def now(rate: Any) -> Any:
        return rate(opt.steps) if isinstance(rate, Schedule) else rate

    settings = opt.groups.everything()
    base = now(settings.pop("")["lr"])
    rates = {pattern: now(own["lr"]) for pattern, own in settings.items() if "lr" in own}
    if rates and not np.all(base):
        raise ValueError(
            f"the optimizer's lr is 0 at step {opt.steps}, so the rates of its groups have no ratio to it that the "
            "test could keep. Set opt.lr to another value, or let the test begin after the warmup's first step."
        )
    return {pattern: rate / base for pattern, rate in rates.items()}


def _noise(losses: np.ndarray) -> float:
    """The standard deviation of losses from batch to batch, at least their rounding in float32.

    From the median of second differences, which neither a trend nor an explosion at the end affects: for normal noise
    they have sqrt(6) times its standard deviation, and their median magnitude is 0.6745 of theirs.
    """
    bends = np.abs(np.diff(losses, 2))
    rounding = 8 * float(np.finfo(np.float32).eps) * float(np.abs(losses).max())
    return max(rounding, float(np.median(bends)) / (0.6745 * math.sqrt(6)) if bends.size else 0.0)


def _exploded(losses: np.ndarray, smoothed: np.ndarray, diverge: float) -> bool:
    """Whether the loss has exploded."""
    if not np.isfinite(losses[-1]):
        return True
    if len(losses) < 10:  # too few to tell an explosion from noise
        return False
    lowest = int(smoothed.argmin())
    fall = smoothed[: lowest + 1].max() - smoothed[lowest]
    return bool(smoothed[-1] - smoothed[lowest] > max(diverge * fall, 7 * _noise(losses)))


def _read(lrs: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, diverged: bool, smoothing: float) -> RangeTest:
    """What a curve of losses suggests."""
    end = len(lrs) - 1 if diverged else len(lrs)  # without the loss that exploded
    curve, rates = smoothed[:end], lrs[:end]
    fell = False
    if end >= 5 and np.isfinite(curve).all():
        left = smoothing ** np.arange(1.0, end + 1)  # weight of what came before the first loss
        average = (1 - smoothing) / (1 + smoothing) * (1 + left) / (1 - left)
        spread = _noise(losses[:end]) * np.sqrt(average)  # the standard deviation of the smoothed losses
        start = np.median(curve[: max(1, end // 5)])
        fell = bool(np.any(start - curve > 4 * spread))
    if not fell:
        if diverged:
            note = "the loss exploded without having fallen: try smaller rates"
        else:
            note = "the loss did not fall: try larger rates, or more steps"
        return RangeTest(lrs, losses, smoothed, None, None, None, diverged, note)
    lowest = int((curve + 2 * spread).argmin())  # the spread keeps a few lucky batches at the start from being it
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
    higher = "" if diverged or curve[-1] > start else "; the loss never exploded, go higher"
    note = f"begin with {valley:.2g}{higher}"
    return RangeTest(lrs, losses, smoothed, steepest, valley, float(rates[lowest]) / 10, diverged, note)
