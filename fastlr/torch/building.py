"""Building engines from groups and state, and what belongs to engines as long as they live."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..kernels import exchange
from ..kernels.staging import Staged
from ..options import OWN
from ..schedules import Schedule
from ..step import scheduled
from ..step.scheduled import Remembered
from . import states, tensors
from .engines import EXCHANGE, Engine, Leaf, Shown
from .following import SCHEDULES, Group, GroupValues, schedules_of
from .recipes import Recipe, all_leaves

__all__ = ["Built", "History", "State", "build", "check_ema_out", "most_updates"]

State = Mapping[Any, Any]  # `torch.optim.Optimizer.state`


@dataclass(frozen=True)
class History:
    """What had happened before engines were made.

    Attributes:
        steps: steps made.
        skipped: steps skipped, without those that engines count.
        observed: what plateaus remember.
    """

    steps: int = 0
    skipped: int = 0
    observed: Remembered = field(default_factory=Remembered)


class Held:
    """What a state holds, to notice that something has been set, cleared or replaced."""

    def __init__(self) -> None:
        self._held: tuple[list[Any], np.ndarray] = [], np.zeros(0, np.int64)

    def remember(self, state: State) -> None:
        """Remember the objects in a state."""
        held = exchange.items(state)
        self._held = held, np.fromiter(map(id, held), np.int64, len(held))

    def is_in(self, state: dict[Any, Any]) -> bool:
        """Whether a state holds the very objects that were remembered, in the same order."""
        return EXCHANGE.holds(state, self._held[1])


@dataclass(frozen=True, eq=False)
class Built:
    """Engines, what they were made for, and what came before them; replaced whole when other engines are needed.

    Attributes:
        recipe: what the optimizer was built with.
        history: what had happened before.
        ema_out: the tensors that hold averages, or None.
        engines: one for each dtype and device; none before the first step.
        params: the parameters of each group that the engines are made for; None before there are engines.
        values: the hyperparameters of each group as engines have taken them over.
        outside: whether clipping and the test for NaN and Inf are done outside of the native optimizers.
        held: remembers what `opt.state` holds.
    """

    recipe: Recipe
    history: History
    ema_out: list[tensors.UserTensor] | None = None
    engines: Sequence[Engine] = ()
    params: list[list[torch.Tensor]] | None = None
    values: list[GroupValues] = field(default_factory=list)
    outside: bool = False
    held: Held = field(default_factory=Held)

    # Whether everything is as it was

    def fits(self, param_groups: Sequence[Group]) -> bool:
        """Whether the engines are made for these parameters and groups."""
        if self.params is None:
            return False
        params = [group["params"] for group in param_groups]
        return list(map(len, params)) == list(map(len, self.params)) and all(
            all(map(operator.is_, now, before)) for now, before in zip(params, self.params, strict=True)
        )

    def is_in(self, state: dict[Any, Any]) -> bool:
        """Whether the entries of the engines are in the state unchanged, along with whatever others keep there."""
        if not all(engine.is_shown for engine in self.engines):
            return False
        if self.held.is_in(state):
            return True
        if not all(engine.is_in(state) for engine in self.engines):
            return False
        self.held.remember(state)  # only what others keep there has changed
        return True

    def find(self) -> bool:
        """Find the gradients; False if a tensor is no longer where it was."""
        return all([engine.find() for engine in self.engines])  # noqa: C419  (all of them)

    # What has happened so far

    def steps(self, state: State) -> int:
        """Steps made, which is what schedules follow; a parameter may have been left out of some."""
        if self.engines:
            return max(engine.native.steps for engine in self.engines)
        return max(self.history.steps, most_updates(state))

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite."""
        return self.history.skipped + max((int(e.native.skipped_steps) for e in self.engines), default=0)

    def observed(self) -> Remembered:
        """What plateaus remember; a copy."""
        out = self.history.observed.copy()
        for engine in self.engines:
            out.update(engine.state.observed)
        return out

    def so_far(self, state: State) -> History:
        """What has happened until now: the history of the engines that follow."""
        return History(self.steps(state), self.history.skipped, self.observed())

    def with_skip(self) -> Built:
        """The same after one more step that was skipped outside of the native optimizers."""
        return replace(self, history=replace(self.history, skipped=self.history.skipped + 1))

    def shown(self) -> Shown:
        """What the engines have put into the state."""
        out = Shown()
        for engine in self.engines:
            engine.add_shown(out)
        return out

    def save_counts(self, state: State) -> None:
        """Put into the state what engines count outside of it."""
        for engine in self.engines:
            for param, skipped in zip(engine.params, engine.skipped(), strict=True):
                entries = state.get(param)
                if skipped and isinstance(entries, dict) and "step" in entries:
                    entries["skipped"] = skipped

    def entering(self, state: dict[Any, Any]) -> list[tuple[Any, Any, Any]]:
        """What to write to put the entries of the engines into the state, see `atomic.commit`; others' entries stay."""
        writes: list[tuple[Any, Any, Any]] = []
        for engine in self.engines:
            for param, entries in zip(engine.params, engine.entries, strict=True):
                there = state.get(param)
                if isinstance(there, dict):
                    writes += ((there, name, value) for name, value in entries.items())
                else:
                    writes.append((state, param, dict(entries)))
        return writes

    # Hyperparameters

    def number(self, schedule: Schedule, step: int) -> float:
        """What a schedule gives for a step; a plateau has what it remembers."""
        for engine in self.engines:
            value = engine.present(schedule, step)
            if value is not None:
                return value
        return schedule(step)

    def evaluated(self, value: Any, step: int) -> Any:
        """A hyperparameter with numbers in the place of schedules; NaN where a schedule fails."""
        if isinstance(value, tuple | list):
            return tuple(self.evaluated(part, step) for part in value)
        if not isinstance(value, Schedule):
            return value
        try:
            return float(self.number(value, step))
        except Exception:  # in a function of the user's; the step that needs the number raises it
            return math.nan

    def present(self, group: Mapping[str, Any], name: str, step: int) -> Any:
        """A hyperparameter of a group in a step."""
        return self.evaluated(tensors.number(name, schedules_of(group).get(name, group[name])), step)

    def take_settings(self, param_groups: Sequence[Group], state: State) -> None:
        """Have engines take over what has changed in the groups.

        Raises:
            TypeError: if a value is of the wrong kind.
            ValueError: if one is out of range.
        """
        changed = [g for g, group in enumerate(param_groups) if not self.values[g].are_in(group)]
        if changed:
            values = {g: GroupValues(g, param_groups[g], self.recipe.names) for g in changed}
            if self.outside:  # then no engine knows this one
                for each in values.values():
                    scheduled.examine("clip_norm", OWN["clip_norm"], each.hyper["clip_norm"], self.steps(state))
            for g in changed:  # if one of several is refused and all are put back, all are taken over again
                self.values[g] = values[g]
            for engine in self.engines:
                engine.take_settings({g: each.hyper for g, each in values.items()})
            self.settle(param_groups, state)

    def settle(self, param_groups: Sequence[Group], state: State) -> None:
        """Put schedules and numbers in their places, in groups whose hyperparameters have just been taken over."""
        for values, group in zip(self.values, param_groups, strict=False):  # there are none before there are engines
            if values.numbers is None:
                values.settle(group)
        self.show_numbers(param_groups, state)

    def show_numbers(self, param_groups: Sequence[Group], state: State) -> None:
        """Put numbers for the next step into groups, if the host knows the step without waiting for a GPU."""
        if any(SCHEDULES in group for group in param_groups) and all(e.host_counts for e in self.engines):
            evaluated = functools.partial(self.evaluated, step=self.steps(state))
            for values, group in zip(self.values, param_groups, strict=False):
                values.show(group, evaluated)


