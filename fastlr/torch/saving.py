"""States in the form of `torch.optim`: what is saved, and reading a state, which is checked whole before it is used."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import groups
from ..hyperparameters import follows
from ..options import OPTIONS, OWN
from ..step import scheduled
from ..step.scheduled import Remembered
from . import averages, states
from .averages import Training
from .building import Built, History, State, build, most_updates
from .engines import Leaf, state_names
from .following import SCHEDULES, Followed, Group, GroupValues, as_schedules, plateaus, schedules_of
from .recipes import Recipe, group_leaves

__all__ = ["Loaded", "read", "to_save"]

# What a saved group holds that belongs to no group here.
_SAVED_ALONG = ("params", SCHEDULES, "skipped_steps", "clock", "observed", "averaging")


def to_save(
    built: Built, param_groups: list[Group], state: State, *, counterpart: str | None, averaging: bool
) -> dict[str, Any]:
    """What `state_dict` returns.

    Args:
        built: the engines.
        param_groups: the groups.
        state: of the parameters; counts that engines keep outside of it are put into it.
        counterpart: the name of the counterpart in `torch.optim`, or None.
        averaging: whether averages are in the place of the weights.
    """
    built.save_counts(state)
    plain = object.__new__(torch.optim.Optimizer)  # PyTorch's own part, without hooks
    plain.state, plain.param_groups = state, param_groups
    plain._optimizer_state_dict_pre_hooks = plain._optimizer_state_dict_post_hooks = {}
    saved: dict[str, Any] = torch.optim.Optimizer.state_dict(plain)
    if not _starts_with_state(counterpart):  # a first update is still to come, as if there were no state
        names = {name for engine in built.engines for entries in engine.entries[:1] for name in entries}
        kept = {k: _without_new(v, names) for k, v in saved["state"].items()}
        saved["state"] = {k: v for k, v in kept.items() if not isinstance(v, dict) or v or not saved["state"][k]}
    observed, steps, recipe = built.observed(), built.steps(state), built.recipe
    for g, (group, here) in enumerate(zip(saved["param_groups"], param_groups, strict=True)):
        try:
            hyper = GroupValues(g, here, recipe.names).hyper
        except ValueError:  # a scheduler of PyTorch sets it as well, as the next step says
            hyper = built.values[g].hyper if built.values else {}
        schedules = {n: v for n, v in hyper.items() if follows(v)}
        group.pop(SCHEDULES, None)
        for name, value in schedules.items():
            group[name] = built.evaluated(value, steps)
        if schedules:
            group[SCHEDULES] = {name: groups.plain(value) for name, value in schedules.items()}
        remembered = scheduled.saved(plateaus(schedules), observed)
        if remembered:
            group["observed"] = remembered
    along = {
        "skipped_steps": built.history.skipped,
        "clock": steps if steps != most_updates(state) else 0,
        "averaging": averaging,
    }
    saved["param_groups"][0].update({name: value for name, value in along.items() if value})
    return saved


@dataclass(frozen=True)
class Loaded:
    """A state that was read, to be put in place at once.

    Attributes:
        state: of the parameters.
        param_groups: the groups.
        built: the engines; none if a parameter has no memory yet.
        training: the weights of training, if the averages were in their place.
    """

    state: defaultdict[Any, Any]
    param_groups: list[Group]
    built: Built
    training: Training | None


@contextlib.contextmanager
def _as_value_errors() -> Iterator[None]:
    """Whatever goes wrong with a saved state is a ValueError: the state is not right."""
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"the state cannot be loaded: {type(error).__name__}: {error}") from error


@_as_value_errors()
def read(saved: Any, built: Built, param_groups: Sequence[Group], called: str) -> Loaded:
    """Check a state whole, and make what is to be put in place to go on from it.

    Args:
        saved: as `torch.optim.Optimizer.state_dict` returns it, of this optimizer or its counterpart.
        built: the present engines.
        param_groups: the present groups.
        called: the name of the optimizer's class.

    Raises:
        ValueError: if it does not fit.
    """
    recipe = built.recipe
    state, saved_groups = states.check_containers(saved, param_groups)
    along = saved_groups[0]
    skipped, clock = (states.count("the optimizer", name, along.get(name, 0)) for name in ("skipped_steps", "clock"))
    new = [_group_from(g, group, param_groups[g], recipe, called) for g, group in enumerate(saved_groups)]
    observed = _observed_from(saved_groups, new)
    hyper = [values.hyper for values in recipe.values(new)]
    entries = _entries_from(state, saved_groups, new, [state_names(recipe.probe(values)) for values in hyper], called)
    history = History(max(clock, most_updates(entries)), skipped, observed)
    for g, values in enumerate(hyper):
        for name, value in values.items():
            part = f"{name!r} of group {g} in the state"
            states.checked(part, scheduled.examine, name, recipe.table[name], value, history.steps)
    halves = any("master" in values for values in entries.values() if isinstance(values, dict))
    averaging = bool(along.get("averaging")) and averages.state_letter(recipe.make) is not None and not halves
    training: Training | None = [(p, None) for group in new for p in group["params"]] if averaging else None
    if any(p.device.type == "meta" for group in new for p in group["params"]):
        next_built = Built(recipe, history, built.ema_out)
    else:
        next_built = build(recipe, new, entries, shown=None, ema_out=built.ema_out, history=history)
    return Loaded(entries, new, next_built, training)


def _observed_from(saved_groups: Sequence[Group], new: Sequence[Group]) -> Remembered:
    """What plateaus remember by saved groups.

    Raises:
        ValueError: if that cannot be read.
    """
    observed = Remembered()
    for g, (saved, group) in enumerate(zip(saved_groups, new, strict=True)):
        called = f"'observed' of group {g} in the state"
        observed.update(
            states.checked(called, scheduled.restored, plateaus(schedules_of(group)), saved.get("observed", {}))
        )
    return observed


def _entries_from(
    state: State,
    saved_groups: Sequence[Group],
    new: Sequence[Group],
    expected: Sequence[Sequence[str]],
    called: str,
) -> defaultdict[Any, Any]:
    """The saved state by parameters, and whatever others keep there by their own keys.

    Args:
        state: as saved, by the numbers of the parameters.
        saved_groups: the saved groups.
        new: the groups as they will be.
        expected: for each group the names of the states of its parameters.
        called: the name of the optimizer's class.

    Raises:
        ValueError: if it does not fit.
    """
    params: dict[Any, torch.Tensor] = {}
    for g, (saved, group) in enumerate(zip(saved_groups, new, strict=True)):
        for k, p in zip(saved["params"], group["params"], strict=True):
            if params.setdefault(k, p) is not p:
                raise ValueError(f"'params' of group {g} in the state has {k!r} twice, for different parameters.")
    entries: defaultdict[Any, Any] = defaultdict(dict)
    for g, (saved, names) in enumerate(zip(saved_groups, expected, strict=True)):
        for k, leaf in zip(saved["params"], group_leaves(new, g), strict=True):
            entries[leaf.param] = _entries_of(leaf, state.get(k), names, called)
    every_name = set().union(*expected)
    for k, value in state.items():
        if k in params:
            continue
        if isinstance(k, int) and isinstance(value, Mapping) and not every_name.isdisjoint(value):
            raise ValueError(f"the state has entries for parameter {k}, but no group has a parameter of that number.")
        entries[k] = value
    return defaultdict(dict, {k: v for k, v in entries.items() if not isinstance(k, torch.Tensor) or v})


def _entries_of(leaf: Leaf, saved: Any, expected: Sequence[str], called: str) -> dict[str, Any]:
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
                    f"of another optimizer than {called} with these settings."
                )
    device = leaf.param.device

    def here(value: Any) -> Any:
        return value if not isinstance(value, torch.Tensor) or value.device == device else value.to(device)

    kept = {*expected, "step", "skipped", "master"}
    return {name: value if name in kept else here(value) for name, value in entries.items()}


def _group_from(g: int, saved: Mapping[str, Any], present: Group, recipe: Recipe, called: str) -> Group:
    """A group as it will be when a saved one is loaded.

    Raises:
        ValueError: if it is of another optimizer, or a schedule cannot be read.
    """
    missing = [name for name in _rule_names(recipe, present) if name not in saved]
    if missing:
        raise ValueError(f"the state is of another optimizer than {called}: its group {g} has no {', '.join(missing)}.")
    decoupled = saved.get("decoupled_weight_decay", present["decoupled_weight_decay"])
    if _decouples(called) and decoupled != present["decoupled_weight_decay"]:
        raise ValueError(
            f"group {g} of the state has decoupled_weight_decay={decoupled!r}, as Adam does, this "
            f"{called} {present['decoupled_weight_decay']!r}: its weights would decay differently. "
            "Set decoupled_weight_decay in the groups of the state, or build the optimizer with the state's value."
        )
    group = {**present, **{k: v for k, v in saved.items() if k not in _SAVED_ALONG}}
    schedules = schedules_of(present)
    saved_schedules = saved.get(SCHEDULES)
    if saved_schedules is not None:
        part = f"{SCHEDULES!r} of group {g} in the state"
        schedules = states.checked(part, _schedules_from, saved_schedules, present, schedules)
        wrong = [name for name, value in schedules.items() if not follows(value)]
        if wrong:
            raise ValueError(f"{part} must be schedules, but that of {wrong[0]!r} is {schedules[wrong[0]]!r}.")
    group.pop(SCHEDULES, None)
    if schedules:
        group[SCHEDULES] = Followed({n: v for n, v in schedules.items() if n in recipe.names})
    return group


def _rule_names(recipe: Recipe, present: Group) -> list[str]:
    """The numbers among the rule's own hyperparameters, which every state of this optimizer has."""
    others = {*OPTIONS, *OWN} - {"lr"}
    return [name for name in recipe.names if name not in others and not isinstance(present[name], bool)]


def _schedules_from(saved: Mapping[str, Any], present: Group, schedules: Mapping[str, Any]) -> dict[str, Any]:
    """The schedules that were saved of a group; a function of the user's is the one that is there now."""
    return {
        name: as_schedules(groups.from_plain(name, value, present.get(name), schedules.get(name)))
        for name, value in saved.items()
    }


def _is_new(called: str, entries: Mapping[str, Any]) -> bool:
    """Whether a parameter with this state has not been updated yet."""
    return not entries or ("step" in entries and states.count(called, "step", entries["step"]) == 0)


def _without_new(entries: Any, names: set[str]) -> Any:
    """What to save of the state of a parameter: if it has not been updated yet, only what others keep there."""
    if not isinstance(entries, dict) or "step" not in entries or states.number("a parameter", "step", entries["step"]):
        return entries
    return {name: value for name, value in entries.items() if name not in names}


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
