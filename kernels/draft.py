"""The statements of `decide` and `update` while a rule is staged, and the names in them."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from .values import Statement, Time, Value, call, element, static, uniform, variables

_SumKey: TypeAlias = tuple[str, str, tuple[tuple[str, int], ...]]


@dataclass
class Sum:
    """A sum over elements.

    Attributes:
        kind: "norm" or "total".
        element: the name in `update` of what is added up.
        column: the argument of `update` that this is as it stands, or "".
        round: the number of measuring passes before the one that can take it: what it follows from is known then.
        names: for each scope that it is taken over, its name in `decide`.
    """

    kind: str
    element: str
    column: str
    round: int
    names: dict[str, str] = field(default_factory=dict)


class Draft:
    """What has been written so far.

    Args:
        arguments: the names that are arguments of `update`.
        uniforms: the names that are arguments of `decide`.
        taken: all names that the rule uses.

    Attributes:
        decide: the statements of `decide`.
        update: the statements of `update`.
        slots: what `decide` returns for the other functions: code -> (its name in `update`, its node in `decide`).
        uniforms: the names that are arguments of `decide`.
        taken: the names that are in use.
        slots_argument: the argument of `update` that has the slots.
        depth: how many conditionals are around the present statement.
    """

    def __init__(self, arguments: set[str], uniforms: set[str], taken: set[str]) -> None:
        self.decide: list[Statement] = []
        self.update: list[Statement] = []
        self.slots: dict[str, tuple[str, ast.expr]] = {}
        self.uniforms, self.taken = uniforms, taken
        self.slots_argument = "h" if "h" not in taken else self.fresh("h")
        taken.add("h")
        self.depth = 0
        self._arguments = arguments
        self._guards: list[ast.expr] = []  # uniform conditions under which the present statement runs
        self._sums: dict[_SumKey, Sum] = {}
        self._rounds: dict[str, dict[str, int]] = {"decide": {}, "update": {}}  # passes before a name is known
        self._versions: dict[str, int] = {}  # how often a name has been assigned

    @property
    def sums(self) -> Iterable[Sum]:
        """All sums, in the order in which they were asked for."""
        return self._sums.values()

    # Statements

    def fresh(self, name: str) -> str:
        """A new name that begins like this one."""
        k = 1
        while f"{name}_{k}" in self.taken:
            k += 1
        self.taken.add(f"{name}_{k}")
        return f"{name}_{k}"

    def assign(self, name: str, value: Value) -> Value:
        """Assign a value to a variable of the rule; what the variable stands for from now on."""
        if value.name == name or value.time is Time.STATIC or (value.time is Time.UNIFORM and self.depth):
            return value
        if value.time is Time.UNIFORM:
            where, clash = "decide", name in self.uniforms or any(name == target for target, _ in self.decide)
        else:
            where, clash = "update", self.depth > 0 or any(name == slot for slot, _ in self.slots.values())
        own = self.fresh(name) if clash else name
        self._note(where, own, value.node)
        return replace(value, node=ast.Name(own))

    def named(self, prefix: str, value: Value) -> Value:
        """An element's value under a fresh name."""
        name = self.fresh(prefix)
        self._note("update", name, self.lift(value))
        return element(name, value.truth)

    def copied(self, value: Value) -> Value:
        """The value under a name of its own, so that it outlives an assignment to what it was computed from."""
        return self.named("x", value) if value.time is Time.ELEMENT else value

    def held(self, value: Value) -> Value:
        """The value under some name, so that it can be used twice."""
        if value.time is Time.STATIC or value.name is not None:
            return value
        if value.time is Time.ELEMENT:
            return self.copied(value)
        if self.depth:
            return value
        name = self.fresh("u")
        self._note("decide", name, value.node)
        return replace(value, node=ast.Name(name))

    def _note(self, where: str, name: str, node: ast.expr) -> None:
        """Add an assignment to `decide` or `update`."""
        (self.decide if where == "decide" else self.update).append((name, node))
        self._rounds[where][name] = self._round(where, node)
        self._versions[name] = self._versions.get(name, 0) + 1

    def _round(self, where: str, node: ast.expr) -> int:
        """How many measuring passes there must have been before an expression is known."""
        return max((self._rounds[where].get(name, 0) for name in variables(node)), default=0)

    # Conditionals

    @contextlib.contextmanager
    def branch(self, test: Value, holds: bool) -> Iterator[None]:
        """The context in which one branch of a conditional is staged."""
        self.depth += 1
        if test.time is Time.UNIFORM:
            self._guards.append(test.node if holds else ast.UnaryOp(ast.Not(), test.node))
        yield
        if test.time is Time.UNIFORM:
            self._guards.pop()
        self.depth -= 1

    # From uniform to element, and back

    def lift(self, value: Value) -> ast.expr:
        """The value in the names of `update`: a uniform one gets a slot, and keeps its guard if it has one."""
        if value.time is Time.ELEMENT:
            return value.node
        node = self.number(value).node
        if isinstance(node, ast.Constant):
            node = ast.Constant(float(value.constant))
        elif self._guards and not isinstance(node, ast.Name):
            test = self._guards[0] if len(self._guards) == 1 else ast.BoolOp(ast.And(), list(self._guards))
            node = ast.IfExp(test, node, ast.Constant(0.0))
        code = ast.unparse(node)
        if code not in self.slots:
            own = node.id if isinstance(node, ast.Name) else None
            clash = own in self._arguments or any(own == target for target, _ in self.update)
            name = self.fresh("h") if own is None or clash else own
            self.slots[code] = (name, node)
            self._rounds["update"][name] = self._round("decide", node)
        return ast.Name(self.slots[code][0])

    def number(self, value: Value) -> Value:
        """A condition used as a number is 1 or 0."""
        if not value.truth or value.time is Time.STATIC:
            return value
        if value.time is Time.UNIFORM:
            return Value(value.time, ast.IfExp(value.node, ast.Constant(1.0), ast.Constant(0.0)))
        return Value(value.time, call("where", value.node, self.lift(static(1.0)), self.lift(static(0.0))))

    def sum(self, kind: str, scope: str, value: Value) -> Value:
        """A sum of an element's value: taken by a measuring pass, and known to `decide` from then on."""
        versions = tuple((name, self._versions.get(name, 0)) for name in sorted(variables(value.node)))
        key = (kind, ast.unparse(value.node), versions)
        if key not in self._sums:
            column = value.name if value.name is not None and value.name not in self._versions else ""
            added = self.named("added", value)
            assert added.name is not None
            self._sums[key] = Sum(kind, added.name, column, self._round("update", added.node))
        taken = self._sums[key]
        if scope not in taken.names:
            taken.names[scope] = name = self.fresh(f"{kind}_{scope}")
            self._rounds["decide"][name] = taken.round + 1
        return uniform(taken.names[scope])
