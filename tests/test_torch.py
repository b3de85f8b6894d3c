"""`fastlr.torch`: real optimizers of PyTorch, with PyTorch's numbers, that write nothing behind anybody's back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
from cases import CASES, PLAIN

import fastlr
from fastlr.schedules import Cosine, Linear

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import fastlr.torch  # noqa: E402
from fastlr.kernels import exchange  # noqa: E402
from fastlr.torch import engines, tensors  # noqa: E402

COUNTERPARTS = [name for name in fastlr.optimizers.__all__ if hasattr(torch.optim, name)]
STEPS = 100
# float64 over 100 steps, as in test_torch_parity: PyTorch orders the operations otherwise.
TOLERANCE = 1e-10


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(11, 3), (5,), (), (2, 3, 4), (0,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_gradients(*groups, seed):
    """The same gradients for several lists of parameters, each in memory of its own."""
    for params in groups:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.detach(), b.detach())


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def data(seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, :1] * x[:, 1:2]).sin()


def settings_for(name):
    own = {"SGD": {"momentum": 0.9, "dampening": 0.3}, "Adadelta": {"lr": 1.0}}
    return {"lr": 0.01, **own.get(name, {})}


# PyTorch's own table


def table():
    """The settings in which PyTorch tests its optimizers, for those that are here too."""
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ImportError:  # it needs the package expecttest
        return []
    out = []
    for info in optim_db:
        name = info.optim_cls.__name__
        if name in COUNTERPARTS:
            out += [(name, entry.kwargs) for entry in info.optim_inputs_func(device="cpu")]
            out += [(name, e.kwargs) for e in info.optim_inputs_func(device="cpu") for e in _as_tensors(e)]
    return out


def _as_tensors(entry):
    """The same settings with a rate that is a tensor."""
    if not isinstance(entry.kwargs.get("lr"), float):
        return []
    return [
        type(entry)(
            params=None,
            kwargs={**entry.kwargs, "lr": torch.tensor(entry.kwargs["lr"], dtype=torch.float64)},
            desc="tensor lr",
        )
    ]


def bad_entries():
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ImportError:
        return []
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in optim_db:
            if info.optim_cls.__name__ in COUNTERPARTS:
                out += [(info.optim_cls.__name__, bad) for bad in info.optim_error_inputs_func("cpu", torch.float32)]
    return out


def test_the_table_is_there():
    """In CI the package that PyTorch's table needs is installed; elsewhere its tests are left out with this reason."""
    pytest.importorskip("expecttest", reason="PyTorch's table of optimizers needs the package expecttest")
    assert len(table()) > 50 and {name for name, _ in table()} == set(COUNTERPARTS)


@pytest.mark.parametrize(("name", "settings"), table(), ids=str)
def test_as_in_pytorch(name, settings):
    ours, theirs = parameters(), parameters()
    mine = getattr(fastlr.torch, name)(ours, **copy.deepcopy(settings))
    reference = getattr(torch.optim, name)(theirs, **copy.deepcopy(settings))
    for k in range(STEPS):
        set_gradients(ours, theirs, seed=k)
        mine.step()
        reference.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "bad"), bad_entries(), ids=lambda x: x if isinstance(x, str) else x.error_regex[:40])
def test_what_pytorch_refuses(name, bad):
    """The same kinds of error. Tensors as betas or as the rate of foreach=True are fine here."""
    entry = bad.optimizer_error_input
    tensor_betas = any(isinstance(b, torch.Tensor) for b in entry.kwargs.get("betas", ()))
    if tensor_betas or "foreach" in entry.kwargs:
        getattr(fastlr.torch, name)(parameters(), **entry.kwargs)
        return
    params = parameters() if entry.params is None else entry.params
    with pytest.warns(bad.error_type) if issubclass(bad.error_type, Warning) else pytest.raises(bad.error_type):
        getattr(fastlr.torch, name)(params, **entry.kwargs)


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_the_arguments_of_the_counterpart(name):
    """In the same order, with the same defaults, in the groups as well."""
    import inspect

    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (fastlr.torch, torch.optim))
    assert list(ours)[: len(theirs)][:3] == list(theirs)[:3]
    assert {n: p.default for n, p in theirs.items()}.items() <= {n: p.default for n, p in ours.items()}.items()
    for n, p in theirs.items():
        assert ours[n].kind is p.kind
    groups = [getattr(m, name)(parameters()).param_groups[0] for m in (fastlr.torch, torch.optim)]
    for key in groups[1].keys() - {"params"}:
        assert groups[0][key] == groups[1][key], key


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rule_with_the_native_bits(case):
    """What the native optimizer makes of the same arrays, through a real optimizer of PyTorch."""
    ours = parameters(torch.float32)
    arrays = [p.detach().numpy().copy() for p in ours]
    mine = getattr(fastlr.torch, case.make.__name__)(ours, **case.settings)
    native = case.make(arrays, **case.settings)
    for k in range(10):
        set_gradients(ours, seed=k)
        mine.step()
        native.step([p.grad.numpy() for p in ours])
    for p, a in zip(ours, arrays, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), a)
    assert set(case.states) <= set(mine.state[ours[0]])
    assert mine.info.step == native.steps == 10


def test_a_rule_of_ones_own():
    @fastlr.rule
    def signed(p, g, m, *, lr, beta=0.9):
        m = beta * m + (1 - beta) * g
        return p - lr * (1.0 if m > 0 else -1.0), m

    ours = parameters()
    before = [p.detach().clone() for p in ours]
    opt = fastlr.torch.Optimizer(ours, signed, lr=0.5, beta=0.0)
    set_gradients(ours, seed=0)
    opt.step()
    for p, old in zip(ours, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * torch.sign(p.grad))
    with pytest.raises(TypeError, match="rule must be made by fastlr.rule, got 'adam'"):
        fastlr.torch.Optimizer(ours, "adam", lr=0.1)


# A model


