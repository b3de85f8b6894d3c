"""A GPU that is none: the host's memory, the kernels one thread after another, streams that only keep order.

It takes the place of `fastlr.gpu.driver.Gpu`, so that everything above the driver runs as on a GPU, with the same
kernel bodies. What it cannot show: speed, races between threads, and what a driver refuses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastlr.arrays import places
from fastlr.arrays.places import Memory
from fastlr.gpu import arrays as device_arrays
from fastlr.gpu import driver
from fastlr.kernels import emulation
from fastlr.kernels.formats import FORMATS

_kernels: dict[str, tuple[Any, int]] = {}


def _memory(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer(memoryview((ctypes.c_char * nbytes).from_address(address)), np.uint8)


def _copy(nbytes: int, to: int, source: int) -> None:
    if nbytes:
        _memory(to, nbytes)[:] = _memory(source, nbytes)


class Graph:
    """Launches recorded while a stream was captured."""

    def __init__(self) -> None:
        self.launches: list[tuple[Callable[..., None], int, list[Any]]] = []

    def replay(self) -> None:
        for function, blocks, values in self.launches:
            function(blocks, *values)


class Device(driver.Device):
    """The driver's part."""

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal, self.label, self.cc = ordinal, f"cuda:{ordinal}", (9, 0)
        self.graph: Graph | None = None
        self.current_stream = 0
        self.calls: list[str] = []
        self.room_for: int | None = None
        self._kept: list[np.ndarray] = []

    def kernel(self, make: Callable[[Any], Any], name: str, content: Sequence[object]) -> tuple[Any, int]:
        key = repr(content)
        if key not in _kernels:
            body = make(emulation.TARGET)
            _kernels[key] = emulation.compile_kernel(body), body.threads
        return _kernels[key]

    def allocate(self, nbytes: int) -> int:
        if self.room_for is not None and nbytes > self.room_for:
            raise MemoryError(f"{self.label} has no room for {nbytes:,} bytes; {self.room_for} are free.")
        raw = np.full(nbytes + 256, 0xAB, np.uint8)
        self._kept.append(raw)
        return raw.ctypes.data + -raw.ctypes.data % 256

    def free(self, address: int) -> None:
        pass

    def table_memory(self, nbytes: int, capturing: bool, stream: int | None = None) -> tuple[int, int]:
        return self.allocate(nbytes), nbytes

    def release_tables(self, memory: tuple[int, int], stream: int | None = None) -> None:
        pass

    def enter(self) -> None:
        pass

    def owner(self, address: int) -> int:
        return self.ordinal

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        assert self.graph is None, "an upload in a capture would be replayed from memory of the host"
        self.calls.append(f"upload {array.nbytes}")
        _memory(address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def upload_now(self, address: int, array: np.ndarray) -> None:
        self.calls.append(f"upload_now {array.nbytes}")
        _memory(address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        assert self.graph is None, "a download in a capture waits for what has not begun"
        self.calls.append("wait")
        if array.nbytes:
            array.reshape(-1).view(np.uint8)[:] = _memory(address, array.nbytes)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self.calls.append("copy")
        if self.graph is not None:
            self.graph.launches.append((_copy, nbytes, [to, source]))
        else:
            _copy(nbytes, to, source)

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        if nbytes:
            _memory(address, nbytes)[:] = 0

    def launch(self, launch: driver.Launch, blocks: int, stream: int) -> None:
        if blocks == 0:
            return
        self.calls.append("launch")
        values = [v.value if not isinstance(v, ctypes.c_float) else np.float32(v.value) for v in launch.values]
        if self.graph is not None:
            self.graph.launches.append((launch.function, blocks, values))
        else:
            launch.function(blocks, *values)

    def capturing(self, stream: int) -> bool:
        return self.graph is not None

    # As a user of a graph would do it.

    def capture(self, function: Callable[[], object]) -> Graph:
        self.graph = graph = Graph()
        try:
            function()
        finally:
            self.graph = None
        return graph


class Array(np.ndarray):
    """An array that fastlr takes to be on the device."""

    ordinal = 0

    def __reduce__(self) -> Any:
        raise TypeError("the emulated device's arrays cannot be pickled")


class Other(Array):
    """One on another device."""

    ordinal = 1


class Place(device_arrays.DevicePlace):
    """The library of these arrays."""

    kind_of_array = "emulated array"
    make_contiguous = "a contiguous copy"

    def memory(self, called: str, leaf: Any) -> Memory:
        if not isinstance(leaf, np.ndarray):
            raise TypeError(f"{called} is a {type(leaf).__name__}, expected an array on {self.label}.")
        return places.HOST.memory(called, np.asarray(leaf))

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._emulated = device

    def stream(self) -> int:
        return self._emulated.current_stream

    def view(self, array: Any, kind: str) -> Any:
        return array if kind == "bfloat16" else array.view(kind)

    def empty_bytes(self, nbytes: int) -> Any:
        if self._emulated.room_for is not None and nbytes > self._emulated.room_for:
            raise RuntimeError("out of memory")
        raw = np.full(nbytes + 256, 0xAB, np.uint8)
        first = -raw.ctypes.data % 256
        return raw[first : first + nbytes].view(Array)

    def contiguous(self, array: Any) -> Any:
        return array if array.flags.c_contiguous else np.ascontiguousarray(array).view(Array)

    def widened(self, called: str, array: Any, name: str, dtype: str) -> Any:
        decode, _ = FORMATS[name].make(np.where)
        return np.asarray(decode(np.asarray(array).view(np.uint16)), dtype).reshape(array.shape).view(Array)


DEVICES = Device(0), Device(1)
PLACES = tuple(Place(d) for d in DEVICES)


def find(leaf: Any) -> Place | None:
    return PLACES[leaf.ordinal] if isinstance(leaf, Array) else None


def on_device(array: np.ndarray, offset: int = 0, kind: type = Array) -> Any:
    """A copy of an array "on the device", `offset` elements after an address that kernels like best."""
    array = np.asarray(array)
    raw = np.full(array.nbytes + 512, 0xAB, np.uint8)
    first = -raw.ctypes.data % 256 + offset * array.itemsize
    out: Any = raw[first : first + array.nbytes].view(array.dtype).reshape(array.shape).view(kind)
    out[...] = array
    return out
