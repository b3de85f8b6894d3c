"""The kernel of one block that finishes a pass: it adds up over tiles, decides and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import types

from . import counting, loss_scaling
from .element import staged_function
from .functions import IN_SCHEDULES, for_kernels
from .grid import (
    ADD,
    ADVANCE,
    CELLS,
    COMMIT,
    COUNTS,
    DECIDE,
    FIRST_ROWS,
    FLAGS,
    LEVEL_COUNT,
    LEVELS,
    LOSS,
    LOSS_RULE,
    MODELS,
    MODELS_OF_ROWS,
    PROGRAM,
    REPORTS,
    ROOTS,
    ROWS,
    SCALARS,
    SETTINGS,
    H,
)
from .layout import ADVANCES, CLOCK, COUNTERS, GO, SHARED, SKIPPED, STEPS, TICKS, T
from .primitives import SCOPES
from .staging import Staged, define
from .storage import Storage
from .target import Body, Target

__all__ = ["finish"]

THREADS = 512


class Formula(Protocol):
    """A setting that follows from the number of the step, see `fastlr.step.scheduled.Formula`."""

    @property
    def uniform(self) -> str:
        """Its name among those that `decide` takes."""

    @property
    def source(self) -> str:
        """Defines `value(n, p)`."""

    @property
    def first(self) -> int:
        """Where its numbers begin among those of the row."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def functions(self) -> Sequence[tuple[str, Callable[..., Any]]]:
        """The user's own functions, by the names that the source calls."""


class _Access(NamedTuple):
    """How a kernel reads and writes the tables of the board.

    Attributes:
        get: `get(board, place)`: what stands in the board.
        integer, number: `integer(address)`, `number(address)`.
        put_integer, put_number: `put_integer(address, value)`, `put_number(address, value)`.
    """

    get: Any
    integer: Any
    number: Any
    put_integer: Any
    put_number: Any


def _access(target: Target) -> _Access:
    integers, numbers = target.row("int64", 1), target.row("float64", 1)

    def get(board: int, place: int) -> Any:
        return integers(board + place * 8)[0]

    def integer(address: int) -> Any:
        return integers(address)[0]

    def number(address: int) -> Any:
        return numbers(address)[0]

    make = target.function
    return _Access(make(get), make(integer), make(number), target.put("int64"), target.put("float64"))


def finish(target: Target, staged: Staged, storage: Storage, formulas: Sequence[Formula] = ()) -> Body:
    """The kernel of one block that adds up over tiles, decides and counts: `(board, low, high, what)`.

    Args:
        target: what it is made of.
        staged: the rule.
        storage: how its columns stand in memory.
        formulas: settings that follow from the number of the step.
    """
    get = _access(target).get
    tally = counting.make(target.where, staged.may_skip, staged.asides).mapped(target.function)
    add, begin = _addition(target, staged.quantities), _beginning(target, tally)
    decide, settle = _deciding(target, staged, storage, formulas, tally), _settling(target, staged, tally)
    each_add = target.each(add, 4, THREADS)
    each_begin = target.each(begin, 1, THREADS)
    each_decide = target.each(decide, 2, THREADS)
    each_settle = target.each(settle, 1, THREADS, wait=False)

    def run(block: int, room: Any, board: int, low: int, high: int, what: int) -> None:
        if what & ADD != 0:
            level, levels = 0, get(board, LEVEL_COUNT)
            while level < levels:
                each_add(board, level, low, high)
                level += 1
        if what & DECIDE != 0:
            each_begin(board)
            each_decide(board, what)
        if what & COMMIT != 0:
            each_settle(board)

    return Body("finish", run, (types.int64,) * 4, THREADS)


def _addition(target: Target, quantities: int) -> Any:
    """`add(thread, board, level, low, high)`: the additions of a level, for some quantities."""
    get, integer, number, _, put_number = _access(target)
    three = target.row("int64", 3)

    def add(thread: int, board: int, level: int, low: int, high: int) -> None:
        levels, cells, program = get(board, LEVELS), get(board, CELLS), get(board, PROGRAM)
        k, end = integer(levels + level * 8) + thread, integer(levels + level * 8 + 8)
        while k < end:
            to, first, second = three(program + k * 24)
            q = low
            while q < high:
                x = number(cells + (first * quantities + q) * 8)
                if second >= 0:
                    x = x + number(cells + (second * quantities + q) * 8)
                put_number(cells + (to * quantities + q) * 8, x)
                q += 1
            k += THREADS

    return target.function(add)


