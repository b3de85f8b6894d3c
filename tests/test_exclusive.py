"""One call at a time: nobody writes or copies an optimizer in the middle of somebody else's call."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

import fastlr
from fastlr.exclusive import enter
from fastlr.schedules import Plateau

N = 5
G = np.ones(N)


def _set_lr(opt, path):
    opt.lr = 0.5


def _set_in_a_group(opt, path):
    opt.groups["*"].lr = 0.5


# Whatever writes or copies an optimizer.
CALLS = {
    "step": lambda opt, path: opt.step({"w": G}),
    "accumulate": lambda opt, path: opt.accumulate({"w": G}),
    "zero_grad": lambda opt, path: opt.zero_grad(),
    "observe": lambda opt, path: opt.observe(1.0),
    "state_dict": lambda opt, path: opt.state_dict(),
    "load_state_dict": lambda opt, path: opt.load_state_dict(STATE),
    "snapshot": lambda opt, path: opt.snapshot(),
    "restore": lambda opt, path: opt.restore(STATE),
    "save": lambda opt, path: opt.save(path / "a.npz"),
    "load": lambda opt, path: opt.load(path / "b.npz"),
    "to": lambda opt, path: opt.to("cpu"),
    "rebuild": lambda opt, path: opt.rebuild({"w": np.zeros(N)}),
    "warmup": lambda opt, path: opt.warmup(),
    "lr": _set_lr,
    "group": _set_in_a_group,
}


def build(lr=1.0, **options):
    return fastlr.SGD({"w": np.zeros(N)}, lr=lr, momentum=0.9, groups={"*": {}}, backend="numpy", **options)


STATE = build().snapshot()


def content(opt):
    return {k: x.tobytes() for k, x in opt.snapshot().items()}


@pytest.mark.parametrize("name", CALLS)
def test_a_schedules_function_cannot_write_its_optimizer(name, tmp_path):
    build().save(tmp_path / "b.npz")
    tries = []

    def momentum(n):
        if n == 1:
            with pytest.raises(RuntimeError, match="this optimizer is in a step, or is being saved"):
                CALLS[name](opt, tmp_path)
            tries.append(n)
        return 0.9

    opt = build(lr=Plateau(1.0))
    opt.groups["*"].momentum = momentum
    twin = build(lr=Plateau(1.0))
    for _ in range(3):
        opt.step({"w": G})
        twin.step({"w": G})
    assert tries == [1]
    assert opt.params["w"].tobytes() == twin.params["w"].tobytes()
    assert opt.steps == 3
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("name", CALLS)
def test_another_thread_cannot_write_an_optimizer_in_a_step(name, tmp_path):
    build().save(tmp_path / "b.npz")
    inside, over = threading.Event(), threading.Event()

    def momentum(n):
        if threading.current_thread() is stepping:  # it is called when it is set as well
            inside.set()
            assert over.wait(60)
        return 0.9

    opt = build(lr=Plateau(1.0))
    stepping = threading.Thread(target=opt.step, args=({"w": G},))
    opt.groups["*"].momentum = momentum
    stepping.start()
    try:
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="in another thread"):
            CALLS[name](opt, tmp_path)
    finally:
        over.set()
        stepping.join()
    assert opt.params["w"].tolist() == [-1.0] * N
    assert opt.steps == 1
    CALLS[name](opt, tmp_path)  # afterwards it can


def test_a_signal_handler_cannot_step_in_the_middle_of_a_step():
    seen = []

    def handle(*_):
        try:
            opt.step({"w": G})
        except RuntimeError as error:
            seen.append(str(error))

    def lr(n):
        signal.raise_signal(signal.SIGUSR1)
        return 1.0

    opt = build(lr=lr)
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        opt.step({"w": G})
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 1
    assert "signal handler" in seen[0]
    assert opt.params["w"].tolist() == [-1.0] * N


def test_a_finalizer_cannot_step_in_the_middle_of_a_step():
    seen = []

    class Dying:
        def __del__(self):
            try:
                opt.step({"w": G})
            except RuntimeError as error:
                seen.append(error)

    alive = [Dying()]

    def lr(n):
        alive.clear()
        return 1.0

    opt = build(lr=lr)
    opt.step({"w": G})
    assert len(seen) == 1
    assert opt.params["w"].tolist() == [-1.0] * N


def test_alloc_cannot_step_the_optimizer_that_it_serves():
    seen = []

    def alloc(nbytes):
        if built:
            try:
                built[0].step({"w": G})
            except RuntimeError as error:
                seen.append(error)
        return bytearray(nbytes)

    built = []
    built.append(build(alloc=alloc))
    built[0].accumulate({"w": G})  # allocates the gradients
    built[0].step()
    assert len(seen) == 1
    assert built[0].params["w"].tolist() == [-1.0] * N


def test_whoever_is_gone_keeps_nobody_out():
    """An exception at the very line that lets others in again: the frame that held the token is gone."""
    users = {}

    def interrupted():
        enter(users)
        held = users[True]
        raise KeyboardInterrupt(held)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert users  # the token is still there
    token = enter(users)
    with pytest.raises(RuntimeError, match="this optimizer is in a step"):
        enter(users)
    assert users == {True: token}


def test_one_of_many_threads_takes_the_place_of_who_is_gone():
    for _ in range(50):
        users = {True: [-1]}  # of a thread that does not exist
        inside, turned_away = [], []
        begin, end = threading.Barrier(4), threading.Event()

        def run(users=users, inside=inside, turned_away=turned_away, begin=begin, end=end):
            begin.wait()
            try:
                token = enter(users)
            except RuntimeError:
                turned_away.append(1)
            else:
                inside.append(token)
                end.wait(60)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(inside) + len(turned_away) < 4:
            pass
        end.set()
        for thread in threads:
            thread.join()
        assert (len(inside), len(turned_away)) == (1, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_in_the_middle_of_another_threads_step_can_step(in_subprocess):
    out = in_subprocess("""
