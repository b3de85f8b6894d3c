"""Run by `test_cuda_code.py` in Numba's CUDA simulator: kernels whose blocks are real threads that wait at barriers."""

from __future__ import annotations

import ctypes
import threading

import numba
import numpy as np
from numba import cuda

import fastlr
from fastlr.kernels.staging import define

KINDS = {"float32": ctypes.c_float, "float64": ctypes.c_double, "int64": ctypes.c_int64, "uint16": ctypes.c_uint16}


def at(address, kind):
    return np.frombuffer((KINDS[kind] * 1).from_address(int(address)), kind)


class Simulated:
    """What kernels are made of in the simulator, as `fastlr.kernels.target.Target`."""

    where = staticmethod(lambda condition, a, b: a if condition else b)
    gpu = False

    def function(self, function):
        return function

    def elements(self, formats, read, written):
        sizes = [np.dtype(f).itemsize for f in formats]

        def load(addresses, i):
            return tuple(at(addresses[k] + i * sizes[k], formats[k])[0] for k in read)

        def store(addresses, i, values):
            for k, value in zip(written, values, strict=True):
                at(addresses[k] + i * sizes[k], formats[k])[0] = value

        return load, store

    def lanes(self, formats, width, read, written, tuning):
        load_one, store_one = self.elements(formats, read, written)

        def load(addresses, i):
            return tuple(load_one(addresses, i + k) for k in range(width))

        def store(addresses, i, values):
            for k in range(width):
                store_one(addresses, i + k, values[k])

        return load, store

    def row(self, kind, count, early=False):
        size = np.dtype(kind).itemsize
        convert = int if kind == "int64" else np.dtype(kind).type
        return lambda address: tuple(convert(at(address + k * size, kind)[0]) for k in range(count))

    def put(self, kind):
        def write(address, value):
            at(address, kind)[0] = value

        return write

    def each(self, phase, arguments, threads, wait=True):
        def run(*values):
            me = threading.current_thread()  # what the simulator makes of a thread of a GPU
            phase(int(me.threadIdx.x), *values)
            if wait:
                me.syncthreads()

        return run


TARGET = Simulated()


def kernel(make):
    body = make(TARGET)
    names = ", ".join(f"a{k}" for k in range(len(body.arguments)))
    room = f"cuda.shared.array({body.shared}, float64)" if body.shared else "0"
    text = f"def kernel({names}):\n    run(int(cuda.blockIdx.x), {room}, {names})"
    function = define(text, "kernel", {"run": body.run, "cuda": cuda, "float64": numba.float64})
    jitted = cuda.jit(function)

    def launch(blocks, *values):
        launched.append(body.name)
        with np.errstate(all="ignore"):
            jitted[int(blocks), body.threads](*values)

    return launch, body.threads


launched: list[str] = []


def main():
    import emulation

    from fastlr.arrays import places

    places.FINDERS.insert(0, emulation.find)
    emulation.Device.kernel = lambda self, make, name, content: kernel(make)
    rng = np.random.default_rng(0)
    tree = {"w": rng.standard_normal(700).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
    for make, settings in (
        (fastlr.Adam, {}),
        (fastlr.LAMB, {"weight_decay": 0.1}),
        (
            fastlr.AdamW,
            {"clip_norm": 1.0, "skip_nonfinite": True, "ema": 0.9, "shadow": "bfloat16", "statistics": True},
        ),
    ):
        here = {k: v.copy() for k, v in tree.items()}
        there = {k: emulation.on_device(v, 1) for k, v in tree.items()}
        ours, theirs = make(here, backend="numpy", **settings), make(there, **settings)
        for _ in range(2):
            g = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in tree.items()}
            info = theirs.step({k: emulation.on_device(v) for k, v in g.items()})
            expected = ours.step(g)
            assert info.asdict() == expected.asdict()
        a, b = ours.state_dict(params=True), theirs.state_dict(params=True)
        assert all(np.array_equal(a[k], b[k]) for k in a), make
    print(f"{len(launched)} kernels, the same bits")


main()
