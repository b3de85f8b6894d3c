"""What a step needs to know of the place where the parameters are: the one question "host or GPU?"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..arrays.columns import Columns, Parameters
from ..kernels.staging import Staged
from ..kernels.storage import Storage
from ..loss_scale import LossScale
from .gradients import Given, Gradients
from .plans import Entries, Plan
from .rows import Counts, Rows
from .scheduled import Formula, Scheduled

__all__ = ["Backend"]


class Backend(Protocol):
    """Where the parameters of an optimizer are, and what carries out its steps there."""

    @property
    def on_device(self) -> bool:
        """Whether that is a GPU, which keeps counters and the loss scale itself."""

    def gradients(self, parameters: Parameters, columns: Columns, given: Sequence[Given]) -> Gradients:
        """What finds gradients for parameters.

        Args:
            parameters: the parameters.
            columns: what a step writes besides them.
            given: the caller's arrays that a step uses besides the gradients.
        """

    def rows(
        self,
        configuration: np.ndarray,
        frozen: np.ndarray,
        counts: Counts,
        partition: np.ndarray | None,
        staged: Staged,
        loss_scale: LossScale | None,
    ) -> Rows:
        """The rows of leaves for a staged rule; the other arguments as for `Rows`."""

    def formulas(self, scheduled: Scheduled) -> tuple[Formula, ...]:
        """The schedules that a kernel evaluates; those that are not among them are evaluated by the host."""

    def plan(
        self, entries: Entries, rows: Rows, staged: Staged, advance: np.ndarray, grad_format: str, partial: bool
    ) -> Plan:
        """The plan of a selection of leaves; arguments as for `Plan`."""

    def kernel(self, staged: Staged, storage: Storage, formulas: tuple[Formula, ...]) -> Any:
        """The kernel of a staged rule, as the plans of this backend run it."""

    def prepare(self, kernel: Any, rows: Rows) -> float:
        """Compile or load all that a step with a kernel needs; the seconds that took."""

    def stream(self, given: Any) -> int:
        """The handle of a stream of the caller's.

        Raises:
            TypeError: if it is no stream.
            ValueError: if there are no streams here.
        """

    def cleared(self, array: Any) -> Any:
        """Something for `atomic.commit`, whose parts can be set to a number."""
