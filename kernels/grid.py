"""A step on many threads: what each thread of each kernel does, written once for every target.

The kernels of a step, in the order of their launches:

    finish                  `decide`, if a measure needs what it returns
    measure 0, finish, ...  each reading pass: sums over tiles, then over leaves and scopes, then `decide`
    update, or update_few   the rule, on pieces of tiles; `update_few` takes what `decide` returned by value
    average, average_few    likewise, on pieces of leaves that are not updated, if averages are kept
    finish                  sums of what the update emitted, if it emits anything

A kernel is a function of its block's number and of addresses; what its threads do stands in phases
`phase(thread, ...)`, between which all threads of a block wait for each other (`Target.each`). So the same text runs on
a GPU (`kernels.cuda`) and, thread after thread, on a processor (`kernels.emulation`), with the same bits. A thread
reads and writes `width` neighbouring elements at once, which is 16 bytes of the narrowest column; where the columns of
a leaf are not aligned alike, or a tile ends, it goes element by element.

Sums have the shape of `kernels.sums`: a thread owns `width` neighbouring lanes of a tile and goes down its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from . import functions, loss_scaling
from .layout import ADVANCES, ASIDE, CLOCK, COUNTERS, FIRST_ADDRESS, GO, SHARED, SKIPPED, STEPS, TICKS, T
from .primitives import SCOPES
from .staged import Code, Staged, define
from .sums import BLOCK, LANES
from .tiles import Storage, accessors, averages, element_text, loaded, zero_of

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

# A row of the tables of tiles and of pieces: leaf, start, count, and the row of its counters, which the leaf has too:
# so a thread asks for the leaf and for what belongs to the row at the same time.
WORK = 4

# What `finish` is asked to do.
ADD, DECIDE, COMMIT = 1, 2, 4

EVERYTHING = 1 << 30 | sum(SHARED.values())  # of the state of a group, where `SHARED` names what is shared of it


@dataclass(frozen=True)
class Tuning:
    """What does not change the result.

    Attributes:
        threads: threads in a block of the update.
        vectors: vectors that a thread of it loads before it uses the first.
        load, store: how memory is read and written, for targets that know such hints.
        read_ahead: loads under way in each thread of a measure of one column; of several, fewer rows.
    """

    threads: int = 256
    vectors: int = 1
    load: str = ".L1::no_allocate"
    store: str = ""
    read_ahead: int = 8


# Registers that a thread may need for what it has loaded: of its elements, if it is to take eight of them at once; of
# them and of what `decide` returned, if it is to keep the latter for itself. See `tests/sass.py`.
_FOR_ELEMENTS, _FOR_ALL = 28, 28
MEASURE_THREADS = 128  # of a block in kernels that take sums over tiles
FINISH_THREADS = 512


@dataclass(frozen=True)
class Target:
    """What kernels are made of on one kind of machine.

    Attributes:
        function: make a function callable from kernels.
        where: a select.
        lanes: `lanes(formats, width, read, written, tuning)`: `load(addresses, i)`, a tuple of `width` tuples of what
            the columns `read` hold from element i on, and `store(addresses, i, values)`; aligned to the access.
        elements: `elements(formats, read, written)`: the same for one element.
        row: `row(kind, count, early=False)`: a function that reads a tuple of numbers at an address; early: right
            where it is called, not where they are needed.
        put: `put(kind)`: a function that writes a number to an address.
        each: `each(phase, arguments, threads, wait)`: a function that carries out a phase in all threads of a block.
        gpu: whether it is a GPU's compiler.
    """

    function: Callable[[Callable[..., Any]], Any]
    where: Any
    lanes: Callable[..., Any]
    elements: Callable[..., Any]
    row: Callable[..., Any]
    put: Callable[..., Any]
    each: Callable[..., Any]
    gpu: bool = False


@dataclass(frozen=True)
class Body:
    """A kernel, before it is compiled for a target.

    Attributes:
        name: for people.
        run: `run(block, room, *arguments)`, where `room` is an array of float64 that the block's threads share.
        arguments: the types of the arguments after the room.
        threads: in a block.
        shared: size of the room; `room` is 0 if it is 0.
    """

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    threads: int
    shared: int = 0


def width_of(formats: Sequence[str]) -> int:
    """How many neighbouring elements a thread reads at once."""
    sizes = [np.dtype(f).itemsize for f in formats]
    if min(sizes) == 2:
        # With eight elements of every column a thread would need more than 64 registers for many columns: half of a
        # wide access to the narrow ones is better than half of the threads.
        return 8 if 8 * sum(sizes) <= 4 * _FOR_ELEMENTS else 4
    return 16 // min(sizes)


def access_bytes(kind: str, width: int) -> int:
    """The widest access to a column when a thread reads `width` elements of it."""
    return min(16, width * np.dtype(kind).itemsize)


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _shift_text(formats: Sequence[str], width: int) -> str:
    """The source of `shift(addresses, start)`: how many elements before `start` a vector begins; -1 if nowhere."""
    sizes = [np.dtype(f).itemsize for f in formats]
    steps = [access_bytes(f, width) // size for f, size in zip(formats, sizes, strict=True)]
    first = steps.index(max(steps))
    lines = [
        "def shift(addresses, start):",
        f"    s = ((addresses[{first}] >> {_log2(sizes[first])}) + start) & {steps[first] - 1}",
        "    off = 0",
    ]
    for k, (kind, size) in enumerate(zip(formats, sizes, strict=True)):
        lines.append(f"    off |= (addresses[{k}] + (start - s) * {size}) & {access_bytes(kind, width) - 1}")
    return "\n".join([*lines, "    return s if off == 0 else -1"])


def _listed(parts: Sequence[str]) -> str:
    return f"({''.join(part + ', ' for part in parts)})"


def _walk(
    target: Target,
    formats: Sequence[str],
    read: Sequence[int],
    written: Sequence[int],
    value: Callable[..., Any],
    kinds: Sequence[str],
    stride: int,
    vectors: int,
    slots: Callable[..., Any],
    tuning: Tuning,
) -> Callable[..., Any]:
    """`walk(addresses, h, start, stop, s, first, acc)`: what one thread does in a tile or piece; the new `acc`.

    Args:
        target: what the kernel is made of.
        formats: of all columns.
        read: the columns that are loaded.
        written: the columns that are stored.
        value: `value(c, h)`, what is stored and what is added up of one element, each a tuple.
        kinds: of what is added up; `acc` has them for each of the thread's lanes, or is 0 if there are none.
        stride: elements from a thread's vector to its next.
        vectors: how many are loaded before the first is used.
        slots: `slots(h)`, what `decide` returned; called once the elements are on their way.
        tuning: hints for loads and stores.
    """
    width, count = width_of(formats), len(kinds)
    load, store = target.lanes(formats, width, read, written, tuning)
    load_one, store_one = target.elements(formats, read, written)
    namespace: dict[str, Any] = {
        "load": load,
        "store": store,
        "load_one": load_one,
        "store_one": store_one,
        "value": value,
        "slots": slots,
        "norm": target.function(_square),
        "total": target.function(_float64),
    }
    store_line = "    store(addresses, {at}, {values})"

    def use(c: str, at: str) -> list[str]:
        """Compute with the vector `c`, store at `at`, add up."""
        lines = [f"    s{k}, k{k} = value({c}[{k}], h)" for k in range(width)]
        if written:
            lines.append(store_line.format(at=at, values=_listed([f"s{k}" for k in range(width)])))
        if count:
            lines += [f"    a{k}_{q} = a{k}_{q} + {kinds[q]}(k{k}[{q}])" for k in range(width) for q in range(count)]
        return lines

    names = [f"a{k}_{q}" for k in range(width) for q in range(count)]
    opened = [f"    {_listed(names)} = acc"] if count else []
    closed = [f"    return {_listed(names)}" if count else "    return acc"]
    many = [f"    c{v} = load(addresses, i + {v * stride})" for v in range(vectors)]
    many.append("    h = slots(h)")
    for v in range(vectors):
        many += use(f"c{v}", f"i + {v * stride}")
    whole = ["    c0 = load(addresses, i)", "    h = slots(h)", *use("c0", "i")]
    part = ["    h = slots(h)"]
    if count:
        for k in range(width):
            part += [
                f"    if start <= i + {k} and i + {k} < stop:",
                f"        s, k = value(load_one(addresses, i + {k}), h)",
                *([f"        store_one(addresses, i + {k}, s)"] if written else []),
                *(f"        a{k}_{q} = a{k}_{q} + {kinds[q]}(k[{q}])" for q in range(count)),
            ]
    else:
        part += [
            "    j = i if i > start else start",
            f"    end = i + {width} if i + {width} < stop else stop",
            "    while j < end:",
            "        s, k = value(load_one(addresses, j), h)",
            "        store_one(addresses, j, s)",
            "        j += 1",
        ]
    for name, arguments, lines in (
        ("many", "addresses, i, h, acc", many),
        ("whole", "addresses, i, h, acc", whole),
        ("part", "addresses, i, start, stop, h, acc", part),
    ):
        source = "\n".join([f"def {name}({arguments}):", *opened, *lines, *closed])
        namespace[name] = target.function(define(source, name, namespace))
    aligned = "s >= 0 and i >= start and i + {reach} <= stop"
    text = ["def walk(addresses, h, start, stop, s, first, acc):", "    i = first", "    while i < stop:"]
    if vectors > 1:
        text += [
            f"        if {aligned.format(reach=(vectors - 1) * stride + width)}:",
            "            acc = many(addresses, i, h, acc)",
            f"            i += {vectors * stride}",
            "            continue",
        ]
    text += [
        f"        if {aligned.format(reach=width)}:",
        "            acc = whole(addresses, i, h, acc)",
        "        else:",
        "            acc = part(addresses, i, start, stop, h, acc)",
        f"        i += {stride}",
        "    return acc",
    ]
    return target.function(define("\n".join(text), "walk", namespace))


def _as_it_is(x):
    return x


def _square(x):
    y = np.float64(x)
    return y * y


def _float64(x):
    return np.float64(x)


def _calls_of(target: Target, code: Code) -> dict[str, Any]:
    return functions.for_kernels(code.calls, target.where, target.function, target.gpu)


def _staged_functions(target: Target, staged: Staged, storage: Storage, code: Code) -> dict[str, Any]:
    """What a staged function of an element calls, and what goes around it."""
    convert = {name: target.function(f) for name, f in accessors(storage, target.where).items()}
    return {**_calls_of(target, code), **convert, "float64": np.float64, "zero": zero_of(staged, storage)}


def _updated(target: Target, staged: Staged, storage: Storage) -> tuple[list[int], Callable[..., Any]]:
    """The columns that the update reads, and `value(c, h)` for `_walk`."""
    namespace = _staged_functions(target, staged, storage, staged.update)
    namespace["update"] = target.function(define(staged.update, "update", namespace))
    used, arguments = loaded(staged, storage, staged.update)
    namespace["element"] = target.function(define(element_text(staged, storage, arguments), "element", namespace))
    stored = len(storage.written(staged)) - (storage.shadow is not None)
    if storage.shadow or staged.emitted:
        first = int(storage.shadow is not None)
        whole = _listed([f"s[{k}]" for k in range(stored)] + ["k[0]"] * first)
        emitted = _listed([f"k[{first + k}]" for k in range(len(staged.emitted))]) if staged.emitted else "0"
        text = f"def value(c, h):\n    s, k = element(c, h)\n    return {whole}, {emitted}"
    else:
        text = "def value(c, h):\n    return element(c, h), 0"
    return used, target.function(define(text, "value", namespace))


def _measured(target: Target, staged: Staged, storage: Storage, number: int) -> tuple[list[int], Callable[..., Any]]:
    """The columns that a measure reads, and `value(c, h)` for `_walk`."""
    source = staged.measures[number].source
    namespace = _staged_functions(target, staged, storage, source)
    namespace["measure"] = target.function(define(source, "measure", namespace))
    used, arguments = loaded(staged, storage, source)
    text = f"def value(c, h):\n    return 0, measure({', '.join(arguments)}, h)"
    return used, target.function(define(text, "value", namespace))


def _sum_kernel(
    target: Target,
    name: str,
    staged: Staged,
    storage: Storage,
    read: Sequence[int],
    written: Sequence[int],
    value: Callable[..., Any],
    kinds: Sequence[str],
    first_quantity: int,
    may_skip: bool,
    needed: bool,
    tuning: Tuning,
) -> Body:
    """A kernel `(leaves, tiles, count, h, counts, cells)` that takes sums over tiles, and may store as well.

    `LANES / width` threads share a tile; a block has several tiles.
    """
    formats, width, quantities = storage.columns(staged), width_of(storage.columns(staged)), staged.quantities
    several, sums = LANES // width, len(kinds)
    tiles_in_block = MEASURE_THREADS // several
    room_of_tile = LANES * sums
    vectors = max(1, tuning.read_ahead // (2 * len(read) - 1)) if not written else 1  # sums need registers too
    walk = _walk(target, formats, read, written, value, kinds, LANES, vectors, target.function(_as_it_is), tuning)
    shift = target.function(define(_shift_text(formats, width), "shift", {}))
    leaf_at, tile_at = target.row("int64", 1 + len(formats)), target.row("int64", WORK)
    leaf_bytes = 8 * (1 + len(formats))
    slots_at, go_at, put = _slots_at(target, staged, storage, needed), target.row("int64", 1), target.put("float64")
    slot_bytes = staged.slots * np.dtype(storage.compute).itemsize
    nothing = (np.float64(0.0),) * (width * sums)
    keep_text = ["def keep(room, base, slot, s, acc):"]
    for k in range(width):
        keep_text.append(f"    lane = (slot * {width} + {k} - s) & {LANES - 1}")
        keep_text += [f"    room[base + {q * LANES} + lane] = acc[{k * sums + q}]" for q in range(sums)]
    keep = target.function(define("\n".join(keep_text), "keep", {}))
    clear = _clear(target, staged, storage)

    def add(thread, block, leaves, tiles, count, h, counts, room):
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

    def halve(thread, half, room):
        base, lane = (thread // several) * room_of_tile, thread % several
        while lane < half:
            for q in range(sums):
                at = base + q * LANES + lane
                room[at] = room[at] + room[at + half]
            lane += several

    def deliver(thread, block, count, cells, room):
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

    def run(block, room, leaves, tiles, count, h, counts, cells):
        each_add(block, leaves, tiles, count, h, counts, room)
        half = LANES // 2
        while half > 0:
            each_halve(half, room)
            half = half // 2
        each_deliver(block, count, cells, room)

    return Body(name, run, (types.int64,) * 6, MEASURE_THREADS, tiles_in_block * room_of_tile)


def _slots_at(target: Target, staged: Staged, storage: Storage, needed: bool) -> Callable[..., Any]:
    """`slots_at(address)`: what `decide` returned for a row; zeros where nobody needs it."""
    if needed:
        at: Callable[..., Any] = target.row(storage.compute, staged.slots, True)
        return at
    zeros = (np.dtype(storage.compute).type(0),) * staged.slots

    def nothing(address):
        return zeros

    return target.function(nothing)


def _clear(target: Target, staged: Staged, storage: Storage) -> Callable[..., Any]:
    """`clear(addresses, start, stop, mine, step)`: zeros for every `step`-th gradient, in a step that is skipped."""
    if not storage.clear:

        def leave(addresses, start, stop, mine, step):
            pass

        return target.function(leave)
    _, store = target.elements(storage.columns(staged), [], [1])
    zero = (zero_of(staged, storage),)

    def clear(addresses, start, stop, mine, step):
        i = start + mine
        while i < stop:
            store(addresses, i, zero)
            i += step

    return target.function(clear)


def measure(target: Target, staged: Staged, storage: Storage, number: int, tuning: Tuning) -> Body:
    """A reading pass: the sums over each tile of what it measures."""
    read, value = _measured(target, staged, storage, number)
    first = staged.spans[number]
    kinds = staged.measures[number].kinds
    name, needed = f"measure_{number}", staged.measures[number].source.reads_slots
    return _sum_kernel(target, name, staged, storage, read, [], value, kinds, first, False, needed, tuning)


def tiles_in_block(staged: Staged, storage: Storage) -> int:
    """How many tiles a block of a kernel takes that takes sums over them."""
    return MEASURE_THREADS * width_of(storage.columns(staged)) // LANES


def piece_size(staged: Staged, storage: Storage, tuning: Tuning) -> int:
    """How many elements a block of the update takes."""
    return min(BLOCK, tuning.threads * tuning.vectors * width_of(storage.columns(staged)))


def update(target: Target, staged: Staged, storage: Storage, tuning: Tuning, by_value: bool) -> Body:
    """The kernel that carries the rule over pieces, or over tiles if it emits sums.

    `(leaves, tiles, count, h, counts, cells)`; by value, for a step with a single row and no sums,
    `(leaves, tiles, count, *slots)`.
    """
    read, value = _updated(target, staged, storage)
    written, may_skip = storage.written(staged), staged.may_skip
    if staged.emitted:
        first = staged.spans[-2]
        kinds = staged.kinds[first:]
        return _sum_kernel(
            target, "update", staged, storage, read, written, value, kinds, first, may_skip, True, tuning
        )
    clear, name = _clear(target, staged, storage), "update"
    return _piece_kernel(target, name, staged, storage, read, written, value, may_skip, clear, tuning, by_value)


def average(target: Target, staged: Staged, storage: Storage, tuning: Tuning, by_value: bool) -> Body:
    """The kernel that averages leaves which are not updated; arguments as those of an update that emits no sums."""
    assert staged.average is not None
    read, arguments = loaded(staged, storage, staged.average)
    namespace = _staged_functions(target, staged, storage, staged.average)
    namespace["average"] = target.function(define(staged.average, "average", namespace))
    text = f"def value(c, h):\n    return average({', '.join(arguments)}, h), 0"
    value, written = target.function(define(text, "value", namespace)), averages(staged)

    def nothing(addresses, start, stop, mine, step):
        pass

    may_skip, clear = staged.may_skip, target.function(nothing)
    return _piece_kernel(target, "average", staged, storage, read, written, value, may_skip, clear, tuning, by_value)


def _piece_kernel(
    target: Target,
    name: str,
    staged: Staged,
    storage: Storage,
    read: Sequence[int],
    written: Sequence[int],
    value: Callable[..., Any],
    may_skip: bool,
    clear: Callable[..., Any],
    tuning: Tuning,
    by_value: bool,
) -> Body:
    """A kernel over pieces, arguments as for `update`; `clear` is called for a piece of a step that is skipped."""
    formats, width, threads = storage.columns(staged), width_of(storage.columns(staged)), tuning.threads
    row_at, as_it_is = _slots_at(target, staged, storage, True), target.function(_as_it_is)
    # Asked for together with the elements, what `decide` returned costs no time, but a register each in every thread;
    # asked for before, it is shared by the threads of a warp.
    held = sum(np.dtype(formats[k]).itemsize for k in read) * width * tuning.vectors // 4
    late = not by_value and held + staged.slots * np.dtype(storage.compute).itemsize // 4 <= _FOR_ALL
    slots_of = row_at if late else as_it_is
    walk = _walk(target, formats, read, written, value, [], threads * width, tuning.vectors, slots_of, tuning)
    early = as_it_is if late else row_at
    shift = target.function(define(_shift_text(formats, width), "shift", {}))
    leaf_at, tile_at = target.row("int64", 1 + len(formats)), target.row("int64", WORK)
    leaf_bytes = 8 * (1 + len(formats))
    go_at = target.row("int64", 1)
    slot_bytes = staged.slots * np.dtype(storage.compute).itemsize

    def piece(thread, block, leaves, tiles, h, counts, values):
        leaf, start, size, r = tile_at(tiles + block * WORK * 8)
        slots = values if by_value else early(h + r * slot_bytes)
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
        slots = [f"h{k}" for k in range(staged.slots)]
        text = [
            f"def run(block, room, leaves, tiles, count, {', '.join(slots)}):",
            f"    each(block, leaves, tiles, 0, 0, {_listed(slots)})",
        ]
        number = getattr(types, storage.compute)
        few = define("\n".join(text), "run", {"each": each})
        return Body(f"{name}_few", few, (types.int64,) * 3 + (number,) * staged.slots, threads)

    def run(block, room, leaves, tiles, count, h, counts, cells):
        each(block, leaves, tiles, h, counts, 0)

    return Body(name, run, (types.int64,) * 6, threads)


# What formulas call.
_FORMULAS = {name: getattr(math, name) for name in ("floor", "cos", "exp", "log", "sqrt", "pow")}


def finish(target: Target, staged: Staged, storage: Storage, formulas: Sequence[Any] = ()) -> Body:
    """The kernel of one block that adds up over tiles, decides and counts: `(board, low, high, what)`.

    Args:
        target: what it is made of.
        staged: the rule.
        storage: how its columns stand in memory.
        formulas: settings that follow from the number of the step (`fastlr.step.scheduled.Formula`).
    """
    quantities = staged.quantities
    may_skip, asides = staged.may_skip, staged.asides
    threads = FINISH_THREADS
    at = target.row("int64", 1)
    number_at = target.row("float64", 1)
    three = target.row("int64", 3)
    put_integer, put = target.put("int64"), target.put("float64")

    def get(board, place):
        return at(board + place * 8)[0]

    get = target.function(get)

    def add(thread, board, level, low, high):
        levels, cells, program = get(board, LEVELS), get(board, CELLS), get(board, PROGRAM)
        k, end = at(levels + level * 8)[0] + thread, at(levels + level * 8 + 8)[0]
        while k < end:
            to, first, second = three(program + k * 24)
            q = low
            while q < high:
                x = number_at(cells + (first * quantities + q) * 8)[0]
                if second >= 0:
                    x = x + number_at(cells + (second * quantities + q) * 8)[0]
                put(cells + (to * quantities + q) * 8, x)
                q += 1
            k += threads

    decide_row = _decide_row(target, staged, storage, formulas)

    def part(board):
        """Whether it is a step of a part; such a step begins a new one if a row of it has been in the present one."""
        return at(get(board, ADVANCE) + get(board, ROWS) * ADVANCES * 8)[0]

    part = target.function(part)

    def begin(thread, board):
        rows, counts, advance = get(board, ROWS), get(board, COUNTS), get(board, ADVANCE)
        if part(board) != 0:
            steps = at(counts + (rows * COUNTERS + CLOCK) * 8)[0]
            r = thread
            while r < rows:
                stepping = at(advance + (r * ADVANCES + STEPS) * 8)[0]
                ticking = at(advance + (r * ADVANCES + TICKS) * 8)[0]
                clock = at(counts + (r * COUNTERS + CLOCK) * 8)[0]
                if (stepping != 0 or ticking != 0) and clock >= steps:
                    put_integer(get(board, FLAGS) + 16, 1)
                r += threads

    def gain(board):
        """What the step adds to the optimizer's clock."""
        if part(board) != 0:
            return at(get(board, FLAGS) + 16)[0]
        return at(get(board, ADVANCE) + (get(board, ROWS) * ADVANCES + TICKS) * 8)[0]

    gain = target.function(gain)

    def decide_rows(thread, board, what):
        rows, counts, advance = get(board, ROWS), get(board, COUNTS), get(board, ADVANCE)
        flags = get(board, FLAGS)
        now = at(counts + (rows * COUNTERS + CLOCK) * 8)[0] + gain(board)
        r = thread
        while r < rows:
            stepping = at(advance + (r * ADVANCES + STEPS) * 8)[0]
            ticking = at(advance + (r * ADVANCES + TICKS) * 8)[0]
            aside = at(advance + (r * ADVANCES + ASIDE) * 8)[0] if asides else 0
            go = 1
            if stepping != 0 or (may_skip and ticking != 0) or aside != 0:
                kept = 0
                if what & COMMIT != 0:
                    kept = EVERYTHING if stepping != 0 else aside
                finite = decide_row(board, r, now - 1 if now > 0 else 0, kept)
                if may_skip and (ticking != 0 or aside != 0):
                    go = 1 if finite != 0.0 else 0
            if what & COMMIT != 0:
                mine = counts + r * COUNTERS * 8
                if may_skip:
                    put_integer(mine + GO * 8, go)
                if stepping != 0:
                    put_integer(flags + 8, 1)
                    if go != 0:
                        put_integer(flags, 1)
                        put_integer(mine + T * 8, at(mine + T * 8)[0] + 1)
                    else:
                        put_integer(mine + SKIPPED * 8, at(mine + SKIPPED * 8)[0] + 1)
                if ticking != 0 and go != 0:
                    put_integer(mine + CLOCK * 8, now)
            r += threads

    def settle(thread, board):
        rows, counts, flags = get(board, ROWS), get(board, COUNTS), get(board, FLAGS)
        own = counts + (rows * COUNTERS + CLOCK) * 8
        if thread == 0:
            if at(flags)[0] != 0 or at(flags + 8)[0] == 0:
                put_integer(own, at(own)[0] + gain(board))
            put_integer(flags, 0)
            put_integer(flags + 8, 0)
            put_integer(flags + 16, 0)
        loss = get(board, LOSS)
        if may_skip and loss != 0:
            rule, first_rows, models = get(board, LOSS_RULE), get(board, FIRST_ROWS), get(board, MODELS)
            growth, backoff, interval, smallest = (
                number_at(rule)[0],
                number_at(rule + 8)[0],
                number_at(rule + 16)[0],
                number_at(rule + 24)[0],
            )
            m = thread
            while m < models:
                r = at(first_rows + m * 8)[0]
                skipped = False
                if r >= 0:
                    skipped = at(counts + (r * COUNTERS + GO) * 8)[0] == 0
                scale, good = number_at(loss + m * 8)[0], number_at(loss + (models + m) * 8)[0]
                put(loss + (2 * models + m) * 8, scale)
                scale, good = rescale(scale, good, skipped, growth, backoff, interval, smallest)
                put(loss + m * 8, scale)
                put(loss + (models + m) * 8, good)
                m += threads

    rescale = target.function(loss_scaling.make(target.where))
    each_add = target.each(target.function(add), 4, threads)
    each_begin = target.each(target.function(begin), 1, threads)
    each_decide = target.each(target.function(decide_rows), 2, threads)
    each_settle = target.each(target.function(settle), 1, threads, wait=False)

    def run(block, room, board, low, high, what):
        if what & ADD != 0:
            level, levels = 0, get(board, LEVEL_COUNT)
            while level < levels:
                each_add(board, level, low, high)
                level += 1
        if what & DECIDE != 0:
            each_begin(board)
            each_decide(board, what)
        if what & COMMIT != 0:
            each_settle(board)

    return Body("finish", run, (types.int64,) * 4, threads)


