"""Stored rows: full precision at any size, and ``stored * row_scale`` is exact."""

import importlib
import sys

import numpy as np
import pytest
import tensorstore
from helpers.encoding import encode_rows
from helpers.stores import make_rows

from gradproj.store.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from gradproj.store.encoding import decode_rows

DTYPES = ["float16", "bfloat16", "float32"]


def exact_power_of_two(values: np.ndarray) -> np.ndarray:
    return np.frexp(values)[0] == 0.5


@pytest.mark.parametrize("size", [1e-38, 1e-34, 1e-30, 1e-8, 1e-5, 1.0, 65504.0, 1e30, 3e38])
def test_float16_rows_keep_eleven_bits_at_any_size_with_an_exact_scale(size):
    rows = (np.random.default_rng(1).uniform(0.5, 1, (20, 37)) * size).astype(np.float32)
    rows[:, ::2] *= -1
    stored, row_scale = encode_rows(rows, "float16")
    assert exact_power_of_two(row_scale).all()
    if size > 1e-33:
        largest = np.abs(stored.astype(np.float32)).max(axis=1)
        assert ((largest >= 2**14) & (largest <= 2**15)).all()
    want = stored.astype(np.float64) * row_scale.astype(np.float64)[:, None]
    np.testing.assert_array_equal(decode_rows(stored, row_scale, "float16"), want)
    np.testing.assert_allclose(want, rows, rtol=2**-11)


def test_largest_magnitude_is_scaled_into_its_binade_at_both_edges():
    rows = np.array(
        [[1.0, 0], [2.0, 0], [np.nextafter(np.float32(2), np.float32(1)), 0]], np.float32
    )
    stored, row_scale = encode_rows(rows, "float16")
    assert row_scale.tolist() == [2**-14, 2**-13, 2**-14]
    assert stored[:, 0].tolist() == [2**14, 2**14, 2**15]  # the third by rounding


def test_zero_nan_infinite_and_denormal_rows():
    tiny = np.float32(2**-149)
    rows = np.array(
        [[0, -0.0], [np.nan, 1], [np.inf, 1], [tiny, -5 * tiny], [1e38, tiny]], np.float32
    )
    stored, row_scale = encode_rows(rows, "float16")
    assert row_scale[:3].tolist() == [1, 1, 1]
    assert row_scale[3] == np.float32(2**-126)
    got = decode_rows(stored, row_scale, "float16")
    np.testing.assert_array_equal(got[[0, 2, 3]], rows[[0, 2, 3]])
    assert np.signbit(got[0]).tolist() == [False, True]
    assert np.isnan(got[1, 0])
    np.testing.assert_allclose(got[4], [1e38, 0], rtol=2**-11)


def test_every_half_decodes_to_numpys_value():
    stored = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    for scale in (1.0, 2**-126, 2**14, 2**100, np.nan, 0.3):
        row_scale = np.full(64, scale, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            want = stored.astype(np.float32) * row_scale[:, None]
        np.testing.assert_array_equal(decode_rows(stored, row_scale, "float16"), want)


def test_missing_row_decodes_to_nan_whatever_is_stored():
    for proj_dtype in DTYPES:
        stored, _ = encode_rows(np.ones((2, 3), np.float32), proj_dtype)
        got = decode_rows(stored, np.array([np.nan, 2], np.float32), proj_dtype)
        assert np.isnan(got[0]).all()
        assert not np.isnan(got[1]).any()


def test_bfloat16_rounds_to_nearest_even_like_tensorstore():
    bfloat16 = tensorstore.bfloat16.numpy_dtype
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    halfway = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, halfway, halfway - 1, halfway + 1]).view(np.float32)
    with np.errstate(invalid="ignore"):
        want = values.astype(bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bfloat16_to_float32(float32_to_bfloat16(values)), want)
    every = np.arange(2**16, dtype=np.uint16)
    number = ~np.isnan(bfloat16_to_float32(every))
    np.testing.assert_array_equal(
        float32_to_bfloat16(bfloat16_to_float32(every))[number], every[number]
    )


def test_float32_rows_are_stored_unchanged():
    rows = make_rows(5, 7)
    stored, row_scale = encode_rows(rows, "float32")
    np.testing.assert_array_equal(stored, rows)
    assert (row_scale == 1).all()


def test_empty_input_encodes_to_empty_output():
    for proj_dtype in DTYPES:
        stored, row_scale = encode_rows(np.empty((0, 5), np.float32), proj_dtype)
        assert decode_rows(stored, row_scale, proj_dtype).shape == (0, 5)


def test_float16_decodes_to_equal_bits_with_and_without_torch(monkeypatch):
    stored = (
        np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, 256)
    )  # every half float there is
    for scale in (1.0, 2.0**-126, 2.0**15, 2.0**100):
        row_scale = np.full(len(stored), scale, np.float32)
        assert "torch" in sys.modules or importlib.import_module("torch")
        with np.errstate(over="ignore"):
            with_torch = decode_rows(stored.copy(), row_scale, "float16")
            with monkeypatch.context() as patch:
                patch.delitem(sys.modules, "torch")
                without = decode_rows(stored.copy(), row_scale, "float16")
        np.testing.assert_array_equal(with_torch, without)
        numbers = ~np.isnan(without)
        assert with_torch[numbers].tobytes() == without[numbers].tobytes()
