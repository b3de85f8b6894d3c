"""Everything a step does around its rule, against separate passes in float64 and against PyTorch's utilities."""

from __future__ import annotations

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_ON, PLAIN, Case

import fastlr
from fastlr.kernels.formats import FORMATS
from fastlr.kernels.sums import BLOCK
from fastlr.step import plans

STEPS = 6
# float64 against float64, in other orders of the operations, over a few steps.
TOLERANCE = 1e-11
DECODE, ENCODE = (
    {n: f.make(np.where)[0] for n, f in FORMATS.items()},
    {n: f.make(np.where)[1] for n, f in FORMATS.items()},
)

# Each option by itself: keyword arguments of the optimizer and of the step.
OPTIONS = {
    "clip_norm": ({"clip_norm": 0.7}, {}),
    "clip_value": ({"clip_value": 0.4}, {}),
    "unscale": ({}, {"grad_scale": 512.0}),
    "skip": ({"skip_nonfinite": True}, {}),
    "ema": ({"ema": 0.8}, {}),
    "shadow": ({"shadow": "bfloat16"}, {}),
    "zero_grads": ({"zero_grads": True}, {}),
    "lr_scale": ({"lr_scale": True}, {}),
    "statistics": ({"statistics": True}, {}),
    "bfloat16": ({"grad_dtype": "bfloat16"}, {}),
}
PAIRED = [case for case in PLAIN if case.name in ("adamw", "lars")]


def settings_of(*names: str, n: int) -> tuple[dict, dict]:
    """Options by name, those of the optimizer and those of the step."""
    build: dict = {}
    step: dict = {}
    for name in names:
        build.update(OPTIONS[name][0])
        step.update(OPTIONS[name][1])
    if build.get("lr_scale"):
        build["lr_scale"] = np.linspace(0.0, 2.0, n)
    return build, step


