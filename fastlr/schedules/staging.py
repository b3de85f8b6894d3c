"""Stage schedules: join the equation of a schedule and those of the schedules inside it into one function of the step.

An equation is a plain function of the step `n` that reads like the paper:

    def cosine(n, *, lr, steps, end):
        return end + (lr - end) * (1 + cos(pi * min(n / steps, 1))) / 2

It is read from its source. What its arguments stand for is decided by their values: numbers become entries of a tuple
`p`, so that schedules that differ only in numbers share compiled code; `Several` numbers become a tuple of them;
another schedule is called like a function, `schedule(n - 5)`, and its equation takes the place of the call; strings,
booleans and None are known when the schedule is staged. An `if` or `for` over what is known is carried out then.

What remains is straight-line code, the function `value(n, p)`, which `evaluating` carries out. Assignments, and the
arguments of calls, are evaluated in any case; of a conditional expression, for one step, only the branch taken.
"""

from __future__ import annotations

import abc
import ast
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from ..kernels.functions import IN_SCHEDULES, name_of
from ..kernels.language import RuleError, parse
from ..kernels.operations import ARITHMETIC, COMPARISONS

__all__ = ["Equation", "HasEquation", "Memory", "Number", "Program", "Several", "staged"]

Equation: TypeAlias = Callable[..., Any]  # (n, *, arguments) -> the value
Number: TypeAlias = float | tuple[float, ...]  # one, or one for each model of a population


class HasEquation(abc.ABC):
    """What can be staged: a schedule."""

    equation: ClassVar[Equation]

    @abc.abstractmethod
    def arguments(self) -> Mapping[str, Any]:
        """What the equation takes, by name; what it does not name is left out."""


@dataclass(frozen=True)
class Several:
    """Several numbers for an equation, which gets a tuple; a plain tuple is one number for each model."""

    values: tuple[Number, ...]


@dataclass(frozen=True)
class Memory:
    """A number that `owner` remembers and that can change between steps."""

    owner: Any
    start: float


_OPERATORS: dict[type, Callable[..., Any]] = {
    **ARITHMETIC,
    **COMPARISONS,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


# What a schedule is apart from its numbers


@dataclass(frozen=True, slots=True)
class _Number:
    """A number of a schedule, by its index among its numbers and functions."""

    index: int


@dataclass(frozen=True, slots=True)
class _Function:
    """A function of the user's, by its index."""

    index: int


@dataclass(frozen=True, slots=True)
class _Outline:
    """An equation and its arguments, with a `_Number` in the place of each number: equal ones have the same program."""

    equation: Equation
    arguments: tuple[Any, ...]  # in the order of the equation's


def _outline(schedule: HasEquation, leaves: list[Any]) -> _Outline:
    """The outline of a schedule; its numbers and functions are appended to `leaves`."""

    def argument(value: Any) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, HasEquation):
            return _outline(value, leaves)
        if isinstance(value, Several):
            return tuple(map(argument, value.values))
        leaves.append(value)
        return (_Function if callable(value) else _Number)(len(leaves) - 1)

    values = schedule.arguments()
    return _Outline(schedule.equation, tuple(argument(values[name]) for name in _read(schedule.equation).keywords))


@dataclass(frozen=True)
class Program:
    """The function `value(n, p)` of all schedules that differ in numbers and the user's functions alone.

    Attributes:
        lines: of its body.
        numbers: for each entry of `p`, its index among the leaves of the schedule, or a number that is always the same.
        functions: the names by which it calls functions, and the index of each among the leaves.
    """

    lines: tuple[str, ...]
    numbers: tuple[_Number | float, ...]
    functions: tuple[tuple[str, int], ...]

    @functools.cached_property
    def source(self) -> str:
        """The text of the function."""
        return "\n    ".join(["def value(n, p):", *self.lines])

    def fill(self, leaves: list[Any]) -> tuple[tuple[Number | Memory, ...], dict[str, Callable[..., Any]]]:
        """The numbers that the function takes, and the functions that it calls, of one schedule."""
        numbers = [leaves[x.index] if isinstance(x, _Number) else x for x in self.numbers]
        return tuple(numbers), {name: leaves[k] for name, k in self.functions}