@pytest.mark.parametrize("name", COUNTERPARTS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_model_trains_to_the_same_loss(name, set_to_none):
    x, y = data()
    losses = []
    for module in (fastlr.torch, torch.optim):
        model = network()
        opt = getattr(module, name)(model.parameters(), **settings_for(name))
        for _ in range(60):
            opt.zero_grad(set_to_none=set_to_none)
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
        losses.append(loss.item())
    # NAdam of PyTorch keeps its product of momenta in float32.
    assert losses[0] == pytest.approx(losses[1], rel=1e-7 if name == "NAdam" else 1e-10)
    assert losses[0] < 0.9 * (network()(x) - y).square().mean().item()


@pytest.mark.parametrize("name", COUNTERPARTS)
@pytest.mark.parametrize("start", [0, 7])
def test_state_goes_to_pytorch_and_back(name, start):
    """Mid-run, and before the first step: each goes on where the other stopped."""
    ours, theirs = parameters(), parameters()
    mine = getattr(fastlr.torch, name)(ours, **settings_for(name))
    reference = getattr(torch.optim, name)(theirs, **settings_for(name))
    for k in range(start):
        set_gradients(ours, theirs, seed=k)
        ours[1].grad = theirs[1].grad = None  # has no state yet
        mine.step()
        reference.step()
    from_here, from_there = io.BytesIO(), io.BytesIO()
    torch.save(mine.state_dict(), from_here)
    torch.save(reference.state_dict(), from_there)
    from_here.seek(0), from_there.seek(0)
    mine = getattr(fastlr.torch, name)(ours)
    reference = getattr(torch.optim, name)(theirs)
    mine.load_state_dict(torch.load(from_there, weights_only=True))
    reference.load_state_dict(torch.load(from_here, weights_only=True))
    assert mine.param_groups[0]["lr"] == reference.param_groups[0]["lr"] == settings_for(name)["lr"]
    for k in range(start, start + 20):
        set_gradients(ours, theirs, seed=k)
        mine.step()
        reference.step()
    assert_close(ours, theirs, 1e-7 if name == "NAdam" else TOLERANCE)


def one_of_each_kind():
    """An optimizer of each kind: with and without state of a group, with and without sums."""
    kinds = {}
    for case in PLAIN:
        rule = case.make(np.zeros(1), **case.settings).rule
        kinds.setdefault((len(rule.scalars) > 0, len(rule.sums) > 0), case)
    return list(kinds.values())


@pytest.mark.parametrize("case", one_of_each_kind(), ids=str)
@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_going_on_equals_never_having_stopped(case, how):
    options = {"clip_norm": 1.0, "skip_nonfinite": True, "ema": 0.9, "shadow": "bfloat16"}
    make = getattr(fastlr.torch, case.make.__name__)
    runs = []
    for stop in (False, True):
        params = parameters(torch.float32)
        opt = make(params, **case.settings, **options)
        for k in range(12):
            if stop and k == 6:
                if how == "load":
                    state = copy.deepcopy(opt.state_dict())
                    opt = make(params, **options)
                    opt.load_state_dict(state)
                else:
                    both = (params, opt)
                    params, opt = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
            set_gradients(params, seed=k)
            if k == 3:
                params[0].grad[0, 0] = float("nan")
            if k % 3 == 0:
                params[1].grad = None
            opt.step()
        runs.append([*params, *opt.ema, *opt.shadow, *(opt.state[p][n] for p in params for n in case.states)])
        assert opt.skipped_steps == 1 and opt.info.step == 11
    assert_same(*runs)


def test_a_copy_is_apart_from_the_original():
    params = parameters()
    opt = fastlr.torch.Adam(params)
    set_gradients(params, seed=0)
    opt.step()
    others, other = copy.deepcopy((params, opt))
    before = [p.detach().clone() for p in params]
    moment = opt.state[params[0]]["exp_avg"].clone()
    set_gradients(others, seed=1)
    other.step()
    assert_same(params, before)
    assert torch.equal(opt.state[params[0]]["exp_avg"], moment) and opt.state[params[0]]["step"] == 1


# Nothing silently wrong


@pytest.mark.parametrize("how", ["rule", "ema", "mixed", "host", "staged"])
def test_autograd_sees_what_is_written(how):
    """A backward pass that needs the weights as they were before the step fails."""
    model = network(dtype=torch.float32)
    target = network(seed=5, dtype=torch.float32)
    x, y = data(dtype=torch.float32)
    if how in ("host", "staged"):
        model, x, y = model.bfloat16(), x.bfloat16(), y.bfloat16()
        opt = fastlr.torch.HostOptimizer(model.parameters(), lr=0.1, chunk=50 if how == "staged" else None)
    else:
        params = [*model.parameters(), *([torch.nn.Parameter(x[0].double())] if how == "mixed" else [])]
        averaged = {"ema": 0.9, "ema_out": target.parameters()} if how == "ema" else {}
        opt = fastlr.torch.SGD(params, lr=0.1, **averaged)
    written = target if how == "ema" else model
    first, second = (written(x) - y).square().mean(), (model(x) - y).square().mean()
    second.backward()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_a_parameter_that_is_not_written_keeps_its_version():
    params = parameters()
    opt = fastlr.torch.Adam(params)
    set_gradients(params, seed=0)
    params[0].grad = None
    versions = [p._version for p in params]
    opt.step()
    assert params[0]._version == versions[0] and params[1]._version > versions[1]


def test_none_is_no_update_and_zeros_are_one():
    ours, theirs = parameters(), parameters()
    mine, reference = fastlr.torch.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for k in range(12):
        set_gradients(ours, theirs, seed=k)
        for params in (ours, theirs):
            if k % 2:
                params[0].grad = None
            if k % 3 == 0:
                params[3].grad = torch.zeros_like(params[3])
        mine.step()
        reference.step()
    assert_close(ours, theirs)
    assert [int(mine.state[p]["step"]) for p in ours] == [6, 12, 12, 12, 12]
    for p in ours:
        p.grad = None
    before = [p.detach().clone() for p in ours]
    mine.step()
    assert_same(ours, before)


def test_memory_that_moves_is_noticed():
    """Another storage, another object, other gradients, a group that grows: each step finds what is there."""
    ours, theirs = parameters(), parameters()
    mine, reference = fastlr.torch.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    kept = []
    for k in range(30):
        set_gradients(ours, theirs, seed=k)
        for params, opt in ((ours, mine), (theirs, reference)):
            if k == 5:
                params[0].data = params[0].data.clone() + 1.0
            if k == 10:
                params[1].grad.data = params[1].grad.data.clone()
            if k == 12:  # a tensor takes the place of another, with its state
                new = torch.nn.Parameter(params[3].detach() * 2)
                new.grad = params[3].grad
                opt.param_groups[0]["params"][3] = new
                opt.state[new] = opt.state.pop(params[3])
                params[3] = new
            if k == 15:
                params.append(torch.nn.Parameter(torch.ones(4, dtype=torch.float64)))
                params[-1].grad = torch.ones_like(params[-1])
                opt.add_param_group({"params": [params[-1]], "lr": 0.5, "weight_decay": 0.1})
            if k == 20:
                opt.param_groups[1]["lr"] = 0.01
                opt.param_groups[0]["betas"] = (0.8, 0.9)
        kept += [p.data for p in ours]
        mine.step()
        reference.step()
        assert_close(ours, theirs)


def test_a_gradient_that_moves_while_another_is_missing():
    """What was found out about gradients in a step that was not made of all of them is not taken for known."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    opt, reference = fastlr.torch.SGD(ours, lr=1.0), torch.optim.SGD(theirs, lr=1.0)
    first, second, other = (torch.full((3,), x) for x in (1.0, 10.0, 100.0))
    for grads in ((first, second), (other, None), (other, second), (other, second), (first, second)):
        for params in (ours, theirs):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        opt.step()
        reference.step()
        assert_same(ours, theirs)


def test_groups_that_differ_in_flags():
    ours, theirs = parameters(), parameters()
    runs = []
    for module, params in ((fastlr.torch, ours), (torch.optim, theirs)):
        groups = [{"params": params[:2], "maximize": True}, {"params": params[2:], "betas": (0.5, 0.9), "eps": 1e-3}]
        runs.append(module.Adam(groups, lr=0.01, weight_decay=0.1))
    for k in range(10):
        set_gradients(ours, theirs, seed=k)
        for opt in runs:
            opt.step()
            if k == 5:
                opt.param_groups[1]["maximize"] = True
    assert_close(ours, theirs)


def test_groups_that_are_put_together_otherwise():
    """Parameters that go over to another group, and groups that are exchanged, are noticed like other tensors."""
    ours, theirs = parameters(), parameters()
    runs = []
    for module, params in ((fastlr.torch, ours), (torch.optim, theirs)):
        runs.append(module.Adam([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.01}]))
    for k in range(9):
        set_gradients(ours, theirs, seed=k)
        for opt in runs:
            if k == 3:
                opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())
            if k == 6:
                opt.param_groups = [{**group, "lr": 0.5} for group in opt.param_groups]
            opt.step()
    assert_close(ours, theirs)


def test_a_group_brings_its_averages_along():
    params, target = parameters(), parameters(seed=1)
    opt = fastlr.torch.SGD(params[:2], lr=0.1, ema=0.5, ema_out=target[:2])
    set_gradients(params, seed=0)
    opt.step()
    with pytest.raises(ValueError, match="ema_out has 2 tensors for 5 parameters"):
        opt.add_param_group({"params": params[2:]})
    opt.add_param_group({"params": params[2:], "ema_out": target[2:]})
    before = [t.detach().clone() for t in target]
    opt.step()
    for p, t, old in zip(params, target, before, strict=True):
        torch.testing.assert_close(t.detach(), old + 0.5 * (p.detach() - old))
    assert all(map(lambda a, b: a is b, opt.ema, target))


def test_two_optimizers_over_a_shared_encoder():
    def run(module):
        torch.manual_seed(0)
        encoder, first, second = (torch.nn.Linear(4, n).double() for n in (4, 1, 2))
        opts = [module.Adam([*encoder.parameters(), *head.parameters()], lr=0.05) for head in (first, second)]
        x = torch.randn(8, 4, dtype=torch.float64)
        for k in range(20):
            opts[k % 2].zero_grad()
            (first, second)[k % 2](encoder(x)).square().sum().backward()
            opts[k % 2].step()
        return [*encoder.parameters(), *first.parameters(), *second.parameters()]

    assert_close(run(fastlr.torch), run(torch.optim))


def test_tied_weights_are_updated_once():
    embedding, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    opt = fastlr.torch.SGD([*embedding.parameters(), torch.nn.Parameter(torch.ones(3))], lr=1.0)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = fastlr.torch.SGD([embedding.weight, head.weight], lr=1.0)
    for one in (opt, twice):
        before = embedding.weight.detach().clone()
        embedding.weight.grad = torch.ones_like(embedding.weight)
        one.step()
        assert torch.equal(embedding.weight.detach(), before - 1)
        built = one._built
        one.step()
        assert one._built is built  # not made anew for a parameter that is there twice
        embedding.weight.data += 1
    other = torch.nn.Parameter(embedding.weight.data)
    other.grad = torch.ones_like(other)
    with pytest.raises(ValueError, match="share memory, so both cannot be updated"):
        fastlr.torch.SGD([embedding.weight, other]).step()


def test_memory_in_another_order():
    """channels_last weights, transposed ones, gradients in whatever order: the right answer."""
    ours, theirs = [], []
    for params in (ours, theirs):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3, bias=False).double().to(memory_format=torch.channels_last)
        params += [conv.weight, torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64).t())]
    assert not ours[0].is_contiguous() and not ours[1].is_contiguous()
    mine, reference = fastlr.torch.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for k in range(8):
        set_gradients(ours, theirs, seed=k)
        if k % 2:
            for params in (ours, theirs):
                for p in params:
                    p.grad = p.grad.contiguous() if k % 4 == 1 else torch.empty_like(p).copy_(p.grad)
        mine.step()
        reference.step()
    assert_close(ours, theirs)
    assert mine.state[ours[0]]["exp_avg"].stride() == ours[0].stride()
    assert_close([mine.state[p]["exp_avg"] for p in ours], [reference.state[p]["exp_avg"] for p in theirs])


def test_a_gradient_that_is_to_be_negated():
    """The imaginary part of a conjugate is a view of numbers whose sign PyTorch keeps aside."""
    p, q = (torch.nn.Parameter(torch.full(s, 2.0)) for s in ((), (2, 1)))
    opt = fastlr.torch.SGD([p, q], lr=1.0)
    for _ in range(2):
        opt.zero_grad()
        sum((torch.complex(torch.ones_like(x), x).conj() * (3 + 1j)).real.sum() for x in (p, q)).backward()
        assert p.grad.is_neg() and p.grad.is_contiguous()
        opt.step()
    assert p.item() == 0.0 and q.detach().flatten().tolist() == [0.0, 0.0]


def test_a_gradient_that_is_the_parameter_itself():
    first, second = (torch.nn.Parameter(torch.tensor(x)) for x in ([1.0, -2.0], [0.0, 0.0]))
    opt = fastlr.torch.SGD([first, second], lr=0.5, momentum=0.9)
    for _ in range(2):
        first.grad = second.grad = first.detach()  # the second needs the first as it was before the step
        opt.step()
    torch.testing.assert_close(first.detach(), torch.tensor([1.0, -2.0]) * (0.5 - 0.5 * (0.9 + 0.5)))
    torch.testing.assert_close(second.detach(), torch.tensor([-1.0, 2.0]) * (0.5 + 0.5 * (0.9 + 0.5)))


BAD_PARAMETERS = {
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), TypeError, "expected float32 or float64. Optimize torch"),
    "half": (lambda: torch.ones(2, dtype=torch.bfloat16), TypeError, "use fastlr.torch.HostOptimizer"),
    "integers": (lambda: torch.ones(2, dtype=torch.int64), TypeError, "is int64, expected float32 or float64."),
    "expanded": (lambda: torch.ones(1).expand(3), ValueError, "is not dense in memory: shape (3,), strides (0,)."),
    "cut": (lambda: torch.ones(4, 4)[:, :2], ValueError, "Pass a parameter that owns its memory"),
    "sparse": (lambda: torch.eye(2).to_sparse(), TypeError, "has the layout torch.sparse_coo. Pass a dense parameter"),
}


@pytest.mark.parametrize("bad", BAD_PARAMETERS)
def test_parameters_that_cannot_be_updated(bad):
    make, error, message = BAD_PARAMETERS[bad]
    with pytest.raises(error) as raised:
        fastlr.torch.Adam([torch.nn.Parameter(torch.ones(2)), make()])
    assert message in str(raised.value) and "parameter '1'" in str(raised.value)
    opt = fastlr.torch.Adam([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(error):
        opt.add_param_group({"params": [make()]})
    assert len(opt.param_groups) == 1


def test_gradients_that_cannot_be_read():
    embedding, linear = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 1)
    opt = fastlr.torch.Adam([*linear.parameters(), *embedding.parameters()])
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in linear.parameters()]
    with pytest.raises(TypeError, match="the gradient of parameter '2' is sparse"):
        opt.step()
    assert_same(linear.parameters(), before)  # nothing was written
    embedding.weight.grad = torch.ones(5, 3)
    embedding.weight.grad.data = torch.ones(2)
    with pytest.raises(ValueError, match=r"the gradient of parameter '2' has shape \(2,\), the parameter \(5, 3\)"):
        opt.step()
    assert_same(linear.parameters(), before)


def test_parameters_without_memory_yet():
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    opt = fastlr.torch.Adam(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"is on the device meta: it has no memory yet. Use module.to_empty"):
        opt.step()
    model.to_empty(device="cpu")
    opt = fastlr.torch.Adam(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 3), -0.5))


def test_bad_settings_and_states():
    params = parameters()
    for settings, error, message in (
        ({"lr": -1.0}, ValueError, "lr must be non-negative and finite, got -1.0."),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError, "Tensor lr must be 1-element, got 2."),
        ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be in [0, 1), got 1.0."),
        ({"momentum": 0.9}, TypeError, "argument 'momentum' is not known here: use betas="),
        ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
        ({"capturable": True}, ValueError, "capturable=True is for parameters on a GPU"),
        ({"ema_out": params}, ValueError, "give its decay as well"),
        ({"ema": 0.9, "ema_out": params[:2]}, ValueError, "ema_out has 2 tensors for 5 parameters. Pass one for each."),
        ({"ema": 0.9, "ema_out": [1, *params[1:]]}, TypeError, "ema_out for parameter '0' is a int, expected a tensor"),
        ({"ema": 0.9, "ema_out": parameters(torch.float32)}, ValueError, "is torch.float32 (11, 3) on cpu, the param"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive and finite, got 0.0."),
        ({"backend": "numpy"}, TypeError, "argument 'backend' is not known; there are params"),
    ):
        with pytest.raises(error) as raised:
            fastlr.torch.AdamW(params, **settings)
        assert message in str(raised.value)
    opt = fastlr.torch.AdamW(params, lr=0.1)
    set_gradients(params, seed=0)
    opt.step()
    before = [p.detach().clone() for p in params] + [opt.state[p]["exp_avg"].clone() for p in params]
    opt.param_groups[0]["lr"] = -2.0
    with pytest.raises(ValueError, match="lr must be non-negative"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1
    sgd = torch.optim.SGD(params, momentum=0.9)
    sgd.step()
    amsgrad = torch.optim.AdamW(params, amsgrad=True).state_dict()
    wrong = copy.deepcopy(opt.state_dict())
    wrong["state"][0]["exp_avg"] = torch.ones(2)
    lacking = copy.deepcopy(opt.state_dict())
    lacking["param_groups"][0]["amsgrad"] = True
    for p, old in zip(params, before, strict=False):
        p.data.copy_(old)
    for state, message in (
        (sgd.state_dict(), "the state is of another optimizer than AdamW: its group 0 has no"),
        (wrong, "'exp_avg' of parameter '0' has shape (2,) in the state, the parameter (11, 3)."),
        (lacking, "the state of parameter '0' has no 'max_exp_avg_sq', only"),
        ({"a": 1}, "this is not the state of an optimizer of PyTorch"),
        (fastlr.torch.AdamW(params[:3]).state_dict(), "the state has groups of [3] parameters, this optimizer of [5]"),
    ):
        with pytest.raises(ValueError) as raised:
            opt.load_state_dict(state)
        assert message in str(raised.value)
        assert opt.param_groups[0]["lr"] == 0.1 and not opt.param_groups[0]["amsgrad"]
        assert_same([*params, *(opt.state[p]["exp_avg"] for p in params)], before)
    opt.load_state_dict(amsgrad)  # of nothing yet: starts afresh
    assert opt.param_groups[0]["amsgrad"]


# What works with optimizers of PyTorch


def schedulers():
    s = torch.optim.lr_scheduler
    return {
        "LambdaLR": lambda o: s.LambdaLR(o, lambda k: 0.9**k),
        "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda k: 0.95),
        "StepLR": lambda o: s.StepLR(o, 3),
        "MultiStepLR": lambda o: s.MultiStepLR(o, [2, 5]),
        "ConstantLR": lambda o: s.ConstantLR(o, 0.3, 4),
        "LinearLR": lambda o: s.LinearLR(o),
        "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
        "PolynomialLR": lambda o: s.PolynomialLR(o, 10, 2.0),
        "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 10),
        "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 4),
        "CyclicLR": lambda o: s.CyclicLR(o, 0.001, 0.1, 3, cycle_momentum=False),
        "OneCycleLR": lambda o: s.OneCycleLR(o, 0.1, total_steps=20),
        "SequentialLR": lambda o: s.SequentialLR(o, [s.LinearLR(o), s.StepLR(o, 3)], [4]),
        "ChainedScheduler": lambda o: s.ChainedScheduler([s.StepLR(o, 3), s.ExponentialLR(o, 0.9)]),
        "ReduceLROnPlateau": lambda o: s.ReduceLROnPlateau(o, patience=1),
        "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 5),
    }


def test_all_schedulers_are_tried():
    known = {
        n
        for n, c in vars(torch.optim.lr_scheduler).items()
        if isinstance(c, type) and n in torch.optim.lr_scheduler.__all__
    }
    assert known - {"LRScheduler"} <= set(schedulers()) | {"_LRScheduler"}


@pytest.mark.parametrize("kind", schedulers())
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
def test_every_scheduler_drives_an_optimizer(kind, name, rate):
    ours, theirs = parameters(), parameters()
    runs = []
    for module, params in ((fastlr.torch, ours), (torch.optim, theirs)):
        more = {"momentum": 0.9} if name == "SGD" else {}
        lr = rate.clone() if isinstance(rate, torch.Tensor) else rate
        opt = getattr(module, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=lr, **more)
        runs.append((opt, schedulers()[kind](opt)))
    for k in range(15):
        set_gradients(ours, theirs, seed=k)
        for opt, scheduler in runs:
            opt.step()
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
    assert_close(ours, theirs)


def test_gradscaler():
    """Unscaling is part of the step; a scale that was too large skips it, and nothing changes."""
    x, y = data(dtype=torch.float32)
    runs = []
    for module in (fastlr.torch, torch.optim):
        for clip in (False, True):
            model = network(dtype=torch.float32)
            opt = module.AdamW(model.parameters(), lr=0.01)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
            skipped = 0
            for _ in range(40):
                opt.zero_grad()
                scaler.scale((model(x) - y).square().mean() * 100).backward()
                if clip:
                    scaler.unscale_(opt)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                before = [p.detach().clone() for p in model.parameters()]
                scaler.step(opt)
                if all(map(torch.equal, before, (p.detach() for p in model.parameters()))):
                    skipped += 1
                    if module is fastlr.torch:
                        assert opt.info.skipped
                scaler.update()
            assert skipped > 2
            if module is fastlr.torch:
                assert opt.skipped_steps == skipped
            runs.append((list(model.parameters()), skipped))
    for ours, theirs in zip(runs[:2], runs[2:], strict=True):
        assert ours[1] == theirs[1]
        assert_close(ours[0], theirs[0], 1e-5)


def test_closures_and_hooks():
    x, y = data()
    model = network()
    opt = fastlr.torch.SGD(model.parameters(), lr=0.05)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o.info)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o.info.step)))
    opt.register_state_dict_post_hook(lambda o, state: state.update(mark=1))

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        first = opt.step(closure)
    for _ in range(20):
        last = opt.step(closure)
    assert last.item() < first.item()
    assert seen[:2] == [("before", None), ("after", 1)] and opt.state_dict()["mark"] == 1


def test_a_compiled_trainer():
    """`torch.compile` leaves the step alone, and what is around it goes on as it would without."""
    x, y = data(dtype=torch.float32)
    losses = []
    for compiled in (False, True):
        model = network(dtype=torch.float32)
        opt = fastlr.torch.AdamW(model.parameters(), lr=0.1, clip_norm=1.0)

        def train(model=model, opt=opt):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            return loss

        step = torch.compile(train, backend="eager") if compiled else train
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            losses.append([step().item() for _ in range(6)])
        assert opt.info.step == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


# Beyond torch.optim


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_whole_step(name):
    """Clipping, averages in the target network, the copy: PyTorch's separate calls in one pass."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    target, average = parameters(torch.float32, 3), parameters(torch.float32, 3)
    opt = getattr(fastlr.torch, name)(
        [("a." + str(k), p) for k, p in enumerate(ours)],
        lr=0.01,
        clip_norm=0.5,
        ema=0.9,
        ema_out=target,
        shadow="bfloat16",
        skip_nonfinite=True,
        statistics=True,
    )
    reference = getattr(torch.optim, name)(theirs, lr=0.01)
    for k in range(20):
        set_gradients(ours, theirs, seed=k)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        reference.step()
        with torch.no_grad():
            for a, p in zip(average, theirs, strict=True):
                a.lerp_(p, 0.1)
        opt.step()
        assert opt.info.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert_close(ours, theirs, 2e-6)
    assert_close(target, average, 2e-6)
    assert_close(opt.shadow.values(), [p.bfloat16() for p in ours], 0)
    assert opt.ema["a.1"] is target[1] and opt.info["a.0"].update_norm > 0
    for p in ours:
        p.grad.fill_(float("inf"))
    before = [x.detach().clone() for x in (*ours, *target)]
    opt.step()
    assert opt.info.skipped and opt.skipped_steps == 1
    assert_same([*ours, *target], before)
    ours[0].data = ours[0].data.clone()
    set_gradients(ours, seed=0)
    opt.step()
    assert opt.skipped_steps == 1 and opt.info.step == 21


def test_several_dtypes_in_one_optimizer():
    """Clipping and skipping are about all of them together."""
    ours = [*parameters(torch.float32), *parameters(torch.float64, 1)]
    theirs = [*parameters(torch.float32), *parameters(torch.float64, 1)]
    groups = [{"params": ours[:7]}, {"params": ours[7:], "lr": 0.1}]
    opt = fastlr.torch.AdamW(groups, lr=0.01, clip_norm=0.5, skip_nonfinite=True, ema=0.9)
    reference = torch.optim.AdamW([{"params": theirs[:7]}, {"params": theirs[7:], "lr": 0.1}], lr=0.01)
    for k in range(10):
        set_gradients(ours, theirs, seed=k)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        opt.step()
        reference.step()
        assert opt.info.grad_norm == pytest.approx(norm.item(), rel=1e-6) and opt.info.clip_coef < 1
    assert_close(ours, theirs, 2e-6)
    assert [e.dtype for e in opt.ema] == [p.dtype for p in ours] and opt.info.step == 10
    assert opt.info.asdict()["lr/1:*"] == 0.1 and opt.info.lr == 0.01
    before = [p.detach().clone() for p in ours]
    ours[0].grad[0, 0] = float("nan")
    opt.step()
    assert_same(ours, before)
    assert opt.info.skipped and opt.skipped_steps == 1 and np.isnan(opt.info.grad_norm)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.skipped_steps == 1
    opt.param_groups[0]["clip_norm"] = 2.0
    set_gradients(ours, seed=0)
    with pytest.raises(ValueError, match="groups with different clip_norm need all parameters to be of one dtype"):
        opt.step()
    with pytest.raises(ValueError, match="scope='group' needs all parameters to be of one dtype"):
        fastlr.torch.AdamW(ours, clip_norm=1.0, scope="group").step()
    assert_same(ours, before)


def test_several_dtypes_are_unscaled_before_they_are_clipped():
    """As GradScaler asks for it: by attributes that are there for the time of a step."""
    ours, theirs = ([*parameters(torch.float32), *parameters(torch.float64, 1)] for _ in range(2))
    scaled, plain = (fastlr.torch.SGD(params, lr=0.1, clip_norm=1.0) for params in (ours, theirs))
    set_gradients(ours, theirs, seed=0)
    for p in ours:
        p.grad *= 4.0
    scaled.grad_scale, scaled.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    scaled.step()
    plain.step()
    assert_same(ours, theirs)
    assert scaled.info.grad_norm == plain.info.grad_norm > 1


def test_an_infinite_norm_of_several_dtypes():
    """Without skipping, clipping does as PyTorch's: to 0, and the element to NaN."""
    ours, theirs = ([*parameters(torch.float32), *parameters(torch.float64, 1)] for _ in range(2))
    opt, reference = fastlr.torch.SGD(ours, lr=0.1, clip_norm=1.0), torch.optim.SGD(theirs, lr=0.1)
    set_gradients(ours, theirs, seed=0)
    ours[0].grad[0, 0] = theirs[0].grad[0, 0] = float("inf")
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    opt.step()
    reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), equal_nan=True)
    assert ours[0][0, 0].isnan() and opt.info.grad_norm == float("inf")


