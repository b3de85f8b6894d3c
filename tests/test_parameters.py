"""Parameters and gradients: trees, buffers, awkward sizes and layouts."""

from __future__ import annotations

import copy
import dataclasses
import mmap
import pickle
import re
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastlr
from fastlr.kernels.sums import BLOCK
from fastlr.schedules import Constant

Layer = namedtuple("Layer", ["w", "b"])


@dataclasses.dataclass(frozen=True)
class Head:
    scale: np.ndarray
    inner: dict


def tree(rng, dtype=np.float64):
    def make(*shape):
        return np.asarray(rng.standard_normal(shape), dtype)

    return {
        "layers": [Layer(make(3, 4), make(4)), Layer(make(4, 2), make(2))],
        "head": Head(make(), {"empty": make(0, 5), "x": make(2)}),
        "nothing": None,
        "pair": (make(1), OrderedDict(a=make(2, 1), b=None)),
        3: make(3),
    }


PATHS = (
    "layers.0.w",
    "layers.0.b",
    "layers.1.w",
    "layers.1.b",
    "head.scale",
    "head.inner.empty",
    "head.inner.x",
    "pair.0",
    "pair.1.a",
    "3",
)


def leaves_of(x):
    return [leaf for _, leaf in fastlr.arrays.trees.leaves_with_paths(x)]


def test_every_kind_of_container(rng):
    params, grads = tree(rng), tree(rng)
    before = [leaf.copy() for leaf in leaves_of(params)]
    opt = fastlr.SGD(params, lr=0.5)
    opt.step(grads)
    for leaf, old, g in zip(leaves_of(params), before, leaves_of(grads), strict=True):
        np.testing.assert_array_equal(leaf, old - 0.5 * g)
    assert tuple(opt.grads) == PATHS


