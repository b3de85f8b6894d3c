"""The schedule that drops when a metric no longer gets better, and what it remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from .. import checks
from . import equations
from .base import Numbers, Schedule, fix, from_zero, one_of, within
from .decays import Constant
from .staging import Memory


@dataclass(frozen=True, repr=False)
class Plateau(Schedule, equation=equations.plateau):
    """A schedule that drops when a metric stops getting better: `max(scale a(n), floor)`; the only one with memory.

    The object only describes it: if you call it yourself, the scale is 1. In an optimizer the scale begins at 1 and
    `opt.observe(metric)` changes it, by the rules of PyTorch's ReduceLROnPlateau: a metric is better if it is below
    `best - threshold abs(best)`, or with threshold_mode "abs" below `best - threshold`; after more than `patience`
    observations in a row that are not, the scale is multiplied by `factor`, and the next `cooldown` observations do not
    count as bad. (Of a negative metric PyTorch takes `best (1 - threshold)`, which is not a margin but its opposite.)

    What it remembers is saved with the optimizer. The memory belongs to this object: one object used in several places
    has one memory, and a new object starts afresh, even if it is equal to the one before.

    Args:
        schedule: what is multiplied; a number stands for `Constant`.
        factor: of each drop, in (0, 1).
        patience: observations without improvement that are let pass, >= 0.
        threshold: what counts as better, >= 0.
        cooldown: observations after a drop that do not count as bad, >= 0.
        mode: "min" if a smaller metric is better, else "max".
        threshold_mode: "rel" or "abs".
        floor: the value never falls below it.
        eps: a drop that would lower the hyperparameter by no more than this is not made, >= 0.
    """

    schedule: Schedule
    factor: Annotated[float, within(checks.PROPER_FRACTION)] = 0.1
    patience: Annotated[int, from_zero] = 10
    threshold: float = 1e-4
    cooldown: Annotated[int, from_zero] = 0
    mode: Annotated[str, one_of("min", "max")] = field(default="min", kw_only=True)
    threshold_mode: Annotated[str, one_of("rel", "abs")] = field(default="rel", kw_only=True)
    floor: Numbers = field(default=0.0, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            fix(self, schedule=Constant(self.schedule))
        super().__post_init__()

    def arguments(self) -> dict[str, Any]:
        """As `Schedule.arguments`."""
        return {**super().arguments(), "scale": Memory(self, 1.0), "lowest": self.floor}


@dataclass
class Observed:
    """What a `Plateau` remembers.

    Attributes:
        scale: the factor on its schedule.
        best: the best metric so far, or None.
        bad: observations in a row that were not better.
        cooling: observations left that do not count as bad.
    """

    scale: float = 1.0
    best: float | None = None
    bad: int = 0
    cooling: int = 0

    def observe(self, plateau: Plateau, metric: float) -> bool:
        """Take account of a metric; whether it is time to drop."""
        sign = 1.0 if plateau.mode == "min" else -1.0
        if self.best is None:
            better = sign * metric < math.inf
        else:
            margin = plateau.threshold
            if plateau.threshold_mode == "abs":
                bound = self.best - sign * margin
            else:
                bound = self.best * (1.0 - sign * math.copysign(margin, self.best))
            better = sign * metric < sign * bound
        if better:
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad <= plateau.patience:
            return False
        self.cooling, self.bad = plateau.cooldown, 0
        return True
