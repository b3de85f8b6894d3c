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
from .grid import Body, Target, access_bytes
from .staging import define
from .tiles import FLAGS

__all__ = ["TARGET", "compile_kernel"]


def _function(function: Callable[..., Any]) -> Any:
    return njit(**FLAGS)(function)


def _lanes(
    formats: Sequence[str], width: int, read: Sequence[int], written: Sequence[int], tuning: Any
) -> tuple[Any, Any]:
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
    return _function(load), _function(store)


def _each(phase: Any, arguments: int, threads: int, wait: bool = True) -> Any:
    names = ", ".join(f"a{k}" for k in range(arguments))
    text = f"def run({names}):\n    for thread in range({threads}):\n        phase(thread, {names})"
    return _function(define(text, "run", {"phase": phase}))


def _row(kind: str, count: int, early: bool = False) -> Any:
    return memory.row(kind, count)


TARGET = Target(_function, memory.where, _lanes, memory.elements, _row, memory.put, _each)


def compile_kernel(body: Body) -> Callable[..., None]:
    """`launch(blocks, *arguments)`: all blocks of a kernel, one after the other."""
    names = ", ".join(f"a{k}" for k in range(len(body.arguments)))
    room = f"np.empty({body.shared})" if body.shared else "0"
    text = f"def launch(blocks, {names}):\n    room = {room}\n    for block in range(blocks):\n"
    text += f"        run(block, room, {names})"
    launch = _function(define(text, "launch", {"run": _function(body.run), "np": np}))
    launch.compile(types.void(types.int64, *body.arguments))
    launch.disable_compile()
    compiled: Callable[..., None] = launch
    return compiled
