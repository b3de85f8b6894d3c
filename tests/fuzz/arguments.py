"""Odd arguments: an error with everything as it was, or what the ordinary value they stand for would have done."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import inspect
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from cases import CASES, Case

import fastlr
from fastlr.schedules import Plateau, Schedule

from .promises import BrokenPromiseError, bits, difference, leaves, refusal, tree_map
from .values import ALLOCATORS, ARRAYS, NUMBERS, SCHEDULED, VALUES, WithArray, WithFloat, made

# Numbers among the arguments: from, to, and whether the last is allowed; others must be finite.
_RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("lr", "weight_decay", "eps", "momentum", "lr_decay", "momentum_decay"), (0.0, np.inf, False)),
    **dict.fromkeys(("initial_accumulator_value", "trust_coefficient", "relative_distance"), (0.0, np.inf, False)),
    **dict.fromkeys(("clip_norm", "clip_value", "d0"), (5e-324, np.inf, False)),
    **dict.fromkeys(("alpha", "rho", "ema", "ema_decay"), (0.0, 1.0, True)),
    "beta": (0.0, 1.0, False),
    "dampening": (-np.inf, np.inf, False),
}
_OFF = {"weight_decay", "clip_norm", "clip_value", "ema"}  # where None means something
_SWITCHES = {"decoupled_weight_decay", "maximize", "skip_nonfinite", "zero_grads", "statistics", "capturable"}
_SWITCHES |= {"nesterov", "centered", "amsgrad", "layer_adaptation", "layerwise"}
_TREES = {
    "tree": "{'w': np.linspace(-1, 1, 6, dtype=D).reshape(2, 3), 'b': np.ones(3, D)}",
    "array": "np.linspace(-1, 1, 5, dtype=D)",
    "list": "[np.ones(2, D), {'x': np.array(0.5, D)}]",
    "empty": "{'w': np.ones((0, 2), D), 'b': np.ones(3, D)}",
    "flat": "fastlr.flatten({'w': np.linspace(-1, 1, 6, dtype=D).reshape(2, 3), 'b': np.ones(3, D)})",
    "population": "fastlr.flatten({'w': np.linspace(-1, 1, 4, dtype=D)}, population=3)",
}
_OPTIONS = {
    "weight_decay": "0.01",
    "clip_norm": "1.0",
    "clip_value": "0.5",
    "ema": "0.9",
    "shadow": "'bfloat16'",
    "skip_nonfinite": "True",
    "zero_grads": "True",
    "statistics": "True",
    "loss_scale": "fastlr.LossScale(8.0, interval=2)",
    "groups": "{'*': {'weight_decay': 0.1}}",
    "scope": "'leaf'",
    "alloc": "bytearray",
    "threads": "2",
}
_TEXTS = ["'all'", "'leaf'", "'group'", "'numpy'", "'numba'", "'bfloat16'", "'float16'", "'float8'", "'ALL'", "b'all'"]
_WHOLE = [*ARRAYS, *VALUES, "{}", "{'w': None}", "{'w': None, 'b': None}", "{'b': np.ones(3, D)}", "[None, None]"]
_GROUPS = [
    "{@V: {'lr': 0.1}}",
    "{'*': @V}",
    "{'*': {'lr': @V}}",
    "{'*': {@V: 0.1}}",
    "{'*': {'frozen': @V}}",
    "[@V]",
    "@V",
]
_GROUPS += ["{'*': {'lr': 0.1}, 'x*': {}}", "{'*': {'backend': 'numpy'}}", "{'w': {'weight_decay': @V}}"]
_GROUPS += ["{'*': {'params': 1}}", "collections.OrderedDict({'*': {'lr': @V}})", "{'[': {}}", "{'*': {}}"]
_OWN_ERRORS = ZeroDivisionError  # what the values themselves raise


def as_number(value: Any) -> float | None:
    """The number that a value is, None if it is none; decided here and nowhere in the library."""
    if isinstance(value, bool | np.bool_ | np.ma.MaskedArray):
        return None
    dtype = getattr(value, "dtype", None)
    if isinstance(value, np.ndarray | np.generic) and (dtype.kind not in "fiu" or value.ndim):
        return None
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        if value.ndim or value.dtype in (sys.modules["torch"].bool, sys.modules["torch"].complex64):
            return None
        value = value.detach()
    elif type(value).__module__.startswith("jax"):
        if value.ndim or value.dtype.kind not in "fiuV":
            return None
    elif isinstance(value, WithArray):
        value = value.value
    elif not isinstance(
        value, int | float | np.generic | np.ndarray | fractions.Fraction | decimal.Decimal | WithFloat
    ):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def is_scheduled(value: Any) -> bool:
    """Whether it may be a schedule."""
    return isinstance(value, Schedule) or (callable(value) and not isinstance(value, type))


def _check_taken(name: str, value: Any, got: Any, population: int | None, how: str) -> None:
    """That a hyperparameter that was taken is what was given, and that this is one."""
    if (value is None and name in _OFF) or isinstance(value, fastlr.schedules.Schedule):
        return
    if name in _SWITCHES or name == "frozen":
        several = name == "frozen" and population and getattr(value, "dtype", None) == np.bool_
        if not isinstance(value, bool | np.bool_) and not several:
            raise BrokenPromiseError(f"{name} took {type(value).__name__}", how)
    elif name == "betas":
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise BrokenPromiseError(f"{name} took {type(value).__name__}", how)
        for part, taken in zip(value, got, strict=True):
            _check_taken("beta", part, taken, population, how)
    elif name in _RANGES and not is_scheduled(value):
        number: Any = as_number(value)
        low, high, closed = _RANGES[name]
        if number is None and population:
            array = np.asarray(value)
            if array.shape == (population,) and array.dtype.kind in "fiu" and not np.ma.isMaskedArray(value):
                number = array.astype(np.float64)
        if number is None:
            raise BrokenPromiseError(f"taken, but no number: {type(value).__name__}", how)
        inside = np.isfinite(number) & (number >= low) & ((number <= high) if closed else (number < high))
        if not np.all(inside):
            raise BrokenPromiseError(f"{name} took a number out of range", how)
        if not np.array_equal(got, number):
            raise BrokenPromiseError(f"{name} took another number than was given", f"{how}  ->  {got!r}")


def gradients(params: Any, k: int) -> Any:
    """Ordinary gradients in the structure of the parameters."""

    def one(path: str, leaf: np.ndarray) -> np.ndarray:
        return ((np.arange(leaf.size) % 5 - 1.7) * (k + 1) / 3).astype(leaf.dtype).reshape(leaf.shape)

    return tree_map(one, params)


def _attempt(action: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "", action()
    except Exception as error:
        return type(error).__name__, error


def _same_steps(opt: fastlr.Optimizer, twin: fastlr.Optimizer, how: str, where: str, steps: int = 2) -> str:
    """Step both; what came of it. They do the same, bit for bit, and what is refused changes nothing."""
    outcome = "accepted"
    for k in range(steps):
        before = bits(opt)
        mine, error = _attempt(lambda k=k: opt.step(gradients(opt.params, k)))
        other, _ = _attempt(lambda k=k: twin.step(gradients(twin.params, k)))
        if mine != other:
            raise BrokenPromiseError(f"two of a kind do not do the same ({where})", f"{how}  ->  {mine!r}, {other!r}")
        after = bits(opt)
        if mine:
            outcome = "refused at the step: " + refusal(error, f"{how}; opt.step(g)", _OWN_ERRORS, where=where)
            if after != before:
                raise BrokenPromiseError(
                    f"a refused step changed something ({where})", f"{how}: {difference(before, after)}"
                )
        elif after != (expected := bits(twin)):
            raise BrokenPromiseError(f"not as the ordinary value ({where})", f"{how}: {difference(after, expected)}")
    return outcome


# Constructors


def _signature(make: type) -> list[str]:
    names = {n for cls in make.__mro__ if "__init__" in vars(cls) for n in inspect.signature(cls.__init__).parameters}
    return sorted(names - {"self", "args", "kwargs", "options", "hyperparameters", "rule"})


def _with_leaf(r: random.Random, text: str) -> str:
    """A tree's text with one leaf exchanged for something odd."""
    leaf = r.choice([*ARRAYS, *ARRAYS, *VALUES])
    shape, own = r.choice(["(2, 3)", "(3,)"]), "np.ones((2, 3), D)"
    leaf = f"(lambda shape, own: {leaf})({shape}, {own})"
    kinds = [f"{{'w': {leaf}, 'b': np.ones(3, D)}}", f"[np.ones(2, D), {leaf}]", leaf, f"{{'w': {{'x': {leaf}}}}}"]
    kinds += [f"({leaf}, None)", f"fastlr.flatten({{'w': {leaf}}})", f"types.SimpleNamespace(w={leaf})"]
    kinds += [f"collections.OrderedDict(w={leaf})", f"{{1: {leaf}, '1': np.ones(2, D)}}", f"{{'': {leaf}}}"]
    kinds += [f"(lambda x: {{'w': x, 'b': x}})({leaf})", f"{{'w': {leaf}, 'w.x': np.ones(2, D)}}", text]
    return r.choice(kinds)