def raw_gradients(rng, n, options) -> list[np.ndarray]:
    """Gradients as a trainer has them, in float64: rounded to bfloat16, scaled, one of them not finite."""
    grads = [rng.standard_normal(n) * 0.5 for _ in range(STEPS)]
    if "unscale" in options:
        grads = [512.0 * g for g in grads]
    if "bfloat16" in options:
        grads = [DECODE["bfloat16"](ENCODE["bfloat16"](g.astype(np.float32))).astype(np.float64) for g in grads]
    if "skip" in options:
        grads[2][n // 2] = np.nan
        grads[3][0] = np.inf
    return grads


def separately(case: Case, start, grads, options, build):
    """The passes one after the other, each a line of NumPy: parameters and average after each step."""
    seen, kept = [], []
    for raw in grads:
        g = raw / 512.0 if "unscale" in options else raw
        kept.append("skip" not in options or bool(np.isfinite(g).all()))
        if "clip_norm" in options and kept[-1]:
            g = g * min(1.0, 0.7 / (np.sqrt(np.sum(g**2)) + 1e-6))
        if "clip_value" in options:
            g = np.minimum(np.maximum(g, -0.4), 0.4)
        seen.append(g)
    settings = dict(case.settings)
    if "lr_scale" in options:
        settings["lr"] = case.make(np.zeros(1), **case.settings).lr * build["lr_scale"]
    history = iter(case.oracle(start, [g for g, k in zip(seen, kept, strict=True) if k], **settings))
    theta, ema = start.copy(), start.copy()
    for k in kept:
        if k:
            theta = next(history)
            ema = 0.8 * ema + 0.2 * theta
        yield theta, ema, k


def check(case: Case, options, rng, n=313, backend="numpy"):
    build, step = settings_of(*options, n=n)
    start, grads = rng.standard_normal(n), raw_gradients(rng, n, options)
    params = start.copy()
    opt = case.make(params, backend=backend, **case.settings, **build)
    for raw, (theta, ema, kept) in zip(grads, separately(case, start, grads, options, build), strict=True):
        before = params.copy()
        if "bfloat16" in options:
            with np.errstate(all="ignore"):
                info = opt.step(ENCODE["bfloat16"](raw.astype(np.float32)), **step)
        else:
            opt.grads[:] = raw
            info = opt.step(**step)
            assert opt.grads.any() == ("zero_grads" not in options)
        np.testing.assert_allclose(params, theta, rtol=TOLERANCE, atol=TOLERANCE)
        assert info.skipped is not kept
        if "ema" in options:
            np.testing.assert_allclose(opt.ema, ema, rtol=TOLERANCE, atol=TOLERANCE)
        if "shadow" in options:
            with np.errstate(all="ignore"):
                rounded = params.astype(np.float32).astype(opt.shadow.dtype)
            assert np.mean(opt.shadow.view(np.uint16) != rounded.view(np.uint16)) < 0.01  # rounded twice there
        g = raw / step.get("grad_scale", 1.0)
        measured = {"clip_norm", "skip", "statistics"} & set(options)
        assert (info.grad_norm is None) == (not measured)
        if measured and kept:
            assert info.grad_norm == pytest.approx(np.sqrt(np.sum(g**2)), rel=1e-12)
        if "clip_norm" in options and kept:
            assert info.clip_coef == pytest.approx(min(1.0, 0.7 / (np.sqrt(np.sum(g**2)) + 1e-6)), rel=1e-12)
        if "statistics" in options and kept:
            leaf = info[""]
            assert leaf.grad_norm == pytest.approx(info.grad_norm, rel=1e-12)
            assert leaf.param_norm == pytest.approx(np.sqrt(np.sum(params**2)), rel=1e-12)
            assert leaf.update_norm == pytest.approx(np.sqrt(np.sum((params - before) ** 2)), rel=1e-9)
    if "lr_scale" in options:
        assert params[0] == start[0]
    assert opt.skipped_steps == (2 if "skip" in options else 0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_each_option_against_separate_passes(case: Case, option, rng):
    check(case, (option,), rng)


@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids="-".join)
@pytest.mark.parametrize("case", PAIRED, ids=repr)
def test_pairs_of_options_against_separate_passes(case: Case, pair, rng):
    if "bfloat16" in pair and "zero_grads" in pair:
        pytest.skip("gradients that are handed in are never cleared")
    check(case, pair, rng)


@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_all_options_against_separate_passes(case: Case, rng):
    check(case, tuple(o for o in OPTIONS if o != "bfloat16"), rng)


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_compiled(option, rng):
    check(next(c for c in PLAIN if c.name == "adam"), (option,), rng, backend="numba")


# The same bits


def everything(n_leaves_tree, **more):
    return {
        **ALL_ON,
        "lr_scale": {
            k: np.abs(np.cos(np.arange(v.size, dtype=v.dtype))).reshape(v.shape) for k, v in n_leaves_tree.items()
        },
        **more,
    }


SHAPES = {"a": (301,), "b": (7, 11), "c": (), "d": (0,), "e": (2 * BLOCK + 5,), "f": (3,)}


def run_everything(case, rng, container=lambda x: x, dtype="float32", groups=None, steps=4, **more):
    """Train with every option on; what is left, in bits."""
    start = {k: np.asarray(rng.standard_normal(s), dtype) for k, s in SHAPES.items()}
    params = container(start)
    opt = case.make(params, groups=groups, **case.settings, **everything(start, **more))
    infos = []
    for k in range(steps):
        for path in SHAPES:
            opt.grads[path] = np.asarray(rng.standard_normal(SHAPES[path]), dtype)
        if k == 2:
            opt.grads["b"][3, 4] = np.inf
        infos.append(opt.step(grad_scale=4.0))
    leaves = {f"params.{k}": np.asarray(params[k]).copy() for k in SHAPES}
    bits = {**leaves, **{k: v for k, v in opt.state_dict().items() if k != "fastlr"}}
    bits.update({f"shadow.{k}": opt.shadow[k].view(np.uint16) for k in SHAPES})
    bits["norms"] = np.array([[i.grad_norm, i.clip_coef, *(x for p in SHAPES for x in i[p])] for i in infos])
    assert [i.skipped for i in infos] == [k == 2 for k in range(steps)]
    return bits


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def seeded():
    return np.random.default_rng(7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_every_option_compiled_equals_numpy(case: Case, dtype):
    reference = run_everything(case, seeded(), dtype=dtype, backend="numpy")
    assert_same(run_everything(case, seeded(), dtype=dtype), reference)


@pytest.mark.parametrize("case", PAIRED, ids=repr)
def test_same_bits_for_any_threads_layout_and_groups(case: Case, monkeypatch):
    monkeypatch.setattr(plans, "_WORTH_WAKING", 0)
    expected = run_everything(case, seeded(), threads=1)
    for threads in (2, 5):
        assert_same(run_everything(case, seeded(), threads=threads), expected)
    assert_same(run_everything(case, seeded(), container=fastlr.flatten), expected)
    lr = case.make(np.zeros(1), **case.settings).lr
    grouped = run_everything(case, seeded(), groups={"b": {"lr": lr}, "[ef]": {"lr": lr}})
    assert_same(grouped, expected)
    monkeypatch.setattr(plans, "_WORTH_STREAMING", 0)  # the shadow past the caches
    assert_same(run_everything(case, seeded(), container=fastlr.flatten), expected)


NEIGHBOURS = [o for o in OPTIONS if o != "zero_grads"]


@pytest.mark.parametrize("pair", list(zip(NEIGHBOURS, NEIGHBOURS[1:] + NEIGHBOURS[:1], strict=True)), ids="-".join)
def test_pairs_compiled_equal_numpy(pair, rng):
    """On the shortest rule, and each option with two others, since each pair is a kernel of its own."""
    n = 2 * BLOCK + 77
    build, step = settings_of(*pair, n=n)
    if "lr_scale" in build:
        build["lr_scale"] = build["lr_scale"].astype(np.float32)
    start = rng.standard_normal(n).astype(np.float32)
    with np.errstate(all="ignore"):
        grads = [g.astype(np.float32) for g in raw_gradients(rng, n, pair)]
        if "bfloat16" in pair:
            grads = [ENCODE["bfloat16"](g) for g in grads]
    results = []
    for backend in ("numba", "numpy"):
        params = start.copy()
        opt = fastlr.SGD(params, lr=0.1, weight_decay=0.1, backend=backend, **build)
        for g in grads:
            info = opt.step(g, **step)
        more = [opt.ema] if "ema" in pair else []
        more += [opt.shadow.view(np.uint16)] if "shadow" in pair else []
        results.append([params, *more, np.array([repr(info), info[""] if info._layout else ""], object)])
    for a, b in zip(*results, strict=True):
        if a.dtype == object:
            assert str(a) == str(b)
        else:
            np.testing.assert_array_equal(a, b)


# An option that is off


def test_what_is_off_leaves_no_trace():
    off = {"clip_norm": None, "clip_value": None, "skip_nonfinite": False, "ema": None, "shadow": None}
    off.update(zero_grads=False, lr_scale=None, statistics=False, loss_scale=None, scope="leaf", grad_dtype="float16")
    plain, with_options = fastlr.Adam(np.zeros(3)), fastlr.Adam(np.zeros(3), **off)
    plain.step(np.ones(3))
    with_options.step(np.ones(3), grad_scale=1.0)
    assert plain._stepper.kernel() is with_options._stepper.kernel()
    assert not plain.rule.measures and not plain.rule.quantities


def test_a_step_allocates_nothing_of_a_buffers_size(rng):
    params = fastlr.flatten({"w": rng.standard_normal(400_000).astype(np.float32)})
    options = everything({"w": np.zeros(400_000, np.float32)})
    opt = fastlr.AdamW(params, **options)
    opt.grads.data[:] = 1.0
    opt.step(grad_scale=2.0)
    tracemalloc.start()
    try:
        opt.grads.data[:] = 1.0
        opt.step(grad_scale=2.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000


# Sums


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38, 1e-44])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_norms_of_huge_and_tiny_gradients(size, backend, rng):
    g = (rng.uniform(0.5, 1.0, 70_001) * size).astype(np.float32)
    w = np.zeros(70_001, np.float32)
    opt = fastlr.SGD(w, lr=1.0, clip_norm=1.0, skip_nonfinite=True, statistics=True, backend=backend)
    info = opt.step(g)
    expected = float(np.sqrt(np.sum(g.astype(np.float64) ** 2)))
    assert not info.skipped
    assert info.grad_norm == pytest.approx(expected, rel=1e-13)
    coefficient = min(1.0, 1.0 / (expected + 1e-6))
    precise = 1e-6 if coefficient == 1 or coefficient > 1e-37 else 1e-3  # a coefficient that float32 has as subnormal
    np.testing.assert_allclose(w, -(coefficient * g.astype(np.float64)), rtol=precise, atol=1e-44)
    assert info[""].update_norm == pytest.approx(float(np.linalg.norm(w.astype(np.float64))), rel=1e-12)


def scaled_by_sums(p, g, m, *, lr, eps=1e-8):
    """Everything that sums can be used for: over a leaf, a group, everything, and of what follows from a sum."""
    whole, part = fastlr.norm(g, over="all"), fastlr.norm(p, "group")
    m = 0.5 * m + g / (whole + eps)
    mean = fastlr.total(m) / (1 + fastlr.total(m * m, over="all"))
    if part > 1:
        m = m - mean
    return p - lr * m * fastlr.norm(m) / (fastlr.norm(p) + 1), m


@pytest.mark.parametrize("container", [lambda x: x, fastlr.flatten])
def test_a_users_rule_with_sums(container, rng):
    shapes = {"a": (4, 5), "b": (40_000,), "c": (3,)}
    start = {k: rng.standard_normal(s) for k, s in shapes.items()}
    grads = [{k: rng.standard_normal(s) for k, s in shapes.items()} for _ in range(3)]
    rule = fastlr.rule(scaled_by_sums)
    assert len(rule.stage().measures) == 3  # of the gradient, of m, and of m when its mean is gone
    results = []
    for backend in ("numba", "numpy"):
        params = container({k: v.copy() for k, v in start.items()})
        opt = fastlr.Optimizer(params, rule, lr=0.1, groups={"[ab]": {"lr": 0.2}}, backend=backend)
        for g in grads:
            opt.step(g)
        results.append({k: np.asarray(params[k]) for k in shapes})
    for k in shapes:
        np.testing.assert_array_equal(results[0][k], results[1][k])
    p, m = {k: v.copy() for k, v in start.items()}, {k: np.zeros(s) for k, s in shapes.items()}
    groups, rates = {"a": "ab", "b": "ab", "c": "c"}, {"a": 0.2, "b": 0.2, "c": 0.1}

    def norm(arrays):
        return np.sqrt(sum(np.sum(np.square(x)) for x in arrays))

    for g in grads:
        m = {k: 0.5 * m[k] + g[k] / (norm(g.values()) + 1e-8) for k in m}
        squares = sum(np.sum(x * x) for x in m.values())
        parts = {k: norm([p[j] for j in p if groups[j] == groups[k]]) for k in p}
        m = {k: m[k] - np.sum(m[k]) / (1 + squares) if parts[k] > 1 else m[k] for k in m}
        p = {k: p[k] - rates[k] * m[k] * norm([m[k]]) / (norm([p[k]]) + 1) for k in p}
    for k in shapes:
        np.testing.assert_allclose(results[0][k], p[k], rtol=1e-10)


def test_a_rule_with_sums_runs_as_ordinary_python(rng):
    p, g = rng.standard_normal(7), rng.standard_normal(7)
    new, _ = fastlr.rule(scaled_by_sums)(p, g, np.zeros(7), lr=0.1)
    params = p.copy()
    fastlr.Optimizer(params, fastlr.rule(scaled_by_sums), lr=0.1, backend="numpy").step(g)
    np.testing.assert_allclose(new, params, rtol=1e-12)


# Scopes: all, group, leaf, model


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("scope", ["all", "group", "leaf"])
@pytest.mark.parametrize("population", [None, 3])
def test_the_scope_of_clipping(scope, population, backend, rng):
    one = {"a": np.zeros(5), "b": np.zeros((2, 3)), "c": np.zeros(BLOCK + 1)}
    params = one if population is None else fastlr.flatten(one, population=population)
    opt = fastlr.SGD(params, lr=1.0, clip_norm=0.5, scope=scope, groups={"[ab]": {"momentum": 0.0}}, backend=backend)
    models = population or 1
    grads = {k: rng.standard_normal((models, *v.shape)) * 0.01 for k, v in one.items()}
    grads["a"][-1] *= 1000
    info = opt.step({k: v if population else v[0] for k, v in grads.items()})
    members = {"all": ("abc", "abc", "abc"), "group": ("ab", "ab", "c"), "leaf": ("a", "b", "c")}[scope]
    smallest = np.full(models, np.inf)
    for k, together in zip("abc", members, strict=True):
        for model in range(models):
            norm = np.sqrt(sum(np.sum(grads[j][model] ** 2) for j in together))
            coefficient = min(1.0, 0.5 / (norm + 1e-6))
            smallest[model] = min(smallest[model], coefficient)
            new = params[k][model] if population else params[k]
            np.testing.assert_allclose(new, -coefficient * grads[k][model], rtol=1e-12)
            found = info[k].clip_coef[model] if population else info[k].clip_coef
            assert found == pytest.approx(coefficient, rel=1e-12)
    np.testing.assert_allclose(info.clip_coef, smallest if population else smallest[0], rtol=1e-12)
    whole = [np.sqrt(sum(np.sum(g[m] ** 2) for g in grads.values())) for m in range(models)]
    np.testing.assert_allclose(info.grad_norm, whole if population else whole[0], rtol=1e-12)


@pytest.mark.parametrize("where", ["leaf", "group", "frozen"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(where, bad, rng):
    params = {k: rng.standard_normal(50).astype(np.float32) for k in ("w", "v.bias", "u.bias")}
    groups = {"*.bias": {"lr": 0.5, "frozen": where == "frozen"}}
    opt = fastlr.Adam(params, groups=groups, ema=0.9, shadow="float16", skip_nonfinite=True, zero_grads=True)
    for name in params:
        opt.grads[name] = rng.standard_normal(50)
    opt.step()
    before, shadow = opt.snapshot(), opt.shadow.data.view(np.uint16).copy()
    for name in params:
        opt.grads[name] = rng.standard_normal(50)
    opt.grads["u.bias" if where != "leaf" else "w"][7] = bad
    info = opt.step()
    assert not opt.grads.data.any()  # cleared all the same, also what is frozen
    if where == "frozen":  # nobody reads it
        assert not info.skipped and opt.steps == 2
        return
    assert info.skipped and info.step == opt.steps == 1 and opt.skipped_steps == 1
    after = opt.snapshot()
    for key in before:
        if key not in ("skipped", "fastlr"):
            np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    np.testing.assert_array_equal(opt.shadow.data.view(np.uint16), shadow)
    assert np.isnan(info["w"].update_norm or np.nan)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_in_a_population_only_the_bad_model_skips(backend, rng):
    fleet = fastlr.flatten({"w": np.ones(3), "b": np.ones(2)}, population=4)
    opt = fastlr.Adam(fleet, lr=0.1, skip_nonfinite=True, clip_norm=np.full(4, 0.5), ema=0.5, backend=backend)
    twin = [{"w": np.ones(3), "b": np.ones(2)} for _ in range(4)]
    others = [fastlr.Adam(p, lr=0.1, clip_norm=0.5, ema=0.5, backend=backend) for p in twin]
    for k in range(3):
        g = {"w": rng.standard_normal((4, 3)), "b": rng.standard_normal((4, 2))}
        if k == 1:
            g["b"][2, 0] = np.nan
        info = opt.step(g)
        np.testing.assert_array_equal(info.skipped, [False, False, k == 1, False])
        for model, other in enumerate(others):
            if not info.skipped[model]:
                other.step({name: x[model] for name, x in g.items()})
    for model, other in enumerate(others):
        np.testing.assert_array_equal(fleet["w"][model], twin[model]["w"])
        np.testing.assert_array_equal(opt.ema["b"][model], other.ema["b"])
    np.testing.assert_array_equal(opt.skipped_steps, [0, 0, 1, 0])
    assert opt.state_dict()["step"].tolist() == [[3, 3, 2, 3]] * 2
    assert opt.steps == 3
    other = fastlr.Adam(fastlr.flatten({"w": np.ones(3), "b": np.ones(2)}, population=4), ema=0.1, clip_norm=1.0)
    other.load_state_dict(opt.state_dict(params=True))
    np.testing.assert_array_equal(other.skipped_steps, [0, 0, 1, 0])
    np.testing.assert_array_equal(other.ema.data, opt.ema.data)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("population", [None, 3])
def test_a_skipped_step_is_none_for_frozen_leaves_either(population, backend):
    one = {"a": np.ones(2), "b": np.ones(3)}
    params = one if population is None else fastlr.flatten(one, population=population)
    opt = fastlr.Adam(params, skip_nonfinite=True, groups={"b": {"frozen": True}}, backend=backend)
    g = {k: np.ones(v.shape) for k, v in dict(params).items()}
    opt.step(g)
    g["a"].reshape(population or 1, -1)[-1] = np.nan
    opt.step(g)
    state, models = opt.state_dict(), population or 1
    clock = [2] * (models - 1) + [1]  # the last model skipped
    assert state["clock"].tolist() == [clock, clock]
    assert state["step"].tolist() == [clock, [0] * models]
    assert state["skipped"].tolist() == [[0] * (models - 1) + [1], [0] * models]


def test_models_can_be_frozen():
    fleet = fastlr.flatten({"w": np.ones(3)}, population=4)
    opt = fastlr.Adam(fleet, lr=0.1, ema=0.5, zero_grads=True)
    opt.frozen = np.array([False, True, False, True])
    opt.grads["w"][:] = 1.0
    opt.step()
    np.testing.assert_allclose(fleet["w"][:, 0], [0.9, 1.0, 0.9, 1.0])
    assert not opt.grads.data.any()
    state = opt.state_dict()
    assert state["step"].tolist() == [[1, 0, 1, 0]] and state["clock"].tolist() == [[1, 1, 1, 1]]
    again = fastlr.Adam(fastlr.flatten({"w": np.ones(3)}, population=4), ema=0.1)
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.frozen, [False, True, False, True])
    opt.frozen = False
    opt.grads["w"][:] = 1.0
    opt.step()
    assert (fleet["w"] < 1).all()
    with pytest.raises(ValueError, match=r"frozen must be one bool or an array of shape \(4,\), got shape \(3,\)"):
        opt.frozen = [True, False, True]
    with pytest.raises(TypeError, match="frozen must be True, False or an array of bools"):
        opt.frozen = np.ones(4)


# Averages, copies and clearing


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize(
    "options", [{}, {"statistics": True, "clip_norm": 0.5, "scope": "leaf"}], ids=["plain", "sums"]
)
def test_the_average_follows_every_parameter(options, backend, rng):
    """Those too that have no gradient, are frozen, or are written by somebody else; in a part those of the part."""
    params = {k: rng.standard_normal(s) for k, s in {"a": 5, "b": BLOCK + 3, "c": (2, 2), "d": 1, "e": 0}.items()}
    settings = {"ema": 0.75, "groups": {"c": {"frozen": True}, "d": {"ema_decay": 0.5}}, "backend": backend, **options}
    opt = fastlr.Adam(params, shadow="bfloat16", skip_nonfinite=True, **settings)
    average = {k: v.copy() for k, v in params.items()}
    for k in range(6):
        for v in params.values():
            v += 1.0  # by somebody else
        g = {n: None if n == "b" and k < 3 else rng.standard_normal(v.shape) for n, v in params.items()}
        if k == 2:
            g["a"][1] = np.inf
        if k == 5:
            g = dict.fromkeys(params)
        before = {n: v.copy() for n, v in params.items()}
        info = opt.step(g, only=["a", "b", "c"] if k == 4 else None)
        assert info.skipped == (k == 2)
        for n in average:
            there = k != 4 or n in "abc"
            if k != 2 and there:
                decay = 0.5 if n == "d" else 0.75
                average[n] = average[n] + (1 - decay) * (params[n] - average[n])
            np.testing.assert_array_equal(opt.ema[n], average[n], err_msg=f"{n} in step {k}")
            moves = k != 2 and there and g[n] is not None and n in "abd"
            assert np.array_equal(params[n], before[n]) == (not moves)
    assert opt.state_dict()["step"][:, 0].tolist() == [4, 2, 0, 3, 3]


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_averages_of_models_that_are_frozen_or_skipped(backend):
    fleet = fastlr.flatten({"w": np.zeros(3), "b": np.zeros(1)}, population=3)
    opt = fastlr.SGD(fleet, lr=0.0, ema=0.5, skip_nonfinite=True, zero_grads=True, backend=backend)
    opt.frozen = np.array([False, True, False])
    fleet.data[:] = 1.0
    opt.grads.data[:] = 1.0
    opt.grads["w"][2, 1] = np.nan
    opt.step()
    assert opt.ema["w"][:, 0].tolist() == opt.ema["b"][:, 0].tolist() == [0.5, 0.5, 0.0]
    opt.frozen = True
    opt.step()
    assert opt.ema["w"][:, 0].tolist() == [0.75, 0.75, 0.5]
    assert not opt.grads.data.any() and opt.steps == 2


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_an_average_pauses_bit_for_bit(backend):
    w = {"a": np.array([1.0, np.inf]), "b": np.array([2.0])}
    opt = fastlr.SGD(w, lr=0.0, ema=1.0, backend=backend)
    opt.ema["a"] = np.array([-0.0, 1.0])
    opt.step({"a": np.zeros(2), "b": None})
    assert opt.ema["a"].tolist() == [0.0, 1.0] and np.signbit(opt.ema["a"][0]) and opt.ema["b"][0] == 2.0
    opt.ema_decay = 0.5
    w["b"][:] = 4.0
    opt.step({"a": np.zeros(2), "b": None})
    assert opt.ema["a"][0] == 0.5 and opt.ema["b"][0] == 3.0
    opt.ema_decay = lambda n: 1.0 if n < 3 else 0.0
    opt.step({"a": np.zeros(2), "b": None})
    assert opt.ema["b"][0] == 3.0
    opt.step({"a": np.zeros(2), "b": None})
    assert opt.ema["b"][0] == 4.0
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\], but"):
        opt.ema_decay = lambda n: 1.5
    opt.ema_decay = lambda n: 1.0 if n < 5 else 1.5
    opt.step({"a": np.zeros(2), "b": None})
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\], but"):
        opt.step({"a": np.zeros(2), "b": None})