def test_flatten_and_back(rng):
    params = tree(rng)
    buf = fastlr.flatten(params)
    assert tuple(buf) == PATHS and len(buf) == len(PATHS)
    assert buf.size == sum(leaf.size for leaf in leaves_of(params)) and buf.nbytes == 8 * buf.size
    assert buf.data.ctypes.data % 64 == 0
    again = buf.unflatten()
    assert type(again["layers"][0]) is Layer and type(again["head"]) is Head and again["nothing"] is None
    for a, b in zip(leaves_of(again), leaves_of(params), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.size == 0 or np.shares_memory(a, buf.data)
        assert not np.shares_memory(a, b)
    assert "layers.0.w 3x4" in repr(buf) and "4 more" in repr(buf)


def test_buffer_views_and_assignment(rng):
    buf = fastlr.flatten(tree(rng))
    buf["layers.0.b"] = np.arange(4.0)
    np.testing.assert_array_equal(buf["layers"]["0.b"], np.arange(4.0))
    np.testing.assert_array_equal(buf["layers"][0]["b"], np.arange(4.0))
    buf["layers"][1]["b"] = np.ones(2)
    np.testing.assert_array_equal(buf["layers.1.b"], [1.0, 1.0])
    assert "layers.1.b" in buf and "layers.1.c" not in buf
    assert dict(buf)["3"].shape == (3,)
    with pytest.raises(ValueError, match=r"'layers.0.b' has shape \(4,\), got \(1,\); nothing is broadcast."):
        buf["layers.0.b"] = np.ones(1)
    with pytest.raises(KeyError, match="no leaf 'layers.0.c'; did you mean 'layers.0.\\w'"):
        buf["layers.0.c"]
    with pytest.raises(KeyError, match="no leaf 'layers'"):
        buf["layers"] = np.ones(2)


def test_copies_and_pickles_of_a_buffer(rng):
    buf = fastlr.flatten(tree(rng))
    for other in (copy.copy(buf), copy.deepcopy(buf), pickle.loads(pickle.dumps(buf))):
        np.testing.assert_array_equal(other.data, buf.data)
        assert other.data.ctypes.data % 64 == 0 and not np.shares_memory(other.data, buf.data)
        other["layers.0.b"] = np.arange(4.0)
        np.testing.assert_array_equal(other.data[12:16], np.arange(4.0))
        assert type(other.unflatten()["head"]) is Head


def test_states_are_staggered_and_aligned():
    opt = fastlr.Adam(fastlr.flatten({"w": np.ones(10_000, np.float32)}), amsgrad=True)
    arrays = [opt.params.data, opt.grads.data, *(opt.state[s].data for s in opt.state)]
    offsets = [a.ctypes.data % 4096 for a in arrays]
    assert len(set(offsets)) == len(arrays)
    assert all(offset % 64 == 0 for offset in offsets)


def test_alloc_places_every_buffer():
    sizes = []

    def alloc(nbytes):
        sizes.append(nbytes)
        return mmap.mmap(-1, nbytes)

    buf = fastlr.flatten({"w": np.ones(1000)}, alloc=alloc)
    opt = fastlr.Adam(buf, alloc=alloc)
    opt.step(np.ones(1000)[::-1])  # gathered
    assert opt.grads.data.size == 1000
    assert len(sizes) == 5 and all(s >= 8000 for s in sizes)
    with pytest.raises(ValueError, match="expected at least .* writable ones"):
        fastlr.flatten({"w": np.ones(1000)}, alloc=lambda n: bytearray(10))
    with pytest.raises(TypeError, match="expected a buffer"):
        fastlr.flatten({"w": np.ones(1000)}, alloc=lambda n: "memory")


def test_alloc_that_returns_memory_that_is_in_use():
    page, n = np.zeros(8 * 1000 + 2 * 4096, np.uint8), 1000

    def same(nbytes):
        return page[:nbytes]

    params = fastlr.flatten({"w": np.ones(n)})
    message = "alloc returned memory that is in use"
    with pytest.raises(ValueError, match=message):
        fastlr.Adam(params, alloc=same, backend="numpy")
    opt = fastlr.SGD(params, momentum=0.5, alloc=same, backend="numpy")  # one buffer, and the first is gone
    with pytest.raises(ValueError, match=message):
        _ = opt.grads
    with pytest.raises(ValueError, match=message):
        opt.step(np.ones(n)[::-1])  # gathered
    with pytest.raises(ValueError, match=message):
        opt.rebuild(fastlr.flatten({"w": np.ones(n)}))
    with pytest.raises(ValueError, match=message):
        fastlr.flatten({"w": np.ones(n)}, alloc=same)
    opt.step(np.ones(n))
    assert (opt.state["momentum_buffer"].data == 1.0).all()  # nobody has written to it
    state = opt.state["momentum_buffer"]
    del opt
    with pytest.raises(ValueError, match=message):
        fastlr.SGD(params, momentum=0.5, alloc=same, backend="numpy")
    assert state["w"][0] == 1.0
    del state
    fastlr.SGD(params, momentum=0.5, alloc=same, backend="numpy")

    memory = np.arange(6000.0)
    w, other = memory[100:4100], np.ones(4000)
    uses = (
        lambda alloc: fastlr.SGD(w, momentum=0.5, alloc=alloc, backend="numpy"),
        lambda alloc: fastlr.SGD(w, alloc=alloc, backend="numpy").grads,
        lambda alloc: fastlr.SGD(other, momentum=0.5, ema=0.5, ema_out=w, alloc=alloc, backend="numpy"),
        lambda alloc: fastlr.SGD(other, lr_scale=w, alloc=alloc, backend="numpy").grads,
        lambda alloc: fastlr.flatten(w, alloc=alloc),
    )
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use(lambda nbytes: memory)
    assert np.array_equal(memory, np.arange(6000.0))


def test_alloc_that_returns_no_plain_memory():
    objects = np.array(["kept"] * 4096)[:, None].astype(object)
    before = objects.tolist()
    for alloc in (lambda nbytes: objects, lambda nbytes: None, lambda nbytes: np.zeros((2, nbytes), "m8[s]")):
        with pytest.raises(TypeError, match="expected a buffer"):
            fastlr.SGD(np.ones(3), momentum=0.5, alloc=alloc, backend="numpy")
    assert objects.tolist() == before
    with pytest.raises(TypeError, match="alloc must be a function of the number of bytes, got 5"):
        fastlr.SGD(np.ones(3), alloc=5, backend="numpy")


shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        shapes,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text("abc_", min_size=1, max_size=3), inner, max_size=3),
            st.tuples(inner, st.none()),
        ),
        max_leaves=6,
    ).filter(lambda t: "(" in repr(t)),
    st.sampled_from(["float32", "float64"]),
    st.booleans(),
    st.data(),
)
def test_any_tree(shape_tree, dtype, flat, data):
    """Whatever the tree: own arrays or flattened, whole gradients or leaves that are strided, transposed or None."""

    def arrays(node):
        if isinstance(node, dict):
            return {k: arrays(v) for k, v in node.items()}
        if isinstance(node, list):
            return [arrays(v) for v in node]
        if isinstance(node, tuple) and (not node or isinstance(node[0], int)):
            return np.asarray(np.random.default_rng(len(node)).standard_normal(node), dtype)
        if isinstance(node, tuple):
            return tuple(arrays(v) for v in node)
        return node

    params = arrays(shape_tree)
    if not leaves_of(params) or isinstance(params, np.ndarray):
        return
    structure = fastlr.arrays.trees.Structure(params)
    grads = []
    for leaf in leaves_of(params):
        kind = data.draw(st.sampled_from(["plain", "strided", "fortran", "read-only", "none"]))
        g = np.asarray(np.random.default_rng(leaf.size).standard_normal(leaf.shape), dtype)
        if kind == "strided" and g.ndim:
            g = np.repeat(g, 2, axis=-1)[..., ::2]
        elif kind == "fortran" and g.ndim:
            g = np.asfortranarray(g)
        elif kind == "read-only":
            g.flags.writeable = False
        grads.append(None if kind == "none" else g)
    before = [leaf.copy() for leaf in leaves_of(params)]
    target = fastlr.flatten(params) if flat else params
    opt = fastlr.SGD(target, lr=0.25)
    for _ in range(2):
        opt.step(structure.build(grads))
    after = leaves_of(target.unflatten() if flat else params)
    for leaf, old, g in zip(after, before, grads, strict=True):
        expected = old if g is None else (old - np.asarray(0.25, dtype) * g) - np.asarray(0.25, dtype) * g
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_awkward_sizes(n, rng):
    params, g = rng.standard_normal(n), rng.standard_normal(n)
    expected = params - 0.1 * g
    fastlr.SGD(params, lr=0.1).step(g)
    np.testing.assert_array_equal(params, expected)


