"""What a step on a GPU found out: there until somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels.layout import CLOCK
from ..step.info import Layout, StepInfo
from ..step.scheduled import Rates
from .tables import Tables

__all__ = ["DeviceStepInfo", "Results"]


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
        kept = Tables(device, {k: array for k, (_, array, _) in enumerate(self._found)}, False, stream)
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
