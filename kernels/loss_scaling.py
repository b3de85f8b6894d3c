"""The rule of a dynamic loss scale, once for the host and for kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np

LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def make(where: Callable[..., Any]) -> Callable[..., Any]:
    """`rescale(scale, good, skipped, growth, backoff, interval, smallest) -> scale, good`, by a backend's select.

    Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; the schedule as in PyTorch.
    """

    def rescale(
        scale: Any, good: Any, skipped: Any, growth: float, backoff: float, interval: float, smallest: float
    ) -> Any:
        grown, shrunk = scale * growth, scale * backoff
        good = where(skipped, 0.0, good + 1.0)
        due = good >= interval  # more than that after a change of the interval
        raised = where(due & (grown <= LARGEST), grown, scale)
        lowered = where(shrunk < smallest, smallest, shrunk)
        return where(skipped, lowered, raised), where(due, 0.0, good)

    return rescale
