"""Schedules: the learning rate, or any other hyperparameter, as a pure function of the number of the step.

A schedule is a small frozen object: `schedule(step)` is the value that the update after `step` others uses, so the
first update reads `schedule(0)`, everywhere and always. It has no memory: a run is resumed by its number of steps
alone. Schedules are built by their names and by what every schedule can do:

    Cosine(1e-3, steps=10_000).warmup(500)      500 steps up, then 10,000 of the cosine
    Constant(1e-3).then(Linear(1e-3, 0.0, steps=100), at=1000)
    0.5 * a, a * b, a.clip(1e-6, 1e-2), a.shift(100), a.repeat(50), a.per_epoch(steps=390)

For a population, rates, decays, factors and limits may be arrays with a number for each model: `Cosine(rates, 100)`,
`rates * Cosine(1.0, 100)`. Whole numbers may be written as floats: `steps=1e4`.

The equation of each is in its docstring, with n for the step. Each is written once, in text (`_emit`), which is carried
out for one step in Python, for an array of steps by NumPy, and in a kernel on a GPU.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np

from .. import checks
from ..checks import MOST, shown
from ..kernels.staging import define

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "Exponential",
    "Function",
    "Interpolated",
    "InverseSqrt",
    "InverseTime",
    "Linear",
    "MultiStep",
    "OneCycle",
    "Piecewise",
    "Plateau",
    "Polynomial",
    "Schedule",
    "SlantedTriangular",
    "StepDecay",
    "TimeBased",
    "WarmupStableDecay",
]


Numbers: TypeAlias = float | Sequence[float] | np.ndarray  # one, or one for each model of a population


class Text:
    """The text of a schedule while it is written.

    Args:
        select: how to write a choice: `select(condition, a, b)`.
        first: the place of its first number in `p`.
        prefix: of its names, which tells those of several texts in one function apart.

    Attributes:
        lines: the statements so far.
        numbers: what `p` holds.
        functions: what the user's own functions are called.
    """

    def __init__(self, select: Callable[[str, str, str], str], first: int = 0, prefix: str = "") -> None:
        self.select, self._first, self.prefix = select, first, prefix
        self.lines: list[str] = []
        self.numbers: list[float | tuple[float, ...]] = []
        self.functions: dict[str, Callable[..., Any]] = {}
        self.plateaus: list[tuple[Plateau, int]] = []  # and the place of the scale of each

    def number(self, value: Any) -> str:
        """A number that may change without another text, or one for each model."""
        self.numbers.append(value if isinstance(value, tuple) else float(value))
        return f"p[{self._first + len(self.numbers) - 1}]"

    def let(self, expression: str) -> str:
        """A name for a value."""
        name = f"{self.prefix}x{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def least(self, a: str, b: str) -> str:
        """The smaller of two values; NaN if `a` is."""
        return self.let(self.select(f"{b} < {a}", b, a))

    def most(self, a: str, b: str) -> str:
        """The larger of two values; NaN if `a` is."""
        return self.let(self.select(f"{b} > {a}", b, a))

    def times(self, a: str, b: str) -> str:
        """A product in which zero times infinity is zero: what is switched off stays off however large the rest is."""
        return self.let(self.select(f"{a} == 0.0", "0.0", self.select(f"{b} == 0.0", "0.0", f"{a} * {b}")))

    def share(self, n: str, steps: str) -> str:
        """How much of some steps is over, from 0 to 1."""
        return self.least(self.let(f"{n} / {steps}"), "1.0")

    @property
    def models(self) -> int | None:
        """How many models there is a number for; None if the numbers are those of all.

        Raises:
            ValueError: if one number has more of them than another.
        """
        counts = sorted({len(x) for x in self.numbers if isinstance(x, tuple)})
        if len(counts) > 1:
            raise ValueError(
                f"a schedule has numbers for {' and for '.join(map(str, counts))} models. Give one number for all, or "
                "one for each model."
            )
        return counts[0] if counts else None

    def source(self, result: str) -> str:
        """The function `value(n, p)`."""
        body = "".join(f"    {line}\n" for line in self.lines)
        return f"def value(n, p):\n{body}    return {result}"


def _floor(x: float) -> float:
    return float(math.floor(x))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _pow(x: float, y: float) -> float:
    try:
        return math.pow(x, y)
    except OverflowError:  # of a number that is not negative, as all in a schedule
        return math.inf


def _where(condition: Any, a: Any, b: Any) -> Any:
    return np.where(condition, a, b)


# The functions that a text may call: the C library's, for one step and for many, so that both are the same to the last
# bit. NumPy's own are others on some processors. What is too large is infinite, as in arrays and kernels.
_ONE: dict[str, Any] = {
    "floor": _floor,
    "cos": math.cos,
    "exp": _exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "pow": _pow,
}
_BLOCK = 16_384  # steps evaluated at once, which stay in the cache


@functools.cache
def _over_arrays(name: str) -> Callable[..., Any]:
    """One of the C library's functions over arrays: compiled, which takes a moment once in a process."""
    import numba

    arguments = ["x", "y"] if name == "pow" else ["x"]
    one = define(f"def f({', '.join(arguments)}):\n    return math.{name}({', '.join(arguments)})", "f", {"math": math})
    made: Callable[..., Any] = numba.vectorize([f"float64({', '.join(['float64'] * len(arguments))})"])(one)
    return made


