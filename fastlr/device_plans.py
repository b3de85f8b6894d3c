"""Plans on a GPU: the same tables, uploaded when they change, and the launches of a step.

Who knows the counters. Without sums and tests of the gradient one group's step needs nothing that the host does not
know: the host decides, and hands the few numbers to a single kernel by value. Otherwise `decide` runs on the GPU, from
settings that are uploaded when they change, and advances the counters there. The host keeps count as well where it
can; where it cannot (a step may be skipped, a graph may be replayed), whoever asks for a counter waits for it.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import places
from .device_arrays import DevicePlace
from .devices import Launch
from .kernels import grid
from .kernels.layout import CLOCK, COUNT, COUNTERS, FIRST_ADDRESS, LEAF, ROW, STEPS, TICKS, T
from .kernels.primitives import power, real_power, sqrt
from .kernels.staging import Staged, define
from .kernels.tiles import Storage
from .loss_scale import LossScale
from .plans import Plan
from .rows import Counts, Rows
from .scheduled import Formula, Rates
from .step_info import Layout, StepInfo

__all__ = ["DevicePlan", "DeviceRows", "DeviceStepInfo", "StepKernels"]

_ALIGNMENT = 256


class StepKernels:
    """The kernels of a step on one GPU, compiled or loaded when they are first needed.

    Args:
        device: the GPU.
        staged: the rule.
        storage: how its columns stand in memory.
        tuning: how the work is cut.
        formulas: the hyperparameters that `decide` has to evaluate itself.

    Attributes:
        compile_s: seconds spent compiling or loading so far.
        piece: elements of a block of the update.
        width: neighbouring elements that a thread takes at once.
    """

    takes_helpers = False

    def __init__(
        self,
        device: Any,
        staged: Staged,
        storage: Storage,
        tuning: grid.Tuning | None = None,
        formulas: tuple[Formula, ...] = (),
    ) -> None:
        self.device, self.staged, self.storage, self.formulas = device, staged, storage, formulas
        self.tuning = tuning or grid.Tuning()
        self.compile_s = 0.0
        self.piece = grid.piece_size(staged, storage, self.tuning)
        self.width = grid.width_of(storage.columns(staged))
        self.tiles_in_block = grid.tiles_in_block(staged, storage)
        self._made: dict[str, tuple[Any, int]] = {}

    def get(self, name: str) -> tuple[Any, int]:
        """The handle of a kernel and the threads in its blocks: "finish", "update", "update_few", "measure_0", ..."""
        if name not in self._made:
            began = time.perf_counter()
            content = (self.staged, self.storage, self.tuning, name, *(self.formulas if name == "finish" else ()))
            try:
                self._made[name] = self.device.kernel(self._maker(name), self.staged.name, content)
            except Exception as error:
                own = [f.uniform for f in self.formulas if f.functions]
                if name != "finish" or not own:
                    raise
                raise ValueError(
                    f"the function that {' and '.join(own)} follows cannot be compiled by Numba for a GPU. Write it "
                    f"with arithmetic and the functions of math, or take a schedule. Numba says: {_last_line(error)}"
                ) from error
            self.compile_s += time.perf_counter() - began
        return self._made[name]

    def _maker(self, name: str) -> Callable[[grid.Target], grid.Body]:
        staged, storage, tuning = self.staged, self.storage, self.tuning
        if name == "finish":
            return lambda target: grid.finish(target, staged, storage, self.formulas)
        if name.startswith("measure_"):
            return lambda target: grid.measure(target, staged, storage, int(name.removeprefix("measure_")), tuning)
        return lambda target: grid.update(target, staged, storage, tuning, by_value=name == "update_few")

    def prepare(self, few: bool) -> None:
        """Compile or load what a step needs."""
        names = ["update_few"] if few else ["finish", "update", *(f"measure_{k}" for k in range(self.measures))]
        for name in names:
            self.get(name)

    @property
    def measures(self) -> int:
        """How many reading passes there are."""
        return len(self.staged.measures)

    def launch(self, name: str, values: Sequence[Any]) -> Launch:
        """A kernel with arguments."""
        function, threads = self.get(name)
        return Launch(function, threads, values)


def _last_line(error: Exception) -> str:
    """What an error says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line or "annot" in line or "ntyped" in line), (lines or ["?"])[0])


