"""A staged rule: the text of its functions, and all that a backend needs to know of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# The states that `after` keeps.
AVERAGES = ("ema",)


@dataclass(frozen=True)
class Code:
    """One staged function.

    Attributes:
        text: its source.
        reads: the arguments that it reads, sorted; those of `decide`, or `p`, `g`, states and inputs.
        calls: the functions that it calls, sorted; each is in the table of `kernels.functions`.
        reads_slots: whether it reads what `decide` returns.
    """

    text: str
    reads: tuple[str, ...]
    calls: tuple[str, ...]
    reads_slots: bool

    def __str__(self) -> str:
        """The source."""
        return self.text


@dataclass(frozen=True)
class Measure:
    """A reading pass before the update.

    Attributes:
        source: `measure(p, g, *states, *inputs, h) -> a value for each sum`.
        kinds: "norm" or "total", for each value.
        columns: the argument that each value is as it stands, or "".
    """

    source: Code
    kinds: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Staged:
    """A rule staged for given static values: the text of `decide`, `measure` and `update`, what they read and return.

    Attributes:
        name: the rule's name.
        uniforms: the arguments of `decide` after `t`, in order.
        states: the states that exist, in order, averages among them; `update` takes and returns them after `p`.
        inputs: what else `update` reads of an element, after the states.
        scalars: state of a group rather than of an element: `decide` takes and returns it.
        shared: for each scalar, whether it is one for "all", one for a "group", or one for each "leaf": it is as wide
            as the widest sum that it follows from.
        common: the uniforms that what is one for all follows from: they must be the same in all groups.
        sums: for each sum that `decide` takes, the number of what is added (counted over all measures) and the scope.
        reports: what `decide` returns for people, such as the norm of the gradient.
        emitted: what `update` returns after the states, to be summed up as norms.
        slots: how many numbers `decide` returns for the other functions.
        exact: whether every operation is correctly rounded everywhere, so that every backend gives the same bits.
        decide: `decide(t, *uniforms, *scalars, *sums) -> *h, *scalars, *reports`.
        measures: the reading passes, in order. `decide` runs before the first and after each.
        update: `update(p, g, *states, *inputs, h) -> p, *states, *emitted`.
        average: `average(p, g, *states, *inputs, h) -> *averages`, for leaves that are not updated; None if no
            averages are kept.
    """

    name: str
    uniforms: tuple[str, ...]
    states: tuple[str, ...]
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    shared: tuple[str, ...]
    common: tuple[str, ...]
    sums: tuple[tuple[int, str], ...]
    reports: tuple[str, ...]
    emitted: tuple[str, ...]
    slots: int
    exact: bool
    decide: Code
    measures: tuple[Measure, ...]
    update: Code
    average: Code | None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of `measure`, `update` and `average` before `h`: one for each column that a step reads."""
        return ("p", "g", *self.states, *self.inputs)

    def columns_read(self, code: Code) -> list[int]:
        """The numbers of the columns that `measure`, `update` or `average` reads."""
        return [k for k, name in enumerate(self.arguments) if name in code.reads]

    @property
    def kinds(self) -> tuple[str, ...]:
        """How each quantity is added up over elements, "norm" or "total": those of the measures, then the emitted."""
        return (*itertools.chain.from_iterable(m.kinds for m in self.measures), *["norm"] * len(self.emitted))

    @property
    def quantities(self) -> int:
        """How many things are added up over elements, by the measures and the update together."""
        return len(self.kinds)

    @property
    def spans(self) -> tuple[int, ...]:
        """Where the quantities of each measure, and then of the update, begin; at the end, how many there are."""
        return (*itertools.accumulate((*(len(m.kinds) for m in self.measures), len(self.emitted)), initial=0),)

    @property
    def may_skip(self) -> bool:
        """Whether a step is left out when its gradient is not finite."""
        return "finite" in self.reports

    @property
    def asides(self) -> bool:
        """Whether rows that are not updated take part: they share state with others, or are averaged."""
        return self.average is not None or any(scope != "leaf" for scope in self.shared)

    def show(self) -> None:
        """Print the staged code."""
        print(self)

    def __str__(self) -> str:
        """The staged code."""
        functions = [self.decide, *(m.source for m in self.measures), self.update]
        return "\n\n".join(str(f) for f in (*functions, *([self.average] if self.average else [])))


def define(source: str | Code, name: str, namespace: Mapping[str, Any]) -> Callable[..., Any]:
    """The function `name` that a piece of text defines; `namespace` has the functions that it calls."""
    scope = {"__name__": __name__, **namespace}
    exec(compile(str(source), f"<staged {name}>", "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function