def test_a_target_network_of_ones_own(rng):
    """The average goes into the caller's arrays, from what stands in them."""
    params = {"w": rng.standard_normal((4, 5)), "b": rng.standard_normal(3)}
    target = {"w": np.zeros((4, 5)), "b": np.ones(3)}
    expected = {k: v.copy() for k, v in target.items()}
    opt = fastlr.SGD(params, lr=0.1, ema=0.75, ema_out=target)
    assert opt.ema is target
    for _ in range(3):
        opt.step({"w": rng.standard_normal((4, 5)), "b": rng.standard_normal(3)})
        for k in expected:
            expected[k] = expected[k] + 0.25 * (params[k] - expected[k])
    for k in expected:
        np.testing.assert_allclose(target[k], expected[k], rtol=1e-14)
    state = opt.state_dict()
    opt.step({"w": np.ones((4, 5)), "b": np.ones(3)})
    opt.load_state_dict(state)
    for k in expected:
        np.testing.assert_allclose(target[k], expected[k], rtol=1e-14)
    opt.ema_decay = 0.0
    opt.step({"w": np.ones((4, 5)), "b": np.ones(3)})
    np.testing.assert_allclose(target["w"], params["w"], rtol=1e-15)
    with pytest.raises(ValueError, match="this optimizer was given ema_out; pass it for the new parameters as well"):
        opt.rebuild({"w": np.ones(2)})
    own = {"w": np.zeros(2)}
    opt.rebuild({"w": np.ones(2)}, ema_out=own)
    opt.step({"w": np.zeros(2)})
    np.testing.assert_array_equal(own["w"], 1.0)


