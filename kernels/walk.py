"""What one thread does with its elements of a tile or a piece: load, call the staged functions, store, add up.

A thread reads and writes `width` neighboring elements at once, which is 16 bytes of the narrowest column; where the
columns of a leaf are not aligned alike, or a tile ends, it goes element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .element import average_of, measure_of, update_of
from .staging import Staged, define
from .storage import Storage, averages
from .target import Target, Tuning, access_bytes, width_of

__all__ = ["Work", "average_work", "measure_work", "shift_of", "update_work", "walk_of"]


@dataclass(frozen=True)
class Work:
    """What a kernel does with each element.

    Attributes:
        read: the columns that are loaded.
        written: the columns that are stored.
        value: `value(c, h)`: what is stored and what is added up of one element, each a tuple.
        kinds: "norm" or "total", for each quantity that is added up.
    """

    read: Sequence[int]
    written: Sequence[int]
    value: Callable[..., Any]
    kinds: Sequence[str] = ()


def update_work(target: Target, staged: Staged, storage: Storage) -> Work:
    """The rule."""
    read = staged.columns_read(staged.update) or [0]
    element = update_of(target, staged, storage, read)

    def value(c: Any, h: Any) -> Any:
        stored, shadow, emitted = element(c, h)
        return stored + shadow, emitted

    return Work(read, storage.written(staged), target.function(value), ["norm"] * len(staged.emitted))


def measure_work(target: Target, staged: Staged, storage: Storage, number: int) -> Work:
    """The measure of a number."""
    read = staged.columns_read(staged.measures[number].source) or [0]
    values = measure_of(target, staged, storage, number, read)

    def value(c: Any, h: Any) -> Any:
        return (), values(c, h)

    return Work(read, [], target.function(value), staged.measures[number].kinds)


def average_work(target: Target, staged: Staged, storage: Storage) -> Work:
    """The averages of leaves that are not updated."""
    assert staged.average is not None
    read = staged.columns_read(staged.average) or [0]
    values = average_of(target, staged, storage, read)

    def value(c: Any, h: Any) -> Any:
        return values(c, h), ()

    return Work(read, averages(staged), target.function(value))


def shift_of(target: Target, formats: Sequence[str]) -> Any:
    """`shift(addresses, start)`: how many elements before `start` a vector of every column begins; -1 if nowhere."""
    width = width_of(formats)
    sizes = tuple(np.dtype(f).itemsize for f in formats)
    masks = tuple(access_bytes(f, width) - 1 for f in formats)
    steps = [(mask + 1) // size for mask, size in zip(masks, sizes, strict=True)]
    first, columns = steps.index(max(steps)), len(formats)
    log2, mask = sizes[first].bit_length() - 1, max(steps) - 1

    def shift(addresses: Any, start: int) -> int:
        s = ((addresses[first] >> log2) + start) & mask
        off = 0
        for k in range(columns):
            off |= (addresses[k] + (start - s) * sizes[k]) & masks[k]
        return s if off == 0 else -1

    return target.function(shift)


def _listed(parts: Sequence[str]) -> str:
    return f"({''.join(part + ', ' for part in parts)})"


def walk_of(
    target: Target,
    formats: Sequence[str],
    work: Work,
    stride: int,
    vectors: int,
    slots: Callable[..., Any],
    tuning: Tuning,
) -> Callable[..., Any]:
    """`walk(addresses, h, start, stop, s, first, acc)`: what one thread does in a tile or piece; the new `acc`.

    Args:
        target: what the kernel is made of.
        formats: of all columns.
        work: what is done with each element; `acc` has what is added up for each of the thread's lanes.
        stride: elements from a thread's vector to its next.
        vectors: how many are loaded before the first is used.
        slots: `slots(h)`, what `decide` returned; called once the elements are on their way.
        tuning: hints for loads and stores.
    """
    width, count, kinds = width_of(formats), len(work.kinds), work.kinds
    value, written = work.value, work.written
    load, store = target.lanes(formats, width, work.read, written, tuning)
    load_one, store_one = target.elements(formats, work.read, written)
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
    for k in range(width):
        part += [
            f"    if start <= i + {k} and i + {k} < stop:",
            f"        s, k = value(load_one(addresses, i + {k}), h)",
            *([f"        store_one(addresses, i + {k}, s)"] if written else []),
            *(f"        a{k}_{q} = a{k}_{q} + {kinds[q]}(k[{q}])" for q in range(count)),
        ]

    def one_by_one(addresses: Any, i: int, start: int, stop: int, h: Any, acc: Any) -> Any:
        """As `part`, where nothing is added up."""
        of_row = slots(h)
        j = i if i > start else start
        end = i + width if i + width < stop else stop
        while j < end:
            stored, _ = value(load_one(addresses, j), of_row)
            store_one(addresses, j, stored)
            j += 1
        return acc

    def made(name: str, arguments: str, lines: Sequence[str]) -> Any:
        source = "\n".join([f"def {name}({arguments}):", *opened, *lines, *closed])
        return target.function(define(source, name, namespace))

    take_many = made("many", "addresses, i, h, acc", many)
    take_whole = made("whole", "addresses, i, h, acc", whole)
    take_part = made("part", "addresses, i, start, stop, h, acc", part) if count else target.function(one_by_one)
    several, reach = vectors > 1, (vectors - 1) * stride + width

    def walk(addresses: Any, h: Any, start: int, stop: int, s: int, first: int, acc: Any) -> Any:
        i = first
        while i < stop:
            if several:  # noqa: SIM102 - a constant, so that what is never called is not compiled
                if s >= 0 and i >= start and i + reach <= stop:
                    acc = take_many(addresses, i, h, acc)
                    i += vectors * stride
                    continue
            if s >= 0 and i >= start and i + width <= stop:
                acc = take_whole(addresses, i, h, acc)
            else:
                acc = take_part(addresses, i, start, stop, h, acc)
            i += stride
        return acc

    return target.function(walk)


def _square(x: Any) -> Any:
    y = np.float64(x)
    return y * y


def _float64(x: Any) -> Any:
    return np.float64(x)
