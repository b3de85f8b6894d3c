"""Arrays on a GPU from any library: PyTorch, CuPy, Numba, anything with a CUDA array interface or DLPack."""

from __future__ import annotations

import abc
import contextlib
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import places
from ..arrays.places import Alloc, Memory, Place
from ..kernels.formats import FORMATS
from . import driver as devices
from .driver import Device

__all__ = ["DeviceArray", "DevicePlace", "on_device"]


class DevicePlace(Place):
    """The memory of one GPU, and the library whose arrays are in it.

    Args:
        device: the GPU.

    Attributes:
        device: the GPU.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.label = device, device.label

    @abc.abstractmethod
    def stream(self) -> int:
        """The handle of the caller's current stream."""

    @abc.abstractmethod
    def view(self, array: Any, kind: str) -> Any:
        """A flat array of bytes as one of another dtype."""

    @abc.abstractmethod
    def empty_bytes(self, nbytes: int) -> Any:
        """A flat array of bytes."""

    def allocate(
        self, count: int, dtype: Any, position: int = 0, alloc: Alloc | None = None, used: Sequence[Memory] = ()
    ) -> Any:
        """A flat array of zeros.

        Raises:
            TypeError: if host memory is to be used.
            MemoryError: if the GPU has not enough; the message says how much was needed.
        """
        if alloc is not None:
            raise TypeError(f"alloc= places buffers in the host's memory, but the parameters are on {self.label}.")
        kind = np.dtype(dtype).name
        nbytes = count * np.dtype(dtype).itemsize
        try:
            raw = self.empty_bytes(nbytes)
        except (MemoryError, RuntimeError) as error:  # each library has its own error, all of them RuntimeErrors
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MemoryError(
                f"a buffer of {count:,} x {kind} needs {nbytes:,} bytes on {self.label}, which has no room for it: "
                f"{problem}"
            ) from None
        array = self.view(raw, kind)
        self.device.clear(self.address(array), nbytes, self.stream())
        return array

    def fill(self, array: Any, value: float) -> None:
        """Set all elements to a number."""
        memory = self.memory("", array)
        if value == 0:
            self.device.clear(memory.address, memory.nbytes, self.stream())
        else:
            self.upload(array, np.full(memory.shape, value, places.storage_of(memory.kind)))

    def copy(self, to: Any, source: Any) -> None:
        """Copy all elements of an array of any library on this GPU."""
        target = self.memory("", to)
        self.device.copy(target.address, places.of(source).address(source), target.nbytes, self.stream())

    def upload(self, to: Any, source: np.ndarray) -> None:
        """Copy all elements of an array on the host; two-byte floats as their bits."""
        target = self.memory("", to)
        numbers = np.ascontiguousarray(source, places.storage_of(target.kind))
        self.device.upload(target.address, numbers, self.stream())

    def download(self, array: Any, stream: int | None = None) -> np.ndarray:
        """A copy as a NumPy array on the host; waits for the stream, by default the current one."""
        memory = self.memory("", array)
        out = np.empty(memory.shape, places.storage_of(memory.kind))
        self.device.download(out, memory.address, self.stream() if stream is None else stream)
        return out

    def as_format(self, bits: Any, name: str) -> Any:
        """Bits as numbers, where the library has the format."""
        return self.view(bits, name)

    def quick_address(self, leaf: Any, shape: tuple[int, ...], kind: str) -> int | None:
        """The address of a C-contiguous array if it is quick to see that it has this place, shape and dtype."""
        return None

    def readable(self, leaf: Any) -> Any:
        """An array that is only read, as `memory` takes it."""
        return leaf

    def using(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """A context in which the library works in a stream, where it can."""
        return contextlib.nullcontext()

    def widened(self, called: str, array: Any, name: str, dtype: str) -> Any:
        """Numbers of a two-byte format, or their bits, as an array of a float dtype.

        Raises:
            TypeError: if the library cannot convert them.
        """
        raise TypeError(
            f"{called} is {name}, but other leaves are not, and an array that belongs to no library cannot be "
            f"converted to {dtype}. Pass gradients of one dtype."
        )

    def contiguous(self, array: Any) -> Any:
        """The array itself if it is C-contiguous, else a copy that is.

        Raises:
            ValueError: if the library cannot copy it.
        """
        if self.memory("", array).contiguous:
            return array
        raise ValueError(f"an array on {self.label} is not C-contiguous. Pass a contiguous copy.")


class _Torch(DevicePlace):
    """PyTorch tensors."""

    kind_of_array = "PyTorch tensor"
    make_contiguous = "tensor.contiguous()"

    def __init__(self, device: Device, where: Any) -> None:
        super().__init__(device)
        self._torch, self._where = sys.modules["torch"], where

    def memory(self, called: str, leaf: Any) -> Memory:
        """What a tensor is, as memory."""
        if not isinstance(leaf, self._torch.Tensor) or leaf.device != self._where:
            where = leaf.device if isinstance(leaf, self._torch.Tensor) else places.of(leaf).label
            raise TypeError(
                f"{called} is a {type(leaf).__name__} on {where}, expected a PyTorch tensor on {self.label}."
            )
        if leaf.requires_grad:
            raise TypeError(
                f"{called} requires grad, so PyTorch would not know that it is written. Pass its .data (or .detach())."
            )
        kind = str(leaf.dtype).removeprefix("torch.")
        address, shape = leaf.data_ptr(), tuple(leaf.shape)
        contiguous, aligned = leaf.is_contiguous() and not leaf.is_conj(), address % leaf.element_size() == 0
        return Memory(address, shape, kind, leaf.numel() * leaf.element_size(), contiguous, aligned, True)

    def quick_address(self, leaf: Any, shape: tuple[int, ...], kind: str) -> int | None:
        """As `DevicePlace.quick_address`."""
        good = (
            isinstance(leaf, self._torch.Tensor)
            and leaf.dtype is getattr(self._torch, kind)
            and leaf.shape == shape
            and leaf.is_contiguous()
            and leaf.device == self._where
            and not leaf.requires_grad
        )
        return leaf.data_ptr() if good else None

    def readable(self, leaf: Any) -> Any:
        """A tensor without its history."""
        return leaf.detach() if leaf.requires_grad else leaf

    def contiguous(self, array: Any) -> Any:
        """The tensor itself if it is C-contiguous, else a copy that is."""
        return array.contiguous()

    def using(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """A context in which PyTorch works in a stream."""
        if stream == self.stream():
            return contextlib.nullcontext()
        cuda = self._torch.cuda
        known = cuda.ExternalStream(stream, self._where) if stream else cuda.default_stream(self._where)
        context: contextlib.AbstractContextManager[Any] = cuda.stream(known)
        return context

    def widened(self, called: str, array: Any, name: str, dtype: str) -> Any:
        """As `DevicePlace.widened`."""
        return array.view(getattr(self._torch, name)).to(getattr(self._torch, dtype))

    def address(self, array: Any) -> int:
        """The address of a tensor's first element."""
        return int(array.data_ptr())

    def stream(self) -> int:
        """The handle of the current stream."""
        return int(self._torch.cuda.current_stream(self._where).cuda_stream)

    def view(self, array: Any, kind: str) -> Any:
        """A flat tensor as one of another dtype."""
        return array.view(getattr(self._torch, kind))

    def empty_bytes(self, nbytes: int) -> Any:
        """A flat tensor of bytes."""
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._where)


class _CuPy(DevicePlace):
    """CuPy arrays."""

    kind_of_array = "CuPy array"
    make_contiguous = "cupy.ascontiguousarray(...)"

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._cupy = sys.modules["cupy"]

    def memory(self, called: str, leaf: Any) -> Memory:
        """What an array is, as memory."""
        if not isinstance(leaf, self._cupy.ndarray) or leaf.device.id != self.device.ordinal:
            raise TypeError(f"{called} is a {type(leaf).__name__}, expected a CuPy array on {self.label}.")
        address = int(leaf.data.ptr)
        aligned = address % leaf.itemsize == 0
        return Memory(address, leaf.shape, str(leaf.dtype), leaf.nbytes, leaf.flags.c_contiguous, aligned, True)

    def contiguous(self, array: Any) -> Any:
        """The array itself if it is C-contiguous, else a copy that is."""
        return self._cupy.ascontiguousarray(array).reshape(array.shape)

    def using(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """A context in which CuPy works in a stream."""
        if stream == self.stream():
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self._cupy.cuda.ExternalStream(stream, self.device.ordinal)
        return context

    def widened(self, called: str, array: Any, name: str, dtype: str) -> Any:
        """As `DevicePlace.widened`; a bfloat16 is the upper half of a float32, which every CuPy knows."""
        if name == "bfloat16":
            return (array.view("uint16").astype("uint32") << 16).view("float32").astype(dtype)
        return array.view(name).astype(dtype)

    def address(self, array: Any) -> int:
        """The address of an array's first element."""
        return int(array.data.ptr)

    def stream(self) -> int:
        """The handle of the current stream."""
        return int(self._cupy.cuda.get_current_stream().ptr)

    def view(self, array: Any, kind: str) -> Any:
        """A flat array as one of another dtype; bfloat16 stays bits, which every CuPy knows."""
        return array if kind == "bfloat16" else array.view(kind)

    def empty_bytes(self, nbytes: int) -> Any:
        """A flat array of bytes."""
        with self._cupy.cuda.Device(self.device.ordinal):
            return self._cupy.empty(nbytes, "uint8")


class DeviceArray:
    """An array on a GPU that belongs to no library; PyTorch, CuPy and Numba take it without a copy.

    `torch.as_tensor(x, device="cuda")`, `cupy.asarray(x)` and `numba.cuda.as_cuda_array(x)` share its memory;
    `x.numpy()` is a copy on the host. Made by `fastlr.flatten(tree, device="cuda")` and by optimizers over arrays of
    a library that fastlr does not allocate with.

    Attributes:
        device: the GPU.
        address: of the first element.
        shape: in elements.
        dtype: NumPy's.
    """

    def __init__(
        self, device: Device, owner: _Allocation, address: int, shape: tuple[int, ...], dtype: np.typing.DTypeLike
    ) -> None:
        self.device, self._owner, self.address = device, owner, address
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": 1,
        }

    def __len__(self) -> int:
        """The first dimension."""
        return self.shape[0]

    def __getitem__(self, part: slice) -> DeviceArray:
        """A part of a flat array; a view."""
        if not isinstance(part, slice) or len(self.shape) != 1:
            raise TypeError("a DeviceArray can be cut by slices of a flat array; hand it to PyTorch or CuPy for more.")
        first, last, step = part.indices(self.shape[0])
        if step != 1:
            raise ValueError("a DeviceArray is contiguous: slices have no step.")
        at = self.address + first * self.itemsize
        return DeviceArray(self.device, self._owner, at, (max(0, last - first),), self.dtype)

    def reshape(self, shape: Any) -> DeviceArray:
        """The same elements in another shape; a view."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if int(np.prod(shape, dtype=np.int64)) != self.size:
            raise ValueError(f"{self.size} elements do not fit the shape {shape}.")
        return DeviceArray(self.device, self._owner, self.address, shape, self.dtype)

    def view(self, dtype: Any) -> DeviceArray:
        """The same bytes of a flat array as another dtype."""
        dtype = np.dtype(dtype)
        return DeviceArray(self.device, self._owner, self.address, (self.nbytes // dtype.itemsize,), dtype)

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        return on_device(self.device).download(self)

    def __reduce__(self) -> Any:
        """Refuse pickles, which would be of an address."""
        raise TypeError("a DeviceArray cannot be pickled or copied; take x.numpy().")

    def __repr__(self) -> str:
        """Shape, dtype and GPU."""
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device.label})"


class _Allocation:
    """Memory of a GPU that is given back when nobody refers to it."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self.address = device, device.allocate(nbytes)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._device.free(self.address)


class _Bare(DevicePlace):
    """Arrays that tell their address by an interface; what we allocate are `DeviceArray`s."""

    kind_of_array = "device array"
    make_contiguous = "a contiguous copy"

    def memory(self, called: str, leaf: Any) -> Memory:
        """What an array is, as memory."""
        found = _by_interface(leaf)
        if found is None:
            raise TypeError(f"{called} is a {type(leaf).__name__}, expected an array on {self.label}.")
        return found

    def address(self, array: Any) -> int:
        """The address of an array's first element."""
        return array.address if isinstance(array, DeviceArray) else self.memory("", array).address

    def quick_address(self, leaf: Any, shape: tuple[int, ...], kind: str) -> int | None:
        """As `DevicePlace.quick_address`."""
        good = type(leaf) is DeviceArray and leaf.device is self.device and leaf.shape == shape and leaf.dtype == kind
        return leaf.address if good else None

    def stream(self) -> int:
        """The legacy default stream, which is in order with all blocking streams."""
        return 0

    def view(self, array: Any, kind: str) -> Any:
        """A flat array as one of another dtype; two-byte floats that NumPy lacks stay bits."""
        return array if kind in FORMATS and kind != "float16" else array.view(kind)

    def empty_bytes(self, nbytes: int) -> DeviceArray:
        """A flat array of bytes."""
        owner = _Allocation(self.device, nbytes)
        return DeviceArray(self.device, owner, owner.address, (nbytes,), np.uint8)


def _by_interface(leaf: Any) -> Memory | None:
    """An array as memory, by its CUDA array interface or DLPack."""
    described = getattr(leaf, "__cuda_array_interface__", None)
    if described is not None:
        address, read_only = described["data"]
        dtype = np.dtype(described["typestr"])
        shape, strides = tuple(described["shape"]), described.get("strides")
        return _memory(address or 0, shape, strides, str(dtype), dtype.itemsize, not read_only)
    if not hasattr(leaf, "__dlpack__") or leaf.__dlpack_device__()[0] != 2:
        return None
    from cuda.core.utils import StridedMemoryView

    seen = StridedMemoryView.from_dlpack(leaf, stream_ptr=1)  # whoever made it makes the default stream wait
    kind = str(seen.dtype) if seen.dtype is not None else "a dtype that NumPy does not know"
    itemsize = seen.dtype.itemsize if seen.dtype is not None else 1
    strides = None if seen.strides is None else tuple(s * itemsize for s in seen.strides)
    return _memory(int(seen.ptr), tuple(seen.shape), strides, kind, itemsize, not seen.readonly)


def _memory(address: int, shape: tuple[int, ...], strides: Any, kind: str, itemsize: int, writeable: bool) -> Memory:
    size = math.prod(shape)
    expected = [itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape))] if strides is not None else []
    in_order = (
        strides is None or size == 0 or all(s == e for s, e, n in zip(strides, expected, shape, strict=True) if n != 1)
    )
    return Memory(address, shape, kind, size * itemsize, in_order, address % itemsize == 0, writeable)


@functools.cache
def _torch_place(where: Any) -> _Torch:
    return _Torch(devices.gpu(where.index), where)


@functools.cache
def _cupy_place(ordinal: int) -> _CuPy:
    return _CuPy(devices.gpu(ordinal))


@functools.cache
def on_device(device: Device) -> _Bare:
    """The place of arrays that belong to no library on a GPU."""
    return _Bare(device)


def _find(leaf: Any) -> Place | None:
    """The place of an array on a GPU; None for anything else."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(leaf, torch.Tensor):
        return _torch_place(leaf.device) if leaf.is_cuda else None
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(leaf, cupy.ndarray):
        return _cupy_place(leaf.device.id)
    if isinstance(leaf, DeviceArray):
        return on_device(leaf.device)
    found = None
    if not isinstance(leaf, np.ndarray):
        found = _by_interface(leaf)
    if found is None:
        return None
    devices.require()
    return on_device(devices.gpu(devices.gpu(0).owner(found.address) or 0))


places.FINDERS.append(_find)
