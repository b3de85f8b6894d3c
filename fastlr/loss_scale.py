"""Dynamic loss scaling: gradients in low precision are kept in range by a factor on the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import checks
from .kernels import loss_scaling

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
        self.changed = False
        self._pull: Callable[[], None] | None = None

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
        self._scale, self._good, self.changed = scale, good, True

    def copy(self) -> LossScale:
        """Another one in the same state."""
        new = LossScale(1.0, growth=self.growth, backoff=self.backoff, interval=self.interval)
        new.load_state_dict(self.state_dict())
        return new

    # For an optimizer on a GPU, which keeps the state there.

    def _learn(self) -> None:
        if self._pull is not None and not self.changed:
            self._pull()

    def attach(self, pull: Callable[[], None]) -> None:
        """Let somebody else keep the state; `pull()` makes it known here."""
        self._pull = pull

    def export(self, models: int) -> np.ndarray:
        """Scale and good steps of each model, shape `(2, models)`."""
        return np.stack([np.broadcast_to(self._scale, models), np.broadcast_to(self._good, models)]).astype(np.float64)

    def take(self, state: np.ndarray) -> None:
        """Take over what `export` returned, as it is now."""
        one = self._scale.ndim == 0 and state.shape[1] == 1
        self._scale, self._good = (x[0] if one else x for x in (state[0].copy(), state[1].astype(np.int64)))
        self._scale, self._good = np.asarray(self._scale), np.asarray(self._good)

    def __repr__(self) -> str:
        """The call that makes it, with the present scale."""
        return f"LossScale({self.scale!r}, growth={self.growth}, backoff={self.backoff}, interval={self.interval})"
