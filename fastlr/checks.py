"""Checks of what users pass, each with one message: what was wrong, what was expected, what to do."""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from .arrays import places
from .arrays.places import Memory
from .arrays.spans import shared
from .kernels.formats import FORMATS

DTYPES = ("float32", "float64")

COUNTERS = ("step", "clock", "skipped")  # their names in a state dict, in the order of `step.rows.Counts`
# What a state dict holds besides the states of the rule.
RESERVED = ("params", *COUNTERS, "fastlr")


@dataclass(frozen=True)
class Interval:
    """Where a number is allowed: everything finite between two ends.

    Attributes:
        low, high: the ends.
        included: those of the ends that are allowed themselves.
    """

    low: float = -math.inf
    high: float = math.inf
    included: tuple[float, ...] = ()

    @property
    def words(self) -> str:
        """What a number in it must be, for messages."""
        if math.isinf(self.low):
            return "must be finite"
        if math.isinf(self.high) and self.low == 0:
            return f"must be {'non-negative' if self.included else 'positive'} and finite"
        if math.isinf(self.high):
            return f"must be {'at least' if self.included else 'above'} {self.low:g} and finite"
        begin, end = "[" if self.low in self.included else "(", "]" if self.high in self.included else ")"
        return f"must be in {begin}{self.low:g}, {self.high:g}{end}"

    def holds(self, value: Any) -> Any:
        """Whether a number is in it, or for an array, which of its elements are."""
        inside = (value > self.low) & (value < self.high)
        for end in self.included:
            inside = inside | (value == end)
        return inside


FINITE = Interval()
POSITIVE = Interval(0.0)
NON_NEGATIVE = Interval(0.0, included=(0.0,))
AT_LEAST_ONE = Interval(1.0, included=(1.0,))
FRACTION = Interval(0.0, 1.0, (0.0, 1.0))
PROPER_FRACTION = Interval(0.0, 1.0)
RATE = Interval(0.0, 1.0, (0.0,))  # the decay of an average, which at 1 would never move


class _Short(reprlib.Repr):
    """What a message shows of a value: its ends, if it is long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_int(self, value: int, level: int) -> str:
        if abs(value) < 10**100:
            return repr(value)
        return f"a whole number of about {int(value.bit_length() * math.log10(2)) + 1} digits"  # too long for `repr`

    def repr_ndarray(self, value: np.ndarray, level: int) -> str:
        with np.printoptions(threshold=6, edgeitems=2):
            return " ".join(self.repr_instance(value, level).split())


_SHORT = _Short()


def shown(value: Any) -> str:
    """A value for a message: its code, without the middle if that is long."""
    return _SHORT.repr(value)


MOST = 2**63 - 1  # the largest whole number that is taken
COUNTABLE = 2**53  # up to which float64 knows every whole number


def _python_number(value: Any) -> Any:
    """The same number as a Python object, exactly; None if it is not a number. All arguments are judged by this.

    Numbers are Python's real ones (int, float, Fraction, Decimal), integers and floats of NumPy, and arrays of other
    libraries without dimensions. Not numbers are bools, text, complex numbers, dates, durations, masked values, and
    values with a unit.
    """
    if isinstance(value, np.ndarray | np.generic):
        real = value.dtype.kind in "iuf" or value.dtype.name in FORMATS
        plain = isinstance(value, np.generic) or places.is_plain(value)
        return value.item() if real and plain and value.ndim == 0 else None
    if getattr(value, "shape", None) == () and hasattr(value, "item") and places.is_plain(value):
        value = value.item()
    return value if isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool) else None


def real(name: str, value: Any, wanted: str = "a number") -> float:
    """A number as a float; NaN and infinity are numbers here.

    Args:
        name: what the caller calls it.
        value: what the user gave.
        wanted: what it must be, in words.

    Raises:
        TypeError: if it is no number.
        ValueError: if a float cannot hold it.
    """
    if type(value) is float:
        return value
    try:
        number = _python_number(value)
    except Exception as error:  # whatever another library raises where there is nothing to read
        raise TypeError(f"{name} is a {type(value).__name__} that cannot be read as a number: {error}.") from None
    if number is None:
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}.")
    try:
        found = float(number)
    except (OverflowError, ValueError):  # ValueError: Decimal's signaling NaN
        found = math.inf
    if math.isinf(found) and number != found:
        raise ValueError(f"{name} must be {wanted} that a float64 can hold, got {shown(value)}.")
    return found


def reals(name: str, value: Any) -> np.ndarray:
    """One number, or a list or an array of them, as an array of float64 of its own.

    Raises:
        TypeError: if it is something else, or one of them is no number.
        ValueError: if a float cannot hold one.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return np.array([real(f"{name}[{k}]", one) for k, one in enumerate(value)], np.float64)
    if isinstance(value, memoryview) or not getattr(value, "shape", ()):
        return np.array(real(name, value))
    return numeric(name, value).astype(np.float64)


