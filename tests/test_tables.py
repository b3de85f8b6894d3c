"""Each fact about a hyperparameter, an option or a column has one home, and everything else agrees with it."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace

import numpy as np
import pytest
from test_full_step import OPTIONS as ONE_BY_ONE

import fastlr
from fastlr.arrays.columns import PARAMETERS, Columns, Parameters, Role
from fastlr.checks import FINITE, FRACTION, NON_NEGATIVE, POSITIVE, RATE
from fastlr.hyperparameters import declared
from fastlr.kernels.binding import AVERAGES
from fastlr.kernels.staging import After
from fastlr.options import AFTER, BEFORE, EXAMPLES, OPTIONS, OWN, Options, StepHyperparameters, check_rows

CLASSES = [getattr(fastlr, name) for name in fastlr.optimizers.__all__]
WORDS = {FINITE: "", NON_NEGATIVE: ">= 0", POSITIVE: "> 0", FRACTION: "in [0, 1]", RATE: "in [0, 1)"}


@pytest.mark.parametrize("make", CLASSES)
def test_docstrings_say_the_defaults_and_ranges(make):
    table = {**declared(make), "lr": OWN["lr"]}
    parameters = inspect.signature(make).parameters
    assert set(parameters) == {"params", "options", *table}
    doc = " ".join(inspect.getdoc(make).partition("Args:")[2].split())
    for name, hyper in table.items():
        said = re.search(rf" {name}: (.*?Default (\([^)]*\)|[-\w.]+?)(?=[.:,]?(?: |$)))", doc)
        assert ast.literal_eval(said[2]) == parameters[name].default, name
        if hyper is not OWN["lr"]:
            assert hyper.default == parameters[name].default and said[1] in hyper.sentence
        words = re.search(r">=? 0|in \[0, 1[])]", said[1])
        assert (words[0] if words else "") == WORDS[hyper.interval], name
    opt = make(np.ones(1), backend="numpy")
    for name, value in re.findall(r"(\w+) \(default ([^),]+)[,)]", doc[doc.index("options:") :]):
        assert getattr(opt, name) == ast.literal_eval(value), name


@pytest.mark.parametrize("make", CLASSES)
def test_classes_declare_what_their_rules_take(make):
    opt = make(np.ones(1), backend="numpy")
    rule, table = opt._stepper.state.options.rule, declared(make)
    parts = {part for hyper in table.values() for part in hyper.parts or (hyper.name,)}
    assert {*rule.hyperparameters} - {*OWN} == parts - {h.name for h in table.values() if h.starts}
    assert {h.starts for h in table.values() if h.starts} <= {*rule.states, *rule.scalars}
    for name, hyper in table.items():
        assert getattr(make, name).interval == hyper.interval
        assert getattr(opt, name) == hyper.default


def test_ranges_go_by_the_class_and_not_by_the_name():
    @fastlr.rule
    def lion(p, g, m, *, lr, alpha, eps=1e-8, betas=2.0, nesterov):
        m = alpha * m + eps * g
        return p - lr * (m if nesterov else betas * g), m

    opt = fastlr.Optimizer(np.ones(1), lion, lr=0.1, alpha=2.0, eps=-1.0, nesterov=False, backend="numpy")
    opt.step(np.ones(1))
    opt.alpha = -7.0
    assert opt.alpha == -7.0 and opt.nesterov is False
    for name, value, words in (
        ("alpha", np.inf, "must be finite"),
        ("lr", -1.0, "must be non-negative and finite"),
        ("weight_decay", -1.0, "must be non-negative and finite"),
        ("clip_norm", 0.0, "must be positive and finite"),
    ):
        with pytest.raises(ValueError, match=f"{name} {words}, got {value}"):
            setattr(opt, name, value)
    with pytest.raises(ValueError, match=r"lr must be non-negative and finite, got -1\.0"):
        fastlr.Optimizer(np.ones(1), lion, lr=-1.0, alpha=2.0, nesterov=True)
    with pytest.raises(ValueError, match=r"rho must be in \[0, 1\], got 2\.0"):
        fastlr.Adadelta(np.ones(1), rho=2.0)


def test_fixed_numbers_are_for_building():
    opt = fastlr.Prodigy(np.ones(1), d0=1e-3, backend="numpy")
    with pytest.raises(AttributeError, match="no hyperparameter 'd0' to set"):
        opt.d0 = 0.5
    with pytest.raises(TypeError, match="d0"):
        fastlr.Prodigy(np.ones(1), groups={"*": {"d0": 0.5}})
    with pytest.raises(TypeError, match="d0 must be a number"):
        fastlr.Prodigy(np.ones(1), d0=lambda step: 0.5)
    assert opt.d0 == 1e-3


def test_every_option_is_where_it_belongs():
    static = {*BEFORE.hyperparameters, *AFTER.hyperparameters} - {*OWN, "grad_scale"}
    turned_on = {flag for option in OPTIONS.values() for flag in option.flags}
    assert turned_on == static - {"scope", "unscaled"} | {"statistics"}
    assert StepHyperparameters.__annotations__.keys() == OWN.keys()
    assert set(EXAMPLES) <= {name for build, _ in ONE_BY_ONE.values() for name in build}
    assert {o.column.name for o in OPTIONS.values() if o.column and o.column.saved} == {*AVERAGES}
    for name, option in OPTIONS.items():
        assert f"\n        {name}: " in fastlr.Optimizer.__doc__ and option.sentence
        assert inspect.signature(fastlr.Optimizer).parameters[name].default == option.default


def test_an_argument_without_a_row_is_named():
    def after(p, start, *, update_clip):
        return min(p, start + update_clip)

    with pytest.raises(TypeError, match=r"after\(\) in kernels/rules.py takes 'update_clip', which no row"):
        check_rows(After(after))


def test_formats_of_columns():
    """A state has the format that its role says, and starts as that says."""
    params = np.array([1.0, -2.0, 3.0], np.float32)
    roles = [Role("m", starts_as=0.5), Role("q", format="bfloat16", starts_as=PARAMETERS)]
    roles.append(Role("h", format="bfloat16", starts_as=0.5))
    columns = Columns(Parameters(params), roles, {}, None)
    assert columns.letters == ("m", "q", "h") and (columns.itemsize("m"), columns.itemsize("q")) == (4, 2)
    np.testing.assert_array_equal(columns.arrays["m"][0], np.full(3, 0.5, np.float32))
    np.testing.assert_array_equal(columns.arrays["q"][0], params.view(np.uint32) >> 16)
    np.testing.assert_array_equal(columns.arrays["h"][0], np.full(3, 0x3F00, np.uint16))


def test_kernels_refuse_states_in_a_format_that_they_do_not_know(monkeypatch):
    """They would read and write beyond the end of the column."""
    roles = Options.roles

    def narrow(self, states, starts):
        return [replace(role, format="bfloat16") if role.saved else role for role in roles(self, states, starts)]

    monkeypatch.setattr(Options, "roles", narrow)
    with pytest.raises(NotImplementedError, match="another format than the parameters'.*'m'"):
        fastlr.Adam(np.ones(3, np.float32), backend="numpy")
