"""Rows whose counters a GPU advances, and their tables in its memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..kernels import grid
from ..kernels.layout import CLOCK, STEPS, TICKS, T
from ..kernels.staging import Staged
from ..loss_scale import LossScale
from ..step.rows import COUNTING, Counts, Rows
from .arrays import DevicePlace
from .results import Results
from .tables import Tables

__all__ = ["DeviceRows"]


class DeviceRows(Rows):
    """Rows whose counters a GPU advances; they get their memory there with the first step.

    Args:
        configuration: as for `Rows`.
        frozen: as for `Rows`.
        counts: as for `Rows`.
        partition: as for `Rows`.
        place: where the parameters are.
        staged: the rule.
        loss_scale: whose state is on the GPU.
        capturable: whether steps may be made that the host does not see.

    Attributes:
        block: the tables on the GPU; None before the first step.
        device_knows: whether the GPU has the counters as they are.
        host_counts: whether the host can tell what a step adds to the counters.
        latest: the results of the last step, of any plan, if somebody still has them.
        stream: of the last step; the counters are up to date in the order of this stream.
    """

    def __init__(
        self,
        configuration: np.ndarray,
        frozen: np.ndarray,
        counts: Counts,
        partition: np.ndarray | None,
        place: DevicePlace,
        staged: Staged,
        loss_scale: LossScale | None,
        capturable: bool,
    ) -> None:
        super().__init__(configuration, frozen, counts, partition)
        self._place, self._staged, self._loss_scale = place, staged, loss_scale
        self._replays = False  # whether graphs may be replayed, which the host does not see
        self.decided_by_host = not capturable and len(self) == 1 and not (staged.quantities or staged.reports)
        self.host_counts = not capturable and not staged.may_skip and not staged.scalars
        self.block: Tables | None = None
        self.device_knows = self.settings_known = False
        self.latest: Callable[[], Results | None] | None = None
        self.stream = 0

    def install(self, table: np.ndarray, h: np.ndarray) -> None:
        """As `Rows.install`."""
        super().install(table, h)
        self._tables: dict[int, np.ndarray] = {
            grid.SETTINGS: table,
            grid.COUNTS: self.counters,
            grid.H: h,
            grid.SCALARS: self.scalars,
            grid.FLAGS: np.zeros(3, np.int64),
            grid.MODELS_OF_ROWS: self.model.astype(np.int64),
        }
        if self._loss_scale is not None:
            self._tables[grid.LOSS_RULE] = np.array(self._loss_scale.rule, np.float64)

    def settings(self) -> list[float]:
        """What `decide` takes of the first row."""
        return self.table[0, : len(self._staged.uniforms)].tolist()

    def board(self) -> dict[int, int]:
        """Addresses of the tables, by their slots on the board of `finish`."""
        assert self.block is not None
        addresses = {key: self.block.address(key) for key in self._tables}
        addresses[grid.LOSS] = self._loss_scale.address if self._loss_scale is not None else 0
        return addresses

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
        """Before the results of the last step are overwritten, keep them if somebody may still ask for them."""
        latest = self.latest() if self.latest is not None else None
        if latest is not None:
            latest.keep(stream)
            self.latest = None

    def upload(self) -> None:
        """Bring what the GPU has up to date, in the order of the current stream."""
        if self.block is not None:
            self.ready(self._place.stream(), False)

    def replace(self, new: Rows) -> bool:
        """As `Rows.replace`."""
        replaced = super().replace(new)
        if replaced:
            self.host_knows, self.device_knows = not self._replays, False
        return replaced

    def advanced(self, advance: np.ndarray) -> None:
        """A step whose counting the host can follow has been made."""
        t, clock = self.counters[:, T], self.counters[:, CLOCK]
        now = clock[-1] + advance[-1, TICKS]  # the own row of the optimizer counts as one that ticks
        t[:], clock[:] = COUNTING.counted(t, clock, advance[:, STEPS], advance[:, TICKS], now)

    def download(self) -> None:
        """Learn from the GPU what only it knows; waits for it."""
        if not self.host_knows and self.block is not None:
            self.block.download([grid.COUNTS, grid.SCALARS], self.stream)
            self.host_knows = not self._replays

    def replayed(self) -> None:
        """From now on steps may be made that the host does not see."""
        self._replays, self.host_knows = True, False

    @property
    def steps(self) -> int:
        """Steps of the optimizer; waits for the GPU if only it knows."""
        self.download()
        return int(self.counters[-1, CLOCK])

    def counts(self) -> Counts:
        """What has been counted; waits for the GPU if only it knows."""
        self.download()
        return super().counts()
