"""The optimizer behind every rule: parameters in, one compiled step, state out."""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np

from . import checkpoints, checks
from . import threads as _threads
from .buffers import Alloc, FlatBuffer, allocate
from .gradients import Gradients
from .groups import Groups
from .kernels import cpu, reference, rules
from .kernels.cpu import CLOCK, CLOCK_STEP, T_STEP, Kernel, T
from .kernels.staging import Before, Rule, Staged
from .plans import Plan
from .trees import Structure, is_container, leaves_with_paths

__all__ = ["Optimizer", "StepInfo", "StepOptions", "warmup"]

_BACKENDS: dict[str, Callable[[Staged, str], Kernel]] = {"numba": cpu.build, "numpy": reference.build}
_BEFORE = Before(rules.step_options)
_OPTIONS = _BEFORE.hyperparameters


@functools.cache
def _kernel(staged: Staged, dtype: str, backend: str) -> Kernel:
    return _BACKENDS[backend](staged, dtype)


def _kinds(optimizer: type) -> dict[str, Any]:
    """A value of the right kind for each hyperparameter of a class: its default, a number where there is none."""
    kinds: dict[str, Any] = {}
    for cls in reversed(optimizer.__mro__):
        if "__init__" in vars(cls) and cls is not object:
            kinds.update({n: p.default for n, p in inspect.signature(vars(cls)["__init__"]).parameters.items()})
    return {n: default if isinstance(default, bool | tuple) else 0.0 for n, default in kinds.items()}


class StepOptions(TypedDict, total=False):
    """What every optimizer takes; see `Optimizer`."""

    weight_decay: Any
    decoupled_weight_decay: bool
    maximize: bool
    groups: Mapping[str, Mapping[str, Any]] | None
    threads: int | None
    alloc: Alloc | None
    backend: str


class StepInfo(NamedTuple):
    """What a step did; immutable.

    Attributes:
        step: number of the step, from 1.
        lr: the learning rate used; an array `(population,)` if it differs between models.
        lrs: the learning rate of each group by pattern, and under "" that of all other leaves.
    """

    step: int
    lr: Any
    lrs: MappingProxyType[str, Any]

    def asdict(self) -> dict[str, Any]:
        """Flat names and values for a logger: "step", "lr" and "lr/<pattern>" for each group."""
        return {"step": self.step, "lr": self.lr, **{f"lr/{p}": lr for p, lr in self.lrs.items() if p}}


