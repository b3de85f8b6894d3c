"""`fastlr.torch` beside others: what users and other libraries put into states and groups is used or refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import fastlr
from fastlr.schedules import Constant, Cosine, Function, Linear, Plateau
from fastlr.step.stepper import Stepper

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import fastlr.torch  # noqa: E402


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in [(3, 2), (4,), ()]]


def set_gradients(*groups, seed):
    for params in groups:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def assert_close(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


# What users do to a state

CHANGES = {
    "another dict": lambda opt, p: setattr(opt, "state", defaultdict(dict)),
    "cleared": lambda opt, p: opt.state.clear(),
    "popped": lambda opt, p: opt.state.pop(p),
    "entries cleared": lambda opt, p: opt.state[p].clear(),
    "entries replaced": lambda opt, p: opt.state.__setitem__(p, {}),
    "a moment replaced": lambda opt, p: opt.state[p].update(exp_avg=torch.ones_like(p)),
    "a moment elsewhere": lambda opt, p: setattr(opt.state[p]["exp_avg"], "data", torch.ones_like(p)),
    "moments set": lambda opt, p: opt.state[p]["exp_avg"].set_(torch.ones(p.shape, dtype=p.dtype)),
    "a moment written": lambda opt, p: opt.state[p]["exp_avg"].fill_(0.5),
    "the count written": lambda opt, p: opt.state[p]["step"].zero_(),
    "the count behind autograd": lambda opt, p: opt.state[p]["step"].data.fill_(2.0),
    "the count replaced": lambda opt, p: opt.state[p].update(step=torch.tensor(2.0)),
    "all scaled": lambda opt, p: [v.mul_(0.5) for e in opt.state.values() for n, v in e.items() if n != "step"],
}


def swapped(opt, p):
    """Two parameters of the same shape exchange their states."""
    others = [q for q in opt.param_groups[0]["params"] if q.shape == p.shape]
    opt.state[others[0]], opt.state[others[1]] = opt.state[others[1]], opt.state[others[0]]


@pytest.mark.parametrize("how", [*CHANGES, "swapped"])
def test_a_state_that_is_changed_is_used(how):
    ours, theirs = ([*parameters(), *parameters(seed=1)] for _ in range(2))
    mine, reference = fastlr.torch.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for k in range(9):
        set_gradients(ours, theirs, seed=k)
        if k in (3, 6):
            for opt, params in ((mine, ours), (reference, theirs)):
                CHANGES.get(how, swapped)(opt, params[k // 6])
        mine.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            for name, value in reference.state[q].items():
                torch.testing.assert_close(mine.state[p][name], value, rtol=1e-10, atol=1e-12)
    assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", [None, 5], ids=["in place", "staged"])
@pytest.mark.parametrize("how", ["another dict", "a moment replaced", "the count written", "a master"])
def test_a_state_that_is_changed_is_used_on_the_host(chunk, how):
    """As an optimizer that was built in that state; a master that is set is the truth, as one that is loaded."""

    def run(change):
        params = parameters(torch.bfloat16)
        opt = fastlr.torch.HostOptimizer(params, lr=0.1, chunk=chunk)
        for k in range(6):
            set_gradients(params, seed=k)
            if k == 3:
                params, opt = change(params, opt)
            opt.step()
        return [*params, *(opt.state[p]["master"] for p in params)]

    def changed(params, opt):
        if how == "a master":
            opt.state[params[0]]["master"] = torch.full(params[0].shape, 2.0)
        else:
            CHANGES[how](opt, params[0])
        return params, opt

    def loaded(params, opt):
        state = copy.deepcopy(opt.state_dict())
        if how == "another dict":  # masters go on from the weights
            state["state"] = {}
        elif how == "a moment replaced":
            state["state"][0]["exp_avg"] = torch.ones(params[0].shape)
        elif how == "the count written":
            state["state"][0]["step"].zero_()
        else:
            state["state"][0]["master"] = torch.full(params[0].shape, 2.0)
        new = fastlr.torch.HostOptimizer(params, lr=0.1, chunk=chunk)
        if how == "the count written":
            new.load_state_dict(state)
            return params, new
        new.load_state_dict(state)
        return params, new

    assert_close(run(changed), run(loaded), 0.0)


def test_scalars_of_the_rule_that_are_set_are_used():
    runs = []
    for how in ("set", "loaded"):
        params = parameters()
        opt = fastlr.torch.NAdam(params, lr=0.1)
        for k in range(6):
            set_gradients(params, seed=k)
            if k == 3 and how == "set":
                opt.state[params[0]]["mu_product"].fill_(0.25)
            elif k == 3:
                state = copy.deepcopy(opt.state_dict())
                state["state"][0]["mu_product"] = torch.tensor(0.25)
                opt.load_state_dict(state)
            opt.step()
        runs.append(params)
    assert_close(*runs)


def test_a_changed_state_that_cannot_be_used_is_refused():
    params = parameters()
    opt = fastlr.torch.Adam(params, lr=0.1)
    set_gradients(params, seed=0)
    opt.step()
    for name, value, message in (
        ("exp_avg", torch.ones(2), "'exp_avg' of parameter '0' has shape (2,) in the state, the parameter (3, 2)."),
        ("exp_avg", 1.0, "'exp_avg' of parameter '0' must be a tensor, got a float."),
        ("exp_avg", [1, 2], "'exp_avg' of parameter '0' must be a tensor, got a list."),
        ("step", [1, 2], "'step' of parameter '0' must be a number, got a list."),
        ("exp_avg", torch.ones(3, 2, dtype=torch.int64), "'exp_avg' of parameter '0' is int64"),
        ("step", torch.tensor(-1.0), "'step' of parameter '0' must be a whole number from 0 on, got -1."),
        ("step", 10**400, "'step' of parameter '0' must be finite, got inf."),
        ("step", torch.tensor(math.nan), "'step' of parameter '0' must be finite, got nan."),
    ):
        before, kept = [p.detach().clone() for p in params], opt.state[params[0]][name]
        opt.state[params[0]][name] = value
        with pytest.raises(ValueError) as raised:
            opt.step()
        assert message in str(raised.value)
        assert all(map(torch.equal, params, before))
        opt.state[params[0]][name] = kept
    opt.state[params[0]]["step"] = [1, 2]
    with pytest.raises(ValueError, match="'step' of a parameter must be a number, got a list"):
        opt.state_dict()
    opt.state[params[0]]["step"] = kept
    opt.state[params[1]] = 5
    with pytest.raises(ValueError, match="the state of parameter '1' must be a dict, got a int"):
        opt.step()
    del opt.state[params[1]]
    opt.step()
    assert [int(opt.state[p]["step"]) for p in params] == [2, 1, 2]


@pytest.mark.parametrize("name", ["Adam", "NAdam", "Adagrad", "ScheduleFreeAdamW"])
def test_a_part_of_a_state_that_is_missing_is_refused(name):
    """PyTorch raises KeyError; what is missing whole starts anew, there as here."""
    params = parameters()
    opt = getattr(fastlr.torch, name)(params, lr=0.1)
    set_gradients(params, seed=0)
    opt.step()
    entries = opt.state[params[0]]
    entries["slow"] = 1.0  # of somebody else
    for missing in [entry for entry in entries if entry != "slow"]:
        before, kept = [p.detach().clone() for p in params], entries.pop(missing)
        with pytest.raises(ValueError, match=rf"parameter '0' has no '{missing}' in the state any more, only .*\(p\)"):
            opt.step()
        assert all(map(torch.equal, params, before))
        entries[missing] = None
        with pytest.raises(ValueError, match=rf"parameter '0' has no '{missing}' in the state any more"):
            opt.step()
        entries[missing] = kept
    opt.step()
    assert [int(opt.state[p]["step"]) for p in params] == [2, 2, 2]
    for entry in [*entries]:
        if entry != "slow":
            del entries[entry]
    opt.step()
    assert [int(opt.state[p]["step"]) for p in params] == [1, 3, 3] and entries["slow"] == 1.0


@pytest.mark.parametrize("how", ["deleted", "None", "replaced"])
def test_momentum_that_is_missing_starts_anew(how):
    """As in PyTorch, whose SGD keeps no count."""
    runs = []
    for module in (fastlr.torch, torch.optim):
        params = parameters()
        opt = module.SGD(params, lr=0.1, momentum=0.9)
        for k in range(6):
            set_gradients(params, seed=k)
            if k == 3 and how == "deleted":
                del opt.state[params[0]]["momentum_buffer"]
            elif k == 3 and how == "None":
                opt.state[params[0]]["momentum_buffer"] = None
            elif k == 3:
                opt.state[params[0]] = {"momentum_buffer": torch.ones_like(params[0])}
            opt.step()
        runs.append(params)
    assert_close(*runs)


def test_a_group_that_needs_more_state_starts_with_it():
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = fastlr.torch.SGD([a], lr=1.0)
    a.grad = b.grad = torch.ones(2)
    opt.step()
    opt.add_param_group({"params": [b], "momentum": 0.5})
    opt.step()
    opt.step()
    assert (a[0].item(), b[0].item()) == (-3.0, -2.5)


# What others keep there


def test_what_others_keep_in_the_state_stays():
    params, late = parameters(), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = fastlr.torch.Adam(params, lr=0.1)
    slow = torch.ones_like(params[0])
    opt.state["mark"] = 1
    opt.state[params[0]]["slow"] = slow  # before the first step, as wrappers do
    opt.state[params[0]]["rank"] = "a"

    def check(opt, param, same):
        assert opt.state["mark"] == 1 and opt.state[param]["rank"] == "a"
        assert opt.state[param]["slow"] is slow if same else torch.equal(opt.state[param]["slow"], slow)

    for k in range(4):
        set_gradients(params, [late], seed=k)
        if k == 1:
            opt.add_param_group({"params": [late]})
        if k == 2:
            params[0].data = params[0].data.clone()
        if k == 3:
            opt.state[params[0]]["exp_avg"] = torch.zeros_like(params[0])
        opt.state[params[1]]["changes"] = k  # no reason to make anything anew
        opt.step()
        check(opt, params[0], True)
    built = opt._built
    opt.state[params[1]]["changes"] = None
    opt.step()
    assert opt._built is built
    state = opt.state_dict()
    assert state["state"]["mark"] == 1 and state["state"][0]["slow"] is slow
    new = fastlr.torch.Adam([{"params": params}, {"params": [late]}])
    new.load_state_dict(torch.load(saved(state), weights_only=True))
    check(new, params[0], False)
    new.step()
    check(new, params[0], False)
    others, other = copy.deepcopy((params, opt))
    check(other, others[0], False)
    other.step()
    check(other, others[0], False)


def test_a_parameter_without_updates_keeps_what_others_put_there():
    params = parameters()
    opt = fastlr.torch.Adam(params, lr=0.1)
    set_gradients(params[:1], seed=0)
    opt.step()
    opt.state[params[1]]["slow"] = 1.0
    assert opt.state_dict()["state"][1] == {"slow": 1.0} and 2 not in opt.state_dict()["state"]
    opt.load_state_dict(opt.state_dict())
    assert opt.state[params[1]]["slow"] == 1.0 and opt.state[params[1]]["step"] == 0


def test_hooks_of_states():
    """As PyTorch tests its own: what hooks add before or after is there."""
    opt = fastlr.torch.Adam(parameters())
    seen = []
    opt.register_state_dict_pre_hook(lambda o: o.state.__setitem__("test", 1))
    assert opt.state_dict()["state"]["test"] == 1
    opt.register_state_dict_post_hook(lambda o, state: seen.append(state["state"].pop("test")))
    assert "test" not in opt.state_dict()["state"] and seen == [1]

    def first(o, state):
        state["param_groups"][0]["lr"] = 0.002

    def second(o, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    def after(o):
        o.state["rate"] = o.param_groups[0]["lr"]

    opt = fastlr.torch.Adam(parameters())
    state = opt.state_dict()
    opt.register_load_state_dict_pre_hook(first)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.002
    opt.register_load_state_dict_pre_hook(second, prepend=True)
    opt.register_load_state_dict_post_hook(after)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == opt.state["rate"] == 0.002


def test_hooks_use_the_optimizer():
    """They are called before a state is saved or loaded and after it, not meanwhile."""
    runs = []
    for module in (fastlr.torch, torch.optim):
        params, seen = parameters(), []
        opt = module.Adam(params, lr=0.1)
        other = copy.deepcopy(opt.state_dict())

        def look(opt, *_, seen=seen):
            if None not in seen:  # it is called by its own call as well
                seen.append(None)
                seen[-1] = len(opt.state_dict()["state"])

        def go_on(opt, *_, params=params):
            set_gradients(params, seed=2)
            opt.step()

        set_gradients(params, seed=0)
        opt.step()
        state = copy.deepcopy(opt.state_dict())
        opt.register_state_dict_pre_hook(look)
        opt.register_state_dict_post_hook(look)
        opt.register_load_state_dict_pre_hook(go_on)
        opt.register_load_state_dict_post_hook(look)
        opt.state_dict()
        opt.load_state_dict(other)
        opt.step()
        with pytest.raises(ValueError):
            opt.load_state_dict({**state, "param_groups": []})
        runs.append((params, seen))
    assert runs[0][1] == runs[1][1] == [3, 3, 0]
    assert_close(runs[0][0], runs[1][0])


class Lookahead:
    """A wrapper that keeps slow weights in the state of the optimizer that it wraps, as timm's does."""

    def __init__(self, base, every=3):
        self.base, self.every = base, every
        for group in base.param_groups:
            group.setdefault("lookahead", 0)

    def step(self):
        self.base.step()
        for group in self.base.param_groups:
            group["lookahead"] += 1
            if group["lookahead"] % self.every == 0:
                for p in group["params"]:
                    slow = self.base.state[p].setdefault("slow", p.detach().clone())
                    slow.lerp_(p.detach(), 0.5)
                    p.data.copy_(slow)


