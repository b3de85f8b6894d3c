"""Flat buffers: one aligned allocation that holds many leaves."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import checks
from .trees import Structure, leaves_with_paths

__all__ = ["FlatBuffer", "flatten"]

Alloc = Callable[[int], Any]

_PAGE = 4096
_ALIGNMENT = 64
# Streams that start at the same page offset fight for the same cache sets: ten of them ran at 35 GB/s, at offsets
# 320 bytes apart at 63.
_STAGGER = 320


def allocate(count: int, dtype: Any, place: int = 0, alloc: Alloc | None = None) -> np.ndarray:
    """Memory for `count` zeros, 64-byte aligned, at the page offset of its place among the streams of a sweep.

    Args:
        count: number of elements.
        dtype: their dtype.
        place: 0 for parameters, 1 for gradients, 2 and up for states.
        alloc: where the memory comes from: `alloc(nbytes)` returns a writable buffer of at least that size.

    Raises:
        TypeError: if what `alloc` returns is no buffer.
        ValueError: if it is too small or read-only.
    """
    nbytes = count * np.dtype(dtype).itemsize
    room = nbytes + 2 * _PAGE
    if alloc is None:
        raw = np.empty(room, np.uint8)
    else:
        given = alloc(room)
        try:
            raw = np.frombuffer(given, np.uint8)
        except (TypeError, ValueError, BufferError) as error:
            raise TypeError(f"alloc({room}) returned a {type(given).__name__}, expected a buffer: {error}.") from None
        if raw.nbytes < room or not raw.flags.writeable:
            raise ValueError(
                f"alloc({room}) returned {raw.nbytes} {'' if raw.flags.writeable else 'read-only '}bytes, "
                f"expected at least {room} writable ones."
            )
    start = -checks.address(raw) % _PAGE + place * _STAGGER % _PAGE
    data = raw[start : start + nbytes].view(dtype)
    data.fill(0)
    return data


class FlatBuffer(Mapping[str, Any]):
    """Many arrays in one aligned allocation; made by `fastlr.flatten`.

    `buf["layer.w"]` is a view of a leaf, `buf["layer"]` a buffer of the leaves below a path, `buf["w"] = x` copies `x`
    into a leaf of exactly its shape. Iterating gives the paths, `len(buf)` is the number of leaves.

    Attributes:
        data: all elements in order, shape `(n,)`, 64-byte aligned.
        population: number of models, or None; the leaves of a population have that many rows.
    """

    def __init__(
        self, structure: Structure, shapes: Sequence[tuple[int, ...]], data: np.ndarray, population: int | None = None
    ) -> None:
        self.data = data
        self.population = population
        self._structure = structure
        self._shapes = tuple(shapes)
        self._ends = ends = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
        self._views = {
            path: data[a:b].reshape(shape)
            for path, a, b, shape in zip(structure.paths, ends[:-1], ends[1:], shapes, strict=True)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles get aligned memory of their own, with views of it."""
        return _remade, (self._structure, self._shapes, self.data, self.population)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of every leaf."""
        return self.data.dtype

    @property
    def size(self) -> int:
        """Number of elements of all leaves together."""
        return self.data.size

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves together."""
        return self.data.nbytes

    def like(self, data: np.ndarray) -> FlatBuffer:
        """The same leaves over other memory."""
        return FlatBuffer(self._structure, self._shapes, data, self.population)

    def unflatten(self) -> Any:
        """The tree that was flattened, with views of this buffer as its leaves."""
        return self._structure.build(self._views.values())

    def __getitem__(self, path: str | int) -> Any:
        """A view of the leaf at a path, or the buffer of the leaves below it."""
        path = str(path)
        if path in self._views:
            return self._views[path]
        inside = [k for k, p in enumerate(self._views) if p.startswith(path + ".")]
        try:
            structure = self._structure.below(path)
        except KeyError:
            raise KeyError(self._unknown(path)) from None
        first, last = (self._ends[inside[0]], self._ends[inside[-1] + 1]) if inside else (0, 0)
        return FlatBuffer(structure, [self._shapes[k] for k in inside], self.data[first:last], self.population)

    def _unknown(self, path: str) -> str:
        close = difflib.get_close_matches(path, self._views, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(list(self._views)[:8])}"
        return f"no leaf {path!r}; {hint}"

    def __setitem__(self, path: str | int, value: Any) -> None:
        """Copy an array into a leaf.

        Raises:
            KeyError: if there is no such leaf.
            ValueError: if the shape is not exactly the leaf's.
        """
        leaf = self._views.get(str(path))
        if leaf is None:
            raise KeyError(self._unknown(str(path)))
        array = np.asarray(value)
        if array.shape != leaf.shape:
            raise ValueError(f"{str(path)!r} has shape {leaf.shape}, got {array.shape}; nothing is broadcast.")
        np.copyto(leaf, array, casting="same_kind")

    def __iter__(self) -> Iterator[str]:
        """The paths."""
        return iter(self._views)

    def __len__(self) -> int:
        """Number of leaves."""
        return len(self._views)

    def __repr__(self) -> str:
        """Sizes, dtype and leaves."""
        leaves = ", ".join(
            f"{path or '(the array)'} {'x'.join(map(str, v.shape)) or 'scalar'}"
            for path, v in list(self._views.items())[:6]
        )
        more = f", ... {len(self) - 6} more" if len(self) > 6 else ""
        models = f", population={self.population}" if self.population is not None else ""
        return f"FlatBuffer({self.size} x {self.dtype}{models}: {leaves}{more})"


def _remade(
    structure: Structure, shapes: Sequence[tuple[int, ...]], data: np.ndarray, population: int | None
) -> FlatBuffer:
    own = allocate(data.size, data.dtype)
    own[:] = data
    return FlatBuffer(structure, shapes, own, population)


def flatten(tree: Any, *, population: int | None = None, alloc: Alloc | None = None) -> FlatBuffer:
    """Copy a tree of arrays into one aligned buffer.

    Args:
        tree: nested dicts, lists, tuples, named tuples, dataclasses and None, with arrays of float32 or float64 (all of
            one dtype) as leaves; paths join with ".". It is only read.
        population: put this many models side by side: every leaf of shape `s` becomes `(population, *s)`, each row a
            copy of the leaf, and any hyperparameter of an optimizer over the buffer may be an array `(population,)`.
        alloc: `alloc(nbytes)` returns the writable memory to use (pinned, memory-mapped, shared); the buffer is
            aligned inside it.

    Returns:
        The buffer.

    Raises:
        TypeError: if a leaf is not an array of float32 or float64, or dtypes are mixed.
        ValueError: if two leaves have the same path, or there is no leaf.

    Example:
        >>> import numpy as np, fastlr
        >>> buf = fastlr.flatten({"w": np.ones((2, 3)), "b": np.zeros(3)})
        >>> buf["w"].shape, buf.size
        ((2, 3), 9)
        >>> fastlr.flatten({"w": np.ones(3)}, population=500)["w"].shape
        (500, 3)
    """
    if population is not None:
        population = checks.count("population", population)
    structure = Structure(tree)
    leaves = [
        np.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf for _, leaf in leaves_with_paths(tree)
    ]
    dtype = checks.arrays(structure.paths, leaves)
    rows = () if population is None else (population,)
    shapes = [(*rows, *leaf.shape) for leaf in leaves]
    size = sum(int(np.prod(s, dtype=np.int64)) for s in shapes)
    buffer = FlatBuffer(structure, shapes, allocate(size, dtype, 0, alloc), population)
    for path, leaf in zip(structure.paths, leaves, strict=True):
        buffer._views[path][...] = leaf
    return buffer
