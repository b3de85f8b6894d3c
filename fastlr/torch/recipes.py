"""What an optimizer was built with, and the hyperparameters of its groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..hyperparameters import Hyper
from ..optimizer import Optimizer as Native
from . import tensors
from .engines import Engine, Leaf, as_arguments, holds_tensors
from .following import Group, GroupValues

__all__ = ["Recipe", "all_leaves", "group_leaves"]


@dataclass(frozen=True)
class Recipe:
    """What an optimizer was built with.

    Attributes:
        make: makes the native optimizer from arrays and settings.
        names: the hyperparameters that a group has.
        table: what each of them is.
        settings: the options that are the same for all groups.
    """

    make: Callable[..., Native]
    names: Sequence[str]
    table: Mapping[str, Hyper[Any]]
    settings: Mapping[str, Any]

    halves = False  # whether parameters may be bfloat16 and float16

    # What HostOptimizer does differently

    def engine(self, *args: Any) -> Engine:
        """An engine, made from the arguments of `Engine`."""
        return Engine(*args)

    def always_outside(self, leaves: Sequence[Leaf]) -> bool:
        """Whether clipping and the test for NaN and Inf are never left to the native optimizer."""
        return False

    # Hyperparameters

    def values(self, param_groups: Sequence[Group]) -> list[GroupValues]:
        """The hyperparameters of each group as they are now.

        Raises:
            ValueError: if a scheduler of PyTorch sets what follows a schedule.
        """
        return [GroupValues(g, group, self.names) for g, group in enumerate(param_groups)]

    def probe(self, hyper: Mapping[str, Any]) -> Native:
        """A native optimizer over one number, with a group's settings: it checks them and shows which states they need.

        Raises:
            TypeError: if a value is of the wrong kind.
            ValueError: if one is out of range.
        """
        numbers = {name: tensors.number(name, value) for name, value in hyper.items()}
        return self.make(np.zeros(1, np.float32), **{**self.settings, "alloc": None}, **as_arguments(numbers))

    def normal(self, settings: Mapping[str, Any], probe: Native) -> dict[str, Any]:
        """Hyperparameters as groups hold them: as the native optimizer has them, but tensors as they were passed."""
        kept = {name: value for name, value in settings.items() if holds_tensors(value)}
        return {name: kept[name] if name in kept else getattr(probe, name) for name in self.names}

    def looks_at_all(self, param_groups: Iterable[Group]) -> bool:
        """Whether a step depends on all gradients together."""
        clips = any(group["clip_norm"] is not None for group in param_groups)
        return clips or bool(self.settings.get("skip_nonfinite"))


def group_leaves(param_groups: Sequence[Mapping[str, Any]], g: int) -> list[Leaf]:
    """The parameters of a group; those without a name are called by their number."""
    group = param_groups[g]
    first = sum(len(before["params"]) for before in param_groups[:g])
    names = group.get("param_names") or [str(first + k) for k in range(len(group["params"]))]
    return [Leaf(p, name, g) for p, name in zip(group["params"], names, strict=True)]


def all_leaves(param_groups: Sequence[Mapping[str, Any]]) -> list[Leaf]:
    """All parameters, each once."""
    leaves = list(itertools.chain.from_iterable(group_leaves(param_groups, g) for g in range(len(param_groups))))
    return list({id(leaf.param): leaf for leaf in reversed(leaves)}.values())[::-1]
