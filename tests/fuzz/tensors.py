"""Optimizers of `fastlr.torch`: their worlds for interrupts, and damaged state dicts of theirs."""

from __future__ import annotations

import copy
import functools
import math
import random
from typing import Any

import torch

import fastlr.torch
from fastlr.schedules import Cosine

from .arguments import as_number
from .promises import BrokenPromiseError, difference, refusal
from .values import VALUES, made


def parameters(*dtypes: torch.dtype) -> list[torch.nn.Parameter]:
    """Two of each dtype."""
    out = []
    for dtype in dtypes:
        out += [torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3))]
        out += [torch.nn.Parameter(torch.ones(3, dtype=dtype))]
    return out


def give(opt: torch.optim.Optimizer, k: int, without: int = -1) -> None:
    """Set ordinary gradients, but for one parameter."""
    for place, p in enumerate(p for group in opt.param_groups for p in group["params"]):
        g = (torch.arange(p.numel()) % 5 - 1.7) * (k + 1) / 3
        p.grad = None if place == without else g.to(p.dtype).reshape(p.shape)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return repr(value)


def see(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that can be compared."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = opt.state_dict()
    groups = {f"group {k}": _plain(group) for k, group in enumerate(state["param_groups"])}
    states = {f"state {k}": _plain(entries) for k, entries in state["state"].items()}
    return {**{f"p{k}": _plain(p) for k, p in enumerate(params)}, **groups, **states}


def build(steps: int, *dtypes: torch.dtype, **settings: Any) -> Any:
    """An optimizer that has made some steps."""
    params = parameters(*(dtypes or (torch.float32,)))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]
    opt = fastlr.torch.Adam(groups, **{"lr": 0.1, **settings})
    for k in range(steps):
        give(opt, k)
        opt.step()
    return opt


# Damaged state dicts

_BUILDS = {
    "adam": functools.partial(build),
    "scheduled": functools.partial(build, lr=Cosine(0.1, steps=50)),
}


@functools.cache
def _saved(name: str) -> Any:
    return _BUILDS[name](3).state_dict()


@functools.cache
def _expected(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    opt = _BUILDS[name](1)
    before = see(opt)
    give(opt, 7)
    opt.step()
    return before, see(opt)


def _odd_tensor(r: random.Random, like: torch.Tensor) -> Any:
    choices = [
        lambda: torch.full_like(like, math.nan),
        lambda: torch.full_like(like, -1),
        lambda: torch.full_like(like, math.inf),
        lambda: torch.full_like(like, 1e30),
        lambda: like.double(),
        lambda: like.to(torch.int64),
        lambda: like.to(torch.bfloat16),
        lambda: like.to(torch.complex64),
        lambda: like.bool(),
        lambda: like.reshape(-1)[:0],
        lambda: torch.zeros(10_000),
        lambda: like[None],
        lambda: like.to("meta"),
        lambda: like.clone().requires_grad_(),
        lambda: like.numpy(),
        lambda: like.tolist(),
        lambda: float(like.reshape(-1)[0]),
        lambda: torch.zeros(like.shape).to_sparse() if like.ndim else None,
        lambda: torch.zeros(like.shape, dtype=torch.uint8),
    ]
    return r.choice(choices)()


def damaged(r: random.Random, name: str) -> tuple[Any, str]:
    """A state dict with something odd in it, and how."""
    state = copy.deepcopy(_saved(name))
    kind = r.choice(["group", "group", "group", "state", "state", "state", "params", "top", "whole", "near"])
    group = r.choice(state["param_groups"])
    index = r.choice([*state["state"]])
    entries = state["state"][index]
    text = r.choice(VALUES)
    if kind == "group":
        key = r.choice([k for k in group if k != "params"])
        if r.random() < 0.2:
            del group[key]
            return state, f"group without {key!r}"
        group[key] = made(text)
        return state, f"group[{key!r}] = {text}"
    if kind == "state":
        key = r.choice([*entries])
        pick = r.random()
        if pick < 0.1:
            del entries[key]
            return state, f"state without {key!r}"
        if pick < 0.6 and isinstance(entries[key], torch.Tensor):
            entries[key] = _odd_tensor(r, entries[key])
            kind = repr(entries[key])[:60]
        else:
            entries[key], kind = made(text), text
        return state, f"state[{key!r}] = {kind}"
    if kind == "params":
        group["params"] = r.choice([[], [0], [0, 0], [99], [1, 2, 3], "01", None, [None], [0.5], {0: 1}, [-1], [[0]]])
        return state, f"params = {group['params']}"
    if kind == "top":
        key = r.choice(["state", "param_groups"])
        if r.random() < 0.3:
            del state[key]
            return state, f"no {key}"
        state[key] = made(text)
        return state, f"{key} = {text}"
    if kind == "near":
        odd = r.choice([{}, {index: {}}, {index: made(text)}, {made("0.5"): entries}, {99: entries}, {"0": entries}])
        state["state"].update(odd)
        return state, f"state updated with {[*odd]}"
    return made(text), text


_RANGES = {"lr": (0, math.inf), "eps": (0, math.inf), "weight_decay": (0, math.inf), "betas": (0, 1)}


def _nonsense(opt: torch.optim.Optimizer) -> str:
    for group in opt.param_groups:
        for name, (low, high) in _RANGES.items():
            values = group[name] if name == "betas" else [group[name]]
            for x in values:
                if isinstance(x, fastlr.schedules.Schedule) or (callable(x) and not isinstance(x, type)):
                    continue
                number = as_number(x.item() if isinstance(x, torch.Tensor) and x.numel() == 1 else x)
                if number is None or not low <= number < high:
                    return f"{name} is {x!r}"
    for entries in opt.state_dict()["state"].values():
        step = float(entries.get("step", 0)) if isinstance(entries, dict) else 0.0  # others may keep what they like
        if not (0 <= step <= 2**53 and step == int(step)):
            return f"step is {step}"
    return ""


def judge(r: random.Random) -> str:
    """Load something damaged into an optimizer in use, and see what has become of it."""
    name = r.choice([*_BUILDS])
    state, kind = damaged(r, name)
    how = f"fastlr.torch, {name}: {kind}"
    opt = _BUILDS[name](1)
    before, one_step_later = _expected(name)
    try:
        opt.load_state_dict(state)
    except Exception as error:
        own = (ZeroDivisionError,) if "Raises()" in how else ()
        outcome = refusal(error, how, *own, where="(loading into fastlr.torch)")
        if see(opt) != before:
            changed = difference(before, see(opt))
            raise BrokenPromiseError("a refused state changed something (fastlr.torch)", f"{how}: {changed}") from error
        give(opt, 7)
        opt.step()
        if see(opt) != one_step_later:
            changed = difference(one_step_later, see(opt))
            raise BrokenPromiseError(
                "a refused state changed the next step (fastlr.torch)", f"{how}: {changed}"
            ) from error
        return outcome
    if "lambda" in kind or "= abs" in kind or "= len" in kind:
        return "loaded"  # the user's own functions
    try:
        nonsense = _nonsense(opt)
        give(opt, 7)
        opt.step()
        again = _nonsense(opt)
    except Exception as error:
        sign = f"unusable after loading (fastlr.torch): {type(error).__name__}"
        raise BrokenPromiseError(sign, f"{how}: {error}") from error
    if nonsense or again:
        sign = (nonsense or again).split(" is ")[0]
        raise BrokenPromiseError(f"loaded nonsense (fastlr.torch): {sign}", f"{how}: {nonsense or again}")
    return "loaded"
