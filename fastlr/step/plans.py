"""Plans: which memory a step touches, as two tables of integers.

`leaves[entry] = (row, address of p, of g, of each state, ...)` and `tiles[tile] = (entry, start, count)`. A row holds
the counters and hyperparameters that several leaves share; in a population each model has its own rows. An entry is a
leaf of a model, or several that can be treated as one. Addresses come from arrays that the optimizer has checked and
keeps alive.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checks
from ..arrays.places import Place
from ..kernels import arrays, cpu, helpers
from ..kernels.cpu import CHUNK, CLOSED, LINE, NEXT, SHARES, WAITING, Kernel
from ..kernels.layout import CLOCK, FIRST_ADDRESS, ROW, STEPS, TICKS
from ..kernels.staging import Staged
from ..kernels.sums import BLOCK
from .info import Layout, StepInfo
from .rows import COUNTING, Rows
from .scheduled import Rates

if TYPE_CHECKING:
    from .gradients import Gradients

__all__ = ["Column", "Entries", "HostPlan", "Plan", "Scope"]

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


class Entries:
    """The tables of leaves and tiles: first the entries that a step updates, then those that it only averages.

    Args:
        sizes: elements of each leaf of one model.
        columns: as `kernels.tiles.Storage.columns` has them.
        index: the row of each leaf and model.
        kept: whether the step updates a leaf of a model, shape `(leaves, models)`.
        averaged: whether the step only averages it.
        merge: make one entry of neighbors that share a row; their elements must be adjacent in every column.

    Attributes:
        leaves, tiles: the tables.
        updated: how many entries are updated.
        updated_tiles: how many tiles they have.
        starts: the first leaf and model of each entry that is updated, counted through all models of all leaves.
        tiles_of: the number of tiles of each of them.
        leaf: the leaf of each of them.
        inside: how many bytes after the start of that leaf's gradient its gradient starts.
        in_flat: how many bytes after the start of all gradients, if these are one array.
        elements: how many elements there are, the averaged ones included.
        itemsizes: bytes of an element of each column.
        left_out: first and last element, in the flat order, of what the step does not update.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        columns: Sequence[Column],
        index: np.ndarray,
        kept: np.ndarray,
        averaged: np.ndarray,
        merge: bool,
    ) -> None:
        models = kept.shape[1]
        lengths = np.repeat(np.asarray(sizes, np.int64), models)
        row = index.reshape(-1)
        kept = kept.reshape(-1) & (lengths > 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1]

        def cut(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """The first leaf and model of each entry, and the elements of the entry."""
            first = kept
            if merge:
                same = np.zeros_like(kept)
                same[1:] = kept[1:] & kept[:-1] & (row[1:] == row[:-1])
                first = kept & ~same
            entry = np.cumsum(first) - 1
            starts = np.flatnonzero(first)
            return starts, np.bincount(entry[kept], lengths[kept], minlength=len(starts)).astype(np.int64)

        self.starts, sizes_of_updated = cut(kept)
        others, sizes_of_others = cut(averaged.reshape(-1) & (lengths > 0))
        starts, totals = np.concatenate([self.starts, others]), np.concatenate([sizes_of_updated, sizes_of_others])
        leaf = starts // models
        inside = (starts % models) * lengths[starts]
        self.itemsizes = [column.itemsize for column in columns]
        itemsize = columns[1].itemsize
        self.updated = count = len(self.starts)
        self.leaf, self.inside = leaf[:count], inside[:count] * itemsize
        self.in_flat = offsets[self.starts] * itemsize
        self.leaves = np.zeros((len(starts), 1 + len(columns)), np.int64)
        self.leaves[:, ROW] = row[starts]
        for k, column in enumerate(columns):
            if column.addresses is not None:
                self.leaves[:, FIRST_ADDRESS + k] = column.addresses[leaf] + inside * column.itemsize
        self.leaves[count:, _GRADIENT] = self.leaves[count:, FIRST_ADDRESS]  # what is only averaged has no gradient

        per = -(-totals // BLOCK)
        which = np.repeat(np.arange(len(starts)), per)
        begin = (np.arange(len(which)) - np.repeat(np.cumsum(per) - per, per)) * BLOCK
        self.tiles = np.ascontiguousarray(
            np.stack([which, begin, np.minimum(BLOCK, totals[which] - begin)], axis=1), np.int64
        )
        self.tiles_of = per[:count]
        self.updated_tiles = int(self.tiles_of.sum())
        self.elements = int(totals.sum())
        out = np.flatnonzero(~kept & (lengths > 0))
        self.left_out = list(zip(offsets[out].tolist(), (offsets[out] + lengths[out]).tolist(), strict=True))


@dataclass(frozen=True)
class Scope:
    """Which entries are added up to the sums of a scope, where each sum is that of a cell: a group, or a model.

    Attributes:
        entries: those of the first cell, in the order of the leaves, then those of the next.
        counts: how many each cell has.
        cells: the cell of each row, -1 if nothing in that cell is updated.
    """

    entries: np.ndarray
    counts: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, cell_of_entry: np.ndarray, cell_of_row: np.ndarray) -> Scope:
        """The scope whose cells have these numbers."""
        numbers, which = np.unique(cell_of_entry, return_inverse=True)
        cells = np.searchsorted(numbers, cell_of_row)
        known = cells < len(numbers)
        known[known] = numbers[cells[known]] == cell_of_row[known]
        counts = np.bincount(which, minlength=len(numbers))
        return cls(np.argsort(which, kind="stable"), counts, np.where(known, cells, -1))

    @classmethod
    def both(cls, entries: Entries, rows: Rows) -> tuple[Scope, Scope]:
        """The scope "group" and the scope "all"; each model has its own sums in both."""
        models = rows.index.shape[1]
        model = entries.starts % models
        row = rows.index.reshape(-1)[entries.starts]
        groups = cls.of(rows.configuration[row] * models + model, rows.configuration * models + rows.model)
        return groups, cls.of(model, rows.model)


class Plan(abc.ABC):
    """What a running step needs: the tables of leaves and tiles, and what it counts and reports.

    Args:
        entries: the tables.
        rows: of the leaves, with their tables of settings (`Rows.install`).
        staged: the rule.
        advance: see `Rows.advance`.
        grad_format: of the gradients.
        partial: whether it is a step of a part.

    Attributes:
        entries: the tables.
        leaves, tiles, updated_tiles, left_out: see `Entries`.
        grad_format, partial, advance: as given.
        reports: what `decide` reported of each row.
        entry: the entry of each leaf and model, -1 where there is none; None if no sums are taken.
        layout: how to read what a step reported; None if it reports nothing.
        gradients: the addresses of the gradients of entries that are updated; a view of the table of leaves.
        next_generation: names the next step, see `has_made`.
        pointed: how often addresses of gradients have been entered.
    """

    layout: Layout | None = None

    def __init__(
        self, entries: Entries, rows: Rows, staged: Staged, advance: np.ndarray, grad_format: str, partial: bool
    ) -> None:
        self.entries, self.rows, self.staged, self.grad_format, self.partial = (
            entries,
            rows,
            staged,
            grad_format,
            partial,
        )
        self.leaves, self.tiles, self.updated_tiles = entries.leaves, entries.tiles, entries.updated_tiles
        self.left_out, self.advance = entries.left_out, advance
        self.gradients = self.leaves[: entries.updated, _GRADIENT]
        self.reports = np.zeros((len(rows), len(staged.reports)))
        self.entry: np.ndarray | None = None
        if staged.quantities:
            entry = np.full(rows.index.size, -1, np.int64)
            entry[entries.starts] = np.arange(entries.updated)
            self.entry = entry.reshape(rows.index.shape)
        self.next_generation = 1
        self.pointed = 0
        self._located: Any = None

    # Gradients

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
        entries = self.entries
        self.pointed += 1
        if flat:
            self.gradients[:] = addresses + entries.in_flat
        else:
            self.gradients[:] = np.asarray(addresses, np.int64)[entries.leaf] + entries.inside

    @abc.abstractmethod
    def expect(self, gradients: Any, given: list[Any], flat: bool) -> None:
        """Let `find` recognize gradients like these from now on.

        Args:
            gradients: knows what they must be.
            given: those of this step, each read where it is, None where there is none.
            flat: whether they are one array that holds all in order.
        """

    @abc.abstractmethod
    def find(self, given: list[Any]) -> bool:
        """Enter the addresses of gradients if all are like those expected; False if they are not."""

    # A step

    @abc.abstractmethod
    def run(self, kernel: Any, threads: int, stream: int | None = None) -> None:
        """Carry out the step.

        Args:
            kernel: the compiled rule.
            threads: how many may take part, on the CPU.
            stream: to step in, on a GPU; None: the caller's current one.
        """

    @abc.abstractmethod
    def has_made(self, generation: int) -> bool:
        """Whether the step of a generation was carried out."""

    @abc.abstractmethod
    def info(self, rates: Rates, grad_scale: Any) -> StepInfo:
        """What the step that was just made did."""

    # Steps of a part

    def number(self) -> int:
        """How many steps came before the one that this step is a part of; -1: a part of none yet.

        Steps of all parts are one step: a part begins a new step if one of its leaves has been in the last one.
        """
        clock, advance = self.rows.counters[:, CLOCK], self.advance[:-1]
        begins = COUNTING.begins(clock[:-1], advance[:, STEPS], advance[:, TICKS], clock[-1])
        return int(clock[-1]) - (not begins.any())

    def count_part(self, number: int) -> None:
        """Count this partial step as part of the step that comes after `number` others.

        Where only the GPU knows the counters, the kernel does this by itself.
        """
        if self.rows.host_knows:
            self.advance[-1, TICKS] = number + 1 - self.rows.counters[-1, CLOCK]


class HostPlan(Plan):
    """A step on the CPU's threads; arguments as for `Plan`.

    Attributes:
        tables: the arguments of a kernel before the generation.
        leaf_sums: the sums over each entry.
    """

    def __init__(
        self, entries: Entries, rows: Rows, staged: Staged, advance: np.ndarray, grad_format: str, partial: bool
    ) -> None:
        super().__init__(entries, rows, staged, advance, grad_format, partial)
        sizes = entries.itemsizes
        self._work = entries.elements * (sum(sizes) + sum(sizes[: 2 * len(staged.measures)]))  # bytes moved
        self.leaf_sums = np.zeros((len(self.leaves), staged.quantities))
        self._tables = (self.leaves, self.tiles, rows.table, rows.counters, rows.h)
        self._last_phase = len(staged.measures)
        self._finder: arrays.Finder | None = None
        self._threads = self._sharing = 0
        average = entries.elements / max(1, len(self.tiles))
        self._chunk = max(1, int(BLOCK // max(1.0, average)))
        self._make_sums()

    def _make_sums(self) -> None:
        """What the kernel finds by the control block: counters, reports, and room for sums."""
        rows, staged, entries = self.rows, self.staged, self.entries
        count = len(rows)
        further: dict[int, np.ndarray] = {
            cpu.ADVANCE: self.advance,
            cpu.SCALARS: rows.scalars,
            cpu.NEW_SCALARS: np.zeros_like(rows.scalars),
            cpu.SUMS: np.zeros((count, len(staged.sums))),
            cpu.REPORTS: self.reports,
            cpu.LEAF_SUMS: self.leaf_sums,
        }
        self._cell_counts = [0, 0]
        if staged.quantities:
            size = len(self.leaves)
            members, bounds = np.zeros((2, size), np.int64), np.zeros((2, size + 1), np.int64)
            cells = np.full((2, count), -1, np.int64)
            for k, scope in enumerate(Scope.both(entries, rows)):
                members[k, : entries.updated] = scope.entries
                bounds[k, 1 : len(scope.counts) + 1] = np.cumsum(scope.counts)
                cells[k] = scope.cells
                self._cell_counts[k] = len(scope.counts)
            first = np.full(size + 1, self.updated_tiles)
            first[: entries.updated] = np.cumsum(entries.tiles_of) - entries.tiles_of
            further[cpu.PARTIALS] = np.zeros((len(self.tiles) + 1, staged.quantities))
            further[cpu.WORK], further[cpu.FIRST] = np.zeros(size + 1), first
            further[cpu.MEMBERS], further[cpu.BOUNDS], further[cpu.CELLS] = members, bounds, cells
        self._further = further

    def expect(self, gradients: Gradients, given: list[Any], flat: bool) -> None:
        """As `Plan.expect`."""
        entries = self.entries
        inside = entries.in_flat if flat else entries.inside
        source = np.zeros_like(entries.leaf) if flat else entries.leaf
        self._finder = gradients.finder(given, flat, source, inside, self.gradients)

    def find(self, given: list[Any]) -> bool:
        """As `Plan.find`."""
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
                helpers.ask(missing, kernel.help_with(*self.tables, generation))
        kernel.run(*self.tables, generation)

    def has_made(self, generation: int) -> bool:
        """As `Plan.has_made`."""
        return self._threads > 0 and int(self._control[CLOSED]) == generation + self._last_phase

    def info(self, rates: Rates, grad_scale: Any) -> StepInfo:
        """As `Plan.info`."""
        steps: int = self.rows.counters.item(-1, CLOCK)
        if self.layout is None:
            return StepInfo(steps, rates)
        return StepInfo(steps, rates, self.layout, self.reports.copy(), self.leaf_sums.copy(), grad_scale)

    def _make_control(self, threads: int) -> None:
        """A new control block; helpers that still know the old one will find nothing to do."""
        self._sharing = max(1, min(threads, cpu.MOST_THREADS, len(self.tiles)))
        size = NEXT + self._sharing * LINE
        control = np.zeros(size + LINE, np.int64)
        skip = -(control.ctypes.data // 8) % LINE
        self._control = control[skip : skip + size]
        self._control[CHUNK], self._control[SHARES] = self._chunk, self._sharing
        for slot, array in self._further.items():
            self._control[slot] = checks.address(array)
        self._control[cpu.CELL_COUNTS : cpu.CELL_COUNTS + 2] = self._cell_counts
        self._control[cpu.PAST] = self._work > _WORTH_STREAMING
        self._control[cpu.UPDATED] = self.updated_tiles
        self.tables = (*self._tables, self._control)
        self._threads = threads
