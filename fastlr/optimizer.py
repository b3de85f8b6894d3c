"""The optimizer behind every rule: parameters in, one compiled step, state out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import get_ident
from typing import Any, ClassVar

import numpy as np

from . import checkpoints, checks
from .arrays.columns import EMA, LR_SCALE, ROLES, SHADOW, Parameters
from .exclusive import Users, exclusive, take_over
from .groups import Groups
from .kernels import rules
from .kernels.atomic import commit
from .kernels.staging import Rule, Staged
from .options import Options, StepOptions, documented, signature
from .owner import StepperOwner
from .state import OptimizerState
from .step.info import StepInfo
from .step.program import Program
from .step.stepper import Accumulation, Stepper

__all__ = ["Optimizer", "StepOptions", "warmup"]

_ACCUMULATION = Rule(rules.accumulation)


class Optimizer(StepperOwner):
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
        lr: learning rate, >= 0. Like every numeric hyperparameter it can be a schedule (`fastlr.schedules`, or a
            function of the step) or, if the parameters are a population, an array `(population,)`. A rule that takes no
            lr has no `opt.lr` either, and `info.lr` is None.
        {options}
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
    _related: ClassVar[tuple[str, ...]] = ()  # the hyperparameters that `_check_settings` looks at
    _defaults: ClassVar[StepOptions] = {}  # of options that have another default in this class

    def __init__(self, params: Any, rule: Rule | None = None, **settings: Any) -> None:
        settings = {**self._defaults, **settings}
        options = Options.of(rule if rule is not None else getattr(self, "_rule", None), settings, self._states)
        parameters = Parameters(params)
        options.check_place(parameters.place)
        table = options.hyperparameters(type(self), settings)
        values, fixed = options.values(table, settings, parameters.population)
        self.__dict__.update(fixed)
        options = options.of_class(type(self), table, fixed)
        groups = Groups(values, settings.get("groups"), parameters.paths, parameters.population, table)
        program = Program.of(options, groups, options.loss_scaled)
        given = {name: settings.get(role.argument) for name, role in ROLES.items()}
        external = {name: tree for name, tree in given.items() if tree is not None}
        loss_scale = settings.get("loss_scale")
        state = OptimizerState.start(options, parameters, groups, program.staged.states, external, loss_scale)
        self._users: Users = {}
        self._stepper = Stepper(state, program, _accumulation(state))
        self._attach_loss_scale(state)
        self._adopt_groups(groups)

    @classmethod
    def _check_settings(cls, uniforms: Sequence[Mapping[str, Any]]) -> None:
        """Check hyperparameters against each other, in each configuration; for subclasses, see `_related`."""

    # The step

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
            stepper = self._current()
            prepared = stepper.prepare(grads, grad_scale, only, stream)
            if prepared.stepper is not stepper:
                stepper = self._stepper = prepared.stepper
            return stepper.run(prepared)
        finally:
            self._users.clear()

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
        self._stepper.accumulation.add(grads, self._stepper)

    @exclusive
    def warmup(self) -> float:
        """Compile what the next step needs, or load it from the cache; the seconds that took."""
        return self._current().warmup()

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
        stepper = self._current()
        stepper.observe(number)
        if stepper.state.options.capturable:
            stepper.push()

    # What it is

    @property
    def params(self) -> Any:
        """The parameters, as they were given."""
        return self._stepper.state.parameters.source

    @property
    def rule(self) -> Staged:
        """The rule as staged for the present settings; `opt.rule.show()` prints its code."""
        stepper = self._stepper
        return Program.of(stepper.state.options, stepper.state.groups, stepper.program.unscaled).staged

    @property
    def steps(self) -> int:
        """Steps made; a step that was skipped for all parameters does not count."""
        return self._stepper.rows.steps

    @property
    def skipped_steps(self) -> Any:
        """Steps that were skipped because the gradient was not finite; `(population,)` in a population."""
        most = self._stepper.rows.counts().skipped.max(axis=0)
        return most if self._stepper.state.parameters.population is not None else int(most[0])

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse copies and pickles, which would hold the addresses of somebody else's parameters."""
        raise TypeError(
            "an optimizer belongs to its parameters and cannot be copied or pickled. Build one over the new parameters "
            "and hand it the state: new.load_state_dict(old.state_dict())."
        )

    def __repr__(self) -> str:
        """The class, its own hyperparameters and what it updates."""
        state = self._stepper.state
        shown = state.groups.everything()[""].items()
        values = ", ".join(f"{n}={v!r}" for n, v in shown if n != "frozen" and v is not None)
        size = f"{state.parameters.size} x {state.parameters.dtype} in {len(state.parameters.leaves)} leaves"
        return f"<{type(self).__name__}({values}) of {size}, {self.steps} steps>"

    # Gradients and states in the parameters' structure

    @property
    def grads(self) -> Any:
        """Gradients to write into; zero at first, and allocated on first use.

        An array if the parameters are one, else a `FlatBuffer`: `opt.grads["layer.w"]` is a view.
        """
        state = self._stepper.state
        return state.parameters.tree(state.gradients.allocate_own())

    @exclusive
    def zero_grad(self) -> None:
        """Set `opt.grads` to zero, if it has been used."""
        commit(self._stepper.accumulation.zeroed())

    @property
    def state(self) -> dict[str, Any]:
        """The states by name, each an array or a `FlatBuffer` in the parameters' structure; views, not copies."""
        state = self._stepper.state
        return {state.options.public_name(letter): state.columns.tree(letter) for letter in state.columns.letters}

    @property
    def ema(self) -> Any:
        """The moving average of the parameters, or what was given as `ema_out`.

        Raises:
            AttributeError: if the optimizer was built without `ema=`.
        """
        return self._column(EMA)

    @property
    def shadow(self) -> Any:
        """The copy of the parameters in low precision, as of the last step, or what was given as `shadow_out`.

        Arrays of float16, or of bfloat16 where the package ml_dtypes is installed; without it their bits, as uint16.

        Raises:
            AttributeError: if the optimizer was built without `shadow=`.
        """
        return self._column(SHADOW)

    @property
    def lr_scale(self) -> Any:
        """The factor on each element's rate, as it was given; the next step reads what stands there then.

        Raises:
            AttributeError: if the optimizer was built without `lr_scale=`.
        """
        return self._column(LR_SCALE)

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
        return checkpoints.collect(self._stepper.state, params)

    @exclusive
    def load_state_dict(self, state: Mapping[str, np.ndarray], *, hyperparameters: bool = True) -> None:
        """Take over what `state_dict` returned.

        By default everything comes from the state, including hyperparameters, schedules and groups. A state whose
        hyperparameters followed a function of yours is refused, since functions are not saved. With
        `hyperparameters=False` the optimizer keeps its own, functions and schedules alike, and takes over the states,
        the counters, the loss scale and what a `Plateau` in the same place remembers.

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
        self._resume(checkpoints.check(self._stepper.state, state, hyperparameters))

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
        checkpoints.save(self._stepper.state, path, params, extra)

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
        saved, extra = checkpoints.read(self._stepper.state, path, hyperparameters)
        self._resume(saved)
        return extra

    def _resume(self, saved: checkpoints.Saved) -> None:
        """Go on from a state that fits: on the host in one piece, which nothing can interrupt."""
        stepper = self._stepper
        state = replace(stepper.state, groups=saved.groups, observed=saved.observed)
        new = stepper.resumed(state, saved.counts, saved.from_file)
        state.gradients.check_given()
        if not state.backend.on_device:
            commit([*checkpoints.writes(state, saved), *self._replacement(new)])
            return
        checkpoints.upload(state, saved)
        commit(self._replacement(stepper.succeeded_by(new)))

    @exclusive
    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of parameters, states, counters and hyperparameters in memory, for `restore`."""
        return checkpoints.snapshot(self._stepper.state)

    @exclusive
    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go back to a snapshot: parameters, states, counters and hyperparameters, functions included, bit for bit."""
        self._resume(checkpoints.check(self._stepper.state, snapshot))

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
        stepper = self._stepper
        if stepper.accumulation.received is not None:
            raise ValueError("gradients are being accumulated; step first, then move.")
        new: Optimizer = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._users = {}
        new._take(stepper.state.moved(device), _accumulation)
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
        before = self._stepper.state
        external = {EMA.name: ema_out, LR_SCALE.name: lr_scale, SHADOW.name: shadow_out}
        after = before.rebuilt(params, external)
        self._stepper.warn_of_graphs()
        groups = before.groups
        self._take(after, _accumulation)
        groups.successor = after.groups
        return after.fresh(before)


def _accumulation(state: OptimizerState) -> Accumulation:
    """`opt.grads` for a state."""
    options = state.options

    def adder(memory: Any, first: bool) -> Stepper:
        names = ("threads", "backend", "grad_dtype", "capturable")
        settings = {name: getattr(options, name) for name in names}
        return Optimizer(memory, _ACCUMULATION, first=first, **settings)._stepper

    return Accumulation(state, adder)


Optimizer.__doc__ = documented(Optimizer.__doc__ or "")
Optimizer.__init__.__signature__ = signature()  # type: ignore[attr-defined]


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
