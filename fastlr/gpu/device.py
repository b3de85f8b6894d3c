"""The contract of what runs kernels: what everything above the driver asks of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..kernels.target import Body, Target

if TYPE_CHECKING:
    from .driver import Gpu, Launch

__all__ = ["Device"]


class Device(Protocol):
    """A GPU, as `fastlr.gpu.driver.Gpu` is one. Addresses are of its memory; a stream is a handle."""

    @property
    def ordinal(self) -> int:
        """Its number among those that the process may see."""

    @property
    def label(self) -> str:
        """What it is called in messages."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def table_memory(self, nbytes: int, capturing: bool, stream: int | None = None) -> tuple[int, int]:
        """Memory for tables, address and size; of tables that are not needed any more where that is safe."""

    def release_tables(self, memory: tuple[int, int], stream: int | None = None) -> None:
        """Give it back, for other tables."""

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy from the host, in the order of a stream."""

    def upload_now(self, address: int, array: np.ndarray) -> None:
        """Copy from the host and wait, beside a stream that is being captured."""

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy to the host, after all that was asked of a stream before; waits for it."""

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from one place to another, in the order of a stream."""

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Zeros, in the order of a stream."""

    def owner(self, address: int) -> int | None:
        """The number of the GPU that an address belongs to; None if it is none's."""

    def kernel(self, make: Callable[[Target], Body], name: str, content: Sequence[object]) -> tuple[Any, int]:
        """The handle of a kernel and the threads of its blocks: its body, the rule's name, what its code depends on."""

    def launch(self, launch: Launch, blocks: int, stream: int) -> None:
        """Start a kernel in a stream."""

    def enter(self) -> None:
        """Call before launches."""

    def capturing(self, stream: int) -> bool:
        """Whether a stream is being captured into a graph."""

    def synchronize(self, stream: int) -> None:
        """Wait for a stream."""


if TYPE_CHECKING:
    _checked: type[Device] = Gpu
