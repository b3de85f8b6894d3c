"""Rows: which leaves, and of which model, share counters and hyperparameters in the tables of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..kernels import counting
from ..kernels.layout import (
    ADVANCES,
    ASIDE,
    CLOCK,
    COUNTERS,
    DECIDES,
    GO,
    SHARES_ALL,
    SHARES_GROUP,
    SKIPPED,
    STEPS,
    TICKS,
    T,
)

COUNTING = counting.make(np.where, may_skip=False, asides=False)  # all that the host counts besides kernels


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of a table of integers, in order: where each is first, and for each row which of them it is.

    As `np.unique(rows, axis=0)`, which compares structured arrays and turns an interrupt into a TypeError.
    """
    order = np.lexsort(rows.T[::-1])
    new = np.ones(len(rows), bool)
    new[1:] = (rows[order[1:]] != rows[order[:-1]]).any(axis=1)
    index = np.empty(len(rows), np.int64)
    index[order] = np.cumsum(new) - 1
    return order[new], index


@dataclass
class Counts:
    """What an optimizer counts, for each leaf and model.

    Attributes:
        t: updates made, shape `(leaves, models)`.
        clock: the last step that the leaf was part of, be it frozen; it tells which parts of a step are done.
        skipped: steps that were skipped because of a gradient that is not finite.
        scalars: state of the rule that is not an element's, shape `(leaves, models, scalars)`.
        steps: steps of the optimizer itself: what schedules follow.
    """

    t: np.ndarray
    clock: np.ndarray
    skipped: np.ndarray
    scalars: np.ndarray
    steps: int = 0

    @classmethod
    def zero(cls, leaves: int, models: int, scalars: list[float]) -> Counts:
        """Nothing has happened yet.

        Args:
            leaves: number of leaves.
            models: number of models.
            scalars: the values that they start at.
        """
        t, clock, skipped = np.zeros((3, leaves, models), np.int64)
        return cls(t, clock, skipped, np.broadcast_to(np.array(scalars, np.float64), (leaves, models, len(scalars))))

    def take(self, k: int, other: Counts, j: int) -> None:
        """Let a leaf have the counts of another one's leaf `j`."""
        self.t[k], self.clock[k], self.skipped[k] = other.t[j], other.clock[j], other.skipped[j]
        self.scalars[k] = other.scalars[j]

    def agreed(self, shared: Sequence[str], configuration: np.ndarray) -> Counts:
        """These counts, with shared state taken from the leaf with the most updates among those that share it.

        Args:
            shared: as `Staged.shared`.
            configuration: as for `Rows`.
        """
        scalars = self.scalars.copy()
        for k, scope in enumerate(shared):
            groups = {"all": np.zeros_like(configuration), "group": configuration}.get(scope)
            for group in () if groups is None else np.unique(groups):
                members = np.flatnonzero(groups == group)
                first = members[self.t[members].argmax(axis=0)]
                scalars[members, :, k] = scalars[first, np.arange(len(first)), k]
        return replace(self, scalars=scalars)


