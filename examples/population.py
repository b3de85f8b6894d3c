"""500 fits of a damped oscillation with 500 learning rates at once, in float64, one launch a step.

Which rate is best depends on the problem; here all are tried together, at the price of one: every model of the
population has its own rate, moments and parameters.
"""

from __future__ import annotations

import time

import numpy as np

import fastlr

MODELS, STEPS = 500, 2_000
TRUE = {"amplitude": 2.0, "decay": 0.6, "frequency": 3.0, "phase": 0.4}
START = {"amplitude": 1.0, "decay": 0.3, "frequency": 2.7, "phase": 0.0}


def loss_and_grads(p: fastlr.FlatBuffer, t: np.ndarray, y: np.ndarray, grads: fastlr.FlatBuffer) -> np.ndarray:
    """Mean squared error of each model, and its gradients into `grads`."""
    a, d, f, phi = (p[name][:, None] for name in TRUE)
    envelope = np.exp(-d * t)
    angle = f * t + phi
    wave = envelope * np.cos(angle)
    slope = -a * envelope * np.sin(angle)
    error = a * wave - y
    weight = 2.0 * error / t.size
    np.sum(weight * wave, axis=1, out=grads["amplitude"])
    np.sum(weight * -t * a * wave, axis=1, out=grads["decay"])
    np.sum(weight * slope * t, axis=1, out=grads["frequency"])
    np.sum(weight * slope, axis=1, out=grads["phase"])
    return np.mean(error**2, axis=1)


def main() -> None:
    """Fit all models and show what each range of rates came to."""
    rng = np.random.default_rng(0)
    t = np.linspace(0.0, 4.0, 100)
    y = TRUE["amplitude"] * np.exp(-TRUE["decay"] * t) * np.cos(TRUE["frequency"] * t + TRUE["phase"])
    y += 0.01 * rng.standard_normal(t.size)

    fleet = fastlr.flatten({name: np.array(value) for name, value in START.items()}, population=MODELS)
    rates = np.geomspace(1e-5, 3.0, MODELS)
    opt = fastlr.Adam(fleet, lr=rates)
    opt.warmup()
    spent = 0.0
    for _ in range(STEPS):
        losses = loss_and_grads(fleet, t, y, opt.grads)
        began = time.perf_counter()
        opt.step()
        spent += time.perf_counter() - began
    losses = loss_and_grads(fleet, t, y, opt.grads)

    print(f"{MODELS} models, {STEPS} steps, {spent / STEPS * 1e6:.0f} us a step for all of them")
    for part in np.array_split(np.arange(MODELS), 10):
        print(f"lr {rates[part[0]]:8.1e} to {rates[part[-1]]:8.1e}   median loss {np.median(losses[part]):9.2e}")
    best = int(np.argmin(losses))
    found = {name: round(float(fleet[name][best]), 3) for name in TRUE}
    print(f"best: lr {rates[best]:.3g}, {found}")
    assert losses[best] < 2e-4 and abs(found["frequency"] - TRUE["frequency"]) < 0.02


if __name__ == "__main__":
    main()