def test_a_wrapper_resumes():
    runs = []
    for module in (fastlr.torch, torch.optim):
        params = parameters()
        outer = Lookahead(module.Adam(params, lr=0.1))
        for k in range(15):
            if k == 8:
                state = torch.load(saved(outer.base.state_dict()), weights_only=True)
                outer = Lookahead(module.Adam(params))
                outer.base.load_state_dict(state)
            set_gradients(params, seed=k)
            outer.step()
        runs.append(params)
    assert_close(*runs)


# Files and copies


def test_a_part_of_a_state_is_saved_as_that_part():
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(20)]
    opt = fastlr.torch.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    state = opt.state_dict()
    whole = len(saved(state).getvalue())
    assert len(saved({0: state["state"][0]}).getvalue()) < whole / 10 > len(saved(opt.state[params[0]]).getvalue())
    average, version = opt.state[params[0]]["exp_avg"], opt.state[params[0]]["exp_avg"]._version
    opt.step()
    assert average._version > version  # to autograd it is still what the step writes


def signed(p, g, m, *, lr, beta=0.9):
    m = beta * m + (1 - beta) * g
    return p - lr * (1.0 if m > 0 else -1.0), m


shared_rule = fastlr.rule(signed)


@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_a_rule_of_ones_own_goes_on(host, how):
    def make(params):
        return (fastlr.torch.HostOptimizer if host else fastlr.torch.Optimizer)(params, shared_rule, lr=0.1)

    runs = []
    for stop in (False, True):
        params = parameters(torch.float32)
        opt = make(params)
        for k in range(4):
            if stop and k == 2:
                if how == "load":
                    state = copy.deepcopy(opt.state_dict())
                    opt = make(params)
                    opt.load_state_dict(state)
                else:
                    both = params, opt
                    params, opt = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
            set_gradients(params, seed=k)
            opt.step()
        runs.append(params)
    assert_close(*runs, 0.0)


