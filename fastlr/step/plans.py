"""Plans: which memory a step touches, as two tables of integers.

`leaves[leaf] = (row, address of p, of g, of each state, ...)` and `tiles[tile] = (leaf, start, count)`. A row is the
place of a group's counters and hyperparameters; in a population each model has rows of its own. Addresses are taken
here and nowhere else, from arrays that the optimizer has checked and keeps alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checks
from ..arrays.places import Place
from ..kernels import arrays, cpu
from ..kernels.cpu import CHUNK, CLOSED, LINE, NEXT, SHARES, WAITING, Kernel
from ..kernels.layout import ASIDE, CLOCK, FIRST_ADDRESS, ROW, TICKS
from ..kernels.staging import Staged
from ..kernels.sums import BLOCK
from .info import Layout, StepInfo
from .rows import Rows
from .threads import ask_helpers

if TYPE_CHECKING:
    from .gradients import Gradients

_GRADIENT = FIRST_ADDRESS + 1

# Below this many bytes one thread is done before another has been woken: that can take 70 us of the caller's time
# (virtual machine, 2026-11), in which it moves some 3 MB.
_WORTH_WAKING = 4 << 20

# Above this many bytes a copy in low precision will have left the caches before anybody reads it, so it goes past them.
_WORTH_STREAMING = 128 << 20


@dataclass(frozen=True)
class Column:
    """One column of a plan.

    Attributes:
        addresses: of each leaf, of all models, kept alive by whoever made the plan; None for gradients, whose addresses
            come later.
        itemsize: bytes of an element.
    """

    addresses: np.ndarray | None
    itemsize: int

    @classmethod
    def of(cls, arrays: Sequence[Any], place: Place, itemsize: int) -> Column:
        """The column that arrays are, one for each leaf."""
        return cls(np.array([place.address(a) for a in arrays], np.int64), itemsize)


class Plan:
    """The tables of a step, and what a running step needs beside them.

    Args:
        sizes: elements of each leaf of one model.
        columns: as `kernels.tiles.Storage.columns` has them.
        rows: of the leaves.
        kept: whether the step updates a leaf of a model, shape `(leaves, models)`.
        averaged: whether the step only averages it.
        advance: see `Rows.advance`.
        staged: the rule.
        table: hyperparameters per row, float64.
        h: scratch for what `decide` returns, per row.
        kind: the format of the gradients.
        merge: leaves stand one after the other in every column, so that neighbours of one row can be one entry.
        partial: whether it is a step of a part.

    Attributes:
        tables: the arguments of a kernel before the generation.
        advance: what the step adds to the counters.
        reports: what `decide` reported of each row.
        leaf_sums: the sums over each entry.
        entry: the entry of each leaf and model, -1 where there is none; only if sums are taken.
        updated_tiles: how many of the tiles, which come first, are of leaves that are updated; the others are only
            averaged.
        left_out: first and last element, in the flat order, of what the step does not update.
        layout: how to read what a step reported; None if it reports nothing.
    """

    layout: Layout | None = None

    def __init__(
        self,
        sizes: Sequence[int],
        columns: Sequence[Column],
        rows: Rows,
        kept: np.ndarray,
        averaged: np.ndarray,
        advance: np.ndarray,
        staged: Staged,
        table: np.ndarray,
        h: np.ndarray,
        kind: str,
        merge: bool,
        partial: bool,
    ) -> None:
        self.kind, self.partial = kind, partial
        models = kept.shape[1]
        lengths = np.repeat(np.asarray(sizes, np.int64), models)
        row = rows.index.reshape(-1)
        kept = kept.reshape(-1) & (lengths > 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1]

        def entries(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """The first leaf (of a model) of each entry, and the elements of the entry."""
            first = kept
            if merge and not staged.quantities:
                same = np.zeros_like(kept)
                same[1:] = kept[1:] & kept[:-1] & (row[1:] == row[:-1])
                first = kept & ~same
            entry = np.cumsum(first) - 1
            starts = np.flatnonzero(first)
            return starts, np.bincount(entry[kept], lengths[kept], minlength=len(starts)).astype(np.int64)

        updated, sizes_of_updated = entries(kept)
        others, sizes_of_others = entries(averaged.reshape(-1) & (lengths > 0))
        starts, totals = np.concatenate([updated, others]), np.concatenate([sizes_of_updated, sizes_of_others])

        leaf = starts // models
        inside = (starts % models) * lengths[starts]
        itemsize = columns[1].itemsize
        count = len(updated)
        self._leaf = leaf[:count]
        self._inside = inside[:count] * itemsize
        self._flat_offsets = offsets[updated] * itemsize
        self.leaves = np.zeros((len(starts), 1 + len(columns)), np.int64)
        self.leaves[:, ROW] = row[starts]
        for k, column in enumerate(columns):
            if column.addresses is not None:
                self.leaves[:, FIRST_ADDRESS + k] = column.addresses[leaf] + inside * column.itemsize
        self.leaves[count:, _GRADIENT] = self.leaves[count:, FIRST_ADDRESS]  # what is only averaged has none

        per = -(-totals // BLOCK)
        which = np.repeat(np.arange(len(starts)), per)
        begin = (np.arange(len(which)) - np.repeat(np.cumsum(per) - per, per)) * BLOCK
        self.tiles = np.ascontiguousarray(
            np.stack([which, begin, np.minimum(BLOCK, totals[which] - begin)], axis=1), np.int64
        )
        self.updated_tiles = int(per[:count].sum())
        self.elements = int(totals.sum())
        self._work = self.elements * sum(c.itemsize for c in columns) + sum(
            self.elements * c.itemsize for c in columns[: 2 * len(staged.measures)]
        )
        self._tables = (self.leaves, self.tiles, table, rows.counters, h)
        self.next_generation = 1
        self._last_phase = len(staged.measures)
        self._located: Any = None
        self._finder: arrays.Finder | None = None
        self._threads = self._sharing = 0
        average = self.elements / max(1, len(self.tiles))
        self._chunk = max(1, int(BLOCK // max(1.0, average)))
        self.advance = advance
        out = np.flatnonzero(~kept & (lengths > 0))
        self.left_out = list(zip(offsets[out].tolist(), (offsets[out] + lengths[out]).tolist(), strict=True))
        self._make_sums(rows, staged, updated, per[:count], models)

    def _make_sums(self, rows: Rows, staged: Staged, starts: np.ndarray, per: np.ndarray, models: int) -> None:
        """Room for sums, and which entries each scope adds up, in the order of the leaves."""
        entries, count = len(self.leaves), len(rows)
        self.reports = np.zeros((count, len(staged.reports)))
        self.leaf_sums = np.zeros((entries, staged.quantities))
        more: dict[int, np.ndarray] = {
            cpu.ADVANCE: self.advance,
            cpu.SCALARS: rows.scalars,
            cpu.NEW_SCALARS: np.zeros_like(rows.scalars),
            cpu.SUMS: np.zeros((count, len(staged.sums))),
            cpu.REPORTS: self.reports,
            cpu.LEAF_SUMS: self.leaf_sums,
        }
        self._cell_counts = [0, 0]
        self.entry: np.ndarray | None = None
        if staged.quantities:
            members = np.zeros((2, entries), np.int64)
            bounds = np.zeros((2, entries + 1), np.int64)
            cells = np.full((2, count), -1, np.int64)
            model = starts % models
            groups = rows.configuration[rows.index.reshape(-1)[starts]] * models + model
            for k, cell in enumerate((groups, model)):
                names, which = np.unique(cell, return_inverse=True)
                members[k, : len(starts)] = np.argsort(which, kind="stable")
                bounds[k, : len(names) + 1] = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=len(names)))])
                of_row = rows.configuration * models + rows.model if k == 0 else rows.model
                place = np.searchsorted(names, of_row)
                known = place < len(names)
                known[known] = names[place[known]] == of_row[known]
                cells[k, known] = place[known]
                self._cell_counts[k] = len(names)
            more[cpu.PARTIALS] = np.zeros((len(self.tiles) + 1, staged.quantities))
            more[cpu.WORK] = np.zeros(entries + 1)
            more[cpu.FIRST] = np.full(entries + 1, self.updated_tiles)
            more[cpu.FIRST][: len(starts)] = np.cumsum(per) - per
            more[cpu.MEMBERS], more[cpu.BOUNDS], more[cpu.CELLS] = members, bounds, cells
            self.entry = np.full(rows.index.size, -1, np.int64)
            self.entry[starts] = np.arange(len(starts))
            self.entry = self.entry.reshape(rows.index.shape)
        self._more = more

    def locate_gradients(self, addresses: Any) -> None:
        """Enter addresses that somebody else has found, unless it is the same object as in the step before."""
        if self._located is not addresses:
            self.point_gradients(addresses, flat=False)
            self._located = addresses

    def point_gradients(self, addresses: Any, flat: bool) -> None:
        """Enter the addresses of gradients.

        Args:
            addresses: one for each leaf, in order; or if they are flat, that of the first element of all.
            flat: whether they are one array that holds all in order.
        """
        self._located = None  # an interrupt must not leave new addresses under an old name
        places = addresses + self._flat_offsets if flat else np.asarray(addresses, np.int64)[self._leaf] + self._inside
        self.leaves[: len(self._leaf), _GRADIENT] = places

    def expect(self, gradients: Gradients, given: list[Any], flat: bool) -> None:
        """Find such gradients by `find` from now on.

        Args:
            gradients: knows what they must be.
            given: those of this step, each read where it is, None where there is none.
            flat: whether they are one array that holds all in order.
        """
        inside = self._flat_offsets if flat else self._inside
        source = np.zeros_like(self._leaf) if flat else self._leaf
        column = self.leaves[: len(self._leaf), _GRADIENT]
        self._finder = gradients.finder(given, flat, source, inside, column)

    def find(self, given: list[Any]) -> bool:
        """Look at gradients, and enter their addresses if all are as those before; whether they are."""
        finder, self._located = self._finder, None
        return finder is not None and finder.look(finder.board, id(given)) == arrays.FOUND

    def run(self, kernel: Kernel, threads: int, stream: int | None = None) -> None:
        """Carry out the step."""
        if threads != self._threads:
            self._make_control(threads)
        generation = self.next_generation
        self.next_generation = generation + self._last_phase + 1
        if self._sharing > 1 and kernel.takes_helpers and self._work >= _WORTH_WAKING:
            missing = self._sharing - 1 - int(self._control[WAITING])
            if missing > 0:
                ask_helpers(missing, kernel.run, self.tables, generation)
        kernel.run(*self.tables, generation)

    def has_made(self, generation: int) -> bool:
        """Whether the step of a generation was carried out."""
        return self._threads > 0 and int(self._control[CLOSED]) == generation + self._last_phase

    def number(self, rows: Rows) -> int:
        """The number of steps before the one that this is, or is a part of; -1 for a part of nothing before the first.

        Steps of all parts are one step: a part begins a new one if a leaf of it has been in the last one.
        """
        steps: int = rows.counters.item(-1, CLOCK)
        if not self.partial:
            return steps
        clocks = rows.counters[:-1, CLOCK][self.advance[:-1, :ASIDE].any(axis=1)]
        begins = clocks.size > 0 and clocks.max() >= steps
        return steps if begins else steps - 1

    def count_part(self, rows: Rows, number: int) -> None:
        """Let the step of a part be, or be a part of, the one that comes after `number` others."""
        self.advance[-1, TICKS] = number + 1 - rows.counters[-1, CLOCK]

    def info(self, rows: Rows, lrs: Any, grad_scale: Any) -> StepInfo:
        """What the step that was just made did."""
        steps: int = rows.counters.item(-1, CLOCK)
        if self.layout is None:
            return StepInfo(steps, lrs)
        return StepInfo(steps, lrs, self.layout, self.reports.copy(), self.leaf_sums.copy(), grad_scale)

    def _make_control(self, threads: int) -> None:
        """A new control block; helpers that still know the old one will find nothing to do."""
        self._sharing = max(1, min(threads, cpu.MOST_THREADS, len(self.tiles)))
        size = NEXT + self._sharing * LINE
        control = np.zeros(size + LINE, np.int64)
        skip = -(control.ctypes.data // 8) % LINE
        self._control = control[skip : skip + size]
        self._control[CHUNK], self._control[SHARES] = self._chunk, self._sharing
        for place, array in self._more.items():
            self._control[place] = checks.address(array)
        self._control[cpu.CELL_COUNTS : cpu.CELL_COUNTS + 2] = self._cell_counts
        self._control[cpu.PAST] = self._work > _WORTH_STREAMING
        self._control[cpu.UPDATED] = self.updated_tiles
        self.tables = (*self._tables, self._control)
        self._threads = threads
