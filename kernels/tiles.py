"""The loops over one tile: how the columns of a step are read, handed to the staged functions, and written.

A loop is `tile(addresses, h, start, stop, out, past)`: the addresses of the columns, what `decide` returned, the range
of elements, where sums go, and whether a column that is only written goes past the caches.
"""

import hashlib
import types as types_module
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import config, njit

from . import functions
from .formats import FORMATS, to_float32
from .memory import elements, lanes, outbox, where
from .notices import warn_once
from .staged import AVERAGES, Code, Staged, define
from .sums import LANES

# Values are added up in parts of some rows, a row being as many as there are lanes, so that lanes are loaded and stored
# less often. In an update the processor must not run out of memory to wait for while it adds: statistics over 25 M
# parameters took 1.4, 0.9, 1.2 and 3.6 ms with 1, 2, 4 and 8 rows (EPYC, two cores, 2026-11).
MEASURED_ROWS, UPDATED_ROWS = 8, 2


# No fast-math and no contraction: the same bits as NumPy. NumPy's error model: x / 0 is inf, without a branch.
FLAGS = {"error_model": "numpy", "nogil": True, "fastmath": False, "boundscheck": False}


@dataclass(frozen=True)
class Storage:
    """How the columns of a step stand in memory.

    Attributes:
        compute: "float32" or "float64"; of the arithmetic, and of all columns but those named here.
        gradient: the same, or one of `formats.FORMATS`.
        shadow: one of `formats.FORMATS` for a copy of the new parameters, or None.
        clear: set each gradient to zero once it has been read.
    """

    compute: str
    gradient: str
    shadow: str | None = None
    clear: bool = False

    def columns(self, staged: Staged) -> list[str]:
        """The dtype of each column: p, g, states, inputs, and the shadow at the end."""
        g = FORMATS[self.gradient].storage if self.gradient in FORMATS else self.gradient
        others = [self.compute] * (len(staged.states) + len(staged.inputs))
        return [self.compute, g, *others, *([FORMATS[self.shadow].storage] if self.shadow else [])]

    def written(self, staged: Staged) -> list[int]:
        """The columns that a step writes, in order."""
        states = range(2, 2 + len(staged.states))
        return [0, *([1] if self.clear else []), *states, *([len(self.columns(staged)) - 1] if self.shadow else [])]


def compiles() -> bool:
    """Whether Numba compiles; where it has been told not to, NumPy takes over, and a warning says so once."""
    if config.DISABLE_JIT:
        warn_once(
            "NUMBA_DISABLE_JIT is set, so nothing is compiled: NumPy makes the steps, slowly, with the same result."
        )
    return not config.DISABLE_JIT


def compiled(function: Callable[..., Any], digest: str) -> Any:
    """A function as part of one kernel, by a name of its own.

    Numba's symbols carry a counter of the process that compiled them. Two kernels from two processes can so have the
    same symbols, and in a third process that loads both from disk one would silently run the other's code.
    """
    own = types_module.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__qualname__ = f"{function.__name__}_{digest}"
    return njit(**FLAGS)(own)


def calls_of(code: Code, digest: str) -> dict[str, Callable[..., Any]]:
    """What a staged function calls, for the processor."""
    return functions.for_kernels(code.calls, where, lambda function: compiled(function, digest))


def digest_of(staged: Staged, storage: Storage) -> str:
    """What tells a kernel's functions from those of all others."""
    return hashlib.sha256(f"{staged!r} {storage!r}".encode()).hexdigest()[:16]


