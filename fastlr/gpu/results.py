"""The results of a step on a GPU, which stay there until somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..kernels.layout import CLOCK
from ..step.info import Layout, StepInfo
from ..step.scheduled import Rates
from .driver import Device
from .tables import Tables

__all__ = ["DeviceStepInfo", "Result", "Results"]


class Result(NamedTuple):
    """One result of a step.

    Attributes:
        address: on the GPU.
        array: where it goes on the host.
        memory: what keeps the memory on the GPU.
    """

    address: int
    array: np.ndarray
    memory: Tables | None


class Results:
    """The results of a step, on the GPU until somebody asks.

    Args:
        device: the GPU.
        stream: that the step was made in.
        steps: the number of the step, if the host knows it.
        results: counters of the optimizer, reports, sums over leaves and loss scales.
        live: whether they are always those of the latest step, rather than of one particular step.
    """

    def __init__(self, device: Device, stream: int, steps: int | None, results: list[Result], live: bool) -> None:
        self._device, self._stream = device, stream
        self._steps, self._results, self._live = steps, results, live
        self._downloaded = False

    def keep(self, stream: int) -> None:
        """Copy the results to other memory on the GPU before the next step overwrites them."""
        if self._downloaded:
            return
        self._stream = stream
        kept = Tables(self._device, {k: result.array for k, result in enumerate(self._results)}, False, stream)
        for k, result in enumerate(self._results):
            self._device.copy(kept.address(k), result.address, result.array.nbytes, stream)
            self._results[k] = Result(kept.address(k), result.array, kept)

    def download(self) -> list[np.ndarray]:
        """The arrays, filled; waits for the GPU."""
        if not self._downloaded:
            for result in self._results:
                self._device.download(result.array, result.address, self._stream)
            self._downloaded = not self._live
        return [result.array for result in self._results]

    @property
    def steps(self) -> int:
        """The number of the step."""
        return self._steps if self._steps is not None else int(self.download()[0][CLOCK])


class DeviceStepInfo(StepInfo):
    """What a step on a GPU did. Reading more than the rates waits for the GPU, once.

    With `capturable=True` it always describes the latest step, even one that a graph made.
    """

    __slots__ = ("_given_scale", "_rates", "_results")

    def __init__(self, results: Results, rates: Rates, layout: Layout | None, grad_scale: Any) -> None:
        self._results, self._rates, self._layout, self._given_scale = results, rates, layout, grad_scale

    @property
    def lrs(self) -> Mapping[str, Any]:
        """The learning rates, as `StepInfo.lrs`; waits for the GPU if a schedule needs a step that only it knows."""
        rates = self._rates.settled()
        return rates.at(max(0, self.step - 1 + bool(np.all(self.skipped)))) if rates.need_step else rates

    @property
    def step(self) -> int:
        """Number of the step, from 1; skipped steps do not count."""
        return self._results.steps

    @property
    def _reports(self) -> np.ndarray:
        return self._results.download()[1]

    @property
    def _sums(self) -> np.ndarray:
        return self._results.download()[2]

    @property
    def _grad_scale(self) -> Any:
        used = self._results.download()[3]
        return self._given_scale * used if used.size else self._given_scale
