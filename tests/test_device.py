"""Steps on a GPU, on an emulated one: the GPU's kernels and everything above the driver, bit for bit as on the CPU."""

from __future__ import annotations

import inspect
import sys
import weakref
from pathlib import Path

import emulation
import numpy as np
import pytest
from arrays import gradients, same, tree_map
from cases import CASES, PLAIN, Case
from emulation import on_device

import fastlr
from fastlr.arrays import places
from fastlr.gpu import arrays as device_arrays
from fastlr.gpu import driver as devices
from fastlr.kernels import emulation as kernel_emulation
from fastlr.kernels.formats import FORMATS
from fastlr.kernels.functions import IN_SCHEDULES, for_kernels
from fastlr.kernels.staging import define
from fastlr.kernels.sums import BLOCK
from fastlr.step.scheduled import distinguished

STEPS = 4
SIZES = [0, 1, 2, 3, 5, 8, 127, 1009, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 17]
ENCODE = {name: f.make(np.where)[1] for name, f in FORMATS.items()}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Arrays of `emulation.Array` are on a GPU, and so is what asks for "cuda"."""
    monkeypatch.setattr(places, "FINDERS", [emulation.find, *places.FINDERS])
    monkeypatch.setattr(devices, "gpu", lambda ordinal=0: emulation.DEVICES[ordinal])
    monkeypatch.setattr(devices, "require", lambda: None)
    gpu = emulation.DEVICES[0]
    gpu.calls.clear()
    gpu.room_for = None
    return gpu


def assert_same(ours, theirs):
    """Two optimizers know the same, bit for bit: parameters, states, counters, settings."""
    a, b = ours.state_dict(params=True), theirs.state_dict(params=True)
    assert a.keys() == b.keys()
    for key in a:
        assert same(a[key], b[key]), f"{key} differs: {a[key]} {b[key]}"


def assert_same_info(ours, theirs, paths=()):
    mine, others = ours.asdict(), theirs.asdict()
    assert mine.keys() == others.keys()
    assert all(same(mine[k], others[k]) for k in mine), (mine, others)
    assert same(ours.skipped, theirs.skipped)
    for path in paths:
        for x, y in zip(ours[path], theirs[path], strict=True):
            assert (x is None) == (y is None) and (x is None or same(x, y)), path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_rule(case: Case, dtype, rng):
    if dtype == "float64" and case not in PLAIN:
        pytest.skip("the settings that are not the default: float32 alone")
    for n in SIZES if case in PLAIN else [1009]:
        start, grads = rng.standard_normal(n).astype(dtype), gradients(rng, n, dtype, STEPS)
        here, there = start.copy(), on_device(start, offset=n % 4)
        ours = case.make(here, backend="numpy", **case.settings)
        theirs = case.make(there, **case.settings)
        for k, g in enumerate(grads):
            ours.step(g)
            theirs.step(on_device(g, offset=n % 4 if k != 2 else 1))  # the third is aligned otherwise than the rest
        assert_same(theirs, ours)


SHAPES = {"a": (301,), "b": (7, 11), "c": (), "d": (0,), "e": (BLOCK + 5,), "f": (3,)}
OPTIONS = {
    "clip all": {"clip_norm": 0.5},
    "clip group": {"clip_norm": 0.5, "scope": "group", "groups": {"[be]": {"lr": 0.1}, "f": {"clip_norm": 1e-3}}},
    "clip leaf, values, decay": {"clip_norm": 0.1, "scope": "leaf", "clip_value": 0.01, "weight_decay": 0.1},
    "skip, ascend": {"skip_nonfinite": True, "maximize": True},
    "average, copy": {"ema": 0.9, "shadow": "bfloat16"},
    "all but statistics": {
        "clip_norm": 1.0,
        "skip_nonfinite": True,
        "ema": 0.5,
        "shadow": "float16",
        "decoupled_weight_decay": True,
        "weight_decay": 0.1,
        "loss_scale": True,
        "lr_scale": True,
    },
    "statistics": {"statistics": True, "groups": {"a": {"frozen": True}}},
    "loss scale, statistics": {"loss_scale": True, "statistics": True, "clip_norm": 1.0},
}


def here_and_there(option, flat, rng, put):
    """Adam with a setting on the CPU, and the same one over parameters put on a GPU."""
    start = {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in SHAPES.items()}
    factors = {k: np.asarray(rng.integers(0, 3, s), np.float32) for k, s in SHAPES.items()}
    here, there = tree_map(np.copy, start), tree_map(put, start)
    if flat:
        here, there = fastlr.flatten(here), fastlr.flatten(there)
    mine, others = dict(OPTIONS[option]), dict(OPTIONS[option])
    if "loss_scale" in mine:
        mine["loss_scale"], others["loss_scale"] = (
            fastlr.LossScale(4.0, interval=2, backoff=0.25, min_scale=3.0) for _ in range(2)
        )
    if "lr_scale" in mine:
        mine["lr_scale"], others["lr_scale"] = factors, tree_map(put, factors)
    return fastlr.Adam(here, backend="numpy", **mine), fastlr.Adam(there, **others)


@pytest.mark.parametrize("flat", [False, True], ids=["tree", "buffer"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, flat, rng):
    ours, theirs = here_and_there(option, flat, rng, on_device)
    options = OPTIONS[option]
    infos = []
    for k in range(6):
        g = {name: np.asarray(rng.standard_normal(s), np.float32) for name, s in SHAPES.items()}
        if k in (2, 5):
            g["b"][3, 3] = np.nan
        given = tree_map(on_device, g)
        if flat and k % 2:  # in one array, every leaf as far from a good address as its parameters
            given = on_device(np.concatenate([x.reshape(-1) for x in g.values()]))
        infos.append((theirs.step(given), ours.step(g)))
        if k == 3:
            ours.lr = theirs.lr = 0.02
    assert_same(theirs, ours)
    for info, expected in infos:  # long after they were made
        assert_same_info(info, expected, SHAPES if option != "average, copy" else ())
    assert ours.skipped_steps == theirs.skipped_steps
    if "shadow" in options:
        assert all(
            same(places.HOST.download(theirs.shadow[k]), np.asarray(ours.shadow[k]).view(np.uint16))
            if theirs.shadow[k].dtype == np.uint16
            else same(theirs.shadow[k], ours.shadow[k])
            for k in SHAPES
        )
    if "ema" in options:
        assert all(same(theirs.ema[k], ours.ema[k]) for k in SHAPES)
    if "loss_scale" in options:
        assert theirs.loss_scale.scale == ours.loss_scale.scale != 4.0


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_two_bytes(kind, dtype, rng):
    n = 3 * BLOCK + 11
    start = rng.standard_normal(n).astype(dtype)
    settings = {"grad_dtype": kind, "clip_norm": 0.5, "shadow": kind}
    here, there = start.copy(), on_device(start, 1)
    ours, theirs = fastlr.AdamW(here, backend="numpy", **settings), fastlr.AdamW(there, **settings)
    for offset in (1, 8, 2):
        g = ENCODE[kind](rng.standard_normal(n).astype(np.float32))
        ours.step(g)
        theirs.step(on_device(g, offset))
    assert_same(theirs, ours)
    assert same(np.asarray(theirs.shadow).view(np.uint16), np.asarray(ours.shadow).view(np.uint16))


def test_own_gradients_are_cleared_and_accumulated(rng):
    start = {"w": rng.standard_normal((5, 7)).astype(np.float32), "b": np.zeros(4, np.float32)}
    here, there = tree_map(np.copy, start), tree_map(on_device, start)
    ours = fastlr.SGD(here, lr=0.1, zero_grads=True, skip_nonfinite=True, backend="numpy")
    theirs = fastlr.SGD(there, lr=0.1, zero_grads=True, skip_nonfinite=True)
    for k in range(5):
        for opt, put in ((ours, np.asarray), (theirs, on_device)):
            local = np.random.default_rng(k)
            parts = [
                {"w": local.standard_normal((5, 7)).astype(np.float32), "b": None},
                {"w": None, "b": local.standard_normal(4).astype(np.float32)},
            ]
            if k == 3:
                parts[0]["w"][1, 1] = np.inf
            for part in parts[: 1 + k % 2]:
                opt.accumulate({n: None if g is None else put(g) for n, g in part.items()})
            opt.step(grad_scale=2.0)
            assert not np.asarray(opt.grads.data).any()
    assert_same(theirs, ours)


def test_parts_frozen_leaves_and_missing_gradients(rng):
    start = {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in SHAPES.items()}
    here, there = tree_map(np.copy, start), tree_map(on_device, start)
    ours, theirs = fastlr.NAdam(here, backend="numpy", clip_norm=1.0, scope="leaf"), None
    theirs = fastlr.NAdam(there, clip_norm=1.0, scope="leaf")
    for k in range(8):
        g = {name: np.asarray(rng.standard_normal(s), np.float32) for name, s in SHAPES.items()}
        only = [None, None, "a", ["b", "c", "d", "e", "f"], None, None, "[ab]", "*"][k]
        if k == 1:
            g["b"] = None
        if k == 4:
            ours.groups, theirs.groups  # noqa: B018
            ours.frozen = theirs.frozen = True
        if k == 5:
            ours.frozen = theirs.frozen = False
        info = theirs.step(tree_map(lambda x: None if x is None else on_device(x), g), only=only)
        expected = ours.step(g, only=only)
        assert_same_info(info, expected)
    assert_same(theirs, ours)
    assert ours.steps == theirs.steps


@pytest.mark.parametrize("case", [fastlr.Prodigy, fastlr.DoG, fastlr.NAdam])
@pytest.mark.parametrize("capturable", [False, True])
def test_state_of_groups_with_leaves_that_are_left_out(case, capturable, rng):
    start = {k: np.asarray(rng.standard_normal(4), np.float32) for k in "abc"}
    here, there = tree_map(np.copy, start), tree_map(on_device, start)
    settings = {"skip_nonfinite": True, "groups": {"c": {"frozen": True, "lr": 0.1}}}
    ours = case(here, backend="numpy", **settings)
    theirs = case(there, capturable=capturable, **settings)
    for k in range(6):
        g = {name: rng.standard_normal(4).astype(np.float32) for name in start}
        g["b"] = None if k < 2 else g["b"]
        if k in (1, 3):
            g["a"][1] = np.inf
        if k == 4:
            ours.groups["c"].frozen = theirs.groups["c"].frozen = False
        info = theirs.step(tree_map(lambda x: None if x is None else on_device(x), g))
        assert_same_info(info, ours.step(g))
    assert_same(theirs, ours)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_norm": 1.0, "skip_nonfinite": True, "shadow": "bfloat16"},
        {"clip_norm": 1.0, "scope": "group", "statistics": True},
    ],
    ids=["few", "whole step", "sums"],
)
def test_averages_of_leaves_that_are_not_updated(settings, capturable, rng):
    start = {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in SHAPES.items()}
    here, there = tree_map(np.copy, start), tree_map(lambda x: on_device(x, offset=1), start)
    settings = {**settings, "ema": 0.75}
    ours, theirs = fastlr.Adam(here, backend="numpy", **settings), fastlr.Adam(there, capturable=capturable, **settings)
    for k in range(6):
        g = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in SHAPES.items()}
        if k in (1, 2):
            g["e"] = g["b"] = None
        if k == 2 and "skip_nonfinite" in settings:
            g["a"][3] = np.nan
        if k == 4:
            ours.frozen = theirs.frozen = True
        info = theirs.step(tree_map(lambda x: None if x is None else on_device(x), g), only="[abf]" if k == 3 else None)
        assert_same_info(info, ours.step(g, only="[abf]" if k == 3 else None))
    assert_same(theirs, ours)
    assert all(same(theirs.ema[k], ours.ema[k]) for k in SHAPES)


def test_populations(rng):
    models = 7
    tree = {"w": rng.standard_normal((3, 5)).astype(np.float32), "b": np.zeros(5, np.float32)}
    here = fastlr.flatten(tree, population=models)
    there = fastlr.flatten(tree_map(on_device, tree), population=models)
    assert there["w"].shape == (models, 3, 5)
    lr = np.geomspace(1e-4, 1e-1, models)
    settings = {"lr": lr, "clip_norm": 0.5, "skip_nonfinite": True, "statistics": True}
    ours = fastlr.Adam(here, backend="numpy", loss_scale=fastlr.LossScale(2.0, interval=2), **settings)
    theirs = fastlr.Adam(there, loss_scale=fastlr.LossScale(2.0, interval=2), **settings)
    for k in range(5):
        g = rng.standard_normal(here.size).astype(np.float32)
        if k in (1, 2):
            g[k * 5] = np.nan
        assert_same_info(theirs.step(on_device(g)), ours.step(g), tree)
    assert_same(theirs, ours)
    assert same(theirs.loss_scale.scale, ours.loss_scale.scale)
    assert same(theirs.skipped_steps, ours.skipped_steps)


# What a step costs the host, and what it waits for


def test_a_plain_step_is_one_launch_and_waits_for_nothing(device, rng):
    params, g = on_device(rng.standard_normal(100_000).astype(np.float32)), on_device(np.ones(100_000, np.float32))
    opt = fastlr.Adam(params)
    opt.step(g)
    device.calls.clear()
    for k in range(3):
        opt.lr = 0.1 / (k + 1)
        assert opt.step(g).step == k + 2
    assert device.calls == ["launch"] * 3
    opt.step(on_device(np.ones(100_000, np.float32)))
    assert device.calls[3].startswith("upload") and device.calls[4:] == ["launch"]


def test_a_full_step_is_three_launches_and_waits_only_when_asked(device, rng):
    tree = {f"w{k}": on_device(rng.standard_normal(500).astype(np.float32)) for k in range(40)}
    g = {k: on_device(np.asarray(v)) for k, v in tree.items()}
    opt = fastlr.AdamW(tree, clip_norm=1.0, ema=0.9, shadow="bfloat16", skip_nonfinite=True)
    opt.step(g)
    device.calls.clear()
    info = opt.step(g)
    assert device.calls == ["launch"] * 3
    assert info.step == 2 and "wait" in device.calls
    device.calls.clear()
    assert info.clip_coef < 1 and not info.skipped
    assert device.calls == []  # asked once


def test_results_are_put_aside_only_for_who_may_ask(device, rng):
    params, g = on_device(rng.standard_normal(50).astype(np.float32)), on_device(np.ones(50, np.float32))
    opt = fastlr.SGD(params, lr=0.1, clip_norm=1.0)
    for _ in range(2):
        opt.step(g)
    device.calls.clear()
    info = opt.step(g)
    assert "copy" not in device.calls
    opt.step(g)
    assert "copy" in device.calls
    assert info.step == 3


# Graphs


def full(params, **options):
    settings = {"clip_norm": 1.0, "skip_nonfinite": True, "ema": 0.9, "shadow": "bfloat16", "statistics": True}
    return fastlr.AdamW(params, **{**settings, **options})


def test_replays_equal_steps(device, rng):
    start = rng.standard_normal(BLOCK + 100).astype(np.float32)
    here, there, g = start.copy(), on_device(start), on_device(np.zeros_like(start))
    ours = full(here, backend="numpy", loss_scale=fastlr.LossScale(8.0, interval=3))
    theirs = full(there, capturable=True, loss_scale=fastlr.LossScale(8.0, interval=3))
    grads = [rng.standard_normal(start.size).astype(np.float32) for _ in range(20)]
    grads[7][3] = grads[8][4] = np.nan
    g[:] = grads[0]
    ours.step(grads[0])
    theirs.step(g)  # compiles, loads, uploads
    infos = []
    graph = device.capture(lambda: infos.append(theirs.step(g)))
    assert theirs.steps == 1, "a capture is no step"
    for k in range(1, 20):
        g[:] = grads[k]
        if k == 5:
            ours.lr = theirs.lr = 0.05  # reaches the graph without another step
        graph.replay()
        expected = ours.step(grads[k])
        assert theirs.steps == ours.steps
        assert_same_info(infos[0], expected, [""])
        assert np.asarray(theirs.loss_scale.on_device).tolist() == [ours.loss_scale.scale]
        assert theirs.loss_scale.scale == ours.loss_scale.scale
    assert ours.skipped_steps == 2
    assert_same(theirs, ours)


def test_a_graph_keeps_its_gradients(device, rng):
    start = rng.standard_normal(300).astype(np.float32)
    there, here = on_device(start), start.copy()
    first, second, third = (on_device(rng.standard_normal(300).astype(np.float32)) for _ in range(3))
    theirs, ours = fastlr.Adam(there, capturable=True), fastlr.Adam(here, backend="numpy")
    theirs.step(first)
    graphs = [device.capture(lambda g=g: theirs.step(g)) for g in (first, second)]
    theirs.step(third)
    graphs[0].replay()
    graphs[1].replay()
    theirs.step(third)
    for g in (first, third, first, second, third):
        ours.step(np.asarray(g))
    assert_same(theirs, ours)


def test_a_graph_follows_a_restored_optimizer(device, rng):
    start = rng.standard_normal(300).astype(np.float32)
    there, here = on_device(start), start.copy()
    g = on_device(rng.standard_normal(300).astype(np.float32))
    theirs, ours = (
        fastlr.Adam(x, lr=0.1, backend=b, **o)
        for x, b, o in ((there, "numba", {"capturable": True}), (here, "numpy", {}))
    )
    theirs.step(g)
    ours.step(np.asarray(g))
    graph = device.capture(lambda: theirs.step(g))
    saved, kept = theirs.snapshot(), ours.snapshot()
    theirs.lr = ours.lr = 0.01
    for _ in range(3):
        graph.replay()
        ours.step(np.asarray(g))
    assert_same(theirs, ours)
    theirs.restore(saved)
    ours.restore(kept)
    for _ in range(2):
        graph.replay()
        ours.step(np.asarray(g))
    assert_same(theirs, ours)
    assert theirs.steps == 3
    with pytest.warns(RuntimeWarning, match="Capture again"):
        theirs.maximize = True


def test_a_capture_without_capturable_is_refused(device, rng):
    params = on_device(rng.standard_normal(30).astype(np.float32))
    opt, g = fastlr.Adam(params), on_device(np.ones(30, np.float32))
    opt.step(g)
    before = opt.snapshot()
    with pytest.raises(RuntimeError, match="Build the optimizer with capturable=True"):
        device.capture(lambda: opt.step(g))
    assert all(same(before[k], v) for k, v in opt.snapshot().items())


# From one place to another


def test_there_and_back_again(rng):
    start = {"w": rng.standard_normal((40, 30)).astype(np.float32), "b": rng.standard_normal(7).astype(np.float32)}
    grads = [tree_map(lambda x: rng.standard_normal(x.shape).astype(np.float32), start) for _ in range(6)]
    settings = {"clip_norm": 1.0, "ema": 0.9, "shadow": "float16", "loss_scale": fastlr.LossScale(4.0, interval=2)}
    ours = full(
        tree_map(np.copy, start), backend="numpy", **{**settings, "loss_scale": fastlr.LossScale(4.0, interval=2)}
    )
    moving = full(fastlr.flatten(start), backend="numpy", **settings)
    for k, g in enumerate(grads):
        if k == 2:
            moving = moving.to("cuda")
            assert moving.params.device == "cuda:0" and isinstance(moving.params["w"], fastlr.DeviceArray)
        if k == 4:
            moving = moving.to("cpu")
        ours.step(g)
        moving.step(tree_map(on_device, g) if 2 <= k < 4 else g)
    assert isinstance(moving.params["w"], np.ndarray)
    assert_same(moving, ours)
    assert moving.loss_scale.scale == ours.loss_scale.scale
    assert same(moving.shadow["w"], ours.shadow["w"])


def test_a_copy_on_the_host_is_made_the_same_way():
    opt = fastlr.Adam(np.ones(3), backend="numpy")
    assert (
        opt.to("cpu")._stepper.state.options.backend == "numpy"
        and opt.to("cuda").to("cpu")._stepper.state.options.backend == "numba"
    )


def test_buffers_move(rng):
    tree = {"w": rng.standard_normal((4, 3)).astype(np.float32), "b": np.ones(2, np.float32)}
    there = fastlr.flatten(tree, device="cuda")
    assert there.to("cuda:0") is there
    assert same(there["w"].numpy(), tree["w"])
    assert same(there.to("cpu")["b"], tree["b"])
    there["b"] = np.full(2, 3.0)
    assert same(there["b"].numpy(), np.full(2, 3.0, np.float32))
    assert "cuda:0" in repr(there)
    with pytest.raises(ValueError, match="has shape"):
        there["b"] = np.zeros(3)
    with pytest.raises(ValueError, match='device must be "cpu", "cuda"'):
        there.to("gpu")


def test_files_and_rebuild(tmp_path, rng):
    start = {"w": rng.standard_normal(50).astype(np.float32), "b": np.ones(2, np.float32)}
    ours, theirs = full(tree_map(np.copy, start), backend="numpy"), full(tree_map(on_device, start))
    g = tree_map(lambda x: rng.standard_normal(x.shape).astype(np.float32), start)
    for _ in range(3):
        ours.step(g)
        theirs.step(tree_map(on_device, g))
    theirs.save(tmp_path / "run.npz")
    again = full(tree_map(lambda x: on_device(np.zeros_like(x)), start))
    again.load(tmp_path / "run.npz")
    assert_same(again, ours)
    assert same(again.shadow["w"], theirs.shadow["w"])
    more = {**tree_map(np.copy, ours.params), "new": np.zeros(3, np.float32)}
    assert ours.rebuild(more) == again.rebuild(tree_map(on_device, more)) == ("new",)
    g["new"] = np.ones(3, np.float32)
    ours.step(g)
    again.step(tree_map(on_device, g))
    assert_same(again, ours)


# Arrays of other libraries


class Foreign:
    """An array of a library that fastlr has not heard of."""

    def __init__(self, array, read_only=False, strides=None):
        self.array, self.read_only, self.strides = array, read_only, strides

    @property
    def __cuda_array_interface__(self):
        a = self.array
        return {
            "shape": a.shape,
            "typestr": a.dtype.str,
            "data": (a.ctypes.data, self.read_only),
            "strides": self.strides,
            "version": 3,
        }


def test_arrays_by_interface(rng):
    start, g = rng.standard_normal((6, 50)).astype(np.float32), rng.standard_normal((6, 50)).astype(np.float32)
    here, there = start.copy(), start.copy()
    ours, theirs = fastlr.Adam(here, backend="numpy"), fastlr.Adam(Foreign(there))
    ours.step(g)
    theirs.step(Foreign(g, read_only=True))
    theirs.step(Foreign(g, strides=(200, 4)))
    ours.step(g)
    assert same(there, here)
    assert isinstance(theirs.state["exp_avg"], fastlr.DeviceArray)
    assert same(theirs.state["exp_avg"].numpy(), ours.state["exp_avg"])
    with pytest.raises(ValueError, match="is read-only"):
        fastlr.Adam(Foreign(there, read_only=True))
    with pytest.raises(ValueError, match="is not C-contiguous"):
        theirs.step(Foreign(g, strides=(4, 24)))


def test_tensors(rng, monkeypatch):
    torch = pytest.importorskip("torch")

    class Tensors(device_arrays._Torch):
        def stream(self):
            return 0

    place = Tensors(emulation.DEVICES[0], torch.device("cpu"))
    find = lambda leaf: place if isinstance(leaf, torch.Tensor) else None  # noqa: E731
    monkeypatch.setattr(places, "FINDERS", [find, *places.FINDERS])
    start, g = rng.standard_normal((30, 5)).astype(np.float32), rng.standard_normal((30, 5)).astype(np.float32)
    here, there = {"w": start.copy()}, {"w": torch.tensor(start)}
    settings = {"clip_norm": 1.0, "ema": 0.5, "shadow": "bfloat16"}
    ours, theirs = fastlr.AdamW(here, backend="numpy", **settings), fastlr.AdamW(there, **settings)
    for _ in range(3):
        ours.step({"w": g})
        theirs.step({"w": torch.tensor(g, requires_grad=True)})
    assert same(there["w"].numpy(), here["w"])
    assert theirs.shadow["w"].dtype == torch.bfloat16
    assert torch.equal(theirs.shadow["w"], there["w"].bfloat16())
    assert same(theirs.ema["w"].numpy(), ours.ema["w"])
    low = torch.tensor(g).bfloat16()
    theirs.step({"w": low})
    ours.step({"w": low})
    assert same(there["w"].numpy(), here["w"])
    theirs.step({"w": torch.tensor(g.T.copy()).T})  # not contiguous: gathered
    ours.step({"w": g})
    assert same(there["w"].numpy(), here["w"])
    with pytest.raises(TypeError, match=r"requires grad.*Pass its \.data"):
        fastlr.AdamW({"w": torch.zeros(3, requires_grad=True)})


# What is wrong


def _params(**options):
    return fastlr.Adam({"w": on_device(np.ones(8, np.float32)), "b": on_device(np.ones(2, np.float32))}, **options)


BAD = {
    "mixed places": (
        lambda: fastlr.Adam({"a": on_device(np.ones(3)), "b": np.ones(3)}),
        ValueError,
        "params['b'] is a NumPy array on cpu, but params['a'] is a emulated array on cuda:0",
    ),
    "two devices": (
        lambda: fastlr.Adam({"a": on_device(np.ones(3)), "b": on_device(np.ones(3), kind=emulation.Other)}),
        ValueError,
        "params['b'] is a emulated array on cuda:1",
    ),
    "alloc": (lambda: _params(alloc=bytearray), TypeError, "alloc= places buffers in the host's memory"),
    "backend": (lambda: _params(backend="numpy"), ValueError, "backend='numpy' steps on the CPU"),
    "capturable on the CPU": (
        lambda: fastlr.Adam(np.ones(3), capturable=True),
        ValueError,
        "capturable=True is for parameters on a GPU",
    ),
    "not contiguous": (
        lambda: fastlr.Adam({"w": on_device(np.ones((4, 4)))[:, ::2]}),
        ValueError,
        "params['w'] is not C-contiguous, so it cannot be updated in place. Pass a contiguous copy",
    ),
    "not aligned": (
        lambda: fastlr.Adam({"w": on_device(np.ones(20, np.uint8))[1:17].view(np.float32)}),
        ValueError,
        "is no multiple of the size of a float32. Pass a copy of it.",
    ),
    "dtype": (lambda: fastlr.Adam(on_device(np.ones(3, np.int32))), TypeError, "expected float32 or float64"),
    "ema_out on the CPU": (
        lambda: fastlr.Adam({"w": on_device(np.ones(3))}, ema=0.9, ema_out={"w": np.ones(3)}),
        TypeError,
        "ema_out['w'] is a ndarray, expected a emulated array",
    ),
    "lr_scale negative": (
        lambda: fastlr.Adam(on_device(np.ones(3)), lr_scale=on_device(-np.ones(3))),
        ValueError,
        "lr_scale must be non-negative",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


BAD_GRADIENTS = {
    "on the CPU": ({"w": np.ones(8, np.float32), "b": None}, TypeError, "is a ndarray on cpu, but the parameters are"),
    "other device": (
        {"w": on_device(np.ones(8, np.float32), kind=emulation.Other), "b": None},
        TypeError,
        "on cuda:1, but the parameters are on cuda:0",
    ),
    "dtype": ({"w": on_device(np.ones(8)), "b": None}, TypeError, "grads['w'] has dtype float64"),
    "bits": ({"w": on_device(np.ones(8, np.uint16)), "b": None}, TypeError, "need grad_dtype="),
    "shape": ({"w": on_device(np.ones(9, np.float32)), "b": None}, ValueError, "grads['w'] has shape (9,)"),
    "no array": ({"w": 3, "b": None}, TypeError, "grads['w'] is a int"),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_bad_gradients(name):
    opt = _params()
    before = opt.snapshot()
    grads, error, message = BAD_GRADIENTS[name]
    with pytest.raises(error) as raised:
        opt.step(grads)
    assert message in str(raised.value)
    assert all(same(before[k], v) for k, v in opt.snapshot().items())


def test_a_loss_scale_is_of_one_optimizer():
    scale = fastlr.LossScale(8.0)
    with pytest.raises(ValueError, match="belongs to no optimizer on a GPU"):
        scale.on_device  # noqa: B018
    opt = _params(loss_scale=scale)
    assert np.asarray(scale.on_device).tolist() == [8.0] and "on a GPU" in repr(scale)
    with pytest.raises(ValueError, match=r"Pass loss_scale\.copy\(\)"):
        _params(loss_scale=scale)
    again = opt.to("cuda")
    scale.load_state_dict({"scale": 2.0, "good": 1})
    assert scale.scale == 2.0 and again.loss_scale.scale == 8.0
    assert opt.to("cpu").loss_scale.scale == 2.0
    scale.update(True)
    assert scale.scale == 1.0 and np.asarray(scale.on_device).tolist() == [1.0]


# What the documentation says that only one place can do

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
ROWS = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.read_text().splitlines() if "|" in line]
FOLLOWS = {name: [cell == "yes" for cell in cells] for name, *cells in ROWS[2:]}


class Interface(Foreign):
    """The same, of NumPy's strides."""

    def __init__(self, array):
        super().__init__(array, strides=None if array.flags.c_contiguous else array.strides)


