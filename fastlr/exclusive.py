"""One call at a time: whoever writes or copies an optimizer keeps all others out until it returns.

A lock would stay locked if an interrupt came between taking it and the `try`, and in a child that was forked while
another thread held it. Here a call that is in leaves a token that names its thread. The token is void if that thread no
longer exists, or if it is the caller's own and no frame below the caller holds the token: then the call that left it is
gone, and the caller takes its place.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Exclusive", "Users", "enter", "exclusive", "take_over"]

# The token of the call that is in, under the key True. A token is a list of the thread's identity and, once its owner
# is gone, of the token that took its place.
Users = dict[bool, list[Any]]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def enter(users: Users) -> list[Any]:
    """Keep others out until `users` is cleared; the caller holds the token in a local variable until then.

    Raises:
        RuntimeError: if somebody else is in.
    """
    token: list[Any] = [threading.get_ident()]
    if users.setdefault(True, token) is not token:
        take_over(users, token)
    return token


def take_over(users: Users, token: list[Any]) -> None:
    """Take the place of a call that is gone.

    Raises:
        RuntimeError: if it is not gone.
    """
    while True:  # each of these calls is atomic, so that of several threads one gets in
        first = holder = users.setdefault(True, token)
        if holder is token:
            return
        while len(holder) > 1:
            holder = holder[1]
        _check_gone(holder, sys._getframe(1))
        if users.get(True) is not first:  # it has returned, and somebody else may be in by now
            continue
        holder.append(token)
        if holder[1] is token:
            users[True] = token
            return


def _check_gone(token: list[Any], caller: FrameType) -> None:
    """Check that the owner of a token is gone; in this thread, that no frame from the caller on holds the token."""
    if token[0] != threading.get_ident():
        # The frames of a thread that goes on meanwhile could not be looked through reliably.
        if token[0] in sys._current_frames():
            raise RuntimeError(
                "this optimizer is in a step in another thread, or is being saved, loaded or set there. "
                "Use one optimizer per thread, or a lock."
            )
        return
    frame: FrameType | None = caller
    while frame is not None:
        if any(value is token for value in list(frame.f_locals.values())):
            raise RuntimeError(
                "this optimizer is in a step, or is being saved, loaded or set: code that runs in the meantime (a "
                "schedule's function, alloc=, a signal handler, __del__) must not write or copy it. Wait until that "
                "call has returned."
            )
        frame = frame.f_back


class Exclusive:
    """An object that one call at a time may use: those of its methods that are marked `exclusive`."""

    _users: Users

    def _settle(self) -> None:
        """Do what an interrupted call has left to be done; called when the next one begins."""


def exclusive(method: _Method) -> _Method:
    """A method of an `Exclusive` that keeps others out while it runs."""

    @functools.wraps(method)
    def alone(self: Exclusive, *args: Any, **more: Any) -> Any:
        token = enter(self._users)  # noqa: F841  (a frame that holds it is what shows that the call is in)
        try:
            self._settle()
            return method(self, *args, **more)
        finally:
            self._users.clear()

    return alone  # type: ignore[return-value]
