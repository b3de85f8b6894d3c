"""Helper threads for work that is worth it.

Numba's own threading layers do not fit a trainer: `workqueue` aborts the process when two Python threads are in
parallel code, `omp` kills a forked child, and spinning OpenMP threads fight with those of BLAS. Here the calling
thread always carries the work; helpers are ordinary Python threads that are asked in and take shares of it while there
are any (`kernels.cpu`, `kernels.vectors`). Any number of Python threads can step different optimizers, beside anybody's
parallel code, and a forked child starts its own helpers.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from .notices import warn_once

__all__ = ["Pool", "ask"]

_TRY_AGAIN = 10.0  # seconds after a thread could not be started
_BACKLOG = 64  # requests that helpers have not yet got round to; more would only be late

_Requests: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], None], int]]"  # work, and the CPU of whoever asks


def _find_current_cpu() -> Callable[[], int] | None:
    """A function that tells on which CPU the calling thread is, where the system has one."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        return ctypes.CDLL(None).sched_getcpu  # type: ignore[no-any-return]
    except (OSError, AttributeError):
        return None


_current_cpu = _find_current_cpu()


class Pool:
    """Helper threads, started when they are first asked for."""

    def __init__(self) -> None:
        self.requests: _Requests = queue.SimpleQueue()
        self.started = 0
        self.lock = threading.Lock()
        self.not_before = 0.0  # when to try again to start a thread, on the monotonic clock

    def ask(self, helpers: int, work: Callable[[], None]) -> None:
        """Ask helpers in; those that come call `work`, maybe long after everything has been done."""
        if self.started < helpers and time.monotonic() >= self.not_before:
            self._start(helpers)
        if self.requests.qsize() < _BACKLOG:
            cpu = _current_cpu() if _current_cpu is not None else -1
            for _ in range(min(helpers, self.started)):
                self.requests.put((work, cpu))

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


def _help(requests: _Requests) -> None:
    avoided = -1
    while True:
        work, cpu = requests.get()
        if cpu != avoided:
            # Linux may wake a helper on the very CPU of the thread that waits for it, and leave both there: a step
            # of 1.2 ms took 3.5 (Linux 6.18, two cores, 2026-11).
            _keep_off(cpu)
            avoided = cpu
        work()
        del work  # a sleeping helper keeps nobody's arrays alive


def _keep_off(cpu: int) -> None:
    """Let the calling thread run on every CPU of the process but this one."""
    try:
        others = os.sched_getaffinity(os.getpid()) - {cpu}
        if others:
            os.sched_setaffinity(0, others)
    except OSError:
        pass  # a container may forbid it; then the scheduler decides


pool = Pool()


def ask(helpers: int, work: Callable[[], None]) -> None:
    """As `Pool.ask`, of the helpers of this process."""
    pool.ask(helpers, work)


def _after_fork_in_child() -> None:
    global pool
    pool = Pool()  # the threads of the parent do not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
