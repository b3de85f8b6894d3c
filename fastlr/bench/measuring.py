"""Measuring: candidates take turns round by round, each checked before it is timed."""

from __future__ import annotations

import datetime
import gc
import itertools
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import checks
from ..info import cpu_name, versions
from ..optimizer import Optimizer
from ..step.threads import get_num_threads
from . import Competitor, competitors, steps
from . import candidates as c
from .report import progress

# Before each turn, long enough for the other libraries' threads to stop spinning; then steps that are not counted.
_SETTLE_S = 0.02
_WARM_STEPS = 3
KINDS = ("update", "full", "options", "target")
_PRODUCT = 512  # rows and columns of the matrices in a loop
_Key = TypeVar("_Key")
_Sample = TypeVar("_Sample")


def turn(step: Callable[[], Any], seconds: float = 0.03) -> list[float]:
    """Seconds that a step took each time in one turn of its candidate, which lasts about so long."""
    time.sleep(_SETTLE_S)
    for _ in range(_WARM_STEPS):
        step()
    out: list[float] = []
    total = 0.0
    while len(out) < 3 or (total < seconds and len(out) < 2_000):
        began = time.perf_counter()
        step()
        out.append(time.perf_counter() - began)
        total += out[-1]
    return out


def alternate(turns: Mapping[_Key, Callable[[], Sequence[_Sample]]], seconds: float) -> dict[_Key, list[list[_Sample]]]:
    """What candidates took, round by round: each has its turn in each of five rounds or more.

    Args:
        turns: by candidate, what times one turn of it and returns its samples.
        seconds: about how long to go on.
    """
    rounds: dict[_Key, list[list[_Sample]]] = {key: [] for key in turns}
    began = time.perf_counter()
    while len(next(iter(rounds.values()))) < 5 or time.perf_counter() - began < seconds:
        for key, take_turn in turns.items():
            rounds[key].append(list(take_turn()))
    return rounds


def relative(rounds: Mapping[str, list[list[float]]], name: str) -> dict[str, float]:
    """A candidate beside fastlr, compared within each round: a machine's speed can drift while it is measured."""
    own, other = (np.array([np.median(times) for times in rounds[n]]) for n in ("fastlr", name))
    return {"relative": float(np.median(other / own)), "added_s": float(np.median(other - own))}


def check(
    problem: c.Problem,
    build: Callable[[c.Problem], c.Candidate | None],
    name: str,
    refer: Callable[[c.Problem], c.Candidate],
) -> None:
    """Compare a candidate with the reference after a few steps on a small problem.

    Raises:
        RuntimeError: if they differ by more than rounding; in the case of fastlr, by a bit.
    """
    small = c.Problem(problem.rule, min(problem.n, 10_007), min(problem.leaves, 7), problem.dtype, problem.threads)
    reference = refer(small)
    candidate = build(small)
    if candidate is None or candidate.params is None:
        return
    for _ in range(5):
        reference.step()
        candidate.step()
    assert reference.params is not None
    a, b = reference.params(), candidate.params()
    if name.startswith(("fastlr", "+")):
        good = np.array_equal(a, b)
    else:
        good = np.allclose(a, b, rtol=0, atol=2e-5 if problem.dtype == "float32" else 1e-12)
    if not good:
        raise RuntimeError(f"{name} does not agree with the reference on {problem.rule}: by {np.abs(a - b).max():.3g}.")


def _builders(
    problem: c.Problem, states: int, with_numpy: bool
) -> dict[str, Callable[[c.Problem], c.Candidate | None]]:
    out: dict[str, Callable[[c.Problem], c.Candidate | None]] = {
        "fastlr": c.fastlr_candidate,
        "torch_fused": c.torch_candidate,
        "authors": c.authors_candidate,
    }
    if with_numpy:
        out["numpy"] = c.numpy_candidate
        if problem.rule in c.BY_HAND and problem.n > c.BLOCK:
            out["numpy_passes"] = partial(c.numpy_candidate, block=None)
    out["roofline"] = partial(c.roofline_candidate, states=states)
    for competitor in competitors:
        if competitor.rules is None or problem.rule in competitor.rules:
            out[competitor.name] = partial(_competing, competitor)
    return out