def _misaligned(array, put):
    raw = put(np.zeros(array.nbytes + 1, np.uint8))
    out = np.asarray(raw)[1:].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out.view(type(raw))


def _step(grads, **options):
    """What makes an SGD over arrays that `put` puts somewhere, and steps with gradients made of good ones."""

    def run(w, put, offer):
        opt = fastlr.SGD({k: offer(v) for k, v in w.items()}, lr=0.5, **options)
        good = {k: put(np.linspace(0.1, 2.0, v.size, dtype=np.float32).reshape(v.shape)) for k, v in w.items()}
        opt.step({k: offer(v) for k, v in grads(good, w, put).items()})

    return run


AS_THEY_ARE = lambda good, w, put: good  # noqa: E731
MAKES = {
    "gradients that are not C-contiguous": _step(lambda g, w, put: {**g, "w": put(np.asarray(g["w"]).T.copy()).T}),
    "gradients that are not aligned": _step(
        lambda g, w, put: {k: _misaligned(np.asarray(v), put) for k, v in g.items()}
    ),
    "gradients that share memory with the parameters": _step(lambda g, w, put: {**g, "w": w["w"]}),
    "gradients of float32 beside some of float16": _step(
        lambda g, w, put: {**g, "b": put(np.asarray(g["b"]).astype(np.float16))}
    ),
    "gradients of float64 for parameters of float32": _step(
        lambda g, w, put: {k: put(np.asarray(v).astype(np.float64)) for k, v in g.items()}
    ),
    "`alloc=`": _step(AS_THEY_ARE, momentum=0.9, alloc=bytearray),
    '`backend="numpy"`': _step(AS_THEY_ARE, backend="numpy"),
    "`capturable=True`": _step(AS_THEY_ARE, capturable=True),
    "`grad_scale=`": lambda w, put, offer: fastlr.SGD({k: offer(v) for k, v in w.items()}, lr=0.5).step(
        {k: offer(put(np.ones_like(np.asarray(v)))) for k, v in w.items()}, grad_scale=1.0
    ),
    "`stream=`": lambda w, put, offer: fastlr.SGD({k: offer(v) for k, v in w.items()}, lr=0.5).step(
        {k: offer(put(np.ones_like(np.asarray(v)))) for k, v in w.items()}, stream=7
    ),
}