def test_rules_are_pickled_by_reference():
    assert copy.deepcopy(shared_rule) is shared_rule is pickle.loads(pickle.dumps(shared_rule))
    hidden = fastlr.rule(signed)
    with pytest.raises(pickle.PicklingError, match="rule 'signed' cannot be pickled: no name in module .* stands for"):
        pickle.dumps(hidden)


def test_a_spawned_process_goes_on(tmp_path):
    """In a process that starts anew the rule is imported from the module of the script."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import multiprocessing, torch, fastlr, fastlr.torch\n"
        "@fastlr.rule\n"
        "def plain(p, g, *, lr):\n"
        "    return p - lr * g\n"
        "def work(params, opt, out):\n"
        "    params[0].grad = torch.ones(2)\n"
        "    opt.step()\n"
        "    out.put(params[0].tolist())\n"
        "if __name__ == '__main__':\n"
        "    params = [torch.nn.Parameter(torch.zeros(2))]\n"
        "    opt = fastlr.torch.Optimizer(params, plain, lr=0.5)\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    out = context.SimpleQueue()\n"
        "    process = context.Process(target=work, args=(params, opt, out))\n"
        "    process.start()\n"
        "    print(out.get())\n"
        "    process.join()\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "[-0.5, -0.5]", run.stderr


# Memory that goes away


@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_memory_that_was_given_back_is_refused(what):
    params = parameters(torch.float32)
    opt = fastlr.torch.SGD(params, lr=0.1)
    set_gradients(params, seed=0)
    opt.step()
    tensor, empty = params[0] if what == "parameter" else params[0].grad, torch.ones(3, 2)
    empty.untyped_storage().resize_(0)
    tensor.data = empty
    with pytest.raises(ValueError, match="parameter '0' has no memory"):
        opt.step()
    tensor.data = torch.ones(3, 2)
    opt.step()


def test_a_parameter_that_is_resized_needs_another_state():
    params = parameters(torch.float32)
    opt = fastlr.torch.Adam(params, lr=0.1)
    set_gradients(params, seed=0)
    opt.step()
    with torch.no_grad():
        params[1].set_(torch.ones(6))
    params[1].grad = torch.ones(6)
    with pytest.raises(
        ValueError, match=r"shape \(4,\) in the state, the parameter \(6,\). If the parameter has changed"
    ):
        opt.step()
    opt.state.pop(params[1])
    opt.step()
    torch.testing.assert_close(params[1].detach(), torch.full((6,), 0.9))


def test_averages_that_are_elsewhere():
    """They go on from what stands where they are now."""
    params, target = parameters(torch.float32), parameters(torch.float32, 1)
    opt = fastlr.torch.SGD(params, lr=0.0, ema=0.5, ema_out=iter(target))
    set_gradients(params, seed=0)
    opt.step()
    for change in (lambda t: setattr(t, "data", torch.zeros_like(t)), lambda t: t.set_(torch.zeros(t.shape))):
        with torch.no_grad():
            change(target[0])
        opt.step()
        assert torch.equal(target[0], params[0] * 0.5) and opt.ema[0] is target[0]


def test_averages_whose_module_has_other_tensors_now():
    online, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    opt = fastlr.torch.SGD(online.parameters(), lr=0.0, ema=0.0, ema_out=target.parameters())
    for p in online.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    target.load_state_dict({name: value.clone() + 1 for name, value in target.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"ema_out for parameter '0' no longer exists, .* opt.ema_out = target.param"):
        opt.step()
    opt.ema_out = target.parameters()
    opt.step()
    torch.testing.assert_close(target.weight, online.weight)
    assert opt.ema[0] is target.weight
    with pytest.raises(ValueError, match="ema_out has 1 tensors for 2 parameters"):
        opt.ema_out = [target.weight]
    opt = fastlr.torch.SGD(online.parameters(), lr=0.0, ema=0.0, ema_out=[p.detach() * 0 for p in online.parameters()])
    opt.step()  # nobody else ever had them: they are what opt.ema has
    opt.step()
    torch.testing.assert_close(opt.ema[0], online.weight.detach())


# Steps inside steps, errors and interrupts


def test_a_step_inside_a_step_is_refused():
    params = parameters()
    errors = []

    def nested(n):
        if n == 1 and not errors:
            for call in (opt.step, opt.state_dict, lambda: opt.load_state_dict({}), lambda: copy.deepcopy(opt)):
                with pytest.raises(RuntimeError, match="this optimizer is in a step") as raised:
                    call()
                errors.append(raised.value)
            with pytest.raises(RuntimeError, match="this optimizer is in a step"):
                opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        return 0.1

    opt = fastlr.torch.SGD(params, lr=Function(nested))
    for k in range(3):
        set_gradients(params, seed=k)
        opt.step()
    assert len(errors) == 4 and opt.info.step == 3

    def closure():  # before the update: a step of its own
        set_gradients(params, seed=5)
        opt.step()
        return 0.0

    opt.step(closure)
    assert opt.info.step == 5


@pytest.mark.parametrize("kind", ["two dtypes", "chunks"])
def test_an_error_in_the_second_part_leaves_the_first(kind):
    bad = Function(lambda n: math.nan if n == 2 else 0.5)
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    if kind == "two dtypes":
        opt = fastlr.torch.SGD([{"params": [a]}, {"params": [b], "lr": bad}], lr=1.0)
    else:
        b = torch.nn.Parameter(torch.zeros(3))
        opt = fastlr.torch.HostOptimizer([{"params": [a]}, {"params": [b], "lr": bad}], fastlr.SGD, lr=1.0, chunk=3)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    with pytest.raises(ValueError, match="lr must be non-negative and finite, but .* gives nan at step 2"):
        opt.step()
    assert (a[0].item(), b[0].item()) == (-2.0, -1.0)
    opt.param_groups[1]["schedules"]["lr"] = Function(lambda n: 0.25)
    opt.step()
    assert (a[0].item(), b[0].item()) == (-3.0, -1.25)


def _interrupted(call, at):
    """Call, with a KeyboardInterrupt at an event "line" of `fastlr.torch`; the lines of all events before."""
    folder = str(Path(fastlr.torch.__file__).parent)
    seen = []

    def trace(frame, event, _):
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(folder) else None
        if event == "line":
            seen.append((frame.f_code, frame.f_lineno))
            if len(seen) == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen


KINDS = {
    "one dtype": lambda: _trained(fastlr.torch.Adam, parameters()),
    "two dtypes": lambda: _trained(fastlr.torch.Adam, [*parameters(), *parameters(torch.float32)]),
    "host": lambda: _trained(fastlr.torch.HostOptimizer, parameters(torch.bfloat16)),
    "chunks": lambda: _trained(fastlr.torch.HostOptimizer, parameters(torch.bfloat16), chunk=5),
}


def _trained(make, params, **more):
    opt = make(params, lr=Linear(0.1, 0.0, steps=20), ema=0.5, **more)
    set_gradients(params, seed=0)
    opt.step()
    set_gradients(params, seed=1)
    opt.step()
    set_gradients(params, seed=2)
    return params, opt


def _facts(params, opt):
    """What a user sees of an optimizer."""
    entries = [opt.state[p] for p in params]
    numbers = [*params, *(t for e in entries for n, t in sorted(e.items()) if isinstance(t, torch.Tensor)), *opt.ema]
    groups = [[group["lr"], len(group["params"])] for group in opt.param_groups]
    return [t.detach().double().flatten().tolist() for t in numbers], groups


ACTIONS = {
    "step": lambda params, opt, other: opt.step(),
    "rebuild": lambda params, opt, other: (opt.state[params[0]].update(step=torch.tensor(7.0)), opt.step()),
    "load": lambda params, opt, other: opt.load_state_dict(other),
    "add": lambda params, opt, other: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones_like(params[0]))]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interrupt_leaves_what_was_before_or_what_comes_after(kind, action):
    """At any line of ours: the optimizer goes on as if the call had not been made, or as if it had."""

    def finished(params, opt):
        shown = _facts(params, opt)
        for p in opt.param_groups[-1]["params"]:
            p.grad = torch.ones_like(p)
        opt.step()
        return shown, _facts(params, opt)[0][: len(params)]

    other = copy.deepcopy(_trained_elsewhere(kind))
    before = finished(*KINDS[kind]())[1]
    params, opt = KINDS[kind]()
    events = _interrupted(lambda: ACTIONS[action](params, opt, other), -1)
    after = finished(params, opt)[1]
    changed = action == "rebuild"  # the user's own part of it is made in any case
    if changed:
        params, opt = KINDS[kind]()
        opt.state[params[0]].update(step=torch.tensor(7.0))
        before = finished(params, opt)[1]
    assert before != after or action == "add"
    firsts = {line: n for n, line in reversed([*enumerate(events, 1)])}
    lasts = {line: n for n, line in enumerate(events, 1)}
    # each line once in a loop is enough here, and of what the kinds have in common a part
    places = sorted({*firsts.values(), *(lasts.values() if kind == "chunks" else ())})
    for at in places if kind == "one dtype" or action == "step" else places[::4]:
        params, opt = KINDS[kind]()
        _interrupted(lambda params=params, opt=opt: ACTIONS[action](params, opt, other), at)
        assert torch.is_grad_enabled()
        found = finished(params, opt)[1]
        assert found in (before, after), f"at {events[at - 1]}, event {at}"


def _trained_elsewhere(kind):
    params, opt = KINDS[kind]()
    for k in range(3, 6):
        set_gradients(params, seed=k)
        opt.step()
    return opt.state_dict()


# Schedules


def test_groups_have_numbers_and_schedules_beside_them():
    params, late = parameters(), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    rate, beta = Linear(0.1, 0.0, steps=10), Linear(0.8, 0.9, steps=10)
    opt = fastlr.torch.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], lr=rate, betas=(beta, 0.999))
    first, second = opt.param_groups
    for k in range(3):
        assert f"{first['lr']:.3f}" == f"{rate(k):.3f}" and first["betas"] == (beta(k), 0.999) and second["lr"] == 0.5
        assert first["schedules"] == {"lr": rate, "betas": (beta, 0.999)} and "lr" not in second["schedules"]
        set_gradients(params, seed=k)
        opt.step()
        assert opt.info.lrs["0:*"] == rate(k)
    opt.add_param_group({"params": [late]})
    assert opt.param_groups[2]["lr"] == rate(3)
    second["lr"] = Linear(1.0, 0.0, steps=4)  # a schedule that is set: from the clock on
    opt.step()
    assert second["lr"] == 0.0 and opt.info.lrs["1:*"] == 0.25
    first["lr"] = 0.25
    with pytest.warns(UserWarning, match=r"lr of group 0 followed Linear\(.*\) and was set to 0.25, which takes its"):
        opt.step()
    assert opt.info.lrs["0:*"] == 0.25 and "lr" not in first["schedules"] and first["betas"] == (beta(5), 0.999)
    del second["schedules"]["lr"]  # from now on the number that stands there
    opt.step()
    assert opt.info.lrs["1:*"] == 0.0


def test_a_parameter_that_comes_late_gets_the_present_rate():
    """Without gradients so far, in another dtype, or in a new group: all follow the optimizer's clock."""
    rate = Linear(1.0, 0.0, steps=10)
    a, b, c = (torch.nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.float32, torch.float32, torch.float64))
    late = torch.nn.Parameter(torch.zeros(1))
    opt = fastlr.torch.SGD([a, b, c], lr=rate)
    a.grad = torch.ones(1)
    for _ in range(5):
        opt.step()
    state = copy.deepcopy(opt.state_dict())
    opt.add_param_group({"params": [late]})
    for p in (b, c, late):
        p.grad = torch.ones_like(p)
    opt.step()
    assert [p.item() for p in (b, c, late)] == [-0.5] * 3 and opt.info.lr == 0.5
    fresh = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    other = fastlr.torch.SGD([torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1)), fresh])
    other.load_state_dict(state)
    fresh.grad = torch.ones_like(fresh)
    other.step()
    assert fresh.item() == -0.5


