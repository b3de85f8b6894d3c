"""What tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import pytest

# The suite's own cache of compiled kernels: a run never depends on what an earlier one left, unless asked to.
os.environ.setdefault("FASTLR_CACHE_DIR", tempfile.mkdtemp(prefix="fastlr-test-"))


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20260101)


@pytest.fixture
def in_subprocess() -> Callable[..., str]:
    """Run a program in a process of its own; its output. Fails if it does not end well, or in time."""

    def run(program: str, timeout: float = 240, **environment: str) -> str:
        env = {**os.environ, **environment}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run