def test_zero_dimensional_and_matrix_parameters(rng):
    scalar = np.array(2.0)
    fastlr.SGD(scalar, lr=0.5).step(np.array(1.0))
    assert scalar == 1.5
    matrix, g = rng.standard_normal((5, 7)), rng.standard_normal((5, 7))
    for gradient in (g, np.asfortranarray(g), g.reshape(-1), np.ascontiguousarray(g.T).T):
        params = matrix.copy()
        opt = fastlr.SGD(params, lr=0.1)
        opt.step(gradient)
        np.testing.assert_array_equal(params, matrix - 0.1 * g)
    assert opt.grads.shape == (5, 7)


def test_own_gradients(rng):
    params = {"w": np.zeros((2, 3)), "b": np.zeros(3)}
    opt = fastlr.SGD(params, lr=1.0)
    with pytest.raises(RuntimeError, match="step\\(\\) without gradients uses opt.grads, which nobody has used yet"):
        opt.step()
    assert opt.steps == 0
    opt.grads["w"][...] = 2.0
    opt.grads["b"] = np.ones(3)
    opt.step()
    np.testing.assert_array_equal(params["w"], -2.0)
    np.testing.assert_array_equal(params["b"], -1.0)
    opt.zero_grad()
    assert not opt.grads.data.any()
    opt.step()
    np.testing.assert_array_equal(params["w"], -2.0)
    opt.step(opt.grads)
    assert opt.steps == 3


