"""The sums of a step on a GPU, as a list of additions for the kernel `finish`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..step.plans import Entries, Scope

__all__ = ["Additions"]


def _copies(to: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Additions that only copy: `cells[to] = cells[source]`."""
    return np.stack([to, source, np.full(len(to), -1)], axis=1)


def _trees(first: np.ndarray, count: np.ndarray) -> list[np.ndarray]:
    """The additions that add up runs of neighboring cells, each into its first cell, by levels.

    The level with stride s adds cell `j + s` to cell `j`, for each `j` that is a multiple of `2 * s`: trees of
    neighbors, as `kernels.sums` has them.

    Args:
        first: the first cell of each run.
        count: how many cells each run has.

    Returns:
        For each level a table of `(to, one, other)`: `cells[to] = cells[one] + cells[other]`.
    """
    levels, stride = [], 1
    longest = int(count.max(initial=0))
    while stride < longest:
        pairs = np.maximum(0, -(-(count - stride) // (2 * stride)))  # of each run, at this level
        run = np.repeat(np.arange(len(count)), pairs)
        pair = np.arange(len(run)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        to = first[run] + pair * 2 * stride
        levels.append(np.stack([to, to, to + stride], axis=1))
        stride *= 2
    return levels


@dataclass(frozen=True)
class Additions:
    """How the sums over tiles become sums over leaves, groups and models.

    The cells are the sums over tiles, then those over entries, then a copy of the latter for each scope, in which the
    entries of a group or a model are neighbors, so that their tree ends in the first of them.

    Attributes:
        cells: how many cells there are.
        first_entry: the cell with the sum over the first entry.
        program: all additions, see `grid.PROGRAM`.
        levels: where in the program each level starts; additions within one are independent.
        roots: for each row the cell with the sum over its leaf, its group and its model; -1 if there is none.
    """

    cells: int
    first_entry: int
    program: np.ndarray
    levels: np.ndarray
    roots: np.ndarray

    @classmethod
    def of(cls, entries: Entries, scopes: Sequence[Scope], row: np.ndarray, rows: int) -> Additions:
        """The additions of a step.

        Args:
            entries: what it updates.
            scopes: the sums beyond those over a leaf, "group" and "all"; empty if the step takes no sums.
            row: of each entry that is updated.
            rows: how many rows there are.
        """
        tiles, count = entries.updated_tiles, entries.updated
        first_tile = np.cumsum(entries.tiles_of) - entries.tiles_of
        every = np.arange(count)
        roots = np.full((rows, 1 + len(scopes) if scopes else 3), -1, np.int64)
        levels = _trees(first_tile, entries.tiles_of)
        if scopes:
            roots[row, 0] = tiles + every
            copies, starts = [_copies(tiles + every, first_tile)], []
            for k, scope in enumerate(scopes, start=1):
                region = tiles + k * count
                copies.append(_copies(region + every, first_tile[scope.entries]))
                start = region + np.cumsum(scope.counts) - scope.counts
                known = scope.cells >= 0
                roots[known, k] = start[scope.cells[known]]
                starts.append(start)
            levels.append(np.concatenate(copies))
            levels += _trees(np.concatenate(starts), np.concatenate([scope.counts for scope in scopes]))
        program = np.concatenate(levels) if levels else np.zeros((0, 3))
        ends = np.cumsum([0, *map(len, levels)]).astype(np.int64)
        return cls(tiles + 3 * count, tiles, np.ascontiguousarray(program, np.int64), ends, roots)
