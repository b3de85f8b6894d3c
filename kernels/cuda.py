"""The kernels of `grid` for NVIDIA GPUs: compiled by numba-cuda to machine code, without a GPU in sight.

Numba compiles; it does not launch. Its dispatcher takes 120 us or more for ten arrays, so a kernel takes addresses and
is launched by its handle (`fastlr.gpu.driver`). Needs the package numba-cuda and is imported when a GPU is asked for.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numba
import numba.cuda.dispatcher
import numpy as np
from cuda.bindings import nvjitlink
from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

from . import caching
from .staging import define
from .target import Body, Target, Tuning, access_bytes

__all__ = ["TARGET", "Image", "image_of"]

_I64, _I32, _I16 = ir.IntType(64), ir.IntType(32), ir.IntType(16)
_LLVM = {"float32": ir.FloatType(), "float64": ir.DoubleType(), "int64": _I64, "uint16": _I16}
_BYTES = {kind: np.dtype(kind).itemsize for kind in _LLVM}
_GLOBAL = 1  # the address space of a GPU's memory


@intrinsic
def _where(typing_context: Any, condition: Any, a: Any, b: Any) -> Any:
    """A select: both values are there already."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(args[0], args[1], args[2])

    return a(types.boolean, a, a), generate


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind, _GLOBAL))


def _place(builder: Any, address: Any, kind: str, index: Any) -> Any:
    return builder.add(address, builder.mul(index, ir.Constant(_I64, _BYTES[kind])))


