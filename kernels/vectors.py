"""Fused passes over flat vectors, with sums in the fixed shape of `kernels.sums`: for line search and L-BFGS.

Each pass works on a range of blocks, so that threads can share them: the sums of a block do not depend on who takes it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from . import helpers
from .caching import KernelCache
from .cpu import MOST_THREADS
from .sums import BLOCK, LANES, block, fold
from .tiles import compiled, compiles

__all__ = ["combine", "dot", "move_and_dot"]

_WORTH_SHARING = 1 << 20  # bytes below which one thread is done before another has begun


def _halve(lanes: Any) -> Any:
    """The sum of lanes, upper half onto lower, down to one."""
    half = LANES // 2
    while half > 0:
        for j in range(half):
            lanes[j] += lanes[j + half]
        half = half // 2
    return lanes[0]


@functools.cache
def _pass(name: str, dtype: str) -> Callable[..., None]:
    """A pass `run(out, x, a, y, z, sums, first, last)` over some blocks, compiled or from the cache."""
    digest = hashlib.sha256(f"{name} {dtype}".encode()).hexdigest()[:16]
    halve = compiled(_halve, digest)

    def move_and_dot(out: Any, x: Any, a: float, y: Any, z: Any, sums: Any, first: int, last: int) -> None:
        lanes = np.zeros(LANES)
        for b in range(first, last):
            lanes[:] = 0.0
            begin, end = b * BLOCK, min((b + 1) * BLOCK, x.size)
            for i in range(begin, end, LANES):
                for j in range(min(LANES, end - i)):
                    value = x[i + j] + a * y[i + j]
                    out[i + j] = value
                    lanes[j] += np.float64(value) * np.float64(z[i + j])
            sums[b, 0] = halve(lanes)

    def dot(out: Any, x: Any, a: float, y: Any, z: Any, sums: Any, first: int, last: int) -> None:
        lanes = np.zeros(LANES)
        for b in range(first, last):
            lanes[:] = 0.0
            begin, end = b * BLOCK, min((b + 1) * BLOCK, x.size)
            for i in range(begin, end, LANES):
                for j in range(min(LANES, end - i)):
                    lanes[j] += np.float64(x[i + j]) * np.float64(y[i + j])
            sums[b, 0] = halve(lanes)

    def move(out: Any, x: Any, a: float, y: Any, z: Any, sums: Any, first: int, last: int) -> None:
        for i in range(first * BLOCK, min(last * BLOCK, x.size)):
            out[i] = x[i] + a * y[i]

    number = getattr(types, dtype)
    vector = types.Array(number, 1, "C")
    sums = types.Array(types.float64, 2, "C")
    run = compiled({"move_and_dot": move_and_dot, "dot": dot, "move": move}[name], digest)
    signature = types.void(vector, vector, number, vector, vector, sums, types.int64, types.int64)
    KernelCache("vectors", name, dtype).compile(run, signature)
    return run


def _by_numpy(name: str) -> Callable[..., None]:
    """The same pass by NumPy, with the same bits."""

    def run(out: Any, x: Any, a: float, y: Any, z: Any, sums: Any, first: int, last: int) -> None:
        for b in range(first, last):
            part = slice(b * BLOCK, (b + 1) * BLOCK)
            left, right = (x, y) if name == "dot" else (out, z)
            if name != "dot":
                out[part] = x[part] + a * y[part]
            if name != "move":
                sums[b, 0] = block(left[part].astype(np.float64) * right[part].astype(np.float64))

    return run


_fold: Callable[..., None] = fold


def _run(name: str, out: np.ndarray, x: np.ndarray, a: float, y: np.ndarray, z: np.ndarray, threads: int) -> float:
    """Carry out a pass; the sum over all blocks."""
    blocks = max(1, -(-x.size // BLOCK))
    sums = np.zeros((blocks, 1))
    run = _pass(name, x.dtype.name) if compiles() else _by_numpy(name)
    factor = x.dtype.type(a)
    if threads == 1 or x.nbytes < _WORTH_SHARING:
        run(out, x, factor, y, z, sums, 0, blocks)
    else:
        threads = min(threads, MOST_THREADS)
        parts = min(threads, blocks)
        shares = iter([*itertools.pairwise(blocks * k // parts for k in range(parts + 1))])

        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def take_shares() -> None:
            for share in shares:  # a list's iterator hands out each once, to whichever thread asks
                problem: BaseException | None = None
                try:
                    run(out, x, factor, y, z, sums, *share)
                except BaseException as error:  # also of a helper: the caller waits for every share that was taken
                    problem = error
                done.put(problem)

        helpers.ask(parts - 1, take_shares)
        take_shares()
        for _ in range(parts):
            if (found := done.get()) is not None:
                raise found
    _fold(sums, 0, blocks, 0)
    return float(sums[0, 0])


def dot(x: np.ndarray, y: np.ndarray, threads: int) -> float:
    """The inner product of two vectors, in float64."""
    return _run("dot", x, x, 0.0, y, y, threads)


def move_and_dot(out: np.ndarray, x: np.ndarray, a: float, y: np.ndarray, z: np.ndarray, threads: int) -> float:
    """`out = x + a y`, and the inner product of `out` and `z`, in one pass; `out` may be `x`."""
    return _run("move_and_dot", out, x, a, y, z, threads)


def combine(out: np.ndarray, x: np.ndarray, a: float, y: np.ndarray, threads: int) -> None:
    """`out = x + a y`; `out` may be `x`."""
    _run("move", out, x, a, y, y, threads)