def test_several_dtypes_follow_a_schedule():
    params = [*parameters(torch.float32), *parameters(torch.float64, 1)]
    opt = fastlr.torch.AdamW(params, lr=Cosine(0.1, steps=20), clip_norm=Linear(1.0, 0.5, steps=4))
    for k in range(4):
        set_gradients(params, seed=k)
        opt.step()
        assert opt.info.clip_coef == pytest.approx((1 - k / 8) / opt.info.grad_norm, rel=1e-4)
        assert opt.info.lr == pytest.approx(Cosine(0.1, steps=20)(k)) and opt.info.step == k + 1
    for p in params:
        p.grad = None
    opt.step()
    assert opt.info.step == 4


def test_names_need_not_be_unique():
    params = parameters()
    opt = fastlr.torch.SGD([("w", p) for p in params], lr=1.0)
    before = [p.detach().clone() for p in params]
    set_gradients(params, seed=0)
    opt.step()
    assert_same(params, [old - p.grad for old, p in zip(before, params, strict=True)])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_another_dtype(kind):
    """Where PyTorch allows it: `grad_dtype`; mixed ones are converted."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this PyTorch has no Tensor.grad_dtype")
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    opt, reference = fastlr.torch.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for p in ours:
        p.grad_dtype = kind
    for k in range(6):
        set_gradients(theirs, seed=k)
        for n, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = q.grad.to(kind).float()
            p.grad = None
            if k > 3 and n == 1:
                p.grad_dtype = torch.float32
            p.grad = q.grad.to(p.grad_dtype)
        opt.step()
        reference.step()
    assert_close(ours, theirs, 1e-6)


def test_a_fastlr_schedule():
    """Read by the kernel; saved with the state, in which PyTorch finds a number."""
    schedule = Cosine(0.1, steps=20).warmup(5)
    ours, theirs = parameters(), parameters()
    opt = fastlr.torch.AdamW(ours, lr=schedule, betas=(Linear(0.8, 0.9, steps=10), 0.999))
    reference = torch.optim.AdamW(theirs)
    for k in range(12):
        set_gradients(ours, theirs, seed=k)
        reference.param_groups[0].update(lr=schedule(k), betas=(0.8 + 0.01 * min(k, 10), 0.999))
        opt.step()
        reference.step()
        assert opt.info.lr == pytest.approx(schedule(k))
        assert opt.param_groups[0]["lr"] == schedule(k + 1) and opt.param_groups[0]["schedules"]["lr"] is schedule
    assert_close(ours, theirs)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["param_groups"][0]["lr"] == pytest.approx(schedule(12))
    torch.optim.AdamW(theirs).load_state_dict(state)
    again = fastlr.torch.AdamW(ours)
    again.load_state_dict(state)
    assert again.param_groups[0]["schedules"]["lr"] == schedule and again.param_groups[0]["lr"] == schedule(12)
    set_gradients(ours, theirs, seed=12)
    reference.param_groups[0].update(lr=schedule(12), betas=(0.9, 0.999))
    again.step()
    reference.step()
    assert_close(ours, theirs)
    again.load_state_dict(reference.state_dict())  # which knows of no schedule: it stays
    assert again.param_groups[0]["schedules"]["lr"] == schedule


# Masters and state on the host


@pytest.mark.parametrize("chunk", [None, 40], ids=["in place", "staged"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_host_optimizer(chunk, kind):
    """The native step over masters, with gradients in low precision; weights are the masters as rounded."""
    ours = parameters(kind)
    masters = [p.detach().float().numpy().copy() for p in ours]
    options = {"lr": 0.1, "skip_nonfinite": True, "ema": 0.5, "weight_decay": 0.1}
    opt = fastlr.torch.HostOptimizer(ours, chunk=chunk, **options)
    native = fastlr.AdamW(masters, **options)
    for k in range(8):
        set_gradients(ours, seed=k)
        grads = [p.grad.float().numpy() for p in ours]
        if k == 2:
            ours[1].grad, grads[1] = None, None
        if k == 4:
            ours[0].grad[0, 0] = grads[0][0, 0] = float("inf")
        opt.step()
        native.step(grads)
        assert opt.info.skipped == (k == 4) and opt.info.step == native.steps
    for p, master, average in zip(ours, masters, opt.ema, strict=True):
        np.testing.assert_array_equal(opt.state[p].get("master", p.detach()).numpy(), master)
        assert torch.equal(p.detach(), torch.from_numpy(master).to(kind)) and average.dtype is torch.float32
    np.testing.assert_array_equal(opt.ema[0].numpy(), native.ema["0"])


@pytest.mark.parametrize("chunk", [None, 40], ids=["in place", "staged"])
def test_host_optimizer_clips(chunk):
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    masters = [torch.nn.Parameter(p.detach().float()) for p in theirs]
    opt = fastlr.torch.HostOptimizer(ours, fastlr.SGD, lr=0.1, momentum=0.9, clip_norm=0.5, chunk=chunk)
    reference = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    for k in range(8):
        set_gradients(ours, theirs, seed=k)
        for m, p in zip(masters, theirs, strict=True):
            m.grad = p.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters, 0.5)
        reference.step()
        opt.step()
        assert opt.info.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_close([opt.state[p]["master"] for p in ours], masters, 1e-6)


@pytest.mark.parametrize("chunk", [None, 40], ids=["in place", "staged"])
def test_host_optimizer_of_several_dtypes(chunk):
    """Matrices in bfloat16 and norms in float32, as models have them."""
    ours = [*parameters(torch.bfloat16), *parameters(torch.float32, 1)]
    masters = [torch.nn.Parameter(p.detach().float()) for p in ours]
    groups = [{"params": ours[:3], "weight_decay": 0.5}, {"params": ours[3:]}]
    opt = fastlr.torch.HostOptimizer(groups, lr=0.01, clip_norm=0.5, skip_nonfinite=True, chunk=chunk)
    reference = torch.optim.AdamW([{"params": masters[:3], "weight_decay": 0.5}, {"params": masters[3:]}], lr=0.01)
    for k in range(6):
        set_gradients(ours, seed=k)
        for m, p in zip(masters, ours, strict=True):
            m.grad = p.grad.float().clone()
        norm = torch.nn.utils.clip_grad_norm_(masters, 0.5)
        reference.step()
        opt.step()
        assert opt.info.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_close([opt.state[p].get("master", p) for p in ours], masters, 1e-6)
    ours[6].grad[0] = float("nan")
    before = [p.detach().clone() for p in ours]
    opt.step()
    assert opt.info.skipped
    assert_same(ours, before)


@pytest.mark.parametrize("chunk", [None, 40], ids=["in place", "staged"])
def test_masters_follow_weights_that_are_written(chunk):
    ours = parameters(torch.bfloat16)
    opt = fastlr.torch.HostOptimizer(ours, lr=1e-3, chunk=chunk)
    set_gradients(ours, seed=0)
    opt.step()
    master = opt.state[ours[0]]["master"].clone()
    with torch.no_grad():
        ours[0][0] = 3.0  # one row; the others keep their low bits
    for p in ours:
        p.grad.zero_()
    ours[3].grad = None
    version = ours[3]._version
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    now = opt.state[ours[0]]["master"]
    assert (now[0] == 3.0).all() and torch.equal(now[1:], master[1:]) and (ours[0][0] == 3.0).all()
    assert ours[3]._version == version
    ours[1].data.fill_(2.0)  # nobody can see this
    opt.take_params()
    opt.step()
    assert (opt.state[ours[1]]["master"] == 2.0).all() and (ours[1] == 2.0).all()


@pytest.mark.parametrize("chunk", [None, 40], ids=["in place", "staged"])
@pytest.mark.parametrize("how", ["load", "deepcopy", "moved"])
def test_host_optimizer_goes_on(chunk, how):
    runs = []
    for stop in (False, True):
        ours = parameters(torch.bfloat16)
        opt = fastlr.torch.HostOptimizer(ours, lr=0.01, chunk=chunk)
        for k in range(10):
            if stop and k == 5:
                if how == "load":  # into weights that are still others
                    state = copy.deepcopy(opt.state_dict())
                    ours = parameters(torch.bfloat16, seed=9)
                    opt = fastlr.torch.HostOptimizer(ours, chunk=chunk)
                    opt.load_state_dict(state)
                elif how == "deepcopy":
                    ours, opt = copy.deepcopy((ours, opt))
                else:
                    for p in ours:
                        p.data = p.data.clone()
            set_gradients(ours, seed=k)
            opt.step()
        runs.append([*ours, *(opt.state[p]["master"] for p in ours)])
    assert_same(*runs)


def test_host_optimizer_places_its_memory(tmp_path):
    taken = []

    def alloc(nbytes):
        taken.append(np.memmap(tmp_path / f"{len(taken)}", np.uint8, "w+", shape=(nbytes,)))
        return taken[-1]

    ours = parameters(torch.bfloat16)
    opt = fastlr.torch.HostOptimizer(ours, lr=0.1, alloc=alloc)
    set_gradients(ours, seed=0)
    opt.step()
    elements = sum(p.numel() for p in ours)
    assert opt.nbytes == 12 * elements and len(taken) == 3
    assert any(opt.state[ours[0]]["master"].detach().numpy()[0, 0].tobytes() in bytes(part) for part in taken)
    for bad, message in (
        ({"shadow": "bfloat16"}, "HostOptimizer takes no shadow"),
        ({"rule": "adam"}, "rule must be an optimizer such as fastlr.AdamW"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fastlr.torch.HostOptimizer(ours, **bad)


def test_shapes_of_memory():
    assert tensors.is_dense(torch.ones(2, 3, 4).permute(2, 0, 1)) and tensors.is_dense(torch.ones(2, 1, 3)[:, :, :])
    assert not tensors.is_dense(torch.ones(4)[::2]) and not tensors.is_dense(torch.ones(2, 3)[:, :2])


def test_exchange_api():
    """What the library says of its tensors, in one call, is what it says one by one."""
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    given = [torch.ones(3, 4, dtype=kind).t() for kind in kinds] + [torch.ones(4, 3), torch.ones(()), torch.ones(0)]
    found = engines.EXCHANGE.describe(engines.objects(given))
    assert found[:, exchange.ADDRESS].tolist() == [t.data_ptr() for t in given]
    assert found[:, exchange.KIND].tolist() == [exchange.kind_of(tensors.name_of(t.dtype)) for t in given]
    layouts = found[:, exchange.LAYOUT].tolist()
    assert len(set(layouts[:4])) == 1 and len(set(layouts)) == 4  # the same shape, in another order: another number
    single = engines.EXCHANGE.describe(engines.objects([torch.ones(2, 3)[:1], torch.ones(1, 3)]))
    assert single[0, exchange.LAYOUT] == single[1, exchange.LAYOUT]
    with pytest.raises(TypeError, match="has no memory"):
        engines.EXCHANGE.describe(engines.objects([torch.ones(2), torch.eye(2).to_sparse()]))
    with pytest.raises(LookupError, match="int has no C exchange API of DLPack 1"):
        exchange.Exchange(int)


def test_tensors_are_found_where_nothing_is_compiled(in_subprocess):
    """The interpreter takes the place of compiled code: moved memory, gradients that are missing, a state replaced."""
    program = """
