"""What a step did: the rates, and whatever norms were taken on the way."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..kernels.sums import fold

__all__ = ["LeafInfo", "StepInfo"]


@dataclass(frozen=True)
class Layout:
    """Where a plan keeps what a step reported, so that it can be read when somebody asks.

    Attributes:
        paths: of the leaves.
        population: number of models, or None.
        entry: the entry in the sums of each leaf and model, -1 if the step left it alone.
        rows: the row in the reports of each leaf and model.
        reports: the names of the reports.
        norms: name to column of the sums of squares.
    """

    paths: Sequence[str]
    population: int | None
    entry: np.ndarray
    rows: np.ndarray
    reports: tuple[str, ...]
    norms: Mapping[str, int]


class LeafInfo(NamedTuple):
    """What a step found out about one leaf; in a population arrays of one number a model.

    A number is None if the step did not take it, and NaN if the leaf was not updated.

    Attributes:
        grad_norm: norm of the gradient, unscaled and before clipping; with `clip_norm`, `skip_nonfinite` or
            `statistics`.
        param_norm: norm of the parameters after the step; with `statistics`.
        update_norm: norm of what the step added to the parameters; with `statistics`.
        clip_coef: what the gradient was multiplied by to clip it, 1 if it was not; with `clip_norm`.
    """

    grad_norm: Any
    param_norm: Any
    update_norm: Any
    clip_coef: Any


class StepInfo:
    """What a step did; read-only. `info["layer.w"]` has the norms of one leaf (`LeafInfo`)."""

    __slots__ = ("_grad_scale", "_layout", "_lrs", "_reports", "_step", "_sums")

    def __init__(
        self,
        step: int,
        lrs: Mapping[str, Any],
        layout: Any = None,
        reports: Any = None,
        sums: Any = None,
        grad_scale: Any = 1.0,
    ) -> None:
        self._step, self._lrs = step, lrs
        self._layout, self._reports, self._sums, self._grad_scale = layout, reports, sums, grad_scale

    def __reduce__(self) -> Any:
        """For copies and pickles: plain numbers, with the rates as they were."""
        return StepInfo, (self.step, dict(self.lrs), self._layout, self._reports, self._sums, self._grad_scale)

    @property
    def step(self) -> int:
        """Number of the step, from 1; skipped steps do not count."""
        return self._step

    @property
    def lrs(self) -> Mapping[str, Any]:
        """The learning rate of each group by pattern, and under "" that of all other leaves."""
        return self._lrs

    @property
    def lr(self) -> Any:
        """The learning rate used; an array `(population,)` if it differs between models; None if the rule has none."""
        return self.lrs[""]

    def _plain(self, per_model: np.ndarray) -> Any:
        """One number a model in the form that users get."""
        return per_model if self._layout.population is not None else per_model[0].item()

    def _reported(self, name: str) -> np.ndarray | None:
        """A report for each leaf and model, NaN where there is none."""
        layout = self._layout
        if layout is None or name not in layout.reports:
            return None
        values = self._reports[layout.rows, layout.reports.index(name)]
        return np.where(layout.entry >= 0, values, np.nan)

    def _first(self, values: np.ndarray, default: float) -> np.ndarray:
        """For each model, the value of the first leaf that is in the step; the default if none is."""
        there: np.ndarray = self._layout.entry >= 0
        return np.where(there.any(axis=0), values[there.argmax(axis=0), np.arange(values.shape[1])], default)

    def _norms(self, name: str) -> np.ndarray | None:
        """A norm of each leaf and model, NaN where it was not updated."""
        layout = self._layout
        if layout is None or name not in layout.norms:
            return None
        squares = np.append(self._sums[:, layout.norms[name]], np.nan)[layout.entry]  # -1: the NaN at the end
        if name == "grad_norm":
            return np.sqrt(squares) / self._grad_scale
        finite = self._reported("finite")
        return np.sqrt(squares) if finite is None else np.where(finite != 0, np.sqrt(squares), np.nan)

    @property
    def grad_norm(self) -> Any:
        """Norm of the whole gradient, unscaled and before clipping; None if nothing asked for it.

        NaN if nothing was updated: of a model that is frozen, say.
        """
        norms = self._reported("grad_norm")
        if norms is not None:
            return self._plain(self._first(norms, np.nan))
        layout = self._layout
        if layout is None or "grad_norm" not in layout.norms:
            return None
        out = np.full(layout.entry.shape[1], np.nan)
        for model, entries in enumerate(layout.entry.T):
            squares = self._sums[entries[entries >= 0]][:, [layout.norms["grad_norm"]]].copy()
            if len(squares):
                fold(squares, 0, len(squares), 0)
                out[model] = np.sqrt(squares[0, 0])
        return self._plain(out / self._grad_scale)

    @property
    def clip_coef(self) -> Any:
        """What the gradient was multiplied by to clip it, 1 if it was not; the smallest where it differs."""
        values = self._reported("clip_coef")
        if values is None:
            return None
        left_out = self._layout.entry < 0
        smallest = np.min(np.where(left_out, np.inf, values), axis=0)
        return self._plain(np.where(left_out.all(axis=0), 1.0, smallest))

    @property
    def skipped(self) -> Any:
        """Whether the step was skipped because the gradient was not finite; for each model of a population."""
        finite = self._reported("finite")
        if finite is None:
            population = self._layout.population if self._layout is not None else None
            return False if population is None else np.zeros(population, bool)
        return self._plain(self._first(finite, 1.0) == 0)

    def __getitem__(self, path: str) -> LeafInfo:
        """The norms of one leaf.

        Raises:
            KeyError: if there is no such leaf, or the step took no norms at all.
        """
        if self._layout is None:
            raise KeyError(
                f"this step took no norms, of {checks.shown(path)} or any other leaf. Build the optimizer with "
                "statistics=True for all of them; clip_norm= or skip_nonfinite=True take those of the gradients."
            )
        paths = self._layout.paths
        if path not in paths:
            close = difflib.get_close_matches(str(path), paths, n=1)
            known = f"did you mean {close[0]!r}?" if close else f"there are {checks.shown(list(paths))}"
            raise KeyError(f"no leaf {checks.shown(path)}; {known}")
        k = list(paths).index(path)
        found = [
            None if values is None else self._plain(values[k])
            for values in (
                *(self._norms(n) for n in ("grad_norm", "param_norm", "update_norm")),
                self._reported("clip_coef"),
            )
        ]
        return LeafInfo(*found)

    def asdict(self) -> dict[str, Any]:
        """Flat names and values for a logger.

        "step"; "lr" and "lr/<pattern>" for each group, if the rule has a rate; what was taken of "grad_norm",
        "clip_coef" and "skipped".
        """
        rates = {f"lr/{p}" if p else "lr": lr for p, lr in self.lrs.items() if lr is not None}
        out = {"step": self.step, **rates}
        more = {"grad_norm": self.grad_norm, "clip_coef": self.clip_coef}
        out.update({name: value for name, value in more.items() if value is not None})
        if self._reported("finite") is not None:
            out["skipped"] = self.skipped
        return out

    def __repr__(self) -> str:
        """Everything in `asdict`."""
        return f"StepInfo({', '.join(f'{k}={v!r}' for k, v in self.asdict().items())})"
