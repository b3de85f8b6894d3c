"""Schedule-free optimizers: the averages in the place of the weights of training, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .building import Built, State
from .following import Group

__all__ = ["Training", "Write", "put_averages", "put_weights", "state_letter", "weights_by_state"]

# The parameters and their weights of training while averages take their place; None: to be computed from the state.
Training = list[tuple[torch.Tensor, torch.Tensor | None]]
Write = tuple[Any, Any, Any]  # see `kernels.atomic.commit`


def state_letter(make: Callable[..., Any]) -> str | None:
    """The rule's letter for the average of a schedule-free optimizer; None for all others."""
    names: Mapping[str, str] = getattr(make, "_states", {})
    return next((letter for letter, name in names.items() if name == "averaged"), None)


def put_averages(built: Built) -> tuple[Training, list[Write]]:
    """The weights of training, to be kept, and what puts the averages in their place."""
    pairs = [
        (p, entries["averaged"])
        for engine in built.engines
        for p, entries in zip(engine.params, engine.entries, strict=True)
    ]
    return [(p, p.detach().clone()) for p, _ in pairs], [(p.detach(), ..., average) for p, average in pairs]


def put_weights(training: Training, built: Built, param_groups: Sequence[Group], state: State) -> list[Write]:
    """What puts the weights of training back."""
    return [
        (p.detach(), ..., weights_by_state(p, built, param_groups, state) if weights is None else weights)
        for p, weights in training
    ]


def weights_by_state(param: torch.Tensor, built: Built, param_groups: Sequence[Group], state: State) -> torch.Tensor:
    """The weights of training by the state, up to the rounding of one operation."""
    entries = state[param]
    if "master" in entries:
        return entries["master"]
    (group,) = (group for group in param_groups if any(p is param for p in group["params"]))
    step = built.steps(state)
    beta = built.present(group, "betas", step)[0] if "betas" in group else built.present(group, "beta", step)
    return entries["z"] + beta * (entries["averaged"] - entries["z"])
