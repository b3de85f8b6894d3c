"""The stepper: rows, settings and plans of one program, and the one way through a step; what stands in `opt.grads`.

    Gradients.find -> Located -> Selection -> Plan.point_gradients -> Prepared -> run

Everything that can fail comes first, in `prepare`; `run` then carries out the step. A stepper is built completely, then
replaced whole: when a step has other leaves or flags, after a fork, and when a state is loaded.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..arrays.buffers import FlatBuffer
from ..arrays.columns import COMPUTE
from ..arrays.trees import is_container
from ..groups import matching
from ..hyperparameters import Hyper
from ..kernels.atomic import commit
from ..kernels.formats import FORMATS
from ..kernels.layout import CLOCK
from ..kernels.storage import Storage
from ..schedules import Schedule
from ..state import OptimizerState, rows_of
from . import threads
from .gradients import Located
from .info import Layout, StepInfo
from .plans import Column, Entries, Plan
from .program import Program, UnequalError
from .rows import Counts
from .scheduled import Rates, Scheduled, examine

__all__ = ["Accumulation", "Prepared", "Selection", "Stepper"]

_MAX_PLANS = 256  # leaves that take part in a step can change from step to step; their plans are kept


@dataclass(frozen=True)
class Selection:
    """The leaves of a step and the form of their gradients: what a plan is made for.

    Attributes:
        active: the leaves that have gradients and are part of the step; None: all.
        seen: the leaves that are part of the step; None: all.
        flat: whether the gradients are one array.
        format: of the gradients.
    """

    active: tuple[bool, ...] | None
    seen: tuple[bool, ...] | None
    flat: bool
    format: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.active, self.seen, self.flat, self.format)))

    def __hash__(self) -> int:
        """Computed once: a selection may have thousands of leaves."""
        return self.__dict__["_hash"]  # type: ignore[no-any-return]


class Prepared(NamedTuple):
    """A step that can no longer be refused.

    Attributes:
        stepper: what carries it out.
        plan: with the addresses of the gradients.
        kernel: what runs it.
        kept: what must be kept alive until it is over.
        number: for a partial step, how many steps came before the one that it is a part of; None for a step of all.
        writes: what to write after it, see `atomic.commit`.
        scale: what gradients are divided by.
        stream: the GPU stream to make it in, or None.
    """

    stepper: Stepper
    plan: Plan
    kernel: Any
    kept: Any
    number: int | None
    writes: list[tuple[Any, Any, Any]] | None
    scale: Any
    stream: int | None


class Accumulation:
    """What stands in `opt.grads`: gradients that the caller writes, or that are added up over several calls.

    Args:
        state: of the optimizer.
        make_adder: `make_adder(memory, first)` makes the stepper that adds gradients to memory, or puts them there if
            they are the first.

    Attributes:
        received: for each leaf, whether it has received a gradient since the last step; None: nothing was added.
    """

    def __init__(self, state: OptimizerState, make_adder: Callable[[Any, bool], Stepper]) -> None:
        self._parameters, self._gradients, self._backend = state.parameters, state.gradients, state.backend
        self._make_adder = make_adder
        self._adders: dict[bool, Stepper] = {}
        self.received: tuple[bool, ...] | None = None

    @property
    def memory(self) -> Any:
        """The gradients in one array, or None if nobody has used them yet."""
        return self._gradients.own

    def own(self, part: tuple[bool, ...] | None) -> tuple[Any, tuple[bool, ...] | None]:
        """The gradients, and the leaves of a part that are updated by them; None: all.

        Args:
            part: the leaves that a step is about; None: all.

        Raises:
            RuntimeError: if nobody has used them yet.
        """
        if self.memory is None:
            raise RuntimeError(
                "step() without gradients uses opt.grads, which nobody has used yet. "
                "Pass them, step(grads), or write them into opt.grads first."
            )
        if self.received is None:
            return self.memory, part
        active = self.received if part is None else tuple(map(operator.and_, part, self.received))
        return self.memory, None if all(active) else active

    def after_step(
        self, part: tuple[bool, ...] | None, cleared: Sequence[tuple[int, int]]
    ) -> list[tuple[Any, Any, Any]]:
        """What to write after a step of a part has used the gradients, see `atomic.commit`.

        Args:
            part: the leaves that the step was about; None: all.
            cleared: first and last element of what is to be zero and is not yet.
        """
        writes = self._zeros([slice(*span) for span in cleared])
        if self.received is None:
            return writes
        left = () if part is None else tuple(a and not b for a, b in zip(self.received, part, strict=True))
        return [self._receives(left if any(left) else None), *writes]

    def zeroed(self) -> list[tuple[Any, Any, Any]]:
        """What to write so that the gradients are zero, if they have been used, see `atomic.commit`."""
        return [self._receives(None), *self._zeros([] if self.memory is None else [slice(None)])]

    def _zeros(self, spans: Sequence[slice]) -> list[tuple[Any, Any, Any]]:
        memory = self._backend.cleared(self.memory) if spans else None
        return [(memory, span, 0) for span in spans]

    def _receives(self, leaves: tuple[bool, ...] | None) -> tuple[Any, Any, Any]:
        return self.__dict__, "received", leaves

    def add(self, grads: Any, stepper: Stepper) -> None:
        """Add gradients; the first after a step take the place of what stands there.

        Args:
            grads: as for `Optimizer.step`.
            stepper: of the optimizer, which settles this if it is interrupted.

        Raises:
            TypeError: if a gradient is no array or has another dtype.
            ValueError: if the structure or a shape differs.
        """
        parameters, received = self._parameters, self.received
        whole = isinstance(grads, np.ndarray | FlatBuffer) or parameters.is_array or not is_container(grads)
        there = parameters.everyone if whole else tuple(g is not None for g in parameters.structure.leaves(grads))
        unused, first = self.memory is None, received is None
        try:  # what is wrong with them shows before anything is written
            prepared = self._adder(first).prepare(grads)
        except BaseException:
            if unused:  # there are no gradients still, as `step()` will say
                commit([(self._gradients.__dict__, "own", None), (self.__dict__, "_adders", {})])
            raise
        held = (False,) * len(there) if received is None else received
        after = self._receives(tuple(map(operator.or_, there, held)))
        stepper.unsettled = prepared.plan, prepared.plan.next_generation, [after], False
        for leaf, given, full in zip(parameters.cut(self.memory), there, held, strict=True):
            if not full and given == (not first):  # it holds something old, and is not overwritten
                parameters.place.fill(leaf, 0)
        self._adders[first] = prepared.stepper
        prepared.stepper.run(prepared)
        stepper.settle()

    def _adder(self, first: bool) -> Stepper:
        """What adds gradients to the memory, or puts them there if they are the first."""
        adder = self._adders.get(first)
        if adder is None:
            adder = self._make_adder(self._parameters.tree(self._gradients.allocate_own()), first)
        elif adder.is_outdated:  # in a child after a fork
            adder = adder.renewed()
        self._adders[first] = adder
        return adder


class Stepper:
    """Rows, settings and plans of one program.

    Args:
        state: of the optimizer; its rows are made anew, with the same counts.
        program: the rule staged for the flags that are on.
        accumulation: `opt.grads`.
        partition: which leaves have to be told apart, as for `Rows`.
        counts: to go on from; None: those of the rows of the state.
        grad_scale: what gradients are divided by.

    Attributes:
        state: of the optimizer.
        program: the rule staged for the flags that are on.
        rows: the counters of the state.
        table: the settings of each row, float64.
        scheduled: the settings that follow schedules.
        plans: by selection.
        unsettled: of a step whose kernel may have run, what remains to be done; None: nothing.
    """

    def __init__(
        self,
        state: OptimizerState,
        program: Program,
        accumulation: Accumulation,
        partition: np.ndarray | None = None,
        counts: Counts | None = None,
        grad_scale: Any = 1.0,
    ) -> None:
        staged, parameters, backend = program.staged, state.parameters, state.backend
        narrow = [role.name for role in state.columns.roles.values() if role.saved and role.format != COMPUTE]
        if narrow:  # they would read and write beyond the end of the column
            raise NotImplementedError(f"kernels do not know states in another format than the parameters': {narrow}.")
        program.check_states(state.columns.letters, state.options)
        if any(scope == "leaf" for _, scope in staged.sums):
            partition = parameters.one_by_one
        counts = state.rows.counts() if counts is None else counts
        configuration, frozen = rows_of(state.groups, counts)
        agreed = counts.agreed(staged.shared, configuration)
        rows = backend.rows(configuration, frozen, agreed, partition, staged, state.loss_scale)
        self.state, self.program = replace(state, rows=rows), program
        self.rows, self.accumulation, self._partition = rows, accumulation, partition
        self._options, self._backend = state.options, backend
        self._scale = grad_scale
        self._addresses = state.addresses
        self.plans: dict[Selection, Plan] = {}
        self._recent: dict[Any, Plan] = {}  # found in a step before, which the next one may repeat
        self._kernels: dict[tuple[str, bool], Any] = {}
        self._masks: dict[tuple[str, ...], tuple[bool, ...] | None] = {}
        self._epoch = threads.epoch
        self.unsettled: tuple[Plan, int, list[tuple[Any, Any, Any]], bool] | None = None
        version, scheduled = state.groups.version, self._follow()
        formulas = backend.formulas(scheduled)
        columns = max(1, len(staged.uniforms)) + sum(f.count for f in formulas)
        self.table = np.zeros((len(rows), columns))
        self._h = np.zeros((len(rows), staged.slots), parameters.dtype)
        self._take_settings(scheduled, version)
        rows.install(self.table, self._h)
        self._formulas = () if rows.decided_by_host else formulas
        self._finds_rate = "rate" in staged.scalars
        self._divides_by_loss_scale = state.loss_scale is not None and not backend.on_device

    # Settings

    @property
    def is_outdated(self) -> bool:
        """Whether settings have changed since they were taken over, or this is a child after a fork."""
        return self._version != self.state.groups.version or self._epoch != threads.epoch

    def renewed(self, unscaled: bool | None = None, partition: np.ndarray | None = None) -> Stepper:
        """The stepper for the settings as they are: this one, its table brought up to date, or another.

        Args:
            unscaled: whether gradients are divided by a scale from now on; None: as it is.
            partition: which leaves have to be told apart from now on, see `Rows`; None: as it is.

        Raises:
            ValueError: if settings do not go together; then nothing is changed.
        """
        groups, program = self.state.groups, self.program
        version = groups.version
        changed = groups.changed_since(self._version)
        unscaled = program.unscaled if unscaled is None else unscaled
        if unscaled != program.unscaled or not changed.isdisjoint(self._options.structural):
            new = Program.of(self._options, groups, unscaled)
            program = program if new == program else new
        else:
            program.check_common(groups.uniforms(), self._options)
        program.check_states(self.state.columns.letters, self._options)
        if program is self.program and partition is None and self._epoch == threads.epoch and "frozen" not in changed:
            scheduled = self._follow()
            if self._backend.formulas(scheduled) == self._backend.formulas(self.scheduled):
                self._take_settings(scheduled, version)
                return self
        partition = self._partition if partition is None else partition
        self.warn_of_graphs()
        return Stepper(self.state, program, self.accumulation, partition, None, self._scale)

    def resumed(self, state: OptimizerState, counts: Counts, check_schedules: bool) -> Stepper:
        """The stepper to go on with from other settings and counts.

        Args:
            state: with other groups, and what plateaus remember.
            counts: to go on from.
            check_schedules: whether schedules have to fit the next step.

        Raises:
            ValueError: if the next step could not be made with them; nothing is changed.
        """
        try:
            program = Program.of(self._options, state.groups, self.program.unscaled)
            if program.staged.states != state.columns.letters:
                names = ", ".join(map(self._options.public_name, program.staged.states)) or "none"
                raise ValueError(f"with the hyperparameters in the state, the rule has different states: {names}.")
            program = self.program if program == self.program else program
            new = Stepper(state, program, self.accumulation, self._partition, counts, self._scale)
            if check_schedules:
                new.scheduled.fill(counts.steps, np.zeros_like(new.table))
        except (TypeError, ArithmeticError, RecursionError) as error:  # of schedules
            raise ValueError(f"the hyperparameters in the state are wrong: {error}.") from None
        return new

    def succeeded_by(self, new: Stepper) -> Stepper:
        """Another stepper over the same arrays; if graphs have been captured, in the memory that they know.

        Args:
            new: as `resumed` made it.
        """
        if not self.rows.captured or new.program is not self.program or not self.rows.replace(new.rows):
            self.warn_of_graphs()
            return new
        kept = copy.copy(self)
        kept.state = replace(new.state, rows=self.rows)
        kept._take_settings(kept._follow(), kept.state.groups.version)
        kept.rows.upload()
        return kept

    def warn_of_graphs(self) -> None:
        """Warn that graphs which have been captured keep using tables that are about to be replaced."""
        if self.rows.captured:
            warnings.warn(
                "the tables of this optimizer are rebuilt, since flags, frozen leaves or the counts of leaves have "
                "changed: graphs that were captured before keep using the old ones. Capture again.",
                RuntimeWarning,
                stacklevel=5,
            )

    def examine(self, label: str, hyper: Hyper[Any], value: Any, several: bool | None) -> None:
        """Refuse a value that was set but does not fit the others, or a schedule whose value for the next step is bad.

        Args:
            label: what the user calls it.
            hyper: the hyperparameter.
            value: what was set.
            several: whether groups override it. A value that must be the same in all groups can only be set in one
                group after another, so whether it is the same is left to the next step to check. None: more
                hyperparameters are about to be set, so the next step checks whether they fit together.

        Raises:
            ValueError: if it does not fit.
        """
        if (
            several is not None
            and hyper.name != "frozen"
            and (hyper.name != "lr" or "lr" in self.program.staged.common)
        ):
            try:
                program = Program.of(self._options, self.state.groups, self.program.unscaled)
                program.check_states(self.state.columns.letters, self._options)
            except UnequalError:
                if not several:
                    raise
        if self.rows.host_knows:  # else the host does not know which step is next, and would have to wait for the GPU
            examine(label, hyper, value, self._step(), self.state.parameters.population)

    def observe(self, metric: float) -> None:
        """Let plateaus among the settings take account of a metric.

        Raises:
            ValueError: if there are none.
        """
        self.state.groups.touch("lr")  # after an interrupt the next step takes over what has been observed
        self.scheduled.observe(metric, self.rows.steps)
        self.renewed()

    def push(self) -> None:
        """Make the settings as they are take effect in graphs that have been captured."""
        self.rows.upload()

    def _step(self) -> int:
        """The number of steps made, as the host knows it."""
        return int(self.rows.counters.item(-1, CLOCK))

    def _follow(self) -> Scheduled:
        """The settings that follow schedules."""
        state = self.state
        names, population = self.program.staged.uniforms, state.parameters.population
        uniforms, table = state.groups.uniforms(), state.groups.table
        return Scheduled(uniforms, table, self.rows, names, state.observed, population)

    def _take_settings(self, scheduled: Scheduled, version: int) -> None:
        """Enter the settings as they are."""
        rates, rows, staged = self.state.groups.lr, self.rows, self.program.staged
        for c, values in enumerate(self.state.groups.uniforms()):
            which = np.flatnonzero(rows.configuration == c)
            for column, name in enumerate(staged.uniforms):
                value = self._scale if name == "grad_scale" else values[name]
                if not isinstance(value, Schedule):
                    self.table[which, column] = value[rows.model[which]] if isinstance(value, np.ndarray) else value
        if scheduled.entries and self._backend.on_device:
            self.table[:, len(staged.uniforms) :] = scheduled.numbers(self.table)
        rows.settings_known = False
        self.scheduled, self._follows = scheduled, scheduled.follows(rates)
        self._parts = parts = scheduled.parts(rates)
        self._rates = Rates(lambda: parts)
        self._version = version

    def _enter_scheduled(self, number: int | None) -> None:
        """Enter the values that settings have after a number of steps; None: in the next step."""
        if not self._formulas:
            self.scheduled.fill(self._step() if number is None else max(0, number), self.table)

    def _enter_scale(self, scale: Any) -> None:
        """Let the next step divide the gradients by a scale."""
        rows, before, uniforms = self.rows, self._scale, self.program.staged.uniforms
        if "grad_scale" in uniforms:
            if scale is not before and not np.array_equal(scale, before):
                rows.settings_known = False
            self.table[:, uniforms.index("grad_scale")] = scale[rows.model] if isinstance(scale, np.ndarray) else scale
        self._scale = scale

    def _checked_scale(self, grad_scale: Any) -> tuple[Any, bool]:
        """What the gradients of a step are to be divided by, and whether that takes a program that divides them."""
        population, loss_scale = self.state.parameters.population, self.state.loss_scale
        scale: Any = 1.0 if grad_scale is None else checks.scale("grad_scale", grad_scale, population)
        if loss_scale is not None and not self._backend.on_device:  # a GPU has the loss scale where it divides by it
            with np.errstate(over="ignore"):  # infinity is refused
                product = scale * loss_scale.scale
            scale = checks.scale("grad_scale times the loss scale", product, population)
        return scale, self.program.unscaled or not np.all(scale == 1.0)

    # The way through a step

    def prepare(
        self, grads: Any, grad_scale: Any = None, only: str | Sequence[str] | None = None, stream: Any = None
    ) -> Prepared:
        """Find what a step needs, and whatever is wrong, before anything is written; arguments as `Optimizer.step`."""
        stream = None if stream is None else self._backend.stream(stream)
        unscales = grad_scale is not None or self.program.unscaled
        scale, unscaled = self._checked_scale(grad_scale) if unscales else (1.0, False)
        seen = None if only is None else self.mask(only)
        if self._follows and seen is None:
            self._enter_scheduled(None)
        active, parameters = seen, self.state.parameters
        own, flat = grads is None, type(grads) is np.ndarray
        if own:
            grads, active = self.accumulation.own(seen)
            flat = True
        elif not flat:
            if isinstance(grads, FlatBuffer):
                grads = parameters.data_of("grads", grads)
            flat = parameters.is_array or not is_container(grads)
        if flat:
            things = [grads]
        else:
            things = parameters.structure.leaves(grads)
            if seen is not None:
                things = [thing if part else None for thing, part in zip(things, seen, strict=True)]
        part = None if active is None and seen is None else (active, seen)
        self.state.gradients.stream = stream
        plan = self._recent.get((flat, part)) if unscaled == self.program.unscaled else None
        if plan is not None and plan.find(things):
            stepper, kept = self, things
        else:
            located = self.state.gradients.find(things, flat, active, seen)
            stepper, plan = self._point(located, unscaled)
            if all(map(operator.is_, located.arrays, things)):  # they may be so again in the next step
                plan.expect(self.state.gradients, list(located.arrays), flat)
                stepper._recent[flat, part] = plan
            kept = [things, located]
        return self._ready(stepper, plan, kept, None, scale, unscaled, own, seen, stream)

    def prepare_located(self, located: Located, grad_scale: float | None = None) -> Prepared:
        """As `prepare`, for gradients that somebody else has found and checked, and keeps alive.

        Args:
            located: the gradients.
            grad_scale: what they are divided by.
        """
        unscales = grad_scale is not None or self.program.unscaled
        scale, unscaled = self._checked_scale(grad_scale) if unscales else (1.0, False)
        if self._follows and located.seen is None:
            self._enter_scheduled(None)
        stepper, plan = self._point(located, unscaled)
        return self._ready(stepper, plan, located, located.number, scale, unscaled, False, located.seen, None)

    def mask(self, only: str | Sequence[str]) -> tuple[bool, ...] | None:
        """Which leaves a partial step is about; None: all.

        Raises:
            ValueError: if a pattern matches nothing, or the loss scale follows whole steps.
        """
        if self.state.loss_scale is not None:
            raise ValueError("a loss scale follows whole steps; step without only=, or build without loss_scale=.")
        key = checks.patterns("only", only)
        if key not in self._masks:
            paths = self.state.parameters.paths
            matched = {path for pattern in key for path in matching("only", pattern, paths)}
            mask = tuple(path in matched for path in paths)
            self._masks[key] = None if all(mask) else mask
        return self._masks[key]

    def _point(self, located: Located, unscaled: bool) -> tuple[Stepper, Plan]:
        """The plan for gradients, which knows where they are, and its stepper: this one, or one that suits it."""
        stepper, selection = self, Selection(located.active, located.seen, located.flat, located.format)
        plan = self.plans.get(selection) if unscaled == self.program.unscaled else None
        if plan is None:
            everyone = self.state.parameters.everyone
            partition = None
            if located.active is not None:
                partition = self.rows.split(located.active, located.seen or everyone)
            if partition is not None or unscaled != self.program.unscaled:
                stepper = self.renewed(unscaled, partition)
            if len(stepper.plans) >= _MAX_PLANS:
                stepper.plans, stepper._recent = {}, {}
            plan = stepper.plans[selection] = stepper._new_plan(selection)
        if located.flat:
            plan.point_gradients(located.addresses, True)
        else:
            plan.locate_gradients(located.addresses)
        return stepper, plan

    def _ready(
        self,
        stepper: Stepper,
        plan: Plan,
        kept: Any,
        number: int | None,
        scale: Any,
        unscaled: bool,
        own: bool,
        seen: tuple[bool, ...] | None,
        stream: int | None,
    ) -> Prepared:
        """A step of which all is known: the other settings of its stepper are entered, which may be this one."""
        if seen is not None and number is None:
            number = plan.number()
        if self._follows and (seen is not None or stepper is not self):
            stepper._enter_scheduled(number)
        if unscaled:
            stepper._enter_scale(scale)
        clear = own and self._options.zero_grads
        kernel = stepper._kernels.get((plan.grad_format, clear)) or stepper.kernel(plan.grad_format, clear)
        writes = self.accumulation.after_step(seen, plan.left_out if clear else ()) if own else None
        return Prepared(stepper, plan, kernel, kept, number, writes, scale, stream)

    def run(self, prepared: Prepared) -> StepInfo:
        """Make a step that has been prepared."""
        _, plan, kernel, kept, number, writes, scale, stream = prepared
        rows = self.rows
        rates = self._rates
        if self._options.capturable:  # a graph makes steps with what is set when it is launched
            rates = Rates(lambda: self._parts)
        elif self._follows and rows.host_knows:
            rates = rates.at(self._step() if number is None else max(0, number))
        if number is not None:
            plan.count_part(number)
        if writes is not None or self._divides_by_loss_scale:
            self.unsettled = plan, plan.next_generation, writes or [], self._divides_by_loss_scale
        plan.run(kernel, self._options.threads or threads.get_num_threads(), stream)
        del kept, prepared
        if self.unsettled is not None:
            self.settle()
        if self._finds_rate:
            rates = Rates(self._rates_found)
            rates = rates if self._backend.on_device else rates.settled()
        return plan.info(rates, scale)

    def settle(self) -> None:
        """After a kernel, do what remains to be done for its step; at the latest when the next call begins."""
        assert self.unsettled is not None
        plan, generation, writes, rescales = self.unsettled
        done: list[tuple[Any, Any, Any]] = [(self.__dict__, "unsettled", None)]
        if plan.has_made(generation):
            done += writes
            if rescales and self.state.loss_scale is not None:
                done += self.state.loss_scale.after(plan.info(self._rates, 1.0).skipped)
        commit(done)

    def _rates_found(self) -> Mapping[str, Any]:
        """The learning rate of each group, where the rule finds it itself: its state `rate`."""
        rows, parameters = self.rows, self.state.parameters
        rows.download()
        rates = rows.scalars[rows.index, self.program.staged.scalars.index("rate")]  # of each leaf and model
        at = {path: k for k, path in enumerate(parameters.paths)}
        groups = self.state.groups
        found = {group.pattern: rates[at[group.paths[0]]] for group in (groups.defaults, *groups.values())}
        return {p: r.copy() if parameters.population is not None else float(r[0]) for p, r in found.items()}

    # Plans and kernels

    def _new_plan(self, selection: Selection) -> Plan:
        """The plan of a selection."""
        state, rows, everyone = self.state, self.rows, self.state.parameters.everyone
        parameters = state.parameters
        params, *others = self._addresses
        columns = [params, Column(None, 2 if selection.format in FORMATS else params.itemsize), *others]
        active = np.array(everyone if selection.active is None else selection.active, bool)
        seen = np.array(everyone if selection.seen is None else selection.seen, bool)
        updated = active[:, None] & ~rows.frozen[rows.index]
        averaged = seen[:, None] & ~updated & bool(self.program.staged.average)
        partial = selection.seen is not None
        sizes = [size // parameters.models for size in parameters.sizes]
        staged = self.program.staged
        merge = selection.flat and parameters.is_flat and not state.columns.external and not staged.quantities
        entries = Entries(sizes, columns, rows.index, updated, averaged, merge)
        advance = rows.advance(active, seen)
        plan = self._backend.plan(entries, rows, staged, advance, selection.format, partial)
        if partial:  # what a partial step does not see is not left out, it comes later
            leaf = np.searchsorted(parameters.starts, [first for first, _ in plan.left_out], side="right") - 1
            plan.left_out = [span for span, k in zip(plan.left_out, leaf, strict=True) if seen[k]]
        plan.layout = self._layout(plan)
        return plan

    def _layout(self, plan: Plan) -> Layout | None:
        """How to read what a step of this plan reported."""
        staged, parameters = self.program.staged, self.state.parameters
        if plan.entry is None:
            return None
        norms = {name: k for k, name in enumerate(staged.emitted, staged.quantities - len(staged.emitted))}
        norms["grad_norm"] = norms.pop("raw_grad_norm", 0)
        if "grad_norm" not in staged.reports and "raw_grad_norm" not in staged.emitted:
            del norms["grad_norm"]
        return Layout(parameters.paths, parameters.population, plan.entry, self.rows.index, staged.reports, norms)

    def kernel(self, grad_format: str | None = None, clear: bool = False) -> Any:
        """The kernel for gradients of a format, by default the parameters' dtype, which are cleared or not."""
        grad_format = self.state.parameters.dtype.name if grad_format is None else grad_format
        if (grad_format, clear) not in self._kernels:
            storage = Storage(self.state.parameters.dtype.name, grad_format, self._options.shadow, clear)
            self._kernels[grad_format, clear] = self._backend.kernel(self.program.staged, storage, self._formulas)
        return self._kernels[grad_format, clear]

    def warmup(self) -> float:
        """Compile what the next step needs, or load it from the cache; the seconds that took."""
        kernel = self.kernel(clear=self._options.zero_grads)
        return self._backend.prepare(kernel, self.rows)