def test_a_copy_in_memory_of_ones_own(rng):
    """The weights of the forward pass are written by the step; the parameters are their masters."""
    start = {"w": rng.standard_normal((4, 5)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
    for kind, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16), ("bfloat16", np.uint16)):
        params, weights = (
            {k: v.copy() for k, v in start.items()},
            {k: np.zeros(v.shape, dtype) for k, v in start.items()},
        )
        own, other = {k: v.copy() for k, v in start.items()}, {"w": np.zeros((4, 5)), "b": np.zeros(3)}
        opt = fastlr.Adam(params, shadow=kind, shadow_out=weights)
        reference = fastlr.Adam(own, shadow=kind)
        assert opt.shadow is weights
        for _ in range(3):
            for k in start:  # at the start as well
                np.testing.assert_array_equal(weights[k].view(np.uint16), reference.shadow[k].view(np.uint16))
            grads = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in start.items()}
            opt.step(grads)
            reference.step(grads)
        moved = opt.to("cpu")
        np.testing.assert_array_equal(moved.shadow["w"].view(np.uint16), weights["w"].view(np.uint16))
        with pytest.raises(ValueError, match="this optimizer was given shadow_out; pass it"):
            opt.rebuild(params)
        for bad, error, message in (
            (other, TypeError, f"shadow_out['w'] has dtype float64, expected {kind} or uint16."),
            ({**weights, "b": weights["w"].reshape(-1)[:3]}, ValueError, "share memory. Pass memory of its own"),
        ):
            with pytest.raises(error) as raised:
                fastlr.Adam(params, shadow=kind, shadow_out=bad)
            assert message in str(raised.value)


def test_decay_of_the_average_differs_between_groups_and_models(rng):
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    opt = fastlr.SGD(params, lr=1.0, ema=0.5, groups={"b": {"ema_decay": 0.0}})
    opt.step({"a": -np.ones(2), "b": -np.ones(2)})
    assert opt.ema["a"].tolist() == [0.5, 0.5] and opt.ema["b"].tolist() == [1.0, 1.0]
    fleet = fastlr.flatten({"w": np.zeros(1)}, population=3)
    opt = fastlr.SGD(fleet, lr=1.0, ema=np.array([0.0, 0.5, 0.75]))
    opt.step({"w": -np.ones((3, 1))})
    assert opt.ema["w"].ravel().tolist() == [1.0, 0.5, 0.25]


def test_gradients_that_are_handed_in_are_never_cleared(rng):
    params = np.zeros(5)
    opt = fastlr.SGD(params, lr=1.0, zero_grads=True)
    g = np.ones(5)
    opt.step(g)
    assert (g == 1).all()
    opt.grads[:] = 2.0
    opt.step(opt.grads)
    assert (opt.grads == 2).all()
    opt.step()
    assert not opt.grads.any()


def test_the_order(rng):
    """Unscale, clip by norm, clip by value, maximize, coupled decay, rule; each would show if it came elsewhere."""
    p = np.array([10.0, -20.0])
    g = np.array([300.0, -400.0])
    opt = fastlr.SGD(
        p, lr=0.5, weight_decay=0.1, maximize=True, clip_norm=5.0 + 5e-6, clip_value=3.5, ema=0.5, shadow="float16"
    )
    opt.step(g, grad_scale=10.0)  # [30, -40] -> norm 50, clipped to [3, -4] -> [3, -3.5] -> [-3, 3.5] -> [-2, 1.5]
    expected = np.array([10.0 + 0.5 * 2.0, -20.0 - 0.5 * 1.5])
    np.testing.assert_allclose(p, expected, rtol=1e-6)
    np.testing.assert_allclose(opt.ema, 0.5 * np.array([10.0, -20.0]) + 0.5 * expected, rtol=1e-6)
    np.testing.assert_array_equal(opt.shadow, p.astype(np.float16))
    q = np.array([10.0])
    fastlr.SGD(q, lr=0.5, weight_decay=0.1, decoupled_weight_decay=True, clip_norm=1.0).step(np.array([1e6]))
    np.testing.assert_allclose(q, 10.0 * (1 - 0.05) - 0.5, rtol=1e-6)  # the decay is not clipped


