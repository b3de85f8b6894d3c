"""What an optimizer was built with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays.places import Alloc
from .groups import somewhere
from .kernels.staging import Rule
from .schedules.base import Schedule

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    rule: Rule
    optimizer: str
    names: Mapping[str, str]
    starts: Mapping[str, float]
    check: Callable[[Sequence[Mapping[str, Any]]], None]
    spelling: Mapping[str, tuple[str, ...]]
    structural: frozenset[str]
    scope: str
    skip_nonfinite: bool
    loss_scaled: bool
    shadow: str | None
    zero_grads: bool
    statistics: bool
    grad_dtype: str | None
    threads: int | None
    alloc: Alloc | None
    capturable: bool
    backend: str
    per_element: bool
    is_users_rule: bool

    def starts_at(self, name: str) -> float:
        if name in self.starts:
            return self.starts[name]
        return float(self.rule.defaults[name]) if name in self.rule.scalars else 0.0

    def public_name(self, letter: str) -> str:
        return self.names.get(letter, letter)

    @property
    def scalars_can_be_nan(self) -> bool:
        """Whether states of a group can be NaN: after gradients that were, or in a rule of the user's."""
        return self.rule.sums_anything or self.is_users_rule

    def label(self, name: str) -> str:
        labels = {n: f"{k}[{i}]" for k, several in self.spelling.items() for i, n in enumerate(several)}
        return labels.get(name, name)

    def check_settings(self, uniforms: Sequence[Mapping[str, Any]]) -> None:
        self.check(uniforms)
        if not self.rule.takes_lr and "weight_decay" not in self.rule.hyperparameters:
            for u in uniforms:
                if u["decoupled_weight_decay"] and somewhere(u["weight_decay"]):
                    raise ValueError(
                        f"decoupled weight decay is in proportion to lr, which rule {self.rule.name!r} does not "
                        "have. Use decoupled_weight_decay=False, or let the rule name weight_decay itself."
                    )

    def static_flags(self, uniforms: Sequence[Mapping[str, Any]], unscaled: bool) -> dict[str, Any]:
        norm_clipped, value_clipped = (
            any(isinstance(u[name], Schedule) or np.any(np.isfinite(u[name])) for u in uniforms)
            for name in ("clip_norm", "clip_value")
        )
        decays = [u["ema_decay"] for u in uniforms if "ema_decay" in u]
        return {
            "scope": self.scope,
            "unscaled": unscaled,
            "tested": self.skip_nonfinite or self.loss_scaled,
            "norm_clipped": norm_clipped,
            "value_clipped": value_clipped,
            "per_element": self.per_element,
            "averaged": "ema_decay" in uniforms[0],
            "may_pause": any(isinstance(d, Schedule) or np.any(d == 1.0) for d in decays),
            "statistics": self.statistics,
            **({} if self.rule.takes_lr else {"lr": 0.0}),
        }
