"""Optimizers for PyTorch: `torch.optim.Optimizer` outside, fastlr's own inside."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from .. import checkpoints, groups
from ..kernels.staging import Rule, Staged
from ..optimizer import Optimizer as Native
from ..optimizer import StepOptions
from ..schedules import Schedule
from ..step_info import Layout, StepInfo
from . import tensors
from .engines import Engine, Leaf, as_arguments, holds_tensors

__all__ = ["Optimizer", "counterpart"]

# Arguments of torch.optim that choose between its implementations: taken, kept in the groups, without effect here.
_IMPLEMENTATIONS = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
# In place of 0, what clipping makes of an infinite norm: gradients are divided, and as float32 this leaves 0 or NaN.
_LEAST = 1e-100
# Options whose part PyTorch or this module plays.
_ELSEWHERE = {"loss_scale", "ema_out", "shadow_out", "zero_grads", "lr_scale", "grad_dtype", "groups", "backend"}
# What a saved group holds beside what a group does.
_SAVED_ALONG = ("params", "schedules", "skipped_steps", "clock")
_OFFERED = [name for name in StepOptions.__annotations__ if name not in _ELSEWHERE | {"capturable"}]


class Optimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """Any rule as a `torch.optim.Optimizer`; `fastlr.torch.AdamW` and the others are this class with a rule.

    Parameters and gradients stay where they are, and one pass updates all of them; only the state is in flat memory,
    of which `opt.state[p]` has views. Everything that works on an optimizer of PyTorch works on this one: groups,
    `add_param_group`, closures, hooks, learning-rate schedulers, `GradScaler`, `copy.deepcopy` and pickle, and
    `state_dict` goes over to the counterpart in `torch.optim` and back. A parameter that has moved or was exchanged, a
    gradient in another place, a hyperparameter set in a group: the next step sees it. A parameter whose gradient is
    None is not updated. On a GPU the step counts in `opt.state` are brought up to date when the state is saved.

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
            model, such as the statistics of batch norm, are no parameters.
        ema_out: an iterable of tensors to keep that average in, one for each parameter, such as
            `target.parameters()`. It goes on from what stands in them.
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
                f"rule must be made by fastlr.rule, got {rule!r}. Optimizers have classes: fastlr.torch.Adam."
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
        self._ema_out = None if ema_out is None else list(ema_out)
        self._engines: list[Engine] | None = None
        self._known: list[list[torch.Tensor]] = []  # the parameters of each group that the engines are made for
        self._loaded: Mapping[str, Any] | None = None
        self._skipped = 0
        self._clock = 0
        self.info: StepInfo | None = None
        starts = {n: getattr(probe, n) for n in vars(probe).keys() & inspect.signature(make).parameters.keys()}
        super().__init__(params, {**implementations, **starts, **self._normal(settings, probe)})
        self._check_ema_out()

    def _normal(self, given: Mapping[str, Any], probe: Native) -> dict[str, Any]:
        """Hyperparameters as groups hold them: as the native optimizer has them, tensors as they were given."""
        return {n: given[n] if n in given and holds_tensors(given[n]) else getattr(probe, n) for n in self._names}

    # Parameters and groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in `torch.optim`; with `ema_out=` the group brings "ema_out" along.

        Raises:
            TypeError: if a parameter or a hyperparameter is of the wrong kind.
            ValueError: if one is out of range, or a parameter is in a group already.
        """
        more = list(param_group.pop("ema_out", ())) if isinstance(param_group, dict) else []
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for leaf in self._leaves_of(len(self.param_groups) - 1):
                tensors.check_parameter(leaf.called, leaf.param, self._halves)
            group.update(self._normal(group, self._probe(group)))
            if group["capturable"] and not all(p.is_cuda for p in group["params"]):
                raise ValueError("capturable=True is for parameters on a GPU; these are on the CPU.")
            if self._ema_out is not None and self._engines is not None:
                self._check_ema_out([*self._ema_out, *more])
        except BaseException:
            self.param_groups.pop()
            raise
        if self._ema_out is not None:
            self._ema_out += more

    def _probe(self, group: Mapping[str, Any]) -> Native:
        """A native optimizer of nothing with the settings of a group: checks them, and tells which states they need."""
        hyper = {n: tensors.number(n, group[n]) for n in self._names if n in group}
        return self._make(np.zeros(1, np.float32), **{**self._settings, "alloc": None}, **as_arguments(hyper))

    def _leaves_of(self, g: int) -> list[Leaf]:
        group = self.param_groups[g]
        first = sum(len(before["params"]) for before in self.param_groups[:g])
        names = group.get("param_names") or [str(first + k) for k in range(len(group["params"]))]
        return [Leaf(p, name, g) for p, name in zip(group["params"], names, strict=True)]

    def _leaves(self) -> list[Leaf]:
        """All parameters, each once."""
        every = itertools.chain.from_iterable(map(self._leaves_of, range(len(self.param_groups))))
        return list({id(leaf.param): leaf for leaf in reversed(list(every))}.values())[::-1]

    def _check_ema_out(self, given: Sequence[torch.Tensor] | None = None) -> None:
        given = self._ema_out if given is None else given
        if given is None:
            return
        leaves = self._leaves()
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

    # Engines

    def _current(self) -> list[Engine]:
        """The engines, made anew if parameters or groups are others than before."""
        here = [group["params"] for group in self.param_groups]
        same = list(map(len, here)) == list(map(len, self._known)) and all(
            all(map(operator.is_, now, before)) for now, before in zip(here, self._known, strict=True)
        )
        return self._engines if self._engines is not None and same else self._build()

    def _build(self) -> list[Engine]:
        """New engines, which go on from the state as it is; on an error everything is as it was."""
        self._save_counts()
        leaves = self._leaves()
        self._check_ema_out()
        averages: dict[int, torch.Tensor] = {}
        if self._ema_out is not None:
            averages = {id(leaf.param): e for leaf, e in zip(leaves, self._ema_out, strict=True)}
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
        if any(group["capturable"] for group in self.param_groups):
            settings["capturable"] = True
        engines, state, steps = [], dict(self.state), self._steps_made()
        for members in places.values():
            own = [averages[id(leaf.param)] for leaf in members] if averages else None
            engine = self._engine(self._make, members, self.param_groups, names, settings, own)
            state.update(engine.adopt(self.state, self._loaded is not None, steps))
            if len(places) > 1 or engine.parts > 1:
                _check_sums(engine.native.rule)
            engines.append(engine)
        here = {id(leaf.param) for leaf in leaves}
        self.state.clear()
        self.state.update({p: entries for p, entries in state.items() if id(p) in here})
        self._engines, self._outside = engines, outside
        self._known = [list(group["params"]) for group in self.param_groups]
        return engines

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
        return max(self._clock, self._most_updates())

    def _most_updates(self) -> int:
        """The updates of the parameter that has had the most, by the state."""
        return max((int(x["step"]) for x in self.state.values() if isinstance(x, dict) and "step" in x), default=0)

    def _save_counts(self) -> None:
        """Put into the state what engines count beside it."""
        for engine in self._engines or ():
            for param, skipped in zip(engine.params, engine.skipped(), strict=True):
                if skipped and param in self.state:
                    self.state[param]["skipped"] = skipped

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
            with torch.enable_grad():
                loss = closure()
        engines = self._current()
        if not all(engine.find() for engine in engines):  # a parameter is elsewhere
            engines = self._build()
            for engine in engines:
                engine.find()
        try:
            self._update(engines)
        finally:
            for engine in engines:  # gradients are not kept alive
                engine.found = ()
        return loss

    def _update(self, engines: Sequence[Engine]) -> None:
        """Make the step with the gradients found; `info` tells of it."""
        for engine in engines:
            engine.take_settings(self.param_groups)
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
            self._skipped += 1
            self.info = self._report(norm, np.nan, False)
        else:
            infos: list[StepInfo | None] = []
            averages = "ema_decay" in self._names  # they follow all parameters at each step
            if averages or any(engine.has_gradients for engine in engines):
                infos = [engine.run(scale / coefficient) for engine in engines]
            alone = infos[0] if infos and not self._outside else None
            self.info = alone or self._report(norm, coefficient, True)

    def _coefficient(self, norm: float) -> float:
        """What to multiply all gradients by to clip them."""
        if self._settings.get("scope", "all") != "all":
            raise ValueError(
                f"scope={self._settings['scope']!r} needs all parameters to be of one dtype on one device. Use one "
                "optimizer for each, or scope='all'."
            )
        steps = self._steps_made()
        limits = {_at(tensors.number("clip_norm", group["clip_norm"]), steps) for group in self.param_groups}
        if len(limits) != 1:
            raise ValueError(
                "groups with different clip_norm need all parameters to be of one dtype on one device. Give all "
                "groups the same, or use one optimizer for each."
            )
        (limit,) = limits
        if limit is None:
            return 1.0
        return max(min(1.0, limit / (norm + 1e-6)), _LEAST)

    def _report(self, norm: float | None, coefficient: float, finite: bool) -> StepInfo:
        """What is told of a step that the native optimizers did not tell of: of all parameters together."""
        steps = self._steps_made()
        rates: list[Any] = [None]
        if "lr" in self._names:
            rates = [_at(tensors.number("lr", g["lr"]), max(0, steps - finite)) for g in self.param_groups]
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

    # Saving and copying

    def state_dict(self) -> dict[str, Any]:
        """The state in the form of `torch.optim`, which the counterpart there loads.

        A hyperparameter that follows a fastlr schedule has its present value in the group, where PyTorch looks for it;
        the schedule is saved beside it. The tensors are those of the optimizer, not copies, as in PyTorch.
        """
        self._save_counts()
        out = super().state_dict()
        if not _starts_with_state(type(self).__name__):  # a first update is still to come, as if there were no state
            out["state"] = {k: v for k, v in out["state"].items() if not _is_new(v)}
        steps = self._steps_made()
        for g, group in enumerate(out["param_groups"]):
            schedules = {n: v for n, v in group.items() if n in self._names and _follows(v)}
            for name, value in schedules.items():
                group[name] = _at(value, steps)
            if g == 0 and self._skipped:
                group["skipped_steps"] = self._skipped
            if g == 0 and steps != self._most_updates():
                group["clock"] = steps
            if schedules:
                group["schedules"] = {name: groups.plain(value) for name, value in schedules.items()}
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, of this optimizer or of its counterpart in `torch.optim`.

        Hyperparameters come from the state, as in PyTorch; those that PyTorch does not know stay as they are, and so
        does a fastlr schedule that a state from PyTorch knows nothing about.

        Raises:
            ValueError: if it is of other parameters or of another optimizer; then nothing is changed.
        """

        def hold(_: Any, final: dict[str, Any]) -> None:  # the last hook: what all others have made of the state
            self._check_state(final)
            self._loaded = final

        handle = self.register_load_state_dict_pre_hook(hold)
        try:
            super().load_state_dict(dict(state_dict))
            if not any(p.device.type == "meta" for group in self.param_groups for p in group["params"]):
                self._build()
        finally:
            handle.remove()
            self._loaded = None

    def _group_from(self, saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
        """A group as it will be when a saved one is loaded."""
        group = {**present, **{k: v for k, v in saved.items() if k not in _SAVED_ALONG}}
        schedules = saved.get("schedules")
        if schedules is not None:
            group.update(checkpoints.as_given(schedules, present))
        else:
            group.update({n: v for n, v in present.items() if n in self._names and _follows(v)})
        return group

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Check a state against this optimizer, whole.

        Raises:
            ValueError: if it does not fit.
        """
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
            raise ValueError("this is not the state of an optimizer of PyTorch: it has no 'state' and 'param_groups'.")
        counts = [[len(g["params"]) for g in groups] for groups in (state["param_groups"], self.param_groups)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"the state has groups of {counts[0]} parameters, this optimizer of {counts[1]}: it has a different "
                "number of parameter groups, or one that doesn't match the size of optimizer's group."
            )
        for g, (saved, present) in enumerate(zip(state["param_groups"], self.param_groups, strict=True)):
            missing = [n for n in self._own_names if n not in saved]
            if missing:
                raise ValueError(
                    f"the state is of another optimizer than {type(self).__name__}: its group {g} has no "
                    f"{', '.join(missing)}."
                )
            probe = self._probe(self._group_from(saved, present))
            expected = Engine.state_names(probe)
            for index, leaf in zip(saved["params"], self._leaves_of(g), strict=True):
                entries = state["state"].get(index) or {}
                first = "step" not in entries and not any(entries.get(n) is not None for n in expected)
                if _is_new(entries) or (first and set(entries) <= set(expected)):
                    continue
                for name in expected:
                    value = entries.get(name)
                    if not isinstance(value, torch.Tensor):
                        raise ValueError(
                            f"the state of {leaf.called} has no {name!r}, only {', '.join(map(str, entries))}. It is "
                            f"of another optimizer than {type(self).__name__} with these settings."
                        )
                    if value.shape != leaf.param.shape:
                        raise ValueError(
                            f"{name!r} of {leaf.called} has shape {tuple(value.shape)} in the state, the parameter "
                            f"{tuple(leaf.param.shape)}."
                        )

    @property
    def _own_names(self) -> list[str]:
        """The numbers among the rule's own hyperparameters, which every state of this optimizer has."""
        others = (*StepOptions.__annotations__, "ema_decay")
        return [n for n in self._names if n not in others and not isinstance(self.param_groups[0][n], bool)]

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along; engines are made anew."""
        self._save_counts()
        kept = ("_make", "_names", "_settings", "_ema_out", "_skipped")
        own = {name: self.__dict__.get(name) for name in kept}
        return {**super().__getstate__(), **own, "_clock": self._steps_made()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state: from a copy, a pickle, or `load_state_dict`."""
        saved = self.__dict__.get("_loaded")
        if saved is not None:
            # PyTorch has cast the state to the parameters' dtype and device; masters and products keep theirs.
            indices = [k for group in saved["param_groups"] for k in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for k, p in zip(indices, params, strict=True):
                if k in saved["state"]:
                    state["state"][p] = dict(saved["state"][k])
            new = [
                self._group_from(group, present)
                for group, present in zip(saved["param_groups"], self.param_groups, strict=True)
            ]
            self._skipped = int(saved["param_groups"][0].get("skipped_steps", 0))
            self._clock = int(saved["param_groups"][0].get("clock", 0))
            state["param_groups"] = [
                {**group, "params": present["params"]} for group, present in zip(new, self.param_groups, strict=True)
            ]
        super().__setstate__(state)
        self._engines = None
        for name, start in (("info", None), ("_loaded", None), ("_known", []), ("_clock", 0)):
            self.__dict__.setdefault(name, start)


@functools.cache
def _never_compiled() -> Callable[..., Any]:
    """The step as `torch.compile` leaves it alone: traced, addresses would become part of a graph.

    Made late: `torch.compiler.disable` imports the compiler, which PyTorch does when the first optimizer is built.
    """
    return torch.compiler.disable(Optimizer._step)


def _follows(value: Any) -> bool:
    """Whether a hyperparameter follows a schedule, or a part of it does."""
    return isinstance(value, Schedule) or (isinstance(value, tuple | list) and any(map(_follows, value)))


def _at(value: Any, step: int) -> Any:
    """A hyperparameter at a step."""
    if isinstance(value, tuple | list):
        return tuple(_at(one, step) for one in value)
    return float(value(step)) if isinstance(value, Schedule) else value


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


def _is_new(entries: Mapping[str, Any]) -> bool:
    """Whether a parameter with this state has not been updated yet."""
    return not entries or ("step" in entries and int(entries["step"]) == 0)


@functools.cache
def _starts_with_state(name: str) -> bool:
    """Whether PyTorch's optimizer of this name makes its state when it is built, and not at the first update."""
    theirs = getattr(torch.optim, name, None)
    return theirs is not None and len(theirs([torch.zeros(1)]).state) > 0


def counterpart(native: type[Native]) -> type[Optimizer]:
    """The class for PyTorch of a native optimizer, with the arguments of the one in `torch.optim` of the same name.

    Args:
        native: such as `fastlr.AdamW`.
    """
    name = native.__name__
    signature = _signature(native, getattr(torch.optim, name, None))

    def construct(self: Optimizer, params: Any, *args: Any, **settings: Any) -> None:
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
        {"__init__": construct, "__doc__": f"{described}\n    {source}\n    ", "__module__": __package__},
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