def _beginning(target: Target, tally: counting.Counting) -> Any:
    """`begin(thread, board)`: find out whether the step of a part begins a new step of the optimizer."""
    get, integer, _, put_integer, _ = _access(target)
    part, begins = _part(target), tally.begins

    def begin(thread: int, board: int) -> None:
        rows, counts, advance = get(board, ROWS), get(board, COUNTS), get(board, ADVANCE)
        if part(board) != 0:
            total = integer(counts + (rows * COUNTERS + CLOCK) * 8)
            r = thread
            while r < rows:
                planned = advance + r * ADVANCES * 8
                clock = integer(counts + (r * COUNTERS + CLOCK) * 8)
                if begins(clock, integer(planned + STEPS * 8), integer(planned + TICKS * 8), total):
                    put_integer(get(board, FLAGS) + 16, 1)
                r += THREADS

    return target.function(begin)


def _part(target: Target) -> Any:
    """`part(board)`: whether it is a step of a part, which is told in the optimizer's own row."""
    get, integer, _, _, _ = _access(target)

    def part(board: int) -> Any:
        return integer(get(board, ADVANCE) + (get(board, ROWS) * ADVANCES + STEPS) * 8)

    return target.function(part)


def _gain(target: Target) -> Any:
    """`gain(board)`: what the step adds to the optimizer's clock."""
    get, integer, _, _, _ = _access(target)
    part = _part(target)

    def gain(board: int) -> Any:
        if part(board) != 0:
            return integer(get(board, FLAGS) + 16)
        return integer(get(board, ADVANCE) + (get(board, ROWS) * ADVANCES + TICKS) * 8)

    return target.function(gain)


def _deciding(
    target: Target, staged: Staged, storage: Storage, formulas: Sequence[Formula], tally: counting.Counting
) -> Any:
    """`decide_rows(thread, board, what)`: `decide` for the rows that need it; with `COMMIT`, count as well."""
    get, integer, _, put_integer, _ = _access(target)
    may_skip = staged.may_skip
    decide_row, gain = _decide_row(target, staged, storage, formulas, tally), _gain(target)
    decides, counted, skips = tally.decides, tally.counted, tally.skips
    plan_at = target.row("int64", ADVANCES)  # STEPS, TICKS, ASIDE

    def decide_rows(thread: int, board: int, what: int) -> None:
        rows, counts, advance, flags = get(board, ROWS), get(board, COUNTS), get(board, ADVANCE), get(board, FLAGS)
        now = integer(counts + (rows * COUNTERS + CLOCK) * 8) + gain(board)
        r = thread
        while r < rows:
            planned, counters = advance + r * ADVANCES * 8, counts + r * COUNTERS * 8
            go = 1
            steps, ticks, aside = plan_at(planned)
            if decides(steps, ticks, aside):
                go = decide_row(board, r, now - 1 if now > 0 else 0, planned, what & COMMIT)
            if what & COMMIT != 0:
                # Read anew: registers that last through `decide` are few.
                steps, ticks, aside = plan_at(planned)
                t, clock = counted(
                    integer(counters + T * 8), integer(counters + CLOCK * 8), steps * go, ticks * go, now
                )
                put_integer(counters + T * 8, t)
                put_integer(counters + CLOCK * 8, clock)
                if may_skip:
                    put_integer(counters + GO * 8, go)
                    put_integer(counters + SKIPPED * 8, skips(integer(counters + SKIPPED * 8), steps, go))
                if steps != 0:
                    put_integer(flags + 8, 1)
                    if go != 0:
                        put_integer(flags, 1)
            r += THREADS

    return target.function(decide_rows)


def _settling(target: Target, staged: Staged, tally: counting.Counting) -> Any:
    """`settle(thread, board)`: advance the optimizer's own clock and the loss scale of each model."""
    get, integer, number, put_integer, put_number = _access(target)
    total, gain, may_skip = tally.total, _gain(target), staged.may_skip
    rescale, four = target.function(loss_scaling.make(target.where)), target.row("float64", 4)

    def settle(thread: int, board: int) -> None:
        rows, counts, flags = get(board, ROWS), get(board, COUNTS), get(board, FLAGS)
        own = counts + (rows * COUNTERS + CLOCK) * 8
        if thread == 0:
            put_integer(own, total(integer(own), gain(board), integer(flags + 8), integer(flags)))
            put_integer(flags, 0)
            put_integer(flags + 8, 0)
            put_integer(flags + 16, 0)
        loss = get(board, LOSS)
        if may_skip and loss != 0:
            growth, backoff, interval, smallest = four(get(board, LOSS_RULE))
            first_rows, models = get(board, FIRST_ROWS), get(board, MODELS)
            m = thread
            while m < models:
                r = integer(first_rows + m * 8)
                skipped = False
                if r >= 0:
                    skipped = integer(counts + (r * COUNTERS + GO) * 8) == 0
                scale, good = number(loss + m * 8), number(loss + (models + m) * 8)
                put_number(loss + (2 * models + m) * 8, scale)
                scale, good = rescale(scale, good, skipped, growth, backoff, interval, smallest)
                put_number(loss + m * 8, scale)
                put_number(loss + (models + m) * 8, good)
                m += THREADS

    return target.function(settle)


