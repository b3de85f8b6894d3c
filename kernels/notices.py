"""Warnings that are given once in a process, whatever made them necessary again."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warn, unless the same has been said before."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
