"""The command line: `fastlr bench`, `info`, `schedules`, `plot`; `python -m fastlr` is the same."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, bench, info, plots
from .bench import report
from .checks import COUNTABLE, DTYPES


def _list(text: str) -> list[str]:
    """Words with commas between them."""
    return [x for x in text.replace(" ", "").split(",") if x]


def _count(text: str) -> int:
    """A whole number such as 1000, 10_000, 25M, 1e6."""
    scale = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 1 <= value <= COUNTABLE or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number (1000, 10_000, 25M)")
    return int(value)


def _counts(text: str) -> list[int]:
    """Whole numbers as `_count` has them, with commas between them."""
    return [_count(word) for word in _list(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastlr", description="Fused optimizer updates at memory speed.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, processor, threads, cache folder, GPU")
    commands.add_parser("schedules", help="the schedules, each with its equation")
    p = commands.add_parser("plot", help="draw schedules")
    p.add_argument(
        "expression", nargs="+", help='such as "Cosine(1e-3, steps=10_000).warmup(500)"; several are overlaid'
    )
    p.add_argument("-o", "--output", metavar="FILE", help=".png, .svg or .pdf; without it, in the terminal")
    p.add_argument("--steps", type=_count, help="how many steps to draw")
    b = commands.add_parser("bench", help="throughput beside NumPy, PyTorch and this machine's memory speed")
    b.add_argument("--quick", action="store_true", help="three rules and three sizes, in under a minute")
    b.add_argument("--rules", type=_list, help="adam,rmsprop,... (default: all)")
    b.add_argument("--sizes", type=_counts, help="numbers of parameters: 1k,1M,25M")
    b.add_argument("--leaves", type=_counts, help="separate arrays per model: 1,148 (1: one flat array)")
    b.add_argument("--dtype", type=_list, default=["float32"], help=f"{' or '.join(DTYPES)}, or both with a comma")
    b.add_argument("--threads", type=int, help="threads for every implementation")
    b.add_argument(
        "--step",
        choices=["update", "full", "options", "target"],
        default="update",
        help="the update alone; AdamW with clip, average, copy and clearing; each option by itself; "
        "Adam with clip and a target network's average",
    )
    b.add_argument("--in-loop", action="store_true", help="between matrix products, as in a training loop")
    b.add_argument("--seconds", type=float, help="about how long to measure each line")
    b.add_argument("--json", metavar="FILE", help="write one row per measured implementation")
    b.add_argument("--compare", metavar="OLD.json", help="show what changed since an earlier run")
    return parser


def _bench(args: argparse.Namespace) -> None:
    old = report.load(args.compare) if args.compare else None
    whole = args.step != "update"
    rules = args.rules or (["adam", "rmsprop", "adagrad"] if args.quick and not whole else None)
    usual = {"target": [70_000], "full": [25_000_000], "options": [25_000_000]}
    sizes = usual.get(
        args.step, [1_000, 1_000_000, 25_000_000] if args.quick else [1_000, 10_000, 1_000_000, 25_000_000]
    )
    leaves = args.leaves or ([10] if args.step == "target" else [1])
    seconds = args.seconds or (1.0 if args.quick else 10.0 if whole else 3.0)
    rows = bench.run(
        rules, args.sizes or sizes, args.dtype, leaves, args.threads, args.in_loop, seconds, step=args.step
    )
    print(
        f"{info.cpu_name()}, {rows[0]['threads']} threads, " + ", ".join(f"{k} {v}" for k, v in info.versions().items())
    )
    if args.in_loop:
        report.show("One optimizer step between other work", *report.loop_table(rows))
    elif args.step == "options":
        report.show("What an option adds to a step of AdamW", *report.option_table(rows))
    else:
        report.show("One whole step" if whole else "One optimizer step", *report.table(rows))
    if old is not None:
        report.show(f"Changed since {args.compare}", *report.comparison(rows, old))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{len(rows)} rows written to {args.json}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; default those of the process.

    Returns:
        The exit status.
    """
    args = _parser().parse_args(argv)
    if args.command == "info":
        for name, value in info.describe().items():
            print(f"{name:16} {value}")
        return 0
    if args.command == "schedules":
        for name, cls in sorted(plots.named().items()):
            print(f"{name:18} {' '.join((cls.__doc__ or '').split(chr(10) * 2)[0].split())}")
        return 0
    try:
        if args.command == "plot":
            plots.plot([plots.parse(text) for text in args.expression], args.output, args.steps)
        else:
            _bench(args)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"fastlr {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