def _asm_load(builder: Any, address: Any, hint: str, nbytes: int, kind: str) -> list[Any]:
    """`nbytes` at once, as values of a kind.

    By inline assembly, which the compiler leaves in its place: it moves plain loads down to their first use, and then
    fewer are under way.
    """
    wide = kind == "float64"
    count, unit, letter = (nbytes // 8, _LLVM["float64"], "d") if wide else (nbytes // 4, _I32, "r")
    bits = "f64" if wide else "b32"
    names = ", ".join(f"${k}" for k in range(count))
    vector, taken = (f".v{count}", f"{{{names}}}") if count > 1 else ("", names)
    text = f"ld.global{hint}{vector}.{bits} {taken}, [${count}];"
    result = ir.LiteralStructType([unit] * count) if count > 1 else unit
    call = builder.asm(ir.FunctionType(result, [_I64]), text, ",".join([f"={letter}"] * count) + ",l", [address], True)
    words = [builder.extract_value(call, k) for k in range(count)] if count > 1 else [call]
    if wide:
        return words
    if kind == "float32":
        return [builder.bitcast(w, _LLVM["float32"]) for w in words]
    low_and_high = []
    for w in words:
        low_and_high += [builder.trunc(w, _I16), builder.trunc(builder.lshr(w, ir.Constant(_I32, 16)), _I16)]
    return low_and_high


def _asm_store(builder: Any, address: Any, hint: str, kind: str, values: list[Any]) -> None:
    """Neighboring values of a kind at once."""
    if kind == "uint16":
        pairs = zip(values[::2], values[1::2], strict=True)
        sixteen = ir.Constant(_I32, 16)
        values = [builder.or_(builder.zext(a, _I32), builder.shl(builder.zext(b, _I32), sixteen)) for a, b in pairs]
    elif kind == "float32":
        values = [builder.bitcast(v, _I32) for v in values]
    unit, letter, bits = (_LLVM["float64"], "d", "f64") if kind == "float64" else (_I32, "r", "b32")
    count = len(values)
    names = ", ".join(f"${k + 1}" for k in range(count))
    vector, given = (f".v{count}", f"{{{names}}}") if count > 1 else ("", names)
    text = f"st.global{hint}{vector}.{bits} [$0], {given};"
    kind_of_call = ir.FunctionType(ir.VoidType(), [_I64] + [unit] * count)
    builder.asm(kind_of_call, text, ",".join(["l"] + [letter] * count) + ",~{memory}", [address, *values], True)


class CudaTarget:
    """What kernels are made of on an NVIDIA GPU, as `Target`."""

    where: Any = _where
    gpu = True

    def function(self, function: Callable[..., Any]) -> Any:
        """As `Target.function`."""
        return cuda.jit(device=True, forceinline=True)(function)

    def elements(self, formats: Sequence[str], read: Sequence[int], written: Sequence[int]) -> tuple[Any, Any]:
        """As `Target.elements`."""

        @intrinsic
        def load(typing_context: Any, addresses: Any, i: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                values = []
                for k in read:
                    at = _place(builder, builder.extract_value(args[0], k), formats[k], args[1])
                    values.append(builder.load(_pointer(builder, at, _LLVM[formats[k]]), align=_BYTES[formats[k]]))
                return context.make_tuple(builder, signature.return_type, values)

            return types.Tuple([getattr(types, formats[k]) for k in read])(addresses, types.int64), generate

        @intrinsic
        def store(typing_context: Any, addresses: Any, i: Any, values: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                for j, k in enumerate(written):
                    at = _place(builder, builder.extract_value(args[0], k), formats[k], args[1])
                    value = builder.extract_value(args[2], j)
                    builder.store(value, _pointer(builder, at, _LLVM[formats[k]]), align=_BYTES[formats[k]])

            wanted = types.Tuple([getattr(types, formats[k]) for k in written])
            return types.void(addresses, types.int64, wanted), generate

        return load, store

    def lanes(
        self, formats: Sequence[str], width: int, read: Sequence[int], written: Sequence[int], tuning: Tuning
    ) -> tuple[Any, Any]:
        """As `Target.lanes`."""

        @intrinsic
        def load(typing_context: Any, addresses: Any, i: Any) -> Any:
            one = types.Tuple([getattr(types, formats[k]) for k in read])

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                columns = []
                for k in read:
                    at, kind = _place(builder, builder.extract_value(args[0], k), formats[k], args[1]), formats[k]
                    nbytes, column = access_bytes(kind, width), []
                    for offset in range(0, width * _BYTES[kind], nbytes):
                        here = builder.add(at, ir.Constant(_I64, offset))
                        column += _asm_load(builder, here, tuning.load, nbytes, kind)
                    columns.append(column)
                lanes = [context.make_tuple(builder, one, [c[j] for c in columns]) for j in range(width)]
                return context.make_tuple(builder, signature.return_type, lanes)

            return types.UniTuple(one, width)(addresses, types.int64), generate

        @intrinsic
        def store(typing_context: Any, addresses: Any, i: Any, values: Any) -> Any:
            one = types.Tuple([getattr(types, formats[k]) for k in written])

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                for j, k in enumerate(written):
                    at, kind = _place(builder, builder.extract_value(args[0], k), formats[k], args[1]), formats[k]
                    column = [builder.extract_value(args[2], (lane, j)) for lane in range(width)]
                    each = access_bytes(kind, width) // _BYTES[kind]
                    for first in range(0, width, each):
                        here = builder.add(at, ir.Constant(_I64, first * _BYTES[kind]))
                        _asm_store(builder, here, tuning.store, kind, column[first : first + each])

            return types.void(addresses, types.int64, types.UniTuple(one, width)), generate

        return load, store

    def row(self, kind: str, count: int, early: bool = False) -> Any:
        """As `Target.row`."""

        @intrinsic
        def read(typing_context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                values = []
                for k in range(count):
                    at = builder.add(args[0], ir.Constant(_I64, k * _BYTES[kind]))
                    if early:
                        values += _asm_load(builder, at, "", _BYTES[kind], kind)
                        continue
                    values.append(builder.load(_pointer(builder, at, _LLVM[kind]), align=_BYTES[kind]))
                return context.make_tuple(builder, signature.return_type, values)

            return types.UniTuple(getattr(types, kind), count)(types.int64), generate

        return read

    def put(self, kind: str) -> Any:
        """As `Target.put`."""

        @intrinsic
        def write(typing_context: Any, address: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                builder.store(args[1], _pointer(builder, args[0], _LLVM[kind]), align=_BYTES[kind])

            return types.void(types.int64, getattr(types, kind)), generate

        return write

    def each(self, phase: Any, arguments: int, threads: int, wait: bool = True) -> Any:
        """As `Target.each`."""
        names = ", ".join(f"a{k}" for k in range(arguments))
        text = f"def run({names}):\n    phase(int64(cuda.threadIdx.x), {names})"
        text += "\n    cuda.syncthreads()" if wait else ""
        return self.function(define(text, "run", {"phase": phase, "cuda": cuda, "int64": np.int64}))


TARGET: Target = CudaTarget()

# No contraction of a product and a sum, and IEEE roots and divisions, which are the default: the same bits as a CPU.
_LINK = ("-fma=0",)


@dataclass(frozen=True)
class Image:
    """A kernel as machine code.

    Attributes:
        name: what it is called among the kernels of a step.
        code: the cubin.
        entry: the symbol of its entry.
        threads: in a block.
        log: what the assembler said of registers and memory, if it was compiled here.
    """

    name: str
    code: bytes
    entry: str
    threads: int
    log: str = ""


def surroundings() -> str:
    """What machine code depends on beyond its text and the sources of this package."""
    names = ("numba", "numba-cuda", "llvmlite", "numpy", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-bindings")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} of the system")
    return ", ".join(found)


def _entry(code: bytes) -> str:
    """The symbol of the kernel in a cubin."""
    return re.findall(rb"\.text\.(\w+)", code)[0].decode()


def _image(kept: bytes) -> Image:
    """What `image_of` has kept."""
    kind, threads, code = kept.split(b"\n", 2)
    if not code.startswith(b"\x7fELF"):
        raise ValueError("not a cubin")
    return Image(kind.decode(), code, _entry(code), int(threads))


def image_of(make: Callable[[Target], Body], name: str, cc: tuple[int, int], content: Sequence[object]) -> Image:
    """The machine code of a kernel, from the cache or compiled.

    Args:
        make: its body for a target.
        name: of the rule, for people who look into the cache.
        cc: the compute capability to compile for.
        content: whatever the code depends on beside what every kernel does.
    """
    entry = caching.Entry(name, "cuda", cc, surroundings(), _LINK, *content)
    found = entry.load(_image)
    if found is not None:
        return found
    image = compile_image(make(TARGET), cc)
    entry.write(b"\n".join([image.name.encode(), str(image.threads).encode(), image.code]))
    return image


def compile_image(body: Body, cc: tuple[int, int]) -> Image:
    """Compile a kernel for a compute capability."""
    names = ", ".join(f"a{k}" for k in range(len(body.arguments)))
    room = f"cuda.shared.array({body.shared}, float64)" if body.shared else "0"
    text = f"def {body.name}({names}):\n    run(int64(cuda.blockIdx.x), {room}, {names})"
    namespace = {"run": TARGET.function(body.run), "cuda": cuda, "int64": np.int64, "float64": types.float64}
    kernel = define(text, body.name, namespace)
    # Functions called by a kernel are compiled for the current GPU, whatever is asked for; there may be none.
    device = mock.Mock(return_value=mock.Mock(compute_capability=cc))
    with mock.patch.object(numba.cuda.dispatcher, "get_current_device", device):
        code, _ = cuda.compile(
            kernel,
            types.void(*body.arguments),
            device=False,
            abi="numba",
            output="ltoir",
            cc=cc,
            launch_bounds=body.threads,
        )
    return _linked(code, body, cc)


def _linked(code: bytes, body: Body, cc: tuple[int, int]) -> Image:
    options = [f"-arch=sm_{cc[0]}{cc[1]}", "-lto", "-Xptxas=-v", *_LINK]
    handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, code, len(code), body.name)
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    made = bytes(cubin)
    return Image(body.name, made, _entry(made), body.threads, log.decode(errors="replace"))
