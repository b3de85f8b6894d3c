"""Number formats of two bytes: what stands in memory, to and from float32, by integer arithmetic alone.

Each function takes a number or an array and gives the same bits in Python, NumPy and compiled code. Nothing here uses
the processor's own conversions: they depend on the processor (F16C) and on its mode for subnormals.
Layouts: IEEE 754-2019, table 3.5 (binary16); bfloat16 is the upper half of binary32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Format:
    """How numbers of a column stand in memory.

    Attributes:
        name: the name of the dtype.
        storage: the dtype of what is loaded and stored.
        make: `make(where)` returns `decode(stored) -> float32` and `encode(float32) -> stored`; `where` is the select
            of the backend.
    """

    name: str
    storage: str
    make: Callable[[Callable[..., Any]], tuple[Callable[..., Any], Callable[..., Any]]]


def _bfloat16(where: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def decode(stored: Any) -> Any:
        return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)

    def encode(x: Any) -> Any:
        """To the nearest, ties to even; NaN stays NaN and gets quiet."""
        u = np.float32(x).view(np.uint32)
        nan = np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        rounded = np.uint32(u + np.uint32(0x7FFF) + np.uint32(np.uint32(u >> np.uint32(16)) & np.uint32(1)))
        return np.uint16(where(nan, np.uint32(u | np.uint32(0x400000)), rounded) >> np.uint32(16))

    return decode, encode


def _float16(where: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def decode(stored: Any) -> Any:
        bits = np.uint32(stored)
        sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
        rest = np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13))  # exponent and fraction in their places
        normal = np.uint32(rest + np.uint32(112 << 23))
        special = np.uint32(rest + np.uint32(224 << 23))
        # A subnormal is a whole number of 2**-24: both factors are exact, and neither they nor the product is a
        # subnormal of float32.
        small = np.float32(np.float32(np.uint32(bits & np.uint32(0x3FF))) * np.float32(2.0**-24)).view(np.uint32)
        u = where(rest >= np.uint32(31 << 23), special, where(rest >= np.uint32(1 << 23), normal, small))
        return np.uint32(sign | u).view(np.float32)

    def encode(x: Any) -> Any:
        """To the nearest, ties to even; beyond 65,504 and its half step infinity; NaN stays NaN and gets quiet."""
        bits = np.float32(x).view(np.uint32)
        sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
        u = np.uint32(bits & np.uint32(0x7FFFFFFF))
        exponent = np.uint32(u >> np.uint32(23))
        # Normal: drop 13 bits of the fraction, after half of what they can hold and the last bit that stays.
        odd = np.uint32(np.uint32(u >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(np.uint32(u - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13))
        # Subnormal: the same with as many bits as make it a whole number of 2**-24; from 26 on nothing is left.
        low = where(exponent > np.uint32(112), np.uint32(112), exponent)
        drop = np.uint32(np.uint32(126) - low)
        drop = where(drop > np.uint32(26), np.uint32(26), drop)
        whole = np.uint32(np.uint32(u & np.uint32(0x7FFFFF)) | np.uint32(0x800000))
        half = np.uint32(np.uint32(np.uint32(1) << np.uint32(drop - np.uint32(1))) - np.uint32(1))
        odd = np.uint32(np.uint32(whole >> drop) & np.uint32(1))
        small = np.uint32(np.uint32(whole + half + odd) >> drop)
        nan = np.uint32(np.uint32(0x7E00) | np.uint32(np.uint32(u >> np.uint32(13)) & np.uint32(0x3FF)))
        finite = where(exponent > np.uint32(112), normal, small)
        large = where(u > np.uint32(0x7F800000), nan, np.uint32(0x7C00))
        return np.uint16(np.uint32(sign | where(exponent >= np.uint32(143), large, finite)))

    return decode, encode


FORMATS = {f.name: f for f in (Format("bfloat16", "uint16", _bfloat16), Format("float16", "uint16", _float16))}


def to_float32(where: Callable[..., Any]) -> Callable[..., Any]:
    """`narrow(x)`: a float64 as a float32 that rounds on to two bytes as if the float64 had been rounded once.

    Rounding to odd: where something is lost, the last bit is set, so that what follows sees neither a tie that is none
    nor an exact number that is none (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).
    """

    def narrow(x: Any) -> Any:
        near = np.float32(x)
        u = near.view(np.uint32)
        back = np.float64(near)
        even = np.uint32(u & np.uint32(1)) == np.uint32(0)
        beyond = abs(back) > abs(x)
        moved = where(beyond, np.uint32(u - np.uint32(1)), np.uint32(u + np.uint32(1)))
        inexact = (back != x) & (back == back) & even
        return np.uint32(where(inexact, moved, u)).view(np.float32)

    return narrow
