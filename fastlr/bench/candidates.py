"""The candidates: implementations of a rule, built over the same parameters and gradients."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastlr

from .. import optimizers
from ..arrays.places import HOST
from ..kernels.staging import define

# The optimizers by the name used in reports, with the settings in which they are measured.
RULES: dict[str, type[fastlr.Optimizer]] = {name.lower(): getattr(optimizers, name) for name in optimizers.__all__}
SETTINGS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
FUSED_IN_TORCH = {"adam", "adamw", "sgd", "adagrad"}

BLOCK = 65_536  # elements; the fastest of the powers of two from 4,096 to 131,072 for NumPy's Adam


@dataclass
class Problem:
    """What a step is measured on."""

    rule: str
    n: int
    leaves: int
    dtype: str
    threads: int

    def array(self, seed: int) -> np.ndarray:
        """Random numbers, never zeros: roots and divisions of zeros take another path."""
        return (np.random.default_rng(seed).random(self.n, np.dtype(self.dtype)) - 0.5) * np.asarray(0.1, self.dtype)

    def parts(self, array: np.ndarray) -> list[np.ndarray]:
        """An array cut into leaves of equal size, each memory of its own if there are several."""
        if self.leaves == 1:
            return [array]
        return [part.copy() for part in np.array_split(array, self.leaves)]


@dataclass
class Candidate:
    """An implementation ready to step."""

    step: Callable[[], Any]
    params: Callable[[], np.ndarray] | None = None  # for the check; None: nothing to compare
    compile_s: float = 0.0


def fastlr_candidate(problem: Problem, backend: str = "numba") -> Candidate:
    """Fastlr itself, or its NumPy reference."""
    settings = SETTINGS.get(problem.rule, {})
    make = RULES[problem.rule]
    if problem.leaves == 1:
        buffer = fastlr.flatten([problem.array(0)])
        opt = make(buffer, threads=problem.threads, backend=backend, **settings)
        opt.grads.data[:] = problem.array(1)
        return Candidate(opt.step, lambda: buffer.data, opt.warmup())
    params, grads = problem.parts(problem.array(0)), problem.parts(problem.array(1))
    opt = make(params, threads=problem.threads, backend=backend, **settings)
    return Candidate(lambda: opt.step(grads), lambda: np.concatenate(params), opt.warmup())


def installed(*packages: str) -> bool:
    """Whether these packages are there, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in packages)


def torch_leaves(problem: Problem) -> list[Any]:
    """Parameters as tensors, with gradients."""
    import torch

    torch.set_num_threads(problem.threads)
    leaves = [torch.from_numpy(x.copy()).requires_grad_() for x in problem.parts(problem.array(0))]
    for leaf, gradient in zip(leaves, problem.parts(problem.array(1)), strict=True):
        leaf.grad = torch.from_numpy(gradient.copy())
    return leaves


def of_torch(step: Callable[[], Any], leaves: Sequence[Any]) -> Candidate:
    """A candidate that steps on tensors."""
    return Candidate(step, lambda: np.concatenate([x.detach().numpy() for x in leaves]))


def torch_candidate(problem: Problem) -> Candidate | None:
    """PyTorch's fused kernel, where PyTorch is installed and has one."""
    if problem.rule not in FUSED_IN_TORCH or not installed("torch"):
        return None
    import torch

    leaves = torch_leaves(problem)
    settings = SETTINGS.get(problem.rule, {})
    opt = getattr(torch.optim, RULES[problem.rule].__name__)(leaves, fused=True, **settings)
    return of_torch(opt.step, leaves)


