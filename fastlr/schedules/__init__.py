"""Schedules: the learning rate, or any other hyperparameter, as a pure function of the number of the step.

A schedule is a small frozen object: `schedule(step)` is the value that the update after `step` others uses, so the
first update reads `schedule(0)`, everywhere and always. It has no memory: a run is resumed by its number of steps
alone. Schedules are built by their names and by what every schedule can do:

    Cosine(1e-3, steps=10_000).warmup(500)      500 steps up, then 10,000 of the cosine
    Constant(1e-3).then(Linear(1e-3, 0.0, steps=100), at=1000)
    0.5 * a, a * b, a.clip(1e-6, 1e-2), a.shift(100), a.repeat(50), a.per_epoch(steps=390)

For a population, rates, decays, factors and limits may be arrays with a number for each model: `Cosine(rates, 100)`,
`rates * Cosine(1.0, 100)`. Whole numbers may be written as floats: `steps=1e4`.

The equation of each is in its docstring, with n for the step, and is written once, as a plain function of
`fastlr.schedules.equations`, which is staged: carried out for one step in Python, for an array of steps by NumPy, and
in a kernel on a GPU.
"""

from .. import arguments
from .base import KINDS, Clip, PerEpoch, Product, Repeat, Scaled, Schedule, Shift, Then, Warmup  # noqa: F401
from .cycles import Cosine, CosineRestarts, Cyclic, OneCycle, SlantedTriangular, WarmupStableDecay
from .decays import (
    Constant,
    Exponential,
    Function,
    Interpolated,
    InverseSqrt,
    InverseTime,
    Linear,
    MultiStep,
    Piecewise,
    Polynomial,
    StepDecay,
    TimeBased,
)
from .plateau import Observed, Plateau

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "Exponential",
    "Function",
    "Interpolated",
    "InverseSqrt",
    "InverseTime",
    "Linear",
    "MultiStep",
    "OneCycle",
    "Piecewise",
    "Plateau",
    "Polynomial",
    "Schedule",
    "SlantedTriangular",
    "StepDecay",
    "TimeBased",
    "WarmupStableDecay",
]

# Pickles name a class by its module, and that is this one, wherever the class is written.
for _kind in (*KINDS.values(), Schedule, Observed):
    _kind.__module__ = __name__
for _kind in KINDS.values():  # a dataclass makes its `__init__` itself
    _kind.__init__ = arguments.answered(_kind.__init__, [arguments.METHOD])  # type: ignore[method-assign]
