"""Tensors as memory, many in one call, through the C exchange API of DLPack.

A library that offers it has a C function that describes a tensor, given the Python object: address, dtype, device,
shape, strides (https://dmlc.github.io/dlpack, `DLPackExchangeAPI`, version 1). From Python the same takes a call for
each of these, and for thousands of small tensors that takes longer than the step itself.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from .caching import KernelCache
from .memory import put, row
from .tiles import compiles

__all__ = [
    "ADDRESS",
    "DEVICE",
    "FIELDS",
    "GRADIENT_IS_NEW",
    "KIND",
    "LAYOUT",
    "MOVED",
    "SAME",
    "Exchange",
    "items",
    "kind_of",
]

# The fields that describe a tensor: its address, its dtype, its device, and its shape and strides as one number.
FIELDS = 4
ADDRESS, KIND, DEVICE, LAYOUT = range(FIELDS)

# What `Exchange.compare` returns, unless it is the number of a gradient that needs a closer look.
SAME, GRADIENT_IS_NEW, MOVED = -1, -2, -3

_CODES = {"float": 2, "bfloat": 4}  # of DLPack's DLDataTypeCode
_MIX = 0x100000001B3  # the prime of the hash FNV-1a, 64 bits


def kind_of(name: str) -> int:
    """The number that stands for a dtype in the field `KIND`."""
    letters = name.rstrip("0123456789")
    return _CODES[letters] | int(name[len(letters) :]) << 8 | 1 << 16


@intrinsic
def _describe(typing_context: Any, function: Any, thing: Any, box: Any) -> Any:
    """Let the library describe a Python object in the DLTensor at an address; returns 0 if it could."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), [word, word]).as_pointer())
        return builder.sext(builder.call(pointer, args[1:]), word)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _next(typing_context: Any, function: Any, mapping: Any, at: Any, key: Any, value: Any) -> Any:
    """The next item of a dict, by `PyDict_Next` of CPython's C API; 0 at the end, and for what is not a dict."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), [word] * 4).as_pointer())
        return builder.sext(builder.call(pointer, args[1:]), word)

    return types.int64(*[types.int64] * 5), generate


_clear_error = types.ExternalFunction("PyErr_Clear", types.void())
_word, _tensor = row("int64", 1), row("int64", 6)
_set = put("int64")
_half_words, _low_bits = 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF

if config.DISABLE_JIT:  # the same functions, run by the interpreter, with ctypes in the place of machine code

    def _words(count: int) -> Any:
        return lambda address: tuple((ctypes.c_int64 * count).from_address(address))

    def _call(function: int, *arguments: int) -> int:
        prototype = ctypes.PYFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * len(arguments))
        try:
            return int(prototype(function)(*arguments))
        except Exception:  # ctypes raises the error that the library has set beside returning -1
            return -1

    def _store(address: int, value: int) -> None:
        ctypes.c_int64.from_address(address).value = value

    def _nothing() -> None:
        """The error that ctypes has raised is cleared."""

    _word, _tensor, _set = _words(1), _words(6), _store
    _describe, _next, _clear_error = _call, _call, _nothing


def _look(function: int, thing: int, box: int, out: Any, k: int) -> int:
    """Describe a tensor in a row of the table; 0 if it has no memory."""
    if _describe(function, thing, box) != 0:
        _clear_error()
        return 0
    data, device, described, shape, strides, offset = _tensor(box)
    layout = described & _half_words  # the number of dimensions
    for d in range(described & _half_words):
        size = _word(shape + 8 * d)[0]
        layout = (layout ^ size) * _MIX & _low_bits
        if size != 1:  # the stride of a dimension of one element means nothing
            layout = (layout ^ _word(strides + 8 * d)[0]) * _MIX & _low_bits
    out[k, ADDRESS], out[k, KIND], out[k, DEVICE] = data + offset, described >> 32, device
    out[k, LAYOUT] = layout
    return 1


def _describe_all(function: int, things: int, box: int, out: Any) -> int:
    """Describe tensors up to the first that cannot be described; returns how many those are."""
    for k in range(len(out)):
        if look(function, _word(things + 8 * k)[0], box, out, k) == 0:
            return k
    return len(out)


def _holds(function: int, mapping: int, expected: Any, outer: int, inner: int) -> bool:
    """Whether a dict of dicts holds these very objects; see `Exchange.holds`."""
    k = 0
    _set(outer, 0)
    while _next(function, mapping, outer, outer + 8, outer + 16) != 0:
        if k + 2 > len(expected) or _word(outer + 8)[0] != expected[k] or _word(outer + 16)[0] != expected[k + 1]:
            return False
        k += 2
        _set(inner, 0)
        while _next(function, _word(outer + 16)[0], inner, inner + 8, inner + 16) != 0:
            if k + 2 > len(expected) or _word(inner + 8)[0] != expected[k] or _word(inner + 16)[0] != expected[k + 1]:
                return False
            k += 2
    return k == len(expected)


def _compare(
    function: int, params: int, gradients: int, none: int, box: int, known: Any, at: Any, kind: Any, found: Any
) -> int:
    """Compare parameters and gradients with earlier descriptions; see `Exchange.compare`."""
    outcome = SAME
    for k in range(len(known)):
        if look(function, _word(params + 8 * k)[0], box, found, 0) == 0:
            return MOVED
        for field in range(FIELDS):
            if found[0, field] != known[k, field]:
                return MOVED
    for k in range(len(at)):
        thing = _word(gradients + 8 * k)[0]
        if thing == none or look(function, thing, box, found, 0) == 0:
            return k
        if k == 0 and found[0, KIND] != kind[0]:
            kind[0] = found[0, KIND]
            outcome = GRADIENT_IS_NEW
        if found[0, KIND] != kind[0] or found[0, DEVICE] != known[k, DEVICE] or found[0, LAYOUT] != known[k, LAYOUT]:
            return k
        if found[0, ADDRESS] == 0 and known[k, ADDRESS] != 0:
            return k
        if at[k] != found[0, ADDRESS]:
            at[k] = found[0, ADDRESS]
            outcome = GRADIENT_IS_NEW
    return outcome


look = numba.njit(error_model="numpy")(_look)  # keeps the GIL: it hands Python objects to their library


@functools.cache
def _compiled(name: str) -> Any:
    table, line, word = types.Array(types.int64, 2, "C"), types.Array(types.int64, 1, "C"), types.int64
    functions = {
        "describe_all": (_describe_all, [word, word, word, table]),
        "holds": (_holds, [word, word, line, word, word]),
        "compare": (_compare, [word, word, word, word, word, table, line, line, table]),
    }
    function, arguments = functions[name]
    if not compiles():
        return function
    run = numba.njit(error_model="numpy")(function)
    KernelCache("exchange", name).compile(run, word(*arguments))
    return run


def _function(capsule: Any) -> int | None:
    """The address of the function that describes a tensor, in version 1 of an exchange API; None without one."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = get(capsule, b"dlpack_exchange_api")
    while api:
        major = ctypes.c_uint32.from_address(api).value
        if major == 1:
            return ctypes.c_void_p.from_address(api + 16 + 3 * 8).value
        api = ctypes.c_void_p.from_address(api + 8).value  # an older version, for older readers
    return None


