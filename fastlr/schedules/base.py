"""What schedules have in common, how they are put together, and how their arguments are checked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeAlias, get_type_hints

import numpy as np

from .. import checks
from ..arguments import answered
from ..checks import MOST, shown
from . import equations
from .evaluating import StagedSchedule
from .staging import Equation, HasEquation, Several

__all__ = ["KINDS", "Numbers", "Schedule"]


# How fields are checked: a check takes a field's name and value, and returns what the field holds

Check: TypeAlias = Callable[[str, Any], Any]


def count(name: str, value: Any) -> int:
    """A whole number from 1 on."""
    return checks.whole(name, value, 1)


def from_zero(name: str, value: Any) -> int:
    """A whole number from 0 on."""
    return checks.whole(name, value, 0)


def within(interval: checks.Interval) -> Check:
    """A number in an interval."""
    return functools.partial(checks.number, interval=interval)


def one_of(*known: str) -> Check:
    """One of these words."""

    def check(name: str, value: Any) -> str:
        checks.choices(name, [value], known)
        return str(value)

    return check


def numbers(name: str, value: Any) -> Any:
    """A number, at least 0, or a tuple of one for each model of a population."""
    array = checks.reals(name, value)
    if array.ndim == 0:
        return checks.number(name, value)
    if array.ndim > 1 or not array.size:
        raise ValueError(f"{name} must be a number, or one for each model, got {shown(value)}.")
    return each(name, array.tolist())


def each(name: str, values: Any) -> tuple[float, ...]:
    """Several numbers, each at least 0."""
    return tuple(checks.number(f"{name}[{k}]", x) for k, x in enumerate(values))


def rising(name: str, values: Any) -> tuple[int, ...]:
    """Steps in rising order."""
    try:
        listed = tuple(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of steps, got {shown(values)}.") from None
    steps = tuple(count(f"{name}[{k}]", v) for k, v in enumerate(listed))
    if not steps or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"{name} must be rising and not empty, got {shown(values)}.")
    if steps[-1] > checks.COUNTABLE:  # beyond it, neighbors are the same float
        raise ValueError(f"{name}[{len(steps) - 1}] must be at most 2**53, got {steps[-1]}.")
    return steps


def a_schedule(name: str, value: Any) -> Schedule:
    """A schedule."""
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a schedule, got {shown(value)}.")
    return value


Numbers: TypeAlias = Annotated[float | Sequence[float] | np.ndarray, numbers]  # one, or one for each model

KINDS: dict[str, type[Schedule]] = {}  # every class of schedules by its name


@dataclass(frozen=True, repr=False)
class Schedule(HasEquation):
    """The base class of all schedules; build one of the others, such as `Cosine`."""

    _method: ClassVar[str] = ""  # of a schedule, that makes one of this class from it
    _checks: ClassVar[list[tuple[str, Check]]]  # of fields, by their types

    def __init_subclass__(cls, equation: Equation) -> None:
        cls.equation = staticmethod(equation)
        by_type = {int: count, float: checks.number, bool: checks.flag, Schedule: a_schedule}
        by_type |= {tuple[int, ...]: rising, tuple[float, ...]: each}
        hints = get_type_hints(cls, include_extras=True)
        found = {name: getattr(hint, "__metadata__", [by_type.get(hint)])[0] for name, hint in hints.items()}
        cls._checks = [(name, check) for name, check in found.items() if check is not None]
        KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        if type(self) is Schedule:
            raise TypeError("Schedule is abstract. Build one by its name, such as Cosine(1e-3, steps=100).")
        for name, check in self._checks:
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def arguments(self) -> dict[str, Any]:
        """What the equation takes, by name; those that it does not name are left out."""
        several = {f.name for f in dataclasses.fields(self) if str(f.type).startswith("tuple")}
        return {name: Several(v) if name in several else v for name, v in self.__getstate__().items()}

    @functools.cached_property
    def staged(self) -> StagedSchedule:
        """The schedule as one function of the step and its numbers."""
        return StagedSchedule(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the fields, without what is computed from them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __call__(self, step: Any) -> Any:
        """The value for a step.

        Args:
            step: number of updates made before, >= 0: an int, or an array of integers.

        Returns:
            A float, or a float64 array of the shape of `step`. If the numbers of the schedule differ between the models
            of a population, there is one more dimension at the end.

        Raises:
            TypeError: if it is not a whole number, or an array of them, or a function of your own returns no number.
            ValueError: if it is negative.
        """
        staged = self.staged
        if type(step) is int:
            if not 0 <= step <= MOST:
                limit = "non-negative" if step < 0 else "at most 2**63 - 1"
                raise ValueError(f"step must be {limit}, got {shown(step)}.")
            if not staged.per_model:
                return float(staged.scalar(float(step), staged.numbers))
            return staged.for_models(staged.models)(float(step), staged.numbers)
        steps = checks.readable("step", step)
        if steps.dtype.kind not in "iu":
            raise TypeError(f"step must be a whole number or an array of them, got {shown(step)}.")
        if steps.size and steps.min() < 0:
            raise ValueError(f"step must be non-negative, got {steps.min()}.")
        if steps.ndim == 0:
            return self(int(steps))
        flat = steps.reshape(-1)
        if staged.per_model:
            values = np.array([self(n) for n in flat.tolist()], np.float64)
            models = values.shape[1:] if steps.size or staged.models is None else (staged.models,)
            return values.reshape(steps.shape + models)
        return staged.over_steps(flat).reshape(steps.shape)

    def extent(self) -> int:
        """About how many steps it takes to see what the schedule does; for pictures."""
        inner = [v.extent() for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Schedule)]
        if inner:
            return max(inner)
        steps = getattr(self, "steps", getattr(self, "milestones", getattr(self, "boundaries", 100)))
        return int(steps[-1] * 1.5) if isinstance(steps, tuple) else int(steps)

    # Composition

    @answered
    def warmup(
        self,
        steps: int,
        start: float = 0.0,
        shape: str = "linear",
        *,
        included: bool = False,
        first_at_start: bool = False,
    ) -> Schedule:
        """Begin low and rise to the schedule; 0 steps make no difference.

        With `f` from `1 / steps` at the first update to 1 at update number `steps`, the factor is
        `start + (1 - start) * g(f)`, where g is f ("linear"), `(1 - cos(pi f)) / 2` ("cosine"), `sqrt(f)` ("sqrt") or
        `log(1 + f * steps) / log(1 + steps)` ("log"). So the first update is never wasted on a rate of `start`.

        Args:
            steps: of the warmup, >= 0.
            start: share of the rate to begin from, in [0, 1].
            shape: "linear", "cosine", "sqrt" or "log".
            included: False: the schedule begins after the warmup, at its own step 0, and the warmup rises to its first
                value. True: the schedule runs from the start, and its first steps are multiplied by the factor, so that
                totals include the warmup.
            first_at_start: let f begin at 0 instead: the first update has the rate `start`.
        """
        is_empty = from_zero("steps", steps) == 0
        length = 1 if is_empty else steps  # the other arguments are checked in any case
        warmed_up = Warmup(self, length, start, shape, included=included, first_at_start=first_at_start)
        return self if is_empty else warmed_up

    def then(self, other: Schedule, at: int) -> Schedule:
        """This schedule for the first `at` steps, then the other from its own step 0: `b(n - at)`."""
        return Then(self, a_schedule("other", other), at)

    def clip(self, low: Numbers, high: Numbers) -> Schedule:
        """Limited to the range from `low` to `high`."""
        return Clip(self, low, high)

    def shift(self, by: int) -> Schedule:
        """Later by `by` steps, with the first value until then: `a(max(n - by, 0))`; earlier if `by` is negative."""
        return Shift(self, by)

    def repeat(self, period: int) -> Schedule:
        """The first `period` steps again and again: `a(n mod period)`."""
        return Repeat(self, period)

    def per_epoch(self, steps: int) -> Schedule:
        """A schedule that counts epochs of so many steps: `a(floor(n / steps))`."""
        return PerEpoch(self, steps)

    __array_ufunc__ = None  # so that `array * schedule` asks the schedule, and makes no array of schedules

    def __mul__(self, other: Any) -> Schedule:
        """The product with another schedule, a number, or an array with one number for each model of a population."""
        if isinstance(other, Schedule):
            return Product(self, other)
        try:
            return Scaled(self, other)
        except TypeError:  # no number: let Python say so, or the other know what to do
            return NotImplemented

    __rmul__ = __mul__

    # As code and as data

    def __repr__(self) -> str:
        """The code that builds it."""
        fields, callee = list(dataclasses.fields(self)), type(self).__name__
        if self._method:
            callee = f"{_grouped(getattr(self, fields.pop(0).name))}.{self._method}"
        arguments: list[str] = []
        for k, f in enumerate(fields):
            value = getattr(self, f.name)
            if not f.kw_only and k == len(arguments) and f.default is dataclasses.MISSING:
                arguments.append(repr(value))
            elif value != f.default:
                arguments.append(f"{f.name}={value!r}")
        return f"{callee}({', '.join(arguments)})"

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data, for JSON; `Schedule.from_dict` reads it.

        Raises:
            TypeError: if a function of the user's is part of it.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, Schedule):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {"type": type(self).__name__, **{name: plain(value) for name, value in self.__getstate__().items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_dict` described.

        Raises:
            ValueError: if it is something else.
        """

        def full(value: Any) -> Any:
            if isinstance(value, Mapping):
                return Schedule.from_dict(value)
            return tuple(full(v) for v in value) if isinstance(value, list | tuple) else value

        try:
            rest = dict(data)
            cls = KINDS[rest.pop("type")]
            return cls(**{name: full(value) for name, value in rest.items()})
        except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"this is not a schedule: {shown(data)} ({str(error)[:200]}).") from None


