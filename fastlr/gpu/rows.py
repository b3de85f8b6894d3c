"""Rows whose counters a GPU advances, and tables in its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels import counting, grid
from ..kernels.layout import CLOCK, STEPS, TICKS, T
from ..kernels.staging import Staged
from ..loss_scale import LossScale
from ..step.rows import Counts, Rows
from .arrays import DevicePlace
from .results import Results
from .tables import Tables

__all__ = ["DeviceRows"]

_COUNTING = counting.make(np.where, may_skip=False, asides=False)  # all that the host follows


class DeviceRows(Rows):
    """Rows whose counters a GPU advances; arguments as for `Rows`."""

    latest: Callable[[], Results | None] | None = None  # of the step made last, of whatever plan
    block: Tables | None = None
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
        self.host_counts = not capturable and not staged.may_skip and not staged.scalars
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
            self._tables[grid.LOSS_RULE] = np.array(loss_scale.rule, np.float64)

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
            self.block = Tables(self._place.device, self._tables, capturing)
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
            for name in ("index", "configuration", "model", "frozen")
        )
        if fits:
            self.counters[:], self.scalars[:] = new.counters, new.scalars
            self.host_knows, self.device_knows = not self._replays, False
        return fits

    def advanced(self, advance: np.ndarray) -> None:
        """A step whose counting the host can follow has been made."""
        t, clock = self.counters[:, T], self.counters[:, CLOCK]
        now = clock[-1] + advance[-1, TICKS]  # the own row of the optimizer counts as one that ticks
        t[:], clock[:] = _COUNTING.counted(t, clock, advance[:, STEPS], advance[:, TICKS], now)

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
