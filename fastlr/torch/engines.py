"""Engines: one native optimizer each, over tensors of one dtype on one device, where they are."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ..kernels import exchange
from ..kernels.formats import FORMATS
from ..kernels.layout import T
from ..optimizer import Optimizer as Native
from ..schedules import Schedule
from ..step.gradients import Located
from ..step.info import StepInfo
from ..step.rows import Counts
from . import states, tensors

_gradient, _dtype = attrgetter("grad"), attrgetter("dtype")
# A look at the memory of a state costs as much as one at a parameter. Of many states these stand for all: who gives
# states other memory gives it to all. A state whose tensor is exchanged is always noticed.
_MOST_WATCHED = 512
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


@dataclass
class Shown:
    """What engines have put into the state, in as far as it is still there.

    Attributes:
        addresses: of each tensor, by its `id`.
        updates: of each tensor that shows a count which nobody has changed, the count, by its `id`.
    """

    addresses: dict[int, int]
    updates: dict[int, int]


class Engine:
    """A native optimizer over parameters where they are; only the state is in flat memory of its own.

    Args:
        make: makes the native optimizer from arrays, groups and hyperparameters.
        leaves: the parameters, all of one dtype on one device.
        hyper: the hyperparameters of each group.
        names: those that the native optimizer has.
        settings: the options of the native optimizer.
        ema_out: where to keep the average of each parameter, or None.

    Attributes:
        params: the parameters.
        native: the native optimizer.
        found: the gradients that `find` found, None where there is none.
        entries: what stands in the state for each parameter, by `adopt`.
        writes: what is to be copied into tensors of the user's before the first step: from, to.

    Raises:
        TypeError: if the native optimizer does not take a parameter or a hyperparameter.
        ValueError: likewise.
    """

    def __init__(
        self,
        make: Callable[..., Native],
        leaves: Sequence[Leaf],
        hyper: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        settings: Mapping[str, Any],
        ema_out: Sequence[tensors.Theirs] | None,
    ) -> None:
        self.leaves, self.params = tuple(leaves), [leaf.param for leaf in leaves]
        self._names = tuple(names)
        self._members = sorted({leaf.group for leaf in leaves})
        several = len(hyper) > 1
        paths = [f"{leaf.group}:{leaf.name}" if several else leaf.name for leaf in leaves]
        self._taken: dict[int, list[tuple[str, Any]] | None] = {g: self._plain(hyper[g]) for g in self._members}
        overrides = {f"{g}:*": dict(self._taken[g] or ()) for g in self._members}
        if len({*paths, *overrides}) < len(paths) + len(overrides):  # names need not be unique, and one may be "*"
            paths = [f"{path}#{k}" for k, path in enumerate(paths)]
        self.ema_out = ema_out
        sizes = [p.numel() for p in self.params]
        self._starts = np.cumsum([0, *sizes])[:-1].tolist()
        more = self._more(paths)
        if ema_out is not None:
            averages = (self._as_array(average.tensor) for average in ema_out)
            more["ema_out"] = dict(zip(paths, averages, strict=True))
        first = as_arguments(dict(self._taken[self._members[0]] or ()))
        groups = overrides if several else None
        self.native = make(self._targets(paths), **first, **settings, **more, groups=groups)
        self._group_of = {g: self.native.groups[f"{g}:*"] if several else self.native for g in self._members}
        self._strides = [p.stride() for p in self.params]
        self._sizes, self._in_rows = sizes, all(map(_is_contiguous, self.params))
        self._singles = [p for p in self.params if p.numel() == 1]
        self._own: torch.dtype = getattr(torch, self.native._params.dtype.name)
        self._readable = {self._own, *tensors.HALVES}
        self._kind: torch.dtype | None = None
        self._located = Located([], "")
        self._usual: Located | None = None  # if the gradients of the step before were all there, as they should be
        self.found: Any = ()
        self._flats: dict[str, torch.Tensor] = {}  # the columns of the native optimizer
        self.entries: list[dict[str, Any]] = []
        self.writes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._exchange = _exchange()
        if self._exchange is not None:
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

    def _initial(self, k: int, saved: Mapping[str, Any], shown: Shown | None) -> None:
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
            return [average.tensor for average in self.ema_out]
        flat = self._flats.setdefault(name, self._as_tensor(columns._flat[name]))
        if name == "shadow":
            flat = flat.view(getattr(torch, self.native._shadow))
        return [tensors.like(p, flat, start) for p, start in zip(self.params, self._starts, strict=True)]

    # State: the entries of `torch.optim.Optimizer.state`

    @staticmethod
    def state_names(native: Native) -> tuple[str, ...]:
        """The names of a native optimizer's states, without those of its own options."""
        return tuple(native._states.get(x, x) for x in native._columns.letters if x != "ema")

    def adopt(self, saved: Mapping[Any, Any], shown: Shown | None, steps: int) -> None:
        """Go on from a state; nothing that a user could see is written yet, see `writes`.

        Args:
            saved: for each parameter its entries; those without start afresh.
            shown: what engines before have put there, or None if the state comes from somewhere else.
            steps: steps made so far, whether or not these parameters took part.

        Raises:
            ValueError: if what stands there cannot be the state of a parameter.
        """
        native, rule = self.native, self.native._source
        columns = {native._states.get(x, x): self.views(x) for x in native._columns.letters}
        starts = [native._initial_scalar(name) for name in rule.scalars]
        counts = Counts.zero(len(self.params), 1, starts)
        counts.scalars = counts.scalars.copy()
        known = {} if shown is None else shown.updates
        for k, leaf in enumerate(self.leaves):
            entries = states.entries_of(leaf.called, saved.get(leaf.param))
            t = entries.get("step", any(entries.get(n) is not None for n in columns))
            t = int(t) if isinstance(t, bool) else known.get(id(t)) or states.count(leaf.called, "step", t)
            counts.t[k], counts.clock[k] = t, steps
            counts.skipped[k] = states.count(leaf.called, "skipped", entries.get("skipped", 0))
            for j, name in enumerate(rule.scalars):
                if name in entries:
                    counts.scalars[k, 0, j] = states.number(leaf.called, name, entries[name])
            for name, views in columns.items():
                value = entries.get(name)
                if value is None:
                    continue
                given, value = value, states.tensor(leaf.called, name, value, leaf.param).detach()
                own = shown is not None and shown.addresses.get(id(given)) == _address(value)
                if name != "ema" or self.ema_out is None:
                    views[k].copy_(value)
                elif not own:  # an average goes on from what stands in the tensor of the user's
                    self.writes.append((views[k].detach(), value))
            self._initial(k, entries, shown)
        counts.steps = steps
        native._columns.encode_shadow()
        native._put(**native._rows_for(counts))
        count, scalars = torch.zeros(len(self.params)), torch.zeros((len(rule.scalars), len(self.params)))
        scalars = scalars.double()
        self._shown = count.numpy(), scalars.numpy()
        self._show(native._rows.counts())
        self._written = [
            *self.params,
            *(average.memory for average in self.ema_out or ()),
            *(self._flats.setdefault(name, self._as_tensor(flat)) for name, flat in native._columns._flat.items()),
        ]
        if self.ema_out is not None and "ema" in columns:  # the tensors themselves are the user's to keep
            columns["ema"] = [average.memory for average in self.ema_out]
        one = torch.zeros(())
        self.entries = [
            {
                "step": tensors.like(one, count, k),
                **{name: views[k] for name, views in columns.items()},
                **{name: tensors.like(one, scalars[j], k) for j, name in enumerate(rule.scalars)},
                **self._extra(k),
            }
            for k in range(len(self.params))
        ]
        self._watch()

    def _watch(self) -> None:
        """Remember where parameters, states and averages are."""
        external = set() if self.ema_out is None else {"ema"}
        counted = {"step", *self.native._source.scalars, *external}
        states = [t for entries in self.entries for name, t in entries.items() if name not in counted]
        self._things: Any = [*self.params, *states[:: -(-len(states) // _MOST_WATCHED) or 1]]
        self._averages = len(self._things)
        self._called = [leaf.called for leaf in self.leaves]
        if self._exchange is not None:
            things = _objects(itertools.chain(self._things, (average.tensor for average in self.ema_out or ())))
            self._described = self._exchange.describe(things)
            self._things = things
            self._things[self._averages :] = None
        else:
            self._addresses = list(map(_address, [*self._things, *(a.tensor for a in self.ema_out or ())]))

    def shown(self) -> Shown:
        """What has been put into the state, in as far as nobody has changed it."""
        addresses = {id(t): _address(t) for entries in self.entries for t in entries.values()}
        t = self.native._rows.counts().t[:, 0].tolist()
        same = np.frombuffer(self._last[0], np.float32) == self._shown[0]
        updates = {id(e["step"]): n for e, n, kept in zip(self.entries, t, same, strict=True) if kept}
        return Shown(addresses, updates)

    @property
    def is_shown(self) -> bool:
        """Whether the counts in the state are those that were put there."""
        count, scalars = self._shown
        return count.tobytes() == self._last[0] and (not len(scalars) or scalars.tobytes() == self._last[1])

    def is_in(self, state: Mapping[Any, Any]) -> bool:
        """Whether the entries of all parameters stand in a state, whatever else does."""
        for param, entries in zip(self.params, self.entries, strict=True):
            found = state.get(param)
            if not isinstance(found, dict) or any(found.get(name) is not value for name, value in entries.items()):
                return False
        return True

    def _show(self, counts: Counts) -> None:
        """Bring the counts in the state up to date."""
        steps, scalars = self._shown
        steps[:], scalars[:] = counts.t[:, 0], counts.scalars[:, 0].T
        self._last = steps.tobytes(), scalars.tobytes()

    def _show_counts(self) -> None:
        """Bring the counts in the state up to date, if the host knows them without waiting for a GPU."""
        rows, (steps, scalars) = self.native._rows, self._shown
        if not self.native._on_host:
            return
        if len(rows) == 1:
            steps.fill(rows.counters.item(0, T))
        else:
            steps[:] = rows.counters[rows.index[:, 0], T]
        last = b""
        if len(scalars):
            scalars[:] = rows.scalars[rows.index[:, 0]].T
            last = scalars.tobytes()
        self._last = steps.tobytes(), last

    def skipped(self) -> list[int]:
        """For each parameter the steps that were skipped; counts in the state that nobody has changed are as of now."""
        counts = self.native._rows.counts()
        if self.is_shown:
            self._show(counts)
        return [int(n) for n in counts.skipped[:, 0]]

    @property
    def host_counts(self) -> bool:
        """Whether the host knows the number of steps without waiting for a GPU."""
        return bool(self.native._on_host or (self.native._rows.host_knows and not self.native._capturable))

    def present(self, schedule: Schedule, step: int) -> float | None:
        """What a schedule that hyperparameters follow gives for a step; None if none of the parameters follows it."""
        if self.native._staged is None or self.native._hyper.changed:
            self.native._refresh()
        value = self.native._scheduled.present(schedule, step)
        return None if value is None else float(value)

    # A step

    def _plain(self, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name, tensors.number(name, values[name])) for name in self._names]

    def take_settings(self, hyper: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over hyperparameters of groups.

        Args:
            hyper: those of the groups in which something may have changed.

        Raises:
            TypeError: if a value is of the wrong kind.
            ValueError: if one is out of range.
        """
        for g in self._members:
            if g not in hyper:
                continue
            plain, before = self._plain(hyper[g]), self._taken[g]
            self._taken[g] = None  # until all have been taken over
            for k, (name, value) in enumerate(plain):
                old = None if before is None else before[k][1]
                if before is None or (value is not old and (isinstance(value, Schedule) or value != old)):
                    setattr(self._group_of[g], name, value)
            self._taken[g] = plain

    def find(self) -> bool:
        """Find the gradients of all parameters and check them.

        Returns:
            False if a parameter, a state or an average is no longer where it was: then an engine has to be made anew.

        Raises:
            TypeError: if one is sparse or of a dtype that cannot be read.
            ValueError: if one has another shape than its parameter or is elsewhere, or an average is gone.
        """
        averages = self._averages_now()
        if self._exchange is None:
            return self._find_one_by_one(averages)
        if averages:
            self._things[self._averages :] = _objects(averages, len(averages))
        self.found = grads = _objects(map(_gradient, self.params), len(self.params))
        params, gradients = (things.__array_interface__["data"][0] for things in (self._things, grads))
        # From here on addresses may be new: an interrupt must not leave them beside gradients of an earlier step.
        usual, self._usual = self._usual, None
        seen = self._exchange.compare(params, gradients, self._described, self._at, self._found_kind)
        if averages:  # which only their owner keeps
            self._things[self._averages :] = None
        if seen == exchange.MOVED:
            return False
        if seen < 0 and not any(p.grad.is_neg() for p in self._singles):  # no others can be, in order as they are
            if seen == exchange.SAME and usual is not None:
                self._located = self._usual = usual
                return True
            name = self._kinds.get(self._found_kind.item())
            if name is not None and self._may_read(self._at, name):
                self._located = self._usual = Located(self._at.copy(), name)
                return True
        self._find_each(grads)
        return True

    def _may_read(self, at: Any, name: str) -> bool:
        """Whether gradients at these addresses are apart from what the step writes."""
        return not self.native._gradients.any_overlaps(at, getattr(torch, name).itemsize)

    def _averages_now(self) -> list[torch.Tensor]:
        """The user's tensors in which averages are kept, none if there are none."""
        if self.ema_out is None:
            return []
        return [average.now(called) for average, called in zip(self.ema_out, self._called, strict=True)]

    def _find_one_by_one(self, averages: Sequence[torch.Tensor]) -> bool:
        """As `find`, without DLPack's exchange API: a call for each property of each tensor."""
        if list(map(_address, itertools.chain(self._things, averages))) != self._addresses:
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
            usual = usual and all(map(operator.or_, map(bool, at), map(operator.not_, self._sizes)))
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

    def prepare(self, scale: float) -> list[Any]:
        """Everything of a step with the gradients found that can fail; it writes nothing that a user could see.

        Args:
            scale: what to divide the gradients by.

        Returns:
            The parts of the step, for `run` one after the other.
        """
        return [self.native._prepare(self._located, None if scale == 1.0 else scale)]

    def run(self, part: Any) -> StepInfo | None:
        """Carry out a part of a step.

        Returns:
            What was done, or None if it is to be told by somebody else.
        """
        active, written = self._located.active, self._written
        if active is not None:
            written = [*itertools.compress(self.params, active), *written[len(self.params) :]]
        # Autograd has to know what is written behind its back: a backward that needs the old values must fail.
        _increment_versions(written)
        return self.native._run(*part)

    def mark(self) -> bytes:
        """Something that is another after each part of a step."""
        found: bytes = self.native._rows.counters.tobytes()
        return found

    def deliver(self, part: Any) -> None:
        """Do what belongs to a part of a step that has been run; once more if it was interrupted."""

    def done(self) -> None:
        """All parts of a step have been run."""
        self._show_counts()


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
