"""The owner of a stepper: replaces it whole, settles it, and shows its hyperparameters as attributes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .arrays.columns import Role
from .arrays.places import HOST
from .exclusive import Exclusive, enter
from .groups import Groups
from .hyperparameters import Hyper
from .loss_scale import LossScale
from .options import OPTIONS, StepHyperparameters
from .state import OptimizerState
from .step.program import Program
from .step.stepper import Accumulation, Stepper

__all__ = ["StepperOwner"]


class StepperOwner(Exclusive, StepHyperparameters):
    """The part of an optimizer between the methods that users call and its stepper."""

    _stepper: Stepper

    # The stepper

    def _current(self) -> Stepper:
        """The stepper for the settings as they are, with nothing left to be done for the step before."""
        stepper = self._stepper
        if stepper.unsettled is not None:
            stepper.settle()
        if stepper.is_outdated:
            stepper = self._stepper = stepper.renewed()
        return stepper

    def _settle(self) -> None:
        """Do what remains to be done for an interrupted step."""
        if self._stepper.unsettled is not None:
            self._stepper.settle()

    def _catch_up(self) -> None:
        """Settle what an interrupted call has left, unless one is under way."""
        if self._stepper.unsettled is None:
            return
        try:
            token = enter(self._users)  # noqa: F841  (a frame that holds it is what shows that the call is in)
        except RuntimeError:
            return
        try:
            self._settle()
        finally:
            self._users.clear()

    def _replacement(self, stepper: Stepper) -> list[tuple[Any, Any, Any]]:
        """What to write to go on with another stepper over the same parameters, see `atomic.commit`."""
        groups, before = stepper.state.groups, self._stepper.state.groups
        writes: list[tuple[Any, Any, Any]] = [(self.__dict__, "_stepper", stepper)]
        if groups is not before:
            self._adopt_groups(groups)
            writes.append((before.__dict__, "successor", groups))
        return writes

    def _attach_loss_scale(self, state: OptimizerState) -> None:
        """Let the loss scale of a state belong to this optimizer."""
        if state.loss_scale is not None:
            place: Any = state.parameters.place
            state.loss_scale.attach(self._catch_up, None if place is HOST else place, state.parameters.models)

    def _adopt_groups(self, groups: Groups) -> None:
        """Let groups belong to this optimizer."""
        groups.users = self._users
        groups.examine = weakref.WeakMethod(self._examine)  # so that an optimizer is freed as soon as nobody has it
        if self._stepper.state.options.capturable:
            groups.listener = self._push_settings

    def _take(self, state: OptimizerState, accumulation: Callable[[OptimizerState], Accumulation]) -> None:
        """Go on from a state over other parameters; `accumulation` makes `opt.grads` for it."""
        before = self._stepper.state
        program = Program.of(state.options, state.groups, self._stepper.program.unscaled)
        stepper = Stepper(state, program, accumulation(state))
        if state.loss_scale is not before.loss_scale:
            self._attach_loss_scale(state)
        self._adopt_groups(state.groups)
        self._stepper = stepper

    # Hyperparameters and columns

    if not TYPE_CHECKING:  # a type checker would take every name for a hyperparameter

        def __getattr__(self, name: str) -> Any:
            """A hyperparameter of the optimizer itself; groups may override it."""
            stepper = self.__dict__.get("_stepper")
            if stepper is not None and name in stepper.state.groups.names:
                return getattr(stepper.state.groups.defaults, name)
            option = OPTIONS.get(name)
            if option is not None and option.column is not None:  # the property of that name raised an AttributeError
                raise option.missing()
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            """Set a hyperparameter of the optimizer itself; the next step uses it."""
            if name.startswith("_"):
                object.__setattr__(self, name, value)
                return
            names = self._stepper.state.groups.names
            if name not in names:
                raise AttributeError(
                    f"{type(self).__name__} has no hyperparameter {name!r} to set; there are {', '.join(names)}."
                )
            token = enter(self._users)  # noqa: F841  (before the groups are read: a call may replace them)
            try:
                groups = self.groups
                groups.enter_value(groups.defaults, name, value)
            finally:
                self._users.clear()

    def _examine(self, label: str, hyper: Hyper[Any], value: Any, several: bool | None) -> None:
        """Refuse a value that was set but does not fit; see `Stepper.examine`."""
        self._stepper.examine(label, hyper, value, several)

    def _push_settings(self) -> None:
        """Make a hyperparameter that was set take effect in graphs that have been captured."""
        self._stepper = self._stepper.renewed()
        self._stepper.push()

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale that gradients are divided by, or None."""
        return self._stepper.state.loss_scale

    @property
    def groups(self) -> Groups:
        """The groups by pattern; `opt.groups["head.*"].lr = 1e-4` takes effect at the next step."""
        return self._stepper.state.groups

    def _column(self, role: Role) -> Any:
        """A column of the step's own in the parameters' structure."""
        columns = self._stepper.state.columns
        if role.name not in columns.roles:
            raise AttributeError
        return columns.tree(role.name)