def test_schedulers_of_pytorch_over_schedules():
    schedulers = torch.optim.lr_scheduler
    runs = []
    for constant in (False, True):  # a scheduler that changes nothing, where some trainer demands one
        params = parameters()
        opt = fastlr.torch.SGD(params, lr=Cosine(0.1, steps=10).warmup(3))
        scheduler = schedulers.LambdaLR(opt, lambda k: 1.0) if constant else None
        for k in range(8):
            set_gradients(params, seed=k)
            opt.step()
            if scheduler is not None:
                scheduler.step()
                state = opt.state_dict()
                assert state["param_groups"][0]["lr"] == pytest.approx(Cosine(0.1, steps=10).warmup(3)(k + 1))
        runs.append(params)
    assert_close(*runs, 0.0)
    for make in (
        lambda o: schedulers.LinearLR(o),
        lambda o: schedulers.StepLR(o, 1),
        lambda o: schedulers.LambdaLR(o, lambda k: 0.5**k),
    ):
        params = parameters()
        opt = fastlr.torch.SGD(params, lr=Linear(0.1, 0.01, steps=10))
        scheduler = make(opt)
        set_gradients(params, seed=0)
        if not isinstance(scheduler, schedulers.LinearLR):  # which begins with another rate at once
            opt.step()
            scheduler.step()
        with pytest.raises(ValueError, match="lr of group 0 follows Linear.* and a scheduler of PyTorch sets it to"):
            opt.step()
        opt.param_groups[0].pop("schedules")  # the scheduler alone
        opt.step()


