"""Memory by address: the only place where an integer becomes a pointer.

The addresses come from a plan, whose arrays have been checked and are kept alive (`fastlr.plans`). Every column of a
plan (parameters, gradients, each state) is memory of its own, and loads and stores say so to LLVM, which would
otherwise guard every loop by overlap checks, of all pairs, and give up vectorising when they get many.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

_I64 = ir.IntType(64)
_LLVM = {"float32": ir.FloatType(), "float64": ir.DoubleType(), "int64": _I64}
_BYTES = {"float32": 4, "float64": 8, "int64": 8}

if os.name == "posix":
    sched_yield = types.ExternalFunction("sched_yield", types.int32())
else:

    @register_jitable
    def sched_yield() -> int:
        """Nothing to give way with."""
        return 0


def view(address: int, count: int, dtype: str) -> np.ndarray:
    """The memory at an address as a NumPy array; for the NumPy reference."""
    buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype)  # type: ignore[call-overload]


def _pointer(builder: Any, address: Any, kind: str, index: Any = None) -> Any:
    pointer = builder.inttoptr(address, _LLVM[kind].as_pointer())
    return pointer if index is None else builder.gep(pointer, [index])


def elements(
    formats: Sequence[str], written: Sequence[int], compute: str
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Access to one element of every column of a plan.

    Args:
        formats: how each column is stored.
        written: the columns that are stored to, in the order of the values.
        compute: the dtype of the arithmetic.

    Returns:
        `load(addresses, i)`, a tuple with one value per column, and `store(addresses, i, values)`. `addresses` is a
        tuple of byte addresses, one per column.
    """
    if any(f != compute for f in formats):
        raise TypeError(f"columns are stored as {', '.join(formats)}, expected {compute} throughout.")
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
                    builder.load(_pointer(builder, builder.extract_value(args[0], k), f, args[1]), align=_BYTES[f]),
                    scope[k],
                )
                for k, f in enumerate(formats)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(getattr(types, compute), count)(addresses, types.int64), generate

    @intrinsic
    def store(typing_context: Any, addresses: Any, i: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scope = scopes(builder.module)
            for j, k in enumerate(written):
                f = formats[k]
                place = _pointer(builder, builder.extract_value(args[0], k), f, args[1])
                mark(builder.store(builder.extract_value(args[2], j), place, align=_BYTES[f]), scope[k])

        wanted = types.UniTuple(getattr(types, compute), len(written))
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


@intrinsic
def where(typing_context: Any, condition: Any, a: Any, b: Any) -> Any:
    """A select: both values are there already."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(args[0], args[1], args[2])

    return a(types.boolean, a, a), generate


@intrinsic
def fetch_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to an int64 in memory in one indivisible step; what stood there before."""

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
