"""What an operation on values of different binding times becomes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import replace

from . import functions
from .draft import Draft
from .values import StagingError, Time, Value, call, static

ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Operations:
    """Operations on values. Static ones are carried out; what is uniform is lifted where it meets an element.

    Args:
        draft: takes the statements that an operation needs.

    Attributes:
        exact: whether every operation on elements so far is correctly rounded everywhere.

    Raises:
        StagingError: (each method) if the operation cannot be staged.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.exact = True

    def signed(self, op: ast.USub | ast.UAdd, x: Value) -> Value:
        """`-x` or `+x` of a number."""
        if x.time is Time.STATIC:
            return static(-x.constant if isinstance(op, ast.USub) else +x.constant)
        return replace(x, node=ast.UnaryOp(op, x.node))

    def binary(self, a: Value, op: ast.operator, b: Value) -> Value:
        """`a + b`, `a - b`, `a * b`, `a / b` or `a**b` of numbers."""
        if type(op) not in ARITHMETIC:
            raise StagingError(f"the operator {construct(op)} cannot be staged; use +, -, *, / and **")
        time = max(a.time, b.time)
        if time is Time.STATIC:
            try:
                return static(ARITHMETIC[type(op)](a.constant, b.constant))
            except ArithmeticError as error:
                raise StagingError(f"{ast.unparse(ast.BinOp(a.node, op, b.node))}: {error}") from None
        if isinstance(op, ast.Pow):
            return self._power(a, b)
        if time is Time.UNIFORM:
            return Value(time, ast.BinOp(a.node, op, b.node), a.integer and b.integer and not isinstance(op, ast.Div))
        if isinstance(op, ast.Div) and b.time is not Time.ELEMENT:
            op, b = ast.Mult(), Value(Time.UNIFORM, ast.BinOp(ast.Constant(1.0), ast.Div(), b.node))
        return Value(time, ast.BinOp(self.draft.lift(a), op, self.draft.lift(b)))

    def _power(self, a: Value, b: Value) -> Value:
        if b.time is Time.STATIC and b.constant in (0.5, -0.5):
            root = self.called("sqrt", [a])
            return root if b.constant > 0 else self.binary(static(1.0), ast.Div(), root)
        if b.time is Time.STATIC and b.integer and abs(b.constant) in (1, 2, 3, 4):
            base = a = self.draft.held(a)
            for _ in range(abs(int(b.constant)) - 1):
                a = self.binary(a, ast.Mult(), base)
            return a if b.constant > 0 else self.binary(static(1.0), ast.Div(), a)
        if Time.ELEMENT in (a.time, b.time):
            raise StagingError(
                "an element can be raised to 0.5 or to a literal integer up to 4; for others use exp and log"
            )
        if b.integer:
            return Value(Time.UNIFORM, call("power", _float(a), b.node))
        return Value(Time.UNIFORM, call("real_power", _float(a), _float(b)))

    def compare(self, left: Value, op: ast.cmpop, right: Value) -> Value:
        """`a < b` and the like, of numbers."""
        if type(op) not in COMPARISONS:
            raise StagingError(f"the comparison {construct(op)} cannot be staged")
        time = max(left.time, right.time)
        if time is Time.STATIC:
            return static(COMPARISONS[type(op)](left.constant, right.constant))
        a, b = (left.node, right.node) if time is Time.UNIFORM else (self.draft.lift(left), self.draft.lift(right))
        return Value(time, ast.Compare(a, [op], [b]), truth=True)

    def joined(self, op: ast.boolop, values: list[Value]) -> Value:
        """Conditions joined by `and` or `or`."""
        decisive = isinstance(op, ast.Or)
        rest = []
        for value in values:
            if value.time is not Time.STATIC:
                rest.append(value)
            elif bool(value.constant) is decisive:
                return static(decisive)
        if not rest:
            return static(not decisive)
        if len(rest) == 1:
            return rest[0]
        time = max(v.time for v in rest)
        if time is Time.UNIFORM:
            return Value(time, ast.BoolOp(op, [v.node for v in rest]), truth=True)
        join = ast.BitOr() if decisive else ast.BitAnd()
        node = self.condition(rest[0])
        for value in rest[1:]:
            node = ast.BinOp(node, join, self.condition(value))
        return Value(time, node, truth=True)

    def negated(self, x: Value) -> Value:
        """`not x`."""
        if x.time is Time.STATIC:
            return static(not x.constant)
        if x.time is Time.UNIFORM:
            return Value(x.time, ast.UnaryOp(ast.Not(), x.node), truth=True)
        return Value(x.time, ast.BinOp(self.condition(x), ast.BitXor(), ast.Constant(True)), truth=True)

    def condition(self, value: Value) -> ast.expr:
        """The code of a value as a condition on elements."""
        if value.time is Time.ELEMENT and value.truth:
            return value.node
        zero = self.draft.lift(static(0.0))
        return ast.Compare(self.draft.lift(self.draft.number(value)), [ast.NotEq()], [zero])

    def choice(self, test: Value, a: Value, b: Value) -> Value:
        """`a` where the condition holds, else `b`; the condition is not static."""
        if test.time is Time.UNIFORM and max(a.time, b.time) is not Time.ELEMENT:
            code = ast.IfExp(test.node, a.node, b.node)
            return Value(Time.UNIFORM, code, a.integer and b.integer, a.truth and b.truth)
        a, b = self.draft.number(a), self.draft.number(b)
        with self.draft.branch(test, True):
            then = self.draft.lift(a)
        with self.draft.branch(test, False):
            other = self.draft.lift(b)
        return Value(Time.ELEMENT, call("where", self.condition(test), then, other))

    def called(self, name: str, arguments: list[Value]) -> Value:
        """A call of a function in the table of `kernels.functions`."""
        if max(v.time for v in arguments) is not Time.ELEMENT:  # once, in float64
            return Value(Time.UNIFORM, call(name, *(_float(v) for v in arguments)))
        self.exact = self.exact and functions.TABLE[name].exact
        return Value(Time.ELEMENT, call(name, *(self.draft.lift(v) for v in arguments)))


def _float(value: Value) -> ast.expr:
    """The code of a function's argument in `decide`, always float64."""
    if isinstance(value.node, ast.Constant):
        return ast.Constant(float(value.constant))
    return call("float", value.node) if value.integer else value.node


def construct(node: ast.AST) -> str:
    """What a piece of syntax is called in messages."""
    words = {
        "For": "a for loop",
        "While": "a while loop",
        "With": "a with block",
        "Subscript": "an index",
        "Try": "a try block",
    }
    name = type(node).__name__
    return words.get(name, f"`{name}`")
