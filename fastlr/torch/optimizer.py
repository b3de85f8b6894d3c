"""Optimizers for PyTorch: `torch.optim.Optimizer` outside, fastlr's own inside."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, ClassVar

import numpy as np
import torch

from .. import checks, groups
from ..exclusive import Users, exclusive, take_over
from ..kernels import exchange
from ..kernels.atomic import commit
from ..kernels.staging import Rule, Staged
from ..optimizer import Optimizer as Native
from ..optimizer import StepOptions
from ..schedules import Schedule
from ..step import scheduled
from ..step.info import Layout, StepInfo
from ..step.scheduled import Remembered
from . import following, states, tensors
from .engines import Engine, Leaf, Shown, as_arguments, holds_tensors
from .engines import _exchange as find_exchange
from .following import SCHEDULES, follows
from .trials import Trial

__all__ = ["Optimizer", "counterpart"]

# Arguments of torch.optim that choose between its implementations: taken, kept in the groups, without effect here.
_IMPLEMENTATIONS = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
# In place of 0, what clipping makes of an infinite norm: gradients are divided, and as float32 this leaves 0 or NaN.
_LEAST = 1e-100
# Options whose part PyTorch or this module plays.
_ELSEWHERE = {"loss_scale", "ema_out", "shadow_out", "zero_grads", "lr_scale", "grad_dtype", "groups", "backend"}
# What a saved group holds beside what a group does.
_SAVED_ALONG = ("params", SCHEDULES, "skipped_steps", "clock", "observed", "averaging")
_OFFERED = [name for name in StepOptions.__annotations__ if name not in _ELSEWHERE | {"capturable"}]


@dataclass
class _Taken:
    """The hyperparameters of a group as engines have taken them over.

    Attributes:
        given: what stood in the group.
        schedules: and beside it.
        values: what that means.
    """

    given: tuple[Any, ...]
    schedules: dict[str, Any]
    values: tuple[Any, ...]


@dataclass
class _Made:
    """Engines, and what belongs to them; see the attributes of `Optimizer` of the same names."""

    engines: list[Engine]
    outside: bool
    known: list[list[torch.Tensor]]
    taken: list[_Taken | None]
    ema_out: list[tensors.Theirs] | None


class Optimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """Any rule as a `torch.optim.Optimizer`; `fastlr.torch.AdamW` and the others are this class with a rule.

    Parameters and gradients stay where they are, and one pass updates all of them; only the state is in flat memory,
    of which `opt.state[p]` has views. Everything that works on an optimizer of PyTorch works on this one: groups,
    `add_param_group`, closures, hooks, learning-rate schedulers, `GradScaler`, `copy.deepcopy` and pickle, and
    `state_dict` goes over to the counterpart in `torch.optim` and back. A parameter that has moved or was exchanged, a
    gradient in another place, a state that was set, cleared or replaced, a hyperparameter set in a group: the next step
    sees it. What others keep in `opt.state` stays. A parameter whose gradient is None is not updated. On a GPU the step
    counts in `opt.state` are brought up to date when the state is saved.

    A group has a number for each hyperparameter; of one that follows a schedule it is that of the next step, and the
    schedule is beside it in `group["schedules"]`. A number that somebody sets takes the place of the schedule, with a
    warning; a scheduler of PyTorch that changes it is refused.

    A step tells autograd what it writes, so that a backward pass that needs the old values fails instead of being
    wrong. Several dtypes and devices in one optimizer are fine; clipping and skipping are about all of them together.

    Args:
        params: parameters, named parameters, or groups, as `torch.optim` takes them: float32 or float64, dense in
            memory, on the CPU or on NVIDIA GPUs. Gradients may be bfloat16 or float16, where PyTorch allows it.
        rule: a rule made by `fastlr.rule`.
        lr: learning rate, >= 0, for groups that have none of their own; a number, a tensor of one element, or a
            schedule of `fastlr.schedules`, as for all hyperparameters. Not for a rule that takes none.
        ema: keep a moving average of the parameters in `opt.ema`, updated in the same pass: its decay, in [0, 1]; at 1
            it stays as it is. It follows all parameters at each step, those too that have no gradient. Buffers of a
            model are no parameters.
        ema_out: an iterable of tensors to keep that average in, one for each parameter, such as
            `target.parameters()`. It goes on from what stands in them. Buffers are no parameters: copy those of batch
            norm after the step, `for a, b in zip(target.buffers(), model.buffers()): a.copy_(b)`. If the target gets
            other tensors, set `opt.ema_out` to them.
        settings: the rule's hyperparameters; those of the step, for each group: weight_decay, decoupled_weight_decay,
            maximize, clip_norm, clip_value; and for the whole optimizer: scope, skip_nonfinite, shadow, statistics,
            threads, alloc. See `fastlr.Optimizer`.

    Attributes:
        info: what the last step did, a `fastlr.StepInfo`; None before the first. With parameters of several dtypes or
            devices it has no norms of single leaves.

    Raises:
        TypeError: if an argument, a parameter or a gradient is of the wrong kind.
        ValueError: if one is out of range or does not fit.

    Example:
        >>> import torch, fastlr.torch
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = fastlr.torch.AdamW(model.parameters(), lr=0.1, clip_norm=1.0)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> opt.step()
        >>> opt.info.step, opt.info.clip_coef < 1
        (1, True)
    """

    _engine: Callable[..., Engine] = Engine
    _unsettled: ClassVar[None] = None  # see `exclusive`: here nothing is left to be done after an interrupt
    _theirs: ClassVar[str | None] = None  # the counterpart in torch.optim
    _halves: ClassVar[bool] = False  # whether parameters may be bfloat16 and float16
    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf instead of writing the gradients

    def __init__(
        self,
        params: Any,
        rule: Rule,
        *,
        lr: Any = None,
        ema: Any = None,
        ema_out: Iterable[torch.Tensor] | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"rule must be made by fastlr.rule, got {checks.shown(rule)}. Optimizers have classes: "
                "fastlr.torch.Adam."
            )
        make = functools.partial(Native, rule=rule)
        if lr is not None:
            settings["lr"] = lr
        self._set_up(params, make, {**settings, "ema": ema, "ema_out": ema_out})

    def _set_up(self, params: Any, make: Callable[..., Native], given: Mapping[str, Any]) -> None:
        """Check everything but the parameters' memory, and make the groups.

        Args:
            params: as PyTorch takes them.
            make: makes the native optimizer from arrays and settings.
            given: the arguments that the caller gave.
        """
        settings = dict(given)
        implementations = {n: settings.pop(n, default) for n, default in _IMPLEMENTATIONS.items()}
        ema_out = settings.pop("ema_out", None)
        if implementations["differentiable"]:
            raise ValueError("differentiable=True is not there: a step is no operation that autograd could follow.")
        unknown = _ELSEWHERE & settings.keys()
        if unknown:
            raise TypeError(f"{unknown.pop()} is not for PyTorch's parameters; see fastlr.torch.Optimizer.")
        numbers = {k: tensors.number(k, v) for k, v in settings.items()}
        probe = make(np.zeros(1, np.float32), **{**numbers, "alloc": None})
        self._make = make
        self._names = [name for name in probe._hyper.names if name != "frozen"]
        if ema_out is not None and "ema_decay" not in self._names:
            raise ValueError("ema_out is where the average is kept; give its decay as well, such as ema=0.999.")
        self._settings = {n: v for n, v in settings.items() if n not in {*self._names, "ema"}}
        self._ema_out: list[tensors.Theirs] | None = None
        self._start(clock=0, skipped=0, observed=Remembered())
        starts = {n: getattr(probe, n) for n in vars(probe).keys() & inspect.signature(make).parameters.keys()}
        super().__init__(params, {**implementations, **starts, **self._normal(settings, probe)})
        if ema_out is not None:
            self.ema_out = ema_out

    def _start(self, clock: int, skipped: int, observed: Remembered) -> None:
        """What an optimizer has before its engines are made: new, or a copy.

        Args:
            clock: steps made.
            skipped: steps skipped, without those that engines count.
            observed: what plateaus remember.
        """
        self._users: Users = {}
        self._engines: list[Engine] | None = None
        self._outside = False
        self._known: list[list[torch.Tensor]] = []  # the parameters of each group that the engines are made for
        self._hyper: list[_Taken | None] = []  # and their hyperparameters
        self._loaded: dict[str, Any] | None = None
        self._clock, self._skipped, self._observed = clock, skipped, observed
        self._training: list[tuple[torch.Tensor, torch.Tensor | None]] | None = (
            None  # weights, while averages take their place
        )
        self._values_of = operator.itemgetter(*self._names)
        self._exchange = find_exchange()
        self._held: tuple[list[Any], np.ndarray] = [], np.zeros(0, np.int64)
        self.info: StepInfo | None = None

    def _normal(self, given: Mapping[str, Any], probe: Native) -> dict[str, Any]:
        """Hyperparameters as groups hold them: as the native optimizer has them, tensors as they were given."""
        return {n: given[n] if n in given and holds_tensors(given[n]) else getattr(probe, n) for n in self._names}

    def _number(self, schedule: Schedule, step: int | None = None) -> float:
        """What a schedule gives for a step, the next one if none is given; a plateau has what it remembers."""
        step = self._steps_made() if step is None else step
        found = (engine.present(schedule, step) for engine in self._engines or ())
        value = next((value for value in found if value is not None), None)
        return schedule(step) if value is None else value

    # Parameters and groups

    @exclusive
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in `torch.optim`; with `ema_out=` the group brings "ema_out" along.

        Raises:
            TypeError: if a parameter or a hyperparameter is of the wrong kind.
            ValueError: if one is out of range, or a parameter is in a group already.
        """
        more = list(param_group.pop("ema_out", ())) if isinstance(param_group, dict) else []
        trial = object.__new__(torch.optim.Optimizer)  # PyTorch's own part, on a list of its own
        trial.defaults, trial.param_groups = self.defaults, list(self.param_groups)
        torch.optim.Optimizer.add_param_group(trial, param_group)
        every, group = trial.param_groups, trial.param_groups[-1]
        for leaf in self._leaves_of(every, len(every) - 1):
            tensors.check_parameter(leaf.called, leaf.param, self._halves)
        g = len(every) - 1
        values = following.resolved(g, group, self._names, self._values_of(group))
        values = tuple(self._normal(dict(zip(self._names, values, strict=True)), self._probe(values)).values())
        if group["capturable"] and not all(p.is_cuda for p in group["params"]):
            raise ValueError("capturable=True is for parameters on a GPU; these are on the CPU.")
        writes: list[tuple[Any, Any, Any]] = [(self.param_groups, slice(g, g), [group])]
        if self._ema_out is not None:
            given = [average.tensor for average in self._ema_out] + more
            self._check_ema_out(given, self._leaves(every))
            averages = [*self._ema_out, *map(tensors.Theirs, more)]
            writes.append((self.__dict__, "_ema_out", averages))
        group.update(zip(self._names, values, strict=True))
        following.settle(g, group, self._names, values)
        following.show(group, self._number)
        commit(writes)

    def _probe(self, values: Sequence[Any]) -> Native:
        """A native optimizer of nothing with the settings of a group: checks them, and tells which states they need."""
        hyper = {n: tensors.number(n, value) for n, value in zip(self._names, values, strict=True)}
        return self._make(np.zeros(1, np.float32), **{**self._settings, "alloc": None}, **as_arguments(hyper))

    @staticmethod
    def _leaves_of(param_groups: Sequence[Mapping[str, Any]], g: int) -> list[Leaf]:
        group = param_groups[g]
        first = sum(len(before["params"]) for before in param_groups[:g])
        names = group.get("param_names") or [str(first + k) for k in range(len(group["params"]))]
        return [Leaf(p, name, g) for p, name in zip(group["params"], names, strict=True)]

    def _leaves(self, param_groups: Sequence[Mapping[str, Any]] | None = None) -> list[Leaf]:
        """All parameters, each once."""
        some = self.param_groups if param_groups is None else param_groups
        every = itertools.chain.from_iterable(self._leaves_of(some, g) for g in range(len(some)))
        return list({id(leaf.param): leaf for leaf in reversed(list(every))}.values())[::-1]

    @property
    def ema_out(self) -> list[torch.Tensor] | None:
        """The tensors in which the average is kept, or None; set it when they are others, such as a new target network.

        Raises:
            TypeError: if something else than tensors is set.
            ValueError: if they do not fit, or the optimizer was built without `ema=`.
        """
        return None if self._ema_out is None else [average.tensor for average in self._ema_out]

    @ema_out.setter
    @exclusive
    def ema_out(self, given: Iterable[torch.Tensor]) -> None:
        if "ema_decay" not in self._names:
            raise ValueError("ema_out is where the average is kept; give its decay as well, such as ema=0.999.")
        given = list(given)
        self._check_ema_out(given, self._leaves())
        fresh = [tensors.Theirs(average) for average in given]
        state = {p: {n: v for n, v in e.items() if n != "ema"} for p, e in self.state.items() if isinstance(e, dict)}
        made = None if self._engines is None else self._make_engines(self.param_groups, state, self._shown(), fresh)
        commit([(self.__dict__, "_ema_out", fresh)])
        if made is not None:
            self._install(made)

    @staticmethod
    def _check_ema_out(given: Sequence[torch.Tensor], leaves: Sequence[Leaf]) -> None:
        if len(given) != len(leaves):
            raise ValueError(f"ema_out has {len(given)} tensors for {len(leaves)} parameters. Pass one for each.")
        for leaf, average in zip(leaves, given, strict=True):
            p = leaf.param
            if not isinstance(average, torch.Tensor):
                raise TypeError(f"ema_out for {leaf.called} is a {type(average).__name__}, expected a tensor.")
            if (average.shape, average.dtype, average.device) != (p.shape, p.dtype, p.device):
                raise ValueError(
                    f"ema_out for {leaf.called} is {average.dtype} {tuple(average.shape)} on {average.device}, "
                    f"the parameter is {p.dtype} {tuple(p.shape)} on {p.device}."
                )
            if average.stride() != p.stride():
                raise ValueError(f"ema_out for {leaf.called} has other strides than the parameter. Pass a copy of it.")
            if not average.is_meta and not tensors.has_memory(average):
                raise ValueError(f"ema_out for {leaf.called} has no memory: its storage has been given back.")

    # Engines

    def _current(self) -> list[Engine]:
        """The engines, made anew if parameters or groups are others than before."""
        here = [group["params"] for group in self.param_groups]
        same = list(map(len, here)) == list(map(len, self._known)) and all(
            all(map(operator.is_, now, before)) for now, before in zip(here, self._known, strict=True)
        )
        return self._engines if self._engines is not None and same else self._build()

    def _ready(self) -> list[Engine]:
        """The engines, made anew if parameters, groups or the state are others than before; gradients are found."""
        engines = self._current()
        if not all(engine.is_shown for engine in engines) or not self._holds_state(engines):
            engines = self._build()
        if not all([engine.find() for engine in engines]):  # noqa: C419  (all of them; a tensor is elsewhere)
            engines = self._build()
            for engine in engines:
                engine.find()
        return engines

    def _holds_state(self, engines: Sequence[Engine]) -> bool:
        """Whether the entries of the engines stand in the state, beside whatever others keep there."""
        held, addresses = self._held
        if self._exchange is not None:
            if self._exchange.holds(self.state, addresses):
                return True
            now = exchange.items(self.state)
        else:
            now = exchange.items(self.state)
            if len(now) == len(held) and all(map(operator.is_, now, held)):
                return True
        found = all(engine.is_in(self.state) for engine in engines)
        if found:  # it is something of others that has changed
            self._hold(now)
        return found

    def _hold(self, held: list[Any]) -> None:
        """Remember what stands in the state."""
        self._held = held, np.fromiter(map(id, held), np.int64, len(held))

    def _shown(self) -> Shown:
        """What the engines have put into the state."""
        every = [engine.shown() for engine in self._engines or ()]
        return Shown(
            {k: v for one in every for k, v in one.addresses.items()},
            {k: v for one in every for k, v in one.updates.items()},
        )

    def _build(self) -> list[Engine]:
        """New engines, which go on from the state as it is; on an error everything is as it was."""
        self._save_counts()
        made = self._make_engines(self.param_groups, self.state, self._shown(), self._ema_out)
        self._install(made)
        return made.engines

    def _make_engines(
        self,
        param_groups: Sequence[dict[str, Any]],
        state: Mapping[Any, Any],
        shown: Shown | None,
        ema_out: Sequence[tensors.Theirs] | None,
        clock: int | None = None,
        observed: Remembered | None = None,
    ) -> _Made:
        """Engines for groups and a state; nothing that a user could see is written yet.

        Args:
            param_groups: the groups.
            state: what they go on from.
            shown: what the engines before have put there, or None if the state comes from somewhere else.
            ema_out: where averages are kept, or None.
            clock: steps made so far; None: as many as this optimizer has made.
            observed: what plateaus remember; None: as in this optimizer.
        """
        leaves = self._leaves(param_groups)
        averages: dict[int, tensors.Theirs] = {}
        if ema_out is not None:
            self._check_ema_out([average.tensor for average in ema_out], leaves)
            fresh = [tensors.Theirs(average.now(leaf.called)) for leaf, average in zip(leaves, ema_out, strict=True)]
            for new, old in zip(fresh, ema_out, strict=True):
                new.kept = old.kept or None
            averages = {id(leaf.param): average for leaf, average in zip(leaves, fresh, strict=True)}
        places: dict[tuple[torch.dtype, torch.device], list[Leaf]] = {}
        for leaf in leaves:
            tensors.check_parameter(leaf.called, leaf.param, self._halves)
            if leaf.param.device.type == "meta":
                raise ValueError(
                    f"{leaf.called} is on the device meta: it has no memory yet. Use module.to_empty(...)."
                )
            places.setdefault((leaf.param.dtype, leaf.param.device), []).append(leaf)
        outside = len(places) > 1 or self._measures_outside(leaves)
        settings = dict(self._settings)
        names = list(self._names)
        if outside:
            settings["skip_nonfinite"] = False
            names.remove("clip_norm")
        if any(group["capturable"] for group in param_groups):
            settings["capturable"] = True
        taken: list[_Taken | None] = [self._taken_from(g, group) for g, group in enumerate(param_groups)]
        hyper = [dict(zip(self._names, one.values, strict=True)) for one in taken if one is not None]
        steps = self._steps_made() if clock is None else clock
        observed = self._remembered() if observed is None else observed
        engines = []
        for members in places.values():
            own = [averages[id(leaf.param)] for leaf in members] if averages else None
            engine = self._engine(self._make, members, hyper, names, settings, own)
            engine.native._put(_observed=observed.copy())
            engine.adopt(state, shown, steps)
            if len(places) > 1 or engine.parts > 1:
                _check_sums(engine.native.rule)
            engines.append(engine)
        known = [list(group["params"]) for group in param_groups]
        return _Made(engines, outside, known, taken, list(averages.values()) if averages else None)

    def _install(self, made: _Made, **more: Any) -> None:
        """Go on with new engines, all at once.

        Args:
            made: the engines, and what belongs to them.
            more: other attributes to set with them.
        """
        state: Any = more.get("state", self.state)
        here = {id(p) for engine in made.engines for p in engine.params}
        gone = [p for engine in self._engines or () for p in engine.params if id(p) not in here]
        for engine in made.engines:
            for param, entries in zip(engine.params, engine.entries, strict=True):
                found = state.get(param)
                if isinstance(found, dict):
                    found.update(entries)  # what others keep there stays
                else:
                    state[param] = dict(entries)
        for param in gone if "state" not in more else ():
            state.pop(param, None)
        writes = [(to, ..., value) for engine in made.engines for to, value in engine.writes]
        attributes = {"_engines": made.engines, "_outside": made.outside, "_known": made.known, "_hyper": made.taken}
        attributes.update(more, **({} if made.ema_out is None else {"_ema_out": made.ema_out}))
        for engine in made.engines:
            engine.writes = []
        commit([*((self.__dict__, name, value) for name, value in attributes.items()), *writes])
        self._hold(exchange.items(self.state))
        self._bring_in_order({g: taken for g, taken in enumerate(made.taken) if taken is not None})

    def _taken_from(self, g: int, group: dict[str, Any]) -> _Taken:
        """The hyperparameters of a group as they are now, to be taken over."""
        given = self._values_of(group)
        values = following.resolved(g, group, self._names, given)
        return _Taken(given, dict(group.get(SCHEDULES) or ()), values)

    def _changed(self) -> dict[int, _Taken]:
        """The hyperparameters of the groups in which something has changed since they were taken over."""
        out = {}
        for g, (group, taken) in enumerate(zip(self.param_groups, self._hyper, strict=True)):
            if (
                taken is None
                or self._values_of(group) != taken.given
                or (group.get(SCHEDULES) or {}) != taken.schedules
            ):
                out[g] = self._taken_from(g, group)
        return out

    def _bring_in_order(self, changed: Mapping[int, _Taken]) -> None:
        """Hyperparameters of groups have been taken over: bring these in order."""
        for g, taken in changed.items():
            following.settle(g, self.param_groups[g], self._names, taken.values)
            self._hyper[g] = taken
        self._show_numbers(changed)

    def _show_numbers(self, some: Iterable[int] | None = None) -> None:
        """Put the numbers for the next step where people look, in some groups or in all that follow schedules."""
        if some is None and not any(SCHEDULES in group for group in self.param_groups):
            return
        known = all(engine.host_counts for engine in self._engines or ())
        steps = self._steps_made() if known else 0
        for g in range(len(self.param_groups)) if some is None else some:
            group, taken = self.param_groups[g], self._hyper[g]
            if SCHEDULES in group and known:
                following.show(group, lambda schedule: self._number(schedule, steps))
            if taken is None:
                continue
            given = self._values_of(group)
            if some is None:
                taken.given = given
            else:  # a tensor can change and stay the same object
                schedules = dict(group.get(SCHEDULES, ()))
                self._hyper[g] = None if holds_tensors(given) else _Taken(given, schedules, taken.values)

    def _measures_outside(self, leaves: Sequence[Leaf]) -> bool:
        """Whether clipping and the test for NaN and Inf have to be done outside of the native optimizer."""
        return False

    @property
    def _measures(self) -> bool:
        """Whether a step depends on all gradients together."""
        clips = any(group["clip_norm"] is not None for group in self.param_groups)
        return clips or bool(self._settings.get("skip_nonfinite"))

    def _steps_made(self) -> int:
        """Steps made, which is what schedules follow; a parameter may have been left out of some."""
        if self._engines:
            return max(engine.native.steps for engine in self._engines)
        return max(self._clock, _most_updates(self.state))

    def _remembered(self) -> Remembered:
        """What plateaus remember."""
        out = self._observed.copy()
        for engine in self._engines or ():
            out.update(engine.native._observed)
        return out

    def _save_counts(self) -> None:
        """Put into the state what engines count beside it."""
        for engine in self._engines or ():
            for param, skipped in zip(engine.params, engine.skipped(), strict=True):
                entries = self.state.get(param)
                if skipped and isinstance(entries, dict) and "step" in entries:
                    entries["skipped"] = skipped

    # A step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters in place.

        Args:
            closure: computes the loss again, with gradients, and returns it; called once, before the update.

        Returns:
            What the closure returned, else None. `opt.info` has what the step did.

        Raises:
            TypeError: if a parameter or a gradient is of the wrong kind, or a hyperparameter in a group.
            ValueError: if one does not fit or is out of range; then nothing was written.
        """
        return _never_compiled()(self, closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            loss = torch.enable_grad()(closure)()
        token = [get_ident()]  # as `exclusive` does
        if self._users.setdefault(True, token) is not token:
            take_over(self._users, token)
        try:
            if self._training is not None:
                raise RuntimeError(
                    "the parameters are the averages, for evaluation. Call train() before the next step."
                )
            self._update(self._ready())
        finally:
            for engine in self._engines or ():  # gradients are not kept alive
                engine.found = ()
            self._users.clear()
        return loss

    def _update(self, engines: Sequence[Engine]) -> None:
        """Make the step with the gradients found; `info` tells of it."""
        self._take_settings(engines)
        scale, coefficient, norm, finite = 1.0, 1.0, None, True
        if "found_inf" in self.__dict__:  # set by GradScaler for the time of the step
            finite = not float(self.found_inf)
            given = self.__dict__.get("grad_scale")
            scale = 1.0 if given is None else float(given)
        if self._outside and finite and self._measures:
            norm = tensors.norm_of([g for engine in engines for g in engine.found if g is not None]) / scale
            finite = np.isfinite(norm) or not self._settings.get("skip_nonfinite")
            coefficient = self._coefficient(norm)
        if not finite:
            skipped = self._report(norm, np.nan, False, False)
            commit([(self.__dict__, "_skipped", self._skipped + 1), (self.__dict__, "info", skipped)])
            return
        if len(engines) == 1 and not self._outside and engines[0].has_gradients:  # the usual case, fast
            (engine,) = engines
            (part,) = engine.prepare(scale)
            self.info = engine.run(part)
            engine.done()
            self._show_numbers()
            return
        parts: list[tuple[Engine, Any]] = []
        averages = "ema_decay" in self._names  # they follow all parameters at each step
        if averages or any(engine.has_gradients for engine in engines):  # then schedules go on for all
            parts = [(engine, part) for engine in engines for part in engine.prepare(scale / coefficient)]
        report = None if parts and not self._outside else self._report(norm, coefficient, True, bool(parts))
        told = self._run(parts)
        self.info = report or told
        self._show_numbers()

    def _take_settings(self, engines: Sequence[Engine]) -> None:
        """Have engines take over what has changed in the groups."""
        changed = self._changed()
        if changed:
            hyper = {g: dict(zip(self._names, taken.values, strict=True)) for g, taken in changed.items()}
            for engine in engines:
                engine.take_settings(hyper)
            self._bring_in_order(changed)

    @staticmethod
    def _run(parts: Sequence[tuple[Engine, Any]]) -> StepInfo | None:
        """Carry out all parts of a step; if it is interrupted once the first is done, the others are done as well."""
        info, begun, marks = None, 0, {}
        try:
            for begun, (engine, part) in enumerate(parts):
                marks[begun] = engine.mark()
                info = engine.run(part)
        except BaseException:
            at, (engine, part) = begun, parts[begun]
            ran = at in marks and engine.mark() != marks[at]
            if ran:
                engine.deliver(part)
            for engine, part in parts[at + ran :] if at + ran else ():
                engine.run(part)
            raise
        finally:
            for engine in dict.fromkeys(engine for engine, _ in parts):
                engine.done()
        return info

    def _coefficient(self, norm: float) -> float:
        """What to multiply all gradients by to clip them."""
        if self._settings.get("scope", "all") != "all":
            raise ValueError(
                f"scope={self._settings['scope']!r} needs all parameters to be of one dtype on one device. Use one "
                "optimizer for each, or scope='all'."
            )
        limits = {self._limit(group) for group in self.param_groups}
        if len(limits) != 1:
            raise ValueError(
                "groups with different clip_norm need all parameters to be of one dtype on one device. Give all "
                "groups the same, or use one optimizer for each."
            )
        (limit,) = limits
        if limit is None:
            return 1.0
        return max(min(1.0, limit / (norm + 1e-6)), _LEAST)

    def _limit(self, group: Mapping[str, Any]) -> Any:
        """The norm to clip to in the next step; what is wrong with a schedule of it is told before anything is written.

        Raises:
            ValueError: if a schedule gives what no norm to clip to can be.
        """
        value = (group.get(SCHEDULES) or {}).get("clip_norm", group["clip_norm"])
        if not isinstance(value, Schedule):
            return tensors.number("clip_norm", value)
        step = self._steps_made()
        found = self._number(value, step)
        scheduled.ensure("clip_norm", "clip_norm", value, found, step)
        return found

    def _present(self, group: Mapping[str, Any], name: str) -> Any:
        """A hyperparameter of a group for the next step."""
        value = (group.get(SCHEDULES) or {}).get(name, group[name])
        return following.at(tensors.number(name, value), self._number)

    def _report(self, norm: float | None, coefficient: float, finite: bool, counts: bool) -> StepInfo:
        """What is told of a step that the native optimizers do not tell of, before it: of all parameters together."""
        steps = self._steps_made() + counts
        rates = [self._present(group, "lr") if "lr" in self._names else None for group in self.param_groups]
        lrs = {"": rates[0], **({f"{g}:*": rate for g, rate in enumerate(rates)} if len(rates) > 1 else {})}
        names = ["finite"] if norm is None else ["finite", "grad_norm", "clip_coef"]
        one = np.zeros((1, 1), np.int64)
        layout = Layout(("",), None, one, one, tuple(names), {})
        values = np.array([[float(finite), np.nan if norm is None else norm, coefficient][: len(names)]])
        return StepInfo(steps, lrs, layout, values, np.zeros((1, 0)))

    # What stands beside the parameters

    def _by_parameter(self, name: str) -> Any:
        """A column of all engines: a list in the order of the parameters, or a dict by names if they have some."""
        found = {
            id(p): view for engine in self._current() for p, view in zip(engine.params, engine.views(name), strict=True)
        }
        leaves = self._leaves()
        if "param_names" in self.param_groups[0]:
            return {leaf.name: found[id(leaf.param)] for leaf in leaves}
        return [found[id(leaf.param)] for leaf in leaves]

    @property
    def ema(self) -> Any:
        """The moving average of each parameter: a list, or a dict if the parameters were given with names."""
        if "ema_decay" not in self._names:
            raise AttributeError("there is no ema; build the optimizer with it, such as ema=0.999.")
        return self._by_parameter("ema")

    @property
    def shadow(self) -> Any:
        """The low-precision copy of each parameter, as of the last step; as `ema`."""
        if self._settings.get("shadow") is None:
            raise AttributeError('there is no shadow; build the optimizer with it, such as shadow="bfloat16".')
        return self._by_parameter("shadow")

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite."""
        return self._skipped + max((int(e.native.skipped_steps) for e in self._engines or ()), default=0)

    # Schedules and averages

    @exclusive
    def observe(self, metric: Any) -> None:
        """Tell every `schedules.Plateau` among the hyperparameters how the training goes.

        Args:
            metric: such as the loss on held-out data; NaN counts as not better.

        Raises:
            TypeError: if it is no number.
            ValueError: if no hyperparameter follows a `Plateau`.
        """
        engines = self._current()
        self._take_settings(engines)
        refused = []
        for engine in engines:
            try:
                engine.native.observe(metric)
            except ValueError as error:  # there is none among its parameters
                refused.append(error)
        if len(refused) == len(engines):
            raise refused[0]
        self._show_numbers()

    def _trial(self) -> Trial:
        """For `fastlr.find_lr`."""
        return Trial(self)

    @property
    def _average(self) -> str | None:
        """The rule's letter for the average of a schedule-free optimizer; None for all others."""
        states_of: Mapping[str, str] = getattr(self._make, "_states", {})
        return next((letter for letter, name in states_of.items() if name == "averaged"), None)

    def _need_average(self) -> str:
        letter = self._average
        if letter is None:
            raise AttributeError(f"{type(self).__name__} is not schedule-free: it keeps no average to evaluate.")
        return letter

    @property
    def averaged(self) -> Any:
        """Of a schedule-free optimizer the averaged parameters, what to evaluate and to keep; as `ema`."""
        return self._by_parameter(self._need_average())

    @property
    def eval(self) -> Callable[[], None]:
        """Of a schedule-free optimizer: `opt.eval()` puts the averages into the parameters, until `train()`."""
        self._need_average()
        return self._put_averages

    @property
    def train(self) -> Callable[[], None]:
        """Of a schedule-free optimizer: `opt.train()` puts the weights of training back, bit for bit."""
        self._need_average()
        return self._put_weights

    @exclusive
    def _put_averages(self) -> None:
        if self._training is not None:
            return
        engines = self._current()
        pairs = [(p, e["averaged"]) for engine in engines for p, e in zip(engine.params, engine.entries, strict=True)]
        kept = [(p, p.detach().clone()) for p, _ in pairs]
        writes: list[tuple[Any, Any, Any]] = [(p.detach(), ..., average) for p, average in pairs]
        commit([(self.__dict__, "_training", kept), *writes])

    @exclusive
    def _put_weights(self) -> None:
        if self._training is None:
            return
        writes: list[tuple[Any, Any, Any]] = []
        for p, weights in self._training:
            writes.append((p.detach(), ..., self._weights_of(p) if weights is None else weights))
        commit([*writes, (self.__dict__, "_training", None)])

    def _weights_of(self, param: torch.Tensor) -> torch.Tensor:
        """The weights of training by the state, up to the rounding of one operation."""
        entries = self.state[param]
        if "master" in entries:
            return entries["master"]
        (group,) = (group for group in self.param_groups if any(p is param for p in group["params"]))
        beta = self._present(group, "betas")[0] if "betas" in group else self._present(group, "beta")
        return entries["z"] + beta * (entries["averaged"] - entries["z"])

    # Saving and copying

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """The state in the form of `torch.optim`, which the counterpart there loads.

        A hyperparameter that follows a fastlr schedule is there with its number for the next step, where PyTorch looks
        for it, and the schedule beside it. The tensors are those of the optimizer, not copies, as in PyTorch.
        """
        self._save_counts()
        out: dict[str, Any] = super().state_dict()
        if not _starts_with_state(self._theirs):  # a first update is still to come, as if there were no state
            known = {name for engine in self._engines or () for one in engine.entries[:1] for name in one}
            kept = {k: _without_new(v, known) for k, v in out["state"].items()}
            out["state"] = {k: v for k, v in kept.items() if not isinstance(v, dict) or v or not out["state"][k]}
        remembered = self._remembered()
        for g, (group, here) in enumerate(zip(out["param_groups"], self.param_groups, strict=True)):
            taken = self._hyper[g] if g < len(self._hyper) else None
            try:
                values = self._taken_from(g, here).values
            except ValueError:  # a scheduler of PyTorch sets it as well, as the next step says
                values = self._values_of(here) if taken is None else taken.values
            schedules = {n: v for n, v in zip(self._names, values, strict=True) if follows(v)}
            group.pop(SCHEDULES, None)
            group.update({name: following.at(value, self._number) for name, value in schedules.items()})
            if schedules:
                group[SCHEDULES] = {name: groups.plain(value) for name, value in schedules.items()}
            observed = scheduled.saved(following.plateaus({SCHEDULES: schedules}), remembered)
            if observed:
                group["observed"] = observed
        steps = self._steps_made()
        along = {
            "skipped_steps": self._skipped,
            "clock": steps if steps != _most_updates(self.state) else 0,
            "averaging": self._training is not None,
        }
        out["param_groups"][0].update({name: value for name, value in along.items() if value})
        return out

    @exclusive
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, of this optimizer or of its counterpart in `torch.optim`.

        Hyperparameters come from the state, as in PyTorch; those that PyTorch does not know stay as they are, and so
        does a fastlr schedule that a state from PyTorch knows nothing about.

        Raises:
            ValueError: if it is of other parameters or of another optimizer; then nothing is changed.
        """

        def hold(_: Any, final: dict[str, Any]) -> dict[str, Any]:  # the last hook: what all others have made of it
            with _as_value_errors():
                self._loaded = self._read(final)
            ids = itertools.count()
            return {
                "state": {},
                "param_groups": [{"params": [next(ids) for _ in g["params"]]} for g in self.param_groups],
            }

        if not isinstance(state_dict, Mapping):
            raise ValueError(f"the state of an optimizer is a dict, got a {type(state_dict).__name__}.")
        handle = self.register_load_state_dict_pre_hook(hold)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            self._loaded = None
            handle.remove()

    def _read(self, saved: Any) -> dict[str, Any]:
        """Check a state whole, and make what is to be set to go on from it.

        Raises:
            ValueError: if it does not fit.
        """
        state, param_groups = states.check_containers(saved, self.param_groups)
        along = param_groups[0]
        skipped, clock = (states.count("the optimizer", n, along.get(n, 0)) for n in ("skipped_steps", "clock"))
        new = [self._group_from(g, one, self.param_groups[g]) for g, one in enumerate(param_groups)]
        observed = Remembered()
        for g, (one, group) in enumerate(zip(param_groups, new, strict=True)):
            called = f"'observed' of group {g} in the state"
            part = states.checked(called, scheduled.restored, following.plateaus(group), one.get("observed", {}))
            observed.update(part)
        params: dict[Any, torch.Tensor] = {}
        for g, (one, group) in enumerate(zip(param_groups, new, strict=True)):
            for k, p in zip(one["params"], group["params"], strict=True):
                if params.setdefault(k, p) is not p:
                    raise ValueError(f"'params' of group {g} in the state has {k!r} twice, for different parameters.")
        own: defaultdict[Any, Any] = defaultdict(dict)
        expected: set[str] = set()
        for g, (one, group) in enumerate(zip(param_groups, new, strict=True)):
            values = self._taken_from(g, group).values
            names = Engine.state_names(self._probe(values))
            expected.update(names)
            for k, leaf in zip(one["params"], self._leaves_of(new, g), strict=True):
                own[leaf.param] = self._entries_from(leaf, state.get(k), names)
        for k, value in state.items():
            if k in params:
                continue
            if isinstance(k, int) and isinstance(value, Mapping) and not expected.isdisjoint(value):
                raise ValueError(
                    f"the state has entries for parameter {k}, but no group has a parameter of that number."
                )
            own[k] = value
        own = defaultdict(dict, {k: v for k, v in own.items() if not isinstance(k, torch.Tensor) or v})
        clock = max(clock, _most_updates(own))
        more = {"state": own, "param_groups": new, "_skipped": skipped, "_clock": clock, "_observed": observed}
        halves = any("master" in entries for entries in own.values() if isinstance(entries, dict))
        averaging = bool(along.get("averaging")) and self._average is not None and not halves
        more["_training"] = [(p, None) for group in new for p in group["params"]] if averaging else None
        if any(p.device.type == "meta" for group in new for p in group["params"]):
            return {**more, "_engines": None}
        return {**more, "made": self._make_engines(new, own, None, self._ema_out, clock, observed)}

    def _entries_from(self, leaf: Leaf, saved: Any, expected: Sequence[str]) -> dict[str, Any]:
        """The saved state of a parameter, checked as far as it can be without an engine.

        Raises:
            ValueError: if something is missing.
        """
        entries = dict(states.entries_of(leaf.called, saved))
        first = "step" not in entries and not any(entries.get(n) is not None for n in expected)
        if not _is_new(leaf.called, entries) and not (first and set(entries) <= set(expected)):
            for name in expected if not first or not entries.keys().isdisjoint(expected) else ():
                if not isinstance(entries.get(name), torch.Tensor):
                    raise ValueError(
                        f"the state of {leaf.called} has no {name!r}, only {', '.join(map(str, entries))}. It is "
                        f"of another optimizer than {type(self).__name__} with these settings."
                    )
        device = leaf.param.device

        def here(value: Any) -> Any:
            return value if not isinstance(value, torch.Tensor) or value.device == device else value.to(device)

        kept = {*expected, "step", "skipped", "master"}
        return {name: value if name in kept else here(value) for name, value in entries.items()}

    def _group_from(self, g: int, saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
        """A group as it will be when a saved one is loaded.

        Raises:
            ValueError: if it is of another optimizer, or a schedule cannot be read.
        """
        missing = [n for n in self._own_names if n not in saved]
        if missing:
            raise ValueError(
                f"the state is of another optimizer than {type(self).__name__}: its group {g} has no "
                f"{', '.join(missing)}."
            )
        decoupled = saved.get("decoupled_weight_decay", present["decoupled_weight_decay"])
        if _decouples(type(self).__name__) and decoupled != present["decoupled_weight_decay"]:
            raise ValueError(
                f"group {g} of the state has decoupled_weight_decay={decoupled!r}, as Adam does, this "
                f"{type(self).__name__} {present['decoupled_weight_decay']!r}: its weights would decay otherwise. Set "
                "decoupled_weight_decay in the groups of the state, or build the optimizer with that of the state."
            )
        group = {**present, **{k: v for k, v in saved.items() if k not in _SAVED_ALONG}}
        followed = dict(present.get(SCHEDULES) or {})
        given = saved.get(SCHEDULES)
        if given is not None:
            called = f"{SCHEDULES!r} of group {g} in the state"
            followed = states.checked(called, _schedules_from, given, present, followed)
            wrong = [name for name, value in followed.items() if not follows(value)]
            if wrong:
                raise ValueError(f"{called} must be schedules, but that of {wrong[0]!r} is {followed[wrong[0]]!r}.")
        group.pop(SCHEDULES, None)
        if followed:
            group[SCHEDULES] = following.Followed({n: v for n, v in followed.items() if n in self._names})
        return group

    @property
    def _own_names(self) -> list[str]:
        """The numbers among the rule's own hyperparameters, which every state of this optimizer has."""
        others = (*StepOptions.__annotations__, "ema_decay")
        return [n for n in self._names if n not in others and not isinstance(self.param_groups[0][n], bool)]

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along; engines are made anew."""
        self._save_counts()
        kept = {name: self.__dict__[name] for name in ("_make", "_names", "_settings", "_skipped", "_training")}
        kept["_ema_out"], kept["_clock"] = self.ema_out, self._steps_made()
        kept["_observed"] = self._remembered().pairs()  # copies of the plateaus will remember it
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state: from a copy, a pickle, or `load_state_dict`."""
        loaded = self.__dict__.get("_loaded")
        if loaded is not None:
            more = dict(loaded)
            made = more.pop("made", None)
            if made is not None:
                self._install(made, **more)
            else:
                commit([(self.__dict__, name, value) for name, value in more.items()])
            return
        super().__setstate__(state)
        given, training = state.get("_ema_out"), state.get("_training")
        self._ema_out = None if given is None else [tensors.Theirs(average) for average in given]
        observed = Remembered()
        for plateau, known in state.get("_observed", ()):
            observed.put(plateau, known)
        self._start(state.get("_clock", 0), state.get("_skipped", 0), observed)
        self._training = training


