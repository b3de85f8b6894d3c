"""Numbers of two bytes: exact to the bit, over all of them and around every boundary."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import fastlr
from fastlr.kernels.formats import FORMATS, to_float32
from fastlr.kernels.memory import where

ml_dtypes = pytest.importorskip("ml_dtypes")

TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ALL = np.arange(2**16, dtype=np.uint16)
both = pytest.mark.parametrize("name", FORMATS)


def test_every_format_is_tested():
    assert TYPES.keys() == FORMATS.keys()


def in_numba(function, dtype):
    """The function over an array, compiled."""
    inner = numba.njit(function)

    @numba.njit
    def run(x, out):
        for k in range(x.size):
            out[k] = inner(x[k])

    def over(x):
        out = np.empty(x.size, dtype)
        run(x, out)
        return out

    return over


@both
def test_all_are_read_exactly(name):
    expected = ALL.view(TYPES[name]).astype(np.float32)
    decode, _ = FORMATS[name].make(np.where)
    for got in (decode(ALL), in_numba(FORMATS[name].make(where)[0], np.float32)(ALL)):
        nan = np.isnan(expected)
        assert got.dtype == np.float32 and np.isnan(got[nan]).all()
        np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def boundaries(name) -> np.ndarray:
    """Every number of the format, the ties between neighbours, and what is next to both; random bits as well."""
    exact = ALL.view(TYPES[name]).astype(np.float32).view(np.uint32).astype(np.int64)
    half = {"bfloat16": 0x8000, "float16": 0x1000}[name]
    small = np.arange(0, 1 << 11, dtype=np.float64)[:, None] * 2.0**-25 + np.array([0.0, -(2.0**-40), 2.0**-40])
    bits = np.concatenate([exact + shift for shift in (-1, 0, 1, half - 1, half, half + 1)]) & 0xFFFFFFFF
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint64)
    near_zero = small.astype(np.float32).reshape(-1).view(np.uint32)
    return np.concatenate([bits.astype(np.uint32), random.astype(np.uint32), near_zero]).view(np.float32)


@both
def test_rounding_is_to_the_nearest_even(name):
    x = boundaries(name)
    with np.errstate(all="ignore"):
        expected = x.astype(TYPES[name]).view(np.uint16)
    decode, encode = FORMATS[name].make(np.where)
    nan = np.isnan(x)
    for got in (encode(x), in_numba(FORMATS[name].make(where)[1], np.uint16)(x)):
        assert got.dtype == np.uint16
        np.testing.assert_array_equal(got[~nan], expected[~nan])
        assert np.isnan(decode(got[nan])).all()
        assert (np.signbit(decode(got)) == np.signbit(x)).all()
    largest = np.float32(65_504 if name == "float16" else ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert decode(encode(largest)) == largest and decode(encode(np.float32(np.inf))) == np.inf


@both
def test_there_and_back(name):
    decode, encode = FORMATS[name].make(np.where)
    numbers = ~np.isnan(decode(ALL))
    np.testing.assert_array_equal(encode(decode(ALL))[numbers], ALL[numbers])


def test_float64_is_rounded_once():
    """Through float32 to the nearest, numbers beside a tie would become that tie and go the wrong way."""
    with np.errstate(all="ignore"):
        narrow = to_float32(np.where)
        rng = np.random.default_rng(0)
        ties = boundaries("float16").astype(np.float64)
        x = np.concatenate([ties, ties * (1 + 1e-13), ties * (1 - 1e-13), [5e-324, 1e300]])
        x = np.concatenate([x, rng.standard_normal(10_000) * 10.0 ** rng.integers(-46, 40, 10_000)])
        _, encode = FORMATS["float16"].make(np.where)
        nan = np.isnan(x)
        expected = x.astype(np.float16).view(np.uint16)  # NumPy's own is exact from float64
        got = encode(narrow(x))
        wrong = encode(x.astype(np.float32))
        np.testing.assert_array_equal(got[~nan], expected[~nan])
        assert (wrong[~nan] != expected[~nan]).any()
        compiled = in_numba(to_float32(where), np.float32)(x)
        np.testing.assert_array_equal(compiled.view(np.uint32)[~nan], narrow(x).view(np.uint32)[~nan])


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_shadow_of_an_optimizer(name, dtype, rng):
    with np.errstate(all="ignore"):
        params = {"w": rng.standard_normal((37, 111)).astype(dtype), "b": np.array([1e-40, -1e39, 7e4, 1e-7], dtype)}
        opt = fastlr.SGD(params, lr=0.5, shadow=name)

        def check():
            for path, leaf in params.items():
                assert opt.shadow[path].dtype == TYPES[name] and opt.shadow[path].shape == leaf.shape
                expected = leaf.astype(np.float32) if name == "bfloat16" and dtype == "float64" else leaf
                exact = expected.astype(TYPES[name]).view(np.uint16)
                differs = opt.shadow[path].view(np.uint16) != exact
                if dtype == "float32" or name == "float16":
                    assert not differs.any()
                else:  # ml_dtypes goes through float32, which rounds twice
                    assert differs.mean() < 0.001

        check()
        for _ in range(3):
            opt.step({"w": rng.standard_normal((37, 111)).astype(dtype), "b": np.zeros(4, dtype)})
            check()


def test_without_ml_dtypes_the_shadow_is_bits(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    opt = fastlr.SGD(np.ones(4, np.float32), shadow="bfloat16")
    assert opt.shadow.dtype == np.uint16 and (opt.shadow == 0x3F80).all()
