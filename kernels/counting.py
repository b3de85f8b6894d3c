"""The rule of counting: what a step does to the counters of a row, once for every backend.

`layout` says which counters a row has, and what a step plans for each row: whether it is updated (`STEPS`), whether the
step is one of it at all (`TICKS`; a frozen row ticks without being updated), and what is done for it although it is not
updated (`ASIDE`). A row whose gradient is not finite may be held back, and then none of that happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Counting(NamedTuple):
    """Functions of whole numbers, or of arrays of them.

    Attributes:
        decides: `decides(steps, ticks, aside)`: whether `decide` runs for the row.
        goes: `goes(ticks, aside, finite)`: 0 if the row is held back, else 1.
        counted: `counted(t, clock, steps, ticks, now)`: the new number of updates, and the last step that was one of
            the row, of a row that is not held back; `now` is the number of this step. Held back, steps and ticks are 0.
        skips: `skips(skipped, steps, go)`: the new number of skipped steps.
        keeps: `keeps(steps, aside, go, shared)`: whether new state of the group becomes that of the row; `shared` is
            the bit of `ASIDE` for the rows that the state is one for, 0 if it is the row's own.
        total: `total(clock, gain, stepping, going)`: the optimizer's own clock, which stands still if rows were to be
            updated (`stepping` is not 0) and all of them were held back (`going` is 0).
        begins: `begins(clock, steps, ticks, total)`: whether a step of some leaves begins a new step of the optimizer,
            since this row has already been in the present one; `total` is the optimizer's clock.
    """

    decides: Callable[..., Any]
    goes: Callable[..., Any]
    counted: Callable[..., Any]
    skips: Callable[..., Any]
    keeps: Callable[..., Any]
    total: Callable[..., Any]
    begins: Callable[..., Any]

    def mapped(self, make: Callable[[Callable[..., Any]], Any]) -> Counting:
        """The same functions as a backend compiles them."""
        return Counting(*map(make, self))


def make(where: Callable[..., Any], may_skip: bool, asides: bool) -> Counting:
    """The rule, by a backend's select.

    Args:
        where: the select.
        may_skip: whether rows can be held back.
        asides: whether anything is done for rows that are not updated.
    """

    def decides(steps: Any, ticks: Any, aside: Any) -> Any:
        return (steps != 0) | (may_skip & (ticks != 0)) | (asides & (aside != 0))

    def goes(ticks: Any, aside: Any, finite: Any) -> Any:
        return where(may_skip & ((ticks != 0) | (asides & (aside != 0))), finite, 1)

    def counted(t: Any, clock: Any, steps: Any, ticks: Any, now: Any) -> Any:
        return t + steps, where(ticks != 0, now, clock)

    def skips(skipped: Any, steps: Any, go: Any) -> Any:
        return skipped + steps * (1 - go)

    def keeps(steps: Any, aside: Any, go: Any, shared: Any) -> Any:
        return (go != 0) & ((steps != 0) | (asides & ((aside & shared) != 0)))

    def total(clock: Any, gain: Any, stepping: Any, going: Any) -> Any:
        return where((going != 0) | (stepping == 0), clock + gain, clock)

    def begins(clock: Any, steps: Any, ticks: Any, total: Any) -> Any:
        return ((steps != 0) | (ticks != 0)) & (clock >= total)

    return Counting(decides, goes, counted, skips, keeps, total, begins)
