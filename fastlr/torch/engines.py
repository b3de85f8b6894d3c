"""Engines: one native optimizer each, which updates tensors of one dtype on one device in place.

All that this package knows of the inside of a native optimizer is here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ..arrays.columns import COMPUTE, EMA
from ..kernels import exchange
from ..kernels.formats import FORMATS
from ..kernels.layout import T
from ..optimizer import Optimizer as Native
from ..options import OPTIONS
from ..schedules import Schedule
from ..state import OptimizerState
from ..step.gradients import Located
from ..step.info import StepInfo
from ..step.rows import Counts
from ..step.scheduled import Remembered
from ..step.stepper import Prepared, Stepper
from . import states, tensors

__all__ = [
    "EXCHANGE",
    "Engine",
    "Leaf",
    "Shown",
    "as_arguments",
    "holds_tensors",
    "hyper_names",
    "objects",
    "state_letters",
    "state_names",
]

EXCHANGE = exchange.Exchange(torch.Tensor)  # describes many tensors in one call

_gradient = attrgetter("grad")
# Looking at the memory of a state costs as much as looking at a parameter. Of many states these stand for all: whoever
# moves the memory of states moves that of all. A state whose tensor is replaced is always noticed.
_MOST_WATCHED = 512
_address = torch.Tensor.data_ptr


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
    """What engines have put into `opt.state`, as far as nobody has changed it.

    Attributes:
        addresses: `id` of a tensor to its address.
        updates: `id` of a tensor that shows the number of updates to that number.
        names: `id` of a parameter to the names of its entries, without average and master: where these are missing,
            they start again from the parameter.
    """

    addresses: dict[int, int] = field(default_factory=dict)
    updates: dict[int, int] = field(default_factory=dict)
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)


class Engine:
    """A native optimizer that updates parameters in place; only the state is in flat memory of its own.

    Args:
        make: makes the native optimizer from arrays, groups and hyperparameters.
        leaves: the parameters, all of one dtype on one device.
        hyper: the hyperparameters of each group.
        names: the names of those that the native optimizer has.
        settings: the options of the native optimizer.
        ema_out: the tensors that hold the average of each parameter, or None.

    Attributes:
        params: the parameters.
        native: the native optimizer.
        gradients: those that `find` found, None where there is none.
        entries: for each parameter what `opt.state[p]` is to hold; made by `adopt`.
        writes: pairs of a tensor of the user's and what to copy into it before the first step.

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
        ema_out: Sequence[tensors.UserTensor] | None,
    ) -> None:
        self.leaves, self.params = tuple(leaves), [leaf.param for leaf in leaves]
        self._names = tuple(names)
        self._members = sorted({leaf.group for leaf in leaves})
        several = len(hyper) > 1
        paths = [f"{leaf.group}:{leaf.name}" if several else leaf.name for leaf in leaves]
        self._taken = {g: self._plain(hyper[g]) for g in self._members}  # empty: to be taken over again
        overrides = {f"{g}:*": dict(self._taken[g]) for g in self._members}
        if len({*paths, *overrides}) < len(paths) + len(overrides):  # names need not be unique, and one may be "*"
            paths = [f"{path}#{k}" for k, path in enumerate(paths)]
        self.ema_out = ema_out
        sizes = [p.numel() for p in self.params]
        self._starts = np.cumsum([0, *sizes])[:-1].tolist()
        options = self._options(paths)
        if ema_out is not None:
            averages = (self._as_array(average.tensor) for average in ema_out)
            options["ema_out"] = dict(zip(paths, averages, strict=True))
        first = as_arguments(self._taken[self._members[0]])
        groups = overrides if several else None
        self.native = make(self._targets(paths), **first, **settings, **options, groups=groups)
        self._pattern_of = {g: f"{g}:*" if several else "" for g in self._members}
        self._sizes = sizes
        self._singles = [p for p in self.params if p.numel() == 1]
        dtype = self.state.parameters.dtype.name
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._readable = {self._dtype, *tensors.HALVES}
        self._located = Located([], "")
        self._usual: Located | None = None  # where the gradients were in the last step, if all could be read in place
        self.gradients: Any = ()
        self._flats: dict[str, torch.Tensor] = {}  # the columns of the native optimizer
        self.entries: list[dict[str, Any]] = []
        self.writes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._addresses = np.zeros(len(self.params), np.int64)  # of the gradients
        self._kind = np.zeros(1, np.int64)  # and their dtype, by the exchange API's number
        self._kinds = {exchange.kind_of(name): name for name in (dtype, *FORMATS)}

    parts = 1  # the number of parts that a step is made in

    # The inside of the native optimizer

    @property
    def stepper(self) -> Stepper:
        """What makes the steps of the native optimizer, for the settings as they are."""
        return self.native._current()

    @stepper.setter
    def stepper(self, stepper: Stepper) -> None:
        self.native._stepper = stepper

    @property
    def state(self) -> OptimizerState:
        """All that the native optimizer holds."""
        return self.native._stepper.state

    @property
    def host_counts(self) -> bool:
        """Whether the host knows the number of steps without waiting for a GPU."""
        state = self.state
        return not state.backend.on_device or (state.rows.host_knows and not state.options.capturable)

    def forget(self, observed: Remembered) -> None:
        """Let plateaus remember what they did before, from the next step on."""
        self.state.observed.take(observed)
        self.native.groups.touch("lr")

    def present(self, schedule: Schedule, step: int) -> float | None:
        """What a schedule that hyperparameters follow gives for a step; None if none of the parameters follows it."""
        value = self.stepper.scheduled.present(schedule, step)
        return None if value is None else float(value)

    def _may_read(self, addresses: np.ndarray, name: str) -> bool:
        """Whether gradients of a dtype at these addresses are apart from what a step writes."""
        return not self.state.gradients.any_overlaps(addresses, getattr(torch, name).itemsize)

    def prepare_native(self, located: Located, scale: float) -> Prepared:
        """Do everything in a step of the native optimizer that can fail.

        Args:
            located: where the gradients are.
            scale: what to divide them by.
        """
        stepper = self.stepper
        prepared = stepper.prepare_located(located, None if scale == 1.0 else scale)
        if prepared.stepper is not stepper:
            self.stepper = prepared.stepper
        return prepared

    # What subclasses do differently

    def _targets(self, paths: Sequence[str]) -> Any:
        """What the native optimizer updates."""
        return dict(zip(paths, map(self._as_array, self.params), strict=True))

    def _options(self, paths: Sequence[str]) -> dict[str, Any]:
        """Further options of the native optimizer."""
        return {}

    def _initial(self, k: int, saved: Mapping[str, Any], shown: Shown | None) -> None:
        """Take over what only a subclass saves of a parameter; see `adopt`."""

    def _extra(self, k: int) -> dict[str, torch.Tensor]:
        """What only a subclass saves of a parameter."""
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
        if name == EMA.name and self.ema_out is not None:
            return [average.tensor for average in self.ema_out]
        flat = self._flats.setdefault(name, self._as_tensor(self.state.columns.flat[name]))
        role = self.state.columns.roles[name]
        if role.format != COMPUTE:
            flat = flat.view(getattr(torch, role.format))
        return [tensors.like(p, flat, start) for p, start in zip(self.params, self._starts, strict=True)]

    # State: the entries of `torch.optim.Optimizer.state`

    def adopt(self, saved: Mapping[Any, Any], shown: Shown | None, steps: int, observed: Remembered) -> None:
        """Go on from a state; nothing that a user could see is written yet, see `writes`.

        Args:
            saved: the entries of each parameter; a parameter without entries starts from the beginning.
            shown: what earlier engines have put there, or None if the state comes from somewhere else.
            steps: steps made so far, whether or not these parameters took part.
            observed: what plateaus remember.

        Raises:
            ValueError: if an entry cannot be the state of a parameter, or some entries are missing.
        """
        options, scalar_names = self.state.options, self.state.options.rule.scalars
        columns = {name: self.views(letter) for letter, name in state_letters(self.native).items()}
        counts = Counts.zero(len(self.params), 1, [options.starts[name] for name in scalar_names])
        counts.scalars = counts.scalars.copy()
        updates = {} if shown is None else shown.updates
        for k, leaf in enumerate(self.leaves):
            entries = states.entries_of(leaf.called, saved.get(leaf.param))
            if shown is not None:
                states.check_whole(leaf.called, entries, shown.names.get(id(leaf.param), ()))
            t = entries.get("step", any(entries.get(n) is not None for n in columns))
            t = int(t) if isinstance(t, bool) else updates.get(id(t)) or states.count(leaf.called, "step", t)
            counts.t[k], counts.clock[k] = t, steps
            counts.skipped[k] = states.count(leaf.called, "skipped", entries.get("skipped", 0))
            for j, name in enumerate(scalar_names):
                if name in entries:
                    nan = options.scalars_can_be_nan
                    counts.scalars[k, 0, j] = states.number(leaf.called, name, entries[name], True, nan)
            for name, views in columns.items():
                value = entries.get(name)
                if value is None:
                    continue
                entry, value = value, states.tensor(leaf.called, name, value, leaf.param).detach()
                unchanged = shown is not None and shown.addresses.get(id(entry)) == _address(value)
                if name != EMA.name or self.ema_out is None:
                    views[k].copy_(value)
                elif not unchanged:  # an average goes on from what stands in the tensor of the user's
                    self.writes.append((views[k].detach(), value))
            self._initial(k, entries, shown)
        counts.steps = steps
        self.state.columns.encode_shadow()  # the low-precision copy is that of the parameters as they are now
        self.stepper = self.stepper.resumed(replace(self.state, observed=observed), counts, False)
        count = torch.zeros(len(self.params))
        scalars = torch.zeros((len(scalar_names), len(self.params)), dtype=torch.float64)
        self._shown = count.numpy(), scalars.numpy()
        self._show(self.state.rows.counts())
        self._written = [
            *self.params,
            *(average.memory for average in self.ema_out or ()),
            *(self._flats.setdefault(name, self._as_tensor(flat)) for name, flat in self.state.columns.flat.items()),
        ]
        if self.ema_out is not None and EMA.name in columns:  # the tensors themselves are the user's to keep
            columns[EMA.name] = [average.memory for average in self.ema_out]
        single = torch.zeros(())
        self.entries = [
            {
                "step": tensors.like(single, count, k),
                **{name: views[k] for name, views in columns.items()},
                **{name: tensors.like(single, scalars[j], k) for j, name in enumerate(scalar_names)},
                **self._extra(k),
            }
            for k in range(len(self.params))
        ]
        self._watch()

    def _watch(self) -> None:
        """Remember where parameters, states and averages are."""
        unwatched = {"step", *self.state.options.rule.scalars, *(() if self.ema_out is None else [EMA.name])}
        states = [t for entries in self.entries for name, t in entries.items() if name not in unwatched]
        watched = [*self.params, *states[:: -(-len(states) // _MOST_WATCHED) or 1]]
        self._first_average = len(watched)
        self._called = [leaf.called for leaf in self.leaves]
        self._watched = objects(itertools.chain(watched, (average.tensor for average in self.ema_out or ())))
        self._described = EXCHANGE.describe(self._watched)
        self._watched[self._first_average :] = None  # which only their owner keeps

    def add_shown(self, shown: Shown) -> None:
        """Tell what has been put into the state, as far as nobody has changed it."""
        shown.addresses.update((id(t), _address(t)) for entries in self.entries for t in entries.values())
        t = self.state.rows.counts().t[:, 0].tolist()
        same = np.frombuffer(self._last[0], np.float32) == self._shown[0]
        shown.updates.update((id(e["step"]), n) for e, n, kept in zip(self.entries, t, same, strict=True) if kept)
        names = [name for name in self.entries[0] if name not in (EMA.name, "master")] if self.entries else []
        shown.names.update(dict.fromkeys(map(id, self.params), tuple(names)))

    @property
    def is_shown(self) -> bool:
        """Whether the counts in the state are those that were put there."""
        count, scalars = self._shown
        return count.tobytes() == self._last[0] and (not len(scalars) or scalars.tobytes() == self._last[1])

    def is_in(self, state: Mapping[Any, Any]) -> bool:
        """Whether the entries of all parameters stand in a state, whatever else does."""
        for param, entries in zip(self.params, self.entries, strict=True):
            there = state.get(param)
            if not isinstance(there, dict) or any(there.get(name) is not value for name, value in entries.items()):
                return False
        return True

    def _show(self, counts: Counts) -> None:
        """Bring the counts in the state up to date."""
        steps, scalars = self._shown
        steps[:], scalars[:] = counts.t[:, 0], counts.scalars[:, 0].T
        self._last = steps.tobytes(), scalars.tobytes()

    def skipped(self) -> list[int]:
        """The steps skipped for each parameter; counts in the state that nobody has changed are brought up to date."""
        counts = self.state.rows.counts()
        if self.is_shown:
            self._show(counts)
        return [int(n) for n in counts.skipped[:, 0]]

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go back to a snapshot."""
        self.native.restore(snapshot)
        self._show(self.state.rows.counts())

    # A step

    def _plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tensors.number(name, values[name]) for name in self._names}

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
            groups, pattern = self.native.groups, self._pattern_of[g]
            group = groups[pattern] if pattern else groups.defaults
            plain, before = self._plain(hyper[g]), self._taken[g]
            self._taken[g] = {}  # until all have been taken over
            for name, value in plain.items():
                old = before.get(name)
                if not before or (value is not old and (isinstance(value, Schedule) or value != old)):
                    groups.set(group, name, value, alone=False)
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
        if averages:
            self._watched[self._first_average :] = objects(averages, len(averages))
        self.gradients = grads = objects(map(_gradient, self.params), len(self.params))
        watched, gradients = (array.__array_interface__["data"][0] for array in (self._watched, grads))
        # From here on addresses may be new: an interrupt must not leave them beside gradients of an earlier step.
        usual, self._usual = self._usual, None
        result = EXCHANGE.compare(watched, gradients, self._described, self._addresses, self._kind)
        if averages:  # which only their owner keeps
            self._watched[self._first_average :] = None
        if result == exchange.MOVED:
            return False
        if result < 0 and not any(p.grad.is_neg() for p in self._singles):  # larger ones with it have other strides
            if result == exchange.SAME and usual is not None:
                self._located = self._usual = usual
                return True
            name = self._kinds.get(self._kind.item())
            if name is not None and self._may_read(self._addresses, name):
                self._located = self._usual = Located(self._addresses.copy(), name)
                return True
        self._find_each(grads)
        return True

    def _averages_now(self) -> list[torch.Tensor]:
        """The user's tensors in which averages are kept, none if there are none."""
        if self.ema_out is None:
            return []
        return [average.now(called) for average, called in zip(self.ema_out, self._called, strict=True)]

    def _find_each(self, grads: Iterable[torch.Tensor | None]) -> None:
        """Find gradients that are not all there, or not all where they can be read as they are."""
        for leaf, grad in zip(self.leaves, grads, strict=True):
            if grad is not None:
                tensors.check_gradient(leaf.called, grad, leaf.param)
        dtypes = {grad.dtype for grad in grads if grad is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= self._readable else self._dtype
        readable: list[torch.Tensor | None] = []
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                grad = tensors.with_strides_of(param, grad, dtype)
                if self.state.gradients.written.overlaps(grad.data_ptr(), grad.nbytes):
                    grad = grad.clone()
            readable.append(grad)
        self.gradients = readable
        active = tuple(grad is not None for grad in readable)
        addresses = [0 if grad is None else grad.data_ptr() for grad in readable]
        self._located = Located(addresses, tensors.name_of(dtype), None if all(active) else active)

    @property
    def has_gradients(self) -> bool:
        """Whether any were found."""
        return self._located.active is None or any(self._located.active)

    def prepare(self, scale: float) -> list[Any]:
        """Do everything in a step with the gradients found that can fail; nothing that a user could see is written.

        Args:
            scale: what to divide the gradients by.

        Returns:
            The parts of the step, for `run` one after the other.
        """
        return [self.prepare_native(self._located, scale)]

    def run(self, part: Any) -> StepInfo | None:
        """Carry out a part of a step.

        Returns:
            What was done, or None where a step has several parts, none of which can tell it.
        """
        active, written = self._located.active, self._written
        if active is not None:
            written = [*itertools.compress(self.params, active), *written[len(self.params) :]]
        # Autograd has to know what is written behind its back: a backward that needs the old values must fail.
        torch.autograd.graph.increment_version(written)
        return part.stepper.run(part)

    def mark(self) -> bytes:
        """A value that differs after each part of a step from what it was before."""
        return self.state.rows.counters.tobytes()

    def deliver(self, part: Any) -> None:
        """Do what belongs to a part of a step that has been run; once more if it was interrupted."""

    def done(self) -> None:
        """All parts of a step have been run: bring counts in the state up to date, if that needs no wait for a GPU."""
        state, (steps, scalars) = self.state, self._shown
        if state.backend.on_device:
            return
        rows = state.rows
        if len(rows) == 1:
            steps.fill(rows.counters.item(0, T))
        else:
            steps[:] = rows.counters[rows.index[:, 0], T]
        last = b""
        if len(scalars):
            scalars[:] = rows.scalars[rows.index[:, 0]].T
            last = scalars.tobytes()
        self._last = steps.tobytes(), last


def objects(items: Iterable[Any], count: int = -1) -> np.ndarray:
    """Python objects in an array, as they are: NumPy looks for no numbers in them."""
    return np.fromiter(items, object, count)


def hyper_names(native: Native) -> list[str]:
    """The names of the hyperparameters of a native optimizer, without "frozen"."""
    return [name for name in native.groups.names if name != "frozen"]


def state_letters(native: Native) -> dict[str, str]:
    """The columns of a native optimizer that belong in the state: the letter of each, and its name there."""
    state = native._stepper.state
    return {letter: state.options.public_name(letter) for letter in state.columns.letters}


def state_names(native: Native) -> list[str]:
    """The names of a native optimizer's states, without those of its own options."""
    return [name for letter, name in state_letters(native).items() if letter != EMA.name]


def as_arguments(hyper: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters by the names that the constructor of a native optimizer has for them."""
    arguments = {o.hyper.name: name for name, o in OPTIONS.items() if o.hyper is not None}
    return {arguments.get(name, name): value for name, value in hyper.items()}


def holds_tensors(value: Any) -> bool:
    """Whether a hyperparameter is a tensor, or has one in it."""
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple | list) and any(map(holds_tensors, value)))
