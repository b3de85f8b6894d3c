"""Memory by address: where an integer becomes a pointer in compiled code for the processor (`kernels.cuda` on a GPU).

The addresses come from a plan, whose arrays have been checked and are kept alive (`fastlr.step.plans`). The columns of
a plan (parameters, gradients, each state) do not overlap, and loads and stores say so to LLVM, which would otherwise
guard every loop by a check of each pair of columns, and stop vectorising when there are many.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable
from numba.np.arrayobj import populate_array

_I64 = ir.IntType(64)
_LLVM = {"float32": ir.FloatType(), "float64": ir.DoubleType(), "int64": _I64, "uint16": ir.IntType(16)}
_BYTES = {"float32": 4, "float64": 8, "int64": 8, "uint16": 2}

if os.name == "posix":
    sched_yield = types.ExternalFunction("sched_yield", types.int32())
else:

    @register_jitable
    def sched_yield() -> int:
        """Do nothing: there is no such call here."""
        return 0


def view(address: int, count: int, dtype: str) -> np.ndarray:
    """The memory at an address as a NumPy array."""
    buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype)  # type: ignore[call-overload]


def _pointer(builder: Any, address: Any, kind: str, index: Any = None) -> Any:
    pointer = builder.inttoptr(address, _LLVM[kind].as_pointer())
    return pointer if index is None else builder.gep(pointer, [index])


def elements(
    formats: Sequence[str], read: Sequence[int], written: Sequence[int]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Access to one element of several columns, no two of which overlap.

    Args:
        formats: the dtype of each column in memory.
        read: the columns that are loaded, in the order of the values.
        written: the columns that are stored to, in the order of the values.

    Returns:
        `load(addresses, i)`, a tuple of values, and `store(addresses, i, values)`. `addresses` is a tuple of byte
        addresses, one per column.
    """
    count = len(formats)

    def scopes(module: Any) -> list[tuple[Any, Any]]:
        """For each column, the alias scope that it is in and those that it is not in."""
        domain = module.add_metadata([ir.MetaDataString(module, "fastlr")])
        each = [module.add_metadata([ir.MetaDataString(module, f"fastlr column {k}"), domain]) for k in range(count)]
        return [(module.add_metadata([each[k]]), module.add_metadata(each[:k] + each[k + 1 :])) for k in range(count)]

    def mark(instruction: Any, scope: tuple[Any, Any]) -> Any:
        instruction.set_metadata("alias.scope", scope[0])
        if count > 1:
            instruction.set_metadata("noalias", scope[1])
        return instruction

    @intrinsic
    def load(typing_context: Any, addresses: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scope = scopes(builder.module)
            values = [
                mark(
                    builder.load(
                        _pointer(builder, builder.extract_value(args[0], k), formats[k], args[1]),
                        align=_BYTES[formats[k]],
                    ),
                    scope[k],
                )
                for k in read
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return types.Tuple([getattr(types, formats[k]) for k in read])(addresses, types.int64), generate

    @intrinsic
    def store(typing_context: Any, addresses: Any, i: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scope = scopes(builder.module)
            for j, k in enumerate(written):
                f = formats[k]
                place = _pointer(builder, builder.extract_value(args[0], k), f, args[1])
                mark(builder.store(builder.extract_value(args[2], j), place, align=_BYTES[f]), scope[k])

        wanted = types.Tuple([getattr(types, formats[k]) for k in written])
        return types.void(addresses, types.int64, wanted), generate

    return load, store


def row(kind: str, count: int) -> Callable[..., Any]:
    """`row(address)`: a tuple of `count` numbers of one kind that stand at an address."""

    @intrinsic
    def read(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [
                builder.load(_pointer(builder, args[0], kind, ir.Constant(_I64, k)), align=_BYTES[kind])
                for k in range(count)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(getattr(types, kind), count)(types.int64), generate

    return read


def get(kind: str) -> Callable[..., Any]:
    """`get(address, k)`: the number of one kind that stands k places after an address."""

    @intrinsic
    def read(typing_context: Any, address: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(builder, args[0], kind, args[1]), align=_BYTES[kind])

        return getattr(types, kind)(types.int64, types.int64), generate

    return read


def put(kind: str) -> Callable[..., Any]:
    """`put(address, value)`: write a number of one kind to an address."""

    @intrinsic
    def write(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], _pointer(builder, args[0], kind), align=_BYTES[kind])

        return types.void(types.int64, getattr(types, kind)), generate

    return write


@dataclass(frozen=True)
class Lanes:
    """Functions of compiled code that add up values in float64, in `width` lanes for each of some quantities.

    Attributes:
        place: `place()`, a tuple of addresses on the stack: of values for each quantity, then of its lanes, all zero.
        clear: `clear(places, row)` sets a row of `width` values of each quantity to zero.
        add: `add(places, row)` adds a row of values of each quantity to its lanes.
        add_rows: `add_rows(places)` does it for all rows, one after the other.
        add_columns: `add_columns(addresses, places, i)` does it for elements of columns from i on, where they are.
        finish: `finish(places, out)` halves the lanes, upper onto lower, down to one; its value goes to `out`.
    """

    place: Callable[..., Any]
    clear: Callable[..., Any]
    add: Callable[..., Any]
    add_rows: Callable[..., Any]
    add_columns: Callable[..., Any]
    finish: Callable[..., Any]


def lanes(width: int, rows: int, kinds: Sequence[str], compute: str, columns: Sequence[int] = ()) -> Lanes:
    """Memory on the stack to add up values in float64, and what adds.

    Lanes are loaded and stored once for many rows of values: storing them is what takes longest.

    Args:
        width: lanes, a power of two.
        rows: how many rows of `width` values there is room for.
        kinds: "norm" for sums of squares or "total" for sums, for each quantity.
        compute: the dtype of the values.
        columns: the column that each quantity is, for `add_columns`.
    """
    count = len(kinds)
    many = ir.VectorType(_LLVM["float64"], width)
    values = ir.VectorType(_LLVM[compute], width)
    room = _BYTES[compute] * width * rows
    lane_room = _BYTES["float64"] * width
    addresses_type = types.UniTuple(types.int64, 2 * count)

    def vector(builder: Any, addresses: Any, k: int, kind: Any) -> Any:
        return builder.inttoptr(builder.extract_value(addresses, k), kind.as_pointer())

    @intrinsic
    def place(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(ir.IntType(8), count * (room + lane_room)))
                memory.align = 64
            first = builder.ptrtoint(memory, _I64)
            offsets = [k * room for k in range(count)] + [count * room + k * lane_room for k in range(count)]
            every = [builder.add(first, ir.Constant(_I64, offset)) for offset in offsets]
            addresses = context.make_tuple(builder, signature.return_type, every)
            for k in range(count):
                builder.store(ir.Constant(many, None), vector(builder, addresses, count + k, many), align=64)
            return addresses

        return addresses_type(), generate

    @intrinsic
    def clear(typing_context: Any, places: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for source in sources(builder, args[0], args[1]):
                builder.store(ir.Constant(values, None), builder.inttoptr(source, values.as_pointer()), align=64)

        return types.void(places, types.int64), generate

    def grow(builder: Any, places: Any, sources: Any, times: int, align: int) -> None:
        """Add `times` rows from the address of each quantity to its lanes."""
        for k, (kind, source) in enumerate(zip(kinds, sources, strict=True)):
            lane = vector(builder, places, count + k, many)
            total = builder.load(lane, align=64)
            for r in range(times):
                at = builder.add(source, ir.Constant(_I64, r * width * _BYTES[compute]))
                x = builder.load(builder.inttoptr(at, values.as_pointer()), align=align)
                x = x if compute == "float64" else builder.fpext(x, many)
                total = builder.fadd(total, builder.fmul(x, x) if kind == "norm" else x)
            builder.store(total, lane, align=64)

    def sources(builder: Any, places: Any, row: Any) -> list[Any]:
        """The address of a row of values of each quantity."""
        offset = builder.mul(row, ir.Constant(_I64, width * _BYTES[compute]))
        return [builder.add(builder.extract_value(places, k), offset) for k in range(count)]

    @intrinsic
    def add(typing_context: Any, places: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            grow(builder, args[0], sources(builder, args[0], args[1]), 1, 64)

        return types.void(places, types.int64), generate

    @intrinsic
    def add_rows(typing_context: Any, places: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            grow(builder, args[0], sources(builder, args[0], ir.Constant(_I64, 0)), rows, 64)

        return types.void(places), generate

    @intrinsic
    def add_columns(typing_context: Any, addresses: Any, places: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            offset = builder.mul(args[2], ir.Constant(_I64, _BYTES[compute]))
            at = [builder.add(builder.extract_value(args[0], k), offset) for k in columns]
            grow(builder, args[1], at, rows, _BYTES[compute])

        return types.void(addresses, places, types.int64), generate

    @intrinsic
    def finish(typing_context: Any, addresses: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for k in range(count):
                x = builder.load(vector(builder, args[0], count + k, many), align=64)
                half = width // 2
                while half:
                    low, high = (
                        builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(ir.IntType(32), half), list(part)))
                        for part in (range(half), range(half, 2 * half))
                    )
                    x, half = builder.fadd(low, high), half // 2
                place = _pointer(builder, args[1], "float64", ir.Constant(_I64, k))
                builder.store(builder.extract_element(x, ir.Constant(ir.IntType(32), 0)), place, align=8)

        return types.void(addresses, out), generate

    return Lanes(place, clear, add, add_rows, add_columns, finish)


def outbox(count: int, kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Memory on the stack that collects values for a column which is written and not read.

    Whole lines can then be stored past the caches, so that they are not read first only to be overwritten.

    Args:
        count: how many values it holds; whole lines of 64 bytes.
        kind: their dtype.

    Returns:
        `place()`, the address of the memory, in a tuple; and `send(place, to, past)`, which copies it to an address,
        past the caches if `past` is not 0 and the address is that of a line.
    """
    line = ir.VectorType(_I64, 8)
    lines = count * _BYTES[kind] // 64
    place_type = types.UniTuple(types.int64, 1)

    @intrinsic
    def place(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(ir.IntType(8), 64 * lines))
                memory.align = 64
            return context.make_tuple(builder, signature.return_type, [builder.ptrtoint(memory, _I64)])

        return place_type(), generate

    @intrinsic
    def send(typing_context: Any, place: Any, to: Any, past: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            zero = ir.Constant(_I64, 0)
            whole = builder.icmp_signed("==", builder.and_(args[1], ir.Constant(_I64, 63)), zero)
            source = builder.extract_value(args[0], 0)

            def copy(**how: Any) -> None:
                for k in range(lines):
                    at = [builder.add(x, ir.Constant(_I64, 64 * k)) for x in (source, args[1])]
                    here, there = (builder.inttoptr(x, line.as_pointer()) for x in at)
                    made = builder.store(builder.load(here, align=64), there, align=how["align"])
                    if "nontemporal" in how:
                        made.set_metadata("nontemporal", how["nontemporal"])

            with builder.if_else(builder.and_(whole, builder.icmp_signed("!=", args[2], zero))) as (then, other):
                with then:
                    one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                    copy(align=64, nontemporal=one)
                with other:
                    copy(align=_BYTES[kind])

        return types.void(place, types.int64, types.int64), generate

    return place, send


def table(kind: str) -> Callable[..., Any]:
    """`array(address, rows, columns)`: the numbers that stand at an address as a two-dimensional array.

    What `numba.carray` gives, in a tenth of the time to compile.
    """
    array_type = types.Array(getattr(types, kind), 2, "C")

    @intrinsic
    def array(typing_context: Any, address: Any, rows: Any, columns: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            made = context.make_array(array_type)(context, builder)
            size = context.get_constant(types.intp, _BYTES[kind])
            populate_array(
                made,
                data=_pointer(builder, args[0], kind),
                shape=args[1:],
                strides=[builder.mul(args[2], size), size],
                itemsize=size,
                meminfo=None,
            )
            return made._getvalue()

        return array_type(types.int64, types.int64, types.int64), generate

    return array


@intrinsic
def where(typing_context: Any, condition: Any, a: Any, b: Any) -> Any:
    """A select between two values that have both been computed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(args[0], args[1], args[2])

    return a(types.boolean, a, a), generate


@intrinsic
def fetch_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to an int64 in memory atomically; returns the value before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], "int64"), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """An int64 that other threads write."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], "int64"), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(typing_context: Any, address: Any, value: Any) -> Any:
    """Write an int64 that other threads read, after everything that was written before it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], "int64"), "seq_cst", 8)

    return types.void(types.int64, types.int64), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine().lower() in ("x86_64", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), kind), [])

    return types.void(), generate
