"""Groups whose hyperparameters follow schedules: numbers where everybody looks, the schedules beside them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..hyperparameters import Hyper
from ..schedules import Function, Plateau, Schedule
from ..step import scheduled
from ..step.scheduled import plateaus_of

__all__ = ["SCHEDULES", "Followed", "evaluated", "examine", "follows", "plateaus", "resolved", "settle", "show"]

SCHEDULES = "schedules"  # the key in a group


class Followed(dict[str, Any]):
    """The schedules of a group: name to schedule, or to a tuple with schedules in it.

    Attributes:
        shown: what stands in the group for each.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shown: dict[str, Any] = {}


def follows(value: Any) -> bool:
    """Whether a hyperparameter follows a schedule, or a part of it does."""
    if isinstance(value, tuple | list):
        return any(map(follows, value))
    return isinstance(value, Schedule) or (callable(value) and not isinstance(value, type))


def _as_schedules(value: Any) -> Any:
    """A hyperparameter whose functions of the step are schedules."""
    if isinstance(value, tuple | list):
        return tuple(map(_as_schedules, value))
    return Function(value) if follows(value) and not isinstance(value, Schedule) else value


def evaluated(value: Any, number: Callable[[Schedule], float]) -> Any:
    """A hyperparameter with numbers in the place of schedules; NaN where a schedule fails."""
    if isinstance(value, tuple | list):
        return tuple(evaluated(part, number) for part in value)
    if not isinstance(value, Schedule):
        return value
    try:
        return float(number(value))
    except Exception:  # in a function of the user's; the step that needs the number raises it
        return math.nan


def examine(hyper: Hyper[Any], value: Any, step: int) -> None:
    """Refuse schedules that do not fit, as a native optimizer does when one is set: by their value for the next step.

    Args:
        hyper: the hyperparameter.
        value: its value, with schedules where it follows some.
        step: steps made.

    Raises:
        ValueError: if a schedule gives what is out of range; what a function of the user's raises is passed on.
    """
    scheduled.examine(hyper.name, hyper, value, step)


def _same(a: Any, b: Any) -> bool:
    """Whether two numbers, or tuples of them, are the same; NaN is NaN."""
    return a is b or bool(a == b) or repr(a) == repr(b)


def resolved(g: int, group: dict[str, Any], names: Sequence[str], numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hyperparameters of a group, with schedules where they follow some.

    A number that somebody has set takes the place of a schedule, as anywhere in fastlr. But one that a scheduler of
    PyTorch has set does not: both would be at work on the same number.

    Args:
        g: the index of the group.
        group: the group.
        names: of the hyperparameters.
        numbers: what stands in the group for each.

    Raises:
        ValueError: if a scheduler of PyTorch sets what follows a schedule.
    """
    followed = group.get(SCHEDULES)
    if followed:
        shown = getattr(followed, "shown", {})
        values = dict(zip(names, numbers, strict=True))
        for name, schedule in followed.items():
            value = values.get(name)
            initial = group.get(f"initial_{name}")
            if name not in shown or _same(value, shown[name]) or (initial is not None and _same(value, initial)):
                values[name] = schedule
            elif initial is not None and not follows(value):
                raise ValueError(
                    f"{name} of group {g} follows {schedule!r}, and a scheduler of PyTorch sets it to {value!r}: it "
                    "can follow only one of them. Give the optimizer a number, or leave the scheduler out; where one "
                    "is demanded, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0) changes nothing."
                )
        numbers = tuple(values[name] for name in names)
    return tuple(map(_as_schedules, numbers)) if any(map(follows, numbers)) else numbers


def settle(g: int, group: dict[str, Any], names: Sequence[str], values: Sequence[Any]) -> None:
    """Put a group's schedules where they belong, once engines have taken over its hyperparameters.

    Args:
        g: the index of the group.
        group: the group.
        names: of the hyperparameters.
        values: as `resolved` returned them.
    """
    followed = {name: value for name, value in zip(names, values, strict=True) if follows(value)}
    before = group.get(SCHEDULES) or {}
    for name in before.keys() - followed.keys():
        warnings.warn(
            f"{name} of group {g} followed {before[name]!r} and was set to {group.get(name)!r}, which takes its place.",
            UserWarning,
            stacklevel=2,
        )
    if before != followed or (followed and not isinstance(before, Followed)):
        new = Followed(followed)
        new.shown = {n: v for n, v in getattr(before, "shown", {}).items() if n in followed}
        group[SCHEDULES] = new
        if not followed:
            del group[SCHEDULES]


def show(group: dict[str, Any], number: Callable[[Schedule], float]) -> None:
    """Put the numbers for the next step where people look.

    Args:
        group: the group, settled.
        number: the number that a schedule gives for the next step.
    """
    followed = group.get(SCHEDULES)
    if followed:
        for name, value in followed.items():
            group[name] = followed.shown[name] = evaluated(value, number)


def plateaus(group: Mapping[str, Any]) -> Iterator[tuple[str, Plateau]]:
    """The plateaus among the schedules of a group, each with a label that says where it is used."""
    for name, value in (group.get(SCHEDULES) or {}).items():
        for k, part in enumerate(value if isinstance(value, tuple) else [value]):
            for j, plateau in enumerate(plateaus_of(part) if isinstance(part, Schedule) else ()):
                yield f"{name}[{k}], {j}", plateau
