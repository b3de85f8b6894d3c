"""The loops over one tile: how the columns of a step are read, handed to the staged functions, and written.

A loop is `tile(addresses, h, start, stop, out, past)`: the addresses of the columns, what `decide` returned, the range
of elements, where sums go, and whether a column that is only written goes past the caches.
"""

from __future__ import annotations

import hashlib
import types as types_module
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numba import config, njit

from .element import average_of, every_column, measure_of, update_of
from .formats import FORMATS
from .memory import elements, lanes, outbox, where
from .notices import warn_once
from .staging import Staged
from .storage import Storage, averages
from .sums import LANES

__all__ = [
    "FLAGS",
    "Compiler",
    "Storage",
    "average_loop",
    "compiled",
    "compiles",
    "digest_of",
    "measure_loop",
    "update_loop",
]

# Values are added up in parts of some rows, a row being as many as there are lanes, so that lanes are loaded and stored
# less often. In an update the processor must not run out of memory to wait for while it adds: statistics over 25 M
# parameters took 1.4, 0.9, 1.2 and 3.6 ms with 1, 2, 4 and 8 rows (EPYC, two cores, 2026-11).
MEASURED_ROWS, UPDATED_ROWS = 8, 2


# No fast-math and no contraction: the same bits as NumPy. NumPy's error model: x / 0 is inf, without a branch.
FLAGS = {"error_model": "numpy", "nogil": True, "fastmath": False, "boundscheck": False}


def compiles() -> bool:
    """Whether Numba compiles; where it has been told not to, NumPy takes over, and a warning says so once."""
    if config.DISABLE_JIT:
        warn_once(
            "NUMBA_DISABLE_JIT is set, so nothing is compiled: NumPy makes the steps, slowly, with the same result."
        )
    return not config.DISABLE_JIT


def compiled(function: Callable[..., Any], digest: str, inline: bool = False) -> Any:
    """A function as part of one kernel, by a name of its own.

    Numba's symbols carry a counter of the process that compiled them. Two kernels from two processes can so have the
    same symbols, and in a third process that loads both from disk one would silently run the other's code.

    Args:
        function: what is compiled.
        digest: of the kernel.
        inline: put the code into its callers before Numba looks at types: each function that is compiled by itself
            takes some 50 ms (EPYC, 2026-11). Not for functions that are called with `*arguments`.
    """
    own = types_module.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__qualname__ = f"{function.__name__}_{digest}"
    return njit(**FLAGS, inline="always" if inline else "never")(own)


def digest_of(staged: Staged, storage: Storage) -> str:
    """What tells a kernel's functions from those of all others."""
    return hashlib.sha256(f"{staged!r} {storage!r}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Compiler:
    """Makes functions for the processor, as parts of the kernel of this digest; `inline` as for `compiled`."""

    digest: str
    inline: bool = True
    where: ClassVar[Any] = where
    gpu: ClassVar[bool] = False

    def function(self, function: Callable[..., Any]) -> Any:
        """Compile a function when it is first called."""
        return compiled(function, self.digest, self.inline)


def update_loop(staged: Staged, storage: Storage) -> Any:
    """The loop over one tile, `tile(addresses, h, start, stop, out, past)`: load, call the staged update, store.

    What the update emits is added up and written to the address `out`; if `past` is not 0, whole lines of the shadow
    are written past the caches. Without emitted values and shadow neither is used.
    """
    digest = digest_of(staged, storage)
    formats, written = storage.columns(staged), storage.written(staged)
    read = every_column(staged)
    element = update_of(Compiler(digest), staged, storage, read)
    if not staged.emitted and not storage.shadow:
        load, store = elements(formats, read, written)

        def plain(addresses: Any, h: Any, start: int, stop: int, out: int, past: int) -> None:
            for i in range(start, stop):
                stored, _, _ = element(load(addresses, i), h)
                store(addresses, i, stored)

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

    def tile(addresses: Any, h: Any, start: int, stop: int, out: int, past: int) -> None:
        mailbox = place_box() if shadow else nowhere
        room = place() if emits else nowhere
        every = addresses + mailbox + room
        for i in range(start, stop, part):
            count = min(part, stop - i)
            if emits and count % LANES != 0:
                clear(room, count // LANES)
            for j in range(count):
                stored, narrow, emitted = element(load(every, i + j), h)
                store(every, i + j, stored)
                keep(every, j, narrow + emitted)
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
    digest, formats = digest_of(staged, storage), storage.columns(staged)
    assert staged.average is not None
    read = staged.columns_read(staged.average) or [0]
    values = average_of(Compiler(digest), staged, storage, read)
    load, store = elements(formats, read, averages(staged))

    def still(addresses: Any, h: Any, start: int, stop: int) -> None:
        for i in range(start, stop):
            store(addresses, i, values(load(addresses, i), h))

    return compiled(still, digest)


def measure_loop(staged: Staged, number: int, storage: Storage) -> Any:
    """The loop over one tile of a measure, as `update_loop`: load, add up, write the sums to `out`."""
    digest = digest_of(staged, storage)
    formats, measure = storage.columns(staged), staged.measures[number]
    columns, count = every_column(staged), len(measure.kinds)
    every_format = [*formats, *[storage.compute] * count, *["float64"] * count]
    load, _ = elements(every_format, columns, [])
    _, keep = elements(every_format, [], range(len(formats), len(formats) + count))
    names = staged.arguments
    part = MEASURED_ROWS * LANES
    direct = all(measure.columns) and (storage.gradient not in FORMATS or "g" not in measure.columns)
    adding = lanes(
        LANES, MEASURED_ROWS, measure.kinds, storage.compute, [names.index(c) for c in measure.columns if direct]
    )
    place, clear, add, add_rows, finish = adding.place, adding.clear, adding.add, adding.add_rows, adding.finish
    add_columns = adding.add_columns
    values = measure_of(Compiler(digest), staged, storage, number, columns)

    def tile(addresses: Any, h: Any, start: int, stop: int, out: int, past: int) -> None:
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