def fix(schedule: Any, /, **values: Any) -> None:
    """Set fields of a frozen schedule to their checked values."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)


def check_ordered(low: Any, high: Any) -> None:
    """Check a lower and an upper limit, of which each may be one for each model."""
    if np.any(np.greater(low, high)):
        raise ValueError(f"high must be at least low, got low={shown(low)} and high={shown(high)}.")


# What the methods of `Schedule` return


@dataclass(frozen=True, repr=False)
class Warmup(Schedule, equation=equations.warmup):
    """See `Schedule.warmup`."""

    _method = "warmup"

    schedule: Schedule
    steps: int
    start: Annotated[float, within(checks.FRACTION)] = 0.0
    shape: Annotated[str, one_of("linear", "cosine", "sqrt", "log")] = "linear"
    included: bool = field(default=False, kw_only=True)
    first_at_start: bool = field(default=False, kw_only=True)

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.schedule.extent() + self.steps * (not self.included)


@dataclass(frozen=True, repr=False)
class Then(Schedule, equation=equations.then):
    """See `Schedule.then`."""

    first: Schedule
    second: Schedule
    at: int

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.at + self.second.extent()

    def __repr__(self) -> str:
        return f"{_grouped(self.first)}.then({self.second!r}, at={self.at})"


@dataclass(frozen=True, repr=False)
class Product(Schedule, equation=equations.product):
    """The product of two schedules."""

    first: Schedule
    second: Schedule

    def __repr__(self) -> str:
        return f"{self.first!r} * {_grouped(self.second)}"


@dataclass(frozen=True, repr=False)
class Scaled(Schedule, equation=equations.scaled):
    """A schedule times a number."""

    schedule: Schedule
    factor: Numbers

    def __repr__(self) -> str:
        return f"{self.factor!r} * {_grouped(self.schedule)}"


@dataclass(frozen=True, repr=False)
class Clip(Schedule, equation=equations.clip):
    """See `Schedule.clip`."""

    _method = "clip"

    schedule: Schedule
    low: Numbers
    high: Numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ordered(self.low, self.high)


@dataclass(frozen=True, repr=False)
class Shift(Schedule, equation=equations.shift):
    """See `Schedule.shift`."""

    _method = "shift"

    schedule: Schedule
    by: Annotated[int, functools.partial(checks.whole, least=-MOST)]

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return max(1, self.schedule.extent() + self.by)


@dataclass(frozen=True, repr=False)
class Repeat(Schedule, equation=equations.repeat):
    """See `Schedule.repeat`."""

    _method = "repeat"

    schedule: Schedule
    period: int

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 3 * self.period


@dataclass(frozen=True, repr=False)
class PerEpoch(Schedule, equation=equations.per_epoch):
    """See `Schedule.per_epoch`."""

    _method = "per_epoch"

    schedule: Schedule
    steps: int

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.schedule.extent() * self.steps


def _grouped(schedule: Schedule) -> str:
    return f"({schedule!r})" if isinstance(schedule, Product | Scaled) else repr(schedule)
