"""Dynamic loss scaling: gradients in low precision are kept in range by a factor on the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import checks

__all__ = ["LossScale"]

_LARGEST = float(np.finfo(np.float32).max)


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

    @property
    def scale(self) -> Any:
        """What to multiply the loss by; an array `(population,)` once the models of a population differ."""
        return float(self._scale) if self._scale.ndim == 0 else self._scale.copy()

    def update(self, skipped: Any) -> None:
        """Take account of a step.

        Args:
            skipped: whether it was skipped, for each model of a population if there is one.
        """
        skipped = np.asarray(skipped, bool)
        grown = self._scale * self.growth
        good = np.where(skipped, 0, self._good + 1)
        due = good == self.interval
        raised = np.where(due & (grown <= _LARGEST), grown, self._scale)
        self._scale = np.where(skipped, self._scale * self.backoff, raised)
        self._good = np.where(due, 0, good)

    def state_dict(self) -> dict[str, Any]:
        """The scale and the good steps so far, as plain numbers and lists."""
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

    def __repr__(self) -> str:
        """The call that makes it, with the present scale."""
        return f"LossScale({self.scale!r}, growth={self.growth}, backoff={self.backoff}, interval={self.interval})"
