"""The throughput report: fastlr beside NumPy, PyTorch and the speed of this machine's memory, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Competitor", "add", "run"]


@dataclass(frozen=True)
class Competitor:
    """An implementation that a user added; see `add`."""

    name: str
    setup: Callable[[int, str], Any]
    step: Callable[[Any], Any]
    bytes_per_param: float
    rules: tuple[str, ...] | None


competitors: list[Competitor] = []


def add(
    name: str,
    setup: Callable[[int, str], Any],
    step: Callable[[Any], Any],
    bytes_per_param: float,
    rules: Sequence[str] | None = None,
) -> None:
    """Add an implementation of your own to the report.

    Args:
        name: what to call it in the table.
        setup: `setup(n, dtype)` makes whatever a step needs for `n` parameters; dtype is "float32" or "float64".
        step: `step(what setup returned)` makes one step, and returns when it is done.
        bytes_per_param: bytes that a step moves per parameter, for the column GB/s.
        rules: the rules beside which it is measured, such as `["adam"]`; default all.

    Raises:
        ValueError: if the name is taken.

    Example:
        >>> import numpy as np, fastlr
        >>> fastlr.bench.add("copy", lambda n, dtype: np.zeros((2, n), dtype), lambda a: np.copyto(a[0], a[1]), 8)
        >>> rows = fastlr.bench.run(rules=["sgd"], sizes=[1000], seconds=0.1, quiet=True)
        >>> sorted({row["impl"] for row in rows} & {"copy", "fastlr", "numpy"})
        ['copy', 'fastlr', 'numpy']
    """
    if name in {"fastlr", "numpy", "numpy_passes", "torch_fused", "authors", "roofline"} or any(
        c.name == name for c in competitors
    ):
        raise ValueError(f"there is an implementation called {name!r} already. Choose another name.")
    competitors.append(Competitor(name, setup, step, bytes_per_param, None if rules is None else tuple(rules)))


def run(
    rules: Sequence[str] | None = None,
    sizes: Sequence[int] = (1_000, 10_000, 1_000_000, 25_000_000),
    dtypes: Sequence[str] = ("float32",),
    leaves: Sequence[int] = (1,),
    threads: int | None = None,
    in_loop: bool = False,
    seconds: float = 3.0,
    quiet: bool = False,
    step: str = "update",
) -> list[dict[str, Any]]:
    """Measure every implementation, alternating in one run.

    Args:
        rules: names of optimizers in lower case; default all.
        sizes: numbers of parameters.
        dtypes: "float32", "float64" or both.
        leaves: into how many separate arrays the parameters are cut; 1 is one flat array.
        threads: threads for each implementation; default `fastlr.get_num_threads()`.
        in_loop: measure between matrix products, and what the step does to them, instead of alone.
        seconds: about how long to measure each rule, size and dtype.
        quiet: show no progress.
        step: "update": the optimizers alone. "full": AdamW with clipping, moving average, bfloat16 copy and clearing,
            beside the separate calls of PyTorch and of Optax. "options": AdamW with each option by itself. "target":
            Adam with clipping and a target network's average.

    Returns:
        One dict per measured implementation, as `fastlr bench --json` writes them.

    Raises:
        TypeError: if a kind of step is not known.
        ValueError: if a rule or dtype is not known, or does not go with the kind of step.
        RuntimeError: if an implementation's answer is wrong; nothing wrong is timed.
    """
    from . import measuring

    return measuring.run(rules, sizes, dtypes, leaves, threads, in_loop, seconds, quiet, step)
