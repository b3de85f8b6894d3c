"""Compiled kernels on disk, one file per kernel, named by everything that its machine code depends on.

Numba's own `cache=True` keys a function by its source file's time stamp and a pickle of its closure; an edited rule
that is imported is pickled by name and silently gets the old kernel, and a file cut short raises. Here the key is a
digest of the staged code, the sources of this package, the options, the versions and the processor, so a stale kernel
cannot be found; the file carries a digest of its content, so a damaged one is compiled again; and it is written beside
its place and renamed, so that any number of processes can fill one folder.
"""

import functools
import hashlib
import os
import pickle
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core.serialize import dumps

_MAGIC = b"fastlr kernel 1\n"


def folder() -> Path:
    """Where compiled kernels are kept: `FASTLR_CACHE_DIR`, else under `NUMBA_CACHE_DIR`, else the user's cache."""
    if own := os.environ.get("FASTLR_CACHE_DIR"):
        return Path(own)
    if numbas := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(numbas) / "fastlr"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastlr"


@functools.cache
def _surroundings() -> str:
    """What every kernel depends on: this package's sources, the versions, the processor."""
    parts = [p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))]
    parts += [
        repr(x).encode()
        for x in (
            sys.version_info[:3],
            sys.implementation.cache_tag,
            numba.__version__,
            llvmlite.__version__,
            np.__version__,
            platform.machine(),
            numba.config.CPU_NAME or llvm.get_host_cpu_name(),
            numba.config.CPU_FEATURES or llvm.get_host_cpu_features().flatten(),
            numba.config.OPT,
        )
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@functools.cache
def _warn_once(place: str, problem: str) -> None:
    warnings.warn(
        f"the folder {place} cannot be used to keep compiled kernels ({problem}): each new process compiles again, "
        "one or two seconds per kernel. Set FASTLR_CACHE_DIR to a folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )


class Entry:
    """One file of the cache.

    Args:
        name: the start of its name, for people.
        content: what its content depends on, beside this package's sources and what `_surroundings` says.
    """

    def __init__(self, name: str, *content: object) -> None:
        digest = hashlib.sha256("\0".join([_surroundings(), name, *map(str, content)]).encode()).hexdigest()
        self.file = folder() / f"{name}-{digest[:32]}.kernel"

    def read(self) -> bytes | None:
        """What was kept, or None if there is nothing that can be used."""
        try:
            data = self.file.read_bytes()
        except OSError:
            return None
        head, body = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
        return body if head == _MAGIC + hashlib.sha256(body).digest() else None

    def write(self, body: bytes) -> None:
        """Keep something; without a folder to keep it in, warn once and go on."""
        temporary = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, temporary = tempfile.mkstemp(dir=self.file.parent, prefix=self.file.stem, suffix=".part")
            with os.fdopen(descriptor, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(temporary, self.file)
        except OSError as error:
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)
            _warn_once(str(self.file.parent), error.strerror or str(error))


class KernelCache:
    """The place of one kernel for the processor on disk; takes the place of Numba's cache on a dispatcher.

    Args:
        name: the start of the file's name, for people.
        content: whatever else the machine code depends on.
    """

    def __init__(self, name: str, *content: object) -> None:
        self._entry = Entry(name, *content)
        self.cache_path = str(self._entry.file.parent)
        self.hit = False

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel, or None if there is none that can be used."""
        body = self._entry.read()
        if body is None:
            return None
        target_context.refresh()
        result = numba.core.compiler.CompileResult._rebuild(target_context, *pickle.loads(body))
        self.hit = True
        return result

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled kernel."""
        self._entry.write(dumps(data._reduce()))

    def enable(self) -> None:
        """Part of Numba's interface; a kernel's cache is always on."""

    def disable(self) -> None:
        """Part of Numba's interface; a kernel's cache is always on."""

    def flush(self) -> None:
        """Remove the kernel from disk."""
        self._entry.file.unlink(missing_ok=True)
