"""Where the gradients of a step are on a GPU: checked, read in place where they can be, copied where not."""

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
    """Finds the addresses of gradients on a GPU, of any library; arguments as for `Gradients`.

    As on the CPU, a gradient that cannot be read where it is is copied first, and one whose dtype differs from the
    others' is converted. If its library can do neither, the gradient is refused.
    """

    _place: DevicePlace

    def _checked(self, path: str, leaf: Any, shapes: Sequence[Any]) -> tuple[Any, str]:
        """A gradient of this GPU, and its format.

        Raises:
            TypeError: if it is not on this GPU or has another dtype.
            ValueError: if it has another shape.
        """
        called = checks.called(path, "grads")
        place = places.of(leaf)
        if not isinstance(place, DevicePlace) or place.device is not self._place.device:
            raise TypeError(
                f"{called} is a {type(leaf).__name__} on {place.label}, but the parameters are on {self._place.label}. "
                f"Pass a {self._place.kind_of_array}."
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
        return leaf, self._formats[memory.kind]

    def _readable(self, path: str, leaf: Any, kind: str, common: str, first: int) -> tuple[int, Any]:
        """The address where a gradient can be read in a format, and the array there: its own, or a copy.

        Args:
            path: of the leaf.
            leaf: the gradient.
            kind: its format.
            common: the format it is needed in.
            first: where it stands among all elements.

        Raises:
            TypeError: if it has to be converted, and its library cannot.
            ValueError: if it has to be gathered, and its library cannot.
        """
        called, place = checks.called(path, "grads"), places.of(leaf)
        assert isinstance(place, DevicePlace)
        stream = self._place.stream() if self.stream is None else self.stream
        memory = place.memory(called, leaf)
        if kind != common or not memory.contiguous:
            with place.using(stream):
                leaf = leaf if kind == common else place.widened(called, leaf, kind, common)
                leaf = place.contiguous(leaf)
            memory = place.memory(called, leaf)
        if memory.aligned and not self.overlaps(memory.address, memory.nbytes):
            return memory.address, leaf
        gathered = self._gather(common)
        address = self._place.address(gathered) + first * (2 if common in FORMATS else self._dtype.itemsize)
        self._place.device.copy(address, memory.address, memory.nbytes, stream)
        return address, (gathered, leaf)

    def look(self, found: list[Any], flat: bool, wanted: str) -> list[int] | None:
        """The addresses of gradients, if it is quick to see that all can be read in place.

        Args:
            found: the gradients, None where a leaf has none.
            flat: whether they are one array that holds all in order.
            wanted: their format.

        Returns:
            An address for each, 0 where there is none; None if `leaves` or `flat` has to look at them, or an array of
            the caller's has moved.
        """
        if [self._place.address(array) for _, array, _ in self._given] != [m.address for m in self._given_memory]:
            return None
        quick = self._place.quick_address
        shapes: Sequence[Any] = self._shapes
        if flat:
            shapes = [self._only_shape if getattr(found[0], "shape", None) == self._only_shape else (self._size,)]
        for dtype in (name for name, format_ in self._formats.items() if format_ == wanted):
            looked = (
                0 if leaf is None else quick(leaf, shape, dtype) for leaf, shape in zip(found, shapes, strict=True)
            )
            addresses = [address for address in looked if address is not None]
            if len(addresses) == len(found):
                size = 2 if wanted in FORMATS else self._dtype.itemsize
                overlap = self.overlaps(addresses[0], self._size * size) if flat else self.any_overlaps(addresses, size)
                return None if overlap else addresses
        return None

    def flat(self, grads: Any) -> tuple[int, list[Any], str]:
        """As `Gradients.flat`."""
        leaf, kind = self._checked("", grads, ((self._size,), self._only_shape))
        address, array = self._readable("", leaf, kind, kind, 0)
        return address, [array], kind

    def leaves(self, leaves: list[Any]) -> tuple[list[int], list[Any], str]:
        """As `Gradients.leaves`."""
        checked = [
            None if leaf is None else self._checked(path, leaf, (tuple(shape),))
            for path, leaf, shape in zip(self._paths, leaves, self._shapes, strict=True)
        ]
        kinds = {kind for _, kind in filter(None, checked)}
        common = kinds.pop() if len(kinds) == 1 else self._name
        settled = [
            (0, None) if one is None else self._readable(path, *one, common, first)
            for path, one, first in zip(self._paths, checked, self._first.tolist(), strict=True)
        ]
        arrays = [array for _, array in settled]
        in_place = all(array is leaf for array, leaf in zip(arrays, leaves, strict=True))
        return [address for address, _ in settled], leaves if in_place else arrays, common
