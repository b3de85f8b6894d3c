"""The functions that a rule may call, as they are in ordinary Python; `kernels.functions` is the table of them.

What differs between backends on NaN and signed zeros (`max`, `min`, `sign`, `clip`) is written here once, in the
language of rules, and staging inlines it: so it gives the same bits in Python, NumPy and compiled code.
"""

import builtins
import math

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


def floor(x):
    """The largest whole number that is not above `x`, as a float; infinities, NaN and -0 stay as they are."""
    return float(math.floor(x)) if x != 0 and x - x == 0 else x


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


# What a sum may run over, from the narrowest to the widest.
SCOPES = ("leaf", "group", "all")


def norm(x, over="leaf"):
    """Root of the sum of the squares of `x` over all elements of a leaf, a "group" or "all"; float64.

    Called as it stands, outside of a kernel, over the numbers it is given.
    """
    return math.sqrt(np.sum(np.square(x, dtype=np.float64)))


def total(x, over="leaf"):
    """Sum of `x` over all elements of a leaf, a "group" or "all"; float64."""
    return float(np.sum(x, dtype=np.float64))
