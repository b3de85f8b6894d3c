"""Parameters as an optimizer sees them, and the memory that goes along with them, element by element."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import checks
from ..kernels.formats import FORMATS, to_float32
from . import places
from .buffers import FlatBuffer
from .places import Alloc, Memory
from .trees import Structure, is_container, leaves_with_paths

__all__ = ["CALLED", "Columns", "Parameters"]

# What the caller calls the arrays that may be his own.
CALLED = {"ema": "ema_out", "lr_scale": "lr_scale", "shadow": "shadow_out"}


class Parameters:
    """The caller's parameters: checked, and where they are.

    Args:
        source: a tree of arrays, a `FlatBuffer` or one array.

    Attributes:
        source: as given.
        structure: of the tree.
        population: number of models, or None.
        place: where they are.
        leaves, memory, shapes, sizes: the arrays in order, of all models.
        starts: the place of each leaf's first element if all stood one after the other.
        size: number of elements.
        dtype: of every leaf.
        everyone: True for each leaf.
        one_by_one: a partition in which each leaf is alone, see `Rows`.
        is_array, is_flat: whether they are one array; one array or a buffer.

    Raises:
        TypeError: if a leaf is no array of float32 or float64, or dtypes are mixed.
        ValueError: if a leaf cannot be updated in place, or two share memory.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        if isinstance(source, FlatBuffer):
            self.structure, tree, self.population = source.structure, source.unflatten(), source.population
        else:
            self.structure, tree, self.population = Structure(source), source, None
        self.leaves: list[Any] = [leaf for _, leaf in leaves_with_paths(tree)]
        paths = self.structure.paths
        self.place = places.common_place("params", paths, self.leaves)
        self.memory: list[Memory] = [
            self.place.memory(checks.called(path), leaf) for path, leaf in zip(paths, self.leaves, strict=True)
        ]
        self.dtype = np.dtype(checks.parameters(paths, self.memory, self.place.make_contiguous))
        self.shapes = [leaf.shape for leaf in self.memory]
        self.sizes = [leaf.size for leaf in self.memory]
        self.size = sum(self.sizes)
        self.starts = np.cumsum([0, *self.sizes])[:-1]
        self.everyone = (True,) * len(self.leaves)
        self.one_by_one = np.arange(len(self.leaves))
        self.is_array = not isinstance(source, FlatBuffer) and not is_container(source)
        self.is_flat = self.is_array or isinstance(source, FlatBuffer)

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of each leaf."""
        return self.structure.paths

    @property
    def models(self) -> int:
        """Number of models; 1 if it is no population."""
        return self.population or 1

    def cut(self, data: Any) -> list[Any]:
        """Flat data as one array for each leaf; views."""
        ends = self.starts + np.array(self.sizes, np.int64)
        return [data[a:b].reshape(s) for a, b, s in zip(self.starts.tolist(), ends.tolist(), self.shapes, strict=True)]

    def tree(self, data: Any) -> Any:
        """Flat data in the parameters' structure: an array if they are one, else a `FlatBuffer`; views."""
        if self.is_array:
            return data.reshape(self.shapes[0])
        if self.is_flat:
            return self.source.like(data)
        return FlatBuffer(self.structure, self.shapes, data)

    def companions(self, name: str, tree: Any, written: bool, kinds: Sequence[str] | None = None) -> list[Any]:
        """The leaves of a tree that goes along with the parameters, checked.

        Args:
            name: what the caller calls it.
            tree: in the parameters' structure.
            written: whether a step writes it.
            kinds: the dtypes that its leaves may have; None: the parameters'.
        """
        if isinstance(tree, FlatBuffer):
            if tree.structure.paths != self.paths:
                raise ValueError(f"{name} is a buffer of other leaves than params. Make it from the same structure.")
            tree = tree.unflatten()
        leaves = [tree] if self.is_array else self.structure.leaves(tree, name)
        paths, place = self.structure.paths, self.place
        memory = []
        for path, leaf in zip(paths, leaves, strict=True):
            if places.of(leaf) is not place or (place is places.HOST and not isinstance(leaf, np.ndarray)):
                leaf_name, expected = checks.called(path, name), place.kind_of_array
                raise TypeError(f"{leaf_name} is a {type(leaf).__name__}, expected a {expected} like the parameter.")
            memory.append(place.memory(checks.called(path, name), leaf))
        checks.companions(name, paths, memory, self.memory, written, place.make_contiguous, kinds)
        return leaves


