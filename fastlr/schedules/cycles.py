"""Schedules that rise and fall: cosines, cycles, and triangles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from .. import checks
from ..checks import shown
from . import equations
from .base import Numbers, Schedule, check_ordered, count, fix, from_zero, one_of, within
from .staging import Several


@dataclass(frozen=True, repr=False)
class Cosine(Schedule, equation=equations.cosine):
    """Half a cosine from the first rate to the last: `end + (lr - end) (1 + cos(pi min(n / steps, 1))) / 2`.

    After `steps` it stays at `end` (PyTorch's CosineAnnealingLR rises again).

    Args:
        lr: the first rate, >= 0.
        steps: >= 1; without a warmup that is added.
        end: the last rate, >= 0.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """

    lr: Numbers
    steps: int
    end: Numbers = field(default=0.0, kw_only=True)


@dataclass(frozen=True, repr=False)
class CosineRestarts(Schedule, equation=equations.cosine_restarts):
    """Cosine with warm restarts: `end + (lr - end) decay**i (1 + cos(pi t / T)) / 2` in period i, t steps into it.

    Args:
        lr: the rate at the start and at each restart, >= 0.
        steps: of the first period, >= 1.
        growth: each period is this many times as long as the one before, a whole number >= 1.
        decay: factor on the height of each period after the last one's, in [0, 1].
        end: the lowest rate, >= 0.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, T_0 and T_mult.
    """

    lr: Numbers
    steps: int
    growth: int = field(default=1, kw_only=True)
    decay: Annotated[float, within(checks.FRACTION)] = field(default=1.0, kw_only=True)
    end: Numbers = field(default=0.0, kw_only=True)

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.steps * sum(self.growth**k for k in range(4))

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        return {**super().arguments(), "equal_periods": self.growth == 1}


@dataclass(frozen=True, repr=False)
class OneCycle(Schedule, equation=equations.one_cycle):
    """Up to a peak and down again: from `lr / div` to `lr`, then to `lr / div / final_div`.

    Two phases: up for `rise steps`, down for the rest. Three: down to `lr / div` in as many steps as up, then on to the
    end. Steps are counted so that the peak is at `rise steps - 1` and the end at `steps - 1`, as in PyTorch's
    OneCycleLR; after that the last value stays (PyTorch's raises). Momentum is not touched: `Cyclic` or `1 - ...` of
    your own does that, for `betas` or `momentum`.

    Args:
        lr: the peak, >= 0.
        steps: of the whole cycle, >= 2.
        rise: share of the steps that go up, in (0, 1); with three phases below 0.5.
        div: the first rate is `lr / div`.
        final_div: the last is `lr / div / final_div`.
        shape: "cosine" or "linear".
        phases: 2 or 3.

    Source: Smith and Topin 2018, arXiv:1708.07120, section 3; defaults of PyTorch.
    """

    lr: Numbers
    steps: int
    rise: Annotated[float, within(checks.FRACTION)] = field(default=0.3, kw_only=True)
    div: Annotated[float, within(checks.AT_LEAST_ONE)] = field(default=25.0, kw_only=True)
    final_div: Annotated[float, within(checks.AT_LEAST_ONE)] = field(default=1e4, kw_only=True)
    shape: Annotated[str, one_of("cosine", "linear")] = field(default="cosine", kw_only=True)
    phases: int = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phases not in (2, 3):
            raise ValueError(f"phases must be 2 or 3, got {shown(self.phases)}.")
        up = self.rise * self.steps - 1  # where the peak is; the end is at steps - 1
        if not 0 < up < (self.steps - 1) / (self.phases - 1):
            raise ValueError(
                f"rise={self.rise} of {self.steps} steps leaves a phase without steps. Take more, or another share."
            )

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        start, up = _divided(self.lr, self.div), self.rise * self.steps - 1
        down = [(2 * up, start)] if self.phases == 3 else []
        last = (self.steps - 1.0, _divided(start, self.final_div))
        ends, values = zip((0.0, start), (up, self.lr), *down, last, strict=True)
        return {"ends": Several(ends), "values": Several(values), "shape": self.shape}


def _divided(value: Any, divisor: float) -> Any:
    """A number, or one for each model, divided."""
    return tuple(x / divisor for x in value) if isinstance(value, tuple) else value / divisor


@dataclass(frozen=True, repr=False)
class Cyclic(Schedule, equation=equations.cyclic):
    """A triangle between two rates, over and over: `low + (high - low) max(0, 1 - |x|) scale`.

    With `c = floor(1 + n / (up + down))` and x from -1 up to 0 at the peak and to 1 down; scale is 1 ("triangular"),
    `1 / 2**(c - 1)` ("triangular2") or `gamma**n` ("exp_range").

    Args:
        low: the lower rate, >= 0.
        high: the upper one of the first cycle, >= low.
        up: steps from low to high, >= 1.
        down: steps back; default as many.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: for "exp_range", in [0, 1].

    Source: Smith 2017, arXiv:1506.01186, section 3; modes and names of PyTorch's CyclicLR.
    """

    low: Numbers
    high: Numbers
    up: int
    down: int | None = field(default=None, kw_only=True)
    mode: Annotated[str, one_of("triangular", "triangular2", "exp_range")] = field(default="triangular", kw_only=True)
    gamma: Annotated[float, within(checks.FRACTION)] = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        fix(self, down=self.up if self.down is None else count("down", self.down))
        check_ordered(self.low, self.high)

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 4 * (self.up + self.down)  # type: ignore[operator]

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        return {**super().arguments(), "period": self.up + self.down}  # type: ignore[operator]


@dataclass(frozen=True, repr=False)
class WarmupStableDecay(Schedule, equation=equations.warmup_stable_decay):
    """Warm up, stay, cool down: `lr (n + 1) / warmup_steps`, then `lr`, at last `end + (lr - end) g(f)`.

    f goes from `1 / decay_steps` to 1 in the cooldown; g is `1 - f` ("linear"), `(1 + cos(pi f)) / 2` ("cosine") or
    `1 - sqrt(f)` ("1-sqrt").

    Args:
        lr: the rate in the middle, >= 0.
        steps: of it all, warmup and cooldown included.
        warmup_steps: >= 0.
        decay_steps: of the cooldown, >= 1.
        shape: of the cooldown.
        end: the last rate, >= 0.

    Source: Hu et al. 2024, arXiv:2404.06395, section 4; 1-sqrt: Haegele et al. 2024, arXiv:2405.18392, section 3.
    """

    lr: Numbers
    steps: int
    warmup_steps: Annotated[int, from_zero] = field(default=0, kw_only=True)
    decay_steps: int = field(kw_only=True)
    shape: Annotated[str, one_of("linear", "cosine", "1-sqrt")] = field(default="1-sqrt", kw_only=True)
    end: Numbers = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} are more than steps={self.steps}."
            )

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        begin = self.steps - self.decay_steps
        return {**super().arguments(), "begin": begin, "warmup_steps": self.warmup_steps or None}


@dataclass(frozen=True, repr=False)
class SlantedTriangular(Schedule, equation=equations.slanted_triangular):
    """A short way up and a long way down: `lr (1 + p (ratio - 1)) / ratio`.

    With `cut = floor(steps cut_fraction)`, `p = n / cut` before it and `1 - (n - cut) / (steps - cut)` after it.

    Args:
        lr: the peak, >= 0.
        steps: >= 2.
        cut_fraction: share of the steps that go up, in (0, 1).
        ratio: how much smaller the lowest rate is than the peak, >= 1.

    Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.2, eq. 3, with `(1 / cut_fraction - 1) cut` written as
    `steps - cut`, which it is for whole numbers.
    """

    lr: Numbers
    steps: int
    cut_fraction: Annotated[float, within(checks.FRACTION)] = field(default=0.1, kw_only=True)
    ratio: Annotated[float, within(checks.AT_LEAST_ONE)] = field(default=32.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < int(self.steps * self.cut_fraction) < self.steps:
            raise ValueError(
                f"cut_fraction={self.cut_fraction} of {self.steps} steps leaves no steps up, or none down."
            )

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        cut = int(self.steps * self.cut_fraction)
        return {"lr": self.lr, "cut": cut, "rest": self.steps - cut, "ratio": self.ratio}
