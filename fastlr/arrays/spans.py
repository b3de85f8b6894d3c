"""Spans of memory: whether arrays overlap."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np

from .places import Memory

__all__ = ["Spans", "shared"]


class Spans:
    """Memory that is apart from each other, to see quickly whether other memory overlaps it.

    Args:
        memory: the address and the bytes of each array.

    Attributes:
        starts, ends: the addresses where spans begin and end, sorted.
    """

    def __init__(self, memory: Iterable[tuple[int, int]]) -> None:
        spans = sorted((address, address + nbytes) for address, nbytes in memory if nbytes)
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]
        self.starts = np.array(self._starts, np.int64)
        self._ends_or_0 = np.array([*self._ends, 0], np.int64)  # the 0 is for index -1: no span begins before
        self.ends = self._ends_or_0[:-1]

    def overlaps(self, address: int, nbytes: int) -> bool:
        """Whether an array overlaps a span."""
        before = bisect.bisect_left(self._starts, address + nbytes) - 1  # the last that begins before its end
        return before >= 0 and self._ends[before] > address and nbytes > 0

    def any_overlaps(self, addresses: Sequence[int] | np.ndarray, nbytes: np.ndarray) -> bool:
        """Whether one of several arrays overlaps a span."""
        if len(addresses) <= 16:  # NumPy takes 7 us for any number up to some hundreds
            return any(map(self.overlaps, map(int, addresses), nbytes.tolist()))
        before = np.searchsorted(self.starts, np.add(addresses, nbytes)) - 1
        return bool(np.any((self._ends_or_0[before] > addresses) & (nbytes > 0)))


def shared(arrays: Iterable[tuple[Memory, str, str]]) -> tuple[str, str] | None:
    """The labels of two arrays that overlap, the one that begins first in front; None if there are none.

    Args:
        arrays: the memory of each, its label, and its owner: arrays of the same owner may overlap.
    """
    furthest, before, owner = 0, "", ""  # while nothing overlaps, no array of another owner reaches as far
    spans = sorted((m.address, m.address + m.nbytes, label, of) for m, label, of in arrays if m.nbytes)
    for start, end, label, of in spans:
        if start < furthest and of != owner:
            return before, label
        if end > furthest:
            furthest, before, owner = end, label, of
    return None
