"""Threads, forks and neighbours: never an abort or a hang, and the same bits."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

import numpy as np
import pytest

import fastlr
from fastlr.exclusive import exclusive
from fastlr.kernels import helpers, vectors
from fastlr.kernels.notices import warn_once
from fastlr.step import threads

PRELUDE = """
import os, signal, sys, threading, time
import numpy as np, numba, fastlr
from fastlr.step import plans
plans._WORTH_WAKING = 0          # helpers for every step
N = 200_003
def fresh(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(N).astype(np.float32), rng.standard_normal(N).astype(np.float32)
def expected(seed, steps):
    p, g = fresh(seed)
    opt = fastlr.Adam(p, threads=1)
    for _ in range(steps): opt.step(g)
    return p
"""

LAYERS = ["default", "workqueue", "omp", "tbb"]


def with_layer(layer: str) -> dict[str, str]:
    return {} if layer == "default" else {"NUMBA_THREADING_LAYER": layer}


def loads(in_subprocess, layer: str) -> bool:
    program = """
import numba
@numba.njit(parallel=True)
def f(n):
    s = 0
    for i in numba.prange(n): s += i
    return s
try:
    f(10); print("yes")
except ValueError:
    print("no")
"""
    return "yes" in in_subprocess(program, **with_layer(layer))


@pytest.mark.parametrize("layer", LAYERS)
def test_several_threads_and_foreign_parallel_code(layer, in_subprocess):
    """Different optimizers from several Python threads, beside a user's own parallel Numba code.

    Under workqueue Numba itself aborts when two threads are in *its* parallel code, so there only one is.
    """
    if not loads(in_subprocess, layer):
        pytest.skip(f"Numba's threading layer {layer} does not load here")
    out = in_subprocess(
        PRELUDE
        + """
@numba.njit(parallel=True)
def foreign(x):
    for i in numba.prange(x.size): x[i] += 1.0
stop = False
def neighbour():
    x = np.zeros(100_000)
    while not stop: foreign(x)
results = {}
def train(seed):
    p, g = fresh(seed)
    opt = fastlr.Adam(p, threads=3)
    for _ in range(60): opt.step(g)
    results[seed] = p
foreign(np.zeros(10))
beside = threading.Thread(target=neighbour); beside.start()
workers = [threading.Thread(target=train, args=(s,)) for s in range(4)]
for w in workers: w.start()
for w in workers: w.join()
stop = True; beside.join()
for s in range(4): assert np.array_equal(results[s], expected(s, 60)), s
print("done")
""",
        **with_layer(layer),
    )
    assert "done" in out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("layer", LAYERS)
def test_fork_after_a_step(layer, in_subprocess):
    if not loads(in_subprocess, layer):
        pytest.skip(f"Numba's threading layer {layer} does not load here")
    out = in_subprocess(
        PRELUDE
        + """
p, g = fresh(0)
opt = fastlr.Adam(p, threads=2)
for _ in range(5): opt.step(g)
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        assert fastlr.kernels.helpers.pool.started == 0
        for _ in range(20): opt.step(g)
        assert fastlr.kernels.helpers.pool.started == 1
        good = np.array_equal(p, expected(0, 25))
        other, h = fresh(1)
        another = fastlr.Adam(other, threads=2)
        for _ in range(5): another.step(h)
        os._exit(0 if good and np.array_equal(other, expected(1, 5)) else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
for _ in range(20): opt.step(g)
assert np.array_equal(p, expected(0, 25))
print("done")
""",
        **with_layer(layer),
    )
    assert "done" in out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_a_helper_looks_in(in_subprocess):
    """A helper that was counted at the moment of the fork does not exist in the child, and nobody waits for it."""
    out = in_subprocess(
        PRELUDE
        + """
from fastlr.kernels.cpu import HELPERS, WAITING
p, g = fresh(0)
opt = fastlr.Adam(p, threads=2)
opt.step(g)
time.sleep(0.2)
control = next(iter(opt._stepper.plans.values()))._control
control[HELPERS] += 1; control[WAITING] += 1
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    for _ in range(5): opt.step(g)
    os._exit(0 if np.array_equal(p, expected(0, 6)) else 1)
_, status = os.waitpid(pid, 0)
assert status == 0, status
print("done")
"""
    )
    assert "done" in out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_compiles(in_subprocess, tmp_path):
    """The child compiles, steps and searches; and so does the parent."""
    out = in_subprocess(
        PRELUDE
        + """
from numba.core.compiler_lock import global_compiler_lock
def compiles():
    if global_compiler_lock._lock.acquire(blocking=False):
        global_compiler_lock._lock.release()
        return False
    return True
def train(**settings):
    p = np.zeros(3)
    opt = fastlr.SGD(p, lr=0.5, threads=2, **settings)
    opt.step(np.ones(3))
    return p.tolist() == [-0.5] * 3 and not opt._stepper.kernel().cached
done = []
thread = threading.Thread(target=lambda: done.append(train())); thread.start()
while not compiles(): time.sleep(0.001)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    good = train(clip_value=2.0)
    x = np.ones(300_000)
    scale = fastlr.LossScale(); scale.update(True)
    good &= fastlr.kernels.vectors.dot(x, x, 2) == 300_000.0 and scale.scale == 2.0**15
    os._exit(0 if good else 1)
_, status = os.waitpid(pid, 0)
assert status == 0, status
thread.join()
assert done == [True] and numba.njit("i8(i8)")(lambda x: x + 1)(1) == 2
print("done")
""",
        FASTLR_CACHE_DIR=str(tmp_path),
    )
    assert "done" in out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_a_compilation_waits_for_the_thread_that_forks(in_subprocess):
    """The fork does not wait for ever, and the child has locks of its own."""
    out = in_subprocess(
        PRELUDE
        + """
from numba.core.compiler_lock import global_compiler_lock
threads = fastlr.step.threads
threads._FORK_PATIENCE = 0.1
begun, forked = threading.Event(), threading.Event()
def compile():
    with global_compiler_lock:
        begun.set(); forked.wait(60)
thread = threading.Thread(target=compile); thread.start(); begun.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    numba.njit("i8(i8)")(lambda x: x + 1)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, status
forked.set(); thread.join()
numba.njit("i8(i8)")(lambda x: x + 1)
print("done")
"""
    )
    assert "done" in out


def test_one_optimizer_in_two_threads_raises(in_subprocess):
    out = in_subprocess(
        PRELUDE
        + """
rng = np.random.default_rng(0)
p = rng.standard_normal(4_000_000); g = rng.standard_normal(4_000_000)
opt = fastlr.Adam(p, threads=1)
opt.step(g)
refused = []
done = False
def other():
    while not done:
        try: opt.step(g)
        except RuntimeError as error: refused.append(str(error))
thread = threading.Thread(target=other); thread.start()
made = 0
while not refused and made < 2000:
    try: opt.step(g); made += 1
    except RuntimeError as error: refused.append(str(error))
done = True; thread.join()
assert "this optimizer is in a step in another thread" in refused[0], refused
before = opt.steps
opt.step(g)
assert opt.steps == before + 1
print("done")
"""
    )
    assert "done" in out


def test_a_step_releases_the_gil(in_subprocess):
    out = in_subprocess(
        PRELUDE
        + """
p, g = np.ones(30_000_000, np.float32), np.ones(30_000_000, np.float32)
opt = fastlr.SGD(p, threads=1); opt.step(g)
ticks = 0; done = False
def count():
    global ticks
    while not done:
        ticks += 1; time.sleep(0)
sys.setswitchinterval(1000)      # nobody gets the GIL unless it is given up
thread = threading.Thread(target=count); thread.start()
for _ in range(20): opt.step(g)
done = True; thread.join()
assert ticks > 20, ticks
print("done")
"""
    )
    assert "done" in out


def test_ctrl_c_leaves_a_usable_optimizer(in_subprocess):
    """The signal comes again and again, anywhere; counters and parameters always agree afterwards."""
    out = in_subprocess(
        PRELUDE
        + """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
p, g = fresh(0)
opt = fastlr.Adam(p, threads=2); opt.step(g)
main = threading.main_thread().ident
done = False
def press():
    while not done:
        time.sleep(0.0007); signal.pthread_kill(main, signal.SIGINT)
interrupted = 0
thread = threading.Thread(target=press)
try:
    thread.start()
except KeyboardInterrupt:
    pass
end = time.time() + 3
while time.time() < end:
    try:
        while time.time() < end: opt.step(g)
    except KeyboardInterrupt:
        interrupted += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
done = True
thread.join()
assert interrupted > 50, interrupted
opt.step(g)
assert np.array_equal(p, expected(0, opt.steps)), opt.steps
print("done", interrupted, opt.steps)
"""
    )
    assert "done" in out


def test_the_program_ends_with_helpers_asleep_and_awake(in_subprocess):
    for wait in ("", "time.sleep(0.05)"):
        in_subprocess(
            PRELUDE + "p, g = fresh(0)\nopt = fastlr.Adam(p, threads=4)\nfor _ in range(50): opt.step(g)\n" + wait,
            timeout=60,
        )


def test_number_of_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "_threads", None)
    assert fastlr.get_num_threads() == threads.available_cpus() >= 1
    fastlr.set_num_threads(3)
    assert fastlr.get_num_threads() == 3
    opt = fastlr.SGD(np.ones(3))
    opt.step(np.ones(3))
    fastlr.set_num_threads(5)
    opt.step(np.ones(3))
    assert opt.steps == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
        ({}, None),
    ],
)
def test_cgroup_quota(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._cgroup_quota(tmp_path) == expected


def test_quota_limits_the_threads(monkeypatch):
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: 0.5)
    assert threads.available_cpus() == 1


@pytest.mark.parametrize("elements", [1_000, 100_000])
def test_more_threads_than_there_is_work_for(elements, monkeypatch):
    """What is made for them follows what is used, and the result is the same."""
    from fastlr.step import plans

    asked = []
    monkeypatch.setattr(plans, "_WORTH_WAKING", 0)
    monkeypatch.setattr(helpers, "ask", lambda count, work: asked.append(count))
    results = []
    for count in (1, 10**7, 10**18):
        p, g = np.zeros(elements), np.arange(1.0, 1.0 + elements)
        opt = fastlr.SGD(p, lr=1.0, threads=count)
        opt.step(g)
        (plan,) = opt._stepper.plans.values()
        assert plan._control.nbytes < 2_000
        results.append(p)
    assert all(np.array_equal(p, results[0]) for p in results)
    many = fastlr.SGD([np.zeros(1) for _ in range(400)], threads=1_000)
    many.step([np.ones(1) for _ in range(400)])
    assert asked == ([255] if elements < 16_384 else [6, 6, 255])


def test_no_thread_can_be_started(monkeypatch):
    """The step goes on alone, with one warning, and another try later."""
    from fastlr.step import plans

    monkeypatch.setattr(plans, "_WORTH_WAKING", 0)
    monkeypatch.setattr(helpers, "pool", helpers.Pool())
    warn_once.cache_clear()
    tries = []

    def refuse(thread):
        tries.append(thread)
        raise RuntimeError("can't start new thread")

    p, g = np.zeros(100_000), np.ones(100_000)
    opt = fastlr.SGD(p, lr=1.0, threads=4)
    x = np.ones(300_000)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.warns(RuntimeWarning, match="no helper thread can be started \\(can't start new thread\\)"):
            opt.step(g)
        for _ in range(4):
            opt.step(g)
        assert len(tries) == 1 and (p == -5.0).all()
        helpers.pool.not_before = 0.0
        opt.step(g)
        assert len(tries) == 2
        assert vectors.dot(x, x, 4) == 300_000.0
        vectors.combine(x, x, 2.0, x, 4)
    helpers.pool.not_before = 0.0
    opt.step(g)
    assert helpers.pool.started == 3 and (p == -7.0).all()
    vectors.combine(x, x, 1.0, x, 4)
    assert (x == 6.0).all()


def test_a_pass_waits_for_shares_that_helpers_have_taken(monkeypatch):
    """It raises what went wrong in them; a helper that never comes keeps nobody waiting."""
    caller, taken, broken = threading.current_thread(), threading.Event(), []

    def run(out, x, a, y, z, sums, first, last):
        if threading.current_thread() is caller:
            taken.wait(30)
        else:
            taken.set()
            time.sleep(0.1)
            if broken:
                raise MemoryError("no room for lanes")
        sums[first:last] = 1.0

    monkeypatch.setattr(vectors, "_pass", lambda name, dtype: run)
    x = np.ones(300_000)
    blocks = -(-x.size // vectors.BLOCK)
    assert vectors.dot(x, x, 2) == blocks
    taken.clear()
    broken.append(True)
    with pytest.raises(MemoryError, match="no room for lanes"):
        vectors.dot(x, x, 2)
    monkeypatch.setattr(helpers, "ask", lambda count, work: None)
    assert vectors.dot(x, x, 2) == blocks


def test_helpers_are_shared_and_few(monkeypatch):
    from fastlr.step import plans

    monkeypatch.setattr(plans, "_WORTH_WAKING", 0)
    for _ in range(5):
        p = np.ones(100_000)
        opt = fastlr.SGD(p, threads=3)
        for _ in range(5):
            opt.step(np.ones(100_000))
    found = [t for t in threading.enumerate() if t.name.startswith("fastlr-")]
    assert 2 <= len(found) <= 8 and all(t.daemon for t in found)


def test_one_call_at_a_time():
    """Whoever finds a call under way may see it return, or a generator in it wait, at that very moment."""

    class Guarded:
        def __init__(self):
            self._users, self.inside = {}, []

        def _settle(self):
            pass

        @exclusive
        def call(self, items):
            self.inside.append(1)
            most = len(self.inside)
            most = max(most, *(len(self.inside) for _ in range(items)))
            self.inside.pop()
            return most

    guarded, most = Guarded(), []

    def work(items):
        start.wait()
        for _ in range(5000):
            with contextlib.suppress(RuntimeError):
                most.append(guarded.call(items))

    counts = (1, 4, 16, 40)
    start = threading.Barrier(len(counts))
    workers = [threading.Thread(target=work, args=(items,)) for items in counts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert max(most) == 1
    assert not guarded.inside
