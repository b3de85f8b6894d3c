"""NumPy arrays as memory, many in one call, by the public fields of `PyArrayObject`.

From Python the address of an array takes a microsecond or more, so it is tempting to remember addresses by the
identity of an array. But the same array can have other memory at the next step (`resize`, `shape=`, `__setstate__`).
Here every array is inspected at each step, in compiled code that keeps the GIL, which is faster than comparing
identities. Whatever is not exactly as expected is left to the caller, whose code is slower and has the error messages.

The fields have been the same since NumPy 1.7 (numpy/ndarraytypes.h). They are checked once on sample arrays; where they
are different (another Python, no GIL), `is_available` says so and every array goes through the slow code.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types

from . import memory
from .caching import KernelCache

__all__ = ["FOUND", "Finder", "is_available", "prepare"]

# Offsets in bytes: of the type in any Python object, and of the fields of an array.
_TYPE, _DATA, _NDIM, _SHAPE, _DTYPE, _FLAGS = 8, 16, 24, 32, 56, 64
_IN_ORDER, _WRITEABLE = 0x101, 0x400  # C_CONTIGUOUS | ALIGNED
_HALF_WORD = 0xFFFFFFFF

FOUND = 0

# Places in the board that the compiled function reads, in int64s: numbers, and addresses of tables.
(
    ARRAY_TYPE,  # id(np.ndarray)
    NONE,  # id(None)
    COUNT,  # number of gradients
    DTYPE,  # id of their dtype
    APART,  # the last address of each, checked not to overlap what a step writes
    EXPECTED,  # for each: whether there is one, its bytes, and the places in SHAPES of the two shapes it may have
    SHAPES,  # number of dimensions, then the dimensions
    STARTS,  # of the memory that a step writes, sorted
    ENDS,
    SPANS,
    ENTRIES,  # number of entries of the plan
    SOURCE,  # for each entry, the number of its gradient
    INSIDE,  # and how many bytes after the gradient's start it begins
    COLUMN,  # the place that takes the address, for the first entry
    STRIDE,  # bytes from one entry to the next
    FIXED,  # number of arrays that must not have changed
    IDENTITIES,  # id of each
    KNOWN,  # the address, id of the dtype, place in SHAPES and required flags of each
    SIZE,
) = range(19)

_size_of_list = types.ExternalFunction("PyList_Size", types.int64(types.int64))
_item_of_list = types.ExternalFunction("PyList_GetItem", types.int64(types.int64, types.int64))
at, put = memory.get("int64"), memory.put("int64")


def _look(board: Any, things: Any) -> Any:
    """Find gradients: see `Finder.look`. `board` is the address of the numbers above, `things` the id of a list."""
    array, shapes = at(board, ARRAY_TYPE), at(board, SHAPES)
    identities, known = at(board, IDENTITIES), at(board, KNOWN)
    for k in range(at(board, FIXED)):
        thing = at(identities, k)
        changed = at(thing + _DATA, 0) != at(known, 4 * k) or at(thing + _DTYPE, 0) != at(known, 4 * k + 1)
        flags = at(known, 4 * k + 3)
        if changed or at(thing + _FLAGS, 0) & flags != flags or not has_shape(thing, shapes + 8 * at(known, 4 * k + 2)):
            return -k - 1
    count, expected, dtype = at(board, COUNT), at(board, EXPECTED), at(board, DTYPE)
    starts, ends, spans, apart = at(board, STARTS), at(board, ENDS), at(board, SPANS), at(board, APART)
    if _size_of_list(things) != count:
        return 1
    for k in range(count):
        thing = _item_of_list(things, k)
        if at(expected, 4 * k) == 0:
            if thing != at(board, NONE):
                return k + 1
            continue
        if at(thing + _TYPE, 0) != array or at(thing + _DTYPE, 0) != dtype:
            return k + 1
        if at(thing + _FLAGS, 0) & _IN_ORDER != _IN_ORDER:
            return k + 1
        first, second = shapes + 8 * at(expected, 4 * k + 2), shapes + 8 * at(expected, 4 * k + 3)
        if not has_shape(thing, first) and not has_shape(thing, second):
            return k + 1
        begin = at(thing + _DATA, 0)
        if begin != at(apart, k):
            end = begin + at(expected, 4 * k + 1)
            low, high = 0, spans  # the spans that begin before the end
            while low < high:
                middle = (low + high) // 2
                if at(starts, middle) < end:
                    low = middle + 1
                else:
                    high = middle
            if low > 0 and at(ends, low - 1) > begin and end > begin:
                return k + 1
            put(apart + 8 * k, begin)
    source, inside, column, stride = at(board, SOURCE), at(board, INSIDE), at(board, COLUMN), at(board, STRIDE)
    for e in range(at(board, ENTRIES)):
        put(column + e * stride, at(apart, at(source, e)) + at(inside, e))
    return FOUND


def _has_shape(thing: Any, shape: Any) -> Any:
    """Whether an array has the shape that stands at an address."""
    ndim = at(shape, 0)
    if at(thing + _NDIM, 0) & _HALF_WORD != ndim:
        return False
    dimensions = at(thing + _SHAPE, 0)
    for d in range(ndim):
        if at(dimensions, d) != at(shape, 1 + d):
            return False
    return True


has_shape = numba.njit(error_model="numpy")(_has_shape)


@functools.cache
def _compiled() -> Any:
    run = numba.njit(error_model="numpy")(_look)  # keeps the GIL: it looks at Python objects
    KernelCache("arrays", "look").compile(run, types.int64(types.int64, types.int64))
    return run


@functools.cache
def is_available() -> bool:
    """Whether arrays can be inspected in this Python; compiles nothing."""
    if numba.config.DISABLE_JIT or sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    if not getattr(sys, "_is_gil_enabled", lambda: True)() or np.ndarray.__basicsize__ < _FLAGS + 4:
        return False

    def word(thing: Any, offset: int) -> int:
        return ctypes.c_int64.from_address(id(thing) + offset).value

    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    for array in (np.zeros(()), np.zeros((2, 3), np.float32), np.zeros((4, 5)).T, np.zeros((0, 7))[:, ::2], frozen):
        shape = (ctypes.c_int64 * array.ndim).from_address(word(array, _SHAPE)) if array.ndim else ()
        fields = word(array, _TYPE), word(array, _DATA), word(array, _DTYPE), word(array, _FLAGS) & _HALF_WORD
        expected = id(np.ndarray), array.ctypes.data, id(array.dtype), array.flags.num
        if fields != expected or word(array, _NDIM) & _HALF_WORD != array.ndim or tuple(shape) != array.shape:
            return False
    return True


def prepare() -> float:
    """Compile the function that inspects arrays, or load it from the cache; returns the seconds that took."""
    began = time.perf_counter()
    if is_available():
        _compiled()
    return time.perf_counter() - began


def flags_of(writeable: bool) -> int:
    """The flags that an array needs to be read, or also written, in place."""
    return _IN_ORDER | (_WRITEABLE if writeable else 0)


class Finder:
    """Finds the gradients of a plan, and checks that other arrays have not changed.

    Args:
        shapes: for each gradient, the one or two shapes that it may have.
        active: for each, whether there is one; otherwise None is expected.
        dtype: of the gradients.
        spans: first and last addresses of the memory that a step writes, each sorted; gradients must not overlap it.
        source: for each entry of the plan, the number of its gradient.
        inside: for each entry, how many bytes after the gradient's start it begins.
        column: the column of the plan that takes the addresses, `(entries,)`, a view.
        fixed: arrays that must stay as they are now; kept alive.
        writeable: for each of them, whether a step writes it.

    Attributes:
        look: `look(board, id(things))`, for a list of one thing for each gradient, enters their addresses into the
            plan if all are as expected. It returns `FOUND`; or k + 1 if the k-th needs a closer look; or -k - 1 if the
            k-th fixed array has changed.
        board: its first argument.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[tuple[int, ...]]],
        active: Sequence[bool],
        dtype: np.dtype,
        spans: tuple[np.ndarray, np.ndarray],
        source: np.ndarray,
        inside: np.ndarray,
        column: np.ndarray,
        fixed: Sequence[np.ndarray],
        writeable: Sequence[bool],
    ) -> None:
        offsets: dict[tuple[int, ...], int] = {}
        flat: list[int] = []

        def offset(shape: tuple[int, ...]) -> int:
            if shape not in offsets:
                offsets[shape] = len(flat)
                flat.extend((len(shape), *shape))
            return offsets[shape]

        expected = []
        for alternatives, exists in zip(shapes, active, strict=True):
            nbytes = int(np.prod(alternatives[0], dtype=np.int64)) * dtype.itemsize
            expected.append((exists, nbytes, offset(alternatives[0]), offset(alternatives[-1])))
        known = [
            (a.ctypes.data, id(a.dtype), offset(a.shape), flags_of(w)) for a, w in zip(fixed, writeable, strict=True)
        ]
        board = np.zeros(SIZE, np.int64)
        tables = {
            APART: np.zeros(len(expected), np.int64),
            EXPECTED: np.array(expected, np.int64),
            SHAPES: np.array(flat, np.int64),
            STARTS: np.ascontiguousarray(spans[0], np.int64),
            ENDS: np.ascontiguousarray(spans[1], np.int64),
            SOURCE: np.ascontiguousarray(source, np.int64),
            INSIDE: np.ascontiguousarray(inside, np.int64),
            IDENTITIES: np.array([id(a) for a in fixed], np.int64),
            KNOWN: np.array(known, np.int64),
        }
        for key, table in tables.items():
            board[key] = table.ctypes.data
        board[ARRAY_TYPE], board[NONE], board[DTYPE] = id(np.ndarray), id(None), id(dtype)
        board[COUNT], board[SPANS], board[ENTRIES] = len(expected), len(spans[0]), len(source)
        board[COLUMN], board[STRIDE], board[FIXED] = column.ctypes.data, column.strides[0], len(fixed)
        self._kept = board, tables, dtype, column, list(fixed)
        self.board = board.ctypes.data
        self.look = _compiled()
