"""`fastlr.torch` beside PyTorch's own optimizers and DeepSpeed's, on the CPU, in one run; results as JSON.

`python -m bench.pytorch` measures everything but the model of a billion parameters, which `--billion` adds (16 GB).
Candidates alternate round by round on random numbers, each in parameters of its own, and are checked against each other
before they are timed. DeepSpeed's CPUAdam takes part where it is installed and can be built.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastlr
import fastlr.torch
from fastlr.bench import measuring
from fastlr.info import cpu_name, versions

from .models import gpt2

ROOT = Path(__file__).parent.parent
LR, DECAY, LIMIT, EMA = 3e-4, 1e-2, 1.0, 0.995
# An actor and a critic of two hidden layers, as in many examples of reinforcement learning: 70 thousand parameters.
NETWORK = [(192, 17), (192,), (192, 192), (192,), (6, 192), (6,), (128, 192), (128,), (18, 128), (18,)]
Shapes = list[tuple[int, ...]]
Step = Callable[[], Any]


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters with gradients, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    out = [torch.nn.Parameter(torch.randn(s, generator=generator).mul_(0.1).to(dtype)) for s in shapes]
    for p in out:
        p.grad = torch.randn(p.shape, generator=generator).mul_(0.1).to(dtype)
    return out


def checked(steps: dict[str, tuple[Step, list[torch.Tensor]]], tolerance: float) -> dict[str, Step]:
    """Make two steps of each, and compare what came out.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    results = {}
    for name, (step, params) in steps.items():
        step()
        step()
        results[name] = [p.detach().double() for p in params[:8]]
    first, *others = results
    for name in others:
        for a, b in zip(results[first], results[name], strict=True):
            if not torch.allclose(a, b, rtol=0, atol=tolerance):
                raise RuntimeError(f"{name} and {first} do not agree: by {(a - b).abs().max():.3g}")
    return {name: step for name, (step, _) in steps.items()}


def measure(case: str, what: str, shapes: Shapes, steps: dict[str, Step], seconds: float) -> list[dict[str, Any]]:
    """Rows for candidates measured in turn; `what` says what a step does."""
    gc.collect()
    rounds = measuring.alternate({name: partial(measuring.turn, step) for name, step in steps.items()}, seconds)
    elements, rows = sum(int(np.prod(s)) for s in shapes), []
    for name, times in rounds.items():
        p10, p50, p90 = (float(x) for x in np.percentile(np.concatenate(times), [10, 50, 90]))
        row = {"case": case, "step": what, "impl": name, "n": elements, "tensors": len(shapes)}
        rows.append({**row, "p10_s": p10, "p50_s": p50, "p90_s": p90, **measuring.relative(rounds, name)})
        print(f"{case:24} {name:16} {p50 * 1e3:10.4f} ms  {rows[-1]['relative']:8.2f}x", flush=True)
    return rows


def plain(case: str, shapes: Shapes, seconds: float, foreach: bool) -> list[dict[str, Any]]:
    """AdamW alone."""
    settings = {"lr": LR, "weight_decay": DECAY}
    steps: dict[str, tuple[Step, list[torch.Tensor]]] = {}
    kinds: dict[str, Any] = {"fastlr": fastlr.torch.AdamW, "torch_fused": torch.optim.AdamW}
    for name, make in {**kinds, **({"torch_foreach": torch.optim.AdamW} if foreach else {})}.items():
        params = parameters(shapes)
        more = {} if name == "fastlr" else {name.removeprefix("torch_"): True}
        steps[name] = make(params, **settings, **more).step, params
    arrays = [p.detach().numpy() for p in parameters(shapes)]
    grads = [p.grad.numpy() for p in parameters(shapes)]
    native = fastlr.AdamW(arrays, **settings)
    steps["fastlr_native"] = lambda: native.step(grads), [torch.from_numpy(a) for a in arrays]
    return measure(case, "AdamW", shapes, checked(steps, 1e-6), seconds)


def whole(case: str, name: str, shapes: Shapes, seconds: float) -> list[dict[str, Any]]:
    """Clipping, the optimizer and an average of the weights, in one pass and by PyTorch's three calls."""
    ours, target, theirs, average = (parameters(shapes) for _ in range(4))
    opt = getattr(fastlr.torch, name)(ours, lr=LR, clip_norm=LIMIT, ema=EMA, ema_out=target)
    reference = getattr(torch.optim, name)(theirs, lr=LR, fused=True)
    arrays, natives = ([p.detach().numpy() for p in parameters(shapes)] for _ in range(2))
    grads = [p.grad.numpy() for p in ours]
    native = getattr(fastlr, name)(arrays, lr=LR, clip_norm=LIMIT, ema=EMA, ema_out=natives)
    fresh = [p.grad.clone() for p in theirs]

    @torch.no_grad()
    def calls() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, LIMIT)  # the gradients are small from the second time on: no less work
        reference.step()
        torch._foreach_lerp_(average, theirs, 1 - EMA)

    def same_gradients() -> None:
        for p, g in zip(theirs, fresh, strict=True):
            p.grad.copy_(g)
        calls()

    steps: dict[str, tuple[Step, list[torch.Tensor]]] = {"fastlr": (opt.step, [*ours[:4], *target[:4]])}
    steps["torch_calls"] = same_gradients, [*theirs[:4], *average[:4]]
    steps["fastlr_native"] = lambda: native.step(grads), [torch.from_numpy(a) for a in (*arrays[:4], *natives[:4])]
    ready = checked(steps, 1e-6)
    ready["torch_calls"] = calls
    return measure(case, f"clip, {name}, average", shapes, ready, seconds)


