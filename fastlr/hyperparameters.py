"""Hyperparameters: of what kind each one is, its range, its default, and the form that a user's value takes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, overload

import numpy as np

from . import checks
from .checks import FINITE, Interval
from .schedules import Function, Schedule

__all__ = ["Hyper", "Number", "declared", "fixed", "flag", "follows", "number", "pair", "part_labels"]

Number = float | np.ndarray
T = TypeVar("T")


@dataclass(frozen=True)
class Hyper(Generic[T]):
    """A hyperparameter, declared in the class of an optimizer: `betas = pair("beta1", "beta2", RATE)`.

    An instance has its value there: reading gives what the optimizer itself uses, setting checks first.

    Attributes:
        name: in the API.
        kind: "number", "flag" or "pair".
        interval: where each number of it must be.
        parts: the names that the rule has for the numbers of a pair.
        optional: whether None is allowed, which turns it off.
        per_model: whether a population can have one for each model.
        scheduled: whether it may follow a schedule.
        starts: the state whose first value it is, or "". Such a number is fixed when the optimizer is built: it follows
            no schedule and is the same for all groups and models.
        default: if nobody gives another; None where there is none.
        sentence: what it is, from the docstring of the class.
    """

    name: str = ""
    kind: str = "number"
    interval: Interval = FINITE
    parts: tuple[str, ...] = ()
    optional: bool = False
    per_model: bool = True
    scheduled: bool = True
    starts: str = ""
    default: Any = field(default=None, compare=False)
    sentence: str = field(default="", compare=False)

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the name of the class attribute."""
        object.__setattr__(self, "name", name)

    @overload
    def __get__(self, instance: None, owner: type) -> Hyper[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        """The value of an optimizer; of the class the declaration."""
        if instance is None:
            return self
        if self.starts:
            return vars(instance)[self.name]
        return getattr(instance.groups.defaults, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        """Never called: `Optimizer.__setattr__` comes first. With it the type checker allows assignments."""
        raise AttributeError(self.name)

    def normal(self, label: str, value: Any, population: int | None = None) -> Any:
        """A user's value in its normal form: bool, float, read-only array, schedule, None, or a tuple of those.

        Args:
            label: what it is called in messages.
            value: what the user gave. A function of the step stands for a `schedules.Function`.
            population: number of models, or None.

        Raises:
            TypeError: if it is of the wrong kind.
            ValueError: if it is outside its range or of the wrong shape.
        """
        if value is None and self.optional:
            return None
        if self.kind == "flag":
            several = self.per_model and population is not None and not isinstance(value, bool | np.bool_)
            return checks.mask(label, value, population) if several else checks.flag(label, value)
        if self.kind == "number":
            return self._one(label, value, population)
        if not isinstance(value, tuple | list) or len(value) != len(self.parts):
            raise ValueError(f"{label} must be {len(self.parts)} numbers, got {checks.shown(value)}.")
        return tuple(self._one(f"{label}[{k}]", one, population) for k, one in enumerate(value))

    def _one(self, label: str, value: Any, population: int | None) -> Any:
        if not self.scheduled or not (isinstance(value, Schedule) or callable(value)) or isinstance(value, type):
            return checks.bounded(label, value, self.interval, population if self.per_model else None)
        schedule = value if isinstance(value, Schedule) else Function(value)
        models = schedule.staged.models
        if models not in (None, population):
            wanted = "one number: only a population takes several, see fastlr.flatten"
            if population is not None:
                wanted = f"one number, or one for each of the {population} models"
            raise ValueError(f"{label} follows a schedule that gives {models} numbers, expected {wanted}.")
        return schedule

    def by_part(self, value: Any) -> list[tuple[str, Any]]:
        """A value under the rule's names."""
        return list(zip(self.parts, value, strict=True)) if self.parts else [(self.name, value)]


def number(interval: Interval = FINITE) -> Hyper[Number]:
    """A number, or a schedule for it."""
    return Hyper(interval=interval)


def pair(first: str, second: str, interval: Interval = FINITE) -> Hyper[tuple[Number, Number]]:
    """Two numbers, with the rule's names for them."""
    return Hyper(kind="pair", interval=interval, parts=(first, second))


def flag() -> Hyper[bool]:
    """True or False, which chooses between branches of the rule."""
    return Hyper(kind="flag", per_model=False, scheduled=False)


def fixed(starts: str, interval: Interval = FINITE) -> Hyper[float]:
    """The number at which a state of the rule begins."""
    return Hyper(interval=interval, starts=starts, per_model=False, scheduled=False)


def _sentences(docstring: str | None) -> dict[str, str]:
    """What stands in a docstring about each argument."""
    _, _, section = inspect.cleandoc(docstring or "").partition("\nArgs:\n")
    section = section.partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in found}


@functools.cache
def declared(optimizer: type) -> Mapping[str, Hyper[Any]]:
    """The hyperparameters that a class and its bases declare, with their defaults, which are those of `__init__`."""
    out: dict[str, Hyper[Any]] = {}
    defaults: dict[str, Any] = {}
    sentences: dict[str, str] = {}
    for cls in reversed(optimizer.__mro__):
        out.update({name: h for name, h in vars(cls).items() if isinstance(h, Hyper)})
        sentences.update(_sentences(cls.__doc__))
        if "__init__" in vars(cls) and cls is not object:
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            defaults.update({p.name: p.default for p in parameters if p.default is not p.empty})
    return {n: replace(h, default=defaults.get(n), sentence=sentences.get(n, "")) for n, h in out.items()}


def part_labels(table: Mapping[str, Hyper[Any]]) -> dict[str, tuple[str, Hyper[Any]]]:
    """For each name in a rule, what users call it and the hyperparameter that it belongs to."""
    labels = {}
    for name, h in table.items():
        labels.update({part: (f"{name}[{k}]", h) for k, part in enumerate(h.parts)} or {name: (name, h)})
    return labels


def follows(value: Any) -> bool:
    """Whether a hyperparameter, or a part of it, follows a schedule."""
    return any(isinstance(one, Schedule) for one in (value if isinstance(value, tuple) else [value]))
