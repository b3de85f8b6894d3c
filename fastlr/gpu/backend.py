"""A step on a GPU, as `step.backend.Backend` has it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.columns import Columns, Parameters
from ..arrays.places import Alloc
from ..kernels.staging import Staged
from ..kernels.storage import Storage
from ..loss_scale import LossScale
from ..step.gradients import Given, Gradients
from ..step.plans import Entries, Plan
from ..step.rows import Counts, Rows
from ..step.scheduled import Formula, Scheduled
from .arrays import DevicePlace
from .driver import stream_handle
from .gradients import DeviceGradients
from .kernels import StepKernels
from .plans import DevicePlan
from .rows import DeviceRows

__all__ = ["GpuBackend"]


@functools.cache
def _kernels(staged: Staged, storage: Storage, device: Any, formulas: tuple[Formula, ...]) -> StepKernels:
    return StepKernels(device, staged, storage, formulas=formulas)


class _Cleared:
    """An array on a GPU whose parts can be set to a number."""

    def __init__(self, place: DevicePlace, array: Any) -> None:
        self._place, self._array = place, array

    def __setitem__(self, part: slice, value: float) -> None:
        self._place.fill(self._array[part], value)


class GpuBackend:
    """The backend for parameters on a GPU; see `Backend`.

    Args:
        place: where they are.
        alloc: where memory for gradients comes from.
        grad_dtype: the format that gradients of dtype uint16 hold, or None.
        capturable: whether steps may be captured into a graph.
    """

    on_device = True

    def __init__(self, place: DevicePlace, alloc: Alloc | None, grad_dtype: str | None, capturable: bool) -> None:
        self._place, self._alloc, self._grad_dtype, self._capturable = place, alloc, grad_dtype, capturable

    def gradients(self, parameters: Parameters, columns: Columns, given: Sequence[Given]) -> Gradients:
        """As `Backend.gradients`."""
        written = [*parameters.leaves, *columns.written]
        return DeviceGradients(parameters, written, self._alloc, self._grad_dtype, given, True)

    def rows(
        self,
        configuration: np.ndarray,
        frozen: np.ndarray,
        counts: Counts,
        partition: np.ndarray | None,
        staged: Staged,
        loss_scale: LossScale | None,
    ) -> DeviceRows:
        """As `Backend.rows`."""
        return DeviceRows(configuration, frozen, counts, partition, self._place, staged, loss_scale, self._capturable)

    def formulas(self, scheduled: Scheduled) -> tuple[Formula, ...]:
        """As `Backend.formulas`."""
        return scheduled.formulas()

    def plan(
        self, entries: Entries, rows: Rows, staged: Staged, advance: np.ndarray, grad_format: str, partial: bool
    ) -> Plan:
        """As `Backend.plan`."""
        assert isinstance(rows, DeviceRows)
        return DevicePlan(entries, rows, staged, advance, grad_format, partial, self._place, self._capturable)

    def kernel(self, staged: Staged, storage: Storage, formulas: tuple[Formula, ...]) -> StepKernels:
        """As `Backend.kernel`."""
        return _kernels(staged, storage, self._place.device, formulas)

    def prepare(self, kernel: StepKernels, rows: Rows) -> float:
        """As `Backend.prepare`."""
        kernel.prepare(rows.decided_by_host)
        return float(kernel.compile_s)

    def stream(self, given: Any) -> int:
        """As `Backend.stream`."""
        return stream_handle(given, self._place.device)

    def cleared(self, array: Any) -> _Cleared:
        """As `Backend.cleared`."""
        return _Cleared(self._place, array)