def deepspeed_steps(shapes: Shapes) -> tuple[Step, list[torch.Tensor]] | None:
    """DeepSpeed's CPUAdam over float32 masters, with the conversions that bfloat16 in and out needs."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        weights = parameters(shapes, torch.bfloat16)
        masters = [torch.nn.Parameter(p.detach().float()) for p in weights]
        for m in masters:
            m.grad = torch.zeros_like(m)
        opt = DeepSpeedCPUAdam(masters, lr=LR, weight_decay=DECAY, adamw_mode=True)

    def step() -> None:
        for m, p in zip(masters, weights, strict=True):
            m.grad.copy_(p.grad)
        opt.step()
        with torch.no_grad():
            for m, p in zip(masters, weights, strict=True):
                p.copy_(m)

    return step, masters


def torch_masters(shapes: Shapes) -> tuple[Step, list[torch.Tensor]]:
    """PyTorch's fused AdamW over float32 masters, with the same conversions."""
    weights = parameters(shapes, torch.bfloat16)
    masters = [torch.nn.Parameter(p.detach().float()) for p in weights]
    for m in masters:
        m.grad = torch.zeros_like(m)
    opt = torch.optim.AdamW(masters, lr=LR, weight_decay=DECAY, fused=True)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_([m.grad for m in masters], [p.grad for p in weights])
        opt.step()
        torch._foreach_copy_(weights, masters)

    return step, masters


def host(case: str, shapes: Shapes, seconds: float) -> list[dict[str, Any]]:
    """Masters in float32, bfloat16 gradients in, bfloat16 weights out."""
    weights = parameters(shapes, torch.bfloat16)
    opt = fastlr.torch.HostOptimizer(weights, lr=LR, weight_decay=DECAY)
    opt.step()
    masters = [opt.state[p]["master"] for p in weights]
    steps: dict[str, tuple[Step, list[torch.Tensor]]] = {"torch_fused": torch_masters(shapes)}
    found = deepspeed_steps(shapes)
    if found is not None:
        steps["deepspeed"] = found
    ready = checked(steps, 1e-6)
    opt.step()
    for a, b in zip(masters[:8], steps["torch_fused"][1][:8], strict=True):
        if not torch.allclose(a, b.detach(), rtol=0, atol=1e-6):
            raise RuntimeError(f"fastlr and torch_fused do not agree: by {(a - b).abs().max():.3g}")
    what = "AdamW on float32 masters, bfloat16 in and out"
    return measure(case, what, shapes, {"fastlr": opt.step, **ready}, seconds)


def scaling(sizes: list[float], seconds: float) -> list[dict[str, Any]]:
    """The host step of models of several sizes: time per parameter."""
    rows = []
    for size in sizes:
        layers = round(size * 1e9 / (4096 * 4096))
        shapes: Shapes = [(4096, 4096)] * layers
        weights = [torch.nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in shapes]
        for k, p in enumerate(weights):
            p.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(k))
            p.grad = p.detach() * 0.5 + 0.01
        opt = fastlr.torch.HostOptimizer(weights, lr=LR, weight_decay=DECAY)
        rounds = measuring.alternate({"fastlr": partial(measuring.turn, opt.step)}, seconds)
        elements = layers * 4096 * 4096
        held = opt.nbytes + 4 * elements
        p10, p50, p90 = (float(x) for x in np.percentile(np.concatenate(rounds["fastlr"]), [10, 50, 90]))
        row = {"case": "host, larger models", "impl": "fastlr", "n": elements, "tensors": layers, "bytes": held}
        rows.append({**row, "p10_s": p10, "p50_s": p50, "p90_s": p90, "gb_per_s": 28 * elements / p50 / 1e9})
        print(f"{elements:,}: {p50:.4f} s, {p50 / elements * 1e9:.3f} ns a parameter, {held / 1e9:.1f} GB", flush=True)
        del opt, weights, p
        gc.collect()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description="fastlr.torch beside PyTorch and DeepSpeed, on the CPU.")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long to measure each case")
    parser.add_argument("--billion", action="store_true", help="up to a model of a billion parameters (16 GB)")
    parser.add_argument("--dry-run", action="store_true", help="tiny: does the command work?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(fastlr.get_num_threads())
    seconds = 0.05 if args.dry_run else args.seconds
    large = [tuple(-(-d // 16) for d in s) for s in gpt2()] if args.dry_run else gpt2()
    many = [(100,)] * (60 if args.dry_run else 3_000)
    date = datetime.datetime.now().isoformat(timespec="seconds")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    extra = {"deepspeed": importlib.metadata.version("deepspeed")} if importlib.util.find_spec("deepspeed") else {}
    system = {"date": date, "commit": commit, "cpu": cpu_name(), "threads": fastlr.get_num_threads()}
    rows = plain("many small tensors", many, seconds, foreach=True)
    rows += plain("RL network", NETWORK, seconds, foreach=False)
    rows += whole("RL network, whole step", "Adam", NETWORK, seconds)
    rows += plain("GPT-2", large, seconds, foreach=False)
    rows += whole("GPT-2, whole step", "AdamW", large, seconds)
    rows += host("GPT-2 on the host", large, seconds)
    if not args.dry_run:
        rows += scaling([0.1, 0.3, 1.0] if args.billion else [0.1, 0.3], seconds / 2)
    file = args.out / f"torch-{date[:10]}.json"
    found = {"system": {**system, "versions": {**versions(), **extra}}, "rows": rows}
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
