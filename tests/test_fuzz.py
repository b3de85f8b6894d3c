"""Random input of every kind, the same in every run: nothing but what is promised comes of it.

Many more are made by `python -m tests.fuzz --minutes 10`.
"""

from __future__ import annotations

import pytest
from fuzz import arguments, files, interrupts, reentry, threads
from fuzz.promises import run

SEED = 1


def check(kind, trial, inputs, part=0):
    report = run(kind, trial, SEED, first=part * 100_000, inputs=inputs)
    print(report)
    assert report.inputs >= inputs
    assert not report.broken, str(report)


@pytest.mark.parametrize("part", range(3))
def test_odd_arguments(part):
    check("arguments", arguments.trial, 1000, part)


@pytest.mark.parametrize("part", range(2))
def test_damaged_files_and_states(part):
    check("files", files.trial, 400, part)


@pytest.mark.parametrize(
    "calls", ["step", "own", "accumulate", "load", "restore", "rebuild", "set", "compiled", "torch"]
)
def test_exceptions_at_any_line(calls):
    if calls == "torch":
        pytest.importorskip("torch")
    check("interrupts", interrupts.trial_of(calls), 400 if calls == "step" else 100)


def test_calls_from_several_threads():
    check("threads", threads.trial, 2500)


@pytest.mark.parametrize("calls", ["step, first", "step, later", "step, loss scale", "accumulate, second", "restore"])
def test_calls_inside_calls(calls):
    check("reentry", reentry.trial_of(calls), 50)


@pytest.mark.parametrize("caller", reentry.CALLERS)
def test_calls_from_what_a_step_calls(caller):
    for steps in range(3):
        for inner in reentry.INNER:
            reentry.called_from(caller, steps, inner)