def _elementwise(source: str) -> dict[str, Any]:
    """What a text over arrays calls."""
    compiled = {name: _over_arrays(name) for name in ("cos", "exp", "log", "pow") if f"{name}(" in source}
    return {**compiled, "floor": np.floor, "sqrt": np.sqrt, "where": _where}


def inline(condition: str, a: str, b: str) -> str:
    """A choice for one step."""
    return f"({a} if {condition} else {b})"


def _choose(condition: str, a: str, b: str) -> str:
    return f"where({condition}, {a}, {b})"


@functools.lru_cache(4096)
def _compiled(source: str, many: bool) -> Callable[..., Any]:
    return define(source, "value", _elementwise(source) if many else _ONE)


def _schedule(value: Any, name: str) -> Schedule:
    if isinstance(value, Schedule):
        return value
    raise TypeError(f"{name} must be a schedule, got {shown(value)}.")


def _own(function: Callable[..., Any], population: int | None, several: bool) -> Callable[[Any], Any]:
    """A function of the user's as a schedule calls it: with an int, and what it returns is checked.

    Args:
        function: the user's.
        population: number of models, if it is known.
        several: whether it may return one number for each model.
    """
    called = f"the function {getattr(function, '__qualname__', None) or shown(function)}"

    def call(n: Any) -> Any:
        step = int(n)
        try:
            found = function(step)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"This was raised by {called}, which a hyperparameter follows, at step {step}.")
            raise
        if type(found) is float:
            return found
        wanted = "a number"
        if several:
            wanted += " or one for each model" + ("" if population is None else f", an array ({population},)")
        gave = f"{called} must return {wanted}, but at step {step} it returned"
        try:
            array = checks.reals("it", found)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{gave} {shown(found)}.") from None
        if array.ndim == 0:
            return float(array)
        if not several or array.ndim > 1 or population not in (None, len(array)):
            hint = "" if several else " Only a population takes one number for each model: see fastlr.flatten."
            raise ValueError(f"{gave} an array of shape {array.shape}.{hint}")
        return array

    return call


def _all_models(value: Callable[..., Any], population: int | None, n: float, numbers: Any) -> Any:
    """A step's values for all models, or the one that is the same for all."""
    with np.errstate(all="ignore"):
        found = np.asarray(value(n, tuple(np.array(x) if isinstance(x, tuple) else x for x in numbers)), np.float64)
    if found.ndim == 0:
        return float(found) if population is None else np.full(population, float(found))
    return found


@dataclass(frozen=True)
class _Made:
    """What carries out a schedule.

    Attributes:
        one: the value of one step, as `one(n, numbers)`.
        many: makes what gives those of an array of steps, where they are numbers and no functions of the user's.
        several: `several(population)` makes what gives one step's values, those of all models or one for all.
        numbers: what they take.
        models: how many models there is a number for, or None.
        own: whether functions of the user's are part of it, which may tell models apart.
    """

    one: Callable[..., Any]
    many: Callable[[], Callable[..., Any]]
    several: Callable[[int | None], Callable[..., Any]]
    numbers: tuple[float | tuple[float, ...], ...]
    models: int | None
    own: bool