class Columns:
    """What a step reads and writes of each element beside parameter and gradient.

    Args:
        parameters: what they go along with.
        letters: the states, averages among them, in the order of the rule.
        initial: the value at which a state starts.
        external: the caller's arrays for "ema", "lr_scale" and "shadow", where there are some.
        shadow: the format of a copy of the parameters, or None.
        alloc: where memory comes from.

    Attributes:
        letters: the states.
        inputs: what is only read, after the states.
        arrays: the array of each leaf, by name, in the order of a plan's columns.
        external: the caller's arrays, as given.

    Raises:
        TypeError: if arrays of the caller's are no arrays like the parameters.
        ValueError: if they do not fit, share memory or hold bad values.
    """

    def __init__(
        self,
        parameters: Parameters,
        letters: Sequence[str],
        initial: Callable[[str], float],
        external: Mapping[str, Any],
        shadow: str | None,
        alloc: Alloc | None,
    ) -> None:
        self._parameters, self._format, self._place = parameters, shadow, parameters.place
        place = parameters.place
        self.letters = tuple(letters)
        self.external = dict(external)
        self.inputs = tuple(name for name in ("lr_scale",) if name in external)
        kinds = {} if shadow is None else {"shadow": (shadow, FORMATS[shadow].storage)}
        given = {
            n: parameters.companions(CALLED[n], tree, n != "lr_scale", kinds.get(n)) for n, tree in external.items()
        }
        self._check(given)
        if "shadow" in given and place is places.HOST:
            given["shadow"] = [leaf.view(FORMATS[shadow or ""].storage) for leaf in given["shadow"]]
        self._flat: dict[str, Any] = {}
        used = [*parameters.memory, *(place.memory(CALLED[n], leaf) for n in given for leaf in given[n])]
        for k, letter in enumerate([n for n in letters if n not in given]):
            self._flat[letter] = place.allocate(parameters.size, parameters.dtype, 2 + k, alloc, used)
        if shadow is not None and "shadow" not in given:
            storage = FORMATS[shadow].storage
            self._flat["shadow"] = place.allocate(parameters.size, storage, 2 + len(letters), alloc, used)
        names = [*letters, *self.inputs, *(["shadow"] if shadow else [])]
        self.arrays = {n: given[n] if n in given else parameters.cut(self._flat[n]) for n in names}
        for letter in letters:
            if letter == "ema" and letter not in given:  # the average begins as a copy
                for own, leaf in zip(self.arrays[letter], parameters.leaves, strict=True):
                    place.copy(own, leaf)
            elif letter != "ema" and initial(letter):
                place.fill(self._flat[letter], initial(letter))
        self.encode_shadow()

    def _check(self, given: Mapping[str, list[Any]]) -> None:
        """What the caller's arrays must be beyond their shape and dtype."""
        memory = self._place.memory
        written = [memory(CALLED[n], a) for n in ("ema", "shadow") for a in given.get(n, ())]
        spans = sorted((m.address, m.address + m.nbytes) for m in written if m.nbytes)
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans)):
            raise ValueError("ema_out and shadow_out share memory. Pass memory of its own for each.")
        for scale in given.get("lr_scale", ()):
            numbers = self._place.download(scale)
            if not (np.isfinite(numbers) & (numbers >= 0)).all():
                raise ValueError("lr_scale must be non-negative and finite everywhere.")
            begin, end = memory("lr_scale", scale).address, memory("lr_scale", scale).address + numbers.nbytes
            if any(a < end and begin < b for a, b in spans):
                raise ValueError("lr_scale shares memory with ema_out or shadow_out. Pass memory of its own for each.")

    @property
    def written(self) -> list[Any]:
        """The arrays that a step writes."""
        return [array for name, arrays in self.arrays.items() if name not in self.inputs for array in arrays]

    def tree(self, name: str) -> Any:
        """A column in the parameters' structure: a view, or the caller's own arrays as they were given."""
        return self.external[name] if name in self.external else self._parameters.tree(self._flat[name])

    def shadow(self) -> Any:
        """The copy in low precision as numbers, or as bits where nobody knows bfloat16."""
        assert self._format is not None
        if "shadow" in self.external:
            return self.external["shadow"]
        return self._parameters.tree(self._place.as_format(self._flat["shadow"], self._format))

    def encode_shadow(self) -> None:
        """Bring the copy in low precision up to date with the parameters."""
        for shadow, bits in zip(self.arrays.get("shadow", ()), self.encoded(self._parameters.leaves), strict=True):
            self._place.upload(shadow, bits)

    def encoded(self, leaves: Sequence[Any]) -> list[np.ndarray]:
        """Parameters in low precision, as bits; none if nobody asks for them.

        Args:
            leaves: the parameters, here or on the host.
        """
        if self._format is None:
            return []
        _, encode = FORMATS[self._format].make(np.where)
        narrow = to_float32(np.where) if self._parameters.dtype == np.float64 else np.asarray
        with np.errstate(all="ignore"):
            return [
                encode(narrow(leaf if isinstance(leaf, np.ndarray) else self._place.download(leaf))) for leaf in leaves
            ]
