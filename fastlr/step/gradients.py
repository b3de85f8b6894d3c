"""Where the gradients of a step are: checked, read in place where they can be, gathered where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .. import checks
from ..arrays.columns import Parameters
from ..arrays.places import Alloc, Memory
from ..arrays.spans import Spans
from ..kernels import arrays
from ..kernels.formats import FORMATS

_IN_ORDER = 0x101  # NumPy's flags C_CONTIGUOUS and ALIGNED


# An array of the caller's that a step uses: what messages call it, the array, and whether it is written.
Given: TypeAlias = tuple[str, Any, bool]


@dataclass(frozen=True)
class Located:
    """Gradients that have been found and checked.

    Attributes:
        addresses: of each leaf's gradient, 0 where there is none; or of the first element, if they are flat.
        format: their dtype, or their format of two bytes.
        active: whether each leaf has one; None: all of them.
        seen: the leaves that a partial step is about; None: it is about all.
        number: for a partial step, how many steps came before the one that it is a part of; None: to be found from the
            counters of its leaves.
        flat: whether they are one array that holds all in order.
        arrays: what has the memory, and must live as long as the step; somebody else keeps it alive if it is empty.
    """

    addresses: Any
    format: str
    active: tuple[bool, ...] | None = None
    seen: tuple[bool, ...] | None = None
    number: int | None = None
    flat: bool = False
    arrays: Sequence[Any] = ()


class Gradients:
    """Finds gradients for parameters: checked, read in place where they can be, gathered where not.

    Args:
        parameters: what they are gradients of.
        written: the arrays that a step writes. Kernels assume that gradients are other memory.
        alloc: where memory for gradients comes from.
        bits: the format that arrays of uint16 hold, or None.
        given: the caller's arrays that a step uses besides the gradients. A step makes sure that they are as they are
            now.
        quick: whether arrays may be looked at in compiled code.

    Attributes:
        written: the memory that a step writes.
        own: memory for gradients in one array, allocated by `allocate_own`; None before.
        stream: of the step that is being prepared, in whose order a GPU copies; None: the caller's current one.
    """

    stream: int | None = None

    def __init__(
        self,
        parameters: Parameters,
        written: Sequence[Any],
        alloc: Alloc | None,
        bits: str | None,
        given: Sequence[Given],
        quick: bool,
    ) -> None:
        place, paths, shapes, dtype = parameters.place, parameters.paths, parameters.shapes, parameters.dtype
        self._place = place
        self._paths, self._shapes, self._dtype, self._alloc = paths, shapes, dtype, alloc
        self._size, self._sizes = parameters.size, np.array(parameters.sizes, np.int64)
        self._starts: list[int] = parameters.starts.tolist()
        self._only_shape = shapes[0] if tuple(paths) == ("",) else None
        self._name = dtype.name  # NumPy makes it anew each time, which takes longer than the rest of a check
        self._formats = {dtype.name: dtype.name, **{name: name for name in FORMATS}}
        if bits is not None:
            self._formats["uint16"] = bits
        self._given, self._given_memory = given, [place.memory(called, a) for called, a, _ in given]
        self._quick = quick
        self.written = Spans((m.address, m.nbytes) for m in (place.memory("", a) for a in written))
        self.own: Any = None
        self._scratch: dict[str, Any] = {}

    def allocate_own(self) -> Any:
        """Zeros to write gradients into; the same memory each time."""
        if self.own is None:
            self.own = self._place.allocate(self._size, self._dtype, 1, self._alloc, self._given_memory)
        return self.own

    def check_given(self) -> None:
        """Check that parameters, and what else of the caller's a step uses, are what and where they were.

        Raises:
            RuntimeError: if one is not.
        """
        for (called, array, _), before in zip(self._given, self._given_memory, strict=True):
            now = self._place.memory(called, array)
            if now != before:
                raise RuntimeError(
                    f"{called} has changed: {_difference(before, now)}. Arrays that an optimizer updates must keep "
                    "their memory, shape and dtype; to go on with others, call opt.rebuild(...)."
                )

    def finder(
        self, found: list[Any], flat: bool, source: np.ndarray, inside: np.ndarray, column: np.ndarray
    ) -> arrays.Finder | None:
        """What finds gradients like some that were found, quickly; None if there is no quick way.

        Args:
            found: those gradients, each read where it is; None where a leaf has none.
            flat: whether they are one array that holds all in order.
            source: for each entry of a plan, which gradient.
            inside: and how many bytes after its begin.
            column: the column of the plan that takes the addresses.
        """
        dtype = next((array.dtype for array in found if array is not None), None)
        if dtype is None or not self._quick or not arrays.is_available():
            return None
        shapes: list[tuple[tuple[int, ...], ...]] = [(shape,) for shape in self._shapes]
        if flat:
            shapes = [((self._size,), (self._size,) if self._only_shape is None else self._only_shape)]
        there = [array is not None for array in found]
        spans = self.written.starts, self.written.ends
        fixed, writeable = [array for _, array, _ in self._given], [written for *_, written in self._given]
        return arrays.Finder(shapes, there, dtype, spans, source, inside, column, fixed, writeable)

    def find(
        self, things: list[Any], flat: bool, active: tuple[bool, ...] | None, seen: tuple[bool, ...] | None
    ) -> Located:
        """Find and check gradients.

        Args:
            things: an array that holds all in order, or one for each leaf, None where there is none.
            flat: which of the two.
            active: the leaves that are updated by one array; None: all.
            seen: the leaves that a partial step is about; None: it is about all.

        Raises:
            RuntimeError: if an array that the optimizer was given is not as it was.
            TypeError: if a gradient is no array or has another dtype.
            ValueError: if one has another shape.
        """
        self.check_given()
        if flat:
            address, arrays, kind = self.flat(things[0])
            return Located(address, kind, active, seen, None, True, arrays)
        addresses, arrays, kind = self.leaves(things)
        there = tuple(array is not None for array in arrays) if 0 in addresses else ()
        return Located(addresses, kind, None if all(there) else there, seen, None, False, arrays)

    def flat(self, grads: Any) -> tuple[int, list[Any], str]:
        """The address of all gradients in one array, that array, which must live as long as the step, and its format.

        Raises:
            TypeError: if it is no array or has another dtype.
            ValueError: if it has another shape.
        """
        array, kind = self._checked("", grads, ((self._size,), self._only_shape))
        address, array = self._readable("", array, kind, kind, 0)
        return address, [array], kind

    def leaves(self, leaves: list[Any]) -> tuple[list[int], list[Any], str]:
        """The address of each leaf's gradient, 0 where it is None, the arrays there, and their format.

        The array there is the leaf itself if it is read where it is.

        Raises:
            TypeError: if a leaf is no array or has another dtype.
            ValueError: if one has another shape.
        """
        usual = self._usual(leaves)
        if usual is not None:
            return usual
        found = [
            None if leaf is None else self._checked(path, leaf, (shape,))
            for path, leaf, shape in zip(self._paths, leaves, self._shapes, strict=True)
        ]
        kinds = {kind for _, kind in filter(None, found)}
        common = kinds.pop() if len(kinds) == 1 else self._name
        readable = [
            (0, None) if one is None else self._readable(path, *one, common, start)
            for path, one, start in zip(self._paths, found, self._starts, strict=True)
        ]
        return [address for address, _ in readable], [array for _, array in readable], common

    def _usual(self, leaves: list[Any]) -> tuple[list[int], list[Any], str] | None:
        """As `leaves`, fast, if each is an array of a right dtype and shape that can be read where it is; else None."""
        addresses: list[int] = []
        first: Any = None
        try:
            for leaf, shape in zip(leaves, self._shapes, strict=True):
                if leaf is None:
                    addresses.append(0)
                    continue
                if type(leaf) is not np.ndarray:  # scalars have addresses of temporaries, subclasses a mask
                    return None
                if first is None:
                    first = leaf.dtype
                if leaf.dtype is not first or leaf.shape != shape or leaf.flags.num & _IN_ORDER != _IN_ORDER:
                    return None
                addresses.append(leaf.__array_interface__["data"][0])
        except (AttributeError, TypeError):
            return None
        if first is None or not first.isnative:
            return None
        kind = self._name if first is self._dtype else self._formats.get(first.name)
        if kind is None or self.any_overlaps(addresses, first.itemsize):
            return None
        return addresses, leaves, kind

    def _checked(self, path: str, leaf: Any, shapes: Sequence[tuple[int, ...] | None]) -> tuple[Any, str]:
        """A gradient as an array, and its format.

        Args:
            path: of the leaf, or "" for all in one array.
            leaf: what was given.
            shapes: those that are right.

        Raises:
            TypeError: if it is no array or has another dtype.
            ValueError: if it has another shape.
        """
        if type(leaf) is np.ndarray and leaf.dtype is self._dtype and leaf.shape in shapes:  # the usual case, fast
            return leaf, self._name
        return checks.gradient(path, leaf, shapes, self._formats)

    def _readable(self, path: str, array: Any, kind: str, common: str, start: int) -> tuple[int, Any]:
        """The address where a gradient can be read in a format, and the array there: its own, or a copy.

        Args:
            path: of the leaf.
            array: the gradient.
            kind: its format.
            common: the format it is needed in.
            start: where it stands among all elements.
        """
        if kind == common and array.flags.num & _IN_ORDER == _IN_ORDER:
            address = checks.address(array)
            if not self.written.overlaps(address, array.nbytes):
                return address, array
        target = self._gather(common)[start : start + array.size].reshape(array.shape)
        if kind == common:
            target[...] = array.view(target.dtype) if kind in FORMATS else array
        else:
            decode, _ = FORMATS[kind].make(np.where)
            target[...] = decode(array.view(np.uint16))
        return checks.address(target), target

    def any_overlaps(self, addresses: Sequence[int] | np.ndarray, itemsize: int) -> bool:
        """Whether the memory of any leaf's gradient is part of what the step writes."""
        return self.written.any_overlaps(addresses, self._sizes * itemsize)

    def _gather(self, kind: str) -> np.ndarray:
        """Memory for gradients that cannot be read where they are."""
        storage = FORMATS[kind].storage if kind in FORMATS else kind
        if storage not in self._scratch:
            self._scratch[storage] = self._place.allocate(self._size, storage, 1, self._alloc, self._given_memory)
        return self._scratch[storage]


def _difference(before: Memory, now: Memory) -> str:
    """The first difference between what an array was and what it is."""
    for name in ("shape", "kind", "address", "contiguous", "aligned", "writeable"):
        was, is_now = getattr(before, name), getattr(now, name)
        if was != is_now:
            label = {"kind": "dtype"}.get(name, name)
            return f"its {label} is {is_now}, it was {was}"
    return "it is another array"