def _constructor(r: random.Random) -> Iterator[str]:
    case = r.choice(CASES)
    dtype = r.choice(["f4", "f8"])
    params = r.choice([*_TREES.values()])
    texts = {name: repr(value) for name, value in case.settings.items()}
    texts.update({name: _OPTIONS[name] for name in r.sample([*_OPTIONS], r.choice([0, 0, 1, 2]))})
    names = _signature(case.make)
    for _ in range(r.choice([1, 1, 1, 2])):
        name = r.choice([*names, "params", "lr", "lr", "tau", "max_grad_norm", "groups"])
        if name == "params":
            params = _with_leaf(r, params)
        elif name in ("ema_out", "shadow_out", "lr_scale"):
            texts[name] = _with_leaf(r, params)
        elif name == "alloc":
            texts[name] = r.choice([*ALLOCATORS, *VALUES])
        elif name in ("scope", "backend", "shadow", "grad_dtype"):
            texts[name] = r.choice([*_TEXTS, *VALUES])
        elif name == "groups":
            texts[name] = r.choice(_GROUPS).replace("@V", r.choice(VALUES))
        else:
            texts[name] = r.choice([*VALUES, *NUMBERS, *SCHEDULED, *_TEXTS[:1], "10**7", "'float32'"])
    if texts.get("backend") in (None, "'numba'"):
        texts["backend"] = "'numpy'"
    arguments = ", ".join(f"{name}={text}" for name, text in texts.items())
    how = f"D = {dtype!r}; fastlr.{case.make.__name__}({params}, {arguments})"
    yield _build(case.make, params, texts, dtype, how, where=name)


