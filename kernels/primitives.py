"""The functions a rule may call, each with one definition that gives the same bits in Python, NumPy and Numba.

Two kinds. *Basic* functions exist on every backend and are correctly rounded there (`sqrt`, `abs`, `where`), or are
the platform's own and take the rule out of the bit contract (`exp`, `log`, `tanh`, ...). *Composed* functions
(`max`, `min`, `sign`, `clip`) differ between backends on NaN and signed zeros, so they are written here once, in the
language of rules, and staging inlines them. *Sums* (`norm`, `total`) run over all elements of a leaf, a group or
everything: a step measures them before it updates, in the fixed order of `kernels.sums`.
"""

import builtins
import math
from collections.abc import Callable
from typing import Any

import numpy as np

abs = builtins.abs
exp = math.exp
tanh = math.tanh
sin = math.sin
cos = math.cos


def log(x):
    """Natural logarithm."""
    return math.log(x)


def sqrt(x):
    """Square root, correctly rounded; NaN for a negative number, as on every other backend."""
    return math.sqrt(x) if x >= 0 else math.nan


def where(condition, a, b):
    """`a` where the condition holds, else `b`; both are evaluated."""
    return a if condition else b


def max(a, b):
    """The larger of two numbers; NaN if either is NaN."""
    return where(a > b, a, where(a != a, a, b))


def min(a, b):
    """The smaller of two numbers; NaN if either is NaN."""
    return where(a < b, a, where(a != a, a, b))


def sign(x):
    """1, -1, or `x` itself where it is a zero or NaN."""
    return where(x > 0, 1.0, where(x < 0, -1.0, x))


def clip(x, low, high):
    """`x` limited to the range from `low` to `high`; NaN stays NaN."""
    return min(max(x, low), high)


def power(base, exponent):
    """`base` to an integer power by repeated squaring: the same products, in the same order, on every backend."""
    n = exponent if exponent >= 0 else -exponent
    result = 1.0
    while n > 0:
        if n % 2 == 1:
            result = result * base
        base = base * base
        n = n // 2
    return result if exponent >= 0 else 1.0 / result


def real_power(base, exponent):
    """`base` to any power, of numbers that are the same for a whole group."""
    return base**exponent


def norm(x, over="leaf"):
    """Root of the sum of the squares of `x` over all elements of a leaf, a "group" or "all"; float64.

    Called as it stands, outside of a kernel, over the numbers it is given.
    """
    return math.sqrt(np.sum(np.square(x, dtype=np.float64)))


def total(x, over="leaf"):
    """Sum of `x` over all elements of a leaf, a "group" or "all"; float64."""
    return float(np.sum(x, dtype=np.float64))


# What a sum may run over.
SCOPES = ("leaf", "group", "all")
SUMS: dict[str, Callable[..., Any]] = {"norm": norm, "total": total}

COMPOSED: dict[str, Callable[..., Any]] = {"max": max, "min": min, "sign": sign, "clip": clip}

# Basic functions, and whether each is correctly rounded everywhere: a rule that calls one that is not is not `exact`.
BASIC: dict[str, bool] = {
    "sqrt": True,
    "abs": True,
    "where": True,
    "exp": False,
    "log": False,
    "tanh": False,
    "sin": False,
    "cos": False,
}

# Whatever a rule's author imported under whatever name, resolved by identity.
_SAME_AS: dict[str, tuple[Any, ...]] = {
    "sqrt": (sqrt, math.sqrt, np.sqrt),
    "abs": (builtins.abs, math.fabs, np.abs, np.fabs),
    "where": (where, np.where),
    "exp": (math.exp, np.exp),
    "log": (log, math.log, np.log),
    "tanh": (math.tanh, np.tanh),
    "sin": (math.sin, np.sin),
    "cos": (math.cos, np.cos),
    "max": (max, builtins.max, np.maximum),
    "min": (min, builtins.min, np.minimum),
    "sign": (sign, np.sign),
    "clip": (clip, np.clip),
    "norm": (norm, np.linalg.norm),
    "total": (total, np.sum),
}


def name_of(function: object) -> str | None:
    """The primitive that a Python, math or NumPy function stands for, or None if it is not one."""
    for name, functions in _SAME_AS.items():
        if any(function is f for f in functions):
            return name
    return None
