"""Everything that needs a GPU, in one command: the tests, then the numbers, written to bench/results as JSON.

`python -m bench.gpu` is meant to take less than eight minutes, `--quick` a fraction of it. Needs PyTorch with CUDA;
CuPy, JAX and Optax are compared with where they are installed. Candidates alternate round by round, on random numbers,
between events of the GPU; the bandwidth of a copy is measured in the same run. Candidates are checked before they are
timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastlr
import fastlr.torch
from fastlr.arrays import places
from fastlr.bench import measuring
from fastlr.bench.steps import DECAY, EMA, FULL, LIMIT, LR
from fastlr.gpu.kernels import StepKernels
from fastlr.info import versions
from fastlr.kernels import grid

from .models import MODELS

ROOT = Path(__file__).parent.parent
ADAM_BYTES, FULL_BYTES = 28, FULL.moved
Step = Callable[[], Any]


class Lab:
    """The machine to measure on.

    Args:
        dry: go through everything with tiny arrays of the host on an emulated device, to see that it runs.
        seconds: about how long to measure each line.
    """

    def __init__(self, dry: bool, seconds: float) -> None:
        import torch

        self.torch, self.dry, self.seconds = torch, dry, 0.01 if dry else seconds
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.rows: list[dict[str, Any]] = []

    def random(self, *shape: int) -> Any:
        """Small random numbers, never zeros: roots and divisions of zeros take another path."""
        return self.torch.randn(*shape, device=self.device) * 0.02

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if not self.dry:
            self.torch.cuda.synchronize()

    def batch(self, step: Step, count: int, before: Step | None = None) -> float:
        """Seconds that one of `count` steps takes: in a row, or each by itself after what is not timed."""
        if before is not None:
            return sum(self._after(before, step) for _ in range(count)) / count
        if self.dry:
            began = time.perf_counter()
            for _ in range(count):
                step()
            return (time.perf_counter() - began) / count
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / count

    def _after(self, before: Step, step: Step) -> float:
        before()
        return self.batch(step, 1)

    def alternate(self, candidates: dict[str, Step], before: dict[str, Step] | None = None) -> dict[str, list[float]]:
        """Seconds of a step of each candidate, round by round.

        Args:
            candidates: by name.
            before: what is done before each step, outside of its time, by the candidate's name.
        """
        counts, first = {}, before or {}
        for name, step in candidates.items():
            self.batch(step, 3, first.get(name))
            self.synchronize()
            counts[name] = max(1, min(1000, int(2e-3 / max(1e-7, self.batch(step, 3, first.get(name))))))

        def turn(name: str, step: Step) -> list[float]:
            if name in first:
                first[name]()
            step()
            return [self.batch(step, 1 if self.dry else counts[name], first.get(name))]

        rounds = measuring.alternate(
            {name: partial(turn, name, step) for name, step in candidates.items()}, self.seconds
        )
        return {name: list(itertools.chain(*times)) for name, times in rounds.items()}

    def measure(
        self,
        mode: str,
        n: int,
        leaves: int,
        bytes_per: dict[str, float],
        candidates: dict[str, Step],
        before: dict[str, Step] | None = None,
    ) -> None:
        """Measure candidates and keep a row for each.

        Args:
            mode: of the step.
            n: number of parameters.
            leaves: in how many arrays.
            bytes_per: bytes that a candidate moves per parameter, by name; the default under "".
            candidates: by name.
            before: as in `alternate`.
        """
        for name, times in self.alternate(candidates, before).items():
            low, middle, high = np.percentile(times, [20, 50, 80])
            moved = bytes_per.get(name, bytes_per[""]) * n
            self.rows.append(
                {
                    "impl": name,
                    "mode": mode,
                    "n": n,
                    "leaves": leaves,
                    "p20_s": low,
                    "p50_s": middle,
                    "p80_s": high,
                    "rounds": len(times),
                    "bytes": moved,
                    "gb_per_s": moved / middle * 1e-9,
                }
            )
            print(
                f"{mode:12} {n:>13,} in {leaves:>4} {name:24} {middle * 1e6:12.1f} us {moved / middle * 1e-9:8.0f} GB/s"
            )

    def free(self) -> None:
        """Give memory back between measurements."""
        if not self.dry:
            self.torch.cuda.empty_cache()


# Candidates. Each returns a step and a function that gives the parameters as one array, for the check.


def fastlr_step(
    lab: Lab, params: list[Any], grads: list[Any], make: Any, **settings: Any
) -> tuple[Step, Callable[[], Any]]:
    """Fastlr over separate tensors, or over one."""
    own = [p.clone() for p in params]
    whole = len(own) == 1
    opt = make(own[0] if whole else own, **settings)
    given = grads[0] if whole else list(grads)
    return (lambda: opt.step(given)), lambda: lab.torch.cat([p.reshape(-1) for p in own])


def fastlr_flat(
    lab: Lab, params: list[Any], grads: list[Any], make: Any, **settings: Any
) -> tuple[Step, Callable[[], Any]]:
    """Fastlr over one flat buffer of many leaves, with the gradients in another."""
    buffer = fastlr.flatten(params)
    opt = make(buffer, **settings)
    opt.grads.data.copy_(lab.torch.cat([g.reshape(-1) for g in grads]))
    return opt.step, lambda: buffer.data


def fastlr_graph(
    lab: Lab, params: list[Any], grads: list[Any], make: Any, **settings: Any
) -> tuple[Step, Callable[[], Any]]:
    """The same as a graph that is replayed."""
    torch = lab.torch
    own = [p.clone() for p in params]
    opt = make(own, capturable=True, **settings)
    before = opt.snapshot()
    with torch.cuda.stream(torch.cuda.Stream()):
        opt.step(grads)  # compiles, loads
    torch.cuda.synchronize()
    opt.restore(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step(grads)
    return graph.replay, lambda: torch.cat([p.reshape(-1) for p in own])


def torch_adam(
    lab: Lab, params: list[Any], grads: list[Any], make: Any = None, **how: Any
) -> tuple[Step, Callable[[], Any]]:
    """PyTorch's Adam, or another optimizer of its kind."""
    own = [p.clone().requires_grad_() for p in params]
    for p, g in zip(own, grads, strict=True):
        p.grad = g.clone()
    opt = (make or lab.torch.optim.Adam)(own, lr=LR, **how)
    return opt.step, lambda: lab.torch.cat([p.detach().reshape(-1) for p in own])