@contextlib.contextmanager
def _as_value_errors() -> Iterator[None]:
    """Whatever goes wrong with a saved state is a ValueError: the state is not right."""
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"the state cannot be loaded: {type(error).__name__}: {error}") from error


@functools.cache
def _never_compiled() -> Callable[..., Any]:
    """The step as `torch.compile` leaves it alone: traced, addresses would become part of a graph.

    Made late: `torch.compiler.disable` imports the compiler, which PyTorch does when the first optimizer is built.
    """
    return torch.compiler.disable(Optimizer._step)


def _check_sums(staged: Staged) -> None:
    """Check that a rule can be carried out over some of the parameters at a time.

    Raises:
        ValueError: if it sums over more than a parameter.
    """
    if any(scope != "leaf" for _, scope in staged.sums):
        raise ValueError(
            f"rule {staged.name!r} sums over several parameters, so all must be of one dtype on one device and updated "
            "together: with HostOptimizer in one chunk, which chunk= can make large enough."
        )


def _schedules_from(saved: Mapping[str, Any], present: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The schedules that were saved of a group; a function of the user's is the one that is there now."""
    return {name: groups.given(name, value, present.get(name), own.get(name)) for name, value in saved.items()}


def _is_new(called: str, entries: Mapping[str, Any]) -> bool:
    """Whether a parameter with this state has not been updated yet."""
    return not entries or ("step" in entries and states.count(called, "step", entries["step"]) == 0)


def _without_new(entries: Any, known: set[str]) -> Any:
    """What to save of the state of a parameter: if it has not been updated yet, only what others keep there."""
    if not isinstance(entries, dict) or "step" not in entries or float(entries["step"]) != 0:
        return entries
    return {name: value for name, value in entries.items() if name not in known}


def _most_updates(state: Mapping[Any, Any]) -> int:
    """The updates of the parameter that has had the most, by the state."""
    counts = (entries["step"] for entries in state.values() if isinstance(entries, dict) and "step" in entries)
    return max((int(states.number("a parameter", "step", one)) for one in counts), default=0)


@functools.cache
def _starts_with_state(name: str | None) -> bool:
    """Whether PyTorch's optimizer of this name makes its state when it is built, and not at the first update."""
    theirs = None if name is None else getattr(torch.optim, name)
    return theirs is not None and len(theirs([torch.zeros(1)]).state) > 0


@functools.cache
def _decouples(name: str) -> bool:
    """Whether how weights decay belongs to PyTorch's optimizer of this name, and is no argument of it."""
    theirs = getattr(torch.optim, name, None)
    return (
        theirs not in (None, torch.optim.Optimizer)
        and "decoupled_weight_decay" not in inspect.signature(theirs).parameters
        and "decoupled_weight_decay" in theirs([torch.zeros(1)]).param_groups[0]
    )


def counterpart(native: type[Native]) -> type[Optimizer]:
    """The class for PyTorch of a native optimizer, with the arguments of the one in `torch.optim` of the same name.

    Args:
        native: such as `fastlr.AdamW`.
    """
    name = native.__name__
    signature = _signature(native, getattr(torch.optim, name, None))

    def construct(self: Optimizer, params: Any, *args: Any, **settings: Any) -> None:
        checks.hyperparameters("argument", settings, signature.parameters)
        given = signature.bind(params, *args, **settings).arguments
        self._set_up(given.pop("params"), native, given)

    construct.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    )
    first, _, rest = (native.__doc__ or "").partition("\n")
    described = f"{first}\n\n    For PyTorch: see `fastlr.torch.Optimizer`, and `fastlr.{name}` for the rule.\n"
    source = rest[rest.index("Source:") :].partition("\n\n")[0] if "Source:" in rest else ""
    return type(
        name,
        (Optimizer,),
        {
            "__init__": construct,
            "_theirs": name if hasattr(torch.optim, name) else None,
            "__doc__": f"{described}\n    {source}\n    ",
            "__module__": __package__,
        },
    )


def _signature(native: type[Native], theirs: type | None) -> inspect.Signature:
    """The arguments of a native optimizer for PyTorch: those of `torch.optim` in their order, then what fastlr adds."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = dict(inspect.signature(theirs or native).parameters)
    options = inspect.signature(Native.__init__).parameters
    for p in (*inspect.signature(native.__init__).parameters.values(), *(options[n] for n in _OFFERED)):
        if p.kind is keyword:
            parameters.setdefault(p.name, p)
    for n, default in {**_IMPLEMENTATIONS, "ema_out": None}.items():
        parameters.setdefault(n, inspect.Parameter(n, keyword, default=default))
    probe = native(np.zeros(1, np.float32))  # type: ignore[call-arg]
    for n in probe._hyper.names:
        if n in parameters:
            parameters[n] = parameters[n].replace(default=getattr(probe, n))
    taken = (p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature(
        sorted((p.replace(annotation=inspect.Parameter.empty) for p in taken), key=lambda p: p.kind)
    )
