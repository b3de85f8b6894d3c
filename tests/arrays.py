"""Arrays to test with, and when two are the same."""

from __future__ import annotations

import numpy as np


def gradients(rng, n, dtype, steps):
    """Ordinary numbers, large and small ones, zeros of both signs, infinities and NaN."""
    out = []
    for _ in range(steps):
        g = (rng.standard_normal(n) * 10.0 ** rng.integers(-20, 10, n)).astype(dtype)
        g[::17] = 0.0
        g[5::19] = -0.0
        out.append(g)
    if n > 50:
        out[1][11], out[2][12], out[3][13] = np.inf, -np.inf, np.nan
    return out


def same(a, b):
    """Bit for bit; one NaN is as good as another."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind != "f":
        return np.array_equal(a, b)
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(
        np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)])
    )


def tree_map(function, tree):
    """The tree with every leaf put through a function."""
    return {k: function(v) for k, v in tree.items()}
