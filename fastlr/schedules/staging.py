"""Stage schedules: join the equation of a schedule and those of the schedules inside it into one function of the step.

An equation is a plain function of the step `n` that reads like the paper:

    def cosine(n, *, lr, steps, end):
        return end + (lr - end) * (1 + cos(pi * min(n / steps, 1))) / 2

It is read from its source. What its arguments stand for is decided by their values: numbers become entries of a tuple
`p`, so that schedules that differ only in numbers share compiled code; `Several` numbers become a tuple of them;
another schedule is called like a function, `schedule(n - 5)`, and its equation takes the place of the call; strings,
booleans and None are known when the schedule is staged. An `if` or `for` over what is known is carried out then.

What remains is straight-line code, `value(n, p)`: it runs as it stands for one step, over arrays with `where` in the
place of conditional expressions, and in kernels. Assignments, and the arguments of calls, are evaluated in any case;
of a conditional expression, for one step, only the branch that is taken.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from .. import checks
from ..checks import shown
from ..kernels.language import RuleError, parse
from ..kernels.staging import define

__all__ = ["Equation", "Memory", "Several", "StagedSchedule", "stage", "times"]

Equation: TypeAlias = Callable[..., Any]  # (n, *, arguments) -> the value
Number: TypeAlias = float | tuple[float, ...]  # one, or one for each model of a population


@dataclass(frozen=True)
class Several:
    """Several numbers for an equation, which gets a tuple; a plain tuple is one number for each model."""

    values: tuple[Number, ...]


@dataclass(frozen=True)
class Memory:
    """A number that changes from outside: something that `owner` remembers."""

    owner: Any
    start: float


@runtime_checkable
class HasEquation(Protocol):
    """What can be staged: a schedule."""

    @property
    def equation(self) -> Equation:
        """Its equation."""

    def arguments(self) -> Mapping[str, Any]:
        """What the equation takes, by name."""


# Functions


def times(a: Any, b: Any) -> Any:
    """A product in which zero times infinity is zero: what is switched off stays off however large the rest is."""
    return 0 if a == 0 else 0 if b == 0 else a * b


def _min(a: Any, b: Any) -> Any:
    """Python's min: the smaller of two values; NaN if `a` is."""
    return b if b < a else a


def _max(a: Any, b: Any) -> Any:
    """Python's max: the larger of two values; NaN if `a` is."""
    return b if b > a else a


# The functions of Python that an equation may call, and what stands for them: the name of a function of staged code,
# or a function that takes the place of the call.
CALLED: dict[Any, str] = {
    math.cos: "cos",
    math.exp: "exp",
    math.floor: "floor",
    math.log: "log",
    math.sqrt: "sqrt",
    math.pow: "pow",
}
INLINED: dict[Any, Callable[..., Any]] = {builtins.min: _min, builtins.max: _max}
_KNOWN = (zip, range, len, reversed)  # what may be called with lists, when a schedule is staged


def _floor(x: float) -> float:
    return float(math.floor(x))


def _infinite(function: Callable[..., float]) -> Callable[..., float]:
    """A function of numbers whose result, where it is too large, is infinite, as in arrays and kernels."""

    def call(*arguments: float) -> float:
        try:
            return function(*arguments)
        except OverflowError:
            return math.inf  # a power is one of a number that is not negative

    return call


# The functions that staged code calls are the C library's, for one step and for arrays, so that both are the same to
# the last bit. NumPy's own are others on some processors.
_SCALAR: dict[str, Callable[..., Any]] = {
    "floor": _floor,
    "cos": math.cos,
    "exp": _infinite(math.exp),
    "log": math.log,
    "sqrt": math.sqrt,
    "pow": _infinite(math.pow),
}


@functools.cache
def _vectorized(name: str) -> Callable[..., Any]:
    """One of the C library's functions over arrays: compiled, which takes a moment once in a process."""
    import numba

    arguments = ["x", "y"] if name == "pow" else ["x"]
    scalar = define(
        f"def f({', '.join(arguments)}):\n    return math.{name}({', '.join(arguments)})", "f", {"math": math}
    )
    vectorized: Callable[..., Any] = numba.vectorize([f"float64({', '.join(['float64'] * len(arguments))})"])(scalar)
    return vectorized