def staged(schedule: HasEquation, prefix: str = "", first: int = 0) -> tuple[Program, list[Any]]:
    """The program of a schedule, and the schedule's numbers and functions, with which it is filled.

    Args:
        schedule: has an equation and its arguments.
        prefix: of the names of variables and of the user's functions, which tells those of several schedules apart.
        first: the index in `p` of its first number.
    """
    leaves: list[Any] = []
    return _program(_outline(schedule, leaves), prefix, first), leaves


@functools.lru_cache(4096)
def _program(outline: _Outline, prefix: str, first: int) -> Program:
    stager = _Stager(prefix, first)
    result = ast.unparse(_expression(stager.schedule(outline, ast.Name("n"))))
    lines = [f"{name} = {ast.unparse(value)}" for name, value in stager.statements]
    return Program((*lines, f"return {result}"), tuple(stager.numbers), tuple(stager.functions))


# Staging


@dataclass(frozen=True)
class _Source:
    """A function as it was read: its name, arguments and statements, and the names of its module."""

    name: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    body: list[ast.stmt]
    outer: Mapping[str, Any]


@functools.cache
def _read(function: Callable[..., Any]) -> _Source:
    """Read an equation, or a function that one calls."""
    try:
        tree, outer = parse(function)
    except RuleError:
        raise ImportError(
            "fastlr reads the source of its own schedules: install it with its .py files, which are missing here."
        ) from None
    positional, keywords = ([a.arg for a in arguments] for arguments in (tree.args.args, tree.args.kwonlyargs))
    return _Source(tree.name, tuple(positional), tuple(keywords), tree.body, outer)


@dataclass
class _Scope:
    """The variables of a function while it is staged: syntax trees, or what is known."""

    source: _Source
    variables: dict[str, Any] = field(default_factory=dict)

    def error(self, node: ast.AST, why: str) -> TypeError:
        """An error in the function's source."""
        line = getattr(node, "lineno", "?")
        return TypeError(f"equation {self.source.name!r}, line {line}: {ast.unparse(node)!r} {why}.")


def _expression(value: Any) -> ast.expr:
    """The syntax tree of a number that is known, or one that is given."""
    return value if isinstance(value, ast.expr) else ast.Constant(float(value))


def _is_known(*values: Any) -> bool:
    return not any(isinstance(value, ast.expr) for value in values)


