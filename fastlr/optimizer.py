"""The optimizer behind every rule: parameters in, one compiled step, state out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from typing import Any, ClassVar, TypedDict

import numpy as np

from . import checkpoints, checks
from .arrays.buffers import FlatBuffer, place_called
from .arrays.columns import CALLED, Columns, Parameters
from .arrays.places import HOST, Alloc, Place
from .arrays.trees import is_container
from .exclusive import enter, exclusive, take_over
from .gpu.driver import stream_handle
from .gpu.gradients import DeviceGradients
from .gpu.kernels import StepKernels
from .gpu.plans import DevicePlan
from .gpu.rows import DeviceRows
from .groups import Groups, everywhere, hyperparameter, matching, somewhere
from .kernels import arrays, cpu, reference, rules
from .kernels.atomic import commit
from .kernels.cpu import Kernel
from .kernels.formats import FORMATS
from .kernels.layout import CLOCK
from .kernels.primitives import SCOPES
from .kernels.staging import After, Before, Rule, RuleError, Staged
from .kernels.tiles import Storage, compiles
from .loss_scale import LossScale
from .schedules.base import Schedule
from .step import threads as _threads
from .step.gradients import Gradients, Located
from .step.info import Layout, StepInfo
from .step.plans import Column, Entries, HostPlan, Plan
from .step.rows import Counts, Rows
from .step.scheduled import Formula, Rates, Remembered, Scheduled, ensure, evaluator

__all__ = ["Optimizer", "StepOptions", "warmup"]

_BACKENDS: dict[str, Callable[[Staged, Storage], Kernel]] = {"numba": cpu.build, "numpy": reference.build}
_BEFORE, _AFTER = Before(rules.before), After(rules.after)
_MAX_PLANS = 256  # leaves that take part in a step can change from step to step; their plans are kept
# Names of the step's own that a rule cannot give to a hyperparameter; the others it owns if it names them.
_TAKEN = {*_BEFORE.hyperparameters, *_BEFORE.states, *_AFTER.hyperparameters, *_AFTER.states, "statistics", "frozen"}
_TAKEN -= {"lr", "weight_decay", "decoupled_weight_decay", "maximize"}
# What exists only if the optimizer was built with it.
_ON_REQUEST = {"ema": "ema=0.999", "shadow": 'shadow="bfloat16"', "lr_scale": "lr_scale=tree"}
_ACCUMULATION = Rule(rules.accumulation)


@functools.cache
def _kernel(staged: Staged, storage: Storage, backend: str) -> Kernel:
    return _BACKENDS[backend if compiles() else "numpy"](staged, storage)


@functools.cache
def _device_kernels(staged: Staged, storage: Storage, device: Any, formulas: tuple[Formula, ...]) -> StepKernels:
    return StepKernels(device, staged, storage, formulas=formulas)


def _kinds(optimizer: type) -> dict[str, Any]:
    """A value of the right kind for each hyperparameter of a class: its default, a number where there is none."""
    kinds: dict[str, Any] = {}
    for cls in reversed(optimizer.__mro__):
        if "__init__" in vars(cls) and cls is not object:
            kinds.update({n: p.default for n, p in inspect.signature(vars(cls)["__init__"]).parameters.items()})
    return {n: default if isinstance(default, bool | tuple) else 0.0 for n, default in kinds.items()}


class _Filled:
    """An array on a GPU whose parts can be set to a number, for `commit`."""

    def __init__(self, place: Place, array: Any) -> None:
        self._place, self._array = place, array

    def __setitem__(self, part: slice, value: float) -> None:
        self._place.fill(self._array[part], value)


class StepOptions(TypedDict, total=False):
    """What every optimizer takes; see `Optimizer`."""

    weight_decay: Any
    decoupled_weight_decay: bool
    maximize: bool
    clip_norm: Any
    scope: str
    clip_value: Any
    skip_nonfinite: bool
    loss_scale: LossScale | None
    ema: Any
    ema_out: Any
    shadow: str | None
    shadow_out: Any
    zero_grads: bool
    lr_scale: Any
    statistics: bool
    grad_dtype: str | None
    groups: Mapping[str, Mapping[str, Any]] | None
    threads: int | None
    alloc: Alloc | None
    capturable: bool
    backend: str


class Optimizer:
    """Updates parameters in place by a rule.

    The classes in `fastlr.optimizers` are this class with a rule and its defaults. With a rule of your own:
    `fastlr.Optimizer(params, my_rule, lr=1e-3)`; its states start at zero and its hyperparameters are keywords.

    One step is, in this order: unscale the gradient, test it for NaN and Inf, clip it by norm, by value, maximize
    (`g = -g`), weight decay, the rule, moving average, low-precision copy, clear the gradient. What is off does not
    exist in the machine code. All leaves, groups and models are updated in one pass; clipping and the test need one
    more, which only reads the gradient. The result is the same bit for bit for any number of threads, for separate
    arrays or a flat buffer, and with `backend="numpy"`, if the rule is exact (`opt.rule.exact`).

    Args:
        params: what to update, in place: a tree of arrays (nested dicts, lists, tuples, named tuples, dataclasses and
            None), a `FlatBuffer`, or one array. The arrays are C-contiguous, writable, not overlapping, all float32 or
            all float64; NumPy arrays, or arrays on one GPU: of PyTorch, CuPy, Numba or anything with a CUDA array
            interface or DLPack.
        rule: a rule made by `fastlr.rule`.
        lr: learning rate, >= 0; not for a rule that takes none, which has no `opt.lr`, and None as `info.lr`. As every
            numeric hyperparameter a schedule (`fastlr.schedules`, or a function of the
            step) or, if the parameters are a population, an array `(population,)`.
        weight_decay: >= 0. Default: that of a rule that names it itself, else 0.
        decoupled_weight_decay: False: L2, `g + weight_decay * p` goes into the rule. True: the rule starts from
            `p - lr * weight_decay * p`.
        maximize: ascend instead of descend: `g = -g` before the decay.
        clip_norm: > 0. The gradient is multiplied by `min(clip_norm / (norm + 1e-6), 1)`, as PyTorch's
            `clip_grad_norm_` does. Default None: not clipped.
        scope: what the norm for `clip_norm` is taken of: "all" (default; in a population of each model), "group" (the
            leaves that match the same patterns) or "leaf".
        clip_value: > 0. Each element of the gradient is limited to this magnitude, after `clip_norm`. Default None.
        skip_nonfinite: a step whose gradient has NaN or Inf anywhere changes nothing: parameters, states, averages,
            copies and counters stay bit for bit; in a population only for that model. `info.skipped` says so.
        loss_scale: a `LossScale`, whose scale the gradients are divided by; implies `skip_nonfinite`. For parameters on
            a GPU its state is there, see `LossScale.on_device`.
        ema: keep a moving average of the parameters, `e = e + (1 - ema) * (p - e)` after each step, in `opt.ema`; in
            [0, 1], at 1 it stays as it is. It starts as a copy of the parameters, and follows all of them, those too
            that are frozen or have no gradient; with `only=` those of the part. A step that is skipped leaves it alone.
            Its decay is the hyperparameter `ema_decay` from then on.
        ema_out: arrays of your own in the parameters' structure to keep the average in (a target network). They go on
            from what stands in them.
        shadow: "bfloat16" or "float16": keep a copy of the parameters in that format in `opt.shadow`.
        shadow_out: arrays of your own in the parameters' structure to keep that copy in (the weights of the forward
            pass, of which the parameters are the masters): of that format, or of uint16 for its bits.
        zero_grads: `step()` sets `opt.grads` to zero in the same pass. Gradients handed to `step` are never written.
        lr_scale: a factor on the learning rate for each element, >= 0 and finite, in the parameters' structure and
            read where it is; an element whose factor is 0 stays as it is, its decay included.
        statistics: take all norms in `info["layer.w"]`. Default False: none but those that the step needs anyway.
        grad_dtype: what gradients of dtype uint16 hold: "bfloat16" or "float16". Arrays of float16, of ml_dtypes'
            bfloat16 and PyTorch tensors of either are understood as they are.
        groups: pattern to hyperparameters, such as `{"*.bias": {"weight_decay": 0.0}, "embed": {"frozen": True}}`.
            A path is that leaf; anything else is an `fnmatch` pattern on paths, case-sensitive. All that match apply in
            order, the later wins.
        threads: how many threads a step may use, >= 1; default `fastlr.get_num_threads()`. More than 256 count as 256,
            and no more are used than there are tiles of up to 16,384 elements.
        alloc: `alloc(nbytes)` returns the memory for every buffer the optimizer makes: writable, and none of it in use
            for something else, such as another buffer.
        capturable: for parameters on a GPU: keep everything that changes from step to step there, so that a step can
            be captured into a CUDA graph and replayed. `info` and `opt.steps` then tell of the step made last, and
            setting a hyperparameter takes effect at the next replay.
        backend: "numba", or "numpy" for the reference: slow, compiles nothing, same bits.
        hyperparameters: those of the rule.

    Raises:
        TypeError: if a parameter or a hyperparameter is of the wrong kind.
        ValueError: if one is outside its range or does not fit.

    Example:
        >>> import numpy as np, fastlr
        >>> @fastlr.rule
        ... def signed(p, g, m, *, lr, beta=0.9):
        ...     m = beta * m + (1 - beta) * g
        ...     return p - lr * (1.0 if m > 0 else -1.0), m
        >>> w = np.ones(3)
        >>> opt = fastlr.Optimizer(w, signed, lr=0.5)
        >>> opt.step(np.array([1.0, -1.0, 2.0])).step
        1
        >>> w
        array([0.5, 1.5, 0.5])
    """

    _rule: ClassVar[Rule]
    _states: ClassVar[Mapping[str, str]] = {}  # the rule's letter -> the name in the API
    _spelling: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    lr: float | np.ndarray
    weight_decay: float | np.ndarray
    decoupled_weight_decay: bool
    maximize: bool
    clip_norm: float | np.ndarray | None
    clip_value: float | np.ndarray | None
    frozen: bool | np.ndarray

    def __init__(
        self,
        params: Any,
        rule: Rule | None = None,
        *,
        lr: Any = None,
        weight_decay: Any = None,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        clip_norm: Any = None,
        scope: str = "all",
        clip_value: Any = None,
        skip_nonfinite: bool = False,
        loss_scale: LossScale | None = None,
        ema: Any = None,
        ema_out: Any = None,
        shadow: str | None = None,
        shadow_out: Any = None,
        zero_grads: bool = False,
        lr_scale: Any = None,
        statistics: bool = False,
        grad_dtype: str | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        threads: int | None = None,
        alloc: Alloc | None = None,
        capturable: bool = False,
        backend: str = "numba",
        **hyperparameters: Any,
    ) -> None:
        rule = rule if rule is not None else getattr(self, "_rule", None)
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be made by fastlr.rule, got {checks.shown(rule)}.")
        checks.state_names([*(self._states.get(s, s) for s in rule.states), *rule.scalars])
        checks.rule_names(rule.hyperparameters, _TAKEN)
        rule.check_constants()
        if lr is not None and not rule.takes_lr:
            raise TypeError(
                f"rule {rule.name!r} has no lr: no keyword-only argument of that name. Build the optimizer without lr, "
                "or let the rule take it and use it."
            )
        if lr_scale is not None and not rule.takes_lr:
            raise ValueError(f"lr_scale is a factor on lr, which rule {rule.name!r} does not have.")
        if threads is not None:
            threads = checks.count("threads", threads)
        if alloc is not None and not callable(alloc):
            raise TypeError(f"alloc must be a function of the number of bytes, got {checks.shown(alloc)}.")
        checks.choices("backend", [backend], _BACKENDS)
        checks.choices("scope", [scope], SCOPES)
        for name, kind in (("shadow", shadow), ("grad_dtype", grad_dtype)):
            if kind is not None:
                checks.choices(name, [kind], FORMATS)
        if loss_scale is not None and not isinstance(loss_scale, LossScale):
            raise TypeError(f"loss_scale must be a fastlr.LossScale, got {checks.shown(loss_scale)}.")
        switches = {"skip_nonfinite": skip_nonfinite, "zero_grads": zero_grads, "statistics": statistics}
        switches["capturable"] = capturable
        for name, given in switches.items():
            checks.hyperparameter(name, given, False, None)
        self._put(_source=rule, _backend=backend, _threads=threads, _alloc=alloc, _users={}, _unsettled=None)
        self._put(_scope=scope, _tests=skip_nonfinite or loss_scale is not None, _statistics=statistics)
        self._put(loss_scale=loss_scale, _shadow=shadow, _clears=zero_grads, _grad_bits=grad_dtype)
        self._put(_params=Parameters(params), _masks={}, _capturable=capturable)
        if self._on_host and capturable:
            raise ValueError("capturable=True is for parameters on a GPU; these are on the CPU.")
        if not self._on_host and backend != "numba":
            raise ValueError(
                f"backend={backend!r} steps on the CPU, but the parameters are on {self._params.place.label}."
            )

        spelled = {n: k for k, names in self._spelling.items() for n in names}
        known: dict[str, Any] = {spelled.get(n, n): rule.defaults.get(n) for n in rule.hyperparameters}
        own_decay = rule.defaults.get("weight_decay", 0.0)
        if rule.takes_lr:
            known["lr"] = lr
        known.update(weight_decay=own_decay if weight_decay is None else weight_decay)
        known.update(decoupled_weight_decay=decoupled_weight_decay, maximize=maximize)
        checks.hyperparameters("hyperparameter", hyperparameters, [*known, "clip_norm", "clip_value"])
        known.update(hyperparameters)
        optional = {*hyperparameters, *_BEFORE.hyperparameters} - {"lr"}
        missing = [n for n, v in known.items() if v is None and n not in optional]
        if missing:
            raise TypeError(f"rule {rule.name!r} needs a value for {', '.join(missing)}.")
        known.update(clip_norm=clip_norm, clip_value=clip_value)
        kinds = {**rule.defaults, **_kinds(type(self))}
        values = {n: hyperparameter(n, v, kinds.get(n, v), self._params.population) for n, v in known.items()}
        if ema is not None:
            values["ema_decay"] = hyperparameter("ema", ema, 0.0, self._params.population)
        elif ema_out is not None:
            raise ValueError("ema_out is where the average is kept; give its decay as well, such as ema=0.999.")
        if shadow_out is not None and shadow is None:
            raise ValueError(
                'shadow_out is where the copy is kept; give its format as well, such as shadow="bfloat16".'
            )
        self._put(_hyper=Groups(values, groups, self._params.paths, self._params.population, self._spelling))
        flags = {n for n, v in values.items() if isinstance(v, bool)}
        tested = {spelled.get(n, n) for n in rule.switches | _BEFORE.switches}
        self._put(_structural={*flags, *tested, *checks.OPTIONAL, "ema_decay"}, _epoch=_threads.epoch)
        self._put(_unscaled=loss_scale is not None, _grad_scale=1.0, _partition=None)
        self._put(_accumulated=None, _adding={}, _observed=Remembered())
        own = {"ema": ema_out, "lr_scale": lr_scale, "shadow": shadow_out}
        external = {name: tree for name, tree in own.items() if tree is not None}
        self._put(_per_element=lr_scale is not None)
        self._allocate(self._stage(self._unscaled).states, external)
        starts = [self._initial_scalar(name) for name in rule.scalars]
        counts = Counts.zero(len(self._params.leaves), self._params.models, starts)
        self._put(**self._rows_for(counts))
        if loss_scale is not None:
            self._attach(loss_scale, self._params)
        self._hyper.users = self._users

    @property
    def _on_host(self) -> bool:
        return self._params.place is HOST

    # Set-up

    def _put(self, **attributes: Any) -> None:
        """Set attributes of the object itself, all at once; plain assignment is for hyperparameters."""
        self.__dict__.update(attributes)

    def _initial(self, letter: str) -> float:
        """The value at which a state starts; for subclasses."""
        return 0.0

    def _initial_scalar(self, name: str) -> float:
        """The value at which a state of a group starts; for subclasses."""
        return float(self._source.defaults[name])

    def _allocate(self, letters: Sequence[str], external: Mapping[str, Any]) -> None:
        """The columns beside parameters and gradients, and what finds the gradients."""
        parameters = self._params
        columns = Columns(parameters, letters, self._initial, external, self._shadow, self._alloc)
        written = [*parameters.leaves, *columns.written]
        place, dtype = parameters.place, parameters.dtype
        make = Gradients if self._on_host else DeviceGradients
        given = [(checks.called(p), leaf, True) for p, leaf in zip(parameters.paths, parameters.leaves, strict=True)]
        for name in external:
            leaves = zip(parameters.paths, columns.arrays[name], strict=True)
            given += [(checks.called(p, CALLED[name]), leaf, name not in columns.inputs) for p, leaf in leaves]
        gradients = make(
            parameters.paths,
            parameters.shapes,
            dtype,
            written,
            place,
            self._alloc,
            self._grad_bits,
            given,
            quick=self._backend == "numba",
        )
        addressed = [
            Column.of(arrays, place, 2 if name == "shadow" else dtype.itemsize)
            for name, arrays in (("", parameters.leaves), *columns.arrays.items())
        ]
        self._put(_columns=columns, _gradients=gradients, _addressed=addressed)

    def _check_settings(self, uniforms: list[dict[str, Any]]) -> None:
        """What one hyperparameter demands of another, in each configuration; for subclasses."""

    def _attach(self, loss_scale: LossScale, parameters: Parameters) -> None:
        """Make a loss scale this optimizer's own."""
        place: Any = parameters.place
        loss_scale.attach(self._catch_up, None if place is HOST else place, parameters.models)

    def _stage(self, unscaled: bool) -> Staged:
        """Stage the rule for the present settings: what is the same in all groups is static.

        Args:
            unscaled: whether gradients are divided by a scale.
        """
        uniforms = self._hyper.uniforms()
        self._check_settings(uniforms)
        if not self._source.takes_lr and "weight_decay" not in self._source.hyperparameters:
            for u in uniforms:
                if u["decoupled_weight_decay"] and somewhere(u["weight_decay"]):
                    raise ValueError(
                        f"decoupled weight decay is in proportion to lr, which rule {self._source.name!r} does not "
                        "have. Use decoupled_weight_decay=False, or let the rule name weight_decay itself."
                    )
        switches = self._source.switches | _BEFORE.switches
        norm_clipped, value_clipped = (
            any(isinstance(u[name], Schedule) or np.any(np.isfinite(u[name])) for u in uniforms)
            for name in ("clip_norm", "clip_value")
        )
        decays = [u["ema_decay"] for u in uniforms if "ema_decay" in u]
        static: dict[str, Any] = {
            "scope": self._scope,
            "unscaled": unscaled,
            "tested": self._tests,
            "norm_clipped": norm_clipped,
            "value_clipped": value_clipped,
            "per_element": self._per_element,
            "averaged": "ema_decay" in uniforms[0],
            "may_pause": any(isinstance(d, Schedule) or np.any(d == 1.0) for d in decays),
            "statistics": self._statistics,
            **({} if self._source.takes_lr else {"lr": 0.0}),
        }
        on = set()
        for name in uniforms[0]:
            values = [u[name] for u in uniforms]
            if name == "frozen":
                continue
            if isinstance(values[0], bool) and all(v is values[0] for v in values):
                static[name] = values[0]
            elif name in switches and not any(map(somewhere, values)):
                static[name] = 0.0
            elif name in switches and all(map(everywhere, values)):
                on.add(name)
        try:
            staged = self._source.stage(static, before=_BEFORE, after=_AFTER, on=frozenset(on))
        except RuleError as error:  # when the rule was made, its flags had one value at a time
            flags = [n for n, v in uniforms[0].items() if isinstance(v, bool) and n != "frozen" and n not in static]
            raise ValueError(f"{', '.join(flags)} must be the same in all groups: {error}") from error
        self._check_common(staged, uniforms)
        return staged

    def _check_common(self, staged: Staged, uniforms: list[dict[str, Any]]) -> None:
        """Check that what is one for all parameters follows from settings that are the same in all groups."""
        labels = {n: f"{k}[{i}]" for k, several in self._spelling.items() for i, n in enumerate(several)}
        for name in staged.common:
            first = uniforms[0][name]
            for other in (u[name] for u in uniforms):
                if other is not first and not np.array_equal(other, first):
                    one = ", ".join(n for n, scope in zip(staged.scalars, staged.shared, strict=True) if scope == "all")
                    raise ValueError(
                        f"{labels.get(name, name)} must be the same in all groups, got {checks.shown(first)} and "
                        f"{checks.shown(other)}: it enters {one} of rule {staged.name!r}, which is one for all "
                        "parameters."
                    )

    # Rows, tables and plans

    def _make_rows(self, counts: Counts, partition: np.ndarray | None, staged: Staged | None = None) -> Rows:
        staged = staged or self._stage(self._unscaled)
        models = counts.t.shape[1]
        frozen = np.array([np.broadcast_to(u["frozen"], models) for u in self._hyper.uniforms()], bool)
        configuration = self._hyper.configuration
        agreed = counts.agreed(staged.shared, configuration)
        place: Any = self._params.place
        if self._on_host:
            return Rows(configuration, frozen, agreed, partition)
        return DeviceRows(configuration, frozen, agreed, partition, place, staged, self.loss_scale, self._capturable)

    def _rows_for(
        self, counts: Counts, partition: np.ndarray | None = None, staged: Staged | None = None
    ) -> dict[str, Any]:
        """Rows for given counts.

        Args:
            counts: of each leaf and model.
            partition: as for `Rows`; None: as it is.
            staged: the rule; None: staged for the present settings.

        Returns:
            The attributes to set; plans made before no longer hold.
        """
        old = self.__dict__.get("_rows")
        if old is not None and old.captured:
            warnings.warn(
                "the tables of this optimizer are made anew (other flags, frozen leaves, or leaves of different "
                "counts): graphs that were captured before go on with the old ones. Capture again.",
                RuntimeWarning,
                stacklevel=4,
            )
        partition = self._partition if partition is None else partition
        rows = self._make_rows(counts, partition, staged)
        made = {"_rows": rows, "_partition": partition, "_staged": None}
        return {**made, "_plans": {}, "_recent": {}, "_kernels": {}}

    def _take_counts(self, counts: Counts) -> None:
        """Go on from other counts; where graphs have been captured, in the memory that they know."""
        rows = self._rows
        if rows.captured and self._stage(self._unscaled) is self._staged:
            new = self._make_rows(counts, self._partition, self._staged)
            if rows.replace(new):
                uniforms = self._hyper.uniforms()
                scheduled = self._follow(uniforms, self._staged, rows)
                self._fill_table(uniforms, self._staged, rows, self._table, scheduled)
                self._put(**self._following(scheduled))
                self._hyper.listener = self._push_settings
                rows.upload()
                return
        self._put(**self._rows_for(counts))

    def _refresh(self, unscaled: bool | None = None, partition: np.ndarray | None = None) -> None:
        """Take over what has changed: hyperparameters, frozen leaves, how rows are shared, a fork.

        Everything is made first and put in place at once, so that an error or an interrupt changes nothing.

        Args:
            unscaled: whether gradients are divided by a scale from now on; None: as it is.
            partition: how leaves are told apart from now on, see `Rows`; None: as it is.
        """
        hyper = self._hyper
        hyper.listener = self._push_settings if self._capturable else None
        unscaled = self._unscaled if unscaled is None else unscaled
        staged = self._staged
        if staged is None or unscaled != self._unscaled or not hyper.changed.isdisjoint(self._structural):
            staged = self._stage(unscaled)
        self._check_states(staged)
        if any(scope == "leaf" for _, scope in staged.sums):
            partition = self._params.one_by_one
        elif partition is None:
            partition = self._partition
        uniforms = hyper.uniforms()
        self._check_common(staged, uniforms)
        kept = staged is self._staged and partition is self._partition and self._epoch == _threads.epoch
        if kept and "frozen" not in hyper.changed:
            scheduled = self._follow(uniforms, staged, self._rows)
            if self._on_host or scheduled.formulas() == self._scheduled.formulas():
                following = self._following(scheduled)
                self._fill_table(uniforms, staged, self._rows, self._table, scheduled)
                self._put(**following)
                hyper.changed.clear()
                return
        new = self._rows_for(self._rows.counts(), partition, staged)
        rows = new["_rows"]
        scheduled = self._follow(uniforms, staged, rows)
        formulas = () if self._on_host else scheduled.formulas()
        table = np.zeros((len(rows), max(1, len(staged.uniforms)) + sum(f.count for f in formulas)))
        self._fill_table(uniforms, staged, rows, table, scheduled)
        h = np.zeros((len(rows), staged.slots), self._params.dtype)
        rows.install(table, h)
        formulas = () if rows.decided_by_host else formulas
        more = {"_formulas": formulas, "_finds_rate": "rate" in staged.scalars, "_unscaled": unscaled}
        made = {"_staged": staged, "_table": table, "_h": h, "_epoch": _threads.epoch}
        self._put(**{**new, **self._following(scheduled), **more, **made})
        hyper.changed.clear()

    def _following(self, scheduled: Scheduled) -> dict[str, Any]:
        """The attributes to set for hyperparameters that follow schedules."""
        rates = self._hyper.lr
        return {"_scheduled": scheduled, "_follows": scheduled.follows(rates), "_lrs": scheduled.parts(rates)}

    def _check_states(self, staged: Staged) -> None:
        if staged.states != self._columns.letters:
            names = ", ".join(sorted(self._states.get(s, s) for s in set(staged.states) ^ set(self._columns.letters)))
            raise ValueError(
                f"the hyperparameters as they are now need other states than those that exist ({names}). "
                "Choose at the start whether a state is there: build a new optimizer."
            )

    def _examine(self, label: str, name: str, value: Any) -> None:
        """Refuse schedules that were set but do not fit: in what they demand, or in their value for the next step."""
        if name in self._structural:
            self._check_states(self._stage(self._unscaled))
        rows = self._rows
        if not rows.host_knows:
            return  # the host does not know which step is next, and would have to wait for the GPU
        step = rows.counters.item(-1, CLOCK)
        for k, part in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(part, Schedule):
                one, _ = evaluator(part, self._params.population)
                found = one(float(step), part._carried_out().numbers)
                ensure(f"{label}[{k}]" if isinstance(value, tuple) else label, name, part, found, step)

    def _fill_table(
        self, uniforms: list[dict[str, Any]], staged: Staged, rows: Rows, table: np.ndarray, scheduled: Scheduled
    ) -> None:
        """The hyperparameters of each row, in the order in which `decide` takes them."""
        for c, values in enumerate(uniforms):
            which = np.flatnonzero(rows.configuration == c)
            for column, name in enumerate(staged.uniforms):
                value = self._grad_scale if name == "grad_scale" else values[name]
                if not isinstance(value, Schedule):
                    table[which, column] = value[rows.model[which]] if isinstance(value, np.ndarray) else value
        if scheduled.entries and not self._on_host:
            table[:, len(staged.uniforms) :] = scheduled.numbers(table)
        rows.settings_known = False

    def _follow(self, uniforms: list[dict[str, Any]], staged: Staged, rows: Rows) -> Scheduled:
        """The hyperparameters that follow a schedule, for these rows."""
        population = self._params.population
        return Scheduled(uniforms, self._spelling, rows, staged.uniforms, self._observed, population)

    def _rates_found(self) -> Mapping[str, Any]:
        """The learning rate of each group, where the rule finds it itself: its state `rate`."""
        rows = self._rows
        rows.download()
        rates = rows.scalars[rows.index, self._staged.scalars.index("rate")]  # of each leaf and model
        places = {path: k for k, path in enumerate(self._params.paths)}
        found = {
            group.pattern: rates[places[group.paths[0]]] for group in (self._hyper.defaults, *self._hyper.values())
        }
        return {p: r.copy() if self._params.population is not None else float(r[0]) for p, r in found.items()}

    def _current_rates(self) -> Mapping[str, Any]:
        rates: Mapping[str, Any] = self._lrs
        return rates

    @exclusive
    def observe(self, metric: Any) -> None:
        """Tell every `schedules.Plateau` among the hyperparameters how the training goes.

        Args:
            metric: such as the loss on held-out data; NaN counts as not better.

        Raises:
            TypeError: if it is no number.
            ValueError: if no hyperparameter follows a `Plateau`.
        """
        number = checks.real("metric", metric)
        if self._staged is None or self._hyper.changed:
            self._refresh()
        self._hyper.changed.add("lr")  # after an interrupt the next step takes over what has been observed
        self._scheduled.observe(number, self.steps)
        self._refresh()
        if self._capturable:
            self._rows.upload()

    def _scale_of(self, grad_scale: Any) -> Any:
        """What the gradients of a step are to be divided by; 1.0 if by nothing."""
        scale: Any = 1.0 if grad_scale is None else checks.scale("grad_scale", grad_scale, self._params.population)
        if self.loss_scale is not None and self._on_host:  # a GPU has the loss scale where it divides by it
            with np.errstate(over="ignore"):  # infinity is refused
                product = scale * self.loss_scale.scale
            scale = checks.scale("grad_scale times the loss scale", product, self._params.population)
        return scale

    def _enter_scale(self, scale: Any) -> None:
        """Let the next step divide the gradients by a scale."""
        rows, before = self._rows, self._grad_scale
        if "grad_scale" in self._staged.uniforms:
            if scale is not before and not np.array_equal(scale, before):
                rows.settings_known = False
            column = self._staged.uniforms.index("grad_scale")
            self._table[:, column] = scale[rows.model] if isinstance(scale, np.ndarray) else scale
        if scale is not before:
            self._put(_grad_scale=scale)

    def _mask(self, only: Any) -> tuple[bool, ...]:
        """Which leaves a partial step is about."""
        if self.loss_scale is not None:
            raise ValueError("a loss scale follows whole steps; step without only=, or build without loss_scale=.")
        key = checks.patterns("only", only)
        if key not in self._masks:
            matched = {path for pattern in key for path in matching("only", pattern, self._params.paths)}
            mask = tuple(path in matched for path in self._params.paths)
            self._masks[key] = self._params.everyone if all(mask) else mask
        found: tuple[bool, ...] = self._masks[key]
        return found

    def _plan_for(
        self, active: tuple[bool, ...], seen: tuple[bool, ...], flat: bool, kind: str, unscaled: bool
    ) -> Plan:
        """The plan for leaves that have gradients, in one array or in an array for each leaf.

        Args:
            active: the leaves that have gradients and are part of the step.
            seen: the leaves that are part of the step.
            flat: whether the gradients are one array.
            kind: the format of the gradients.
            unscaled: whether they are divided by a scale.
        """
        everyone = self._params.everyone  # stands for itself: a tuple of thousands would be hashed at each step
        key = (None if active is everyone else active, None if seen is everyone else seen, flat, kind)
        plan: Plan | None = self._plans.get(key) if unscaled == self._unscaled else None
        if plan is None:
            partition = self._rows.split(active, seen) if active is not everyone else None
            if partition is not None or unscaled != self._unscaled:
                self._refresh(unscaled, partition)
            if len(self._plans) >= _MAX_PLANS:
                self._put(_plans={}, _recent={})
            plan = self._plans[key] = self._new_plan(active, seen, flat, kind)
        return plan

    def _new_plan(self, active: tuple[bool, ...], seen: tuple[bool, ...], flat: bool, kind: str) -> Plan:
        """A plan, arguments as for `_plan_for`."""
        rows: Rows = self._rows
        params, *others = self._addressed
        columns = [params, Column(None, 2 if kind in FORMATS else params.itemsize), *others]
        taking_part = np.array(active, bool)
        updated = taking_part[:, None] & ~rows.frozen[rows.index]
        averaged = np.array(seen, bool)[:, None] & ~updated & bool(self._staged.average)
        sizes = [size // self._params.models for size in self._params.sizes]
        merge = flat and self._params.is_flat and not self._columns.external and not self._staged.quantities
        entries = Entries(sizes, columns, rows.index, updated, averaged, merge)
        advance, partial = rows.advance(taking_part, np.array(seen, bool)), seen is not self._params.everyone
        plan: Plan
        if isinstance(rows, DeviceRows):
            place: Any = self._params.place
            plan = DevicePlan(entries, rows, self._staged, advance, kind, partial, place, self._capturable)
        else:
            plan = HostPlan(entries, rows, self._staged, advance, kind, partial)
        if seen is not self._params.everyone:  # what a partial step does not see is not left out, it comes later
            leaf = np.searchsorted(self._params.starts, [first for first, _ in plan.left_out], side="right") - 1
            plan.left_out = [span for span, k in zip(plan.left_out, leaf, strict=True) if seen[k]]
        plan.layout = self._layout(plan)
        return plan

    def _layout(self, plan: Plan) -> Layout | None:
        """How to read what a step of this plan reported."""
        staged: Staged = self._staged
        if plan.entry is None:
            return None
        norms = {name: k for k, name in enumerate(staged.emitted, staged.quantities - len(staged.emitted))}
        norms["grad_norm"] = norms.pop("raw_grad_norm", 0)
        if "grad_norm" not in staged.reports and "raw_grad_norm" not in staged.emitted:
            del norms["grad_norm"]
        return Layout(
            self._params.paths,
            self._params.population,
            plan.entry,
            self._rows.index,
            staged.reports,
            norms,
        )

    def _kernel_for(self, kind: str, clear: bool) -> Any:
        """The kernel for gradients of a format that are cleared or not."""
        if (kind, clear) not in self._kernels:
            storage = Storage(self._params.dtype.name, kind, self._shadow, clear)
            if self._on_host:
                self._kernels[kind, clear] = _kernel(self._staged, storage, self._backend)
            else:
                self._kernels[kind, clear] = _device_kernels(
                    self._staged, storage, self._params.place.device, self._formulas
                )
        return self._kernels[kind, clear]

    @property
    def _kernel(self) -> Kernel:
        """The kernel for gradients of the parameters' dtype."""
        return self._kernel_for(self._params.dtype.name, False)

    def _bind(self, grads: Any, only: Any, unscaled: bool, stream: int | None) -> tuple[Plan, Any]:
        """The plan for a step, with the addresses of the gradients in it, and what must be kept alive meanwhile."""
        everyone = self._params.everyone
        active = seen = everyone if only is None else self._mask(only)
        flat = type(grads) is np.ndarray
        if not flat:
            if type(grads) is Located:
                active, seen = grads.active or everyone, grads.seen or everyone
                plan = self._plan_for(active, seen, False, grads.kind, unscaled)
                plan.locate_gradients(grads.addresses)
                return plan, grads
            if grads is None:
                grads, active = self._own_gradients(active)
            elif isinstance(grads, FlatBuffer):
                if grads.structure.paths != self._params.paths or grads.shapes != tuple(self._params.shapes):
                    raise ValueError("grads is a buffer of other leaves than params. Make it from the same structure.")
                grads = grads.data
            flat = self._params.is_array or not is_container(grads)
        things = [grads] if flat else self._params.structure.leaves(grads)
        if only is not None and not flat:
            things = [thing if there else None for thing, there in zip(things, seen, strict=True)]
        part = None if active is everyone else (active, seen)
        if unscaled == self._unscaled:
            recent: Plan | None = self._recent.get((flat, part))
            if recent is not None and recent.find(things):
                return recent, things
        self._gradients.stream = stream
        self._gradients.check_given()
        if flat:
            addresses, found, kind = self._gradients.flat(grads)
        else:
            addresses, found, kind = self._gradients.leaves(things)
            complete = 0 not in addresses
            active = everyone if complete else tuple(a is not None for a in found)
        plan = self._plan_for(active, seen, flat, kind, unscaled)
        plan.point_gradients(addresses, flat)
        if all(map(operator.is_, found, things)):  # they may be so again in the next step
            plan.expect(self._gradients, found, flat)
            self._recent[flat, part] = plan
        return plan, (things, found)

    def _own_gradients(self, active: tuple[bool, ...]) -> tuple[Any, tuple[bool, ...]]:
        """`opt.grads`, and the leaves that are updated by them."""
        own = self._gradients.own
        if own is None:
            raise RuntimeError(
                "step() without gradients uses opt.grads, which nobody has used yet. "
                "Pass them, step(grads), or write them into opt.grads first."
            )
        if self._accumulated is None:
            return own, active
        there = tuple(a and b for a, b in zip(active, self._accumulated, strict=True))
        return own, self._params.everyone if all(there) else there

    # The public step

    def step(
        self,
        grads: Any = None,
        *,
        grad_scale: Any = None,
        only: str | Sequence[str] | None = None,
        stream: Any = None,
    ) -> StepInfo:
        """Update the parameters in place.

        Args:
            grads: gradients in the parameters' structure, or in one flat array of all of them; of the parameters'
                shapes and dtype, or float16 or bfloat16; only read. They are read where they are if they are
                C-contiguous, else gathered. A leaf that is None is not updated. Without it `opt.grads` is used.
            grad_scale: what to divide the gradients by, > 0: the loss scale, or the number of gradients that were
                added up; one number, or one for each model.
            only: a path or a pattern as in `groups`, or several: update the leaves that match, and leave the others and
                their counters as they are. Steps of all parts are one step of everything, where no sum goes beyond a
                part.
            stream: for parameters on a GPU, the stream to step in: of PyTorch, CuPy or cuda.core, or a handle. Default:
                the current stream of the parameters' library; of arrays of no library the legacy default stream.

        Returns:
            What was done.

        Raises:
            TypeError: if a gradient is no array or has another dtype, or `stream` is no stream.
            ValueError: if the structure or a shape differs, `grad_scale` is not positive and finite, `only` matches
                nothing, or a stream is given for parameters on the CPU.
            RuntimeError: if there are no gradients; if a parameter, or another array that the optimizer was given, has
                other memory, shape or dtype than it had; if another call of this optimizer is under way, in another
                thread or in this one (from a schedule's function, say); or if the stream is being captured and the
                optimizer is not capturable.
            DeviceError: if a kernel cannot be loaded.
        """
        token = [get_ident()]
        if self._users.setdefault(True, token) is not token:
            take_over(self._users, token)
        try:
            return self._run(*self._prepare(grads, grad_scale, only, stream))
        finally:
            self._users.clear()

    def _prepare(self, grads: Any, grad_scale: Any = None, only: Any = None, stream: Any = None) -> tuple[Any, ...]:
        """Find what a step needs, and whatever is wrong, before anything is written; arguments as for `step`.

        Returns:
            What `_run` takes. It holds on to everything that the step reads.
        """
        if self._unsettled is not None:
            self._settle()
        if stream is not None:
            if self._on_host:
                raise ValueError("stream= is for parameters on a GPU; these are on the CPU.")
            stream = stream_handle(stream, self._params.place.device)
        scale, unscaled = 1.0, self._unscaled
        if grad_scale is not None or unscaled:
            scale = self._scale_of(grad_scale)
            unscaled = unscaled or not np.all(scale == 1.0)
        if self._hyper.changed or self._staged is None or self._epoch != _threads.epoch:
            self._refresh()
        part = only is not None or (type(grads) is Located and grads.seen is not None)
        if self._follows and not part:
            self._enter_scheduled(None)
        table, number = self._table, None
        plan, kept = self._bind(grads, only, unscaled, stream)
        if part:
            given = grads.number if type(grads) is Located else None
            number = plan.number(self._rows) if given is None else given
        if self._follows and (part or self._table is not table):
            self._enter_scheduled(number)
        if unscaled:
            self._enter_scale(scale)
        clear = self._clears and grads is None
        kernel = self._kernels.get((plan.kind, clear)) or self._kernel_for(plan.kind, clear)
        done = self._after_own(plan, clear, only) if grads is None else None
        return plan, kernel, kept, number, done, scale, stream

    def _enter_scheduled(self, number: int | None) -> None:
        """Enter the values that scheduled hyperparameters have after a number of steps; None: in the next step."""
        if not self._formulas:
            steps = self._rows.counters.item(-1, CLOCK) if number is None else max(0, number)
            self._scheduled.fill(steps, self._table)

    def _run(
        self, plan: Plan, kernel: Any, kept: Any, number: int | None, done: Any, scale: Any, stream: int | None
    ) -> StepInfo:
        """Make a step that has been prepared."""
        rows: Any = self._rows
        lrs: Any = self._current_rates if self._capturable else self._lrs
        if self._follows and rows.host_knows and not self._capturable:
            lrs = Rates(lrs, rows.counters.item(-1, CLOCK) if number is None else max(0, number))
        if number is not None:
            plan.count_part(rows, number)
        rescales = self.loss_scale is not None and self._on_host
        if done is not None or rescales:
            self._put(_unsettled=(plan, plan.next_generation, done or (), rescales))
        plan.run(kernel, self._threads or _threads.get_num_threads(), stream)
        del kept
        if self._unsettled is not None:
            self._settle()
        if self._finds_rate:
            lrs = self._rates_found() if self._on_host else self._rates_found
        return plan.info(rows, lrs, scale)

    def _settle(self) -> None:
        """After a kernel, do what remains to be done for its step; at the latest when the next call begins."""
        plan, generation, writes, rescales = self._unsettled
        done: list[tuple[Any, Any, Any]] = [(self.__dict__, "_unsettled", None)]
        if plan.has_made(generation):
            done += writes
            if rescales:
                done += self.loss_scale.after(plan.info(self._rows, {}, 1.0).skipped)
        commit(done)

    def _catch_up(self) -> None:
        """Settle what an interrupted call has left, unless one is under way."""
        if self._unsettled is not None:
            with contextlib.suppress(RuntimeError):
                token = enter(self._users)  # noqa: F841
                try:
                    self._settle()
                finally:
                    self._users.clear()

    def _after_own(self, plan: Plan, clear: bool, only: Any) -> list[tuple[Any, Any, Any]]:
        """What to write after a step from `opt.grads`: accumulation starts anew; what the pass has not is cleared."""
        writes: list[tuple[Any, Any, Any]] = []
        if self._accumulated is not None:
            stepped = self._params.everyone if only is None else self._mask(only)
            left = tuple(a and not b for a, b in zip(self._accumulated, stepped, strict=True))
            writes.append((self.__dict__, "_accumulated", left if any(left) else None))
        if clear:
            own = self._gradients.own
            on_host = self._on_host
            writes += [(own if on_host else _Filled(self._params.place, own), slice(*s), 0) for s in plan.left_out]
        return writes

    @exclusive
    def accumulate(self, grads: Any) -> None:
        """Add gradients to `opt.grads`; the first after a step take the place of what stood there.

        Then `step(grad_scale=k)` updates with their mean over `k` calls, or `step()` with their sum. A leaf that was
        None every time is not updated.

        Args:
            grads: as for `step`; several calls may differ in dtype.

        Raises:
            TypeError: if a gradient is no array or has another dtype.
            ValueError: if the structure or a shape differs.
        """
        if grads is None:
            raise TypeError("accumulate needs gradients to add, got None.")
        before = self._accumulated
        first = before is None
        whole = isinstance(grads, np.ndarray | FlatBuffer) or self._params.is_array or not is_container(grads)
        there = self._params.everyone if whole else tuple(g is not None for g in self._params.structure.leaves(grads))
        before = (False,) * len(there) if before is None else before
        fresh = self._gradients.own is None
        try:  # what is wrong with them shows before anything is written
            adding = self._adding_to_own(first)
            prepared = adding._prepare(grads)
        except BaseException:
            if fresh:  # there are no gradients still, as `step()` will say
                commit([(self._gradients.__dict__, "own", None), (self.__dict__, "_adding", {})])
            raise
        plan = prepared[0]
        after = tuple(a or b for a, b in zip(there, before, strict=True))
        self._put(_unsettled=(plan, plan.next_generation, [(self.__dict__, "_accumulated", after)], False))
        for leaf, given, held in zip(self._params.cut(self._gradients.own), there, before, strict=True):
            if not held and given == (not first):  # not written by the first, or added to although it is the first
                self._params.place.fill(leaf, 0)
        adding._run(*prepared)
        self._settle()

    def _adding_to_own(self, first: bool) -> Optimizer:
        """What adds gradients to `opt.grads`, or puts them there."""
        own = self._params.tree(self._gradients.allocate_own())
        if first not in self._adding:
            settings = {"threads": self._threads, "backend": self._backend, "grad_dtype": self._grad_bits}
            settings["capturable"] = self._capturable
            self._adding[first] = Optimizer(own, _ACCUMULATION, first=first, **settings)
        adding: Optimizer = self._adding[first]
        return adding

    @exclusive
    def warmup(self) -> float:
        """Compile what the next step needs, or load it from the cache; the seconds that took."""
        self._refresh()
        kernel = self._kernel_for(self._params.dtype.name, self._clears)
        if isinstance(kernel, StepKernels):
            kernel.prepare(self._rows.decided_by_host)
        quick = arrays.prepare() if self._on_host and self._backend == "numba" else 0.0
        return float(kernel.compile_s) + quick

    # Hyperparameters

    def __getattr__(self, name: str) -> Any:
        """A hyperparameter of the optimizer itself; groups may override it."""
        hyper = self.__dict__.get("_hyper")
        if hyper is not None and name in hyper.names:
            return getattr(hyper.defaults, name)
        if name in _ON_REQUEST:  # from the property of that name
            raise AttributeError(f"there is no {name}; build the optimizer with it, such as {_ON_REQUEST[name]}.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a hyperparameter of the optimizer itself; the next step uses it."""
        if name not in self._hyper.names:
            raise AttributeError(
                f"{type(self).__name__} has no hyperparameter {name!r} to set; "
                f"there are {', '.join(self._hyper.names)}."
            )
        setattr(self.groups.defaults, name, value)

    def _push_settings(self) -> None:
        """Let graphs that have been captured see a hyperparameter that was set."""
        if self._staged is not None:
            self._refresh()
            self._rows.upload()

    @property
    def params(self) -> Any:
        """The parameters, as they were given."""
        return self._params.source

    @property
    def groups(self) -> Groups:
        """The groups by pattern; `opt.groups["head.*"].lr = 1e-4` takes effect at the next step."""
        hyper: Groups = self._hyper
        if hyper.examine is None:  # weak, so that an optimizer is freed as soon as nobody has it
            hyper.examine = weakref.WeakMethod(self._examine)
        return hyper

    @property
    def rule(self) -> Staged:
        """The rule as staged for the present settings; `opt.rule.show()` prints its code."""
        return self._stage(self._unscaled)

    @property
    def steps(self) -> int:
        """Steps made; one that was skipped for everything does not count."""
        steps: int = self._rows.steps
        return steps

    @property
    def skipped_steps(self) -> Any:
        """Steps that were skipped because the gradient was not finite; `(population,)` in a population."""
        most = self._rows.counts().skipped.max(axis=0)
        return most if self._params.population is not None else int(most[0])

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse copies and pickles, which would hold the addresses of somebody else's parameters."""
        raise TypeError(
            "an optimizer belongs to its parameters and cannot be copied or pickled. Build one over the new parameters "
            "and hand it the state: new.load_state_dict(old.state_dict())."
        )

    def __repr__(self) -> str:
        """The class, its own hyperparameters and what it updates."""
        shown = self._hyper.defaults._values.items()
        values = ", ".join(f"{n}={v!r}" for n, v in shown if n != "frozen" and v is not None)
        size = f"{self._params.size} x {self._params.dtype} in {len(self._params.leaves)} leaves"
        return f"<{type(self).__name__}({values}) of {size}, {self.steps} steps>"

    # Gradients and states in the parameters' structure

    @property
    def grads(self) -> Any:
        """Gradients to write into; zero at first, and allocated on first use.

        An array if the parameters are one, else a `FlatBuffer`: `opt.grads["layer.w"]` is a view.
        """
        return self._params.tree(self._gradients.allocate_own())

    @exclusive
    def zero_grad(self) -> None:
        """Set `opt.grads` to zero, if it has been used."""
        own = self._gradients.own
        writes: list[tuple[Any, Any, Any]] = [(self.__dict__, "_accumulated", None)]
        if own is not None and self._on_host:
            writes.append((own, ..., 0))
        elif own is not None:
            self._params.place.fill(own, 0)
        commit(writes)

    @property
    def state(self) -> dict[str, Any]:
        """The states by name, each an array or a `FlatBuffer` in the parameters' structure; views, not copies."""
        return {self._states.get(letter, letter): self._columns.tree(letter) for letter in self._columns.letters}

    @property
    def ema(self) -> Any:
        """The moving average of the parameters, or what was given as `ema_out`.

        Raises:
            AttributeError: if the optimizer was built without `ema=`.
        """
        if "ema" not in self._columns.arrays:
            raise AttributeError
        return self._columns.tree("ema")

    @property
    def shadow(self) -> Any:
        """The copy of the parameters in low precision, as of the last step, or what was given as `shadow_out`.

        Arrays of float16, or of bfloat16 where the package ml_dtypes is installed; without it their bits, as uint16.

        Raises:
            AttributeError: if the optimizer was built without `shadow=`.
        """
        if self._shadow is None:
            raise AttributeError
        return self._columns.shadow()

    @property
    def lr_scale(self) -> Any:
        """The factor on each element's rate, as it was given; the next step reads what stands there then.

        Raises:
            AttributeError: if the optimizer was built without `lr_scale=`.
        """
        if not self._per_element:
            raise AttributeError
        return self._columns.tree("lr_scale")

    # Saving

    @exclusive
    def state_dict(self, *, params: bool = False) -> dict[str, np.ndarray]:
        """Everything the optimizer knows, as copies in a flat dict of arrays.

        Args:
            params: put the parameters in as well, under "params.<path>".

        Returns:
            "<state>.<path>" for each state and leaf ("exp_avg.w"), the average among them ("ema.w"); "step", "clock",
            "skipped" and what the rule keeps of a group, shape `(leaves, models)`; "fastlr", the description in JSON
            as bytes. It works with `np.savez(file, **state)`; for names that NumPy's files cannot hold use `save`.
        """
        return checkpoints.collect(self, params)

    @exclusive
    def load_state_dict(self, state: Mapping[str, np.ndarray], *, hyperparameters: bool = True) -> None:
        """Take over what `state_dict` returned.

        By default everything comes from the state, hyperparameters, schedules and groups included, and what is not in
        it, a function of yours that a hyperparameter followed, is refused. With `hyperparameters=False` the optimizer
        keeps all of its own, functions and schedules alike, and takes the states, counters, the loss scale and what a
        `Plateau` in the same place remembers.

        Args:
            state: from an optimizer of the same rule over parameters of the same paths (in any order), shapes and
                dtype; parameters in it are copied into this optimizer's.
            hyperparameters: True: take those of the state, which must be of the same class: with the hyperparameters
                of an Adam an AdamW would no longer decay. False: keep this optimizer's, of whatever class that state
                is, if it has the same rule.

        Raises:
            TypeError: if it is no dict.
            ValueError: if it is from something else, incomplete or damaged; then nothing is changed.
        """
        checkpoints.apply(self, state, hyperparameters)

    @exclusive
    def save(
        self, path: str | os.PathLike[str], *, params: bool = True, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Write the optimizer to a file; a crash at any moment leaves the old file or the new one, whole.

        A link is followed, and a file that is replaced hands on its mode. Nothing is copied in memory on the way.

        Args:
            path: ends in ".npz" (NumPy reads it) or ".safetensors" (the package safetensors reads it). In its names
                a few characters that such files cannot hold stand as "%" and their code.
            params: write the parameters as well, so that `load` restores the whole run.
            extra: what you want to have back from `load`, such as `{"epoch": 3, "rng": rng.bit_generator.state}`:
                numbers, strings, None, NumPy arrays of numbers, and dicts, lists and tuples of those.

        Raises:
            TypeError: if there is something else in `extra`.
            ValueError: if the ending is another one, or a name is too long for a file.
        """
        checkpoints.save(self, path, params, extra)

    @exclusive
    def load(self, path: str | os.PathLike[str], *, hyperparameters: bool = True) -> dict[str, Any]:
        """Read what `save` wrote; continuing equals never having stopped, bit for bit.

        Args:
            path: of the file.
            hyperparameters: True: take those of the file. False: keep this optimizer's, schedules, functions and groups
                included; see `load_state_dict`.

        Returns:
            What was saved as `extra`; an empty dict if nothing was.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, not fastlr's, or of another optimizer; then nothing is changed.
        """
        return checkpoints.load(self, path, hyperparameters)

    @exclusive
    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of parameters, states, counters and hyperparameters in memory, for `restore`."""
        return checkpoints.snapshot(self)

    @exclusive
    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go back to a snapshot: parameters, states, counters and hyperparameters, functions included, bit for bit."""
        checkpoints.apply(self, snapshot)

    @exclusive
    def to(self, device: str) -> Optimizer:
        """An optimizer that goes on with copies of the parameters somewhere else, with the same bits.

        This one stays as it is. `new.params` has the parameters in the structure of this one's: a `FlatBuffer` if
        they are one, else a tree; on a GPU their leaves are `fastlr.DeviceArray`s, which PyTorch and CuPy take without
        a copy. To go on with parameters that you have moved yourself, build an optimizer over them and hand it
        `state_dict()`.

        Args:
            device: "cpu", or "cuda", "cuda:1", ... for a GPU.

        Raises:
            ValueError: if it is none of these, or gradients are being accumulated.
            DeviceError: if there is no such GPU.
            MemoryError: if it has too little memory.
        """
        if self._accumulated is not None:
            raise ValueError("gradients are being accumulated; step first, then move.")
        place, ours = place_called(device), self._params

        def moved(leaves: Sequence[Any], given: Any, dtype: Any = ours.dtype) -> Any:
            data = place.allocate(ours.size, dtype)
            buffer = FlatBuffer(ours.structure, ours.shapes, data, ours.population)
            for to, leaf in zip(ours.cut(data), leaves, strict=True):
                place.upload(to, ours.place.download(leaf))
            if ours.is_array:
                return data.reshape(ours.shapes[0])
            return buffer if isinstance(given, FlatBuffer) else buffer.unflatten()

        new: Optimizer = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        capturable = self._capturable and place is not HOST
        backend = self._backend if self._on_host and place is HOST else "numba"
        new._put(_users={}, _capturable=capturable, _backend=backend)
        dtypes = {} if self._shadow is None else {"shadow": FORMATS[self._shadow].storage}
        external = {
            CALLED[n]: moved(self._columns.arrays[n], given, dtypes.get(n, ours.dtype))
            for n, given in self._columns.external.items()
        }
        new._put(_alloc=None if place is not HOST else self._alloc)
        if self.loss_scale is not None and place is ours.place:
            new._put(loss_scale=self.loss_scale.copy())
            new._attach(new.loss_scale, ours)
        new.rebuild(moved(ours.leaves, ours.source), **external)
        new._hyper.examine = None  # this one's own is made when it is needed
        return new

    @exclusive
    def rebuild(
        self, params: Any, *, ema_out: Any = None, lr_scale: Any = None, shadow_out: Any = None
    ) -> tuple[str, ...]:
        """Go on with other parameters: added, removed or resized ones.

        Leaves of the same path and shape keep their state and counters, the others start afresh.

        Args:
            params: the new parameters, as for a new optimizer, of the same dtype.
            ema_out: where to keep their average, if the optimizer was given arrays for it.
            lr_scale: their rates per element, if the optimizer was given some.
            shadow_out: where to keep their copy, if the optimizer was given arrays for it.

        Returns:
            The paths that start afresh.

        Raises:
            TypeError: if the dtype differs.
            ValueError: if the parameters do not fit, or a group's pattern matches none of them; then nothing changes.
        """
        new: Optimizer = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._put(_params=Parameters(params), _masks={})
        ours, theirs = self._params, new._params
        if theirs.dtype != ours.dtype or theirs.population != ours.population:
            raise TypeError(
                f"the new parameters are {theirs.dtype} with population={theirs.population}, the old ones {ours.dtype} "
                f"with population={ours.population}. Build a new optimizer."
            )
        hyper = self._hyper.with_values(self._hyper.everything(), new._params.paths)
        new._put(_hyper=hyper, _partition=None, _accumulated=None, _adding={}, _observed=self._observed.copy())
        if new._capturable and new._on_host:
            raise ValueError("this optimizer is capturable, but the new parameters are on the CPU. Build a new one.")
        external = {"ema": ema_out, "lr_scale": lr_scale, "shadow": shadow_out}
        for name in self._columns.external:
            if external[name] is None:
                raise ValueError(f"this optimizer was given {CALLED[name]}; pass it for the new parameters as well.")
        new._allocate(self._columns.letters, {name: external[name] for name in self._columns.external})
        starts = [self._initial_scalar(name) for name in self._source.scalars]
        old, counts = self._rows.counts(), Counts.zero(len(new._params.leaves), new._params.models, starts)
        counts.scalars, counts.steps = counts.scalars.copy(), old.steps
        places = {path: k for k, path in enumerate(self._params.paths)}
        fresh = []
        for k, path in enumerate(new._params.paths):
            j = places.get(path)
            if j is None or self._params.shapes[j] != new._params.shapes[k]:
                fresh.append(path)
                continue
            for mine, theirs in zip(
                (counts.t, counts.clock, counts.skipped, counts.scalars),
                (old.t, old.clock, old.skipped, old.scalars),
                strict=True,
            ):
                mine[k] = theirs[j]
            for letter in self._columns.letters:
                if letter not in self._columns.external:
                    source = self._columns.arrays[letter][j]
                    if new._params.place is self._params.place:
                        new._params.place.copy(new._columns.arrays[letter][k], source)
                    else:
                        new._params.place.upload(new._columns.arrays[letter][k], self._params.place.download(source))
        new._put(**new._rows_for(counts))
        if new.loss_scale is not None and new._params.place is not self._params.place:
            new._put(loss_scale=new.loss_scale.copy())
            self._attach(new.loss_scale, new._params)
        hyper.users = self._users
        self.__dict__.update(new.__dict__)
        return tuple(fresh)


def warmup(*rules: type[Optimizer] | Rule, dtypes: Sequence[str] = ("float32",), **settings: Any) -> dict[str, float]:
    """Compile kernels ahead of their first use; they stay in the cache on disk.

    Args:
        rules: optimizer classes or rules.
        dtypes: "float32", "float64" or both.
        settings: hyperparameters as for the optimizer, since some choose the kernel (`amsgrad=True`, a weight decay).

    Returns:
        Seconds by name and dtype; near zero for what was in the cache.

    Example:
        >>> import fastlr
        >>> seconds = fastlr.warmup(fastlr.Adam, weight_decay=0.01)
        >>> list(seconds)
        ['Adam float32']
    """
    seconds = {}
    for rule in rules:
        if not isinstance(rule, Rule) and not (isinstance(rule, type) and issubclass(rule, Optimizer)):
            raise TypeError(f"warmup takes optimizer classes and rules, got {checks.shown(rule)}.")
        for dtype in dtypes:
            checks.choices("dtype", [dtype], checks.DTYPES)
            nothing = np.zeros(1, dtype)
            if isinstance(rule, Rule):
                opt = Optimizer(nothing, rule, **({"lr": 0.0} if rule.takes_lr else {}) | settings)
            else:
                opt = rule(nothing, **settings)
            seconds[f"{getattr(rule, '__name__', rule)} {dtype}"] = opt.warmup()
    return seconds
