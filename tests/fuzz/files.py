"""Damaged state files and state dicts: refused with everything as it was, or taken for what they say.

No code is run from a file, and no more memory is asked for than the parameters need.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import fastlr
from fastlr.schedules import Cosine, Plateau

from .arguments import gradients
from .promises import BrokenPromiseError, bits, difference, refusal
from .values import ARRAYS, VALUES, made

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

_HAS_TORCH = importlib.util.find_spec("torch") is not None
_ROOM = 256 << 20  # bytes that loading a state of some hundred bytes may ask for
_SECONDS = 2.0  # of processor time that it may take
_ran: list[str] = []  # what was run from a file: nothing


def run_from_a_file(*_: Any) -> float:
    """What the files here would run if anything did."""
    _ran.append("run")
    return 0.1


class _Pickled:
    def __reduce__(self) -> Any:
        return run_from_a_file, ("pickled",)


_CODE = f"__import__({__name__!r}, fromlist=['x']).run_from_a_file()"


def _audit(event: str, arguments: Any) -> None:
    if _watching and event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec"):
        _ran.append(event)


_watching: list[bool] = []
sys.addaudithook(_audit)


# Optimizers in the middle of a run, and their states


def _tree() -> dict[str, np.ndarray]:
    return {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


def _adam() -> fastlr.Optimizer:
    scale, groups = fastlr.LossScale(8.0, interval=3), {"b": {"lr": 0.05, "betas": (0.5, 0.9)}}
    return fastlr.Adam(_tree(), lr=0.1, ema=0.9, loss_scale=scale, groups=groups, backend="numpy")


def _population() -> fastlr.Optimizer:
    params = fastlr.flatten(_tree(), population=3)
    return fastlr.AdamW(params, lr=np.array([0.1, 0.2, 0.3]), clip_norm=np.array([1.0, 2.0, 3.0]), backend="numpy")


def _scheduled() -> fastlr.Optimizer:
    lr = Plateau(Cosine(0.1, steps=50).warmup(3), patience=0)
    return fastlr.SGD(_tree(), lr=lr, momentum=0.9, clip_norm=lambda n: 1.0 + n, shadow="bfloat16", backend="numpy")


BUILDERS: dict[str, Callable[[], fastlr.Optimizer]] = {
    "adam": _adam,
    "population": _population,
    "scheduled": _scheduled,
    "nadam": lambda: fastlr.NAdam({"w": np.ones((2, 3)), "x": [np.ones(())]}, lr=0.1, backend="numpy"),
    "prodigy": lambda: fastlr.Prodigy(np.linspace(-1, 1, 5), backend="numpy", clip_norm=1.0),
    "sgd": lambda: fastlr.SGD(np.linspace(-1, 1, 5), lr=0.1, backend="numpy"),
}


def _used(name: str, steps: int) -> fastlr.Optimizer:
    opt = BUILDERS[name]()
    for k in range(steps):
        opt.step(gradients(opt.params, k))
    if name == "scheduled":
        opt.observe(1.0)
        opt.observe(2.0)
    return opt


_folder = tempfile.TemporaryDirectory(prefix="fastlr-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


@cache
def _saved(name: str, suffix: str) -> tuple[bytes, dict[str, np.ndarray]]:
    """A file of an optimizer in use, and the state in it."""
    opt, path = _used(name, 3), Path(_folder.name, f"good{suffix}")
    opt.save(path)
    return path.read_bytes(), opt.snapshot()


@cache
def _expected(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an optimizer is before a file is loaded, and one step later without it."""
    opt = _used(name, 1)
    before = bits(opt)
    opt.step(gradients(opt.params, 7))
    return before, bits(opt)


# Damage to bytes