import warnings
warnings.filterwarnings("ignore", "NUMBA_DISABLE_JIT")
import torch, fastlr.torch
shapes = [(3, 2), (4,), ()]
ours, theirs = ([torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes] for _ in range(2))
mine, reference = fastlr.torch.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
for k in range(8):
    for params, opt in ((ours, mine), (theirs, reference)):
        for j, p in enumerate(params):
            p.grad = torch.full_like(p, k - 2.0 * j) if k != 2 or j else None
        if k == 3:
            params[0].data = params[0].data.clone() + 1
        if k == 5:
            opt.state[params[1]]["exp_avg"] = torch.ones_like(params[1])
        opt.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
built = mine._built
mine.step()
assert mine._built is built
try:
    fastlr.torch.engines.EXCHANGE.describe(fastlr.torch.engines.objects([torch.eye(2).to_sparse()]))
except TypeError as error:
    assert "has no memory" in str(error)
"""
    assert in_subprocess(program, NUMBA_DISABLE_JIT="1") == ""


def test_an_older_pytorch_is_refused(in_subprocess):
    program = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(Tensor=object, __version__="2.9.1")
try:
    import fastlr.torch
except ImportError as error:
    print(error)
"""
    assert "fastlr.torch needs PyTorch 2.10 or later, this is 2.9.1: pip install --upgrade torch" in in_subprocess(
        program
    )


