"""Schedules: their sources replayed literally, the other libraries, composition, and in an optimizer."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlr
from fastlr import cli, plots
from fastlr import schedules as s
from fastlr.schedules import Schedule

N = np.arange(400)

# One of each in several settings; what is promised of all is tested over all of them.
ALL = [
    s.Constant(1e-3),
    s.TimeBased(0.1, 1e-3),
    s.InverseTime(0.1, 0.01),
    s.InverseTime(0.1, 0.5, 7),
    s.StepDecay(0.1, 0.5, 10),
    s.StepDecay(0.1, 0.5, 10, count="1 + n"),
    s.MultiStep(0.1, (3, 80)),
    s.Exponential(0.1, 0.01),
    s.Exponential(0.1, factor=0.9, every=3),
    s.Exponential(0.1, half_life=7, floor=0.01),
    s.Linear(0.1, 0.01, steps=100),
    s.Polynomial(0.1, 200, 2.0, end=0.01),
    s.Polynomial(0.1, 20, 1.5, end=0.01, cycle=True),
    s.Cosine(0.1, steps=100, end=0.01),
    s.CosineRestarts(0.1, 30),
    s.CosineRestarts(0.1, 10, growth=2, decay=0.5, end=1e-3),
    s.CosineRestarts(0.1, 3, growth=3),
    s.OneCycle(0.1, 100),
    s.OneCycle(0.1, 300, phases=3, shape="linear"),
    s.Cyclic(0.01, 0.1, 5),
    s.Cyclic(0.01, 0.1, 5, down=7, mode="triangular2"),
    s.Cyclic(0.01, 0.1, 5, mode="exp_range", gamma=0.99),
    s.InverseSqrt(0.1, 40),
    s.WarmupStableDecay(0.1, 300, warmup_steps=10, decay_steps=30),
    s.WarmupStableDecay(0.1, 300, decay_steps=300, shape="cosine", end=0.01),
    s.SlantedTriangular(0.1, 100),
    s.Piecewise((5, 10), (0.1, 0.2, 0.0)),
    s.Interpolated((5, 100), (0.1, 0.2, 0.3), shape="cosine"),
    s.Plateau(s.Cosine(0.1, 50), floor=0.01),
    s.Cosine(1e-3, steps=100).warmup(10),
    s.Cosine(1e-3, steps=100).warmup(10, 0.1, "log", included=True),
    s.Constant(0.1).then(s.Linear(0.1, 0.0, steps=5), at=10),
    0.5 * s.Cosine(1.0, 9) * s.Constant(0.1),
    s.Linear(1.0, 0.0, 100).clip(0.2, 0.8).shift(3).repeat(20).per_epoch(2),
    (s.Linear(1.0, 0.0, 100) * 2).warmup(5, shape="sqrt").shift(-3),
]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_what_all_promise(schedule: Schedule):
    values = schedule(N)
    assert values.dtype == np.float64 and values.shape == N.shape
    assert np.isfinite(values).all() and (values >= 0).all()
    assert values.tolist() == [schedule(int(n)) for n in N]  # to the last bit
    assert schedule(np.int32(7)) == schedule(7) == schedule(np.array([[7]]))[0, 0]
    assert isinstance(schedule(7), float)
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule and hash(again) == hash(schedule) and again(9) == schedule(9)
    rebuilt = eval(repr(schedule), {name: getattr(s, name) for name in s.__all__})
    assert rebuilt == schedule and repr(rebuilt) == repr(schedule)
    assert plots.parse(repr(schedule)) == schedule
    assert schedule.extent() >= 1
    large = 10**9 + 7
    assert schedule(large) == schedule(np.array([large]))[0]


def test_every_schedule_is_tested():
    def inside(schedule):
        yield type(schedule).__name__
        for value in vars(schedule).values():
            if isinstance(value, Schedule):
                yield from inside(value)

    tested = {name for schedule in ALL for name in inside(schedule)}
    assert set(Schedule._names) - {"Function"} == tested
    assert set(s.__all__) <= {*Schedule._names, "Schedule"}


# The sources, replayed literally


@pytest.mark.parametrize("decay", [1e-12, 1e-10, 1e-7, 1e-6, 1e-4, 1e-3, 0.03, 1.0, 50.0])
def test_time_based_is_the_recursion(decay):
    steps = 1_000_000
    lr = np.longdouble(0.1)
    factors = 1 + np.longdouble(decay) * np.arange(steps, dtype=np.longdouble)
    with np.errstate(over="ignore"):
        recursion = lr / np.concatenate([[1], np.cumprod(factors)[:-1]])
    closed = s.TimeBased(0.1, decay)(np.arange(steps))
    normal = recursion > 1e-290
    assert normal.sum() > 80
    assert np.abs(closed[normal] / recursion[normal] - 1).max() < 1e-12
    assert (closed[~normal] < 1e-288).all()


def test_forms_from_the_literature():
    for n in range(50):
        assert s.InverseTime(0.5, 0.1)(n) == 0.5 / (1 + 0.1 * n)
        assert s.StepDecay(0.5, 0.5, 4, count="1 + n")(n) == 0.5 * 0.5 ** math.floor((1 + n) / 4)
        assert s.StepDecay(0.5, 0.5, 4)(n) == 0.5 * 0.5 ** math.floor(n / 4)
        assert s.Exponential(0.5, 0.1)(n) == 0.5 * math.exp(-0.1 * n)
        assert s.Exponential(0.5, half_life=5)(n) == pytest.approx(0.5 * 2 ** (-n / 5), rel=1e-15)
        cycle = s.Exponential(0.5, 0.1, every=5)(n)
        assert cycle == s.Exponential(0.5, 0.1)(n - n % 5)
        vaswani = 512**-0.5 * min((n + 1) ** -0.5, (n + 1) * 20**-1.5)
        assert s.InverseSqrt(512**-0.5 * 20**-0.5, 20)(n) == pytest.approx(vaswani, rel=1e-14)


def test_slanted_triangular_is_the_paper():
    """Howard and Ruder 2018, eq. 3, with numbers for which the cut is whole."""
    steps, fraction, ratio, peak = 200, 0.1, 32, 0.01
    for t in range(steps):
        cut = math.floor(steps * fraction)
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / fraction - 1))
        assert s.SlantedTriangular(peak, steps)(t) == pytest.approx(peak * (1 + p * (ratio - 1)) / ratio, rel=1e-12)


def test_restarts_one_by_one():
    schedule = s.CosineRestarts(1.0, 3, growth=3, decay=0.5, end=0.1)
    n, length, height = 0, 3, 0.9
    for _ in range(7):
        for t in range(length):
            expected = 0.1 + height * (1 + math.cos(math.pi * t / length)) / 2
            assert schedule(n) == pytest.approx(expected, rel=1e-12), n
            n += 1
        length, height = 3 * length, 0.5 * height


def test_warmup_stable_decay():
    schedule = s.WarmupStableDecay(1.0, 100, warmup_steps=10, decay_steps=20, end=0.1)
    assert [schedule(n) for n in (0, 4, 9, 10, 79)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    for k in range(1, 21):
        assert schedule(79 + k) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(k / 20)), rel=1e-14)
    assert schedule(99) == schedule(1000) == 0.1


# Composition


def test_warmup():
    constant = s.Constant(2.0)
    assert constant.warmup(4)(np.arange(6)).tolist() == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert constant.warmup(4, first_at_start=True)(np.arange(6)).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert constant.warmup(4, 0.5)(0) == 2.0 * (0.5 + 0.5 / 4)
    assert constant.warmup(4, shape="sqrt")(0) == 1.0
    assert constant.warmup(4, shape="cosine")(1) == pytest.approx(1.0)
    assert constant.warmup(4, shape="log")(0) == 2.0 * math.log(2) / math.log(5)
    line = s.Linear(1.0, 0.0, steps=10)
    after, within = line.warmup(5), line.warmup(5, included=True)
    assert after(5) == 1.0 and after(6) == line(1) and after(15) == 0.0  # 15 steps in all
    assert within(5) == line(5) and within(10) == 0.0  # 10
    for shape in ("linear", "cosine", "sqrt", "log"):
        values = line.warmup(5, shape=shape)(np.arange(6))
        assert values[4] == 1.0 and (np.diff(values[:5]) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.sampled_from(ALL), st.integers(1, 300), st.integers(0, 500))
def test_joins_and_products(a, b, at, n):
    joined = a.then(b, at=at)
    assert joined(n) == (a(n) if n < at else b(n - at))
    assert (a * b)(n) == a(n) * b(n)
    assert (3.0 * a)(n) == 3.0 * a(n)
    assert a.clip(0.01, 0.05)(n) == min(max(a(n), 0.01), 0.05)
    assert a.shift(at)(n) == a(max(n - at, 0)) and a.shift(-at)(n) == a(n + at)
    assert a.repeat(at)(n) == a(n % at)
    assert a.per_epoch(at)(n) == a(n // at)


def test_continuous_where_promised():
    for schedule, jump in ((s.OneCycle(1.0, 1000), 0.02), (s.Linear(1.0, 0.0, 100).warmup(100), 0.011)):
        assert np.abs(np.diff(schedule(np.arange(1100)))).max() < jump


def test_functions_of_ones_own():
    own = s.Function(lambda n: 0.1 / math.sqrt(1 + n))
    assert own(3) == 0.05 and own(np.array([3, 8]))[0] == 0.05
    assert (2 * own).warmup(2)(5) == 0.2 / math.sqrt(4)
    with pytest.raises(TypeError, match="cannot be saved. Pass it again after loading"):
        own.to_dict()


BAD = [
    (lambda: s.Constant(-1.0), ValueError, "value must be at least 0 and finite, got -1.0."),
    (lambda: s.Constant("x"), TypeError, "value must be a number, got 'x'."),
    (lambda: s.Cosine(0.1, steps=0), ValueError, "steps must be at least 1, got 0."),
    (lambda: s.Cosine(0.1, steps=1.5), TypeError, "steps must be a whole number, got 1.5."),
    (lambda: s.Exponential(0.1), ValueError, "give one of decay, factor and half_life, got none."),
    (
        lambda: s.Exponential(0.1, 0.1, factor=0.9),
        ValueError,
        "give one of decay, factor and half_life, got decay, factor",
    ),
    (lambda: s.MultiStep(0.1, (5, 3)), ValueError, "milestones must be rising and not empty, got (5, 3)."),
    (lambda: s.Piecewise((5,), (0.1,)), ValueError, "values must be one more than boundaries, got 1 and 1."),
    (lambda: s.Cyclic(0.1, 0.01, 5), ValueError, "high must be at least low"),
    (lambda: s.OneCycle(0.1, 2), ValueError, "leaves a phase without steps"),
    (lambda: s.WarmupStableDecay(0.1, 10, warmup_steps=5, decay_steps=6), ValueError, "are more than steps=10."),
    (lambda: s.Constant(1.0).warmup(5, shape="square"), TypeError, "shape 'square' is not known"),
    (lambda: s.Constant(1.0).then(0.1, at=3), TypeError, "other must be a schedule, got 0.1."),
    (lambda: s.Constant(1.0)(-1), ValueError, "step must be non-negative, got -1."),
    (lambda: s.Constant(1.0)(0.5), TypeError, "step must be a whole number or an array of them, got 0.5."),
    (lambda: Schedule.from_dict({"type": "Sine"}), ValueError, "this is not a schedule"),
    (lambda: fastlr.Adam(np.zeros(3)).observe(1.0), ValueError, "no hyperparameter follows a Plateau"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input(number):
    call, error, message = BAD[number]
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


# The other libraries, over their whole length


def torch_rates(make, steps, lr=0.1, **optimizer):
    torch = pytest.importorskip("torch")
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, **optimizer)
    scheduler = make(torch.optim.lr_scheduler, opt)
    out = []
    for _ in range(steps):
        out.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return np.array(out)


TORCH = {
    "StepLR": (lambda m, o: m.StepLR(o, 7, 0.3), s.StepDecay(0.1, 0.3, 7), 100),
    "MultiStepLR": (lambda m, o: m.MultiStepLR(o, [5, 40], 0.2), s.MultiStep(0.1, (5, 40), 0.2), 100),
    "ExponentialLR": (lambda m, o: m.ExponentialLR(o, 0.97), s.Exponential(0.1, factor=0.97), 300),
    "LinearLR": (lambda m, o: m.LinearLR(o, 0.25, 0.8, 30), s.Linear(0.025, 0.08, 30), 60),
    "ConstantLR": (lambda m, o: m.ConstantLR(o, 0.25, 9), s.Constant(0.025).then(s.Constant(0.1), at=9), 30),
    "PolynomialLR": (lambda m, o: m.PolynomialLR(o, 50, 2.5), s.Polynomial(0.1, 50, 2.5), 80),
    "CosineAnnealingLR": (lambda m, o: m.CosineAnnealingLR(o, 80, 0.01), s.Cosine(0.1, 80, end=0.01), 80),
    "WarmRestarts": (
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 10, 2, 0.01),
        s.CosineRestarts(0.1, 10, growth=2, end=0.01),
        300,
    ),
    "OneCycleLR": (
        lambda m, o: m.OneCycleLR(o, 0.1, total_steps=200, cycle_momentum=False),
        s.OneCycle(0.1, 200),
        200,
    ),
    "OneCycleLR, three phases": (
        lambda m, o: m.OneCycleLR(
            o, 0.1, total_steps=200, three_phase=True, anneal_strategy="linear", cycle_momentum=False
        ),
        s.OneCycle(0.1, 200, phases=3, shape="linear"),
        200,
    ),
    **{
        f"CyclicLR {mode}": (
            lambda m, o, mode=mode: m.CyclicLR(o, 0.01, 0.1, 8, 13, mode, 0.99, cycle_momentum=False),
            s.Cyclic(0.01, 0.1, 8, down=13, mode=mode, gamma=0.99),
            200,
        )
        for mode in ("triangular", "triangular2", "exp_range")
    },
    "SequentialLR": (
        lambda m, o: m.SequentialLR(o, [m.ConstantLR(o, 0.5, 100), m.ExponentialLR(o, 0.9)], [20]),
        s.Constant(0.05).then(s.Exponential(0.1, factor=0.9), at=20),
        60,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCH)
def test_pytorch(name):
    make, schedule, steps = TORCH[name]
    np.testing.assert_allclose(schedule(np.arange(steps)), torch_rates(make, steps), rtol=1e-11, atol=1e-14)


OPTAX = {
    "constant": (lambda o: o.constant_schedule(0.1), s.Constant(0.1)),
    "linear": (lambda o: o.linear_schedule(0.1, 0.02, 60), s.Linear(0.1, 0.02, 60)),
    "polynomial": (lambda o: o.polynomial_schedule(0.1, 0.01, 3.0, 90), s.Polynomial(0.1, 90, 3.0, end=0.01)),
    "exponential": (lambda o: o.exponential_decay(0.1, 20, 0.5), s.Exponential(0.1, factor=0.5 ** (1 / 20))),
    "staircase": (lambda o: o.exponential_decay(0.1, 20, 0.5, staircase=True), s.StepDecay(0.1, 0.5, 20)),
    "cosine": (lambda o: o.cosine_decay_schedule(0.1, 90, 0.1), s.Cosine(0.1, 90, end=0.01)),
    "piecewise": (
        lambda o: o.piecewise_constant_schedule(0.1, {10: 0.5, 30: 0.1}),
        s.Piecewise((10, 30), (0.1, 0.05, 0.005)),
    ),
    "interpolate": (
        lambda o: o.piecewise_interpolate_schedule("linear", 0.1, {10: 2.0, 50: 0.25}),
        s.Interpolated((10, 50), (0.1, 0.2, 0.05)),
    ),
    "warmup cosine": (
        lambda o: o.warmup_cosine_decay_schedule(0.0, 0.1, 20, 100, 0.01),
        s.Cosine(0.1, 80, end=0.01).warmup(20, first_at_start=True),
    ),
    "join": (
        lambda o: o.join_schedules([o.constant_schedule(0.1), o.linear_schedule(0.1, 0.0, 20)], [30]),
        s.Constant(0.1).then(s.Linear(0.1, 0.0, 20), at=30),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name):
    optax = pytest.importorskip("optax")
    make, schedule = OPTAX[name]
    theirs = make(optax)
    np.testing.assert_allclose(schedule(np.arange(150)), [float(theirs(n)) for n in range(150)], rtol=2e-6, atol=1e-8)


KERAS = {
    "ExponentialDecay": (lambda k: k.ExponentialDecay(0.1, 20, 0.5), s.Exponential(0.1, factor=0.5 ** (1 / 20))),
    "InverseTimeDecay": (lambda k: k.InverseTimeDecay(0.1, 20, 0.5), s.InverseTime(0.1, 0.5 / 20)),
    "PolynomialDecay": (
        lambda k: k.PolynomialDecay(0.1, 20, 0.01, 2.0, cycle=True),
        s.Polynomial(0.1, 20, 2.0, end=0.01, cycle=True),
    ),
    "CosineDecay": (
        lambda k: k.CosineDecay(0.0, 60, 0.1, warmup_target=0.1, warmup_steps=20),
        s.Cosine(0.1, 60, end=0.01).warmup(20, first_at_start=True),
    ),
    "CosineDecayRestarts": (
        lambda k: k.CosineDecayRestarts(0.1, 10, 2.0, 0.5),
        s.CosineRestarts(0.1, 10, growth=2, decay=0.5),
    ),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras(name):
    keras = pytest.importorskip("keras")
    make, schedule = KERAS[name]
    theirs = make(keras.optimizers.schedules)
    np.testing.assert_allclose(schedule(np.arange(120)), [float(theirs(n)) for n in range(120)], rtol=1e-5, atol=1e-7)


# In an optimizer


def pairs(rng, **settings):
    params, g = rng.standard_normal(20), [rng.standard_normal(20) for _ in range(12)]
    return params, g, fastlr.AdamW(params, backend="numpy", **settings)


def test_hyperparameters_follow(rng):
    lr, beta = s.Cosine(1e-2, steps=10).warmup(3), s.Linear(0.8, 0.95, steps=8)
    clip, decay = s.Linear(1.0, 0.1, 5), lambda n: 0.1 / (1 + n)
    params, g, opt = pairs(rng, lr=lr, betas=(beta, 0.99), clip_norm=clip, weight_decay=decay)
    start = params.copy()
    infos = [opt.step(x) for x in g]
    assert [info.lr for info in infos] == [lr(n) for n in range(12)]  # read long after
    by_hand = fastlr.AdamW(start, backend="numpy", betas=(0.8, 0.99), clip_norm=1.0)
    for n, x in enumerate(g):
        by_hand.lr, by_hand.betas, by_hand.clip_norm, by_hand.weight_decay = lr(n), (beta(n), 0.99), clip(n), decay(n)
        by_hand.step(x)
    assert np.array_equal(params, start)


def test_groups_frozen_leaves_and_parts(rng):
    tree = {k: rng.standard_normal(5) for k in "abc"}
    lr = s.Linear(1.0, 0.0, 10)
    opt = fastlr.SGD(tree, lr=lr, groups={"b": {"lr": 0.5 * lr}, "c": {"lr": 0.25}}, backend="numpy")
    before = {k: v.copy() for k, v in tree.items()}
    ones = {k: np.ones(5) for k in tree}
    opt.frozen = True
    opt.step(ones)
    opt.frozen = False  # the clock has gone on
    info = opt.step(ones)
    for k, rate in (("a", lr(1)), ("b", 0.5 * lr(1)), ("c", 0.25)):
        np.testing.assert_allclose(before[k] - tree[k], rate)
    assert dict(info.lrs) == {"": lr(1), "b": 0.5 * lr(1), "c": 0.25}
    opt.step(ones, only="a")
    opt.step(ones, only="[bc]")
    np.testing.assert_allclose(before["a"] - tree["a"], lr(1) + lr(2))
    np.testing.assert_allclose(before["b"] - tree["b"], 0.5 * (lr(1) + lr(2)))


def test_leaves_of_one_group_at_different_clocks():
    tree = {"a": np.zeros(3), "b": np.zeros(3)}
    lr = s.Linear(1.0, 0.0, 10)
    opt = fastlr.SGD(tree, lr=lr, backend="numpy")
    ones = {k: np.ones(3) for k in tree}
    for _ in range(2):
        opt.step(ones, only="a")
    opt.step(ones)
    np.testing.assert_allclose(tree["a"], -(lr(0) + lr(1) + lr(2)))
    np.testing.assert_allclose(tree["b"], -lr(0))


def test_a_skipped_step_does_not_count(rng):
    lr = s.Linear(1.0, 0.0, 10)
    w = np.zeros(3)
    opt = fastlr.SGD(w, lr=lr, skip_nonfinite=True, backend="numpy")
    for g in (np.ones(3), np.full(3, np.nan), np.ones(3)):
        info = opt.step(g)
    assert info.lr == lr(1)
    np.testing.assert_allclose(w, -(lr(0) + lr(1)))


@pytest.mark.parametrize("at", [0, 1, 7])
def test_resumed_from_a_number(rng, tmp_path, at):
    lr = s.CosineRestarts(1e-2, 3, growth=2).warmup(2)
    params, g, opt = pairs(rng, lr=lr, weight_decay=s.Constant(0.1))
    for x in g[:at]:
        opt.step(x)
    opt.save(tmp_path / "x.npz")
    other = params.copy()
    again = fastlr.AdamW(other, backend="numpy")
    again.load(tmp_path / "x.npz")
    assert again.lr == lr and again.weight_decay == s.Constant(0.1)
    for x in g[at:]:
        assert opt.step(x).lr == again.step(x).lr
    assert np.array_equal(params, other)


def test_a_function_has_to_be_passed_again(rng):
    params, g, opt = pairs(rng, lr=lambda n: 0.1 / (1 + n))
    opt.step(g[0])
    state = opt.state_dict()
    with pytest.raises(ValueError, match=r"lr followed Function\(.*a function of yours, which cannot be saved"):
        fastlr.AdamW(params.copy(), backend="numpy").load_state_dict(state)
    again = fastlr.AdamW(params.copy(), lr=lambda n: 0.1 / (1 + n), backend="numpy")
    again.load_state_dict(state)
    assert again.step(g[1]).lr == 0.05


def test_a_value_out_of_range_changes_nothing(rng):
    params, g, opt = pairs(rng, betas=(s.Linear(0.9, 1.0, 2), 0.99))
    opt.step(g[0])
    opt.step(g[1])
    before = opt.snapshot()
    with pytest.raises(
        ValueError, match=r"betas\[0\] must be in \[0, 1\), but Linear\(0.9, 1.0, 2\) gives 1.0 at step 2."
    ):
        opt.step(g[2])
    assert all(np.array_equal(before[k], v) for k, v in opt.snapshot().items())


def test_numbers_change_without_another_kernel(rng):
    kernels = []
    for steps in (10, 20):
        opt = fastlr.Adam(np.zeros(3), lr=s.Cosine(0.1, steps=steps))
        opt.step(np.ones(3))
        kernels.append(opt._kernel)
        opt.lr = 0.1
        opt.step(np.ones(3))
        kernels.append(opt._kernel)
    assert len({id(k) for k in kernels}) == 1


def test_plateau_is_pytorchs(tmp_path, rng):
    torch = pytest.importorskip("torch")
    metrics = np.concatenate([np.linspace(5, 1, 12), np.full(9, 1.0), np.linspace(1, 0.5, 4), np.full(20, 0.7)])
    metrics = metrics + rng.normal(0, 1e-3, metrics.size)
    metrics[[0, 15]] = np.nan
    for mode, threshold_mode in (("min", "rel"), ("max", "abs")):
        theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        how = {"mode": mode, "factor": 0.3, "patience": 3, "threshold": 0.01, "cooldown": 2}
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, threshold_mode=threshold_mode, **how)
        lr = s.Plateau(0.1, 0.3, 3, 0.01, 2, mode=mode, threshold_mode=threshold_mode)
        opt = fastlr.SGD(np.zeros(2), lr=lr, backend="numpy")
        for k, metric in enumerate(metrics):
            theirs.step()
            assert opt.step(np.zeros(2)).lr == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12), k
            scheduler.step(metric)
            opt.observe(metric)
            if k == 17:
                opt.save(tmp_path / f"{mode}.npz")
                opt = fastlr.SGD(np.zeros(2), lr=0.5, backend="numpy")
                opt.load(tmp_path / f"{mode}.npz")
        assert opt.step(np.zeros(2)).lr < 0.1
    with pytest.raises(TypeError, match="metric must be a number, got 'good'"):
        opt.observe("good")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("sgd-momentum", "nadam", "lamb")], ids=repr)
def test_every_numeric_hyperparameter_takes_one(case):
    opt = case.make(np.ones(4), backend="numpy", **case.settings)
    for name, value in list(opt.groups.defaults._values.items()):
        if isinstance(value, float):
            setattr(opt, name, s.Constant(value))
        elif isinstance(value, tuple):
            setattr(opt, name, tuple(s.Constant(v) for v in value))
    plain = case.make(np.ones(4), backend="numpy", **case.settings)
    for _ in range(3):
        opt.step(np.full(4, 0.5))
        plain.step(np.full(4, 0.5))
    assert np.array_equal(opt.params, plain.params)


# The command line


def test_the_list(capsys):
    assert cli.main(["schedules"]) == 0
    said = capsys.readouterr().out
    for name in plots.named():
        assert name in said


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.png"):
        file = tmp_path / name
        assert cli.main(["plot", "Cosine(1e-3, steps=1_000).warmup(50)", "OneCycle(1e-3, 900)", "-o", str(file)]) == 0
        assert file.stat().st_size > 5_000
    assert "OneCycle" in (tmp_path / "a.svg").read_text()


def test_a_picture_in_the_terminal(capsys):
    pytest.importorskip("plotext")
    assert cli.main(["plot", "Cosine(1e-3, steps=1_000)", "--steps", "500"]) == 0
    assert "Cosine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os').system('true')", "is no schedule"),
        ("Cosine(1e-3, steps=100).__class__", "cannot stand here"),
        ("Cosine(1e-3, steps=100).to_dict()", "is not one of warmup, then"),
        ("Cosine(1e-3, steps=open('x'))", "calls open, which is no schedule"),
        ("[Cosine(1e-3, steps=3) for x in (1,)]", "cannot stand here"),
        ("Cosine(*(1e-3, 5))", "unpacks something"),
        ("Cosin(1e-3, steps=3)", "did you mean Cosine"),
        ("Function(abs)", "calls Function, which is no schedule"),
        ("1e-3", "is no schedule. Try"),
        ("2 * 3", "multiplies no schedule"),
        ("Cosine(1e-3, steps=", "is not an expression"),
        ("Cosine(1e-3)", "missing 1 required positional argument: 'steps'"),
        ("Cosine(1e-3, steps=-5)", "steps must be at least 1, got -5."),
    ],
)
def test_expressions_that_are_refused(expression, message, capsys):
    assert cli.main(["plot", expression]) == 2
    assert message in capsys.readouterr().err
