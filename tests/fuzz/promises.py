"""What came of inputs: counted by outcome; a broken promise with what to run to see it again."""

from __future__ import annotations

import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fastlr

_LONGEST = 3000  # characters of a message; five hundred numbers are more
_EXAMPLES = 3  # of each sign
_PATIENCE_S = 60.0  # of processor time for one input, a compilation included; others take a tenth of a second

_ADDRESS = re.compile(rb"0x[0-9a-f]+")  # of a function in its repr

Trial = Callable[[random.Random], Iterator[str]]


class BrokenPromiseError(Exception):
    """Something else than what was promised.

    Args:
        sign: what is wrong, in the same words for all inputs of one kind.
        how: the input, as code.
    """

    def __init__(self, sign: str, how: str) -> None:
        super().__init__(f"{sign}: {how}")
        self.sign, self.how = sign, how


@dataclass
class Report:
    """What came of the inputs of one kind.

    Attributes:
        kind: of input.
        seed: of all of them.
        first: index of the first, and of the one after the last.
        outcomes: how many inputs had each.
        broken: by sign, how many there were, and of the first few the index and how it looks.
    """

    kind: str
    seed: int
    first: int
    after: int
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """How many there were."""
        return sum(self.outcomes.values())

    def add_broken(self, sign: str, index: int, how: str) -> None:
        """Note a broken promise."""
        self.outcomes["NOT PROMISED"] += 1
        self._count(sign, 1, [(index, how)])

    def _count(self, sign: str, count: int, examples: list[Any]) -> None:
        entry = self.broken.setdefault(sign, [0, []])
        entry[0] += count
        entry[1] = (entry[1] + examples)[:_EXAMPLES]

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what another process has seen, as `asdict` has it."""
        self.after = max(self.after, other["after"])
        self.outcomes.update(other["outcomes"])
        for sign, (count, examples) in other["broken"].items():
            self._count(sign, count, examples)

    def asdict(self) -> dict[str, Any]:
        """As plain data."""
        return {"after": self.after, "outcomes": dict(self.outcomes), "broken": self.broken}

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        lines = [f"{self.kind}: {self.inputs:,} inputs (seed {self.seed}): {counts}"]
        for sign, (count, examples) in sorted(self.broken.items(), key=lambda item: -item[1][0]):
            lines.append(f"  {count:,} x {sign}")
            lines += [f"      --only {self.kind} --seed {self.seed} --index {index}: {how}" for index, how in examples]
        return "\n".join(lines)


def run(
    kind: str,
    trial: Trial,
    seed: int,
    first: int = 0,
    *,
    inputs: float = float("inf"),
    until: float = float("inf"),
    indices: float = float("inf"),
    on_index: Callable[[int], None] = lambda index: None,
) -> Report:
    """Make trials until there are enough inputs, or time is up.

    Args:
        kind: of input.
        trial: makes one or several inputs from random numbers, and yields what came of each; ends by itself, or by
            `BrokenPromiseError`. `StopIteration` before anything was yielded means that there are no more.
        seed: of the whole run.
        first: index of the first trial.
        inputs: how many, at least.
        until: the time (`time.monotonic`) after which none is begun.
        indices: how many trials, at most.
        on_index: called before each trial.
    """
    report = Report(kind, seed, first, first)
    while report.inputs < inputs and time.monotonic() < until and report.after - first < indices:
        index = report.after
        on_index(index)
        r = random.Random(f"{kind} {seed} {index}")
        r.index = index  # type: ignore[attr-defined]
        before = report.inputs
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", DeprecationWarning)  # of other libraries' arrays, for NumPy
                began = time.process_time()
                for outcome in trial(r):
                    report.outcomes[outcome] += 1
                    if time.process_time() - began > _PATIENCE_S and index > first:  # the first makes what all need
                        raise BrokenPromiseError("slow", f"{time.process_time() - began:.1f} s")
                    began = time.process_time()
        except BrokenPromiseError as broken:
            report.add_broken(broken.sign, index, broken.how)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = "".join(traceback.format_exception(error)).strip().replace("\n", "\n      ")
            report.add_broken(f"unexpected {type(error).__name__} in {where.name}", index, text)
        report.after += 1
        if report.inputs == before:
            break
    return report


def refusal(error: BaseException, how: str, *more: type[BaseException], where: str = "") -> str:
    """The outcome for an error that is promised: its type.

    Args:
        error: that was raised.
        how: the input.
        more: types allowed beside TypeError and ValueError.
        where: what the input is about, for the sign.
    """
    kind = type(error)
    if kind not in (TypeError, ValueError, *more) and not kind.__module__.startswith("fastlr"):
        raise BrokenPromiseError(f"{kind.__name__} {where}", f"{how}  ->  {_short(error)}") from error
    if not str(error) and kind not in more:
        raise BrokenPromiseError(f"{kind.__name__} without a message {where}", how) from error
    if len(str(error)) > _LONGEST:
        raise BrokenPromiseError("a message of thousands of characters", f"{how}  ->  {str(error)[:60]}") from error
    return f"refused ({kind.__name__})"


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "fastlr" in f.filename or "kernels" in f.filename), frames[-1])
    place = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
    return f"{type(error).__name__}: {str(error)[:160]} ({place})"


# What is compared bit for bit.


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of parameters, with their paths."""
    if isinstance(tree, Mapping):
        for key in tree:
            yield from leaves(tree[key], f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for key, part in enumerate(tree):
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    elif tree is not None:
        yield path, tree


def tree_map(function: Callable[[str, np.ndarray], Any], tree: Any, path: str = "") -> Any:
    """A tree of dicts and lists with every leaf put through a function; a `FlatBuffer` becomes a dict of its leaves."""
    if isinstance(tree, fastlr.FlatBuffer):
        return {key: function(key, tree[key]) for key in tree}
    if isinstance(tree, dict):
        return {k: tree_map(function, part, f"{path}.{k}" if path else str(k)) for k, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(tree_map(function, part, f"{path}.{k}" if path else str(k)) for k, part in enumerate(tree))
    return None if tree is None else function(path, tree)


def bits(opt: fastlr.Optimizer) -> dict[str, Any]:
    """Parameters, states, averages, copies, counters, hyperparameters, loss scale: everything that can be compared."""
    out: dict[str, Any] = {f"params.{path}": leaf.tobytes() for path, leaf in leaves(opt.params)}
    state = opt.state_dict()
    out["fastlr"] = _ADDRESS.sub(b"", state.pop("fastlr").tobytes())
    out.update({key: (value.shape, value.tobytes()) for key, value in state.items()})
    if getattr(opt, "shadow", None) is not None:
        out.update({f"shadow.{path}": np.asarray(leaf).tobytes() for path, leaf in leaves(opt.shadow)})
    return out


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What differs between two such dicts, in words; empty if nothing does."""
    return ", ".join(str(k) for k in {**a, **b} if a.get(k) != b.get(k))[:200]
