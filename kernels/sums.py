"""Sums in a fixed shape, so that threads, tiles and backends give the same bits.

A leaf is cut into blocks of `BLOCK` elements from its start. A block is summed in `LANES` float64 lanes: lane j takes
the elements j, j + LANES, ... in their order; then the lanes are halved, j + width onto j, down to one. Blocks of a
leaf, and leaves of a group or of everything, are added as a tree of neighbors (`fold`). Nothing depends on who adds
what, or on how the leaves are laid out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 16_384  # elements
LANES = 128


def fold(values: Any, first: int, count: int, column: int) -> None:
    """Add `count` rows of one column as a tree of neighbors, in place; the sum is left in the first row."""
    while count > 1:
        half = count // 2
        for k in range(half):
            values[first + k, column] = values[first + 2 * k, column] + values[first + 2 * k + 1, column]
        if count % 2 == 1:
            values[first + half, column] = values[first + count - 1, column]
        count = half + count % 2


def block(x: np.ndarray) -> np.ndarray:
    """The sum over one block, by NumPy.

    Args:
        x: at most `BLOCK` float64 numbers.
    """
    padded = np.zeros(-(-x.size // LANES) * LANES)
    padded[: x.size] = x
    lanes = np.zeros(LANES)
    for line in padded.reshape(-1, LANES):
        lanes = lanes + line
    while lanes.size > 1:
        half = lanes.size // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]
