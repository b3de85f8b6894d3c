"""An exception at any line of a call: what is there afterwards is what was before, or what comes after."""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import fastlr
from fastlr.schedules import Cosine, Plateau

from .arguments import gradients
from .promises import BrokenPromiseError, bits, difference, tree_map

_FOLDERS = tuple({str(Path(module.__file__).parent) for module in (fastlr, fastlr.kernels)})
# It carries a step out in the place of a compiled call, which nothing can interrupt.
_KERNELS = str(Path(fastlr.kernels.__file__).parent)
_IN_PLACE_OF_A_KERNEL = str(Path(_KERNELS, "reference.py"))


class World:
    """An optimizer, and what a user has beside it."""

    def __init__(self, opt: Any, **more: Any) -> None:
        self.opt = opt
        self.__dict__.update(more)

    def grads(self, k: int) -> Any:
        """Ordinary gradients, the same objects each time."""
        key = f"_grads_{k}"
        if key not in self.__dict__:
            self.__dict__[key] = gradients(self.opt.params, k)
        return self.__dict__[key]

    def see(self) -> dict[str, Any]:
        """Everything that can be compared."""
        return bits(self.opt)


def _goes_on(w: World) -> None:
    """Steps of all kinds."""
    w.opt.step(w.grads(2))
    w.opt.step(_part(w.grads(3)))
    w.opt.step(w.grads(1))


@dataclass(frozen=True)
class Scene:
    """A call to interrupt.

    Attributes:
        name: of the call.
        build: makes the world before it.
        act: the call.
        then: what a user does afterwards.
        reference: whether lines of the NumPy reference count as well.
    """

    name: str
    build: Callable[[], World]
    act: Callable[[World], Any]
    then: Callable[[World], Any] = _goes_on
    reference: bool = False


def _part(tree: Any) -> Any:
    """Gradients without that of the first leaf."""
    if isinstance(tree, dict):
        return {**tree, next(iter(tree)): None}
    return tree