def _where(condition: Any, a: Any, b: Any) -> Any:
    return np.where(condition, a, b)


class _Select(ast.NodeTransformer):
    """Write conditional expressions as calls of `where`, for arrays."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return ast.Call(ast.Name("where", ast.Load()), [node.test, node.body, node.orelse], [])


@functools.lru_cache(4096)
def _for_steps(source: str) -> Callable[..., Any]:
    """The function `value` of a source, for one step."""
    return define(source, "value", _SCALAR)


def _over_arrays(source: str, functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function `value` of a source, over arrays."""
    tree = _Select().visit(ast.parse(source))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call)}
    compiled = {name: _vectorized(name) for name in ("cos", "exp", "log", "pow") if name in called}
    namespace = {**compiled, "floor": np.floor, "sqrt": np.sqrt, "where": _where, **functions}
    return define(ast.unparse(tree), "value", namespace)


_BLOCK = 16_384  # steps evaluated at once, which stay in the cache


@functools.lru_cache(4096)
def _for_arrays(source: str) -> Callable[..., Any]:
    return _over_arrays(source, {})


def _checked(function: Callable[..., Any], population: int | None, several: bool) -> Callable[[Any], Any]:
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
            returned = function(step)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"This was raised by {called}, which a hyperparameter follows, at step {step}.")
            raise
        if type(returned) is float:
            return returned
        wanted = "a number"
        if several:
            wanted += " or one for each model" + ("" if population is None else f", an array ({population},)")
        start = f"{called} must return {wanted}, but at step {step} it returned"
        try:
            array = checks.reals("it", returned)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{start} {shown(returned)}.") from None
        if array.ndim == 0:
            return float(array)
        if not several or array.ndim > 1 or population not in (None, len(array)):
            hint = "" if several else " Only a population takes one number for each model: see fastlr.flatten."
            raise ValueError(f"{start} an array of shape {array.shape}.{hint}")
        return array

    return call


def _all_models(value: Callable[..., Any], population: int | None, n: float, numbers: tuple[Number, ...]) -> Any:
    """A step's values for all models, or the one that is the same for all."""
    arrays = tuple(np.array(x) if isinstance(x, tuple) else x for x in numbers)
    with np.errstate(all="ignore"):
        values = np.asarray(value(n, arrays), np.float64)
    if values.ndim == 0:
        return float(values) if population is None else np.full(population, float(values))
    return values


# The result


class StagedSchedule:
    """A schedule as one function of the step and its numbers.

    Attributes:
        source: the function `value(n, p)`.
        lines: the lines of its body.
        numbers: what `p` holds: one number, or one for each model.
        functions: the user's functions that it calls, by the names in the source.
        memories: each `Memory` among the numbers: its owner and its index.
        models: how many models there is a number for, or None.
        per_model: whether its value may be one for each model: functions of the user's can tell models apart.
        scalar: the value of one step, as `scalar(n, numbers)` of a float `n`, if it is one number for all models.

    Raises:
        ValueError: if one number has more models than another.
    """

    def __init__(
        self,
        lines: tuple[str, ...],
        numbers: tuple[Number, ...],
        functions: dict[str, Callable[..., Any]],
        memories: tuple[tuple[Any, int], ...],
    ) -> None:
        self.lines, self.numbers, self.functions, self.memories = lines, numbers, functions, memories
        self.source = "\n    ".join(["def value(n, p):", *lines])
        counts = sorted({len(x) for x in numbers if isinstance(x, tuple)})
        if len(counts) > 1:
            raise ValueError(
                f"a schedule has numbers for {' and for '.join(map(str, counts))} models. Give one number for all, or "
                "one for each model."
            )
        self.models = counts[0] if counts else None
        self.per_model = self.models is not None or bool(functions)
        self._for_population: dict[int | None, Callable[..., Any]] = {}
        if functions:
            checked = {name: _checked(f, None, False) for name, f in functions.items()}
            self.scalar = define(self.source, "value", {**_SCALAR, **checked})
        else:
            self.scalar = _for_steps(self.source)

    def over_steps(self, steps: np.ndarray) -> np.ndarray:
        """The values of an array of steps, if they are one for all models and no functions of the user's take part.

        Args:
            steps: integers (n,).
        """
        out, value = np.empty(steps.shape), _for_arrays(self.source)
        with np.errstate(all="ignore"):
            for first in range(0, steps.size, _BLOCK):
                part = slice(first, first + _BLOCK)
                out[part] = value(steps[part].astype(np.float64), self.numbers)
        return out

    def for_models(self, population: int | None) -> Callable[..., Any]:
        """What gives one step's values: those of all models, or one for all."""
        value = self._for_population.get(population)
        if value is None:
            checked = {name: _checked(f, population, True) for name, f in self.functions.items()}
            over = _over_arrays(self.source, checked) if checked else _for_arrays(self.source)
            value = self._for_population[population] = functools.partial(_all_models, over, population)
        return value


