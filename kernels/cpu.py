"""A step on CPU threads: `decide` once per row, `measure` and `update` over the tiles of a plan.

One compiled function carries out a whole step, counters included, so that a step is either not begun or complete when
Python next looks (a KeyboardInterrupt waits for it). It takes the tables of a plan and never names an optimizer.

A step goes in phases: each measure, then the update. In each, the tiles are cut into a share for each thread and
handed out by atomic counters, to the calling thread and to any helper that has come in meanwhile
(`helpers`); whoever is done with one share goes on with the others. Nobody waits for a helper that has not
come, so a core that is busy with something else costs only its share. Between phases the calling thread adds up what
was measured and decides. Which thread does which tile does not show in the result.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from . import counting, sums
from .caching import KernelCache
from .element import staged_function
from .layout import ADVANCES, ASIDE, CLOCK, COUNT, FIRST_ADDRESS, GO, LEAF, ROW, SHARED, SKIPPED, START, STEPS, TICKS, T
from .memory import atomic_load, atomic_store, elements, fetch_add, get, pause, row, sched_yield, table, where
from .primitives import SCOPES
from .staging import Staged
from .storage import Storage, zero_of
from .tiles import Compiler, average_loop, compiled, digest_of, measure_loop, update_loop

# Places in the control block, in int64s: each that threads write has a cache line of its own. The phase is written
# before the step is opened and read after that. In the fourth line, addresses and sizes of a plan's further tables.
# From NEXT on, one counter for each share of the tiles.
HELPERS, OPENED, PHASE, CLOSED, WAITING, ARRIVED, CHUNK, SHARES = 0, 8, 9, 16, 24, 32, 40, 41
ADVANCE, SCALARS, NEW_SCALARS, SUMS, REPORTS, PARTIALS, LEAF_SUMS, WORK, FIRST, MEMBERS, BOUNDS, CELLS = range(42, 54)
CELL_COUNTS, PAST, NEXT = 54, 56, 64  # two counts: cells of scope "group", of scope "all"; see `update_loop`
UPDATED = 57  # how many tiles are of leaves that are updated; the others are only averaged
LINE = 8
MOST_THREADS = 256  # that take part in a step; more of them would not move memory faster

# How often a helper looks for the next step before it goes to sleep. Once it has been asked in, the step is about to
# begin: the call that woke it can take the caller 70 us (virtual machine, an idle core). After a step, some 50 us, so
# that steps one after the other find it awake and a matrix product that follows is hardly disturbed.
_ASKED, _PATIENCE = 50_000, 5_000


@dataclass(frozen=True)
class Kernel:
    """A compiled step.

    Attributes:
        run: `run(leaves, tiles, table, counters, h, control, generation)`.
        compile_s: seconds spent compiling or loading it.
        cached: whether it came from disk.
        takes_helpers: whether other threads may take part.
    """

    run: Callable[..., None]
    compile_s: float
    cached: bool
    takes_helpers: bool

    def help_with(self, *step: Any) -> Callable[[], None]:
        """What a helper calls to take part in a step; arguments as for `run`."""
        *tables, generation = step
        return functools.partial(self.run, *tables, -generation)  # one function, so that the loops are compiled once


def _loop(staged: Staged, storage: Storage, digest: str) -> Any:
    """`loop(phase, addresses, h, start, stop, out, past)`: the loop of a phase over one tile."""
    update = update_loop(staged, storage)

    def loop(phase: int, addresses: Any, h: Any, start: int, stop: int, out: int, past: int) -> None:
        update(addresses, h, start, stop, out, past)

    loop = compiled(loop, digest, inline=True)
    for k in reversed(range(len(staged.measures))):
        loop = compiled(_chosen(k, measure_loop(staged, k, storage), loop), digest, inline=True)
    return loop


def _chosen(number: int, measure: Any, later: Any) -> Callable[..., None]:
    """The loop of the measure of a number in its phase, that of `later` in others."""

    def loop(phase: int, addresses: Any, h: Any, start: int, stop: int, out: int, past: int) -> None:
        if phase == number:
            measure(addresses, h, start, stop, out, past)
        else:
            later(phase, addresses, h, start, stop, out, past)

    return loop


def _sweep(staged: Staged, storage: Storage, digest: str) -> Any:
    """Take tiles and run the loop of a phase over each."""
    columns, slots, quantities = len(storage.columns(staged)), staged.slots, staged.quantities
    addresses_at, slots_at, setting_at = row("int64", columns), row(storage.compute, slots), get("int64")
    size = np.dtype(storage.compute).itemsize
    last, may_skip, clears = len(staged.measures), staged.may_skip, storage.clear
    averages = bool(staged.average)
    average: Any = average_loop(staged, storage) if averages else None
    starts = staged.spans
    _, store_g = elements(storage.columns(staged), [], [1])
    zero = (zero_of(staged, storage),)
    loop = _loop(staged, storage, digest)

    def take_tiles(
        phase: int,
        leaves: Any,
        tiles: Any,
        counters: Any,
        h: Any,
        base: int,
        partials: int,
        chunk: int,
        shares: int,
        mine: int,
    ) -> None:
        past = setting_at(base, PAST)
        updated = setting_at(base, UPDATED) if averages else len(tiles)
        many = updated if phase < last else len(tiles)
        for k in range(shares):  # first one's own share, which this core may still have in its cache, then the others'
            share = (mine + k) % shares
            begin, end = many * share // shares, many * (share + 1) // shares
            while True:
                taken = begin + fetch_add(base + 8 * (NEXT + share * LINE), chunk)
                if taken >= end:
                    break
                for place in range(taken, min(taken + chunk, end)):
                    # What was measured last is updated first: it may still be in a cache.
                    tile_index = begin + end - 1 - place if last > 0 and phase == last else place
                    leaf, start, count = tiles[tile_index, LEAF], tiles[tile_index, START], tiles[tile_index, COUNT]
                    r = leaves[leaf, ROW]
                    addresses = addresses_at(np.int64(leaves.ctypes.data) + (leaf * (columns + 1) + FIRST_ADDRESS) * 8)
                    if may_skip and phase == last and counters[r, GO] == 0:
                        if clears and tile_index < updated:
                            for i in range(start, start + count):
                                store_g(addresses, i, zero)
                        continue
                    values = slots_at(np.int64(h.ctypes.data) + r * slots * size)
                    if averages and tile_index >= updated:
                        average(addresses, values, start, start + count)
                        continue
                    out = partials + (tile_index * quantities + starts[phase]) * 8
                    loop(phase, addresses, values, start, start + count, out, past)

    return compiled(take_tiles, digest)


def _counting(staged: Staged) -> counting.Counting:
    return counting.make(where, staged.may_skip, staged.asides)


def _decision(staged: Staged, digest: str) -> Any:
    """`decide` for every row in the step, and for others whose clock or shared state depends on it."""
    decides = compiled(_counting(staged).decides, digest, inline=True)
    decide = staged_function(Compiler(digest, inline=False), staged.decide, "decide")
    uniforms, scalars, added = len(staged.uniforms), len(staged.scalars), len(staged.sums)
    slots, reports = staged.slots, len(staged.reports)
    uniforms_at, scalars_at, sums_at = (row("float64", n) for n in (uniforms, scalars, added))
    integers, floats = table("int64"), table("float64")

    def decide_rows(settings: Any, counters: Any, h: Any, control: Any) -> None:
        rows = len(h)
        advance = integers(control[ADVANCE], rows + 1, ADVANCES)
        new_scalars = floats(control[NEW_SCALARS], rows, scalars)
        report = floats(control[REPORTS], rows, reports)
        for r in range(rows):
            if decides(advance[r, STEPS], advance[r, TICKS], advance[r, ASIDE]):
                values = decide(
                    counters[r, T] + 1,
                    *uniforms_at(np.int64(settings.ctypes.data) + r * uniforms * 8),
                    *scalars_at(control[SCALARS] + r * scalars * 8),
                    *sums_at(control[SUMS] + r * added * 8),
                )
                for k in range(slots):
                    h[r, k] = values[k]
                for k in range(scalars):
                    new_scalars[r, k] = values[slots + k]
                for k in range(reports):
                    report[r, k] = values[slots + scalars + k]

    return compiled(decide_rows, digest)


def _addition(staged: Staged, digest: str) -> Any:
    """Add up the blocks of some quantities: leaf by leaf, then over the scopes that `decide` asks for."""
    every, added = staged.quantities, len(staged.sums)
    fold = compiled(sums.fold, digest)
    integers, floats = table("int64"), table("float64")
    asked = staged.sums or ((0, SCOPES[0]),)
    sources, scopes = tuple(q for q, _ in asked), tuple(SCOPES.index(scope) for _, scope in asked)
    roots = tuple(staged.kinds[q] == "norm" for q in sources)
    only = np.int64(0)  # as a literal it would be a type of its own, and `fold` be compiled twice

    def add_up(leaves: Any, tiles: Any, h: Any, control: Any, low: int, high: int) -> None:
        entries, rows = len(leaves), len(h)
        partials = floats(control[PARTIALS], len(tiles) + 1, every)
        leaf_sums = floats(control[LEAF_SUMS], entries, every)
        first = integers(control[FIRST], entries + 1, 1)
        for e in range(entries):
            for q in range(low, high):
                fold(partials, first[e, 0], first[e + 1, 0] - first[e, 0], q)
                leaf_sums[e, q] = partials[first[e, 0], q]
        results = floats(control[SUMS], rows, added)
        work = floats(control[WORK], entries + 1, 1)
        for s in range(added):
            q, scope, root = sources[s], scopes[s], roots[s]
            if q < low or q >= high:
                continue
            if scope == 0:
                for e in range(entries):
                    value = leaf_sums[e, q]
                    results[leaves[e, ROW], s] = math.sqrt(value) if root else value
                continue
            cells = control[CELL_COUNTS + scope - 1]
            members = integers(control[MEMBERS] + (scope - 1) * entries * 8, entries, 1)
            bounds = integers(control[BOUNDS] + (scope - 1) * (entries + 1) * 8, cells + 1, 1)
            cell_of_row = integers(control[CELLS] + (scope - 1) * rows * 8, rows, 1)
            for c in range(cells):
                begin, count = bounds[c, 0], bounds[c + 1, 0] - bounds[c, 0]
                for k in range(count):
                    work[begin + k, 0] = leaf_sums[members[begin + k, 0], q]
                fold(work, begin, count, only)
            for r in range(rows):
                if cell_of_row[r, 0] >= 0:
                    value = work[bounds[cell_of_row[r, 0], 0], 0]
                    results[r, s] = math.sqrt(value) if root else value

    return compiled(add_up, digest)


def _commit(staged: Staged, digest: str) -> Any:
    """Advance the counters and scalar state of the rows that were updated."""
    scalars = len(staged.scalars)
    _, goes, counted, skips, keeps, total, _ = _counting(staged).mapped(lambda f: compiled(f, digest, inline=True))
    flags = (*(SHARED.get(scope, 0) for scope in staged.shared), 0)
    integers, floats = table("int64"), table("float64")

    def commit(counters: Any, control: Any) -> None:
        rows = len(counters) - 1
        advance = integers(control[ADVANCE], rows + 1, ADVANCES)
        old, new = floats(control[SCALARS], rows, scalars), floats(control[NEW_SCALARS], rows, scalars)
        stepping = going = 0
        gain = advance[rows, TICKS]
        now = counters[rows, CLOCK] + gain  # the same for all rows, however long one was left out
        for r in range(rows):
            steps, ticks, aside = advance[r, STEPS], advance[r, TICKS], advance[r, ASIDE]
            go = goes(ticks, aside, counters[r, GO])
            t, clock = counters[r, T], counters[r, CLOCK]
            counters[r, T], counters[r, CLOCK] = counted(t, clock, steps * go, ticks * go, now)
            counters[r, SKIPPED] = skips(counters[r, SKIPPED], steps, go)
            for k in range(scalars):
                if keeps(steps, aside, go, flags[k]):
                    old[r, k] = new[r, k]
            stepping += steps
            going += steps * go
        counters[rows, CLOCK] = total(counters[rows, CLOCK], gain, stepping, going)

    return compiled(commit, digest)


def build(staged: Staged, storage: Storage) -> Kernel:
    """Compile a staged rule for one storage, or load it from disk."""
    began = time.perf_counter()
    digest = digest_of(staged, storage)
    measures, quantities = len(staged.measures), staged.quantities
    sweep = _sweep(staged, storage, digest)
    decide_rows, commit = _decision(staged, digest), _commit(staged, digest)
    bounds = staged.spans
    add_up: Any = _addition(staged, digest) if quantities else None
    finite = staged.reports.index("finite") if staged.may_skip else -1
    reports = len(staged.reports)
    floats = table("float64")
    own = np.int64(0)  # the share of the calling thread; a literal would be a type of its own, and compile all twice

    def step(leaves: Any, tiles: Any, settings: Any, counters: Any, h: Any, control: Any, generation: int) -> None:
        base = np.int64(control.ctypes.data)
        if generation > 0:
            decide_rows(settings, counters, h, control)
            for phase in range(measures + 1):
                if finite >= 0 and phase == measures:
                    report = floats(control[REPORTS], len(h), reports)
                    for r in range(len(h)):
                        counters[r, GO] = np.int64(report[r, finite] != 0.0)
                for share in range(control[SHARES]):
                    control[NEXT + share * LINE] = 0
                control[ARRIVED] = 0
                control[PHASE] = phase
                atomic_store(base + 8 * OPENED, generation + phase)
                sweep(phase, leaves, tiles, counters, h, base, control[PARTIALS], control[CHUNK], control[SHARES], own)
                atomic_store(base + 8 * CLOSED, generation + phase)
                spins = 0
                while atomic_load(base + 8 * HELPERS) != 0:
                    pause()
                    spins += 1
                    if spins % _PATIENCE == 0:
                        sched_yield()
                if quantities > 0:
                    add_up(leaves, tiles, h, control, bounds[phase], bounds[phase + 1])
                if phase < measures:
                    decide_rows(settings, counters, h, control)
            commit(counters, control)
            return
        wanted, patience = -generation, _ASKED  # a helper, see `Kernel.help_with`
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
                phase = control[PHASE]
                sweep(phase, leaves, tiles, counters, h, base, control[PARTIALS], control[CHUNK], control[SHARES], mine)
            fetch_add(base + 8 * HELPERS, -1)
            wanted, patience = wanted + 1, _PATIENCE

    integers_2d, floats_2d = types.Array(types.int64, 2, "C"), types.Array(types.float64, 2, "C")
    compute = types.Array(getattr(types, storage.compute), 2, "C")
    control_kind = types.Array(types.int64, 1, "C")
    signature = types.void(integers_2d, integers_2d, floats_2d, integers_2d, compute, control_kind, types.int64)
    dispatcher = compiled(step, digest)
    cache = KernelCache(staged.name, staged, storage)
    cache.compile(dispatcher, signature)
    return Kernel(dispatcher, time.perf_counter() - began, cache.hit, takes_helpers=True)
