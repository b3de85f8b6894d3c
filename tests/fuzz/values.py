"""Odd values, as the code that makes them."""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import fractions
import functools
import importlib.util
import types
import warnings
from typing import Any

import numpy as np

import fastlr
from fastlr import schedules


class WithFloat:
    """Becomes whatever it was given, by `float`, `int` or as an index."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> Any:
        return self.value

    def __index__(self) -> Any:
        return self.value


class WithArray:
    """Becomes whatever it was given, for NumPy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.value if dtype is None else np.asarray(self.value, dtype)


class Raises:
    """Raises at whatever is asked of it."""

    def _raise(self, *_: Any) -> Any:
        raise ZeroDivisionError("raised by the value itself")

    __float__ = __int__ = __index__ = __array__ = __len__ = __iter__ = __getitem__ = __bool__ = _raise
    __eq__ = _raise
    __hash__ = object.__hash__


class Plain(np.ndarray):
    """A subclass that means no more than its memory."""


class Reversed(np.ndarray):
    """A subclass that means something else than its memory."""

    def __array_finalize__(self, _: Any) -> None:
        self.unit = -1.0

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return -np.array(self.view(np.ndarray), dtype)


def nest(depth: int, leaf: Any = None) -> Any:
    """A list in a list in a list."""
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def nest_dicts(depth: int, leaf: Any = None) -> Any:
    """A dict in a dict in a dict."""
    for _ in range(depth):
        leaf = {"a": leaf}
    return leaf


def circle() -> Any:
    """A list that holds itself."""
    out: list[Any] = []
    out.append(out)
    return out


def dict_circle() -> Any:
    """A dict that holds itself."""
    out: dict[str, Any] = {}
    out["w"] = out
    return out


def same_memory(size: int = 1 << 16) -> Any:
    """An `alloc` that returns the same memory each time."""
    memory = np.zeros(size, np.uint8)
    return lambda n: memory


def frozen(x: Any) -> np.ndarray:
    """Made read-only."""
    x.flags.writeable = False
    return x