def test_plateaus_are_told():
    params = [*parameters(), *parameters(torch.float32)]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.5}]
    opt = fastlr.torch.SGD(groups, lr=Plateau(0.1, patience=0, factor=0.5))
    set_gradients(params, seed=0)
    opt.step()
    for metric in (1.0, 1.0):
        opt.observe(metric)
    assert opt.param_groups[0]["lr"] == 0.05 and opt.param_groups[1]["lr"] == 0.5
    params[0].data = params[0].data.clone()  # engines made anew remember
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.05
    state = torch.load(saved(opt.state_dict()), weights_only=True)
    again = fastlr.torch.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=1.0)
    again.load_state_dict(state)
    _, other = copy.deepcopy((params, opt))
    for one in (again, other):
        assert one.param_groups[0]["lr"] == 0.05
        one.observe(1.0)
        assert one.param_groups[0]["lr"] == 0.025
    with pytest.raises(ValueError, match="no hyperparameter follows a Plateau"):
        fastlr.torch.SGD(params, lr=0.1).observe(1.0)


def test_plateaus_are_told_all_or_none():
    params, fails = [*parameters(), *parameters(torch.float32)], []

    def rate(n):
        if fails:
            raise ValueError("no rate today")
        return 0.5

    plateau = Plateau(0.1, patience=0, factor=0.5)
    groups = [
        {"params": params[:3], "lr": plateau},
        {"params": params[3:], "lr": Function(rate) * Plateau(1.0, patience=0)},
    ]
    opt = fastlr.torch.SGD(groups, lr=1.0)
    set_gradients(params, seed=0)
    opt.step()
    opt.observe(1.0)
    fails.append(1)
    with pytest.raises(ValueError, match="no rate today"):
        opt.observe(1.0)
    fails.clear()
    opt.step()
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.5]


