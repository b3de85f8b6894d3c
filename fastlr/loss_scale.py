"""Dynamic loss scaling: gradients in low precision are kept in range by a factor on the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks
from .kernels import loss_scaling

if TYPE_CHECKING:
    from .device_arrays import DevicePlace

__all__ = ["LossScale"]

_rescale = loss_scaling.make(np.where)


class LossScale:
    """A factor on the loss that grows while gradients stay finite and shrinks when they do not.

    Multiply the loss by `scale`; an optimizer built with `loss_scale=` divides the gradients by it, skips a step whose
    gradient is not finite, and calls `update`. After `interval` steps in a row that were not skipped the scale is
    multiplied by `growth`, unless float32 could not hold it; after a skipped one at once by `backoff`. These are the
    semantics of PyTorch's `torch.amp.GradScaler`. In a population each model has a scale of its own.

    Args:
        init: the first scale, > 0. Default 65,536.
        growth: factor after `interval` good steps, > 1. Default 2.
        backoff: factor after a skipped step, in (0, 1). Default 0.5.
        interval: good steps in a row before the scale grows, >= 1. Default 2000.

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

    def __init__(
        self, init: float = 2.0**16, *, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
    ) -> None:
        init = checks.number("init", init, 0.0, math.inf)
        self.growth = checks.number("growth", growth, 1.0, math.inf)
        self.backoff = checks.number("backoff", backoff, 0.0, 1.0)
        self.interval = checks.count("interval", interval)
        self._scale = np.asarray(init)
        self._good = np.asarray(0, np.int64)
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
        """Take account of a step.

        Args:
            skipped: whether it was skipped, for each model of a population if there is one.
        """
        skipped = np.asarray(skipped, bool)
        self._scale, good = _rescale(self._scale, self._good, skipped, self.growth, self.backoff, self.interval)
        self._good = good.astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The scale and the good steps so far, as plain numbers and lists."""
        self._learn()
        return {"scale": self._scale.tolist(), "good": self._good.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: if it is something else; then nothing is changed.
        """
        try:
            scale, good = np.asarray(state["scale"], np.float64), np.asarray(state["good"], np.int64)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"this is not the state of a LossScale: {state!r}.") from None
        if not (np.isfinite(scale) & (scale > 0)).all() or scale.ndim > 1:
            raise ValueError(f"this is not the state of a LossScale: its scale is {state['scale']!r}.")
        self._scale, self._good = scale, good
        self._put()

    def copy(self) -> LossScale:
        """Another one in the same state."""
        new = LossScale(1.0, growth=self.growth, backoff=self.backoff, interval=self.interval)
        new.load_state_dict(self.state_dict())
        return new

    # For an optimizer on a GPU, which keeps the state there.

    @property
    def on_device(self) -> Any:
        """The scale where the optimizer has it on a GPU: float64, shape `(models,)`, of the parameters' library.

        Multiply the loss by it and nothing waits; it changes with each step, be it by a graph.

        Raises:
            ValueError: if no optimizer on a GPU has it.
        """
        if self._place is None:
            raise ValueError("this loss scale is of no optimizer on a GPU; use .scale.")
        return self._memory[: len(self._memory) // 3]

    def attach(self, place: DevicePlace, models: int) -> None:
        """Keep the state on a GPU from now on: scale, good steps and the scale of the last step, for each model.

        Raises:
            ValueError: if it is on a GPU already, for another optimizer.
        """
        if self._place is not None:
            raise ValueError(
                "this loss scale belongs to another optimizer already; on a GPU each has one of its own. "
                "Pass loss_scale.copy()."
            )
        self._place, self._memory = place, place.allocate(3 * models, "float64")
        self._put()

    @property
    def address(self) -> int:
        """Where the state is on the GPU."""
        assert self._place is not None
        return self._place.address(self._memory)

    def _put(self) -> None:
        """Bring what the GPU has up to date."""
        if self._place is not None:
            models = len(self._memory) // 3
            state = [np.broadcast_to(x, models).astype(np.float64) for x in (self._scale, self._good, self._scale)]
            self._place.copy(self._memory, np.concatenate(state))

    def _learn(self) -> None:
        """Learn from the GPU how it stands; waits for it."""
        if self._place is not None:
            state = self._place.to_host(self._memory, self.stream).reshape(3, -1)
            one = self._scale.ndim == 0 and state.shape[1] == 1
            self._scale, self._good = (np.asarray(x[0] if one else x) for x in (state[0], state[1].astype(np.int64)))

    def __repr__(self) -> str:
        """The call that makes it, with the present scale."""
        if self._place is not None:
            return f"LossScale(growth={self.growth}, backoff={self.backoff}, interval={self.interval}) on a GPU"
        return f"LossScale({self.scale!r}, growth={self.growth}, backoff={self.backoff}, interval={self.interval})"
