"""The language of rules: reading a function's source, and what may stand in it."""

from __future__ import annotations

import ast
import inspect
import reprlib
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .functions import RESERVED


class RuleError(ValueError):
    """A rule that cannot be staged; the message names the line."""


class Source:
    """A function in the language of rules: its syntax tree, the names that it sees, and its arguments.

    Attributes:
        function: the function.
        name: its name.
        tree: its syntax tree.
        globals: the names that it sees.
        positional: its positional arguments.
        states: those after the first two.
        scalars: state of a group: keyword-only arguments that are returned after the states.
        hyperparameters: the other keyword-only arguments that users set.
        counts: whether it takes `t`.
        takes_lr: whether it takes `lr` or `base_lr`.
        constants: the numbers that it reads from its module or closure, noted when it is staged.
        defaults: of its keyword-only arguments, without `t`.
        switches: the hyperparameters that a conditional tests by their bare name: where such a one is zero everywhere,
            the branch does not exist.
    """

    first: ClassVar[dict[str, str]] = {"p": "parameter", "g": "gradient"}  # how the positional arguments begin

    def __init__(self, function: Callable[..., Any]) -> None:
        if not inspect.isfunction(function):
            raise RuleError(f"a rule must be a function written with `def`, got {reprlib.repr(function)}.")
        self.function = function
        self.name = self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.tree, self.globals = parse(function)
        arguments = self.tree.args
        if arguments.vararg or arguments.kwarg or arguments.defaults:
            raise RuleError(
                f"rule {self.name!r}, line {self.tree.lineno}: take p, g and the states as plain positional arguments "
                "and the rest as keyword-only arguments, without *args, **kwargs or positional defaults."
            )
        self.positional = tuple(a.arg for a in arguments.posonlyargs + arguments.args)
        if self.positional[:2] != tuple(self.first):
            expected = " and ".join(f"{name} ({meaning})" for name, meaning in self.first.items())
            raise RuleError(
                f"rule {self.name!r}, line {self.tree.lineno}: the first two arguments must be {expected}, "
                f"got {', '.join(self.positional[:2]) or 'none'}."
            )
        if "lr" in self.positional:
            raise RuleError(
                f"rule {self.name!r}, line {self.tree.lineno}: 'lr' stands before the *, where the states of each "
                f"element are. Hyperparameters are keyword-only: def {self.name}(p, g, *, lr), with the states after g."
            )
        self.states = self.positional[2:]
        self.scalars = self._scalars()
        not_set = {"t", "base_lr", *self.scalars}  # by the user
        self.hyperparameters = tuple(a.arg for a in arguments.kwonlyargs if a.arg not in not_set)
        self.counts = any(a.arg == "t" for a in arguments.kwonlyargs)
        self.takes_lr = any(a.arg in ("lr", "base_lr") for a in arguments.kwonlyargs)
        self.constants: dict[str, bool | int | float] = {}  # that it reads from its module or closure
        stores = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        for name, line in [(a.arg, a.lineno) for a in ast.walk(arguments) if isinstance(a, ast.arg)] + [
            (n.id, n.lineno) for n in stores
        ]:
            if name in RESERVED:
                raise RuleError(
                    f"rule {self.name!r}, line {line}: {name!r} is the name of a function that staged code calls; "
                    "call the variable something else."
                )
        self.defaults = {
            name: p.default
            for name, p in inspect.signature(function).parameters.items()
            if p.default is not p.empty and name != "t"
        }
        self.switches = frozenset(
            node.test.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Name)
        ) & set(self.hyperparameters)

    def _scalars(self) -> tuple[str, ...]:
        """Keyword-only arguments that are returned, by name, after the states: state of a group, not of an element."""
        return ()


class Before(Source):
    """What runs on every element before any rule: `(p, g, inputs..., *, ...) -> p, g, lr, reports...`.

    A report is shown to users under the name of the variable that is returned.
    """

    @property
    def reports(self) -> tuple[str, ...]:
        """The names of what is reported."""
        last = self.tree.body[-1]
        assert isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple)
        return tuple(ast.unparse(part) for part in last.value.elts[3:])


class After(Source):
    """What runs on every element after any rule: `(p, start, inputs and averages..., *, ...) -> p, averages...`."""

    first: ClassVar[dict[str, str]] = {"p": "parameter after the rule", "start": "parameter before the step"}


def parse(function: Callable[..., Any]) -> tuple[ast.FunctionDef, Mapping[str, Any]]:
    """The syntax tree of a function and the names that it sees."""
    name = getattr(function, "__name__", repr(function))
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        if function.__globals__.get("__package__") == __package__:
            raise ImportError(
                "fastlr reads the source of its own rules: install it with its .py files, which are missing here."
            ) from None
        raise RuleError(
            f"the source of rule {name!r} cannot be read: Python keeps none of exec's code and, before 3.13, none of "
            "what is typed at its prompt or passed with -c. Define the rule with `def` in a file or a notebook cell."
        ) from None
    try:
        node = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except SyntaxError:
        node = None
    if not isinstance(node, ast.FunctionDef):
        raise RuleError(f"line {first}: rule {name!r} must be a function written with `def`, not a lambda or a class.")
    ast.increment_lineno(node, first - 1)
    code, arguments = function.__code__, node.args
    names = tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    if node.name != code.co_name or names != code.co_varnames[: len(names)]:
        raise RuleError(
            f"the source found for rule {name!r}, in line {first} of {code.co_filename}, is that of another function: "
            "it is wrapped by a decorator, or the file has changed since. Use the function itself; import it again."
        )
    return node, names_seen_by(function)


def names_seen_by(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The names that a function sees in its module, its closure and among the builtins, as they are now."""
    closure = inspect.getclosurevars(function)
    return {**closure.builtins, **function.__globals__, **closure.nonlocals}
