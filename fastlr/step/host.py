"""A step on the host: plans and kernels for CPU threads, or the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays.columns import Columns, Parameters
from ..arrays.places import Alloc
from ..kernels import arrays, cpu, reference
from ..kernels.cpu import Kernel
from ..kernels.staging import Staged
from ..kernels.storage import Storage
from ..kernels.tiles import compiles
from ..loss_scale import LossScale
from .gradients import Given, Gradients
from .plans import Entries, HostPlan, Plan
from .rows import Counts, Rows
from .scheduled import Formula, Scheduled

__all__ = ["KERNELS", "HostBackend"]

# What builds a kernel, by the name of the backend that users choose.
KERNELS: dict[str, Callable[[Staged, Storage], Kernel]] = {"numba": cpu.build, "numpy": reference.build}


@functools.cache
def _kernel(staged: Staged, storage: Storage, name: str) -> Kernel:
    return KERNELS[name if compiles() else "numpy"](staged, storage)


class HostBackend:
    """The backend for parameters in the host's memory; see `Backend`.

    Args:
        name: "numba" or "numpy".
        alloc: where memory for gradients comes from.
        grad_dtype: the format that gradients of dtype uint16 hold, or None.
    """

    on_device = False

    def __init__(self, name: str, alloc: Alloc | None, grad_dtype: str | None) -> None:
        self._name, self._alloc, self._grad_dtype = name, alloc, grad_dtype

    def gradients(self, parameters: Parameters, columns: Columns, given: Sequence[Given]) -> Gradients:
        """As `Backend.gradients`."""
        written = [*parameters.leaves, *columns.written]
        quick = self._name == "numba"
        return Gradients(parameters, written, self._alloc, self._grad_dtype, given, quick)

    def rows(
        self,
        configuration: np.ndarray,
        frozen: np.ndarray,
        counts: Counts,
        partition: np.ndarray | None,
        staged: Staged,
        loss_scale: LossScale | None,
    ) -> Rows:
        """As `Backend.rows`."""
        return Rows(configuration, frozen, counts, partition)

    def formulas(self, scheduled: Scheduled) -> tuple[Formula, ...]:
        """None: the host evaluates schedules before the kernel."""
        return ()

    def plan(
        self, entries: Entries, rows: Rows, staged: Staged, advance: np.ndarray, grad_format: str, partial: bool
    ) -> Plan:
        """As `Backend.plan`."""
        return HostPlan(entries, rows, staged, advance, grad_format, partial)

    def kernel(self, staged: Staged, storage: Storage, formulas: tuple[Formula, ...]) -> Kernel:
        """As `Backend.kernel`."""
        return _kernel(staged, storage, self._name)

    def prepare(self, kernel: Kernel, rows: Rows) -> float:
        """As `Backend.prepare`."""
        return float(kernel.compile_s) + (arrays.prepare() if self._name == "numba" else 0.0)

    def stream(self, given: Any) -> int:
        """As `Backend.stream`."""
        raise ValueError("stream= is for parameters on a GPU; these are on the CPU.")

    def cleared(self, array: np.ndarray) -> np.ndarray:
        """As `Backend.cleared`."""
        return array
