"""Hyperparameters that follow a schedule, in an optimizer: evaluated for each row before a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import checks
from .kernels.layout import CLOCK, COUNTERS
from .rows import Rows
from .schedules import Observed, Schedule, Text, inline

__all__ = ["Formula", "Rates", "Scheduled"]


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


@dataclass
class _Entry:
    """One hyperparameter of one configuration."""

    label: str  # as the user calls it
    checked: str  # whose range holds
    uniform: str
    schedule: Schedule
    one: Callable[..., float]
    numbers: tuple[float, ...]
    text: Text
    rows: list[int]
    column: int
    limits: tuple[float, float, tuple[float, ...]]  # lowest, highest, and which of them are allowed


class Scheduled:
    """The scheduled hyperparameters of an optimizer.

    Args:
        uniforms: for each configuration, the values under the rule's names.
        spelling: hyperparameters of the API that are several in the rule.
        rows: of the leaves.
        names: the uniforms that `decide` takes, in order.
        observed: what plateaus remember, by their code; grows.
    """

    def __init__(
        self,
        uniforms: Sequence[Mapping[str, Any]],
        spelling: Mapping[str, tuple[str, ...]],
        rows: Rows,
        names: Sequence[str],
        observed: dict[str, Observed],
    ) -> None:
        labels = {n: (f"{k}[{i}]", k) for k, several in spelling.items() for i, n in enumerate(several)}
        self._observed = observed
        self.entries: list[_Entry] = []
        for c, values in enumerate(uniforms):
            for uniform, value in values.items():
                if not isinstance(value, Schedule) or uniform not in names:
                    continue
                text = Text(inline)
                value._emit(text, "n")
                for plateau, _ in text.plateaus:
                    observed.setdefault(repr(plateau), Observed())
                which = np.flatnonzero(rows.configuration == c).tolist()
                label, checked = labels.get(uniform, (uniform, uniform))
                one, _, _ = value._texts()
                entry = _Entry(
                    label,
                    checked,
                    uniform,
                    value,
                    one,
                    (),
                    text,
                    which,
                    list(names).index(uniform),
                    checks.limits(checked),
                )
                self.entries.append(entry)
        self.take_observed()

    def take_observed(self) -> None:
        """Bring the numbers up to date with what plateaus have observed."""
        for entry in self.entries:
            numbers = list(entry.text.numbers)
            for plateau, place in entry.text.plateaus:
                numbers[place] = self._observed[repr(plateau)].scale
            entry.numbers = tuple(numbers)
        self._single = None
        if len(self.entries) == 1 and len(self.entries[0].rows) == 1:
            (e,) = self.entries
            clock = e.rows[0] * COUNTERS + CLOCK
            self._single = e.one, e.numbers, clock, (e.rows[0], e.column), *e.limits

    def fill(self, counters: np.ndarray, table: np.ndarray) -> None:
        """Enter the value of each scheduled hyperparameter for the step that is about to be made.

        Raises:
            ValueError: if one is outside its range; then nothing is entered.
        """
        if self._single is not None:  # the usual case, fast: one hyperparameter of one row
            one, numbers, clock, place, low, high, closed = self._single
            value = one(float(counters.item(clock)), numbers)
            if low < value < high or value in closed:
                table[place] = value
                return
        found = []
        for entry in self.entries:
            known: dict[int, float] = {}
            for r in entry.rows:
                clock = counters.item(r, CLOCK)
                if clock not in known:
                    known[clock] = self._value(entry, clock)
                found.append((r, entry.column, known[clock]))
        for r, column, value in found:
            table[r, column] = value

    @staticmethod
    def _value(entry: _Entry, clock: int) -> float:
        value = float(entry.one(float(clock), entry.numbers))
        low, high, closed = entry.limits
        if not (low < value < high or (closed and value in closed)):
            wanted = checks.expected(entry.checked)
            raise ValueError(f"{entry.label} {wanted}, but {entry.schedule!r} gives {value!r} at step {clock}.")
        return value

    def parts(self, rates: Mapping[str, Any]) -> Mapping[str, Any]:
        """For each group, its learning rate, or what gives it: a function of the step and its numbers."""
        if not self.entries:
            return rates
        out: dict[str, Any] = {}
        for pattern, lr in rates.items():
            if isinstance(lr, Schedule):
                entry = next((e for e in self.entries if e.uniform == "lr" and e.schedule == lr), None)
                one, _, numbers = lr._texts()
                out[pattern] = (one, entry.numbers if entry is not None else numbers)
            else:
                out[pattern] = lr
        return out

    # For kernels

    def formulas(self) -> tuple[Formula, ...]:
        """What a kernel has to evaluate, for all configurations alike.

        Raises:
            ValueError: if groups have schedules of different kinds for one hyperparameter, or some have none.
        """
        made: dict[str, Formula] = {}
        first = 0
        for entry in self.entries:
            fresh = Text(inline)
            source = fresh.source(entry.schedule._emit(fresh, "n"))
            functions = tuple(fresh.functions.items())
            known = made.get(entry.uniform)
            if known is None:
                made[entry.uniform] = Formula(entry.uniform, source, first, len(entry.numbers), functions)
                first += len(entry.numbers)
            elif (known.source, known.functions) != (source, functions):
                raise ValueError(
                    f"on a GPU all groups must have the same kind of schedule for {entry.label}: their numbers may "
                    f"differ, but {entry.schedule!r} is of another kind than that of another group."
                )
        return tuple(made.values())

    def numbers(self, rows: Rows) -> np.ndarray:
        """The numbers of the formulas, for each row."""
        formulas = {f.uniform: f for f in self.formulas()}
        out = np.zeros((len(rows), sum(f.count for f in formulas.values())))
        for entry in self.entries:
            first = formulas[entry.uniform].first
            out[entry.rows, first : first + len(entry.numbers)] = entry.numbers
        missing = [
            f.uniform
            for f in formulas.values()
            if sum(len(e.rows) for e in self.entries if e.uniform == f.uniform) != len(rows)
        ]
        if missing:
            raise ValueError(
                f"on a GPU all groups must have a schedule for {', '.join(missing)} if one has; give the others one of "
                "the same kind."
            )
        return out

    # Plateaus

    def observe(self, metric: float) -> None:
        """Let every plateau take account of a metric.

        Raises:
            ValueError: if there is none.
        """
        plateaus = {repr(p): p for entry in self.entries for p, _ in entry.text.plateaus}
        if not plateaus:
            raise ValueError("no hyperparameter follows a Plateau: lr=fastlr.schedules.Plateau(1e-3) would.")
        for name, plateau in plateaus.items():
            self._observed[name].observe(plateau, metric)
        self.take_observed()


class Rates(Mapping[str, Any]):
    """The learning rates of a step, evaluated when somebody asks.

    Args:
        parts: as `Scheduled.parts` has them.
        step: the number of updates before.
    """

    __slots__ = ("_parts", "_step")

    def __init__(self, parts: Mapping[str, Any], step: int) -> None:
        self._parts, self._step = parts, step

    def __getitem__(self, pattern: str) -> Any:
        """The rate of a group."""
        part = self._parts[pattern]
        return float(part[0](float(self._step), part[1])) if type(part) is tuple else part

    def __iter__(self) -> Iterator[str]:
        """The patterns."""
        return iter(self._parts)

    def __len__(self) -> int:
        """Number of groups, the optimizer's own among them."""
        return len(self._parts)


def saved(observed: Mapping[str, Observed]) -> dict[str, Any]:
    """What plateaus remember, as plain data."""
    return {name: asdict(state) for name, state in observed.items()}


def restored(data: Mapping[str, Any]) -> dict[str, Observed]:
    """What `saved` returned."""
    return {name: Observed(**state) for name, state in data.items()}


def metric_of(value: Any) -> float:
    """A metric as a number; NaN is allowed, and never better.

    Raises:
        TypeError: if it is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric must be a number, got {value!r}.") from None
