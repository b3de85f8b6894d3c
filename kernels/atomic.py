"""Several writes that take effect together."""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["commit"]


def commit(writes: Iterable[tuple[Any, Any, Any]]) -> None:
    """Carry out `container[key] = value` for each write, with nothing in between.

    All of it is one call into C: no signal handler and no other Python code comes before the last write, so that an
    interrupt leaves either what was before or what comes after.

    Args:
        writes: (container, key, value): `(array, ..., source)` copies into an array, `(object.__dict__, name, value)`
            sets an attribute. None of them may fail: check before.
    """
    collections.deque(itertools.starmap(operator.setitem, list(writes)), maxlen=0)
