"""Targets: what a kernel for many threads is made of on one kind of machine, and a kernel before it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .element import Maker

__all__ = ["Body", "Target", "Tuning", "access_bytes", "width_of"]


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


# Registers that a thread may need for the elements it has loaded, if it is to take eight of them at once. See
# `tests/sass.py`.
_FOR_ELEMENTS = 28


class Target(Maker, Protocol):
    """What kernels are made of on one kind of machine; the functions that it returns are called from kernels."""

    def lanes(
        self, formats: Sequence[str], width: int, read: Sequence[int], written: Sequence[int], tuning: Tuning
    ) -> tuple[Any, Any]:
        """Access to `width` neighboring elements of several columns, aligned to the access.

        Returns:
            `load(addresses, i)`, a tuple of `width` tuples of what the columns `read` hold from element i on, and
            `store(addresses, i, values)` for the columns `written`.
        """

    def elements(self, formats: Sequence[str], read: Sequence[int], written: Sequence[int]) -> tuple[Any, Any]:
        """The same for one element: `load(addresses, i)` and `store(addresses, i, values)`."""

    def row(self, kind: str, count: int, early: bool = False) -> Any:
        """`read(address)`, a tuple of numbers; early: read right where it is called, not where they are needed."""

    def put(self, kind: str) -> Any:
        """`put(address, value)` writes a number."""

    def each(self, phase: Any, arguments: int, threads: int, wait: bool = True) -> Any:
        """`run(*arguments)`: `phase(thread, *arguments)` in all threads of a block; with `wait`, until all are done."""


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
    """How many neighboring elements a thread reads at once."""
    sizes = [np.dtype(f).itemsize for f in formats]
    if min(sizes) == 2:
        # With eight elements of every column a thread would need more than 64 registers for many columns: half of a
        # wide access to the narrow ones is better than half of the threads.
        return 8 if 8 * sum(sizes) <= 4 * _FOR_ELEMENTS else 4
    return 16 // min(sizes)


def access_bytes(kind: str, width: int) -> int:
    """The widest access to a column when a thread reads `width` elements of it."""
    return min(16, width * np.dtype(kind).itemsize)