def test_the_documentation_names_what_is_tried():
    assert MAKES.keys() == FOLLOWS.keys()


@pytest.mark.parametrize("what", FOLLOWS)
def test_what_the_documentation_says_of_places(what):
    """Accepted or refused as the table says; where it is accepted, with the same bits everywhere."""
    as_it_is = lambda x: x  # noqa: E731
    bits = []
    for put, offer, possible in zip(
        (np.asarray, on_device, np.asarray), (as_it_is, as_it_is, Interface), FOLLOWS[what], strict=True
    ):
        w = {"w": put(np.arange(12, dtype=np.float32).reshape(3, 4)), "b": put(np.ones(5, np.float32))}
        before = tree_map(np.array, w)
        if possible:
            MAKES[what](w, put, offer)
            bits.append(tree_map(np.array, w))
            assert all(same(bits[0][k], bits[-1][k]) and not same(bits[-1][k], before[k]) for k in w)
        else:
            with pytest.raises((TypeError, ValueError)):
                MAKES[what](w, put, offer)
            assert all(same(np.array(w[k]), before[k]) for k in w)


def test_copies_of_gradients_are_in_the_graph(device):
    w, ours = on_device(np.arange(1.0, 9.0, dtype=np.float32)), np.arange(1.0, 9.0, dtype=np.float32)
    opt = fastlr.SGD(w, lr=0.5, capturable=True)
    opt.step(w)  # the parameters are their own gradients
    graph = device.capture(lambda: opt.step(w))
    for _ in range(2):
        graph.replay()
    assert same(np.asarray(w), ours / 8)


