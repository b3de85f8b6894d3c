"""Optimizers for PyTorch: `torch.optim.Optimizer` outside, fastlr's own inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from threading import get_ident
from typing import Any, ClassVar

import numpy as np
import torch

from .. import checks
from ..arrays.columns import EMA, SHADOW
from ..exclusive import Exclusive, Users, exclusive, take_over
from ..hyperparameters import follows
from ..kernels.atomic import commit
from ..kernels.staging import Rule
from ..optimizer import Optimizer as Native
from ..options import OPTIONS
from ..step import scheduled
from ..step.info import StepInfo
from . import averages, saving, stepping, tensors
from .averages import Training
from .building import Built, History, State, build, check_ema_out
from .engines import hyper_names
from .following import GroupValues
from .recipes import Recipe, all_leaves, group_leaves
from .trials import Trial

__all__ = ["IMPLEMENTATIONS", "OFFERED", "Optimizer"]

# Arguments of torch.optim that choose between its implementations: taken, kept in the groups, without effect here.
IMPLEMENTATIONS = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
# Options that PyTorch or this module takes care of.
_ELSEWHERE = {name for name, option in OPTIONS.items() if not option.torch}
# The options of the step that optimizers for PyTorch take.
OFFERED = [name for name in OPTIONS if name not in _ELSEWHERE | {"capturable"}]


class Optimizer(Exclusive, torch.optim.Optimizer):  # type: ignore[misc]
    """Any rule as a `torch.optim.Optimizer`; `fastlr.torch.AdamW` and the others are this class with a rule.

    Parameters and gradients stay where they are, and one pass updates all of them; only the state is in flat memory, of
    which `opt.state[p]` has views. Everything that works on an optimizer of PyTorch works on this one: groups,
    `add_param_group`, closures, hooks, learning-rate schedulers, `GradScaler`, `copy.deepcopy` and pickle, and
    `state_dict` can be exchanged with the counterpart in `torch.optim`. The next step notices a parameter that has
    moved or was replaced, a gradient in another place, a state that was set, cleared or replaced, and a hyperparameter
    set in a group. What others keep in `opt.state` stays. A parameter whose gradient is None is not updated. On a GPU
    the step counts in `opt.state` are brought up to date when the state is saved.

    A group holds a number for each hyperparameter. For one that follows a schedule it is the number for the next step,
    and the schedule itself is in `group["schedules"]`. If somebody sets the number, it replaces the schedule, with a
    warning; if a scheduler of PyTorch changes it, the next step raises.

    A step tells autograd what it writes, so that a backward pass that needs the old values fails instead of being
    wrong. Several dtypes and devices in one optimizer are fine; clipping and skipping treat all of them together.

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

    _counterpart: ClassVar[str | None] = None  # the name of the counterpart in torch.optim
    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf instead of writing the gradients
    _is_complete = False  # until then schedules are not evaluated: they may use what does not exist yet

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

    def _set_up(
        self,
        params: Any,
        make: Callable[..., Native],
        arguments: Mapping[str, Any],
        recipe: Callable[..., Recipe] = Recipe,
    ) -> None:
        """Check everything but the parameters' memory, and make the groups.

        Args:
            params: as PyTorch takes them.
            make: makes the native optimizer from arrays and settings.
            arguments: the others that the caller passed.
            recipe: makes the recipe.
        """
        settings = dict(arguments)
        implementations = {n: settings.pop(n, default) for n, default in IMPLEMENTATIONS.items()}
        ema_out = settings.pop("ema_out", None)
        if implementations["differentiable"]:
            raise ValueError("differentiable=True is not supported: autograd cannot follow a step.")
        unknown = _ELSEWHERE & settings.keys()
        if unknown:
            raise TypeError(f"{unknown.pop()} is not supported for PyTorch's parameters; see fastlr.torch.Optimizer.")
        numbers = {name: tensors.number(name, value) for name, value in settings.items()}
        probe = make(np.zeros(1, np.float32), **{**numbers, "alloc": None})
        names = hyper_names(probe)
        if ema_out is not None:
            _check_ema(names)
        self._recipe = recipe(
            make, names, probe.groups.table, {n: v for n, v in settings.items() if n not in {*names, "ema"}}
        )
        self._start(History(), None)
        starts = {n: getattr(probe, n) for n in vars(probe).keys() & inspect.signature(make).parameters.keys()}
        super().__init__(params, {**implementations, **starts, **self._recipe.normal(settings, probe)})
        self._is_complete = True
        if ema_out is not None:
            self.ema_out = ema_out

    def _start(self, history: History, ema_out: list[tensors.UserTensor] | None) -> None:
        """What an optimizer has before its engines are made: new, or a copy.

        Args:
            history: what has happened so far.
            ema_out: the tensors that hold averages, or None.
        """
        self._users: Users = {}
        self._built = Built(self._recipe, history, ema_out)
        self._training: Training | None = None
        self.info: StepInfo | None = None

    # Parameters and groups

    @exclusive
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in `torch.optim`; with `ema_out=` the group brings "ema_out" along.

        Raises:
            TypeError: if a parameter or a hyperparameter is of the wrong kind.
            ValueError: if one is out of range, a schedule in the next step, or a parameter is in a group already.
        """
        new_averages: list[Any] = []
        if isinstance(param_group, dict):
            param_group = dict(param_group)  # the caller's own stays as it is
            new_averages = list(param_group.pop("ema_out", ()))
        trial = object.__new__(torch.optim.Optimizer)  # PyTorch's own part, on a list of its own
        trial.defaults, trial.param_groups = self.defaults, list(self.param_groups)
        torch.optim.Optimizer.add_param_group(trial, param_group)
        groups, group, g = trial.param_groups, trial.param_groups[-1], len(trial.param_groups) - 1
        recipe, built = self._recipe, self._built
        for leaf in group_leaves(groups, g):
            tensors.check_parameter(leaf.called, leaf.param, recipe.halves)
        values = GroupValues(g, group, recipe.names)
        step = built.steps(self.state) if any(map(follows, values.hyper.values())) else 0
        if self._is_complete:
            for name, value in values.hyper.items():
                scheduled.examine(name, recipe.table[name], value, step)
        values.hyper = recipe.normal(values.hyper, recipe.probe(values.hyper))
        if group["capturable"] and not all(p.is_cuda for p in group["params"]):
            raise ValueError("capturable=True is for parameters on a GPU; these are on the CPU.")
        writes: list[averages.Write] = [(self.param_groups, slice(g, g), [group])]
        if built.ema_out is not None:
            check_ema_out([average.tensor for average in built.ema_out] + new_averages, all_leaves(groups))
            ema_out = [*built.ema_out, *map(tensors.UserTensor, new_averages)]
            writes.append((self.__dict__, "_built", replace(built, ema_out=ema_out)))
        group.update(values.hyper)
        values.settle(group)
        values.show(group, functools.partial(built.evaluated, step=step))
        commit(writes)

    @property
    def ema_out(self) -> list[torch.Tensor] | None:
        """The tensors in which the average is kept, or None; set it to use others, such as a new target network's.

        Raises:
            TypeError: if something else than tensors is set.
            ValueError: if they do not fit, or the optimizer was built without `ema=`.
        """
        ema_out = self._built.ema_out
        return None if ema_out is None else [average.tensor for average in ema_out]

    @ema_out.setter
    @exclusive
    def ema_out(self, ema_out: Iterable[torch.Tensor]) -> None:
        _check_ema(self._recipe.names)
        ema_out = list(ema_out)
        check_ema_out(ema_out, all_leaves(self.param_groups))
        fresh = [tensors.UserTensor(average) for average in ema_out]
        if self._built.params is None:
            self._built = replace(self._built, ema_out=fresh)
            return
        state = {p: {n: v for n, v in e.items() if n != EMA.name} for p, e in self.state.items() if isinstance(e, dict)}
        self._install(self._rebuilt(state, fresh))

    # Engines

    def _current(self) -> Built:
        """The engines, rebuilt if parameters or groups have changed."""
        return self._built if self._built.fits(self.param_groups) else self._rebuild()

    def _ready(self) -> Built:
        """The engines, rebuilt if parameters, groups or the state have changed, with the gradients found."""
        built = self._current()
        if not built.is_in(self.state):
            built = self._rebuild()
        if not built.find():  # a tensor is elsewhere
            built = self._rebuild()
            built.find()
        return built

    def _rebuild(self) -> Built:
        """Go on with new engines from the state as it is; on an error everything is as it was."""
        self._built.save_counts(self.state)
        built = self._rebuilt(self.state, self._built.ema_out)
        self._install(built)
        return built

    def _rebuilt(self, state: State, ema_out: list[tensors.UserTensor] | None) -> Built:
        """New engines, which are not in use yet.

        Args:
            state: what they go on from.
            ema_out: the tensors that hold averages, or None.
        """
        before = self._built
        history = before.so_far(self.state)
        shown = before.shown()
        return build(self._recipe, self.param_groups, state, shown=shown, ema_out=ema_out, history=history)

    def _install(self, built: Built, state: dict[Any, Any] | None = None, **attributes: Any) -> None:
        """Go on with new engines, all at once.

        Args:
            built: the engines.
            state: another state to go on with; None: the present one.
            attributes: others to set with them.
        """
        gone: list[torch.Tensor] = []
        if state is None:
            params = {id(p) for engine in built.engines for p in engine.params}
            gone = [p for engine in self._built.engines for p in engine.params if id(p) not in params]
        else:
            attributes["state"] = state
        writes = built.entering(self.state if state is None else state)
        writes += [(to, ..., value) for engine in built.engines for to, value in engine.writes]
        for engine in built.engines:
            engine.writes = []
        attributes["_built"] = built
        commit([*((self.__dict__, name, value) for name, value in attributes.items()), *writes])
        for param in gone:
            self.state.pop(param, None)
        built.held.remember(self.state)
        built.settle(self.param_groups, self.state)

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
            for engine in self._built.engines:  # do not keep gradients alive
                engine.gradients = ()
            self._users.clear()
        return loss

    def _update(self, built: Built) -> None:
        """Make the step with the gradients found; `info` tells of it."""
        groups, state, engines = self.param_groups, self.state, built.engines
        built.take_settings(groups, state)
        scale, finite = 1.0, True
        if "found_inf" in self.__dict__:  # set by GradScaler for the time of the step
            finite = not float(self.found_inf)
            grad_scale = self.__dict__.get("grad_scale")
            scale = 1.0 if grad_scale is None else float(grad_scale)
        if finite and len(engines) == 1 and not built.outside and engines[0].has_gradients:  # the usual case, fast
            (engine,) = engines
            (part,) = engine.prepare(scale)
            try:
                self.info = engine.run(part)
            finally:  # a step that was interrupted may have been made
                engine.done()
            built.show_numbers(groups, state)
            return
        coefficient, norm = 1.0, None
        if built.outside and finite and self._recipe.looks_at_all(groups):
            norm = stepping.gradient_norm(engines) / scale
            finite = bool(np.isfinite(norm)) or not self._recipe.settings.get("skip_nonfinite")
            coefficient = stepping.clip_coefficient(built, state, norm)
        report = functools.partial(stepping.report, built, groups, state, norm=norm)
        if not finite:
            skipped = report(coefficient=np.nan, finite=False, counts=False)
            commit([(self.__dict__, "_built", built.with_skip()), (self.__dict__, "info", skipped)])
            return
        parts: list[tuple[Any, Any]] = []
        keeps_averages = "ema_decay" in self._recipe.names  # they follow all parameters at each step
        if keeps_averages or any(engine.has_gradients for engine in engines):  # then schedules go on for all
            parts = [(engine, part) for engine in engines for part in engine.prepare(scale / coefficient)]
        told = None
        if not parts or built.outside:
            told = report(coefficient=coefficient, finite=True, counts=bool(parts))
        info = stepping.run(parts)
        self.info = told or info
        built.show_numbers(groups, state)

    # What stands beside the parameters

    def _by_parameter(self, name: str) -> Any:
        """A column of all engines: a list in the order of the parameters, or a dict by names if they have some."""
        views = {
            id(p): view
            for engine in self._current().engines
            for p, view in zip(engine.params, engine.views(name), strict=True)
        }
        leaves = all_leaves(self.param_groups)
        if "param_names" in self.param_groups[0]:
            return {leaf.name: views[id(leaf.param)] for leaf in leaves}
        return [views[id(leaf.param)] for leaf in leaves]

    @property
    def ema(self) -> Any:
        """The moving average of each parameter: a list, or a dict if the parameters were given with names."""
        if "ema_decay" not in self._recipe.names:
            raise OPTIONS["ema"].missing()
        return self._by_parameter(EMA.name)

    @property
    def shadow(self) -> Any:
        """The low-precision copy of each parameter, as of the last step; as `ema`."""
        if self._recipe.settings.get("shadow") is None:
            raise OPTIONS["shadow"].missing()
        return self._by_parameter(SHADOW.name)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite."""
        return self._built.skipped_steps

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
        built = self._current()
        built.take_settings(self.param_groups, self.state)
        engines = [engine for engine in built.engines if engine.stepper.scheduled.plateaus] or built.engines[:1]
        before = [engine.state.observed.copy() for engine in engines]
        try:
            for engine in engines:
                engine.native.observe(metric)
        except BaseException:  # a user's function may raise: then no plateau has observed anything
            for engine, observed in zip(engines, before, strict=True):
                engine.forget(observed)
            raise
        built.show_numbers(self.param_groups, self.state)

    def _trial(self) -> Trial:
        """For `fastlr.find_lr`.

        Raises:
            ValueError: if there is no learning rate, or that of the first group is 0, to which others have no ratio.
        """
        if "lr" not in self._recipe.names:
            raise ValueError(f"{type(self).__name__} has no lr to look for.")
        step = self._built.steps(self.state)
        rates = [self._built.present(group, "lr", step) for group in self.param_groups]
        before = {"_built": self._current(), "info": self.info}
        return Trial(self, rates, self._built, lambda: self.__dict__.update(before))

    def _average_letter(self) -> str:
        letter = averages.state_letter(self._recipe.make)
        if letter is None:
            raise AttributeError(f"{type(self).__name__} is not schedule-free: it keeps no average to evaluate.")
        return letter

    @property
    def averaged(self) -> Any:
        """The averaged parameters of a schedule-free optimizer, to evaluate and to keep; in the form of `ema`."""
        return self._by_parameter(self._average_letter())

    @property
    def eval(self) -> Callable[[], None]:
        """For a schedule-free optimizer: `opt.eval()` puts the averages into the parameters, until `train()`."""
        self._average_letter()
        return self._put_averages

    @property
    def train(self) -> Callable[[], None]:
        """For a schedule-free optimizer: `opt.train()` puts the training weights back, bit for bit."""
        self._average_letter()
        return self._put_weights

    @exclusive
    def _put_averages(self) -> None:
        if self._training is None:
            training, writes = averages.put_averages(self._current())
            commit([(self.__dict__, "_training", training), *writes])

    @exclusive
    def _put_weights(self) -> None:
        if self._training is not None:
            writes = averages.put_weights(self._training, self._built, self.param_groups, self.state)
            commit([*writes, (self.__dict__, "_training", None)])

    # Saving and copying

    def state_dict(self) -> dict[str, Any]:
        """The state in the form of `torch.optim`, which the counterpart there loads.

        A hyperparameter that follows a fastlr schedule is there with its number for the next step, where PyTorch looks
        for it, and the schedule beside it. The tensors are those of the optimizer, not copies, as in PyTorch. Hooks
        are called before and after, and may use the optimizer.
        """
        for hook in tuple(self._optimizer_state_dict_pre_hooks.values()):
            hook(self)
        out = self._whole_state()
        for hook in tuple(self._optimizer_state_dict_post_hooks.values()):
            changed = hook(self, out)
            out = out if changed is None else changed
        return out

    @exclusive
    def _whole_state(self) -> dict[str, Any]:
        """What `state_dict` returns, without hooks."""
        counterpart, averaging = self._counterpart, self._training is not None
        return saving.to_save(self._built, self.param_groups, self.state, counterpart=counterpart, averaging=averaging)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, of this optimizer or of its counterpart in `torch.optim`.

        Hyperparameters come from the state, as in PyTorch; those that PyTorch does not know stay as they are, and so
        does a fastlr schedule that a state from PyTorch knows nothing about. Hooks are called before and after, and
        may use the optimizer.

        Raises:
            ValueError: if it is of other parameters or of another optimizer; then nothing is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"the state of an optimizer is a dict, got a {type(state_dict).__name__}.")
        final: Any = dict(state_dict)
        for hook in tuple(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = hook(self, final)
            final = final if changed is None else changed
        self._take_state(final)
        for hook in tuple(self._optimizer_load_state_dict_post_hooks.values()):
            hook(self)

    @exclusive
    def _take_state(self, saved: Any) -> None:
        """Take over a state as the hooks have left it, whole or not at all."""
        loaded = saving.read(saved, self._built, self.param_groups, type(self).__name__)
        self._install(loaded.built, loaded.state, param_groups=loaded.param_groups, _training=loaded.training)

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along; engines are made anew."""
        self._built.save_counts(self.state)
        history = self._built.so_far(self.state)
        kept = {"_recipe": self._recipe, "_history": history, "_ema_out": self.ema_out, "_training": self._training}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state from a copy or a pickle."""
        state = dict(state)
        history, ema_out, training = (state.pop(name, None) for name in ("_history", "_ema_out", "_training"))
        super().__setstate__(state)
        self._start(history or History(), None if ema_out is None else list(map(tensors.UserTensor, ema_out)))
        self._training, self._is_complete = training, True


@functools.cache
def _never_compiled() -> Callable[..., Any]:
    """The step as `torch.compile` leaves it alone: traced, addresses would become part of a graph.

    Made late: `torch.compiler.disable` imports the compiler, which PyTorch does when the first optimizer is built.
    """
    return torch.compiler.disable(Optimizer._step)


def _check_ema(names: Iterable[str]) -> None:
    needs = OPTIONS["ema_out"].needs
    assert needs is not None
    if "ema_decay" not in names:
        raise ValueError(needs[1])