def _build(make: Any, params: str, texts: Mapping[str, str], dtype: str, how: str, where: str) -> str:
    """Build an optimizer of texts; what came of it."""
    given, twins = ([], {}), ([], {})
    for arguments in (given, twins):
        try:
            arguments[0].append(made(params, D=dtype))
            arguments[1].update({name: made(text, D=dtype) for name, text in texts.items()})
        except (TypeError, ValueError, RecursionError, ArithmeticError, *_PARTS_FAIL) as error:
            return f"not made ({type(error).__name__})"  # a part of it, such as a flat buffer of something odd
    arrays = [x for part in (given[0], given[1]) for x in _arrays(part)]
    before = [np.ndarray.tobytes(x) for x in arrays]
    try:
        opt = make(*given[0], **given[1])
    except Exception as error:
        outcome = refusal(error, how, *_own(error), where="(constructor)")
        if [np.ndarray.tobytes(x) for x in arrays] != before:
            raise BrokenPromiseError(f"a refused constructor changed an array ({where})", how) from error
        return outcome
    if opt.rule is None or not repr(opt):
        raise BrokenPromiseError("no rule or repr", how)
    for name, value in given[1].items():
        if name in _RANGES or name in _SWITCHES or name == "betas":
            got = getattr(opt, "ema_decay" if name == "ema" else name, value)
            _check_taken(name, value, got, opt.params.population if _is_population(opt) else None, how)
            number = as_number(value)
            if name in _RANGES and number is not None and not is_scheduled(value):
                twins[1][name] = number
    twin = make(*twins[0], **twins[1])
    outcome = _same_steps(opt, twin, how, "built")
    before_loading = bits(opt)
    if outcome == "accepted":
        state = opt.state_dict()
        try:
            opt.load_state_dict(state)
        except Exception as error:
            if type(error) is ValueError and "a function of yours" in str(error):
                return outcome  # of which a state has only the name
            raise BrokenPromiseError(f"cannot load its own state: {type(error).__name__}", f"{how}: {error}") from error
        if bits(opt) != before_loading:
            raise BrokenPromiseError("its own state changes it", f"{how}: {difference(before_loading, bits(opt))}")
    return outcome


# Parts are made by fastlr too, so what else it raises there is a fault; NumPy has IndexErrors of its own.
_PARTS_FAIL = (fastlr.DeviceError, IndexError)


def _own(error: BaseException) -> tuple[type[BaseException], ...]:
    return (_OWN_ERRORS,) if isinstance(error, _OWN_ERRORS) else ()


def _is_population(opt: fastlr.Optimizer) -> bool:
    return isinstance(opt.params, fastlr.FlatBuffer) and opt.params.population is not None


def _arrays(part: Any, depth: int = 4) -> Iterator[np.ndarray]:
    if isinstance(part, np.ndarray) and part.dtype.kind == "f":
        yield part
    elif isinstance(part, fastlr.FlatBuffer):
        yield part.data
    elif isinstance(part, dict | list | tuple) and depth:
        for child in part.values() if isinstance(part, dict) else part:
            yield from _arrays(child, depth - 1)


# Steps


def _good(r: random.Random) -> tuple[Callable[[], fastlr.Optimizer], str, str]:
    """A function that builds an ordinary optimizer, its code, and the dtype."""
    case: Case = r.choice(CASES)
    dtype, params = r.choice(["f4", "f8"]), r.choice([*_TREES.values()])
    texts = {name: repr(value) for name, value in case.settings.items()}
    texts.update({name: _OPTIONS[name] for name in r.sample([*_OPTIONS], r.choice([0, 0, 1, 2]))})
    texts["backend"] = "'numpy'"
    code = f"D = {dtype!r}; opt = fastlr.{case.make.__name__}({params}"
    code += "".join(f", {name}={text}" for name, text in texts.items()) + ")"
    return (
        lambda: case.make(made(params, D=dtype), **{name: made(text, D=dtype) for name, text in texts.items()}),
        code,
        dtype,
    )


class _NotOneError(Exception):
    """What was given is no gradient."""