def test_an_element_with_rate_zero_stays_whatever_happens():
    p = np.array([-0.0, 1.0, 2.0])
    opt = fastlr.AdamW(p, lr=0.1, weight_decay=0.5, lr_scale=np.array([0.0, 0.0, 1.0]))
    opt.step(np.array([1.0, np.nan, 1.0]))
    assert p[0] == 0 and np.signbit(p[0]) and p[1] == 1.0 and p[2] < 2.0
    assert opt.lr_scale[2] == 1.0
    opt.lr_scale[1] = 1.0  # read where it is
    opt.step(np.array([1.0, np.inf, 1.0]))
    assert np.isnan(p[1])


# Gradients in low precision


def as_kind(kind, g):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    if kind == "bits":
        return ENCODE["bfloat16"](g)
    if kind == "torch":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        return torch.from_numpy(g).to(torch.bfloat16)
    return g.astype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[kind])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "bits", "torch"])
def test_gradients_of_two_bytes(kind, dtype, rng):
    shapes = {"w": (40, 5), "b": (3,)}
    start = {k: rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}
    low = {k: as_kind(kind, rng.standard_normal(s).astype(np.float32)) for k, s in shapes.items()}
    wide = {
        k: (g.float().numpy() if kind == "torch" else DECODE["bfloat16"](g) if kind == "bits" else g).astype(dtype)
        for k, g in low.items()
    }
    results = []
    for grads, backend in ((low, "numba"), (low, "numpy"), (wide, "numba")):
        params = {k: v.copy() for k, v in start.items()}
        opt = fastlr.Adam(params, clip_norm=1.0, grad_dtype="bfloat16", backend=backend)
        norms = [opt.step(grads).grad_norm for _ in range(2)]
        strided = {k: g if kind == "torch" else np.repeat(g, 2, axis=-1)[..., ::2] for k, g in grads.items()}
        norms.append(opt.step(strided).grad_norm)
        results.append((params, norms))
    for params, norms in results[1:]:
        assert norms == results[0][1]
        for k in shapes:
            np.testing.assert_array_equal(params[k], results[0][0][k])


def test_mixed_gradients(rng):
    params = {k: np.zeros(3, np.float32) for k in "abc"}
    opt = fastlr.SGD(params, lr=1.0, grad_dtype="bfloat16")
    opt.step({"a": np.ones(3, np.float32), "b": np.full(3, 2, np.float16), "c": np.full(3, 0x4040, np.uint16)})
    assert [params[k][0] for k in "abc"] == [-1.0, -2.0, -3.0]
    opt.step({"a": None, "b": np.full(3, 2, np.float16), "c": np.full(3, 4, np.float16)})
    assert [params[k][0] for k in "abc"] == [-1.0, -4.0, -7.0]
    flat = np.zeros(4, np.float32)
    fastlr.SGD(flat, lr=1.0).step(np.full(8, 2, np.float16)[::2])
    assert (flat == -2).all()
    with pytest.raises(TypeError, match="grads has dtype uint16, but .* need grad_dtype="):
        fastlr.SGD(flat, lr=1.0).step(np.zeros(4, np.uint16))


# Accumulation


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("container", [lambda x: x, fastlr.flatten])
def test_accumulate_then_step(container, backend, rng):
    start = {"w": rng.standard_normal((5, 3)).astype(np.float32), "b": rng.standard_normal(2).astype(np.float32)}
    params, twin = container({k: v.copy() for k, v in start.items()}), {k: v.copy() for k, v in start.items()}
    opt = fastlr.Adam(params, lr=0.1, clip_norm=1.0, backend=backend)
    other = fastlr.Adam(twin, lr=0.1, clip_norm=1.0, backend=backend)
    for _ in range(3):
        parts = [{k: rng.standard_normal(v.shape).astype(np.float32) for k, v in start.items()} for _ in range(4)]
        parts[1] = {k: v.astype(np.float16) for k, v in parts[1].items()}
        parts[2] = {"w": parts[2]["w"], "b": None}
        for part in parts:
            opt.accumulate(part)
        whole = {k: np.zeros_like(v) for k, v in start.items()}
        for part in parts:
            for k, g in part.items():
                if g is not None:
                    whole[k] = whole[k] + g.astype(np.float32)
        opt.step(grad_scale=4.0)
        other.step(whole, grad_scale=4.0)
        for k in start:
            np.testing.assert_array_equal(params[k], twin[k])


def test_a_leaf_that_never_had_a_gradient_is_not_updated(rng):
    params = {"a": np.ones(2), "b": np.ones(2)}
    opt = fastlr.AdamW(params, lr=0.1, zero_grads=True)
    opt.grads.data[:] = 5.0  # the first gradients take the place of what stands there
    opt.accumulate({"a": np.ones(2), "b": None})
    opt.accumulate({"a": np.ones(2), "b": None})
    assert opt.grads["a"].tolist() == [2.0, 2.0] and opt.grads["b"].tolist() == [0.0, 0.0]
    opt.step()
    assert (params["b"] == 1).all() and (params["a"] < 1).all()
    assert opt.state_dict()["step"].tolist() == [[1], [0]]
    opt.accumulate(np.ones(4))
    opt.accumulate(fastlr.flatten({"a": np.ones(2), "b": np.ones(2)}))
    opt.step()
    assert opt.state_dict()["step"].tolist() == [[2], [1]]
    opt.accumulate({"a": np.ones(2), "b": None})
    opt.zero_grad()
    opt.step()  # zeros mean an update
    assert opt.state_dict()["step"].tolist() == [[3], [2]]
    with pytest.raises(ValueError, match="has shape"):
        opt.accumulate(np.ones(3))


def test_accumulation_and_partial_steps(rng):
    """What has been stepped starts anew, what has not goes on."""
    params = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)}
    opt = fastlr.SGD(params, lr=1.0)
    opt.accumulate({"a": np.ones(2), "b": np.ones(2), "c": None})
    opt.step(only="a")
    opt.accumulate({"a": np.full(2, 5.0), "b": np.ones(2), "c": None})
    opt.step(only=["a", "b", "c"])
    assert [params[k][0] for k in "abc"] == [-6.0, -2.0, 0.0]
    assert opt.state_dict()["step"].tolist() == [[2], [1], [0]]


# Rules whose sums run over everything


@fastlr.rule
def by_all(p, g, *, lr, seen=0.0, rate=0.0, updates=0.0, level=1.0, factor=2.0):
    """State that is one for all (`seen` and `level`), each leaf's own (`updates`), and only shown (`rate`)."""
    level = factor * level
    seen = seen + fastlr.norm(g, "all") * level
    rate = lr / seen
    updates = updates + 1
    return p - rate * g, seen, rate, updates, level


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("population", [None, 2])
def test_what_follows_from_everything_is_one_for_all(population, backend, rng):
    one = {"a": np.ones(3), "b": np.ones(2), "c": np.ones(4)}
    params = one if population is None else fastlr.flatten(one, population=population)
    settings = {"groups": {"c": {"lr": 0.5, "frozen": True}}, "skip_nonfinite": True, "backend": backend}
    opt = fastlr.Optimizer(params, by_all, lr=1.0, **settings)
    shape = (population or 1, 9)
    seen, level = np.zeros(shape[0]), 1.0
    for k in range(5):
        g = rng.standard_normal(shape)
        split = {"a": g[:, :3], "b": g[:, 3:5], "c": g[:, 5:]}
        given = {n: x if population else x[0] for n, x in split.items()}
        if k == 3:
            given["a"][..., 0] = np.nan
        late = k < 2
        opt.step({**given, "b": None if late else given["b"]})
        if k == 3:  # in the population for both models
            continue
        level *= 2
        seen += level * np.sqrt(np.sum(np.square(g[:, : 3 if late else 5]), axis=1))
        state = opt.state_dict()
        np.testing.assert_allclose(state["seen"], np.tile(seen, (3, 1)), rtol=1e-14)
        assert (state["level"] == level).all()
    assert state["updates"].tolist() == [[4.0] * shape[0], [2.0] * shape[0], [0.0] * shape[0]]
    assert opt.rule.shared == ("all", "leaf", "leaf", "all") and opt.rule.common == ("factor",)


