"""How many threads a step may use, and what a fork means to a process that compiles."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import llvmlite.binding.ffi
from numba.core.compiler_lock import global_compiler_lock

from .. import checks

__all__ = ["get_num_threads", "set_num_threads"]


def available_cpus() -> int:
    """The CPUs that this process may use: its affinity, limited by the quota of its cgroup."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cpus, math.ceil(quota))) if quota else cpus


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs per period that the cgroup allows (version 2, then 1), or None."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        if quota != "max":
            return float(quota) / float(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = float((root / "cpu" / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            return quota_us / float((root / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        pass
    return None


_threads: int | None = None

# Grows in a forked child: what was shared with helpers that do not exist there has to be made anew.
epoch = 0


# A fork waits until no other thread compiles. Else the child would find the compiler locked for ever, by a thread that
# does not exist there. A compilation takes seconds; one that takes longer than this may be waiting for the very thread
# that forks. The locks stand in the order in which a compilation takes them.
_FORK_PATIENCE = 30.0
_COMPILERS: list[Any] = [global_compiler_lock, llvmlite.binding.ffi.lib._lock]


class _Held(threading.local):
    locks: tuple[Any, ...] = ()


_held = _Held()


def _before_fork() -> None:
    for compiler in _COMPILERS:
        if not compiler._lock.acquire(timeout=_FORK_PATIENCE):
            break
        _held.locks = (*_held.locks, compiler._lock)


def _after_fork() -> None:
    locks, _held.locks = _held.locks, ()
    for lock in reversed(locks):
        lock.release()


def _after_fork_in_child() -> None:
    global epoch
    for compiler in _COMPILERS:
        if compiler._lock not in _held.locks:
            compiler._lock = threading.RLock()
    _after_fork()
    epoch += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def set_num_threads(n: int) -> None:
    """Set how many threads a step may use, the calling one included, where an optimizer was not given `threads=`.

    The result of a step does not depend on it.

    Args:
        n: number of threads, >= 1. More than 256 count as 256, and no more are used than a step has tiles of up to
            16,384 elements.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is less than 1.

    Example:
        >>> import fastlr
        >>> fastlr.set_num_threads(2)
        >>> fastlr.get_num_threads()
        2
    """
    global _threads
    _threads = checks.count("n", n)


def get_num_threads() -> int:
    """How many threads a step may use: what was set, else the CPUs that this process may use."""
    global _threads
    if _threads is None:
        _threads = available_cpus()
    return _threads
