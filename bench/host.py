"""What a step on a GPU costs the host: `python -m bench.host`, on a machine without a GPU.

The real cuda-bindings and everything above them run over a driver that only writes down what it is asked for
(tests/stub_driver.c, built here by the C compiler). A real driver adds some 1.5 us to each launch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import fastlr
from fastlr.bench import measuring
from fastlr.gpu.driver import Gpu

STUB = Path(__file__).parent.parent / "tests" / "stub_driver.c"


def median_us(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Microseconds of one call."""
    rounds = measuring.alternate({"": partial(measuring.turn, call)}, seconds)
    return float(np.median(np.concatenate(rounds[""]))) * 1e6


def measure() -> dict[str, float]:
    """Microseconds of the host by what is done."""
    import ctypes

    from fastlr.options import EXAMPLES

    ctypes.CDLL("libcuda.so.1").stub_parameters(3)

    def tree(leaves: int) -> Any:
        return fastlr.flatten({f"w{k}": np.ones(1000, np.float32) for k in range(leaves)}, device="cuda")

    out = {}
    params, grads = tree(10), tree(10)
    opt = fastlr.Adam(params)
    opt.step(grads)
    with mock.patch.object(Gpu, "launch", autospec=True, side_effect=Gpu.launch) as launch:
        opt.step(grads)
    arguments = launch.call_args.args
    out["one launch"] = median_us(lambda: Gpu.launch(*arguments))
    out["plain step, 1 launch"] = median_us(lambda: opt.step(grads))
    settings = {name: EXAMPLES[name] for name in ("clip_norm", "skip_nonfinite", "ema", "shadow")}
    whole = fastlr.AdamW(tree(10), **settings)
    whole.step(grads)
    out["full step, 3 launches"] = median_us(lambda: whole.step(grads))
    many = fastlr.Adam(tree(148).unflatten())
    given = [tree(148).unflatten() for _ in range(2)]
    many.step(given[0])
    out["148 arrays, the same gradients"] = median_us(lambda: many.step(given[0]))
    turn = iter(range(1 << 60))
    out["148 arrays, other gradients each time"] = median_us(lambda: many.step(given[next(turn) % 2]))
    return out


def main() -> int:
    """Build the stub, start again with it, print."""
    if os.environ.get("FASTLR_STUB_DRIVER"):
        for what, us in measure().items():
            print(f"{us:8.1f} us  {what}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = ["cc", "-shared", "-fPIC", "-w", "-O1", "-o", f"{folder}/libcuda.so.1", str(STUB), "-ldl"]
        subprocess.run(command, check=True)
        env = {**os.environ, "LD_LIBRARY_PATH": folder, "FASTLR_STUB_DRIVER": "1"}
        return subprocess.run([sys.executable, "-m", "bench.host"], env=env, cwd=STUB.parent.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
