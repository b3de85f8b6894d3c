"""Hyperparameters that follow a schedule, in an optimizer: evaluated for each row before a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import checks
from ..hyperparameters import Hyper, part_labels
from ..schedules import Schedule
from ..schedules.evaluating import StagedSchedule
from ..schedules.plateau import Observed, Plateau
from .rows import Rows

if TYPE_CHECKING:
    from ..groups import Groups

__all__ = ["Followed", "Formula", "Rates", "Remembered", "Scheduled"]


class Remembered:
    """What plateaus remember, separately for each object, even if two are equal.

    Args:
        pairs: plateaus, each with what it remembers.
    """

    def __init__(self, pairs: Iterable[tuple[Plateau, Observed]] = ()) -> None:
        # The plateau is kept as well: only while it exists does no other object have its id.
        self._states = {id(plateau): (plateau, state) for plateau, state in pairs}

    def of(self, plateau: Plateau) -> Observed:
        """What a plateau remembers; the initial state if it is new."""
        return self._states.setdefault(id(plateau), (plateau, Observed()))[1]

    def pairs(self) -> list[tuple[Plateau, Observed]]:
        """The plateaus, each with what it remembers."""
        return list(self._states.values())

    def put(self, plateau: Plateau, state: Observed) -> None:
        """Set what a plateau remembers."""
        self._states[id(plateau)] = plateau, state

    def update(self, other: Remembered) -> None:
        """Add what another remembers."""
        for plateau, state in other.pairs():
            self.put(plateau, state)

    def copy(self) -> Remembered:
        """An independent copy, for the same plateaus."""
        return Remembered((plateau, replace(state)) for plateau, state in self.pairs())

    def take(self, other: Remembered) -> None:
        """Remember what another does, instead of what was remembered."""
        self._states = {id(plateau): (plateau, state) for plateau, state in other.pairs()}

    def __getstate__(self) -> list[tuple[Plateau, Observed]]:
        """Each plateau with what it remembers, since a copy of it is another object."""
        return self.pairs()

    def __setstate__(self, state: list[tuple[Plateau, Observed]]) -> None:
        """Take over what a copy or a pickle holds."""
        self._states = {id(plateau): (plateau, observed) for plateau, observed in state}


def plateaus_of(schedule: Schedule) -> list[Plateau]:
    """The plateaus in a schedule, in the order of its numbers."""
    return [plateau for plateau, _ in schedule.staged.memories]


def evaluator(schedule: Schedule, population: int | None) -> tuple[Callable[..., Any], bool]:
    """The function `value(n, numbers)` of a schedule, and whether its value may be an array `(population,)`."""
    staged = schedule.staged
    if population is not None and staged.per_model:
        return staged.for_models(population), True
    return staged.scalar, False


def ensure(label: str, hyper: Hyper[Any], schedule: Schedule, value: Any, step: int) -> None:
    """Check the value of a schedule.

    Args:
        label: the hyperparameter, as the user calls it.
        hyper: whose range holds.
        schedule: that was asked.
        value: what it gave: a number, or one for each model.
        step: for which step.

    Raises:
        ValueError: if it is out of range.
    """
    for one in np.ravel(value).tolist():
        if not hyper.interval.holds(one):
            raise ValueError(
                f"{label} {hyper.interval.words}, but {checks.shown(schedule)} gives {one!r} at step {step}."
            )


def examine(label: str, hyper: Hyper[Any], value: Any, step: int, population: int | None = None) -> None:
    """Check the values that the schedules in a hyperparameter give for a step.

    Args:
        label: the hyperparameter, as the user calls it.
        hyper: whose range holds.
        value: the hyperparameter; numbers in it are not checked.
        step: for which step.
        population: number of models, or None.

    Raises:
        ValueError: if a schedule gives what is out of range; what a function of the user's raises is passed on.
    """
    for k, part in enumerate(value if isinstance(value, tuple) else [value]):
        if isinstance(part, Schedule):
            one, _ = evaluator(part, population)
            found = one(float(step), part.staged.numbers)
            ensure(f"{label}[{k}]" if isinstance(value, tuple) else label, hyper, part, found, step)


@dataclass(frozen=True)
class Formula:
    """A scheduled hyperparameter as a kernel evaluates it.

    Attributes:
        uniform: its name among those that `decide` takes.
        source: defines `value(n, p)`.
        first: where its numbers begin among those of the row.
        count: how many there are.
        functions: the user's own, by the names that the source calls.
    """

    uniform: str
    source: str
    first: int
    count: int
    functions: tuple[tuple[str, Callable[..., Any]], ...] = ()


def distinguished(schedules: Sequence[Schedule]) -> tuple[str, tuple[tuple[str, Callable[..., Any]], ...]]:
    """The source of `value(n, p)` for schedules of several kinds, and the users' functions that it calls.

    The first number of a row tells the kind, from 1; if it is 0 the second number is the value.
    """
    lines = ["def value(n, p):"]
    functions: dict[str, Callable[..., Any]] = {}
    for kind, schedule in enumerate(schedules, 1):
        staged = StagedSchedule(schedule, prefix=f"k{kind}_", first=1)
        lines += [f"    if p[0] == {kind}.0:", *(f"        {line}" for line in staged.lines)]
        functions.update(staged.functions)
    return "\n".join([*lines, "    return p[1]", ""]), tuple(functions.items())


@dataclass
class _Entry:
    """One hyperparameter of one configuration."""

    label: str  # as the user calls it
    hyper: Hyper[Any]
    uniform: str
    schedule: Schedule
    value: Callable[..., Any]
    per_model: bool  # whether it may give one number for each model
    numbers: tuple[Any, ...]
    rows: np.ndarray
    models: np.ndarray  # of the rows
    column: int


class Scheduled:
    """The scheduled hyperparameters of an optimizer.

    Args:
        uniforms: for each configuration, the values under the rule's names.
        table: every hyperparameter by its name in the API.
        rows: of the leaves.
        names: the uniforms that `decide` takes, in order.
        observed: what plateaus remember; grows.
        population: number of models, or None.
    """

    def __init__(
        self,
        uniforms: Sequence[Mapping[str, Any]],
        table: Mapping[str, Hyper[Any]],
        rows: Rows,
        names: Sequence[str],
        observed: Remembered,
        population: int | None,
    ) -> None:
        self._rows = len(rows)
        labels = part_labels(table)
        self._observed, self._population = observed, population
        self.entries: list[_Entry] = []
        for c, values in enumerate(uniforms):
            for uniform, value in values.items():
                if not isinstance(value, Schedule) or uniform not in names:
                    continue
                indices = np.flatnonzero(rows.configuration == c)
                label, hyper = labels[uniform]
                entry = _Entry(
                    label,
                    hyper,
                    uniform,
                    value,
                    *evaluator(value, population),
                    (),
                    indices,
                    rows.model[indices],
                    list(names).index(uniform),
                )
                self.entries.append(entry)
        self._rates = {id(e.schedule): e for e in reversed(self.entries) if e.uniform == "lr"}
        self._followed = {id(e.schedule): e for e in reversed(self.entries)}
        self.take_observed()

    def take_observed(self) -> None:
        """Update the numbers with what plateaus have observed."""
        for entry in self.entries:
            entry.numbers = self._numbers(entry, self._observed)
        self._single = None
        if len(self.entries) == 1 and len(self.entries[0].rows) == 1 and not self.entries[0].per_model:
            (e,) = self.entries
            interval = e.hyper.interval
            cell = int(e.rows[0]), e.column
            self._single = e.value, e.numbers, cell, interval.low, interval.high, interval.included

    @staticmethod
    def _numbers(entry: _Entry, observed: Remembered) -> tuple[Any, ...]:
        numbers = list(entry.schedule.staged.numbers)
        for plateau, index in entry.schedule.staged.memories:
            numbers[index] = observed.of(plateau).scale
        return tuple(numbers)

    def fill(self, step: int, table: np.ndarray) -> None:
        """Enter the value of each scheduled hyperparameter, the same for all rows whenever they were last updated.

        Args:
            step: the number of steps before this one.
            table: hyperparameters of each row.

        Raises:
            ValueError: if one is outside its range; then nothing is entered.
        """
        if self._single is not None:  # the usual case, kept fast: one hyperparameter of one row
            evaluate, numbers, cell, low, high, closed = self._single
            value = evaluate(float(step), numbers)
            if low < value < high or value in closed:
                table[cell] = value
                return
        values = [self._value(entry, step) for entry in self.entries]
        for entry, value in zip(self.entries, values, strict=True):
            table[entry.rows, entry.column] = value[entry.models] if entry.per_model else value

    @staticmethod
    def _value(entry: _Entry, step: int) -> Any:
        value = entry.value(float(step), entry.numbers)
        ensure(entry.label, entry.hyper, entry.schedule, value, step)
        return value

    def follows(self, rates: Mapping[str, Any]) -> bool:
        """Whether anything follows a schedule, even if it is a rate that all groups override."""
        return bool(self.entries) or any(isinstance(lr, Schedule) for lr in rates.values())

    def parts(self, rates: Mapping[str, Any]) -> Mapping[str, Any]:
        """For each group, its learning rate, or the schedule that it follows."""
        if not self.follows(rates):
            return rates
        out: dict[str, Any] = {}
        for pattern, lr in rates.items():
            entry = self._rates.get(id(lr))
            if entry is not None:
                out[pattern] = Followed(entry.value, entry.numbers)
            elif isinstance(lr, Schedule):  # all leaves of the group have another one's
                out[pattern] = Followed(evaluator(lr, self._population)[0], lr.staged.numbers)
            else:
                out[pattern] = lr
        return out

    # For kernels

    def formulas(self) -> tuple[Formula, ...]:
        """What a kernel has to evaluate, for all configurations alike."""
        first = 0
        formulas = []
        for uniform, kinds in self._kinds().items():
            count = self._room(kinds)
            if self._is_single(kinds):
                (((source, functions), _),) = kinds.items()
            else:
                source, functions = distinguished([entries[0].schedule for entries in kinds.values()])
            formulas.append(Formula(uniform, source, first, count, functions))
            first += count
        return tuple(formulas)

    def _kinds(self) -> dict[str, dict[Any, list[_Entry]]]:
        """For each uniform, what follows schedules of the same kind: they differ in their numbers alone."""
        out: dict[str, dict[Any, list[_Entry]]] = {}
        for entry in self.entries:
            staged = entry.schedule.staged
            kind = staged.source, tuple(staged.functions.items())
            out.setdefault(entry.uniform, {}).setdefault(kind, []).append(entry)
        return out

    def _is_single(self, kinds: Mapping[Any, Sequence[_Entry]]) -> bool:
        """Whether all rows follow a schedule of one kind."""
        return len(kinds) == 1 and sum(len(e.rows) for entries in kinds.values() for e in entries) == self._rows

    def _room(self, kinds: Mapping[Any, Sequence[_Entry]]) -> int:
        """How many numbers a row has."""
        most = max(len(entry.numbers) for entries in kinds.values() for entry in entries)
        return most if self._is_single(kinds) else 1 + max(1, most)

    def numbers(self, table: np.ndarray) -> np.ndarray:
        """The numbers of the formulas, for each row.

        Args:
            table: hyperparameters of each row, of which those count that follow no schedule.
        """
        blocks = []
        for kinds in self._kinds().values():
            entries = [(k, e) for k, several in enumerate(kinds.values(), 1) for e in several]
            offset = 0 if self._is_single(kinds) else 1
            block = np.zeros((self._rows, self._room(kinds)))
            if offset:
                block[:, 1] = table[:, entries[0][1].column]
            for kind, entry in entries:
                if offset:
                    block[entry.rows, 0] = kind
                for k, x in enumerate(entry.numbers, offset):
                    block[entry.rows, k] = np.array(x)[entry.models] if isinstance(x, tuple) else x
            blocks.append(block)
        return np.concatenate([*blocks, np.zeros((self._rows, 0))], axis=1)

    # Plateaus

    @property
    def plateaus(self) -> list[Plateau]:
        """The plateaus among the schedules, each once."""
        return list({id(p): p for entry in self.entries for p in plateaus_of(entry.schedule)}.values())

    def observe(self, metric: float, step: int) -> None:
        """Let every plateau take account of a metric.

        Args:
            metric: the metric.
            step: the number of steps made.

        Raises:
            ValueError: if there is none.
        """
        plateaus = self.plateaus
        if not plateaus:
            raise ValueError("no hyperparameter follows a Plateau: lr=fastlr.schedules.Plateau(1e-3) would.")
        observed = self._observed.copy()  # nothing changes if a user's function raises
        for plateau in plateaus:
            if observed.of(plateau).observe(plateau, metric):
                lowered = observed.copy()
                lowered.of(plateau).scale *= plateau.factor
                followers = [e for e in self.entries if any(p is plateau for p in plateaus_of(e.schedule))]
                drops = (self._at(e, step, observed) - self._at(e, step, lowered) for e in followers)
                if any(np.any(drop > plateau.eps) for drop in drops):
                    observed = lowered
        self._observed.take(observed)
        self.take_observed()

    def present(self, schedule: Schedule, step: int) -> Any:
        """The value of a schedule after a number of steps; None if nothing follows it."""
        entry = self._followed.get(id(schedule))
        return None if entry is None else entry.value(float(step), entry.numbers)

    def _at(self, entry: _Entry, step: int, observed: Remembered) -> np.ndarray:
        return np.asarray(entry.value(float(step), self._numbers(entry, observed)))


class Followed(NamedTuple):
    """A schedule that a learning rate follows.

    Attributes:
        value: `value(n, numbers)` is the rate after `n` steps.
        numbers: what plateaus have lowered among them.
    """

    value: Callable[..., Any]
    numbers: tuple[Any, ...]


class Rates(Mapping[str, Any]):
    """The learning rates of a step by pattern, evaluated when somebody asks.

    Args:
        parts: gives for each group its rate, or the schedule that it follows, see `Scheduled.parts`.
        before: the number of steps before this one; None: it is not known yet.
    """

    __slots__ = ("_before", "_parts")

    def __init__(self, parts: Callable[[], Mapping[str, Any]], before: int | None = None) -> None:
        self._parts, self._before = parts, before

    def at(self, before: int) -> Rates:
        """The rates after a number of steps."""
        return Rates(self._parts, before)

    def settled(self) -> Rates:
        """The rates as they are now, whatever is set later."""
        parts = self._parts()
        return Rates(lambda: parts, self._before)

    @property
    def need_step(self) -> bool:
        """Whether they cannot be evaluated before it is known how many steps were made."""
        return self._before is None and any(isinstance(part, Followed) for part in self._parts().values())

    def __getitem__(self, pattern: str) -> Any:
        """The rate of a group."""
        part = self._parts()[pattern]
        if not isinstance(part, Followed):
            return part
        assert self._before is not None
        value = part.value(float(self._before), part.numbers)
        return value if isinstance(value, np.ndarray) else float(value)

    def __iter__(self) -> Iterator[str]:
        """The patterns."""
        return iter(self._parts())

    def __len__(self) -> int:
        """Number of groups, the optimizer's own among them."""
        return len(self._parts())

    def __repr__(self) -> str:
        """The rates in a dict."""
        return repr(dict(self))