class Optimizer:
    """Updates parameters in place by a rule.

    The classes in `fastlr.optimizers` are this class with a rule and its defaults. With a rule of your own:
    `fastlr.Optimizer(params, my_rule, lr=1e-3)`; its states start at zero and its hyperparameters are keywords.

    One step is, for each element: maximize (`g = -g`), weight decay, the rule. All leaves, groups and models are one
    launch. The result is the same bit for bit for any number of threads, for separate arrays or a flat buffer, and
    with `backend="numpy"`, if the rule is exact (`opt.rule.exact`).

    Args:
        params: what to update, in place: a tree of arrays (nested dicts, lists, tuples, named tuples, dataclasses and
            None), a `FlatBuffer`, or one array. The arrays are C-contiguous, writable, not overlapping, all float32 or
            all float64.
        rule: a rule made by `fastlr.rule`.
        lr: learning rate, >= 0; as every numeric hyperparameter an array `(population,)` if the parameters are a
            population.
        weight_decay: >= 0. Default: that of a rule that names it itself, else 0.
        decoupled_weight_decay: False: L2, `g + weight_decay * p` goes into the rule. True: the rule starts from
            `p - lr * weight_decay * p`.
        maximize: ascend instead of descend: `g = -g` before anything else.
        groups: pattern to hyperparameters, such as `{"*.bias": {"weight_decay": 0.0}, "embed": {"frozen": True}}`.
            Patterns are `fnmatch` patterns on paths, case-sensitive; all that match apply in order, the later wins.
        threads: how many threads a step may use; default `fastlr.get_num_threads()`.
        alloc: `alloc(nbytes)` returns the memory for every buffer the optimizer makes.
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

    def __init__(
        self,
        params: Any,
        rule: Rule | None = None,
        *,
        lr: Any,
        weight_decay: Any = None,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        threads: int | None = None,
        alloc: Alloc | None = None,
        backend: str = "numba",
        **hyperparameters: Any,
    ) -> None:
        rule = rule if rule is not None else getattr(self, "_rule", None)
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be made by fastlr.rule, got {rule!r}.")
        checks.state_names(self._states.get(s, s) for s in rule.states)
        if threads is not None:
            threads = checks.count("threads", threads)
        checks.choices("backend", [backend], _BACKENDS)
        self._put(_source=rule, _backend=backend, _threads=threads, _alloc=alloc, _lock=threading.RLock())
        self._attach(params)

        spelled = {n: k for k, names in self._spelling.items() for n in names}
        known: dict[str, Any] = {spelled.get(n, n): rule.defaults.get(n) for n in rule.hyperparameters}
        own_decay = rule.defaults.get("weight_decay", 0.0)
        known.update(lr=lr, weight_decay=own_decay if weight_decay is None else weight_decay)
        known.update(decoupled_weight_decay=decoupled_weight_decay, maximize=maximize)
        checks.choices("hyperparameter", hyperparameters, known)
        known.update(hyperparameters)
        missing = [n for n, v in known.items() if v is None and n not in (*hyperparameters, *_OPTIONS)]
        if missing:
            raise TypeError(f"rule {rule.name!r} needs a value for {', '.join(missing)}.")
        kinds = {**rule.defaults, **_kinds(type(self))}
        values = {n: checks.hyperparameter(n, v, kinds.get(n, v), self._models) for n, v in known.items()}
        self._put(_hyper=Groups(values, groups, self._structure.paths, self._models, self._spelling))
        flags = {n for n, v in values.items() if isinstance(v, bool)}
        switches = {spelled.get(n, n) for n in rule.switches | _BEFORE.switches}
        self._put(_structural=flags | switches, _epoch=_threads.epoch)
        self._allocate(self._stage().states)
        zeros = np.zeros((len(self._leaves), self._models or 1), np.int64)
        self._put(**self._rows_for(zeros, zeros, steps=0))

    # Set-up

    def _put(self, **attributes: Any) -> None:
        """Set attributes of the object itself, all at once; plain assignment is for hyperparameters."""
        self.__dict__.update(attributes)

    def _attach(self, params: Any) -> None:
        """Check the parameters and remember where they are."""
        if isinstance(params, FlatBuffer):
            structure, tree, models = params._structure, params.unflatten(), params.population
        else:
            structure, tree, models = Structure(params), params, None
        leaves = [leaf for _, leaf in leaves_with_paths(tree)]
        dtype = np.dtype(checks.parameters(structure.paths, leaves))
        sizes = [leaf.size for leaf in leaves]
        self._put(
            params=params,
            _structure=structure,
            _models=models,
            _leaves=leaves,
            _shapes=[leaf.shape for leaf in leaves],
            _sizes=sizes,
            _size=sum(sizes),
            _everyone=(True,) * len(leaves),
            _dtype=dtype,
            _starts=np.cumsum([0, *sizes])[:-1],
            _is_array=isinstance(params, np.ndarray),
            _is_flat=isinstance(params, np.ndarray | FlatBuffer),
        )

    def _initial(self, letter: str) -> float:
        """The value at which a state starts; for subclasses."""
        return 0.0

    def _allocate(self, letters: Sequence[str]) -> None:
        """States at their initial values, and what finds the gradients."""
        data = {}
        for k, letter in enumerate(letters):
            data[letter] = allocate(self._size, self._dtype, 2 + k, self._alloc)
            if self._initial(letter):
                data[letter].fill(self._initial(letter))
        written = [*self._leaves, *data.values()]
        gradients = Gradients(self._structure.paths, self._shapes, self._dtype, written, self._alloc)
        self._put(_data=data, _gradients=gradients)

    def _check_settings(self, uniforms: list[dict[str, Any]]) -> None:
        """What one hyperparameter demands of another, in each configuration; for subclasses."""

    def _stage(self) -> Staged:
        """Stage the rule for the present settings: what is the same in all groups is static."""
        uniforms = self._hyper.uniforms()
        self._check_settings(uniforms)
        switches = self._source.switches | _BEFORE.switches
        static: dict[str, Any] = {}
        on = set()
        for name in uniforms[0]:
            values = [u[name] for u in uniforms]
            if name == "frozen":
                continue
            if isinstance(values[0], bool) and all(v is values[0] for v in values):
                static[name] = values[0]
            elif name in switches and not any(np.any(v) for v in values):
                static[name] = 0.0
            elif name in switches and all(np.all(v) for v in values):
                on.add(name)
        return self._source.stage(static, before=_BEFORE, on=frozenset(on))

    # Rows: leaves (of one model) that share hyperparameters and counters

    def _rows_for(
        self, t: np.ndarray, clock: np.ndarray, steps: int, active: Sequence[bool] | None = None
    ) -> dict[str, Any]:
        """Rows for given counters of each leaf and model, shape `(leaves, models)`, and for the leaves in a step.

        Returns:
            The attributes to set; plans made before no longer hold.
        """
        leaves, models = t.shape
        active = (True,) * leaves if active is None else tuple(active)
        frozen = np.array([u["frozen"] for u in self._hyper.uniforms()], bool)
        key = np.empty((leaves, models, 5), np.int64)
        key[..., 0] = self._hyper.configuration[:, None]
        key[..., 1] = np.arange(models)
        key[..., 2] = t
        key[..., 3] = clock
        key[..., 4] = np.array(active, bool)[:, None]
        unique, rows = np.unique(key.reshape(-1, 5), axis=0, return_inverse=True)
        stands = frozen[unique[:, 0]]
        counters = np.zeros((len(unique) + 1, 4), np.int64)
        counters[:-1, T], counters[:-1, CLOCK] = unique[:, 2], unique[:, 3]
        counters[:-1, T_STEP] = unique[:, 4] * ~stands
        counters[:-1, CLOCK_STEP] = unique[:, 4] | stands
        counters[-1, CLOCK], counters[-1, CLOCK_STEP] = steps, 1  # the optimizer's own: its clock counts the steps
        return {
            "_rows": rows.reshape(leaves, models),
            "_row_configuration": unique[:, 0],
            "_row_model": unique[:, 1],
            "_counters": counters,
            "_active": active,
            "_stands": frozen[self._hyper.configuration],
            "_staged": None,
            "_plans": {},
        }

    def _counters_of_leaves(self) -> tuple[np.ndarray, np.ndarray]:
        """Updates made and steps seen, for each leaf and model."""
        return self._counters[self._rows, T], self._counters[self._rows, CLOCK]

    def _refresh(self, active: Sequence[bool] | None = None) -> None:
        """Take over what has changed: hyperparameters, frozen leaves, which leaves are in the step, a fork."""
        active = self._active if active is None else tuple(active)
        hyper = self._hyper
        staged = self._staged
        if staged is None or not hyper.changed.isdisjoint(self._structural):
            staged = self._stage()
        if staged.states != tuple(self._data):
            names = ", ".join(sorted(self._states.get(s, s) for s in set(staged.states) ^ set(self._data)))
            raise ValueError(
                f"the hyperparameters as they are now need other states than those that exist ({names}). "
                "Choose at the start whether a state is there: build a new optimizer."
            )
        same = staged is self._staged and active == self._active and _threads.epoch == self._epoch
        if same and "frozen" not in hyper.changed:
            self._fill_table(staged, self._table)
            self._put(_lrs=hyper.lr)
            hyper.changed.clear()
            return
        kernel = _kernel(staged, self._dtype.name, self._backend)
        rows = self._rows_for(*self._counters_of_leaves(), self.steps, active)
        count = len(rows["_counters"]) - 1
        table = np.zeros((count, max(1, len(staged.uniforms))))
        self._put(
            **rows,
            _table=table,
            _h=np.zeros((count, staged.slots), self._dtype),
            _kernel=kernel,
            _epoch=_threads.epoch,
            _lrs=hyper.lr,
        )
        self._fill_table(staged, table)
        self._put(_staged=staged)
        hyper.changed.clear()

    def _fill_table(self, staged: Staged, table: np.ndarray) -> None:
        """The hyperparameters of each row, in the order in which `decide` takes them."""
        for c, values in enumerate(self._hyper.uniforms()):
            rows = np.flatnonzero(self._row_configuration == c)
            for column, name in enumerate(staged.uniforms):
                value = values[name]
                table[rows, column] = value[self._row_model[rows]] if isinstance(value, np.ndarray) else value

    def _plan_for(self, active: tuple[bool, ...], flat: bool) -> Plan:
        """The plan for leaves that have gradients, in one array or in an array for each leaf."""
        if active != self._active:
            self._refresh(active)
        if flat not in self._plans:
            models = self._models or 1
            itemsize = self._dtype.itemsize
            columns = [[checks.address(leaf) for leaf in self._leaves]]
            columns += [(checks.address(data) + self._starts * itemsize).tolist() for data in self._data.values()]
            left_out = self._stands | ~np.array(self._active, bool)
            self._plans[flat] = Plan(
                [size // models for size in self._sizes],
                np.array(columns, np.int64),
                np.where(left_out[:, None], -1, self._rows),
                itemsize,
                self._table,
                self._counters,
                self._h,
                merge=flat and self._is_flat,
            )
        plan: Plan = self._plans[flat]
        return plan

    def _bind(self, grads: Any) -> tuple[Plan, Any]:
        """The plan for a step, with the addresses of the gradients in it, and what must live as long as the step."""
        if grads is None:
            grads = self._gradients.own
            if grads is None:
                raise RuntimeError(
                    "step() without gradients uses opt.grads, which nobody has used yet. "
                    "Pass them, step(grads), or write them into opt.grads first."
                )
        elif isinstance(grads, FlatBuffer):
            if grads._structure.paths != self._structure.paths or grads._shapes != tuple(self._shapes):
                raise ValueError("grads is a buffer of other leaves than params. Make it from the same structure.")
            grads = grads.data
        if isinstance(grads, np.ndarray) or not is_container(grads):
            if (plan := self._plans.get(True)) is not None and plan.points_at([grads]):
                return plan, None
            address, array = self._gradients.flat(grads)
            plan = self._plan_for(self._everyone, flat=True)
            plan.point_flat_gradient(address, [grads] if array is grads else None)
            return plan, array
        leaves = self._structure.leaves(grads)
        if (plan := self._plans.get(False)) is not None and plan.points_at(leaves):
            return plan, None
        addresses, arrays = self._gradients.leaves(leaves)
        plan = self._plan_for(tuple(a is not None for a in arrays), flat=False)
        plan.point_gradients(addresses, leaves if arrays is leaves else None)
        return plan, arrays

    # The public step

    def step(self, grads: Any = None) -> StepInfo:
        """Update the parameters in place.

        Args:
            grads: gradients in the parameters' structure, or in one flat array of all of them; of the parameters'
                dtype and shapes; only read. They are read where they are if they are C-contiguous, else gathered. A
                leaf that is None is not updated. Without it `opt.grads` is used.

        Returns:
            What was done.

        Raises:
            TypeError: if a gradient is no array or has another dtype.
            ValueError: if the structure or a shape differs.
            RuntimeError: if there are no gradients, or another thread is in a step of this optimizer.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this optimizer is in a step in another thread. Use one optimizer per thread, or a lock."
            )
        try:
            if self._hyper.changed or self._staged is None or self._epoch != _threads.epoch:
                self._refresh()
            plan, kept = self._bind(grads)
            plan.run(self._kernel, self._threads or _threads.get_num_threads())
            del kept
            lrs = self._lrs
            return StepInfo(int(self._counters[-1, CLOCK]), lrs[""], lrs)
        finally:
            self._lock.release()

    def warmup(self) -> float:
        """Compile what the next step needs, or load it from the cache; the seconds that took."""
        self._refresh()
        return float(self._kernel.compile_s)

    # Hyperparameters

    def __getattr__(self, name: str) -> Any:
        """A hyperparameter of the optimizer itself; groups may override it."""
        hyper = self.__dict__.get("_hyper")
        if hyper is not None and name in hyper.names:
            return getattr(hyper.defaults, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a hyperparameter of the optimizer itself; the next step uses it."""
        if name not in self._hyper.names:
            raise AttributeError(
                f"{type(self).__name__} has no hyperparameter {name!r} to set; "
                f"there are {', '.join(self._hyper.names)}."
            )
        setattr(self._hyper.defaults, name, value)

    @property
    def groups(self) -> Groups:
        """The groups by pattern; `opt.groups["head.*"].lr = 1e-4` takes effect at the next step."""
        hyper: Groups = self._hyper
        return hyper

    @property
    def rule(self) -> Staged:
        """The rule as staged for the present settings; `opt.rule.show()` prints its code."""
        return self._stage()

    @property
    def steps(self) -> int:
        """Steps made."""
        return int(self._counters[-1, CLOCK])

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse copies and pickles, which would hold the addresses of somebody else's parameters."""
        raise TypeError(
            "an optimizer belongs to its parameters and cannot be copied or pickled. Build one over the new parameters "
            "and hand it the state: new.load_state_dict(old.state_dict())."
        )

    def __repr__(self) -> str:
        """The class, its own hyperparameters and what it updates."""
        values = ", ".join(f"{n}={v!r}" for n, v in self._hyper.defaults._values.items() if n != "frozen")
        size = f"{self._size} x {self._dtype} in {len(self._leaves)} leaves"
        return f"<{type(self).__name__}({values}) of {size}, {self.steps} steps>"

    # Gradients and states in the parameters' structure

    def _tree(self, data: np.ndarray) -> Any:
        """Flat data in the parameters' structure, as views."""
        if self._is_array:
            return data.reshape(self._shapes[0])
        if self._is_flat:
            return self.params.like(data)
        return FlatBuffer(self._structure, self._shapes, data)

    @property
    def grads(self) -> Any:
        """Gradients to write into; zero at first, and allocated on first use.

        An array if the parameters are one, else a `FlatBuffer`: `opt.grads["layer.w"]` is a view.
        """
        return self._tree(self._gradients.allocate_own())

    def zero_grad(self) -> None:
        """Set `opt.grads` to zero, if it has been used."""
        if self._gradients.own is not None:
            self._gradients.own.fill(0)

    @property
    def state(self) -> dict[str, Any]:
        """The states by name, each an array or a `FlatBuffer` in the parameters' structure; views, not copies."""
        return {self._states.get(letter, letter): self._tree(data) for letter, data in self._data.items()}

    # Saving

    def state_dict(self, *, params: bool = False) -> dict[str, np.ndarray]:
        """Everything the optimizer knows, as copies in a flat dict of arrays.

        Args:
            params: put the parameters in as well, under "params.<path>".

        Returns:
            "<state>.<path>" for each state and leaf ("exp_avg.w"); "step" and "clock", shape `(leaves, models)`;
            "fastlr", the description in JSON as bytes. It works with `np.savez(file, **state)`.
        """
        return checkpoints.collect(self, params)

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state_dict` returned, hyperparameters and groups included.

        Args:
            state: from an optimizer of the same rule over parameters of the same paths, shapes and dtype; parameters
                in it are copied into this optimizer's.

        Raises:
            ValueError: if it is from something else, or incomplete; then nothing is changed.
        """
        checkpoints.apply(self, state)

    def save(self, path: str | os.PathLike[str], *, params: bool = True) -> None:
        """Write the optimizer to a file; a crash at any moment leaves the old file or the new one, whole.

        Args:
            path: ends in ".npz" (NumPy alone, no pickle) or ".safetensors" (needs the package safetensors).
            params: write the parameters as well, so that `load` restores the whole run.

        Raises:
            ValueError: if the ending is another one.
            ImportError: if safetensors is asked for and missing.
        """
        checkpoints.write(checkpoints.collect(self, params), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what `save` wrote; continuing equals never having stopped, bit for bit.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is cut short, not fastlr's, or of another optimizer; then nothing is changed.
        """
        checkpoints.apply(self, checkpoints.read(path))

    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of parameters, states, counters and hyperparameters in memory, for `restore`."""
        return checkpoints.collect(self, True)

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go back to a snapshot: parameters, states, counters and hyperparameters, bit for bit."""
        checkpoints.apply(self, snapshot)

    def rebuild(self, params: Any) -> tuple[str, ...]:
        """Go on with other parameters: added, removed or resized ones.

        Leaves of the same path and shape keep their state and counters, the others start afresh.

        Args:
            params: the new parameters, as for a new optimizer, of the same dtype.

        Returns:
            The paths that start afresh.

        Raises:
            TypeError: if the dtype differs.
            ValueError: if the parameters do not fit, or a group's pattern matches none of them; then nothing changes.
        """
        new: Optimizer = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._attach(params)
        if new._dtype != self._dtype or new._models != self._models:
            raise TypeError(
                f"the new parameters are {new._dtype} with population={new._models}, the old ones {self._dtype} with "
                f"population={self._models}. Build a new optimizer."
            )
        own, *overrides = self._hyper.export().items()
        values = {n: v for n, v in self._hyper.defaults._values.items() if n != "frozen"}
        hyper = Groups(values, dict(overrides), new._structure.paths, new._models, self._spelling)
        hyper.defaults.frozen = own[1]["frozen"]
        new._put(_hyper=hyper)
        new._allocate(tuple(self._data))
        counters = np.zeros((2, len(new._leaves), new._models or 1), np.int64)
        old = {path: k for k, path in enumerate(self._structure.paths)}
        fresh = []
        t, clock = self._counters_of_leaves()
        for k, path in enumerate(new._structure.paths):
            j = old.get(path)
            if j is None or self._shapes[j] != new._shapes[k]:
                fresh.append(path)
                continue
            counters[0, k], counters[1, k] = t[j], clock[j]
            for letter, data in new._data.items():
                a, b = new._starts[k], self._starts[j]
                data[a : a + new._sizes[k]] = self._data[letter][b : b + self._sizes[j]]
        new._put(**new._rows_for(counters[0], counters[1], self.steps))
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
            raise TypeError(f"warmup takes optimizer classes and rules, got {rule!r}.")
        for dtype in dtypes:
            checks.choices("dtype", [dtype], checks.DTYPES)
            nothing = np.zeros(1, dtype)
            opt = (
                Optimizer(nothing, rule, **{"lr": 0.0, **settings})
                if isinstance(rule, Rule)
                else rule(nothing, **settings)
            )
            seconds[f"{getattr(rule, '__name__', rule)} {dtype}"] = opt.warmup()
    return seconds
