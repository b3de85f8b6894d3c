"""Where arrays live: what an optimizer needs to know about them, whichever library made them."""

from __future__ import annotations

import abc
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.formats import FORMATS

__all__ = ["HOST", "Alloc", "Memory", "Place", "common_place", "of"]

Alloc = Callable[[int], Any]

_PAGE = 4096
_ALIGNMENT = 64
# Streams that start at the same page offset fight for the same cache sets: ten of them ran at 35 GB/s, at offsets
# 320 bytes apart at 63.
_STAGGER = 320


@dataclass(frozen=True)
class Memory:
    """An array as its memory.

    Attributes:
        address: of the first element; whoever uses it keeps the array alive.
        shape: in elements.
        kind: the name of its dtype.
        nbytes: of all elements.
        contiguous: whether the elements stand in C order without gaps.
        aligned: whether the address is a multiple of an element's size.
        writeable: whether they may be written.
    """

    address: int
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    contiguous: bool
    aligned: bool
    writeable: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def is_plain(array: Any) -> bool:
    """Whether an array is just the numbers in its memory: no mask, no units, no subclass with its own arithmetic."""
    if isinstance(array, np.ndarray):
        return type(array) in (np.ndarray, np.memmap)
    return not hasattr(array, "units")


def check_plain(called: str, array: Any) -> None:
    """Check that an array is just the numbers in its memory, see `is_plain`.

    Raises:
        TypeError: if it is not; the message says what to pass.
    """
    if is_plain(array):
        return
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{called} is a masked array, whose mask would be ignored. Pass x.filled(0), or x.data to use the masked "
            "elements too."
        )
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    if isinstance(array, np.ndarray):
        raise TypeError(
            f"{called} is a {kind}, a subclass of np.ndarray, and what it adds would be ignored. "
            "Pass np.asarray(x), which is the same memory."
        )
    raise TypeError(f"{called} is a {kind}, whose units would be ignored. Pass the numbers alone.")


class Place(abc.ABC):
    """A kind of memory and the library whose arrays are in it.

    Attributes:
        label: what users call it: "cpu", "cuda:0".
        kind_of_array: what its arrays are called in messages.
        make_contiguous: what to write to get a contiguous array.
    """

    label: str
    kind_of_array: str
    make_contiguous: str

    @abc.abstractmethod
    def memory(self, called: str, leaf: Any) -> Memory:
        """What an array is, as memory.

        Raises:
            TypeError: if it is no array of this place; `called` names it.
        """

    def address(self, array: Any) -> int:
        """The address of an array's first element."""
        return self.memory("", array).address

    @abc.abstractmethod
    def allocate(
        self, count: int, dtype: Any, position: int = 0, alloc: Alloc | None = None, used: Sequence[Memory] = ()
    ) -> Any:
        """A flat array of zeros, aligned for kernels."""

    @abc.abstractmethod
    def fill(self, array: Any, value: float) -> None:
        """Set all elements to a number."""

    @abc.abstractmethod
    def copy(self, to: Any, source: Any) -> None:
        """Copy all elements of an array in the same memory, of the same shape and dtype."""

    @abc.abstractmethod
    def upload(self, to: Any, source: np.ndarray) -> None:
        """Copy all elements of an array on the host, of the same shape; two-byte floats as their bits."""

    @abc.abstractmethod
    def download(self, array: Any) -> np.ndarray:
        """A copy as a NumPy array on the host; two-byte floats as their bits."""

    @abc.abstractmethod
    def as_format(self, bits: Any, name: str) -> Any:
        """Bits as numbers of a two-byte format, if the library has it; else as they are."""

    @abc.abstractmethod
    def contiguous(self, array: Any) -> Any:
        """The array itself if its elements stand in order, else a copy in which they do."""


