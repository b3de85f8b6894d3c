"""The same step carried out by NumPy on whole tiles: the reference that every compiled sweep must equal bit for bit."""

from __future__ import annotations

import time

import numpy as np

from . import primitives
from .cpu import CLOCK, CLOCK_STEP, COUNT, FIRST_ADDRESS, LEAF, ROW, START, T_STEP, Kernel, T
from .memory import view
from .staging import Staged, define

_NUMPY = {
    "sqrt": np.sqrt,
    "abs": np.abs,
    "where": np.where,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def build(staged: Staged, dtype: str) -> Kernel:
    """A step with the arguments of `kernels.cpu`, without compiling anything."""
    began = time.perf_counter()
    decide = define(staged.decide, "decide", {**_NUMPY, "power": primitives.power})
    update = define(staged.update, "update", _NUMPY)
    uniforms = len(staged.uniforms)

    def run(
        leaves: np.ndarray,
        tiles: np.ndarray,
        table: np.ndarray,
        counters: np.ndarray,
        h: np.ndarray,
        control: np.ndarray,
        generation: int,
    ) -> None:
        with np.errstate(all="ignore"):
            for r in np.flatnonzero(counters[:, T_STEP]):
                h[r] = decide(int(counters[r, T]) + 1, *table[r, :uniforms])
            for tile in tiles:
                leaf = leaves[tile[LEAF]]
                part = slice(tile[START], tile[START] + tile[COUNT])
                p, g, *states = (view(int(a), part.stop, dtype)[part] for a in leaf[FIRST_ADDRESS:])
                results = update(p, g, *states, tuple(h[leaf[ROW]]))
                for column, result in zip((p, *states), results, strict=True):
                    column[...] = result
        counters[:, T] += counters[:, T_STEP]
        counters[:, CLOCK] += counters[:, CLOCK_STEP]

    return Kernel(run, time.perf_counter() - began, cached=False, takes_helpers=False)