def _damaged_bytes(r: random.Random, data: bytes) -> tuple[bytes, str]:
    out, kind = bytearray(data), r.choice(["flip", "flip", "flip", "cut", "head", "insert", "delete", "zeros", "noise"])
    k = r.randrange(len(out))
    if kind == "flip":
        for _ in range(r.choice([1, 1, 1, 3, 20])):
            out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    elif kind == "cut":
        del out[k:]
    elif kind == "head":
        del out[: r.randrange(1, 200)]
    elif kind == "insert":
        out[k:k] = r.randbytes(r.randrange(1, 50))
    elif kind == "delete":
        del out[k : k + r.randrange(1, 50)]
    elif kind == "zeros":
        length = min(r.randrange(1, 300), len(out) - k)
        out[k : k + length] = bytes(length)
    else:
        length = min(r.randrange(1, 30), len(out) - k)
        out[k : k + length] = r.randbytes(length)
    return bytes(out), kind


# Damage to the description

_DEEP = 3000
_ODD_JSON: list[Callable[[], Any]] = [
    *(lambda x=x: x for x in (None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, 5e-324, 10**18, 2**63, 2**70, 10**400)),
    *(lambda x=x: x for x in (math.nan, math.inf, -math.inf, "", "x", "0.1", "NaN", "w", "\0", "x" * 3000, _CODE)),
    *(list, dict, lambda: [0.1], lambda: [0.1, 0.2], lambda: [0.1] * 3, lambda: {"": 0.1}),
    *(
        lambda: [[[[0.1]]]],
        lambda: [None] * 3,
        lambda: ["x", 1],
        lambda: [1.0] * 20_000,
        lambda: {str(k): k for k in range(9999)},
    ),
    *(lambda: {"type": "Constant", "value": 0.2}, lambda: {"type": "Constant", "value": -1}, lambda: {"type": None}),
    *(lambda: {"type": None, "code": "x"}, lambda: {"type": "Function", "function": "abs"}, lambda: {"type": []}),
    *(lambda: {"type": "Function", "function": _CODE}, lambda: {"type": "Schedule"}, lambda: {"type": _CODE}),
    *(lambda: {"type": "Constant", "value": _CODE}, lambda: {"type": "Cosine", "lr": 0.1, "steps": 10**30}),
    *(lambda: {"type": "Exponential", "lr": 1e300, "factor": 1e300}, lambda: {"type": "Constant", "value": 1e400}),
    *(lambda: {"type": "Piecewise", "boundaries": [1] * 9, "values": []}, lambda: {"type": "Observed", "scale": 1}),
    *(lambda: {"type": "Scaled", "schedule": {"type": "Constant", "value": 0.1}, "factor": -1},),
    *(lambda: {"type": "Polynomial", "lr": 0.1, "steps": 9, "power": 2, "cycle": _CODE},),
    *(lambda: {"type": "Warmup", "schedule": {"type": "Constant", "value": 0.1}, "steps": 5, "included": _CODE},),
]


def _nested(text: str, depth: int = _DEEP) -> str:
    return text * depth + ("]" if text == "[" else "1}" if text.startswith("{") else "") * depth


_RAW = [
    _nested("["),
    _nested('{"a":'),
    "[" * 9,
    "1" * 5000,
    '"' + "x" * 10**6 + '"',
    "-",
    "NaN",
    "{}",
    "[]",
    "",
    "null",
    "1e999",
]