def torch_full(lab: Lab, params: list[Any], grads: list[Any]) -> tuple[Step, Callable[[], Any], Step]:
    """The whole step as PyTorch's best separate calls; the third writes the gradient that a step clears."""
    torch = lab.torch
    own = [p.clone().requires_grad_() for p in params]
    for p, g in zip(own, grads, strict=True):
        p.grad = g.clone()
    held = [p.grad for p in own]
    opt = torch.optim.AdamW(own, lr=LR, weight_decay=DECAY, fused=True)
    data = [p.detach() for p in own]
    average, copy = [p.clone() for p in data], [p.bfloat16() for p in data]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(own, LIMIT, foreach=True)
        opt.step()
        torch._foreach_lerp_(average, data, 1 - EMA)
        torch._foreach_copy_(copy, data)
        torch._foreach_zero_(held)

    return step, lambda: torch.cat([p.reshape(-1) for p in data]), lambda: torch._foreach_copy_(held, grads)


def fastlr_full(lab: Lab, params: list[Any], grads: list[Any]) -> tuple[Step, Callable[[], Any], Step]:
    """The whole step over one flat buffer; the third writes the gradient that a step clears."""
    buffer = fastlr.flatten(params)
    opt = fastlr.AdamW(buffer, **{**FULL.settings, "lr": LR})
    given = lab.torch.cat([g.reshape(-1) for g in grads])
    return opt.step, lambda: buffer.data, lambda: opt.grads.data.copy_(given)