def number(name: str, value: Any, interval: Interval = NON_NEGATIVE) -> float:
    """A number in an interval.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is outside the interval.
    """
    found = real(name, value)
    if not interval.holds(found):
        raise ValueError(f"{name} {interval.words}, got {shown(value)}.")
    return found


def bounded(name: str, value: Any, interval: Interval, population: int | None) -> float | np.ndarray:
    """A number in an interval, or for a population an array `(population,)` of them, which is read-only then.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is outside the interval or of the wrong shape.
    """
    array = reals(name, value)
    if array.ndim and (population is None or array.shape != (population,)):
        wanted = "one number" if population is None else f"one number or an array of shape ({population},)"
        hint = "" if population is not None else " (only a population takes arrays: see fastlr.flatten)"
        raise ValueError(f"{name} must be {wanted}, got shape {array.shape}{hint}.")
    if array.ndim == 0:
        return number(name, array.item(), interval)
    for outside in array[~interval.holds(array)].tolist():
        number(name, outside, interval)
    array.flags.writeable = False
    return array


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    return bool(value)


def mask(name: str, value: Any, population: int | None) -> np.ndarray:
    """One bool for each model of a population, as a read-only array.

    Raises:
        TypeError: if it is no array of bools.
        ValueError: if it has another shape.
    """
    array = readable(name, value).copy()
    if array.dtype != bool:
        raise TypeError(f"{name} must be True, False or an array of bools, one for each model, got {shown(value)}.")
    if array.shape != (population,):
        raise ValueError(f"{name} must be one bool or an array of shape ({population},), got shape {array.shape}.")
    array.flags.writeable = False
    return array


def scale(name: str, value: Any, population: int | None) -> float | np.ndarray:
    """A factor on gradients: positive and finite, one number or one for each model, see `bounded`."""
    return bounded(name, value, POSITIVE, population)


def called(path: str, name: str = "params") -> str:
    """What a leaf is called in messages."""
    return f"{name}[{path!r}]" if path else name


def aligned(leaf_name: str, memory: Memory) -> None:
    """Check that an array stands at a multiple of its element's size.

    Raises:
        ValueError: if it does not.
    """
    if not memory.aligned:
        raise ValueError(
            f"{leaf_name} is not aligned: its address {memory.address:#x} is no multiple of the size of a "
            f"{memory.kind}. Pass a copy of it."
        )


def arrays(paths: Sequence[str], leaves: Sequence[Memory]) -> str:
    """Check that leaves have one floating dtype; its name.

    Raises:
        TypeError: if a leaf is not float32 or float64, or they are mixed.
        ValueError: if there is none.
    """
    if not leaves:
        raise ValueError("params holds no arrays. Pass at least one array of float32 or float64.")
    for path, leaf in zip(paths, leaves, strict=True):
        leaf_name = called(path)
        if leaf.kind not in DTYPES:
            raise TypeError(f"{leaf_name} has dtype {leaf.kind}, expected float32 or float64. Convert it with .astype.")
        if leaf.kind != leaves[0].kind:
            raise TypeError(
                f"{leaf_name} has dtype {leaf.kind}, but {called(paths[0])} has {leaves[0].kind}. "
                "Give all parameters one dtype, or use one optimizer for each dtype."
            )
    return leaves[0].kind


