"""Files: whatever the names, the links and the modes; what a caller adds; and files that are damaged or hostile."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

import fastlr

SUFFIXES = pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
posix = pytest.mark.skipif(os.name != "posix", reason="links and modes of POSIX")


def trainer(names=("w", "b"), value=1.0, size=2, lr=0.1):
    params = {name: np.full(size, value + k) for k, name in enumerate(names)}
    return params, fastlr.SGD(params, lr=lr, momentum=0.9, backend="numpy")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# Names


ODD = ("w", "w.npy", "w.npy.npy", "a\0", "a", "a%00", "a%2500", "b\\c", "b/c", "\ud800", "%uD800", "50%", "é\n", "file")


@SUFFIXES
def test_any_names(suffix, tmp_path):
    params, opt = trainer(ODD)
    for k, p in enumerate(params.values()):
        opt.step({name: np.full(2, k + 0.5) if q is p else None for name, q in params.items()})
    opt.save(tmp_path / f"run{suffix}")
    other, again = trainer(ODD, value=-1.0)
    again.load(tmp_path / f"run{suffix}")
    assert_same(other, params)
    assert_same(again.state_dict(), opt.state_dict())


def test_ordinary_names_stay_as_they_are_for_numpy(tmp_path):
    _, opt = trainer(["w", "layer.w.0", "50%", "w.npy"])
    opt.save(tmp_path / "run.npz")
    state = opt.state_dict(params=True)
    with np.load(tmp_path / "run.npz") as file:
        found = {key: file[key] for key in file.files}
    assert state.keys() ^ found.keys() == {
        "params.w.npy", "params.w%2Enpy", "momentum_buffer.w.npy", "momentum_buffer.w%2Enpy"
    }  # fmt: skip
    for key in state.keys() & found.keys() - {"fastlr"}:
        np.testing.assert_array_equal(state[key], found[key])
    assert np.array_equal(found["params.w%2Enpy"], state["params.w.npy"])


def test_files_of_numpy_are_read(tmp_path):
    """As older versions wrote them, in their order and compressed."""
    params, opt = trainer(["a%00", "50%", "w"])
    opt.step({name: np.ones(2) for name in params})
    state = opt.state_dict(params=True)
    state["step"] = np.asfortranarray(np.broadcast_to(state["step"], (3, 1)))
    for save in (np.savez, np.savez_compressed):
        with open(tmp_path / "run.npz", "wb") as file:
            save(file, **state)
        other, again = trainer(["a%00", "50%", "w"], value=5.0)
        assert again.load(tmp_path / "run.npz") == {}
        assert_same(other, params)


def test_a_name_that_is_too_long(tmp_path):
    _, opt = trainer(["w", "x" * 70_000])
    with pytest.raises(ValueError, match="is too long for a file"):
        opt.save(tmp_path / "run.npz")
    assert os.listdir(tmp_path) == []


def named_as_numpys(p, g, file, *, lr, allow_pickle=0.0):
    file = 0.5 * file + g
    allow_pickle = allow_pickle + lr
    return p - lr * file, file, allow_pickle


@SUFFIXES
def test_states_called_as_arguments_of_numpy(suffix, tmp_path):
    w = np.ones(2)
    opt = fastlr.Optimizer(w, fastlr.rule(named_as_numpys), lr=0.5, backend="numpy")
    opt.step(np.ones(2))
    opt.save(tmp_path / f"run{suffix}")
    other = np.zeros(2)
    again = fastlr.Optimizer(other, fastlr.rule(named_as_numpys), lr=0.25, backend="numpy")
    again.load(tmp_path / f"run{suffix}")
    assert_same(again.state_dict(params=True), opt.state_dict(params=True))


def test_safetensors_is_what_the_package_reads_and_writes(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    params, opt = trainer(["w", "b", "50%"], size=3)
    opt.step({name: np.ones(3) for name in params})
    opt.save(tmp_path / "run.safetensors", extra={"x": np.arange(3, dtype=np.uint8), "y": np.zeros((2, 0))})
    found = safetensors.load_file(tmp_path / "run.safetensors")
    state = opt.state_dict(params=True)
    assert state.keys() <= found.keys()
    for key in state.keys() - {"fastlr"}:
        np.testing.assert_array_equal(state[key], found[key])
    safetensors.save_file(state, tmp_path / "theirs.safetensors")
    other, again = trainer(["w", "b", "50%"], size=3, value=9.0)
    again.load(tmp_path / "theirs.safetensors")
    assert_same(again.state_dict(params=True), state)


# What the caller adds


@SUFFIXES
def test_extra(suffix, tmp_path):
    _, opt = trainer()
    rng, legacy = np.random.default_rng(3), np.random.RandomState(3)
    python = random.Random(3)
    extra = {
        "epoch": 3,
        "best": float("inf"),
        "name": "run \0 \ud800 7",
        "none": None,
        "flag": True,
        "big": 2**200,
        "rng": rng.bit_generator.state,
        "mt": legacy.get_state(),
        "python": python.getstate(),
        "losses": [0.5, [np.float32(0.25), np.int64(3)], (1, (2,), [])],
        "$array": {"$tuple": [1], "$$x": 2, "": {}},
        "arrays": [np.arange(6, dtype=np.int16).reshape(2, 3).T, np.zeros((0, 2), bool), np.array(2.5)],
        "_": np.arange(3, dtype=">f4"),
    }
    opt.save(tmp_path / f"run{suffix}", extra=extra)
    found = opt.load(tmp_path / f"run{suffix}")

    def same(a, b):
        if isinstance(b, dict):
            assert list(a) == list(b)
            for key in b:
                same(a[key], b[key])
        elif isinstance(b, list | tuple):
            assert type(a) is type(b) and len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                same(x, y)
        elif isinstance(b, np.ndarray):
            assert a.dtype == b.dtype.newbyteorder("=") and a.shape == b.shape and np.array_equal(a, b)
        else:
            assert a == b and type(a) is type(b.item() if isinstance(b, np.generic) else b)

    same(found, extra)
    again = np.random.default_rng()
    again.bit_generator.state = found["rng"]
    assert again.random() == rng.random()
    python.setstate(found["python"])
    assert opt.load(tmp_path / f"run{suffix}", hyperparameters=False).keys() == extra.keys()
    opt.save(tmp_path / f"run{suffix}")
    assert opt.load(tmp_path / f"run{suffix}") == {}


def test_extra_that_cannot_be_saved(tmp_path):
    _, opt = trainer()
    circle = []
    circle.append(circle)
    for extra, error, message in (
        ([], TypeError, "extra must be a dict"),
        ({1: 2}, TypeError, "extra has the key 1; keys must be strings"),
        ({"a": {"b": {1}}}, TypeError, r"extra\['a'\]\['b'\] is a set"),
        ({"a": [np.array([None])]}, TypeError, r"extra\['a'\]\[0\] is an array of object"),
        ({"a": 1j}, TypeError, r"extra\['a'\] is a complex"),
        ({"a": circle}, ValueError, "nested more than 200 deep, or in a circle"),
        ({"a": 10**5000}, ValueError, "digits"),
    ):
        with pytest.raises(error, match=message):
            opt.save(tmp_path / "run.npz", extra=extra)
        assert os.listdir(tmp_path) == []
    deep = 5
    for _ in range(150):
        deep = (deep,)
    opt.save(tmp_path / "run.npz", extra={"deep": deep})
    assert opt.load(tmp_path / "run.npz") == {"deep": deep}


# Links, modes, what a crash has left


@posix
@SUFFIXES
def test_a_link_is_followed(suffix, tmp_path):
    _, opt = trainer()
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / f"latest{suffix}", tmp_path / "disk" / "run"
    link.symlink_to(target)
    for _ in range(2):  # a link to nothing, then to a file
        opt.step({"w": np.ones(2), "b": np.ones(2)})
        opt.save(link)
        assert link.is_symlink() and os.listdir(tmp_path / "disk") == ["run"]
        _, again = trainer()
        again.load(link)
        assert again.steps == opt.steps


@posix
def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path):
    _, opt = trainer()
    path = tmp_path / "run.npz"
    for mode in (0o600, 0o640, 0o666, 0o444):
        path.touch()
        path.chmod(mode)
        opt.save(path)
        assert path.stat().st_mode & 0o7777 == mode
        opt.load(path)


@posix
def test_what_a_crash_has_left_is_removed(tmp_path):
    _, opt = trainer()
    writing = """