def test_the_same_array_with_new_content_is_read_again(rng):
    params, g = np.zeros(10), np.zeros(10)
    opt = fastlr.SGD(params, lr=1.0)
    for k in range(3):
        g[:] = k
        opt.step(g)
    np.testing.assert_array_equal(params, -3.0)


def test_gradients_that_are_the_parameters(rng):
    """Weight shrinking: p - 0.5 * p. The kernel assumes that they are different memory, so they are copied."""
    for n in (5, 1000):
        params = {"a": rng.standard_normal(n), "b": rng.standard_normal(3)}
        start = {k: v.copy() for k, v in params.items()}
        fastlr.SGD(params, lr=0.5).step({"a": params["a"], "b": params["b"]})
        for k in params:
            np.testing.assert_array_equal(params[k], start[k] - 0.5 * start[k])
    whole = rng.standard_normal(100)
    before = whole.copy()
    fastlr.SGD(whole[:50], lr=1.0).step(whole[25:75])
    np.testing.assert_array_equal(whole[:50], before[:50] - before[25:75])


def test_many_leaves_that_overlap_are_found(rng):
    params = [np.zeros(3) for _ in range(20)]
    grads = [np.ones(3) for _ in range(19)] + [params[7]]
    opt = fastlr.SGD(params, lr=1.0)
    opt.step(grads)
    np.testing.assert_array_equal(params[7], -1.0)
    np.testing.assert_array_equal(params[19], 0.0)


def test_fresh_and_repeated_gradients_and_other_forms_in_turn(rng):
    params = {"w": np.zeros(4), "b": np.zeros(2)}
    opt = fastlr.SGD(params, lr=1.0)
    grads = {"w": np.ones(4), "b": np.ones(2)}
    for g in (
        grads,
        grads,
        {"b": np.ones(2), "w": np.ones(4)},
        np.ones(6),
        np.ones(6),
        {"w": np.ones(4), "b": None},
        grads,
    ):
        opt.step(g)
    np.testing.assert_array_equal(params["w"], -7.0)
    np.testing.assert_array_equal(params["b"], -6.0)
    opt.grads.data[:] = 1.0
    opt.step()
    opt.step(grads)
    np.testing.assert_array_equal(params["w"], -9.0)


def test_a_flat_gradient_with_leaves_left_out(rng):
    """Each leaf reads its own part, wherever it stands."""
    for container in (lambda x: x, fastlr.flatten):
        for frozen in ("a", "b", "c"):
            params = container({k: np.zeros(2) for k in "abc"})
            opt = fastlr.SGD(params, lr=1.0, groups={f"[!{frozen}]": {"frozen": True}})
            g = np.arange(6.0)
            for gradient in (g, g.copy()):
                opt.step(gradient)
            for k, name in enumerate("abc"):
                np.testing.assert_array_equal(params[name], -2 * g[2 * k : 2 * k + 2] if name == frozen else 0.0)


def test_large_gradients_are_not_kept_alive():
    import weakref

    params = np.zeros(2_000_000)
    opt = fastlr.SGD(params, lr=1.0)
    g = np.ones(2_000_000)
    seen = weakref.ref(g)
    opt.step(g)
    opt.step(g)
    assert params[0] == -2.0
    del g
    assert seen() is None
    leaves = [np.zeros(2_000_000), np.zeros(3)]
    opt = fastlr.SGD(leaves, lr=1.0)
    grads = [np.ones(2_000_000), np.ones(3)]
    seen = weakref.ref(grads[0])
    for _ in range(2):
        opt.step(grads)
    grads[0] = np.full(2_000_000, 2.0)
    assert seen() is None
    opt.step(grads)
    assert leaves[0][0] == -4.0 and leaves[1][0] == -3.0


