"""Staging: what is computed when, and what cannot be staged."""

from __future__ import annotations

import ast
import functools
import linecache
import math
import py_compile
from pathlib import Path

import numpy as np
import pytest
from cases import CASES

import fastlr
from fastlr.kernels import primitives, rules
from fastlr.kernels.functions import TABLE, for_float64
from fastlr.kernels.primitives import clip, max, min, norm, sign, sqrt, where

HALF = 0.5
SLOW = False


def compiled_and_reference(rule, params, grads, **settings):
    out = []
    for backend in ("numba", "numpy"):
        p = params.copy()
        opt = fastlr.Optimizer(p, rule, backend=backend, **settings)
        for g in grads:
            opt.step(g)
        out.append(p)
    return out


def test_the_staged_code_of_adam():
    text = str(fastlr.Adam(np.zeros(1)).rule)
    assert "v_max" not in text  # a state that nobody uses does not exist
    assert "h_1 * g" in text and "(1 - beta1) * g" not in text  # lifted
    assert "m_hat = m * h_3" in text  # a division by something uniform is a multiplication
    assert "1.0 / (1 - power(beta1, t))" in text  # in decide, in float64
    assert "g * g" in text and "**" not in text


def test_no_literal_is_left_in_an_update():
    """Numba would take `0.3 * x` of a float32 to float64."""
    rules_in_use = [case.make(np.zeros(1), **case.settings).rule for case in CASES]
    for staged in [*rules_in_use, fastlr.rule(everything).stage(), fastlr.rule(radam).stage()]:
        constants = [n.value for n in ast.walk(ast.parse(staged.update.text)) if isinstance(n, ast.Constant)]
        assert not [c for c in constants if c is not True], staged.update.text


def test_show_prints_it(capsys):
    opt = fastlr.Adam(np.zeros(1), amsgrad=True)
    opt.rule.show()
    assert capsys.readouterr().out.strip() == str(opt.rule)
    assert opt.rule.states == ("m", "v", "v_max")


def test_options_that_are_off_are_not_there():
    plain = str(fastlr.Adam(np.zeros(1)).rule)
    assert "weight_decay" not in plain and "maximize" not in plain and "where" not in plain
    assert "weight_decay" in str(fastlr.Adam(np.zeros(1), weight_decay=0.1).rule)
    assert "-g" in str(fastlr.Adam(np.zeros(1), maximize=True).rule)


def test_a_flag_that_differs_between_groups_becomes_a_select(rng):
    params = {"a": rng.standard_normal(5), "b": rng.standard_normal(5)}
    alone = {k: v.copy() for k, v in params.items()}
    groups = {"b": {"amsgrad": True, "maximize": True, "weight_decay": 0.1}}
    opt = fastlr.Adam(params, lr=0.1, groups=groups)
    others = [fastlr.Adam(alone["a"], lr=0.1), fastlr.Adam(alone["b"], lr=0.1, **groups["b"])]
    for k in range(5):
        g = {k: rng.standard_normal(5) for k in params}
        opt.step(g)
        for other, name in zip(others, params, strict=True):
            other.step(g[name])
    for name in params:
        np.testing.assert_array_equal(params[name], alone[name])
    assert "where" in str(opt.rule)


def test_a_rule_runs_as_ordinary_python():
    rule = fastlr.rule(rules.adam)
    p, m, v, _ = rule(1.0, 2.0, 0.0, 0.0, 0.0, lr=0.1, t=1, beta1=0.9, beta2=0.999, eps=0.0, amsgrad=False)
    assert (p, m, v) == pytest.approx((0.9, 0.2, 0.004))


def radam(p, g, m, v, *, lr, t, beta1=0.9, beta2=0.999, eps=1e-8):
    """Liu et al. 2020, arXiv:1908.03265, Algorithm 2; eps as in PyTorch."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 5:
        r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        step = r * m_hat * (1 - beta2**t) ** 0.5 / (v**0.5 + eps)
    else:
        step = m_hat
    return p - lr * step, m, v


def test_radam_equals_pytorch(rng):
    """Uniform values pass through assignments; what is lifted out of a conditional keeps its guard."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    start, grads = rng.standard_normal(20), [rng.standard_normal(20) for _ in range(30)]
    for got in compiled_and_reference(fastlr.rule(radam), start, grads, lr=0.01):
        theirs = torch.tensor(start, requires_grad=True)
        reference = torch.optim.RAdam([theirs], lr=0.01)
        for g in grads:
            theirs.grad = torch.tensor(g)
            reference.step()
        np.testing.assert_allclose(got, theirs.detach().numpy(), rtol=1e-10)