def labelled_plateaus(groups: Groups) -> Iterator[tuple[str, Plateau]]:
    """The plateaus among the hyperparameters, each with a label that says where it is used."""
    for label, schedule in groups.schedules():
        for k, plateau in enumerate(plateaus_of(schedule)):
            yield f"{label}, {k}" if k else label, plateau


def saved(labelled: Iterable[tuple[str, Plateau]], observed: Remembered) -> dict[str, Any]:
    """What plateaus remember, as plain data: by their labels, since equal ones may remember different things."""
    return {label: asdict(observed.of(plateau)) for label, plateau in labelled}


def restored(labelled: Iterable[tuple[str, Plateau]], data: Any) -> Remembered:
    """What `saved` returned, for the plateaus that have these labels now.

    States of fastlr 0.1 have the code of a plateau for its label, so that equal ones share what they remember.

    Raises:
        ValueError: if it is something else.
    """
    kinds = {f.name: f.type for f in fields(Observed)}

    def checked(name: str, value: Any) -> Any:
        if kinds[name] == "int":
            return checks.counted(f"{name} of a Plateau", value)
        if kinds[name] == "float | None" and value is None:
            return None
        if type(value) is not float or math.isnan(value) or (kinds[name] == "float" and not 0 <= value < math.inf):
            raise ValueError(f"{name} of a Plateau cannot be {checks.shown(value)}.")
        return value

    if not isinstance(data, dict) or not all(isinstance(s, dict) and s.keys() <= kinds.keys() for s in data.values()):
        raise ValueError(f"this is not what plateaus remember: {checks.shown(data)}.")
    states = {name: Observed(**{k: checked(k, v) for k, v in state.items()}) for name, state in data.items()}
    observed = Remembered()
    for label, plateau in labelled:
        state = states.get(label, states.get(repr(plateau)))
        if state is not None:
            observed.put(plateau, replace(state))
    return observed