def _nodes(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container and key in it."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        found.append((tree, key))
        _nodes(tree[key], found)
    return found


def _damaged_json(r: random.Random, data: bytes) -> tuple[bytes, str]:
    """A description with something odd in it."""
    tree, kind = json.loads(data), ""
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        nodes = _nodes(tree, [])
        at, key = r.choice(nodes)
        kind = r.choice(["odd", "odd", "odd", "odd", "gone", "more", "renamed", "swapped", "raw", "near"])
        if kind == "gone":
            del at[key]
        elif kind == "more":
            odd = r.choice(_ODD_JSON)()
            if isinstance(at, dict):
                at[r.choice(["", "x", "lr", "frozen", "w", _CODE, "step"])] = odd
            else:
                at.append(odd)
        elif kind == "renamed" and isinstance(at, dict):
            at[r.choice(["", "x", "lr", "w", "\0", _CODE])] = at.pop(key)
        elif kind == "swapped":
            other, its = r.choice(nodes)
            try:
                at[key], other[its] = other[its], at[key]
                json.dumps(tree)
            except (ValueError, RecursionError, KeyError, IndexError):  # one is part of the other
                tree = json.loads(data)
        elif kind == "raw":
            at[key] = "@RAW@"
            text = json.dumps(tree).replace('"@RAW@"', raw := r.choice(_RAW))
            return text.encode(), f"raw {raw[:9]} at {key!r}"
        elif kind == "near" and isinstance(at[key], int | float) and not isinstance(at[key], bool):
            at[key] = r.choice([-at[key], at[key] * 1e9, at[key] + 0.5, str(at[key]), [at[key]], float(at[key])])
        else:
            at[key] = r.choice(_ODD_JSON)()
        kind = f"{kind} at {key!r}"
    return json.dumps(tree).encode(), kind


def _damaged_description(r: random.Random, data: bytes) -> tuple[bytes, str]:
    pick = r.random()
    if pick < 0.9:
        return _damaged_json(r, data)
    if pick < 0.93:
        return r.choice(_RAW).encode(), "raw"
    if pick < 0.95:
        doubled = r.choice(['"format": 3, ', '"states": [], ', '"groups": {}, ', '"leaves": {}, ', '"dtype": "x", '])
        return data.replace(b"{", b"{" + doubled.encode(), 1), "a key twice"
    if pick < 0.97:
        return data.decode().encode("utf-16"), "utf-16"
    return _damaged_bytes(r, data)


# Damage to archives

_F4 = "'descr': '<f4', 'fortran_order': False, 'shape': "
_HEADERS = [
    *(f"{{{_F4}(10000000000000,), }}", f"{{{_F4}(-1,), }}", f"{{{_F4}(2**62, 2**62), }}", f"{{{_F4}{_CODE}, }}"),
    *(f"{{{_F4}(3000000000, 3000000000), }}", f"{{{_F4}({'1,' * 99}), }}", f"{{{_F4}3}}", f"{{{_F4}None}}"),
    *(
        "{'descr': '<f4'}",
        "",
        "{}",
        "(" * 500,
        "[" * 5000,
        _CODE,
        "{'descr': 'O', 'fortran_order': False, 'shape': ()}",
    ),
    *("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", "{'descr': '<f4', 'fortran_order': 0, 'shape': 3}"),
    *("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }", "{'descr': '<M8[s]', 'shape': (3,)}"),
]


def _npy(array: np.ndarray, pickled: bool = True) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=pickled)
    return out.getvalue()


