"""Stage a rule: give every expression a binding time and compute each as early as it can be.

    static    booleans, and switches that are zero everywhere    when the kernel is built
    uniform   hyperparameters, `t`, literals, what follows       once per step and group, in float64, by `decide`
    sum       `norm(x)` and `total(x)` over elements             by `measure`, in float64; then `decide` goes on
    element   `p`, `g`, the states and what follows              per element, in the compute dtype, by `update`

`Rule(function).stage({"amsgrad": False})` returns a `Staged` rule: the source of the functions and what they need.
Binding times pass through assignments. What is uniform inside an element expression is lifted into a slot of the tuple
`h` that `decide` returns, literals included, so that no float64 is left in a float32 loop; a division by something
uniform becomes a multiplication; conditionals on elements become selects; what is lifted out of a conditional keeps
its guard; literal integer powers become products and `**0.5` becomes `sqrt`.
"""

from __future__ import annotations

import ast
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .binding import Stager
from .language import After, Before, RuleError, Source, names_seen_by
from .staged import Staged, define
from .values import Constant

_Key: TypeAlias = tuple[Before | None, After | None, frozenset[str], tuple[tuple[str, str], ...]]

__all__ = ["After", "Before", "Rule", "RuleError", "Staged", "define"]


class Rule(Source):
    """An update rule: a plain function of one element, checked when it is wrapped and staged when a kernel is built.

    The function takes `p`, `g` and its states as positional arguments and everything that is the same for a whole
    group as keyword-only arguments, among them `lr` and, if they are wanted, `t` (the number of this update, from 1)
    and `base_lr` (the learning rate without the factor of an element, for state of the group).
    It returns the new `p`, then the new states in the same order. A rule whose steps do not follow a rate leaves `lr`
    out, and optimizers are built without one. Allowed are assignments, arithmetic, comparisons,
    conditionals and the functions of `kernels.primitives` under any of their names in `math`, NumPy or Python;
    `fastlr.norm(x)` and `fastlr.total(x)` sum over a leaf, or with `over="group"` or `over="all"` over more. A
    keyword-only argument that is returned by name after the states is state of the group, kept in float64; it starts
    at its default. Calling the rule runs the function as it stands.

    State of the group that follows from a sum over a group, or over all leaves, is shared by these leaves, including
    those that are left out of a step or added later. So it may not follow from `t` or from a sum over fewer leaves, and
    settings that enter state shared by all must be the same in all groups. State that is only returned, and never read,
    is exempt.

    Numbers that the function reads from its module or closure become part of the rule when it is wrapped. An optimizer
    is not built with a rule whose numbers have changed since; make what should change an argument.

    Args:
        function: the rule, in a file (its source is read).

    Raises:
        RuleError: if the source is missing or has something that cannot be staged, if a state is returned in the
            place of another, if `lr` is taken and not used, or if state shared by several leaves follows from what they
            do not have in common; the message names the line.

    Example:
        >>> def signed(p, g, m, *, lr, beta=0.9):
        ...     m = beta * m + (1 - beta) * g
        ...     return p - lr * (1.0 if m > 0 else -1.0), m
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.__module__ = function.__module__
        self._staged: dict[_Key, Staged] = {}
        self._check_order()
        flags = {name: value for name, value in self.defaults.items() if isinstance(value, bool)}
        # Every branch once, so that an error shows when the rule is written.
        variants = [flags, *({**flags, name: not flags[name]} for name in flags), {n: not v for n, v in flags.items()}]
        uses_lr = ["lr" in self.stage(variant).uniforms for variant in variants]
        if self.takes_lr and not any(uses_lr):
            raise RuleError(
                f"rule {self.name!r}, line {self.tree.lineno}: takes lr, but nothing that it returns follows from it. "
                "Use it, or leave it out of the arguments: then optimizers are built without lr."
            )

    def _check_order(self) -> None:
        """Check that no state is returned, by its name, where another belongs.

        Raises:
            RuleError: if one is.
        """
        expected = ("p", *self.states)
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Return) or not isinstance(node.value, ast.Tuple):
                continue
            names = [x.id if isinstance(x, ast.Name) else "" for x in node.value.elts]
            where = f"rule {self.name!r}, line {node.lineno}: returns"
            for name, own in zip(names[1:], self.states, strict=False):
                if name in self.states and name != own:
                    raise RuleError(
                        f"{where} {name!r} in the place of the state {own!r}. States are returned in the order of the "
                        f"arguments, {', '.join(expected)}; if it is meant, assign {own} = {name} before."
                    )
            index = expected.index(names[0]) if names[0] in self.states else 0
            if index and names[index : index + 1] == ["p"]:
                raise RuleError(
                    f"{where} {names[0]!r} in the place of the new p, and 'p' in that of {names[0]!r}. The order is "
                    f"that of the arguments: {', '.join(expected)}."
                )

    def check_constants(self) -> None:
        """Check that the numbers which the rule reads from its module or closure are those that it was made with.

        Raises:
            RuleError: if one has changed.
        """
        names = names_seen_by(self.function)
        for text, constant in self.constants.items():
            first, *rest = text.split(".")
            now = names.get(first, constant)
            for name in rest:
                now = getattr(now, name, constant)
            both_nan = now != now and constant != constant
            if now != constant and not both_nan:
                raise RuleError(
                    f"rule {self.name!r} was made with {text} = {constant!r}, which is {now!r} now. Numbers that a "
                    "rule reads are frozen when it is made: make the rule again, or make the number a keyword-only "
                    "argument."
                )

    def _scalars(self) -> tuple[str, ...]:
        returns = [node.value for node in ast.walk(self.tree) if isinstance(node, ast.Return)]
        last = returns[-1] if returns else None
        parts = last.elts if isinstance(last, ast.Tuple) else []
        keywords = {a.arg for a in self.tree.args.kwonlyargs}
        scalars = [x.id for x in parts[1 + len(self.states) :] if isinstance(x, ast.Name) and x.id in keywords]
        defaults = inspect.signature(self.function).parameters
        for name in scalars:
            start = defaults[name].default
            if isinstance(start, bool) or not isinstance(start, int | float):
                raise RuleError(
                    f"rule {self.name!r}, line {self.tree.lineno}: {name!r} is returned, so it is state of a group and "
                    "needs the number that it starts at as its default."
                )
        return tuple(scalars)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rule as ordinary Python, on numbers."""
        return self.function(*args, **kwargs)

    def __copy__(self) -> Rule:
        """The rule itself: nothing in it changes."""
        return self

    def __deepcopy__(self, memo: Any) -> Rule:
        """The rule itself."""
        return self

    def __reduce__(self) -> str:
        """By reference, as functions are pickled: the module and the name in it.

        Raises:
            pickle.PicklingError: if the rule cannot be imported from there.
        """
        scope = vars(sys.modules.get(self.__module__, ast))
        name = next((name for name in (self.name, *scope) if scope.get(name) is self), None)
        if name is None:
            raise pickle.PicklingError(
                f"rule {self.name!r} cannot be pickled: no name in module {self.__module__!r} stands for it. Write it "
                "at the top level of a module, under @fastlr.rule."
            )
        return name

    def __repr__(self) -> str:
        """The rule with its arguments."""
        return f"<rule {self.name}{inspect.signature(self.function)}>"

    def stage(
        self,
        static: Mapping[str, Constant] | None = None,
        *,
        before: Before | None = None,
        after: After | None = None,
        on: frozenset[str] = frozenset(),
    ) -> Staged:
        """Stage the rule for given static values.

        Args:
            static: hyperparameters whose value is known when the kernel is built; the others are uniform.
            before: what runs first on every element.
            after: what runs last on every element.
            on: switches that are nonzero in every group, so that the branch not taken does not exist.

        Returns:
            The staged rule; the same object for the same arguments.
        """
        static = static or {}
        key = (before, after, on, tuple(sorted((k, repr(v)) for k, v in static.items())))
        if key not in self._staged:
            self._staged[key] = Stager(self, static, on).run(before, after)
        return self._staged[key]

    def _by_default(self) -> Staged:
        return self.stage({k: v for k, v in self.defaults.items() if isinstance(v, bool)})

    def show(self) -> None:
        """Print the code staged for the defaults."""
        self._by_default().show()

    @property
    def sums_anything(self) -> bool:
        """Whether it sums over elements, so that state of the group can follow from gradients."""
        return bool(self._by_default().sums)
