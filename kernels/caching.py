"""Compiled kernels on disk, one file per kernel, named by everything that its machine code depends on.

Numba's own `cache=True` keys a function by its source file's time stamp and a pickle of its closure; an edited rule
that is imported is pickled by name and silently gets the old kernel, and a file cut short raises. Here the key is a
digest of the staged code, the sources of this package, the options, the versions and the processor, so a stale kernel
cannot be found; the file carries a digest of its content, so a damaged one is compiled again; and it is written beside
its place and renamed, so that any number of processes can fill one folder.

What is read is run: it is unpickled, and it is machine code. So it is read only from a folder and a file that belong to
this user or to root, and that nobody else can write to.
"""

import contextlib
import functools
import hashlib
import importlib.resources
import os
import pickle
import platform
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core.serialize import dumps

from .notices import warn_once

_MAGIC = b"fastlr kernel 1\n"
_Kept = TypeVar("_Kept")


class CacheError(Exception):
    """Compiled kernels cannot be kept; the message says why, and what to do."""


def folder() -> Path:
    """Where compiled kernels are kept: `FASTLR_CACHE_DIR`, else under `NUMBA_CACHE_DIR`, else the user's cache.

    Raises:
        CacheError: if none of these is known.
    """
    if own := os.environ.get("FASTLR_CACHE_DIR"):
        return Path(own)
    if numbas := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(numbas) / "fastlr"
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (RuntimeError, KeyError):  # neither HOME nor an entry of the user
        raise CacheError(
            "compiled kernels cannot be kept: this user has no home directory. Set FASTLR_CACHE_DIR to a folder."
        ) from None
    return base / "fastlr"


def problem() -> str | None:
    """Why kernels cannot be kept, as far as can be seen without trying; None if they can."""
    try:
        place = folder()
        _surroundings()
        with contextlib.suppress(FileNotFoundError), _opened(place):
            pass
    except CacheError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be opened ({error.strerror or error})"
    existing = next((p for p in (place, *place.parents) if p.exists()), place)
    return None if os.access(existing, os.W_OK) else "it cannot be written"


@functools.cache
def _surroundings() -> str:
    """What every kernel depends on: this package's code, the versions, the processor."""
    code = [f for f in importlib.resources.files(__package__).iterdir() if f.name.endswith((".py", ".pyc"))]
    if not code:  # in an archive that does not show its files
        raise CacheError(
            "compiled kernels cannot be kept: they depend on the files of fastlr, which cannot be read. Install fastlr "
            "unpacked."
        )
    parts = [f.read_bytes() for f in sorted(code, key=lambda f: f.name)]
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


def _warn(problem: object) -> None:
    warn_once(f"{problem} Until then each new process compiles again, one or two seconds per kernel.")


def _other_writers(status: os.stat_result) -> str | None:
    """Who besides this user and root can write to a file or folder, in words; None if nobody can."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


@contextlib.contextmanager
def _opened(place: Path) -> Iterator[int | None]:
    """The folder of the cache, opened, provided that nobody else can have put anything there.

    The check is made on the open folder, so it does not matter who can rename or replace the folders above it.

    Returns:
        A descriptor; None on Windows, where the folders of users are their own.

    Raises:
        CacheError: if others can write there.
        OSError: if it cannot be opened.
    """
    if os.name != "posix":
        yield None
        return
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if others := _other_writers(os.fstat(descriptor)):
            raise CacheError(
                f"the folder {place} is not used to keep compiled kernels: {others}, and what is in it is run. Set "
                "FASTLR_CACHE_DIR to a folder of your own that nobody else can write to (chmod go-w)."
            )
        yield descriptor
    finally:
        os.close(descriptor)


class Entry:
    """One file of the cache.

    Args:
        name: the start of the file's name, for people.
        content: what the file depends on, besides what `_surroundings` covers.
    """

    def __init__(self, name: str, *content: object) -> None:
        self.file: Path | None = None
        try:
            digest = hashlib.sha256("\0".join([_surroundings(), name, *map(str, content)]).encode()).hexdigest()
            self.file = folder() / f"{name}-{digest[:32]}.kernel"
        except CacheError as error:
            _warn(error)

    def load(self, decode: Callable[[bytes], _Kept]) -> _Kept | None:
        """Load what was written.

        Args:
            decode: turns the bytes back into an object.

        Returns:
            What `decode` returns; None if there is no file, or none that can be used: the caller then makes the object
            and writes it again.
        """
        data = b"" if self.file is None else self._read(self.file)
        head, body = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
        if head != _MAGIC + hashlib.sha256(body).digest():
            return None
        try:
            return decode(body)
        except Exception:  # whatever pickle, Numba and LLVM raise for what they cannot read
            return None

    def _read(self, path: Path) -> bytes:
        try:
            with _opened(path.parent) as inside:
                if inside is None:
                    return path.read_bytes()
                descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=inside)
                with os.fdopen(descriptor, "rb") as file:
                    if _other_writers(os.fstat(descriptor)) is None:
                        return file.read()
        except CacheError as error:
            _warn(error)
        except OSError:
            pass
        return b""

    def write(self, body: bytes) -> None:
        """Write to the file; if its folder cannot be used, warn once and go on."""
        if self.file is None:
            return
        place, temporary = self.file.parent, None
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _opened(place):
                descriptor, temporary = tempfile.mkstemp(dir=place, prefix=self.file.stem, suffix=".part")
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_MAGIC + hashlib.sha256(body).digest() + body)
                os.replace(temporary, self.file)
        except CacheError as error:
            _warn(error)
        except OSError as error:
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)
            reason = error.strerror or error
            _warn(
                f"the folder {place} cannot be used to keep compiled kernels ({reason}). Set FASTLR_CACHE_DIR to a "
                "folder that can be written."
            )


class KernelCache:
    """One kernel for the processor on disk; replaces Numba's own cache of a function.

    Args:
        name: the start of the file's name, for people.
        content: whatever else the machine code depends on.

    Attributes:
        hit: whether the kernel was loaded rather than compiled.
    """

    def __init__(self, name: str, *content: object) -> None:
        self._entry = Entry(name, *content)
        self.cache_path = "" if self._entry.file is None else str(self._entry.file.parent)
        self.hit = False

    def compile(self, function: Any, signature: Any) -> None:
        """Compile a function for one signature, or load it; from then on it takes no other.

        Args:
            function: what `numba.njit` returned. Its private `_cache` is set: Numba has no public way to say where
                compiled code is kept.
            signature: of Numba's types.
        """
        function._cache = self
        function.compile(signature)
        function.disable_compile()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel, or None if none can be used; called by Numba, as the methods that follow."""

        def rebuild(body: bytes) -> Any:
            target_context.refresh()
            return numba.core.compiler.CompileResult._rebuild(target_context, *pickle.loads(body))

        result = self._entry.load(rebuild)
        self.hit = result is not None
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
        if self._entry.file is not None:
            self._entry.file.unlink(missing_ok=True)
