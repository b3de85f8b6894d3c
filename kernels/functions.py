"""What rules and staged code may call: one table, which says what carries out each function where.

A rule may call a function by any of its names in `kernels.primitives`, Python, `math` and NumPy. In staged code it has
one name, by which it stands in the table.
"""

from __future__ import annotations

import builtins
import enum
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from . import primitives
from .staged import define

_Function: TypeAlias = Callable[..., Any]


class Kind(enum.Enum):
    """What staging makes of a call."""

    CALL = "a call in staged code"
    INLINED = "its definition in `kernels.primitives`, in place: backends differ on NaN and signed zeros"
    SUM = "a sum over elements, measured before the update in the fixed order of `kernels.sums`"
    OPERATOR = "a call in staged code, which a rule writes as an operator"


@dataclass(frozen=True)
class Function:
    """A row of the table.

    Attributes:
        python: what carries it out for one number; where it has no result, it may raise as Python does.
        numpy: what carries it out for arrays.
        kernel: what compiled code calls instead of `python`; None if that is compiled itself.
        gpu: what compiled code calls on a GPU, if it is something else than on a processor.
        also: by what a rule may call it, beside `python`.
        exact: whether it is correctly rounded everywhere, so that every backend gives the same bits.
        overflows: whether Python raises an error where the result is too large for a float.
        kind: what staging makes of a call.
    """

    python: _Function
    numpy: _Function
    kernel: _Function | None = None
    gpu: _Function | None = None
    also: tuple[_Function, ...] = ()
    exact: bool = True
    overflows: bool = False
    kind: Kind = Kind.CALL

    @property
    def number(self) -> _Function:
        """What carries it out for one number, with an infinity or NaN where Python raises an error.

        What is not exact comes from the C library, as in compiled code: NumPy's own differs on some processors.
        """
        return self.numpy if self.exact else _without_errors(self.python, self.numpy)

    @functools.cached_property
    def array(self) -> _Function:
        """What carries it out for arrays, to the same bits as for one number; compiling it may take a moment."""
        if self.exact or self.kernel is None:
            return self.numpy
        import numba

        names = [*inspect.signature(self.python).parameters]
        text = f"def call({', '.join(names)}):\n    return kernel({', '.join(names)})"
        signature = numba.float64(*[numba.float64] * len(names))
        vectorized: _Function = numba.vectorize([signature])(define(text, "call", {"kernel": self.kernel}))
        return vectorized


def _without_errors(python: _Function, numpy: _Function) -> _Function:
    def function(*numbers: float) -> np.float64:
        try:
            return np.float64(python(*numbers))
        except (ArithmeticError, ValueError):
            with np.errstate(all="ignore"):
                return np.float64(numpy(*numbers))

    return function


def _infinite(function: _Function) -> _Function:
    """A function that returns an infinity where Python raises an error because the result is too large."""

    def call(*numbers: float) -> float:
        try:
            return function(*numbers)
        except OverflowError:
            return math.inf

    return call


_INLINED, _SUM, _OPERATOR = Kind.INLINED, Kind.SUM, Kind.OPERATOR

TABLE: dict[str, Function] = {
    "sqrt": Function(primitives.sqrt, np.sqrt, math.sqrt, also=(math.sqrt, np.sqrt)),
    "abs": Function(builtins.abs, np.abs, builtins.abs, also=(math.fabs, np.abs, np.fabs)),
    # Not "floor": that is a variable of rules and formulas.
    "round_down": Function(primitives.floor, np.floor, np.floor, gpu=math.floor, also=(math.floor, np.floor)),
    "where": Function(primitives.where, np.where, also=(np.where,)),  # in kernels, the select of the backend
    "exp": Function(math.exp, np.exp, math.exp, also=(np.exp,), exact=False, overflows=True),
    "log": Function(primitives.log, np.log, math.log, also=(math.log, np.log), exact=False),
    "tanh": Function(math.tanh, np.tanh, math.tanh, also=(np.tanh,), exact=False),
    "sin": Function(math.sin, np.sin, math.sin, also=(np.sin,), exact=False),
    "cos": Function(math.cos, np.cos, math.cos, also=(np.cos,), exact=False),
    "max": Function(primitives.max, np.maximum, also=(builtins.max, np.maximum), kind=_INLINED),
    "min": Function(primitives.min, np.minimum, also=(builtins.min, np.minimum), kind=_INLINED),
    "sign": Function(primitives.sign, np.sign, also=(np.sign,), kind=_INLINED),
    "clip": Function(primitives.clip, np.clip, also=(np.clip,), kind=_INLINED),
    "norm": Function(primitives.norm, np.linalg.norm, also=(np.linalg.norm,), kind=_SUM),
    "total": Function(primitives.total, np.sum, also=(np.sum,), kind=_SUM),
    "power": Function(primitives.power, primitives.power, kind=_OPERATOR),  # to an integer
    "real_power": Function(
        primitives.real_power, primitives.real_power, math.pow, exact=False, overflows=True, kind=_OPERATOR
    ),
    "float": Function(builtins.float, np.float64, builtins.float, kind=_OPERATOR),
}

# What a rule may call, sums aside.
CALLABLE = tuple(f.python.__name__ for f in TABLE.values() if f.kind in (Kind.CALL, Kind.INLINED))

# What staged code calls: variables of a rule must have other names.
RESERVED = frozenset(name for name, f in TABLE.items() if f.kind is not Kind.INLINED)

# What the formulas of schedules may call: functions of numbers that compiled code has.
IN_SCHEDULES = tuple(name for name, f in TABLE.items() if f.kernel is not None)


def name_of(function: object) -> str | None:
    """The name in the table of what a rule calls, or None if it is not there."""
    for name, row in TABLE.items():
        if row.kind is not Kind.OPERATOR and any(function is f for f in (row.python, *row.also)):
            return name
    return None


def for_numbers(calls: Iterable[str]) -> dict[str, _Function]:
    """What these names stand for in a function of numbers: fast, but it may raise as Python does."""
    return {name: TABLE[name].python for name in calls}


def for_float64(calls: Iterable[str]) -> dict[str, _Function]:
    """What these names stand for in a function of NumPy's numbers, which raises nothing."""
    return {name: TABLE[name].number for name in calls}


def for_arrays(calls: Iterable[str]) -> dict[str, _Function]:
    """What these names stand for in a function of arrays."""
    return {name: TABLE[name].numpy for name in calls}


def for_steps(calls: Iterable[str]) -> dict[str, _Function]:
    """What these names stand for in the formula of a schedule, for one step: functions of `math`, for speed.

    For finite numbers, and roots and powers of numbers that are not negative; round_down returns an int.
    """

    def function(row: Function) -> _Function:
        own = row.gpu or row.kernel or row.python
        return _infinite(own) if row.overflows else own

    return {name: function(TABLE[name]) for name in calls}


def for_arrays_of_steps(calls: Iterable[str]) -> dict[str, _Function]:
    """What these names stand for in the formula of a schedule, for arrays of steps: the same bits."""
    return {name: TABLE[name].array for name in calls}


def for_kernels(
    calls: Iterable[str], where: _Function, compiled: Callable[[_Function], _Function], gpu: bool = False
) -> dict[str, _Function]:
    """What these names stand for in compiled code.

    Args:
        calls: the names.
        where: the backend's select.
        compiled: makes a plain function one that compiled code may call.
        gpu: whether the code is for a GPU.
    """

    def function(name: str) -> _Function:
        if name == "where":
            return where
        row = TABLE[name]
        own = (row.gpu if gpu else None) or row.kernel
        return own if own is not None else compiled(row.python)

    return {name: function(name) for name in calls}