def _competing(competitor: Competitor, problem: c.Problem) -> c.Candidate:
    """A user's implementation."""
    return c.Candidate(partial(competitor.step, competitor.setup(problem.n, problem.dtype)))


def _environment() -> dict[str, Any]:
    """What every row says about where it was measured."""
    commit = None
    root = Path(__file__).parents[2]
    # A checkout of fastlr, not an installation inside somebody else's.
    if (root / ".git").exists() and shutil.which("git"):
        git = ["git", "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    python = platform.python_version()
    return {"commit": commit, "date": now, "cpu": cpu_name(), "python": python, "versions": versions()}


def run(
    rules: Sequence[str] | None,
    sizes: Sequence[int],
    dtypes: Sequence[str],
    leaves: Sequence[int],
    threads: int | None,
    in_loop: bool,
    seconds: float,
    quiet: bool,
    step: str,
) -> list[dict[str, Any]]:
    """See `fastlr.bench.run`."""
    checks.choices("step", [step], KINDS)
    if step != "update":
        only = (steps.TARGET if step == "target" else steps.FULL).make.__name__.lower()
        if (rules is not None and list(rules) != [only]) or list(dtypes) != ["float32"] or in_loop:
            raise ValueError(f"step {step!r} is measured for {only} in float32, alone. Leave out the other choices.")
        rules = [only]
    rules = list(c.RULES) if rules is None else [r.lower() for r in rules]
    for kind, given, known in (("rule", rules, c.RULES), ("dtype", dtypes, checks.DTYPES)):
        unknown = [x for x in given if x not in known]
        if unknown:
            raise ValueError(f"{kind} {unknown[0]!r} is not known; there are {', '.join(known)}.")
    count = get_num_threads() if threads is None else checks.count("threads", threads)
    problems = [
        c.Problem(r, n, k, d, count)
        for r in rules
        for d in dtypes
        for n in sizes
        for k in leaves
        if k == 1 or k * 10 <= n
    ]
    if not problems:
        raise ValueError(
            "nothing to measure: each leaf must have ten parameters or more. Choose other sizes or leaves."
        )
    environment = _environment()
    rows: list[dict[str, Any]] = []
    for problem in progress(problems, quiet):
        measure = partial(_measure_step, step) if step != "update" else _measure_in_loop if in_loop else _measure
        rows += [{**row, **environment} for row in measure(problem, seconds)]
        gc.collect()
    return rows


def _probe(problem: c.Problem) -> Optimizer:
    """The optimizer of a problem, on one parameter."""
    return c.RULES[problem.rule](np.zeros(1, problem.dtype), **c.SETTINGS.get(problem.rule, {}))


def _prepare(problem: c.Problem, with_numpy: bool) -> tuple[dict[str, c.Candidate], int]:
    states = len(_probe(problem).state)
    ready = {}
    for name, build in _builders(problem, states, with_numpy).items():
        check(problem, build, name, partial(c.fastlr_candidate, backend="numpy"))
        candidate = build(problem)
        if candidate is not None:
            ready[name] = candidate
    return ready, states


def _measure(problem: c.Problem, seconds: float) -> Iterator[dict[str, Any]]:
    ready, states = _prepare(problem, with_numpy=True)
    yield from _rows(problem, "alone", ready, {name: _moved(problem, name, states) for name in ready}, seconds)


def _rows(
    problem: c.Problem, mode: str, ready: Mapping[str, c.Candidate], moved: Mapping[str, float], seconds: float
) -> Iterator[dict[str, Any]]:
    """Time candidates; a row for each."""
    rounds = alternate({name: partial(turn, candidate.step) for name, candidate in ready.items()}, seconds)
    for name, candidate in ready.items():
        samples = list(itertools.chain(*rounds[name]))
        yield {**_row(problem, name, mode, samples, moved[name], candidate.compile_s), **relative(rounds, name)}


def _measure_step(kind: str, problem: c.Problem, seconds: float) -> Iterator[dict[str, Any]]:
    """Whole steps; see `steps`."""
    ready, moved = {}, {}
    for name, entry in steps.entries(kind, problem).items():
        if entry.step is not None:
            check(problem, entry.build, name, entry.reference)
        candidate = entry.build(problem)
        if candidate is not None:
            ready[name], moved[name] = candidate, entry.moved
    yield from _rows(problem, kind, ready, moved, seconds)


def _moved(problem: c.Problem, name: str, states: int) -> float:
    """Bytes per parameter that a step has to move: its update, and what its rule measures before."""
    competitor = next((one for one in competitors if one.name == name), None)
    if competitor is not None:
        return competitor.bytes_per_param
    columns = 3 + 2 * states
    if name != "roofline":
        staged = _probe(problem).rule
        columns += sum(len(staged.columns_read(measure.source)) for measure in staged.measures)
    return columns * np.dtype(problem.dtype).itemsize


def _row(
    problem: c.Problem, name: str, mode: str, samples: Sequence[float] | np.ndarray, moved: float, compile_s: float
) -> dict[str, Any]:
    p10, p50, p90 = (float(x) for x in np.percentile(samples, [10, 50, 90]))
    return {
        "impl": name,
        "rule": problem.rule,
        "device": "cpu",
        "dtype": problem.dtype,
        "n": problem.n,
        "leaves": problem.leaves,
        "threads": problem.threads,
        "mode": mode,
        "p10_s": p10,
        "p50_s": p50,
        "p90_s": p90,
        "ns_per_param": p50 / problem.n * 1e9,
        "gb_per_s": moved * problem.n / p50 / 1e9,
        "compile_s": compile_s,
    }


def _neighbors(threads: int) -> dict[str, Callable[[], Any]]:
    """What a training loop does between two steps."""
    a = np.random.default_rng(0).random((_PRODUCT, _PRODUCT), np.float32)
    out: dict[str, Callable[[], Any]] = {"matmul": lambda: a @ a}
    try:
        import torch
    except ImportError:
        return out
    torch.set_num_threads(threads)
    net = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512))
    x = torch.randn(256, 512)
    out["torch"] = lambda: net(x).square().mean().backward()
    return out