@pytest.mark.parametrize("kind", ["adam", "two dtypes", "host", "average"])
def test_find_lr_puts_everything_back(kind):
    """The curve is that of fastlr's own optimizer; then parameters, gradients, states and schedules are as before."""
    dtypes = {"two dtypes": (torch.float32, torch.float64), "host": (torch.bfloat16,)}.get(kind, (torch.float64,))
    params = [torch.nn.Parameter(torch.full((2,), 5.0, dtype=dtype)) for dtype in dtypes]
    target = [torch.zeros_like(p) for p in params]
    more = {"ema": 0.5, "ema_out": target} if kind == "average" else {}
    make = fastlr.torch.HostOptimizer if kind == "host" else fastlr.torch.Adam
    opt = make([{"params": [p]} for p in params], lr=Linear(0.1, 0.0, steps=9), **more)

    def fun(given):
        assert all(map(lambda a, b: a is b, given, params))
        opt.zero_grad()
        loss = sum(p.double().square().sum() for p in params)
        loss.backward()
        return loss

    fun(params)
    opt.step()
    before = [[*params, *(p.grad for p in params), *target, *(t for e in opt.state.values() for t in e.values())]]
    before += [[t.detach().clone() for t in before[0]], [dict(group) for group in opt.param_groups], opt.info]
    found = fastlr.find_lr(opt, fun, 1e-3, 100.0, steps=30)
    assert found.suggestion is not None and found.losses[0] == pytest.approx(fun(params).item(), rel=1e-6)
    assert all(map(torch.equal, before[0], before[1])) and opt.info is before[3]
    assert [dict(group) for group in opt.param_groups] == before[2]
    opt.step()
    assert opt.info.step == 2 and opt.info.lr == pytest.approx(0.1 * 8 / 9)
    if kind == "adam":
        assert fastlr.find_lr(opt, lambda _: (1.0, None), steps=5).suggestion is None
        native = fastlr.Adam(np.full(2, 5.0))
        other = fastlr.torch.Adam([torch.nn.Parameter(torch.full((2,), 5.0, dtype=torch.float64))])
        curves = [
            fastlr.find_lr(
                o,
                lambda p, o=o: (
                    float((q := p if o is native else p[0].detach()) @ q),
                    [2 * q] if o is other else 2 * q,
                ),
            )
            for o in (native, other)
        ]
        assert curves[0].losses.tolist() == curves[1].losses.tolist()


