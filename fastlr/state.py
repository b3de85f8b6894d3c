"""The state of an optimizer: all that is saved, moved and rebuilt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import checks
from .arrays.buffers import FlatBuffer, place_called
from .arrays.columns import ROLES, Columns, Parameters
from .arrays.places import HOST
from .gpu.arrays import DevicePlace
from .gpu.backend import GpuBackend
from .groups import Groups
from .loss_scale import LossScale
from .options import Options
from .step.backend import Backend
from .step.gradients import Given, Gradients
from .step.host import HostBackend
from .step.plans import Column
from .step.rows import Counts, Rows
from .step.scheduled import Remembered

__all__ = ["OptimizerState"]


@dataclass(frozen=True)
class OptimizerState:
    """All that an optimizer saves, moves and rebuilds. Steps change the contents of its parts, not which parts it has.

    Attributes:
        options: what the optimizer was built with.
        parameters: the caller's.
        columns: the states, averages and copies that belong to them.
        gradients: what finds gradients for them.
        backend: what carries out steps where they are.
        groups: the hyperparameters.
        rows: the counters; a stepper makes those that its kernels advance.
        observed: what plateaus remember.
        loss_scale: the optimizer's own, or None.
    """

    options: Options
    parameters: Parameters
    columns: Columns
    gradients: Gradients
    backend: Backend
    groups: Groups
    rows: Rows
    observed: Remembered
    loss_scale: LossScale | None

    @classmethod
    def start(
        cls,
        options: Options,
        parameters: Parameters,
        groups: Groups,
        states: Sequence[str],
        external: Mapping[str, Any],
        loss_scale: LossScale | None,
    ) -> OptimizerState:
        """The state before the first step.

        Args:
            options: what the optimizer is built with.
            parameters: the caller's.
            groups: the hyperparameters.
            states: the names of the rule's states.
            external: the caller's arrays for "ema", "lr_scale" and "shadow", where there are some.
            loss_scale: the optimizer's own, or None.
        """
        columns, gradients, backend = _memory(options, parameters, states, external)
        starts = [options.starts[name] for name in options.rule.scalars]
        counts = Counts.zero(len(parameters.leaves), parameters.models, starts)
        rows = Rows(*rows_of(groups, counts), counts, None)
        return cls(options, parameters, columns, gradients, backend, groups, rows, Remembered(), loss_scale)

    @property
    def addresses(self) -> list[Column]:
        """The columns of a plan: of the parameters, then of the other columns."""
        place, columns = self.parameters.place, self.columns
        return [
            Column.of(self.parameters.leaves, place, self.parameters.dtype.itemsize),
            *(Column.of(arrays, place, columns.itemsize(name)) for name, arrays in columns.arrays.items()),
        ]

    def rebuilt(self, params: Any, external: Mapping[str, Any]) -> OptimizerState:
        """The state over other parameters: leaves of the same path and shape keep theirs.

        Args:
            params: the parameters, as a user gives them.
            external: the caller's arrays for "ema", "lr_scale" and "shadow", None where none are given.

        Raises:
            TypeError: if the dtype differs.
            ValueError: if something does not fit; nothing is changed.
        """
        before, after = self.parameters, Parameters(params)
        if after.dtype != before.dtype or after.population != before.population:
            raise TypeError(
                f"the new parameters are {after.dtype} with population={after.population}, the old ones "
                f"{before.dtype} with population={before.population}. Build a new optimizer."
            )
        groups = self.groups.with_values(self.groups.everything(), after.paths)
        if self.options.capturable and after.place is HOST:
            raise ValueError("this optimizer is capturable, but the new parameters are on the CPU. Build a new one.")
        for name, arrays in external.items():
            argument = ROLES[name].argument
            if arrays is None and name in self.columns.external:
                raise ValueError(f"this optimizer was given {argument}; pass it for the new parameters as well.")
            if arrays is not None and name not in self.columns.external:
                raise ValueError(f"this optimizer was built without {argument}. Build a new one with it.")
        given = {name: external[name] for name in self.columns.external}
        new = OptimizerState.start(self.options, after, groups, self.columns.letters, given, None)
        counts, kept = new.rows.counts(), self.rows.counts()
        counts.scalars, counts.steps = counts.scalars.copy(), kept.steps
        at = {path: k for k, path in enumerate(before.paths)}
        for k, path in enumerate(after.paths):
            j = at.get(path)
            if j is None or before.shapes[j] != after.shapes[k]:
                continue
            counts.take(k, kept, j)
            for letter in self.columns.letters:
                if letter not in self.columns.external:
                    source = self.columns.arrays[letter][j]
                    target = new.columns.arrays[letter][k]
                    if after.place is before.place:
                        after.place.copy(target, source)
                    else:
                        after.place.upload(target, before.place.download(source))
        loss_scale = self.loss_scale
        if loss_scale is not None and after.place is not before.place:
            loss_scale = loss_scale.copy()
        rows = Rows(*rows_of(groups, counts), counts, None)
        return replace(new, rows=rows, observed=self.observed.copy(), loss_scale=loss_scale)

    def fresh(self, before: OptimizerState) -> tuple[str, ...]:
        """The paths of the leaves that have no predecessor of the same shape in another state."""
        shapes = dict(zip(before.parameters.paths, before.parameters.shapes, strict=True))
        mine = zip(self.parameters.paths, self.parameters.shapes, strict=True)
        return tuple(path for path, shape in mine if shapes.get(path) != shape)

    def moved(self, device: str) -> OptimizerState:
        """The state over copies of the parameters in another place.

        Args:
            device: "cpu", or "cuda", "cuda:1", ... for a GPU.
        """
        place, ours = place_called(device), self.parameters

        def copied(leaves: Sequence[Any], given: Any, dtype: Any = ours.dtype) -> Any:
            data = place.allocate(ours.size, dtype)
            buffer = FlatBuffer(ours.structure, ours.shapes, data, ours.population)
            for to, leaf in zip(ours.cut(data), leaves, strict=True):
                place.upload(to, ours.place.download(leaf))
            if ours.is_array:
                return data.reshape(ours.shapes[0])
            return buffer if isinstance(given, FlatBuffer) else buffer.unflatten()

        options, on_host = self.options, place is HOST
        external: dict[str, Any] = dict.fromkeys(ROLES)
        for name, given in self.columns.external.items():
            external[name] = copied(self.columns.arrays[name], given, self.columns.roles[name].dtype(ours.dtype))
        options = replace(
            options,
            capturable=options.capturable and not on_host,
            backend=options.backend if on_host and ours.place is HOST else "numba",
            alloc=options.alloc if on_host else None,
        )
        loss_scale = self.loss_scale
        if loss_scale is not None and place is ours.place:
            loss_scale = loss_scale.copy()
        here = replace(self, options=options, loss_scale=loss_scale)
        return here.rebuilt(copied(ours.leaves, ours.source), external)


def rows_of(groups: Groups, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """For each leaf, the index of its configuration; for each configuration and model, whether it is frozen.

    Args:
        groups: the hyperparameters.
        counts: of each leaf and model.
    """
    models = counts.t.shape[1]
    frozen = np.array([np.broadcast_to(values["frozen"], models) for values in groups.uniforms()], bool)
    return groups.configuration, frozen


def _memory(
    options: Options, parameters: Parameters, states: Sequence[str], external: Mapping[str, Any]
) -> tuple[Columns, Gradients, Backend]:
    """The columns besides parameters and gradients, what finds the gradients, and where it all is."""
    columns = Columns(parameters, options.roles(states, options.starts), external, options.alloc)
    given: list[Given] = [
        (checks.called(path), leaf, True) for path, leaf in zip(parameters.paths, parameters.leaves, strict=True)
    ]
    for name in external:
        leaves, role = zip(parameters.paths, columns.arrays[name], strict=True), columns.roles[name]
        given += [(checks.called(path, role.argument), leaf, role.written) for path, leaf in leaves]
    place = parameters.place
    backend: Backend
    if isinstance(place, DevicePlace):
        backend = GpuBackend(place, options.alloc, options.grad_dtype, options.capturable)
    else:
        backend = HostBackend(options.backend, options.alloc, options.grad_dtype)
    return columns, backend.gradients(parameters, columns, given), backend
