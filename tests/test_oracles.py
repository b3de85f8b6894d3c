"""Every optimizer does what its paper says."""

from __future__ import annotations

import types

import numpy as np
import pytest
from cases import CASES, Case

import fastlr
from fastlr.kernels import primitives, rules

STEPS = 40
# float64 against float64: different but equivalent orders of operations, over STEPS steps.
FLOAT64 = 1e-12


def test_every_optimizer_has_a_row():
    public = {getattr(fastlr, name) for name in fastlr.optimizers.__all__}
    assert public == {case.make for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float64_against_the_paper(case: Case, rng):
    start = rng.standard_normal(97)
    grads = [rng.standard_normal(97) * 10.0 ** rng.integers(-3, 2) for _ in range(STEPS)]
    expected = case.oracle(start, grads, **case.settings)
    params = start.copy()
    opt = case.make(params, **case.settings)
    assert set(opt.state) == set(case.states)
    for g, e in zip(grads, expected, strict=True):
        opt.step(g)
        np.testing.assert_allclose(params, e, rtol=FLOAT64, atol=FLOAT64)


class Bounded:
    """A float64 number with a bound on the error that float32 arithmetic may have made up to here."""

    U = 2.0**-24  # half a unit in the last place of float32, relative
    TINY = 2.0**-149  # smallest subnormal of float32

    def __init__(self, value, error=0.0):
        self.value, self.error = np.asarray(value, np.float64), np.asarray(error, np.float64)

    @classmethod
    def of(cls, x):
        return x if isinstance(x, cls) else cls(x, np.abs(x) * cls.U)  # a hyperparameter, rounded to float32

    def _rounded(self, value, error):
        return Bounded(value, error + (np.abs(value) + error) * self.U + self.TINY)

    def __add__(self, other):
        o = Bounded.of(other)
        return self._rounded(self.value + o.value, self.error + o.error)

    def __neg__(self):
        return Bounded(-self.value, self.error)

    def __sub__(self, other):
        return self + -Bounded.of(other)

    def __mul__(self, other):
        o = Bounded.of(other)
        error = np.abs(self.value) * o.error + np.abs(o.value) * self.error + self.error * o.error
        return self._rounded(self.value * o.value, error)

    def __truediv__(self, other):
        o = Bounded.of(other)
        least = np.maximum(np.abs(o.value) - o.error, 1e-300)
        quotient = self.value / o.value
        # A division by a uniform is a multiplication by its rounded inverse: one more rounding.
        return self._rounded(quotient, (self.error + np.abs(quotient) * o.error) / least + np.abs(quotient) * self.U)

    def __pow__(self, n):
        assert n == 2
        return self * self

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return Bounded.of(other) - self

    def __rtruediv__(self, other):
        return Bounded.of(other) / self

    def __gt__(self, other):
        return bool(self.value > other)

    @classmethod
    def norm(cls, x, over="leaf"):
        """Summed in float64: off by no more than the norm of what each element may be off by."""
        return cls(np.sqrt(np.sum(x.value**2)), np.sqrt(np.sum(x.error**2)) + 1e-13 * np.sqrt(np.sum(x.value**2)))

    @classmethod
    def total(cls, x, over="leaf"):
        """Summed in float64: off by no more than what all elements may be off by."""
        return cls(np.sum(x.value), np.sum(x.error) + 1e-13 * np.sum(np.abs(x.value)))

    def abs(self):
        return Bounded(np.abs(self.value), self.error)

    def sqrt(self):
        low = np.sqrt(np.maximum(self.value - self.error, 0.0))
        high = np.sqrt(self.value + self.error)
        return self._rounded(np.sqrt(self.value), np.maximum(high - np.sqrt(self.value), np.sqrt(self.value) - low))

    def max(self, other):
        self, o = Bounded.of(self), Bounded.of(other)
        return Bounded(np.maximum(self.value, o.value), np.maximum(self.error, o.error))


def bounded(function):
    """A rule that computes with bounds: the same code, other primitives."""

    def either(name):
        """The primitive for numbers with bounds, and for those that are the same for a whole group."""
        own, plain = getattr(Bounded, name), getattr(primitives, name)
        return lambda x, *more: (own if any(isinstance(v, Bounded) for v in (x, *more)) else plain)(x, *more)

    names = {name: either(name) for name in ("sqrt", "max", "abs")}
    names.update(norm=Bounded.norm, total=Bounded.total)
    made = types.FunctionType(function.__code__, {**function.__globals__, **names})
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float32_within_the_bound_of_its_terms(case: Case, rng):
    """One step from random states, in float32, against the rule in float64 with a running error bound."""
    n = 1009
    params = rng.standard_normal(n).astype(np.float32)
    opt = case.make(params, **case.settings)
    for _ in range(3):
        opt.step((rng.standard_normal(n) * 10.0 ** rng.integers(-3, 2)).astype(np.float32))
    g = rng.standard_normal(n).astype(np.float32)
    states = opt._stepper.state.options.rule.states
    kept = opt._stepper.state.columns.flat
    exact = {s: Bounded(kept[s].astype(np.float64)) if s in kept else Bounded(0.0) for s in states}
    values = opt._stepper.state.groups.uniforms()[0]
    owned = {"weight_decay": 0.0} if "weight_decay" in opt._stepper.state.options.rule.hyperparameters else {}
    flags = dict.fromkeys(("unscaled", "tested", "norm_clipped", "value_clipped", "per_element"), False)
    given = {k: values[k] for k in ("lr", "clip_norm", "clip_value", "maximize", "weight_decay")}
    given.update(decoupled_weight_decay=values["decoupled_weight_decay"], grad_scale=1.0, scope="all", **flags)
    p, g_in, *_ = bounded(rules.before)(
        Bounded(params.astype(np.float64)), Bounded(g.astype(np.float64)), None, **{**given, **owned}
    )
    arguments = {k: values[k] for k in opt._stepper.state.options.rule.hyperparameters}
    arguments.update(zip(opt._stepper.state.options.rule.scalars, opt._stepper.rows.scalars[0].tolist(), strict=True))
    if "t" in opt._stepper.state.options.rule.function.__code__.co_varnames:
        arguments["t"] = 4
    if "base_lr" in opt._stepper.state.options.rule.function.__code__.co_varnames:
        arguments["base_lr"] = values["lr"]
    results = bounded(opt._stepper.state.options.rule.function)(p, g_in, *exact.values(), **arguments)
    opt.step(g)
    got = {"p": params, **kept}
    for name, result in zip(("p", *states), results[: 1 + len(states)], strict=True):
        if name in got:
            excess = np.abs(got[name].astype(np.float64) - result.value) - result.error
            assert excess.max() <= 0, f"{name}: outside the bound by {excess.max():.3g}"
            assert np.median(result.error) < 1e-4  # the bound says something
