"""Groups whose hyperparameters follow schedules: numbers where everybody looks, the schedules beside them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..hyperparameters import follows
from ..schedules import Function, Plateau, Schedule
from ..step.scheduled import plateaus_of
from .engines import holds_tensors

__all__ = ["SCHEDULES", "Followed", "Group", "GroupValues", "as_schedules", "plateaus", "schedules_of"]

Group = dict[str, Any]  # one of `torch.optim.Optimizer.param_groups`
SCHEDULES = "schedules"  # the key in a group


class Followed(dict[str, Any]):
    """The schedules of a group: name to schedule, or to a tuple with schedules in it.

    Attributes:
        shown: what stands in the group for each.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shown: dict[str, Any] = {}


class GroupValues:
    """The hyperparameters of a group as they are when this is made: schedules where they follow some, else numbers.

    A number that somebody has set takes the place of a schedule, as anywhere in fastlr. But one that a scheduler of
    PyTorch has set does not: both would be at work on the same number.

    Args:
        g: the index of the group.
        group: the group.
        names: of the hyperparameters.

    Attributes:
        hyper: the hyperparameters by name.
        numbers: what stands in the group for each since engines have taken them over; None: to be taken over again.
        schedules: what stands in `group["schedules"]`.

    Raises:
        ValueError: if a scheduler of PyTorch sets what follows a schedule.
    """

    def __init__(self, g: int, group: Group, names: Sequence[str]) -> None:
        self._g, self._numbers_of = g, operator.itemgetter(*names)
        self.numbers: tuple[Any, ...] | None = None
        self.schedules = schedules_of(group)
        shown = getattr(self.schedules, "shown", {})
        self.hyper: dict[str, Any] = {name: as_schedules(group[name]) for name in names}
        for name in (name for name in names if name in self.schedules):
            schedule, value, initial = self.schedules[name], group[name], group.get(f"initial_{name}")
            if name not in shown or _same(value, shown[name]) or (initial is not None and _same(value, initial)):
                self.hyper[name] = as_schedules(schedule)
            elif initial is not None and not follows(self.hyper[name]):
                raise ValueError(
                    f"{name} of group {g} follows {schedule!r}, and a scheduler of PyTorch sets it to {value!r}: it "
                    "can follow only one of them. Give the optimizer a number, or leave the scheduler out; where one "
                    "is demanded, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0) changes nothing."
                )

    def are_in(self, group: Group) -> bool:
        """Whether nothing in the group has been set since engines took it over."""
        return self._numbers_of(group) == self.numbers and schedules_of(group) == self.schedules

    def settle(self, group: Group) -> None:
        """Put schedules where they belong in the group, once engines have taken over its hyperparameters."""
        before = schedules_of(group)
        followed = Followed({name: value for name, value in self.hyper.items() if follows(value)})
        for name in before.keys() - followed.keys():
            warnings.warn(
                f"{name} of group {self._g} followed {before[name]!r} and was set to {group.get(name)!r}, which takes "
                "its place.",
                UserWarning,
                stacklevel=2,
            )
        followed.shown = {n: v for n, v in getattr(before, "shown", {}).items() if n in followed}
        if not followed:
            group.pop(SCHEDULES, None)
        elif before != followed or not isinstance(before, Followed):
            group[SCHEDULES] = followed
        self.schedules = dict(followed)
        numbers = self._numbers_of(group)
        self.numbers = None if holds_tensors(numbers) else numbers  # a tensor can change and stay the same object

    def show(self, group: Group, evaluated: Callable[[Any], Any]) -> None:
        """Put the numbers for the next step where people look.

        Args:
            group: the group, settled.
            evaluated: returns a hyperparameter with the numbers for the next step in the place of schedules.
        """
        followed = group.get(SCHEDULES)
        if followed:
            for name, value in followed.items():
                group[name] = followed.shown[name] = evaluated(value)
            if self.numbers is not None:
                self.numbers = self._numbers_of(group)


def schedules_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in `group["schedules"]`."""
    return group.get(SCHEDULES) or {}


def as_schedules(value: Any) -> Any:
    """A hyperparameter whose functions of the step are schedules."""
    if isinstance(value, tuple | list):
        return tuple(map(as_schedules, value))
    is_function = callable(value) and not isinstance(value, Schedule | type)
    return Function(value) if is_function else value


def _same(a: Any, b: Any) -> bool:
    """Whether two numbers, or tuples of them, are the same; NaN is NaN."""
    return a is b or bool(a == b) or repr(a) == repr(b)


def plateaus(schedules: Mapping[str, Any]) -> Iterator[tuple[str, Plateau]]:
    """The plateaus among the schedules of a group, each with a label that says where it is used."""
    for name, value in schedules.items():
        for k, part in enumerate(value if isinstance(value, tuple) else [value]):
            for j, plateau in enumerate(plateaus_of(part) if isinstance(part, Schedule) else ()):
                yield f"{name}[{k}], {j}", plateau