def build(
    recipe: Recipe,
    param_groups: Sequence[Group],
    state: State,
    *,
    shown: Shown | None,
    ema_out: Sequence[tensors.UserTensor] | None,
    history: History,
) -> Built:
    """Engines for groups and a state; nothing that a user could see is written yet.

    Args:
        recipe: what the optimizer was built with.
        param_groups: the groups.
        state: what the engines go on from.
        shown: what earlier engines have put there, or None if the state comes from somewhere else.
        ema_out: the tensors that hold averages, or None.
        history: what has happened so far.

    Raises:
        TypeError: if a parameter, an average or a hyperparameter is of the wrong kind.
        ValueError: if one does not fit, is out of range or has no memory.
    """
    leaves = all_leaves(param_groups)
    fresh = None if ema_out is None else _averages(ema_out, leaves)
    by_place: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, leaf in enumerate(leaves):
        tensors.check_parameter(leaf.called, leaf.param, recipe.halves)
        if leaf.param.device.type == "meta":
            raise ValueError(f"{leaf.called} is on the device meta: it has no memory yet. Use module.to_empty(...).")
        by_place.setdefault((leaf.param.dtype, leaf.param.device), []).append(k)
    outside = len(by_place) > 1 or recipe.always_outside(leaves)
    settings = dict(recipe.settings)
    names = list(recipe.names)
    if outside:
        settings["skip_nonfinite"] = False
        names.remove("clip_norm")
    if any(group["capturable"] for group in param_groups):
        settings["capturable"] = True
    values = recipe.values(param_groups)
    hyper = [each.hyper for each in values]
    engines = []
    for members in by_place.values():
        averages = None if fresh is None else [fresh[k] for k in members]
        engine = recipe.engine(recipe.make, [leaves[k] for k in members], hyper, names, settings, averages)
        engine.adopt(state, shown, history.steps, history.observed.copy())
        if len(by_place) > 1 or engine.parts > 1:
            _check_sums(engine.native.rule)
        engines.append(engine)
    params = [list(group["params"]) for group in param_groups]
    return Built(recipe, history, fresh, engines, params, values, outside)


