"""Rules beside their authors' own PyTorch code, in float64, where that is installed.

Schedule-free AdamW follows the paper's Algorithm 1, from which the authors' package has moved on: there the rate is not
corrected for bias, the root is.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastlr

torch = pytest.importorskip("torch")

STEPS = 60


def _dog(params):
    return pytest.importorskip("dog").DoG(params, reps_rel=0.01)


def _ldog(params):
    return pytest.importorskip("dog").LDoG(params, reps_rel=0.01)


def _prodigy(params):
    return pytest.importorskip("prodigyopt").Prodigy(params, eps=1e-300, d0=1e-3, weight_decay=0.1)


def _free_sgd(params):
    return pytest.importorskip("schedulefree").SGDScheduleFree(params, lr=0.05, weight_decay=0.01)


CASES = {
    "DoG": (_dog, fastlr.DoG, {"relative_distance": 0.01}),
    "L-DoG": (_ldog, fastlr.DoG, {"relative_distance": 0.01, "layerwise": True}),
    "Prodigy": (_prodigy, fastlr.Prodigy, {"eps": 0.0, "d0": 1e-3, "weight_decay": 0.1}),
    "schedule-free SGD": (_free_sgd, fastlr.ScheduleFreeSGD, {"lr": 0.05, "weight_decay": 0.01}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_the_same_path(name, rng):
    make, ours, settings = CASES[name]
    start = {"a": rng.standard_normal((6, 5)), "b": rng.standard_normal(4)}
    scale = {k: np.exp(rng.standard_normal(v.shape)) for k, v in start.items()}
    theirs = {k: torch.tensor(v, requires_grad=True) for k, v in start.items()}
    mine = {k: v.copy() for k, v in start.items()}
    other = make(list(theirs.values()))
    if hasattr(other, "train"):
        other.train()
    opt = ours(mine, backend="numpy", **settings)
    for _ in range(STEPS):
        for k, p in theirs.items():
            p.grad = torch.tensor(scale[k]) * (p.detach() - 1.0)
        other.step()
        opt.step({k: scale[k] * (v - 1.0) for k, v in mine.items()})
        for k in mine:
            np.testing.assert_allclose(mine[k], theirs[k].detach().numpy(), rtol=1e-9, atol=1e-12)
    if hasattr(other, "eval"):  # theirs turns the parameters into the average and back; ours has it at hand
        other.eval()
        for k in mine:
            np.testing.assert_allclose(opt.averaged[k], theirs[k].detach().numpy(), rtol=1e-9, atol=1e-12)
