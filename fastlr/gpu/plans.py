"""Plans on a GPU: the tables of a step, uploaded when they change, and its launches.

If a step takes no sums, does not test its gradients and has one row, the host knows all that `decide` needs: then the
host decides, and passes the few numbers to a single kernel by value. Otherwise `decide` runs on the GPU, from settings
that are uploaded when they change, and advances the counters there. The host counts along where it can; where it cannot
(a step may be skipped, a graph may be replayed), whoever asks for a counter waits for the GPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from ..kernels import grid
from ..kernels.layout import CLOCK, COUNT, COUNTERS, FIRST_ADDRESS, LEAF, ROW, STEPS, TICKS, T
from ..kernels.staging import Staged
from ..step.info import StepInfo
from ..step.plans import Entries, Plan, Scope
from ..step.scheduled import Rates
from .additions import Additions
from .arrays import DevicePlace
from .gradients import DeviceGradients
from .kernels import StepKernels
from .launches import Launches, decider
from .results import DeviceStepInfo, Result, Results
from .rows import DeviceRows
from .tables import Tables

__all__ = ["DevicePlan"]


class DevicePlan(Plan):
    """A step on a GPU.

    Args:
        entries: as for `Plan`.
        rows: as for `Plan`.
        staged: as for `Plan`.
        advance: as for `Plan`.
        grad_format: as for `Plan`.
        partial: as for `Plan`.
        place: where the parameters are.
        capturable: whether steps may be captured into a graph.
    """

    rows: DeviceRows

    def __init__(
        self,
        entries: Entries,
        rows: DeviceRows,
        staged: Staged,
        advance: np.ndarray,
        grad_format: str,
        partial: bool,
        place: DevicePlace,
        capturable: bool,
    ) -> None:
        super().__init__(entries, rows, staged, advance, grad_format, partial)
        self._place, self._device, self._capturable = place, place.device, capturable
        self.launches: dict[StepKernels, Launches] = {}
        self._last: Launches | None = None
        self._expected: tuple[DeviceGradients, list[bool], bool] | None = None
        self._made = 0
        self._gain = advance.copy()  # what the step adds to the counters that the host keeps
        advance[-1, STEPS] = partial
        self._tiles = self._with_rows(self.tiles[: self.updated_tiles])
        self._on_board = self._make_tables()

    def _make_tables(self) -> dict[int, np.ndarray]:
        """The tables of a step that a GPU decides, by their places on the board."""
        rows, entries, staged = self.rows, self.entries, self.staged
        scopes = Scope.both(entries, rows) if staged.quantities else ()
        row = rows.index.reshape(-1)[entries.starts]
        additions = self._additions = Additions.of(entries, scopes, row, len(rows))
        first_rows = np.full(rows.index.shape[1], -1, np.int64)
        in_step = np.flatnonzero(self.advance[:-1, STEPS])[::-1]
        first_rows[rows.model[in_step]] = in_step
        return {
            grid.ADVANCE: self.advance,
            grid.PROGRAM: additions.program,
            grid.LEVELS: additions.levels,
            grid.ROOTS: additions.roots,
            grid.FIRST_ROWS: first_rows,
            grid.REPORTS: self.reports,
            grid.CELLS: np.zeros((additions.cells, staged.quantities)),
        }

    # Gradients

    def expect(self, gradients: DeviceGradients, given: list[Any], flat: bool) -> None:
        """As `Plan.expect`."""
        self._expected = gradients, [array is not None for array in given], flat

    def find(self, given: list[Any]) -> bool:
        """As `Plan.find`."""
        if self._expected is None:
            return False
        gradients, there, flat = self._expected
        if [array is not None for array in given] != there:
            return False
        addresses = gradients.look(given, flat, self.grad_format)
        if addresses is None:
            return False
        self.point_gradients(addresses[0] if flat else addresses, flat)
        return True

    # A step

    def run(self, kernel: StepKernels, threads: int, stream: int | None = None) -> None:
        """Start the step; waits for nothing.

        Raises:
            RuntimeError: if the stream is being captured and the optimizer is not capturable.
        """
        rows = self.rows
        generation = self.next_generation
        self.next_generation = generation + 1
        stream = self._place.stream() if stream is None else stream
        self._device.enter()
        capturing = self._device.capturing(stream)
        if capturing and not self._capturable:
            raise RuntimeError(
                "the current stream is being captured into a graph, but what changes from step to step is on the "
                "host. Build the optimizer with capturable=True."
            )
        averages = len(self.tiles) > self.updated_tiles
        kernel.prepare(rows.decided_by_host, averages)  # a kernel that fails to load fails before anything is counted
        if not rows.decided_by_host:
            rows.ready(stream, capturing)
            if not self._capturable:
                rows.keep_latest(stream)
        rows.made_in(stream)
        launches = self._last = self._launches_for(kernel, stream, capturing)
        if capturing:
            self._capture(launches, stream)
        else:
            self._upload_leaves(launches, stream)
        decided = self._decide(launches) if rows.decided_by_host else None
        launches.start(self._device, stream)
        self._made = generation
        if capturing:
            launches.read_leaves(launches.block)
        self._count(decided)

    def _launches_for(self, kernels: StepKernels, stream: int, capturing: bool) -> Launches:
        """The launches with these kernels, their tables uploaded."""
        if kernels not in self.launches:
            updated, averaged = np.split(self.tiles, [self.updated_tiles])
            emits = bool(self.staged.emitted)  # then the update adds up over tiles
            tables = {
                "leaves": self.leaves,
                "pieces": self._tiles if emits else self._pieces(kernels, updated),
                "averaged": self._pieces(kernels, averaged),
            }
            on_board: dict[int, np.ndarray] = {}
            if not self.rows.decided_by_host:
                on_board = self._on_board
                tables["tiles"], tables["board"] = self._tiles, np.zeros(grid.BOARD, np.int64)
            launches = Launches(self._device, kernels, tables, on_board, capturing)
            if self.rows.decided_by_host:
                launches.decided_by_host()
            else:
                launches.decided_by_gpu(self.rows.board())
            launches.block.upload(stream, capturing)
            launches.knows(self.gradients, self.pointed)
            self.launches[kernels] = launches
        return self.launches[kernels]

    def _pieces(self, kernels: StepKernels, tiles: np.ndarray) -> np.ndarray:
        """What each block takes that goes through tiles: pieces of entries, cut where vectors start."""
        itemsize = np.dtype(kernels.storage.compute).itemsize
        sizes = np.bincount(tiles[:, LEAF], tiles[:, COUNT], minlength=len(self.leaves)).astype(np.int64)
        shift = (self.leaves[:, FIRST_ADDRESS] // itemsize) % kernels.width
        per = -(-(sizes + shift) // kernels.piece) * (sizes > 0)
        entry = np.repeat(np.arange(len(sizes)), per)
        k = np.arange(len(entry)) - np.repeat(np.cumsum(per) - per, per)
        begin = np.maximum(0, k * kernels.piece - shift[entry])
        end = np.minimum(sizes[entry], (k + 1) * kernels.piece - shift[entry])
        return self._with_rows(np.stack([entry, begin, end - begin], axis=1))

    def _with_rows(self, tiles: np.ndarray) -> np.ndarray:
        """Tiles or pieces, with the row of each."""
        return np.ascontiguousarray(np.concatenate([tiles, self.leaves[tiles[:, LEAF], ROW][:, None]], axis=1))

    def _capture(self, launches: Launches, stream: int) -> None:
        """Give the graph leaves of its own: those of later steps must not change what it reads."""
        captured = Tables(self._device, {"leaves": self.leaves.copy()}, True)
        captured.upload(stream, True)
        self.rows.captured = True
        assert self.rows.block is not None
        for tables in (captured, launches.block, self.rows.block):
            tables.keep_for_graph()
        launches.read_leaves(captured)

    def _upload_leaves(self, launches: Launches, stream: int) -> None:
        """Let the GPU have the addresses of gradients that are elsewhere than in its last step."""
        if not launches.knows(self.gradients, self.pointed):
            launches.block.upload(stream, False, ["leaves"])

    def _decide(self, launches: Launches) -> Any:
        """Decide on the host and hand over the result; returns the new state of the rule that is not an element's."""
        rows = self.rows
        rows.download()
        values = decider(self.staged)(int(rows.counters[0, T]) + 1, rows.settings(), rows.scalars[0].tolist())
        launches.decide(values)
        return values[self.staged.slots :]

    def _count(self, decided: Any) -> None:
        """Count along on the host where it can; else note that only the GPU knows.

        Args:
            decided: what `_decide` returned; None if the GPU decided.
        """
        rows = self.rows
        self._gain[-1, TICKS] = self.advance[-1, TICKS]
        if decided is not None:
            if self.advance[0, STEPS]:
                rows.scalars[0] = decided
            rows.advanced(self._gain)
            rows.device_knows = False
        elif self._capturable:
            rows.replayed()
        elif rows.host_counts and rows.host_knows:
            rows.advanced(self._gain)
        else:
            rows.host_knows = False

    def has_made(self, generation: int) -> bool:
        """As `Plan.has_made`."""
        return self._made == generation

    def info(self, rates: Rates, grad_scale: Any) -> StepInfo:
        """As `Plan.info`; what only the GPU knows is downloaded when somebody asks."""
        rows = self.rows
        steps = int(rows.counters[-1, CLOCK]) if rows.host_knows else None
        if self.layout is None and steps is not None:
            return StepInfo(steps, rates)
        assert self._last is not None
        results = Results(self._device, rows.stream, steps, self._results(self._last.block), live=self._capturable)
        rows.latest = weakref.ref(results)
        return DeviceStepInfo(results, rates, self.layout, grad_scale)

    def _results(self, block: Tables) -> list[Result]:
        """Where the results of a step are: counters of the optimizer, reports, sums over leaves, and loss scales."""
        board, quantities, own = self.rows.board(), self.staged.quantities, self.rows.block
        models = self.rows.index.shape[1]
        sums = np.zeros((self.entries.updated, quantities))
        used = board[grid.LOSS] + 2 * models * 8 if board[grid.LOSS] else 0
        return [
            Result(board[grid.COUNTS] + len(self.rows) * COUNTERS * 8, np.zeros(COUNTERS, np.int64), own),
            Result(block.address(grid.REPORTS), np.zeros_like(self.reports), block),
            Result(block.address(grid.CELLS) + self._additions.first_entry * quantities * 8, sums, block),
            Result(used, np.zeros(models if used else 0), own),
        ]