@pytest.mark.parametrize("made", [devices.Gpu, emulation.Device])
def test_devices_are_complete(made):
    """What stands in for a GPU has each method of the protocol, with the same arguments."""
    for name, method in vars(devices.Device).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert name in vars(made), name
            assert list(inspect.signature(vars(made)[name]).parameters) == list(inspect.signature(method).parameters)


def test_too_little_memory(device):
    w = on_device(np.ones(100_000, np.float32))
    device.room_for = 1000
    with pytest.raises(MemoryError, match=r"a buffer of 100,000 x float32 needs 400,000 bytes on cuda:0"):
        fastlr.Adam(w)


def test_a_kernel_that_does_not_load_changes_nothing(device, monkeypatch):
    opt = fastlr.Adagrad(on_device(np.ones(8, np.float32)), lr_decay=0.123, skip_nonfinite=True)
    before = opt.snapshot()

    def refuse(*args):
        raise fastlr.DeviceError("the kernel 'update' cannot be loaded.")

    monkeypatch.setattr(type(device), "kernel", refuse)
    with pytest.raises(fastlr.DeviceError, match="cannot be loaded"):
        opt.step(on_device(np.ones(8, np.float32)))
    assert all(same(before[k], v) for k, v in opt.snapshot().items())


def test_tables_are_given_back(device):
    given = []
    device.release_tables = lambda memory, stream: given.append(memory)
    try:
        opt = _params()
        opt.step(tree_map(lambda x: on_device(np.asarray(x)), opt.params))
        gone = weakref.ref(opt._stepper.rows)
        del opt
        assert gone() is None and given
    finally:
        del device.release_tables


