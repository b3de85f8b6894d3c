"""Schedules: their sources replayed literally, the other libraries, composition, and in an optimizer."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import pickle
import warnings
import weakref

import numpy as np
import pytest
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlr
from fastlr import cli, plots
from fastlr import schedules as s
from fastlr.schedules import Observed, staging
from fastlr.schedules.base import KINDS, Schedule
from fastlr.schedules.evaluating import StagedSchedule
from fastlr.schedules.staging import HasEquation, Memory, Several

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
    assert set(KINDS) - {"Function"} == tested
    assert set(s.__all__) <= {*KINDS, "Schedule"}


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


def test_no_steps_of_warmup_are_no_warmup():
    line = s.Linear(1.0, 0.5, steps=10)
    assert line.warmup(0) is line and line.warmup(0.0, 0.5, "log", included=True) is line
    with pytest.raises(TypeError, match="shape 'square' is not known"):
        line.warmup(0, shape="square")
    with pytest.raises(ValueError, match="steps must be at least"):
        line.warmup(-1)


def test_whole_numbers_may_be_written_as_floats():
    assert s.Cosine(0.1, steps=1e4) == s.Cosine(0.1, steps=10_000)
    assert repr(s.Cosine(0.1, steps=np.float32(100))) == "Cosine(0.1, 100)"
    assert s.MultiStep(0.1, (5.0, 1e2)).milestones == (5, 100)
    assert s.Constant(0.1).shift(-1e2).shift(3.0).repeat(1e1).per_epoch(2.0) == (
        s.Constant(0.1).shift(-100).shift(3).repeat(10).per_epoch(2)
    )
    assert s.Plateau(0.1, patience=2.0, cooldown=0.0).patience == 2
    assert s.WarmupStableDecay(0.1, 1e2, warmup_steps=1e1, decay_steps=2e1).extent() == 100
    for steps in (1e4 + 0.5, math.inf, math.nan, True):
        with pytest.raises((TypeError, ValueError), match="steps must be a whole number"):
            s.Cosine(0.1, steps=steps)
    for steps in (10**30, 10**5000):
        with pytest.raises(ValueError, match="steps must be") as raised:
            s.Cosine(0.1, steps=steps)
        assert len(str(raised.value)) < 300


# Extreme numbers

GROWING = [
    s.Exponential(1e-6, factor=1.2),
    s.Exponential(1e300, factor=1e300, every=7),
    s.Exponential(0.0, factor=3.0),
    s.StepDecay(1e-6, 2.0, every=1),
    s.StepDecay(0.0, 1e300, every=1),
    s.MultiStep(1e-3, tuple(range(1, 40)), 1e20),
    s.Cyclic(0.0, 1e308, 1, mode="triangular2"),
    s.TimeBased(0.1, 1e308),
    s.TimeBased(1e308, 1e-308),
    s.InverseTime(1e308, 1e308, 3),
    s.Exponential(1e308, 1e308),
    s.Exponential(0.1, half_life=1e-300),
    s.Polynomial(1e308, 3, 1e308, end=1e308, cycle=True),
    s.CosineRestarts(1e308, 1, growth=2, decay=1e-300),
    s.CosineRestarts(0.1, 3, growth=10**9),
    s.SlantedTriangular(1e308, 10, ratio=1e308),
    s.Interpolated((1, 2**53 - 1), (1e308, 0.0, 1e308)),
    s.OneCycle(1e308, 10, div=1e308, final_div=1e308),
]
STEPS = st.one_of(st.integers(0, 5000), st.integers(0, 2**53), st.integers(2**53 - 5000, 2**53))


def compositions():
    """Schedules of schedules, extreme ones among them."""
    count = st.one_of(st.integers(1, 50), st.integers(1, 2**53 - 1))
    factor = st.sampled_from([0.0, 5e-324, 1e-30, 0.5, 3.0, 1e308])

    def more(inner):
        return st.one_of(
            st.builds(lambda a, b: a * b, inner, inner),
            st.builds(lambda a, f: f * a, inner, factor),
            st.builds(lambda a, b, at: a.then(b, at), inner, inner, count),
            st.builds(lambda a, low, high: a.clip(min(low, high), max(low, high)), inner, factor, factor),
            st.builds(lambda a, by: a.shift(by), inner, st.one_of(count, count.map(lambda n: -n))),
            st.builds(lambda a, n: a.repeat(n), inner, count),
            st.builds(lambda a, n: a.per_epoch(n), inner, count),
            st.builds(lambda a, n, x: a.warmup(n, shape=x), inner, count, st.sampled_from(["linear", "log", "cosine"])),
            st.builds(lambda a, f: s.Plateau(a, floor=f), inner, factor),
        )

    return st.recursive(st.sampled_from(GROWING + ALL), more, max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(compositions(), st.lists(STEPS, min_size=1, max_size=8))
def test_one_step_and_many_are_the_same_for_all_numbers(schedule, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, many = [schedule(n) for n in steps], schedule(np.array(steps)).tolist()
    assert one == many  # so none is NaN
    assert min(one) >= 0.0


@pytest.mark.parametrize("schedule", GROWING, ids=repr)
def test_what_is_too_large_is_clipped(schedule):
    steps = np.array([0, 1, 2, 700, 3894, 10**6, 2**53])
    limited, free = schedule.clip(1e-3, 1.0), schedule(steps)
    assert [limited(int(n)) for n in steps] == limited(steps).tolist() == np.clip(free, 1e-3, 1.0).tolist()
    w = np.ones(1)
    opt = fastlr.SGD(w, lr=limited, backend="numpy")
    opt.load_state_dict({**opt.state_dict(), **_at_step(opt, 3894)})
    assert opt.step(np.zeros(1)).lr == limited(3894)


def _at_step(opt, step):
    """What makes a state one of a later step."""
    state = opt.state_dict()
    description = json.loads(bytes(state["fastlr"])) | {"steps": step}
    clock = np.full_like(state["clock"], step)
    return {"fastlr": np.frombuffer(json.dumps(description).encode(), np.uint8), "clock": clock, "step": clock}


def test_too_large_a_rate_is_refused(rng):
    opt = fastlr.SGD(np.ones(1), lr=s.StepDecay(1e300, 1e10, 1), backend="numpy")
    opt.step(np.zeros(1))
    with pytest.raises(
        ValueError, match=r"lr must be non-negative and finite, but StepDecay\(.*\) gives inf at step 1."
    ):
        opt.step(np.zeros(1))


def test_what_is_not_a_number_is_not_clipped_away():
    own = s.Function(lambda n: math.nan)
    assert math.isnan(own.clip(0.1, 0.2)(0)) and math.isnan((s.Constant(1.0) * own)(0))


def test_a_cycle_needs_steps_on_both_sides():
    with pytest.raises(ValueError, match="rise=1.0 of 100 steps leaves a phase without steps"):
        s.OneCycle(0.1, 100, rise=1.0)


# Copies


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_are_copied_and_pickled_after_use(schedule):
    before = schedule(7)
    for again in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), copy.copy(schedule)):
        assert again == schedule and again(7) == before and again(np.array([7]))[0] == before


def _third(n):
    return 1 / (n + 3)


def test_pickles_of_functions():
    named, nameless = s.Function(_third).warmup(2), s.Function(lambda n: 0.1)
    assert named(5) == nameless(0) + named(5) - 0.1
    assert pickle.loads(pickle.dumps(named))(5) == named(5)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(nameless)


def test_reports_are_copied_and_pickled(rng):
    tree = {"a": rng.standard_normal(3), "b": rng.standard_normal(2)}
    options = {"clip_norm": 0.1, "statistics": True, "groups": {"b": {"lr": s.Constant(0.5)}}, "backend": "numpy"}
    for lr in (0.1, s.Cosine(0.1, 10), lambda n: 0.1):
        opt = fastlr.SGD(tree, lr=lr, **options)
        opt.step({k: np.ones_like(v) for k, v in tree.items()})
        info = opt.step({"a": np.ones(3), "b": None})
        for again in (pickle.loads(pickle.dumps(info)), copy.deepcopy(info)):
            opt.step({k: np.ones_like(v) for k, v in tree.items()})
            assert again.asdict() == info.asdict() and again["a"] == info["a"] and repr(again) == repr(info)
    plain = fastlr.SGD(np.ones(2), backend="numpy").step(np.ones(2))
    assert pickle.loads(pickle.dumps(plain)).asdict() == plain.asdict()


# Equations, and how they are staged


def as_it_stands(schedule):
    """The equation of a schedule as ordinary Python, with those of the schedules inside it."""

    def plain(value):
        match value:
            case HasEquation():
                return as_it_stands(value)
            case Several(values=values):
                return [float(x) for x in values]
            case Memory(start=start):
                return start
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    names = inspect.signature(schedule.equation).parameters
    arguments = {name: plain(value) for name, value in schedule.arguments().items() if name in names}
    return lambda n: schedule.equation(n, **arguments)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_equations_are_ordinary_python(schedule):
    equation = as_it_stands(schedule)
    for n in (0, 1, 2, 9, 10, 11, 57, 99, 100, 10**6):
        assert equation(float(n)) == schedule(n)


def test_schedules_that_differ_in_numbers_share_their_code():
    a, b = s.Cosine(0.1, 10).warmup(3), s.Cosine([0.2, 0.3], 7, end=0.1).warmup(5)
    assert a.staged.source == b.staged.source and a.staged.numbers != b.staged.numbers
    assert s.Cosine(0.1, 10).warmup(3, shape="sqrt").staged.source != a.staged.source
    before = staging._program.cache_info().misses
    s.Cosine(0.3, 5).warmup(4)(2)
    assert staging._program.cache_info().misses == before  # staged once
    assert "0.5" not in s.Exponential(0.1, half_life=3).staged.source  # a compiler would make exp2 of pow(0.5, x)
    assert s.Exponential(0.1, 0.2).staged.numbers == (0.2, 0.1, 0.0)  # neither steps of a staircase nor a factor


def branches(n, *, lr):
    if n > 3:
        return lr
    return 0.0


def attributes(n, *, lr):
    return lr.real


def loops(n, *, lr):
    while n > lr:
        n = n - 1
    return n


def unknown(n, *, lr):
    return lr * missing  # noqa: F821


def calls(n, *, lr):
    return math.gamma(n) * lr


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        (branches, "'n > 3' is not known when staged; write a conditional expression"),
        (attributes, "'lr.real' cannot stand in an equation"),
        (loops, "cannot stand in an equation"),
        (unknown, "'missing' is not defined"),
        (calls, "cannot stand in an equation"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_staged_names_the_line(equation, message):
    class Mine(HasEquation):
        def arguments(self):
            return {"lr": 0.1}

    Mine.equation = staticmethod(equation)
    line = inspect.getsourcelines(equation)[1]
    with pytest.raises(TypeError, match=f"equation '{equation.__name__}', line ({line + 1}|{line + 2}): ") as raised:
        StagedSchedule(Mine())
    assert message in str(raised.value)


def test_pickles_name_the_public_module():
    """Those of fastlr 0.1 do, also for what the methods return and what plateaus remember."""
    for cls in (*KINDS.values(), Schedule, Observed):
        assert cls.__module__ == "fastlr.schedules" and getattr(s, cls.__name__) is cls
    assert b"fastlr.schedules\nWarmup" in pickle.dumps(s.Constant(0.1).warmup(3), protocol=0)


def test_schedule_itself_is_abstract():
    with pytest.raises(TypeError, match="Build one by its name"):
        Schedule()


# Functions of the user's


def test_functions_of_ones_own():
    own = s.Function(lambda n: 0.1 / math.sqrt(1 + n))
    assert own(3) == 0.05 and own(np.array([3, 8]))[0] == 0.05
    assert (2 * own).warmup(2)(5) == 0.2 / math.sqrt(4)
    with pytest.raises(TypeError, match="cannot be saved. Pass it again after loading"):
        own.to_dict()


def test_functions_are_called_with_an_int():
    table, seen = [0.1, 0.05, 0.01], []

    def rate(n):
        seen.append(n)
        return table[n]

    opt = fastlr.SGD(np.ones(1), lr=s.Function(rate).shift(1), backend="numpy")
    assert [opt.step(np.ones(1)).lr for _ in range(3)] == [0.1, 0.1, 0.05]
    assert s.Function(rate)(np.array([[2, 1]])).tolist() == [[0.01, 0.05]]
    assert {type(n) for n in seen} == {int}


def half(n):
    return {0: 0.5, 1: np.float32(0.5), 2: np.array(0.5), 3: 1}[n]


def test_what_functions_may_return():
    assert s.Function(half)(np.arange(4)).tolist() == [0.5, 0.5, 0.5, 1.0]
    wrong = [None, "0.1", True, 0.1j, np.array([0.1]), [0.1, 0.2], np.zeros((2, 2)), {}, np.array("0.1")]
    for value in wrong:
        w = np.ones(2)
        opt = fastlr.SGD(w, lr=lambda n, value=value: value, backend="numpy")
        with pytest.raises(
            (TypeError, ValueError), match="the function .*lambda.* must return a number, but at step 0"
        ):
            opt.step(np.ones(2))
        assert w.tolist() == [1.0, 1.0] and opt.steps == 0


def broken(n):
    raise LookupError(f"no rate for {n}")


def test_exceptions_of_functions_say_at_which_step():
    opt = fastlr.SGD(np.ones(1), lr=s.Constant(0.1).then(s.Function(broken), at=1), backend="numpy")
    with pytest.raises(LookupError, match="no rate for 0") as raised:
        opt.step(np.ones(1))
    assert "by the function broken, which a hyperparameter follows, at step 0" in getattr(
        raised.value, "__notes__", ["by the function broken, which a hyperparameter follows, at step 0"]
    )[0].replace("This was raised ", "")


# Populations


def fleet(models=4):
    return fastlr.flatten({"w": np.ones(3)}, population=models)


RATES = np.geomspace(1e-3, 1.0, 4)
PER_MODEL = [
    (s.Cosine(RATES, 10), lambda r, n: s.Cosine(r, 10)(n)),
    (RATES * s.Cosine(1.0, 10), lambda r, n: r * s.Cosine(1.0, 10)(n)),
    (s.Cosine(1.0, 10) * list(RATES), lambda r, n: r * s.Cosine(1.0, 10)(n)),
    (RATES * s.Cosine(RATES, 10).warmup(3), lambda r, n: r * s.Cosine(r, 10).warmup(3)(n)),
    (s.Exponential(0.1, factor=RATES), lambda r, n: s.Exponential(0.1, factor=r)(n)),
    (s.TimeBased(0.1, RATES), lambda r, n: s.TimeBased(0.1, r)(n)),
    (s.OneCycle(RATES, 9).clip(1e-4, RATES), lambda r, n: s.OneCycle(r, 9).clip(1e-4, r)(n)),
    (s.Function(lambda n: RATES * 0.9**n), lambda r, n: r * 0.9**n),
    (s.Function(lambda n: RATES * 0.9**n).clip(0.01, 0.5).warmup(2), lambda r, n: None),
    (s.Plateau(RATES, patience=0), lambda r, n: r),
]


@pytest.mark.parametrize(
    ("schedule", "one"), PER_MODEL, ids=lambda x: type(x).__name__ if isinstance(x, Schedule) else ""
)
def test_a_population_follows_a_schedule_of_arrays(schedule, one):
    params = fleet()
    opt = fastlr.SGD(params, lr=schedule, groups={"w": {"weight_decay": 0.1 * schedule}}, backend="numpy")
    for n in range(4):
        before, info = params["w"].copy(), opt.step({"w": np.ones((4, 3))})
        assert info.lr.shape == (4,) and info.lr.tolist() == schedule(n).tolist()
        if one(0.1, n) is not None:
            assert info.lr.tolist() == [one(float(r), n) for r in RATES]
        decay = 0.1 * info.lr[:, None]
        np.testing.assert_allclose(before - params["w"], info.lr[:, None] * (1 + decay * before), atol=1e-15)
    assert schedule(np.arange(3)).shape == (3, 4) and schedule(np.zeros((0, 2), int)).shape[:2] == (0, 2)
    assert (schedule(np.arange(3))[2] == schedule(2)).all()


def test_schedules_of_arrays_are_schedules(tmp_path):
    schedule = RATES * s.Cosine(RATES, 10).warmup(3)
    assert schedule == Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) and hash(schedule)
    assert eval(repr(schedule), vars(s)) == schedule == plots.parse(repr(schedule)) == copy.deepcopy(schedule)
    assert isinstance(np.float64(2) * s.Constant(1.0), Schedule) and isinstance(
        np.array(2.0) * s.Constant(1.0), Schedule
    )
    opt = fastlr.SGD(fleet(), lr=schedule, backend="numpy")
    opt.step({"w": np.ones((4, 3))})
    opt.save(tmp_path / "x.npz")
    again = fastlr.SGD(fleet(), lr=0.1, backend="numpy")
    again.load(tmp_path / "x.npz")
    assert again.lr == schedule and again.step({"w": np.ones((4, 3))}).lr.tolist() == schedule(1).tolist()


def test_schedules_of_arrays_that_do_not_fit():
    lr = s.Cosine(RATES, 10)
    with pytest.raises(ValueError, match="lr follows a schedule that gives 4 numbers, expected one number: only a"):
        fastlr.SGD(np.ones(4), lr=lr)
    with pytest.raises(
        ValueError, match="lr follows a schedule that gives 4 numbers, expected one number, or one for each of the 3"
    ):
        fastlr.SGD(fleet(3), lr=lr)
    with pytest.raises(ValueError, match=r"betas\[1\] follows a schedule that gives 4 numbers"):
        fastlr.Adam(fleet(3), betas=(0.9, s.Constant(RATES / 2)))
    with pytest.raises(ValueError, match="a schedule has numbers for 2 and for 4 models"):
        fastlr.SGD(fleet(), lr=s.Constant([0.1, 0.2]) * lr)
    for bad in (np.ones((2, 2)), np.array([-1.0, 1.0]), np.array(["a"]), []):
        with pytest.raises((TypeError, ValueError), match="lr"):
            s.Cosine(bad, 10)
    opt = fastlr.SGD(fleet(), lr=lambda n: RATES[:3], backend="numpy")
    with pytest.raises(
        ValueError, match=r"for each model, an array \(4,\), but at step 0 it returned an array of shape \(3"
    ):
        opt.step({"w": np.ones((4, 3))})
    opt = fastlr.SGD(fleet(), lr=lambda n: -RATES, backend="numpy")
    with pytest.raises(ValueError, match=r"lr must be non-negative and finite, but Function\(.*gives -0.001 at step 0"):
        opt.step({"w": np.ones((4, 3))})


def test_no_message_prints_hundreds_of_numbers():
    many, params = np.linspace(2.0, 3.0, 500), fleet(500)
    opt = fastlr.Adam(params, backend="numpy")
    refused = [
        lambda: fastlr.SGD(np.ones(3), lr=s.Cosine(many, 10)),
        lambda: s.Cosine(-many, 10),
        lambda: s.MultiStep(0.1, many),
        lambda: s.MultiStep(0.1, (*range(500, 1, -1),)),
        lambda: s.Constant(0.1)(many),
        lambda: Schedule.from_dict({"type": "Sine", "lr": many.tolist()}),
        lambda: setattr(opt, "betas", (s.Constant(many), 0.9)),
        lambda: setattr(opt, "betas", many),
        lambda: setattr(opt, "amsgrad", many),
        lambda: setattr(opt, "frozen", many),
        lambda: fastlr.SGD(params, lr=lambda n: many.tolist() * 2, backend="numpy").step(params),
        lambda: fastlr.SGD(params, lr=lambda n: str(many.tolist()), backend="numpy").step(params),
        lambda: fastlr.SGD(params, groups=many),
        lambda: fastlr.SGD(params, groups={"w": many}),
        lambda: s.Constant(0.1).then(many, at=1),
    ]
    for call in refused:
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert len(str(raised.value)) < 600


# What is refused leaves the old value


def test_a_schedule_that_does_not_fit_is_refused_where_it_is_set():
    tree = {"a": np.ones(2), "b": np.ones(2)}
    grads = {k: np.ones(2) for k in tree}
    opt = fastlr.Adam(tree, lr=0.1, groups={"b": {"lr": 0.2}}, backend="numpy")
    for _ in range(3):
        opt.step(grads)
    late = s.Linear(0.9, 1.1, steps=4)  # 1.05 at step 3
    refused = [
        (opt, "lr", lambda n: 0.1 - n, r"^lr must be non-negative and finite, but Function\(.*gives -2.9 at step 3"),
        (opt, "lr", lambda n: None, "must return a number, but at step 3 it returned None"),
        (opt, "lr", s.Cosine(RATES, 10), "only a population"),
        (opt, "lr", lambda n: [0.1][n], "list index out of range"),
        (opt, "betas", (0.9, late), r"^betas\[1\] must be in \[0, 1\), but Linear\(0.9, 1.1, 4\) gives 1.05 at step 3"),
        (opt.groups["b"], "lr", s.StepDecay(1.0, 1e200, 1), r"^groups\['b'\]: lr must be .*gives inf at step 3"),
        (opt.groups["b"], "betas", (late, late), r"^groups\['b'\]: betas\[0\] must be"),
    ]
    for target, name, value, message in refused:
        with pytest.raises((TypeError, ValueError, IndexError), match=message):
            setattr(target, name, value)
        assert dict(opt.step(grads).lrs) == {"": 0.1, "b": 0.2} and opt.betas == (0.9, 0.999)
        assert "betas" not in opt.groups["b"].overrides
        opt.restore(opt.snapshot())
        opt._stepper.rows.counters[:, 1] = 3
    opt.lr = s.Linear(1.0, 0.0, 10)
    assert opt.step(grads).lr == 0.7


def test_a_schedule_cannot_ask_for_a_state_that_is_not_there():
    opt = fastlr.SGD(np.ones(2), lr=0.1, backend="numpy")
    with pytest.raises(ValueError, match="need other states than this optimizer has"):
        opt.momentum = s.Constant(0.9)
    assert opt.momentum == 0.0 and opt.step(np.ones(2)).lr == 0.1


def test_setting_schedules_keeps_nothing_alive():
    opt = fastlr.SGD(np.ones(2), lr=0.1, backend="numpy")
    opt.lr = s.Constant(0.1)
    opt.step(np.ones(2))
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()


def test_a_rate_that_all_groups_override_is_a_number_in_the_report():
    opt = fastlr.SGD({"w": np.ones(2)}, lr=s.Linear(1.0, 0.0, 10), groups={"*": {"lr": 0.5}}, backend="numpy")
    opt.step({"w": np.ones(2)})
    assert dict(opt.step({"w": np.ones(2)}).lrs) == {"": 0.9, "*": 0.5}


BAD = [
    (lambda: s.Constant(-1.0), ValueError, "value must be non-negative and finite, got -1.0."),
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


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("how", ["no gradient", "only", "frozen", "rebuild"])
def test_a_leaf_that_comes_late_gets_the_rate_of_the_step(how, backend):
    lr, n = s.Linear(1.0, 0.0, 10), 4
    tree = {"a": np.zeros(3), **({} if how == "rebuild" else {"b": np.zeros(3)})}
    opt = fastlr.SGD(tree, lr=lr, backend=backend)
    if how == "frozen":
        opt = fastlr.SGD(tree, lr=lr, groups={"b": {"frozen": True}}, backend=backend)
    for _ in range(n):
        g = {k: None if k == "b" and how == "no gradient" else np.ones(3) for k in tree}
        opt.step(g, only="a" if how == "only" else None)
    if how == "rebuild":
        tree["b"] = np.zeros(3)
        opt.rebuild(tree)
    if how == "frozen":
        opt.groups["b"].frozen = False
    ones = {k: np.ones(3) for k in tree}
    info = opt.step(ones)
    assert info.lr == lr(n)
    np.testing.assert_allclose(tree["b"], -lr(n))
    np.testing.assert_allclose(tree["a"], -sum(lr(k) for k in range(n + 1)))
    assert opt.state_dict()["step"].tolist() == [[n + 1], [1]]  # of which bias corrections are made
    opt.step(ones)
    np.testing.assert_allclose(tree["b"], -lr(n) - lr(n + 1))


def test_parts_of_one_step_have_one_rate():
    tree = {"a": np.zeros(1), "b": np.zeros(1), "c": np.zeros(1)}
    lr = s.Linear(1.0, 0.0, 10)
    opt = fastlr.SGD(tree, lr=lr, backend="numpy")
    ones = {k: np.ones(1) for k in tree}
    for n in range(3):
        for part in "ab" if n < 2 else "abc":  # c is left out twice
            info = opt.step(ones, only=part)
            assert (info.step, info.lr) == (n + 1, lr(n))
    assert opt.step(ones).lr == lr(3)
    assert opt.step({**ones, "a": None, "c": None}, only="*").lr == lr(4)  # a part of everything is no part
    assert opt.step(ones).step == 6
    np.testing.assert_allclose(
        [tree[k][0] for k in "abc"], [-sum(map(lr, k)) for k in ([0, 1, 2, 3, 5], range(6), [2, 3, 5])]
    )


def test_a_model_that_was_skipped_gets_the_rate_of_the_step():
    lr = s.Linear(1.0, 0.0, 10)
    fleet = fastlr.flatten({"w": np.zeros(1)}, population=2)
    opt = fastlr.SGD(fleet, lr=lr, skip_nonfinite=True, backend="numpy")
    for g in ([1.0, 1.0], [1.0, np.nan], [np.nan, np.nan], [1.0, 1.0]):
        info = opt.step(np.array(g))
    assert (info.step, info.lr) == (3, lr(2))
    np.testing.assert_allclose(fleet["w"][:, 0], [-lr(0) - lr(1) - lr(2), -lr(0) - lr(2)])


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
    again.load_state_dict(state, hyperparameters=False)
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
    opt.restore(before)
    assert opt.steps == 2


def test_numbers_change_without_another_kernel(rng):
    kernels = []
    for steps in (10, 20):
        opt = fastlr.Adam(np.zeros(3), lr=s.Cosine(0.1, steps=steps))
        opt.step(np.ones(3))
        kernels.append(opt._stepper.kernel())
        opt.lr = 0.1
        opt.step(np.ones(3))
        kernels.append(opt._stepper.kernel())
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


def rates_after(metrics, **settings):
    opt = fastlr.SGD(np.zeros(1), lr=s.Plateau(0.1, **{"patience": 1, **settings}), backend="numpy")
    out = []
    for metric in metrics:
        opt.observe(metric)
        out.append(float(f"{opt.step(np.zeros(1)).lr:.1g}"))
    return out


@pytest.mark.parametrize("level", [1.0, -1.0, 1e-9, -1e9])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_margin_is_one_for_metrics_of_either_sign(level, mode):
    assert rates_after([level] * 6, mode=mode) == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    better = -abs(level) if mode == "min" else abs(level)
    quickly = [level + better * 2e-4 * k for k in range(6)]
    assert rates_after(quickly, mode=mode) == [0.1] * 6
    worse = [level - better * 2e-4 * k for k in range(6)]
    assert rates_after(worse, mode=mode)[-1] == 0.001


@pytest.mark.parametrize(("eps", "floor"), [(1e-8, 0.0), (1e-8, 1e-5), (5e-3, 0.0), (0.0, 1e-4), (0.2, 0.0)])
def test_a_plateaus_smallest_drop_is_pytorchs(eps, floor):
    torch = pytest.importorskip("torch")
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, patience=1, eps=eps, min_lr=floor)
    opt = fastlr.SGD(np.zeros(1), lr=s.Plateau(0.1, patience=1, eps=eps, floor=floor), backend="numpy")
    for _ in range(30):
        theirs.step()
        scheduler.step(1.0)
        opt.observe(1.0)
        assert opt.step(np.zeros(1)).lr == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)


def test_a_new_plateau_begins_at_its_own_rate(tmp_path):
    first, g = s.Plateau(0.1, patience=0), {"a": np.zeros(1), "b": np.zeros(1)}

    def make(lr, other):
        return fastlr.SGD({"a": np.zeros(1), "b": np.zeros(1)}, lr=lr, groups={"b": {"lr": other}}, backend="numpy")

    opt = make(first, 0.5 * first)  # one memory in two places
    for _ in range(3):
        opt.observe(1.0)
    assert list(opt.step(g).lrs.values()) == pytest.approx([1e-3, 0.5e-3])
    opt.lr = s.Plateau(0.1, patience=0)  # equal, but another
    assert list(opt.step(g).lrs.values()) == pytest.approx([0.1, 0.5e-3])
    opt.observe(1.0)
    opt.observe(1.0)
    assert list(opt.step(g).lrs.values()) == pytest.approx([1e-2, 0.5e-5])
    opt.save(tmp_path / "x.npz")
    fresh = make(0.3, 0.2)
    fresh.load(tmp_path / "x.npz")
    moved, rebuilt = opt.to("cpu"), make(0.3, 0.2)
    rebuilt.restore(opt.snapshot())
    rebuilt.rebuild({"a": np.zeros(1), "b": np.zeros(1), "c": np.zeros(1)})
    rebuilt.rebuild({"a": np.zeros(1), "b": np.zeros(1)})
    for one in (opt, fresh, moved, rebuilt):  # each goes on by itself
        one.observe(1.0)
        assert list(one.step(g).lrs.values()) == pytest.approx([1e-3, 0.5e-6])


def test_plateaus_over_functions_are_restored():
    def make():
        return fastlr.SGD(np.zeros(1), lr=s.Plateau(s.Function(lambda n: 0.1), patience=0), backend="numpy")

    opt, again = make(), make()
    opt.observe(1.0)
    opt.observe(1.0)
    again.load_state_dict(opt.state_dict(), hyperparameters=False)
    assert again.step(np.zeros(1)).lr == opt.step(np.zeros(1)).lr == pytest.approx(0.01)


def test_what_plateaus_remember_in_states_of_before():
    """They had it by the code of the plateau."""
    lr = s.Plateau(0.1, patience=0)
    opt = fastlr.SGD({"a": np.zeros(1), "b": np.zeros(1)}, lr=lr, groups={"b": {"lr": 2 * lr}}, backend="numpy")
    state = opt.state_dict()
    description = json.loads(bytes(state["fastlr"]))
    description["observed"] = {repr(lr): {"scale": 0.25, "best": 3.0, "bad": 0, "cooling": 0}}
    state["fastlr"] = np.frombuffer(json.dumps(description).encode(), np.uint8)
    opt.load_state_dict(state)
    assert list(opt.step({"a": np.zeros(1), "b": np.zeros(1)}).lrs.values()) == [0.025, 0.05]


def test_a_metric_that_cannot_be_taken_changes_nothing():
    calls = []

    def rate(n):
        if calls:
            raise RuntimeError("no more")
        return 0.1

    opt = fastlr.SGD(np.zeros(1), lr=s.Plateau(s.Function(rate), patience=0), backend="numpy")
    opt.observe(1.0)
    before = opt.state_dict()["fastlr"].tobytes()
    calls.append(1)
    with pytest.raises(RuntimeError, match="no more"):
        opt.observe(1.0)
    assert opt.state_dict()["fastlr"].tobytes() == before


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("sgd-momentum", "nadam", "lamb")], ids=repr)
def test_every_numeric_hyperparameter_takes_one(case):
    opt = case.make(np.ones(4), backend="numpy", **case.settings)
    for name, value in list(opt.groups.defaults.overrides.items()):
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
        ("Cosine(1e-3, steps=3).war" + "9" * 5000 + "(1)", "asks for 'war99999"),
        ("Cosin" + "e" * 5000 + "(1e-3, steps=3)", "calls Cosineeee"),
        ("Cosine(1e-3, s" + "9" * 5000 + "=3)", "argument 's9999"),
        ("Function(abs)", "calls Function, which is no schedule"),
        ("1e-3", "is no schedule. Try"),
        ("2 * 3", "multiplies no schedule"),
        ("Cosine(1e-3, steps=", "is not an expression"),
        ("Cosine(1e-3)", "missing 1 required positional argument: 'steps'"),
        ("Cosine(1e-3, steps=-5)", "steps must be at least 1, got -5."),
        ("Cosine(0.1, 5) * 'x'", "multiplies a schedule by what is no number"),
        ("2 * True * Cosine(0.1, 5)", "multiplies no schedule"),
        ("Cosine(0.1, 5)" + ".warmup(5)" * 500, "is nested more than 50 deep"),
        ("0.5 * " * 900 + "Cosine(0.1, 5)", "is nested more than 50 deep"),
        ("(" * 150 + "Cosine(0.1, 5)" + ")" * 150, ""),
        ("(" * 4000 + "1" + ")" * 4000, "is not an expression: too many nested parentheses"),
        ("1 * " + "-" * 9000 + "1", "is nested more than 50 deep"),
        ("[" * 120 + "]" * 120, "is nested more than 50 deep"),
        ("Cosine(0.1, 5" + ", 5" * 10_000 + ")", "an expression has at most 10,000 characters, got 30,014."),
        ("Cosine(0.1, 10**10**10)", "'10 ** 10 ** 10' cannot stand here"),
        ("Cosine(0.1, " + "9" * 5000 + ")", "is not an expression: Exceeds the limit"),
        ("Cosine(0.1, " + "9" * 4000 + ")", "steps must be"),
        ("Cosine(" + "9" * 4000 + ", 5)", "lr must be"),
        ("Cosine(0.1, 1e999)", "steps must be a whole number, got inf."),
        ("Cosine(1e999, 5)", "lr must be non-negative and finite, got inf."),
        ("Piecewise((" + "1, " * 3000 + "), 0.1)", "boundaries must be rising and not empty"),
        ("'a' * 10000000000", "multiplies no schedule"),
        ("(1, 2) * 1000000000", "multiplies no schedule"),
        ("Cosine(0.1, 5, end=None)", "'None' cannot stand here"),
        ("Cosine(0.1, 5j)", "'5j' cannot stand here"),
        ("lambda: Cosine(0.1, 5)", "cannot stand here"),
        ("(x := Cosine(0.1, 5))", "cannot stand here"),
        ("f'{Cosine(0.1, 5)}'", "cannot stand here"),
        ("Cosine(0.1, 5, steps=5)", "got multiple values for argument 'steps'"),
        ("Cosine(0.1, steps=5, steps=5)", "gives an argument twice"),
        ("Cosine(0.1, '\\d')", "steps must be a whole number"),
        ("Cosine(0.1, '\udcff')", "is not an expression"),
        ("Cosine(0.1, 5)\0", "is not an expression"),
        ("Cosine", "cannot stand here"),
        ("Cosine(0.1, 5).warmup", "cannot stand here"),
        ("Linear((0.1, 0.2), (1, 2, 3), 5)", "a schedule has numbers for 2 and for 3 models"),
        ("", "is not an expression"),
        ("\n", "is not an expression"),
    ],
    ids=lambda text: text[:30].encode("ascii", "replace").decode() or "nothing",
)
def test_expressions_that_are_refused(expression, message, capsys, monkeypatch):
    monkeypatch.setattr(plots, "show", lambda curves, **labels: None)
    accepted = not message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["plot", expression]) == (0 if accepted else 2)
    said = capsys.readouterr().err
    assert message in said and len(said) < 900 and said.count("\n") == (0 if accepted else 1)


@pytest.mark.parametrize(
    "expression",
    [
        "StepDecay(1.0, 10.0, 1)",
        "Cosine(1e308, 100)",
        "Exponential(0.1, half_life=1e308)",
        "Cosine(0.1, 9007199254740991)",
        "CosineRestarts(0.1, 9007199254740991, growth=9007199254740991)",
        "(0.1, 0.2) * Cosine(1.0, 10)",
    ],
)
def test_pictures_of_extreme_numbers(expression, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "show", lambda curves, **labels: drawn.append(curves))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["plot", expression, "--steps", "2k"]) == cli.main(["plot", expression]) == 0
    for curves in drawn:
        for x, y in curves.values():
            assert len(x) == len(y) > 0 and np.isfinite(y).all() and x.min() >= 0


@pytest.mark.parametrize("steps", ["0", "-5", "1e30", "x", "1,2", "1.5", "nan", "inf"])
def test_numbers_of_steps_that_cannot_be_drawn(steps, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plot", "Cosine(0.1, 5)", f"--steps={steps}"])
    assert ended.value.code == 2 and "whole number" in capsys.readouterr().err


def test_the_code_of_products_is_that_of_the_same_schedule():
    a, b = s.Cosine(1.0, 10), s.Linear(1.0, 0.0, 10)
    for product in (a * (0.5 * b), 0.5 * (0.3 * a), (a * b) * a, a * (b * a), (0.5 * a) * b):
        assert eval(repr(product), vars(s)) == product
