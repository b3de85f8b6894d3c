"""Pictures of schedules and of range tests, and the language in which the command line names schedules."""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import checks, schedules
from .checks import shown
from .schedules import Schedule

__all__ = ["draw", "parse", "plot"]

_METHODS = ("warmup", "then", "clip", "shift", "repeat", "per_epoch")
_LONGEST, _DEEPEST = 10_000, 50  # of expressions
_HIGHEST = 1e300  # higher values cannot be scaled to a picture
_NOT_NAMED = ("Function", "Schedule")  # a user's function cannot be written on a command line


def named() -> dict[str, type[Schedule]]:
    """The schedules that an expression can name."""
    return {name: getattr(schedules, name) for name in schedules.__all__ if name not in _NOT_NAMED}


def parse(expression: str) -> Schedule:
    """The schedule that an expression names, such as `Cosine(1e-3, steps=10_000).warmup(500)`.

    It can name schedules, numbers, strings and the methods of schedules, and nothing else; no code is executed.

    Args:
        expression: as it would be written in Python after `from fastlr.schedules import *`; at most 10,000 characters,
            nested at most 50 deep.

    Raises:
        ValueError: if it is something else; the message says what.
        TypeError: if an argument is of the wrong kind.

    Example:
        >>> from fastlr.plots import parse
        >>> parse("0.5 * Cosine(1e-3, steps=100).warmup(10)")(9)
        0.0005
    """
    tree = _tree(expression)

    def refuse(node: ast.AST, why: str) -> NoReturn:
        raise ValueError(
            f"{shown(ast.unparse(node))} {why}. An expression names schedules and numbers and nothing else."
        )

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() | bool()):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(value(part) for part in parts)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                a, b = value(left), value(right)
                if not isinstance(a, Schedule) and not isinstance(b, Schedule):
                    refuse(node, "multiplies no schedule")
                if any(isinstance(x, str | bool) for x in (a, b)):
                    refuse(node, "multiplies a schedule by what is no number")
                return a * b
            case ast.Call(func=ast.Name(id=name)):
                known = named()
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1)
                    hint = f"; did you mean {close[0]}" if close else f"; there are {', '.join(sorted(known))}"
                    refuse(node, f"calls {shown(name)[1:-1]}, which is no schedule{hint}")
                return call(known[name], node)
            case ast.Call(func=ast.Attribute(value=inner, attr=name)):
                schedule = value(inner)
                if not isinstance(schedule, Schedule) or name not in _METHODS:
                    refuse(node, f"asks for {shown(name)}, which is not one of {', '.join(_METHODS)}")
                return call(getattr(schedule, name), node)
        refuse(node, "cannot stand here")

    def call(function: Any, node: ast.Call) -> Schedule:
        if any(k.arg is None for k in node.keywords) or any(isinstance(a, ast.Starred) for a in node.args):
            refuse(node, "unpacks something")
        if len({k.arg for k in node.keywords}) < len(node.keywords):
            refuse(node, "gives an argument twice")
        arguments = [value(a) for a in node.args]
        keywords = {str(k.arg): value(k.value) for k in node.keywords}
        try:
            schedule: Schedule = function(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{shown(ast.unparse(node))}: {str(error).replace('__init__() ', '')}") from None
        return schedule

    schedule = value(tree)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"{shown(expression)} is no schedule. Try Cosine(1e-3, steps=1000).")
    return schedule


def _tree(expression: str) -> ast.expr:
    """The syntax tree of an expression that is neither too long nor too deep.

    Raises:
        ValueError: if it is too long or too deep, or not an expression.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression has at most {_LONGEST:,} characters, got {len(expression):,}.")
    too_deep = f"{shown(expression)} is nested more than {_DEEPEST} deep. Make it simpler."
    try:
        with warnings.catch_warnings():  # of Python, about backslashes and the like
            warnings.simplefilter("ignore")
            tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{shown(expression)} is not an expression: {error.msg}.") from None
    except (RecursionError, MemoryError):
        raise ValueError(too_deep) from None
    except ValueError as error:  # characters that no source can have
        raise ValueError(f"{shown(expression)} is not an expression: {error}.") from None
    level: list[ast.AST] = [tree]
    for _ in range(2 * _DEEPEST):  # a call of a method is two levels
        level = [inner for node in level for inner in ast.iter_child_nodes(node)]
    if level:
        raise ValueError(too_deep)
    return tree


def _need(module: str) -> Any:
    try:
        return __import__(module, fromlist=["x"])
    except ImportError:
        package = module.split(".")[0]
        raise ImportError(f'a picture needs {package}: pip install "fastlr-kernels[plot]".') from None


def draw(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | Path | None, **labels: str) -> None:
    """Draw curves.

    Args:
        curves: name to x and y.
        path: a file ending in .png, .svg or .pdf; None: in the terminal.
        labels: `title`, `xlabel`, `ylabel`; `xscale`, `yscale` "log" or "linear".

    Raises:
        ImportError: if matplotlib, or plotext for the terminal, is missing.
        ValueError: if the ending is another.
    """
    if path is None:
        show(curves, **labels)
        return
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{checks.shown(str(path))} must end in .png, .svg or .pdf.")
    figure_module, agg = _need("matplotlib.figure"), _need("matplotlib.backends.backend_agg")
    figure = figure_module.Figure(figsize=(7, 3.5), layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, linewidth=1.5)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    if 1 < len(curves) <= 20:
        axes.legend(fontsize="small")
    # The same file for the same picture: no date, no random names of parts.
    _need("matplotlib").rcParams["svg.hashsalt"] = "fastlr"
    date = {"Date": None} if Path(path).suffix == ".svg" else {}
    figure.savefig(path, metadata=date)


def show(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], **labels: str) -> None:
    """Draw curves in the terminal; see `draw`."""
    terminal = _need("plotext")
    terminal.clear_figure()
    terminal.theme("clear")
    terminal.plot_size(100, 25)
    for name, (x, y) in curves.items():
        terminal.plot(x.tolist(), y.tolist(), label=name if len(curves) > 1 else None)
    if "title" in labels:
        terminal.title(labels["title"])
    for axis in ("x", "y"):
        if f"{axis}label" in labels:
            getattr(terminal, f"{axis}label")(labels[f"{axis}label"])
        if labels.get(f"{axis}scale") == "log":
            getattr(terminal, f"{axis}scale")("log")
    terminal.show()


def plot(drawn: Sequence[Schedule], path: str | Path | None = None, steps: int | None = None) -> None:
    """Draw schedules.

    Args:
        drawn: the schedules.
        path: a file ending in .png, .svg or .pdf; None: in the terminal.
        steps: how many; default: as many as it takes to see what they do.

    Raises:
        ValueError: if `steps` is not positive, or the ending is another.
        ImportError: if matplotlib, or plotext for the terminal, is missing.
    """
    last = max(schedule.extent() for schedule in drawn) if steps is None else checks.count("steps", steps)
    n = np.unique(np.linspace(0, min(last, checks.COUNTABLE), 2001).astype(np.int64))
    curves = {}
    for schedule in drawn:
        name = shown(schedule)
        values = schedule(n)
        for model, y in enumerate(values.reshape(len(n), -1).T):
            fits = y < _HIGHEST
            curves[f"{name}[{model}]" if values.ndim > 1 else name] = (n[fits], y[fits])
    labels = {"xlabel": "step", "ylabel": "value"}
    if len(drawn) == 1:
        labels["title"] = shown(drawn[0])
    draw(curves, path, **labels)
