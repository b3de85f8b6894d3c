"""Engines: one native optimizer each, over tensors of one dtype on one device, where they are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch

from ..gradients import Located
from ..kernels import exchange
from ..kernels.formats import FORMATS
from ..kernels.layout import T
from ..optimizer import Optimizer as Native
from ..rows import Counts
from ..schedules import Schedule
from ..step_info import StepInfo
from . import tensors

_gradient, _dtype = attrgetter("grad"), attrgetter("dtype")
_address, _count, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.is_contiguous


@dataclass(frozen=True)
class Leaf:
    """A parameter: the tensor, what it is called, and the index of its group."""

    param: torch.Tensor
    name: str
    group: int

    @property
    def called(self) -> str:
        """What messages call it."""
        return f"parameter {self.name!r}"


class Engine:
    """A native optimizer over parameters where they are; only the state is in flat memory of its own.

    Args:
        make: makes the native optimizer from arrays, groups and hyperparameters.
        leaves: the parameters, all of one dtype on one device.
        groups: the groups of the PyTorch optimizer.
        names: the hyperparameters that each of them holds.
        settings: the options of the native optimizer.
        ema_out: where to keep the average of each parameter, or None.

    Attributes:
        params: the parameters.
        native: the native optimizer.
        found: the gradients that `find` found, None where there is none.

    Raises:
        TypeError: if the native optimizer does not take a parameter or a hyperparameter.
        ValueError: likewise.
    """

    def __init__(
        self,
        make: Callable[..., Native],
        leaves: Sequence[Leaf],
        groups: Sequence[dict[str, Any]],
        names: Sequence[str],
        settings: Mapping[str, Any],
        ema_out: Sequence[torch.Tensor] | None,
    ) -> None:
        self.leaves, self.params = tuple(leaves), [leaf.param for leaf in leaves]
        self._names = tuple(names)
        self._values_of = itemgetter(*names)
        self._members = sorted({leaf.group for leaf in leaves})
        several = len(groups) > 1
        paths = [f"{leaf.group}:{leaf.name}" if several else leaf.name for leaf in leaves]
        if len(set(paths)) < len(paths):  # names need not be unique
            paths = [f"{path}#{k}" for k, path in enumerate(paths)]
        self._taken = {g: self._plain(groups[g]) for g in self._members}
        hyper = {f"{g}:*": dict(self._taken[g]) for g in self._members}
        self.ema_out = ema_out
        sizes = [p.numel() for p in self.params]
        self._starts = np.cumsum([0, *sizes])[:-1].tolist()
        more = self._more(paths)
        if ema_out is not None:
            more["ema_out"] = dict(zip(paths, map(self._as_array, ema_out), strict=True))
        first = as_arguments(dict(self._taken[self._members[0]]))
        self.native = make(self._targets(paths), **first, **settings, **more, groups=hyper if several else None)
        self._group_of = {g: self.native.groups[f"{g}:*"] if several else self.native for g in self._members}
        self._addresses = list(map(_address, self.params))
        self._strides = [p.stride() for p in self.params]
        self._sizes, self._in_rows = sizes, all(map(_is_contiguous, self.params))
        self._singles = [p for p in self.params if p.numel() == 1]
        self._given: dict[int, tuple[Any, ...]] = {}
        self._own: torch.dtype = getattr(torch, self.native._params.dtype.name)
        self._readable = {self._own, *tensors.HALVES}
        self._kind: torch.dtype | None = None
        self._located = Located([], "")
        self._usual: Located | None = None  # if the gradients of the step before were all there, as they should be
        self.found: Any = ()
        self._exchange = _exchange()
        if self._exchange is not None:
            self._things = _objects(self.params)
            self._described = self._exchange.describe(self._things)
            self._at = np.zeros(len(self.params), np.int64)
            self._found_kind = np.zeros(1, np.int64)
            self._kinds = {exchange.kind_of(name): name for name in (self.native._params.dtype.name, *FORMATS)}

    parts = 1  # how many steps of parts a step is cut into

    # What subclasses do otherwise

    def _targets(self, paths: Sequence[str]) -> Any:
        """What the native optimizer updates."""
        return dict(zip(paths, map(self._as_array, self.params), strict=True))

    def _more(self, paths: Sequence[str]) -> dict[str, Any]:
        """More options for the native optimizer."""
        return {}

    def _initial(self, k: int, saved: Mapping[str, Any], loaded: bool) -> None:
        """Take over what else was saved of a parameter; see `adopt`."""

    def _extra(self, k: int) -> dict[str, Any]:
        """What else is to be saved of a parameter."""
        return {}

    # Memory

    @staticmethod
    def _as_array(tensor: torch.Tensor) -> Any:
        """A tensor's memory as the native optimizer takes it: a NumPy array, on a GPU a tensor."""
        flat = tensors.in_memory_order(tensor)
        if flat.dtype in tensors.HALVES:
            flat = flat.view(torch.uint16)
        return flat.numpy() if flat.device.type == "cpu" else flat

    @staticmethod
    def _as_tensor(array: Any) -> torch.Tensor:
        """The other way round; the same memory."""
        return torch.from_numpy(array) if isinstance(array, np.ndarray) else array

    def views(self, name: str) -> list[torch.Tensor]:
        """A column of the native optimizer as one tensor for each parameter, with its shape and strides."""
        columns = self.native._columns
        if name == "ema" and self.ema_out is not None:
            return list(self.ema_out)
        flat = self._as_tensor(columns._flat[name])
        if name == "shadow":
            flat = flat.view(getattr(torch, self.native._shadow))
        return [tensors.like(p, flat, start) for p, start in zip(self.params, self._starts, strict=True)]

    # State: the entries of `torch.optim.Optimizer.state`

    @staticmethod
    def state_names(native: Native) -> tuple[str, ...]:
        """The names of a native optimizer's states, without those of its own options."""
        return tuple(native._states.get(x, x) for x in native._columns.letters if x != "ema")

    def adopt(
        self, saved: Mapping[torch.Tensor, Mapping[str, Any]], loaded: bool, steps: int
    ) -> dict[torch.Tensor, dict[str, Any]]:
        """Go on from a saved state.

        Args:
            saved: for each parameter its entries; those without start afresh.
            loaded: whether it comes from somewhere else, and not from the engine before.
            steps: how many steps have been made, whether or not these parameters took part.

        Returns:
            The entries that stand for the state from now on: views of the memory that steps update.
        """
        native, rule = self.native, self.native._source
        columns = {native._states.get(x, x): self.views(x) for x in native._columns.letters}
        starts = [native._initial_scalar(name) for name in rule.scalars]
        counts = Counts.zero(len(self.params), 1, starts)
        counts.scalars = counts.scalars.copy()
        for k, param in enumerate(self.params):
            entries = saved.get(param) or {}
            t = entries.get("step", any(entries.get(n) is not None for n in columns))
            counts.t[k] = counts.clock[k] = int(t)
            counts.skipped[k] = int(entries.get("skipped", 0))
            for j, name in enumerate(rule.scalars):
                if name in entries:
                    counts.scalars[k, 0, j] = float(entries[name])
            for name, views in columns.items():
                if isinstance(entries.get(name), torch.Tensor) and views[k] is not entries[name]:
                    views[k].copy_(entries[name])
            self._initial(k, entries, loaded)
        counts.steps = steps
        native._columns.encode_shadow()
        native._put(**native._rows_for(counts))
        self._steps = torch.zeros(len(self.params))
        self._scalars = torch.zeros((len(rule.scalars), len(self.params)), dtype=torch.float64)
        self._shown = self._steps.numpy(), self._scalars.numpy()
        self._show_counts()
        self._written = [*self.params, *(self.ema_out or ()), *map(self._as_tensor, native._columns._flat.values())]
        return {
            p: {
                "step": self._steps[k],
                **{name: views[k] for name, views in columns.items()},
                **{name: self._scalars[j, k] for j, name in enumerate(rule.scalars)},
                **self._extra(k),
            }
            for k, p in enumerate(self.params)
        }

    def _show_counts(self) -> None:
        """Bring the counts in the state up to date, if the host knows them without waiting for a GPU."""
        rows, (steps, scalars) = self.native._rows, self._shown
        if not self.native._on_host:
            return
        if len(rows) == 1:
            steps.fill(rows.counters.item(0, T))
        else:
            steps[:] = rows.counters[rows.index[:, 0], T]
        if len(scalars):
            scalars[:] = rows.scalars[rows.index[:, 0]].T

    def skipped(self) -> list[int]:
        """For each parameter the steps that were skipped; the counts in the state are brought up to date as well."""
        counts = self.native._rows.counts()
        steps, scalars = self._shown
        steps[:], scalars[:] = counts.t[:, 0], counts.scalars[:, 0].T
        return [int(n) for n in counts.skipped[:, 0]]

    # A step

    def _plain(self, group: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name, tensors.number(name, group[name])) for name in self._names]

    def take_settings(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over what has changed in the groups of the PyTorch optimizer.

        Raises:
            TypeError: if a value is of the wrong kind.
            ValueError: if one is out of range.
        """
        for g in self._members:
            given = self._values_of(groups[g])
            if given == self._given.get(g):
                continue
            plain = self._plain(groups[g])
            for (name, value), (_, before) in zip(plain, self._taken[g], strict=True):
                if value is not before and (isinstance(value, Schedule) or value != before):
                    setattr(self._group_of[g], name, value)
            self._taken[g] = plain
            if not any(map(holds_tensors, given)):  # a tensor can change and stay the same object
                self._given[g] = given

    def find(self) -> bool:
        """Find the gradients of all parameters and check them.

        Returns:
            False if a parameter is no longer where it was: then an engine has to be made anew.

        Raises:
            TypeError: if one is sparse or of a dtype that cannot be read.
            ValueError: if one has another shape than its parameter or is elsewhere.
        """
        if self._exchange is None:
            return self._find_one_by_one()
        self.found = grads = _objects(map(_gradient, self.params), len(self.params))
        params, gradients = (things.__array_interface__["data"][0] for things in (self._things, grads))
        seen = self._exchange.compare(params, gradients, self._described, self._at, self._found_kind)
        if seen == exchange.MOVED:
            return False
        if seen < 0 and not any(p.grad.is_neg() for p in self._singles):  # no others can be, in order as they are
            if seen == exchange.SAME and self._usual is not None:
                self._located = self._usual
                return True
            name = self._kinds.get(self._found_kind.item())
            if name is not None and self._may_read(self._at, name):
                self._located = self._usual = Located(self._at.copy(), name)
                return True
        self._usual = None
        self._find_each(grads)
        return True

    def _may_read(self, at: Any, name: str) -> bool:
        """Whether gradients at these addresses are apart from what the step writes."""
        return not self.native._gradients.any_overlaps(at, getattr(torch, name).itemsize)

    def _find_one_by_one(self) -> bool:
        """As `find`, without DLPack's exchange API: a call for each property of each tensor."""
        if list(map(_address, self.params)) != self._addresses:
            return False
        self.found = grads = list(map(_gradient, self.params))
        try:
            at, kinds = list(map(_address, grads)), set(map(_dtype, grads))
            usual = len(kinds) == 1 and list(map(_count, grads)) == self._sizes
            if usual and self._in_rows:
                usual = all(map(_is_contiguous, grads))
            elif usual:
                usual = [g.stride() for g in grads] == self._strides
            usual = usual and not any(p.grad.is_neg() for p in self._singles)
        except (AttributeError, TypeError, RuntimeError):  # one is None, or has no memory
            usual = False
        if usual:
            (kind,) = kinds
            if self._usual is not None and kind is self._kind and at == self._usual.addresses:
                self._located = self._usual
                return True
            name = tensors.name_of(kind)
            if kind in self._readable and self._may_read(at, name):
                self._kind, self._located = kind, Located(at, name)
                self._usual = self._located
                return True
        self._usual = None
        self._find_each(grads)
        return True

    def _find_each(self, grads: Iterable[torch.Tensor | None]) -> None:
        """Find gradients that are not all there, or not all where they can be read as they are."""
        for leaf, grad in zip(self.leaves, grads, strict=True):
            if grad is not None:
                tensors.check_gradient(leaf.called, grad, leaf.param)
        kinds = {grad.dtype for grad in grads if grad is not None}
        kind = kinds.pop() if len(kinds) == 1 and kinds <= self._readable else self._own
        found: list[torch.Tensor | None] = []
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                grad = tensors.with_strides_of(param, grad, kind)
                if self.native._gradients.overlaps(grad.data_ptr(), grad.nbytes):
                    grad = grad.clone()
            found.append(grad)
        self.found = found
        active = tuple(grad is not None for grad in found)
        at = [0 if grad is None else grad.data_ptr() for grad in found]
        self._located = Located(at, tensors.name_of(kind), None if all(active) else active)

    @property
    def has_gradients(self) -> bool:
        """Whether any were found."""
        return self._located.active is None or any(self._located.active)

    def run(self, scale: float) -> StepInfo | None:
        """Make the step with the gradients found; without any it is a step all the same, for what follows schedules.

        Args:
            scale: what to divide them by.

        Returns:
            What was done; None if it is to be told by somebody else.
        """
        active, written = self._located.active, self._written
        if active is not None:
            written = [*itertools.compress(self.params, active), *written[len(self.params) :]]
        # Autograd has to know what is written behind its back: a backward that needs the old values must fail.
        _increment_versions(written)
        info = self.native.step(self._located, grad_scale=None if scale == 1.0 else scale)
        self._show_counts()
        return info


def _increment_versions(tensors: list[torch.Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # an older PyTorch, which takes one
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


@functools.cache
def _exchange() -> exchange.Exchange | None:
    """What describes many tensors in one call; PyTorch has it from 2.10 on."""
    try:
        return exchange.Exchange(torch.Tensor)
    except LookupError:
        return None


def _objects(things: Iterable[Any], count: int = -1) -> np.ndarray:
    """Python objects in an array, as they are: NumPy looks for no numbers in them."""
    return np.fromiter(things, object, count)


def as_arguments(hyper: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters by the names that the constructor of a native optimizer has for them."""
    return {"ema" if name == "ema_decay" else name: value for name, value in hyper.items()}


def holds_tensors(value: Any) -> bool:
    """Whether a hyperparameter is a tensor, or has one in it."""
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple | list) and any(map(holds_tensors, value)))
