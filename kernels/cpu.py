"""The sweep on CPU threads: `decide` once per row, then `update` over the tiles of a plan.

One compiled function carries out a whole step, counters included, so that a step is either not begun or complete when
Python next looks (a KeyboardInterrupt waits for it). It takes the tables of a plan and never names an optimizer.

The tiles are cut into a share for each thread and handed out by atomic counters, to the calling thread and to any
helper that has come in meanwhile (`fastlr.threads`); whoever is done with one share goes on with the others. Nobody
waits for a helper that has not come, so a core that is busy with something else costs only its share. Which thread
does which tile does not show in the result.
"""

import hashlib
import math
import time
import types as types_module
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import njit, types

from . import primitives
from .caching import KernelCache
from .memory import atomic_load, atomic_store, elements, fetch_add, pause, row, sched_yield, where
from .staging import Staged, define

BLOCK = 16_384  # elements of a tile, at most; sums over a leaf are taken in blocks of this size

# Columns of a plan's tables.
ROW, FIRST_ADDRESS = 0, 1  # leaves: the row of its counters, then the addresses of p, g and the states
LEAF, START, COUNT = 0, 1, 2  # tiles
T, CLOCK, T_STEP, CLOCK_STEP = 0, 1, 2, 3  # counters: updates made, steps seen, and what this step adds to each

# Places in the control block, in int64s: each that threads write has a cache line of its own. From NEXT on, one
# counter for each share of the tiles.
HELPERS, OPENED, CLOSED, WAITING, ARRIVED, CHUNK, SHARES, NEXT = 0, 8, 16, 24, 32, 40, 41, 48
LINE = 8

# How often a helper looks for the next step before it goes to sleep. Once it has been asked in, the step is about to
# begin: the call that woke it can take the caller 70 us (virtual machine, an idle core). After a step, some 50 us, so
# that steps one after the other find it awake and a matrix product that follows is hardly disturbed.
_ASKED, _PATIENCE = 50_000, 5_000

# No fast-math and no contraction: the same bits as NumPy. NumPy's error model: x / 0 is inf, without a branch.
_FLAGS = {"error_model": "numpy", "nogil": True, "fastmath": False, "boundscheck": False}


@dataclass(frozen=True)
class Kernel:
    """A compiled step.

    Attributes:
        run: `run(leaves, tiles, table, counters, h, control, generation)`; a helper passes the negative generation.
        compile_s: seconds spent compiling or loading it.
        cached: whether it came from disk.
        takes_helpers: whether other threads may take part.
    """

    run: Callable[..., None]
    compile_s: float
    cached: bool
    takes_helpers: bool


def _compiled(function: Callable[..., Any], digest: str) -> Any:
    """A function as part of one kernel, by a name of its own.

    Numba's symbols carry a counter of the process that compiled them. Two kernels from two processes can so have the
    same symbols, and in a third process that loads both from disk one would silently run the other's code.
    """
    own = types_module.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__qualname__ = f"{function.__name__}_{digest}"
    return njit(**_FLAGS)(own)


_ELEMENT = {
    "sqrt": math.sqrt,
    "abs": abs,
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "sin": math.sin,
    "cos": math.cos,
}


def _digest(staged: Staged, dtype: str) -> str:
    return hashlib.sha256(f"{staged!r} {dtype}".encode()).hexdigest()[:16]


def tile_loop(staged: Staged, dtype: str) -> Callable[..., None]:
    """The loop over one tile, `tile(addresses, h, start, stop)`: load, call the staged update, store."""
    columns = 2 + len(staged.states)
    load, store = elements([dtype] * columns, [0, *range(2, columns)], dtype)
    digest = _digest(staged, dtype)
    update = _compiled(define(staged.update, "update", {**_ELEMENT, "where": where}), digest)

    def tile(addresses, h, start, stop):
        for i in range(start, stop):
            store(addresses, i, update(*load(addresses, i), h))

    loop: Callable[..., None] = _compiled(tile, digest)
    return loop


