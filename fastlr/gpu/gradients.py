"""Where the gradients of a step are on a GPU, of whatever library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checks
from ..arrays import places
from ..kernels.formats import FORMATS
from ..step.gradients import Gradients
from .arrays import DevicePlace

__all__ = ["DeviceGradients"]


class DeviceGradients(Gradients):
    """The same for gradients on a GPU, of whatever library; arguments as for `Gradients`."""

    _at: DevicePlace

    def _found(self, path: str, leaf: Any, shapes: Sequence[Any]) -> tuple[int, Any, str]:
        """The address of a gradient, the array there, and its format.

        Raises:
            TypeError: if it is not on this GPU or has another dtype.
            ValueError: if it has another shape or shares memory with what the step writes.
        """
        called = checks.called(path, "grads")
        place = places.of(leaf)
        if not isinstance(place, DevicePlace) or place.device is not self._at.device:
            raise TypeError(
                f"{called} is a {type(leaf).__name__} on {place.label}, but the parameters are on {self._at.label}. "
                f"Pass a {self._at.kind_of_array}."
            )
        leaf = place.readable(leaf)
        memory = place.memory(called, leaf)
        if memory.kind not in self._formats:
            hint = " (bits of 16-bit floats need grad_dtype=)" if memory.kind == "uint16" else ""
            raise TypeError(
                f"{called} has dtype {memory.kind}, but the parameters have {self._name}. Convert it{hint}."
            )
        if memory.shape not in shapes:
            expected = " or ".join(str(shape) for shape in shapes if shape is not None)
            raise ValueError(f"{called} has shape {memory.shape}, expected {expected}.")
        checks.aligned(called, memory)
        if not memory.contiguous:
            leaf = place.contiguous(leaf)
            memory = place.memory(called, leaf)
        if self.overlaps(memory.address, memory.nbytes):
            raise ValueError(
                f"{called} shares memory with the parameters or with what else the step writes. Pass a copy of it."
            )
        return memory.address, leaf, self._formats[memory.kind]

    def look(self, found: list[Any], flat: bool, wanted: str) -> list[int] | None:
        """The addresses of gradients that are certainly of a format, in order and apart from what a step writes.

        Args:
            found: the gradients, None where a leaf has none.
            flat: whether they are one array that holds all in order.
            wanted: the format.

        Returns:
            An address for each, 0 where there is none; None if one needs a closer look, or an array of the caller's is
            not where it was.
        """
        if [self._at.address(array) for _, array, _ in self._given] != [m.address for m in self._given_memory]:
            return None
        quick = self._at.quick_address
        shapes: Sequence[Any] = self._shapes
        if flat:
            shapes = [self._only_shape if getattr(found[0], "shape", None) == self._only_shape else (self._size,)]
        for kind in (name for name, known in self._formats.items() if known == wanted):
            addresses = [
                0 if leaf is None else quick(leaf, shape, kind) for leaf, shape in zip(found, shapes, strict=True)
            ]
            known = [address for address in addresses if address is not None]
            if len(known) == len(addresses):
                nbytes = 2 if wanted in FORMATS else self._dtype.itemsize
                apart = not (self.overlaps(known[0], self._size * nbytes) if flat else self.any_overlaps(known, nbytes))
                return known if apart else None
        return None

    def flat(self, grads: Any) -> tuple[int, list[Any], str]:
        """As `Gradients.flat`."""
        address, leaf, kind = self._found("", grads, ((self._size,), self._only_shape))
        return address, [leaf], kind

    def leaves(self, leaves: list[Any]) -> tuple[list[int], list[Any], str]:
        """As `Gradients.leaves`.

        Raises:
            TypeError: as `_found`, or if dtypes are mixed.
            ValueError: as `_found`.
        """
        found = [
            None if leaf is None else self._found(path, leaf, (tuple(shape),))
            for path, leaf, shape in zip(self._paths, leaves, self._shapes, strict=True)
        ]
        kinds = dict.fromkeys(one[2] for one in found if one is not None)
        if len(kinds) > 1:
            raise TypeError(
                f"grads has leaves of {' and '.join(kinds)}. On a GPU all gradients of a step have one dtype."
            )
        arrays = [None if one is None else one[1] for one in found]
        where_they_are = all(array is leaf for array, leaf in zip(arrays, leaves, strict=True))
        at = [0 if one is None else one[0] for one in found]
        return at, leaves if where_they_are else arrays, next(iter(kinds), self._name)
