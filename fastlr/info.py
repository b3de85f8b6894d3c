"""What `fastlr info` prints: versions, processor, threads, cache, GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import numba
import numpy as np

from ._version import __version__
from .gpu import driver as devices
from .kernels import caching
from .step import threads

__all__ = ["cpu_name", "describe", "versions"]


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what a step depends on or is compared with."""
    out = {
        "fastlr": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }
    for name in ("llvmlite", "torch", "jax", "optax", "numba-cuda"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _vector_width() -> str:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    for name, width in (
        ("avx512f", "512 bits (AVX-512)"),
        ("avx2", "256 bits (AVX2)"),
        ("sse2", "128 bits (SSE2)"),
        ("neon", "128 bits (NEON)"),
    ):
        if features.get(name):
            return width
    return "unknown"


def _cache() -> str:
    problem = caching.problem()
    unused = "" if problem is None else f"; not used, kernels are compiled in each process: {problem}"
    try:
        folder = caching.folder()
    except caching.CacheError:
        return f"none{unused}"
    try:
        sizes = [k.stat().st_size for k in folder.glob("*.kernel")]
    except OSError:
        sizes = []
    return f"{folder} ({len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB){unused}"


def _gpu() -> str:
    missing = devices.problem()
    if missing is not None:
        return f"none: {missing}"
    return ", ".join(repr(devices.gpu(k)) for k in range(devices.count()))


def describe() -> dict[str, str]:
    """What `fastlr info` prints, by name."""
    return {
        **versions(),
        "cpu": cpu_name(),
        "vector width": _vector_width(),
        "threads": f"{threads.get_num_threads()} of {os.cpu_count()} CPUs",
        "threading layer": "fastlr's own helper threads, independent of Numba's layers",
        "kernel cache": _cache(),
        "gpu": _gpu(),
    }