# What follows a schedule


@pytest.mark.parametrize("how", ["no gradient", "another dtype", "add_param_group", "both"])
def test_a_parameter_that_comes_late_gets_the_rate_of_the_step(how):
    lr, n = Linear(1.0, 0.0, steps=10), 4
    a = torch.nn.Parameter(torch.zeros(1))
    b = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64 if how in ("another dtype", "both") else torch.float32))
    added = how in ("add_param_group", "both")
    opt = fastlr.torch.SGD([a] if added else [a, b], lr=lr)
    a.grad = torch.ones(1)
    for _ in range(n):
        opt.step()
    if added:
        opt.add_param_group({"params": [b]})
    b.grad = torch.ones_like(b)
    opt.step()
    assert opt.info.lr == lr(n) and b.item() == pytest.approx(-lr(n), rel=1e-6)
    again = copy.deepcopy(opt)
    again.param_groups[0]["params"][0].grad = torch.ones(1)
    again.step()
    assert again.info.lr == lr(n + 1)


def test_the_steps_are_saved_where_no_parameter_has_seen_all(tmp_path):
    lr = Linear(1.0, 0.0, steps=10)
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    opt = fastlr.torch.SGD(params, lr=lr, momentum=0.5)
    for n in range(4):
        for k, p in enumerate(params):
            p.grad = torch.ones(1) if k == n % 2 else None
        opt.step()
    torch.save(opt.state_dict(), tmp_path / "x.pt")
    again = fastlr.torch.SGD(params, lr=lr, momentum=0.5)
    again.load_state_dict(torch.load(tmp_path / "x.pt"))
    again.step()
    assert again.info.lr == lr(4)
    other = fastlr.torch.SGD(params, lr=lr, momentum=0.5)
    other.load_state_dict(fastlr.torch.SGD(params, lr=lr, momentum=0.5).state_dict())
    other.step()
    assert other.info.lr == lr(0)