def test_device_arrays():
    x = device_arrays.on_device(emulation.DEVICES[0]).allocate(12, "float32")
    y = x[2:8].reshape((2, 3))
    assert y.shape == (2, 3) and len(y) == 2 and not y.numpy().any()
    assert y.__cuda_array_interface__["data"][0] == x.__cuda_array_interface__["data"][0] + 8
    with pytest.raises(TypeError, match="slices of a flat array"):
        x[3]
    with pytest.raises(ValueError, match="do not fit"):
        x.reshape((5, 5))
    with pytest.raises(TypeError, match="cannot be pickled"):
        x.__reduce__()


@pytest.mark.skipif("numba_cuda" not in sys.modules and devices.problem() is None, reason="there is a GPU")
def test_without_a_gpu(in_subprocess):
    program = """
import sys, numpy as np, fastlr
assert not {"fastlr.kernels.cuda", "numba.cuda.dispatcher", "cuda.bindings.driver", "torch"} & set(sys.modules)
try:
    fastlr.flatten({"w": np.ones(3)}, device="cuda")
except fastlr.DeviceError as error:
    print(error)
from fastlr.info import describe
print(describe()["gpu"])
"""
    said = in_subprocess(program)
    assert "a GPU was asked for, but n" in said
    assert "Arrays on the CPU work without." in said