def test_what_follows_from_a_group_is_one_for_the_group():
    @fastlr.rule
    def by_group(p, g, *, lr, seen=0.0):
        seen = seen + fastlr.total(g, over="group")
        return p - lr * g / seen, seen

    params = {k: np.ones(1) for k in ("a.x", "a.y", "b.x", "b.y")}
    opt = fastlr.Optimizer(params, by_group, lr=1.0, groups={"b.*": {"lr": 0.5}}, backend="numpy")
    opt.step({"a.x": np.ones(1), "a.y": None, "b.x": None, "b.y": None})
    opt.step({"a.x": np.ones(1), "a.y": None, "b.x": None, "b.y": np.full(1, 3.0)})
    assert opt.state_dict()["seen"].tolist() == [[2.0], [2.0], [3.0], [3.0]]
    assert params["b.y"][0] == 0.5


def test_new_leaves_and_old_states_take_what_is_one_for_all(rng):
    params = {"a": np.zeros(3), "b": np.zeros(2)}
    opt = fastlr.Prodigy(params, backend="numpy")
    g = {"a": np.ones(3), "b": np.ones(2)}
    for _ in range(5):
        opt.step(g)
    opt.rebuild({"new": np.zeros(1), **params})
    state = opt.state_dict()
    assert np.ptp(state["d"]) == np.ptp(state["r"]) == 0 and state["d"][0, 0] > 1e-6
    state["d"][0], state["r"][0] = 1e-6, 0.0  # as states were once saved: the first leaf is the late one
    opt.load_state_dict(state)
    assert np.ptp(opt.state_dict()["d"]) == 0 and opt.state_dict()["d"][0, 0] > 1e-6


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("rate", [1.0, 0.9, 0.1])
def test_prodigy_with_a_late_leaf_and_another_rate(late, rate, rng):
    matrix = rng.standard_normal((40, 10))
    target = matrix @ rng.standard_normal(10)
    w = {"a": np.zeros(5), "b": np.zeros(5)}
    opt = fastlr.Prodigy(w, groups={"b": {"lr": rate}}, backend="numpy")
    for k in range(600):
        g = matrix.T @ (matrix @ np.concatenate([w["a"], w["b"]]) - target) / 20
        opt.step({"a": g[:5], "b": g[5:] if k >= late else None})
    residual = matrix @ np.concatenate([w["a"], w["b"]]) - target
    assert np.mean(residual**2) < 1e-6 * np.mean(target**2)


def test_settings_that_enter_what_is_one_for_all(rng):
    params = {"a": np.zeros(3), "b": np.zeros(2)}
    message = r"betas\[1\] must be the same in all groups, got 0.999 and 0.9: it enters d, r of rule 'prodigy'"
    with pytest.raises(ValueError, match=message):
        fastlr.Prodigy(params, groups={"b": {"betas": (0.9, 0.9)}})
    opt = fastlr.Prodigy(params, groups={"b": {"betas": (0.8, 0.999), "lr": 0.5, "eps": 1e-6}}, backend="numpy")
    opt.step(params)
    opt.groups["b"].betas = (0.8, 0.9)
    with pytest.raises(ValueError, match="must be the same in all groups"):
        opt.step(params)
    opt.groups["b"].betas = opt.betas
    assert opt.step(params).step == 2
    with pytest.raises(ValueError, match="layerwise must be the same in all groups: rule 'dog'"):
        fastlr.DoG(params, groups={"b": {"layerwise": True}})


# Partial steps


# Rules whose sums stay within a leaf: a part cannot know what goes beyond it.
LOCAL = [c for c in PLAIN if all(over == "leaf" for _, over in c.make(np.zeros(1), **c.settings).rule.sums)]


@pytest.mark.parametrize("case", LOCAL, ids=repr)
def test_the_union_of_partial_steps_is_one_step(case: Case, rng):
    shapes = {"layer0.w": (4, 3), "layer0.b": (3,), "layer1.w": (BLOCK + 3,), "head": (2,)}
    start = {k: rng.standard_normal(s) for k, s in shapes.items()}
    options = {"ema": 0.9, "shadow": "bfloat16", "clip_norm": 0.5, "scope": "leaf", "backend": "numpy"}
    parts, whole = ({k: v.copy() for k, v in start.items()} for _ in range(2))
    a = case.make(parts, **case.settings, **options)
    b = case.make(whole, **case.settings, **options)
    for k in range(3):
        grads = {k: rng.standard_normal(s) for k, s in shapes.items()}
        assert a.step({**grads, "layer0.w": None, "layer0.b": None}, only=["layer1.*", "head"]).step == k + 1
        assert a.step(grads, only="layer0.*").step == k + 1
        b.step(grads)
    for key, value in b.snapshot().items():
        np.testing.assert_array_equal(a.snapshot()[key], value, err_msg=key)
    np.testing.assert_array_equal(a.shadow.data.view(np.uint16), b.shadow.data.view(np.uint16))


def test_partial_steps_from_own_gradients(rng):
    params = fastlr.flatten({"a": np.zeros(3), "b": np.zeros(2), "c": np.zeros(4)})
    opt = fastlr.SGD(params, lr=1.0, zero_grads=True, groups={"c": {"frozen": True}})
    opt.grads.data[:] = 1.0
    opt.step(only="b")
    assert opt.grads["b"].tolist() == [0.0, 0.0] and opt.grads["a"].all() and opt.grads["c"].all()
    opt.step(only=("a", "c"))
    assert not opt.grads.data.any()
    assert params.data.tolist() == [-1.0] * 5 + [0.0] * 4
    assert opt.steps == 1 and opt.state_dict()["clock"].tolist() == [[1], [1], [1]]
    plans_made = dict(opt._stepper.plans)
    for _ in range(3):
        opt.step(only="b")
        opt.step(only=("a", "c"))
    assert opt._stepper.plans == plans_made  # kept, not made anew
    assert opt.steps == 4


