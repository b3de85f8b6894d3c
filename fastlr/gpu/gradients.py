"""Where the gradients of a step are on a GPU: checked, read in place where they can be, copied where not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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

    def _checked(self, path: str, leaf: Any, shapes: Sequence[tuple[int, ...] | None]) -> tuple[Any, str]:
        """As `Gradients._checked`; a gradient elsewhere than on this GPU is a TypeError."""
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

    def _readable(self, path: str, array: Any, kind: str, common: str, start: int) -> tuple[int, Any]:
        """As `Gradients._readable`.

        Raises:
            TypeError: if it has to be converted, and its library cannot.
            ValueError: if it has to be gathered, and its library cannot.
        """
        called, place = checks.called(path, "grads"), places.of(array)
        assert isinstance(place, DevicePlace)
        stream = self._place.stream() if self.stream is None else self.stream
        memory = place.memory(called, array)
        if kind != common or not memory.contiguous:
            with place.using(stream):
                array = array if kind == common else place.widened(called, array, kind, common)
                array = place.contiguous(array)
            memory = place.memory(called, array)
        if memory.aligned and not self.written.overlaps(memory.address, memory.nbytes):
            return memory.address, array
        gathered = self._gather(common)
        address = self._place.address(gathered) + start * (2 if common in FORMATS else self._dtype.itemsize)
        self._place.device.copy(address, memory.address, memory.nbytes, stream)
        return address, (gathered, array)

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
        sizes = self._sizes
        if flat:
            shapes = [self._only_shape if getattr(found[0], "shape", None) == self._only_shape else (self._size,)]
            sizes = np.array([self._size])
        for dtype in (name for name, format_ in self._formats.items() if format_ == wanted):
            looked = (
                0 if leaf is None else quick(leaf, shape, dtype) for leaf, shape in zip(found, shapes, strict=True)
            )
            addresses = [address for address in looked if address is not None]
            if len(addresses) == len(found):
                size = 2 if wanted in FORMATS else self._dtype.itemsize
                return None if self.written.any_overlaps(addresses, sizes * size) else addresses
        return None

    def _usual(self, leaves: list[Any]) -> None:
        """None: `look` sees what is quick to see."""