# Schedules, which a GPU evaluates itself where it decides


@pytest.mark.parametrize("capturable", [False, True])
def test_schedules_in_a_kernel(device, rng, capturable):
    s = fastlr.schedules
    start = {"w": rng.standard_normal(300).astype(np.float32), "b": np.zeros(5, np.float32)}
    here, there = tree_map(np.copy, start), tree_map(on_device, start)
    settings = {
        "lr": s.Plateau(s.CosineRestarts(0.1, 3, growth=2).warmup(2, shape="log"), 0.5, 0),
        "betas": (s.Linear(0.8, 0.9, 5), 0.99),
        "clip_norm": lambda n: 1.0 / (1.0 + n),
        "skip_nonfinite": True,
        "groups": {"b": {"lr": s.Plateau(s.CosineRestarts(0.3, 2, growth=2).warmup(1, shape="log"), 0.5, 0)}},
    }
    ours = fastlr.Adam(here, backend="numpy", **settings)
    theirs = fastlr.Adam(there, capturable=capturable, **settings)
    for k in range(9):
        g = tree_map(lambda x: rng.standard_normal(x.shape).astype(np.float32), start)
        if k == 4:
            g["w"][5] = np.nan
        info, expected = theirs.step(tree_map(on_device, g)), ours.step(g)
        assert dict(info.lrs) == dict(expected.lrs)
        if k in (2, 5, 6):
            ours.observe(1.0)
            theirs.observe(1.0)
    assert_same(theirs, ours)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1.0, "scope": "leaf"}, {"skip_nonfinite": True}], ids=str)
