"""`python -m tests.fuzz --minutes 5`: inputs of every kind, made in processes of their own, since some may crash."""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module

from .promises import Report, run

KINDS = ("arguments", "files", "interrupts", "threads", "reentry")
_PART = 500  # trials after which a process tells what came of them
_HANGS_S = 120  # without a new input


def _work(kind: str, seed: int, first: int, inputs: float, seconds: float, indices: float, place: str) -> None:
    """In a process of its own: make inputs; which one is under way is always to be seen in a file."""
    with open(place, "r+b") as file, mmap.mmap(file.fileno(), 8) as shown:

        def on_index(index: int) -> None:
            shown[:8] = index.to_bytes(8, "little")

        trial = import_module(f".{kind}", __package__).trial
        until, after, more = time.monotonic() + seconds, first + indices, True
        while inputs > 0 and time.monotonic() < until and first < after and more:
            part = min(_PART, after - first)
            report = run(kind, trial, seed, first, inputs=inputs, until=until, indices=part, on_index=on_index)
            print(json.dumps(report.asdict()), flush=True)
            first, inputs, more = report.after, inputs - report.inputs, report.inputs > 0


def _watched(kind: str, seed: int, first: int, inputs: float, seconds: float, indices: float) -> Report:
    """Run inputs in another process, and go on after one that ends it."""
    report = Report(kind, seed, first, first)
    until = time.monotonic() + seconds
    while report.inputs < inputs and time.monotonic() < until and report.after - first < indices:
        with tempfile.NamedTemporaryFile() as place, tempfile.TemporaryFile("w+") as out:
            place.write((2**64 - 1).to_bytes(8, "little"))
            place.flush()
            limits = inputs - report.inputs, until - time.monotonic(), indices - (report.after - first)
            arguments = [kind, seed, report.after, *limits, place.name]
            command = [sys.executable, "-X", "faulthandler", "-m", __package__, "--work", json.dumps(arguments)]
            process = subprocess.Popen(command, stdout=out)
            index, changed = -1, time.monotonic()
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    with open(place.name, "rb") as file:
                        now = int.from_bytes(file.read(8), "little")
                    if now != index:
                        index, changed = now, time.monotonic()
                    elif time.monotonic() - changed > _HANGS_S:
                        process.kill()
                        process.wait()
            finally:
                process.kill()
            out.seek(0)
            lines = out.read().splitlines()
            with open(place.name, "rb") as file:
                index = int.from_bytes(file.read(8), "little")
        parts = [json.loads(line) for line in lines]
        for part in parts:
            report.merge(part)
        if process.returncode == 0:
            if not parts or not sum(parts[-1]["outcomes"].values()):
                break  # there are no more
        elif process.returncode > 0 or index == 2**64 - 1:
            raise SystemExit(f"{kind}: nothing could be run; see above.")
        else:  # what came of the last inputs before it is lost: they are made again
            if index > report.after:
                again = _watched(kind, seed, report.after, math.inf, math.inf, index - report.after)
                report.merge(again.asdict())
            code = process.returncode
            name = "hangs" if code == -signal.SIGKILL else f"ends the process ({code})"
            report.add_broken(name, index, "see above")
            report.after = index + 1
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="for all kinds together; default 5, or as many as --count takes")
    parser.add_argument("--count", type=float, help="how many inputs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs; default 0")
    parser.add_argument("--only", choices=[*KINDS, "args"], help="one kind of input")
    parser.add_argument("--index", type=int, help="one input, as a report names it; needs --only")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        _work(*json.loads(given.work))
        return
    kinds = KINDS if given.only is None else ("arguments" if given.only == "args" else given.only,)
    minutes = given.minutes or (math.inf if given.count or given.index is not None else 5.0)
    inputs, indices = given.count or math.inf, math.inf if given.index is None else 1
    broken = False
    for kind in kinds:
        began = time.monotonic()
        report = _watched(kind, given.seed, given.index or 0, inputs, minutes * 60 / len(kinds), indices)
        seconds = time.monotonic() - began
        print(report, f"  {seconds:.0f} s, {report.inputs / seconds:.0f} inputs a second", sep="\n", flush=True)
        broken = broken or bool(report.broken)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    os.environ.setdefault("FASTLR_CACHE_DIR", tempfile.gettempdir() + f"/fastlr-fuzz-{os.getuid()}")
    main()
