"""Whole steps of a training loop: fastlr's one call, and the same by separate calls of PyTorch and Optax.

Three kinds. "full": AdamW with clipping, moving average, bfloat16 copy and clearing. "options": AdamW plain and with
each option by itself, for what an option costs. "target": Adam with clipping and a target network's average, as in
reinforcement learning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import fastlr

from ..arrays.places import HOST
from ..options import EXAMPLES, OPTIONS, with_trees
from .candidates import Candidate, Problem, in_parallel, installed, of_torch, streams, torch_leaves

LR, DECAY, LIMIT, EMA = 1e-3, 1e-2, EXAMPLES["clip_norm"], EXAMPLES["ema"]


@dataclass(frozen=True)
class Step:
    """A kind of step.

    Attributes:
        make: the optimizer.
        settings: its options.
        moved: bytes that a float32 step moves per parameter: what is read and what is written.
    """

    make: type[fastlr.Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    moved: int = 28


_PLAIN = {"lr": LR, "weight_decay": DECAY}
FULL = Step(
    fastlr.AdamW,
    _PLAIN | {name: EXAMPLES[name] for name in ("clip_norm", "skip_nonfinite", "ema", "shadow", "zero_grads")},
    46,
)
TARGET = Step(fastlr.Adam, {"lr": LR, "clip_norm": LIMIT, "ema": EMA}, 40)


def fastlr_step(step: Step, problem: Problem, backend: str = "numba") -> Candidate:
    """The whole step in one call."""
    params = fastlr.flatten(problem.parts(problem.array(0)))
    settings = with_trees(step.settings, lambda x: params.like(np.full_like(params.data, x)))
    opt = step.make(params, **settings, threads=problem.threads, backend=backend)
    first = problem.array(1)
    opt.grads.data[:] = first
    if problem.n > 100_000 or not settings.get("zero_grads"):
        return Candidate(opt.step, lambda: params.data, opt.warmup())

    def whole() -> None:  # on the small problems of a check with a gradient each time
        opt.grads.data[:] = first
        opt.step()

    return Candidate(whole, lambda: params.data, opt.warmup())


def torch_steps(step: Step, problem: Problem) -> Candidate | None:
    """The same by PyTorch's calls: clip, fused optimizer, average, copy, clear."""
    if not installed("torch"):
        return None
    import torch

    leaves = torch_leaves(problem)
    first = [leaf.grad.clone() for leaf in leaves]
    averages = [leaf.detach().clone() for leaf in leaves]
    shadows = [leaf.detach().to(torch.bfloat16) for leaf in leaves]
    decay = {"weight_decay": DECAY} if step is FULL else {}
    opt = getattr(torch.optim, step.make.__name__)(leaves, lr=LR, fused=True, **decay)
    again = problem.n <= 100_000 and step is FULL

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def whole() -> None:
        if again:
            for leaf, gradient in zip(leaves, first, strict=True):
                leaf.grad.copy_(gradient)
        torch.nn.utils.clip_grad_norm_(leaves, LIMIT, foreach=True)
        opt.step()
        torch._foreach_lerp_(averages, leaves, 1 - EMA)
        if step is FULL:
            for shadow, leaf in zip(shadows, leaves, strict=True):
                shadow.copy_(leaf)
                leaf.grad.zero_()

    return of_torch(whole, leaves)


def optax_steps(step: Step, problem: Problem) -> Candidate | None:
    """The same by Optax in one jitted function that may reuse its arguments' memory; it need not clear gradients."""
    if step is not FULL or not installed("jax", "optax"):
        return None
    import jax
    import jax.numpy as jnp
    import optax

    chain = optax.chain(optax.clip_by_global_norm(LIMIT), optax.adamw(LR, weight_decay=DECAY))

    @partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def whole(params: Any, state: Any, average: Any, shadow: Any, grads: Any) -> Any:
        updates, state = chain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda e, p: e + (1 - EMA) * (p - e), average, params)
        return params, state, average, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    params = [jnp.array(x) for x in problem.parts(problem.array(0))]
    grads = [jnp.array(x) for x in problem.parts(problem.array(1))]
    held = [
        params,
        chain.init(params),
        jax.tree.map(jnp.copy, params),
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), params),
    ]

    wait: Callable[..., Any] = jax.block_until_ready

    def run() -> None:
        held[:] = whole(*held, grads)
        wait(held)

    return Candidate(run, lambda: np.concatenate([np.asarray(x).ravel() for x in held[0]]))


def roofline(problem: Problem) -> Candidate:
    """The same bytes as in a full step with almost no arithmetic: a reading pass and a reading and writing one."""
    arrays = streams(problem, 5)
    copy = HOST.allocate(problem.n, np.uint16, 5)
    return in_parallel(problem, _touch(), *arrays, arrays[1].view(np.int32), copy, np.float32(1e-9))


@functools.cache
def _touch() -> Callable[..., None]:
    import numba

    prange = numba.prange

    def touch(p, g, m, v, e, bits, copy, c):  # type: ignore[no-untyped-def]
        total = 0
        for i in prange(bits.size):
            total += bits[i]
        d = c * np.float32(total & 1)
        for i in prange(p.size):
            p[i] += c
            g[i] += d
            m[i] += c
            v[i] += c
            e[i] += c
            copy[i] = np.uint16(7)

    loop: Callable[..., None] = numba.njit(parallel=True, error_model="numpy")(touch)
    return loop


@dataclass(frozen=True)
class Entry:
    """What is measured: how to make it, the bytes per parameter it has to move, and the step it must agree with."""

    build: Callable[[Problem], Candidate | None]
    moved: int
    step: Step | None

    def reference(self, problem: Problem) -> Candidate:
        """The same step by NumPy."""
        assert self.step is not None
        return fastlr_step(self.step, problem, backend="numpy")


def entries(kind: str, problem: Problem) -> dict[str, Entry]:
    """What is measured for a kind of step, by name."""

    def own(step: Step) -> Entry:
        return Entry(partial(fastlr_step, step), step.moved, step)

    if kind == "options":
        out = {"fastlr": own(Step(fastlr.AdamW, _PLAIN))}
        for name, example in EXAMPLES.items():
            out[f"+ {name}"] = own(Step(fastlr.AdamW, {**_PLAIN, name: example}, 28 + OPTIONS[name].moved))
        return out
    step = FULL if kind == "full" else TARGET
    out = {"fastlr": own(step), "torch_calls": Entry(partial(torch_steps, step), step.moved, step)}
    if step is FULL:
        out["optax"] = Entry(partial(optax_steps, step), step.moved, step)
        if problem.leaves == 1:
            out["roofline"] = Entry(roofline, step.moved, None)
    return out
