"""Files of named arrays: .npz and .safetensors, written member by member and read with no trust in what they say."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from . import checks

try:
    import fcntl
except ImportError:  # Windows, where a file that somebody has open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

__all__ = ["DTYPES", "Archive", "Member", "member_name", "reading", "write"]

Fits = Callable[[np.dtype, tuple[int, ...], int], None]


class Member(NamedTuple):
    """An array of a file.

    Attributes:
        name: as `member_name` has it.
        shape, dtype: of the array.
        get: returns the array, when its turn to be written has come.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[], np.ndarray]


# What a name in a file cannot hold: NUL, at which zip cuts it; backslashes, which zip makes slashes on Windows; half a
# surrogate pair, which is no UTF-8; an ending that np.load takes for its own; what safetensors keeps for itself; and
# what would look like one of these escapes.
_ODD = re.compile(r"[\0\\\ud800-\udfff]|\.(?=npy\Z)|\A_(?=_metadata__\Z)|%(?=[0-9A-F]{2}|u[0-9A-F]{4})")
_LONGEST_NAME = 65_000  # bytes; zip has room for 65,535


def member_name(key: str) -> str:
    """The name that stands for a key in a file: the key itself, but for characters that a file cannot hold.

    Raises:
        ValueError: if it is too long.
    """

    def escape(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"%{code:02X}" if code < 256 else f"%u{code:04X}"

    name = _ODD.sub(escape, key)
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"the name {key[:60]!r}... is too long for a file. Give the parameters shorter names.")
    return name


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _span(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


# Writing


def _write_npz(file: BinaryIO, members: Sequence[Member]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for member in members:
            array = np.ascontiguousarray(member.get()).reshape(member.shape)
            info = zipfile.ZipInfo(f"{member.name}.npy")
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            with archive.open(info, "w", force_zip64=True) as into:
                np.lib.format.write_array_header_1_0(into, np.lib.format.header_data_from_array_1_0(array))
                into.write(_bytes_of(array))


# The numbers that a file can hold, by the names that safetensors has for them.
DTYPES = {
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    "BOOL": np.dtype("?"),
}
_LONGEST_HEADER = 100_000_000  # as the package safetensors has it


def _write_safetensors(file: BinaryIO, members: Sequence[Member]) -> None:
    members = sorted(members, key=lambda m: -m.dtype.itemsize)  # so that each stands at a multiple of its size
    called = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"crc32": "0" * 8 * len(members)}}
    end = 0
    for member in members:
        begin, end = end, end + _span(member.shape, member.dtype)
        dtype = called[member.dtype.newbyteorder("<")]
        header[member.name] = {"dtype": dtype, "shape": list(member.shape), "data_offsets": [begin, end]}

    def text(sums: str) -> bytes:
        header["__metadata__"]["crc32"] = sums
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        return len(packed).to_bytes(8, "little") + packed

    file.write(text("0" * 8 * len(members)))
    sums = {}
    for member in members:
        array = np.ascontiguousarray(member.get(), member.dtype.newbyteorder("<"))
        sums[member.name] = _sum(member.name, member.dtype, member.shape, _bytes_of(array))
        file.write(_bytes_of(array))
    file.seek(0)
    file.write(text("".join(f"{sums[name]:08x}" for name in sorted(sums))))


def _sum(name: str, dtype: np.dtype, shape: tuple[int, ...], data: memoryview) -> int:
    """What tells whether an array or what the header says of it has been damaged, which the format itself does not."""
    return zlib.crc32(data, zlib.crc32(f"{name} {dtype.str} {shape}".encode()))