def _plain_array(value: Any, dtype: np.dtype, shapes: list[tuple[int, ...]]) -> np.ndarray:
    """The ordinary array that a gradient stands for; decided here and nowhere in the library."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.requires_grad or value.layout != torch.strided or value.device.type != "cpu":
            raise _NotOneError
        given = value
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        if value.dtype == np.float32 != dtype and given.dtype == torch.bfloat16:
            value = value.astype(dtype)
    if np.ma.isMaskedArray(value) or isinstance(value, str | bytes):
        raise _NotOneError
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    short = array.dtype.name in ("float16", "bfloat16")
    if array.shape not in shapes or not (short or (array.dtype.kind == "f" and array.dtype.itemsize == dtype.itemsize)):
        raise _NotOneError
    return np.array(array.view(np.ndarray).astype(array.dtype.newbyteorder("=")), order="C")


def plain(value: Any, params: Any) -> Any:
    """The ordinary gradients that something stands for.

    Raises:
        _NotOneError: if it stands for none.
    """
    every = [leaf for _, leaf in leaves(params)]
    dtype, size = every[0].dtype, sum(leaf.size for leaf in every)

    def walk(given: Any, tree: Any) -> Any:
        if given is None:
            return None
        if isinstance(tree, dict):
            if not isinstance(given, Mapping) or given.keys() != tree.keys():
                raise _NotOneError
            return {k: walk(given[k], tree[k]) for k in tree}
        if isinstance(tree, list):
            if not isinstance(given, list | tuple) or len(given) != len(tree):
                raise _NotOneError
            return [walk(x, t) for x, t in zip(given, tree, strict=True)]
        return _plain_array(given, dtype, [tree.shape])

    if isinstance(value, fastlr.FlatBuffer):
        if [*value] != [path for path, _ in leaves(params)]:
            raise _NotOneError
        return walk({**value}, tree_map(lambda _, leaf: leaf, params))
    whole = [(size,), params.shape] if isinstance(params, np.ndarray) else [(size,)]
    if isinstance(value, Mapping | list | tuple):
        return walk(value, tree_map(lambda _, leaf: leaf, params))
    return _plain_array(value, dtype, whole)


def _odd_gradients(r: random.Random, opt: fastlr.Optimizer, dtype: str) -> tuple[str, str, Any]:
    """Gradients with something odd in them: as code, what is odd, and as they are."""
    params = opt.params
    every = [*leaves(params)]
    if r.random() < 0.3:
        k = r.randrange(len(every))
        text, (_, leaf) = r.choice(_WHOLE), every[k]
        size = sum(x.size for _, x in every)
        shape = (size,) if r.random() < 0.7 else leaf.shape
        own = params.data if isinstance(params, fastlr.FlatBuffer) else leaf
        return f"(lambda shape, own: {text})({shape}, params)", text, made(text, shape=shape, D=dtype, own=own)
    chosen, text = r.choice(every)[0], r.choice([*ARRAYS, *ARRAYS, *VALUES])

    def one(path: str, leaf: np.ndarray) -> Any:
        return made(text, shape=leaf.shape, D=dtype, own=leaf) if path == chosen else np.ones(leaf.shape, leaf.dtype)

    return f"ones, but {chosen!r}: {text} (shape, D, own: of the parameter)", text, tree_map(one, params)


def _ordinary(what: str, value: Any, opt: fastlr.Optimizer) -> Any:
    """The ordinary value that an odd one stands for in a call.

    Raises:
        _NotOneError: if it stands for none.
    """
    if value is None:
        return None
    if what in ("grads", "accumulate"):
        return plain(value, opt.params)
    if what == "grad_scale":
        number: Any = as_number(value)
        if number is None and _is_population(opt) and not np.ma.isMaskedArray(value):
            array = np.asarray(value)
            if array.shape == (opt.params.population,) and array.dtype.kind in "fiu":
                number = array.astype(np.float64)
        if number is not None and np.all(np.isfinite(number) & (np.asarray(number) > 0)):
            return number
    if what == "only":
        several = isinstance(value, list | tuple | set | frozenset) and all(isinstance(x, str) for x in value)
        if isinstance(value, str) or several:
            return value if isinstance(value, str) else [str(x) for x in value]
    raise _NotOneError  # no streams on the CPU; and no optimizer here follows a Plateau, so that it could observe


def _call(opt: fastlr.Optimizer, what: str, value: Any) -> Exception | None:
    """Make a call with something odd in it; what it raised."""
    try:
        if what in ("accumulate", "observe"):
            getattr(opt, what)(value)
        elif what == "grads":
            opt.step(value)
        else:
            opt.step(gradients(opt.params, 3), **{what: value})
    except Exception as error:
        return error
    return None


_CALLS_OF_A_STEP = ["grads", "grads", "grads", "accumulate", "grad_scale", "only", "stream", "observe"]
_PATTERNS = ["'w'", "['w', 'b']", "'*'", "['*', 'x']", "('b',)", "{'w'}", "''", "['']"]


def _step(r: random.Random) -> Iterator[str]:
    build, code, dtype = _good(r)
    opt, twin = build(), build()
    for k in range(r.choice([0, 1, 2])):
        opt.step(gradients(opt.params, k))
        twin.step(gradients(twin.params, k))
    for _ in range(5):
        what = r.choice(_CALLS_OF_A_STEP)
        before, rule = bits(opt), opt.rule
        if what in ("grads", "accumulate"):
            try:
                how, odd, value = _odd_gradients(r, opt, dtype)
            except (TypeError, ValueError, *_PARTS_FAIL):
                continue
            how = f"{code}; opt.{'step' if what == 'grads' else what}({how})"
        else:
            odd = r.choice([*VALUES, *_PATTERNS * 9] if what == "only" else VALUES)
            value = made(odd)
            how = f"{code}; opt.observe({odd})" if what == "observe" else f"{code}; opt.step(g, {what}={odd})"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ordinary = _ordinary(what, value, opt)
            stands_for_one = True
        except (_NotOneError, TypeError, ValueError, RecursionError, ArithmeticError, RuntimeError):
            ordinary, stands_for_one = None, False
        own = [leaf for _, leaf in leaves(opt.params)]
        held = [(x, np.ndarray.tobytes(x)) for x in _arrays(value) if not any(np.shares_memory(x, p) for p in own)]
        error = _call(opt, what, value)
        if any(np.ndarray.tobytes(x) != old for x, old in held):
            raise BrokenPromiseError(f"{what} wrote the caller's arrays", how)
        if error is not None:
            more = (RuntimeError,) if what == "grads" and value is None else ()
            yield refusal(error, how, *more, *_own(error), where=f"(step, {what})")
            if bits(opt) != before:
                raise BrokenPromiseError(
                    f"a refused {what} changed something", f"{how}: {difference(before, bits(opt))}"
                )
            if opt.rule is not rule and opt.rule.show() != rule.show():
                raise BrokenPromiseError(f"a refused {what} changed the kernel", how)
            continue
        if not stands_for_one:
            kind = odd if what in ("grads", "accumulate") else type(value).__name__
            raise BrokenPromiseError(f"took what is no {what}: {kind}", how)
        if (refused := _call(twin, what, ordinary)) is not None:
            raise BrokenPromiseError(f"took what it refuses as an ordinary {what}", f"{how}  ->  {refused}")
        if bits(opt) != (wanted := bits(twin)):
            raise BrokenPromiseError(f"not as the ordinary {what}", f"{how}: {difference(bits(opt), wanted)}")
        yield "accepted"
    _same_steps(opt, twin, f"{code}; ...", "afterwards", 1)


def _raised(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


# Hyperparameters between steps


def _setter(r: random.Random) -> Iterator[str]:
    build, code, _ = _good(r)
    opt, twin = build(), build()
    known = {*_RANGES, *_SWITCHES, "betas"} - {"ema", "d0", "initial_accumulator_value"}
    names = [*(n for n in _signature(type(opt)) if n in known), "frozen", "ema_decay", "lr", "lr", "speed", "steps"]
    for _ in range(5):
        name, text = r.choice(names), r.choice([*VALUES, *NUMBERS, *SCHEDULED])
        in_group = len(opt.groups) and r.random() < 0.5
        how = f"{code}; opt{'.groups[...]' if in_group else ''}.{name} = {text}"
        target, other = (next(iter(o.groups.values())) if in_group else o for o in (opt, twin))
        value = made(text)
        before, old = bits(opt), getattr(target, name, None)
        error = _raised(lambda name=name, value=value, target=target: setattr(target, name, value))
        if error is not None:
            yield refusal(error, how, AttributeError, *_own(error), where="(setting)")
            now = getattr(target, name, None)
            if bits(opt) != before or (now is not old and repr(now) != repr(old)):
                raise BrokenPromiseError(f"setting {name} was refused and changed something", how)
            continue
        population = opt.params.population if _is_population(opt) else None
        _check_taken(name, value, getattr(target, name), population, how)
        number = as_number(value) if name in _RANGES and not is_scheduled(value) else None
        setattr(other, name, made(text) if number is None else number)
        outcome = _same_steps(opt, twin, how, "set", 1)
        yield outcome
        if outcome != "accepted":  # it goes on with what it was
            for o, t in ((opt, target), (twin, other)):
                setattr(t, name, old)
                o.step(gradients(o.params, 5))


# Functions and other classes

_LINE = {"fun": "fun", "params": "np.ones(3)", "direction": "-np.ones(3)", "method": "'armijo'", "first": "1.0"}
_CALLS: list[tuple[str, dict[str, str], str]] = [
    ("fastlr.flatten", {"tree": "{'w': np.ones(3)}", "population": "2", "alloc": "bytearray", "device": "'cpu'"}, ""),
    (
        "fastlr.flatten({'w': np.ones(3), 'b': np.ones(2)}).__setitem__",
        {"path": "'w'", "value": "np.ones(3)"},
        "buffer",
    ),
    ("fastlr.flatten({'w': np.ones(3), 'b': np.ones(2)}).__getitem__", {"path": "'w'"}, "buffer"),
    ("fastlr.LossScale", {"init": "8.0", "growth": "2.0", "backoff": "0.5", "interval": "3"}, ""),
    ("fastlr.LossScale(8.0).update", {"skipped": "False"}, ""),
    ("fastlr.LossScale(8.0).load_state_dict", {"state": "{'scale': 2.0, 'good': 0}"}, ""),
    ("fastlr.LossScale(8.0).load_state_dict", {"state": "{'scale': @V, 'good': @W}"}, ""),
    ("fastlr.set_num_threads", {"n": "2"}, ""),
    ("fastlr.rule", {"function": "descent.function"}, ""),
    ("fastlr.Optimizer", {"params": "np.ones(3)", "rule": "descent", "lr": "0.1", "backend": "'numpy'"}, ""),
    ("fastlr.line_search", {**_LINE, "c1": "1e-4", "c2": "0.9", "max_evaluations": "20"}, ""),
    ("fastlr.LBFGS", {"params": "np.ones(3)", "history": "5", "method": "'armijo'", "max_evaluations": "9"}, "lbfgs"),
    ("fastlr.LBFGS(np.ones(3)).minimize", {"fun": "fun", "max_steps": "3", "grad_tolerance": "1e-5"}, ""),
    ("fastlr.LBFGS(np.ones(3)).load_state_dict", {"state": "fastlr.LBFGS(np.ones(3)).state_dict()"}, ""),
    ("fastlr.find_lr", {"opt": "opt", "fun": "fun", "low": "1e-5", "high": "1.0", "steps": "4", "diverge": "4.0"}, ""),
    ("opt.rebuild", {"params": "{'w': np.ones(2)}"}, ""),
    ("opt.to", {"device": "'cpu'"}, ""),
    ("opt.save", {"path": "'x.npz'", "params": "True"}, "file"),
    ("opt.load", {"path": "'x.npz'"}, "file"),
    ("opt.load_state_dict", {"state": "opt.state_dict()"}, ""),
    ("opt.groups.__getitem__", {"pattern": "'*'"}, "buffer"),
    ("schedules.Schedule.from_dict", {"data": "{'type': 'Constant', 'value': 0.1}"}, "schedule"),
    ("schedules.Schedule.from_dict", {"data": "{'type': @V, 'value': @W}"}, "schedule"),
    ("schedules.Constant", {"value": "0.1"}, "schedule"),
    ("schedules.Cosine", {"lr": "0.1", "steps": "9", "end": "0.0"}, "schedule"),
    ("schedules.CosineRestarts", {"lr": "0.1", "steps": "9", "growth": "2", "decay": "0.5", "end": "0.0"}, "schedule"),
    ("schedules.Cyclic", {"low": "0.1", "high": "0.2", "up": "3", "down": "4", "mode": "'triangular2'"}, "schedule"),
    ("schedules.Exponential", {"lr": "0.1", "factor": "0.9", "every": "2", "floor": "0.0"}, "schedule"),
    ("schedules.Exponential", {"lr": "0.1", "decay": "0.9"}, "schedule"),
    ("schedules.Exponential", {"lr": "0.1", "half_life": "3.0"}, "schedule"),
    ("schedules.Function", {"function": "lambda n: 0.1"}, "function"),
    ("schedules.Interpolated", {"steps": "(0, 5)", "values": "(0.1, 0.2)", "shape": "'linear'"}, "schedule"),
    ("schedules.InverseSqrt", {"lr": "0.1", "warmup_steps": "3"}, "schedule"),
    ("schedules.InverseTime", {"lr": "0.1", "decay": "0.5", "every": "2"}, "schedule"),
    ("schedules.Linear", {"start": "0.1", "end": "0.0", "steps": "9"}, "schedule"),
    ("schedules.MultiStep", {"lr": "0.1", "milestones": "(2, 5)", "factor": "0.5"}, "schedule"),
    ("schedules.OneCycle", {"lr": "0.1", "steps": "9", "rise": "0.3", "div": "25.0", "phases": "3"}, "schedule"),
    ("schedules.Piecewise", {"boundaries": "(2, 5)", "values": "(0.1, 0.2, 0.3)"}, "schedule"),
    ("schedules.Plateau", {"schedule": "schedules.Constant(0.1)", "factor": "0.5", "patience": "2"}, "schedule"),
    ("schedules.Plateau", {"schedule": "0.1", "threshold": "1e-3", "cooldown": "1", "floor": "0.0"}, "schedule"),
    ("schedules.Polynomial", {"lr": "0.1", "steps": "9", "power": "2.0", "end": "0.0", "cycle": "True"}, "schedule"),
    ("schedules.SlantedTriangular", {"lr": "0.1", "steps": "9", "cut_fraction": "0.2", "ratio": "32.0"}, "schedule"),
    ("schedules.StepDecay", {"lr": "0.1", "factor": "0.5", "every": "3", "count": "'n'"}, "schedule"),
    ("schedules.TimeBased", {"lr": "0.1", "decay": "0.5"}, "schedule"),
    ("schedules.WarmupStableDecay", {"lr": "0.1", "steps": "9", "decay_steps": "3", "warmup_steps": "2"}, "schedule"),
    (
        "schedules.Constant(0.1).warmup",
        {"steps": "3", "start": "0.1", "shape": "'cosine'", "included": "True"},
        "schedule",
    ),
    ("schedules.Constant(0.1).then", {"other": "schedules.Constant(0.2)", "at": "3"}, "schedule"),
    ("schedules.Cosine(0.1, steps=9).clip", {"low": "0.01", "high": "0.05"}, "schedule"),
    ("schedules.Cosine(0.1, steps=9).shift", {"by": "-3"}, "schedule"),
    ("schedules.Cosine(0.1, steps=9).repeat", {"period": "5"}, "schedule"),
    ("schedules.Cosine(0.1, steps=9).per_epoch", {"steps": "5"}, "schedule"),
    ("schedules.Cosine(0.1, steps=9).__mul__", {"other": "0.5"}, "schedule"),
    ("schedules.Cosine(0.1, steps=9)", {"step": "5"}, ""),
    ("schedules.Function(lambda n: 0.1)", {"step": "5"}, "function"),
]
_KEYWORDS = {"step": 0, "tree": 0, "path": 1, "value": 1, "n": 0, "state": 0, "other": 0}  # those given by position


def _function(r: random.Random) -> Iterator[str]:
    called, good, kind = r.choice(_CALLS)
    texts = dict(good)
    chosen = r.choice([*texts])
    if "@V" in texts[chosen]:
        texts[chosen] = texts[chosen].replace("@V", r.choice(VALUES)).replace("@W", r.choice(VALUES))
    else:
        odd = [
            *VALUES,
            *NUMBERS,
            "np.array([1, 2])",
            "np.array([[1.5]])",
            "np.arange(0)",
            "'w'",
            "'lr'",
            "(3, 2)",
            "(1,)",
        ]
        odd += [
            "(0, 10**400)",
            "(0.1,) * 5",
            "np.ones(3)",
            "np.ones(3, 'f4')",
            "(2, 5, 9)",
            "(0, 1, np.nan)",
            "1e4",
            "3.0",
        ]
        texts[chosen] = r.choice(odd)
    names = {"opt": fastlr.SGD({"w": np.ones(3)}, lr=0.1, backend="numpy", groups={"*": {}}), "fun": _square}
    values = {name: made(text, **names) for name, text in texts.items()}
    how = f"{called}({', '.join(f'{name}={text}' for name, text in texts.items())})"
    opt = names["opt"]
    before = bits(opt)
    by_position = [values[n] for n in texts if n in _KEYWORDS or n in ("by", "pattern", "data", "skipped", "device")]
    by_name = {
        n: v for n, v in values.items() if not (n in _KEYWORDS or n in ("by", "pattern", "data", "skipped", "device"))
    }
    threads, folder = fastlr.get_num_threads(), os.getcwd()
    allowed: tuple[type[BaseException], ...] = {
        "buffer": (KeyError,),
        "file": (OSError, FileNotFoundError, IsADirectoryError, PermissionError),
    }.get(kind, ())
    allowed += (RuntimeError,) if called == "fastlr.find_lr" else ()
    if kind == "file":
        os.chdir(_folder.name)
    try:
        out = made(called, **names)(*by_position, **by_name)
        if kind in ("schedule", "function") and isinstance(out, Schedule):
            _check_schedule(out, how, kind, values[chosen])
        elif kind == "lbfgs":
            out.step(_square)
    except BrokenPromiseError:
        raise
    except MemoryError as error:
        if chosen not in ("population",) or not as_number(values[chosen]) > 2**30:
            raise BrokenPromiseError(f"MemoryError ({called})", how) from error
        yield "refused (MemoryError)"
    except Exception as error:
        yield refusal(error, how, *allowed, *_own(error), where=f"({called})")
        if bits(opt) != before:
            raise BrokenPromiseError(f"a refused {called} changed the optimizer", how) from error
    else:
        yield "accepted"
    finally:
        os.chdir(folder)
        fastlr.set_num_threads(threads)


_folder = tempfile.TemporaryDirectory(prefix="fastlr-fuzz-")


def _square(p: Any) -> tuple[float, Any]:
    x = p["w"] if isinstance(p, dict) else p.data if isinstance(p, fastlr.FlatBuffer) else p
    x = np.asarray(x)
    return float((x * x).sum()) / 2, {"w": x.copy()} if isinstance(p, dict) else x.copy()


def _not_finite(x: Any) -> Any:
    return ~np.isfinite(x)


def _grows(schedule: Schedule) -> bool:
    """Whether a factor above 1 is in it, which overflows to infinity."""
    inner = [getattr(schedule, f.name) for f in dataclasses.fields(schedule)]
    factor = getattr(schedule, "factor", None)
    grows = factor is not None and not isinstance(schedule, Plateau) and np.any(np.greater(factor, 1))
    return bool(grows) or any(isinstance(part, Schedule) and _grows(part) for part in inner)


def _check_schedule(schedule: Schedule, how: str, kind: str, given: Any = None) -> None:
    """One step and many give the same; code and data make the same schedule again.

    Args:
        schedule: that was made.
        how: as code.
        kind: "function" if a function of the user's is in it.
        given: the odd argument; an array of one number for each model makes a schedule that gives such arrays.
    """
    steps = np.array([0, 1, 2, 7, 100, 10**6, 2**53])
    try:
        one = [schedule(int(n)) for n in steps]
        many = schedule(steps)
    except Exception as error:
        if kind == "function":
            refusal(error, how, *_own(error), where="a function's value")
            return
        raise BrokenPromiseError(f"{type(error).__name__} at a step", f"{how}  ->  {error}") from error
    if np.array(one).tobytes() != many.tobytes():
        raise BrokenPromiseError("one step and many differ", f"{how}  ->  {one}, {many.tolist()}"[:300])
    if kind == "function":
        return
    shape = np.shape(one[0])
    if shape and (np.ndim(given) != 1 or np.ma.isMaskedArray(given) or isinstance(given, memoryview | bytearray)):
        raise BrokenPromiseError("a schedule took what is no array of numbers", how)
    bad = np.isnan if _grows(schedule) else _not_finite
    if any(np.shape(x) != shape or np.any(bad(x)) for x in one) or not (shape or type(one[0]) is float):
        raise BrokenPromiseError("a schedule gives what is not finite", f"{how}  ->  {one}"[:300])
    if Schedule.from_dict(schedule.to_dict()) != schedule:
        raise BrokenPromiseError("to_dict and from_dict give another schedule", how)
    try:
        again = eval(repr(schedule), {**vars(fastlr.schedules), "inf": np.inf, "array": np.array})
    except Exception as error:
        raise BrokenPromiseError("its code cannot be run", f"{how}  ->  {schedule!r}") from error
    if again != schedule:
        raise BrokenPromiseError("its code gives another schedule", f"{how}  ->  {schedule!r}")


# What the command line reads

_PIECES = [
    "Cosine(1e-3, steps=10)",
    "Constant(0.1)",
    ".warmup(5)",
    ".then(Constant(1), at=3)",
    "0.5 * ",
    "(",
    ")",
    "[",
    "]",
]
_PIECES += [
    "1e400",
    "10**9",
    "-",
    "+",
    "*",
    "**",
    ",",
    "lambda: 0",
    "__import__('os')",
    "'x'",
    '"',
    "\0",
    "\n",
    "\\",
    "é",
]
_PIECES += [
    "Cosine",
    "steps=",
    ".",
    "x",
    "1_000",
    "0x",
    "f'{1}'",
    "if",
    "for x in y",
    "{}",
    "*a",
    "**b",
    "None",
    "True",
]
_PIECES += [
    "Plateau(0.1)",
    "Function(abs)",
    ".clip(0, 1)",
    ".repeat(3)",
    "((((",
    "----",
    "not ",
    "9" * 5000,
    "Cosine(" * 9,
]
_DEEP = [
    "(" * 3000 + ")" * 3000,
    "-" * 5000 + "1",
    "[" * 3000,
    "Constant(1)" + ".shift(1)" * 3000,
    "1*" * 5000 + "Constant(1)",
]
_DEEP += ["Constant(1)" + ".warmup(2)" * 500, "Piecewise((" + "1," * 10**5 + "),(1,))", "Constant(" + "9" * 10**5 + ")"]


def _expression(r: random.Random) -> Iterator[str]:
    from fastlr.plots import parse

    text = r.choice(_DEEP) if r.random() < 0.02 else "".join(r.choice(_PIECES) for _ in range(r.randrange(1, 9)))
    if r.random() < 0.5:
        text = list("0.5 * Cosine(1e-3, steps=10_000, end=0).warmup(500, shape='cosine').clip(0, 1)")
        for _ in range(r.randrange(1, 5)):
            k = r.randrange(len(text))
            text[k] = r.choice(["", "(", ")", "9", ",", ".", "*", text[k] * 3, r.choice(_PIECES)])
        text = "".join(text)
    how = f"fastlr.plots.parse({text[:200]!r})"
    try:
        schedule = parse(text)
    except Exception as error:
        yield refusal(error, how, where="parse")
        return
    _check_schedule(schedule, how, "schedule")
    yield "accepted"


def trial(r: random.Random) -> Iterator[str]:
    """One of all these."""
    pick = r.random()
    chosen = (
        _constructor
        if pick < 0.4
        else _step
        if pick < 0.55
        else _setter
        if pick < 0.65
        else _function
        if pick < 0.93
        else _expression
    )
    yield from chosen(r)
