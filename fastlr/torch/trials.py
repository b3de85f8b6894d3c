"""Range tests with optimizers of PyTorch: other rates for a while, and everything back as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels.atomic import commit
from ..search.find_lr import evaluate
from . import tensors
from .building import Built
from .following import SCHEDULES, Followed, schedules_of

__all__ = ["Trial"]


class Trial:
    """What `fastlr.find_lr` needs of an optimizer; see `fastlr.search.find_lr.Trial`.

    Args:
        opt: the optimizer.
        rates: the present learning rate of each group.
        built: the engines.
        put_back: lets the optimizer have the engines again, and everything else that a step sets.

    Raises:
        ValueError: if the rate of the first of several groups is 0, to which others have no ratio.
    """

    def __init__(
        self, opt: torch.optim.Optimizer, rates: Sequence[float], built: Built, put_back: Callable[[], None]
    ) -> None:
        if len(rates) > 1 and not rates[0]:
            raise ValueError(
                "the lr of the first group is 0 now, so those of the others have no ratio to it that the test could "
                "keep. Set it to another value, or let the test begin after the warmup's first step."
            )
        self._ratios = [rate / rates[0] if len(rates) > 1 else 1.0 for rate in rates]
        self._opt, self._built, self._put_back = opt, built, put_back
        built.take_settings(opt.param_groups, opt.state)
        self._snapshots = [engine.native.snapshot() for engine in built.engines]
        self._params = [p for group in opt.param_groups for p in group["params"]]
        self._weights = [p.detach().clone() for p in self._params]
        self._grads = [(p.grad, None if p.grad is None else p.grad.detach().clone()) for p in self._params]
        self._groups = [dict(group) for group in opt.param_groups]

    def set(self, lr: float) -> None:
        """Let the next step have a rate; groups keep their ratios."""
        for group, ratio in zip(self._opt.param_groups, self._ratios, strict=True):
            others = {name: value for name, value in schedules_of(group).items() if name != "lr"}
            group[SCHEDULES] = Followed(others)
            group["lr"] = lr * ratio

    def evaluate(self, fun: Callable[[Any], Any]) -> tuple[float, Any]:
        """Call the user's function with the parameters, as `fastlr.search.find_lr.evaluate`; a loss may be a tensor."""

        def numbers(params: Any) -> Any:
            result = fun(params)
            if isinstance(result, tuple) and len(result) == 2:
                return tensors.number("the loss", result[0]), result[1]
            return tensors.number("the loss", result)

        return evaluate(numbers, self._params)

    def step(self, grads: Any) -> None:
        """Make a step, with the gradients given or those that the parameters have."""
        if grads is not None:
            for p, grad in zip(self._params, grads, strict=True):
                p.grad = grad
        self._opt.step()

    def restore(self) -> None:
        """Put everything back as it was: parameters, gradients, state and groups."""
        opt, built = self._opt, self._built
        for group, before in zip(opt.param_groups, self._groups, strict=True):
            group.clear()
            group.update(before)
        for engine, snapshot in zip(built.engines, self._snapshots, strict=True):
            engine.restore(snapshot)
        commit(built.entering(opt.state))  # engines made meanwhile have put others there
        for p, weights, (grad, values) in zip(self._params, self._weights, self._grads, strict=True):
            p.detach().copy_(weights)
            p.grad = grad
            if grad is not None:
                grad.detach().copy_(values)
        for engine in built.engines:
            engine.done()
        self._put_back()
        for values in built.values:
            values.numbers = None
        built.take_settings(opt.param_groups, opt.state)
