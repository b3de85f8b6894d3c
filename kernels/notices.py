"""Warnings that are given once in a process."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warn, unless this message has been given before."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