def test_schedule_free_optimizers_evaluate():
    net = torch.nn.Linear(3, 1)
    for make in (fastlr.torch.ScheduleFreeAdamW, fastlr.torch.ScheduleFreeSGD):
        opt = make(net.parameters(), lr=0.1)
        for k in range(3):
            set_gradients([*net.parameters()], seed=k)
            opt.step()
        weights, averaged = net.weight.detach().clone(), opt.averaged[0].clone()
        assert averaged.data_ptr() != net.weight.data_ptr() and not torch.equal(averaged, weights)
        opt.eval()
        opt.eval()
        assert torch.equal(net.weight, averaged) and torch.equal(opt.averaged[0], averaged)
        with pytest.raises(RuntimeError, match=r"the parameters are the averages, .* Call train\(\) before"):
            opt.step()
        state, weights_then = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
        opt.train()
        opt.train()
        assert torch.equal(net.weight, weights)
        opt.step()
        other = torch.nn.Linear(3, 1)  # a run that was saved while it was evaluated
        other.load_state_dict(weights_then)
        resumed = make(other.parameters())
        resumed.load_state_dict(state)
        with pytest.raises(RuntimeError, match="the parameters are the averages"):
            resumed.step()
        resumed.train()
        torch.testing.assert_close(other.weight.detach(), weights)
    plain = fastlr.torch.SGD(net.parameters())
    assert not hasattr(plain, "train") and not hasattr(plain, "eval")
    with pytest.raises(AttributeError, match="SGD is not schedule-free"):
        _ = plain.averaged


def test_numbers_too_large_are_refused():
    with pytest.raises(ValueError, match="lr must be"):
        fastlr.torch.SGD(parameters(), lr=10**400)


# States that are damaged


def _damaged(state, random):
    """A copy of a state with something wrong, or at least odd, in one place."""
    state = copy.deepcopy(state)
    values = [
        None, True, -1, 0, 1, 5.5, 10**400, -(2**70), math.nan, math.inf, "text", b"bytes", [], [1.0], {}, {"a": 1},
        (0.9, 0.999), (2.0, -1.0), torch.tensor(math.nan), torch.tensor(-1.0), torch.ones(2), torch.ones(3, 2),
        torch.ones(3, 2, dtype=torch.complex64), torch.ones(3, 2, device="meta"), torch.eye(3, 2).to_sparse(),
        torch.full((4,), math.nan), -torch.ones(4), object(), {"type": "Linear"}, {"type": "Nothing", "a": [{}]}, 1j,
    ]  # fmt: skip
    places = []

    def walk(thing):
        if isinstance(thing, dict | list):
            for key in thing if isinstance(thing, dict) else range(len(thing)):
                places.append((thing, key))
                walk(thing[key])

    walk(state)
    for _ in range(random.choice([1, 1, 2])):
        container, key = random.choice(places)
        how = random.randrange(4)
        if how == 0 and key in (container if isinstance(container, dict) else range(len(container))):
            container.pop(key)
        elif how == 1 and isinstance(container, dict):
            container[random.choice([7, -1, "odd", None, (1, 2)])] = random.choice(values)
        elif isinstance(container, dict) or key < len(container):
            container[key] = random.choice(values)
    return state


@pytest.mark.parametrize("name", ["Adam", "SGD", "Prodigy", "HostOptimizer"])
def test_damaged_states(name):
    """Each is refused and nothing has changed, or taken over and the next step works; as PyTorch where that works."""
    make = getattr(fastlr.torch, name)
    kind = torch.bfloat16 if name == "HostOptimizer" else torch.float32
    more = {"momentum": 0.9} if name == "SGD" else {}

    def built():
        params = parameters(kind)
        opt = make([{"params": params[:2]}, {"params": params[2:]}], lr=Linear(0.1, 0.0, steps=9), **more)
        set_gradients(params, seed=0)
        opt.step()
        set_gradients(params, seed=1)
        return params, opt

    def facts(params, opt):
        state = opt.state_dict()
        return repr([[p.tolist() for p in params], state["state"], state["param_groups"]])

    params, opt = built()
    state = opt.state_dict()
    wanted, outcomes, choose = facts(params, opt), {"refused": 0, "taken": 0}, random.Random(3)
    for _ in range(250):
        bad = _damaged(state, choose)
        try:
            opt.load_state_dict(bad)
        except ValueError:
            outcomes["refused"] += 1
            assert facts(params, opt) == wanted
            continue
        outcomes["taken"] += 1
        try:
            reference = copy.deepcopy(params)
            theirs = getattr(torch.optim, name)([{"params": reference[:2]}, {"params": reference[2:]}], **more)
            theirs.load_state_dict(bad)
            set_gradients(reference, seed=1)
            theirs.step()
        except Exception:
            reference = None
        opt.step()
        if reference is not None:
            assert all(
                bool(torch.isnan(p).any()) <= bool(torch.isnan(q).any()) for p, q in zip(params, reference, strict=True)
            )
        params, opt = built()
    assert min(outcomes.values()) > 20
    opt.step()


