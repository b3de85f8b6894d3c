"""Plans: which memory a step touches, as two tables of integers.

`leaves[leaf] = (row, address of p, of g, of each state)` and `tiles[tile] = (leaf, start, count)`. A row is the place
of a group's counters and hyperparameters; in a population each model has rows of its own. Addresses are taken here
and nowhere else, from arrays that the optimizer has checked and keeps alive.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels.cpu import BLOCK, CHUNK, FIRST_ADDRESS, LINE, NEXT, ROW, SHARES, WAITING, Kernel
from .threads import ask_helpers

_GRADIENT = FIRST_ADDRESS + 1
# Gradients that are the same arrays as in the step before need no new check. Up to this size they are simply kept;
# keeping larger ones would cost the user memory, so they are remembered by weak references.
_REMEMBERED_BYTES = 4 << 20

# Below this many bytes one thread is done before another has been woken: that can take 70 us of the caller's time
# (virtual machine, 2026-11), in which it moves some 3 MB.
_WORTH_WAKING = 4 << 20


class Plan:
    """The tables of a step, and what a running step needs beside them.

    Args:
        sizes: elements of each leaf of one model.
        columns: addresses of p and of each state, per leaf; shape `(1 + states, leaves)`.
        rows: row of each leaf of each model, shape `(leaves, models)`; negative where the step leaves it alone.
        itemsize: bytes of an element.
        table: hyperparameters per row, float64.
        counters: per row, and one more row for the optimizer itself.
        h: scratch for what `decide` returns, per row.
        merge: leaves stand one after the other in every column, so that neighbours of one row can be one entry.

    Attributes:
        tables: the arguments of a kernel before the generation.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        columns: np.ndarray,
        rows: np.ndarray,
        itemsize: int,
        table: np.ndarray,
        counters: np.ndarray,
        h: np.ndarray,
        merge: bool,
    ) -> None:
        models = rows.shape[1]
        lengths = np.repeat(np.asarray(sizes, np.int64), models)
        row = rows.reshape(-1)
        kept = (row >= 0) & (lengths > 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        first = kept
        if merge:
            same = np.zeros_like(kept)
            same[1:] = kept[1:] & kept[:-1] & (row[1:] == row[:-1])
            first = kept & ~same
        entry = np.cumsum(first) - 1
        starts = np.flatnonzero(first)
        totals = np.bincount(entry[kept], lengths[kept], minlength=len(starts)).astype(np.int64)

        leaf = starts // models
        self._inside = (starts % models) * lengths[starts] * itemsize if len(starts) else starts
        self._leaf = leaf
        self._flat_offsets = offsets[starts] * itemsize
        self._first_offset = int(self._flat_offsets[0]) if len(starts) else 0
        self.leaves = np.zeros((max(1, len(starts)), 2 + columns.shape[0]), np.int64)
        if len(starts):
            self.leaves[:, ROW] = row[starts]
            self.leaves[:, FIRST_ADDRESS] = columns[0][leaf] + self._inside
            self.leaves[:, _GRADIENT + 1 :] = (columns[1:][:, leaf] + self._inside).T

        per = -(-totals // BLOCK)
        which = np.repeat(np.arange(len(starts)), per)
        begin = (np.arange(len(which)) - np.repeat(np.cumsum(per) - per, per)) * BLOCK
        self.tiles = np.ascontiguousarray(
            np.stack([which, begin, np.minimum(BLOCK, totals[which] - begin)], axis=1), np.int64
        )
        self.elements = int(totals.sum())
        self._work = self.elements * itemsize * (1 + columns.shape[0])
        self._tables = (self.leaves, self.tiles, table, counters, h)
        self._generations = itertools.count(1)
        self._itemsize = itemsize
        self._pointed: list[Any] | tuple[Any, ...] | None = None
        self._threads = 0
        average = self.elements / max(1, len(self.tiles))
        self._chunk = max(1, int(BLOCK // max(1.0, average)))

    def points_at(self, arrays: list[Any]) -> bool:
        """Whether the gradients in the plan are these very arrays."""
        last = self._pointed
        if type(last) is tuple:
            last = [reference() for reference in last]
        return last is not None and len(last) == len(arrays) and all(map(operator.is_, last, arrays))

    def point_gradients(self, addresses: Any, arrays: list[Any] | None) -> None:
        """Enter the address of each leaf's gradient, in the order of the leaves.

        Args:
            addresses: one for each leaf.
            arrays: those whose addresses they are, if the same arrays will have the same addresses again.
        """
        self._pointed = None  # an interrupt from here on must not leave new addresses under an old name
        self.leaves[: len(self._leaf), _GRADIENT] = np.asarray(addresses, np.int64)[self._leaf] + self._inside
        self._remember(arrays)

    def point_flat_gradient(self, address: int, arrays: list[Any] | None) -> None:
        """Enter the address of one array that holds all gradients in order; as `point_gradients`."""
        self._pointed = None
        if len(self._leaf) == 1:  # the usual case: one flat buffer
            self.leaves[0, _GRADIENT] = address + self._first_offset
        else:
            self.leaves[: len(self._leaf), _GRADIENT] = address + self._flat_offsets
        self._remember(arrays)

    def _remember(self, arrays: list[Any] | None) -> None:
        if arrays is not None:
            small = self.elements * self._itemsize <= _REMEMBERED_BYTES
            self._pointed = arrays if small else tuple(map(weakref.ref, arrays))

    def run(self, kernel: Kernel, threads: int) -> None:
        """Carry out the step."""
        if threads != self._threads:
            self._make_control(threads)
        generation = next(self._generations)
        if threads > 1 and kernel.takes_helpers and self._work >= _WORTH_WAKING:
            missing = threads - 1 - int(self._control[WAITING])
            if missing > 0:
                ask_helpers(missing, kernel.run, self.tables, generation)
        kernel.run(*self.tables, generation)

    def _make_control(self, threads: int) -> None:
        """A new control block; helpers that still know the old one will find nothing to do."""
        size = NEXT + threads * LINE
        control = np.zeros(size + LINE, np.int64)
        skip = -(control.ctypes.data // 8) % LINE
        self._control = control[skip : skip + size]
        self._control[CHUNK], self._control[SHARES] = self._chunk, threads
        self.tables = (*self._tables, self._control)
        self._threads = threads
