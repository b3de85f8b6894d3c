"""Plans on a GPU: the same tables, uploaded when they change, and the launches of a step.

Who knows the counters. Without sums and tests of the gradient one group's step needs nothing that the host does not
know: the host decides, and hands the few numbers to a single kernel by value. Otherwise `decide` runs on the GPU, from
settings that are uploaded when they change, and advances the counters there. The host keeps count as well where it
can; where it cannot (a step may be skipped, a graph may be replayed), whoever asks for a counter waits for it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..kernels import functions, grid
from ..kernels.layout import CLOCK, COUNT, COUNTERS, FIRST_ADDRESS, LEAF, ROW, STEPS, TICKS, T
from ..kernels.staging import Staged, define
from ..step.gradients import Gradients
from ..step.info import StepInfo
from ..step.plans import Plan
from ..step.rows import Rows
from .arrays import DevicePlace
from .driver import Launch
from .gradients import DeviceGradients
from .kernels import StepKernels
from .results import DeviceStepInfo, Results
from .rows import DeviceRows
from .tables import Tables

__all__ = ["DevicePlan"]


def _additions(first: np.ndarray, count: np.ndarray) -> list[np.ndarray]:
    """The additions of trees of neighbours over runs of cells, in levels of rows (to, one, other)."""
    levels, stride = [], 1
    longest = int(count.max()) if len(count) else 0
    while stride < longest:
        per = np.maximum(0, -(-(count - stride) // (2 * stride)))  # places j, multiples of 2 strides, with j + stride
        run = np.repeat(np.arange(len(count)), per)
        j = (np.arange(len(run)) - np.repeat(np.cumsum(per) - per, per)) * 2 * stride
        to = first[run] + j
        levels.append(np.stack([to, to, to + stride], axis=1))
        stride *= 2
    return levels


class DevicePlan(Plan):
    """The tables of a step on a GPU.

    Args:
        args: as for `Plan`.
        more: as for `Plan`.
        place: where the parameters are.
        capturable: whether steps may be captured into a graph.
    """

    rows: DeviceRows

    def __init__(self, *args: Any, place: DevicePlace, capturable: bool, **more: Any) -> None:
        self._place, self._device, self._capturable = place, place.device, capturable
        self._launches: dict[StepKernels, _Launches] = {}
        self._last: _Launches | None = None
        self._expected: tuple[DeviceGradients, list[bool], bool] | None = None
        self._version = 0  # of the leaves: grows when the gradients are elsewhere
        self._made = 0
        super().__init__(*args, **more)

    def _make_sums(self, rows: Rows, staged: Staged, starts: np.ndarray, per: np.ndarray, models: int) -> None:
        """Which cells are added up to which, in levels, and where each row finds its sums."""
        assert isinstance(rows, DeviceRows)
        self.rows, self._staged = rows, staged
        self._gain = self.advance.copy()
        self.advance[-1, STEPS] = self.partial
        entries, tiles = len(starts), self.updated_tiles
        first = np.cumsum(per) - per
        levels = _additions(first, per)
        regions = [tiles, tiles + entries, tiles + 2 * entries]  # sums over leaves, and trees over groups and models
        roots = np.full((len(rows), 3), -1, np.int64)
        self.entry = None
        if staged.quantities:
            model = starts % models
            row = rows.index.reshape(-1)[starts]
            roots[row, 0] = regions[0] + np.arange(entries)
            copies = [np.stack([regions[0] + np.arange(entries), first, np.full(entries, -1)], axis=1)]
            runs_first, runs_count = [], []
            for k, (cell, of_row) in enumerate(
                (
                    (rows.configuration[row] * models + model, rows.configuration * models + rows.model),
                    (model, rows.model),
                ),
                start=1,
            ):
                names, which = np.unique(cell, return_inverse=True)
                order = np.argsort(which, kind="stable")
                size = np.bincount(which, minlength=len(names))
                begin = regions[k] + np.cumsum(size) - size
                copies.append(np.stack([regions[k] + np.arange(entries), first[order], np.full(entries, -1)], axis=1))
                runs_first.append(begin)
                runs_count.append(size)
                at = np.minimum(np.searchsorted(names, of_row), max(0, len(names) - 1))
                known = names[at] == of_row if len(names) else np.zeros(len(of_row), bool)
                roots[known, k] = begin[at[known]]
            levels.append(np.concatenate(copies))
            levels += _additions(np.concatenate(runs_first), np.concatenate(runs_count))
            self.entry = np.full(rows.index.size, -1, np.int64)
            self.entry[starts] = np.arange(entries)
            self.entry = self.entry.reshape(rows.index.shape)
        first_rows = np.full(models, -1, np.int64)
        in_step = np.flatnonzero(self.advance[:-1, STEPS])[::-1]
        first_rows[rows.model[in_step]] = in_step
        self.reports = np.zeros((len(rows), len(staged.reports)))
        self.leaf_sums = np.zeros((entries, staged.quantities))
        self._first_leaf_cell = regions[0]
        self._tables_of_plan: dict[Any, np.ndarray] = {
            grid.ADVANCE: self.advance,
            grid.PROGRAM: np.ascontiguousarray(np.concatenate(levels) if levels else np.zeros((0, 3)), np.int64),
            grid.LEVELS: np.concatenate([[0], np.cumsum([len(level) for level in levels])]).astype(np.int64),
            grid.ROOTS: roots,
            grid.FIRST_ROWS: first_rows,
            grid.REPORTS: self.reports,
            grid.CELLS: np.zeros((tiles + 3 * entries, staged.quantities)),
            "leaves": self.leaves,
            "tiles": self._with_rows(self.tiles[:tiles]),
        }

    def point_gradients(self, addresses: Any, flat: bool) -> None:
        """As `Plan.point_gradients`."""
        self._located = None
        column = addresses + self._flat_offsets if flat else np.asarray(addresses, np.int64)[self._leaf] + self._inside
        mine = self.leaves[: len(self._leaf), FIRST_ADDRESS + 1]
        if not np.array_equal(mine, column):
            self._version += 1
            mine[:] = column

    def expect(self, gradients: Gradients, given: list[Any], flat: bool) -> None:
        """As `Plan.expect`."""
        assert isinstance(gradients, DeviceGradients)
        self._expected = gradients, [array is not None for array in given], flat

    def find(self, given: list[Any]) -> bool:
        """As `Plan.find`."""
        if self._expected is None:
            return False
        gradients, there, flat = self._expected
        if [array is not None for array in given] != there:
            return False
        addresses = gradients.look(given, flat, self.kind)
        if addresses is None:
            return False
        self.point_gradients(addresses[0] if flat else addresses, flat)
        return True

    # A step

    def _pieces(self, kernels: StepKernels, tiles: np.ndarray) -> np.ndarray:
        """What each block takes that goes through tiles: pieces of leaves, cut where vectors begin."""
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

    def _launches_for(self, kernels: StepKernels, stream: int, capturing: bool) -> _Launches:
        """The step with these kernels, its tables uploaded."""
        if kernels not in self._launches:
            updated, others = np.split(self.tiles, [self.updated_tiles])
            emits = self._staged.emitted
            pieces = self._tables_of_plan["tiles"] if emits else self._pieces(kernels, updated)
            averaged = self._pieces(kernels, others)
            if self.rows.decided_by_host:
                tables = {"leaves": self.leaves, "pieces": pieces, "averaged": averaged}
                made = _Launches(self._device, tables, capturing)
                self._pack_few(made, kernels, len(pieces))
            else:
                board = np.zeros(grid.BOARD, np.int64)
                tables = {**self._tables_of_plan, "pieces": pieces, "averaged": averaged, "board": board}
                made = _Launches(self._device, tables, capturing)
                self._fill_board(board, made.block)
                self._pack(made, kernels, len(pieces))
            made.average_blocks = len(averaged)
            if len(averaged):
                self._pack_average(made, kernels, len(averaged))
            made.block.upload(stream, capturing)
            made.leaves_known = self._version
            self._launches[kernels] = made
        return self._launches[kernels]

    def _pack_few(self, made: _Launches, kernels: StepKernels, pieces: int) -> None:
        """The one launch of a step that the host decides."""
        made.update = kernels.launch("update_few", self._arguments_few(made, kernels, "pieces", pieces))
        made.update_blocks = pieces
        self._decide = _host_decide(self._staged)

    def _arguments_few(self, made: _Launches, kernels: StepKernels, table: str, count: int) -> list[Any]:
        """The arguments of a kernel that takes what `decide` returned by value, which follows them."""
        number = ctypes.c_float if kernels.storage.compute == "float32" else ctypes.c_double
        addresses = [ctypes.c_int64(made.block.address(name)) for name in ("leaves", table)]
        return [*addresses, ctypes.c_int64(count), *(number() for _ in range(self._staged.slots))]

    def _arguments(self, made: _Launches, table: str, count: int) -> list[Any]:
        """The arguments of a kernel that goes over a table of tiles or pieces."""
        address, rows = made.block.address, self.rows.board()
        numbers = (address("leaves"), address(table), count, rows[grid.H], rows[grid.COUNTS], address(grid.CELLS))
        return [ctypes.c_int64(x) for x in numbers]

    def _pack_average(self, made: _Launches, kernels: StepKernels, pieces: int) -> None:
        """The launch that averages leaves which are not updated."""
        if self.rows.decided_by_host:
            arguments = self._arguments_few(made, kernels, "averaged", pieces)
            made.average = kernels.launch("average_few", arguments)
        else:
            made.average = kernels.launch("average", self._arguments(made, "averaged", pieces))

    def _fill_board(self, board: np.ndarray, block: Tables) -> None:
        for place, address in self.rows.board().items():
            board[place] = address
        for place in self._tables_of_plan:
            if isinstance(place, int):
                board[place] = block.address(place)
        board[grid.LEVEL_COUNT] = len(self._tables_of_plan[grid.LEVELS]) - 1
        board[grid.ROWS], board[grid.MODELS] = len(self.rows), len(self._tables_of_plan[grid.FIRST_ROWS])

    def _pack(self, made: _Launches, kernels: StepKernels, pieces: int) -> None:
        """The launches of a step that the GPU decides."""
        staged, address, tiles = self._staged, made.block.address, self.updated_tiles

        def finish(low: int, high: int, what: int) -> Launch:
            return kernels.launch("finish", [ctypes.c_int64(x) for x in (address("board"), low, high, what)])

        last = len(staged.measures)
        made.tile_blocks = -(-tiles // kernels.tiles_in_block)
        made.update_blocks = made.tile_blocks if staged.emitted else pieces
        made.update = kernels.launch("update", self._arguments(made, "pieces", pieces))
        made.measures = [kernels.launch(f"measure_{k}", self._arguments(made, "tiles", tiles)) for k in range(last)]
        ends = staged.spans
        for k in range(last):
            commit = grid.COMMIT if k == last - 1 else 0
            made.finishes.append(finish(ends[k], ends[k + 1], grid.ADD | grid.DECIDE | commit))
        if not last:
            made.first = finish(0, 0, grid.DECIDE | grid.COMMIT)
        elif staged.measures[0].source.reads_slots:
            made.first = finish(0, 0, grid.DECIDE)
        if staged.emitted:
            made.after = finish(ends[last], ends[last + 1], grid.ADD)

    def run(self, kernel: Any, threads: int, stream: int | None = None) -> None:
        """Start the step in a stream, by default the caller's current one; waits for nothing.

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
        made = self._launches_for(kernel, stream, capturing)
        if capturing:
            # The graph gets leaves of its own: those of later steps must not change what it reads.
            captured = Tables(self._device, {"leaves": self.leaves.copy()}, capturing)
            captured.upload(stream, capturing)
            rows.captured = True
            assert rows.block is not None
            for tables in (captured, made.block, rows.block):
                tables.keep_for_graph()
            made.read_leaves(captured)
        elif made.leaves_known != self._version:
            made.block.upload(stream, False, ["leaves"])
            made.leaves_known = self._version
        self._last = made
        if rows.decided_by_host:
            self._run_few(made, stream)
            self._made = generation
            return
        made.start(self._device, stream)
        self._made = generation
        if capturing:
            made.read_leaves(made.block)
        if self._capturable:
            rows.replayed()
        elif rows.host_counts and rows.host_knows:
            rows.advanced(self._counted())
        else:
            rows.host_knows = False

    def has_made(self, generation: int) -> bool:
        """As `Plan.has_made`."""
        return self._made == generation

    def count_part(self, rows: Rows, number: int) -> None:
        """As `Plan.count_part`; where the host does not know the counters, a kernel finds out."""
        if self.rows.host_knows:
            super().count_part(rows, number)

    def _counted(self) -> np.ndarray:
        """What the step adds to the counters that the host keeps."""
        self._gain[-1, TICKS] = self.advance[-1, TICKS]
        return self._gain

    def _run_few(self, made: _Launches, stream: int) -> None:
        rows, slots = self.rows, self._staged.slots
        rows.pull()
        values = self._decide(int(rows.counters[0, T]) + 1, rows.settings(), rows.scalars[0].tolist())
        assert made.update is not None
        for launch in (made.update, made.average):
            for to, value in zip(launch.values[3:] if launch is not None else (), values, strict=False):
                to.value = value
        self._device.launch(made.update, made.update_blocks, stream)
        if made.average is not None:
            self._device.launch(made.average, made.average_blocks, stream)
        if self.advance[0, STEPS]:
            rows.scalars[0] = values[slots:]
        rows.advanced(self._counted())
        rows.device_knows = False

    # What it reported

    def info(self, rows: Rows, lrs: Any, grad_scale: Any) -> StepInfo:
        """As `Plan.info`; what only the GPU knows is fetched when somebody asks."""
        assert isinstance(rows, DeviceRows)
        steps = int(rows.counters[-1, CLOCK]) if rows.host_knows else None
        if self.layout is None and steps is not None:
            return StepInfo(steps, lrs)
        assert self._last is not None
        results = Results(self._device, rows.stream, steps, self._found(self._last.block), live=self._capturable)
        rows.latest = weakref.ref(results)
        return DeviceStepInfo(results, lrs, self.layout, grad_scale)

    def _found(self, block: Tables) -> list[tuple[int, np.ndarray, Any]]:
        """Where the results of a step are, as arrays of their size, and what keeps that memory."""
        rows, quantities, own = self.rows.board(), self._staged.quantities, self.rows.block
        models = len(self._tables_of_plan[grid.FIRST_ROWS])
        used = rows[grid.LOSS] + 2 * models * 8 if rows[grid.LOSS] else 0
        return [
            (rows[grid.COUNTS] + len(self.rows) * COUNTERS * 8, np.zeros(COUNTERS, np.int64), own),
            (block.address(grid.REPORTS), np.zeros_like(self.reports), block),
            (block.address(grid.CELLS) + self._first_leaf_cell * quantities * 8, np.zeros_like(self.leaf_sums), block),
            (used, np.zeros(models if used else 0), own),
        ]


