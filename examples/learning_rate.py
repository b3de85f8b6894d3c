"""Everything about the learning rate, on the digits: find it, schedule it, do without it, search along a line.

Needs scikit-learn for the data (`pip install scikit-learn`).
"""

import numpy as np
from sklearn.datasets import load_digits

import fastlr
from fastlr.schedules import Cosine, Plateau

x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
train, test = slice(0, 1400), slice(1400, None)
rng = np.random.default_rng(0)


def fresh():
    """Parameters of a small network, in one buffer."""
    first, second = rng.standard_normal((64, 64)) * 0.1, rng.standard_normal((64, 10)) * 0.1
    tree = {"w1": first, "b1": np.zeros(64), "w2": second, "b2": np.zeros(10)}
    return fastlr.flatten({k: v.astype(np.float32) for k, v in tree.items()})


def loss_and_grads(p, x, y):
    """Cross entropy, and its gradient by hand."""
    hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
    z = hidden @ p["w2"] + p["b2"]
    d = np.exp(z - z.max(1, keepdims=True))
    d /= d.sum(1, keepdims=True)
    loss = -float(np.log(d[np.arange(len(y)), y] + 1e-30).mean())
    d[np.arange(len(y)), y] -= 1
    d /= np.float32(len(y))
    back = (d @ p["w2"].T) * (hidden > 0)
    return loss, {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ d, "b2": d.sum(0)}


def accuracy(p):
    """Share of the test images that are read right."""
    hidden = np.maximum(x[test] @ p["w1"] + p["b1"], 0)
    return float(np.mean((hidden @ p["w2"] + p["b2"]).argmax(1) == y[test]))


def batch(p):
    """The next random batch."""
    chosen = rng.integers(0, 1400, 64)
    return loss_and_grads(p, x[train][chosen], y[train][chosen])


params = fresh()
found = fastlr.find_lr(fastlr.SGD(params, momentum=0.9), batch, 1e-4, 100.0)
print(found)

results = {}
for name, make, settings in (
    ("SGD at the suggestion", fastlr.SGD, {"lr": found.suggestion, "momentum": 0.9}),
    ("and with a schedule", fastlr.SGD, {"lr": Cosine(found.suggestion, 550).warmup(50), "momentum": 0.9}),
    ("Adam that drops on a plateau", fastlr.Adam, {"lr": Plateau(1e-2, factor=0.5, patience=3)}),
    ("Prodigy", fastlr.Prodigy, {}),
    ("schedule-free AdamW", fastlr.ScheduleFreeAdamW, {"lr": 1e-2}),
):
    params = fresh()
    opt = make(params, **settings)
    recent = []
    for k in range(600):
        loss, grads = batch(params)
        info = opt.step(grads)
        recent.append(loss)
        if "plateau" in name and k % 20 == 19:
            opt.observe(np.mean(recent[-20:]))
    judged = opt.averaged if "free" in name else params
    results[name] = accuracy(judged)
    print(f"{name:30} {results[name]:.1%}, last rate {float(info.lr):.2g}")

params = fresh()
info = fastlr.LBFGS(params).minimize(lambda p: loss_and_grads(p, x[train], y[train]), max_steps=60)
results["L-BFGS"] = accuracy(params)
print(f"{'L-BFGS, full batches':30} {results['L-BFGS']:.1%}, {info.step} steps")
assert min(results.values()) > 0.85, results