def everything(p, g, m, *, lr, t, beta=0.9, low=-1.0, fancy=True):
    """One of each thing that a rule may do."""
    m = beta * m + (1 - beta) * g
    a, b = abs(m), np.sign(g)
    a, b = b, a
    u = 0.5 * m if (g > 0 and m < 1) or not a >= 0 else -m / 3
    if u > low:
        u = clip(u, low, 1.0)
        k = 2
    else:
        k = 1
        u = min(u, g)
    u *= k
    u -= HALF * math.sqrt(a * a) + (g > 0) * 0.3 + b
    c = u > 0
    if c:
        c = u > 1
        u, a = a, u
    u = u + 0.7 * a if c else u
    if fancy:
        u = u + where(t > 2, b, 0.0) ** 3 + np.maximum(m, 0) ** -2 * 0.0
    else:
        pass
    w = lr if t < 3 else lr / t**0.5
    return p - w * u, m


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fancy", [True, False])
def test_everything_that_a_rule_may_do(fancy, dtype, rng):
    rule = fastlr.rule(everything)
    start = rng.standard_normal(501).astype(dtype)
    grads = [rng.standard_normal(501).astype(dtype) for _ in range(5)]
    a, b = compiled_and_reference(rule, start, grads, lr=0.1, fancy=fancy)
    np.testing.assert_array_equal(a, b)
    if dtype == "float64" and not fancy:  # as ordinary Python, element by element
        p, m = start.tolist(), [0.0] * 501
        for t, g in enumerate(grads, 1):
            p, m = zip(
                *(everything(x, float(y), z, lr=0.1, t=t, fancy=False) for x, y, z in zip(p, g, m, strict=True)),
                strict=True,
            )
        np.testing.assert_allclose(a, p, rtol=1e-12)