def stage(schedule: HasEquation, prefix: str = "", first: int = 0) -> StagedSchedule:
    """Stage a schedule.

    Args:
        schedule: has an equation and its arguments.
        prefix: of the names of variables and of the user's functions, which tells those of several schedules apart.
        first: the index in `p` of its first number.
    """
    stager = _Stager(prefix, first)
    result = ast.unparse(_expression(stager.schedule(schedule, ast.Name("n"))))
    lines = [f"{name} = {ast.unparse(value)}" for name, value in stager.statements]
    return StagedSchedule((*lines, f"return {result}"), tuple(stager.numbers), stager.functions, tuple(stager.memories))


# Staging

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass(frozen=True)
class _Call:
    """A function of the user's in an equation."""

    name: str


@dataclass
class _Scope:
    """The names of an equation, or of a function that it calls, while it is staged."""

    name: str
    outer: Mapping[str, Any]  # of the module
    arguments: dict[str, Any]  # those not read so far
    variables: dict[str, Any] = field(default_factory=dict)  # syntax trees, or what is known


@functools.cache
def _read(function: Callable[..., Any]) -> tuple[ast.FunctionDef, Mapping[str, Any]]:
    """The syntax tree of an equation and the names that it sees."""
    try:
        return parse(function)
    except RuleError:
        raise ImportError(
            "fastlr reads the source of its own schedules: install it with its .py files, which are missing here."
        ) from None


def _expression(value: Any) -> ast.expr:
    """The syntax tree of a number that is known, or one that is given."""
    return value if isinstance(value, ast.expr) else ast.Constant(float(value))


def _is_known(*values: Any) -> bool:
    return not any(isinstance(value, ast.expr) for value in values)


