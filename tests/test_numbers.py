"""What is a number is decided in one place: every numeric argument takes the same kinds, and refuses the same."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import fastlr
from fastlr import schedules
from fastlr.search.find_lr import evaluate


class Length:
    """A number with a unit, as libraries of units wrap it."""

    units = "m"
    shape = ()

    def item(self):
        return 0.5

    def __float__(self):
        return 0.5

    def __array__(self, dtype=None, copy=None):
        return np.array(0.5)


NO_NUMBERS = {
    "bool": True,
    "bool of NumPy": np.True_,
    "text": "0.5",
    "bytes": b"0.5",
    "bytearray": bytearray(b"5"),
    "array of text": np.array("0.5"),
    "array of bytes": np.array(b"0.5"),
    "array of bools": np.array(True),
    "array of objects": np.array(0.5, object),
    "complex": 0.5 + 0j,
    "complex of NumPy": np.complex64(0.5),
    "array of complex": np.array(0.5 + 0j),
    "duration": np.timedelta64(1, "s"),
    "duration in nanoseconds": np.timedelta64(1, "ns"),
    "date": np.datetime64("1970-01-02"),
    "array of a duration": np.array(1, "m8[ns]"),
    "masked": np.ma.masked,
    "masked array": np.ma.array(0.5, mask=True),
    "record": np.zeros((), [("x", float)]),
    "with a unit": Length(),
    "dict": {},
    "set": {0.5},
    "float": float,
    "text of 100,000 letters": "x" * 100_000,
}
NUMBERS = {
    "int": 0,
    "Fraction": Fraction(1, 2),
    "Decimal": Decimal("0.5"),
    "integer of NumPy": np.uint8(0),
    "float of NumPy": np.float32(0.5),
    "half": np.float16(0.5),
    "long double": np.longdouble(0.5),
    "array without dimensions": np.array(0.5),
    "array of an integer of another byte order": np.array(0, ">i4"),
}
TOO_LARGE = (10**400, 10**5000, Fraction(10**400), Decimal("1e400"))


def adam(**settings):
    return fastlr.Adam(np.ones(1), backend="numpy", **settings)


def population(**settings):
    return fastlr.SGD(fastlr.flatten({"w": np.ones(1)}, population=2), backend="numpy", **settings)


def flat(params):
    return 1.0, 0 * params


def later(value):
    opt = adam()
    opt.lr = value
    return opt.lr


# Where a number goes in, and what it has become.
PLACES = {
    "lr": lambda x: adam(lr=x).lr,
    "lr, set": later,
    "betas": lambda x: adam(betas=(0.0, x)).betas[1],
    "a group": lambda x: adam(groups={"*": {"lr": x}}).groups["*"].lr,
    "ema": lambda x: adam(ema=x).ema_decay,
    "initial_accumulator_value": lambda x: (
        fastlr.Adagrad(np.ones(1), initial_accumulator_value=x).initial_accumulator_value
    ),
    "one of a population's": lambda x: population(lr=[x, 0.5]).lr[0],
    "Constant": lambda x: schedules.Constant(x).value,
    "Piecewise": lambda x: schedules.Piecewise([1], [x, 0.0]).values[0],
    "a loss": lambda x: evaluate(lambda _: (x, None), None)[0],
    "smoothing": lambda x: fastlr.find_lr(adam(), flat, smoothing=x, steps=5) and float(x),
    "grad_tolerance": lambda x: fastlr.LBFGS(np.ones(1)).minimize(flat, grad_tolerance=x) and float(x),
}
POSITIVE = {
    "clip_norm": lambda x: adam(clip_norm=x).clip_norm,
    "grad_scale": lambda x: adam().step(np.ones(1), grad_scale=x) and float(x),
    "d0": lambda x: fastlr.Prodigy(np.ones(1), d0=x).d0,
    "LossScale": lambda x: fastlr.LossScale(x).scale,
    "first": lambda x: fastlr.line_search(lambda p: (p[0], p), np.ones(1), -np.ones(1), first=x) and float(x),
}
METRIC = {"observe": lambda x: adam(lr=schedules.Plateau(0.5)).observe(x) or float(x)}
COUNTS = {
    "threads": lambda x: adam(threads=x)._stepper.state.options.threads,
    "population": lambda x: fastlr.flatten({"w": np.ones(1)}, population=x).population,
    "steps": lambda x: schedules.Cosine(0.5, x).steps,
    "interval": lambda x: fastlr.LossScale(interval=x).interval,
    "history": lambda x: fastlr.LBFGS(np.ones(1), history=x).history,
}


@pytest.mark.parametrize("place", [*PLACES, *POSITIVE, *METRIC, *COUNTS])
def test_what_is_no_number_is_refused(place):
    give = {**PLACES, **POSITIVE, **METRIC, **COUNTS}[place]
    for kind, value in NO_NUMBERS.items():
        with pytest.raises((TypeError, ValueError), match="number") as raised:
            give(value)
        assert len(str(raised.value)) < 400, kind


@pytest.mark.parametrize("place", [*PLACES, *POSITIVE, *METRIC])
def test_numbers_are_taken(place):
    for kind, value in NUMBERS.items():
        if value == 0 and place in POSITIVE:
            value += 1
        found = {**PLACES, **POSITIVE, **METRIC}[place](value)
        assert type(found) is float or found.dtype == np.float64, kind
        assert found == float(value), kind


@pytest.mark.parametrize("place", [*PLACES, *POSITIVE, *METRIC, *COUNTS])
def test_what_no_float_holds(place):
    for value in TOO_LARGE:
        with pytest.raises(ValueError, match="number that a float64 can hold, got"):
            {**PLACES, **POSITIVE, **METRIC, **COUNTS}[place](value)


@pytest.mark.parametrize("place", COUNTS)
def test_whole_numbers(place):
    give = COUNTS[place]
    for value in (3, 3.0, np.int16(3), np.array(3), Decimal(3), Fraction(3)):
        assert type(give(value)) is int and give(value) == 3
    for value in (2.5, float("nan"), Fraction(5, 2)):
        with pytest.raises(TypeError, match="must be a whole number"):
            give(value)
    for value in (0, -1, -1e300):
        with pytest.raises(ValueError, match="must be at least 1"):
            give(value)
    with pytest.raises(ValueError, match="must be at most 2\\*\\*63 - 1"):
        give(2**63)


def test_numbers_of_other_libraries():
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    ours, theirs = jnp.bfloat16(0.5), torch.tensor(0.5, requires_grad=True)
    for value in (ours, np.asarray(ours), jnp.float32(0.5), theirs, theirs.detach(), torch.tensor(0.5).half()):
        assert adam(lr=value).lr == 0.5
    for value in (torch.tensor(True), torch.tensor(0.5j), torch.empty((), device="meta"), jnp.array(False)):
        with pytest.raises(TypeError, match="number"):
            adam(lr=value)


def test_arrays_of_numbers():
    for value in ((0.25, 0.5), range(2), np.array([1, 2]), np.array([0.25, 0.5], np.float32), np.array([1, 2], ">f4")):
        assert np.array_equal(population(lr=value).lr, np.array(value, float))
    bad = (["0.1", 0.5], [True, 0.5], [None, 0.5], [[0.1], [0.2]], np.array(["0.1", "0.2"]), np.array([True, False]))
    bad += (np.array([0.1, 0.2j]), np.array([1, 2], "m8[s]"), np.array([0.1, 0.2], object), np.ma.array([0.1, 0.2]))
    bad += (np.array([0.1, 0.2]).view(np.recarray), b"12", bytearray(b"12"))
    for value in bad:
        with pytest.raises(TypeError, match="number|mask|subclass"):
            population(lr=value)
    for value in (np.array([True, False]), [True, False], (True, False)):
        assert population(groups={"w": {"frozen": value}}).groups["w"].frozen.tolist() == [True, False]
    with pytest.raises(TypeError, match="frozen is a masked array"):
        population(groups={"w": {"frozen": np.ma.array([True, False], mask=[True, False])}})


def test_flags_and_steps_of_schedules():
    one = schedules.Constant(1.0)
    for value in (1, 0.0, None, "yes", np.array([]), float("nan")):
        for take in (
            lambda x: one.warmup(3, included=x),
            lambda x: one.warmup(3, first_at_start=x),
            lambda x: schedules.Polynomial(0.1, 9, cycle=x),
        ):
            with pytest.raises(TypeError, match="must be True or False"):
                take(value)
    for value in (
        True,
        "1",
        b"1",
        np.ma.array([1, 2]),
        np.array([1.5]),
        np.timedelta64(1, "s"),
        [[1], [1, 2]],
        10**400,
    ):
        with pytest.raises((TypeError, ValueError), match="step"):
            one(value)
    for state in (
        np.zeros(3),
        {"scale": "1", "good": 0},
        {"scale": np.ma.array(1.0), "good": 0},
        {"scale": 1j, "good": 0},
    ):
        with pytest.raises(ValueError, match="this is not the state of a LossScale"):
            fastlr.LossScale().load_state_dict(state)
    scale = fastlr.LossScale(8.0)
    for skipped in (np.ma.array(True), [[True], [True, False]], {}):
        with pytest.raises(TypeError, match="skipped is"):
            scale.update(skipped)
    scale.update(np.True_)
    assert scale.scale == 4.0


@pytest.mark.parametrize("make", [fastlr.schedules.Constant, fastlr.schedules.Plateau])
def test_the_bytes_of_a_buffer_are_no_numbers(make):
    with pytest.raises(TypeError, match="must be a"):
        make(memoryview(b"1"))
