"""The kernels of `grid` on the processor, one thread after another: what a GPU is to do, on machines without one.

Compiled from the same text as the kernels for a GPU, with the same order of operations, so the results are the same
bit for bit. What it cannot show are speed, and threads that forget to wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit, types

from . import memory
from .staging import define
from .target import Body, Target, Tuning, access_bytes
from .tiles import FLAGS

__all__ = ["TARGET", "compile_kernel"]


class EmulatedTarget:
    """What kernels are made of on the processor, as `Target`."""

    where: Any = memory.where
    gpu = False

    def function(self, function: Callable[..., Any]) -> Any:
        """As `Target.function`."""
        return njit(**FLAGS)(function)

    def elements(self, formats: Sequence[str], read: Sequence[int], written: Sequence[int]) -> tuple[Any, Any]:
        """As `Target.elements`."""
        return memory.elements(formats, read, written)

    def lanes(
        self, formats: Sequence[str], width: int, read: Sequence[int], written: Sequence[int], tuning: Tuning
    ) -> tuple[Any, Any]:
        """As `Target.lanes`."""
        load_one, store_one = memory.elements(formats, read, written)
        namespace = {"load_one": load_one, "store_one": store_one}

        def checked(columns: Sequence[int]) -> str:
            """A GPU stops at an access that is not aligned to its size."""
            off = [
                f"(addresses[{k}] + i * {np.dtype(formats[k]).itemsize}) & {access_bytes(formats[k], width) - 1}"
                for k in columns
            ]
            return f"    if ({' | '.join(f'({x})' for x in off)}) != 0:\n        raise ValueError('not aligned')\n"

        loads = ", ".join(f"load_one(addresses, i + {k})" for k in range(width))
        load = define(f"def load(addresses, i):\n{checked(read)}    return ({loads},)", "load", namespace)
        stores = "\n".join(f"    store_one(addresses, i + {k}, values[{k}])" for k in range(width))
        checks = checked(written) if written else ""
        store = define(f"def store(addresses, i, values):\n{checks}{stores or '    pass'}", "store", namespace)
        return self.function(load), self.function(store)

    def row(self, kind: str, count: int, early: bool = False) -> Any:
        """As `Target.row`."""
        return memory.row(kind, count)

    def put(self, kind: str) -> Any:
        """As `Target.put`."""
        return memory.put(kind)

    def each(self, phase: Any, arguments: int, threads: int, wait: bool = True) -> Any:
        """As `Target.each`."""
        names = ", ".join(f"a{k}" for k in range(arguments))
        text = f"def run({names}):\n    for thread in range({threads}):\n        phase(thread, {names})"
        return self.function(define(text, "run", {"phase": phase}))


TARGET: Target = EmulatedTarget()


def compile_kernel(body: Body) -> Callable[..., None]:
    """`launch(blocks, *arguments)`: all blocks of a kernel, one after the other."""
    names = ", ".join(f"a{k}" for k in range(len(body.arguments)))
    room = f"np.empty({body.shared})" if body.shared else "0"
    text = f"def launch(blocks, {names}):\n    room = {room}\n    for block in range(blocks):\n"
    text += f"        run(block, room, {names})"
    launch = TARGET.function(define(text, "launch", {"run": TARGET.function(body.run), "np": np}))
    launch.compile(types.void(types.int64, *body.arguments))
    launch.disable_compile()
    compiled: Callable[..., None] = launch
    return compiled
