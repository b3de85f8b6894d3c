"""What a step asks of a GPU (`Device`), and the CUDA driver that does it (`Gpu`).

Memory goes by its address, streams by their handles, and launches are packed beforehand. The package cuda-bindings,
which comes with numba-cuda, is imported when somebody asks for a GPU.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .. import checks

__all__ = ["Device", "DeviceError", "Gpu", "Launch", "gpu", "problem"]

_INSTALL = 'pip install "fastlr-kernels[cuda13]" (or [cuda12], for a driver older than 580)'


_TABLE_BYTES, _HELD = 1 << 20, 64  # uploads up to this size are copied first; so many copies are kept


class DeviceError(RuntimeError):
    """A GPU is missing, or it refused something; the call that raises this has changed nothing."""


@functools.cache
def problem() -> str | None:
    """Why no GPU can be used, and what to do; None if one can."""
    for package in ("numba_cuda", "cuda.bindings"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"numba-cuda is not installed: {_INSTALL}"
    from cuda.bindings import driver

    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # cuda-bindings raises what its loader raises
        return f"no NVIDIA driver was found ({str(error).splitlines()[0]}): install it, nvidia-smi must work"
    if status != driver.CUresult.CUDA_SUCCESS:
        return f"the NVIDIA driver does not start ({status.name}): see nvidia-smi and CUDA_VISIBLE_DEVICES"
    status, count = driver.cuDeviceGetCount()
    if status != driver.CUresult.CUDA_SUCCESS or count == 0:
        return "no NVIDIA GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def require() -> None:
    """Raise what is missing for a GPU.

    Raises:
        DeviceError: if something is.
    """
    missing = problem()
    if missing is not None:
        raise DeviceError(f"a GPU was asked for, but {missing}. Arrays on the CPU work without.")


def count() -> int:
    """How many GPUs there are."""
    from cuda.bindings import driver

    _, found = driver.cuDeviceGetCount()
    return int(found)


@functools.cache
def gpu(ordinal: int = 0) -> Gpu:
    """The GPU with a number."""
    require()
    return Gpu(ordinal)


def stream_handle(stream: Any, device: Device) -> int:
    """The handle of a stream of any library.

    Args:
        stream: what the user gave.
        device: the GPU that it must belong to.

    Raises:
        TypeError: if it is not a stream.
        ValueError: if it says that it belongs to another GPU.
    """
    where = getattr(stream, "device_id", getattr(getattr(stream, "device", None), "index", None))
    if isinstance(where, int) and where not in (-1, device.ordinal):
        raise ValueError(f"the stream is of cuda:{where}, but the parameters are on {device.label}.")
    for name in ("cuda_stream", "ptr"):  # PyTorch; CuPy
        if isinstance(getattr(stream, name, None), int):
            return int(getattr(stream, name))
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    raise TypeError(
        f"stream must be a stream of PyTorch, CuPy or cuda.core, or its handle, got {checks.shown(stream)}."
    )


class Launch:
    """A kernel with its arguments, packed for the driver.

    Args:
        function: the handle of the loaded kernel.
        threads: in a block.
        values: ctypes numbers, in the order of the kernel's parameters; change `.value` between launches.
    """

    def __init__(self, function: Any, threads: int, values: Sequence[Any]) -> None:
        self.function, self.threads, self.values = function, threads, list(values)
        self._pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        self.packed = ctypes.addressof(self._pointers)


@runtime_checkable
class Device(Protocol):
    """What a step needs from a GPU. `Gpu` is the real one; the tests have another that runs on the CPU.

    Everything is ordered by the stream that it is given; only `download` and `upload_now` wait.

    Attributes:
        ordinal: its number among those that the process may see.
        label: "cuda:0" and so on.
        cc: its compute capability.
    """

    ordinal: int
    label: str
    cc: tuple[int, int]

    def __hash__(self) -> int:
        """A GPU is equal only to itself."""
        return id(self)

    def allocate(self, nbytes: int) -> int:
        """The address of memory that the caller owns until it calls `free`; aligned to 256 bytes.

        Raises:
            MemoryError: if there is not enough; the message says how much there is.
        """

    def free(self, address: int) -> None:
        """Give memory back."""

    def table_memory(self, nbytes: int, capturing: bool, stream: int | None = None) -> tuple[int, int]:
        """Memory for tables: its address and size. It stays allocated and is used again after `release_tables`.

        Args:
            nbytes: the size needed.
            capturing: whether a graph is being captured.
            stream: the only stream that will use it, if that is known. Memory that only this stream has used before
                can then be used again without waiting, since a stream does one thing after the other.
        """

    def release_tables(self, memory: tuple[int, int], stream: int | None = None) -> None:
        """Let others use table memory, with the only stream that used it, if that is known."""

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy from the host; the array may be changed once this returns."""

    def upload_now(self, address: int, array: np.ndarray) -> None:
        """Copy from the host and wait, while another stream is being captured into a graph."""

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy to the host, and wait."""

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy within the GPU's memory."""

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Write zeros."""

    def owner(self, address: int) -> int | None:
        """The number of the GPU that an address belongs to; None if it belongs to none."""

    def kernel(self, make: Callable[[Any], Any], name: str, content: Sequence[object]) -> tuple[Any, int]:
        """The handle of a kernel, compiled or from the cache, and the threads in its blocks.

        Args:
            make: makes the kernel's body for a `grid.Target`.
            name: of the rule, for the names of files in the cache.
            content: everything that its code depends on.

        Raises:
            DeviceError: if it cannot be compiled or loaded.
        """

    def enter(self) -> None:
        """Prepare the calling thread for launches."""

    def launch(self, launch: Launch, blocks: int, stream: int) -> None:
        """Start a kernel; nothing for 0 blocks."""

    def capturing(self, stream: int) -> bool:
        """Whether a stream is being captured into a graph."""


class Gpu(Device):
    """One GPU, by the CUDA driver.

    Args:
        ordinal: its number among those that the process may see.
    """

    def __init__(self, ordinal: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self.ordinal, self.label = ordinal, f"cuda:{ordinal}"
        handle = self._ask(driver.cuDeviceGet(ordinal))
        attribute = driver.CUdevice_attribute
        major, minor = (
            int(self._ask(driver.cuDeviceGetAttribute(a, handle)))
            for a in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.cc = major, minor
        # The context that PyTorch, CuPy, JAX and Numba use as well.
        self._context = self._ask(driver.cuDevicePrimaryCtxRetain(handle))
        self._handle = handle
        self._own_stream: Any = None
        self._modules: dict[bytes, Any] = {}
        self._spare: list[tuple[int, int, int | None]] = []  # address, size, the only stream that used it
        self._lock = threading.Lock()
        self._held: collections.deque[np.ndarray] = collections.deque(maxlen=_HELD)

    def _ask(self, answer: tuple[Any, ...]) -> Any:
        """What the driver returned, or an error in words."""
        status, *values = answer
        if status != self._driver.CUresult.CUDA_SUCCESS:
            _, text = self._driver.cuGetErrorString(status)
            described = text.decode() if isinstance(text, bytes) else status.name
            raise DeviceError(f"{self.label}: the CUDA driver says {status.name}: {described}.")
        return values[0] if len(values) == 1 else None

    def enter(self) -> None:
        """Make the GPU's context the current one of the calling thread."""
        _, now = self._driver.cuCtxGetCurrent()
        if int(now) != int(self._context):
            self._ask(self._driver.cuCtxSetCurrent(self._context))

    def __repr__(self) -> str:
        """Its name."""
        _, name = self._driver.cuDeviceGetName(100, self._handle)
        return f"<{self.label}, {name.decode().split(chr(0))[0]}, compute capability {self.cc[0]}.{self.cc[1]}>"

    # Memory

    def allocate(self, nbytes: int) -> int:
        """As `Device.allocate`."""
        self.enter()
        status, address = self._driver.cuMemAlloc(max(1, nbytes))
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryError(f"{self.label} has no room for {nbytes:,} bytes; {self.room()}.")
        return int(self._ask((status, address)))

    def room(self) -> str:
        """How much memory is free, in words."""
        _, free, total = self._driver.cuMemGetInfo()
        return f"{free:,} of {total:,} bytes are free"

    def free(self, address: int) -> None:
        """Give memory back."""
        self._driver.cuMemFree(address)

    def table_memory(self, nbytes: int, capturing: bool, stream: int | None = None) -> tuple[int, int]:
        """As `Device.table_memory`."""
        size = 1 << max(8, (nbytes - 1).bit_length())
        with self._lock:
            fitting = (k for k, (_, room, last) in enumerate(self._spare) if room == size and last == stream)
            index = None if capturing else next(fitting, None)
            spare = self._spare.pop(index) if index is not None else None
        if spare is None:
            with _Relaxed(self._driver):
                return self.allocate(size), size
        if stream is None:
            self._ask(self._driver.cuCtxSynchronize())  # a kernel of the previous user may still run
        return spare[:2]

    def release_tables(self, memory: tuple[int, int], stream: int | None = None) -> None:
        """As `Device.release_tables`."""
        with self._lock:
            self._spare.append((*memory, stream))

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        """As `Device.upload`.

        Some systems read the host's memory only when the stream gets there: a small array is copied first, and a
        larger one waited for.
        """
        self.enter()
        if array.nbytes <= _TABLE_BYTES:
            array = array.copy()
            self._held.append(array)
        self._ask(self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, stream))
        if array.nbytes > _TABLE_BYTES:
            self._ask(self._driver.cuStreamSynchronize(stream))

    def upload_now(self, address: int, array: np.ndarray) -> None:
        """As `Device.upload_now`."""
        self.enter()
        driver = self._driver
        with _Relaxed(driver):
            if self._own_stream is None:
                self._own_stream = self._ask(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
            self._ask(driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._own_stream))
            self._ask(driver.cuStreamSynchronize(self._own_stream))

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        """As `Device.download`."""
        self.enter()
        if array.nbytes:
            self._ask(self._driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, stream))
            self._ask(self._driver.cuStreamSynchronize(stream))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """As `Device.copy`."""
        self.enter()
        if nbytes:
            self._ask(self._driver.cuMemcpyDtoDAsync(to, source, nbytes, stream))

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """As `Device.clear`."""
        self.enter()
        if nbytes:
            self._ask(self._driver.cuMemsetD8Async(address, 0, nbytes, stream))

    def owner(self, address: int) -> int | None:
        """As `Device.owner`."""
        attribute = self._driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        status, ordinal = self._driver.cuPointerGetAttribute(attribute, address)
        return int(ordinal) if status == self._driver.CUresult.CUDA_SUCCESS else None

    # Kernels

    def kernel(self, make: Callable[[Any], Any], name: str, content: Sequence[object]) -> tuple[Any, int]:
        """As `Device.kernel`."""
        from ..kernels import cuda

        try:
            image = cuda.image_of(make, name, self.cc, content)
        except Exception as error:  # whatever NVVM, nvJitLink and their loaders raise
            raise DeviceError(
                f"a kernel of {name!r} cannot be compiled for compute capability {self.cc[0]}.{self.cc[1]}: {error} "
                f"numba-cuda needs libNVVM and nvJitLink: {_INSTALL}, or set CUDA_HOME to a CUDA toolkit."
            ) from error
        return self.load(image), image.threads

    def load(self, image: Any) -> Any:
        """The handle of a kernel; the same image is loaded once.

        Raises:
            DeviceError: if the driver refuses it.
        """
        if image.code not in self._modules:
            self.enter()
            with _Relaxed(self._driver):
                try:
                    module = self._ask(self._driver.cuModuleLoadData(image.code))
                    self._modules[image.code] = self._ask(
                        self._driver.cuModuleGetFunction(module, image.entry.encode())
                    )
                except DeviceError as error:
                    raise DeviceError(
                        f"the kernel {image.name!r}, compiled for compute capability {self.cc[0]}.{self.cc[1]}, cannot "
                        f"be loaded. {error} Is the driver at least as new as the CUDA packages? Nothing was changed."
                    ) from None
        return self._modules[image.code]

    def launch(self, launch: Launch, blocks: int, stream: int) -> None:
        """As `Device.launch`."""
        if blocks:
            answer = self._driver.cuLaunchKernel(
                launch.function, blocks, 1, 1, launch.threads, 1, 1, 0, stream, launch.packed, 0
            )
            if answer[0] != 0:
                self._ask(answer)

    def capturing(self, stream: int) -> bool:
        """As `Device.capturing`."""
        status, state = self._driver.cuStreamIsCapturing(stream)
        return bool(status == self._driver.CUresult.CUDA_SUCCESS and int(state) != 0)


class _Relaxed:
    """While a graph is captured by this thread, let it allocate and load outside of the capture."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED

    def __enter__(self) -> None:
        _, self._mode = self._driver.cuThreadExchangeStreamCaptureMode(self._mode)

    def __exit__(self, *unused: object) -> None:
        self._driver.cuThreadExchangeStreamCaptureMode(self._mode)
