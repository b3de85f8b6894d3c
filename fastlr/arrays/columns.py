"""Parameters as an optimizer sees them, and the memory that goes along with them, element by element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..kernels.formats import FORMATS, to_float32
from . import places
from .buffers import FlatBuffer
from .places import Alloc, Memory
from .spans import shared
from .trees import Structure, is_container, leaves_with_paths

__all__ = ["COMPUTE", "EMA", "LR_SCALE", "PARAMETERS", "ROLES", "SHADOW", "Columns", "Parameters", "Role"]

COMPUTE = "compute"  # the format in which a step computes: that of the parameters
PARAMETERS = "parameters"  # what a column starts as: a copy of them


@dataclass(frozen=True)
class Role:
    """What a column is to a step: an array that goes along with the parameters, element by element.

    Attributes:
        name: in the step and in a state dict: the rule's letter for a state.
        argument: the option in which the caller gives arrays of his own; "" where there is none.
        written: whether a step writes it, or only reads it.
        saved: whether it is part of the state; another follows from the parameters, or is the caller's to keep.
        format: of its numbers: `COMPUTE`, or "bfloat16" or "float16".
        starts_as: the number that it is filled with, or `PARAMETERS`.
    """

    name: str
    argument: str = ""
    written: bool = True
    saved: bool = True
    format: str = COMPUTE
    starts_as: float | str = 0.0

    def dtype(self, compute: np.dtype) -> np.dtype:
        """How it is stored, beside parameters of a dtype."""
        return compute if self.format == COMPUTE else np.dtype(FORMATS[self.format].storage)


EMA = Role("ema", "ema_out", starts_as=PARAMETERS)
LR_SCALE = Role("lr_scale", "lr_scale", written=False, saved=False)
SHADOW = Role("shadow", "shadow_out", saved=False, starts_as=PARAMETERS)
# The columns of the step's own, in the order in which they follow the states of the rule.
ROLES = {role.name: role for role in (EMA, LR_SCALE, SHADOW)}


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
        starts: the index of each leaf's first element in flat data.
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

    def data_of(self, name: str, buffer: FlatBuffer) -> Any:
        """The array of a buffer that goes along with the parameters.

        Raises:
            ValueError: if its structure or its shapes differ from theirs.
        """
        if buffer.structure.paths != self.paths or buffer.shapes != tuple(self.shapes):
            raise ValueError(f"{name} was made from a different structure than params. Make it from the same one.")
        return buffer.data

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
                raise ValueError(f"{name} was made from a different structure than params. Make it from the same one.")
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
    """What a step reads and writes for each element besides the parameter and the gradient.

    Args:
        parameters: what they go along with.
        roles: of the columns, in the order of a plan's.
        external: the caller's own arrays, by the name of their role.
        alloc: where memory comes from.

    Attributes:
        roles: by name, in order.
        letters: the states, averages among them.
        inputs: what is only read.
        flat: the columns that the optimizer made, by name, each in one array.
        arrays: the array of each leaf, by name, in order.
        external: the caller's arrays, as given.

    Raises:
        TypeError: if arrays of the caller's are no arrays like the parameters.
        ValueError: if they do not fit, share memory or hold bad values.
    """

    def __init__(
        self, parameters: Parameters, roles: Sequence[Role], external: Mapping[str, Any], alloc: Alloc | None
    ) -> None:
        self._parameters, self._place = parameters, parameters.place
        self.roles = {role.name: role for role in roles}
        self.letters = tuple(role.name for role in roles if role.saved)
        self.inputs = tuple(role.name for role in roles if not role.written)
        self.external = dict(external)
        given = {name: self._companions(self.roles[name], tree) for name, tree in external.items()}
        self._check(given)
        self.flat = self._allocated([role for role in roles if role.name not in given], given, alloc)
        self.arrays = {n: given[n] if n in given else parameters.cut(self.flat[n]) for n in self.roles}
        for name, role in self.roles.items():
            if role.starts_as == PARAMETERS and (role.format != COMPUTE or name not in given):
                self._copy(role, parameters.leaves)
            elif isinstance(role.starts_as, float) and role.starts_as and name not in given:
                start = self._encoded(role, [np.full(1, role.starts_as, parameters.dtype)])[0]
                parameters.place.fill(self.flat[name], start.item())

    def _companions(self, role: Role, tree: Any) -> list[Any]:
        """The caller's arrays for a column, one for each leaf."""
        storage = role.dtype(self._parameters.dtype)
        kinds = None if role.format == COMPUTE else (role.format, storage.name)
        leaves = self._parameters.companions(role.argument, tree, role.written, kinds)
        return leaves if kinds is None or self._place is not places.HOST else [leaf.view(storage) for leaf in leaves]

    def _allocated(
        self, roles: Sequence[Role], given: Mapping[str, Sequence[Any]], alloc: Alloc | None
    ) -> dict[str, Any]:
        parameters, place = self._parameters, self._place
        theirs = [place.memory(self.roles[n].argument, leaf) for n, leaves in given.items() for leaf in leaves]
        used = [*parameters.memory, *theirs]
        return {
            role.name: place.allocate(parameters.size, role.dtype(parameters.dtype), 2 + k, alloc, used)
            for k, role in enumerate(roles)
        }

    def itemsize(self, name: str) -> int:
        """Bytes of one element of a column."""
        return self.roles[name].dtype(self._parameters.dtype).itemsize

    def _check(self, given: Mapping[str, list[Any]]) -> None:
        """What the caller's arrays must be beyond their shape and dtype."""
        arguments = [(self.roles[name].argument, leaf) for name, leaves in given.items() for leaf in leaves]
        both = shared((self._place.memory(name, leaf), name, name) for name, leaf in arguments)
        if both is not None:
            raise ValueError(f"{' and '.join(sorted(both))} share memory. Pass memory of its own for each.")
        for scale in given.get(LR_SCALE.name, ()):
            numbers = self._place.download(scale)
            if not (np.isfinite(numbers) & (numbers >= 0)).all():
                raise ValueError(f"{LR_SCALE.argument} must be non-negative and finite everywhere.")

    @property
    def written(self) -> list[Any]:
        """The arrays that a step writes."""
        return [array for name, arrays in self.arrays.items() if self.roles[name].written for array in arrays]

    def tree(self, name: str) -> Any:
        """A column in the parameters' structure: a view, or the caller's own arrays as they were given.

        Numbers in a format that NumPy does not know are given as their bits.
        """
        if name in self.external:
            return self.external[name]
        flat, role = self.flat[name], self.roles[name]
        return self._parameters.tree(flat if role.format == COMPUTE else self._place.as_format(flat, role.format))

    def encode_shadow(self) -> None:
        """Bring the copy in low precision up to date with the parameters."""
        if SHADOW.name in self.roles:
            self._copy(self.roles[SHADOW.name], self._parameters.leaves)

    def shadow_of(self, leaves: Sequence[Any]) -> list[tuple[Any, np.ndarray]]:
        """The arrays of the low-precision copy, each with what it is to hold for other parameters; none without a copy.

        Args:
            leaves: the parameters, here or on the host.
        """
        if SHADOW.name not in self.roles:
            return []
        return list(zip(self.arrays[SHADOW.name], self._encoded(self.roles[SHADOW.name], leaves), strict=True))

    def _copy(self, role: Role, leaves: Sequence[Any]) -> None:
        """Fill a column with parameters."""
        for own, leaf in zip(self.arrays[role.name], self._encoded(role, leaves), strict=True):
            self._place.copy(own, leaf)

    def _encoded(self, role: Role, leaves: Sequence[Any]) -> Sequence[Any]:
        """Parameters as a column stores them."""
        if role.format == COMPUTE:
            return leaves
        _, encode = FORMATS[role.format].make(np.where)
        narrow = to_float32(np.where) if self._parameters.dtype == np.float64 else np.asarray
        with np.errstate(all="ignore"):
            return [
                encode(narrow(leaf if isinstance(leaf, np.ndarray) else self._place.download(leaf))) for leaf in leaves
            ]
