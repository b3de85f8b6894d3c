"""Checks of what users pass, each with one message: what was wrong, what was expected, what to do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

DTYPES = ("float32", "float64")

# What a state dict holds beside the states of the rule.
RESERVED = ("params", "step", "clock", "fastlr")

# Hyperparameters by their name in the API: (lowest, highest, whether the highest is allowed). Others must be finite.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "lr": (0.0, math.inf, False),
    "betas": (0.0, 1.0, False),
    "eps": (0.0, math.inf, False),
    "weight_decay": (0.0, math.inf, False),
    "momentum": (0.0, math.inf, False),
    "alpha": (0.0, 1.0, True),
    "rho": (0.0, 1.0, True),
    "lr_decay": (0.0, math.inf, False),
    "initial_accumulator_value": (0.0, math.inf, False),
}


def _expected(name: str) -> str:
    low, high, closed = _RANGES.get(name, (-math.inf, math.inf, False))
    if (low, high) == (-math.inf, math.inf):
        return "must be finite"
    if high == math.inf:
        return "must be non-negative and finite"
    return f"must be in [{low:g}, {high:g}{']' if closed else ')'}"


def _number(name: str, label: str, value: Any, population: int | None) -> float | np.ndarray:
    low, high, closed = _RANGES.get(name, (-math.inf, math.inf, False))
    if value is None or isinstance(value, bool | np.bool_ | str):
        raise TypeError(f"{label} must be a number, got {value!r}.")
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{label} must be a number, got {value!r}.") from None
    if array.ndim and (population is None or array.shape != (population,)):
        expected = "one number" if population is None else f"one number or an array of shape ({population},)"
        hint = "" if population is not None else " (only a population takes arrays: see fastlr.flatten)"
        raise ValueError(f"{label} must be {expected}, got shape {array.shape}{hint}.")
    good = np.isfinite(array) & (array >= low) & ((array <= high) if closed else (array < high))
    if not good.all():
        shown = array if array.ndim == 0 else array[~good][0]
        raise ValueError(f"{label} {_expected(name)}, got {float(shown)!r}.")
    if array.ndim == 0:
        return float(array)
    array.flags.writeable = False
    return array


def hyperparameter(name: str, value: Any, like: Any, population: int | None, where: str = "") -> Any:
    """A hyperparameter in its normal form: bool, float, read-only array (population,) or a tuple of those.

    Args:
        name: its name in the API.
        value: what the user gave.
        like: a value of the right kind: a bool for flags, a tuple for pairs.
        population: number of models, or None.
        where: what to put before the name in messages, such as a group.

    Raises:
        TypeError: if it is of the wrong kind.
        ValueError: if it is outside its range or of the wrong shape.
    """
    label = f"{where}{name}"
    if isinstance(like, bool):
        if isinstance(value, bool | np.bool_):
            return bool(value)
        raise TypeError(f"{label} must be True or False, got {value!r}.")
    if isinstance(like, tuple):
        if not isinstance(value, tuple | list) or len(value) != len(like):
            raise ValueError(f"{label} must be {len(like)} numbers, got {value!r}.")
        return tuple(_number(name, f"{label}[{k}]", v, population) for k, v in enumerate(value))
    return _number(name, label, value, population)


def _called(path: str, name: str = "params") -> str:
    return f"{name}[{path!r}]" if path else name


def arrays(paths: Sequence[str], leaves: Sequence[Any]) -> str:
    """Check that leaves are arrays of one floating dtype; its name.

    Raises:
        TypeError: if a leaf is not a NumPy array of float32 or float64, or they are mixed.
        ValueError: if there is none.
    """
    if not leaves:
        raise ValueError("params holds no arrays. Pass at least one array of float32 or float64.")
    first = None
    for path, leaf in zip(paths, leaves, strict=True):
        called = _called(path)
        if not isinstance(leaf, np.ndarray):
            raise TypeError(
                f"{called} is a {type(leaf).__name__}, expected a NumPy array that can be updated in place. "
                "Convert it, or share its memory (torch: tensor.detach().numpy(); JAX: a copy, np.array(x))."
            )
        if leaf.dtype.name not in DTYPES or not leaf.dtype.isnative:
            raise TypeError(f"{called} has dtype {leaf.dtype}, expected float32 or float64. Convert it with .astype.")
        if first is None:
            first = leaf.dtype
        elif leaf.dtype != first:
            raise TypeError(
                f"{called} has dtype {leaf.dtype}, but {_called(paths[0])} has {first}. "
                "Give all parameters one dtype, or use one optimizer for each dtype."
            )
    assert first is not None
    return str(first.name)


def parameters(paths: Sequence[str], leaves: Sequence[Any]) -> str:
    """Check the caller's parameters, which are updated where they are; the name of their dtype.

    Raises:
        TypeError: as `arrays`.
        ValueError: if a leaf is not C-contiguous, aligned and writable, or two leaves overlap.
    """
    dtype = arrays(paths, leaves)
    for path, leaf in zip(paths, leaves, strict=True):
        called = _called(path)
        if not leaf.flags.c_contiguous or not leaf.flags.aligned:
            raise ValueError(
                f"{called} is not C-contiguous, so it cannot be updated in place. "
                "Pass np.ascontiguousarray(...) or use fastlr.flatten(params)."
            )
        if not leaf.flags.writeable:
            raise ValueError(f"{called} is read-only, so it cannot be updated in place. Pass a copy of it.")
    spans = sorted((address(leaf), leaf.nbytes, path) for path, leaf in zip(paths, leaves, strict=True) if leaf.size)
    for (start, nbytes, path), (after, _, other) in itertools.pairwise(spans):
        if start + nbytes > after:
            raise ValueError(
                f"{_called(path)} and {_called(other)} share memory, so both cannot be updated. "
                "Pass each parameter once (tied weights: keep one of them and add up their gradients)."
            )
    return dtype


def address(array: np.ndarray) -> int:
    """The address of an array's first element; whoever uses it keeps the array alive."""
    return int(array.__array_interface__["data"][0])