def accessors(storage: Storage, select: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`decode_g` and `encode_shadow` as far as the storage needs them, with the select of a backend."""
    out: dict[str, Callable[..., Any]] = {}
    if storage.gradient in FORMATS:
        out["decode_g"] = FORMATS[storage.gradient].make(select)[0]
    if storage.shadow:
        out["encode_shadow"] = FORMATS[storage.shadow].make(select)[1]
        if storage.compute == "float64":
            out["narrow"] = to_float32(select)
    return out


def reading(staged: Staged, storage: Storage) -> list[str]:
    """The arguments of the staged functions, from the tuple `c` of what the columns hold."""
    read = [f"c[{k}]" for k in range(2 + len(staged.states) + len(staged.inputs))]
    if storage.gradient in FORMATS:
        read[1] = "float64(decode_g(c[1]))" if storage.compute == "float64" else "decode_g(c[1])"
    return read


def loaded(staged: Staged, storage: Storage, code: Code) -> tuple[list[int], list[str]]:
    """The columns that a staged function uses, and its arguments in terms of the tuple `c` of what they hold."""
    arguments = reading(staged, storage)
    used = staged.columns_read(code) or [0]
    for k, argument in enumerate(arguments):
        place = used.index(k) if k in used else used.index(used[0])
        arguments[k] = argument.replace(f"c[{k}]", f"c[{place}]") if k in used else f"c[{place}]"
    return used, arguments


def averages(staged: Staged) -> list[int]:
    """The columns that are averages."""
    return [2 + k for k, name in enumerate(staged.states) if name in AVERAGES]


def element_text(staged: Staged, storage: Storage, arguments: Sequence[str]) -> str:
    """The source of `element(c, h)`: from what the columns hold to what is stored, and what is kept aside.

    What is stored are the columns of `Storage.written` without the shadow. Kept aside are the shadow, which leaves in
    whole lines, and what is emitted, which is added up.
    """
    states = len(staged.states)
    stored = ["r[0]", *(["zero"] if storage.clear else []), *(f"r[{1 + k}]" for k in range(states))]
    kept = [f"r[{1 + states + k}]" for k in range(len(staged.emitted))]
    if storage.shadow:
        kept.insert(0, "encode_shadow(narrow(r[0]))" if storage.compute == "float64" else "encode_shadow(r[0])")
    both = f"({', '.join(stored)},), ({', '.join(kept)},)" if kept else f"({', '.join(stored)},)"
    return f"def element(c, h):\n    r = update({', '.join(arguments)}, h)\n    return {both}"


def _element(staged: Staged, storage: Storage, digest: str) -> Callable[..., Any]:
    """`element(c, h)`, compiled; see `element_text`."""
    update = compiled(define(staged.update, "update", calls_of(staged.update, digest)), digest)
    convert = {name: compiled(f, digest) for name, f in accessors(storage, where).items()}
    namespace = {**convert, "zero": zero_of(staged, storage), "float64": np.float64, "update": update}
    return compiled(define(element_text(staged, storage, reading(staged, storage)), "element", namespace), digest)


def zero_of(staged: Staged, storage: Storage) -> Any:
    """The zero of a gradient."""
    return np.dtype(storage.columns(staged)[1]).type(0)


def update_loop(staged: Staged, storage: Storage) -> Any:
    """The loop over one tile, `tile(addresses, h, start, stop, out, past)`: load, call the staged update, store.

    What the update emits is added up and written to the address `out`; if `past` is not 0, whole lines of the shadow
    are written past the caches. Without emitted values and shadow neither is used.
    """
    digest = digest_of(staged, storage)
    formats, written = storage.columns(staged), storage.written(staged)
    read = range(2 + len(staged.states) + len(staged.inputs))
    element = _element(staged, storage, digest)
    if not staged.emitted and not storage.shadow:
        load, store = elements(formats, read, written)

        def plain(addresses, h, start, stop, out, past):
            for i in range(start, stop):
                store(addresses, i, element(load(addresses, i), h))

        return compiled(plain, digest)

    part = UPDATED_ROWS * LANES
    emits, kinds = bool(staged.emitted), ("norm",) * len(staged.emitted)
    box = [formats[-1]] if storage.shadow else []
    values = [*box, *[storage.compute] * len(kinds)]
    every_format = [*formats, *values, *["float64"] * len(kinds)]
    load, store = elements(every_format, read, [k for k in written if not (storage.shadow and k == len(formats) - 1)])
    take, keep = elements(every_format, [len(formats)], range(len(formats), len(formats) + len(values)))
    _, put = elements(every_format, [], [len(formats) - 1])
    place_box, send = outbox(part, formats[-1])
    adding = lanes(LANES, UPDATED_ROWS, kinds, storage.compute)
    place, clear, add, add_rows, finish = adding.place, adding.clear, adding.add, adding.add_rows, adding.finish
    shadow, column, width = storage.shadow is not None, len(formats) - 1, np.dtype(formats[-1]).itemsize
    nowhere = ()

    def tile(addresses, h, start, stop, out, past):
        mailbox = place_box() if shadow else nowhere
        room = place() if emits else nowhere
        every = addresses + mailbox + room
        for i in range(start, stop, part):
            count = min(part, stop - i)
            if emits and count % LANES != 0:
                clear(room, count // LANES)
            for j in range(count):
                stored, kept = element(load(every, i + j), h)
                store(every, i + j, stored)
                keep(every, j, kept)
            if shadow:
                if count == part:
                    send(mailbox, addresses[column] + i * width, past)
                else:
                    for j in range(count):
                        put(every, i + j, take(every, j))
            if emits:
                if count == part:
                    add_rows(room)
                else:
                    for r in range((count + LANES - 1) // LANES):
                        add(room, r)
        if emits:
            finish(room, out)

    return compiled(tile, digest)


def average_loop(staged: Staged, storage: Storage) -> Any:
    """The loop over one tile of a leaf that is not updated, as `update_loop`: only its averages are written."""
    assert staged.average is not None
    digest, formats = digest_of(staged, storage), storage.columns(staged)
    read, arguments = loaded(staged, storage, staged.average)
    average = compiled(define(staged.average, "average", calls_of(staged.average, digest)), digest)
    text = f"def element(c, h):\n    return average({', '.join(arguments)}, h)"
    element = compiled(define(text, "element", {"average": average}), digest)
    load, store = elements(formats, read, averages(staged))

    def still(addresses, h, start, stop):
        for i in range(start, stop):
            store(addresses, i, element(load(addresses, i), h))

    return compiled(still, digest)


def measure_loop(staged: Staged, number: int, storage: Storage) -> Any:
    """The loop over one tile of a measure, as `update_loop`: load, add up, write the sums to `out`."""
    digest = digest_of(staged, storage)
    formats, measure = storage.columns(staged), staged.measures[number]
    columns, count = 2 + len(staged.states) + len(staged.inputs), len(measure.kinds)
    every_format = [*formats, *[storage.compute] * count, *["float64"] * count]
    load, _ = elements(every_format, range(columns), [])
    _, keep = elements(every_format, [], range(len(formats), len(formats) + count))
    names = ["p", "g", *staged.states, *staged.inputs]
    part = MEASURED_ROWS * LANES
    direct = all(measure.columns) and (storage.gradient not in FORMATS or "g" not in measure.columns)
    adding = lanes(
        LANES, MEASURED_ROWS, measure.kinds, storage.compute, [names.index(c) for c in measure.columns if direct]
    )
    place, clear, add, add_rows, finish = adding.place, adding.clear, adding.add, adding.add_rows, adding.finish
    add_columns = adding.add_columns
    namespace = {**calls_of(measure.source, digest), "float64": np.float64}
    if storage.gradient in FORMATS:
        namespace["decode_g"] = compiled(accessors(storage, where)["decode_g"], digest)
    namespace["measure"] = compiled(define(measure.source, "measure", namespace), digest)
    read = ", ".join(reading(staged, storage))
    values = compiled(define(f"def values(c, h):\n    return measure({read}, h)", "values", namespace), digest)

    def tile(addresses, h, start, stop, out, past):
        room = place()
        every = addresses + room
        for i in range(start, stop, part):
            count = min(part, stop - i)
            if direct and count == part:
                add_columns(addresses, room, i)
                continue
            if count % LANES != 0:
                clear(room, count // LANES)
            for j in range(count):
                keep(every, j, values(load(every, i + j), h))
            if count == part:
                add_rows(room)
            else:
                for r in range((count + LANES - 1) // LANES):
                    add(room, r)
        finish(room, out)

    return compiled(tile, digest)