@dataclass(frozen=True, repr=False)
class Schedule(abc.ABC):
    """What all schedules can do; build one by its name."""

    _names: ClassVar[dict[str, type[Schedule]]] = {}
    _method: ClassVar[str] = ""  # of a schedule, that makes one of this class from it

    def __init_subclass__(cls) -> None:
        Schedule._names[cls.__name__] = cls

    @abc.abstractmethod
    def _emit(self, text: Text, n: str) -> str:
        """Write the schedule as a function of the step `n`; the name or expression of its value."""

    def _carried_out(self) -> _Made:
        """What carries it out."""
        made: _Made | None = self.__dict__.get("_made")
        if made is None:
            one, many = Text(inline), Text(_choose)
            sources = [text.source(self._emit(text, "n")) for text in (one, many)]
            functions = one.functions

            def scalar() -> Callable[..., Any]:
                if not functions:
                    return _compiled(sources[0], False)
                return define(sources[0], "value", {**_ONE, **{k: _own(f, None, False) for k, f in functions.items()}})

            def vector() -> Callable[..., Any]:
                return _compiled(sources[1], True)

            @functools.cache
            def several(population: int | None) -> Callable[..., Any]:
                own = {k: _own(f, population, True) for k, f in functions.items()}
                value = define(sources[1], "value", {**_elementwise(sources[1]), **own}) if own else vector()
                return functools.partial(_all_models, value, population)

            made = _Made(scalar(), vector, several, tuple(one.numbers), one.models, bool(functions))
            object.__setattr__(self, "_made", made)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the fields, without what was made of them."""
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
        made = self._carried_out()
        if type(step) is int:
            if not 0 <= step <= MOST:
                limit = "non-negative" if step < 0 else "at most 2**63 - 1"
                raise ValueError(f"step must be {limit}, got {shown(step)}.")
            if made.models is None and not made.own:
                return float(made.one(float(step), made.numbers))
            return made.several(made.models)(float(step), made.numbers)
        steps = checks.readable("step", step)
        if steps.dtype.kind not in "iu":
            raise TypeError(f"step must be a whole number or an array of them, got {shown(step)}.")
        if steps.size and steps.min() < 0:
            raise ValueError(f"step must be non-negative, got {steps.min()}.")
        if steps.ndim == 0:
            return self(int(steps))
        flat = steps.reshape(-1)
        if made.models is not None or made.own:
            values = np.array([self(n) for n in flat.tolist()], np.float64)
            models = values.shape[1:] if steps.size or made.models is None else (made.models,)
            return values.reshape(steps.shape + models)
        out, value = np.empty(flat.shape), made.many()
        with np.errstate(all="ignore"):
            for first in range(0, flat.size, _BLOCK):
                part = slice(first, first + _BLOCK)
                out[part] = value(flat[part].astype(np.float64), made.numbers)
        return out.reshape(steps.shape)

    def extent(self) -> int:
        """About how many steps it takes to see what the schedule does; for pictures."""
        inner = [v.extent() for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Schedule)]
        if inner:
            return max(inner)
        steps = getattr(self, "steps", getattr(self, "milestones", getattr(self, "boundaries", 100)))
        return int(steps[-1] * 1.5) if isinstance(steps, tuple) else int(steps)

    # Composition

    @checks.answered
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
        none = _count("steps", steps, zero=True) == 0
        made = Warmup(self, 1 if none else steps, start, shape, included=included, first_at_start=first_at_start)
        return self if none else made

    def then(self, other: Schedule, at: int) -> Schedule:
        """This schedule for the first `at` steps, then the other from its own step 0: `b(n - at)`."""
        return Then(self, other, at)

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
        fields, made = list(dataclasses.fields(self)), type(self).__name__
        if self._method:
            made = f"{_grouped(getattr(self, fields.pop(0).name))}.{self._method}"
        arguments: list[str] = []
        for k, f in enumerate(fields):
            value = getattr(self, f.name)
            if not f.kw_only and k == len(arguments) and f.default is dataclasses.MISSING:
                arguments.append(repr(value))
            elif value != f.default:
                arguments.append(f"{f.name}={value!r}")
        return f"{made}({', '.join(arguments)})"

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data, for JSON; `Schedule.from_dict` reads it.

        Raises:
            TypeError: if a function of the user's is part of it.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, Schedule):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {
            "type": type(self).__name__,
            **{f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }

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
            cls = Schedule._names[rest.pop("type")]
            made = cls(**{name: full(value) for name, value in rest.items()})
            for f in dataclasses.fields(made):
                kind = {"Schedule": Schedule, "bool": bool}.get(str(f.type), object)
                if not isinstance(getattr(made, f.name), kind):
                    raise TypeError(f"{f.name} cannot be {shown(getattr(made, f.name))}")
        except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"this is not a schedule: {shown(data)} ({str(error)[:200]}).") from None
        return made


def _count(name: str, value: Any, zero: bool = False) -> int:
    """A whole number from 1 on, or from 0 on."""
    return checks.whole(name, value, 0 if zero else 1)


_number = checks.within


def _numbers(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> Any:
    """A number as `_number`, or a tuple of one for each model of a population."""
    found = checks.reals(name, value)
    if found.ndim == 0:
        return _number(name, value, low, high)
    if found.ndim > 1 or not found.size:
        raise ValueError(f"{name} must be a number, or one for each model, got {shown(value)}.")
    return tuple(_number(f"{name}[{k}]", one, low, high) for k, one in enumerate(found.tolist()))


def _over(value: Any, divisor: float) -> Any:
    """A number, or one for each model, divided."""
    return tuple(x / divisor for x in value) if isinstance(value, tuple) else value / divisor


def _ordered(low: Any, high: Any) -> None:
    """Check a lower and an upper limit, of which each may be one for each model."""
    if np.any(np.greater(low, high)):
        raise ValueError(f"high must be at least low, got low={shown(low)} and high={shown(high)}.")


def _fix(schedule: Any, /, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(schedule, name, value)


@dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """The same value at every step.

    Args:
        value: >= 0.
    """

    value: Numbers

    def __post_init__(self) -> None:
        _fix(self, value=_numbers("value", self.value))

    def _emit(self, text: Text, n: str) -> str:
        return text.let(f"{text.number(self.value)} + 0.0 * {n}")


@dataclass(frozen=True, repr=False)
class TimeBased(Schedule):
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

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), decay=_numbers("decay", self.decay))

    def _emit(self, text: Text, n: str) -> str:
        first = 6
        lr, d = text.number(self.lr), text.number(self.decay)
        product = "1.0"
        for k in range(1, first):
            product = text.let(f"{product} * " + text.select(f"{n} > {k}.0", f"(1.0 + {d} * {k}.0)", "1.0"))
        # For the rest a rate that does not overflow there; of a larger one the product is infinite already.
        d = text.least(text.most(d, "1e-300"), "1e150")
        end = text.most(n, f"{first}.0")

        def integral(x: str) -> str:
            """`((1 + u) log(1 + u) - u) / d` for u = d x, by a series of positive terms where u < 1/2."""
            u = text.let(f"{d} * {x}")
            r = text.let(f"{u} / (2.0 + {u})")
            square = text.let(f"{r} * {r}")
            series = "0.0"
            for k in range(12, 0, -1):
                series = text.let(f"{square} * ({series} + 1.0 / {2 * k + 1}.0)")
            small = f"2.0 * ({square} + (1.0 + {r}) * {r} * {series}) / (1.0 - {r})"
            large = f"(1.0 + {u}) * log(1.0 + {u}) - {u}"
            return text.let(text.select(f"{u} < 0.5", small, large) + f" / {d}")

        def corrections(x: str) -> str:
            y = text.let(f"{d} / (1.0 + {d} * {x})")
            square = text.let(f"{y} * {y}")
            inner = "0.0"
            # B(2j) / (2j (2j - 1)), j from 8 to 1
            for over, under in (
                *((-3617, 122400), (1, 156), (-691, 360360), (1, 1188)),
                *((-1, 1680), (1, 1260), (-1, 360), (1, 12)),
            ):
                inner = text.let(f"{over}.0 / {under}.0 + {square} * ({inner})")
            return text.let(f"{y} * {inner} - 0.5 * log(1.0 + {d} * {x})")

        a, b = f"{first}.0", end
        tail = text.let(f"({integral(b)} - {integral(a)}) + ({corrections(b)} - {corrections(a)})")
        tail = text.let(text.select(f"{n} > {first}.0", tail, "0.0"))
        return text.let(f"{lr} / {product} * exp(-{tail})")


@dataclass(frozen=True, repr=False)
class InverseTime(Schedule):
    """Inverse-time decay: `lr / (1 + decay n)`, or with `floor(n / every)` for n in a staircase.

    Args:
        lr: the first rate, >= 0.
        decay: >= 0.
        every: steps of the staircase; default 1: none.
    """

    lr: Numbers
    decay: Numbers
    every: int = 1

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), decay=_numbers("decay", self.decay), every=_count("every", self.every))

    def _emit(self, text: Text, n: str) -> str:
        if self.every > 1:
            n = text.let(f"floor({n} / {text.number(self.every)})")
        return text.let(f"{text.number(self.lr)} / (1.0 + {text.number(self.decay)} * {n})")


@dataclass(frozen=True, repr=False)
class StepDecay(Schedule):
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
    count: str = field(default="n", kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), factor=_numbers("factor", self.factor))
        _fix(self, every=_count("every", self.every))
        checks.choices("count", [self.count], ["n", "1 + n"])

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 6 * self.every

    def _emit(self, text: Text, n: str) -> str:
        n = n if self.count == "n" else text.let(f"1.0 + {n}")
        drops = text.let(f"floor({n} / {text.number(self.every)})")
        return text.times(text.number(self.lr), text.let(f"pow({text.number(self.factor)}, {drops})"))


@dataclass(frozen=True, repr=False)
class MultiStep(Schedule):
    """Drops at given steps: `lr factor**(number of milestones <= n)`.

    Args:
        lr: the first rate, >= 0.
        milestones: the steps from which on each drop holds, rising.
        factor: of each drop, >= 0.
    """

    lr: Numbers
    milestones: tuple[int, ...]
    factor: Numbers = 0.1

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), factor=_numbers("factor", self.factor))
        _fix(self, milestones=_rising("milestones", self.milestones))

    def _emit(self, text: Text, n: str) -> str:
        drops = "0.0"
        for milestone in self.milestones:
            drops = text.let(f"{drops} + " + text.select(f"{n} >= {text.number(milestone)}", "1.0", "0.0"))
        return text.times(text.number(self.lr), text.let(f"pow({text.number(self.factor)}, {drops})"))


def _rising(name: str, values: Any) -> tuple[int, ...]:
    """Steps in rising order."""
    try:
        given = tuple(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of steps, got {shown(values)}.") from None
    found = tuple(_count(f"{name}[{k}]", v) for k, v in enumerate(given))
    if not found or any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"{name} must be rising and not empty, got {shown(values)}.")
    if found[-1] > 2**53:  # beyond it, neighbours are the same float
        raise ValueError(f"{name}[{len(found) - 1}] must be at most 2**53, got {found[-1]}.")
    return found


@dataclass(frozen=True, repr=False)
class Exponential(Schedule):
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
        value = _number(name, value) if name == "half_life" else _numbers(name, value)
        if name != "decay" and 0 in (value if isinstance(value, tuple) else (value,)):
            raise ValueError(f"{name} must be positive, got 0.")
        _fix(self, lr=_numbers("lr", self.lr), every=_count("every", self.every), floor=_numbers("floor", self.floor))
        _fix(self, **{name: value})

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return max(1, int(min(5 * self.half_life, MOST))) if self.half_life else max(100, 10 * self.every)

    def _emit(self, text: Text, n: str) -> str:
        if self.every > 1:
            every = text.number(self.every)
            n = text.let(f"floor({n} / {every}) * {every}")
        if self.factor is not None:
            value = f"pow({text.number(self.factor)}, {n})"
        elif self.half_life is not None:
            value = f"pow({text.number(0.5)}, {n} / {text.number(self.half_life)})"
        else:
            assert self.decay is not None
            value = f"exp(-{text.number(self.decay)} * {n})"
        return text.most(text.times(text.number(self.lr), text.let(value)), text.number(self.floor))


@dataclass(frozen=True, repr=False)
class Linear(Schedule):
    """From one value to another in a straight line: `start + (end - start) min(n / steps, 1)`.

    Args:
        start: the first value, >= 0.
        end: the value from step `steps` on, >= 0.
        steps: >= 1.
    """

    start: Numbers
    end: Numbers
    steps: int

    def __post_init__(self) -> None:
        _fix(
            self, start=_numbers("start", self.start), end=_numbers("end", self.end), steps=_count("steps", self.steps)
        )

    def _emit(self, text: Text, n: str) -> str:
        start, end = text.number(self.start), text.number(self.end)
        f = text.share(n, text.number(self.steps))
        # Exact at both ends.
        return text.let(f"{start} * (1.0 - {f}) + {end} * {f}")


@dataclass(frozen=True, repr=False)
class Polynomial(Schedule):
    """Polynomial decay: `end + (lr - end) (1 - min(n / steps, 1))**power`.

    Args:
        lr: the first rate, >= 0.
        steps: >= 1.
        power: > 0.
        end: the last rate, >= 0.
        cycle: begin again whenever the steps are over, each time with as many as have been made: `steps` becomes
            `steps ceil(n / steps)` (Keras, TensorFlow).
    """

    lr: Numbers
    steps: int
    power: float = 1.0
    end: Numbers = field(default=0.0, kw_only=True)
    cycle: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), steps=_count("steps", self.steps), end=_numbers("end", self.end))
        _fix(self, power=_number("power", self.power), cycle=checks.flag("cycle", self.cycle))

    def _emit(self, text: Text, n: str) -> str:
        steps, end = text.number(self.steps), text.number(self.end)
        if self.cycle:
            times = text.most(text.let(f"-floor(-{n} / {steps})"), "1.0")
            steps = text.let(f"{steps} * {times}")
        left = text.let(f"1.0 - {text.share(n, steps)}")
        return text.let(f"{end} + ({text.number(self.lr)} - {end}) * pow({left}, {text.number(self.power)})")


@dataclass(frozen=True, repr=False)
class Cosine(Schedule):
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

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), steps=_count("steps", self.steps), end=_numbers("end", self.end))

    def _emit(self, text: Text, n: str) -> str:
        end, f = text.number(self.end), text.share(n, text.number(self.steps))
        return text.let(f"{end} + ({text.number(self.lr)} - {end}) * ({_falling(f)})")


def _falling(f: str) -> str:
    """From 1 to 0 along a cosine; never below 0."""
    return f"0.5 * (1.0 + cos({math.pi!r} * {f}))"


@dataclass(frozen=True, repr=False)
class CosineRestarts(Schedule):
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
    decay: float = field(default=1.0, kw_only=True)
    end: Numbers = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), steps=_count("steps", self.steps), end=_numbers("end", self.end))
        _fix(self, growth=_count("growth", self.growth), decay=_number("decay", self.decay, 0.0, 1.0))

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.steps * sum(self.growth**k for k in range(4))

    def _emit(self, text: Text, n: str) -> str:
        steps, end = text.number(self.steps), text.number(self.end)
        if self.growth == 1:
            period = text.let(f"floor({n} / {steps})")
            f = text.let(f"{n} / {steps} - {period}")
        else:
            # Period i begins at steps (growth**i - 1) / (growth - 1). Its number follows from a logarithm, which may
            # be off by one where it is a whole number.
            g = text.number(self.growth)

            def begin(power: str) -> str:
                return text.let(f"{steps} * ({power} - 1.0) / ({g} - 1.0)")

            period = text.let(f"floor(log({n} / {steps} * ({g} - 1.0) + 1.0) / log({g}))")
            power = text.let(f"pow({g}, {period})")
            late = f"{n} < {begin(power)}"
            period = text.let(text.select(late, f"{period} - 1.0", period))
            power = text.let(text.select(late, f"{power} / {g}", power))
            following = text.let(f"{power} * {g}")
            early = f"{n} >= {begin(following)}"
            period = text.let(text.select(early, f"{period} + 1.0", period))
            power = text.let(text.select(early, following, power))
            f = text.let(f"({n} - {begin(power)}) / ({steps} * {power})")
        height = text.let(f"({text.number(self.lr)} - {end}) * pow({text.number(self.decay)}, {period})")
        return text.let(f"{end} + {height} * ({_falling(f)})")


@dataclass(frozen=True, repr=False)
class OneCycle(Schedule):
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
    rise: float = field(default=0.3, kw_only=True)
    div: float = field(default=25.0, kw_only=True)
    final_div: float = field(default=1e4, kw_only=True)
    shape: str = field(default="cosine", kw_only=True)
    phases: int = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), steps=_count("steps", self.steps))
        _fix(self, rise=_number("rise", self.rise, 0.0, 1.0))
        _fix(self, div=_number("div", self.div, 1.0), final_div=_number("final_div", self.final_div, 1.0))
        checks.choices("shape", [self.shape], ["cosine", "linear"])
        if self.phases not in (2, 3):
            raise ValueError(f"phases must be 2 or 3, got {shown(self.phases)}.")
        _fix(self, phases=int(self.phases))
        up = self.rise * self.steps - 1  # where the peak is; the end is at steps - 1
        if not 0 < up < (self.steps - 1) / (self.phases - 1):
            raise ValueError(
                f"rise={self.rise} of {self.steps} steps leaves a phase without steps. Take more, or another share."
            )

    def _emit(self, text: Text, n: str) -> str:
        low = _over(self.lr, self.div)
        final = _over(low, self.final_div)
        up = self.rise * self.steps - 1
        if self.phases == 2:
            ends, values = [0.0, up, self.steps - 1.0], [low, self.lr, final]
        else:
            ends, values = [0.0, up, 2 * self.rise * self.steps - 2, self.steps - 1.0], [low, self.lr, low, final]
        names = [text.number(v) for v in values]
        places = [text.number(e) for e in ends]
        result = names[-1]
        for k in range(len(ends) - 2, -1, -1):
            a, b = names[k], names[k + 1]
            f = text.share(text.most(text.let(f"{n} - {places[k]}"), "0.0"), text.let(f"{places[k + 1]} - {places[k]}"))
            if self.shape == "cosine":
                value = text.let(f"{b} + ({a} - {b}) * ({_falling(f)})")
            else:
                value = text.let(f"({b} - {a}) * {f} + {a}")
            result = text.let(text.select(f"{n} <= {places[k + 1]}", value, result))
        return result


@dataclass(frozen=True, repr=False)
class Cyclic(Schedule):
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
    mode: str = field(default="triangular", kw_only=True)
    gamma: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, low=_numbers("low", self.low), high=_numbers("high", self.high), up=_count("up", self.up))
        _fix(self, down=self.up if self.down is None else _count("down", self.down))
        _fix(self, gamma=_number("gamma", self.gamma, 0.0, 1.0))
        checks.choices("mode", [self.mode], ["triangular", "triangular2", "exp_range"])
        _ordered(self.low, self.high)

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 4 * (self.up + self.down)  # type: ignore[operator]

    def _emit(self, text: Text, n: str) -> str:
        assert self.down is not None
        up, down = text.number(self.up), text.number(self.down)
        whole = text.number(self.up + self.down)
        cycle = text.let(f"floor({n} / {whole})")
        inside = text.let(f"{n} - {cycle} * {whole}")
        height = text.let(text.select(f"{inside} <= {up}", f"{inside} / {up}", f"({whole} - {inside}) / {down}"))
        if self.mode == "triangular2":
            height = text.let(f"{height} * pow({text.number(0.5)}, {cycle})")
        elif self.mode == "exp_range":
            height = text.let(f"{height} * pow({text.number(self.gamma)}, {n})")
        low = text.number(self.low)
        return text.let(f"{low} + ({text.number(self.high)} - {low}) * {height}")


@dataclass(frozen=True, repr=False)
class InverseSqrt(Schedule):
    """Linear to the peak, then with the inverse root: `lr min((n + 1) / warmup, sqrt(warmup / (n + 1)))`.

    Args:
        lr: the peak, reached by update number `warmup`, >= 0.
        warmup: steps up, >= 1.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 3, with the peak `d_model**-0.5 warmup**-0.5` called lr; its
    step_num is n + 1.
    """

    lr: Numbers
    warmup_steps: int

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), warmup_steps=_count("warmup_steps", self.warmup_steps))

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 10 * self.warmup_steps

    def _emit(self, text: Text, n: str) -> str:
        w, k = text.number(self.warmup_steps), text.let(f"{n} + 1.0")
        factor = text.least(text.let(f"{k} / {w}"), text.let(f"sqrt({w} / {k})"))
        return text.let(f"{text.number(self.lr)} * {factor}")


@dataclass(frozen=True, repr=False)
class WarmupStableDecay(Schedule):
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
    warmup_steps: int = field(default=0, kw_only=True)
    decay_steps: int = field(kw_only=True)
    shape: str = field(default="1-sqrt", kw_only=True)
    end: Numbers = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), steps=_count("steps", self.steps), end=_numbers("end", self.end))
        _fix(self, warmup_steps=_count("warmup_steps", self.warmup_steps, zero=True))
        _fix(self, decay_steps=_count("decay_steps", self.decay_steps))
        checks.choices("shape", [self.shape], ["linear", "cosine", "1-sqrt"])
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} are more than steps={self.steps}."
            )

    def _emit(self, text: Text, n: str) -> str:
        lr, end = text.number(self.lr), text.number(self.end)
        begin = text.number(self.steps - self.decay_steps)
        over = text.most(text.let(f"{n} - {begin} + 1.0"), "0.0")
        f = text.share(over, text.number(self.decay_steps))
        g = {"linear": f"1.0 - {f}", "cosine": _falling(f), "1-sqrt": f"1.0 - sqrt({f})"}[self.shape]
        value = text.let(f"{end} + ({lr} - {end}) * ({g})")
        value = text.let(text.select(f"{n} < {begin}", lr, value))
        if self.warmup_steps:
            w = text.number(self.warmup_steps)
            value = text.let(text.select(f"{n} < {w}", f"{lr} * ({n} + 1.0) / {w}", value))
        return value


@dataclass(frozen=True, repr=False)
class SlantedTriangular(Schedule):
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
    cut_fraction: float = field(default=0.1, kw_only=True)
    ratio: float = field(default=32.0, kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, lr=_numbers("lr", self.lr), steps=_count("steps", self.steps))
        _fix(
            self,
            cut_fraction=_number("cut_fraction", self.cut_fraction, 0.0, 1.0),
            ratio=_number("ratio", self.ratio, 1.0),
        )
        if not 0 < int(self.steps * self.cut_fraction) < self.steps:
            raise ValueError(
                f"cut_fraction={self.cut_fraction} of {self.steps} steps leaves no steps up, or none down."
            )

    def _emit(self, text: Text, n: str) -> str:
        top = int(self.steps * self.cut_fraction)
        cut, rest, ratio = text.number(top), text.number(self.steps - top), text.number(self.ratio)
        down = text.most(text.let(f"1.0 - ({n} - {cut}) / {rest}"), "0.0")
        p = text.let(text.select(f"{n} < {cut}", f"{n} / {cut}", down))
        return text.let(f"{text.number(self.lr)} * (1.0 + {p} * ({ratio} - 1.0)) / {ratio}")


@dataclass(frozen=True, repr=False)
class Piecewise(Schedule):
    """Constant pieces: `values[k]` from step `boundaries[k - 1]` on.

    Args:
        boundaries: the steps at which the next value begins, rising.
        values: one more than boundaries, each >= 0.
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _fix(self, boundaries=_rising("boundaries", self.boundaries))
        _fix(self, values=tuple(_number(f"values[{k}]", v) for k, v in enumerate(self.values)))
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"values must be one more than boundaries, got {len(self.values)} and {len(self.boundaries)}."
            )

    def _emit(self, text: Text, n: str) -> str:
        value = text.let(f"{text.number(self.values[0])} + 0.0 * {n}")
        for boundary, after in zip(self.boundaries, self.values[1:], strict=True):
            value = text.let(text.select(f"{n} >= {text.number(boundary)}", text.number(after), value))
        return value