def test_arrays_of_other_libraries_as_gradients():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    params = {"w": np.zeros(4, np.float32)}
    opt = fastlr.SGD(params, lr=1.0)
    opt.step({"w": torch.ones(4)})
    np.testing.assert_array_equal(params["w"], -1.0)
    flat = np.zeros(4, np.float32)
    fastlr.SGD(flat, lr=1.0).step(torch.ones(4))
    np.testing.assert_array_equal(flat, -1.0)
    with pytest.raises(TypeError, match="grads\\['w'\\] is a Tensor that NumPy cannot read"):
        opt.step({"w": torch.ones(4, requires_grad=True)})


def test_population(rng):
    one = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2)}
    lrs = np.geomspace(1e-3, 1.0, 50)
    betas1 = np.linspace(0.0, 0.95, 50)
    fleet = fastlr.flatten(one, population=50)
    assert fleet["w"].shape == (50, 3, 2)
    opt = fastlr.Adam(fleet, lr=lrs, betas=(betas1, 0.99), groups={"b": {"weight_decay": 0.1}})
    alone = [{k: v.copy() for k, v in one.items()} for _ in range(50)]
    opts = [
        fastlr.Adam(p, lr=lrs[k], betas=(betas1[k], 0.99), groups={"b": {"weight_decay": 0.1}})
        for k, p in enumerate(alone)
    ]
    for _ in range(5):
        g = {k: rng.standard_normal((50, *v.shape)) for k, v in one.items()}
        info = opt.step(g)
        for k, o in enumerate(opts):
            o.step({name: x[k] for name, x in g.items()})
    np.testing.assert_array_equal(info.lr, lrs)
    for k in range(50):
        for name in one:
            np.testing.assert_array_equal(fleet[name][k], alone[k][name])
    with pytest.raises(ValueError, match=r"lr must be one number or an array of shape \(50,\), got shape \(49,\)"):
        opt.lr = lrs[:49]
    with pytest.raises(ValueError, match="read-only"):
        opt.lr[0] = 1.0


def test_groups(rng):
    names = ["embed", "body.w", "body.bias", "head.w", "head.bias"]
    params = {n: np.ones(3) for n in names}
    opt = fastlr.SGD(
        params,
        lr=0.1,
        weight_decay=0.5,
        groups={"*.bias": {"weight_decay": 0.0}, "head.*": {"lr": 0.01}, "embed": {"frozen": True}},
    )
    info = opt.step({n: np.ones(3) for n in names})
    expected = {"embed": 1.0, "body.w": 1 - 0.1 * 1.5, "body.bias": 0.9, "head.w": 1 - 0.01 * 1.5, "head.bias": 0.99}
    for n in names:
        np.testing.assert_allclose(params[n], expected[n], rtol=1e-15)
    assert info.lr == 0.1 and info.lrs["head.*"] == 0.01 and info.lrs["*.bias"] == 0.1
    assert info.asdict() == {"step": 1, "lr": 0.1, "lr/*.bias": 0.1, "lr/head.*": 0.01, "lr/embed": 0.1}
    with pytest.raises(AttributeError):
        info.lr = 3.0
    assert opt.groups["head.*"].paths == ("head.w", "head.bias")
    opt.groups["head.*"].lr = 1.0
    opt.groups["embed"].frozen = False
    opt.lr = 0.2
    before = {n: p.copy() for n, p in params.items()}
    info = opt.step({n: np.ones(3) for n in names})
    assert (info.lr, info.lrs["head.*"], opt.groups["*.bias"].lr) == (0.2, 1.0, 0.2)
    np.testing.assert_allclose(params["head.bias"], before["head.bias"] - 1.0)
    np.testing.assert_allclose(params["embed"], before["embed"] - 0.2 * (1 + 0.5 * before["embed"]))


