"""Carry out staged schedules: for one step, for arrays of steps, and for the models of a population."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import checks
from ..checks import shown
from ..kernels import functions as known
from ..kernels.staging import define
from .staging import HasEquation, Memory, Number, staged

__all__ = ["StagedSchedule"]

_BLOCK = 16_384  # steps evaluated at once, which stay in the cache


_SCALAR = known.for_steps(known.IN_SCHEDULES)


class _Select(ast.NodeTransformer):
    """Write conditional expressions as calls of `where`, for arrays."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return ast.Call(ast.Name("where", ast.Load()), [node.test, node.body, node.orelse], [])


def _over_arrays(source: str, functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function `value` of a source, over arrays, with functions of the user's."""
    tree = _Select().visit(ast.parse(source))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return define(ast.unparse(tree), "value", {**known.for_arrays_of_steps(called - {*functions}), **functions})


@functools.lru_cache(4096)
def _for_steps(source: str) -> Callable[..., Any]:
    """The function `value` of a source, for one step."""
    return define(source, "value", _SCALAR)


@functools.lru_cache(4096)
def _for_arrays(source: str) -> Callable[..., Any]:
    """The function `value` of a source, over arrays."""
    return _over_arrays(source, {})


def _checked(function: Callable[..., Any], population: int | None, per_model: bool) -> Callable[[Any], Any]:
    """A function of the user's as a schedule calls it: with an int, and what it returns is checked.

    Args:
        function: the user's.
        population: number of models, if it is known.
        per_model: whether it may return one number for each model.
    """
    called = f"the function {getattr(function, '__qualname__', None) or shown(function)}"

    def call(n: Any) -> Any:
        step = int(n)
        try:
            returned = function(step)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"This was raised by {called}, which a hyperparameter follows, at step {step}.")
            raise
        if type(returned) is float:
            return returned
        wanted = "a number"
        if per_model:
            wanted += " or one for each model" + ("" if population is None else f", an array ({population},)")
        start = f"{called} must return {wanted}, but at step {step} it returned"
        try:
            array = checks.reals("it", returned)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{start} {shown(returned)}.") from None
        if array.ndim == 0:
            return float(array)
        if not per_model or array.ndim > 1 or population not in (None, len(array)):
            hint = "" if per_model else " Only a population takes one number for each model: see fastlr.flatten."
            raise ValueError(f"{start} an array of shape {array.shape}.{hint}")
        return array

    return call


def _all_models(value: Callable[..., Any], population: int | None, n: float, numbers: tuple[Number, ...]) -> Any:
    """A step's values for all models, or the one that is the same for all."""
    arrays = tuple(np.array(x) if isinstance(x, tuple) else x for x in numbers)
    with np.errstate(all="ignore"):
        values = np.asarray(value(n, arrays), np.float64)
    if values.ndim == 0:
        return float(values) if population is None else np.full(population, float(values))
    return values


class StagedSchedule:
    """A schedule as one function of the step and its numbers.

    Args:
        schedule: has an equation.
        prefix: of the names in the source, as for `staging.staged`.
        first: the index in `p` of its first number.

    Attributes:
        source: the function `value(n, p)`.
        lines: of its body.
        numbers: what `p` holds: one number, or one for each model.
        functions: the user's functions that it calls, by the names in the source.
        memories: each `Memory` among the numbers: its owner and its index.
        models: how many models there is a number for, or None.
        per_model: whether its value may be one for each model: functions of the user's can tell models apart.
        scalar: the value of one step, as `scalar(n, numbers)` of a float `n`, if it is one number for all models.

    Raises:
        ValueError: if one number has more models than another.
    """

    def __init__(self, schedule: HasEquation, prefix: str = "", first: int = 0) -> None:
        program, leaves = staged(schedule, prefix, first)
        numbers, self.functions = program.fill(leaves)
        self.source, self.lines = program.source, program.lines
        self.memories = [(x.owner, k) for k, x in enumerate(numbers) if isinstance(x, Memory)]
        starts = (x.start if isinstance(x, Memory) else x for x in numbers)
        self.numbers: tuple[Number, ...] = tuple(x if isinstance(x, tuple) else float(x) for x in starts)
        counts = sorted({len(x) for x in self.numbers if isinstance(x, tuple)})
        if len(counts) > 1:
            raise ValueError(
                f"a schedule has numbers for {' and for '.join(map(str, counts))} models. Give one number for all, or "
                "one for each model."
            )
        self.models = counts[0] if counts else None
        self.per_model = self.models is not None or bool(self.functions)
        self.scalar = _for_steps(self.source)
        if self.functions:
            checked = {name: _checked(function, None, False) for name, function in self.functions.items()}
            self.scalar = define(self.source, "value", {**_SCALAR, **checked})
        self._for_population: dict[int | None, Callable[..., Any]] = {}

    def over_steps(self, steps: np.ndarray) -> np.ndarray:
        """The values of an array of steps, if they are one for all models and no functions of the user's take part.

        Args:
            steps: integers (n,).
        """
        out, value = np.empty(steps.shape), _for_arrays(self.source)
        with np.errstate(all="ignore"):
            for first in range(0, steps.size, _BLOCK):
                part = slice(first, first + _BLOCK)
                out[part] = value(steps[part].astype(np.float64), self.numbers)
        return out

    def for_models(self, population: int | None) -> Callable[..., Any]:
        """What gives one step's values, as `f(n, numbers)`: those of all models, or one for all."""
        if population not in self._for_population:
            checked = {name: _checked(function, population, True) for name, function in self.functions.items()}
            value = _over_arrays(self.source, checked) if checked else _for_arrays(self.source)
            self._for_population[population] = functools.partial(_all_models, value, population)
        return self._for_population[population]
