"""How it is measured: candidates alternate round by round, each checked before it is timed."""

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
from typing import Any

import numpy as np

from .. import checks
from ..info import cpu_name, versions
from ..step import threads as _threads
from . import candidates as c
from . import competitors, steps
from .report import progress

# Before each turn, long enough for the other libraries' threads to stop spinning; then steps that are not counted.
_SETTLE_S = 0.02
_WARM_STEPS = 3
_TURN_S = 0.03
KINDS = ("update", "full", "options", "target")
_PRODUCT = 512  # rows and columns of the matrices in a loop


def _times(step: Callable[[], Any], seconds: float) -> list[float]:
    """One turn of a candidate."""
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


def _checked(
    problem: c.Problem,
    build: Callable[[c.Problem], c.Candidate | None],
    name: str,
    refer: Callable[[c.Problem], c.Candidate],
) -> None:
    """Compare a candidate with the reference after some steps on a small problem.

    Raises:
        RuntimeError: if they differ by more than rounding; for fastlr, at all.
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
        if problem.rule in c._BY_HAND and problem.n > c._BLOCK:
            out["numpy_passes"] = partial(c.numpy_candidate, block=None)
    out["roofline"] = partial(c.roofline_candidate, states=states)
    for one in competitors:
        if one.rules is None or problem.rule in one.rules:
            out[one.name] = partial(_entered, one)
    return out


def _entered(one: Any, problem: c.Problem) -> c.Candidate:
    state = one.setup(problem.n, problem.dtype)
    return c.Candidate(partial(one.step, state))


def _environment() -> dict[str, Any]:
    """What every row says about where it was measured."""
    commit = None
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which(
        "git"
    ):  # a checkout of fastlr, not an installation inside somebody else's
        git = ["git", "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "commit": commit,
        "date": now,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": versions(),
    }


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
    count = _threads.get_num_threads() if threads is None else checks.count("threads", threads)
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


def _prepare(problem: c.Problem, with_numpy: bool) -> tuple[dict[str, c.Candidate], int]:
    probe = c.RULES[problem.rule](np.zeros(1, problem.dtype), **c.SETTINGS.get(problem.rule, {}))
    states = len(probe.state)
    ready = {}
    for name, build in _builders(problem, states, with_numpy).items():
        _checked(problem, build, name, partial(c.fastlr_candidate, backend="numpy"))
        candidate = build(problem)
        if candidate is not None:
            ready[name] = candidate
    return ready, states


def _measure(problem: c.Problem, seconds: float) -> Iterator[dict[str, Any]]:
    ready, states = _prepare(problem, with_numpy=True)
    rounds = _alternate(ready, seconds)
    for name, candidate in ready.items():
        samples = list(itertools.chain(*rounds[name]))
        row = _row(problem, name, "alone", samples, _moved(problem, name, states), candidate.compile_s)
        yield {**row, **_beside(rounds, name)}


def _alternate(ready: Mapping[str, c.Candidate], seconds: float) -> dict[str, list[list[float]]]:
    """The times of each candidate, round by round."""
    rounds: dict[str, list[list[float]]] = {name: [] for name in ready}
    began = time.perf_counter()
    while len(next(iter(rounds.values()))) < 5 or time.perf_counter() - began < seconds:
        for name, candidate in ready.items():
            rounds[name].append(_times(candidate.step, _TURN_S))
    return rounds


def _beside(rounds: Mapping[str, list[list[float]]], name: str) -> dict[str, float]:
    """A candidate beside fastlr, compared within each round: a machine's speed can drift while it is measured."""
    own, other = (np.array([np.median(times) for times in rounds[n]]) for n in ("fastlr", name))
    return {"relative": float(np.median(other / own)), "added_s": float(np.median(other - own))}


def _measure_step(kind: str, problem: c.Problem, seconds: float) -> Iterator[dict[str, Any]]:
    """Whole steps; see `steps`."""
    ready, moved = {}, {}
    for name, entry in steps.entries(kind, problem).items():
        if entry.step is not None:
            _checked(problem, entry.build, name, entry.reference)
        candidate = entry.build(problem)
        if candidate is not None:
            ready[name], moved[name] = candidate, entry.moved
    rounds = _alternate(ready, seconds)
    for name, candidate in ready.items():
        samples = list(itertools.chain(*rounds[name]))
        yield {**_row(problem, name, kind, samples, moved[name], candidate.compile_s), **_beside(rounds, name)}


def _moved(problem: c.Problem, name: str, states: int) -> float:
    """Bytes per parameter that a step has to move: its update, and what its rule measures before."""
    entered = next((one for one in competitors if one.name == name), None)
    if entered is not None:
        return entered.bytes_per_param
    columns = 3 + 2 * states
    if name != "roofline":
        staged = c.RULES[problem.rule](np.zeros(1, problem.dtype), **c.SETTINGS.get(problem.rule, {})).rule
        columns += sum(len(staged.columns_read(measure.source)) for measure in staged.measures)
    return columns * np.dtype(problem.dtype).itemsize


def _row(
    problem: c.Problem, name: str, mode: str, samples: list[float], moved: float, compile_s: float
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


def _neighbours(threads: int) -> dict[str, Callable[[], Any]]:
    """What a trainer does between two steps."""
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


def _measure_in_loop(problem: c.Problem, seconds: float) -> Iterator[dict[str, Any]]:
    """Each step between two runs of a neighbour; and the neighbour after it, beside the neighbour alone."""
    ready, states = _prepare(problem, with_numpy=False)
    ready.pop("roofline")
    for kind, neighbour in _neighbours(problem.threads).items():
        alone: list[float] = []
        spent: dict[str, list[float]] = {name: [] for name in ready}
        cold: dict[str, list[float]] = {name: [] for name in ready}
        after: dict[str, list[float]] = {name: [] for name in ready}
        began = time.perf_counter()
        while len(alone) < 5 or time.perf_counter() - began < seconds:
            alone += _times(neighbour, _TURN_S)
            for name, candidate in ready.items():
                cold[name] += _times(candidate.step, _TURN_S)
                time.sleep(_SETTLE_S)
                for k in range(_WARM_STEPS + 12):
                    t0 = time.perf_counter()
                    neighbour()
                    t1 = time.perf_counter()
                    candidate.step()
                    t2 = time.perf_counter()
                    if k >= _WARM_STEPS:
                        after[name].append(t1 - t0)
                        spent[name].append(t2 - t1)
        for name, candidate in ready.items():
            yield {
                **_row(
                    problem, name, f"in_loop_{kind}", spent[name], _moved(problem, name, states), candidate.compile_s
                ),
                "alone_p50_s": float(np.median(cold[name])),
                "neighbour_p50_s": float(np.median(after[name])),
                "neighbour_alone_p50_s": float(np.median(alone)),
            }
