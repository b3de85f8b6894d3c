"""The options of a step: one table, of which signatures, checks, documentation, tests and the benchmark are made."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypedDict, get_type_hints

import numpy as np

from . import arguments, checks
from .arrays.columns import EMA, LR_SCALE, ROLES, SHADOW, Role
from .arrays.places import HOST, Alloc, Place
from .checks import FRACTION, NON_NEGATIVE, POSITIVE
from .groups import everywhere, somewhere
from .hyperparameters import Hyper, Number, declared, flag, number, part_labels
from .kernels import rules
from .kernels.formats import FORMATS
from .kernels.primitives import SCOPES
from .kernels.staging import After, Before, Rule
from .loss_scale import LossScale
from .schedules import Schedule

__all__ = [
    "AFTER",
    "BEFORE",
    "EXAMPLES",
    "OPTIONS",
    "OWN",
    "Option",
    "Options",
    "StepHyperparameters",
    "StepOptions",
    "documented",
    "signature",
    "with_trees",
]

BEFORE, AFTER = Before(rules.before), After(rules.after)


def _always(value: Any) -> bool:
    return True


def _limits(value: Any) -> bool:
    """Whether a limit is finite, so that it limits something, in at least one model."""
    return isinstance(value, Schedule) or bool(np.any(np.isfinite(value)))


def _pauses(decay: Any) -> bool:
    """Whether an average may stay as it is at some step, in some model."""
    return isinstance(decay, Schedule) or bool(np.any(decay == 1.0))


def _one_of(known: Iterable[str]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        checks.choices(name, [value], known)
        return value

    return check


def _loss_scale(name: str, value: Any) -> LossScale:
    if not isinstance(value, LossScale):
        raise TypeError(f"{name} must be a fastlr.LossScale, got {checks.shown(value)}.")
    return value


def _function(name: str, value: Any) -> Alloc:
    if not callable(value):
        raise TypeError(f"{name} must be a function of the number of bytes, got {checks.shown(value)}.")
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Option:
    """An option of the step.

    Attributes:
        sentence: what it is, for the documentation.
        default: if nobody gives another. None is always allowed where it is the default: off.
        fallback: the value where nobody gives one, neither the user nor a rule that names it itself.
        hyper: the hyperparameter that it becomes in a built optimizer; None if it is not one. It can have another name.
        check: `check(name, value)` checks an option that is not a hyperparameter, and returns its normal form.
        flags: the static flags of `before` and `after` in `kernels/rules.py` that it turns on, each with a function of
            the hyperparameter's value in one group that says whether it does; other options do once they are on.
        column: what it reads or writes for each element.
        needs: another option without which it means nothing, and the message that says so.
        torch: whether `fastlr.torch` takes it as it is; if not, PyTorch or that package does its job.
        example: a value with which it does something, for tests and the benchmark; for a tree, the value of each
            element. None where there is nothing to measure.
        moved: the bytes per parameter that it adds to what a float32 step moves.
        name: in the API.
    """

    sentence: str
    default: Any = None
    fallback: Any = None
    hyper: Hyper[Any] | None = None
    check: Callable[[str, Any], Any] | None = None
    flags: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    column: Role | None = None
    needs: tuple[str, str] | None = None
    torch: bool = True
    example: Any = None
    moved: int = 0
    name: str = ""

    def missing(self) -> AttributeError:
        """The error for an optimizer that was built without the column of this option."""
        example = f"{self.name}={'tree' if self.takes_tree else repr(self.example)}"
        return AttributeError(f"there is no {self.name}; build the optimizer with it, such as {example}.")

    @property
    def takes_tree(self) -> bool:
        """Whether it is given as arrays that go along with the parameters."""
        return self.column is not None and self.column.argument == self.name


class StepOptions(TypedDict, total=False):
    """What every optimizer takes; see `Optimizer`."""

    weight_decay: Annotated[
        Any,
        Option(
            ">= 0. Default: that of a rule that names it itself, else 0.",
            hyper=number(NON_NEGATIVE),
            fallback=0.0,
        ),
    ]
    decoupled_weight_decay: Annotated[
        bool,
        Option(
            "False: L2, `g + weight_decay * p` goes into the rule. True: the rule starts from "
            "`p - lr * weight_decay * p`.",
            False,
            hyper=flag(),
        ),
    ]
    maximize: Annotated[
        bool,
        Option("ascend instead of descend: `g = -g` before the decay.", False, hyper=flag()),
    ]
    clip_norm: Annotated[
        Any,
        Option(
            "> 0. The gradient is multiplied by `min(clip_norm / (norm + 1e-6), 1)`, as PyTorch's `clip_grad_norm_` "
            "does. Default None: not clipped.",
            hyper=Hyper(interval=POSITIVE, optional=True),
            flags={"norm_clipped": _limits},
            example=1.0,
            moved=4,
        ),
    ]
    scope: Annotated[
        str,
        Option(
            'what the norm for `clip_norm` is taken of: "all" (default; in a population of each model), "group" (the '
            'leaves that match the same patterns) or "leaf".',
            "all",
            check=_one_of(SCOPES),
        ),
    ]
    clip_value: Annotated[
        Any,
        Option(
            "> 0. Each element of the gradient is limited to this magnitude, after `clip_norm`. Default None.",
            hyper=Hyper(interval=POSITIVE, optional=True),
            flags={"value_clipped": _limits},
            example=1.0,
        ),
    ]
    skip_nonfinite: Annotated[
        bool,
        Option(
            "a step whose gradient has NaN or Inf anywhere changes nothing: parameters, states, averages, copies and "
            "counters stay bit for bit; in a population only for that model. `info.skipped` says so.",
            False,
            check=checks.flag,
            flags={"tested": _always},
            example=True,
            moved=4,
        ),
    ]
    loss_scale: Annotated[
        LossScale | None,
        Option(
            "a `LossScale`, whose scale the gradients are divided by; implies `skip_nonfinite`. For parameters on a "
            "GPU its state is there, see `LossScale.on_device`.",
            check=_loss_scale,
            flags={"tested": _always},
            torch=False,
        ),
    ]
    ema: Annotated[
        Any,
        Option(
            "keep a moving average of the parameters, `e = e + (1 - ema) * (p - e)` after each step, in `opt.ema`; in "
            "[0, 1], at 1 it stays as it is. It starts as a copy of the parameters, and follows all of them, those too "
            "that are frozen or have no gradient; with `only=` those of the part. A step that is skipped leaves it "
            "alone. Its decay is the hyperparameter `ema_decay` from then on.",
            hyper=Hyper("ema_decay", interval=FRACTION),
            flags={"averaged": _always, "may_pause": _pauses},
            column=EMA,
            example=0.999,
            moved=8,
        ),
    ]
    ema_out: Annotated[
        Any,
        Option(
            "arrays of your own in the parameters' structure to keep the average in (a target network). They go on "
            "from what stands in them.",
            needs=("ema", "ema_out is where the average is kept; give its decay as well, such as ema=0.999."),
            torch=False,
        ),
    ]
    shadow: Annotated[
        str | None,
        Option(
            '"bfloat16" or "float16": keep a copy of the parameters in that format in `opt.shadow`.',
            check=_one_of(FORMATS),
            column=SHADOW,
            example="bfloat16",
            moved=2,
        ),
    ]
    shadow_out: Annotated[
        Any,
        Option(
            "arrays of your own in the parameters' structure to keep that copy in (the weights of the forward pass, of "
            "which the parameters are the masters): of that format, or of uint16 for its bits.",
            needs=(
                "shadow",
                'shadow_out is where the copy is kept; give its format as well, such as shadow="bfloat16".',
            ),
            torch=False,
        ),
    ]
    zero_grads: Annotated[
        bool,
        Option(
            "`step()` sets `opt.grads` to zero in the same pass. Gradients handed to `step` are never written.",
            False,
            check=checks.flag,
            torch=False,
            example=True,
            moved=4,
        ),
    ]
    lr_scale: Annotated[
        Any,
        Option(
            "a factor on the learning rate for each element, >= 0 and finite, in the parameters' structure and read "
            "where it is; an element whose factor is 0 stays as it is, its decay included.",
            flags={"per_element": _always},
            column=LR_SCALE,
            torch=False,
            example=1.0,
            moved=4,
        ),
    ]
    statistics: Annotated[
        bool,
        Option(
            'take all norms in `info["layer.w"]`. Default False: none but those that the step needs anyway.',
            False,
            check=checks.flag,
            flags={"statistics": _always},
            example=True,
        ),
    ]
    grad_dtype: Annotated[
        str | None,
        Option(
            'what gradients of dtype uint16 hold: "bfloat16" or "float16". Arrays of float16, of ml_dtypes\' bfloat16 '
            "and PyTorch tensors of either are understood as they are.",
            check=_one_of(FORMATS),
            torch=False,
        ),
    ]
    groups: Annotated[
        Mapping[str, Mapping[str, Any]] | None,
        Option(
            'pattern to hyperparameters, such as `{"*.bias": {"weight_decay": 0.0}, "embed": {"frozen": True}}`. A '
            "path is that leaf; anything else is an `fnmatch` pattern on paths, case-sensitive. All that match apply "
            "in order, the later wins.",
            torch=False,
        ),
    ]
    threads: Annotated[
        int | None,
        Option(
            "how many threads a step may use, >= 1; default `fastlr.get_num_threads()`. More than 256 count as 256, "
            "and no more are used than there are tiles of up to 16,384 elements.",
            check=checks.count,
        ),
    ]
    alloc: Annotated[
        Alloc | None,
        Option(
            "`alloc(nbytes)` returns the memory for every buffer the optimizer makes: writable, and none of it in use "
            "for something else, such as another buffer.",
            check=_function,
        ),
    ]
    capturable: Annotated[
        bool,
        Option(
            "for parameters on a GPU: keep everything that changes from step to step there, so that a step can be "
            "captured into a CUDA graph and replayed. `info` and `opt.steps` then tell of the step made last, and "
            "setting a hyperparameter takes effect at the next replay.",
            False,
            check=checks.flag,
        ),
    ]
    backend: Annotated[
        str,
        Option(
            '"numba", or "numpy" for the reference: slow, compiles nothing, same bits.',
            "numba",
            check=_one_of(("numba", "numpy")),
            torch=False,
        ),
    ]


class StepHyperparameters:
    """The options above that are hyperparameters, and `lr` and `frozen`, as attributes of an optimizer.

    This says their types to type checkers; the rows of the table say what they are.
    """

    lr: Hyper[Number]
    weight_decay: Hyper[Number]
    decoupled_weight_decay: Hyper[bool]
    maximize: Hyper[bool]
    clip_norm: Hyper[Number | None]
    clip_value: Hyper[Number | None]
    ema_decay: Hyper[Number]
    frozen: Hyper[bool | np.ndarray]


def _named(name: str, option: Option) -> Option:
    """An option that knows what it is called, and so does its hyperparameter."""
    hyper, default = option.hyper, False if isinstance(option.default, bool) else None
    if hyper is not None:
        hyper = replace(hyper, name=hyper.name or name, default=default, sentence=option.sentence)
    return replace(option, name=name, hyper=hyper)


_HINTS = get_type_hints(StepOptions, include_extras=True)
OPTIONS: dict[str, Option] = {name: _named(name, *hint.__metadata__) for name, hint in _HINTS.items()}
# The hyperparameters of the step itself. Their ranges hold everywhere; those of a rule's are declared by its class.
OWN: dict[str, Hyper[Any]] = {
    "lr": Hyper("lr", interval=NON_NEGATIVE),
    **{option.hyper.name: option.hyper for option in OPTIONS.values() if option.hyper is not None},
    "frozen": Hyper("frozen", "flag", scheduled=False, default=False),
}
# Each option that costs something, with a value with which it does something, for tests and the benchmark.
EXAMPLES = {name: option.example for name, option in OPTIONS.items() if option.example is not None}
_FLAGS = {name for option in OPTIONS.values() for name in option.flags}


def check_rows(step: Before | After) -> None:
    """Check that what runs before or after every rule takes nothing but what the table has.

    Raises:
        TypeError: if it takes something else, which no step would have a value for.
    """
    for name in step.hyperparameters:
        if name not in {*OWN, *_FLAGS, "grad_scale", "scope", "unscaled"}:
            raise TypeError(
                f"{step.name}() in kernels/rules.py takes {name!r}, which no row of StepOptions in fastlr/options.py "
                "has. Add the row: a hyperparameter is the hyper of one, a flag one of its flags."
            )


check_rows(BEFORE)
check_rows(AFTER)
# Names that the step itself uses, so that a rule's hyperparameter cannot have them. The four that are taken out again a
# rule may use: then they are the rule's, and the step leaves them alone.
_TAKEN = {*BEFORE.hyperparameters, *BEFORE.states, *AFTER.hyperparameters, *AFTER.states, "statistics", "frozen"}
_TAKEN -= {"lr", "weight_decay", "decoupled_weight_decay", "maximize"}


def with_trees(settings: Mapping[str, Any], tree: Callable[[float], Any]) -> dict[str, Any]:
    """Settings with an array in the place of each number that stands for one.

    Args:
        settings: such as `EXAMPLES`.
        tree: makes arrays of one number.
    """
    return {n: tree(value) if n in OPTIONS and OPTIONS[n].takes_tree else value for n, value in settings.items()}


def signature() -> inspect.Signature:
    """The arguments of `Optimizer`."""
    parameter, keyword = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
    first = [parameter(name, parameter.POSITIONAL_OR_KEYWORD, annotation=Any) for name in ("self", "params")]
    rule = parameter("rule", parameter.POSITIONAL_OR_KEYWORD, default=None, annotation="Rule | None")
    options = [
        parameter(name, keyword, default=OPTIONS[name].default, annotation=hint)
        for name, hint in get_type_hints(StepOptions).items()
    ]
    lr = parameter("lr", keyword, default=None, annotation=Any)
    rest = parameter("hyperparameters", parameter.VAR_KEYWORD, annotation=Any)
    return inspect.Signature([*first, rule, lr, *options, rest], return_annotation=None)


def documented(docstring: str) -> str:
    """A docstring in which the line "{options}" stands for what is to be said about each option."""
    form = textwrap.TextWrapper(120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)
    lines = [form.fill(f"{name}: {option.sentence}") for name, option in OPTIONS.items()]
    return docstring.replace("        {options}", "\n".join(lines))


@dataclass(frozen=True)
class Options:
    """Everything that an optimizer was built with and that is no hyperparameter; it never changes.

    Attributes:
        rule: the update.
        on: the options that were given, without those that are off.
        scope, shadow, zero_grads, statistics, grad_dtype, threads, alloc, capturable, backend: as given.
        optimizer: the name of the class.
        names: the names in the API of the rule's states.
        labels: what users call what the rule names.
        starts: the numbers at which states begin, those of groups among them; others begin at 0.
        structural: the hyperparameters on which the code of a step may depend: setting one may mean another kernel.
        check_class: checks hyperparameters against each other, in each configuration; see `Optimizer._check_settings`.
        is_users_rule: whether the rule is not the class's own.
    """

    rule: Rule
    on: frozenset[str] = frozenset()
    scope: str = "all"
    shadow: str | None = None
    zero_grads: bool = False
    statistics: bool = False
    grad_dtype: str | None = None
    threads: int | None = None
    alloc: Alloc | None = None
    capturable: bool = False
    backend: str = "numba"
    optimizer: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)
    structural: frozenset[str] = frozenset()
    check_class: Callable[[Sequence[Mapping[str, Any]]], None] | None = None
    is_users_rule: bool = True

    @classmethod
    def of(cls, rule: Any, settings: Mapping[str, Any], states: Mapping[str, str]) -> Options:
        """What a user gave, checked.

        Args:
            rule: what should be a rule.
            settings: the options and the hyperparameters by name.
            states: the rule's letters to the names of its states in the API.

        Raises:
            TypeError: if something is of the wrong kind.
            ValueError: if something does not fit, or the rule cannot be used.
        """
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be made by fastlr.rule, got {checks.shown(rule)}.")
        checks.state_names([*(states.get(s, s) for s in rule.states), *rule.scalars], ROLES)
        for name in rule.hyperparameters:
            if name in _TAKEN:
                raise ValueError(
                    f"{name!r} is the name of an option of the step. Give the rule's hyperparameter another name."
                )
        rule.check_constants()
        if settings.get("lr") is not None and not rule.takes_lr:
            raise TypeError(
                f"rule {rule.name!r} has no lr: no keyword-only argument of that name. Build the optimizer without lr, "
                "or let the rule take it and use it."
            )
        given = {name: settings.get(name, option.default) for name, option in OPTIONS.items()}
        if given[LR_SCALE.argument] is not None and not rule.takes_lr:
            raise ValueError(f"lr_scale is a factor on lr, which rule {rule.name!r} does not have.")
        for name, option in OPTIONS.items():
            if option.check is not None and (given[name] is not None or option.default is not None):
                given[name] = option.check(name, given[name])
            if option.needs is not None and given[name] is not None and given[option.needs[0]] is None:
                raise ValueError(option.needs[1])
        on = frozenset(n for n, value in given.items() if value is not None and value is not False)
        kept = {n: given[n] for n in cls.__dataclass_fields__ if n in given}
        return cls(rule, on, **kept)

    @property
    def loss_scaled(self) -> bool:
        """Whether there is a loss scale, so that gradients are divided at each step."""
        return "loss_scale" in self.on

    # What the class of an optimizer adds

    def of_class(self, optimizer: type, table: Mapping[str, Hyper[Any]], fixed: Mapping[str, float]) -> Options:
        """These options with what a class adds.

        Args:
            optimizer: the class.
            table: its hyperparameters.
            fixed: the numbers at which states begin, by the names of the hyperparameters.
        """
        cls: Any = optimizer
        given = {h.starts: fixed[name] for name, h in table.items() if h.starts}
        starts = {name: float(self.rule.defaults[name]) for name in self.rule.scalars} | given
        structural = frozenset(self.structural_names(table) | set(cls._related))
        check, is_users = cls._check_settings, not hasattr(cls, "_rule")
        labels = {part: label for part, (label, _) in part_labels(table).items()}
        return replace(
            self,
            optimizer=cls.__name__,
            names=cls._states,
            labels=labels,
            starts=starts,
            structural=structural,
            check_class=check,
            is_users_rule=is_users,
        )

    def public_name(self, state: str) -> str:
        """The name in the API of a state."""
        return self.names.get(state, state)

    @property
    def scalars_can_be_nan(self) -> bool:
        """Whether states of a group can be NaN: after gradients that were, or in a rule of the user's."""
        return self.rule.sums_anything or self.is_users_rule

    def check_place(self, place: Place) -> None:
        """Check that the parameters are where these options are for.

        Raises:
            ValueError: if they are not.
        """
        if place is HOST and self.capturable:
            raise ValueError("capturable=True is for parameters on a GPU; these are on the CPU.")
        if place is not HOST and self.backend != "numba":
            raise ValueError(f"backend={self.backend!r} steps on the CPU, but the parameters are on {place.label}.")

    # Hyperparameters

    def hyperparameters(self, optimizer: type, settings: Mapping[str, Any]) -> dict[str, Hyper[Any]]:
        """Every hyperparameter that an optimizer can have.

        One that a user's rule has and no class declares can be any finite number. It is a flag if its default is True
        or False, or if it has no default and True or False is given.

        Args:
            optimizer: the class.
            settings: what the user gave.
        """
        table = {**declared(optimizer), **OWN}
        parts = {part for h in table.values() for part in h.parts}
        for name in self.rule.hyperparameters:
            if name not in table and name not in parts:
                default = self.rule.defaults.get(name)
                is_flag = isinstance(settings.get(name) if default is None else default, bool)
                kind: Hyper[Any] = flag() if is_flag else number()
                table[name] = replace(kind, name=name, default=default)
        return table

    def values(
        self, table: Mapping[str, Hyper[Any]], settings: Mapping[str, Any], population: int | None
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """The hyperparameters that exist, and the numbers at which states begin, in their normal form.

        Args:
            table: of `hyperparameters`.
            settings: what the user gave.
            population: number of models, or None.

        Raises:
            TypeError: if one is unknown, missing or of the wrong kind.
            ValueError: if one is outside its range.
        """
        rule = self.rule
        api = {part: h.name for h in table.values() for part in h.parts}
        known = {api.get(n, n): rule.defaults.get(n) for n in rule.hyperparameters}
        if rule.takes_lr:
            known["lr"] = None
        starts = {name: settings.get(name, h.default) for name, h in table.items() if h.starts}
        own = [name for name in OWN if name in OPTIONS]
        given = {name: value for name, value in settings.items() if name not in OPTIONS and name not in starts}
        if not rule.takes_lr:
            given.pop("lr", None)
        arguments.check("hyperparameter", given, [*dict.fromkeys([*known, *own, *starts])])
        known.update(given)
        missing = [n for n, v in known.items() if v is None and (n == "lr" or n not in {*given, *OPTIONS})]
        if missing:
            raise TypeError(f"rule {rule.name!r} needs a value for {', '.join(missing)}.")
        labels = {n: n for n in known}
        for name, option in OPTIONS.items():
            if option.hyper is None:
                continue
            value = settings.get(name, option.default)
            if value is None:
                value = rule.defaults.get(name, option.fallback)
            if name == option.hyper.name or value is not None:
                known[option.hyper.name], labels[option.hyper.name] = value, name
        return (
            {n: table[n].normal(labels[n], v, population) for n, v in known.items()},
            {n: table[n].normal(n, v) for n, v in starts.items()},
        )

    def structural_names(self, table: Mapping[str, Hyper[Any]]) -> set[str]:
        """The hyperparameters on which the code of a step may depend: setting one may mean another kernel."""
        api = {part: h.name for h in table.values() for part in h.parts}
        names = {api.get(n, n) for n in self.rule.switches | BEFORE.switches}
        names |= {o.hyper.name for o in OPTIONS.values() if o.hyper is not None and o.flags}
        return names | {n for n, h in table.items() if h.kind == "flag" and n != "frozen"}

    def static_flags(
        self, uniforms: Sequence[Mapping[str, Any]], unscaled: bool
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """What is known when a kernel is built: values that are the same in all groups, and the switches that are on.

        Args:
            uniforms: for each configuration, the hyperparameters under the rule's names.
            unscaled: whether gradients are divided by a scale.

        Raises:
            ValueError: if settings do not go together, or the rule has no lr for a decay that is in proportion to it.
        """
        if self.check_class is not None:
            self.check_class(uniforms)
        rule = self.rule
        if not rule.takes_lr and "weight_decay" not in rule.hyperparameters:
            for u in uniforms:
                if u["decoupled_weight_decay"] and somewhere(u["weight_decay"]):
                    raise ValueError(
                        f"decoupled weight decay is in proportion to lr, which rule {rule.name!r} does not have. Use "
                        "decoupled_weight_decay=False, or let the rule take weight_decay itself."
                    )
        static: dict[str, Any] = {"scope": self.scope, "unscaled": unscaled, **dict.fromkeys(_FLAGS, False)}
        for option in OPTIONS.values():
            hyper = option.hyper
            for name, turns_on in option.flags.items():
                if hyper is None:
                    static[name] |= option.name in self.on
                else:
                    static[name] |= any(turns_on(u[hyper.name]) for u in uniforms if hyper.name in u)
        if not rule.takes_lr:
            static["lr"] = 0.0
        on = set()
        switches = rule.switches | BEFORE.switches
        for name in uniforms[0].keys() - {"frozen"}:
            values = [u[name] for u in uniforms]
            if isinstance(values[0], bool) and all(v is values[0] for v in values):
                static[name] = values[0]
            elif name in switches and not any(map(somewhere, values)):
                static[name] = 0.0
            elif name in switches and all(map(everywhere, values)):
                on.add(name)
        return static, frozenset(on)

    # Columns

    def roles(self, states: Iterable[str], starts: Mapping[str, float]) -> list[Role]:
        """The columns of a step, in order.

        Args:
            states: those of the staged rule, averages among them.
            starts: the numbers at which states of the rule begin, where it is not 0.
        """
        roles = [ROLES.get(name) or Role(name, starts_as=starts.get(name, 0.0)) for name in states]
        for option in OPTIONS.values():
            role = option.column
            if role is not None and not role.saved and option.name in self.on:
                value = getattr(self, option.name, None)  # of the shadow, its format
                roles.append(replace(role, format=value) if isinstance(value, str) else role)
        return sorted(roles, key=lambda role: (not role.saved, role.written))