def _params() -> dict[str, np.ndarray]:
    return {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


def _world(steps: int, make: Any = fastlr.Adam, params: Callable[[], Any] = _params, **settings: Any) -> World:
    """An optimizer that has made some steps."""
    settings = {"lr": 0.1, "backend": "numpy", **settings}
    opt = make(params(), **{k: v() if k in ("loss_scale", "ema_out", "lr_scale") else v for k, v in settings.items()})
    w = World(opt)
    for k in range(steps):
        opt.step(w.grads(k % 2))
    return w


def _like(value: float) -> Callable[[], Any]:
    return lambda: {k: np.full_like(x, value) for k, x in _params().items()}


def _scale() -> fastlr.LossScale:
    return fastlr.LossScale(8.0, interval=2)


def _infinite(w: World) -> Any:
    return tree_map(lambda _, x: np.full_like(x, np.inf), w.opt.params)


def _accumulated(count: int, **settings: Any) -> World:
    w = _world(1, **settings)
    for k in range(count):
        w.opt.accumulate(w.grads(k))
    return w


def _then_own(w: World) -> None:
    """What was accumulated is used."""
    w.opt.accumulate(w.grads(1))
    w.opt.step(grad_scale=2.0)
    _goes_on(w)


def _with_snapshot(**settings: Any) -> World:
    other = _world(2, **settings)
    other.opt.lr = 0.3
    w = _world(1, **settings)
    w.snapshot, w.state = other.opt.snapshot(), other.opt.state_dict()
    return w


def _for_rebuild(**settings: Any) -> World:
    w = _world(2, groups={"b": {"lr": 0.2}}, **settings)
    w.new = {"b": np.full(3, 2.0, np.float32), "x": np.ones(4, np.float32)}
    return w


def _set(name: str, value: Any, group: str | None = None, **settings: Any) -> tuple[Any, Any]:
    groups = {"groups": {"b": {"lr": 0.2}}} if group else {}

    def act(w: World) -> None:
        setattr(w.opt.groups[group] if group else w.opt, name, value)

    return functools.partial(_world, 2, **settings, **groups), act


def _step(k: int, **arguments: Any) -> Callable[[World], Any]:
    return lambda w: w.opt.step(w.grads(k), **arguments)


def _own_step(**arguments: Any) -> Callable[[World], Any]:
    return lambda w: w.opt.step(**arguments)


def _given(w: World) -> None:
    """Write into the optimizer's own gradients."""
    for path, leaf in gradients(w.opt.params, 2).items():
        w.opt.grads[path][...] = leaf


def _own_grads(**settings: Any) -> World:
    w = _world(1, **settings)
    _given(w)
    return w


def _again_own(w: World) -> None:
    _given(w)
    w.opt.step()
    _goes_on(w)


def _after_part(**settings: Any) -> World:
    w = _world(1, **settings)
    w.opt.step(w.grads(1), only="w")
    return w


def _accumulated_part() -> World:
    w = _accumulated(0)
    w.opt.accumulate(_part(w.grads(0)))
    return w


def _after_rebuild(w: World) -> None:
    _goes_on(World(w.opt))


def _after_setting(**values: Any) -> World:
    w = _world(2, groups={"b": {"lr": 0.2}})
    for name, value in values.items():
        setattr(w.opt.groups["b"], name, value)
    return w


def _each(change: Callable[[np.ndarray], Any]) -> Callable[[World], Any]:
    """A step whose gradients are new objects."""
    return lambda w: w.opt.step({key: change(x) for key, x in w.grads(0).items()})


def _accumulate(k: int, change: Callable[[Any], Any] = lambda tree: tree) -> Callable[[World], Any]:
    return lambda w: w.opt.accumulate(change(w.grads(k)))


def _halves(tree: Any) -> Any:
    return {key: x.astype(np.float16) for key, x in tree.items()}


_made = functools.partial
_population = _made(
    _world, 1, params=lambda: fastlr.flatten(_params(), population=2), lr=np.array([0.1, 0.2]), skip_nonfinite=True
)
_many = _made(_world, 1, clip_norm=0.5, ema=0.9, shadow="bfloat16", statistics=True)
_outside = _made(_world, 1, ema=0.9, ema_out=_like(0.5), lr_scale=_like(0.5))
_compiled = _made(_world, backend="numba")
_compiled_more = _made(_world, backend="numba", clip_norm=0.5, ema=0.9)
_groups = {"w": {"lr": 0.2}}
_rebuild: Callable[[World], Any] = lambda w: w.opt.rebuild(w.new)  # noqa: E731
_restore: Callable[[World], Any] = lambda w: w.opt.restore(w.snapshot)  # noqa: E731

_SCENES = [
    Scene("step, first", _made(_world, 0), _step(0)),
    Scene("step, later", _made(_world, 2), _step(0)),
    Scene("step, new arrays", _made(_world, 2), _each(np.copy)),
    Scene("step, of half precision", _made(_world, 1), _each(lambda x: x.astype(np.float16))),
    Scene("step, gathered", _made(_world, 1), _each(np.asfortranarray)),
    Scene("step, flat", _made(_world, 1), lambda w: w.opt.step(np.ones(9, np.float32))),
    Scene("step, first without a leaf", _made(_world, 0), lambda w: w.opt.step(_part(w.grads(0)))),
    Scene("step, later without a leaf", _made(_world, 2), lambda w: w.opt.step(_part(w.grads(0)))),
    Scene("step, only, first", _made(_world, 0), _step(0, only="w")),
    Scene("step, only, later", _made(_world, 2), _step(0, only=["b"])),
    Scene("step, only, after a part", _after_part, _step(0, only=["b"])),
    Scene("step, grad_scale, first", _made(_world, 0), _step(0, grad_scale=2.0)),
    Scene("step, grad_scale, later", _made(_world, 2), _step(0, grad_scale=4.0)),
    Scene("step, loss scale", _made(_world, 2, loss_scale=_scale), _step(0)),
    Scene("step, loss scale, first", _made(_world, 0, loss_scale=_scale), _step(0)),
    Scene("step, loss scale, grows", _made(_world, 1, loss_scale=_scale), _step(0)),
    Scene("step, loss scale, skipped", _made(_world, 2, loss_scale=_scale), lambda w: w.opt.step(_infinite(w))),
    Scene("step, skipped", _made(_world, 2, skip_nonfinite=True), lambda w: w.opt.step(_infinite(w))),
    Scene("step, clip, ema, shadow", _many, _step(0)),
    Scene("step, ema_out, lr_scale", _outside, _step(0)),
    Scene("step, schedule", _made(_world, 1, lr=Cosine(0.1, steps=5).warmup(2)), _step(0)),
    Scene("step, own schedule", _made(_world, 1, lr=lambda n: 0.1 / (n + 1)), _step(0)),
    Scene("step, population", _population, lambda w: w.opt.step(np.ones(18, np.float32))),
    Scene("step, prodigy", _made(_world, 1, fastlr.Prodigy), _step(0)),
    Scene("step, nadam", _made(_world, 1, fastlr.NAdam), _step(0)),
    Scene("step, lamb", _made(_world, 1, fastlr.LAMB), _step(0)),
    Scene("step, after lr was set", _made(_after_setting, lr=0.5), _step(0)),
    Scene("step, after frozen was set", _made(_after_setting, frozen=True), _step(0)),
    Scene("step, after clip_norm was set", _made(_after_setting, clip_norm=0.1), _step(0)),
    Scene("step, through the reference", _many, _step(0), reference=True),
    Scene("step, through the reference, first", _made(_world, 0), _step(0), reference=True),
    Scene("own, accumulated", _made(_accumulated, 2), _own_step(grad_scale=2.0), _then_own),
    Scene("own, accumulated, loss scale", _made(_accumulated, 2, loss_scale=_scale), _own_step(), _then_own),
    Scene("own, accumulated, a part", _made(_accumulated, 2), _own_step(only="w"), _then_own),
    Scene("own, cleared", _made(_own_grads, zero_grads=True), _own_step(), _again_own),
    Scene("own, cleared, accumulated", _made(_accumulated, 1, zero_grads=True), _own_step(), _then_own),
    Scene("own, cleared, a part", _made(_accumulated, 1, zero_grads=True), _own_step(only="w"), _then_own),
    Scene("accumulate, first", _made(_accumulated, 0), _accumulate(0), _then_own),
    Scene("accumulate, second", _made(_accumulated, 1), _accumulate(2), _then_own),
    Scene("accumulate, third", _made(_accumulated, 2), _accumulate(2), _then_own),
    Scene("accumulate, without a leaf", _made(_accumulated, 0), _accumulate(0, _part), _then_own),
    Scene("accumulate, with it again", _accumulated_part, _accumulate(0), _then_own),
    Scene("accumulate, of half precision", _made(_accumulated, 1), _accumulate(0, _halves), _then_own),
    Scene("accumulate, through the reference", _made(_accumulated, 1), _accumulate(0), _then_own, reference=True),
    Scene("zero_grad", _made(_accumulated, 2), lambda w: w.opt.zero_grad(), _then_own),
    Scene("grads, first", _made(_world, 1), lambda w: w.opt.grads),
    Scene("load_state_dict", _made(_with_snapshot, ema=0.9), lambda w: w.opt.load_state_dict(w.state)),
    Scene("restore, loss scale", _made(_with_snapshot, loss_scale=_scale), _restore),
    Scene("restore, shadow", _made(_with_snapshot, shadow="float16"), _restore),
    Scene("restore, nadam", _made(_with_snapshot, make=fastlr.NAdam), _restore),
    Scene("restore, groups", _made(_with_snapshot, groups=_groups), _restore),
    Scene("restore, plateau", _made(_with_snapshot, lr=Plateau(0.1)), _restore),
    Scene("rebuild", _made(_for_rebuild, ema=0.9), _rebuild, _after_rebuild),
    Scene("rebuild, nadam", _made(_for_rebuild, make=fastlr.NAdam), _rebuild, _after_rebuild),
    Scene("set lr", *_set("lr", 0.5)),
    Scene("set lr of a group", *_set("lr", 0.5, "b")),
    Scene("set betas", *_set("betas", (0.5, 0.9))),
    Scene("set clip_norm", *_set("clip_norm", 0.1)),
    Scene("set frozen", *_set("frozen", True, "b")),
    Scene("set weight_decay", *_set("weight_decay", 0.1)),
    Scene("set a schedule", *_set("lr", Cosine(0.3, steps=9))),
    Scene("observe", _made(_world, 1, lr=Plateau(0.1, patience=0)), lambda w: w.opt.observe(1.0)),
    Scene("state_dict", _made(_world, 1), lambda w: w.opt.state_dict()),
    Scene("compiled, first", _made(_compiled, 0), _step(0)),
    Scene("compiled, later", _made(_compiled, 2), _step(0)),
    Scene("compiled, new arrays", _made(_compiled, 2), _each(np.copy)),
    Scene("compiled, without a leaf", _made(_compiled, 1), lambda w: w.opt.step(_part(w.grads(0)))),
    Scene("compiled, only", _made(_compiled, 1), _step(0, only="w")),
    Scene("compiled, clip, ema", _made(_compiled_more, 1), _step(0)),
    Scene("compiled, clip, ema, first", _made(_compiled_more, 0), _step(0)),
]


class _TorchWorld(World):
    """One of `fastlr.torch`."""

    def see(self) -> dict[str, Any]:
        from . import tensors

        return tensors.see(self.opt)


def _torch_world(steps: int, given: int = -1, two: bool = False, **settings: Any) -> World:
    """With parameters of one dtype or two, and gradients for the next step but for one of them."""
    import torch

    from . import tensors

    dtypes = (torch.float32, torch.float64)[: 1 + two]
    opt, other = (tensors.build(count, *dtypes, **settings) for count in (steps, 2))
    tensors.give(opt, 3, given)
    return _TorchWorld(opt, state=other.state_dict())


def _torch_goes_on(w: World) -> None:
    from . import tensors

    for k in (1, 2):
        tensors.give(w.opt, k)
        w.opt.step()


if importlib.util.find_spec("torch") is not None:
    _torch = [
        ("first", _made(_torch_world, 0), lambda w: w.opt.step()),
        ("later", _made(_torch_world, 2), lambda w: w.opt.step()),
        ("first without a gradient", _made(_torch_world, 0, given=0), lambda w: w.opt.step()),
        ("later without a gradient", _made(_torch_world, 2, given=0), lambda w: w.opt.step()),
        ("schedule", _made(_torch_world, 1, lr=Cosine(0.1, steps=5)), lambda w: w.opt.step()),
        ("load_state_dict", _made(_torch_world, 1), lambda w: w.opt.load_state_dict(w.state)),
        ("two dtypes, first", _made(_torch_world, 0, two=True), lambda w: w.opt.step()),
        ("two dtypes, later", _made(_torch_world, 2, two=True), lambda w: w.opt.step()),
    ]
    _SCENES += [Scene(f"torch, {name}", build, act, _torch_goes_on) for name, build, act in _torch]
SCENES = {scene.name: scene for scene in _SCENES}


class AtLine:
    """Does something at a line of fastlr, counted from 1, while a call is made; without an action it only counts."""

    def __init__(self, line: int, action: Callable[[], Any], reference: bool = False) -> None:
        self.line, self.action, self.reference = line, action, reference
        self.count, self.place = 0, ""
        self._ours: dict[str, bool] = {}

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        ours = self._ours.get(name)
        if ours is None:
            ours = self._ours[name] = name.startswith(_FOLDERS)
        return self._traced if ours and (self.reference or not self._in_kernel(frame)) else None

    @staticmethod
    def _in_kernel(frame: FrameType | None) -> bool:
        """Whether a frame is the reference's run, or was called from there; others of the reference only build it."""
        while frame is not None and frame.f_code.co_filename.startswith(_KERNELS):
            if frame.f_code.co_filename == _IN_PLACE_OF_A_KERNEL and frame.f_code.co_name != "build":
                return True
            frame = frame.f_back
        return False

    def _traced(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.line:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.action()
        return self._traced

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)


@functools.cache
def lines(name: str) -> int:
    """How many lines of fastlr a call takes."""
    scene, count = SCENES[name], 0
    for _ in range(2):  # what is made once in a process is there the second time
        w = scene.build()
        with AtLine(0, lambda: None, scene.reference) as at:
            scene.act(w)
        count = at.count
    return count


@functools.cache
def _references(name: str) -> tuple[dict[str, Any], ...]:
    """What is there before and after a call, and at the end of what a user does then, without the call and with it."""
    scene = SCENES[name]
    w = scene.build()
    before = w.see()
    scene.then(w)
    without = w.see()
    w = scene.build()
    scene.act(w)
    after = w.see()
    scene.then(w)
    return before, after, without, w.see()


class _RaisedError(KeyboardInterrupt):
    """The exception that is raised."""


def _raise() -> None:
    raise _RaisedError


def interrupt(name: str, line: int) -> str:
    """Raise at a line of a call; what came of it."""
    scene = SCENES[name]
    before, after, without, with_it = _references(name)
    w = scene.build()
    at = AtLine(line, _raise, scene.reference)
    try:
        with at:
            scene.act(w)
    except _RaisedError:
        pass
    else:
        raise BrokenPromiseError(f"{name}: the exception was swallowed", f"line {line}, {at.place}")
    how = f"line {line} of {lines(name)}, {at.place}"
    allowed = [without, with_it]
    try:
        if line % 3:
            now = w.see()
            if now not in (before, after):
                raise BrokenPromiseError(f"{name}: a mixture", f"{how}: {difference(before, now)}")
            if before != after:
                allowed = [without] if now == before else [with_it]
        if before != after and line % 3 and now == before and line % 2:
            scene.act(w)  # it is simply done again
            allowed = [with_it]
        scene.then(w)
        end = w.see()
    except BrokenPromiseError:
        raise
    except Exception as error:
        raise BrokenPromiseError(f"{name}: {type(error).__name__} afterwards", f"{how}: {error}") from error
    if end not in allowed:
        raise BrokenPromiseError(f"{name}: later steps differ", f"{how}: {difference(allowed[0], end)}")
    return "before" if end == without and without != with_it else "after" if without != with_it else "the same"


@functools.cache
def places(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Every line of these calls, shuffled."""
    found = [(name, line) for name in names for line in range(1, lines(name) + 1)]
    random.Random(0).shuffle(found)
    return found


def trial_of(*names: str) -> Callable[[random.Random], Iterator[str]]:
    """A trial for calls whose names begin so; each place is tried once."""
    chosen = tuple(name for name in SCENES if name.startswith(names))

    def trial(r: random.Random) -> Iterator[str]:
        every = places(chosen)
        index = r.index  # type: ignore[attr-defined]
        if index < len(every):
            yield interrupt(*every[index])

    return trial


trial = trial_of("")