class _Stager:
    """Carries out equations with syntax trees in the place of numbers.

    Args:
        prefix: as for `stage`.
        first: as for `stage`.
    """

    def __init__(self, prefix: str, first: int) -> None:
        self._prefix, self._first, self._names = prefix, first, 0
        self.statements: list[tuple[str, ast.expr]] = []
        self.numbers: list[Number] = []
        self.functions: dict[str, Callable[..., Any]] = {}
        self.memories: list[tuple[Any, int]] = []

    def schedule(self, schedule: HasEquation, n: Any) -> Any:
        """The value of a schedule at a step."""
        tree, outer = _read(schedule.equation)
        values = schedule.arguments()
        arguments = {a.arg: values[a.arg] for a in tree.args.kwonlyargs}
        return self._block(tree.body, _Scope(tree.name, outer, arguments, {"n": self._variable("n", n)}))

    def _function(self, function: Callable[..., Any], values: list[Any]) -> Any:
        """What a function that is written like an equation returns."""
        tree, outer = _read(function)
        names = [a.arg for a in tree.args.args]
        variables = {name: self._variable(name, value) for name, value in zip(names, values, strict=True)}
        return self._block(tree.body, _Scope(tree.name, outer, {}, variables))

    @staticmethod
    def _error(node: ast.AST, scope: _Scope, why: str) -> TypeError:
        return TypeError(f"equation {scope.name!r}, line {getattr(node, 'lineno', '?')}: {ast.unparse(node)!r} {why}.")

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

    def _number(self, value: Number) -> ast.expr:
        """A number that may be another without another source."""
        self.numbers.append(value if isinstance(value, tuple) else float(value))
        return ast.Subscript(ast.Name("p"), ast.Constant(self._first + len(self.numbers) - 1))

    def _argument(self, value: Any) -> Any:
        """What an argument of an equation is while it is staged."""
        if isinstance(value, Several):
            return tuple(map(self._number, value.values))
        if isinstance(value, Memory):
            self.memories.append((value.owner, len(self.numbers)))
            return self._number(value.start)
        if value is None or isinstance(value, bool | str | HasEquation):
            return value
        if callable(value):
            name = self._fresh("function")
            self.functions[name] = value
            return _Call(name)
        return self._number(value)

    def _look_up(self, node: ast.Name, scope: _Scope) -> Any:
        if node.id in scope.variables:
            return scope.variables[node.id]
        if node.id in scope.arguments:
            value = scope.variables[node.id] = self._argument(scope.arguments[node.id])
            return value
        if node.id in scope.outer:
            return scope.outer[node.id]
        raise self._error(node, scope, "is not defined")

    # Statements

    def _block(self, body: list[ast.stmt], scope: _Scope) -> Any:
        """Carry out statements; what they return, or None."""
        for statement in body:
            match statement:
                case ast.Expr(value=ast.Constant()):  # the docstring
                    pass
                case ast.Assign(targets=[target], value=value):
                    self._assign(target, self._value(value, scope), scope)
                case ast.If():
                    test = self._value(statement.test, scope)
                    if not _is_known(test):
                        raise self._error(
                            statement.test, scope, "is not known when staged; write a conditional expression"
                        )
                    result = self._block(statement.body if test else statement.orelse, scope)
                    if result is not None:
                        return result
                case ast.For(orelse=[]):
                    for item in self._value(statement.iter, scope):
                        self._assign(statement.target, item, scope)
                        if self._block(statement.body, scope) is not None:
                            raise self._error(statement, scope, "returns from a loop")
                case ast.Return(value=ast.expr() as value):
                    return self._value(value, scope)
                case _:
                    raise self._error(statement, scope, "cannot stand in an equation")
        return None

    def _assign(self, target: ast.expr, value: Any, scope: _Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope.variables[name] = self._variable(name, value)
            case ast.Tuple(elts=parts):
                for part, item in zip(parts, value, strict=True):
                    self._assign(part, item, scope)
            case _:
                raise self._error(target, scope, "cannot be assigned in an equation")

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
                if isinstance(op, ast.Is | ast.IsNot) or _is_known(a, b):
                    return _OPERATORS[type(op)](a, b)
                return ast.Compare(_expression(a), [op], [_expression(b)])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition = self._value(test, scope)
                if _is_known(condition):
                    return self._value(body if condition else orelse, scope)
                a, b = (_expression(self._value(part, scope)) for part in (body, orelse))
                return ast.IfExp(condition, a, b)
            case ast.Subscript(value=whole, slice=ast.Slice(lower=lower, upper=upper, step=None)):
                ends = (None if end is None else self._value(end, scope) for end in (lower, upper))
                return self._value(whole, scope)[slice(*ends)]
            case ast.Subscript(value=whole, slice=index):
                return self._value(whole, scope)[self._value(index, scope)]
            case ast.Call(func=function, args=arguments, keywords=[]):
                return self._call(node, scope, self._value(function, scope), [self._value(a, scope) for a in arguments])
        raise self._error(node, scope, "cannot stand in an equation")

    def _operation(self, op: ast.operator, a: Any, b: Any) -> Any:
        if _is_known(a, b):
            return _OPERATORS[type(op)](a, b)
        if isinstance(op, ast.Pow):
            # Of a known base a compiler would make another function, of 0.5**x an exp2: with other bits.
            base = self._number(a) if _is_known(a) else a
            return ast.Call(ast.Name("pow"), [base, _expression(b)], [])
        return ast.BinOp(_expression(a), op, _expression(b))

    def _call(self, node: ast.Call, scope: _Scope, function: Any, values: list[Any]) -> Any:
        if isinstance(function, HasEquation):
            return self.schedule(function, *values)
        if isinstance(function, _Call):  # called once, whatever becomes of its result
            return self._variable("x", ast.Call(ast.Name(function.name), list(map(_expression, values)), []))
        if function in _KNOWN or (function in CALLED and _is_known(*values)):
            return function(*values)
        if function in CALLED:
            return ast.Call(ast.Name(CALLED[function]), list(map(_expression, values)), [])
        function = INLINED.get(function, function)
        if not inspect.isfunction(function):
            raise self._error(node, scope, "cannot be called in an equation")
        return self._function(function, values)