def test_leaves_that_come_late_on_a_schedule(settings, capturable, rng):
    """Whoever decides, the host or the GPU, reads a schedule at the same step: of parts, late leaves and skipped."""
    lr = fastlr.schedules.Linear(0.5, 0.1, 20)
    start = {k: rng.standard_normal(4).astype(np.float32) for k in "abc"}
    here, there = tree_map(np.copy, start), tree_map(on_device, start)
    settings = {**settings, "lr": lr, "groups": {"c": {"frozen": True}}}
    ours = fastlr.SGD(here, backend="numpy", **settings)
    theirs = fastlr.SGD(there, capturable=capturable, **settings)
    for k, only in enumerate([None, None, "a", "b", ["b", "c"], "a", None, "c", "[ab]", "*", None]):
        g = {n: rng.standard_normal(4).astype(np.float32) for n in start}
        g["a"] = None if k in (1, 9) else g["a"]
        if k in (3, 6) and "skip_nonfinite" in settings:
            g["b"][1] = np.nan
        if k == 5:
            ours.groups["c"].frozen = theirs.groups["c"].frozen = False
        expected, given = ours.step(g, only=only), tree_map(lambda x: None if x is None else on_device(x), g)
        info = theirs.step(given, only=only)
        assert info.step == expected.step
        assert info.lr == expected.lr
    assert_same(theirs, ours)


