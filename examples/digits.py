"""A multi-layer perceptron in plain NumPy on 1,797 real images of digits, trained by Adam, RMSprop and Adagrad.

Each optimizer trains twice: with the NumPy reference and with the compiled step. The weights end with the same bits;
only the time in the update differs. Needs scikit-learn for its bundled data set.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastlr

EPOCHS, BATCH, HIDDEN = 60, 64, 256
OPTIMIZERS = {
    "Adam": (fastlr.Adam, {"lr": 1e-3}),
    "RMSprop": (fastlr.RMSprop, {"lr": 1e-3}),
    "Adagrad": (fastlr.Adagrad, {"lr": 5e-2}),
}


def data() -> tuple[np.ndarray, ...]:
    """Training and test images, scaled to [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    return tuple(train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels))


def initial(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """He initialization (He et al. 2015, arXiv:1502.01852, eq. 10)."""
    sizes = [64, HIDDEN, HIDDEN, 10]
    params = {}
    for k, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        params[f"w{k}"] = (rng.standard_normal((fan_in, fan_out)) * np.sqrt(2.0 / fan_in)).astype(np.float32)
        params[f"b{k}"] = np.zeros(fan_out, np.float32)
    return params


def logits(params: fastlr.FlatBuffer, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The network's output, and the input of each layer."""
    inputs = [x]
    for k in (0, 1):
        inputs.append(np.maximum(inputs[-1] @ params[f"w{k}"] + params[f"b{k}"], 0))
    return inputs[-1] @ params["w2"] + params["b2"], inputs


def backward(params: fastlr.FlatBuffer, grads: fastlr.FlatBuffer, x: np.ndarray, y: np.ndarray) -> None:
    """Write the gradients of the mean cross-entropy into `grads`."""
    out, inputs = logits(params, x)
    out -= out.max(axis=1, keepdims=True)
    delta = np.exp(out)
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    for k in (2, 1, 0):
        np.matmul(inputs[k].T, delta, out=grads[f"w{k}"])
        np.sum(delta, axis=0, out=grads[f"b{k}"])
        if k:
            delta = (delta @ params[f"w{k}"].T) * (inputs[k] > 0)


def train(make: type[fastlr.Optimizer], settings: dict[str, float], backend: str) -> tuple[np.ndarray, float, float]:
    """Train once: the weights, the accuracy on the test images, and microseconds in an update (median)."""
    x, x_test, y, y_test = data()
    rng = np.random.default_rng(0)
    params = fastlr.flatten(initial(rng))
    opt = make(params, backend=backend, **settings)
    opt.warmup()
    spent = []
    for _ in range(EPOCHS):
        order = rng.permutation(len(x))
        for k in range(0, len(x), BATCH):
            batch = order[k : k + BATCH]
            backward(params, opt.grads, x[batch], y[batch])
            began = time.perf_counter()
            opt.step()
            spent.append(time.perf_counter() - began)
    accuracy = float((logits(params, x_test)[0].argmax(axis=1) == y_test).mean())
    return params.data, accuracy, float(np.median(spent)) * 1e6


def main() -> None:
    """Train with each optimizer, by NumPy and compiled."""
    print(f"{'':10}{'test accuracy':>14}{'NumPy reference':>18}{'fastlr':>12}   per update (median), {EPOCHS} epochs")
    for name, (make, settings) in OPTIMIZERS.items():
        reference, _, slow = train(make, settings, "numpy")
        weights, accuracy, fast = train(make, settings, "numba")
        assert np.array_equal(weights, reference), f"{name}: the bits differ"
        print(f"{name:10}{accuracy:14.1%}{slow:15.0f} us{fast:9.0f} us   same bits")
        assert accuracy >= 0.96, f"{name}: {accuracy:.1%} of the test images, expected at least 96 %"


if __name__ == "__main__":
    main()
