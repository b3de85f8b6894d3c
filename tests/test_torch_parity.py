"""The same numbers as PyTorch, in every setting that both have."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastlr

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

STEPS = 100
# float64 over 100 steps: PyTorch orders the operations otherwise.
TOLERANCE = 1e-10


def grid(**choices):
    """All combinations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


SETTINGS = [
    *[("Adam", s) for s in grid(amsgrad=[False, True], weight_decay=[0.0, 0.1], maximize=[False, True])],
    *[("Adam", s) for s in grid(betas=[(0.0, 0.9), (0.5, 0.0)], eps=[1e-3], lr=[0.1])],
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    *[("AdamW", s) for s in grid(amsgrad=[False, True], weight_decay=[0.0, 0.1], maximize=[False, True])],
    ("AdamW", {}),
    *[
        ("SGD", {"lr": 0.05, **s})
        for s in grid(momentum=[0.0, 0.9], dampening=[0.0, 0.4], weight_decay=[0.0, 0.01], maximize=[False, True])
    ],
    *[("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, **s}) for s in grid(weight_decay=[0.0, 0.01])],
    *[
        ("RMSprop", s)
        for s in grid(centered=[False, True], momentum=[0.0, 0.9], weight_decay=[0.0, 0.01], maximize=[False, True])
    ],
    *[("RMSprop", s) for s in grid(alpha=[0.5], eps=[1e-2], lr=[0.1])],
    *[
        ("Adagrad", s)
        for s in grid(
            lr_decay=[0.0, 0.01], initial_accumulator_value=[0.0, 0.1], weight_decay=[0.0, 0.01], maximize=[False, True]
        )
    ],
    *[("NAdam", s) for s in grid(momentum_decay=[4e-3, 0.1], weight_decay=[0.0, 0.01], maximize=[False, True])],
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    *[("Adadelta", s) for s in grid(rho=[0.9, 0.5], weight_decay=[0.0, 0.01], maximize=[False, True])],
]


@pytest.mark.parametrize(
    ("name", "settings"),
    SETTINGS,
    ids=lambda x: x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items()),
)
def test_float64(name, settings, rng):
    start = {"w": rng.standard_normal((11, 3)), "b": rng.standard_normal(5)}
    ours = {k: v.copy() for k, v in start.items()}
    theirs = {k: torch.tensor(v, requires_grad=True) for k, v in start.items()}
    opt = getattr(fastlr, name)(ours, **settings)
    reference = getattr(torch.optim, name)(theirs.values(), **settings)
    for _ in range(STEPS):
        grads = {k: rng.standard_normal(v.shape) for k, v in start.items()}
        for k, g in grads.items():
            theirs[k].grad = torch.tensor(g)
        opt.step(grads)
        reference.step()
    for k in start:
        np.testing.assert_allclose(ours[k], theirs[k].detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in fastlr.optimizers.__all__ if hasattr(torch.optim, name)])
def test_defaults_are_the_same(name):
    ours = getattr(fastlr, name)(np.zeros(1))
    theirs = getattr(torch.optim, name)([torch.zeros(1, requires_grad=True)]).defaults
    for key, value in theirs.items():
        if key not in ("foreach", "fused", "capturable", "differentiable"):
            assert getattr(ours, key) == value, key


def test_a_leaf_without_gradient_keeps_its_own_count(rng):
    """As in PyTorch: no gradient, no update, and the step count of that parameter stands still."""
    start = [rng.standard_normal(4), rng.standard_normal(4)]
    ours = [x.copy() for x in start]
    theirs = [torch.tensor(x, requires_grad=True) for x in start]
    opt, reference = fastlr.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for k in range(20):
        grads = [rng.standard_normal(4), rng.standard_normal(4) if k % 3 else None]
        for x, g in zip(theirs, grads, strict=True):
            x.grad = None if g is None else torch.tensor(g)
        opt.step(grads)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)