def _decide_row(
    target: Target, staged: Staged, storage: Storage, formulas: Sequence[Formula], tally: counting.Counting
) -> Any:
    """`decide_row(board, r, step, planned, commit)`: decide for one row; 0 if it is held back, else 1.

    `planned` is the address of the row's part of the table `ADVANCE`. With `commit`, new state of the group is kept.
    """
    get, integer, _, _, put_number = _access(target)
    plan_at = target.row("int64", ADVANCES)  # STEPS, TICKS, ASIDE
    slots, scalars, reports, compute = staged.slots, len(staged.scalars), len(staged.reports), storage.compute
    slot, size = np.dtype(compute).type, np.dtype(compute).itemsize
    finite = slots + scalars + staged.reports.index("finite") if staged.may_skip else 0
    shared = (*(SHARED.get(scope, 0) for scope in staged.shared), 0)
    decide = staged_function(target, staged.decide, "decide")
    uniforms, sums = _uniforms(target, staged, formulas), _sums(target, staged)
    state, put_slot = target.row("float64", scalars), target.put(compute)
    goes, keeps = tally.goes, tally.keeps

    def decide_row(board: int, r: int, step: int, planned: int, commit: int) -> Any:
        t = integer(get(board, COUNTS) + (r * COUNTERS + T) * 8) + 1
        h, x, report = get(board, H) + r * slots * size, get(board, SCALARS) + r * scalars * 8, get(board, REPORTS)
        v = decide(t, *uniforms(board, r, np.float64(step)), *state(x), *sums(board, r))
        for k in range(slots):
            put_slot(h + k * size, slot(v[k]))
        for k in range(reports):
            put_number(report + (r * reports + k) * 8, np.float64(v[slots + scalars + k]))
        steps, ticks, aside = plan_at(planned)
        go = goes(ticks, aside, np.int64(v[finite] != 0.0))
        for k in range(scalars):
            if commit != 0 and keeps(steps, aside, go, shared[k]):
                put_number(x + k * 8, np.float64(v[slots + k]))
        return go

    return target.function(decide_row)


def _uniforms(target: Target, staged: Staged, formulas: Sequence[Formula]) -> Any:
    """`uniforms(board, r, n)`: what `decide` takes of the settings of a row in step `n`."""
    get, integer, number, _, _ = _access(target)
    count = len(staged.uniforms)
    first = max(1, count)
    width = first + sum(f.count for f in formulas)
    read = target.row("float64", width)
    values = [f"u[{k}]" for k in range(count)]
    namespace: dict[str, Any] = {}
    known = for_kernels(IN_SCHEDULES, target.where, target.function, target.gpu)
    for f in formulas:
        own = {name: target.function(function) for name, function in f.functions}
        namespace[f"formula_{f.uniform}"] = target.function(define(f.source, "value", {**known, **own}))
        values[staged.uniforms.index(f.uniform)] = (
            f"formula_{f.uniform}(n, u[{first + f.first} : {first + f.first + f.count}])"
        )
    if "grad_scale" in staged.uniforms:
        values[staged.uniforms.index("grad_scale")] += " * scale"
    text = f"def taken(u, n, scale):\n    return ({''.join(f'{value}, ' for value in values)})"
    taken = target.function(define(text, "taken", namespace))

    def scale_of(board: int, r: int) -> Any:
        """The loss scale of the row's model."""
        loss = get(board, LOSS)
        if loss == 0:
            return 1.0
        return number(loss + integer(get(board, MODELS_OF_ROWS) + r * 8) * 8)

    def no_scale(board: int, r: int) -> Any:
        return 1.0

    scale = target.function(scale_of if "grad_scale" in staged.uniforms else no_scale)

    def uniforms(board: int, r: int, n: Any) -> Any:
        return taken(read(get(board, SETTINGS) + r * width * 8), n, scale(board, r))

    return target.function(uniforms)


def _sums(target: Target, staged: Staged) -> Any:
    """`sums(board, r)`: the sums that `decide` takes, of a row."""
    get, _, number, _, _ = _access(target)
    quantities, scopes = staged.quantities, len(SCOPES)
    kinds = staged.kinds
    read = target.row("int64", scopes)

    def total(cells: int, root: int, quantity: int) -> Any:
        return number(cells + (root * quantities + quantity) * 8) if root >= 0 else 0.0

    total = target.function(total)

    def norm(cells: int, root: int, quantity: int) -> Any:
        return math.sqrt(total(cells, root, quantity))

    values = [f"{kinds[q]}(cells, roots[{SCOPES.index(scope)}], {q})" for q, scope in staged.sums]
    text = f"def taken(cells, roots):\n    return ({''.join(f'{value}, ' for value in values)})"
    taken = target.function(define(text, "taken", {"total": total, "norm": target.function(norm)}))

    def sums(board: int, r: int) -> Any:
        return taken(get(board, CELLS), read(get(board, ROOTS) + r * scopes * 8))

    return target.function(sums)
