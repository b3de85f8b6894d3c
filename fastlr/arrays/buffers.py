"""Flat buffers: one aligned allocation that holds many leaves."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import checks
from ..gpu import arrays as device_arrays
from ..gpu import driver as devices
from . import places
from .places import HOST, Alloc, Place
from .trees import Structure, leaves_with_paths

__all__ = ["FlatBuffer", "flatten"]


class FlatBuffer(Mapping[str, Any]):
    """Many arrays in one aligned allocation; made by `fastlr.flatten`.

    `buf["layer.w"]` is a view of a leaf, `buf["layer"]` a buffer of the leaves below a path, `buf["w"] = x` copies `x`
    into a leaf of exactly its shape. Iterating gives the paths, `len(buf)` is the number of leaves.

    Attributes:
        data: all elements in order, shape `(n,)`, 64-byte aligned; an array of the library that the leaves are of.
        population: number of models, or None; then the first dimension of every leaf is the model.
        structure: of the tree that was flattened.
        shapes: of the leaves, in order.
    """

    def __init__(
        self, structure: Structure, shapes: Sequence[tuple[int, ...]], data: Any, population: int | None = None
    ) -> None:
        self.data = data
        self._place = places.of(data)
        self.population = population
        self.structure = structure
        self.shapes = tuple(shapes)
        self._ends = ends = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
        self._views = {
            path: data[a:b].reshape(shape)
            for path, a, b, shape in zip(structure.paths, ends[:-1], ends[1:], shapes, strict=True)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles get aligned memory of their own, with views of it."""
        return _remade, (self.structure, self.shapes, self.data, self.population)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of every leaf, as NumPy's; of two-byte floats that NumPy lacks, that of their bits."""
        return np.dtype(places.storage_of(self._place.memory("", self.data).kind))

    @property
    def device(self) -> str:
        """Where the elements are: "cpu", "cuda:0"."""
        return self._place.label

    @property
    def size(self) -> int:
        """Number of elements of all leaves together."""
        return int(self._ends[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves together."""
        return self.size * self.dtype.itemsize

    def to(self, device: str) -> FlatBuffer:
        """A copy of the buffer somewhere else, or the buffer itself if it is there.

        Args:
            device: "cpu", or "cuda", "cuda:1", ... for a GPU.

        Raises:
            ValueError: if it is none of these.
            DeviceError: if there is no such GPU.
        """
        place = place_called(device)
        if place.label == self._place.label:
            return self
        data = place.allocate(self.size, self.dtype)
        place.upload(data, self._place.download(self.data))
        return self.like(data)

    def like(self, data: Any) -> FlatBuffer:
        """The same leaves over other memory."""
        return FlatBuffer(self.structure, self.shapes, data, self.population)

    def unflatten(self) -> Any:
        """The tree that was flattened, with views of this buffer as its leaves."""
        return self.structure.build(self._views.values())

    def __getitem__(self, path: str | int) -> Any:
        """A view of the leaf at a path, or the buffer of the leaves below it."""
        path = _path(path)
        if path in self._views:
            return self._views[path]
        inside = [k for k, p in enumerate(self._views) if p.startswith(path + ".")]
        try:
            structure = self.structure.below(path)
        except KeyError:
            raise KeyError(self._unknown(path)) from None
        first, last = (self._ends[inside[0]], self._ends[inside[-1] + 1]) if inside else (0, 0)
        return FlatBuffer(structure, [self.shapes[k] for k in inside], self.data[first:last], self.population)

    def _unknown(self, path: str) -> str:
        close = difflib.get_close_matches(path, self._views, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(list(self._views)[:8])}"
        return f"no leaf {checks.shown(path)}; {hint}"

    def __setitem__(self, path: str | int, value: Any) -> None:
        """Copy an array into a leaf.

        Raises:
            KeyError: if there is no such leaf.
            TypeError: if it is no array of numbers.
            ValueError: if the shape is not exactly the leaf's.
        """
        path = _path(path)
        leaf = self._views.get(path)
        if leaf is None:
            raise KeyError(self._unknown(path))
        array = checks.readable(repr(path), value) if places.of(value) is HOST else value
        if tuple(array.shape) != tuple(leaf.shape):
            raise ValueError(f"{path!r} has shape {tuple(leaf.shape)}, got {tuple(array.shape)}; nothing is broadcast.")
        if self._place is HOST:
            np.copyto(leaf, array, casting="same_kind")
        elif places.of(array) is HOST:
            self._place.upload(leaf, array.astype(self.dtype, "C", "same_kind"))
        else:
            self._place.copy(leaf, array)

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
        where = "" if self._place is HOST else f" on {self.device}"
        return f"FlatBuffer({self.size} x {self.dtype}{where}{models}: {leaves}{more})"


def _path(key: Any) -> str:
    """The path that a key means; for what cannot be a key, a text to show in a message."""
    return str(key) if isinstance(key, str | int | np.integer) else checks.shown(key)


def _remade(structure: Structure, shapes: Sequence[tuple[int, ...]], data: Any, population: int | None) -> FlatBuffer:
    place = places.of(data)
    own = place.allocate(place.memory("", data).size, places.storage_of(place.memory("", data).kind))
    place.copy(own, data)
    return FlatBuffer(structure, shapes, own, population)


def place_called(device: str) -> Place:
    """The place with a name that users write; on a GPU, the one of arrays that belong to no library.

    Raises:
        ValueError: if no place has this name.
        DeviceError: if there is no such GPU.
    """
    if device == "cpu":
        return HOST
    name, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if name != "cuda" or not (number == "" or (number.isdecimal() and len(number) < 5)):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:" and a number, got {checks.shown(device)}.')
    return device_arrays.on_device(devices.gpu(int(number or 0)))


def flatten(
    tree: Any, *, population: int | None = None, alloc: Alloc | None = None, device: str | None = None
) -> FlatBuffer:
    """Copy a tree of arrays into one aligned buffer.

    Args:
        tree: nested dicts, lists, tuples, named tuples, dataclasses and None, with arrays of float32 or float64 (all of
            one dtype) as leaves; paths join with ".". It is only read. Arrays on a GPU stay on it, in a buffer of their
            library.
        population: put this many models side by side: every leaf of shape `s` becomes `(population, *s)`, each row a
            copy of the leaf, and any hyperparameter of an optimizer over the buffer may be an array `(population,)`.
        alloc: `alloc(nbytes)` returns the writable memory to use (pinned, memory-mapped, shared), none of it in use for
            something else; the buffer is aligned inside it.
        device: "cpu" or "cuda", "cuda:1", ...: where to put the buffer; default: where the arrays are.

    Returns:
        The buffer.

    Raises:
        TypeError: if a leaf is not an array of float32 or float64, or dtypes are mixed.
        ValueError: if two leaves have the same path, there is no leaf, or leaves are in different places.
        DeviceError: if there is no such GPU.

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
    leaves = [np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for _, leaf in leaves_with_paths(tree)]
    source = places.common_place("params", structure.paths, leaves)
    found = [source.memory(checks.called(path), leaf) for path, leaf in zip(structure.paths, leaves, strict=True)]
    dtype = checks.arrays(structure.paths, found)
    target = source if device is None or place_called(device).label == source.label else place_called(device)
    rows = () if population is None else (population,)
    shapes = [(*rows, *leaf.shape) for leaf in found]
    size = sum(int(np.prod(s, dtype=np.int64)) for s in shapes)
    used = found if source is HOST else ()
    buffer = FlatBuffer(structure, shapes, target.allocate(size, dtype, 0, alloc, used), population)
    for path, leaf in zip(structure.paths, leaves, strict=True):
        view, content = buffer[path], source.contiguous(leaf)
        if target is HOST:
            view[...] = source.download(content)
        elif source is target and population is None:
            target.copy(view, content)
        else:
            target.upload(view, np.broadcast_to(source.download(content), tuple(view.shape)))
    return buffer