def test_later_groups_win_and_case_matters():
    opt = fastlr.SGD(
        {"aB": np.ones(1), "b": np.ones(1)}, groups={"*": {"lr": 0.5}, "a*": {"lr": 0.25}, "aB": {"momentum": 0.0}}
    )
    opt.step({"aB": np.ones(1), "b": np.ones(1)})
    assert (opt.params["aB"][0], opt.params["b"][0]) == (0.75, 0.5)
    with pytest.raises(ValueError, match="the pattern 'ab' matches no parameter"):
        fastlr.SGD({"aB": np.ones(1)}, groups={"ab": {"lr": 0.5}})


def test_a_path_is_that_leaf_before_it_is_a_pattern():
    """Paths may hold the characters of patterns."""
    params = {name: np.ones(1) for name in ("layers[0].w", "layers0.w", "h[0]", "h0", "*", "?")}
    frozen = {"layers[0].w": {"frozen": True}, "h[0]": {"lr": 2.0}, "*": {"lr": 3.0}, "?": {"lr": 4.0}}
    opt = fastlr.SGD(params, lr=1.0, groups=frozen, backend="numpy")
    assert {pattern: group.paths for pattern, group in opt.groups.items()} == {p: (p,) for p in frozen}
    opt.step({name: np.ones(1) for name in params})
    assert [p.item() for p in params.values()] == [1.0, 0.0, -1.0, 0.0, -2.0, -3.0]
    opt.step({name: np.ones(1) for name in params}, only=["h[0]", "h[[]0]"])
    opt.step({name: np.ones(1) for name in params}, only="layers[[]0[]].w")
    assert [p.item() for p in params.values()] == [1.0, 0.0, -3.0, 0.0, -2.0, -3.0]
    with pytest.raises(ValueError, match=r"matches no parameter\. .* In a pattern \[\[\] stands for a bracket\."):
        opt.step({name: np.ones(1) for name in params}, only="layers[1]*")


def test_a_frozen_leaf_keeps_its_count_and_its_clock_goes_on():
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    opt = fastlr.Adam(params, groups={"b": {"frozen": True}})
    g = {"a": np.ones(2), "b": np.ones(2)}
    for _ in range(3):
        opt.step(g)
    state = opt.state_dict()
    assert state["step"].tolist() == [[3], [0]] and state["clock"].tolist() == [[3], [3]]
    assert not params["b"].any() and not opt.state["exp_avg"]["b"].any()
    opt.groups["b"].frozen = False
    opt.step({"a": None, "b": np.ones(2)})
    state = opt.state_dict()
    assert state["step"].tolist() == [[3], [1]] and state["clock"].tolist() == [[3], [4]]
    assert opt.steps == 4


def test_every_hyperparameter_can_change_between_steps(rng):
    p, q = np.ones(4), np.ones(4)
    a, b = fastlr.AdamW(p), fastlr.AdamW(q, backend="numpy")
    for k in range(6):
        for opt in (a, b):
            opt.lr, opt.betas, opt.eps, opt.weight_decay = 0.1 / (k + 1), (0.5 + k / 20, 0.9), 10.0**-k, 0.1 * (k % 2)
            opt.maximize = bool(k % 3)
            opt.step(np.full(4, 0.5 * k))
    np.testing.assert_array_equal(p, q)


def test_a_setting_that_would_need_another_state(rng):
    opt = fastlr.SGD(np.ones(3), backend="numpy")
    for _ in range(2):  # before the first step and after it
        with pytest.raises(ValueError, match=r"need other states than this optimizer has \(momentum_buffer\)"):
            opt.momentum = 0.9
        assert opt.momentum == 0.0
        opt.step(np.ones(3))
    assert opt.steps == 2