import os, threading, warnings
import numpy as np, fastlr
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
inside, over = threading.Event(), threading.Event()
def lr(n):
    if threading.current_thread() is not threading.main_thread():
        inside.set()
        over.wait(60)
    return 1.0
w, g = {"w": np.zeros(5)}, {"w": np.ones(5)}
opt = fastlr.SGD(w, lr=lr, backend="numpy")
stepping = threading.Thread(target=opt.step, args=(g,))
stepping.start()
assert inside.wait(60)
child = os.fork()
if child == 0:
    try:
        opt.step(g)
        os._exit(0 if w["w"].tolist() == [-1.0] * 5 else 1)
    except BaseException:
        os._exit(2)
over.set()
stepping.join()
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert "child 0" in out


class TestInterrupted:
    """An interrupt between a kernel and what follows it is made good by the next call."""

    @staticmethod
    def interrupt(opt, monkeypatch, call):
        """Make a call that is interrupted when its kernel is done."""

        def settle(self):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(opt._stepper), "settle", settle)
            with pytest.raises(KeyboardInterrupt):
                call()

    @pytest.mark.parametrize("read_scale", [True, False])
    def test_loss_scale(self, monkeypatch, read_scale):
        opt = build(loss_scale=fastlr.LossScale(8.0, interval=1))
        self.interrupt(opt, monkeypatch, lambda: opt.step({"w": 8 * G}))
        assert opt.steps == 1
        if read_scale:
            assert opt.loss_scale.scale == 16.0
        opt.step({"w": 16 * G})
        assert opt.params["w"].tolist() == [-2.9] * N
        assert opt.loss_scale.scale == 32.0

    def test_loss_scale_of_a_step_that_was_not_made(self, monkeypatch):
        opt = build(loss_scale=fastlr.LossScale(8.0, interval=1))

        def run(self, *_):
            raise KeyboardInterrupt

        opt.step({"w": 8 * G})
        with monkeypatch.context() as patch:
            patch.setattr("fastlr.step.plans.HostPlan.run", run)
            with pytest.raises(KeyboardInterrupt):
                opt.step({"w": 16 * G})
        assert opt.loss_scale.scale == 16.0
        assert opt.steps == 1

    def test_accumulation(self, monkeypatch):
        opt = build(zero_grads=True)
        self.interrupt(opt, monkeypatch, lambda: opt.accumulate({"w": G}))
        opt.accumulate({"w": G})
        self.interrupt(opt, monkeypatch, lambda: opt.step(grad_scale=2.0))
        assert opt.params["w"].tolist() == [-1.0] * N
        opt.accumulate({"w": G})
        assert opt.grads["w"].tolist() == [1.0] * N


def test_a_loss_scale_belongs_to_one_optimizer():
    scale = fastlr.LossScale(8.0)
    first = build(loss_scale=scale)
    with pytest.raises(ValueError, match=r"belongs to another optimizer already.*loss_scale.copy\(\)"):
        build(loss_scale=scale)
    second = build(loss_scale=scale.copy())
    second.step({"w": np.full(N, np.inf)})
    assert (first.loss_scale.scale, second.loss_scale.scale) == (8.0, 4.0)
    del first
    build(loss_scale=scale)  # nobody has it any more


def test_accumulating_is_no_step_of_the_loss_scale():
    opt = build(loss_scale=fastlr.LossScale(4.0, interval=4))
    for _ in range(3):
        opt.accumulate({"w": 4 * G})
    assert opt.loss_scale.state_dict() == {"scale": 4.0, "good": 0}
    opt.step(grad_scale=3.0)
    assert opt.loss_scale.state_dict() == {"scale": 4.0, "good": 1}


def test_what_a_moved_optimizer_is_set_to_is_checked_by_itself():
    first = build()
    first.lr = lambda n: 1.0
    second = first.to("cpu")
    del first
    with pytest.raises(ValueError, match="lr must be non-negative"):
        second.lr = lambda n: -1.0


class Meddling(float):
    """A number that does something to the optimizer when it is read."""

    def __new__(cls, value, action):
        made = super().__new__(cls, value)
        made.action = action
        return made

    def __float__(self):
        self.action()
        return 0.25


@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("lr", "group")])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_number_that_is_read_while_it_is_set_cannot_write_the_optimizer(name, grouped, tmp_path):
    build().save(tmp_path / "b.npz")
    opt, tries = build(lr=Plateau(1.0)), []

    def action():
        with pytest.raises(RuntimeError, match="this optimizer is in a step, or is being saved"):
            CALLS[name](opt, tmp_path)
        tries.append(name)

    target = opt.groups["*"] if grouped else opt
    target.lr = Meddling(0.5, action)
    assert tries == [name]
    target = opt.groups["*"] if grouped else opt
    assert target.lr == 0.25
    opt.step({"w": G})
    assert opt.params["w"].tolist() == [-0.25] * N