# Rules by the package and class in which their authors published them for PyTorch.
AUTHORS = {
    "dog": ("dog", "DoG"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "schedulefreesgd": ("schedulefree", "SGDScheduleFree"),
}


def authors_candidate(problem: Problem) -> Candidate | None:
    """The authors' own PyTorch code, where it is installed."""
    package, name = AUTHORS.get(problem.rule, ("", ""))
    if not package or not installed(package, "torch"):
        return None
    leaves = torch_leaves(problem)
    opt = getattr(importlib.import_module(package), name)(leaves, lr=1.0)
    if hasattr(opt, "train"):
        opt.train()
    return of_torch(opt.step, leaves)


def _adam(p: Any, g: Any, m: Any, v: Any, x: Any, t: int, f: Any) -> None:
    np.multiply(m, f(0.9), out=m)
    np.multiply(g, f(1 - 0.9), out=x)
    np.add(m, x, out=m)
    np.multiply(v, f(0.999), out=v)
    np.multiply(g, g, out=x)
    np.multiply(x, f(1 - 0.999), out=x)
    np.add(v, x, out=v)
    np.multiply(v, f(1 / (1 - 0.999**t)), out=x)
    np.sqrt(x, out=x)
    np.add(x, f(1e-8), out=x)
    np.divide(m, x, out=x)
    np.multiply(x, f(1e-3 / (1 - 0.9**t)), out=x)
    np.subtract(p, x, out=p)


def _rmsprop(p: Any, g: Any, v: Any, x: Any, t: int, f: Any) -> None:
    np.multiply(v, f(0.99), out=v)
    np.multiply(g, g, out=x)
    np.multiply(x, f(1 - 0.99), out=x)
    np.add(v, x, out=v)
    np.sqrt(v, out=x)
    np.add(x, f(1e-8), out=x)
    np.divide(g, x, out=x)
    np.multiply(x, f(1e-2), out=x)
    np.subtract(p, x, out=p)


def _adagrad(p: Any, g: Any, s: Any, x: Any, t: int, f: Any) -> None:
    np.multiply(g, g, out=x)
    np.add(s, x, out=s)
    np.sqrt(s, out=x)
    np.add(x, f(1e-10), out=x)
    np.divide(g, x, out=x)
    np.multiply(x, f(1e-2), out=x)
    np.subtract(p, x, out=p)


# Written by hand for speed, in place and with one temporary: the number of states, and the passes over a block.
BY_HAND: dict[str, tuple[int, Callable[..., None]]] = {
    "adam": (2, _adam),
    "rmsprop": (1, _rmsprop),
    "adagrad": (1, _adagrad),
}


def numpy_candidate(problem: Problem, block: int | None = BLOCK) -> Candidate:
    """The best in-place NumPy there is: by hand in blocks that stay in the cache, else the staged rule.

    Args:
        problem: what to step on.
        block: elements of a block; None for passes over whole arrays, as most people write it.
    """
    if problem.rule not in BY_HAND:
        return fastlr_candidate(problem, backend="numpy")
    states, passes = BY_HAND[problem.rule]
    dtype = np.dtype(problem.dtype)
    params, grads = problem.parts(problem.array(0)), problem.parts(problem.array(1))
    whole = [[p, g, *(np.zeros_like(p) for _ in range(states))] for p, g in zip(params, grads, strict=True)]
    size = max(p.size for p in params)
    temporary = np.empty(min(size, block or size), dtype)
    blocks = [
        [x[k : k + temporary.size] for x in arrays] + [temporary[: arrays[0][k : k + temporary.size].size]]
        for arrays in whole
        for k in range(0, arrays[0].size, temporary.size)
    ]
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        for arrays in blocks:
            passes(*arrays, t, dtype.type)

    return Candidate(step, lambda: np.concatenate(params))


def streams(problem: Problem, count: int) -> list[np.ndarray]:
    """Arrays in memory as fastlr allocates it."""
    arrays = [HOST.allocate(problem.n, problem.dtype, k) for k in range(count)]
    for array in arrays:
        array.fill(1e-3)
    return arrays


def in_parallel(problem: Problem, loop: Callable[..., Any], *arguments: Any) -> Candidate:
    """A parallel loop of Numba's own, compiled."""
    import numba

    threads = min(problem.threads, numba.config.NUMBA_NUM_THREADS)

    def step() -> None:
        numba.set_num_threads(threads)
        loop(*arguments)

    step()
    return Candidate(step)


def roofline_candidate(problem: Problem, states: int) -> Candidate:
    """Read and write the same streams with almost no arithmetic, by a plain parallel loop of Numba's own."""
    little = np.dtype(problem.dtype).type(1e-9)
    return in_parallel(problem, _touch(states), *streams(problem, 2 + states), little)


@functools.cache
def _touch(states: int) -> Callable[..., None]:
    """The loop for a number of states."""
    import numba

    names = [f"s{k}" for k in range(states)]
    text = "\n".join(
        [
            f"def touch({', '.join(['p', 'g', *names, 'c'])}):",
            "    for i in prange(p.size):",
            "        p[i] += g[i]",
            *(f"        {s}[i] += c" for s in names),
        ]
    )
    touch = define(text, "touch", {"prange": numba.prange})
    loop: Callable[..., None] = numba.njit(parallel=True, error_model="numpy")(touch)
    return loop
