"""State: saved, loaded, restored, carried over; and files that survive crashes."""

from __future__ import annotations

import json
import os
import shutil
import sys

import numpy as np
import pytest
from cases import CASES, PLAIN, Case

import fastlr
from fastlr import schedules

ADAMW = next(case for case in PLAIN if case.name == "adamw")


def trainer(case: Case, rng, flat=False):
    params = {"w": rng.standard_normal((6, 5)), "b": rng.standard_normal(7)}
    params = fastlr.flatten(params) if flat else params
    return params, case.make(params, groups={"b": {"lr": 0.05}}, **case.settings)


def gradients(rng, count):
    return [{"w": rng.standard_normal((6, 5)), "b": rng.standard_normal(7) if k % 4 else None} for k in range(count)]


def bits(params, opt):
    return {**{k: np.asarray(params[k]).copy() for k in ("w", "b")}, **opt.state_dict()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_save_load_continue_equals_never_stopping(case: Case, suffix, rng, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    grads = gradients(rng, 10)
    params, opt = trainer(case, np.random.default_rng(1))
    for g in grads[:5]:
        opt.step(g)
    opt.groups["b"].lr = 0.025
    opt.save(tmp_path / f"run{suffix}")
    other, again = trainer(case, np.random.default_rng(2), flat=True)
    again.load(tmp_path / f"run{suffix}")
    assert again.steps == 5 and again.groups["b"].lr == 0.025
    for g in grads[5:]:
        opt.step(g)
        again.step(g)
    assert_same(bits(params, opt), bits(other, again))


@pytest.mark.parametrize("case", PLAIN, ids=repr)
def test_state_dict_works_with_savez(case: Case, rng, tmp_path):
    params, opt = trainer(case, rng)
    for g in gradients(rng, 3):
        opt.step(g)
    state = opt.state_dict()
    assert all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in state.items())
    assert {k for k in state if k.endswith(".w")} == {f"{s}.w" for s in case.states}
    np.savez(tmp_path / "s.npz", **state)
    before = {k: v.copy() for k, v in state.items()}
    opt.step(gradients(rng, 2)[1])
    assert_same(state, before)  # copies
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        opt.load_state_dict(dict(file))
    assert_same(opt.state_dict(), before)
    assert opt.steps == 3


def test_snapshot_and_restore(rng):
    params, opt = trainer(ADAMW, rng)
    grads = gradients(rng, 8)
    for g in grads[:3]:
        opt.step(g)
    kept, before = opt.snapshot(), bits(params, opt)
    opt.lr = 7.0
    for g in grads[3:]:
        opt.step(g)
    opt.restore(kept)
    assert_same(bits(params, opt), before)
    for g in grads[3:]:
        opt.step(g)
    once = bits(params, opt)
    opt.restore(kept)
    for g in grads[3:]:
        opt.step(g)
    assert_same(bits(params, opt), once)


def test_population_is_saved(rng, tmp_path):
    fleet = fastlr.flatten({"w": np.ones(3)}, population=4)
    opt = fastlr.Adam(fleet, lr=np.array([0.1, 0.2, 0.3, 0.4]), betas=(np.linspace(0, 0.9, 4), 0.99))
    opt.step(rng.standard_normal(12))
    opt.save(tmp_path / "fleet.npz")
    other = fastlr.Adam(fastlr.flatten({"w": np.zeros(3)}, population=4))
    other.load(tmp_path / "fleet.npz")
    g = rng.standard_normal(12)
    opt.step(g)
    other.step(g)
    np.testing.assert_array_equal(opt.params.data, other.params.data)
    np.testing.assert_array_equal(other.lr, [0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("name", ["ema_out", "lr_scale", "shadow_out"])
def test_rebuild_refuses_what_the_optimizer_was_built_without(name):
    opt = fastlr.SGD(np.zeros(3), lr=1.0)
    with pytest.raises(ValueError, match=f"was built without {name}"):
        opt.rebuild(np.zeros(4), **{name: np.zeros(4)})
    assert opt.params.shape == (3,)


def test_rebuild_carries_state_over(rng):
    old = {"a": rng.standard_normal(4), "b": rng.standard_normal((2, 2)), "c": rng.standard_normal(3)}
    opt = fastlr.Adam(old, lr=0.1, groups={"a": {"lr": 0.2}})
    grads = {k: rng.standard_normal(v.shape) for k, v in old.items()}
    for _ in range(3):
        opt.step(grads)
    twin = {k: v.copy() for k, v in old.items()}
    same = fastlr.Adam(twin, lr=0.1, groups={"a": {"lr": 0.2}})
    same.load_state_dict(opt.state_dict())
    new = {"d": rng.standard_normal(5), "b": rng.standard_normal((3, 2)), "a": old["a"]}
    assert opt.rebuild(new) == ("d", "b")
    assert opt.steps == 3
    assert opt.state_dict()["step"].tolist() == [[0], [0], [3]]
    more = {"d": np.ones(5), "b": np.ones((3, 2)), "a": grads["a"]}
    fresh = new["d"].copy()
    opt.step(more)
    same.step(grads)
    np.testing.assert_array_equal(new["a"], twin["a"])
    np.testing.assert_allclose(new["d"], fresh - 0.1, rtol=1e-6)
    before = opt.state_dict()
    with pytest.raises(ValueError, match="the pattern 'a' matches no parameter"):
        opt.rebuild({"z": np.ones(2)})
    with pytest.raises(TypeError, match="the new parameters are float32"):
        opt.rebuild({"a": np.ones(2, np.float32)})
    assert_same(opt.state_dict(), before)
    opt.step(more)
    assert opt.steps == 5


def test_a_crash_while_writing_leaves_the_old_file(rng, tmp_path, monkeypatch):
    params, opt = trainer(PLAIN[0], rng)
    path = tmp_path / "run.npz"
    opt.save(path)
    old = path.read_bytes()
    opt.step(gradients(rng, 2)[1])
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, lambda *a: (_ for _ in ()).throw(OSError("the disk is gone")))
            with pytest.raises(OSError, match="the disk is gone"):
                opt.save(path)
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["run.npz"]
    opt.save(path)
    assert path.read_bytes() != old
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_files_and_states_that_do_not_fit(rng, tmp_path):
    params, opt = trainer(ADAMW, rng)
    opt.step(gradients(rng, 2)[1])
    good = tmp_path / "good.npz"
    opt.save(good)
    before = bits(params, opt)

    def refused(match, error=ValueError, **changes):
        path = tmp_path / "bad.npz"
        with np.load(good) as file:
            state = dict(file)
        for key, value in changes.items():
            state.pop(key) if value is None else state.__setitem__(key, value)
        with open(path, "wb") as file:
            np.savez(file, **state)
        with pytest.raises(error, match=match):
            opt.load(path)

    with np.load(good) as file:
        description = json.loads(bytes(file["fastlr"]))

    def described(**changes):
        return np.frombuffer(json.dumps({**description, **changes}).encode(), np.uint8)

    refused("not the state of a fastlr optimizer", fastlr=None)
    refused("not the state of a fastlr optimizer", fastlr=np.arange(5, dtype=np.uint8))
    refused("format 99", fastlr=described(format=99))
    refused("of another optimizer: its rule is 'sgd'", fastlr=described(rule="sgd"))
    refused("its dtype is 'float32'", fastlr=described(dtype="float32"))
    refused("its population is 3", fastlr=described(population=3))
    refused("of other parameters: 'w' has shape", fastlr=described(leaves={"w": [6, 4], "b": [7]}))
    refused("the state has no 'exp_avg.w'; it is incomplete", **{"exp_avg.w": None})
    refused("'exp_avg.w' in the state is float64", **{"exp_avg.w": np.zeros((6, 4))})
    refused("'step' in the state is float64", step=np.zeros((2, 1)))
    bad_lr = {p: {**v, "lr": -1.0} for p, v in description["groups"].items()}
    refused("lr must be non-negative", fastlr=described(groups=bad_lr))
    for size in (0, 10, good.stat().st_size // 2, good.stat().st_size - 1):
        cut = tmp_path / "cut.npz"
        cut.write_bytes(good.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut short or not a file written by fastlr"):
            opt.load(cut)
    other = tmp_path / "text.npz"
    other.write_text("not a file of ours")
    with pytest.raises(ValueError, match="cut short or not a file written by fastlr"):
        opt.load(other)
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "missing.npz")
    with pytest.raises(ValueError, match=r"must end in .npz or .safetensors"):
        opt.save(tmp_path / "run.pt")
    assert_same(bits(params, opt), before)
    shutil.copy(good, tmp_path / "copy.npz")
    opt.load(tmp_path / "copy.npz")
    assert_same(bits(params, opt), before)


def test_a_state_of_other_settings(rng):
    a = fastlr.Adam(np.ones(3), amsgrad=True)
    b = fastlr.Adam(np.ones(3))
    with pytest.raises(ValueError, match="its states is"):
        b.load_state_dict(a.state_dict())


# Hyperparameters, of the state or one's own


def test_hyperparameters_of_the_state_or_ones_own(rng, tmp_path):
    def make(lr, **settings):
        return fastlr.AdamW(np.ones(2), lr=lr, backend="numpy", **settings)

    a = make(schedules.Cosine(1e-3, steps=10), weight_decay=0.5)
    a.step(np.ones(2))
    a.save(tmp_path / "run.npz")
    for lr in (schedules.Cosine(1e-3, steps=1000), lambda n: 5e-5, 0.25):
        b = make(lr, groups={"*": {"weight_decay": 0.125}})
        b.load(tmp_path / "run.npz", hyperparameters=False)
        own = b.lr
        assert (own.function if callable(lr) and not isinstance(lr, schedules.Schedule) else own) == lr
        assert b.groups["*"].weight_decay == 0.125 and b.weight_decay == make(1.0).weight_decay
        assert b.steps == 1 and np.array_equal(b.params, a.params)
        assert_same(
            {k: v for k, v in b.state_dict().items() if k != "fastlr"},
            {k: v for k, v in a.state_dict().items() if k != "fastlr"},
        )
        assert b.step(np.ones(2)).lr == (lr(1) if callable(lr) else lr)
        b.load(tmp_path / "run.npz")
        assert b.lr == a.lr and b.weight_decay == 0.5 and not b.groups


def test_a_function_is_never_replaced_by_another_without_a_word(rng):
    a = fastlr.SGD(np.ones(2), lr=lambda n: 1e-3, backend="numpy")
    a.step(np.ones(2))
    for lr in (lambda n: 5e-5, 0.1, schedules.Constant(0.1)):
        b = fastlr.SGD(np.ones(2), lr=lr, backend="numpy")
        with pytest.raises(ValueError, match=r"a function of yours, which cannot be saved.*hyperparameters=False"):
            b.load_state_dict(a.state_dict())
        b.load_state_dict(a.state_dict(), hyperparameters=False)
        assert b.steps == 1


def test_a_snapshot_has_functions_too(rng):
    first, second = (lambda n: 0.5), (lambda n: 0.25)
    opt = fastlr.Adam(np.ones(2), lr=first, groups={"*": {"betas": (first, 0.5)}}, backend="numpy")
    kept = opt.snapshot()
    opt.lr = 7.0
    opt.groups["*"].betas = (second, 0.5)
    opt.restore(kept)
    assert opt.lr.function is first and opt.groups["*"].betas[0].function is first
    assert opt.step(np.ones(2)).lr == 0.5


def test_a_state_of_another_class(rng):
    adam = fastlr.Adam(np.ones(2), lr=0.1, backend="numpy")
    adam.step(np.ones(2))
    w = np.ones(2)
    adamw = fastlr.AdamW(w, lr=0.1, weight_decay=0.5, backend="numpy")
    before = adamw.state_dict()
    with pytest.raises(ValueError, match=r"of 'Adam', but this optimizer is 'AdamW'.*hyperparameters=False"):
        adamw.load_state_dict(adam.state_dict())
    assert_same(before, adamw.state_dict())
    adamw.load_state_dict(adam.state_dict(), hyperparameters=False)
    assert adamw.steps == 1 and adamw.weight_decay == 0.5 and adamw.decoupled_weight_decay
    old = adam.state_dict()  # older files do not say their class
    description = json.loads(bytes(old["fastlr"]))
    del description["optimizer"]
    old["fastlr"] = np.frombuffer(json.dumps(description).encode(), np.uint8)
    fastlr.Adam(np.ones(2), backend="numpy").load_state_dict(old)


def test_a_plateau_of_ones_own_goes_on(rng):
    def make():
        return fastlr.SGD(np.zeros(2), lr=schedules.Plateau(1.0, patience=1), backend="numpy")

    a, b = make(), make()
    for _ in range(4):
        a.observe(1.0)
    b.load_state_dict(a.state_dict(), hyperparameters=False)
    assert b.step(np.zeros(2)).lr == a.step(np.zeros(2)).lr < 1.0


# Leaves


def test_leaves_in_another_order(rng):
    """Everything goes by path: counters and what a rule keeps of a group, too."""
    start = {name: rng.standard_normal(3) for name in "abc"}

    def make(order):
        params = {name: start[name].copy() for name in order}
        return params, fastlr.NAdam(params, lr=0.1, groups={"b": {"lr": 0.3}}, backend="numpy")

    (pa, a), (pb, b) = make("abc"), make("cab")
    for k in range(6):
        a.step({name: rng.standard_normal(3) if k % (i + 1) == 0 else None for i, name in enumerate("abc")})
    assert len(set(a.state_dict()["step"].ravel())) == 3
    b.load_state_dict(a.state_dict(params=True))
    g = {name: rng.standard_normal(3) for name in "abc"}
    a.step(g)
    b.step(g)
    for name in "abc":
        assert np.array_equal(pa[name], pb[name]), name
    for key in ("step", "clock", "skipped", "mu_product"):
        assert np.array_equal(a.state_dict()[key][[2, 0, 1]], b.state_dict()[key]), key


def test_parameters_given_in_memory_that_is_written(rng):
    w = {"a": np.ones(2), "b": np.full(2, 2.0)}
    opt = fastlr.SGD(w, lr=0.1, backend="numpy")
    opt.load_state_dict({**opt.state_dict(), "params.a": w["b"], "params.b": w["a"]})
    assert w["a"].tolist() == [2.0, 2.0] and w["b"].tolist() == [1.0, 1.0]


def test_parameters_that_have_become_read_only(rng):
    w = {"a": np.ones(2), "b": np.ones(2)}
    opt = fastlr.SGD(w, lr=0.1, momentum=0.9, backend="numpy")
    state = fastlr.SGD({"a": np.zeros(2), "b": np.zeros(2)}, lr=0.5, momentum=0.9).state_dict(params=True)
    w["b"].flags.writeable = False
    with pytest.raises(RuntimeError, match=r"params\['b'\] has changed: its writeable is False"):
        opt.load_state_dict(state)
    assert opt.lr == 0.1 and w["a"].tolist() == [1.0, 1.0]


# Any state of one's own can be loaded

_RULES = [
    (fastlr.SGD, {"momentum": 0.9}),
    (fastlr.Adam, {}),
    (fastlr.AdamW, {"weight_decay": 0.1}),
    (fastlr.RMSprop, {"centered": True}),
    (fastlr.NAdam, {}),
    (fastlr.LAMB, {}),
    (fastlr.LARS, {}),
    (fastlr.DoG, {}),
    (fastlr.Prodigy, {}),
    (fastlr.ScheduleFreeAdamW, {}),
]


def _random_optimizer(seed):
    """An optimizer of any settings; the same for the same seed."""
    rng = np.random.default_rng(seed)
    make, settings = _RULES[rng.integers(len(_RULES))]
    population = (None, 1, 2, 3)[rng.integers(4)]

    def number(low, high, scheduled=True):
        kind = rng.integers(4)
        if kind == 0 and population:
            return rng.uniform(low, high, population)
        if kind == 1 and scheduled:
            return schedules.Linear(rng.uniform(low, high), rng.uniform(low, high), 5)
        return rng.uniform(low, high)

    def hyperparameters(names):
        found = {}
        for name in names:
            if rng.random() < 0.5:
                continue
            if name == "betas":
                found[name] = (number(0.1, 0.9), number(0.1, 0.9))
            elif name == "frozen":
                found[name] = bool(rng.integers(2)) if population is None else rng.random(population) < 0.3
            else:
                found[name] = number(0.01, 0.5)
        return found

    probe = make(np.ones(1), backend="numpy", **settings)
    names = [
        n for n in ("lr", "betas", "weight_decay", "clip_norm", "clip_value") if n in probe._stepper.state.groups.names
    ]
    names = [n for n in names if make is not fastlr.DoG or n == "lr"]
    settings = {**settings, **hyperparameters(names)}
    groups = {
        p: hyperparameters([n for n in names if "clip" not in n] + ["frozen"]) for p in ("b", "*.c")[: rng.integers(3)]
    }
    options = {"ema": number(0.5, 0.9, False)} if rng.integers(2) else {}
    params = fastlr.flatten({"w": np.full((2, 2), 0.5), "b": np.ones(2), "d": {"c": np.ones(1)}}, population=population)
    return params, make(params, groups=groups, backend="numpy", **{**settings, **options})


def test_any_state_of_ones_own_can_be_loaded():
    done = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        try:
            params, opt = _random_optimizer(seed)
            opt.step(rng.standard_normal(params.size))
        except ValueError:  # settings that do not go together
            continue
        state = opt.state_dict(params=True)
        other, again = _random_optimizer(seed)
        if seed % 2:  # of any hyperparameters
            again.groups.defaults.lr = 0.125
            for group in again.groups.values():
                group.lr = 0.25
        again.load_state_dict(state)
        assert_same(again.state_dict(params=True), state)
        g = rng.standard_normal(params.size)
        opt.step(g)
        again.step(g)
        assert_same(again.state_dict(params=True), opt.state_dict(params=True))
        done += 1
    assert done > 90


# States that are damaged


def _redescribed(state, change):
    description = json.loads(bytes(state["fastlr"]))
    change(description)
    return {**state, "fastlr": np.frombuffer(json.dumps(description).encode(), np.uint8)}


def _nested(depth):
    inner = {"type": "Constant", "value": 0.1}
    for _ in range(depth):
        inner = {"type": "Scaled", "schedule": inner, "factor": 1.0}
    return inner


def _set(*keys):
    *path, last, value = keys

    def change(description):
        for key in path:
            description = description[key]
        description[last] = value

    return change


_OWN = ("groups", "")
_NONSENSE = [
    _set(*_OWN, "lr", float("nan")),
    _set(*_OWN, "lr", -1.0),
    _set(*_OWN, "lr", 10**400),
    _set(*_OWN, "lr", 1e400),
    _set(*_OWN, "lr", "0.1"),
    _set(*_OWN, "lr", ["0.1", "0.2"]),
    _set(*_OWN, "lr", [10**400, 1]),
    _set(*_OWN, "lr", [0.1, 0.2, 0.3]),
    _set(*_OWN, "lr", True),
    _set(*_OWN, "lr", None),
    _set(*_OWN, "lr", {}),
    _set(*_OWN, "lr", {"type": "Function", "function": "print"}),
    _set(*_OWN, "lr", {"type": "Product", "first": 1.0, "second": 2.0}),
    _set(*_OWN, "lr", {"type": "Clip", "schedule": 0.1, "low": 0.0, "high": 1.0}),
    _set(*_OWN, "lr", {"type": "Cosine", "lr": 10**400, "steps": 10}),
    _set(*_OWN, "lr", {"type": ["Cosine"]}),
    _set(*_OWN, "lr", {"type": "Constant", "value": [[]]}),
    _set(*_OWN, "lr", _nested(300)),
    _set(*_OWN, "betas", [{"type": "Linear", "start": 0.9, "end": 1.0, "steps": 3}, 0.9]),
    _set(*_OWN, "betas", [2.0, 0.9]),
    _set(*_OWN, "betas", [0.9]),
    _set(*_OWN, "betas", 0.9),
    _set(*_OWN, "betas", {"type": "Constant", "value": 0.1}),
    _set(*_OWN, "amsgrad", True),
    _set(*_OWN, "amsgrad", 1),
    _set(*_OWN, "frozen", [True]),
    _set(*_OWN, "frozen", 0),
    _set(*_OWN, "clip_norm", 0.0),
    _set(*_OWN, "another", 0.0),
    _set(*_OWN, {}),
    _set("groups", []),
    _set("groups", "b", "another", 0.1),
    _set("groups", "nowhere", {"lr": 0.1}),
    _set("groups", "b", None),
    _set("steps", 2**70),
    _set("steps", -1),
    _set("steps", 1.5),
    _set("steps", True),
    _set("steps", None),
    _set("observed", {"x": {"scale": -1.0}}),
    _set("observed", {"x": {"scale": float("nan")}}),
    _set("observed", {"x": {"bad": -1}}),
    _set("observed", {"x": {"bad": 2**70}}),
    _set("observed", {"x": {"worse": 1}}),
    _set("observed", {"x": {"best": "low"}}),
    _set("observed", [1]),
    _set("loss_scale", {"scale": 0.0, "good": 0}),
    _set("loss_scale", {"scale": float("inf"), "good": 0}),
    _set("loss_scale", {"scale": "2.0", "good": 0}),
    _set("loss_scale", {"scale": True, "good": 0}),
    _set("loss_scale", {"scale": [1.0, 2.0], "good": [0, 0]}),
    _set("loss_scale", {"scale": 1.0, "good": -1}),
    _set("loss_scale", {"scale": 1.0, "good": 0.5}),
    _set("loss_scale", {"scale": 1.0, "good": 2**60}),
    _set("loss_scale", {"scale": 10**400, "good": 0}),
    _set("loss_scale", 5),
    _set("leaves", []),
    _set("leaves", "x", None),
    _set("leaves", {"w": [2], "b": "x"}),
    _set("optimizer", 5),
    _set("states", [[[]]]),
    _set("format", None),
]


def _full(lr=0.1):
    params = {"w": np.full(2, 0.5, np.float32), "b": np.ones(3, np.float32)}
    groups = {"b": {"lr": schedules.Plateau(0.1)}}
    scale = fastlr.LossScale(8.0)
    opt = fastlr.Adam(params, lr=lr, groups=groups, loss_scale=scale, ema=0.9, shadow="bfloat16", backend="numpy")
    return params, opt


def _everything(opt):
    return {
        **opt.state_dict(params=True),
        "bits": np.concatenate([v.view(np.uint16) for v in opt._stepper.state.columns.arrays["shadow"]]),
        "lr": np.array([repr({p: g.overrides for p, g in (("", opt.groups.defaults), *opt.groups.items())})]),
    }


@pytest.fixture(scope="module")
def saved():
    _, opt = _full(0.3)
    for _ in range(3):
        opt.step({"w": np.full(2, 8.0, np.float32), "b": np.full(3, -8.0, np.float32)})
    opt.observe(1.0)
    return opt.state_dict(params=True)


@pytest.mark.parametrize("change", _NONSENSE)
def test_descriptions_that_make_no_sense(saved, change):
    _, opt = _full()
    before = _everything(opt)
    with pytest.raises(ValueError):
        opt.load_state_dict(_redescribed(saved, change))
    assert_same(_everything(opt), before)
    opt.load_state_dict(saved)
    assert_same(opt.state_dict(params=True), saved)


def test_arrays_that_make_no_sense(saved):
    _, opt = _full()
    before = _everything(opt)
    for changes in (
        {"step": saved["step"] - 100},
        {"clock": saved["clock"] + 2**60},
        {"skipped": saved["skipped"] - 1},
        {"step": saved["step"].astype(np.float64)},
        {"exp_avg.w": np.array([None, None])},
        {"exp_avg.w": [[1.0], [1.0, 2.0]]},
        {"exp_avg.w": "text"},
        {"params.b": saved["params.b"][:2]},
        {"fastlr": "text"},
        {"fastlr": np.zeros((2, 2), np.uint8)},
        {"fastlr": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"fastlr": np.frombuffer(b"1" * 10_000, np.uint8)},
        {"fastlr": np.frombuffer(b"\xff\xfe\xfd", np.uint8)},
    ):
        with pytest.raises(ValueError):
            opt.load_state_dict({**saved, **changes})
        assert_same(_everything(opt), before)
    with pytest.raises(TypeError, match="state must be a dict"):
        opt.load_state_dict([])
    rule = fastlr.NAdam(np.ones(2), backend="numpy")
    with pytest.raises(ValueError, match="'mu_product' in the state must not be NaN"):
        rule.load_state_dict({**rule.state_dict(), "mu_product": np.full((1, 1), np.nan)})


def test_descriptions_damaged_anywhere(saved):
    """Any node of a description replaced by any other: an error with nothing changed, or a state that can step."""
    rng = np.random.default_rng(0)
    values = [None, True, -1, 0, 3, 2**53, 10**400, 0.5, -0.5, float("nan"), float("inf"), "", "lr", [], [0.1, 0.2], {}]
    values += [[[]], {"type": "Cosine"}, {"type": None}, {"type": "Linear", "start": 0.1, "end": 0.05, "steps": 3}]

    def places(node, path=()):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            yield (*path, key)
            yield from places(node[key], (*path, key))

    _, opt = _full()
    before, taken = _everything(opt), 0
    original = opt.snapshot()
    every = list(places(json.loads(bytes(saved["fastlr"]))))
    for _ in range(600):
        path, value = every[rng.integers(len(every))], values[rng.integers(len(values))]
        try:
            opt.load_state_dict(_redescribed(saved, _set(*path, value)))
        except ValueError:
            assert_same(_everything(opt), before)
        else:
            taken += 1
            opt.step({"w": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
            opt.restore(original)
            assert_same(_everything(opt), before)
    assert taken < 120


# Interrupts


class _Interrupted:
    """Raises KeyboardInterrupt at one line of fastlr, of all that are run."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, _):
        if event == "call":
            return self if os.sep + "fastlr" + os.sep in frame.f_code.co_filename else None
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that is closed a little later
@pytest.mark.parametrize(
    ("how", "stride"), [("load_state_dict", 1), ("load", 5), ("restore", 5), ("hyperparameters=False", 5)]
)
def test_an_interrupt_leaves_what_was_before_or_what_comes_after(saved, how, stride, tmp_path):
    def make():
        params, opt = _full()
        opt.step({"w": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
        return params, opt

    def act(opt):
        if how == "load":
            opt.load(tmp_path / "run.npz")
        else:
            opt.load_state_dict(state, hyperparameters="False" not in how)

    source = _full()[1]
    source.load_state_dict(saved)
    source.save(tmp_path / "run.npz")
    state = source.snapshot() if how == "restore" else saved
    g = {"w": np.full(2, 3.0, np.float32), "b": np.full(3, -5.0, np.float32)}
    ends = []
    for loaded in (False, True):
        _, opt = make()
        if loaded:
            act(opt)
        now = _everything(opt)
        opt.step(g)
        ends.append((now, _everything(opt)))
    assert set(ends[0][0]) == set(ends[1][0])
    _, opt = make()
    first = opt.snapshot()
    seen = [0, 0]
    for at in range(1, 100_000, stride):
        trace, before = _Interrupted(at), sys.gettrace()
        sys.settrace(trace)
        try:
            act(opt)
            done = True
        except KeyboardInterrupt:
            done = False
        finally:
            sys.settrace(before)
        now = _everything(opt)
        which = int(not all(np.array_equal(now[k], v) for k, v in ends[0][0].items()))
        assert_same(now, ends[which][0])
        if done:
            break
        seen[which] += 1
        if which or at % 25 == 1:
            opt.step(g)
            assert_same(_everything(opt), ends[which][1])
            opt.restore(first)
    assert which == 1 and seen[0] * stride > 1000


@pytest.mark.parametrize("exchange", ["load_state_dict", "restore", "rebuild", "find_lr"])
def test_a_group_that_was_taken_before_is_that_of_the_optimizer(exchange):
    params = {"w": np.ones(2), "b": np.ones(2)}
    opt = fastlr.SGD(params, lr=0.1, groups={"b": {"lr": 0.2}}, backend="numpy")
    opt.step(params)
    group, state = opt.groups["b"], opt.snapshot()
    group.lr = 0.3
    if exchange == "rebuild":
        opt.rebuild(params)
    elif exchange == "find_lr":
        fastlr.find_lr(opt, lambda p: (1.0, p))
    else:
        getattr(opt, exchange)(state)
    assert group.lr == opt.groups["b"].lr == (0.2 if exchange in ("load_state_dict", "restore") else 0.3)
    group.lr = 0.5
    assert group.lr == opt.groups["b"].lr == 0.5 and "0.5" in repr(group)
    assert opt.step(params).lrs["b"] == 0.5


def test_a_group_that_is_no_more():
    params = {"w": np.ones(2), "b": np.ones(2)}
    opt = fastlr.SGD(params, groups={"b": {"lr": 0.2}}, backend="numpy")
    group = opt.groups["b"]
    opt.load_state_dict(fastlr.SGD(params, lr=0.3, backend="numpy").state_dict())
    for use in (lambda: group.lr, lambda: setattr(group, "lr", 0.5)):
        with pytest.raises(RuntimeError, match="there is no group 'b' any more: what was loaded has other groups"):
            use()
    assert opt.lr == 0.3 and repr(group) == "Group('b': no longer there)"


@fastlr.rule
def overflowing(p, g, *, lr, weight=1.0):
    """A rule whose scalar overflows and is NaN after that."""
    weight = weight * 1e200 - weight * 1e150
    return p - lr * weight * g, weight


@pytest.mark.parametrize("make", [fastlr.ScheduleFreeSGD, fastlr.ScheduleFreeAdamW, fastlr.NAdam, overflowing])
def test_its_own_state_loads_after_an_overflow(make):
    def build():
        if make is overflowing:
            return fastlr.Optimizer(np.ones(2), make, lr=1e308, backend="numpy")
        return make(np.ones(2), lr=1e308, backend="numpy")

    opt, other = build(), build()
    with np.errstate(all="ignore"):
        for _ in range(4):
            opt.step(np.ones(2))
    state = opt.state_dict(params=True)
    other.load_state_dict(state)
    assert_same(other.state_dict(params=True), state)
