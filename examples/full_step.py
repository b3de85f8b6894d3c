"""A multi-layer perceptron in plain NumPy on 1,797 real images of digits, with everything that a trainer does per step.

Two micro-batches are accumulated; then one call takes their mean, tests it for NaN and Inf, clips it, updates by AdamW,
averages the weights, writes a float16 copy and clears the gradient. The same is done by separate NumPy passes on a
second set of weights: the numbers agree, the time does not. Needs scikit-learn for its bundled data set.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastlr

STEPS, BATCH, HIDDEN = 120, 64, 768
LR, DECAY, LIMIT, EMA = 1e-3, 1e-2, 1.0, 0.97


def initial(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """He initialization (He et al. 2015, arXiv:1502.01852, eq. 10)."""
    params = {}
    for k, (fan_in, fan_out) in enumerate(itertools.pairwise([64, HIDDEN, HIDDEN, 10])):
        params[f"w{k}"] = (rng.standard_normal((fan_in, fan_out)) * np.sqrt(2.0 / fan_in)).astype(np.float32)
        params[f"b{k}"] = np.zeros(fan_out, np.float32)
    return params


def forward(params: fastlr.FlatBuffer, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The network's output, and the input of each layer."""
    inputs = [x]
    for k in (0, 1):
        inputs.append(np.maximum(inputs[-1] @ params[f"w{k}"] + params[f"b{k}"], 0))
    return inputs[-1] @ params["w2"] + params["b2"], inputs


def gradients(params: fastlr.FlatBuffer, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the mean cross-entropy."""
    out, inputs = forward(params, x)
    delta = np.exp(out - out.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    grads = {}
    for k in (2, 1, 0):
        grads[f"w{k}"], grads[f"b{k}"] = inputs[k].T @ delta, delta.sum(axis=0)
        if k:
            delta = (delta @ params[f"w{k}"].T) * (inputs[k] > 0)
    return {name: grads[name] for name in params}


class SeparatePasses:
    """The same step as one writes it in NumPy: a pass over the arrays for each thing."""

    def __init__(self, params: np.ndarray) -> None:
        self.params, self.grads = params, np.zeros_like(params)
        self.m, self.v = np.zeros_like(params), np.zeros_like(params)
        self.average, self.copy = params.copy(), params.astype(np.float16)
        self.t = 0

    def step(self, scale: float) -> None:
        """Unscale, test, clip, decay, update, average, copy, clear."""
        g, p, m, v = self.grads, self.params, self.m, self.v
        g *= np.float32(1 / scale)
        norm = np.linalg.norm(g)
        if not np.isfinite(norm):
            return
        g *= np.float32(min(1.0, LIMIT / (norm + 1e-6)))
        self.t += 1
        p *= np.float32(1 - LR * DECAY)
        m *= np.float32(0.9)
        m += np.float32(0.1) * g
        v *= np.float32(0.999)
        v += np.float32(1e-3) * g * g
        rate = np.float32(LR / (1 - 0.9**self.t))
        p -= rate * m / (np.sqrt(v * np.float32(1 / (1 - 0.999**self.t))) + np.float32(1e-8))
        self.average += np.float32(1 - EMA) * (p - self.average)
        self.copy[...] = p
        g.fill(0)


def main() -> None:
    """Train both side by side and show the time of an update."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    rng = np.random.default_rng(0)
    params = fastlr.flatten(initial(rng))
    opt = fastlr.AdamW(
        params,
        lr=LR,
        weight_decay=DECAY,
        clip_norm=LIMIT,
        skip_nonfinite=True,
        ema=EMA,
        shadow="float16",
        zero_grads=True,
    )
    opt.warmup()
    separate = SeparatePasses(params.data.copy())
    fast, slow = [], []
    for _ in range(STEPS):
        for _ in range(2):
            batch = rng.integers(0, len(x), BATCH)
            grads = gradients(params, x[batch], y[batch])
            opt.accumulate(grads)
            separate.grads += np.concatenate([g.ravel() for g in grads.values()])
        t0 = time.perf_counter()
        info = opt.step(grad_scale=2.0)
        t1 = time.perf_counter()
        separate.step(2.0)
        t2 = time.perf_counter()
        fast.append(t1 - t0)
        slow.append(t2 - t1)
    assert not info.skipped and opt.skipped_steps == 0

    def accuracy(weights: fastlr.FlatBuffer) -> float:
        return float((forward(weights, x_test)[0].argmax(axis=1) == y_test).mean())

    averaged = accuracy(opt.ema)
    difference = float(np.abs(params.data - separate.params).max())
    print(
        f"{params.size:,} parameters, {STEPS} steps; last gradient norm {info.grad_norm:.3f}, "
        f"multiplied by {info.clip_coef:.3f}"
    )
    print(f"test accuracy {accuracy(params):.1%}, of the averaged weights {averaged:.1%}")
    a, b = np.median(fast) * 1e3, np.median(slow) * 1e3
    print(f"one call {a:.2f} ms, separate passes {b:.2f} ms: {b / a:.1f} times as long (medians)")
    print(f"largest difference between the two: {difference:.1e}")
    assert averaged > 0.95 and difference < 1e-3


if __name__ == "__main__":
    main()
