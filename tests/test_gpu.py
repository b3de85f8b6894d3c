"""On a real GPU: the CPU's bits, graphs, streams. Skipped without one; `python -m bench.gpu` runs it then measures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from arrays import gradients, same, tree_map
from cases import CASES, PLAIN, Case

import fastlr
from fastlr.gpu import driver as devices
from fastlr.kernels.sums import BLOCK

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if devices.problem() is not None or not torch.cuda.is_available():
    pytest.skip(
        f"no GPU to test on: {devices.problem() or 'this PyTorch is built without CUDA'}", allow_module_level=True
    )

from test_device import OPTIONS, SHAPES, SIZES, STEPS, assert_same, assert_same_info, here_and_there  # noqa: E402

import fastlr.torch  # noqa: E402


def on_gpu(array, offset: int = 0):
    """A tensor on the GPU, `offset` elements after an address that kernels like best."""
    array = np.asarray(array)
    room = torch.empty(array.size + offset, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, device="cuda")
    out = room[offset:].view(array.shape)
    out.copy_(torch.from_numpy(array.copy()))
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_rule(case: Case, dtype, rng):
    for n in [*SIZES, 1_000_003] if case in PLAIN else [1009]:
        start, grads = rng.standard_normal(n).astype(dtype), gradients(rng, n, dtype, STEPS)
        here, there = start.copy(), on_gpu(start, offset=n % 4)
        ours, theirs = case.make(here, backend="numpy", **case.settings), case.make(there, **case.settings)
        for k, g in enumerate(grads):
            ours.step(g)
            theirs.step(on_gpu(g, offset=n % 4 if k != 2 else 1))
        if "real_power" in ours.rule.decide.calls:  # the platform's own power, in float64
            np.testing.assert_allclose(there.cpu().numpy(), here, rtol=1e-6)
        else:
            assert_same(theirs, ours)


@pytest.mark.parametrize("flat", [False, True], ids=["tree", "buffer"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, flat, rng):
    ours, theirs = here_and_there(option, flat, rng, on_gpu)
    infos = []
    for k in range(6):
        g = {name: np.asarray(rng.standard_normal(s), np.float32) for name, s in SHAPES.items()}
        if k in (2, 5):
            g["b"][3, 3] = np.nan
        infos.append((theirs.step(tree_map(on_gpu, g)), ours.step(g)))
    assert_same(theirs, ours)
    for info, expected in infos:
        assert_same_info(info, expected, SHAPES if option != "average, copy" else ())
    if "shadow" in OPTIONS[option]:
        for k in SHAPES:
            bits = theirs.shadow[k].view(torch.int16).cpu().numpy()
            assert np.array_equal(bits.view(np.uint16), np.asarray(ours.shadow[k]).view(np.uint16))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_gradients_of_two_bytes(kind, rng):
    start = rng.standard_normal(3 * BLOCK + 11).astype(np.float32)
    here, there = start.copy(), on_gpu(start, 1)
    ours, theirs = fastlr.AdamW(here, clip_norm=0.5, backend="numpy"), fastlr.AdamW(there, clip_norm=0.5)
    for offset in (1, 8, 2):
        g = torch.from_numpy(rng.standard_normal(start.size).astype(np.float32)).to(getattr(torch, kind))
        room = torch.empty(start.size + offset, dtype=g.dtype, device="cuda")
        room[offset:] = g.cuda()
        ours.step(g)
        theirs.step(room[offset:])
    assert_same(theirs, ours)


def full(params, **options):
    settings = {"clip_norm": 1.0, "skip_nonfinite": True, "ema": 0.9, "shadow": "bfloat16"}
    return fastlr.AdamW(params, **{**settings, **options})


def test_a_thousand_replays(rng):
    start = rng.standard_normal(BLOCK + 100).astype(np.float32)
    eager, graphed = torch.tensor(start, device="cuda"), torch.tensor(start, device="cuda")
    g = torch.zeros_like(eager)
    ours, theirs = full(eager), full(graphed, capturable=True)
    generator = torch.Generator("cuda").manual_seed(0)

    def fill(k):
        g.normal_(generator=generator)
        if k % 97 == 5:
            g[k] = float("nan")

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fill(0)
        theirs.step(g)
        ours.step(g)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        info = theirs.step(g)
    for k in range(1, 1001):
        fill(k)
        if k == 500:
            ours.lr = theirs.lr = 3e-3
        graph.replay()
        expected = ours.step(g)
    assert info.grad_norm == expected.grad_norm and info.step == expected.step == theirs.steps
    assert ours.skipped_steps == theirs.skipped_steps == 11
    assert torch.equal(eager, graphed)
    assert_same(theirs, ours)


def test_two_streams_at_once(rng):
    start = [rng.standard_normal(1_000_003).astype(np.float32) for _ in range(2)]
    grads = [rng.standard_normal(x.size).astype(np.float32) for x in start]
    here = [x.copy() for x in start]
    for x, g in zip(here, grads, strict=True):
        opt = full(x)
        for _ in range(20):
            opt.step(g)
    there, there_grads = [on_gpu(x) for x in start], [on_gpu(g) for g in grads]
    opts = [full(x) for x in there]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        for opt, g, stream in zip(opts, there_grads, streams, strict=True):
            with torch.cuda.stream(stream):
                opt.step(g)
    torch.cuda.synchronize()
    assert all(same(x.cpu().numpy(), y) for x, y in zip(there, here, strict=True))


def test_nothing_is_waited_for(rng):
    """A step returns while the GPU is still busy with what was asked before."""
    x = torch.randn(8192, 8192, device="cuda")
    w, g = torch.randn(10_000, device="cuda"), torch.randn(10_000, device="cuda")
    opt = full(w)
    opt.step(g)
    torch.cuda.synchronize()
    for _ in range(20):
        x = torch.tanh(x @ x)
    opt.step(g)
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert busy


def test_there_and_back_again(rng):
    start = rng.standard_normal(100_003).astype(np.float32)
    grads = [rng.standard_normal(start.size).astype(np.float32) for _ in range(6)]
    ours, moving = full(start.copy()), full(start.copy())
    for k, g in enumerate(grads):
        if k == 2:
            moving = moving.to("cuda")
        if k == 4:
            moving = moving.to("cpu")
        ours.step(g)
        moving.step(on_gpu(g) if 2 <= k < 4 else g)
    assert_same(moving, ours)


@pytest.mark.parametrize("library", ["cupy", "numba", "jax"])
def test_other_libraries(library, rng):
    start, g = rng.standard_normal(5003).astype(np.float32), rng.standard_normal(5003).astype(np.float32)
    here = start.copy()
    fastlr.Adam(here).step(g)
    if library == "cupy":
        cupy = pytest.importorskip("cupy")
        there, theirs = cupy.asarray(start), cupy.asarray(g)
        back = cupy.asnumpy
    elif library == "numba":
        from numba import cuda

        there, theirs = cuda.to_device(start), cuda.to_device(g)
        back = lambda x: x.copy_to_host()  # noqa: E731
    else:
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("this JAX is built without CUDA")
        there, theirs = on_gpu(start), jax.numpy.asarray(g)
        theirs.block_until_ready()
        back = lambda x: x.cpu().numpy()  # noqa: E731
    fastlr.Adam(there).step(theirs)
    torch.cuda.synchronize()
    assert same(back(there), here)


def test_too_little_memory():
    free, _ = torch.cuda.mem_get_info()
    w = torch.zeros(int(free * 0.45) // 4, device="cuda")
    with pytest.raises(MemoryError, match=r"needs [\d,]+ bytes on cuda:0"):
        fastlr.Adam(w)


SMALL = """
import torch, fastlr
w, g = torch.randn(40_000, device="cuda")[3:], torch.randn(40_000, device="cuda")[3:]
opt = fastlr.AdamW({"w": w, "b": torch.zeros(7, device="cuda")}, clip_norm=1.0, ema=0.9, shadow="bfloat16",
                   skip_nonfinite=True, statistics=True)
