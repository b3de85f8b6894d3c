"""A step of several engines: clipping and reporting over all parameters together, and all parts made or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..options import OWN
from ..schedules import Schedule
from ..step import scheduled
from ..step.info import Layout, StepInfo
from . import tensors
from .building import Built, State
from .engines import Engine
from .following import Group

__all__ = ["clip_coefficient", "gradient_norm", "report", "run"]

# The least coefficient, for an infinite norm. Gradients are divided by it, and in float32 this leaves 0 or NaN.
_LEAST = 1e-100


def gradient_norm(engines: Sequence[Engine]) -> float:
    """The norm of all gradients together."""
    return tensors.norm_of([grad for engine in engines for grad in engine.gradients if grad is not None])


def clip_coefficient(built: Built, state: State, norm: float) -> float:
    """What to multiply all gradients by to clip them.

    Raises:
        ValueError: if groups or `scope` ask for several norms, or a schedule gives what no norm to clip to can be.
    """
    scope = built.recipe.settings.get("scope", "all")
    if scope != "all":
        raise ValueError(
            f"scope={scope!r} needs all parameters to be of one dtype on one device. Use one optimizer for each, or "
            "scope='all'."
        )
    limits = {_limit(built, values.hyper["clip_norm"], built.steps(state)) for values in built.values}
    if len(limits) != 1:
        raise ValueError(
            "groups with different clip_norm need all parameters to be of one dtype on one device. Give all groups the "
            "same, or use one optimizer for each."
        )
    (limit,) = limits
    return 1.0 if limit is None else max(min(1.0, limit / (norm + 1e-6)), _LEAST)


def _limit(built: Built, value: Any, step: int) -> float | None:
    """The norm to clip to in the next step; a schedule of it is checked before anything is written.

    Raises:
        ValueError: if a schedule gives what no norm to clip to can be.
    """
    if not isinstance(value, Schedule):
        return tensors.number("clip_norm", value)
    limit = built.number(value, step)
    scheduled.ensure("clip_norm", OWN["clip_norm"], value, limit, step)
    return limit


def report(
    built: Built,
    param_groups: Sequence[Group],
    state: State,
    *,
    norm: float | None,
    coefficient: float,
    finite: bool,
    counts: bool,
) -> StepInfo:
    """What a step is going to do, where no native optimizer can tell it for all parameters together.

    Args:
        built: the engines.
        param_groups: the groups.
        state: of the parameters.
        norm: of all gradients, None if it was not needed.
        coefficient: by which they are clipped, NaN if the step is skipped.
        finite: whether they are finite.
        counts: whether the step counts as one.
    """
    step = built.steps(state)
    rates = [built.present(group, "lr", step) if "lr" in built.recipe.names else None for group in param_groups]
    lrs = {"": rates[0], **({f"{g}:*": rate for g, rate in enumerate(rates)} if len(rates) > 1 else {})}
    names = ["finite"] if norm is None else ["finite", "grad_norm", "clip_coef"]
    index = np.zeros((1, 1), np.int64)
    layout = Layout(("",), None, index, index, tuple(names), {})
    values = np.array([[float(finite), np.nan if norm is None else norm, coefficient][: len(names)]])
    return StepInfo(step + counts, lrs, layout, values, np.zeros((1, 0)))


def run(parts: Sequence[tuple[Engine, Any]]) -> StepInfo | None:
    """Carry out all parts of a step; if it is interrupted once the first is done, the others are done as well."""
    info, begun, marks = None, 0, {}
    try:
        for begun, (engine, part) in enumerate(parts):
            marks[begun] = engine.mark()
            info = engine.run(part)
    except BaseException:
        at, (engine, part) = begun, parts[begun]
        ran = at in marks and engine.mark() != marks[at]
        if ran:
            engine.deliver(part)
        for engine, part in parts[at + ran :] if at + ran else ():
            engine.run(part)
        raise
    finally:
        for engine in dict.fromkeys(engine for engine, _ in parts):
            engine.done()
    return info