class Exchange:
    """Describes the tensors of a library.

    Args:
        tensor: the class of its tensors.

    Raises:
        LookupError: if the library does not offer this.
    """

    def __init__(self, tensor: type) -> None:
        capsule = getattr(tensor, "__dlpack_c_exchange_api__", None)
        function = None if capsule is None else _function(capsule)
        if function is None:
            raise LookupError(f"{tensor.__name__} has no C exchange API of DLPack 1.")
        self._at = function
        self._box, self._found = np.zeros(8, np.int64), np.zeros((1, FIELDS), np.int64)
        self._address_of_box = self._box.ctypes.data
        self._none = id(None)
        self._items = np.zeros(6, np.int64)
        self._address_of_items = self._items.ctypes.data
        self._next = ctypes.cast(ctypes.pythonapi.PyDict_Next, ctypes.c_void_p).value

    def describe(self, things: np.ndarray) -> np.ndarray:
        """Describe tensors.

        Args:
            things: an array of them, of dtype object.

        Returns:
            A row of `FIELDS` numbers for each.

        Raises:
            TypeError: if one has no memory to describe.
        """
        out = np.zeros((len(things), FIELDS), np.int64)
        good = _compiled("describe_all")(self._at, things.__array_interface__["data"][0], self._address_of_box, out)
        if good < len(out):
            raise TypeError(f"{things[good]!r} has no memory.")
        return out

    def compare(self, params: int, gradients: int, known: np.ndarray, at: np.ndarray, kind: np.ndarray) -> int:
        """Compare parameters and further tensors with their description, and look up the gradients.

        Args:
            params: the address of an array, of dtype object, of the parameters and then the further tensors.
            gradients: the address of such an array of the parameters' gradients.
            known: what `describe` said of the parameters and the further tensors. A gradient must have the same shape,
                strides and device as its parameter.
            at: the addresses of the gradients, shape `(n,)`; updated.
            kind: the dtype of the gradients, shape `(1,)`; updated.

        Returns:
            `SAME`; `GRADIENT_IS_NEW` if an address or the dtype has changed; `MOVED` if another tensor has changed; or
            the number of the first gradient that is None or not as it must be: then `at` is only partly updated.
        """
        run = _compiled("compare")
        return int(run(self._at, params, gradients, self._none, self._address_of_box, known, at, kind, self._found))

    def holds(self, mapping: dict[Any, Any], expected: np.ndarray) -> bool:
        """Whether a dict, and each dict among its values, holds the same objects as before in the same order.

        Args:
            mapping: the dict.
            expected: from `items`; the objects have to be alive.
        """
        at = self._address_of_items
        return bool(_compiled("holds")(self._next, id(mapping), expected, at, at + 24))


def items(mapping: Mapping[Any, Any]) -> list[Any]:
    """All keys and values of a dict, in order; a value that is a dict is followed by its keys and values."""
    out: list[Any] = []
    for key, value in mapping.items():
        out += key, value
        if isinstance(value, dict):
            out += itertools.chain.from_iterable(value.items())
    return out
