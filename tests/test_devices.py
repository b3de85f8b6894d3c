"""What is asked of the CUDA driver, by the real cuda-bindings over a driver that only writes down (stub_driver.c).

Nothing here has run on a GPU: the stub gives memory of the host, and no kernel runs.
"""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install -e .[cuda13]")
pytest.importorskip("cuda.bindings")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stub")

BEGIN = """
import ctypes, numpy as np, fastlr
from fastlr.gpu import driver as devices

class Launch(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("function", "blocks", "threads", "stream")]
    _fields_ += [("parameters", ctypes.c_int64 * 8)]

stub = ctypes.CDLL("libcuda.so.1")
stub.stub_launches.restype = ctypes.POINTER(Launch)
for name in ("stub_launched", "stub_unrelaxed", "stub_synchronized"):
    getattr(stub, name).restype = ctypes.c_int64
for name in ("stub_capture", "stub_fail_load", "stub_room", "stub_parameters"):
    getattr(stub, name).argtypes = [ctypes.c_int64]

def launches():
    return [stub.stub_launches()[k] for k in range(stub.stub_launched())]

def integers(address, *shape):
    count = int(np.prod(shape))
    return np.frombuffer((ctypes.c_int64 * count).from_address(address), np.int64).reshape(shape)

tree = {"w": np.ones((40, 30), np.float32), "b": np.ones(7, np.float32), "c": np.zeros(5000, np.float32)}
there = fastlr.flatten(tree, device="cuda")
leaves, grads = there.unflatten(), fastlr.flatten(tree, device="cuda").unflatten()
stub.stub_parameters(3)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stub_driver.c")
    command = ["cc", "-shared", "-fPIC", "-w", "-o", str(folder / "libcuda.so.1"), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return str(folder)


@pytest.fixture
def with_stub(stub, in_subprocess):
    return lambda program: in_subprocess(BEGIN + textwrap.dedent(program), LD_LIBRARY_PATH=stub)


def test_a_plain_step(with_stub):
    with_stub("""
        assert devices.problem() is None and repr(devices.gpu(0)).startswith("<cuda:0, No GPU at all")
        opt = fastlr.Adam(leaves)
        opt.step(grads)
        (launch,) = launches()
        table, pieces, count = launch.parameters[:3]
        assert (launch.blocks, launch.threads, launch.stream) == (count, 256, 0)
        rows = integers(table, 3, 5)
        for row, k in zip(rows, tree):
            columns = [leaves[k], grads[k], opt.state["exp_avg"][k], opt.state["exp_avg_sq"][k]]
            assert row[1:].tolist() == [x.address for x in columns]
        seen = {e: [] for e in range(3)}
        for leaf, start, size, _ in integers(pieces, count, 4):
            assert 0 < size <= 1024
            seen[leaf] += range(start, start + size)
        assert [sorted(seen[e]) for e in range(3)] == [list(range(x.size)) for x in tree.values()]
        again = fastlr.flatten(tree, device="cuda").unflatten()
        opt.step(again)
        assert launches()[1].parameters[0] == table and integers(table, 3, 5)[0, 2] == again["w"].address
        """)


def test_a_full_step_waits_for_nothing(with_stub):
    with_stub("""
        opt = fastlr.AdamW(leaves, clip_norm=1.0, skip_nonfinite=True, ema=0.9, shadow="bfloat16", statistics=True)
        opt.step(grads)
        stub.stub_reset()
        infos = [opt.step(grads, stream=0x77) for _ in range(5)]
        assert len(launches()) == 5 * 4  # with statistics; three without
        assert {x.stream for x in launches()} == {0x77}
        assert launches()[1].blocks == 1 and launches()[1].threads == 512
        assert stub.stub_synchronized() == 0
        infos[0].step
        assert stub.stub_synchronized() > 0
        del infos
        stub.stub_reset()
        for _ in range(10):  # the info of each step lives until the next has been made, as in most loops
            info = opt.step(grads)
        assert stub.stub_synchronized() == 0
        """)


def test_a_capture_allocates_and_uploads_beside_it(with_stub):
    with_stub("""
        opt = fastlr.Adam(leaves, clip_norm=1.0, capturable=True)
        opt.step(grads)
        table = launches()[0].parameters[0]
        stub.stub_reset()
        stub.stub_capture(1)
        others = {k: g for k, g in grads.items()}
        opt.step(others)
        stub.stub_capture(0)
        assert stub.stub_unrelaxed() == 0 and stub.stub_synchronized() == 0
        captured = [x.parameters[0] for x in launches()]
        assert len(captured) == 3 and table not in captured
        opt.step(grads)
        assert launches()[3].parameters[0] == table
        import gc
        read = {x for launch in launches()[:3] for x in launch.parameters[:1]}
        del opt
        gc.collect()
        more = [fastlr.Adam(leaves, clip_norm=1.0) for _ in range(5)]
        stub.stub_reset()
        for one in more:
            one.step(grads)
        again = {x for launch in launches() for x in launch.parameters[:1]}
        assert not read & again, "a graph that is still there would read somebody else's tables"
        opt = fastlr.Adam(leaves)
        opt.step(grads)
        stub.stub_capture(1)
        try:
            opt.step(grads)
        except RuntimeError as error:
            assert "capturable=True" in str(error)
        else:
            raise AssertionError("not refused")
        """)


def test_what_a_driver_refuses(with_stub):
    said = with_stub("""
        opt = fastlr.RMSprop(leaves)
        before = opt.snapshot()
        stub.stub_fail_load(1)
        for call in (
            lambda: opt.step(grads),
            lambda: fastlr.flatten(tree, device="cuda:7"),
        ):
            try:
                call()
            except fastlr.DeviceError as error:
                print(error)
        assert all(np.array_equal(before[k], v) for k, v in opt.snapshot().items())
        assert launches() == []
        stub.stub_fail_load(0)
        opt.step(grads)
        assert len(launches()) == 1
        stub.stub_room(1000)
        try:
            fastlr.Adam(leaves)
        except MemoryError as error:
            print(error)
        class Elsewhere:
            cuda_stream, device_id = 5, 1

        for stream in ("fast", Elsewhere):
            try:
                opt.step(grads, stream=stream)
            except (TypeError, ValueError) as error:
                print(error)
        """)
    assert "the kernel 'update_few', compiled for compute capability 9.0, cannot be loaded. cuda:0: the CUDA" in said
    assert "cuda:7: the CUDA driver says CUDA_ERROR_INVALID_DEVICE" in said
    assert "a buffer of 6,207 x float32 needs 24,828 bytes on cuda:0, which has no room for it" in said
    assert "stream must be a stream of PyTorch, CuPy or cuda.core, or its handle, got 'fast'." in said
    assert "the stream is of cuda:1, but the parameters are on cuda:0." in said


def test_information(with_stub):
    said = with_stub("""
        from fastlr.info import describe
        print(describe()["gpu"])
        """)
    assert "No GPU at all" in said