def parameters(paths: Sequence[str], leaves: Sequence[Memory], make_contiguous: str) -> str:
    """Check the caller's parameters, which are updated where they are; the name of their dtype.

    Args:
        paths: of the leaves.
        leaves: their memory.
        make_contiguous: what to write for a contiguous copy, for messages.

    Raises:
        TypeError: as `arrays`.
        ValueError: if a leaf is not C-contiguous, aligned and writable, or two leaves overlap.
    """
    dtype = arrays(paths, leaves)
    for path, leaf in zip(paths, leaves, strict=True):
        leaf_name = called(path)
        if not leaf.contiguous:
            raise ValueError(
                f"{leaf_name} is not C-contiguous, so it cannot be updated in place. "
                f"Pass {make_contiguous} or use fastlr.flatten(params)."
            )
        aligned(leaf_name, leaf)
        if not leaf.writeable:
            raise ValueError(f"{leaf_name} is read-only, so it cannot be updated in place. Pass a copy of it.")
    both = shared((leaf, called(path), path) for path, leaf in zip(paths, leaves, strict=True))
    if both is not None:
        raise ValueError(
            f"{both[0]} and {both[1]} share memory, so both cannot be updated. "
            "Pass each parameter once (tied weights: keep one of them and add up their gradients)."
        )
    return dtype


def companions(
    name: str,
    paths: Sequence[str],
    leaves: Sequence[Memory],
    params: Sequence[Memory],
    written: bool,
    make_contiguous: str,
    kinds: Sequence[str] | None = None,
) -> None:
    """Check arrays that go along with the parameters, element by element, where they are.

    Args:
        name: what the caller calls them.
        paths: of the leaves.
        leaves: what the user gave.
        params: the parameters.
        written: whether the step writes them, so that they must be apart from the parameters and from each other.
        make_contiguous: what to write for a contiguous copy, for messages.
        kinds: the dtypes that they may have; None: the parameters'.

    Raises:
        TypeError: if a leaf is of another dtype.
        ValueError: if a leaf has another shape, cannot be written or is not C-contiguous, or shares memory.
    """
    for path, leaf, param in zip(paths, leaves, params, strict=True):
        leaf_name = called(path, name)
        if kinds is not None and leaf.kind not in kinds:
            raise TypeError(f"{leaf_name} has dtype {leaf.kind}, expected {' or '.join(kinds)}.")
        if kinds is None and leaf.kind != param.kind:
            raise TypeError(f"{leaf_name} has dtype {leaf.kind}, but the parameter has {param.kind}.")
        if leaf.shape != param.shape:
            raise ValueError(f"{leaf_name} has shape {leaf.shape}, but the parameter has {param.shape}.")
        if not leaf.contiguous:
            raise ValueError(f"{leaf_name} is not C-contiguous. Pass {make_contiguous}.")
        aligned(leaf_name, leaf)
        if written and not leaf.writeable:
            raise ValueError(f"{leaf_name} is read-only, so it cannot be written. Pass a copy of it.")
    labelled = [(leaf, called(path, name)) for path, leaf in zip(paths, leaves, strict=True)]
    arrays = [(leaf, label, label if written else name) for leaf, label in labelled]
    arrays += [(leaf, called(path), "params") for path, leaf in zip(paths, params, strict=True)]
    both = shared(arrays)
    if both is not None:
        raise ValueError(f"{both[0]} and {both[1]} share memory. Pass memory of its own for {name}.")


def address(array: np.ndarray) -> int:
    """The address of an array's first element; whoever uses it keeps the array alive."""
    return int(array.__array_interface__["data"][0])


def readable(name: str, leaf: Any) -> np.ndarray:
    """What a user gave for an array of numbers, as NumPy reads it; without a copy where possible.

    Raises:
        TypeError: if it is not one, or is more than the numbers in its memory, see `places.is_plain`.
    """
    places.check_plain(name, leaf)
    try:
        array = np.asarray(leaf)
    except Exception as error:  # whatever an array of another library raises: torch for requires_grad, say
        raise TypeError(f"{name} is a {type(leaf).__name__} that NumPy cannot read: {error}") from None
    if array.dtype == object:
        given = "an array of objects" if isinstance(leaf, np.ndarray) else f"a {type(leaf).__name__}"
        raise TypeError(f"{name} is {given}, expected an array of numbers.")
    return array


def numeric(name: str, leaf: Any) -> np.ndarray:
    """As `readable`, of whatever dtype of real numbers.

    Raises:
        TypeError: if it is no array of real numbers, or is more than the numbers in its memory.
    """
    array = readable(name, leaf)
    if array.dtype.kind not in "iuf" and array.dtype.name not in FORMATS:
        raise TypeError(f"{name} must be real numbers, got an array of {array.dtype}.")
    return array