def _form(path: Path) -> str:
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{checks.shown(str(path))} must end in .npz or .safetensors.")
    return path.suffix


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside another, which takes its place once it is whole and on the disk; it gets the other's mode."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        mode = None
    _remove_left_over(path)
    temporary, descriptor = _beside(path, 0o666 if mode is None else mode | stat.S_IWUSR)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            if mode is not None:
                os.chmod(temporary, mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the rename itself is in the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _beside(path: Path, mode: int) -> tuple[Path, int]:
    """A new file with a name of its own, and a lock on it for as long as it is open, by which others see that we live.

    The system takes what the umask forbids from the mode, as for every file.
    """
    while True:
        temporary = path.parent / f".{path.name}.fastlr-{secrets.token_hex(4)}.part"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        if fcntl is None:
            return temporary, descriptor
        with contextlib.suppress(OSError):  # a file system that knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # nobody has removed it before there was a lock
            return temporary, descriptor
        os.close(descriptor)


def _remove_left_over(path: Path) -> None:
    """Remove the files beside a path that were left by processes which died while writing it."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.fastlr-[0-9a-f]{{8}}\.part")
    for entry in path.parent.iterdir():
        if ours.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                if fcntl is None:
                    entry.unlink()  # which Windows refuses while somebody has it open
                else:
                    with open(entry, "r+b") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        entry.unlink()


def write(members: Sequence[Member], path: str | os.PathLike[str]) -> None:
    """Write arrays to a file beside its place, flush it to the disk, then rename it.

    Args:
        members: the arrays, of different names.
        path: ends in ".npz" or ".safetensors"; a link is followed.
    """
    save = _write_npz if _form(Path(path)) == ".npz" else _write_safetensors
    with _replacing(Path(os.path.realpath(path))) as file:
        save(file, members)


# Reading


class Archive(Protocol):
    """A file that is being read: only what is asked for is read, and it is checked before there is memory for it."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a member of this name."""

    def array(self, name: str, fits: Fits) -> np.ndarray:
        """A member.

        Args:
            name: which.
            fits: is called with dtype, shape and the bytes that the file holds for it, and raises if they are not as
                they should be; only then the member is read.
        """


class _DamagedError(Exception):
    """What a file says of itself does not hold."""


_CHUNK = 1 << 20


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


class _Npz:
    """A zip file of .npy files."""

    def __init__(self, file: BinaryIO) -> None:
        self._size, self._zip = _size(file), zipfile.ZipFile(file)
        self._members = {info.filename: info for info in self._zip.infolist()}
        if len(self._members) != len(self._zip.infolist()):
            raise _DamagedError("two members have one name")

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._members

    def array(self, name: str, fits: Fits) -> np.ndarray:
        info = self._members[f"{name}.npy"]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.compress_size > self._size:
            raise _DamagedError(f"{name} is compressed in another way than NumPy's")
        with self._zip.open(info) as member:
            length, dtype, shape, transposed = _npy_header(member)
            nbytes = _span(shape, dtype)
            fits(dtype, shape, info.compress_size - length if info.compress_type == zipfile.ZIP_STORED else 0)
            if info.file_size != length + nbytes:
                raise _DamagedError(f"{name} has another length than its header says")
            array = np.empty(shape[::-1] if transposed else shape, dtype)
            into = _bytes_of(array)
            for first in range(0, nbytes, _CHUNK):
                part = member.read(min(_CHUNK, nbytes - first))
                into[first : first + len(part)] = part
                if len(part) != min(_CHUNK, nbytes - first):
                    raise _DamagedError(f"{name} is cut short")
            member.read(1)  # at the end the sum is checked, of an empty member too
        return array.T if transposed else array


_NPY = re.compile(
    rb"\{'descr': '([<>|=][a-z]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}, ?)*\d{0,19})\), \} *\n"
)


def _npy_header(member: Any) -> tuple[int, np.dtype, tuple[int, ...], bool]:
    """The length of the header of a .npy file, and what it says; nothing in it is evaluated."""
    start = member.read(8)
    size = {1: 2, 2: 4, 3: 4}.get(start[6] if len(start) == 8 and start.startswith(b"\x93NUMPY") else 0)
    length = int.from_bytes(member.read(size), "little") if size else 0
    found = _NPY.fullmatch(member.read(length)) if 0 < length <= 10_000 else None
    if size is None or found is None:
        raise _DamagedError(f"{member.name} is no array of numbers")
    shape = tuple(int(n) for n in found[3].decode().replace(" ", "").split(",") if n)
    return 8 + size + length, np.dtype(found[1].decode()), shape, found[2] == b"True"


class _Safetensors:
    """A header in JSON and the arrays, one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_size(file) - 8, _LONGEST_HEADER):
            raise _DamagedError("its header is longer than the file")
        header = json.loads(file.read(length).decode())
        self._file, self._first = file, 8 + length
        metadata = header.pop("__metadata__", {})
        self._members: dict[str, tuple[np.dtype, tuple[int, ...], int, int]] = {}
        for name, entry in header.items():
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or end - begin != _span(shape, dtype):
                raise _DamagedError(f"{name!r} has another length than its shape says")
            self._members[name] = dtype, tuple(shape), begin, end
        order = sorted(self._members, key=lambda name: self._members[name][2:])
        ends = [0, *(self._members[name][3] for name in order)]
        if [self._members[name][2] for name in order] != ends[:-1] or ends[-1] != _size(file) - self._first:
            raise _DamagedError("its arrays do not follow one another to the end of the file")
        # Files of the package safetensors have no sums; ours have something as long even if its key is damaged.
        sums = metadata.get("crc32", next((text for text in metadata.values() if len(text) >= 8 * len(order)), ""))
        if sums and not re.fullmatch(rf"[0-9a-f]{{{8 * len(order)}}}", sums):
            raise _DamagedError("its sums are damaged")
        self._sums = {n: int(sums[8 * k : 8 * k + 8], 16) for k, n in enumerate(sorted(order))} if sums else {}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def array(self, name: str, fits: Fits) -> np.ndarray:
        dtype, shape, begin, end = self._members[name]
        fits(dtype, shape, end - begin)
        array = np.empty(shape, dtype)
        into = _bytes_of(array)
        self._file.seek(self._first + begin)
        if self._file.readinto(into) != end - begin:  # type: ignore[attr-defined]
            raise _DamagedError(f"{name!r} is cut short")
        if name in self._sums and _sum(name, dtype, shape, into) != self._sums[name]:
            raise _DamagedError(f"the sum of {name!r} is another one")
        return array if sys.byteorder == "little" else array.astype(dtype.newbyteorder("="))


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """A file that `write` wrote, or NumPy, or the package safetensors.

    Raises:
        ValueError: if it is cut short or something else, also while it is read.
    """
    form = _form(Path(path))
    kind, made_by = (_Npz, "file written by fastlr") if form == ".npz" else (_Safetensors, ".safetensors file")
    damaged = f"{str(path)!r} is cut short or not a {made_by}"
    with open(path, "rb") as file:
        try:
            try:
                archive = kind(file)
            except ValueError as error:  # of what it is made of
                raise _DamagedError(str(error)) from None
            yield archive
        except Exception as error:  # whatever zipfile, zlib, struct and json make of bytes that make no sense
            ours = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
            of_the_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
            if ours or of_the_disk or isinstance(error, MemoryError):
                raise
            text = str(error)
            raise ValueError(f"{damaged}: {text if len(text) < 200 else text[:200] + '...'}.") from None
