"""The program of a step: a rule staged for the flags that are on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..groups import Groups
from ..kernels.staging import RuleError, Staged
from ..options import AFTER, BEFORE, Options

__all__ = ["Program", "UnequalError"]


class UnequalError(ValueError):
    """A hyperparameter that has to be the same in all groups is not."""


@dataclass(frozen=True)
class Program:
    """A rule staged for the flags that are on; another flag makes another program.

    Attributes:
        staged: the rule, staged.
        unscaled: whether gradients are divided by a scale.
    """

    staged: Staged
    unscaled: bool

    @classmethod
    def of(cls, options: Options, groups: Groups, unscaled: bool) -> Program:
        """The program for the present settings: what is the same in all groups is static.

        Args:
            options: what the optimizer was built with.
            groups: its hyperparameters.
            unscaled: whether gradients are divided by a scale.

        Raises:
            ValueError: if settings do not go together.
        """
        uniforms = groups.uniforms()
        static, on = options.static_flags(uniforms, unscaled)
        try:
            staged = options.rule.stage(static, before=BEFORE, after=AFTER, on=on)
        except RuleError as error:  # when the rule was made, its flags had one value at a time
            flags = [n for n, v in uniforms[0].items() if isinstance(v, bool) and n != "frozen" and n not in static]
            raise UnequalError(f"{', '.join(flags)} must be the same in all groups: {error}") from error
        program = cls(staged, unscaled)
        program.check_common(uniforms, options)
        return program

    def check_common(self, uniforms: Sequence[Mapping[str, Any]], options: Options) -> None:
        """Check that what is one for all parameters follows from settings that are the same in all groups.

        Args:
            uniforms: the settings of each group, under the rule's names.
            options: what the optimizer was built with.

        Raises:
            ValueError: if it does not.
        """
        staged = self.staged
        for name in staged.common:
            first = uniforms[0][name]
            for other in (u[name] for u in uniforms):
                if other is not first and not np.array_equal(other, first):
                    shared = [n for n, scope in zip(staged.scalars, staged.shared, strict=True) if scope == "all"]
                    raise UnequalError(
                        f"{options.labels[name]} must be the same in all groups, got {checks.shown(first)} and "
                        f"{checks.shown(other)}: it enters {', '.join(shared)} of rule {staged.name!r}, which is one "
                        "for all parameters."
                    )

    def check_states(self, letters: Sequence[str], options: Options) -> None:
        """Check that the states of the program are those that exist.

        Args:
            letters: those that exist, under the rule's names.
            options: what the optimizer was built with.

        Raises:
            ValueError: if they are not.
        """
        if self.staged.states != tuple(letters):
            names = ", ".join(sorted(options.public_name(s) for s in set(self.staged.states) ^ set(letters)))
            raise ValueError(
                f"the hyperparameters as they are now need other states than this optimizer has ({names}). "
                "Which states exist is decided when an optimizer is built: build a new one."
            )