class _Block:
    """Several tables in one piece of a GPU's memory, and their contents on the host.

    Args:
        device: the GPU.
        tables: the content of each; their arrays are kept, so that later uploads have what stands in them then.
    """

    def __init__(self, device: Any, tables: Mapping[Any, np.ndarray], capturing: bool) -> None:
        self._device, self.tables = device, tables
        self._offsets, size = {}, 0
        for key, table in tables.items():
            self._offsets[key] = size
            size += -(-max(table.nbytes, 8) // _ALIGNMENT) * _ALIGNMENT
        self._memory = device.table_memory(size, capturing)
        self._size = size
        weakref.finalize(self, device.release_tables, self._memory)

    def address(self, key: Any) -> int:
        """Where a table is."""
        return int(self._memory[0] + self._offsets[key])

    def upload(self, stream: int, capturing: bool, keys: Sequence[Any] | None = None) -> None:
        """Copy tables to the GPU, all at once or some."""
        if keys is None:
            everything = np.zeros(self._size, np.uint8)
            for key, table in self.tables.items():
                first = self._offsets[key]
                everything[first : first + table.nbytes] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
            parts = [(self._memory[0], everything)]
        else:
            parts = [(self.address(key), np.ascontiguousarray(self.tables[key])) for key in keys]
        for address, part in parts:
            if capturing:
                self._device.upload_now(address, part)
            else:
                self._device.upload(address, part, stream)

    def download(self, keys: Sequence[Any], stream: int) -> None:
        """Copy tables back into their arrays on the host; waits."""
        for key in keys:
            self._device.download(self.tables[key], self.address(key), stream)


class DeviceRows(Rows):
    """Rows whose counters a GPU advances; arguments as for `Rows`."""

    latest: Callable[[], Results | None] | None = None  # of the step made last, of whatever plan
    block: _Block | None = None
    host_knows, device_knows = True, False
    settings_known = False
    captured = False  # whether a graph knows where the tables are
    stream = 0  # of the step made last: what it found out is there in the order of this stream

    def install(
        self,
        place: DevicePlace,
        staged: Staged,
        table: np.ndarray,
        h: np.ndarray,
        models: int,
        loss_scale: LossScale | None,
        capturable: bool,
    ) -> None:
        """Give the rows memory on a GPU, for a staged rule and its settings.

        Args:
            place: where.
            staged: the rule.
            table: settings of each row, as the host has them.
            h: room for what `decide` returns.
            models: number of models.
            loss_scale: whose state is on the GPU.
            capturable: whether steps may be made that the host does not see.
        """
        self._place, self._staged, self._table, self._loss_scale = place, staged, table, loss_scale
        # The host knows all that `decide` needs, and hands over what comes out.
        self.decided_by_host = not capturable and len(self) == 1 and not (staged.quantities or staged.reports)
        # The host can count as well as the GPU.
        self.host_counts = not capturable and "finite" not in staged.reports and not staged.scalars
        self._models = models
        self._tables: dict[Any, np.ndarray] = {
            grid.SETTINGS: table,
            grid.COUNTS: self.counters,
            grid.H: h,
            grid.SCALARS: self.scalars,
            grid.FLAGS: np.zeros(3, np.int64),
            grid.MODELS_OF_ROWS: self.model.astype(np.int64),
        }
        if loss_scale is not None:
            rule = loss_scale.growth, loss_scale.backoff, loss_scale.interval
            self._tables[grid.LOSS_RULE] = np.array(rule, np.float64)

    def settings(self) -> list[float]:
        """What `decide` takes of the first row."""
        return self._table[0, : len(self._staged.uniforms)].tolist()

    def board(self) -> dict[int, int]:
        """Addresses of the tables, by their places in a board."""
        assert self.block is not None
        found = {key: self.block.address(key) for key in self._tables}
        found[grid.LOSS] = self._loss_scale.address if self._loss_scale is not None else 0
        return found

    def ready(self, stream: int, capturing: bool) -> None:
        """Bring what the GPU has up to date."""
        if self.block is None:
            self.block = _Block(self._place.device, self._tables, capturing)
        if not self.device_knows:
            self.block.upload(stream, capturing)
            self.device_knows = self.settings_known = True
        elif not self.settings_known:
            self.block.upload(stream, capturing, [grid.SETTINGS])
            self.settings_known = True

    def made_in(self, stream: int) -> None:
        """The stream of the step that is about to be made."""
        self.stream = stream
        if self._loss_scale is not None:
            self._loss_scale.stream = stream

    def keep_latest(self, stream: int) -> None:
        """Before the results of the last step are overwritten, put them aside if somebody may still ask for them."""
        latest = self.latest() if self.latest is not None else None
        if latest is not None:
            latest.keep(stream)
            self.latest = None

    def push(self) -> None:
        """Bring what the GPU has up to date, in the order of the current stream."""
        if self.block is not None:
            self.ready(self._place.stream(), False)

    def replace(self, new: Rows) -> bool:
        """Take over the counts of other rows, if the same leaves share them; whether it was possible."""
        fits = all(
            np.array_equal(getattr(self, name), getattr(new, name))
            for name in ("index", "configuration", "model", "frozen", "by_leaf")
        )
        if fits:
            self.counters[:], self.scalars[:] = new.counters, new.scalars
            self.host_knows, self.device_knows = not self._replays, False
        return fits

    def advanced(self, advance: np.ndarray) -> None:
        """A step whose counting the host can follow has been made."""
        self.counters[:, T] += advance[:, STEPS]
        self.counters[:, CLOCK] += advance[:, TICKS]

    def pull(self) -> None:
        """Learn from the GPU what only it knows; waits for it."""
        if not self.host_knows and self.block is not None:
            self.block.download([grid.COUNTS, grid.SCALARS], self.stream)
            self.host_knows = not self._replays

    _replays = False

    def replayed(self) -> None:
        """From now on steps may be made that the host does not see."""
        self._replays, self.host_knows = True, False

    @property
    def steps(self) -> int:
        """Steps of the optimizer; waits for the GPU if only it knows."""
        self.pull()
        return int(self.counters[-1, CLOCK])

    def counts(self) -> Counts:
        """What has been counted; waits for the GPU if only it knows."""
        self.pull()
        return super().counts()


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
        partial: whether it is a plan of a step of a part.
    """

    rows: DeviceRows

    def __init__(self, *args: Any, place: DevicePlace, capturable: bool, partial: bool, **more: Any) -> None:
        self._place, self._device, self._capturable = place, place.device, capturable
        self._launches: dict[StepKernels, _Launches] = {}
        self._last: _Launches | None = None
        self._captured: list[_Block] = []
        self._known: tuple[list[Any], list[int], Callable[[Any], int]] | None = None
        self._version = 0  # of the leaves: grows when the gradients are elsewhere
        self._partial = partial
        super().__init__(*args, **more)

    def _make_sums(self, rows: Rows, staged: Staged, starts: np.ndarray, per: np.ndarray, models: int) -> None:
        """Which cells are added up to which, in levels, and where each row finds its sums."""
        assert isinstance(rows, DeviceRows)
        self.rows, self._staged = rows, staged
        self._gain = self.advance.copy()
        self.advance[-1, STEPS] = self._partial
        entries, tiles = len(starts), len(self.tiles)
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
            "tiles": self._with_rows(self.tiles),
        }

    def points_at(self, arrays: list[Any]) -> bool:
        """Whether the gradients in the plan are these very arrays, with their memory where it was."""
        if self._known is None or len(self._known[0]) != len(arrays):
            return False
        references, addresses, address_of = self._known
        same = all(reference() is array for reference, array in zip(references, arrays, strict=True))
        return same and list(map(address_of, arrays)) == addresses

    def point_gradients(self, addresses: Any, arrays: list[Any] | None) -> None:
        """As `Plan.point_gradients`."""
        self._point(np.asarray(addresses, np.int64)[self._leaf] + self._inside)
        self._remember_each(addresses, arrays)

    def point_flat_gradient(self, address: int, arrays: list[Any] | None) -> None:
        """As `Plan.point_flat_gradient`."""
        self._point(address + self._flat_offsets)
        self._remember_each([address], arrays)

    def _remember_each(self, addresses: list[int], arrays: list[Any] | None) -> None:
        """Remember gradients that are read where they are; their memory can still change."""
        if arrays is None or len(set(map(type, arrays))) != 1:
            return
        try:
            self._known = list(map(weakref.ref, arrays)), addresses, places.of(arrays[0]).address
        except TypeError:  # arrays of a kind that cannot be remembered
            self._known = None

    def _point(self, column: np.ndarray) -> None:
        self._known = None
        mine = self.leaves[: len(self._leaf), FIRST_ADDRESS + 1]
        if not np.array_equal(mine, column):
            mine[:] = column
            self._version += 1

    # A step

    def _pieces(self, kernels: StepKernels) -> np.ndarray:
        """What each block of the update takes: pieces of leaves, cut where vectors begin."""
        if self._staged.emitted:
            return self._tables_of_plan["tiles"]
        itemsize = np.dtype(kernels.storage.compute).itemsize
        sizes = np.bincount(self.tiles[:, LEAF], self.tiles[:, COUNT], minlength=len(self.leaves)).astype(np.int64)
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
            pieces = self._pieces(kernels)
            if self.rows.decided_by_host:
                made = _Launches(self._device, {"leaves": self.leaves, "pieces": pieces}, capturing)
                self._pack_few(made, kernels, len(pieces))
            else:
                board = np.zeros(grid.BOARD, np.int64)
                tables = {**self._tables_of_plan, "pieces": pieces, "board": board}
                made = _Launches(self._device, tables, capturing)
                self._fill_board(board, made.block)
                self._pack(made, kernels, len(pieces))
            made.block.upload(stream, capturing)
            made.leaves_known = self._version
            self._launches[kernels] = made
        return self._launches[kernels]

    def _pack_few(self, made: _Launches, kernels: StepKernels, pieces: int) -> None:
        """The one launch of a step that the host decides."""
        number = ctypes.c_float if kernels.storage.compute == "float32" else ctypes.c_double
        addresses = [ctypes.c_int64(made.block.address(name)) for name in ("leaves", "pieces")]
        slots = [number() for _ in range(self._staged.slots)]
        made.update = kernels.launch("update_few", [*addresses, ctypes.c_int64(pieces), *slots])
        made.update_blocks = pieces
        self._decide = _host_decide(self._staged)

    def _fill_board(self, board: np.ndarray, block: _Block) -> None:
        for place, address in self.rows.board().items():
            board[place] = address
        for place in self._tables_of_plan:
            if isinstance(place, int):
                board[place] = block.address(place)
        board[grid.LEVEL_COUNT] = len(self._tables_of_plan[grid.LEVELS]) - 1
        board[grid.ROWS], board[grid.MODELS] = len(self.rows), len(self._tables_of_plan[grid.FIRST_ROWS])

    def _pack(self, made: _Launches, kernels: StepKernels, pieces: int) -> None:
        """The launches of a step that the GPU decides."""
        staged, address, rows = self._staged, made.block.address, self.rows.board()

        def over(table: str, count: int) -> list[Any]:
            numbers = (address("leaves"), address(table), count, rows[grid.H], rows[grid.COUNTS], address(grid.CELLS))
            return [ctypes.c_int64(x) for x in numbers]

        def finish(low: int, high: int, what: int) -> Launch:
            return kernels.launch("finish", [ctypes.c_int64(x) for x in (address("board"), low, high, what)])

        last = len(staged.measures)
        made.tile_blocks = -(-len(self.tiles) // kernels.tiles_in_block)
        made.update_blocks = made.tile_blocks if staged.emitted else pieces
        made.update = kernels.launch("update", over("pieces", len(self.tiles) if staged.emitted else pieces))
        made.measures = [kernels.launch(f"measure_{k}", over("tiles", len(self.tiles))) for k in range(last)]
        ends = np.cumsum([0, *(len(m.kinds) for m in staged.measures), len(staged.emitted)]).tolist()
        for k in range(last):
            commit = grid.COMMIT if k == last - 1 else 0
            made.finishes.append(finish(ends[k], ends[k + 1], grid.ADD | grid.DECIDE | commit))
        if not last:
            made.first = finish(0, 0, grid.DECIDE | grid.COMMIT)
        elif grid.reads_slots(staged.measures[0].source):
            made.first = finish(0, 0, grid.DECIDE)
        if staged.emitted:
            made.after = finish(ends[last], ends[last + 1], grid.ADD)

    def run(self, kernel: Any, threads: int, stream: int | None = None) -> None:
        """Start the step in a stream, by default the caller's current one; waits for nothing.

        Raises:
            RuntimeError: if the stream is being captured and the optimizer is not capturable.
        """
        rows = self.rows
        stream = self._place.stream() if stream is None else stream
        self._device.enter()
        capturing = self._device.capturing(stream)
        if capturing and not self._capturable:
            raise RuntimeError(
                "the current stream is being captured into a graph, but what changes from step to step is on the "
                "host. Build the optimizer with capturable=True."
            )
        kernel.prepare(rows.decided_by_host)  # a kernel that fails to load fails before anything is counted
        if not rows.decided_by_host:
            rows.ready(stream, capturing)
            if not self._capturable:
                rows.keep_latest(stream)
        rows.made_in(stream)
        made = self._launches_for(kernel, stream, capturing)
        if capturing:
            # The graph gets leaves of its own: those of later steps must not change what it reads.
            captured = _Block(self._device, {"leaves": self.leaves.copy()}, capturing)
            captured.upload(stream, capturing)
            self._captured.append(captured)
            rows.captured = True
            made.read_leaves(captured)
        elif made.leaves_known != self._version:
            made.block.upload(stream, False, ["leaves"])
            made.leaves_known = self._version
        self._last = made
        if rows.decided_by_host:
            self._run_few(made, stream)
            return
        made.start(self._device, stream)
        if capturing:
            made.read_leaves(made.block)
        if self._capturable:
            rows.replayed()
        elif rows.host_counts and rows.host_knows:
            rows.advanced(self._counted())
        else:
            rows.host_knows = False

    def count_part(self, rows: Rows) -> None:
        """Nothing: a kernel finds out whether the step of a part is a new step."""

    def _counted(self) -> np.ndarray:
        """What the step adds to the counters that the host keeps."""
        if self._partial:
            super().count_part(self.rows)
            self._gain[-1, TICKS] = self.advance[-1, TICKS]
        return self._gain

    def _run_few(self, made: _Launches, stream: int) -> None:
        rows, slots = self.rows, self._staged.slots
        rows.pull()
        values = self._decide(int(rows.counters[0, T]) + 1, rows.settings(), rows.scalars[0].tolist())
        assert made.update is not None
        for to, value in zip(made.update.values[3:], values, strict=False):
            to.value = value
        self._device.launch(made.update, made.update_blocks, stream)
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

    def _found(self, block: _Block) -> list[tuple[int, np.ndarray, Any]]:
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
        after: adds up what the update emitted.
        tile_blocks, update_blocks: how many blocks the measures and the update have.
    """

    def __init__(self, device: Any, tables: Mapping[Any, np.ndarray], capturing: bool) -> None:
        self.block = _Block(device, tables, capturing)
        self.leaves_known = -1
        self.first: Launch | None = None
        self.measures: list[Launch] = []
        self.finishes: list[Launch] = []
        self.update: Launch | None = None
        self.after: Launch | None = None
        self.tile_blocks = self.update_blocks = 0

    def start(self, device: Any, stream: int) -> None:
        """All launches, in order."""
        if self.first is not None:
            device.launch(self.first, 1, stream)
        for measure, finish in zip(self.measures, self.finishes, strict=True):
            device.launch(measure, self.tile_blocks, stream)
            device.launch(finish, 1, stream)
        device.launch(self.update, self.update_blocks, stream)
        if self.after is not None:
            device.launch(self.after, 1, stream)

    def read_leaves(self, block: _Block) -> None:
        """Take the table of leaves from another block in what is launched from now on."""
        for launch in (self.update, *self.measures):
            assert launch is not None
            launch.values[0].value = block.address("leaves")


class Results:
    """What a step found out, on the GPU until somebody asks.

    Args:
        device: the GPU.
        stream: that the step was made in.
        steps: the number of the step, if the host knows it.
        found: addresses of the counters of the optimizer, the reports, the sums over leaves and the loss scales, an
            array of the size of each, and what keeps their memory.
        live: whether it tells of the last step at any time, rather than of one.
    """

    def __init__(
        self, device: Any, stream: int, steps: int | None, found: list[tuple[int, np.ndarray, Any]], live: bool
    ) -> None:
        self._device, self._stream = device, stream
        self._steps, self._found, self._live = steps, found, live
        self._taken = False

    def keep(self, stream: int) -> None:
        """Put the results aside before the next step overwrites them."""
        if self._taken:
            return
        device, self._stream = self._device, stream
        kept = _Block(device, {k: array for k, (_, array, _) in enumerate(self._found)}, capturing=False)
        for k, (address, array, _) in enumerate(self._found):
            device.copy(kept.address(k), address, array.nbytes, stream)
        self._found = [(kept.address(k), array, kept) for k, (_, array, _) in enumerate(self._found)]

    def take(self) -> list[np.ndarray]:
        """The arrays, filled; waits for the GPU."""
        if not self._taken:
            for address, array, _ in self._found:
                self._device.download(array, address, self._stream)
            self._taken = not self._live
        return [array for _, array, _ in self._found]

    @property
    def steps(self) -> int:
        """The number of the step."""
        return self._steps if self._steps is not None else int(self.take()[0][CLOCK])


class DeviceStepInfo(StepInfo):
    """What a step on a GPU did. Reading more than the rates waits for the GPU, once.

    With `capturable=True` it always tells of the step made last, be it by a graph.
    """

    __slots__ = ("_given_scale", "_results")

    def __init__(self, results: Results, lrs: Any, layout: Layout | None, grad_scale: Any) -> None:
        self._results, self._lrs, self._layout, self._given_scale = results, lrs, layout, grad_scale

    @property
    def lrs(self) -> Mapping[str, Any]:
        """The learning rates, as `StepInfo.lrs`; of a schedule whose step only the GPU knows it is asked."""
        lrs = self._lrs() if callable(self._lrs) else self._lrs
        if isinstance(lrs, dict):
            return Rates(lrs, max(0, self.step - 1 + bool(np.all(self.skipped))))
        return lrs

    @property
    def step(self) -> int:
        """Number of the step, from 1; skipped steps do not count."""
        return self._results.steps

    @property
    def _reports(self) -> np.ndarray:
        return self._results.take()[1]

    @property
    def _sums(self) -> np.ndarray:
        return self._results.take()[2]

    @property
    def _grad_scale(self) -> Any:
        used = self._results.take()[3]
        return self._given_scale * used if used.size else self._given_scale


def _host_decide(staged: Staged) -> Callable[[int, Sequence[float], Sequence[float]], Any]:
    """`decide` on the host, for one row: what the kernel takes, then the new state of the group."""
    powers = {"power": power, "real_power": real_power}
    plain = {n: getattr(math, n) for n in ("exp", "log", "tanh", "sin", "cos")}
    fast = define(staged.decide, "decide", {**plain, **powers, "sqrt": sqrt, "abs": abs})
    functions = {n: getattr(np, n) for n in ("exp", "log", "tanh", "sin", "cos", "sqrt", "abs")}
    careful = define(staged.decide, "decide", {**functions, **powers})

    def decide(t: int, settings: Sequence[float], scalars: Sequence[float]) -> Any:
        try:
            return fast(t, *settings, *scalars)
        except (ZeroDivisionError, OverflowError, ValueError):  # Python raises where IEEE has an infinity or NaN
            with np.errstate(all="ignore"):
                return careful(t, *map(np.float64, settings), *map(np.float64, scalars))

    return decide