import os, signal, sys, time, numpy as np, fastlr
opt = fastlr.SGD(np.ones(2), lr=0.1, backend="numpy")
def stop(*a):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = stop
opt.save(sys.argv[1])
"""
    run = [sys.executable, "-c", writing, str(tmp_path / "run.npz")]
    with subprocess.Popen(run, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"writing\n"
            (left,) = os.listdir(tmp_path)
            assert left.startswith(".run.npz.") and left.endswith(".part")
            others = ".run.npz.mine.part", ".other.npz.fastlr-01234567.part"
            for name in others:
                (tmp_path / name).touch()
            opt.save(tmp_path / "run.npz")
            assert sorted(os.listdir(tmp_path)) == sorted(["run.npz", left, *others])  # its process lives
        finally:
            process.kill()
    opt.save(tmp_path / "run.npz")
    assert sorted(os.listdir(tmp_path)) == sorted(["run.npz", *others])


@SUFFIXES
def test_saving_copies_nothing(suffix, tmp_path):
    params, opt = trainer(size=2_000_000)
    tracemalloc.start()
    try:
        opt.save(tmp_path / f"run{suffix}")
        assert tracemalloc.get_traced_memory()[1] < 4e6  # of 64 MB
        tracemalloc.reset_peak()
        opt.load(tmp_path / f"run{suffix}")
        assert tracemalloc.get_traced_memory()[1] < 64e6 + 6e6
    finally:
        tracemalloc.stop()


# Files that are damaged or hostile


@SUFFIXES
def test_bytes_damaged_anywhere(suffix, tmp_path):
    params, source = trainer()
    for _ in range(3):
        source.step({"w": np.ones(2), "b": np.ones(2)})
    path = tmp_path / f"run{suffix}"
    source.save(path, extra={"epoch": 3, "rng": np.arange(5)})
    good, right = path.read_bytes(), source.state_dict(params=True)
    _, opt = trainer(value=7.0)
    before = opt.state_dict(params=True)
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "right": 0}
    for k in range(500):
        data = bytearray(good)
        kind = k % 4
        at = int(rng.integers(len(data)))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + int(rng.integers(1, 20))] = rng.bytes(int(rng.integers(0, 20)))
        elif kind == 2:
            del data[at:]
        else:
            data[at : at + 8] = int(rng.integers(0, 2**62)).to_bytes(8, "little")
        path.write_bytes(data)
        try:
            extra = opt.load(path)
        except ValueError:
            assert_same(opt.state_dict(params=True), before)
            outcomes["refused"] += 1
        else:
            assert extra["epoch"] == 3 and extra["rng"].tolist() == [0, 1, 2, 3, 4]
            assert_same(opt.state_dict(params=True), right)
            outcomes["right"] += 1
            opt.load_state_dict(before)
    assert outcomes["refused"] > 250, outcomes


def rewritten(path, changes=(), more=(), compress=zipfile.ZIP_STORED):
    """A file of ours with other members."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members.update(changes)
    with zipfile.ZipFile(path, "w", compress) as new:
        for name, data in [*members.items(), *more]:
            new.writestr(name, data)