def _bits(leaf: Any) -> np.ndarray | None:
    """The memory of a PyTorch tensor of bfloat16, which NumPy cannot read, as uint16; None if it is something else."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.bfloat16:
        return None
    array: np.ndarray = readable("", leaf.detach().view(torch.int16)).view(np.uint16)
    return array


def gradient(
    path: str, leaf: Any, shapes: Sequence[tuple[int, ...] | None], formats: Mapping[str, str]
) -> tuple[np.ndarray, str]:
    """A gradient as an array of a right dtype and shape, without a copy where possible, and the format it has.

    Args:
        path: of the leaf, or "" for all parameters in one array.
        leaf: what the user gave.
        shapes: those that are right; the first is the one to ask for.
        formats: the name of each right dtype to that of the format; the first is the parameters' own.

    Raises:
        TypeError: if it is no array or has another dtype.
        ValueError: if it has another shape.
    """
    leaf_name = called(path, "grads")
    array = _bits(leaf)
    kind = "bfloat16"
    if array is None:
        array = readable(leaf_name, leaf)
        if array.dtype.name not in formats or not array.dtype.isnative:
            own = next(iter(formats))
            hint = " (bits of 16-bit floats need grad_dtype=)" if array.dtype == np.uint16 else ""
            raise TypeError(
                f"{leaf_name} has dtype {array.dtype}, but the parameters have {own}. Convert it with .astype{hint}."
            )
        kind = formats[array.dtype.name]
    if array.shape not in shapes:
        if path or shapes[0] is None:
            raise ValueError(f"{leaf_name} has shape {array.shape}, but the parameter has {shapes[-1]}.")
        size = int(np.prod(shapes[0]))
        expected = f"the shape {shapes[1]}" if shapes[1] is not None else "the structure of params"
        raise ValueError(
            f"grads has shape {array.shape}, params has {size} elements. "
            f"Pass {expected}, or one gradient per parameter in the same flat order, shape ({size},)."
        )
    return array, kind


def state_names(names: Iterable[str], columns: Iterable[str]) -> None:
    """Check the names of a rule's states against the other names in a state dict.

    Args:
        names: of the states.
        columns: what a step keeps for each element besides the states.

    Raises:
        ValueError: if one is taken; saving such a state would overwrite something else.
    """
    reserved = (*RESERVED, *columns)
    for name in names:
        if name in reserved:
            raise ValueError(
                f"a state called {name!r} cannot be saved beside {', '.join(reserved)}. Rename it in the rule."
            )


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """One pattern or several, as a tuple.

    Raises:
        TypeError: if it is something else.
        ValueError: if there is none.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(x, str) for x in value):
        raise TypeError(f"{name} must be a pattern or a list of patterns, got {shown(value)}.")
    if not value:
        raise ValueError(f"{name} must name a pattern or several, got {shown(value)}.")
    return tuple(value)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number, which may be written as a float: 1e4.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is below the least or above the most, without one above `MOST`.
    """
    if not real(name, value, "a whole number").is_integer():
        raise TypeError(f"{name} must be a whole number, got {shown(value)}.")
    found = int(_python_number(value))
    if found < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}.")
    if found > (MOST if most is None else most):
        wanted = "2**63 - 1" if most is None else f"{most:,}"
        raise ValueError(f"{name} must be at most {wanted}, got {shown(value)}.")
    return found


def count(name: str, value: Any) -> int:
    """A positive whole number, as `whole`.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is not positive.
    """
    return whole(name, value, 1)


def counted(name: str, value: Any) -> int:
    """A whole number that something has counted: from 0 to `COUNTABLE`.

    Raises:
        ValueError: if it is something else.
    """
    if type(value) is not int or not 0 <= value < COUNTABLE:
        raise ValueError(f"{name} must be a whole number from 0 to 2**53, got {shown(value)}.")
    return value


def choices(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check names against those that exist.

    Raises:
        TypeError: if one is unknown.
    """
    known = list(known)
    for one in given:
        if one not in known:
            raise TypeError(f"{name} {shown(one)} is not known; there are {', '.join(known)}.")