for _ in range(3):
    opt.step({"w": g, "b": torch.ones(7, device="cuda")})
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not there")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_memory_checker_finds_nothing(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def weights(dtype, device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 65), (7,), (), (BLOCK + 3,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_gradients(*groups, seed):
    for params in groups:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
def test_an_optimizer_of_pytorch(name):
    """The CPU's bits through `fastlr.torch`, with everything in the step; and parameters of both in one optimizer."""
    options = {"lr": 0.01, "clip_norm": 0.5, "ema": 0.9, "skip_nonfinite": True, "shadow": "bfloat16"}
    make = getattr(fastlr.torch, name)
    ours, theirs = weights(torch.float32, "cpu"), weights(torch.float32, "cuda")
    here, there = make(ours, **options), make(theirs, **options)
    for k in range(6):
        set_gradients(ours, theirs, seed=k)
        if k == 3:
            ours[1].grad[2] = theirs[1].grad[2] = float("nan")
        if k == 4:
            ours[0].grad = theirs[0].grad = None
        here.step()
        there.step()
        assert here.info.skipped == there.info.skipped == (k == 3)
    for a, b in zip((*ours, *here.ema, *here.shadow), (*theirs, *there.ema, *there.shadow), strict=True):
        assert torch.equal(a.detach(), b.detach().cpu())
    state = there.state_dict()
    assert [int(entry["step"]) for entry in state["state"].values()] == [4, 5, 5, 5]
    moved = weights(torch.float32, "cpu")
    with torch.no_grad():
        for p, q in zip(moved, theirs, strict=True):
            p.copy_(q)
    again = make(moved, **options)
    again.load_state_dict(state)
    mixed = make([*ours, *theirs], lr=0.01, clip_norm=0.5, skip_nonfinite=True)
    set_gradients(ours, theirs, moved, seed=9)
    again.step()
    mixed.step()
    assert mixed.info.clip_coef < 1 and not mixed.info.skipped
    theirs[0].grad[0, 0] = float("inf")
    before = [p.detach().cpu() for p in (*ours, *theirs)]
    mixed.step()
    assert mixed.info.skipped
    for p, old in zip((*ours, *theirs), before, strict=True):
        assert torch.equal(p.detach().cpu(), old)


def test_masters_on_the_host_of_weights_here():
    for chunk in (None, 5_000):
        ours, theirs = weights(torch.bfloat16, "cpu"), weights(torch.bfloat16, "cuda")
        here = fastlr.torch.HostOptimizer(ours, lr=0.01)
        there = fastlr.torch.HostOptimizer(theirs, lr=0.01, chunk=chunk)
        for k in range(5):
            set_gradients(ours, theirs, seed=k)
            if k == 2:
                ours[1].grad = theirs[1].grad = None
            here.step()
            there.step()
            there.zero_grad()
        torch.cuda.synchronize()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p.detach(), q.detach().cpu())
            assert torch.equal(here.state[p]["master"], there.state[q]["master"])
    set_gradients(theirs, seed=9)
    clipped = fastlr.torch.HostOptimizer(theirs, lr=0.01, clip_norm=0.1, skip_nonfinite=True)
    clipped.step()
    assert clipped.info.clip_coef < 1
    theirs[0].grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in theirs]
    clipped.step()
    assert clipped.info.skipped and all(map(torch.equal, before, (p.detach() for p in theirs)))