def npy(array):
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True)
    return out.getvalue()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_hostile_npz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, opt = trainer()
    path = tmp_path / "run.npz"
    before = opt.state_dict(params=True)
    header = b"\x93NUMPY\x01\x00"

    def with_header(text, data=b""):
        text = text.encode() if isinstance(text, str) else text
        return header + len(text).to_bytes(2, "little") + text + data

    entry = "momentum_buffer.w.npy"
    for data in (
        npy(np.array([Bomb()], dtype=object)),
        npy(np.zeros(3)),
        npy(np.zeros(2, np.float32)),
        npy(np.zeros(2))[:-4],
        npy(np.zeros(2)) + b"more",
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }\n"),
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 300 + ",), }\n"),
        with_header("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }\n", b"x" * 16),
        with_header("(" * 5000),
        with_header("__import__('os').mkdir('ran')\n"),
        header,
        b"",
        b"PK",
    ):
        opt.save(path)
        rewritten(path, {entry: data})
        with pytest.raises(ValueError):
            opt.load(path)
        assert_same(opt.state_dict(params=True), before)
    opt.save(path)
    rewritten(path, compress=zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="is compressed in another way"):
        opt.load(path)
    assert not (tmp_path / "ran").exists()


def test_no_more_is_read_than_is_wanted(tmp_path):
    """Members that nobody asks for, long descriptions, arrays that are longer than the file."""
    params, opt = trainer()
    path = tmp_path / "run.npz"
    opt.save(path, extra={"x": np.zeros(3)})
    zeros = npy(np.zeros(8_000_000))  # 64 MB, 0.1 MB in the file
    bomb = npy(np.zeros(64_000_000, np.uint8))

    def peak():
        tracemalloc.start()
        try:
            with pytest.raises(ValueError):
                opt.load(path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        assert {"fastlr.npy", "fastlr.extra.npy", "fastlr.extra.0.npy"} <= set(file.namelist())
    for name, data in (
        ("momentum_buffer.w", zeros),
        ("fastlr", bomb),
        ("fastlr.extra", bomb),
        ("fastlr.extra.0", zeros),
    ):
        path.write_bytes(whole)
        rewritten(path, {f"{name}.npy": data}, compress=zipfile.ZIP_DEFLATED)
        assert peak() < 20e6, name
    del zeros, bomb
    opt.save(path)
    rewritten(path, more=[(f"{k}.npy", b"") for k in range(20_000)])
    begin = time.perf_counter()
    opt.load(path)
    assert time.perf_counter() - begin < 5


def test_hostile_safetensors(tmp_path):
    _, opt = trainer()
    opt.step({"w": np.ones(2), "b": np.full(2, 3.0)})
    path = tmp_path / "run.safetensors"
    opt.save(path)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    before = opt.state_dict(params=True)

    def put(header, data=data):
        packed = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(packed).to_bytes(8, "little") + packed + data)

    first, second = "momentum_buffer.w", "momentum_buffer.b"
    entry = header[first]
    swapped = {**entry, "data_offsets": header[second]["data_offsets"]}
    for changed in (
        {first: swapped},  # one array twice
        {first: swapped, second: {**header[second], "data_offsets": entry["data_offsets"]}},  # the sums tell
        {first: {**entry, "shape": [10**18]}},
        {first: {**entry, "shape": [-2]}},
        {first: {**entry, "shape": [True]}},
        {first: {**entry, "shape": 2}},
        {first: {**entry, "dtype": "Q8"}},
        {first: {**entry, "data_offsets": [0, 10**18]}},
        {first: {**entry, "data_offsets": [0]}},
        {first: None},
        {"__metadata__": []},
        {"__metadata__": {"crc32": "x"}},
    ):
        put({**header, **changed})
        with pytest.raises(ValueError):
            opt.load(path)
        assert_same(opt.state_dict(params=True), before)
    for packed in (b"[]", b"{", b"[" * 100_000, b"\xff"):
        put(packed)
        with pytest.raises(ValueError, match="cut short or not a .safetensors file"):
            opt.load(path)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="cut short or not a .safetensors file"):
        opt.load(path)
    put(header)
    opt.load(path)
    for metadata in (header["__metadata__"], {"crc;2": header["__metadata__"]["crc32"]}):
        put({**header, "__metadata__": metadata}, data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ValueError, match="cut short or not a .safetensors file"):
            opt.load(path)
    put({**header, "__metadata__": {"format": "np"}})  # written anew by somebody
    opt.load(path)
