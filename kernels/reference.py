"""The same step carried out by NumPy on whole tiles: the reference that every compiled sweep must equal bit for bit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import counting, cpu, functions, sums
from .atomic import commit
from .cpu import Kernel
from .layout import ADVANCES, CLOCK, COUNT, FIRST_ADDRESS, GO, LEAF, ROW, SHARED, SKIPPED, START, TICKS, T
from .memory import view
from .primitives import SCOPES
from .staging import Staged, define
from .storage import Storage, accessors, averages

_fold: Callable[..., None] = sums.fold


class _Tables:
    """The tables of a plan beyond the arguments of a kernel, by their places in the control block."""

    def __init__(self, staged: Staged, control: np.ndarray, entries: int, rows: int, tiles: int) -> None:
        def array(place: int, kind: str, *shape: int) -> np.ndarray:
            count = int(np.prod(shape))
            return view(int(control[place]), count, kind).reshape(shape) if count else np.zeros(shape, kind)

        quantities = staged.quantities
        self.advance = array(cpu.ADVANCE, "int64", rows + 1, ADVANCES)
        self.steps, self.ticks, self.aside = self.advance[:-1].T
        self.scalars = array(cpu.SCALARS, "float64", rows, len(staged.scalars))
        self.sums = array(cpu.SUMS, "float64", rows, len(staged.sums))
        self.reports = array(cpu.REPORTS, "float64", rows, len(staged.reports))
        self.partials = array(cpu.PARTIALS, "float64", tiles, quantities)
        self.leaf_sums = array(cpu.LEAF_SUMS, "float64", entries, quantities)
        self.first = array(cpu.FIRST, "int64", entries + 1)
        self.members = array(cpu.MEMBERS, "int64", 2, entries)
        self.bounds = array(cpu.BOUNDS, "int64", 2, entries + 1)
        self.cells = array(cpu.CELLS, "int64", 2, rows)
        self.cell_counts = control[cpu.CELL_COUNTS : cpu.CELL_COUNTS + 2]


def _folded(values: np.ndarray) -> float:
    column = values.reshape(-1, 1).copy()
    _fold(column, 0, len(column), 0)
    return float(column[0, 0]) if len(column) else 0.0


def build(staged: Staged, storage: Storage) -> Kernel:
    """A step with the arguments of `kernels.cpu`, without compiling anything."""
    began = time.perf_counter()
    decide = define(staged.decide, "decide", functions.for_float64(staged.decide.calls))
    update = define(staged.update, "update", functions.for_arrays(staged.update.calls))
    measures = [define(m.source, "measure", functions.for_arrays(m.source.calls)) for m in staged.measures]
    average = None
    if staged.average is not None:
        average = define(staged.average, "average", functions.for_arrays(staged.average.calls))
    convert: dict[str, Callable[..., Any]] = accessors(storage, np.where)
    columns, states = storage.columns(staged), len(staged.states)
    uniforms, slots, scalars = len(staged.uniforms), staged.slots, len(staged.scalars)
    kinds = staged.kinds
    tally = counting.make(np.where, staged.may_skip, staged.asides)
    flags = np.array([SHARED.get(scope, 0) for scope in staged.shared], np.int64)

    def load(leaf: np.ndarray, tile: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The columns of a tile as they stand in memory, and what `update` reads of them."""
        part = slice(tile[START], tile[START] + tile[COUNT])
        stored = [view(int(a), part.stop, kind)[part] for a, kind in zip(leaf[FIRST_ADDRESS:], columns, strict=True)]
        read = stored[: 2 + states + len(staged.inputs)]
        if "decode_g" in convert:
            read = [read[0], convert["decode_g"](read[1]).astype(storage.compute), *read[2:]]
        return stored, read

    def block(x: Any, kind: str, size: int) -> Any:
        wide = np.broadcast_to(np.asarray(x, np.float64), size)
        return sums.block(wide * wide if kind == "norm" else wide)

    def decide_rows(table: np.ndarray, counters: np.ndarray, h: np.ndarray, tables: _Tables) -> np.ndarray:
        new = tables.scalars.copy()
        for r in np.flatnonzero(tally.decides(tables.steps, tables.ticks, tables.aside)):
            values = decide(int(counters[r, T]) + 1, *table[r, :uniforms], *tables.scalars[r], *tables.sums[r])
            h[r], new[r] = values[:slots], values[slots : slots + scalars]
            tables.reports[r] = values[slots + scalars :]
        return new

    def add_up(leaves: np.ndarray, tables: _Tables, quantities: range) -> None:
        for e, (a, b) in enumerate(zip(tables.first[:-1], tables.first[1:], strict=True)):
            for q in quantities:
                tables.leaf_sums[e, q] = _folded(tables.partials[a:b, q])
        for s, (q, scope) in enumerate(staged.sums):
            if q not in quantities:
                continue
            which = SCOPES.index(scope) - 1
            finish = np.sqrt if kinds[q] == "norm" else np.positive
            if which < 0:
                tables.sums[leaves[:, ROW], s] = finish(tables.leaf_sums[:, q])
                continue
            bounds = tables.bounds[which, : tables.cell_counts[which] + 1]
            for c, (a, b) in enumerate(itertools.pairwise(bounds)):
                members = tables.members[which, a:b]
                tables.sums[tables.cells[which] == c, s] = finish(_folded(tables.leaf_sums[members, q]))

    def run(
        leaves: np.ndarray,
        tiles: np.ndarray,
        table: np.ndarray,
        counters: np.ndarray,
        h: np.ndarray,
        control: np.ndarray,
        generation: int,
    ) -> None:
        tables = _Tables(staged, control, len(leaves), len(h), len(tiles))
        updated, others = np.split(tiles, [control[cpu.UPDATED]])
        with np.errstate(all="ignore"):
            new_scalars = decide_rows(table, counters, h, tables)
            first = 0
            for measure, described in zip(measures, staged.measures, strict=True):
                quantities = range(first, first + len(described.kinds))
                for k, tile in enumerate(updated):
                    leaf = leaves[tile[LEAF]]
                    values = measure(*load(leaf, tile)[1], tuple(h[leaf[ROW]]))
                    for q, x in zip(quantities, values, strict=True):
                        tables.partials[k, q] = block(x, kinds[q], tile[COUNT])
                add_up(leaves, tables, quantities)
                new_scalars = decide_rows(table, counters, h, tables)
                first = quantities.stop
            go = np.ones(len(h), np.int64)
            if staged.may_skip:
                go = np.not_equal(tables.reports[:, staged.reports.index("finite")], 0.0).astype(np.int64)
            writes: list[tuple[Any, Any, Any]] = []  # as compiled steps, all or none
            for k, tile in enumerate(updated):
                leaf = leaves[tile[LEAF]]
                stored, read = load(leaf, tile)
                if go[leaf[ROW]]:
                    results = update(*read, tuple(h[leaf[ROW]]))
                    emitted = results[1 + states :]
                    for q, x in enumerate(emitted, first):
                        tables.partials[k, q] = block(x, "norm", tile[COUNT])
                    written = zip((stored[0], *stored[2:]), results[: 1 + states], strict=False)
                    writes += [(column, ..., np.array(result, column.dtype)) for column, result in written]
                    if storage.shadow:
                        narrow = convert.get("narrow", np.asarray)
                        new = np.asarray(results[0], stored[0].dtype)
                        writes.append((stored[-1], ..., convert["encode_shadow"](narrow(new))))
                if storage.clear:
                    writes.append((stored[1], ..., 0))
            for tile in others:
                leaf = leaves[tile[LEAF]]
                stored, read = load(leaf, tile)
                if average is not None and go[leaf[ROW]]:
                    results = average(*read, tuple(h[leaf[ROW]]))
                    writes += [(stored[k], ..., x) for k, x in zip(averages(staged), results, strict=True)]
            if staged.emitted:
                add_up(leaves, tables, range(first, first + len(staged.emitted)))
        steps, ticks, aside = tables.steps, tables.ticks, tables.aside
        gain = tables.advance[-1, TICKS]
        now = counters[-1, CLOCK] + gain
        going, counted = tally.goes(ticks, aside, go), counters.copy()
        counted[:-1, GO] = go
        t, clock = counters[:-1, T], counters[:-1, CLOCK]
        counted[:-1, T], counted[:-1, CLOCK] = tally.counted(t, clock, steps * going, ticks * going, now)
        counted[:-1, SKIPPED] = tally.skips(counters[:-1, SKIPPED], steps, going)
        counted[-1, CLOCK] = tally.total(counters[-1, CLOCK], gain, steps.sum(), (steps * going).sum())
        scalars_of = tally.keeps(steps[:, None], aside[:, None], going[:, None], flags)
        writes += [(tables.scalars, scalars_of, new_scalars[scalars_of]), (counters, ..., counted)]
        commit([*writes, (control, cpu.CLOSED, generation + len(measures))])

    return Kernel(run, time.perf_counter() - began, cached=False, takes_helpers=False)
