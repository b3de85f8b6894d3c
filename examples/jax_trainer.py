"""JAX computes the gradients, fastlr updates NumPy arrays in place: what to watch.

On the CPU, JAX takes NumPy arrays as they are where it can (`jnp.asarray`, arguments of jitted functions), without a
copy, and runs asynchronously. An update in place can then change an array that JAX is still reading. Two safe ways:

1. wait for what was computed before the update: `jax.block_until_ready((loss, grads))`, as here; and keep no JAX
   array that was made from the parameters beyond the step;
2. or hand JAX a copy: `jnp.array(params["w"], copy=True)`.

The gradients need no copy: fastlr reads a JAX array where it is.
"""

from __future__ import annotations

import sys

import numpy as np

import fastlr

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    print("this example needs JAX: pip install jax")
    sys.exit(0)


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared error of a small network."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def main() -> None:
    """Fit y = sin(3 x) + x**2 on 512 points."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (512, 1)).astype(np.float32)
    y = np.sin(3 * x) + x**2
    params = {
        "w1": rng.standard_normal((1, 64)).astype(np.float32),
        "b1": np.zeros(64, np.float32),
        "w2": (rng.standard_normal((64, 1)) / 8).astype(np.float32),
    }
    opt = fastlr.Adam(params, lr=1e-2)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    first = None
    for _ in range(500):
        value, grads = jax.block_until_ready(value_and_grad(params, x, y))
        opt.step(grads)
        first = float(value) if first is None else first
    print(f"loss {first:.4f} -> {float(value):.6f} in {opt.steps} steps")
    assert float(value) < 0.01 * first


if __name__ == "__main__":
    main()
