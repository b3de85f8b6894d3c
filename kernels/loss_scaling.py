"""The rule of a dynamic loss scale, once for the host and for kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np

LARGEST = float(np.finfo(np.float32).max)


def make(where: Callable[..., Any]) -> Callable[..., Any]:
    """`rescale(scale, good, skipped, growth, backoff, interval) -> scale, good`, with the select of a backend.

    Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; the schedule as in PyTorch.
    """

    def rescale(scale, good, skipped, growth, backoff, interval):
        grown = scale * growth
        good = where(skipped, 0.0, good + 1.0)
        due = good == interval
        raised = where(due & (grown <= LARGEST), grown, scale)
        return where(skipped, scale * backoff, raised), where(due, 0.0, good)

    return rescale