def _decide_row(target: Target, staged: Staged, storage: Storage, formulas: Sequence[Any]) -> Any:
    """`decide_row(board, r, step, kept)`: decide for one row; 0.0 if its gradient is not finite and reported so.

    Of the state of the group what `kept` names is kept: 0: nothing, `EVERYTHING`, or some of `SHARED`.
    """
    slots, scalars, reports = staged.slots, len(staged.scalars), len(staged.reports)
    compute = storage.compute
    size = np.dtype(compute).itemsize
    settings = max(1, len(staged.uniforms)) + sum(f.count for f in formulas)
    kinds = staged.kinds
    quantities = staged.quantities
    number = target.row("float64", 1)

    def total(cells, quantity, root):
        return number(cells + (root * quantities + quantity) * 8)[0] if root >= 0 else 0.0

    total = target.function(total)

    def norm(cells, quantity, root):
        return math.sqrt(total(cells, quantity, root))

    namespace: dict[str, Any] = {
        "decide": target.function(define(staged.decide, "decide", _calls_of(target, staged.decide))),
        "integer": target.row("int64", 1),
        "number": number,
        "uniforms": target.row("float64", settings),
        "scopes": target.row("int64", len(SCOPES)),
        "state": target.row("float64", scalars),
        "put": target.put("float64"),
        "put_slot": target.put(compute),
        "float64": np.float64,
        "slot": np.dtype(compute).type,
        "total": total,
        "norm": target.function(norm),
    }
    values = [f"u[{k}]" for k in range(len(staged.uniforms))]
    for f in formulas:
        first = max(1, len(staged.uniforms)) + f.first
        functions = {name: target.function(own) for name, own in f.functions}
        namespace[f"formula_{f.uniform}"] = target.function(define(f.source, "value", {**_FORMULAS, **functions}))
        values[staged.uniforms.index(f.uniform)] = f"formula_{f.uniform}(n, u[{first} : {first + f.count}])"
    if "grad_scale" in staged.uniforms:
        values[staged.uniforms.index("grad_scale")] += " * scale"
    values += [f"x[{k}]" for k in range(scalars)]
    values += [f"{kinds[q]}(cells, {q}, roots[{SCOPES.index(scope)}])" for q, scope in staged.sums]

    def table(place: int, bytes_of_row: int) -> str:
        return f"integer(board + {8 * place})[0] + r * {bytes_of_row}"

    text = [
        "def decide_row(board, r, step, kept):",
        f"    t = integer({table(COUNTS, 8 * COUNTERS)} + {8 * T})[0] + 1",
        "    n = float64(step)",
        f"    u = uniforms({table(SETTINGS, 8 * settings)})",
        f"    h = {table(H, size * slots)}",
    ]
    if scalars:
        text.append(f"    x = state({table(SCALARS, 8 * scalars)})")
    if staged.sums:
        text.append(f"    roots, cells = scopes({table(ROOTS, 8 * len(SCOPES))}), integer(board + {8 * CELLS})[0]")
    if "grad_scale" in staged.uniforms:
        text += [
            "    scale = 1.0",
            f"    loss = integer(board + {8 * LOSS})[0]",
            "    if loss != 0:",
            f"        scale = number(loss + integer({table(MODELS_OF_ROWS, 8)})[0] * 8)[0]",
        ]
    text.append(f"    v = decide({', '.join(['t', *values])})")
    text += [f"    put_slot(h + {k * size}, slot(v[{k}]))" for k in range(slots)]
    if reports:
        text.append(f"    report = {table(REPORTS, 8 * reports)}")
        text += [f"    put(report + {8 * k}, float64(v[{slots + scalars + k}]))" for k in range(reports)]
    finite = f"float64(v[{slots + scalars + staged.reports.index('finite')}])" if staged.may_skip else "1.0"
    if scalars:
        text += [f"    if kept != 0 and {finite} != 0.0:", f"        new = {table(SCALARS, 8 * scalars)}"]
        for k, scope in enumerate(staged.shared):
            text.append(f"        if kept & {EVERYTHING & ~sum(SHARED.values()) | SHARED.get(scope, 0)} != 0:")
            text.append(f"            put(new + {8 * k}, float64(v[{slots + k}]))")
    text.append(f"    return {finite}")
    return target.function(define("\n".join(text), "decide_row", namespace))
