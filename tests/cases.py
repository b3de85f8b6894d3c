"""The one table of optimizers: every test that is about optimizers runs over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracles

import fastlr
from fastlr.options import EXAMPLES


@dataclass(frozen=True)
class Case:
    """One optimizer in one setting.

    Attributes:
        name: for the test's name.
        make: the class.
        settings: its keyword arguments.
        oracle: float64 reference with the same keyword arguments.
        states: names of the states that exist in this setting.
        bad: (keyword arguments, part of the message) that must raise.
    """

    name: str
    make: type[fastlr.Optimizer]
    settings: dict[str, Any]
    oracle: Callable[..., list[np.ndarray]]
    states: tuple[str, ...]
    bad: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def __repr__(self) -> str:
        return self.name


_LR = [
    ({"lr": -1.0}, "lr must be non-negative and finite, got -1.0."),
    ({"lr": float("nan")}, "lr must be non-negative and finite, got nan."),
    ({"lr": "fast"}, "lr must be a number, got 'fast'."),
    (
        {"lr": [1e-3, 1e-4]},
        "lr must be one number, got shape (2,) (only a population takes arrays: see fastlr.flatten).",
    ),
    ({"lr": True}, "lr must be a number, got True."),
    ({"weight_decay": -0.1}, "weight_decay must be non-negative and finite, got -0.1."),
    ({"maximize": 1}, "maximize must be True or False, got 1."),
    ({"learning_rate": 0.1}, "hyperparameter 'learning_rate' is not known here: use lr=. There are"),
    ({"threads": 0}, "threads must be at least 1, got 0."),
    ({"threads": 1.5}, "threads must be a whole number, got 1.5."),
    ({"backend": "gpu"}, "backend 'gpu' is not known; there are numba, numpy."),
]

CASES = [
    Case(
        "sgd",
        fastlr.SGD,
        {"lr": 0.1},
        oracles.sgd,
        (),
        [
            *_LR,
            ({"momentum": -0.5}, "momentum must be non-negative and finite, got -0.5."),
            ({"nesterov": True}, "nesterov=True needs a momentum above 0 and a dampening of 0."),
            ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov=True needs a momentum above 0"),
        ],
    ),
    Case("sgd-momentum", fastlr.SGD, {"lr": 0.1, "momentum": 0.9}, oracles.sgd, ("momentum_buffer",)),
    Case(
        "sgd-dampened",
        fastlr.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01, "maximize": True},
        oracles.sgd,
        ("momentum_buffer",),
    ),
    Case("sgd-nesterov", fastlr.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, oracles.sgd, ("momentum_buffer",)),
    Case(
        "adagrad",
        fastlr.Adagrad,
        {},
        oracles.adagrad,
        ("sum",),
        [
            *_LR,
            ({"lr_decay": -1.0}, "lr_decay must be non-negative and finite, got -1.0."),
            (
                {"initial_accumulator_value": -1.0},
                "initial_accumulator_value must be non-negative and finite, got -1.0.",
            ),
            ({"eps": -1e-8}, "eps must be non-negative and finite, got -1e-08."),
        ],
    ),
    Case(
        "adagrad-decayed",
        fastlr.Adagrad,
        {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1, "weight_decay": 0.01},
        oracles.adagrad,
        ("sum",),
    ),
    Case(
        "adadelta",
        fastlr.Adadelta,
        {},
        oracles.adadelta,
        ("square_avg", "acc_delta"),
        [*_LR, ({"rho": 1.5}, "rho must be in [0, 1], got 1.5.")],
    ),
    Case(
        "adadelta-decoupled",
        fastlr.Adadelta,
        {"lr": 0.5, "rho": 0.95, "weight_decay": 0.1, "decoupled_weight_decay": True},
        oracles.adadelta,
        ("square_avg", "acc_delta"),
    ),
    Case(
        "rmsprop",
        fastlr.RMSprop,
        {},
        oracles.rmsprop,
        ("square_avg",),
        [*_LR, ({"alpha": -0.1}, "alpha must be in [0, 1], got -0.1.")],
    ),
    Case(
        "rmsprop-centered-momentum",
        fastlr.RMSprop,
        {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9, "centered": True, "weight_decay": 0.01},
        oracles.rmsprop,
        ("square_avg", "grad_avg", "momentum_buffer"),
    ),
    Case("rmsprop-momentum", fastlr.RMSprop, {"momentum": 0.5}, oracles.rmsprop, ("square_avg", "momentum_buffer")),
    Case(
        "adam",
        fastlr.Adam,
        {},
        oracles.adam,
        ("exp_avg", "exp_avg_sq"),
        [
            *_LR,
            ({"betas": (1.0, 0.999)}, "betas[0] must be in [0, 1), got 1.0."),
            ({"betas": (0.9, -0.1)}, "betas[1] must be in [0, 1), got -0.1."),
            ({"betas": 0.9}, "betas must be 2 numbers, got 0.9."),
            ({"eps": -1.0}, "eps must be non-negative and finite, got -1.0."),
            ({"amsgrad": "yes"}, "amsgrad must be True or False, got 'yes'."),
        ],
    ),
    Case(
        "adam-amsgrad",
        fastlr.Adam,
        {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
        oracles.adam,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
    Case(
        "nadam",
        fastlr.NAdam,
        {},
        oracles.nadam,
        ("exp_avg", "exp_avg_sq"),
        [
            *_LR,
            ({"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0."),
            ({"momentum_decay": -1.0}, "momentum_decay must be non-negative and finite, got -1.0."),
            ({"mu_product": 0.5}, "hyperparameter 'mu_product' is not known; there are"),
        ],
    ),
    Case(
        "nadam-decayed",
        fastlr.NAdam,
        {"lr": 0.01, "betas": (0.8, 0.99), "momentum_decay": 0.1, "weight_decay": 0.1, "maximize": True},
        oracles.nadam,
        ("exp_avg", "exp_avg_sq"),
    ),
    Case(
        "lamb",
        fastlr.LAMB,
        {},
        oracles.lamb,
        ("exp_avg", "exp_avg_sq"),
        [
            *_LR,
            ({"eps": -1.0}, "eps must be non-negative and finite, got -1.0."),
            ({"layer_adaptation": 1}, "layer_adaptation must be True or False, got 1."),
        ],
    ),
    Case(
        "lamb-decayed",
        fastlr.LAMB,
        {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1, "maximize": True},
        oracles.lamb,
        ("exp_avg", "exp_avg_sq"),
    ),
    Case(
        "lamb-not-adapted",
        fastlr.LAMB,
        {"weight_decay": 0.1, "layer_adaptation": False},
        oracles.lamb,
        ("exp_avg", "exp_avg_sq"),
    ),
    Case(
        "lars",
        fastlr.LARS,
        {},
        oracles.lars,
        ("momentum_buffer",),
        [
            *_LR,
            ({"momentum": -0.5}, "momentum must be non-negative and finite, got -0.5."),
            ({"trust_coefficient": -1e-3}, "trust_coefficient must be non-negative and finite, got -0.001."),
        ],
    ),
    Case(
        "lars-decayed",
        fastlr.LARS,
        {"lr": 0.5, "momentum": 0.5, "trust_coefficient": 0.02, "weight_decay": 0.1},
        oracles.lars,
        ("momentum_buffer",),
    ),
    Case(
        "adamw",
        fastlr.AdamW,
        {},
        oracles.adamw,
        ("exp_avg", "exp_avg_sq"),
        [*_LR, ({"decoupled_weight_decay": None}, "decoupled_weight_decay must be True or False, got None.")],
    ),
    Case(
        "adamw-amsgrad",
        fastlr.AdamW,
        {"lr": 0.01, "betas": (0.8, 0.99), "amsgrad": True, "weight_decay": 0.5},
        oracles.adamw,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
]
CASES += [
    Case(
        "dog",
        fastlr.DoG,
        {},
        oracles.dog,
        ("initial_params",),
        [*_LR, ({"relative_distance": -1.0}, "relative_distance must be non-negative and finite, got -1.0.")],
    ),
    Case(
        "dog-layerwise",
        fastlr.DoG,
        {"lr": 2.0, "relative_distance": 0.01, "layerwise": True, "weight_decay": 0.01, "maximize": True},
        oracles.dog,
        ("initial_params",),
    ),
    Case(
        "prodigy",
        fastlr.Prodigy,
        {"d0": 1e-3},
        oracles.prodigy,
        ("initial_params", "exp_avg", "exp_avg_sq", "weighted_grad"),
        [*_LR, ({"d0": 0.0}, "d0 must be positive and finite, got 0.0."), ({"eps": -1.0}, "eps must be non-negative")],
    ),
    Case(
        "prodigy-coupled",
        fastlr.Prodigy,
        {"lr": 0.5, "betas": (0.8, 0.9), "d0": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": False},
        oracles.prodigy,
        ("initial_params", "exp_avg", "exp_avg_sq", "weighted_grad"),
    ),
    Case(
        "schedule-free-sgd",
        fastlr.ScheduleFreeSGD,
        {"lr": 0.1, "weight_decay": 0.01},
        oracles.schedule_free_sgd,
        ("averaged", "z"),
        [*_LR, ({"beta": 1.0}, "beta must be in [0, 1), got 1.0.")],
    ),
    Case(
        "schedule-free-adamw",
        fastlr.ScheduleFreeAdamW,
        {"weight_decay": 0.01},
        oracles.schedule_free_adamw,
        ("averaged", "z", "exp_avg_sq"),
        [*_LR, ({"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0.")],
    ),
]
# Every option of the step at once, at values that show within a few steps of gradients around 1.
ALL_ON = {**EXAMPLES, "clip_norm": 0.5, "clip_value": 0.01, "ema": 0.9}
# One setting for each optimizer, for tests of what does not depend on the rule.
PLAIN = [next(case for case in CASES if case.make is make) for make in dict.fromkeys(case.make for case in CASES)]
# Those in which no element's update depends on another's.
ELEMENTWISE = [case for case in PLAIN if not case.make(np.zeros(1), **case.settings).rule.sums]