class _Launches:
    """The launches of a step with certain kernels, and their tables.

    Args:
        device: the GPU.
        tables: the tables of the plan.
        capturing: whether a graph is being captured.

    Attributes:
        block: the tables.
        leaves_known: the version of the leaves that the GPU has.
        first: decides before anything is measured.
        measures, finishes: the reading passes, and what adds up and decides after each.
        update: the rule.
        average: averages leaves that are not updated.
        after: adds up what the update emitted.
        tile_blocks, update_blocks, average_blocks: how many blocks the measures, the update and `average` have.
    """

    def __init__(self, device: Any, tables: Mapping[Any, np.ndarray], capturing: bool) -> None:
        self.block = Tables(device, tables, capturing)
        self.leaves_known = -1
        self.first: Launch | None = None
        self.measures: list[Launch] = []
        self.finishes: list[Launch] = []
        self.update: Launch | None = None
        self.average: Launch | None = None
        self.after: Launch | None = None
        self.tile_blocks = self.update_blocks = self.average_blocks = 0

    def start(self, device: Any, stream: int) -> None:
        """All launches, in order."""
        if self.first is not None:
            device.launch(self.first, 1, stream)
        for measure, finish in zip(self.measures, self.finishes, strict=True):
            device.launch(measure, self.tile_blocks, stream)
            device.launch(finish, 1, stream)
        device.launch(self.update, self.update_blocks, stream)
        if self.average is not None:
            device.launch(self.average, self.average_blocks, stream)
        if self.after is not None:
            device.launch(self.after, 1, stream)

    def read_leaves(self, block: Tables) -> None:
        """Take the table of leaves from another block in what is launched from now on."""
        for launch in (self.update, self.average, *self.measures):
            if launch is not None:
                launch.values[0].value = block.address("leaves")


def _host_decide(staged: Staged) -> Callable[[int, Sequence[float], Sequence[float]], Any]:
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
