"""`opt.grads`: gradients that the caller writes, or that are added up over several calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..arrays.columns import Parameters
from .gradients import Gradients

__all__ = ["Accumulation", "Adder"]


class Adder(Protocol):
    """What adds gradients to memory: a stepper, for a rule that does."""

    @property
    def is_outdated(self) -> bool:
        """Whether it has to be renewed, as in a child after a fork."""

    def renewed(self) -> Any:
        """One that is not outdated."""

    def prepare(self, grads: Any) -> Any:
        """Find gradients, and whatever is wrong, before anything is written."""

    def run(self, prepared: Any) -> Any:
        """Add what was prepared."""


class Accumulation:
    """What stands in `opt.grads`.

    Args:
        parameters: what they are gradients of.
        gradients: has their memory.
        make_adder: `make_adder(memory, first)` makes what adds gradients to memory, or puts them there if they are the
            first.

    Attributes:
        received: for each leaf, whether it has received a gradient since the last step; None: nothing was added.
    """

    def __init__(self, parameters: Parameters, gradients: Gradients, make_adder: Callable[[Any, bool], Adder]) -> None:
        self._parameters, self._gradients, self._make_adder = parameters, gradients, make_adder
        self._adders: dict[bool, Adder] = {}
        self.received: tuple[bool, ...] | None = None

    @property
    def memory(self) -> Any:
        """The gradients in one array, or None if nobody has used them yet."""
        return self._gradients.own

    def own(self, part: tuple[bool, ...] | None) -> tuple[Any, tuple[bool, ...] | None]:
        """The gradients, and the leaves of a part that are updated by them; None: all.

        Args:
            part: the leaves that a step is about; None: all.

        Raises:
            RuntimeError: if nobody has used them yet.
        """
        if self.memory is None:
            raise RuntimeError(
                "step() without gradients uses opt.grads, which nobody has used yet. "
                "Pass them, step(grads), or write them into opt.grads first."
            )
        if self.received is None:
            return self.memory, part
        active = tuple(map(bool, self.received))
        if part is not None:
            active = tuple(a and b for a, b in zip(part, active, strict=True))
        return self.memory, None if all(active) else active

    def after_step(self, part: tuple[bool, ...] | None) -> list[tuple[Any, Any, Any]]:
        """What to write after a step of a part has used the gradients, see `atomic.commit`.

        Args:
            part: the leaves that the step was about; None: all.
        """
        if self.received is None:
            return []
        left = () if part is None else tuple(a and not b for a, b in zip(self.received, part, strict=True))
        return [(self.__dict__, "received", left if any(left) else None)]

    def adder(self, first: bool) -> Adder:
        """What adds gradients to the memory, or puts them there if they are the first."""
        if first not in self._adders:
            self._adders[first] = self._make_adder(self._parameters.tree(self._gradients.allocate_own()), first)
        elif self._adders[first].is_outdated:  # in a child after a fork
            self._adders[first] = self._adders[first].renewed()
        return self._adders[first]

    def add(self, first: bool, prepared: Any) -> None:
        """Carry out what `adder` has prepared."""
        self._adders[first] = prepared.stepper
        prepared.stepper.run(prepared)

    def forget_memory(self) -> list[tuple[Any, Any, Any]]:
        """What to write so that nobody has used the gradients yet, see `atomic.commit`."""
        return [(self._gradients.__dict__, "own", None), (self.__dict__, "_adders", {})]

    def clear_unwritten(self, there: Sequence[bool], first: bool) -> None:
        """Before gradients are added, set to zero the leaves that have received none yet, unless they are overwritten.

        Args:
            there: for each leaf, whether there is a gradient to add.
            first: whether gradients are put in place of what stands there.
        """
        held = (False,) * len(there) if self.received is None else self.received
        for leaf, given, received in zip(self._parameters.cut(self.memory), there, held, strict=True):
            if not received and given == (not first):
                self._parameters.place.fill(leaf, 0)