def _with_header(r: random.Random, data: bytes) -> bytes:
    """An array's file with another header."""
    header = r.choice(_HEADERS).encode()
    version = r.choice([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    size = r.choice([len(header)] * 5 + [0, 65535, 2**31])
    length = (size & 0xFFFF).to_bytes(2, "little") if version[0] == 1 else size.to_bytes(4, "little")
    return b"\x93NUMPY" + version + length + header + data[-24:]


def _odd_array(r: random.Random, like: np.ndarray) -> np.ndarray:
    choice = r.randrange(12)
    if choice == 0:
        return like.astype(r.choice(["f2", "f4", "f8", "i8", "i4", "u1", "c8", "U3", "?", ">f4", ">f8", ">i8"]))
    if choice == 1:
        return np.full(like.shape, _Pickled(), object)
    if choice == 2:
        return like.reshape(-1) if r.random() < 0.5 else like[None]
    if choice == 3:
        return np.asfortranarray(like)
    if choice == 4:
        return np.zeros(r.choice([(0,), (1,), (1000,), (2, 0), ()]), like.dtype)
    if choice == 5:
        return np.zeros(like.shape, [("a", "f4"), ("b", "i4")])
    if choice == 6:
        return np.full(like.shape, "2026-01-01", "M8[s]")
    if choice == 7:
        return np.full(like.shape, b"x")
    bad = [-1, 0, 2**62, -(2**62), 2**53 + 1] if like.dtype.kind in "iu" else [np.nan, np.inf, -np.inf, -1.0, 1e30, 0.0]
    out = np.array(like)
    if like.dtype == np.uint8 or not out.size:
        return out[: r.randrange(out.size + 1)] if out.ndim else out
    if choice < 10:
        out.flat[r.randrange(out.size)] = r.choice(bad)
    else:
        out[...] = r.choice(bad)
    return out


@cache
def _bomb() -> bytes:
    """The file of an array of two gigabytes of zeros, deflated."""
    import zlib

    header = np.lib.format.header_data_from_array_1_0(np.zeros(1, np.float32)) | {"shape": (2**29,)}
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, header)
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = squeezer.compress(out.getvalue()) + squeezer.flush(zlib.Z_FULL_FLUSH)
    one = squeezer.compress(bytes(1 << 22)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    return part + one * 512 + squeezer.flush()


def _with_bomb(members: Mapping[str, bytes], name: str) -> bytes:
    """An archive one of whose members takes two gigabytes once it is unpacked."""
    packed = _bomb()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, data in members.items():
            if member != name:
                archive.writestr(member, data)
        info = zipfile.ZipInfo(name)
        offset = out.tell()
        archive.writestr(info, packed)
        for entry in archive.filelist:
            if entry.filename == name:
                entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, 2**31 + 128
    content = bytearray(out.getvalue())
    content[offset + 8 : offset + 10] = b"\x08\x00"
    return bytes(content)


@cache
def _many_members() -> bytes:
    """Thousands of empty arrays in an archive."""
    out, empty = io.BytesIO(), _npy(np.zeros(0))
    with zipfile.ZipFile(out, "w") as archive:
        for k in range(20_000):
            archive.writestr(f"{k}.npy", empty)
    return out.getvalue()


_MEMBERS = ["array", "header", "bytes", "gone", "renamed", "swapped", "twice", "more", "order", "packed"]
_NAMES = ["x.npy", "../x.npy", "/etc/x.npy", "", "\0", "a" * 999 + ".npy", "file.npy", "fastlr", "params.w"]


def _damaged_npz(r: random.Random, name: str) -> tuple[bytes, str, bool]:
    """A damaged archive, how it is damaged, and whether that cannot go unnoticed, thanks to its checksums."""
    data, state = _saved(name, ".npz")
    pick = r.random()
    if pick < 0.3:
        return *_damaged_bytes(r, data), True
    members = {f"{key}.npy": _npy(value) for key, value in state.items()}
    if pick < 0.302:
        return _with_bomb(members, r.choice([*members, "other.npy"])), "two gigabytes in a member", False
    if pick < 0.304:
        return _many_members(), "many members", False
    kind = r.choice(
        ["json", "json", "json", "json", "json", "array", "array", "header", "bytes", "gone", "renamed", "swapped"]
    )
    kind = r.choice([kind, kind, kind, "twice", "more", "order", "packed"])
    key = r.choice([*members])
    twice: list[tuple[str, bytes]] = []
    method = zipfile.ZIP_STORED
    if kind == "json":
        text, kind = _damaged_description(r, state["fastlr"].tobytes())
        members["fastlr.npy"] = _npy(np.frombuffer(text, np.uint8))
    elif kind == "array":
        members[key] = _npy(_odd_array(r, state[key[:-4]]))
    elif kind == "header":
        members[key] = _with_header(r, members[key])
    elif kind == "bytes":
        members[key], _ = _damaged_bytes(r, members[key])
    elif kind == "gone":
        del members[key]
    elif kind == "renamed":
        new = r.choice(
            ["x.npy", "../x.npy", "/etc/x.npy", key[:-4], key + ".npy", key.upper(), "", "\0", "a" * 999, "file.npy"]
        )
        members[new] = members.pop(key)
    elif kind == "swapped":
        other = r.choice([*members])
        members[key], members[other] = members[other], members[key]
    elif kind == "twice":
        twice = [(key, r.choice([members[key], _npy(np.zeros(3)), b"", _npy(_odd_array(r, state[key[:-4]]))]))]
    elif kind == "more":
        others = ["x.npy", "x", "params.x.npy", "exp_avg.npy", "allow_pickle.npy", "file.npy"]
        members[r.choice([other for other in others if other not in members])] = r.choice(
            [b"", b"x", _npy(np.zeros(3)), _npy(np.full(2, _Pickled(), object)), members[key]]
        )
    elif kind == "order":
        members = dict(r.sample([*members.items()], len(members)))
    else:
        method = r.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # names that are there twice
        for member, content in [*members.items(), *twice]:
            info = zipfile.ZipInfo(member or "x")
            info.compress_type = method
            archive.writestr(info, content)
    return out.getvalue(), f"{kind} {key}", kind in ("more", "order", "packed")


def _damaged_safetensors(r: random.Random, name: str) -> tuple[bytes, str]:
    data, state = _saved(name, ".safetensors")
    pick = r.random()
    if pick < 0.25:
        return _damaged_bytes(r, data)
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if pick < 0.5:
        header, kind = _damaged_json(r, header)
        kind = f"header: {kind}"
    elif pick < 0.6:
        tree = json.loads(header)
        key = r.choice([*tree])
        if isinstance(tree[key], dict) and "dtype" in tree[key]:
            tree[key]["dtype"] = r.choice(
                ["F32", "F64", "BF16", "F16", "I64", "U64", "U8", "BOOL", "F8_E4M3", "x", "C64"]
            )
        header, kind = json.dumps(tree).encode(), f"dtype of {key}"
    elif pick < 0.65:
        size = r.choice([0, 1, 2**31, 2**63, 2**64 - 1, size + 1, size - 1])
        return size.to_bytes(8, "little") + header + body, "size of the header"
    elif pick < 0.9:
        text, kind = _damaged_description(r, state["fastlr"].tobytes())
        state = {**state, "fastlr": np.frombuffer(text, np.uint8)}
        return _safetensors(state), kind
    else:
        key = r.choice([*state])
        try:
            return _safetensors({**state, key: np.ascontiguousarray(_odd_array(r, state[key]))}), f"array {key}"
        except Exception:  # an array that such a file cannot hold
            return body, "no header"
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body, kind


def _safetensors(state: Mapping[str, np.ndarray]) -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save(dict(state))


# Damage to state dicts

_KEYS = ["fastlr", "step", "clock", "skipped", "x", "", 3, None, ("w",), "params.w", b"fastlr", "params", "fastlr\0"]


class _Odd(Mapping):
    """A mapping that does something else than it says."""

    def __init__(self, state: Mapping[str, Any], how: str) -> None:
        self.state, self.how = state, how

    def __getitem__(self, key: Any) -> Any:
        if self.how == "raises":
            raise RuntimeError("raised by the mapping itself")
        return self.state["fastlr"] if self.how == "same" else self.state[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(()) if self.how == "empty" else iter(self.state)

    def __len__(self) -> int:
        return 0

    def __contains__(self, key: Any) -> bool:
        return True


def _damaged_dict(r: random.Random, name: str) -> tuple[Any, str]:
    _, state = _saved(name, ".npz")
    out: dict[Any, Any] = {key: value.copy() for key, value in state.items()}
    key, kind = (
        r.choice([*out]),
        r.choice(["json", "json", "array", "value", "value", "gone", "more", "renamed", "whole"]),
    )
    if kind == "json":
        text, kind = _damaged_description(r, state["fastlr"].tobytes())
        out["fastlr"] = r.choice(
            [np.frombuffer(text, np.uint8)] * 4 + [text, list(text), text.decode("utf-8", "replace")]
        )
    elif kind == "array":
        out[key] = _odd_array(r, out[key])
    elif kind == "value":
        text = r.choice([*VALUES, *ARRAYS])
        dtype = out[key].dtype.str[1:] if out[key].dtype.kind == "f" else "f8"  # not all of them can be of integers
        out[key] = made(text, shape=out[key].shape, D=dtype, own=out[key])
        kind = text
    elif kind == "gone":
        del out[key]
    elif kind == "more":
        out[r.choice(_KEYS)] = made(r.choice(VALUES))
    elif kind == "renamed":
        out[r.choice(_KEYS)] = out.pop(key)
    else:
        kind = r.choice(["raises", "same", "empty", "other", "value"])
        if kind == "value":
            text = r.choice(VALUES)
            return made(text), text
        if kind == "other":
            return _saved(r.choice([*BUILDERS]), ".npz")[1], kind
        return _Odd(out, kind), kind
    return out, f"{kind} ({key})"


# What came of it


class _Room:
    """Loading may ask for so much memory and no more."""

    def __enter__(self) -> None:
        self.limits = None
        if resource is not None and os.path.exists("/proc/self/statm"):
            self.limits = resource.getrlimit(resource.RLIMIT_AS)
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + _ROOM, self.limits[1]))
        self.began = time.process_time()
        _ran.clear()
        _watching.append(True)

    def __exit__(self, *_: Any) -> None:
        _watching.clear()
        self.seconds = time.process_time() - self.began
        if self.limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, self.limits)