def _turn_in_loop(neighbor: Callable[[], Any], step: Callable[[], Any]) -> list[tuple[float, float]]:
    """Seconds of a neighbor and of the step that follows it, in turn."""
    time.sleep(_SETTLE_S)
    out = []
    for _ in range(_WARM_STEPS + 12):
        t0 = time.perf_counter()
        neighbor()
        t1 = time.perf_counter()
        step()
        out.append((t1 - t0, time.perf_counter() - t1))
    return out[_WARM_STEPS:]


def _measure_in_loop(problem: c.Problem, seconds: float) -> Iterator[dict[str, Any]]:
    """Each step between two runs of a neighbor; and the neighbor after it, beside the neighbor alone."""
    ready, states = _prepare(problem, with_numpy=False)
    ready.pop("roofline")
    for kind, neighbor in _neighbors(problem.threads).items():
        turns: dict[tuple[str, str], Callable[[], Sequence[Any]]] = {("neighbor", ""): partial(turn, neighbor)}
        for name, candidate in ready.items():
            turns["alone", name] = partial(turn, candidate.step)
            turns["in loop", name] = partial(_turn_in_loop, neighbor, candidate.step)
        rounds = alternate(turns, seconds)
        samples: dict[tuple[str, str], np.ndarray] = {key: np.concatenate(times) for key, times in rounds.items()}
        for name, candidate in ready.items():
            after, spent = samples["in loop", name].T
            moved = _moved(problem, name, states)
            yield {
                **_row(problem, name, f"in_loop_{kind}", spent, moved, candidate.compile_s),
                "alone_p50_s": float(np.median(samples["alone", name])),
                "neighbour_p50_s": float(np.median(after)),
                "neighbour_alone_p50_s": float(np.median(samples["neighbor", ""])),
            }
