"""Dynamic loss scaling: gradients in low precision are kept in range by a factor on the loss."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arguments, checks
from .kernels import loss_scaling
from .kernels.atomic import commit

if TYPE_CHECKING:
    from .gpu.arrays import DevicePlace

__all__ = ["LossScale"]

_rescale = loss_scaling.make(np.where)


class LossScale:
    """A factor on the loss that grows while gradients stay finite and shrinks when they do not.

    Multiply the loss by `scale`; an optimizer built with `loss_scale=` divides the gradients by it, skips a step whose
    gradient is not finite, and calls `update`. After `interval` steps in a row that were not skipped the scale is
    multiplied by `growth`, unless float32 could not hold it; after a skipped one at once by `backoff`. These are the
    semantics of PyTorch's `torch.amp.GradScaler`. In a population each model has a scale of its own. A loss scale
    belongs to one optimizer: a scale that changed between the steps of two would be wrong for the second.

    Args:
        init: the first scale, > 0. Default 65,536.
        growth: factor after `interval` good steps, > 1. Default 2.
        backoff: factor after a skipped step, in (0, 1). Default 0.5.
        interval: good steps in a row before the scale grows, >= 1. Default 2000.
        min_scale: the scale never shrinks below this, > 0 and <= `init`. Default: the smallest that float32 holds in
            full precision, about 1.2e-38.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; the schedule as in PyTorch.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.ones(2, np.float32)
        >>> opt = fastlr.SGD(w, lr=1.0, loss_scale=fastlr.LossScale(init=1024.0))
        >>> info = opt.step(np.array([512.0, np.inf], np.float32))
        >>> info.skipped, opt.loss_scale.scale, w.tolist()
        (True, 512.0, [1.0, 1.0])
        >>> info = opt.step(np.array([512.0, 256.0], np.float32))
        >>> info.skipped, opt.loss_scale.scale, w.tolist()
        (False, 512.0, [0.0, 0.5])
    """

    @arguments.answered
    def __init__(
        self,
        init: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        min_scale: float = loss_scaling.SMALLEST,
    ) -> None:
        init = checks.number("init", init, checks.POSITIVE)
        self.growth = checks.number("growth", growth, checks.Interval(1.0))
        self.backoff = checks.number("backoff", backoff, checks.PROPER_FRACTION)
        self.interval = checks.count("interval", interval)
        self.min_scale = checks.number("min_scale", min_scale, checks.POSITIVE)
        if self.min_scale > init:
            raise ValueError(f"min_scale must be at most init, {init!r}, got {min_scale!r}.")
        self._scale = np.asarray(init)
        self._good = np.asarray(0, np.int64)
        self._owner: weakref.WeakMethod[Callable[[], None]] | None = None
        self._place: DevicePlace | None = None
        self._memory: Any = None
        self.stream: int | None = None  # in which the step made last has changed it, if it is on a GPU

    @property
    def scale(self) -> Any:
        """What to multiply the loss by; an array `(population,)` once the models of a population differ.

        If the optimizer's parameters are on a GPU, the scale lives there, and reading it waits for the GPU.
        """
        self._learn()
        return float(self._scale) if self._scale.ndim == 0 else self._scale.copy()

    def update(self, skipped: Any) -> None:
        """Grow or shrink after a step.

        Args:
            skipped: whether the step was skipped, for each model of a population if there is one.
        """
        skipped = checks.readable("skipped", skipped)
        self._learn()
        commit(self.after(skipped))
        self.upload()

    @property
    def rule(self) -> tuple[float, float, int, float]:
        """What the change of the scale depends on: growth, backoff, interval, min_scale."""
        return self.growth, self.backoff, self.interval, self.min_scale

    def after(self, skipped: Any) -> list[tuple[Any, Any, Any]]:
        """What to write to take account of a step, see `atomic.commit`."""
        skipped = np.asarray(skipped, bool)
        with np.errstate(over="ignore"):  # a scale that grows beyond float32 is not taken anyway
            scale, good = _rescale(self._scale, self._good, skipped, *self.rule)
        return self.writes(scale, good.astype(np.int64))

    def writes(self, scale: np.ndarray, good: np.ndarray) -> list[tuple[Any, Any, Any]]:
        """What to write to have a scale and good steps, see `atomic.commit`."""
        return [(self.__dict__, "_scale", scale), (self.__dict__, "_good", good)]

    def state_dict(self) -> dict[str, Any]:
        """The scale and the good steps so far, as plain numbers and lists."""
        self._learn()
        return {"scale": self._scale.tolist(), "good": self._good.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: if it is something else; then nothing is changed.
        """
        scale, good = self.read(state)
        self._catch_up()
        commit(self.writes(scale, good))
        self.upload()

    @staticmethod
    def read(state: Any, population: int | None = None, alone: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The scale and the good steps so far in what `state_dict` returned, checked.

        Args:
            state: what it returned.
            population: number of models of the optimizer that it is for, or None.
            alone: whether it is for a scale without an optimizer, which may have any number of models.

        Raises:
            ValueError: if it is something else.
        """
        try:
            scale, good = (checks.readable(name, state[name]).copy() for name in ("scale", "good"))
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"this is not the state of a LossScale: {checks.shown(state)}.") from None
        models = {scale.shape, good.shape} - {()}
        fits = len(models) < 2 and scale.ndim < 2 if alone else models <= {(population,)}
        if not fits or scale.dtype.kind not in "iuf" or good.dtype.kind not in "iu":
            raise ValueError(f"this is not the state of a LossScale: {checks.shown(state)}.")
        scale = scale.astype(np.float64)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f"this is not the state of a LossScale: its scale is {checks.shown(state['scale'])}, which must be "
                "positive and finite."
            )
        if not ((good >= 0) & (good < checks.COUNTABLE)).all():
            raise ValueError(f"this is not the state of a LossScale: its good steps are {checks.shown(state['good'])}.")
        return scale, good.astype(np.int64)

    def copy(self) -> LossScale:
        """Another one in the same state."""
        new = LossScale(
            max(1.0, self.min_scale),
            growth=self.growth,
            backoff=self.backoff,
            interval=self.interval,
            min_scale=self.min_scale,
        )
        new.load_state_dict(self.state_dict())
        return new

    # For an optimizer on a GPU, which keeps the state there.

    @property
    def on_device(self) -> Any:
        """The scale on the GPU, as an array of the parameters' library: float64, shape `(models,)`.

        Multiplying the loss by it waits for nothing; it changes with each step, even one that a graph makes.

        Raises:
            ValueError: if no optimizer on a GPU has it.
        """
        if self._place is None:
            raise ValueError("this loss scale belongs to no optimizer on a GPU; use .scale.")
        return self._memory[: len(self._memory) // 3]

    def attach(self, catch_up: Callable[[], None], place: DevicePlace | None, models: int) -> None:
        """Belong to an optimizer from now on, and keep the state where its parameters are.

        Args:
            catch_up: a method of the optimizer that reports a step which was interrupted after its kernel.
            place: a GPU, where scale, good steps and the scale of the last step are kept for each model; None: the CPU.
            models: how many there are.

        Raises:
            ValueError: if it belongs to another optimizer.
        """
        owner = self._owner() if self._owner is not None else None
        if self._place is not None or (owner is not None and owner != catch_up):
            raise ValueError(
                "this loss scale belongs to another optimizer already, and each optimizer needs its own. "
                "Pass loss_scale.copy()."
            )
        self._owner = weakref.WeakMethod(catch_up)  # type: ignore[arg-type]
        if place is not None:
            self._place, self._memory = place, place.allocate(3 * models, "float64")
            self.upload()

    @property
    def address(self) -> int:
        """Where the state is on the GPU."""
        assert self._place is not None
        return self._place.address(self._memory)

    def upload(self) -> None:
        """Bring what a GPU has up to date."""
        if self._place is not None:
            models = len(self._memory) // 3
            state = [np.broadcast_to(x, models).astype(np.float64) for x in (self._scale, self._good, self._scale)]
            self._place.upload(self._memory, np.concatenate(state))

    def _catch_up(self) -> None:
        """Let the optimizer tell of a step that was interrupted after its kernel."""
        catch_up = self._owner() if self._owner is not None else None
        if catch_up is not None:
            catch_up()

    def _learn(self) -> None:
        """Bring scale and good steps up to date, from the optimizer or from the GPU, which it waits for."""
        self._catch_up()
        if self._place is not None:
            state = self._place.download(self._memory, self.stream).reshape(3, -1)
            one = self._scale.ndim == 0 and state.shape[1] == 1
            self._scale, self._good = (np.asarray(x[0] if one else x) for x in (state[0], state[1].astype(np.int64)))

    def __repr__(self) -> str:
        """The call that makes it, with the present scale."""
        if self._place is not None:
            return f"LossScale(growth={self.growth}, backoff={self.backoff}, interval={self.interval}) on a GPU"
        return f"LossScale({self.scale!r}, growth={self.growth}, backoff={self.backoff}, interval={self.interval})"
