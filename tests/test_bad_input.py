"""Bad input gets a clear error before anything is written: the table of messages."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
from cases import CASES

import fastlr


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [pytest.param(c.make, s, m, id=f"{c.name}-{k}") for c in CASES for k, (s, m) in enumerate(c.bad)],
)
def test_settings(make, settings, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make(np.ones(3), **settings)


def read_only():
    x = np.ones(3)
    x.flags.writeable = False
    return x


def unaligned():
    return np.frombuffer(bytearray(33), np.uint8)[1:].view(np.float64)


SHARED = np.ones(10)

PARAMETERS = [
    ({}, ValueError, "params holds no arrays. Pass at least one array of float32 or float64."),
    ({"w": None}, ValueError, "params holds no arrays"),
    ({"a": {"w": 1.0}}, TypeError, "params['a.w'] is a float, expected a NumPy array that can be updated in place."),
    ({"w": "text"}, TypeError, "params['w'] is a str"),
    ({"w": np.ones(3, np.int64)}, TypeError, "params['w'] has dtype int64, expected float32 or float64."),
    ({"w": np.ones(3, np.complex64)}, TypeError, "params['w'] has dtype complex64"),
    ({"w": np.ones(3, np.float16)}, TypeError, "params['w'] has dtype float16"),
    ({"w": np.ones(3, ">f8")}, TypeError, "params['w'] has dtype >f8"),
    (
        {"w": np.ones(3), "b": np.ones(3, np.float32)},
        TypeError,
        "params['b'] has dtype float32, but params['w'] has float64. Give all parameters one dtype",
    ),
    ([np.ones((4, 4))[:, 1]], ValueError, "params['0'] is not C-contiguous, so it cannot be updated in place."),
    ([np.asfortranarray(np.ones((4, 4)))], ValueError, "params['0'] is not C-contiguous"),
    ([unaligned()], ValueError, "params['0'] is not aligned: its address"),
    (read_only(), ValueError, "params is read-only, so it cannot be updated in place. Pass a copy of it."),
    ([SHARED, SHARED], ValueError, "params['0'] and params['1'] share memory, so both cannot be updated."),
    ({"a": SHARED[:6], "b": SHARED[5:]}, ValueError, "params['a'] and params['b'] share memory"),
    (
        {"a.b": np.ones(1), "a": {"b": np.ones(1)}},
        ValueError,
        "params has two leaves with the path 'a.b'. Rename a key",
    ),
]


@pytest.mark.parametrize(("params", "error", "message"), PARAMETERS)
def test_parameters(params, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlr.SGD(params)


GRADIENTS = [
    ({"w": np.ones((2, 3))}, ValueError, "grads does not have the structure of params: missing b."),
    (
        {"w": np.ones((2, 3)), "b": np.ones(3), "c": np.ones(1)},
        ValueError,
        "unexpected c. Pass one gradient per parameter.",
    ),
    ({"w": np.ones((3, 2)), "b": np.ones(3)}, ValueError, "grads['w'] has shape (3, 2), but the parameter has (2, 3)."),
    (
        {"w": np.ones((2, 3), np.float32), "b": np.ones(3)},
        TypeError,
        "grads['w'] has dtype float32, but the parameters have float64.",
    ),
    ({"w": {"x": np.ones(3)}, "b": np.ones(3)}, TypeError, "grads['w'] is a dict, expected an array of numbers."),
    (
        [np.ones((2, 3)), np.ones(3)],
        ValueError,
        "grads does not have the structure of params: missing w, b; unexpected 0, 1.",
    ),
    (
        np.ones(8),
        ValueError,
        "grads has shape (8,), params has 9 elements. Pass the structure of params, or one gradient per",
    ),
    (np.ones((3, 3)), ValueError, "grads has shape (3, 3), params has 9 elements."),
    (
        np.ones(9, np.float32),
        TypeError,
        "grads has dtype float32, but the parameters have float64. Convert it with .astype.",
    ),
    (1.5, ValueError, "grads has shape (), params has 9 elements."),
    ("gradient", TypeError, "grads has dtype <U8"),
    (fastlr.flatten({"x": np.ones(9)}), ValueError, "grads was made from a different structure than params."),
]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("grads", "error", "message"), GRADIENTS)
def test_gradients(grads, error, message, flat):
    tree = {"w": np.ones((2, 3)), "b": np.zeros(3)}
    params = fastlr.flatten(tree) if flat else tree
    opt = fastlr.Adam(params)
    with pytest.raises(error, match=re.escape(message)):
        opt.step(grads)
    assert opt.steps == 0
    np.testing.assert_array_equal(params["w"], 1.0)
    np.testing.assert_array_equal(params["b"], 0.0)
    opt.step({"w": np.ones((2, 3)), "b": np.ones(3)})
    assert opt.steps == 1


class Length(np.ndarray):
    """Numbers with a unit, as libraries of units make a subclass for them."""


MASKED = np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False])
MORE = [
    (MASKED, "a masked array, whose mask would be ignored. Pass x.filled(0)"),
    (np.ma.array(np.ones(3)), "a masked array"),
    (np.ones(3).view(np.recarray), "a numpy.rec.recarray, a subclass of np.ndarray, and what it adds would be"),
    (np.ones(3).view(Length), "Length, a subclass of np.ndarray, and what it adds would be ignored. Pass np."),
]
INTO = {
    "params": lambda x: fastlr.SGD(x, backend="numpy"),
    "params['w']": lambda x: fastlr.SGD({"w": x}, backend="numpy"),
    "flatten": lambda x: fastlr.flatten({"w": x}),
    "a buffer": lambda x: fastlr.flatten({"w": np.ones(3)}).__setitem__("w", x),
    "grads": lambda x: fastlr.SGD(np.ones(3), backend="numpy").step(x),
    "grads['w']": lambda x: fastlr.SGD({"w": np.ones(3)}, backend="numpy").step({"w": x}),
    "grads['v']": lambda x: fastlr.SGD({"w": np.ones(3), "v": np.ones(3)}, backend="numpy").step(
        {"w": np.ones(3), "v": x}
    ),
    "accumulate": lambda x: fastlr.SGD({"w": np.ones(3)}, backend="numpy").accumulate({"w": x}),
    "lr_scale": lambda x: fastlr.SGD(np.ones(3), lr_scale=x, backend="numpy"),
    "ema_out": lambda x: fastlr.SGD(np.ones(3), ema=0.5, ema_out=x.copy(), backend="numpy"),
    "shadow_out": lambda x: fastlr.SGD(np.ones(3), shadow="float16", shadow_out=x.astype(np.float16), backend="numpy"),
    "line_search": lambda x: fastlr.line_search(lambda p: (1.0, p), x, np.ones(3)),
}


@pytest.mark.parametrize("into", INTO)
def test_arrays_that_mean_more_than_their_memory(into):
    for array, message in MORE:
        with pytest.raises(TypeError, match=re.escape(message)):
            INTO[into](array)


def test_a_list_is_the_gradient_of_one_array():
    w = np.ones(2)
    opt = fastlr.SGD(w, lr=1.0, backend="numpy")
    opt.step([1.0, 2.0])
    opt.accumulate((1.0, 2.0))
    opt.step()
    assert w.tolist() == [-1.0, -3.0]
    bad = (
        ([1.0], ValueError, "grads has shape (1,), params has 2 elements."),
        ([], ValueError, "grads has shape (0,), params has 2 elements."),
        ([np.ones(2)], ValueError, "grads has shape (1, 2), params has 2 elements."),
        ([1.0, None], TypeError, "grads is a list, expected an array of numbers."),
        ([1.0, [2.0]], TypeError, "grads is a list that NumPy cannot read"),
        ([True, False], TypeError, "grads has dtype bool, but the parameters have float64."),
        ({"w": w}, TypeError, "grads is a dict, expected an array of numbers."),
    )
    for grads, error, message in bad:
        for call in (opt.step, opt.accumulate):
            with pytest.raises(error, match=re.escape(message)):
                call(grads)
    assert w.tolist() == [-1.0, -3.0] and opt.steps == 2


def test_scales_whose_product_is_infinite():
    params = fastlr.flatten({"w": np.ones(2)}, population=3)
    opt = fastlr.SGD(params, loss_scale=fastlr.LossScale(8.0), backend="numpy")
    opt.step(np.ones(6), grad_scale=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="grad_scale times the loss scale must be positive and finite, got inf"):
        opt.step(np.ones(6), grad_scale=[1.0, 2.0, 1e308])
    assert opt.steps == 1


def test_nothing_to_accumulate():
    opt = fastlr.SGD(np.ones(2), backend="numpy")
    for _ in range(2):
        with pytest.raises(TypeError, match="accumulate needs gradients to add, got None"):
            opt.accumulate(None)
        opt.accumulate(np.ones(2))


def test_gradients_of_a_part():
    opt = fastlr.SGD({"w": np.ones(2), "b": np.ones(3)}, lr=1.0, backend="numpy")
    message = (
        "missing b. Pass one gradient per parameter. Where there is none, even with only=, pass None in its place."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        opt.step({"w": np.ones(2)}, only="w")
    assert opt.step({"w": np.ones(2), "b": None}, only="w").step == 1
    with pytest.raises(
        ValueError, match=re.escape("ema_out does not have the structure of params: missing b. Pass the same")
    ):
        fastlr.SGD({"w": np.ones(2), "b": np.ones(3)}, ema=0.9, ema_out={"w": np.ones(2)})


def nested(depth, leaf):
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def test_trees_without_an_end():
    """A tree in itself, and one that is nested so deep that Python gives up."""
    circle = {"a": [np.ones(2)]}
    circle["a"].append(circle)
    deep = nested(2000, np.ones(2))
    for call in (fastlr.SGD, fastlr.flatten):
        with pytest.raises(ValueError, match=re.escape("params['a.1'] is params itself")):
            call(circle)
        with pytest.raises(ValueError, match=re.escape("params['b.a.1'] is params['b'] itself: a tree cannot hold")):
            call({"b": circle})
        with pytest.raises(ValueError, match="params is nested more than 100 deep"):
            call(deep)
    twice = [np.ones(2)]
    with pytest.raises(ValueError, match="share memory"):  # not in itself, but the same array twice
        fastlr.SGD({"a": twice, "b": twice})

    w = nested(100, np.ones(2))
    buffer = fastlr.flatten(w)
    assert copy.deepcopy(buffer).size == pickle.loads(pickle.dumps(buffer)).size == 2
    opt = fastlr.SGD(w, lr=1.0, backend="numpy")
    opt.step(nested(100, np.ones(2)))
    for grads in (deep, circle, nested(99, np.ones(2)), nested(101, np.ones(2))):
        with pytest.raises((TypeError, ValueError), match="grads"):
            opt.step(grads)
    assert opt.steps == 1 and opt._stepper.state.parameters.leaves[0].tolist() == [0.0, 0.0]
    opt = fastlr.SGD({"w": np.ones(2)}, lr=1.0, backend="numpy")
    for grads in (deep, circle, {"w": circle}, {"w": deep}):
        with pytest.raises((TypeError, ValueError), match="grads"):
            opt.step(grads)


TAKES = [
    lambda x: fastlr.SGD(np.ones(2), lr=x),
    lambda x: fastlr.SGD(np.ones(2), nesterov=x),
    lambda x: fastlr.SGD(np.ones(2), backend=x),
    lambda x: fastlr.SGD(np.ones(2), loss_scale=x),
    lambda x: fastlr.SGD(np.ones(2), alloc=x),
    lambda x: fastlr.Optimizer(np.ones(2), x, lr=0.1),
    lambda x: fastlr.SGD(np.ones(2), backend="numpy").to(x),
    lambda x: fastlr.SGD(np.ones(2), backend="numpy").step(np.ones(2), grad_scale=x),
    lambda x: fastlr.SGD(np.ones(2), backend="numpy").step(np.ones(2), only=x),
    lambda x: fastlr.SGD(np.ones(2), backend="numpy").step(np.ones(2), stream=x),
    lambda x: fastlr.flatten(np.ones(2), population=x),
    lambda x: fastlr.LBFGS(np.ones(2), method=x),
    lambda x: fastlr.warmup(x),
    lambda x: fastlr.rule(x),
    lambda x: fastlr.flatten({"w": np.ones(2)})[x],
    lambda x: fastlr.flatten({"w": np.ones(2)}).__setitem__(x, np.ones(2)),
]


def circle():
    out = []
    out.append(out)
    return out


@pytest.mark.parametrize("make", [circle, lambda: nested(5000, 1), lambda: 10**5000, lambda: "x" * 10**6])
def test_messages_show_the_beginning_of_what_is_long(make):
    value = make()
    for take in TAKES:
        with pytest.raises((TypeError, ValueError, KeyError)) as raised:
            take(value)
        assert len(str(raised.value)) < 500


def test_memory_maps_are_their_memory(tmp_path):
    w, g = (np.memmap(tmp_path / name, np.float64, "w+", shape=3) for name in "wg")
    g[:] = 1.0
    for params, grads in ((w, g), ({"w": w}, {"w": g})):
        fastlr.SGD(params, lr=1.0, backend="numpy").step(grads)
    assert w.tolist() == [-2.0] * 3 and fastlr.flatten({"w": w})["w"].tolist() == [-2.0] * 3


def test_what_wraps_numbers_with_a_unit():
    class Meters:
        units = "m"

        def __array__(self, dtype=None, copy=None):
            return np.ones(3)

    w = np.ones(3)
    with pytest.raises(TypeError, match="Meters, whose units would be ignored. Pass the numbers alone"):
        fastlr.SGD(w, backend="numpy").step(Meters())
    assert w.tolist() == [1.0] * 3


def test_nested_structures_name_the_place():
    params = {"layers": [{"w": np.ones(2)}, {"w": np.ones(2)}]}
    opt = fastlr.SGD(params)
    with pytest.raises(
        ValueError, match=re.escape("grads['layers.1'] does not have the structure of params: missing w")
    ):
        opt.step({"layers": [{"w": np.ones(2)}, {"v": np.ones(2)}]})
    with pytest.raises(ValueError, match=re.escape("grads['layers'] is a ndarray, expected a list with 0, 1.")):
        opt.step({"layers": np.ones(4)})


GROUPS = [
    ({"bias": {"lr": 0.1}}, ValueError, "groups: the pattern 'bias' matches no parameter. There are w, b."),
    ({"b": {"lr": -0.1}}, ValueError, "groups['b']: lr must be non-negative and finite, got -0.1."),
    ({"b": {"speed": 0.1}}, TypeError, "groups['b']: hyperparameter 'speed' is not known; there are lr, momentum"),
    ({"b": {"frozen": 1}}, TypeError, "groups['b']: frozen must be True or False, got 1."),
    ([{"lr": 0.1}], TypeError, "groups must be a dict of pattern: hyperparameters, got [{'lr': 0.1}]."),
    ({"": {"lr": 0.1}}, ValueError, 'groups: a pattern must be a string such as "*.bias" or "*", got \'\'.'),
    ({3: {"lr": 0.1}}, ValueError, "groups: a pattern must be a string"),
    ({"b": 0.1}, TypeError, "groups['b'] must be a dict of hyperparameters, got 0.1."),
    ({"b": {"nesterov": True}}, ValueError, "nesterov=True needs a momentum above 0"),
]


@pytest.mark.parametrize(("groups", "error", "message"), GROUPS)
def test_groups(groups, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlr.SGD({"w": np.ones(2), "b": np.ones(2)}, groups=groups)


def test_a_bad_value_between_steps_changes_nothing():
    opt = fastlr.Adam({"w": np.ones(2)}, groups={"w": {"lr": 0.5}})
    for change in (lambda: setattr(opt, "lr", -1.0), lambda: setattr(opt.groups["w"], "betas", (2.0, 0.5))):
        with pytest.raises(ValueError, match="must be"):
            change()
    assert (opt.lr, opt.groups["w"].lr, opt.groups["w"].betas) == (1e-3, 0.5, (0.9, 0.999))
    with pytest.raises(AttributeError, match="group 'w' has no 'momentum'; it has lr"):
        _ = opt.groups["w"].momentum


def test_flatten():
    for population, error, message in (
        (0, ValueError, "population must be at least 1, got 0."),
        (2.5, TypeError, "population must be a whole number, got 2.5."),
    ):
        with pytest.raises(error, match=re.escape(message)):
            fastlr.flatten({"w": np.ones(2)}, population=population)
    with pytest.raises(TypeError, match="params\\['w'\\] has dtype int64"):
        fastlr.flatten({"w": np.arange(3)})
    with pytest.raises(TypeError, match="is a list|is a int|expected a NumPy array"):
        fastlr.flatten({"w": [1, 2]})


def test_states_with_names_that_are_taken():
    """Saved beside the counters, they would overwrite them without a word."""

    def counting(p, g, step, *, lr):
        step = step + 1
        return p - lr * g / step, step

    with pytest.raises(ValueError, match="a state called 'step' cannot be saved beside params, step, clock"):
        fastlr.Optimizer(np.ones(3), fastlr.rule(counting), lr=0.1)


def test_copies():
    opt = fastlr.SGD(np.ones(2))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="an optimizer belongs to its parameters and cannot be copied or pickled"):
            copied(opt)


def test_threads_and_warmup():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        fastlr.set_num_threads(0)
    with pytest.raises(TypeError, match="n must be a whole number, got 'all'"):
        fastlr.set_num_threads("all")
    with pytest.raises(TypeError, match="warmup takes optimizer classes and rules, got 'adam'"):
        fastlr.warmup("adam")
    with pytest.raises(TypeError, match="dtype 'float16' is not known; there are float32, float64"):
        fastlr.warmup(fastlr.Adam, dtypes=["float16"])


ELSEWHERE = [
    (fastlr.Adam, {"max_grad_norm": 1.0}, "use clip_norm="),
    (fastlr.Adam, {"clipnorm": 1.0}, 'use clip_norm= with scope="leaf"'),
    (fastlr.Adam, {"clipvalue": 1.0}, "use clip_value="),
    (fastlr.SGD, {"tau": 0.005}, "use ema=1 - tau, and ema_out= for a target network"),
    (fastlr.SGD, {"learning_rate": 0.1}, "use lr="),
    (fastlr.Adam, {"beta_1": 0.9}, "use betas=(beta1, beta2)"),
    (fastlr.SGD, {"b1": 0.9}, "use momentum=, if this class has it; fastlr.Adam and its kin have betas"),
    (fastlr.SGD, {"betas": (0.9, 0.99)}, "use momentum=, if this class has it"),
    (fastlr.Adam, {"momentum": 0.9}, "use betas=, whose first is the momentum"),
    (fastlr.RMSprop, {"rho": 0.9}, "use alpha=, the decay of the average"),
    (fastlr.AdamW, {"epsilon": 1e-8}, "use eps="),
    (fastlr.SGD, {"epsilon": 1e-8}, "leave it out: this rule has no eps"),
    (fastlr.Adam, {"wd": 0.1}, "use weight_decay="),
    (fastlr.Adam, {"use_ema": True}, "use ema=, the decay of the average"),
    (fastlr.SGD, {"amsgrad": True}, "use fastlr.Adam or fastlr.AdamW, which have it"),
    (fastlr.Adam, {"nesterov": True}, "use fastlr.SGD, which has it, or fastlr.NAdam"),
    (fastlr.Adam, {"fused": True}, "leave it out: it chooses among PyTorch's implementations"),
]


@pytest.mark.parametrize(("make", "settings", "message"), ELSEWHERE)
def test_arguments_that_other_libraries_have(make, settings, message):
    (name,) = settings
    expected = re.escape(f"hyperparameter {name!r} is not known here: {message}")
    with pytest.raises(TypeError, match=expected):
        make(np.ones(3), **settings)
    with pytest.raises(TypeError, match="groups\\['\\*'\\]: " + expected):
        make(np.ones(3), groups={"*": settings})


s = fastlr.schedules
CALLED_OTHERWISE = [
    (fastlr.LossScale, {"init_scale": 8.0}, "LossScale: argument 'init_scale' is not known here: use init=. There are"),
    (fastlr.LossScale, {"growth_interval": 8}, "use interval="),
    (fastlr.LossScale, {"growth_factor": 2.0}, "use growth="),
    (fastlr.LossScale, {"backoff_factor": 0.5}, "use backoff="),
    (fastlr.LossScale, {"enabled": True}, "leave it out: for none, build the optimizer without loss_scale="),
    (s.Cosine, {"lr": 0.1, "T_max": 5}, "Cosine: argument 'T_max' is not known here: use steps=. There are lr, steps"),
    (s.Cosine, {"lr": 0.1, "steps": 5, "eta_min": 0.0}, "use end="),
    (s.Cosine, {"lr": 0.1, "steps": 5, "warmup_steps": 2}, "use the method, such as Constant(1e-3).warmup(500)"),
    (s.Cosine, {"lr": 0.1, "steps": 5, "last_epoch": -1}, "leave it out: a schedule has no memory"),
    (s.CosineRestarts, {"lr": 0.1, "T_0": 5, "T_mult": 2}, "use steps="),
    (s.StepDecay, {"lr": 0.1, "step_size": 3}, "use every="),
    (s.StepDecay, {"lr": 0.1, "every": 3, "gamma": 0.5}, "use factor="),
    (s.StepDecay, {"lr": 0.1, "milestones": (3, 5)}, "use fastlr.schedules.MultiStep, or Piecewise"),
    (s.MultiStep, {"lr": 0.1, "boundaries": (3, 5)}, "use milestones="),
    (s.Exponential, {"lr": 0.1, "gamma": 0.5}, "use factor="),
    (s.InverseTime, {"lr": 0.1, "decay_rate": 0.5}, "use decay="),
    (s.Linear, {"init_value": 0.1, "end": 0.0, "steps": 5}, "use start="),
    (s.Constant, {"lr": 0.1}, "use value="),
    (s.OneCycle, {"max_lr": 0.1, "steps": 5}, "use lr="),
    (s.OneCycle, {"lr": 0.1, "steps": 5, "pct_start": 0.3}, "use rise="),
    (s.Cyclic, {"base_lr": 0.1, "high": 1.0, "up": 5}, "use low="),
    (s.Cyclic, {"low": 0.1, "high": 1.0, "step_size_up": 5}, "use up="),
    (s.Cyclic, {"low": 0.1, "high": 1.0, "step_size": 5}, "use every= of StepDecay, or up= and down= of Cyclic"),
    (s.Plateau, {"schedule": 0.1, "min_lr": 0.0}, "use floor="),
    (s.Constant(0.1).warmup, {"warmup_steps": 5}, "warmup: argument 'warmup_steps' is not known here: use steps="),
    (s.Cosine, {"lr": 0.1, "steps": 5, "speed": 1}, "Cosine: argument 'speed' is not known; there are lr, steps, end."),
    (fastlr.LBFGS, {"params": np.ones(2), "history_size": 5}, "LBFGS: argument 'history_size' is not known here: use"),
    (fastlr.LBFGS, {"params": np.ones(2), "tolerance_grad": 1e-5}, "use grad_tolerance= of minimize"),
    (fastlr.LBFGS, {"params": np.ones(2), "max_iter": 5}, "use max_steps= of minimize"),
    (fastlr.LBFGS, {"params": np.ones(2), "lr": 1.0}, "leave it out: the line search finds how far to go"),
    (fastlr.LBFGS(np.ones(2)).minimize, {"fun": max, "max_iter": 5}, "use max_steps="),
    (fastlr.LBFGS(np.ones(2)).minimize, {"fun": max, "tolerance_grad": 1e-5}, "use grad_tolerance="),
    (fastlr.LBFGS(np.ones(2)).minimize, {"fun": max, "tolerance_change": 1e-5}, "use loss_tolerance="),
    (
        fastlr.find_lr,
        {"start_lr": 1e-5},
        "find_lr: argument 'start_lr' is not known here: use low=. There are opt, fun,",
    ),
    (fastlr.find_lr, {"end_lr": 1.0}, "use high="),
    (fastlr.find_lr, {"num_iter": 100}, "use steps="),
    (fastlr.Adam, {"params": np.ones(2), "warmup_steps": 5}, "use lr= with a schedule, such as"),
    (fastlr.Adam, {"params": np.ones(2), "step_size": 0.1}, "use lr="),
]


@pytest.mark.parametrize(("call", "arguments", "message"), CALLED_OTHERWISE)
def test_arguments_of_functions_that_other_libraries_have(call, arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call(**arguments)


def test_functions_that_answer_are_still_those():
    assert [*inspect.signature(s.Cosine).parameters] == ["lr", "steps", "end"]
    assert [*inspect.signature(fastlr.find_lr).parameters][:3] == ["opt", "fun", "low"]
    assert [*inspect.signature(fastlr.LossScale).parameters][:2] == ["init", "growth"]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'steps'"):
        s.Cosine(0.1)