def cupy_adam(lab: Lab, params: list[Any], grads: list[Any]) -> tuple[Step, Callable[[], Any]] | None:
    """One elementwise kernel, as a user of CuPy writes it."""
    if lab.dry or importlib.util.find_spec("cupy") is None or len(params) > 1:
        return None
    import cupy

    p, g = cupy.asarray(params[0].clone()), cupy.asarray(grads[0])
    m, v = cupy.zeros_like(p), cupy.zeros_like(p)
    kernel = cupy.ElementwiseKernel(
        "float32 g, float32 c1, float32 c2",
        "float32 p, float32 m, float32 v",
        "m = 0.9f * m + 0.1f * g; v = 0.999f * v + 0.001f * g * g; p -= 1e-3f * m * c1 / (sqrtf(v * c2) + 1e-8f);",
        "adam",
    )
    count = iter(range(1, 1 << 62))

    def step() -> None:
        t = next(count)
        with cupy.cuda.ExternalStream(lab.torch.cuda.current_stream().cuda_stream):
            kernel(g, np.float32(1 / (1 - 0.9**t)), np.float32(1 / (1 - 0.999**t)), p, m, v)

    return step, lambda: lab.torch.as_tensor(p, device="cuda").reshape(-1)


def optax_adam(lab: Lab, params: list[Any], grads: list[Any]) -> tuple[Step, Callable[[], Any]] | None:
    """Optax under jit with donated buffers; each step is waited for, since JAX has streams of its own."""
    if lab.dry or importlib.util.find_spec("optax") is None or importlib.util.find_spec("jax") is None:
        return None
    import jax
    import optax

    if jax.default_backend() != "gpu":
        return None
    tree = [jax.numpy.asarray(p.cpu().numpy()) for p in params]
    given = [jax.numpy.asarray(g.cpu().numpy()) for g in grads]
    rule = optax.adam(LR)
    held = [tree, rule.init(tree)]

    def one(tree: Any, state: Any, given: Any) -> Any:
        change, state = rule.update(given, state, tree)
        return optax.apply_updates(tree, change), state

    jitted = jax.jit(one, donate_argnums=(0, 1))

    def step() -> None:
        held[0], held[1] = jitted(held[0], held[1], given)
        jax.block_until_ready(held[0])

    return step, lambda: lab.torch.from_numpy(np.concatenate([np.asarray(x).reshape(-1) for x in held[0]])).cuda()


def checked(
    made: dict[str, tuple[Step, Callable[[], Any]] | None], before: dict[str, Step] | None = None
) -> dict[str, Step]:
    """The candidates that are there, after three steps in which they must agree with the first.

    Args:
        made: by name; None for what is not installed.
        before: what is done before each step, by name.

    Raises:
        RuntimeError: if one does not: fastlr's own to the bit, others within rounding.
    """
    there = {name: one for name, one in made.items() if one is not None}
    reference = None
    for name, (step, params) in there.items():
        for _ in range(3):
            if before is not None:
                before[name]()
            step()
        found = params().float()
        if reference is None:
            reference = found.clone()
            continue
        difference = float((found - reference).abs().max())
        if difference > (0.0 if name.startswith("fastlr") else 2e-5):
            raise RuntimeError(f"{name} does not agree with fastlr: by {difference:.3g}.")
    return {name: step for name, (step, _) in there.items()}


# What is measured.


