"""The machine code of every float32 update is vectorised and free of float64."""

from __future__ import annotations

import platform
import re

import numpy as np
import pytest
from cases import ALL_ON, CASES, Case
from numba import types

import fastlr
from fastlr.kernels import tiles
from fastlr.kernels.storage import Storage

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")


# Arithmetic on float64, and conversions to and from it.
DOUBLE = r"\bv?(?:add|sub|mul|div|sqrt|min|max|cmp\w*|cvt\w*)(?:sd|pd)\b.*|\bv?cvt(?:ss2sd|ps2pd|sd2ss|pd2ps)\b.*"


def assembly(staged, dtype: str) -> str:
    """The code of the loop over one tile, without the entry that Numba makes for calls from Python."""
    return compiled(tiles.update_loop(staged, Storage(dtype, dtype)), staged, Storage(dtype, dtype))


def compiled(loop, staged, storage: Storage) -> str:
    """The code of a loop over one tile."""
    addresses = types.UniTuple(types.int64, len(storage.columns(staged)))
    slots = types.UniTuple(getattr(types, storage.compute), staged.slots)
    loop.compile((addresses, slots, types.int64, types.int64, types.int64, types.int64))
    (text,) = loop.inspect_asm().values()
    return bodies(text)


def bodies(text: str) -> str:
    """The functions in some assembly that are not Numba's wrappers."""
    parts = re.split(r"(?m)^\s*\.type\s+(\S+),@function$", text)
    own = [
        body
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
        if not name.startswith(("_ZN7cpython", "cfunc"))
    ]
    assert own, "no function found"
    return "".join(body[: body.index(".size")] for body in own)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float32(case: Case):
    staged = case.make(np.zeros(1, np.float32), **case.settings).rule
    text = assembly(staged, "float32")
    vector = set(re.findall(r"\bv(?:mul|add|sub|div|sqrt)ps\b.*%([xyz])mm", text))
    assert vector & {"y", "z"} or "%ymm" not in text, "no vector arithmetic"
    assert re.search(r"\bv?(?:mul|add|sub)ps\b", text)
    double = re.findall(DOUBLE, text)
    assert not double, f"float64 in a float32 loop: {double[:5]}"
    fused = re.findall(r"\bvfn?m(?:add|sub)\w+", text)
    assert not fused, f"contracted: {fused[:3]}"
    # The only calls are Numba's own entry; roots are instructions.
    assert "sqrtf" not in text
    if "sqrt" in staged.update.calls:
        assert re.search(r"\bv?sqrtps\b", text) and re.search(r"\bv?divps\b", text)


FULL = {
    "weight_decay": 0.1,
    **{name: value for name, value in ALL_ON.items() if name not in ("shadow", "statistics")},
    "lr_scale": np.ones(1, np.float32),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shadow", [None, "bfloat16", "float16"])
def test_the_whole_update(kind, shadow):
    """Every option on: still vectors, no float64 but in the sums of a measure, no contraction, no calls."""
    staged = fastlr.AdamW(np.zeros(1, np.float32), shadow=shadow, **FULL).rule
    storage = Storage("float32", kind, shadow, True)
    text = compiled(tiles.update_loop(staged, storage), staged, storage)
    assert re.search(r"\bv?divps\b", text) and re.search(r"\bv?sqrtps\b", text)
    assert not re.search(DOUBLE, text) and not re.search(r"\bvfn?m(?:add|sub)\w+", text)
    assert not re.search(r"\bv?cvt(?:ph2ps|ps2ph)\b|__(?:gnu_[fh]2[hf]|trunc|extend)\w*", text)  # not the processor's
    if shadow:
        assert re.search(r"\bv?movnt\w+", text)  # whole lines past the caches


@pytest.mark.parametrize("make", [fastlr.AdamW, fastlr.LAMB])
def test_a_measure(make):
    """Sums of squares in float64 lanes, of values computed in float32 vectors."""
    staged = make(np.zeros(1, np.float32), clip_norm=1.0).rule
    storage = Storage("float32", "float32")
    for number in range(len(staged.measures)):
        text = compiled(tiles.measure_loop(staged, number, storage), staged, storage)
        assert re.search(r"\bv?addpd\b.*%[yz]mm", text) or "%ymm" not in text
        assert re.search(r"\bv?cvtps2pd\b", text)
        assert not re.search(r"\bvfn?m(?:add|sub)\w+", text)


def test_float64():
    for case in CASES:
        text = assembly(case.make(np.zeros(1), **case.settings).rule, "float64")
        assert re.search(r"\bv?(?:mul|add|sub)pd\b", text), case.name
        assert not re.search(r"\bvfn?m(?:add|sub)\w+", text), case.name


def test_a_float64_literal_would_be_seen():
    """The check above can fail: a rule whose literals were not lifted has float64 in its loop."""
    from dataclasses import replace

    staged = CASES[0].make(np.zeros(1, np.float32)).rule
    text = staged.update.text.replace("p - lr * g", "p - 0.5 * g * lr")
    spoilt = replace(staged, update=replace(staged.update, text=text))
    assert spoilt.update != staged.update
    storage = Storage("float32", "float32")
    try:
        text = compiled(tiles.update_loop(spoilt, storage), spoilt, storage)
    except Exception as error:  # the store refuses a tuple of float64
        text = str(error)
    assert "pd" in text or "float64" in text