def test_an_interrupt_while_gradients_are_found_leaves_none_of_an_earlier_step(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fastlr.torch.SGD([p], lr=1.0)
    p.grad = torch.ones(3)
    opt.step()
    opt.step()
    p.grad = torch.full((3,), 1000.0)

    def interrupted(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastlr.torch.engines.Engine._may_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    opt.step()
    assert p.tolist() == [-1002.0] * 3


@pytest.mark.parametrize(
    ("limit", "error"),
    [(lambda n: {}[n], KeyError), (lambda n: -1.0 if n else 1.0, ValueError)],
    ids=["raises", "range"],
)
def test_a_scheduled_limit_of_several_dtypes_is_checked(limit, error):
    """The norm over several dtypes is taken outside of the native optimizers, which check everything else."""
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = fastlr.torch.SGD([a, b], lr=1.0, clip_norm=lambda n: 1.0)
    for q in (a, b):
        q.grad = torch.full_like(q, 100.0)
    opt.step()
    before = a.tolist(), b.tolist()
    for group in opt.param_groups:
        group["clip_norm"] = fastlr.schedules.Function(limit)
    with pytest.raises(error):
        opt.step()
    assert (a.tolist(), b.tolist()) == before


def test_the_state_of_an_adam_does_not_change_how_an_adamw_decays():
    p = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.Adam([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.ones(3)
    theirs.step()
    opt = fastlr.torch.AdamW([p])
    with pytest.raises(ValueError, match="decoupled_weight_decay=False, as Adam does, this AdamW True"):
        opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["decoupled_weight_decay"] is True
    fastlr.torch.AdamW([p], decoupled_weight_decay=False).load_state_dict(theirs.state_dict())


def test_a_group_that_is_added_is_only_read():
    params, target = parameters()[:1], parameters(seed=1)[:1]
    opt = fastlr.torch.Adam(params, ema=0.5, ema_out=target)
    late, average = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    bad = {"params": late, "ema_out": [average], "lr": -1.0}
    given = dict(bad)
    with pytest.raises(ValueError, match="lr must be"):
        opt.add_param_group(bad)
    assert bad == given and len(opt.param_groups) == 1 and len(opt.ema_out) == 1
    good = {"params": late, "ema_out": [average]}
    given = dict(good)
    opt.add_param_group(good)
    assert good == given and opt.ema_out[1] is average


BAD_SCHEDULES = {
    "clip_value": (lambda n, g: 1.0, TypeError, "missing 1 required positional argument: 'g'"),
    "clip_norm": (lambda n: {}[n], KeyError, "1"),
    "betas": (
        (0.9, Constant(2.0)),
        ValueError,
        r"betas\[1\] must be in \[0, 1\), but Constant\(2.0\) gives 2.0 at step",
    ),
    "lr": (lambda n: 0.1 - n, ValueError, "lr must be non-negative and finite, but .* gives -0.9 at step 1"),
    "ema_decay": (Constant(2.0), ValueError, "must be in .0, 1., but Constant"),
}


@pytest.mark.parametrize("how", ["load", "add", "set"])
@pytest.mark.parametrize("name", BAD_SCHEDULES)
def test_a_schedule_that_does_not_fit_is_refused(name, how):
    """When it comes, or when it is taken over; nothing has changed, and the optimizer goes on with what it had."""
    value, error, message = BAD_SCHEDULES[name]
    runs = []
    for bad in (False, True):
        params, late = [*parameters(), *parameters(torch.float32)], torch.nn.Parameter(torch.ones(2))
        opt = fastlr.torch.Adam(params, lr=0.1, ema=0.5)
        for k in range(3):
            set_gradients(params, seed=k)
            if bad and k == 1:
                before, state = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())
                if how == "load":
                    wrong = copy.deepcopy(state)
                    wrong["param_groups"][0][name] = value
                    with pytest.raises(ValueError, match=f"'{name}' of group 0 in the state is invalid: .*{message}"):
                        opt.load_state_dict(wrong)
                elif how == "add":
                    with pytest.raises(error, match=message):
                        opt.add_param_group({"params": [late], name: value})
                else:
                    group = opt.param_groups[0]
                    kept = dict(group)
                    group.update({"lr": 0.5, "eps": 1.0, name: value})
                    with pytest.raises(error, match=message):
                        opt.step()
                    group.update(kept)
                assert all(map(torch.equal, params, before)) and repr(opt.state_dict()) == repr(state)
            opt.step()
        runs.append(params)
    assert_close(*runs, 0.0)


@pytest.mark.parametrize("kind", ["one dtype", "two dtypes", "chunks"])
def test_an_interrupted_step_that_was_made_is_counted(kind, monkeypatch):
    params, opt = KINDS[kind]()
    run = Stepper.run

    def interrupted(self, *args):
        run(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastlr.step.stepper.Stepper.run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    counts = [int(opt.state[p]["step"]) for p in params]
    opt.step()
    assert counts[0] == 3 and [int(opt.state[p]["step"]) for p in params] == [n + 1 for n in counts]


@pytest.mark.parametrize("make", [fastlr.torch.ScheduleFreeSGD, fastlr.torch.ScheduleFreeAdamW, fastlr.torch.DoG])
def test_its_own_state_loads_after_an_overflow(make):
    params = parameters()
    opt = make(params, lr=1e308)
    for k in range(3):
        set_gradients(params, seed=k)
        opt.step()
    opt.load_state_dict(opt.state_dict())
    set_gradients(params, seed=3)
    opt.step()
