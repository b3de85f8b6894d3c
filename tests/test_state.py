"""State: saved, loaded, restored, carried over; and files that survive crashes."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from cases import CASES, PLAIN, Case

import fastlr
from fastlr import checkpoints

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
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~checkpoints._umask())


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


def test_a_damaged_safetensors_file(rng, tmp_path):
    pytest.importorskip("safetensors")
    _, opt = trainer(PLAIN[0], rng)
    path = tmp_path / "run.safetensors"
    opt.save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut short or not a .safetensors file"):
        opt.load(path)


def test_safetensors_that_is_not_installed(rng, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    _, opt = trainer(PLAIN[0], rng)
    with pytest.raises(ImportError, match="needs the package safetensors: pip install safetensors"):
        opt.save(tmp_path / "run.safetensors")


def test_a_state_of_other_settings(rng):
    a = fastlr.Adam(np.ones(3), amsgrad=True)
    b = fastlr.Adam(np.ones(3))
    with pytest.raises(ValueError, match="its states is"):
        b.load_state_dict(a.state_dict())
