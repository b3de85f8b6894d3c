"""The kernels of a step on a GPU, compiled or loaded when they are first needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..kernels import grid
from ..kernels.finish import finish
from ..kernels.staging import Staged
from ..kernels.storage import Storage
from ..step.scheduled import Formula
from .driver import Device, Launch

__all__ = ["StepKernels"]


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

    def __init__(
        self,
        device: Device,
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
            return lambda target: finish(target, staged, storage, self.formulas)
        if name.startswith("measure_"):
            return lambda target: grid.measure(target, staged, storage, int(name.removeprefix("measure_")), tuning)
        make = grid.average if name.startswith("average") else grid.update
        return lambda target: make(target, staged, storage, tuning, by_value=name.endswith("_few"))

    def prepare(self, few: bool, averages: bool = False) -> None:
        """Compile or load what a step needs; `averages`: one that averages leaves which are not updated."""
        names = ["update_few"] if few else ["finish", "update", *(f"measure_{k}" for k in range(self.measures))]
        names += [f"average{'_few' if few else ''}"] * averages
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
    """The line of an error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line or "annot" in line or "ntyped" in line), (lines or ["?"])[0])
