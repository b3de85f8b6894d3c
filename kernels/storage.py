"""How the columns of a step stand in memory, and what converts between that and the numbers of the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .formats import FORMATS, to_float32
from .staged import AVERAGES
from .staging import Staged

__all__ = ["Storage", "accessors", "averages", "zero_of"]


@dataclass(frozen=True)
class Storage:
    """How the columns of a step stand in memory.

    Attributes:
        compute: "float32" or "float64"; of the arithmetic, and of all columns but those named here.
        gradient: the same, or one of `formats.FORMATS`.
        shadow: one of `formats.FORMATS` for a copy of the new parameters, or None.
        clear: set each gradient to zero once it has been read.
    """

    compute: str
    gradient: str
    shadow: str | None = None
    clear: bool = False

    def columns(self, staged: Staged) -> list[str]:
        """The dtype of each column: p, g, states, inputs, and the shadow at the end."""
        g = FORMATS[self.gradient].storage if self.gradient in FORMATS else self.gradient
        others = [self.compute] * (len(staged.states) + len(staged.inputs))
        return [self.compute, g, *others, *([FORMATS[self.shadow].storage] if self.shadow else [])]

    def written(self, staged: Staged) -> list[int]:
        """The columns that a step writes, in order."""
        states = range(2, 2 + len(staged.states))
        return [0, *([1] if self.clear else []), *states, *([len(self.columns(staged)) - 1] if self.shadow else [])]


def accessors(storage: Storage, select: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`decode_g` and `encode_shadow` as far as the storage needs them, with the select of a backend."""
    out: dict[str, Callable[..., Any]] = {}
    if storage.gradient in FORMATS:
        out["decode_g"] = FORMATS[storage.gradient].make(select)[0]
    if storage.shadow:
        out["encode_shadow"] = FORMATS[storage.shadow].make(select)[1]
        if storage.compute == "float64":
            out["narrow"] = to_float32(select)
    return out


def averages(staged: Staged) -> list[int]:
    """The columns that are averages."""
    return [2 + k for k, name in enumerate(staged.states) if name in AVERAGES]


def zero_of(staged: Staged, storage: Storage) -> Any:
    """The zero of a gradient."""
    return np.dtype(storage.columns(staged)[1]).type(0)
