"""What happens to one element, on every backend that compiles: from what its columns hold to what is stored and added.

The functions here are handed what makes functions callable from kernels (`Maker`), and give functions of the tuple `c`,
what some columns hold of the element, and of `h`, what `decide` returned for its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from . import functions
from .staged import Code, Staged, define
from .storage import Storage, accessors, zero_of

__all__ = ["Maker", "average_of", "every_column", "measure_of", "staged_function", "update_of"]


class Maker(Protocol):
    """What makes functions for one backend."""

    @property
    def where(self) -> Any:
        """A select: `where(condition, a, b)`."""

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU's."""

    def function(self, function: Callable[..., Any], /) -> Any:
        """Make a function callable from kernels."""


def every_column(staged: Staged) -> range:
    """The columns that can be read."""
    return range(len(staged.arguments))


def staged_function(maker: Maker, code: Code, name: str) -> Any:
    """A staged function, callable from kernels."""
    calls = functions.for_kernels(code.calls, maker.where, maker.function, maker.gpu)
    return maker.function(define(code, name, calls))


def _values(maker: Maker, staged: Staged, storage: Storage, code: Code, name: str, columns: Sequence[int]) -> Any:
    """`values(c, h)`: what a staged function returns, where `c` has only the columns that it uses."""
    taken = [f"c[{columns.index(k) if k in columns else 0}]" for k in every_column(staged)]
    namespace: dict[str, Any] = {name: staged_function(maker, code, name)}
    decode = accessors(storage, maker.where).get("decode_g")
    if decode is not None and 1 in columns:
        namespace.update(decode=maker.function(decode), number=np.dtype(storage.compute).type)
        taken[1] = f"number(decode({taken[1]}))"
    return maker.function(define(f"def values(c, h):\n    return {name}({', '.join(taken)}, h)", "values", namespace))


def _shadow(maker: Maker, storage: Storage) -> Any:
    """`shadow(p)`: the copy of a new parameter, in a tuple that is empty if there is none."""
    convert = {name: maker.function(f) for name, f in accessors(storage, maker.where).items() if name != "decode_g"}
    encode: Any = convert.get("encode_shadow")
    narrow: Any = convert.get("narrow")

    def none(p: Any) -> Any:
        return ()

    def encoded(p: Any) -> Any:
        return (encode(p),)

    def narrowed(p: Any) -> Any:
        return (encode(narrow(p)),)

    return maker.function(none if encode is None else encoded if narrow is None else narrowed)


def update_of(maker: Maker, staged: Staged, storage: Storage, columns: Sequence[int]) -> Any:
    """`element(c, h)`: what is stored, the shadow, and what is emitted; three tuples.

    What is stored are the columns of `Storage.written` without the shadow. The shadow, which leaves in whole lines, is
    none or one number.

    Args:
        maker: of functions.
        staged: the rule.
        storage: how its columns stand in memory.
        columns: those that `c` has.
    """
    values, shadow = _values(maker, staged, storage, staged.update, "update", columns), _shadow(maker, storage)
    zeros, end = (zero_of(staged, storage),) * storage.clear, 1 + len(staged.states)

    def element(c: Any, h: Any) -> Any:
        r = values(c, h)
        return (r[0], *zeros, *r[1:end]), shadow(r[0]), r[end:]

    return maker.function(element)


def measure_of(maker: Maker, staged: Staged, storage: Storage, number: int, columns: Sequence[int]) -> Any:
    """`values(c, h)`: what a measure adds up; arguments as for `update_of`, and the measure's number."""
    return _values(maker, staged, storage, staged.measures[number].source, "measure", columns)


def average_of(maker: Maker, staged: Staged, storage: Storage, columns: Sequence[int]) -> Any:
    """`values(c, h)`: the new averages of a leaf that is not updated; arguments as for `update_of`."""
    assert staged.average is not None
    return _values(maker, staged, storage, staged.average, "average", columns)