def unaligned(shape: Any, dtype: Any) -> np.ndarray:
    """Ones at an address that is no multiple of anything."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    out = np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)
    out[...] = 1
    return out


def spread(shape: Any, dtype: Any) -> np.ndarray:
    """Ones with gaps between them."""
    return np.ones((*shape, 2), dtype)[..., 0]


@fastlr.rule
def descent(p, g, *, lr):
    """The simplest rule."""
    return p - lr * g


_HAVE = {name: importlib.util.find_spec(name) is not None for name in ("torch", "jax", "ml_dtypes")}

NAMES: dict[str, Any] = {
    "np": np,
    "fastlr": fastlr,
    "schedules": schedules,
    "array": array,
    "collections": collections,
    "datetime": datetime,
    "Decimal": decimal.Decimal,
    "Fraction": fractions.Fraction,
    "types": types,
    **{f.__name__: f for f in (WithFloat, WithArray, Raises, Plain, Reversed, nest, nest_dicts, circle, dict_circle)},
    **{f.__name__: f for f in (same_memory, frozen, unaligned, spread, descent)},
}


@functools.cache
def _code(text: str) -> Any:
    return compile(text, text[:60], "eval")


def made(text: str, **names: Any) -> Any:
    """The value that a text makes; a new one each time."""
    for name in _HAVE:
        if name in text and name not in NAMES:
            NAMES[name] = __import__(name) if name != "jax" else __import__("jax.numpy").numpy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return eval(_code(text), {**NAMES, **names})


# Numbers, and what looks like one.
NUMBERS = [
    *("0", "0.0", "-0.0", "1", "0.1", "0.5", "-1", "-0.1", "2", "1e-8", "1e8", "5e-324", "1e308", "1e-308"),
    *("10**18", "2**53", "2**63", "2**64", "10**400", "-(10**400)", "float('nan')", "float('inf')", "-float('inf')"),
    *("np.float64(0.1)", "np.float32(0.1)", "np.float16(0.1)", "np.longdouble(0.1)", "np.longdouble('1e4000')"),
    *("np.int8(1)", "np.int64(1)", "np.uint64(2**64 - 1)", "np.uint8(0)", "np.array(0.1)", "np.array(1)"),
    *("np.array(0.1, 'f4')", "np.array(0.1, '>f8')", "Fraction(1, 10)", "Decimal('0.1')", "Decimal('nan')"),
    *("WithFloat(0.1)", "WithFloat('x')", "WithFloat(10**400)", "WithArray(0.1)", "WithArray(np.array(0.1))"),
]
NOT_NUMBERS = [
    *("None", "True", "False", "np.True_", "np.array(True)", "''", "'0.1'", "b'0.1'", "bytearray(b'1')", "'x' * 5000"),
    *("memoryview(b'1')", "np.str_('0.1')", "np.bytes_(b'0.1')", "np.void(b'12345678')", "np.array('0.1')"),
    *("np.array(b'0.1')", "np.array(None)", "np.array(0.1, object)", "np.array([0.1], object)", "1j", "complex(0.1)"),
    *("np.complex64(1)", "np.array(1j)", "np.timedelta64(1)", "np.timedelta64(1, 's')", "np.timedelta64('NaT')"),
    *("np.datetime64('2026-01-01')", "np.datetime64('NaT')", "np.array(np.timedelta64(1))", "datetime.timedelta(1)"),
    *("datetime.date(2026, 1, 1)", "np.ma.masked", "np.ma.masked_array(0.1)", "np.ma.masked_array(0.1, mask=True)"),
    *("np.ma.masked_array([0.1], mask=[True])", "np.array((1, 2.0), 'i4,f8')", "[0.1]", "(0.1,)", "[]", "()", "{}"),
    *("(0.1, 0.2)", "(0.1, None)", "('0.1', 0.1)", "(1j, 0.1)", "(10**400, 0.1)", "(0.9, np.timedelta64(1))"),
    *("[0.1, 0.2, 0.3]", "[0.1] * 500", "np.array([0.1])", "np.array([[0.1]])", "np.array([])", "np.zeros(500)"),
    *("np.full(3, 0.1)", "np.array([0.1, -1, 0.1])", "np.array([0.1, np.nan, 0.1])", "np.array(['0.1'] * 3)"),
    *("np.ones(3, bool)", "np.ones(3, 'm8[s]')", "np.ones(3, complex)", "np.ma.masked_array([.1] * 3, [0, 1, 0])"),
    *("np.full(3, 0.1, object)", "np.matrix([[0.1]])", "np.rec.array([(0.1,)])", "{'a': 1}", "{0.1}", "set()"),
    *("frozenset({0.1})", "object()", "object", "int", "float", "np.float64", "np.dtype('f8')", "np", "..."),
    *("NotImplemented", "slice(1)", "range(3)", "iter([0.1])", "(x for x in [0.1])", "array.array('d', [0.1])"),
    *("Raises()", "nest(5)", "nest(5000)", "circle()", "nest_dicts(5000)", "dict_circle()", "fastlr", "descent"),
    *("collections.OrderedDict(a=0.1)", "collections.deque([0.1])", "types.SimpleNamespace(a=1)"),
    *("fastlr.LossScale()", "fastlr.Adam", "fastlr.flatten({'x': np.ones(2)})", "fastlr.SGD(np.ones(1))"),
]
SCHEDULED = [
    *("schedules.Constant(0.1)", "schedules.Cosine(1e-3, steps=10).warmup(3)", "schedules.Plateau(0.1)"),
    *("0.5 * schedules.Linear(0.2, 0.0, steps=5)", "schedules.Constant(2.0)"),
    *("schedules.Exponential(1.0, factor=1e10).clip(0.0, 0.5)", "schedules.Cosine", "schedules.Constant(0.0)"),
    *("lambda n: 0.1", "lambda n: 0.1 * n", "lambda n: -1.0", "lambda n: 'x'", "lambda n: None", "lambda n: 1j"),
    *("lambda n: 10**400", "lambda n: float('nan')", "lambda n: np.array(0.1)", "lambda n: np.full(3, 0.1)"),
    *("lambda n: np.full(2, 0.1)", "lambda n: [0.1]", "lambda n: True", "lambda n: np.timedelta64(1)", "lambda: 0.1"),
    *("lambda n: np.float32(0.1)", "lambda n: np.ma.masked", "lambda n: b'1'", "lambda n, m: 0.1", "lambda n: 1 / 0"),
    *("(schedules.Constant(0.9), 0.99)", "(lambda n: 0.5, lambda n: 0.9)", "(0.9, schedules.Constant(2.0))", "abs"),
    *("[lambda n: 0.1]", "schedules.Plateau(schedules.Cosine(0.1, steps=9))", "len", "lambda n: 1 / float(n - 1)"),
]
if _HAVE["torch"]:
    NOT_NUMBERS += ["torch.tensor([0.1])", "torch.tensor(1j)", "torch.tensor(True)", "torch.float32", "torch"]
    NUMBERS += ["torch.tensor(0.1)", "torch.tensor(0.1, requires_grad=True)", "torch.tensor(0.1, dtype=torch.bfloat16)"]
if _HAVE["jax"]:
    NUMBERS += ["jax.asarray(0.1)"]
    NOT_NUMBERS += ["jax.asarray([0.1])"]
VALUES = [*NUMBERS, *NOT_NUMBERS, *SCHEDULED]

# Arrays in place of one of `shape` and the dtype `D`; `own` is the parameter itself.
ARRAYS = [
    *(
        "np.ones(shape, D)",
        "np.zeros(shape, D)",
        "-np.ones(shape, D)",
        "np.full(shape, np.nan, D)",
        "own",
        "own.copy()",
    ),
    *("np.full(shape, np.inf, D)", "np.full(shape, np.finfo(D).max, D)", "np.full(shape, 1e-44, D)", "own[...]"),
    *("np.ones(shape, 'f2')", "np.ones(shape, 'f4')", "np.ones(shape, 'f8')", "np.ones(shape, '>f4')"),
    *("np.ones(shape, '>f8')", "np.ones(shape, np.longdouble)", "np.ones(shape, int)", "np.ones(shape, bool)"),
    *("np.ones(shape, 'u2')", "np.ones(shape, complex)", "np.ones(shape, object)", "np.full(shape, '1.0')"),
    *("np.ones(shape, 'm8[s]')", "np.ones(shape, 'M8[s]')", "np.full(shape, b'1')", "np.zeros(shape, 'f4,i4')"),
    *(
        "spread(shape, D)",
        "np.asfortranarray(np.ones(shape, D))",
        "np.ones(shape, D)[..., ::-1]",
        "unaligned(shape, D)",
    ),
    *("np.broadcast_to(np.ones((), D), shape)", "frozen(np.ones(shape, D))", "np.ones((*shape, 1), D)", "own.T"),
    *("np.ones((1, *shape), D)", "np.ones((0,), D)", "np.ones(1, D)", "np.ones((), D)", "np.ones(shape[:-1], D)"),
    *("np.ma.masked_array(np.ones(shape, D), mask=np.ones(shape))", "np.ma.masked_array(np.ones(shape, D))"),
    *("np.matrix(np.ones((1, 3), D))", "np.ones(shape, D).view(Plain)", "np.ones(shape, D).view(Reversed)"),
    *("np.ones(shape, D).view(np.recarray)", "WithArray(np.ones(shape, D))", "WithArray(None)", "WithArray('x')"),
    *("np.ones(shape, D).tolist()", "np.ones(shape, D).reshape(-1)", "memoryview(np.ones(shape, D))", "1.0", "None"),
    *("np.float64(1)", "np.float32(1)", "np.ones(shape, D).sum()", "np.ones(shape, D).dtype.type(1)", "iter([1.0])"),
    *("array.array('d', [1.0, 2.0, 3.0])", "array.array('f', [1.0, 2.0, 3.0])", "[None]", "[1.0, None]", "0", "{}"),
    *("np.ones(10**5, D)", "np.lib.stride_tricks.as_strided(np.ones(1, D), shape, [0] * len(shape))", "[[]]"),
]
if _HAVE["torch"]:
    ARRAYS += [
        *("torch.ones(shape)", "torch.ones(shape, dtype=torch.float64)", "torch.ones(shape, requires_grad=True)"),
        *("torch.ones(shape, dtype=torch.bfloat16)", "torch.ones(shape, dtype=torch.float16)", "torch.ones(shape).T"),
        *("torch.ones(shape, device='meta')", "torch.ones(shape).to_sparse()", "torch.nn.Parameter(torch.ones(shape))"),
    ]
if _HAVE["jax"]:
    ARRAYS += ["jax.ones(shape)", "jax.ones(shape, jax.bfloat16)"]
if _HAVE["ml_dtypes"]:
    ARRAYS += ["np.ones(shape, ml_dtypes.bfloat16)", "np.ones(shape, ml_dtypes.float8_e5m2)"]

ALLOCATORS = [
    *("lambda n: bytearray(n)", "lambda n: np.zeros(n, np.uint8)", "lambda n: memoryview(bytearray(n))", "bytearray"),
    *("lambda n: bytearray(2 * n)", "lambda n: np.zeros(n // 8 + 1)", "same_memory()", "lambda n: bytes(n)"),
    *("lambda n: bytearray(n - 1)", "lambda n: bytearray(0)", "lambda n: None", "lambda n: n", "lambda n: 'x' * n"),
    *("lambda n: np.zeros(n, object)", "lambda n: np.zeros((n, 2), np.uint8)[:, 0]", "lambda n: np.zeros(n, complex)"),
    *("lambda n: frozen(np.zeros(n, np.uint8))", "lambda n: 1 / 0", "lambda: bytearray(10**5)", "lambda n: [0] * n"),
    *("lambda n: np.zeros(n, 'M8[s]')", "lambda n: np.ma.zeros(n, dtype='u1')", "lambda n: memoryview(bytes(n))"),
]