class Host(Place):
    """NumPy arrays."""

    label = "cpu"
    kind_of_array = "NumPy array"
    make_contiguous = "np.ascontiguousarray(...)"

    def memory(self, called: str, leaf: Any) -> Memory:
        """What an array is, as memory."""
        if not isinstance(leaf, np.ndarray):
            raise TypeError(
                f"{called} is a {type(leaf).__name__}, expected a NumPy array that can be updated in place. "
                "Convert it, or share its memory (torch: tensor.detach().numpy(); JAX: a copy, np.array(x))."
            )
        check_plain(called, leaf)
        flags, address = leaf.flags, leaf.__array_interface__["data"][0]
        described = (flags.c_contiguous, flags.aligned, flags.writeable)
        return Memory(address, leaf.shape, str(leaf.dtype), leaf.nbytes, *described)

    def allocate(
        self, count: int, dtype: Any, position: int = 0, alloc: Alloc | None = None, used: Sequence[Memory] = ()
    ) -> np.ndarray:
        """Memory for `count` zeros, 64-byte aligned, at the page offset of its position among the streams of a sweep.

        Args:
            count: number of elements.
            dtype: their dtype.
            position: 0 for parameters, 1 for gradients, 2 and up for states.
            alloc: where the memory comes from: `alloc(nbytes)` returns a writable buffer of at least that size, none
                of which is in use.
            used: what is in use, besides all that came from `alloc` before.

        Raises:
            TypeError: if what `alloc` returns is no buffer.
            ValueError: if it is too small, read-only, or in use; then nothing is written.
        """
        nbytes = count * np.dtype(dtype).itemsize
        room = nbytes + 2 * _PAGE
        raw = np.empty(room, np.uint8) if alloc is None else _bytes_from(alloc, room)
        start = -self.address(raw) % _PAGE + position * _STAGGER % _PAGE
        data = raw[start : start + nbytes].view(dtype)
        if alloc is not None and nbytes:
            _take(raw, self.address(data), nbytes, used)
        data.fill(0)
        return data

    def address(self, array: np.ndarray) -> int:
        """The address of an array's first element."""
        return int(array.__array_interface__["data"][0])

    def fill(self, array: np.ndarray, value: float) -> None:
        """Set all elements to a number."""
        array.fill(value)

    def copy(self, to: np.ndarray, source: np.ndarray) -> None:
        """Copy all elements."""
        to[...] = source

    def upload(self, to: np.ndarray, source: np.ndarray) -> None:
        """Copy all elements."""
        to[...] = source

    def download(self, array: np.ndarray) -> np.ndarray:
        """A copy."""
        return array.copy()

    def contiguous(self, array: np.ndarray) -> np.ndarray:
        """The array itself if its elements stand in order, else a copy."""
        return np.ascontiguousarray(array).reshape(array.shape)

    def as_format(self, bits: np.ndarray, name: str) -> np.ndarray:
        """Bits as float16, or as bfloat16 where the package ml_dtypes is installed."""
        if name == "float16":
            return bits.view(np.float16)
        try:
            import ml_dtypes
        except ImportError:
            return bits
        return bits.view(ml_dtypes.bfloat16)


def _bytes_from(alloc: Alloc, room: int) -> np.ndarray:
    """What a user's function returns for memory, as bytes; see `Host.allocate`."""
    given = alloc(room)
    try:
        view = memoryview(given)
        if "O" in view.format:
            raise TypeError("it holds references to Python objects")
        raw = np.frombuffer(view, np.uint8)  # an array of its own, which all views of it keep alive, and nothing else
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(f"alloc({room}) returned a {type(given).__name__}, expected a buffer: {error}.") from None
    if raw.nbytes < room or not raw.flags.writeable:
        raise ValueError(
            f"alloc({room}) returned {raw.nbytes} {'' if raw.flags.writeable else 'read-only '}bytes, "
            f"expected at least {room} writable ones."
        )
    return raw


# What came from `alloc=` and is still in use: begin and end by the identity of an array that lives as long.
_IN_USE: dict[int, tuple[int, int, weakref.ref[np.ndarray]]] = {}


def _take(raw: np.ndarray, begin: int, nbytes: int, used: Sequence[Memory]) -> None:
    """Take memory that came from `alloc=` into use until `raw` is gone.

    Raises:
        ValueError: if some of it is in use.
    """
    end = begin + nbytes

    def taken() -> bool:
        return any(a < end and begin < b for a, b, _ in list(_IN_USE.values()))

    if taken():
        gc.collect()  # what used it may be garbage that refers to itself
    if taken() or any(m.address < end and begin < m.address + m.nbytes for m in used):
        raise ValueError(
            "alloc returned memory that is in use: that of parameters, or what it returned for a buffer that still "
            "exists. It must return memory of its own for each buffer, until that buffer is gone."
        )
    key = id(raw)
    _IN_USE[key] = begin, end, weakref.ref(raw, lambda _: _IN_USE.pop(key, None))


HOST = Host()

# Functions that know the place of arrays beyond the host's: `find(leaf)` returns it, or None.
FINDERS: list[Callable[[Any], Place | None]] = []


def of(leaf: Any) -> Place:
    """The place of an array; the host for anything that no library's finder knows."""
    if isinstance(leaf, np.ndarray) and type(leaf) is np.ndarray:
        return HOST
    for find in FINDERS:
        place = find(leaf)
        if place is not None:
            return place
    return HOST


def common_place(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> Place:
    """The place where all leaves are.

    Raises:
        ValueError: if they are in different ones.
    """
    found = [of(leaf) for leaf in leaves]
    for path, place in zip(paths, found, strict=True):
        if place is not found[0]:
            first, other = (f"{name}[{p!r}]" if p else name for p in (paths[0], path))
            raise ValueError(
                f"{other} is a {place.kind_of_array} on {place.label}, but {first} is a {found[0].kind_of_array} on "
                f"{found[0].label}. Move all to one place, or use one optimizer for each."
            )
    return found[0] if found else HOST


def storage_of(kind: str) -> str:
    """The dtype in memory of a dtype or format: of two-byte floats that of their bits."""
    return FORMATS[kind].storage if kind in FORMATS else kind
