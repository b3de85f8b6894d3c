"""What a caller saves with an optimizer: numbers, strings, lists, dicts and arrays, as JSON and a list of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .checks import shown
from .files import DTYPES

__all__ = ["pack", "unpack"]

DEEPEST = 200  # containers within containers
_DTYPES = {dtype.name for dtype in DTYPES.values()}
_ARRAY, _TUPLE = "$array", "$tuple"  # stand for what JSON lacks; a caller's key that begins with $ gets one more


def pack(extra: Any) -> tuple[Any, list[np.ndarray]]:
    """What a caller wants to save, as JSON has it and the arrays in it.

    Raises:
        TypeError: if something in it is none of these.
        ValueError: if it is nested too deep, or in a circle.
    """
    arrays: list[np.ndarray] = []

    def one(label: str, value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError(f"extra is nested more than {DEEPEST} deep, or in a circle.")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"{label} has the key {shown(key)}; keys must be strings. Convert it with str.")
            return {
                ("$" if key.startswith("$") else "") + key: one(f"{label}[{key!r}]", v, depth + 1)
                for key, v in value.items()
            }
        if isinstance(value, list | tuple):
            items = [one(f"{label}[{k}]", v, depth + 1) for k, v in enumerate(value)]
            return {_TUPLE: items} if isinstance(value, tuple) else items
        if type(value) is np.ndarray and value.dtype.name in _DTYPES:
            arrays.append(value.astype(value.dtype.newbyteorder("="), copy=False))
            return {_ARRAY: len(arrays) - 1}
        if isinstance(value, np.generic) and value.dtype.name in _DTYPES:
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise TypeError(
            f"{label} is {kind}. A file takes numbers, strings, None, lists, tuples, dicts with strings as keys and "
            "NumPy arrays of numbers; convert it."
        )

    if not isinstance(extra, Mapping):
        raise TypeError(f"extra must be a dict, got {shown(extra)}.")
    return one("extra", extra, 0), arrays


def unpack(packed: Any, array: Callable[[int], np.ndarray]) -> dict[str, Any]:
    """What `pack` was given.

    Args:
        packed: as JSON had it.
        array: returns the array of a number.

    Raises:
        ValueError: if it is something else.
    """

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {_ARRAY} and type(value[_ARRAY]) is int and value[_ARRAY] >= 0:
            return array(value[_ARRAY])
        if value.keys() == {_TUPLE} and isinstance(value[_TUPLE], list):
            return tuple(one(v) for v in value[_TUPLE])
        if any(key.startswith("$") and not key.startswith("$$") for key in value):
            raise ValueError("what was saved as extra is damaged.")
        return {key.removeprefix("$"): one(v) for key, v in value.items()}

    if not isinstance(packed, dict):
        raise ValueError("what was saved as extra is damaged.")
    return one(packed)  # type: ignore[no-any-return]


def fits(dtype: np.dtype, shape: tuple[int, ...], held: int) -> None:
    """Check an array of the caller's before it is read: there is no more of it than the file holds.

    Raises:
        ValueError: if there is.
    """
    if dtype.name not in _DTYPES or math.prod(shape) * dtype.itemsize > held:
        raise ValueError("what was saved as extra is damaged.")
