"""The report: progress, the tables, and what changed since an earlier run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_KEY = ("impl", "rule", "device", "dtype", "n", "leaves", "threads", "mode")


def progress(problems: Sequence[Any], quiet: bool) -> Iterator[Any]:
    """Go through problems with a progress bar, if rich is installed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        for k, problem in enumerate(problems):
            if not quiet:
                print(f"[{k + 1}/{len(problems)}] {problem.rule} {problem.dtype} n={problem.n:,}", flush=True)
            yield problem
        return
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=quiet, transient=True) as bar:
        task = bar.add_task("", total=len(problems))
        for problem in problems:
            bar.update(task, description=f"{problem.rule} {problem.dtype} n={problem.n:,}")
            yield problem
            bar.advance(task)


def duration(seconds: float) -> str:
    """A time to three digits, in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _find(rows: Iterable[dict[str, Any]], row: dict[str, Any], **other: Any) -> dict[str, Any] | None:
    wanted = {**{k: row[k] for k in _KEY}, **other}
    return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), None)


_COLUMNS = ("rule", "dtype", "parameters", "leaves", "implementation")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What a line is about: the first columns of every table."""
    return row["rule"], row["dtype"], f"{row['n']:,}", str(row["leaves"]), row["impl"]


def beside(
    row: dict[str, Any], own: dict[str, Any] | None, roof: dict[str, Any] | None
) -> tuple[float | None, float | None]:
    """How many times as long as fastlr a step takes, and its share of the memory's speed.

    Compared round by round where the rows say how; rows written by earlier versions have medians alone.
    """

    def longer(r: dict[str, Any] | None) -> float | None:
        if r is None or own is None:
            return None
        return float(r.get("relative") or r["p50_s"] / own["p50_s"])

    this, that = longer(row), longer(roof)
    if this is None or that is None or roof is None:
        return this, None
    moved = row["gb_per_s"] * row["p50_s"] / (roof["gb_per_s"] * roof["p50_s"])  # a rule that measures reads more
    return this, that / this * moved


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the report for steps measured alone."""
    header = [*_COLUMNS, "p50", "p10", "p90", "ns/param", "GB/s", "of roofline", "fastlr is", "compiled in"]
    lines = []
    for row in rows:
        roof = _find(rows, row, impl="roofline")
        own = _find(rows, row, impl="fastlr")
        longer, share = beside(row, own, roof)
        compared = own and row["impl"] not in ("fastlr", "roofline")
        lines.append(
            [
                *_cells(row),
                *(duration(row[k]) for k in ("p50_s", "p10_s", "p90_s")),
                f"{row['ns_per_param']:.3g}",
                f"{row['gb_per_s']:.3g}",
                f"{share:.2f}" if roof else "",
                f"{longer:.2f}x as fast" if compared else "",
                duration(row["compile_s"]) if row["compile_s"] else "",
            ]
        )
    return header, lines


def option_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for what each option adds to a step, in bytes and in time."""
    header = [*_COLUMNS, "p50", "time added", "bytes added", "at the plain step's speed", "ratio"]
    lines = []
    for row in rows:
        plain = _find(rows, row, impl="fastlr")
        assert plain is not None
        added = row["added_s"]
        size = row["gb_per_s"] * row["p50_s"] * 1e9 - plain["gb_per_s"] * plain["p50_s"] * 1e9
        expected = size / plain["gb_per_s"] / 1e9
        cells = [duration(row["p50_s"]), "", "", "", ""]
        if row is not plain:
            sign = "-" if added < 0 else ""
            cells[1:3] = sign + duration(abs(added)), f"{size / row['n']:.0f} a parameter"
            cells[3:] = (duration(expected), f"{added / expected:.2f}") if expected > 1e-12 else ("", "")
        lines.append([*_cells(row), *cells])
    return header, lines


def loop_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the report for steps in a loop."""
    times = ("step alone", "in the loop", "ratio", "what follows, alone", "after a step", "ratio")
    header = [*_COLUMNS, "between", *times]
    lines = [
        [
            *_cells(row),
            row["mode"].removeprefix("in_loop_"),
            duration(row["alone_p50_s"]),
            duration(row["p50_s"]),
            f"{row['p50_s'] / row['alone_p50_s']:.2f}",
            duration(row["neighbour_alone_p50_s"]),
            duration(row["neighbour_p50_s"]),
            f"{row['neighbour_p50_s'] / row['neighbour_alone_p50_s']:.2f}",
        ]
        for row in rows
    ]
    return header, lines


def comparison(rows: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for what changed since an earlier run; relative to that run's roofline where there is one."""
    header = [*_COLUMNS, "then", "now", "now / then", "of roofline then", "now"]
    lines = []
    for row in rows:
        then = _find(old, row)
        if then is None:
            continue
        roofs = [_find(where, row, impl="roofline") for where in (old, rows)]
        fractions = [f"{r['p50_s'] / x['p50_s']:.2f}" if r else "" for r, x in zip(roofs, (then, row), strict=True)]
        lines.append(
            [
                *_cells(row),
                duration(then["p50_s"]),
                duration(row["p50_s"]),
                f"{row['p50_s'] / then['p50_s']:.2f}",
                *fractions,
            ]
        )
    return header, lines


def show(title: str, header: list[str], lines: list[list[str]]) -> None:
    """Print a table, by rich where it is installed."""
    if not lines:
        print(f"{title}: nothing to show")
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(x) for x in column) for column in zip(header, *lines, strict=True)]
        print(title)
        for line in (header, *lines):
            print("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip())
        return
    out = Table(title=title, title_justify="left")
    for k, name in enumerate(header):
        out.add_column(name, justify="left" if k in (0, 1, 4) else "right")
    before = None
    for line in lines:
        if before is not None and line[:4] != before:
            out.add_section()
        before = line[:4]
        out.add_row(*line)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(out)


def load(path: str) -> list[dict[str, Any]]:
    """Rows that an earlier run wrote.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        rows = json.loads(Path(path).read_text())
        if not (isinstance(rows, list) and all(set(_KEY) <= set(row) for row in rows)):
            raise ValueError
    except ValueError:
        raise ValueError(f"{path!r} is not a file written by fastlr bench --json.") from None
    return rows