def copies(lab: Lab, n: int) -> None:
    """The copy bandwidth of the GPU, of as many bytes as a step of `n` parameters moves."""
    source = lab.random(n * ADAM_BYTES // 8)
    target = lab.torch.empty_like(source)
    lab.measure("copy", n, 1, {"": ADAM_BYTES}, {"copy": lambda: target.copy_(source)})


def plain(lab: Lab, n: int, everybody: bool) -> None:
    """Adam over one flat tensor."""
    params, grads = [lab.random(n)], [lab.random(n)]
    made = {
        "fastlr": fastlr_step(lab, params, grads, fastlr.Adam),
        "torch_fused": torch_adam(lab, params, grads, fused=True),
    }
    if n <= 100_000 and not lab.dry:
        made["fastlr_graph"] = fastlr_graph(lab, params, grads, fastlr.Adam)
    if everybody:
        made["torch_foreach"] = torch_adam(lab, params, grads, foreach=True)
        made["cupy"] = cupy_adam(lab, params, grads)
        made["optax"] = optax_adam(lab, params, grads)
    lab.measure("adam", n, 1, {"": ADAM_BYTES}, checked(made))


def model(lab: Lab, name: str, shapes: list[tuple[int, ...]]) -> None:
    """Adam over the tensors of a model: as they are, and as one flat buffer."""
    params, grads = ([lab.random(*s) for s in shapes] for _ in range(2))
    n = sum(p.numel() for p in params)
    made = {
        "fastlr": fastlr_step(lab, params, grads, fastlr.Adam),
        "fastlr_flat": fastlr_flat(lab, params, grads, fastlr.Adam),
        "fastlr_torch": torch_adam(lab, params, grads, fastlr.torch.Adam),
        "torch_fused": torch_adam(lab, params, grads, fused=True),
        "torch_foreach": torch_adam(lab, params, grads, foreach=True),
        "optax": optax_adam(lab, params, grads),
    }
    lab.measure(f"adam {name}", n, len(shapes), {"": ADAM_BYTES}, checked(made))


def whole(lab: Lab, mode: str, shapes: list[tuple[int, ...]]) -> None:
    """The full step: clip, AdamW, average, bfloat16 copy, clear."""
    params, grads = ([lab.random(*s) for s in shapes] for _ in range(2))
    n = sum(p.numel() for p in params)
    made = {"fastlr_flat": fastlr_full(lab, params, grads), "torch_calls": torch_full(lab, params, grads)}
    before = {name: write for name, (_, _, write) in made.items()}
    candidates = checked({name: (step, found) for name, (step, found, _) in made.items()}, before)
    lab.measure(mode, n, len(shapes), {"": FULL_BYTES}, candidates, before)


def tuning(lab: Lab, n: int) -> list[dict[str, Any]]:
    """How the time depends on what does not change the result."""
    p, g = lab.random(n), lab.random(n)
    opt = fastlr.Adam(p)
    opt.step(g)
    stepper = opt._stepper
    kernels = stepper.prepare(g).kernel
    candidates, described = {}, {}
    for threads in (128, 256, 512):
        for vectors in (1, 2, 4):
            for load, store in ((".L1::no_allocate", ""), ("", ""), (".cs", ".cs"), (".L1::no_allocate", ".cs")):
                if vectors > 1 and threads == 512:
                    continue
                chosen = grid.Tuning(threads=threads, vectors=vectors, load=load, store=store)
                other = StepKernels(kernels.device, kernels.staged, kernels.storage, chosen)
                name = f"{threads} threads, {vectors} vectors, load{load or ' plain'}, store{store or ' plain'}"

                def step(other: StepKernels = other) -> None:
                    stepper.run(stepper.prepare(g)._replace(kernel=other))

                candidates[name], described[name] = step, chosen.__dict__
                if lab.dry:
                    break
    times = lab.alternate(candidates)
    rows = [{"tuning": described[k], "n": n, "p50_s": float(np.median(t))} for k, t in times.items()]
    rows.sort(key=lambda r: r["p50_s"])
    for row in rows[:5]:
        print(f"{row['p50_s'] * 1e6:10.1f} us {row['tuning']}")
    return rows


def profile(lab: Lab, n: int) -> list[dict[str, Any]]:
    """The time of each kernel of a full step, from PyTorch's profiler."""
    if lab.dry:
        return []
    torch = lab.torch
    step, _, write = fastlr_full(lab, [lab.random(n)], [lab.random(n)])
    write(), step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(10):
            write(), step()
        torch.cuda.synchronize()
    found = []
    for event in seen.key_averages():
        name = re.search(r"(finish|measure_\d|update_few|update)", event.key)
        spent = getattr(event, "device_time", None) or getattr(event, "cuda_time", 0)
        found.append({"kernel": name[1] if name else event.key[:60], "calls": event.count, "mean_us": spent, "n": n})
        print(found[-1])
    return found


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Tensors of the host as if they were on a GPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    import emulation
    import torch

    from fastlr.gpu import arrays as device_arrays

    class Tensors(device_arrays._Torch):
        def stream(self) -> int:
            return 0

    place = Tensors(emulation.DEVICES[0], torch.device("cpu"))
    places.FINDERS.insert(0, lambda leaf: place if isinstance(leaf, torch.Tensor) else None)
    try:
        yield
    finally:
        places.FINDERS.pop(0)


def run_tests() -> dict[str, Any]:
    """The tests that need a GPU."""
    # Nothing of the suite's settings: the plugins that they name need not be there.
    plain = ["-q", "-rs", "-W", "default", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *plain, str(ROOT / "tests" / "test_gpu.py")]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    return {
        "passed": done.returncode == 0,
        "summary": done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "",
        "seconds": time.perf_counter() - began,
    }


def system(lab: Lab) -> dict[str, Any]:
    """What was measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    out: dict[str, Any] = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit}
    out["versions"] = {**versions(), "cuda": lab.torch.version.cuda}
    if lab.dry:
        return {**out, "gpu": "none: emulated", "driver": ""}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return {**out, "gpu": lab.torch.cuda.get_device_name(0), "driver": driver[0] if driver else ""}


def main(argv: list[str] | None = None) -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description="The tests and numbers that need a GPU.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, no tuning")
    parser.add_argument("--skip-tests", action="store_true", help="the numbers alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on an emulated device: does the command work?")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long to measure each line")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
    args = parser.parse_args(argv)
    toolkit = Path("/usr/local/cuda")
    if toolkit.exists():  # where libNVVM is if it did not come as a package
        os.environ.setdefault("CUDA_HOME", str(toolkit))
    lab = Lab(args.dry_run, args.seconds)
    found: dict[str, Any] = {"system": system(lab)}
    print(json.dumps(found["system"], indent=1))
    if not (args.skip_tests or args.dry_run):
        found["tests"] = run_tests()
    name = re.sub(r"\W+", "-", found["system"]["gpu"]).strip("-").lower()
    file = args.out / f"gpu-{found['system']['date'][:10]}-{name}.json"

    def keep() -> None:
        found["rows"] = lab.rows
        file.write_text(json.dumps(found, indent=1) + "\n")

    sizes = [1_000, 10_000, 1_000_000, 16_000_000, 256_000_000, 1_000_000_000]
    if args.quick:
        sizes = [10_000, 16_000_000, 256_000_000]
    if args.dry_run:
        sizes = [1_000]
    total = 0 if lab.dry else lab.torch.cuda.mem_get_info()[1]
    models = {k: make() for k, make in MODELS.items()}
    if args.dry_run:
        models = {k: [tuple(max(1, math.isqrt(d) // 8) for d in s) for s in v] for k, v in models.items()}
    with emulated() if args.dry_run else contextlib.nullcontext():
        for n in sizes:
            if not lab.dry and 2.5 * 16 * n > total:
                print(f"{n:,} parameters: too many for {total:,} bytes")
                continue
            copies(lab, n)
            plain(lab, n, everybody=5 * 16 * n < total or lab.dry)
            lab.free()
            keep()
        for label, shapes in models.items():
            model(lab, label, shapes)
            lab.free()
            whole(lab, f"full {label}", shapes)
            lab.free()
            keep()
        for n in sizes[-1:] if args.dry_run else [10_000, 256_000_000]:
            whole(lab, "full", [(n,)])
            lab.free()
        keep()
        found["profile"] = profile(lab, 256_000_000)
        keep()
        if not args.quick:
            found["tuning"] = tuning(lab, 1_000 if args.dry_run else 256_000_000)
            keep()
    print(f"written to {file}")
    return 0 if found.get("tests", {"passed": True})["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