class _Stager:
    """Carries out equations with syntax trees in the place of numbers.

    Args:
        prefix: as for `staged`.
        first: as for `staged`.
    """

    def __init__(self, prefix: str, first: int) -> None:
        self._prefix, self._first, self._names = prefix, first, 0
        self._entries: dict[_Number, ast.expr] = {}
        self.statements: list[tuple[str, ast.expr]] = []
        self.numbers: list[_Number | float] = []
        self.functions: list[tuple[str, int]] = []

    def schedule(self, outline: _Outline, n: Any) -> Any:
        """The value of a schedule at a step."""
        source = _read(outline.equation)
        arguments = dict(zip(source.keywords, outline.arguments, strict=True))
        return self._block(source.body, _Scope(source, {"n": self._variable("n", n), **arguments}))

    def _function(self, function: Callable[..., Any], values: list[Any]) -> Any:
        """What a function that is written like an equation returns."""
        source = _read(function)
        pairs = zip(source.positional, values, strict=True)
        return self._block(source.body, _Scope(source, {name: self._variable(name, value) for name, value in pairs}))

    # Names

    def _fresh(self, name: str) -> str:
        self._names += 1
        return f"{self._prefix}{name}{self._names}"

    def _variable(self, name: str, value: Any) -> Any:
        """A value by a name, so that it can be used more than once."""
        if _is_known(value) or isinstance(value, ast.Name | ast.Constant | ast.Subscript):
            return value
        name = self._fresh(name)
        self.statements.append((name, value))
        return ast.Name(name)

    def _entry(self, number: _Number | float) -> ast.expr:
        """A number as an entry of `p`."""
        self.numbers.append(number)
        return ast.Subscript(ast.Name("p"), ast.Constant(self._first + len(self.numbers) - 1))

    def _look_up(self, node: ast.Name, scope: _Scope) -> Any:
        for names in (scope.variables, scope.source.outer):
            if node.id in names:
                return self._read_number(names[node.id])
        raise scope.error(node, "is not defined")

    def _read_number(self, value: Any) -> Any:
        """What is read: of a number, which has its entry in `p` from the first time on, that entry."""
        if isinstance(value, _Number) and value not in self._entries:
            self._entries[value] = self._entry(value)
        return self._entries[value] if isinstance(value, _Number) else value

    # Statements

    def _block(self, body: list[ast.stmt], scope: _Scope) -> Any:
        """Carry out statements; what they return, or None."""
        for statement in body:
            match statement:
                case ast.Expr(value=ast.Constant()):  # the docstring
                    pass
                case ast.Assign(targets=[target], value=value):
                    self._assign(target, self._value(value, scope), scope)
                case ast.If(test=test):
                    condition = self._value(test, scope)
                    if not _is_known(condition):
                        raise scope.error(test, "is not known when staged; write a conditional expression")
                    result = self._block(statement.body if condition else statement.orelse, scope)
                    if result is not None:
                        return result
                case ast.For(target=target, orelse=[]):
                    for item in self._value(statement.iter, scope):
                        self._assign(target, item, scope)
                        if self._block(statement.body, scope) is not None:
                            raise scope.error(statement, "returns from a loop")
                case ast.Return(value=ast.expr() as value):
                    return self._value(value, scope)
                case _:
                    raise scope.error(statement, "cannot stand in an equation")
        return None

    def _assign(self, target: ast.expr, value: Any, scope: _Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope.variables[name] = self._variable(name, self._read_number(value))
            case ast.Tuple(elts=parts):
                for part, item in zip(parts, value, strict=True):
                    self._assign(part, item, scope)
            case _:
                raise scope.error(target, "cannot be assigned in an equation")

    # Expressions

    def _value(self, node: ast.expr, scope: _Scope) -> Any:
        """A syntax tree, or what is known: a number, a string, a tuple, a schedule."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name():
                return self._look_up(node, scope)
            case ast.Tuple(elts=parts):
                return tuple(self._value(part, scope) for part in parts)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self._operation(op, self._value(left, scope), self._value(right, scope))
            case ast.UnaryOp(op=ast.USub() as op, operand=operand):
                value = self._value(operand, scope)
                return -value if _is_known(value) else ast.UnaryOp(op, value)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                a, b = self._value(left, scope), self._value(right, scope)
                if _is_known(a, b) or isinstance(op, ast.Is | ast.IsNot):
                    return _OPERATORS[type(op)](a, b)
                return ast.Compare(_expression(a), [op], [_expression(b)])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition = self._value(test, scope)
                if _is_known(condition):
                    return self._value(body if condition else orelse, scope)
                return ast.IfExp(condition, *(_expression(self._value(branch, scope)) for branch in (body, orelse)))
            case ast.Subscript(value=parts, slice=index):
                return self._read_number(self._value(parts, scope)[self._value(index, scope)])
            case ast.Call(func=function, args=arguments, keywords=[]):
                return self._call(node, scope, self._value(function, scope), [self._value(a, scope) for a in arguments])
        raise scope.error(node, "cannot stand in an equation")

    def _operation(self, op: ast.operator, a: Any, b: Any) -> Any:
        if _is_known(a, b):
            return _OPERATORS[type(op)](a, b)
        if isinstance(op, ast.Pow):
            # Of a known base a compiler would make another function, of 0.5**x an exp2: with other bits.
            base = self._entry(float(a)) if _is_known(a) else a
            return ast.Call(ast.Name("real_power"), [base, _expression(b)], [])
        return ast.BinOp(_expression(a), op, _expression(b))

    def _call(self, node: ast.Call, scope: _Scope, function: Any, values: list[Any]) -> Any:
        if isinstance(function, _Outline):
            return self.schedule(function, *values)
        if isinstance(function, _Function):  # called once, whatever becomes of its result
            name = self._fresh("function")
            self.functions.append((name, function.index))
            return self._variable("x", ast.Call(ast.Name(name), list(map(_expression, values)), []))
        if inspect.isfunction(function):
            return self._function(function, values)
        if _is_known(*values):
            return function(*values)
        called = name_of(function)
        if called not in IN_SCHEDULES:
            raise scope.error(node, "cannot be called in an equation")
        return ast.Call(ast.Name(called), list(map(_expression, values)), [])