# Against PyTorch's utilities


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_as_pytorch(limit, rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    start = [rng.standard_normal((7, 3)), rng.standard_normal(5)]
    theirs = [torch.tensor(x, requires_grad=True) for x in start]
    ours = [x.copy() for x in start]
    reference = torch.optim.AdamW(theirs, lr=0.01)
    opt = fastlr.AdamW(ours, lr=0.01, clip_norm=limit)
    for _ in range(20):
        grads = [rng.standard_normal(x.shape) for x in start]
        for x, g in zip(theirs, grads, strict=True):
            x.grad = torch.tensor(g)
        norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
        reference.step()
        info = opt.step(grads)
        assert info.grad_norm == pytest.approx(float(norm), rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-10, atol=1e-10)


def test_clipping_by_value_as_pytorch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    start, theirs = rng.standard_normal(50), None
    theirs = torch.tensor(start, requires_grad=True)
    reference = torch.optim.SGD([theirs], lr=0.1)
    opt = fastlr.SGD(start, lr=0.1, clip_value=0.3)
    for _ in range(3):
        g = rng.standard_normal(50)
        theirs.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_value_([theirs], 0.3)
        reference.step()
        opt.step(g)
    np.testing.assert_allclose(start, theirs.detach().numpy(), rtol=1e-14)


def test_the_average_as_pytorch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Linear(6, 4, dtype=torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)  # the first is a copy
    ours = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    opt = fastlr.SGD(ours, lr=0.1, ema=0.9)
    reference = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        grads = {name: rng.standard_normal(tuple(p.shape)) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = torch.tensor(grads[name])
        reference.step()
        averaged.update_parameters(model)
        opt.step(grads)
    for name, p in averaged.module.named_parameters():
        np.testing.assert_allclose(opt.ema[name], p.detach().numpy(), rtol=1e-12)


def test_the_loss_scale_as_pytorch(rng):
    """The same scales, the same skipped steps and the same parameters as GradScaler."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    start = rng.standard_normal(9).astype(np.float32)
    theirs = torch.tensor(start, requires_grad=True)
    reference = torch.optim.SGD([theirs], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_factor=4.0, backoff_factor=0.5, growth_interval=3)
    opt = fastlr.SGD(start, lr=0.1, loss_scale=fastlr.LossScale(256.0, growth=4.0, backoff=0.5, interval=3))
    for k in range(40):
        scale = float(scaler.scale(torch.ones(())))
        assert opt.loss_scale.scale == scale
        g = (rng.standard_normal(9) * scale).astype(np.float32)
        if k in (5, 6, 13, 30):
            g[k % 9] = np.inf
        theirs.grad = torch.tensor(g)
        scaler.step(reference)
        scaler.update()
        info = opt.step(g)
        assert info.skipped is (k in (5, 6, 13, 30))
    np.testing.assert_allclose(start, theirs.detach().numpy(), rtol=1e-6)
    assert opt.skipped_steps == 4 and opt.steps == 36


def test_the_loss_scale_is_saved_and_limited(tmp_path, rng):
    def make():
        return fastlr.SGD(np.ones(3, np.float32), loss_scale=fastlr.LossScale(4.0, interval=2))

    opt = make()
    opt.step(np.ones(3, np.float32))
    opt.save(tmp_path / "run.npz")
    again = make()
    again.loss_scale.update(True)
    again.load(tmp_path / "run.npz")
    assert again.loss_scale.scale == 4.0
    assert again.step(np.ones(3, np.float32)).grad_norm == pytest.approx(np.sqrt(3) / 4)
    assert again.loss_scale.scale == 8.0
    with pytest.raises(ValueError, match="this is not the state of a LossScale"):
        again.loss_scale.load_state_dict({"scale": -1.0, "good": 0})
    largest = fastlr.LossScale(2.0**127, interval=1)
    largest.update(False)
    assert largest.scale == 2.0**127  # float32 could not hold more
    fleet = fastlr.flatten({"w": np.ones(2)}, population=3)
    opt = fastlr.SGD(fleet, lr=0.0, loss_scale=fastlr.LossScale(8.0))
    opt.step({"w": np.array([[1.0, 1.0], [np.nan, 1.0], [1.0, 1.0]])})
    np.testing.assert_array_equal(opt.loss_scale.scale, [8.0, 4.0, 8.0])
    info = opt.step({"w": np.ones((3, 2))})
    np.testing.assert_allclose(info.grad_norm, np.sqrt(2) / np.array([8.0, 4.0, 8.0]))
    assert "LossScale(" in repr(opt.loss_scale)


def test_a_loss_scale_of_a_shorter_interval_goes_on():
    """More good steps than the interval has, from a run with a longer one, make the scale grow at once."""
    scale = fastlr.LossScale(4.0, interval=100)
    for _ in range(50):
        scale.update(False)
    shorter = fastlr.LossScale(interval=10)
    shorter.load_state_dict(scale.state_dict())
    shorter.update(False)
    assert (shorter.scale, shorter.state_dict()["good"]) == (8.0, 0)


def test_a_loss_scale_never_shrinks_below_its_limit():
    scale = fastlr.LossScale(1.0, min_scale=0.3)
    scales = []
    for skipped in (True, True, True, False):
        scale.update(skipped)
        scales.append(scale.scale)
    assert scales == [0.5, 0.3, 0.3, 0.3]
    assert scale.copy().min_scale == 0.3
    scale = fastlr.LossScale()
    for _ in range(2000):
        scale.update(True)
    assert scale.scale == np.finfo(np.float32).tiny


# What a step tells


def test_info(rng):
    params = {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(4), "frozen": np.ones(2)}
    opt = fastlr.AdamW(params, clip_norm=1.0, skip_nonfinite=True, statistics=True, groups={"frozen": {"frozen": True}})
    info = opt.step({"w": np.ones((3, 4)), "b": None, "frozen": np.ones(2)})
    assert info.grad_norm == pytest.approx(np.sqrt(12)) and info["w"].grad_norm == info.grad_norm
    assert np.isnan(info["b"].grad_norm) and np.isnan(info["frozen"].param_norm)
    assert info.asdict() == {
        "step": 1,
        "lr": 1e-3,
        "lr/frozen": 1e-3,
        "grad_norm": info.grad_norm,
        "clip_coef": info.clip_coef,
        "skipped": False,
    }
    kept = info["w"]
    opt.step({"w": np.zeros((3, 4)), "b": np.zeros(4), "frozen": np.ones(2)})
    assert info["w"] == kept  # it is of its own step
    with pytest.raises(KeyError, match="no leaf 'v'"):
        info["v"]
    with pytest.raises(AttributeError):
        info.grad_norm = 1.0
    plain = fastlr.SGD({"w": np.zeros(2)}).step({"w": np.ones(2)})
    assert plain.grad_norm is None and plain.clip_coef is None and plain.skipped is False
    assert "grad_norm" not in plain.asdict()


def test_info_of_what_was_left_out():
    fleet = fastlr.flatten({"w": np.ones(3), "b": np.ones(2)}, population=3)
    opt = fastlr.SGD(fleet, clip_norm=1.0, skip_nonfinite=True, statistics=True)
    opt.frozen = np.array([False, True, False])
    g = np.ones((3, 5))
    g[1] = np.nan
    info = opt.step({"w": g[:, :3], "b": g[:, 3:]})
    np.testing.assert_allclose(info.grad_norm, [np.sqrt(5), np.nan, np.sqrt(5)])
    np.testing.assert_allclose(info.clip_coef, [1 / np.sqrt(5), 1.0, 1 / np.sqrt(5)], rtol=1e-6)
    assert not info.skipped.any()
    assert np.isnan(info["w"].grad_norm[1]) and np.isnan(info["b"].clip_coef[1])
    plain = fastlr.SGD({"w": np.ones(3)}, clip_norm=1.0, statistics=True)
    info = plain.step({"w": None})
    assert np.isnan(info.grad_norm) and (info.clip_coef, info.skipped) == (1.0, False)


def test_limits_can_be_switched_and_changed_between_steps():
    p = np.zeros(4)
    opt = fastlr.SGD(p, lr=1.0, groups={})
    opt.step(np.ones(4))
    opt.clip_norm = 1.0
    info = opt.step(np.ones(4))
    assert info.clip_coef == pytest.approx(0.5, rel=1e-5)
    opt.clip_norm = None
    assert opt.step(np.ones(4)).clip_coef is None and opt.clip_norm is None
    opt.clip_value = 0.25
    before = p.copy()
    opt.step(np.ones(4))
    np.testing.assert_allclose(p, before - 0.25)
    params = {"a": np.zeros(4), "b": np.zeros(4)}
    opt = fastlr.SGD(params, lr=1.0, groups={"a": {"clip_norm": 1.0}})
    opt.step({"a": np.ones(4), "b": np.array([np.inf, 1.0, 1.0, 1.0])})
    assert params["b"][1] == -1.0  # not clipped, whatever the norm


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_save_and_go_on_with_every_option(suffix, rng, tmp_path):
    case = next(c for c in PLAIN if c.name == "nadam")

    def trainer():
        start = {k: np.asarray(np.random.default_rng(3).standard_normal(s), np.float32) for k, s in SHAPES.items()}
        return start, case.make(start, **case.settings, **everything(start, loss_scale=fastlr.LossScale(8.0)))

    def train(opt, seed):
        numbers = np.random.default_rng(seed)
        for k in range(3):
            for path, shape in SHAPES.items():
                opt.grads[path] = np.asarray(numbers.standard_normal(shape), np.float32)
            if k == 1:
                opt.grads["f"][0] = np.nan
            opt.step()

    params, opt = trainer()
    train(opt, 1)
    opt.save(tmp_path / f"run{suffix}")
    other, again = trainer()
    again.load(tmp_path / f"run{suffix}")
    np.testing.assert_array_equal(again.shadow.data.view(np.uint16), opt.shadow.data.view(np.uint16))
    train(opt, 2)
    train(again, 2)
    assert_same(opt.snapshot(), again.snapshot())
    np.testing.assert_array_equal(again.shadow.data.view(np.uint16), opt.shadow.data.view(np.uint16))
    assert again.skipped_steps == 2 and again.loss_scale.scale == opt.loss_scale.scale == 2.0
    assert opt.rebuild(
        {**params, "new": np.zeros(3, np.float32)}, lr_scale={**opt.lr_scale, "new": np.ones(3, np.float32)}
    ) == ("new",)
    np.testing.assert_array_equal(opt.state_dict()["mu_product"][-1], 1.0)
    np.testing.assert_array_equal(opt.ema["new"], 0.0)


# Bad input


def leaf(**kwargs):
    return {"w": np.ones((2, 3)), "b": np.ones(3), **kwargs}


SHARED = leaf()
BAD_SETTINGS = [
    ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive and finite, got 0.0."),
    ({"clip_norm": -1.0}, ValueError, "clip_norm must be positive and finite, got -1.0."),
    ({"clip_norm": float("nan")}, ValueError, "clip_norm must be positive and finite, got nan."),
    ({"clip_norm": "small"}, TypeError, "clip_norm must be a number, got 'small'."),
    ({"clip_value": -0.5}, ValueError, "clip_value must be positive and finite, got -0.5."),
    ({"scope": "model"}, TypeError, "scope 'model' is not known; there are leaf, group, all."),
    ({"ema": 1.5}, ValueError, "ema must be in [0, 1], got 1.5."),
    ({"ema": -0.1}, ValueError, "ema must be in [0, 1], got -0.1."),
    ({"ema_out": SHARED}, ValueError, "ema_out is where the average is kept; give its decay as well"),
    ({"ema": 0.9, "ema_out": {"w": np.ones((2, 3))}}, ValueError, "ema_out does not have the structure of params"),
    (
        {"ema": 0.9, "ema_out": leaf(b=np.ones(4))},
        ValueError,
        "ema_out['b'] has shape (4,), but the parameter has (3,)",
    ),
    ({"ema": 0.9, "ema_out": leaf(b=np.ones(3, np.float32))}, TypeError, "ema_out['b'] has dtype float32"),
    ({"ema": 0.9, "ema_out": leaf(b=[1.0, 2.0, 3.0])}, TypeError, "ema_out['b'] is a list, expected a NumPy array"),
    ({"ema": 0.9, "ema_out": SHARED}, ValueError, "share memory. Pass memory of its own for ema_out."),
    ({"ema": 0.9, "ema_out": leaf(w=np.ones((3, 2)).T)}, ValueError, "ema_out['w'] is not C-contiguous"),
    ({"shadow_out": SHARED}, ValueError, "shadow_out is where the copy is kept; give its format as well"),
    ({"shadow": "float8"}, TypeError, "shadow 'float8' is not known; there are bfloat16, float16."),
    ({"grad_dtype": "int8"}, TypeError, "grad_dtype 'int8' is not known; there are bfloat16, float16."),
    ({"zero_grads": 1}, TypeError, "zero_grads must be True or False, got 1."),
    ({"skip_nonfinite": None}, TypeError, "skip_nonfinite must be True or False, got None."),
    ({"statistics": "yes"}, TypeError, "statistics must be True or False, got 'yes'."),
    ({"loss_scale": 1024.0}, TypeError, "loss_scale must be a fastlr.LossScale, got 1024.0."),
    (
        {"lr_scale": leaf(b=np.array([1.0, -1.0, 1.0]))},
        ValueError,
        "lr_scale must be non-negative and finite everywhere",
    ),
    (
        {"lr_scale": leaf(b=np.array([1.0, np.nan, 1.0]))},
        ValueError,
        "lr_scale must be non-negative and finite everywhere",
    ),
    ({"lr_scale": np.ones(9)}, ValueError, "lr_scale is a ndarray, expected a dict with w, b."),
    ({"lr_scale": SHARED}, ValueError, "share memory. Pass memory of its own for lr_scale."),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS)
def test_bad_settings(settings, error, message):
    with pytest.raises(error) as raised:
        fastlr.SGD(SHARED, **settings)
    assert message in str(raised.value)
    assert all((x == 1).all() for x in SHARED.values())


def test_factors_that_share_memory_with_each_other_share_none_with_parameters():
    memory = np.ones(30)
    params = {"a": np.ones(30), "b": memory[20:25]}
    with pytest.raises(ValueError, match=r"lr_scale\['a'\] and params\['b'\] share memory"):
        fastlr.SGD(params, lr_scale={"a": memory, "b": memory[5:10]})
    fastlr.SGD({**params, "b": np.ones(5)}, lr_scale={"a": memory, "b": memory[5:10]})


BAD_STEPS = [
    ({"grad_scale": 0.0}, ValueError, "grad_scale must be positive and finite, got 0.0."),
    ({"grad_scale": -2.0}, ValueError, "grad_scale must be positive and finite, got -2.0."),
    ({"grad_scale": float("nan")}, ValueError, "grad_scale must be positive and finite, got nan."),
    ({"grad_scale": float("inf")}, ValueError, "grad_scale must be positive and finite, got inf."),
    ({"grad_scale": np.ones(2)}, ValueError, "grad_scale must be one number, got shape (2,)"),
    ({"grad_scale": "big"}, TypeError, "grad_scale must be a number, got 'big'."),
    ({"only": "layer3.*"}, ValueError, "only: the pattern 'layer3.*' matches no parameter. There are w, b."),
    ({"only": ["w", "x"]}, ValueError, "only: the pattern 'x' matches no parameter."),
    ({"only": []}, ValueError, "only must name a pattern or several, got []."),
    ({"only": 3}, TypeError, "only must be a pattern or a list of patterns, got 3."),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_STEPS)
def test_bad_steps(arguments, error, message):
    params = leaf()
    opt = fastlr.Adam(params, clip_norm=1.0, ema=0.9)
    opt.step(leaf())
    before = opt.snapshot()
    with pytest.raises(error) as raised:
        opt.step(leaf(), **arguments)
    assert message in str(raised.value)
    assert_same(opt.snapshot(), before)
    opt.step(leaf())
    assert opt.steps == 2


def test_more_bad_input():
    for arguments, message in (
        ({"init": 0.0}, "init must be positive and finite, got 0.0."),
        ({"growth": 1.0}, "growth must be above 1 and finite, got 1.0."),
        ({"backoff": 1.0}, "backoff must be in (0, 1), got 1.0."),
        ({"interval": 0}, "interval must be at least 1, got 0."),
        ({"init": 1.0, "min_scale": 2.0}, "min_scale must be at most init, 1.0, got 2.0."),
        ({"init": "much"}, "init must be a number, got 'much'."),
    ):
        with pytest.raises((ValueError, TypeError)) as raised:
            fastlr.LossScale(**arguments)
        assert message in str(raised.value)
    opt = fastlr.SGD(np.ones(2), loss_scale=fastlr.LossScale())
    with pytest.raises(ValueError, match="a loss scale follows whole steps; step without only="):
        opt.step(np.ones(2), only="*")
    plain = fastlr.SGD(np.ones(2))
    for name in ("ema", "shadow", "lr_scale"):
        with pytest.raises(AttributeError, match="build the optimizer with"):
            getattr(plain, name)
        with pytest.raises(AttributeError):
            setattr(plain, name, 0.5)
    averaged = fastlr.SGD(np.ones(2), ema=0.9)
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\], got 2.0."):
        averaged.ema_decay = 2.0
    with pytest.raises(ValueError, match="its states is"):
        plain.load_state_dict(averaged.state_dict())


def taken_name(p, g, *, lr, grad_scale=1.0):
    return p - lr * g / grad_scale


def test_a_rule_cannot_take_the_name_of_an_option():
    with pytest.raises(ValueError, match="'grad_scale' is the name of an option of the step"):
        fastlr.Optimizer(np.ones(2), fastlr.rule(taken_name), lr=0.1)


def not_a_scope(p, g, *, lr):
    return p - lr * g / fastlr.norm(g, over="world")


def sum_of_what_is_the_same(p, g, *, lr):
    return p - lr * g / fastlr.norm(lr)


def scalar_without_start(p, g, *, lr, count):
    count = count + 1
    return p - lr * g / count, count


def scalar_from_elements(p, g, *, lr, count=0.0):
    count = count + g
    return p - lr * g, count


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (not_a_scope, "norm runs over 'leaf', 'group', 'all', written as a literal, got 'world'"),
        (sum_of_what_is_the_same, "norm sums what differs between elements; 'lr' does not"),
        (scalar_without_start, "'count' is returned, so it is state of a group and needs the number that it starts at"),
        (scalar_from_elements, "'count' is state of a group, so it cannot follow from elements"),
    ],
)
def test_rules_that_cannot_be_staged(rule, message):
    with pytest.raises(fastlr.RuleError) as raised:
        fastlr.rule(rule)
    assert message in str(raised.value)