def build(staged: Staged, dtype: str) -> Kernel:
    """Compile a staged rule for one dtype, or load it from disk.

    Args:
        staged: the staged rule.
        dtype: "float32" or "float64"; of the columns and of the arithmetic.
    """
    began = time.perf_counter()
    columns, uniforms, slots = 2 + len(staged.states), len(staged.uniforms), staged.slots
    digest = _digest(staged, dtype)
    power = _compiled(primitives.power, digest)
    decide = _compiled(define(staged.decide, "decide", {**_ELEMENT, "power": power}), digest)
    tile = tile_loop(staged, dtype)
    addresses_at, uniforms_at, slots_at = row("int64", columns), row("float64", uniforms), row(dtype, slots)
    size = np.dtype(dtype).itemsize

    def take_tiles(leaves, tiles, h, base, chunk, shares, mine):
        for k in range(shares):  # first one's own share, which this core may still have in its cache, then the others'
            share = (mine + k) % shares
            begin, end = len(tiles) * share // shares, len(tiles) * (share + 1) // shares
            while True:
                first = begin + fetch_add(base + 8 * (NEXT + share * LINE), chunk)
                if first >= end:
                    break
                for tile_index in range(first, min(first + chunk, end)):
                    leaf, start, count = tiles[tile_index, LEAF], tiles[tile_index, START], tiles[tile_index, COUNT]
                    addresses = addresses_at(np.int64(leaves.ctypes.data) + (leaf * (columns + 1) + FIRST_ADDRESS) * 8)
                    values = slots_at(np.int64(h.ctypes.data) + leaves[leaf, ROW] * slots * size)
                    tile(addresses, values, start, start + count)

    sweep = _compiled(take_tiles, digest)

    def step(leaves, tiles, table, counters, h, control, generation):
        base = np.int64(control.ctypes.data)
        if generation > 0:
            for r in range(len(counters)):
                if counters[r, T_STEP]:
                    values = decide(counters[r, T] + 1, *uniforms_at(np.int64(table.ctypes.data) + r * uniforms * 8))
                    for k in range(slots):
                        h[r, k] = values[k]
            # The place of `measure`: sums over leaves, from which decide goes on. No rule asks for one yet.
            for share in range(control[SHARES]):
                control[NEXT + share * LINE] = 0
            control[ARRIVED] = 0
            atomic_store(base + 8 * OPENED, generation)
            sweep(leaves, tiles, h, base, control[CHUNK], control[SHARES], 0)
            atomic_store(base + 8 * CLOSED, generation)
            spins = 0
            while atomic_load(base + 8 * HELPERS) != 0:
                pause()
                spins += 1
                if spins % _PATIENCE == 0:
                    sched_yield()
            for r in range(len(counters)):
                counters[r, T] += counters[r, T_STEP]
                counters[r, CLOCK] += counters[r, CLOCK_STEP]
            return
        wanted, patience = -generation, _ASKED
        while True:
            fetch_add(base + 8 * WAITING, 1)
            spins = 0
            while atomic_load(base + 8 * OPENED) < wanted and spins < patience:
                pause()
                spins += 1
            fetch_add(base + 8 * WAITING, -1)
            if atomic_load(base + 8 * OPENED) < wanted:
                return
            fetch_add(base + 8 * HELPERS, 1)
            wanted = atomic_load(base + 8 * OPENED)
            if atomic_load(base + 8 * CLOSED) < wanted:
                mine = fetch_add(base + 8 * ARRIVED, 1) + 1
                sweep(leaves, tiles, h, base, control[CHUNK], control[SHARES], mine)
            fetch_add(base + 8 * HELPERS, -1)
            wanted, patience = wanted + 1, _PATIENCE

    integers, floats = types.Array(types.int64, 2, "C"), types.Array(types.float64, 2, "C")
    compute = types.Array(getattr(types, dtype), 2, "C")
    signature = types.void(integers, integers, floats, integers, compute, types.Array(types.int64, 1, "C"), types.int64)
    dispatcher = _compiled(step, digest)
    dispatcher._cache = cache = KernelCache(staged.name, staged, dtype, numba.config.DISABLE_JIT)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return Kernel(dispatcher, time.perf_counter() - began, cache.hit, takes_helpers=True)