_RANGES = {
    **dict.fromkeys(("lr", "eps", "momentum", "weight_decay"), (0.0, math.inf)),
    "betas": (0.0, 1.0),
    "ema_decay": (0.0, 1.0 + 1e-15),  # 1 pauses it
    **dict.fromkeys(("clip_norm", "clip_value"), (5e-324, math.inf)),
}


def _is_honest(opt: fastlr.Optimizer) -> str:
    """What is nonsense about an optimizer's state; empty if nothing is."""
    state = opt.state_dict()
    description = json.loads(state["fastlr"].tobytes())
    for key in ("step", "clock", "skipped"):
        if (state[key] < 0).any() or (state[key] > 2**53).any():
            return f"{key} is {state[key].ravel()[:3]}"
    if not (isinstance(description["steps"], int) and 0 <= description["steps"] <= 2**53):
        return f"steps is {description['steps']!r}"
    for pattern, values in description["groups"].items():
        for name, value in values.items():
            for number in value if isinstance(value, list) else [value]:
                inner = number if isinstance(number, list) else [number]
                for x in inner:
                    if isinstance(x, dict) or (x is None and name.startswith("clip")):
                        continue
                    if name in ("frozen", "maximize", "amsgrad", "nesterov", "decoupled_weight_decay"):
                        good = isinstance(x, bool)
                    else:
                        low, high = _RANGES.get(name, (-1e308, np.inf))
                        good = isinstance(x, int | float) and not isinstance(x, bool) and low <= x < high
                    if not good:
                        return f"{pattern!r}: {name} is {x!r}"
    if opt.loss_scale is not None:
        scale, good = (np.asarray(description["loss_scale"][k]) for k in ("scale", "good"))
        if not (np.isfinite(scale).all() and (scale > 0).all() and (good >= 0).all() and scale.ndim <= 1):
            return f"loss_scale is {description['loss_scale']}"
    for seen in description.get("observed", {}).values():
        numbers = [seen["scale"], seen["bad"], seen["cooling"]]
        if not all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in numbers):
            return f"observed is {seen}"
        if not isinstance(seen["best"], int | float | None) or seen["best"] != seen["best"]:
            return f"observed is {seen}"
    return ""


