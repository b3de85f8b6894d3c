"""What staging knows of an expression: when its value is known, and the code that remains of it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

Constant: TypeAlias = bool | int | float | str
Statement: TypeAlias = tuple[str, ast.expr]  # an assignment: the name, and what it becomes


class Time(IntEnum):
    """When a value is known."""

    STATIC = 0
    UNIFORM = 1
    ELEMENT = 2


class StagingError(Exception):
    """Why something cannot be staged; whoever knows the line makes a `RuleError` of it."""


@dataclass(frozen=True)
class Value:
    """An expression of a rule.

    Attributes:
        time: when it is known.
        node: its code: a constant if static, in the names of `decide` if uniform, in those of `update` if element.
        integer: whether it is an integer.
        truth: whether it is a condition rather than a number.
    """

    time: Time
    node: ast.expr
    integer: bool = False
    truth: bool = False

    @property
    def constant(self) -> bool | int | float:
        """The value of a static expression that is a number."""
        assert isinstance(self.node, ast.Constant) and isinstance(self.node.value, bool | int | float)
        return self.node.value

    @property
    def name(self) -> str | None:
        """The variable that it is, or None if it is more than that."""
        return self.node.id if isinstance(self.node, ast.Name) else None


def static(value: Constant) -> Value:
    """A value that is known when the kernel is built."""
    return Value(Time.STATIC, ast.Constant(value), isinstance(value, int), isinstance(value, bool))


def uniform(name: str, integer: bool = False) -> Value:
    """A variable of `decide`."""
    return Value(Time.UNIFORM, ast.Name(name), integer)


def element(name: str, truth: bool = False) -> Value:
    """A variable of `update`."""
    return Value(Time.ELEMENT, ast.Name(name), truth=truth)


def variables(node: ast.AST) -> set[str]:
    """The variables in a piece of code, without the functions that it calls."""
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in called}


def call(function: str, *arguments: ast.expr) -> ast.Call:
    """The code of a call."""
    return ast.Call(ast.Name(function), list(arguments), [])
