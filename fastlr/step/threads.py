"""Helper threads for steps that are worth it.

Numba's own threading layers do not fit a trainer: `workqueue` aborts the process when two Python threads are in
parallel code, `omp` kills a forked child, and spinning OpenMP threads fight with those of BLAS. Here the calling
thread always carries the step; helpers are ordinary Python threads that are asked in and take tiles while there are
any (`kernels.cpu`). Any number of Python threads can step different optimizers, beside anybody's parallel code, and
a forked child starts its own helpers and can compile.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding.ffi
from numba.core.compiler_lock import global_compiler_lock

from .. import checks
from ..kernels.notices import warn_once

__all__ = ["get_num_threads", "set_num_threads"]

_TRY_AGAIN = 10.0  # seconds after a thread could not be started
_BACKLOG = 64  # requests that helpers have not yet got round to; more would only be late


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


def _find_current_cpu() -> Callable[[], int] | None:
    """A function that tells on which CPU the calling thread is, where the system has one."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        return ctypes.CDLL(None).sched_getcpu  # type: ignore[no-any-return]
    except (OSError, AttributeError):
        return None


_current_cpu = _find_current_cpu()


class _Pool:
    """Helper threads, started when they are first asked for."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.started = 0
        self.lock = threading.Lock()
        self.not_before = 0.0  # when to try again to start a thread, on the monotonic clock

    def ask(self, helpers: int, run: Any, tables: Any, generation: int) -> None:
        """Ask helpers in; they come when they can. The step does not need them."""
        if self.started < helpers and time.monotonic() >= self.not_before:
            self._start(helpers)
        if self.requests.qsize() < _BACKLOG:
            cpu = _current_cpu() if _current_cpu is not None else -1
            for _ in range(min(helpers, self.started)):
                self.requests.put((run, tables, generation, cpu))

    def _start(self, helpers: int) -> None:
        with self.lock:
            while self.started < helpers:
                thread = threading.Thread(
                    target=_help, args=(self.requests,), name=f"fastlr-{self.started}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # too many in the process or for the user, or Python is shutting down
                    self.not_before = time.monotonic() + _TRY_AGAIN
                    warn_once(
                        f"no helper thread can be started ({error}): steps go on with fewer, and with the same result."
                    )
                    return
                self.started += 1


def _help(requests: queue.SimpleQueue[Any]) -> None:
    avoided = -1
    while True:
        run, tables, generation, cpu = requests.get()
        if cpu != avoided:
            # Linux may wake a helper on the very CPU of the thread that waits for it, and leave both there: a step
            # of 1.2 ms took 3.5 (Linux 6.18, two cores, 2026-11).
            _keep_off(cpu)
            avoided = cpu
        run(*tables, -generation)
        del run, tables  # a sleeping helper keeps nobody's arrays alive


def _keep_off(cpu: int) -> None:
    """Let the calling thread run on every CPU of the process but this one."""
    try:
        others = os.sched_getaffinity(os.getpid()) - {cpu}
        if others:
            os.sched_setaffinity(0, others)
    except OSError:
        pass  # a container may forbid it; then the scheduler decides


_pool = _Pool()
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
    global _pool, epoch
    for compiler in _COMPILERS:
        if compiler._lock not in _held.locks:
            compiler._lock = threading.RLock()
    _after_fork()
    _pool = _Pool()
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


def ask_helpers(helpers: int, run: Any, tables: Any, generation: int) -> None:
    """Ask helper threads to take part in a step that is about to begin."""
    _pool.ask(helpers, run, tables, generation)
