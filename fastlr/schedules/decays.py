"""Schedules that begin high and fall, or that follow values of your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from .. import checks
from ..checks import MOST, shown
from . import equations
from .base import Numbers, Schedule, fix, numbers, one_of
from .staging import Several


@dataclass(frozen=True, repr=False)
class Constant(Schedule, equation=equations.constant):
    """The same value at every step.

    Args:
        value: >= 0.
    """

    value: Numbers


@dataclass(frozen=True, repr=False)
class TimeBased(Schedule, equation=equations.time_based):
    """Time-based decay as a recursion: `lr[n + 1] = lr[n] / (1 + decay n)`, from `lr[0] = lr`.

    In closed form `lr / prod(1 + decay k, k < n)`. The first six factors are multiplied; of the others the logarithms
    are summed by Euler and Maclaurin's formula with eight corrections (Stirling's series), whose integral is taken
    without cancellation. It agrees with the recursion to 1e-12. The rate falls faster than any power of n: for
    `lr / (1 + decay n)` take `InverseTime`.

    Args:
        lr: the first rate, >= 0.
        decay: >= 0.
    """

    lr: Numbers
    decay: Numbers


@dataclass(frozen=True, repr=False)
class InverseTime(Schedule, equation=equations.inverse_time):
    """Inverse-time decay: `lr / (1 + decay n)`, or with `floor(n / every)` for n in a staircase.

    Args:
        lr: the first rate, >= 0.
        decay: >= 0.
        every: steps of the staircase; default 1: none.
    """

    lr: Numbers
    decay: Numbers
    every: int = 1

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        return {**super().arguments(), "staircase": self.every > 1}


@dataclass(frozen=True, repr=False)
class StepDecay(Schedule, equation=equations.step_decay):
    """Step-based decay: `lr factor**floor(n / every)`, or `lr factor**floor((1 + n) / every)`.

    Args:
        lr: the first rate, >= 0.
        factor: of each drop, >= 0.
        every: steps between drops, >= 1.
        count: "n" (default; PyTorch's StepLR): the first drop comes after `every` updates. "1 + n" (the form of the
            textbooks): one update earlier.
    """

    lr: Numbers
    factor: Numbers
    every: int
    count: Annotated[str, one_of("n", "1 + n")] = field(default="n", kw_only=True)

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 6 * self.every


@dataclass(frozen=True, repr=False)
class MultiStep(Schedule, equation=equations.multi_step):
    """Drops at given steps: `lr factor**(number of milestones <= n)`.

    Args:
        lr: the first rate, >= 0.
        milestones: the steps from which on each drop holds, rising.
        factor: of each drop, >= 0.
    """

    lr: Numbers
    milestones: tuple[int, ...]
    factor: Numbers = 0.1


@dataclass(frozen=True, repr=False)
class Exponential(Schedule, equation=equations.exponential):
    """Exponential decay: `lr exp(-decay n)`; with `every`, `floor(n / every) every` stands for n (a staircase).

    Give one of:

    Args:
        lr: the first rate, >= 0.
        decay: per step, >= 0.
        factor: per step, > 0: `decay = -log(factor)`; PyTorch's ExponentialLR has it as gamma.
        half_life: steps in which the rate halves, > 0: `decay = log(2) / half_life`.
        every: steps of the staircase; default 1: none.
        floor: the rate never falls below it.
    """

    lr: Numbers
    decay: Numbers | None = None
    factor: Numbers | None = field(default=None, kw_only=True)
    half_life: float | None = field(default=None, kw_only=True)
    every: int = field(default=1, kw_only=True)
    floor: Numbers = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        given = {k: getattr(self, k) for k in ("decay", "factor", "half_life") if getattr(self, k) is not None}
        if len(given) != 1:
            raise ValueError(f"give one of decay, factor and half_life, got {', '.join(given) or 'none'}.")
        ((name, value),) = given.items()
        value = checks.number(name, value) if name == "half_life" else numbers(name, value)
        if name != "decay" and 0 in (value if isinstance(value, tuple) else (value,)):
            raise ValueError(f"{name} must be positive, got 0.")
        super().__post_init__()
        fix(self, **{name: value})

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return max(1, int(min(5 * self.half_life, MOST))) if self.half_life else max(100, 10 * self.every)

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        return {**super().arguments(), "staircase": self.every > 1, "lowest": self.floor}


@dataclass(frozen=True, repr=False)
class Linear(Schedule, equation=equations.linear):
    """From one value to another in a straight line: `start + (end - start) min(n / steps, 1)`.

    Args:
        start: the first value, >= 0.
        end: the value from step `steps` on, >= 0.
        steps: >= 1.
    """

    start: Numbers
    end: Numbers
    steps: int


@dataclass(frozen=True, repr=False)
class Polynomial(Schedule, equation=equations.polynomial):
    """Polynomial decay: `end + (lr - end) (1 - min(n / steps, 1))**power`.

    Args:
        lr: the first rate, >= 0.
        steps: >= 1.
        power: > 0.
        end: the last rate, >= 0.
        cycle: instead of staying at `end`, stretch the decay each time it is over: `steps` becomes
            `steps ceil(n / steps)` (Keras, TensorFlow).
    """

    lr: Numbers
    steps: int
    power: float = 1.0
    end: Numbers = field(default=0.0, kw_only=True)
    cycle: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, repr=False)
class InverseSqrt(Schedule, equation=equations.inverse_sqrt):
    """Linear to the peak, then an inverse root: `lr min((n + 1) / warmup_steps, sqrt(warmup_steps / (n + 1)))`.

    Args:
        lr: the peak, reached by update number `warmup_steps`, >= 0.
        warmup_steps: steps up, >= 1.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 3, with the peak `d_model**-0.5 warmup_steps**-0.5` called lr;
    its step_num is n + 1.
    """

    lr: Numbers
    warmup_steps: int

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 10 * self.warmup_steps


@dataclass(frozen=True, repr=False)
class Piecewise(Schedule, equation=equations.piecewise):
    """Constant pieces: `values[k]` from step `boundaries[k - 1]` on.

    Args:
        boundaries: the steps at which the next value begins, rising.
        values: one more than boundaries, each >= 0.
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"values must be one more than boundaries, got {len(self.values)} and {len(self.boundaries)}."
            )


@dataclass(frozen=True, repr=False)
class Interpolated(Schedule, equation=equations.interpolated):
    """Between given values at given steps, in straight lines or along cosines; constant after the last.

    Args:
        steps: where the values are reached, rising; the first value is at step 0.
        values: one more than steps, each >= 0.
        shape: "linear" or "cosine".
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]
    shape: Annotated[str, one_of("linear", "cosine")] = field(default="linear", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) != len(self.steps) + 1:
            raise ValueError(f"values must be one more than steps, got {len(self.values)} and {len(self.steps)}.")

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        return {**super().arguments(), "steps": Several((0, *self.steps))}


@dataclass(frozen=True, repr=False)
class Function(Schedule, equation=equations.call):
    """A function of your own of the step.

    Args:
        function: `function(n)`, a number for the number of updates made before, which is an int; for a population it
            may return an array `(population,)`.

    It cannot be saved: pass it again when a state is loaded. For a GPU it must be one that Numba can compile, of a
    float64 `n`, and return one number for all models.
    """

    function: Callable[[Any], Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be callable, got {shown(self.function)}.")

    def to_dict(self) -> dict[str, Any]:
        """Refuse: a function is not data."""
        raise TypeError(f"{shown(self)} is a function of your own, which cannot be saved. Pass it again after loading.")