def test_schedules_in_a_graph(device, rng):
    lr = fastlr.schedules.Cosine(0.1, 20).warmup(5)
    start, g = rng.standard_normal(50).astype(np.float32), on_device(rng.standard_normal(50).astype(np.float32))
    here, there = start.copy(), on_device(start)
    ours, theirs = fastlr.Adam(here, lr=lr, backend="numpy"), fastlr.Adam(there, lr=lr, capturable=True)
    theirs.step(g)
    ours.step(np.asarray(g))
    infos = []
    graph = device.capture(lambda: infos.append(theirs.step(g)))
    for _ in range(12):
        graph.replay()
        assert infos[0].lr == ours.step(np.asarray(g)).lr
    ours.lr = 0.5 * fastlr.schedules.Cosine(0.1, 20).warmup(5)
    with pytest.warns(RuntimeWarning, match="Capture again"):
        theirs.lr = ours.lr  # another formula: another kernel
    theirs.step(g)
    ours.step(np.asarray(g))
    assert_same(theirs, ours)


@pytest.mark.parametrize("capturable", [False, True])
def test_groups_may_follow_schedules_of_different_kinds(device, rng, capturable):
    """A row says which kind it follows, and none is one of them: any group can be set at any time."""
    s = fastlr.schedules
    start = {name: rng.standard_normal(20).astype(np.float32) for name in "abcd"}
    here, there = tree_map(np.copy, start), tree_map(on_device, start)
    groups = {
        "b": {"lr": s.Plateau(s.StepDecay(0.1, 0.5, 2), patience=0)},
        "c": {"lr": 0.01},
        "d": {"lr": s.Cosine(0.3, 4), "weight_decay": lambda n: 0.1 / (1.0 + n)},
    }
    ours = fastlr.Adam(here, lr=s.Cosine(0.1, 5), weight_decay=0.0, groups=groups, backend="numpy")
    theirs = fastlr.Adam(there, lr=s.Cosine(0.1, 5), weight_decay=0.0, groups=groups, capturable=capturable)

    def steps():
        for _ in range(3):
            g = tree_map(lambda x: rng.standard_normal(x.shape).astype(np.float32), start)
            assert dict(theirs.step(tree_map(on_device, g)).lrs) == dict(ours.step(g).lrs)
            for opt in (ours, theirs):
                opt.observe(1.0)
        assert_same(theirs, ours)

    steps()
    for lr in (s.Linear(0.1, 0.0, 9), 0.1):  # in one group after the other
        for pattern in (None, "b", "c", "d"):
            for opt in (ours, theirs):
                group = opt if pattern is None else opt.groups[pattern]
                group.lr = s.Plateau(lr, patience=0) if pattern == "b" else lr
        steps()


def test_a_population_follows_schedules_of_arrays_on_a_gpu(device, rng):
    s = fastlr.schedules
    rates = np.geomspace(1e-3, 0.1, 3)
    here = fastlr.flatten({"w": np.ones(5)}, population=3)
    there = fastlr.flatten({"w": np.ones(5)}, population=3, device="cuda")
    lr = rates * s.Cosine(1.0, 6).clip(1e-3, rates)
    ours = fastlr.SGD(here, lr=lr, backend="numpy")
    theirs = fastlr.SGD(there, lr=lr)
    for _ in range(3):
        g = rng.standard_normal((3, 5))
        info = theirs.step({"w": on_device(g)})
        assert info.lr.tolist() == ours.step({"w": g}).lr.tolist() == lr(info.step - 1).tolist()
    assert_same(theirs, ours)


def test_extreme_schedules_in_a_kernel():
    """As on the host, to the last bit: overflow, periods at the end of the integers, powers of numbers that are off."""
    s = fastlr.schedules
    tried = [
        s.StepDecay(1e-6, 2.0, every=1).clip(0.0, 1.0),
        s.Exponential(0.0, factor=1e300),
        0.0 * s.Exponential(1e-6, factor=1.2).repeat(5).per_epoch(3),
        s.Exponential(0.1, half_life=3.7),
        s.Cyclic(0.0, 0.1, 3, mode="triangular2"),
        s.TimeBased(0.1, 1e308),
        s.CosineRestarts(0.1, 3, growth=2, decay=0.9),
    ]
    source, _ = distinguished(tried)
    target = kernel_emulation.TARGET
    functions = for_kernels(IN_SCHEDULES, target.where, target.function)
    function = target.function(define(source, "value", functions))
    for kind, schedule in enumerate(tried, 1):
        numbers = np.array([kind, *schedule.staged.numbers], np.float64)
        for n in (0, 1, 2, 10, 11, 3894, 10**6, 2**53 - 2, 2**53):
            assert function(float(n), numbers) == schedule(n), (schedule, n)


def test_a_function_that_numba_cannot_compile():
    opt = _params(lr=lambda n: float(str(0.1)), clip_norm=1.0)
    before = opt.snapshot()
    with pytest.raises(ValueError, match="the function that lr follows cannot be compiled by Numba for a GPU"):
        opt.step(tree_map(lambda x: on_device(np.asarray(x)), opt.params))
    assert all(same(before[k], v) for k, v in opt.snapshot().items())
