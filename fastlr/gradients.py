"""Where the gradients of a step are: checked, read in place where they can be, gathered where not."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import checks
from .buffers import Alloc, allocate

_IN_ORDER = 0x101  # NumPy's flags C_CONTIGUOUS and ALIGNED


class Gradients:
    """Finds the addresses of gradients for parameters of given paths and shapes.

    Args:
        paths: of the leaves, for messages.
        shapes: of the leaves.
        dtype: of the parameters, and so of the gradients.
        written: the arrays that a step writes. Kernels assume that gradients are other memory.
        alloc: where memory for gradients comes from.

    Attributes:
        own: memory for gradients in one array, allocated by `allocate_own`; None before.
    """

    def __init__(
        self,
        paths: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        dtype: np.dtype,
        written: Sequence[np.ndarray],
        alloc: Alloc | None,
    ) -> None:
        self._paths, self._shapes, self._dtype, self._alloc = paths, shapes, dtype, alloc
        self._sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        self._size = sum(self._sizes)
        self._nbytes = [size * dtype.itemsize for size in self._sizes]
        self._first = np.cumsum([0, *self._sizes])[:-1]
        self._only_shape = shapes[0] if tuple(paths) == ("",) else None
        spans = sorted((checks.address(a), checks.address(a) + a.nbytes) for a in written if a.size)
        self._starts, self._ends = [a for a, _ in spans], [b for _, b in spans]
        self.own: np.ndarray | None = None
        self._scratch: np.ndarray | None = None

    def allocate_own(self) -> np.ndarray:
        """Zeros to write gradients into; the same memory each time."""
        if self.own is None:
            self.own = allocate(self._size, self._dtype, 1, self._alloc)
        return self.own

    def flat(self, grads: Any) -> tuple[int, np.ndarray]:
        """The address of all gradients in one array, and the array there, which must live as long as the step.

        Raises:
            TypeError: if it is no array or has another dtype.
            ValueError: if it has another shape.
        """
        array = checks.flat_gradient(grads, self._size, self._only_shape, self._dtype)
        address = self._place(array)
        if address is None:
            gathered = self._gather()
            gathered.reshape(array.shape)[...] = array
            return checks.address(gathered), gathered
        return address, array

    def leaves(self, leaves: list[Any]) -> tuple[list[int], list[np.ndarray | None]]:
        """The address of each leaf's gradient, 0 where it is None, and the arrays there.

        The list of arrays is the list given if every leaf is read where it is.

        Raises:
            TypeError: if a leaf is no array or has another dtype.
            ValueError: if one has another shape.
        """
        dtype = self._dtype
        addresses: list[int] = []
        try:  # the usual case, fast: every leaf an array of the right dtype and shape, in order
            for leaf, shape in zip(leaves, self._shapes, strict=True):
                if leaf.dtype is not dtype or leaf.shape != shape or leaf.flags.num & _IN_ORDER != _IN_ORDER:
                    break
                addresses.append(leaf.__array_interface__["data"][0])
        except (AttributeError, TypeError):
            addresses.clear()
        if len(addresses) == len(leaves) and not self._any_overlaps(addresses):
            return addresses, leaves
        arrays = [
            None if leaf is None else checks.gradient(path, leaf, shape, dtype)
            for path, leaf, shape in zip(self._paths, leaves, self._shapes, strict=True)
        ]
        for k, array in enumerate(arrays):
            if array is not None and self._place(array) is None:
                start = self._first[k]
                arrays[k] = place = self._gather()[start : start + self._sizes[k]].reshape(self._shapes[k])
                place[...] = array
        return [0 if a is None else checks.address(a) for a in arrays], arrays

    def _place(self, array: np.ndarray) -> int | None:
        """The address of a gradient that can be read where it is: in order, aligned, no part of what a step writes."""
        if array.flags.num & _IN_ORDER != _IN_ORDER:
            return None
        address = checks.address(array)
        return None if self._overlaps(address, array.nbytes) else address

    def _overlaps(self, begin: int, nbytes: int) -> bool:
        """Whether some memory is part of what the step writes."""
        before = bisect.bisect_left(self._starts, begin + nbytes) - 1
        return before >= 0 and self._ends[before] > begin and nbytes > 0

    def _any_overlaps(self, addresses: list[int]) -> bool:
        """Whether the memory of any leaf's gradient is part of what the step writes."""
        if len(addresses) <= 8:
            return any(map(self._overlaps, addresses, self._nbytes))
        before = np.searchsorted(self._starts, np.add(addresses, self._nbytes)) - 1
        reach = np.array([*self._ends, 0])[before]  # nothing before: -1, the zero
        return bool(np.any((reach > addresses) & (np.array(self._nbytes) > 0)))

    def _gather(self) -> np.ndarray:
        """Memory for gradients that cannot be read where they are."""
        if self._scratch is None:
            self._scratch = allocate(self._size, self._dtype, 1, self._alloc)
        return self._scratch
