"""The kernels of a step on many threads, written once for every target.

The kernels of a step, in the order of their launches:

    finish                  `decide`, if a measure needs what it returns
    measure 0, finish, ...  each reading pass: sums over tiles, then over leaves and scopes, then `decide`
    update, or update_few   the rule, on pieces of tiles; `update_few` takes what `decide` returned by value
    average, average_few    likewise, on pieces of leaves that are not updated, if averages are kept
    finish                  sums of what the update emitted, if it emits anything

A kernel is a function of its block's number and of addresses; what its threads do stands in phases
`phase(thread, ...)`, between which all threads of a block wait for each other (`Target.each`). So the same text runs on
a GPU (`kernels.cuda`) and, thread after thread, on a processor (`kernels.emulation`), with the same bits. What one
thread does with its elements is in `kernels.walk`, the kernel that finishes a pass in `kernels.finish`, and what
kernels are made of in `kernels.target`.

Sums have the shape of `kernels.sums`: a thread owns `width` neighboring lanes of a tile and goes down its rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from .layout import COUNTERS, FIRST_ADDRESS, GO
from .staging import Staged, define
from .storage import Storage, zero_of
from .sums import BLOCK, LANES
from .target import Body, Target, Tuning, width_of
from .walk import Work, average_work, measure_work, shift_of, update_work, walk_of

__all__ = ["Body", "Target", "Tuning", "average", "measure", "piece_size", "tiles_in_block", "update", "width_of"]

# Places in the board of a step, in int64s: addresses of its tables, and their sizes.
(
    SETTINGS,  # (rows, uniforms and the numbers of formulas) float64
    COUNTS,  # (rows + 1, COUNTERS) int64, the last of the optimizer itself
    H,  # (rows, slots)
    ADVANCE,  # (rows + 1, ADVANCES) int64; in the last row: whether it is a step of a part, what its clock gains
    SCALARS,  # (rows, scalars) float64
    REPORTS,  # (rows, reports) float64
    CELLS,  # (tiles and what they add up to, quantities) float64
    PROGRAM,  # (additions, 3) int64: cells[a] = cells[b] + cells[c], or a copy if c is -1
    LEVELS,  # (levels + 1,) int64: where in the program each level begins; within one, additions are independent
    LEVEL_COUNT,
    ROOTS,  # (rows, scopes) int64: the cell with the sum over a row's leaf, group and model, or -1
    ROWS,
    FLAGS,  # 3 int64, zero between steps: a row went, a row was to go, a row's clock was at the optimizer's
    LOSS,  # (3, models) float64: loss scale, good steps in a row, scale of the last step; 0 if there is no loss scale
    LOSS_RULE,  # 4 float64: growth, backoff, interval, smallest scale
    FIRST_ROWS,  # (models,) int64: a row of each model that is in the step, or -1
    MODELS_OF_ROWS,  # (rows,) int64
    MODELS,
) = range(18)
BOARD = 18

# What `finish` is asked to do.
ADD, DECIDE, COMMIT = 1, 2, 4

# A row of the tables of tiles and of pieces: leaf, start, count, and the row of its counters, which the leaf has too:
# so a thread asks for the leaf and for what belongs to the row at the same time.
WORK = 4

# Registers that a thread may need for what it has loaded and what `decide` returned, if it is to keep the latter for
# itself. See `tests/sass.py`.
_FOR_ALL = 28
MEASURE_THREADS = 128  # of a block in kernels that take sums over tiles


def tiles_in_block(staged: Staged, storage: Storage) -> int:
    """How many tiles a block of a kernel takes that takes sums over them."""
    return MEASURE_THREADS * width_of(storage.columns(staged)) // LANES


def piece_size(staged: Staged, storage: Storage, tuning: Tuning) -> int:
    """How many elements a block of the update takes."""
    return min(BLOCK, tuning.threads * tuning.vectors * width_of(storage.columns(staged)))


def measure(target: Target, staged: Staged, storage: Storage, number: int, tuning: Tuning) -> Body:
    """A reading pass: the sums over each tile of what it measures."""
    work = measure_work(target, staged, storage, number)
    first, needed = staged.spans[number], staged.measures[number].source.reads_slots
    return _sum_kernel(target, f"measure_{number}", staged, storage, work, first, False, needed, tuning)


def update(target: Target, staged: Staged, storage: Storage, tuning: Tuning, by_value: bool) -> Body:
    """The kernel that carries the rule over pieces, or over tiles if it emits sums.

    `(leaves, tiles, count, h, counts, cells)`; by value, for a step with a single row and no sums,
    `(leaves, tiles, count, *slots)`.
    """
    work, may_skip = update_work(target, staged, storage), staged.may_skip
    if staged.emitted:
        first = staged.spans[-2]
        return _sum_kernel(target, "update", staged, storage, work, first, may_skip, True, tuning)
    clear = _clear(target, staged, storage)
    return _piece_kernel(target, "update", staged, storage, work, may_skip, clear, tuning, by_value)


def average(target: Target, staged: Staged, storage: Storage, tuning: Tuning, by_value: bool) -> Body:
    """The kernel that averages leaves which are not updated; arguments as those of an update that emits no sums."""
    work, may_skip = average_work(target, staged, storage), staged.may_skip
    return _piece_kernel(target, "average", staged, storage, work, may_skip, _leave(target), tuning, by_value)


def _sum_kernel(
    target: Target,
    name: str,
    staged: Staged,
    storage: Storage,
    work: Work,
    first_quantity: int,
    may_skip: bool,
    needed: bool,
    tuning: Tuning,
) -> Body:
    """A kernel `(leaves, tiles, count, h, counts, cells)` that takes sums over tiles, and may store as well.

    `LANES / width` threads share a tile; a block has several tiles.
    """
    formats, width, quantities = storage.columns(staged), width_of(storage.columns(staged)), staged.quantities
    several, sums = LANES // width, len(work.kinds)
    tiles_in_block = MEASURE_THREADS // several
    room_of_tile = LANES * sums
    vectors = 1 if work.written else max(1, tuning.read_ahead // (2 * len(work.read) - 1))  # sums need registers too
    walk = walk_of(target, formats, work, LANES, vectors, target.function(_as_it_is), tuning)
    shift, clear = shift_of(target, formats), _clear(target, staged, storage)
    leaf_at, tile_at = target.row("int64", 1 + len(formats)), target.row("int64", WORK)
    leaf_bytes = 8 * (1 + len(formats))
    slots_at, go_at, put = _slots_at(target, staged, storage, needed), target.row("int64", 1), target.put("float64")
    slot_bytes = staged.slots * np.dtype(storage.compute).itemsize
    nothing = (np.float64(0.0),) * (width * sums)

    def keep(room: Any, base: int, slot: int, s: int, acc: Any) -> None:
        for k in range(width):
            lane = (slot * width + k - s) & (LANES - 1)
            for q in range(sums):
                room[base + q * LANES + lane] = acc[k * sums + q]

    keep = target.function(keep)

    def add(thread: int, block: int, leaves: int, tiles: int, count: int, h: int, counts: int, room: Any) -> None:
        tile = block * tiles_in_block + thread // several
        slot = thread % several
        acc, s = nothing, 0
        if tile < count:
            leaf, start, size, r = tile_at(tiles + tile * WORK * 8)
            values = slots_at(h + r * slot_bytes)
            go = 1
            if may_skip:
                go = go_at(counts + (r * COUNTERS + GO) * 8)[0]
            addresses = leaf_at(leaves + leaf * leaf_bytes)[FIRST_ADDRESS:]
            found = shift(addresses, start)
            s = found if found > 0 else 0
            if go != 0:
                acc = walk(addresses, values, start, start + size, found, start - s + slot * width, acc)
            else:
                clear(addresses, start, start + size, slot, several)
        keep(room, (thread // several) * room_of_tile, slot, s, acc)

    def halve(thread: int, half: int, room: Any) -> None:
        base, lane = (thread // several) * room_of_tile, thread % several
        while lane < half:
            for q in range(sums):
                at = base + q * LANES + lane
                room[at] = room[at] + room[at + half]
            lane += several

    def deliver(thread: int, block: int, count: int, cells: int, room: Any) -> None:
        tile = block * tiles_in_block + thread // several
        if thread % several == 0 and tile < count:
            for q in range(sums):
                put(
                    cells + (tile * quantities + first_quantity + q) * 8,
                    room[(thread // several) * room_of_tile + q * LANES],
                )

    each_add = target.each(target.function(add), 7, MEASURE_THREADS)
    each_halve = target.each(target.function(halve), 2, MEASURE_THREADS)
    each_deliver = target.each(target.function(deliver), 4, MEASURE_THREADS, wait=False)

    def run(block: int, room: Any, leaves: int, tiles: int, count: int, h: int, counts: int, cells: int) -> None:
        each_add(block, leaves, tiles, count, h, counts, room)
        half = LANES // 2
        while half > 0:
            each_halve(half, room)
            half = half // 2
        each_deliver(block, count, cells, room)

    return Body(name, run, (types.int64,) * 6, MEASURE_THREADS, tiles_in_block * room_of_tile)


def _slots_at(target: Target, staged: Staged, storage: Storage, needed: bool) -> Any:
    """`slots_at(address)`: what `decide` returned for a row; zeros where nobody needs it."""
    if needed:
        return target.row(storage.compute, staged.slots, early=True)
    zeros = (np.dtype(storage.compute).type(0),) * staged.slots

    def nothing(address: int) -> Any:
        return zeros

    return target.function(nothing)


def _leave(target: Target) -> Any:
    """As `_clear`, of a kernel that has no gradients to set to zero."""

    def leave(addresses: Any, start: int, stop: int, mine: int, step: int) -> None:
        pass

    return target.function(leave)


def _clear(target: Target, staged: Staged, storage: Storage) -> Any:
    """`clear(addresses, start, stop, mine, step)`: zeros for every `step`-th gradient, in a step that is skipped."""
    if not storage.clear:
        return _leave(target)
    _, store = target.elements(storage.columns(staged), [], [1])
    zero = (zero_of(staged, storage),)

    def clear(addresses: Any, start: int, stop: int, mine: int, step: int) -> None:
        i = start + mine
        while i < stop:
            store(addresses, i, zero)
            i += step

    return target.function(clear)


def _as_it_is(x: Any) -> Any:
    return x


def _piece_kernel(
    target: Target,
    name: str,
    staged: Staged,
    storage: Storage,
    work: Work,
    may_skip: bool,
    clear: Any,
    tuning: Tuning,
    by_value: bool,
) -> Body:
    """A kernel over pieces, arguments as for `update`; `clear` is called for a piece of a step that is skipped."""
    formats, width, threads = storage.columns(staged), width_of(storage.columns(staged)), tuning.threads
    row_at, as_it_is = _slots_at(target, staged, storage, True), target.function(_as_it_is)
    # Asked for together with the elements, what `decide` returned costs no time, but a register each in every thread;
    # asked for before, it is shared by the threads of a warp.
    held = sum(np.dtype(formats[k]).itemsize for k in work.read) * width * tuning.vectors // 4
    late = not by_value and held + staged.slots * np.dtype(storage.compute).itemsize // 4 <= _FOR_ALL
    late_slots, early_slots = (row_at, as_it_is) if late else (as_it_is, row_at)
    walk = walk_of(target, formats, work, threads * width, tuning.vectors, late_slots, tuning)
    shift = shift_of(target, formats)
    leaf_at, tile_at = target.row("int64", 1 + len(formats)), target.row("int64", WORK)
    leaf_bytes = 8 * (1 + len(formats))
    go_at = target.row("int64", 1)
    slot_bytes = staged.slots * np.dtype(storage.compute).itemsize

    def piece(thread: int, block: int, leaves: int, tiles: int, h: int, counts: int, values: Any) -> None:
        leaf, start, size, r = tile_at(tiles + block * WORK * 8)
        slots = values if by_value else early_slots(h + r * slot_bytes)
        go = 1
        if may_skip:
            go = go_at(counts + (r * COUNTERS + GO) * 8)[0]
        addresses = leaf_at(leaves + leaf * leaf_bytes)[FIRST_ADDRESS:]
        s = shift(addresses, start)
        if go != 0:
            begin = start - s if s > 0 else start
            walk(addresses, slots, start, start + size, s, begin + thread * width, 0)
        else:
            clear(addresses, start, start + size, thread, threads)

    each = target.each(target.function(piece), 6, threads, wait=False)
    if by_value:
        slots = ", ".join(f"h{k}" for k in range(staged.slots))
        text = f"def run(block, room, leaves, tiles, count, {slots}):\n    each(block, leaves, tiles, 0, 0, ({slots},))"
        number = getattr(types, storage.compute)
        few = define(text, "run", {"each": each})
        return Body(f"{name}_few", few, (types.int64,) * 3 + (number,) * staged.slots, threads)

    def run(block: int, room: Any, leaves: int, tiles: int, count: int, h: int, counts: int, cells: int) -> None:
        each(block, leaves, tiles, h, counts, 0)

    return Body(name, run, (types.int64,) * 6, threads)