def test_chunks_that_take_turns_are_steps_of_their_own():
    lr = Linear(1.0, 0.0, steps=10)
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    opt = fastlr.torch.HostOptimizer(params, fastlr.SGD, lr=lr, chunk=4)
    for n in range(6):
        for k, p in enumerate(params):
            p.grad = torch.ones(4) if n == 5 or k == n % 2 else None
        before = [p.detach().clone() for p in params]
        opt.step()
        for p, was in zip(params, before, strict=True):
            if p.grad is not None:
                torch.testing.assert_close(was - p.detach(), torch.full((4,), lr(n)))


def test_rules_that_sum_over_all_parameters_need_them_together():
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, dtype=torch.float64))]
    for p in params:
        p.grad = torch.ones_like(p)
    message = "sums over several parameters, so all must be of one dtype on one device"
    with pytest.raises(ValueError, match=message):
        fastlr.torch.Prodigy(params).step()
    two = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    for p in two:
        p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=message):
        fastlr.torch.HostOptimizer(two, fastlr.DoG, chunk=4).step()
    fastlr.torch.HostOptimizer(two, fastlr.DoG, chunk=8).step()


@pytest.mark.parametrize("kind", ["one dtype", "two dtypes", "masters", "chunks"])
def test_the_average_follows_every_parameter(kind):
    """As PyTorch's AveragedModel does, whatever has a gradient."""
    dtypes = [torch.float32, torch.float64 if kind == "two dtypes" else torch.float32]
    params = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in dtypes]
    if kind in ("masters", "chunks"):
        opt = fastlr.torch.HostOptimizer(params, fastlr.SGD, lr=0.0, ema=0.5, chunk=4 if kind == "chunks" else None)
    else:
        opt = fastlr.torch.SGD(params, lr=0.0, ema=0.5)
    assert not any(e.any() for e in opt.ema)
    with torch.no_grad():
        for p in params:
            p += 1.0
    for k, expected in enumerate([0.5, 0.75, 0.875]):
        params[0].grad = torch.zeros(4) if k == 1 else None
        opt.step()
        for e in opt.ema:
            assert e.tolist() == [expected] * 4
    assert opt.state[params[1]]["step"] == 0