@fastlr.rule
def signs(p, g):
    """A rule without a rate."""
    return p - 0.1 * np.sign(g)


RELATED = [
    (fastlr.SGD, {"momentum": 0.9, "nesterov": True}, "dampening", 0.5, "nesterov=True needs a momentum above 0"),
    (fastlr.SGD, {"momentum": 0.9, "nesterov": True}, "momentum", 0.0, "nesterov=True needs a momentum above 0"),
    (fastlr.SGD, {"momentum": 0.9, "nesterov": True}, "dampening", Constant(0.5), "a dampening of 0"),
    (fastlr.SGD, {"momentum": 0.9, "dampening": 0.5}, "nesterov", True, "nesterov=True needs a momentum above 0"),
    (fastlr.SGD, {"momentum": 0.9}, "momentum", 0.0, "need other states than this optimizer has"),
    (fastlr.RMSprop, {}, "centered", True, "need other states than this optimizer has (grad_avg)"),
    (fastlr.Adam, {}, "amsgrad", True, "need other states than this optimizer has (max_exp_avg_sq)"),
    (fastlr.DoG, {}, "relative_distance", 0.5, "relative_distance must be the same in all groups"),
    (fastlr.DoG, {}, "layerwise", True, "layerwise must be the same in all groups"),
    (fastlr.Prodigy, {}, "betas", (0.9, 0.9), "betas[1] must be the same in all groups"),
]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("make", "settings", "name", "value", "message"), RELATED)
def test_what_does_not_go_with_the_others_is_refused_where_it_is_set(
    make, settings, name, value, message, grouped, steps
):
    if "other states" in message and grouped and value == 0.0:
        return  # the other leaf still needs it
    opt = make({"a": np.ones(2), "b": np.ones(3)}, **settings, groups={"b": {}}, backend="numpy")
    if "in all groups" in message and not grouped:
        setattr(opt, name, value)  # of all of them
        opt.step({"a": np.ones(2), "b": np.ones(3)})
        return
    for _ in range(steps):
        opt.step({"a": np.ones(2), "b": np.ones(3)})
    target = opt.groups["b"] if grouped else opt
    before = getattr(target, name)
    with pytest.raises(ValueError, match=re.escape(message)):
        setattr(target, name, value)
    assert getattr(target, name) == before and name not in opt.groups["b"].overrides
    opt.step({"a": np.ones(2), "b": np.ones(3)})
    assert opt.steps == steps + 1


def test_decoupled_decay_without_a_rate_is_refused_where_it_is_set():
    opt = fastlr.Optimizer(np.ones(2), signs, weight_decay=0.1, backend="numpy")
    with pytest.raises(ValueError, match="decoupled weight decay is in proportion to lr"):
        opt.decoupled_weight_decay = True
    assert opt.decoupled_weight_decay is False and opt.step(np.ones(2)).step == 1


def test_what_has_to_be_the_same_is_set_in_one_group_after_another():
    params = {"a": np.ones(2), "b": np.ones(3)}
    opt = fastlr.Prodigy(params, groups={"b": {"betas": (0.8, 0.999)}}, backend="numpy")
    opt.betas = (0.9, 0.9)
    with pytest.raises(ValueError, match="must be the same in all groups"):
        opt.step(params)
    opt.groups["b"].betas = (0.8, 0.9)
    assert opt.step(params).step == 1


def test_setting_what_does_not_exist():
    opt = fastlr.SGD(np.ones(1))
    with pytest.raises(AttributeError, match="SGD has no hyperparameter 'learning_rate' to set; there are"):
        opt.learning_rate = 0.1
    with pytest.raises(AttributeError):
        _ = opt.betas
    assert "SGD(" in repr(opt) and "1 x float64" in repr(opt)