@pytest.mark.parametrize("name", ["max", "min", "sign", "clip"])
def test_composed_primitives_agree_on_awkward_numbers(name):
    values = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]
    x, y = (np.array(v) for v in zip(*[(a, b) for a in values for b in values], strict=True))

    def by_max(p, g):
        return max(p, g)

    def by_min(p, g):
        return min(p, g)

    def by_sign(p, g):
        return sign(g)

    def by_clip(p, g):
        return clip(g, p, 1.0)

    rule = {"max": by_max, "min": by_min, "sign": by_sign, "clip": by_clip}[name]
    a, b = compiled_and_reference(fastlr.rule(rule), x, [y])
    c = np.array([rule(float(p), float(g)) for p, g in zip(x, y, strict=True)])
    numpys = {"max": np.maximum(x, y), "min": np.minimum(x, y), "sign": np.sign(y), "clip": np.clip(y, x, 1.0)}
    np.testing.assert_array_equal(a, numpys[name])  # NaN where NumPy has NaN
    for other in (b, c):
        np.testing.assert_array_equal(a, other)
        np.testing.assert_array_equal(np.signbit(a), np.signbit(other))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floor_has_the_same_bits_everywhere(dtype):
    def steps(p, g, *, t, floor=1.5):
        return np.floor(g) + math.floor(t / floor - 3)

    x = np.array([0.0, -0.0, 0.5, -0.5, 2.0, -3.7, 8388609.0, 1e30, math.inf, -math.inf, math.nan], dtype)
    rule = fastlr.rule(steps)
    assert rule.stage().exact
    a, b = compiled_and_reference(rule, np.zeros_like(x), [x] * 5)
    c = np.array([primitives.floor(float(v)) for v in x], dtype) + np.dtype(dtype).type(5 // 1.5 - 3)
    for other in (b, c):
        np.testing.assert_array_equal(a, other)
        np.testing.assert_array_equal(np.signbit(a), np.signbit(other))


def test_functions_of_settings_come_from_the_c_library():
    """NumPy's own have other bits on some processors."""

    def decays(p, g, *, t, rate=0.021):
        return g * np.tanh(rate * t) * np.exp(-rate * t) * np.log(t + 1)

    rule = fastlr.rule(decays)
    assert rule.stage().exact
    a, b = np.zeros(1), np.zeros(1)
    compiled, reference = (fastlr.Optimizer(p, rule, backend=k) for p, k in ((a, "numba"), (b, "numpy")))
    for _ in range(30):
        compiled.step(np.ones(1))
        reference.step(np.ones(1))
        assert a[0] == b[0]


def test_what_a_function_of_numbers_returns_where_python_raises():
    functions = for_float64(TABLE)
    assert (functions["exp"](1e3), functions["log"](0.0)) == (math.inf, -math.inf)
    assert math.isnan(functions["log"](-1.0)) and math.isnan(functions["sin"](math.inf))
    assert functions["exp"](0.3) == math.exp(0.3)


def test_integer_powers_are_the_same_products_everywhere():
    for base in (0.9, 0.999, 1.0001, -0.3):
        for t in (0, 1, 2, 7, 1000, 123_457, -3):
            expected = primitives.power(np.float64(base), t)

            def power_rule(p, g, *, t, base):
                return p * 0.0 + base**t

            p = np.ones(1)
            opt = fastlr.Optimizer(p, fastlr.rule(power_rule), base=base)
            if t >= 1:
                opt._stepper.rows.counters[:-1, 0] = t - 1
                opt.step(np.zeros(1))
                assert p[0] == expected
            assert expected == pytest.approx(base**t, rel=1e-9)


def test_transcendental_functions_take_a_rule_out_of_the_contract(rng):
    def lively(p, g, *, lr):
        return p - lr * np.tanh(g)

    rule = fastlr.rule(lively)
    assert not rule.stage().exact
    start, g = rng.standard_normal(9), rng.standard_normal(9)
    for got in compiled_and_reference(rule, start, [g], lr=0.1):
        np.testing.assert_allclose(got, start - 0.1 * np.tanh(g), rtol=1e-14)


def loop(p, g, *, lr):
    for _ in range(3):
        p = p - lr * g
    return p


def unknown(p, g, *, lr):
    return p - lr * np.cumsum(g)


def undefined(p, g, *, lr):
    return p - lr * velocity


def half_assigned(p, g, *, lr):
    if g > 0:
        u = g
    return p - lr * u


def early(p, g, *, lr):
    if g > 0:
        return p
    return p - lr * g


def too_few(p, g, m, *, lr):
    return p - lr * g


def indexed(p, g, *, lr):
    return p - lr * g[0]


def modulo(p, g, *, lr):
    return p - lr * (g % 2)


def power_of_elements(p, g, *, lr):
    return p - lr * g**5


def fractional(p, g, *, lr, beta=0.5):
    return p - lr * g**beta


def no_return(p, g, *, lr):
    p = p - lr * g


def swapped(g, p, *, lr):
    return p - lr * g


def variadic(p, g, *states, lr):
    return p - lr * g


def not_imported(p, g, *, lr):
    return p - lr * tanh(g)


def wrong_arity(p, g, *, lr):
    return p - lr * sqrt(g, 2)


def divides_by_zero(p, g, *, lr):
    return p - lr * g * (1 / 0)


def chained_is(p, g, *, lr):
    return p - lr * (g is p)


def in_a_flag(p, g, *, lr, slow=False):
    if slow:
        while p > 0:
            p = p - 1
    return p - lr * g


def states_swapped(p, g, m, v, *, lr):
    m = m + g
    v = v + g**2
    return p - lr * m, v, m


def state_twice(p, g, m, v, *, lr):
    m = m + g
    v = v + m
    return p - lr * v, m, m


def state_for_parameter(p, g, m, *, lr):
    m = m + g
    p = p - lr * m
    return m, p


def rateless(p, g, *, lr):
    u = lr * g
    u = 0.1 * g
    return p - u


def counts_for_all(p, g, *, lr, t, mean=0.0):
    mean = mean + (norm(g, "all") - mean) / t
    return p - lr / mean * g, mean


def leaf_in_all(p, g, *, lr, own=0.0, every=0.0):
    own = own + norm(g)
    every = every + norm(g, "all") * own
    return p - lr / every * g, own, every


def shadowing(p, g, *, lr, power=2.0):
    return p - lr * power * g


def shadowing_inside(p, g, *, lr):
    where = g * g
    return p - lr * where


def rate_before_the_star(p, g, lr):
    return p - lr * g


def too_many(p, g, *, lr):
    return p - lr * g, g


def in_a_list(p, g, m, *, lr):
    return [p - lr * g, m]


BAD = [
    (rate_before_the_star, 0, "'lr' stands before the *, where the states of each element are. Hyperparameters are"),
    (too_many, 1, "returns 2 values, expected 1: the new p alone."),
    (in_a_list, 1, "returns a container; return the new p and the new states, `return p, m`"),
    (states_swapped, 3, "returns 'v' in the place of the state 'm'"),
    (state_twice, 3, "returns 'm' in the place of the state 'v'"),
    (state_for_parameter, 3, "returns 'm' in the place of the new p, and 'p' in that of 'm'"),
    (rateless, 0, "takes lr, but nothing that it returns follows from it"),
    (
        counts_for_all,
        2,
        "'mean' is remembered, and follows from a sum over 'all', which is one for several leaves,",
    ),
    (counts_for_all, 2, "also from t, which each leaf counts for itself"),
    (leaf_in_all, 3, "but also from a sum over 'leaf'"),
    (shadowing, 0, "'power' is the name of a function that staged code calls"),
    (shadowing_inside, 1, "'where' is the name of a function that staged code calls"),
    (loop, 1, "a for loop cannot be staged"),
    (unknown, 1, "the function 'np.cumsum' is not known to staging; a rule may call sqrt, abs"),
    (not_imported, 1, "the function 'tanh' is not known to staging; import it where the rule is defined"),
    (undefined, 1, "'velocity' is not an argument, an earlier assignment or a numeric constant"),
    (half_assigned, 3, "'u' is assigned in one branch of a conditional only"),
    (early, 2, "a return inside a conditional cannot be staged"),
    (too_few, 1, "returns 1 value, expected 2: the new p, then m in the order of the arguments"),
    (indexed, 1, "an index cannot be staged"),
    (modulo, 1, "the operator `Mod` cannot be staged"),
    (power_of_elements, 1, "an element can be raised to 0.5 or to a literal integer up to 4"),
    (fractional, 1, "an element can be raised to 0.5 or to a literal integer up to 4"),
    (no_return, 0, "must end with a return of the new p, then the new states"),
    (swapped, 0, "the first two arguments must be p (parameter) and g (gradient), got g, p"),
    (variadic, 0, "without *args"),
    (wrong_arity, 1, "sqrt takes 1 arguments, got 2"),
    (divides_by_zero, 1, "1 / 0: division by zero"),
    (chained_is, 1, "the comparison `Is` cannot be staged"),
    (in_a_flag, 2, "a while loop cannot be staged"),
]


@pytest.mark.parametrize(("function", "below", "message"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_staged_names_the_line(function, below, message):
    with pytest.raises(fastlr.RuleError) as error:
        fastlr.rule(function)
    line = function.__code__.co_firstlineno + below
    assert f"rule {function.__name__!r}, line {line}: " in str(error.value)
    assert message in str(error.value)


def test_a_missing_source():
    scope: dict = {}
    exec("def hidden(p, g, *, lr):\n    return p - lr * g", scope)
    with pytest.raises(fastlr.RuleError, match="the source of rule 'hidden' cannot be read.* in a file or a notebook"):
        fastlr.rule(scope["hidden"])
    with pytest.raises(fastlr.RuleError, match="a rule must be a function written with `def`, got 3"):
        fastlr.rule(3)
    with pytest.raises(fastlr.RuleError, match="must be a function written with `def`"):
        fastlr.rule(lambda p, g, *, lr: p - lr * g)


def test_the_source_of_something_else(tmp_path):
    """What is staged is what the function does, or it is refused."""

    def twice(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        return run

    @twice
    def doubled(p, g, *, lr):
        return p - lr * g

    with pytest.raises(fastlr.RuleError, match="rule 'doubled', .* is that of another function: it is wrapped"):
        fastlr.rule(doubled)
    file = tmp_path / "changed.py"
    for after in ("def new(p, g, *, lr):", "def old(p, g, m, *, lr):"):
        scope: dict = {}
        file.write_text("def old(p, g, *, lr):\n    return p - lr * g\n")
        exec(compile(file.read_text(), str(file), "exec"), scope)
        assert fastlr.rule(scope["old"]).name == "old"
        file.write_text(f"{after}\n    return p - lr * g\n")
        linecache.clearcache()
        with pytest.raises(fastlr.RuleError, match="changed.py, is that of another function"):
            fastlr.rule(scope["old"])


def test_without_the_files_of_fastlr(in_subprocess, tmp_path):
    """Compiled files alone are not enough, and one sentence says so."""
    for name, module in (("fastlr", fastlr), ("fastlr/kernels", fastlr.kernels)):
        (tmp_path / name).mkdir()
        for source in Path(module.__file__).parent.glob("*.py"):
            compiled = tmp_path / name / f"{source.stem}.pyc"
            py_compile.compile(str(source), str(compiled), f"gone/{source.name}", doraise=True)
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
try:
    import fastlr
except ImportError as error:
    print(error)
"""
    out = in_subprocess(program)
    assert out.startswith("fastlr reads the source of its own rules: install it with its .py files")
    assert out.count("\n") == 1


def test_no_wrapped_rule_no_optimizer():
    with pytest.raises(TypeError, match="rule must be made by fastlr.rule"):
        fastlr.Optimizer(np.zeros(1), loop, lr=0.1)

    def needs(p, g, *, lr, beta):
        return p - lr * beta * g

    with pytest.raises(TypeError, match="rule 'needs' needs a value for beta"):
        fastlr.Optimizer(np.zeros(1), fastlr.rule(needs), lr=0.1)


def test_a_rule_that_names_weight_decay_owns_it():
    def owner(p, g, *, lr, weight_decay=0.5):
        return p - lr * g - weight_decay

    p = np.ones(1)
    fastlr.Optimizer(p, fastlr.rule(owner), lr=0.0, weight_decay=0.25).step(np.ones(1))
    assert p[0] == 0.75
    fastlr.Optimizer(p, fastlr.rule(owner), lr=0.0).step(np.ones(1))
    assert p[0] == 0.25


def test_any_name_for_a_state(rng):
    """`h` and `t` are staging's own names, unless the rule uses them."""

    def awkward(p, g, h, t, h_1, *, lr, x_1=0.5):
        h = x_1 * h + g
        t = t + abs(h)
        h_1 = max(h_1, 0.25 * t)
        return p - lr * h / (h_1 + 1), h, t, h_1

    start, grads = rng.standard_normal(9), [rng.standard_normal(9) for _ in range(3)]
    a, b = compiled_and_reference(fastlr.rule(awkward), start, grads, lr=0.1)
    np.testing.assert_array_equal(a, b)
    h, t, h_1 = np.zeros(9), np.zeros(9), np.zeros(9)
    for g in grads:
        h = 0.5 * h + g
        t = t + abs(h)
        h_1 = np.maximum(h_1, 0.25 * t)
        start = start - 0.1 * h / (h_1 + 1)
    np.testing.assert_allclose(a, start, rtol=1e-14)


def test_states_may_be_returned_by_any_expression():
    def remembers(p, g, before, older, x, *, lr):
        older = before
        before = g
        x = x - lr * (g + older)
        return x, before, older, x

    def inline(p, g, m, v, *, lr, beta=0.5):
        return p - lr * m, v - v + beta * m + g, m - m + v

    p = np.zeros(1)
    opt = fastlr.Optimizer(p, fastlr.rule(remembers), lr=1.0, backend="numpy")
    for g in (1.0, 2.0):
        opt.step(np.full(1, g))
    assert (p[0], opt.state["before"][0], opt.state["older"][0]) == (-4.0, 2.0, 1.0)
    fastlr.rule(inline)


def test_lr_in_one_branch_is_enough():
    def either(p, g, *, lr, a=False, b=False):
        if a:
            step = lr * g if b else g
        else:
            step = 0.1 * g
        return p - step

    fastlr.rule(either)


def signs(p, g, m, *, size=0.5):
    """A rule whose steps have a size of their own."""
    m = m + g
    return p - size * np.sign(m), m


def test_a_rule_without_a_rate():
    rule = fastlr.rule(signs)
    a, b = compiled_and_reference(rule, np.ones(3), [np.array([1.0, -1.0, 0.0])], weight_decay=0.5, ema=0.9)
    assert a.tolist() == b.tolist() == [0.5, 1.5, 0.5]
    p = {"a": np.ones(1), "b": np.ones(1)}
    opt = fastlr.Optimizer(p, rule, groups={"b": {"size": 0.25}}, backend="numpy")
    info = opt.step({"a": np.ones(1), "b": np.ones(1)})
    assert (p["a"][0], p["b"][0], info.lr) == (0.5, 0.75, None)
    assert info.asdict() == {"step": 1}
    assert not hasattr(opt, "lr") and "lr" not in repr(opt)
    again = fastlr.Optimizer(p, rule, groups={"b": {"size": 0.25}}, backend="numpy")
    again.load_state_dict(opt.state_dict())
    fastlr.warmup(rule, backend="numpy")
    with pytest.raises(AttributeError, match="has no hyperparameter 'lr' to set; there are size"):
        opt.lr = 0.1
    with pytest.raises(TypeError, match="'lr' is not known; there are size"):
        fastlr.Optimizer(p, rule, groups={"b": {"lr": 0.25}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 5.0}, "rule 'signs' has no lr: no keyword-only argument of that name. Build the optimizer without lr"),
        ({"decoupled_weight_decay": True, "weight_decay": 0.1}, "decoupled weight decay is in proportion to lr, which"),
        ({"lr_scale": np.ones(1)}, "lr_scale is a factor on lr, which rule 'signs' does not have"),
    ],
)
def test_what_a_rule_without_a_rate_is_not_for(settings, message):
    with pytest.raises((TypeError, ValueError)) as error:
        fastlr.Optimizer(np.ones(1), fastlr.rule(signs), **settings)
    assert message in str(error.value)


def test_a_rule_with_a_rate_needs_one():
    with pytest.raises(TypeError, match="rule 'radam' needs a value for lr"):
        fastlr.Optimizer(np.ones(1), fastlr.rule(radam))


class Settings:
    rate = 0.5


def test_constants_of_the_module_are_part_of_the_rule(monkeypatch):
    """As they were when the rule was made; an optimizer is not built with a rule that says something else by now."""

    def scaled(p, g, *, lr):
        return p - lr * HALF * Settings.rate * g if not SLOW else p

    p = np.ones(1)
    rule = fastlr.rule(scaled)
    opt = fastlr.Optimizer(p, rule, lr=1.0)
    opt.step(np.ones(1))
    assert p[0] == 0.75
    assert "lr * 0.5 * 0.5" in str(opt.rule)
    for name, value in (("HALF", 0.25), ("SLOW", True), ("Settings.rate", 1)):
        with monkeypatch.context() as changed:
            changed.setattr(f"{__name__}.{name}", value)
            with pytest.raises(fastlr.RuleError) as error:
                fastlr.Optimizer(p, rule, lr=1.0)
            assert f"was made with {name} = " in str(error.value) and f", which is {value!r} now" in str(error.value)
    opt.step(np.ones(1))
    assert p[0] == 0.5


def test_constants_of_a_closure():
    def made(beta):
        def own(p, g, m, *, lr):
            m = beta * m + g
            return p - lr * m, m

        def change():
            nonlocal beta
            beta = 0.25

        return fastlr.rule(own), change

    rule, change = made(math.nan)
    fastlr.Optimizer(np.ones(1), rule, lr=0.1)
    change()
    with pytest.raises(fastlr.RuleError, match="was made with beta = nan, which is 0.25 now"):
        fastlr.Optimizer(np.ones(1), rule, lr=0.1)