def _averages(ema_out: Sequence[tensors.UserTensor], leaves: Sequence[Leaf]) -> list[tensors.UserTensor]:
    """The tensors that hold averages as they are now."""
    check_ema_out([average.tensor for average in ema_out], leaves)
    fresh = [tensors.UserTensor(average.now(leaf.called)) for leaf, average in zip(leaves, ema_out, strict=True)]
    for new, old in zip(fresh, ema_out, strict=True):
        new.kept = old.kept or None
    return fresh


def check_ema_out(averages: Sequence[torch.Tensor], leaves: Sequence[Leaf]) -> None:
    """Check that tensors can hold the averages of parameters.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if one differs from its parameter in shape, dtype, device or strides, or there are too few or many.
    """
    if len(averages) != len(leaves):
        raise ValueError(f"ema_out has {len(averages)} tensors for {len(leaves)} parameters. Pass one for each.")
    for leaf, average in zip(leaves, averages, strict=True):
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


def _check_sums(staged: Staged) -> None:
    """Check that a rule can be carried out for some of the parameters at a time.

    Raises:
        ValueError: if it sums over more than a parameter.
    """
    if any(scope != "leaf" for _, scope in staged.sums):
        raise ValueError(
            f"rule {staged.name!r} sums over several parameters, so all must be of one dtype on one device and updated "
            "together: with HostOptimizer in one chunk, which chunk= can make large enough."
        )


def most_updates(state: State) -> int:
    """The updates of the parameter that has had the most, by the state."""
    counts = (entries["step"] for entries in state.values() if isinstance(entries, dict) and "step" in entries)
    return max((int(states.number("a parameter", "step", count)) for count in counts), default=0)