def _readable(path: str, leaf: Any) -> np.ndarray:
    try:
        return leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    except Exception as error:  # whatever an array of another library raises: torch for requires_grad, say
        raise TypeError(
            f"{_called(path, 'grads')} is a {type(leaf).__name__} that NumPy cannot read: {error}"
        ) from None


def gradient(path: str, leaf: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A leaf of the gradients as an array of the right dtype and shape, without a copy where possible.

    Raises:
        TypeError: if it is no array or has another dtype than the parameters.
        ValueError: if it has another shape.
    """
    called = _called(path, "grads")
    array = _readable(path, leaf)
    if array.dtype != dtype:
        raise TypeError(f"{called} has dtype {array.dtype}, but the parameters have {dtype}. Convert it with .astype.")
    if array.shape != shape:
        raise ValueError(f"{called} has shape {array.shape}, but the parameter has {shape}.")
    return array


def flat_gradient(grads: Any, size: int, shape: tuple[int, ...] | None, dtype: np.dtype) -> np.ndarray:
    """The gradients of all parameters in one array.

    Args:
        grads: what the user gave.
        size: number of parameters.
        shape: another shape that is right as well: that of parameters that are one array.
        dtype: that of the parameters.

    Raises:
        TypeError: if it is no array or has another dtype than the parameters.
        ValueError: if it has another shape.
    """
    array = _readable("", grads)
    if array.dtype != dtype:
        raise TypeError(f"grads has dtype {array.dtype}, but the parameters have {dtype}. Convert it with .astype.")
    if array.shape != (size,) and array.shape != shape:
        expected = f"the shape {shape}" if shape is not None else "the structure of params"
        raise ValueError(
            f"grads has shape {array.shape}, params has {size} elements. "
            f"Pass {expected}, or one gradient per parameter in the same flat order, shape ({size},)."
        )
    return array


def state_names(names: Iterable[str]) -> None:
    """Check the names of a rule's states against the other names in a state dict.

    Raises:
        ValueError: if one is taken; saving such a state would overwrite something else.
    """
    for name in names:
        if name in RESERVED:
            raise ValueError(
                f"a state called {name!r} cannot be saved beside {', '.join(RESERVED)}. Rename it in the rule."
            )


def count(name: str, value: Any) -> int:
    """A positive whole number.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return int(value)


def choices(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check names against those that exist.

    Raises:
        TypeError: if one is unknown.
    """
    known = list(known)
    for one in given:
        if one not in known:
            raise TypeError(f"{name} {one!r} is not known; there are {', '.join(known)}.")