class Rows:
    """Leaves that have the same hyperparameters and counts share a row.

    Args:
        configuration: for each leaf, the index of its hyperparameters.
        frozen: for each configuration and model, whether it is frozen.
        counts: of each leaf and model.
        partition: a number for each leaf; leaves with different numbers share no row, because a step of some leaves
            only, or a sum over a leaf, treats them differently. None: any leaves may share a row.

    Attributes:
        index: the row of each leaf and model.
        configuration, model, frozen: of each row.
        counters: `(rows + 1, 4)`, updated by kernels; the last row is the optimizer's own, whose clock counts steps.
        scalars: `(rows, scalars)`, updated by kernels.
        table: the settings of each row, float64; see `install`.
        h: room for what `decide` returns for each row.
        host_knows: whether `counters` and `scalars` are up to date here; never False on the CPU.
        settings_known: whether the kernels have `table` as it is here; never False on the CPU.
        captured: whether a captured graph has the addresses of these tables.
        decided_by_host: whether Python calls `decide`, rather than a kernel; only for steps on a GPU.
    """

    table: np.ndarray
    h: np.ndarray
    host_knows = True
    settings_known = True
    captured = False
    decided_by_host = False

    def __init__(
        self, configuration: np.ndarray, frozen: np.ndarray, counts: Counts, partition: np.ndarray | None
    ) -> None:
        leaves, models = counts.t.shape
        fixed = np.empty((leaves, models, 6), np.int64)
        fixed[..., 0] = configuration[:, None]
        fixed[..., 1] = np.arange(models)
        fixed[..., 2], fixed[..., 3], fixed[..., 4] = counts.t, counts.clock, counts.skipped
        fixed[..., 5] = 0 if partition is None else partition[:, None]
        bits = np.ascontiguousarray(counts.scalars).view(np.int64)
        key = np.concatenate([fixed, bits], axis=2).reshape(leaves * models, -1)
        first, index = _distinct(key)
        unique = key[first]
        self._partition = partition
        self.index = index.reshape(leaves, models)
        self.configuration, self.model = unique[:, 0], unique[:, 1]
        self.frozen = frozen[self.configuration, self.model]
        self.counters = np.zeros((len(unique) + 1, COUNTERS), np.int64)
        self.counters[:-1, T], self.counters[:-1, CLOCK], self.counters[:-1, SKIPPED] = unique[:, 2:5].T
        self.counters[:, GO] = 1
        self.counters[-1, CLOCK] = counts.steps
        self.scalars = np.ascontiguousarray(counts.scalars.reshape(leaves * models, -1)[first])

    def __len__(self) -> int:
        """Number of rows, without the optimizer's own."""
        return len(self.configuration)

    def install(self, table: np.ndarray, h: np.ndarray) -> None:
        """Use these tables from now on; see the attributes."""
        self.table, self.h = table, h

    def upload(self) -> None:
        """Let a GPU have what was changed here; nothing to do on the CPU."""

    def download(self) -> None:
        """Learn what only a GPU knows; nothing to do on the CPU."""

    def replace(self, new: Rows) -> bool:
        """Take over the counts of other rows if the same leaves share them; False if they do not."""
        same = ("index", "configuration", "model", "frozen")
        if not all(np.array_equal(getattr(self, name), getattr(new, name)) for name in same):
            return False
        self.counters[:], self.scalars[:] = new.counters, new.scalars
        return True

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return int(self.counters[-1, CLOCK])

    def counts(self) -> Counts:
        """What has been counted, for each leaf and model; copies."""
        t, clock, skipped = (self.counters[self.index, k] for k in (T, CLOCK, SKIPPED))
        return Counts(t, clock, skipped, self.scalars[self.index], self.steps)

    def split(self, active: Sequence[bool], seen: Sequence[bool]) -> np.ndarray | None:
        """A partition that separates leaves which a step treats differently; None if such leaves share no row.

        Args:
            active: for each leaf, whether it is updated if it is not frozen.
            seen: for each leaf, whether it takes part in the step at all.
        """
        leaves, models = self.index.shape
        part = np.array(active, np.int64) + 2 * np.array(seen, np.int64)
        pairs = np.stack([self.index.reshape(-1), np.repeat(part, models)], axis=1)
        if len(_distinct(pairs)[0]) == len(self):
            return None
        old = np.zeros(leaves, np.int64) if self._partition is None else self._partition
        return _distinct(np.stack([old, part], axis=1))[1]

    def advance(self, active: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """What a step does with each row, as `kernels.layout` has it; in the last row what the optimizer's clock gains.

        Args:
            active: for each leaf, whether it is updated if it is not frozen.
            seen: for each leaf, whether it takes part in the step at all; a frozen leaf can.
        """
        out = np.zeros((len(self) + 1, ADVANCES), np.int64)
        active, seen, frozen = active[:, None], seen[:, None], self.frozen[self.index]
        out[self.index, STEPS] = active & ~frozen  # leaves that differ in this have rows of their own
        out[self.index, TICKS] = active | (seen & frozen)
        out[-1, TICKS] = 1
        stepping = out[:-1, STEPS] != 0
        group = self.configuration * self.index.shape[1] + self.model
        shared = SHARES_ALL * np.isin(self.model, self.model[stepping]) + SHARES_GROUP * np.isin(group, group[stepping])
        out[:-1, ASIDE] = np.where(stepping, 0, DECIDES + shared)
        return out
