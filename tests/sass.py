"""Machine code of kernels for a GPU, taken apart; `python tests/sass.py` records the baseline of the gate."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from cases import CASES

import fastlr
from fastlr.kernels import cuda, grid
from fastlr.kernels.storage import Storage

BASELINE = Path(__file__).with_name("sass_baseline.json")
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0)}

# Whole updates, and those of rules with every option that reads or writes more.
FULL = {"weight_decay": 0.1, "clip_norm": 1.0, "clip_value": 0.5, "skip_nonfinite": True, "ema": 0.9}


@dataclass
class Code:
    """What the gate looks at.

    Attributes:
        registers: of a thread.
        spilled, local: bytes spilled, and accesses to local memory.
        loads, stores: accesses to global memory of 128 bits.
        early: whether nothing that a wide load brings is used before the last of them is under way.
        doubles: instructions in float64.
        calls: of functions in other places.
        instructions: from the first wide load to the last wide store, without what only rare numbers need.
    """

    registers: int
    spilled: int
    local: int
    loads: int
    stores: int
    early: bool
    doubles: int
    calls: int
    instructions: int


def disassembled(image: cuda.Image) -> list[str]:
    """The instructions of a kernel, without operands of labels."""
    from cuda.pathfinder import find_nvidia_binary_utility

    tool = find_nvidia_binary_utility("nvdisasm")
    assert tool, "nvdisasm is missing: pip install cuda-toolkit[nvdisasm]"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image.code)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return [m.group(1).strip() for m in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);", text)]


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _early(instructions: list[str], wide_loads: list[int]) -> bool:
    loaded: set[str] = set()
    for k in range(wide_loads[0], wide_loads[-1] + 1) if wide_loads else ():
        _, _, operands = instructions[k].partition(" ")
        to, _, source = operands.partition(",")
        if loaded & set(re.findall(r"\bR\d+", source)):
            return False
        if k in wide_loads:
            first = int(re.search(r"R(\d+)", to).group(1))
            loaded |= {f"R{n}" for n in range(first, first + 4)}
    return True


def read(image: cuda.Image) -> Code:
    """Take a kernel apart."""
    instructions = disassembled(image)
    codes = [opcode(i) for i in instructions]
    wide_loads = [k for k, c in enumerate(codes) if c.startswith("LDG") and ".128" in c]
    wide_stores = [k for k, c in enumerate(codes) if c.startswith("STG") and ".128" in c]
    last = wide_stores[-1] if wide_stores else wide_loads[-1] if wide_loads else 0
    first = wide_loads[0] if wide_loads else 0
    log = image.log
    return Code(
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        local=sum(c.startswith(("LDL", "STL")) for c in codes),
        loads=len(wide_loads),
        stores=len(wide_stores),
        early=_early(instructions, wide_loads),
        doubles=sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F.*F64|MUFU\.\w+64H|I2F\.F64", c)) for c in codes),
        calls=sum(c.startswith("CALL.ABS") for c in codes),
        instructions=last - first + 1,
    )


def optimizer(name: str) -> fastlr.Optimizer:
    """An optimizer of the table, or "adamw full" and so on."""
    rule, _, more = name.partition(" ")
    case = next(c for c in CASES if c.name == rule)
    options = dict(FULL) if more.startswith("full") else {}
    if more.endswith("scaled"):
        options["lr_scale"] = np.ones(1, np.float32)
    return case.make(np.zeros(1, np.float32), **{**case.settings, **options})


# Kernels by name: the optimizer, the gradient's format, the copy's, whether gradients are cleared.
FORMATS = {
    "float32": ("float32", None, False),
    "bfloat16 in": ("bfloat16", None, False),
    "bfloat16 in and out": ("bfloat16", "bfloat16", False),
    "copy, cleared": ("float32", "bfloat16", True),
}
UPDATES = [(case.name, "float32") for case in CASES] + [
    *[("adamw full", f) for f in FORMATS],
    ("adam", "bfloat16 in"),
    ("sgd-momentum full scaled", "float32"),
]


def update(name: str, formats: str, architecture: str, by_value: bool = False) -> tuple[cuda.Image, list[str], Storage]:
    """The update of an optimizer, what it reads and writes, and how."""
    staged, storage = optimizer(name).rule, Storage("float32", *FORMATS[formats])
    tuning = grid.Tuning()
    image = cuda.compile_image(grid.update(cuda.TARGET, staged, storage, tuning, by_value), ARCHITECTURES[architecture])
    return image, staged, storage


def key(architecture: str, name: str, formats: str) -> str:
    return f"{architecture} {name} {formats}"


if __name__ == "__main__":
    found = {}
    import sys

    for architecture in ARCHITECTURES:
        for name, formats in UPDATES:
            if len(sys.argv) > 1 and sys.argv[1] not in name + formats:
                continue
            image, staged, storage = update(name, formats, architecture)
            code = read(image)
            width = grid.width_of(storage.columns(staged))
            found[key(architecture, name, formats)] = code.instructions / width
            print(key(architecture, name, formats), round(code.instructions / width, 1), asdict(code))
    BASELINE.write_text(json.dumps({k: round(v, 2) for k, v in sorted(found.items())}, indent=1) + "\n")