@dataclass(frozen=True, repr=False)
class Interpolated(Schedule):
    """Between given values at given steps, in straight lines or along cosines; constant after the last.

    Args:
        steps: where the values are reached, rising; the first value is at step 0.
        values: one more than steps, each >= 0.
        shape: "linear" or "cosine".
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]
    shape: str = field(default="linear", kw_only=True)

    def __post_init__(self) -> None:
        _fix(self, steps=_rising("steps", self.steps))
        _fix(self, values=tuple(_number(f"values[{k}]", v) for k, v in enumerate(self.values)))
        checks.choices("shape", [self.shape], ["linear", "cosine"])
        if len(self.values) != len(self.steps) + 1:
            raise ValueError(f"values must be one more than steps, got {len(self.values)} and {len(self.steps)}.")

    def _emit(self, text: Text, n: str) -> str:
        value = text.number(self.values[-1])
        ends = (0, *self.steps)
        for k in range(len(self.steps) - 1, -1, -1):
            begin, end = text.number(ends[k]), text.number(ends[k + 1])
            a, b = text.number(self.values[k]), text.number(self.values[k + 1])
            f = text.let(f"({n} - {begin}) / ({end} - {begin})")
            rest = _falling(f) if self.shape == "cosine" else f"1.0 - {f}"
            between = text.let(f"{b} + ({a} - {b}) * ({rest})")
            value = text.let(text.select(f"{n} < {end}", between, value))
        return value


@dataclass(frozen=True, repr=False)
class Function(Schedule):
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

    def _emit(self, text: Text, n: str) -> str:
        name = f"{text.prefix}own{len(text.functions)}"
        text.functions[name] = self.function
        return text.let(f"{name}({n})")

    def to_dict(self) -> dict[str, Any]:
        """Refuse: a function is not data."""
        raise TypeError(f"{shown(self)} is a function of your own, which cannot be saved. Pass it again after loading.")


@dataclass(frozen=True, repr=False)
class Plateau(Schedule):
    """A schedule that drops when a metric no longer gets better: `max(scale a(n), floor)`; the one with memory.

    The object only describes it: called by itself the scale is 1. In an optimizer the scale begins at 1 and
    `opt.observe(metric)` changes it, by the rules of PyTorch's ReduceLROnPlateau: a metric is better if it is below
    `best - threshold abs(best)`, or with threshold_mode "abs" below `best - threshold`; after more than `patience`
    observations in a row that are not, the scale is multiplied by `factor`, and the next `cooldown` observations do not
    count as bad. (Of a negative metric PyTorch takes `best (1 - threshold)`, which is not a margin but its opposite.)

    What it remembers is saved with the optimizer. It belongs to this object: where one object stands in several
    places there is one memory, and a new object begins afresh, be it equal to the one before.

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
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    mode: str = field(default="min", kw_only=True)
    threshold_mode: str = field(default="rel", kw_only=True)
    floor: Numbers = field(default=0.0, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            _fix(self, schedule=Constant(self.schedule))
        _fix(self, factor=checks.number("factor", self.factor, 0.0, 1.0), floor=_numbers("floor", self.floor))
        _fix(self, threshold=_number("threshold", self.threshold), eps=_number("eps", self.eps))
        for name in ("patience", "cooldown"):
            _fix(self, **{name: _count(name, getattr(self, name), zero=True)})
        checks.choices("mode", [self.mode], ["min", "max"])
        checks.choices("threshold_mode", [self.threshold_mode], ["rel", "abs"])

    def _emit(self, text: Text, n: str) -> str:
        text.plateaus.append((self, len(text.numbers)))
        scale = text.number(1.0)
        return text.most(text.let(f"{scale} * {self.schedule._emit(text, n)}"), text.number(self.floor))


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


# What the methods of `Schedule` make.


@dataclass(frozen=True, repr=False)
class Warmup(Schedule):
    """See `Schedule.warmup`."""

    _method = "warmup"

    schedule: Schedule
    steps: int
    start: float = 0.0
    shape: str = "linear"
    included: bool = field(default=False, kw_only=True)
    first_at_start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _schedule(self.schedule, "schedule")
        _fix(self, steps=_count("steps", self.steps), start=_number("start", self.start, 0.0, 1.0))
        for name in ("included", "first_at_start"):
            _fix(self, **{name: checks.flag(name, getattr(self, name))})
        checks.choices("shape", [self.shape], ["linear", "cosine", "sqrt", "log"])

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.schedule.extent() + self.steps * (not self.included)

    def _emit(self, text: Text, n: str) -> str:
        steps, start = text.number(self.steps), text.number(self.start)
        f = text.share(n if self.first_at_start else text.let(f"{n} + 1.0"), steps)
        g = {
            "linear": f,
            "cosine": f"1.0 - {_falling(f)}",
            "sqrt": f"sqrt({f})",
            "log": f"log(1.0 + {f} * {steps}) / log(1.0 + {steps})",
        }[self.shape]
        factor = text.let(f"{start} + (1.0 - {start}) * ({g})")
        factor = text.let(text.select(f"{n} < {steps}", factor, "1.0"))
        at = n if self.included else text.most(text.let(f"{n} - {steps}"), "0.0")
        return text.let(f"{factor} * {self.schedule._emit(text, at)}")


@dataclass(frozen=True, repr=False)
class Then(Schedule):
    """See `Schedule.then`."""

    first: Schedule
    second: Schedule
    at: int

    def __post_init__(self) -> None:
        _schedule(self.first, "first"), _schedule(self.second, "other")
        _fix(self, at=_count("at", self.at))

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.at + self.second.extent()

    def _emit(self, text: Text, n: str) -> str:
        at = text.number(self.at)
        before = self.first._emit(text, text.least(n, at))
        after = self.second._emit(text, text.most(text.let(f"{n} - {at}"), "0.0"))
        return text.let(text.select(f"{n} < {at}", before, after))

    def __repr__(self) -> str:
        return f"{_grouped(self.first)}.then({self.second!r}, at={self.at})"


@dataclass(frozen=True, repr=False)
class Product(Schedule):
    """The product of two schedules."""

    first: Schedule
    second: Schedule

    def _emit(self, text: Text, n: str) -> str:
        return text.times(self.first._emit(text, n), self.second._emit(text, n))

    def __repr__(self) -> str:
        return f"{self.first!r} * {_grouped(self.second)}"


@dataclass(frozen=True, repr=False)
class Scaled(Schedule):
    """A schedule times a number."""

    schedule: Schedule
    factor: Numbers

    def __post_init__(self) -> None:
        _fix(self, factor=_numbers("factor", self.factor))

    def _emit(self, text: Text, n: str) -> str:
        return text.times(text.number(self.factor), self.schedule._emit(text, n))

    def __repr__(self) -> str:
        return f"{self.factor!r} * {_grouped(self.schedule)}"


@dataclass(frozen=True, repr=False)
class Clip(Schedule):
    """See `Schedule.clip`."""

    _method = "clip"

    schedule: Schedule
    low: Numbers
    high: Numbers

    def __post_init__(self) -> None:
        _fix(self, low=_numbers("low", self.low), high=_numbers("high", self.high))
        _ordered(self.low, self.high)

    def _emit(self, text: Text, n: str) -> str:
        value = self.schedule._emit(text, n)
        return text.least(text.most(value, text.number(self.low)), text.number(self.high))


@dataclass(frozen=True, repr=False)
class Shift(Schedule):
    """See `Schedule.shift`."""

    _method = "shift"

    schedule: Schedule
    by: int

    def __post_init__(self) -> None:
        _fix(self, by=checks.whole("by", self.by, -MOST))

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return max(1, self.schedule.extent() + self.by)

    def _emit(self, text: Text, n: str) -> str:
        return self.schedule._emit(text, text.most(text.let(f"{n} - {text.number(self.by)}"), "0.0"))


@dataclass(frozen=True, repr=False)
class Repeat(Schedule):
    """See `Schedule.repeat`."""

    _method = "repeat"

    schedule: Schedule
    period: int

    def __post_init__(self) -> None:
        _fix(self, period=_count("period", self.period))

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return 3 * self.period

    def _emit(self, text: Text, n: str) -> str:
        period = text.number(self.period)
        return self.schedule._emit(text, text.let(f"{n} - floor({n} / {period}) * {period}"))


@dataclass(frozen=True, repr=False)
class PerEpoch(Schedule):
    """See `Schedule.per_epoch`."""

    _method = "per_epoch"

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        _fix(self, steps=_count("steps", self.steps))

    def extent(self) -> int:
        """As `Schedule.extent`."""
        return self.schedule.extent() * self.steps

    def _emit(self, text: Text, n: str) -> str:
        return self.schedule._emit(text, text.let(f"floor({n} / {text.number(self.steps)})"))


def _grouped(schedule: Schedule) -> str:
    return f"({schedule!r})" if isinstance(schedule, Product | Scaled) else repr(schedule)


for _class in Schedule._names.values():  # a dataclass makes its `__init__` itself
    _class.__init__ = checks.answered(_class.__init__, _class.__name__, [checks.METHOD])  # type: ignore[method-assign]
