"""Calls from several threads: one after the other, or refused; what is copied beside a step is never torn."""

from __future__ import annotations

import random
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastlr

from .promises import BrokenPromiseError
from .values import NAMES

_BIG = 1000.0  # a rate; the other is 1, so that the parameters tell how many steps were made with each
_folder = tempfile.TemporaryDirectory(prefix="fastlr-fuzz-")


@fastlr.rule
def counting(p, g, n, *, lr):
    """Steps with gradients of 1 count themselves in `n`, and in `p` those with each rate."""
    n = n + g
    return p - lr * g, n


NAMES["counting"] = counting


class _Run:
    """Calls of one optimizer from several threads.

    Args:
        r: random numbers.
        compiled: whether steps are, so that other threads run beside them.
    """

    def __init__(self, r: random.Random, compiled: bool) -> None:
        self.params = {"a": np.zeros(40, np.float32), "b": np.zeros((3, 7), np.float32), "c": np.zeros(5, np.float32)}
        backend = "numba" if compiled else "numpy"
        self.compiled = compiled
        self.opt = fastlr.Optimizer(self.params, counting, lr=1.0, backend=backend, groups={"c": {}})
        self.grads = {k: np.ones_like(x) for k, x in self.params.items()}
        self.path = Path(_folder.name, f"run{r.choice(['.npz', '.safetensors'])}")
        self.snapshots: list[Any] = [self.opt.snapshot()]
        self.steps: list[int] = []
        self.restored = False
        self.wrong: list[str] = []
        self.outcomes: list[str] = []

    # What is called

    def step(self) -> None:
        self.steps.append(self.opt.step(self.grads).step)

    def step_new(self) -> None:
        self.steps.append(self.opt.step({k: x.copy() for k, x in self.grads.items()}).step)

    def step_own(self) -> None:
        self.opt.accumulate(self.grads)

    def snapshot(self) -> None:
        found = self.opt.snapshot()
        self.check(found, "a snapshot")
        self.snapshots.append(found)

    def state_dict(self) -> None:
        found = self.opt.state_dict(params=True)
        self.check(found, "a state dict")

    def save(self) -> None:
        path = self.path.with_name(f"{threading.get_ident()}-{self.path.name}")
        self.opt.save(path)
        other = fastlr.Optimizer(
            {k: np.zeros_like(x) for k, x in self.params.items()}, counting, lr=1.0, groups={"c": {}}
        )
        other.load(path)
        self.check(other.snapshot(), "a file")

    def restore(self) -> None:
        self.restored = True
        self.opt.restore(self.snapshots[-1])

    def load_state_dict(self) -> None:
        self.restored = True
        self.opt.load_state_dict(self.snapshots[0])

    def set_lr(self) -> None:
        self.opt.lr = _BIG if self.opt.lr == 1.0 else 1.0

    def set_group(self) -> None:
        self.opt.groups["c"].frozen = False

    def look(self) -> None:
        repr(self.opt), self.opt.steps, self.opt.lr, dict(self.opt.groups), self.opt.state, self.opt.rule

    def skipped(self) -> None:
        _ = self.opt.skipped_steps

    def to(self) -> None:
        try:
            moved = self.opt.to("cpu")
        except ValueError as error:
            if "being accumulated" not in str(error):
                raise
        else:
            self.check(moved.snapshot(), "what was moved")

    def rebuild(self) -> None:
        self.opt.rebuild(self.params)

    def zero_grad(self) -> None:
        self.opt.zero_grad()

    def warmup(self) -> None:
        self.opt.warmup()

    # What has to hold of it

    def check(self, state: Any, what: str) -> None:
        """All leaves, states and counters tell of the same steps."""
        steps = state["step"].ravel()
        counted = {int(steps[0]), *steps.tolist(), *state["clock"].ravel().tolist()}
        for name in self.params:
            counted |= {int(x) for x in np.unique(state[f"n.{name}"])}
            moved = np.unique(state[f"params.{name}"])
            if len(moved) != 1:
                self.wrong.append(f"{what} is torn: {name!r} has {moved[:4]}")
                return
            total = -int(moved[0])
            with_big = round((total - int(steps[0])) / (_BIG - 1))
            if with_big * _BIG + (steps[0] - with_big) != total:
                self.wrong.append(f"{what} is torn: {name!r} moved by {total} in {steps[0]} steps")
                return
        if len(counted) != 1:
            self.wrong.append(f"{what} is torn: it counts {sorted(counted)}")

    def call(self, name: str) -> None:
        try:
            getattr(self, name)()
        except RuntimeError as error:
            if type(error) is RuntimeError and "in a step" in str(error):
                self.outcomes.append("refused (in a step)")
            else:
                self.wrong.append(f"{name}: {type(error).__name__}: {error}")
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            self.outcomes.append("done")


_READERS = ["snapshot", "state_dict", "look", "look", "skipped", "to", "warmup"]
_WRITERS = ["set_lr", "set_lr", "set_group", "step_own", "zero_grad", "rebuild"]
_STEPS = ["step", "step", "step", "step_new"]


def trial(r: random.Random) -> Iterator[str]:
    """One optimizer, two to four threads, some hundred calls."""
    run = _Run(r, compiled=r.random() < 0.3)
    pool = [
        *_READERS,
        *r.sample(_WRITERS, r.randrange(4)),
        *(["restore", "load_state_dict"] if r.random() < 0.3 else []),
    ]
    if run.compiled:
        pool = [name for name in pool if name != "step_own"]  # kernels of their own
    pool = r.sample(pool, r.randrange(1, len(pool) + 1))
    pool += ["save"] if r.random() < 0.1 else []
    lists = [[r.choice(_STEPS) for _ in range(40)]]
    lists += [[r.choice([*pool, *_STEPS[:1]]) for _ in range(25)] for _ in range(r.randrange(1, 4))]
    how = f"threads that call {sorted({*pool})} beside steps"
    start = threading.Barrier(len(lists))

    def work(calls: list[str]) -> None:
        start.wait()
        for name in calls:
            run.call(name)

    workers = [threading.Thread(target=work, args=(calls,), daemon=True) for calls in lists]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(r.choice([1e-6, 1e-5, 1e-4]))
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    finally:
        sys.setswitchinterval(interval)
    if any(worker.is_alive() for worker in workers):
        raise BrokenPromiseError("threads hang", how)
    _judge(run, how)
    yield from run.outcomes


def _judge(run: _Run, how: str) -> None:
    run.call("snapshot")
    if not run.restored:
        if sorted(run.steps) != [*range(1, len(run.steps) + 1)]:
            run.wrong.append(f"steps are numbered {sorted(run.steps)[:9]}...")
        if run.opt.steps != len(run.steps):
            run.wrong.append(f"{len(run.steps)} steps were made, {run.opt.steps} counted")
    before = run.opt.steps
    run.call("step")
    run.call("snapshot")
    if run.opt.steps != before + 1:
        run.wrong.append("the step afterwards is not counted")
    if run.wrong:
        sign = re.sub(r"(torn|numbered|made).*", r"\1", run.wrong[0])
        sign = re.sub(r"(Error).*", r"\1", re.sub(r"^\d+ ", "", sign))
        raise BrokenPromiseError(sign, f"{how}: {run.wrong[0]} ({len(run.wrong)} in all)")