@cache
def _whole(name: str) -> dict[str, Any]:
    """What an optimizer is after the file as it was written."""
    opt, path = _used(name, 1), Path(_folder.name, "whole.npz")
    path.write_bytes(_saved(name, ".npz")[0])
    opt.load(path)
    return bits(opt)


def _judge(
    name: str, load: Callable[[fastlr.Optimizer], Any], how: str, *more: type[BaseException], same: bool = False
) -> str:
    """Load into an optimizer in use, and see what has become of it.

    Args:
        name: of the optimizer.
        load: loads what is damaged.
        how: it is damaged.
        more: what it may raise beside TypeError and ValueError.
        same: whether the damage cannot go unnoticed, so that what can be loaded is what was saved.
    """
    opt = _used(name, 1)
    before, one_step_later = _expected(name)
    room, error = _Room(), None
    with room:
        try:
            load(opt)
        except Exception as raised:
            error = raised
    if _ran:
        raise BrokenPromiseError("code was run from a file", f"{how}: {_ran}")
    if room.seconds > _SECONDS:
        raise BrokenPromiseError("loading takes long", f"{how}: {room.seconds:.1f} s")
    if error is not None:
        outcome = refusal(error, how, *more, where="(loading)")
        if bits(opt) != before:
            raise BrokenPromiseError("a refused state changed something", f"{how}: {difference(before, bits(opt))}")
        opt.step(gradients(opt.params, 7))
        if bits(opt) != one_step_later:
            changed = difference(one_step_later, bits(opt))
            raise BrokenPromiseError("a refused state changed the next step", f"{how}: {changed}")
        return outcome
    try:
        nonsense = _is_honest(opt)
    except Exception as error:
        raise BrokenPromiseError(f"loaded nonsense: {type(error).__name__}", f"{how}: {error}") from error
    if nonsense:
        raise BrokenPromiseError(f"loaded nonsense: {nonsense.split(' is ')[0]}", f"{how}: {nonsense}")
    loaded = bits(opt)
    if same and loaded != _whole(name):
        raise BrokenPromiseError("a damaged archive was loaded", f"{how}: {difference(loaded, _whole(name))}")
    try:
        state = opt.snapshot()
        opt.step(gradients(opt.params, 7))
        opt.restore(state)
    except Exception as error:
        raise BrokenPromiseError(f"unusable after loading: {type(error).__name__}", f"{how}: {error}") from error
    if bits(opt) != loaded:
        raise BrokenPromiseError("what was loaded changes when it is saved", f"{how}: {difference(loaded, bits(opt))}")
    return "loaded"


def _own(kind: str) -> tuple[type[BaseException], ...]:
    """What a state raises itself when it is read."""
    return (ZeroDivisionError,) if "Raises()" in kind else (RuntimeError,) if kind == "raises" else ()


def trial(r: random.Random) -> Iterator[str]:
    """One damaged file or state dict."""
    name, pick = r.choice([*BUILDERS]), r.random()
    if _HAS_TORCH and r.random() < 0.15:
        from . import tensors

        yield tensors.judge(r)
    elif pick < 0.7:
        suffix = ".npz" if pick < 0.4 else ".safetensors"
        data, kind, same = _damaged_npz(r, name) if suffix == ".npz" else (*_damaged_safetensors(r, name), False)
        path = Path(_folder.name, f"damaged{suffix}")
        path.write_bytes(data)
        yield _judge(name, lambda opt: opt.load(path), f"{name}, {suffix}: {kind}", same=same)
    else:
        state, kind = _damaged_dict(r, name)
        whole = r.random() < 0.5

        def load(opt: fastlr.Optimizer) -> None:
            (opt.restore if whole else opt.load_state_dict)(state)

        yield _judge(name, load, f"{name}, state dict: {kind}", *_own(kind))
