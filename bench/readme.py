"""Write the README's generated parts: the table of optimizers and the numbers measured last.

`python bench/readme.py` writes them, `python bench/readme.py --check` fails if they are not up to date. The numbers
come from the newest file in bench/results; each names the command that measured it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

import fastlr
from fastlr.bench import report
from fastlr.optimizers import __all__ as names

ROOT = Path(__file__).parent.parent
RULES = ("adam", "rmsprop", "adagrad")


def newest() -> list[dict]:
    """Rows of the files recorded on the newest day: cpu-<date>-<what>.json."""
    files = sorted((ROOT / "bench" / "results").glob("cpu-*.json"))
    day = files[-1].name[: len("cpu-2026-01-01")]
    return [row for file in files if file.name.startswith(day) for row in report.load(str(file))]


def optimizers() -> str:
    """One line an optimizer, from its class."""
    lines = ["| optimizer | in a line | defaults | states | source |", "|---|---|---|---|---|"]
    for name in sorted(names):
        cls = getattr(fastlr, name)
        doc = cls.__doc__ or ""
        first = doc.split("\n", 1)[0].removeprefix(f"{name}: ").rstrip(".")
        source = " ".join(re.search(r"Source: (.*?)(?:\n\n|$)", doc, re.S)[1].split())  # type: ignore[index]
        opt = cls(np.zeros(1))
        shown = opt.groups.everything()[""].items()
        settings = {k: v for k, v in shown if k not in ("frozen", "maximize") and v is not None}
        usual = {"weight_decay": 0.0, "decoupled_weight_decay": False}
        values = ", ".join(f"{k}={v}" for k, v in settings.items() if usual.get(k) != v or k not in usual)
        every = [cls._states.get(s, s) for s in cls._rule.states]
        present = set(opt.state)
        states = ", ".join(f"`{s}`" if s in present else f"(`{s}`)" for s in every)
        lines.append(f"| `{name}` | {first} | {values} | {states} | {source.rstrip('.')} |")
    return "\n".join(lines)


def pick(rows: list[dict], **wanted: object) -> dict:
    """The one row with these values."""
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


def headline(rows: list[dict]) -> str:
    """The number of the first screen."""
    big = {"rule": "adam", "n": 25_000_000, "leaves": 1, "dtype": "float32", "mode": "alone"}
    own, roof, torch, plain = (pick(rows, impl=i, **big) for i in ("fastlr", "roofline", "torch_fused", "numpy_passes"))
    return (
        f"One Adam step over 25 million float32 parameters: **{own['p50_s'] * 1e3:.1f} ms**, "
        f"{roof['p50_s'] / own['p50_s']:.0%} of the speed at which this machine can read and write those bytes at all; "
        f"PyTorch `fused=True` {torch['p50_s'] * 1e3:.1f} ms, in-place NumPy {plain['p50_s'] * 1e3:.0f} ms "
        f"({own['cpu']}, {own['threads']} cores; `fastlr bench`, {own['date'][:10]})."
    )


def measured(rows: list[dict]) -> str:
    """The table of steps measured alone."""
    lines = [
        "| rule | parameters | fastlr | of the memory's speed | PyTorch fused | NumPy in blocks | NumPy in passes |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = {
        (r["rule"], r["n"], r["leaves"])
        for r in rows
        if r["mode"] == "alone" and r["dtype"] == "float32" and r["rule"] in RULES
    }
    for rule, n, leaves in sorted(keys, key=lambda k: (RULES.index(k[0]), k[2] > 1, k[1])):
        at = [
            r
            for r in rows
            if (r["rule"], r["n"], r["leaves"], r["dtype"], r["mode"]) == (rule, n, leaves, "float32", "alone")
        ]
        by = {r["impl"]: r for r in at}
        own = by["fastlr"]["p50_s"]
        size = f"{n:,}" + (f" in {leaves:,} arrays" if leaves > 1 else "")
        others = [
            f"{report.duration(by[k]['p50_s'])} ({by[k]['p50_s'] / own:.1f}x)" if k in by else ""
            for k in ("torch_fused", "numpy", "numpy_passes")
        ]
        lines.append(
            f"| {rule} | {size} | {report.duration(own)} | {by['roofline']['p50_s'] / own:.2f} | {' | '.join(others)} |"
        )
    row = rows[0]
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    lines.append("")
    lines.append(
        f"{row['cpu']}, {row['threads']} threads, {row['date'][:10]}; {versions}. "
        "In brackets: how many times as long as fastlr."
    )
    return "\n".join(lines)


def whole(rows: list[dict]) -> str:
    """What the whole step costs, beside separate calls, and each option by itself."""
    kinds = {
        "full": "AdamW, clip, test, average, bfloat16 copy, clear",
        "target": "Adam, clip, target average",
    }
    names = {"fastlr": "fastlr, one call", "torch_calls": "PyTorch", "optax": "Optax", "roofline": "the memory's speed"}
    lines = [f"| step | parameters | {' | '.join(names.values())} |", "|---|---|---|---|---|---|"]
    for mode, words in kinds.items():
        by = {r["impl"]: r for r in rows if r["mode"] == mode}
        own = by["fastlr"]
        others = [by.get(name) for name in list(names)[1:]]
        cells = [f"{report.duration(r['p50_s'])} ({report.beside(r, own, None)[0]:.2f}x)" if r else "" for r in others]
        cells.insert(0, report.duration(own["p50_s"]))
        size = f"{own['n']:,}" + (f" in {own['leaves']} arrays" if own["leaves"] > 1 else "")
        lines.append(f"| {words} | {size} | {' | '.join(cells)} |")
    options = [r for r in rows if r["mode"] == "options"]
    plain = next(r for r in options if r["impl"] == "fastlr")
    added = ", ".join(f"{r['impl'][2:]} {r['added_s'] * 1e3:+.1f} ms" for r in options if r is not plain)
    machine = f"{own['cpu']}, {own['threads']} threads, {own['date'][:10]}"
    torch = own["versions"].get("torch", "not installed")
    lines += [
        "",
        f"Each option by itself, added to {plain['p50_s'] * 1e3:.1f} ms of AdamW over {plain['n']:,} parameters: "
        f"{added}. {machine}; torch {torch}. PyTorch: `clip_grad_norm_(foreach=True)`, `AdamW(fused=True)`, `lerp_`, "
        "`copy_`, `zero_`; Optax: `chain(clip_by_global_norm, adamw)` with the average under `jit` with donation.",
    ]
    return "\n".join(lines)


def gpu(file: Path | None) -> str:
    """What was measured on a GPU, or that nothing was."""
    if file is None:
        return (
            "Compiled for sm_80 and sm_90, its machine code read by a test, and run in an emulation of the GPU and in "
            "Numba's simulator with the CPU's bits; **not yet run or timed on a GPU**."
        )
    found = json.loads(file.read_text())
    rows, system = found["rows"], found["system"]
    names = {
        "fastlr": "fastlr",
        "fastlr_flat": "one flat buffer",
        "fastlr_torch": "fastlr.torch",
        "fastlr_graph": "replayed graph",
    }
    names |= {"torch_fused": "PyTorch fused", "torch_foreach": "foreach", "torch_calls": "PyTorch's calls"}
    names |= {"cupy": "CuPy", "optax": "Optax"}
    lines = [
        f"| step | parameters | of a copy's speed | {' | '.join(names.values())} |",
        "|---" * (3 + len(names)) + "|",
    ]
    copies = {r["n"]: r for r in rows if r["mode"] == "copy"}
    best_copy = max(r["gb_per_s"] for r in copies.values())
    steps: dict[tuple[str, int, int], dict[str, dict]] = {}
    for row in rows:
        if row["mode"] != "copy":
            steps.setdefault((row["mode"], row["n"], row["leaves"]), {})[row["impl"]] = row
    for (mode, n, leaves), by in steps.items():
        own = min((r for name, r in by.items() if name.startswith("fastlr")), key=lambda r: r["p50_s"])
        cells = [
            (
                f"{report.duration(by[k]['p50_s'])}"
                + (f" ({by[k]['p50_s'] / own['p50_s']:.2f}x)" if by[k] is not own else "")
            )
            if k in by
            else ""
            for k in names
        ]
        bandwidth = copies[n]["gb_per_s"] if n in copies else best_copy
        share = f"{own['gb_per_s'] / bandwidth:.2f}" if n >= 1_000_000 else ""
        size = f"{n:,}" + (f" in {leaves} arrays" if leaves > 1 else "")
        lines.append(f"| {mode} | {size} | {share} | {' | '.join(cells)} |")
    versions = ", ".join(f"{k} {v}" for k, v in system["versions"].items())
    tests = f" Tests there: {found['tests']['summary'].strip('= ')}." if "tests" in found else ""
    lines += [
        "",
        f"{system['gpu']}, driver {system['driver']}, {system['date'][:10]}; {versions}. A copy there and back: "
        f"{best_copy:,.0f} GB/s. In brackets: how many times as long as fastlr's fastest.{tests}",
    ]
    return "\n".join(lines)


def torch_optimizers(file: Path) -> str:
    """`fastlr.torch` beside PyTorch's and DeepSpeed's optimizers."""
    found = json.loads(file.read_text())
    rows, system = found["rows"], found["system"]
    names = {"torch_fused": "PyTorch `fused=True`", "torch_foreach": "`foreach=True`", "torch_calls": "PyTorch's calls"}
    names |= {"deepspeed": "DeepSpeed CPUAdam"}
    lines = [f"| step | tensors | parameters | fastlr.torch | {' | '.join(names.values())} |", "|---" * 8 + "|"]
    for case in dict.fromkeys(r["case"] for r in rows if "step" in r):
        by = {r["impl"]: r for r in rows if r["case"] == case}
        own = by["fastlr"]
        cells = [f"{report.duration(by[k]['p50_s'])} ({by[k]['relative']:.2f}x)" if k in by else "" for k in names]
        size = f"{own['tensors']:,} | {own['n']:,}"
        lines.append(f"| {case}: {own['step']} | {size} | {report.duration(own['p50_s'])} | {' | '.join(cells)} |")
    added = ", ".join(
        f"{-r['added_s'] * 1e6:.0f} us over {r['tensors']} tensors"
        for r in rows
        if r["impl"] == "fastlr_native" and r["n"] < 10**6
    )
    large = ", ".join(
        f"{r['n'] / 1e9:.1f} B in {report.duration(r['p50_s'])} ({r['p50_s'] / r['n'] * 1e9:.2f} ns each, "
        f"{r['bytes'] / 1e9:.1f} GB)"
        for r in rows
        if r["case"] == "host, larger models"
    )
    versions = ", ".join(f"{k} {v}" for k, v in system["versions"].items() if k in ("torch", "deepspeed"))
    lines += [
        "",
        f"{system['cpu']}, {system['threads']} threads, {system['date'][:10]}; {versions}; "
        "`python -m bench.pytorch --billion`. In brackets: how many times as long as fastlr, compared round by round. "
        "PyTorch's calls: `clip_grad_norm_`, `fused=True` and `torch._foreach_lerp_`; on masters PyTorch and DeepSpeed "
        f"convert gradients and weights by copies. The native step over the same arrays takes less by {added}: what a "
        "`torch.optim.Optimizer` costs. "
        f"`HostOptimizer` by the size of the model: {large}.",
    ]
    return "\n".join(lines)


def newest_file(kind: str) -> Path | None:
    """The file of the newest day, such as gpu-<date>-<name>.json."""
    files = sorted((ROOT / "bench" / "results").glob(f"{kind}-*.json"))
    return files[-1] if files else None


def generated(text: str) -> str:
    """The README with its generated parts written anew."""
    rows = newest()
    parts = {"optimizers": optimizers(), "headline": headline(rows), "measured": measured(rows), "whole": whole(rows)}
    parts["gpu"] = gpu(newest_file("gpu"))
    beside_torch = newest_file("torch")
    assert beside_torch is not None, "run python -m bench.pytorch"
    parts["torch"] = torch_optimizers(beside_torch)
    for name, content in parts.items():
        pattern = rf"(<!-- {name}: bench/readme.py -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S)
        assert count == 1, f"the README has no part {name!r}"
    return text


def main() -> int:
    """Write or check."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = generated(old)
    if "--check" in sys.argv:
        if new != old:
            print("README.md is not up to date: run python bench/readme.py")
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
