"""Calls from inside a call of the same optimizer: refused, and nothing has changed; or wholly before or after it.

A schedule's function, `__del__`, a signal handler, `alloc=` and what gradients and numbers do when they are read run in
the middle of a step. Whatever they call there, the step goes on as if they had not.
"""

from __future__ import annotations

import functools
import gc
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastlr

from .arguments import gradients
from .interrupts import SCENES, AtLine, Scene, World, lines
from .promises import BrokenPromiseError, difference

_folder = tempfile.TemporaryDirectory(prefix="fastlr-fuzz-")


# What is called inside.
INNER: dict[str, Callable[[World], Any]] = {
    "step": lambda w: w.opt.step(gradients(w.opt.params, 6)),
    "step, only": lambda w: w.opt.step(gradients(w.opt.params, 6), only="w"),
    "step, without a leaf": lambda w: w.opt.step({**gradients(w.opt.params, 6), "w": None}),
    "step, grad_scale": lambda w: w.opt.step(gradients(w.opt.params, 6), grad_scale=3.0),
    "accumulate": lambda w: w.opt.accumulate(gradients(w.opt.params, 6)),
    "zero_grad": lambda w: w.opt.zero_grad(),
    "grads": lambda w: w.opt.grads,
    "restore": lambda w: w.opt.restore(w.held),
    "load_state_dict": lambda w: w.opt.load_state_dict(w.held),
    "rebuild": lambda w: w.opt.rebuild({"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}),
    "lr": lambda w: setattr(w.opt, "lr", 0.7),
    "lr of a group": lambda w: setattr(next(iter(w.opt.groups.values()), w.opt), "lr", 0.7),
    "frozen": lambda w: setattr(w.opt, "frozen", True),
    "clip_norm": lambda w: setattr(w.opt, "clip_norm", 0.01),
    "snapshot": lambda w: w.opt.snapshot(),
    "state_dict": lambda w: w.opt.state_dict(),
    "save": lambda w: w.opt.save(Path(_folder.name, "inside.npz")),
    "to": lambda w: w.opt.to("cpu"),
    "observe": lambda w: w.opt.observe(1.0),
    "warmup": lambda w: w.opt.warmup(),
    "look": lambda w: [repr(w.opt), w.opt.steps, w.opt.lr, [*w.opt.groups], w.opt.skipped_steps],
}


def _called(action: Callable[[], Any]) -> str:
    """What came of a call: nothing, or the type of what it raised."""
    try:
        action()
    except Exception as error:
        return "in a step" if type(error) is RuntimeError and "in a step" in str(error) else type(error).__name__
    return ""


def _world(scene: Scene) -> World:
    w = scene.build()
    w.held = w.opt.snapshot()
    return w


def _end(scene: Scene, w: World) -> dict[str, Any]:
    outcome = _called(lambda: scene.then(w))
    return {**w.see(), "then": outcome}


@functools.cache
def _orders(name: str, inner: str) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """What both calls raise, what is there then and at the end: without the inner one, before it, and after it."""
    scene, found = SCENES[name], []
    for order in ("outer", "inner, outer", "outer, inner"):
        w = _world(scene)
        came = {"inner": "in a step", "outer": ""}
        for call in order.split(", "):
            action = functools.partial(scene.act if call == "outer" else INNER[inner], w)
            came[call] = _called(action)
        found.append((came["outer"], came["inner"], w.see(), _end(scene, w)))
    return found


def enter(name: str, line: int, inner: str) -> str:
    """Make a call at a line of another; what came of it."""
    scene = SCENES[name]
    w, came = _world(scene), ["not called"]

    def action() -> None:
        came[0] = _called(lambda: INNER[inner](w))

    at = AtLine(line, action, scene.reference)

    def outer() -> None:
        with at:
            scene.act(w)

    outcome = _called(outer)
    return _judge(scene, inner, w, outcome, came[0], f"line {line} of {lines(name)}, {at.place}")


def _judge(scene: Scene, inner: str, w: World, outer: str, came: str, how: str) -> str:
    found = (outer, came, w.see(), _end(scene, w))
    orders = _orders(scene.name, inner)
    if found in orders:
        return "refused (in a step)" if came == "in a step" else "before or after"
    sign = f"{inner} inside {scene.name.split(',')[0]}"
    alike = [order for order in orders if order[:2] == found[:2]]
    if not alike:
        possible = ", ".join(sorted({f"{a or 'done'} and {b or 'done'}" for a, b, *_ in orders}))
        what = f"the outer call: {outer or 'done'}, the inner: {came or 'done'}; expected {possible}"
        raise BrokenPromiseError(f"{sign}: not one after the other", f"{scene.name}, {how}: {what}")
    now = difference(alike[0][2], found[2])
    later = difference(alike[0][3], found[3])
    raise BrokenPromiseError(
        f"{sign}: something else", f"{scene.name}, {how}: inner {came or 'done'}; now {now}; later {later}"
    )


# Places where a step itself runs what a user wrote


class _Calls:
    """Makes a call whenever it is asked for something, once."""

    def __init__(self) -> None:
        self.w: Any = None
        self.inner, self.came, self.count = "", "not called", 0

    def __call__(self) -> None:
        if self.w is not None and self.count == 0:
            self.count += 1
            self.came = _called(lambda: INNER[self.inner](self.w))


class _Array:
    """A gradient that calls when NumPy reads it."""

    def __init__(self, array: np.ndarray, calls: _Calls) -> None:
        self.array, self.calls = array, calls

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.calls()
        return self.array


class _Number(float):
    """A number that calls when it is asked for its value."""

    calls: Any = None

    def __float__(self) -> float:
        self.calls()
        return 2.0


class _Dict(dict):
    """Gradients that call when they are looked up."""

    calls: Any = None

    def __getitem__(self, key: Any) -> Any:
        self.calls()
        return super().__getitem__(key)

    def items(self) -> Any:
        self.calls()
        return super().items()


class _Dies:
    """Calls when it is freed."""

    def __init__(self, calls: _Calls) -> None:
        self.calls, self.itself = calls, self

    def __del__(self) -> None:
        self.calls()


def _params() -> dict[str, np.ndarray]:
    return {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


def _built(calls: _Calls, steps: int, **settings: Any) -> World:
    settings = {"lr": 0.1, "backend": "numpy", "groups": {"b": {"lr": 0.2}}, **settings}
    w = World(fastlr.Adam(_params(), **settings))
    for k in range(steps):
        w.opt.step(gradients(w.opt.params, k))
    calls.w = None
    return w


def _by_schedule(calls: _Calls, steps: int) -> tuple[World, Callable[[], Any]]:
    def lr(n: int) -> float:
        calls()
        return 0.1

    w = _built(calls, steps, lr=lr)
    return w, lambda: w.opt.step(w.grads(0))


def _by_alloc(calls: _Calls, steps: int) -> tuple[World, Callable[[], Any]]:
    def alloc(nbytes: int) -> bytearray:
        calls()
        return bytearray(nbytes)

    w = _built(calls, steps, alloc=alloc)
    return w, lambda: w.opt.step({k: np.asfortranarray(x) for k, x in w.grads(0).items()})


def _by_array(calls: _Calls, steps: int) -> tuple[World, Callable[[], Any]]:
    w = _built(calls, steps)
    return w, lambda: w.opt.step({k: _Array(x, calls) for k, x in w.grads(0).items()})


def _by_number(calls: _Calls, steps: int) -> tuple[World, Callable[[], Any]]:
    w, scale = _built(calls, steps), _Number(2.0)
    scale.calls = calls
    return w, lambda: w.opt.step(w.grads(0), grad_scale=scale)


def _by_mapping(calls: _Calls, steps: int) -> tuple[World, Callable[[], Any]]:
    w = _built(calls, steps)
    grads = _Dict(w.grads(0))
    grads.calls = calls
    return w, lambda: w.opt.step(grads)


def _by_collection(calls: _Calls, steps: int) -> tuple[World, Callable[[], Any]]:
    w = _built(calls, steps)

    def act() -> None:
        before = gc.get_threshold()
        _Dies(calls)
        gc.set_threshold(r_threshold)
        try:
            w.opt.step(w.grads(0))
        finally:
            gc.set_threshold(*before)

    r_threshold = 1 + steps * 7
    return w, act


CALLERS = {
    "a schedule": _by_schedule,
    "alloc": _by_alloc,
    "a gradient": _by_array,
    "a number": _by_number,
    "a mapping": _by_mapping,
    "the garbage collector": _by_collection,
}


def called_from(caller: str, steps: int, inner: str) -> str:
    """Make a call from what a step calls; what came of it."""

    def fresh() -> tuple[_Calls, World, Callable[[], Any]]:
        calls = _Calls()
        w, act = CALLERS[caller](calls, steps)
        w.held = w.opt.snapshot()
        return calls, w, act

    def then(w: World) -> str:
        return _called(lambda: [w.opt.step(gradients(w.opt.params, k)) for k in (2, 3)])

    orders = []
    for order in ("outer", "inner, outer", "outer, inner"):
        calls, w, act = fresh()
        came = {"inner": "in a step", "outer": ""}
        for call in order.split(", "):
            came[call] = _called(act if call == "outer" else functools.partial(INNER[inner], w))
        orders.append((came["outer"], came["inner"], w.see(), then(w), w.see()))
    calls, w, act = fresh()
    calls.w, calls.inner = w, inner
    outer = _called(act)
    calls.w = None
    if not calls.count:
        return "not called"
    found = (outer, calls.came, w.see(), then(w), w.see())
    if found in orders:
        return "refused (in a step)" if calls.came == "in a step" else "before or after"
    how = f"steps before: {steps}; the outer call: {outer or 'done'}, the inner: {calls.came or 'done'}"
    changed = ", ".join(difference(order[4], found[4]) for order in orders)
    raise BrokenPromiseError(f"{inner} from {caller}: something else", f"{how}: {changed}")


@functools.cache
def _places(names: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(name, line) for name in names for line in range(1, lines(name) + 1)]


_OUTER = ("step", "own", "accumulate", "restore", "load", "rebuild", "set", "observe", "compiled")


def trial_of(*names: str) -> Callable[[random.Random], Iterator[str]]:
    """A trial inside calls whose names begin so."""
    chosen = tuple(n for n, s in SCENES.items() if n.startswith(names) and not s.reference and "population" not in n)

    def trial(r: random.Random) -> Iterator[str]:
        if r.random() < 0.2:
            yield called_from(r.choice([*CALLERS]), r.randrange(3), r.choice([*INNER]))
        else:
            yield enter(*r.choice(_places(chosen)), r.choice([*INNER]))

    return trial


trial = trial_of(*_OUTER)
