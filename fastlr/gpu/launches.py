"""The launches of a step on a GPU: which kernels start, in which order, with which arguments."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..kernels import functions, grid
from ..kernels.staging import Staged, define
from .driver import Device, Launch
from .kernels import StepKernels
from .tables import Tables

__all__ = ["Launches", "decider"]


class Launches:
    """The launches of a step with some kernels.

    Args:
        device: the GPU.
        kernels: what is launched.
        tables: by name; "pieces", "averaged" and, if the GPU decides, "tiles" say what the blocks of a launch work on.
        on_board: the tables that `finish` finds by the table "board", by their places there.
        capturing: whether a graph is being captured.

    Attributes:
        block: the tables on the GPU.
        sequence: each launch and its number of blocks, in order.
    """

    def __init__(
        self,
        device: Device,
        kernels: StepKernels,
        tables: Mapping[str, np.ndarray],
        on_board: Mapping[int, np.ndarray],
        capturing: bool,
    ) -> None:
        self._kernels, self._tables, self._on_board = kernels, tables, on_board
        self.block = Tables(device, {**tables, **on_board}, capturing)
        self._pointed, self._gradients = 0, np.zeros(0, np.int64)
        self.sequence: list[tuple[Launch, int]] = []
        self._readers: list[Launch] = []  # of the leaves, by their first argument

    def decided_by_host(self) -> None:
        """One kernel, which takes what `decide` returned as arguments; and one for leaves that are only averaged."""
        self._add_few("update_few", "pieces")
        if len(self._tables["averaged"]):
            self._add_few("average_few", "averaged")

    def decided_by_gpu(self, board: Mapping[int, int]) -> None:
        """`finish` decides, between kernels that measure, and before the one that updates.

        Args:
            board: addresses of the tables of the rows, by their places on the board.
        """
        staged, kernels = self._kernels.staged, self._kernels
        self._fill_board(board)
        last = len(staged.measures)
        ends = staged.spans
        tile_blocks = -(-len(self._tables["tiles"]) // kernels.tiles_in_block)
        if not last:
            self._add_finish(0, 0, grid.DECIDE | grid.COMMIT)
        elif staged.measures[0].source.reads_slots:
            self._add_finish(0, 0, grid.DECIDE)
        for k in range(last):
            self._add(f"measure_{k}", "tiles", tile_blocks, board)
            commit = grid.COMMIT if k == last - 1 else 0
            self._add_finish(ends[k], ends[k + 1], grid.ADD | grid.DECIDE | commit)
        self._add("update", "pieces", tile_blocks if staged.emitted else len(self._tables["pieces"]), board)
        if len(self._tables["averaged"]):
            self._add("average", "averaged", len(self._tables["averaged"]), board)
        if staged.emitted:
            self._add_finish(ends[last], ends[last + 1], grid.ADD)

    def _add(self, name: str, table: str, blocks: int, board: Mapping[int, int]) -> None:
        """A kernel that goes over a table of tiles or pieces."""
        address, count = self.block.address, len(self._tables[table])
        numbers = (address("leaves"), address(table), count, board[grid.H], board[grid.COUNTS], address(grid.CELLS))
        self._add_reader(self._kernels.launch(name, [ctypes.c_int64(x) for x in numbers]), blocks)

    def _add_few(self, name: str, table: str) -> None:
        """A kernel that takes what `decide` returned by value, after its own arguments."""
        number = ctypes.c_float if self._kernels.storage.compute == "float32" else ctypes.c_double
        count = len(self._tables[table])
        own = [ctypes.c_int64(x) for x in (self.block.address("leaves"), self.block.address(table), count)]
        slots = [number() for _ in range(self._kernels.staged.slots)]
        self._add_reader(self._kernels.launch(name, [*own, *slots]), count)

    def _add_reader(self, launch: Launch, blocks: int) -> None:
        self.sequence.append((launch, blocks))
        self._readers.append(launch)

    def _add_finish(self, low: int, high: int, what: int) -> None:
        """The kernel that adds up the quantities from `low` to `high` and decides, as far as `what` says."""
        numbers = (self.block.address("board"), low, high, what)
        self.sequence.append((self._kernels.launch("finish", [ctypes.c_int64(x) for x in numbers]), 1))

    def _fill_board(self, rows: Mapping[int, int]) -> None:
        board, tables = self._tables["board"], self._on_board
        addresses = {**rows, **{place: self.block.address(place) for place in tables}}
        board[[*addresses]] = [*addresses.values()]
        board[grid.LEVEL_COUNT] = len(tables[grid.LEVELS]) - 1
        board[grid.ROWS], board[grid.MODELS] = len(tables[grid.ROOTS]), len(tables[grid.FIRST_ROWS])

    def decide(self, values: Sequence[float]) -> None:
        """Hand over what `decide` returned on the host."""
        for launch in self._readers:
            for argument, value in zip(launch.values[3:], values, strict=False):
                argument.value = value

    def knows(self, gradients: np.ndarray, pointed: int) -> bool:
        """Whether the GPU knows where the gradients are; from now on it does.

        Args:
            gradients: their addresses.
            pointed: see `Plan`; it saves looking at the addresses.
        """
        if pointed == self._pointed:
            return True
        self._pointed = pointed
        if np.array_equal(gradients, self._gradients):
            return True
        self._gradients = gradients.copy()
        return False

    def read_leaves(self, block: Tables) -> None:
        """Read the table of leaves from another block in what is launched from now on."""
        address = block.address("leaves")
        for launch in self._readers:
            launch.values[0].value = address

    def start(self, device: Device, stream: int) -> None:
        """All launches, in order."""
        for launch, blocks in self.sequence:
            device.launch(launch, blocks, stream)


@functools.cache
def decider(staged: Staged) -> Callable[[int, Sequence[float], Sequence[float]], Any]:
    """`decide` on the host, for one row: what the kernel takes, then the new state of the group."""
    fast = define(staged.decide, "decide", functions.for_numbers(staged.decide.calls))
    careful = define(staged.decide, "decide", functions.for_float64(staged.decide.calls))

    def decide(t: int, settings: Sequence[float], scalars: Sequence[float]) -> Any:
        try:
            return fast(t, *settings, *scalars)
        except (ZeroDivisionError, OverflowError, ValueError):  # Python raises where IEEE has an infinity or NaN
            with np.errstate(all="ignore"):
                return careful(t, *map(np.float64, settings), *map(np.float64, scalars))

    return decide