def test_names_that_look_like_patterns():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
    groups = [{"params": [("*", params[0]), ("a", params[1])]}, {"params": [("*", params[2]), ("h[0]", params[3])]}]
    opt = fastlr.torch.SGD([{**groups[0], "lr": 1.0}, {**groups[1], "lr": 2.0}])
    set_gradients(params, seed=0)
    grads = [p.grad.item() for p in params]
    opt.step()
    for p, g, lr in zip(params, grads, (1.0, 1.0, 2.0, 2.0), strict=True):
        assert p.item() == pytest.approx(1.0 - lr * g, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (fastlr.torch.SGD, {"betas": (0.9, 0.99)}, "use momentum="),
        (fastlr.torch.Adam, {"max_grad_norm": 1.0}, "use clip_norm="),
        (fastlr.torch.Adam, {"tau": 0.1}, "use ema=1 - tau"),
        (fastlr.torch.Adam, {"speed": 1.0}, "'speed' is not known; there are params, lr, betas"),
        (fastlr.torch.HostOptimizer, {"rule": fastlr.Adam, "max_grad_norm": 1.0}, "use clip_norm="),
    ],
)
def test_arguments_that_other_libraries_have(make, settings, message):
    with pytest.raises(TypeError, match=message):
        make([torch.nn.Parameter(torch.ones(1))], **settings)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_gradients_that_mean_more_than_their_memory():
    masked = pytest.importorskip("torch.masked")
    p = torch.nn.Parameter(torch.ones(3))
    opt = fastlr.torch.SGD([p], lr=1.0)
    for _ in range(2):
        p.grad = masked.masked_tensor(torch.ones(3), torch.tensor([True, False, True]))
        with pytest.raises(TypeError, match="the gradient of parameter '0' is a MaskedTensor"):
            opt.step()
        p.grad = p.grad.to_tensor(0)
        opt.step()
    assert p.tolist() == [-1.0, 1.0, -1.0]


def test_groups_can_be_set_after_a_range_test():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = fastlr.torch.SGD([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1)

    def fun(_=None):
        opt.zero_grad()
        loss = ((a + b) ** 2).sum()
        loss.backward()
        return loss

    fun()
    opt.step()
    fastlr.find_lr(opt, fun)
    before = b.detach().clone()
    opt.param_groups[1]["lr"] = 0.0
    fun()
    opt.step()
    assert torch.equal(b, before) and not torch.equal(a, before)
