"""Tables in a GPU's memory, and their contents on the host."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .driver import Device

__all__ = ["Tables"]

_ALIGNMENT = 256


class Tables:
    """Several tables in one piece of a GPU's memory, and their contents on the host.

    Args:
        device: the GPU.
        tables: the content of each; the arrays are kept, and each upload copies what is in them at that time.
        capturing: whether a graph is being captured.
        stream: the only stream that will use them, if it is known.
    """

    def __init__(
        self, device: Device, tables: Mapping[Any, np.ndarray], capturing: bool, stream: int | None = None
    ) -> None:
        self._device, self.tables = device, tables
        self._offsets, size = {}, 0
        for key, table in tables.items():
            self._offsets[key] = size
            size += -(-max(table.nbytes, 8) // _ALIGNMENT) * _ALIGNMENT
        self._memory = device.table_memory(size, capturing, stream)
        self._size = size
        self._release = weakref.finalize(self, device.release_tables, self._memory, stream)

    def keep_for_graph(self) -> None:
        """Never hand the memory back: a graph may be replayed after everybody else has forgotten the tables."""
        self._release.detach()

    def address(self, key: Any) -> int:
        """Where a table is."""
        return int(self._memory[0] + self._offsets[key])

    def upload(self, stream: int, capturing: bool, keys: Sequence[Any] | None = None) -> None:
        """Copy tables to the GPU, all at once or some."""
        if keys is None:
            everything = np.zeros(self._size, np.uint8)
            for key, table in self.tables.items():
                first = self._offsets[key]
                everything[first : first + table.nbytes] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
            parts = [(self._memory[0], everything)]
        else:
            parts = [(self.address(key), np.ascontiguousarray(self.tables[key])) for key in keys]
        for address, part in parts:
            if capturing:
                self._device.upload_now(address, part)
            else:
                self._device.upload(address, part, stream)

    def download(self, keys: Sequence[Any], stream: int) -> None:
        """Copy tables back into their arrays on the host; waits."""
        for key in keys:
            self._device.download(self.tables[key], self.address(key), stream)
