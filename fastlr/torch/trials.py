"""Range tests with optimizers of PyTorch: other rates for a while, and everything back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..search.find_lr import evaluate
from . import tensors
from .following import SCHEDULES, Followed

if TYPE_CHECKING:
    from .optimizer import Optimizer

__all__ = ["Trial"]


class Trial:
    """What `fastlr.find_lr` needs of an optimizer; see `fastlr.search.find_lr.Trial`.

    Args:
        opt: the optimizer.

    Raises:
        ValueError: if it has no learning rate, or the rate of its first group is 0, to which others have no ratio.
    """

    def __init__(self, opt: Optimizer) -> None:
        if "lr" not in opt._names:
            raise ValueError(f"{type(opt).__name__} has no lr to look for.")
        rates = [opt._present(group, "lr") for group in opt.param_groups]
        if len(rates) > 1 and not rates[0]:
            raise ValueError(
                "the lr of the first group is 0 now, so those of the others have no ratio to it that the test could "
                "keep. Set it to another value, or let the test begin after the warmup's first step."
            )
        self._ratios = [rate / rates[0] if len(rates) > 1 else 1.0 for rate in rates]
        self._opt, self._engines = opt, opt._current()
        opt._take_settings(self._engines)
        self._snapshots = [engine.native.snapshot() for engine in self._engines]
        self._params = [p for group in opt.param_groups for p in group["params"]]
        self._weights = [p.detach().clone() for p in self._params]
        self._grads = [(p.grad, None if p.grad is None else p.grad.detach().clone()) for p in self._params]
        self._groups = [dict(group) for group in opt.param_groups]
        self._attributes = {name: opt.__dict__[name] for name in ("info", "_skipped")}

    def set(self, lr: float) -> None:
        """Let the next step have a rate; groups keep their ratios."""
        for group, ratio in zip(self._opt.param_groups, self._ratios, strict=True):
            others = {name: one for name, one in (group.get(SCHEDULES) or {}).items() if name != "lr"}
            group[SCHEDULES] = Followed(others)
            group["lr"] = lr * ratio

    def evaluate(self, fun: Callable[[Any], Any]) -> tuple[float, Any]:
        """Call the user's function with the parameters, as `fastlr.search.find_lr.evaluate`; a loss may be a tensor."""

        def numbers(params: Any) -> Any:
            found = fun(params)
            if isinstance(found, tuple) and len(found) == 2:
                return tensors.number("the loss", found[0]), found[1]
            return tensors.number("the loss", found)

        return evaluate(numbers, self._params)

    def step(self, grads: Any) -> None:
        """Make a step, with the gradients given or those that the parameters have."""
        if grads is not None:
            for p, grad in zip(self._params, grads, strict=True):
                p.grad = grad
        self._opt.step()

    def restore(self) -> None:
        """Put everything back as it was: parameters, gradients, state and groups."""
        opt = self._opt
        for group, before in zip(opt.param_groups, self._groups, strict=True):
            group.clear()
            group.update(before)
        for engine, snapshot in zip(self._engines, self._snapshots, strict=True):
            engine.native.restore(snapshot)
            engine._show(engine.native._rows.counts())
            for param, entries in zip(engine.params, engine.entries, strict=True):
                opt.state[param].update(entries)  # a rebuild meanwhile has put others there
        for p, weights, (grad, values) in zip(self._params, self._weights, self._grads, strict=True):
            p.detach().copy_(weights)
            p.grad = grad
            if grad is not None:
                grad.detach().copy_(values)
        for engine in self._engines:
            engine.done()
        opt.__dict__.update(self._attributes)
        opt._hyper = [None for _ in opt.param_groups]
        opt._take_settings(opt._engines or ())
