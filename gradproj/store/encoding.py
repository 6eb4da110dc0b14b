"""How float32 rows become stored ones and back: ``row = stored * row_scale``. The one place that knows."""

import sys
from collections.abc import Iterator

import numpy as np

from gradproj.store.bfloat16 import NAN_BITS, bfloat16_to_float32, float32_to_bfloat16
from gradproj.store.layout import STORED_DTYPES

_LEAST_EXPONENT = (
    -126
)  # of a normal float32, so that no scale is lost where denormals are flushed to zero
VALUES_PER_STEP = 2**17
"""Values to encode or decode at once: the temporaries stay in the cache, several times faster than whole arrays."""


def encode_rows(rows: np.ndarray, proj_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode float32 rows for storage.

    A float16 row is divided by a power of two that brings its largest magnitude into [2^14, 2^15), so that
    rows of any size keep 11 bits; the division and its undoing are exact. Where that would need a power below
    2^-126 (largest magnitude under 2^-111) the scale is 2^-126. Rows of zeros or with a NaN or infinity, and
    the other types, have scale 1.

    Args:
        rows: ``(n, D)`` float32.
        proj_dtype: float16, bfloat16 or float32.

    Returns:
        The stored rows ``(n, D)`` (bfloat16 as uint16 bits; float32 rows are not copied) and ``row_scale``
        ``(n,)`` float32.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    row_scale = np.ones(len(rows), np.float32)
    if proj_dtype == "float32":
        return rows, row_scale
    stored = np.empty(rows.shape, STORED_DTYPES[proj_dtype])
    if proj_dtype == "bfloat16":
        for step in _steps(rows):
            stored[step] = float32_to_bfloat16(rows[step])
        return stored, row_scale
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    scalable = np.isfinite(largest) & (largest > 0)
    exponents = np.maximum(np.frexp(largest[scalable])[1] - 15, _LEAST_EXPONENT)
    row_scale[scalable] = np.ldexp(np.float32(1), exponents)
    inverse = 1 / row_scale
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # only in rows that hold a NaN or infinity anyway
        for step in _steps(rows):
            stored[step] = rows[step] * inverse[step, None]
    return stored, row_scale


def decode_rows(stored: np.ndarray, row_scale: np.ndarray, proj_dtype: str) -> np.ndarray:
    """``stored * row_scale`` in float32, ``(n, D)``; NaN where either is."""
    out = np.empty(stored.shape, np.float32)
    for step in _steps(stored):
        decode_into(stored[step], row_scale[step], proj_dtype, out[step])
    return out


def decode_into(
    stored: np.ndarray, row_scale: np.ndarray, proj_dtype: str, out: np.ndarray
) -> None:
    """Decode some rows into ``out`` (same shape, float32); best at some 100,000 values a call.

    ``out`` may be ``stored`` itself where that is float32.
    """
    if proj_dtype == "float16":
        _decode_float16_into(stored, row_scale, out)
    else:
        values = bfloat16_to_float32(stored) if proj_dtype == "bfloat16" else stored
        np.multiply(values, row_scale[:, None], out=out)


def _decode_float16_into(stored: np.ndarray, row_scale: np.ndarray, out: np.ndarray) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and stored.flags.writeable:
        # The processor's own conversion, by whoever has it loaded: a reader of the store waits for no torch, and
        # takes one and a half times as long. Both are exact.
        torch.from_numpy(out).copy_(torch.from_numpy(stored.view(np.float16)))
        with np.errstate(invalid="ignore"):
            np.multiply(out, row_scale[:, None], out=out)
        return
    # Moving a half's bits into a float's place gives value * 2^-112, denormals included; the multiplication
    # puts that right together with the row's scale. Four times as fast as numpy's own conversion. Only
    # infinities and NaN come out wrong, and are done again below.
    bits = stored.view(np.int16)
    wide = bits.astype(np.int32)
    wide <<= 13
    wide &= np.int32(-0x70000001)  # sign and the 15 bits of exponent and mantissa
    if (row_scale >= 2**15).any():  # 2^112 times that is no float32
        np.multiply(wide.view(np.float32), np.float32(2**112), out=out)
        np.multiply(out, row_scale[:, None], out=out)
    else:
        np.multiply(wide.view(np.float32), (row_scale * np.float32(2**112))[:, None], out=out)
    exponents = bits & np.int16(0x7C00)
    if exponents.max(initial=0) == 0x7C00:
        special = exponents.max(axis=1) == 0x7C00
        with np.errstate(invalid="ignore"):  # NaN of any kind is expected here
            out[special] = (
                stored[special].view(np.float16).astype(np.float32) * row_scale[special, None]
            )


def nan_rows(shape: tuple[int, ...], proj_dtype: str) -> np.ndarray:
    """Stored values that read as NaN: the fill of what is not there."""
    return np.full(
        shape, NAN_BITS if proj_dtype == "bfloat16" else np.nan, STORED_DTYPES[proj_dtype]
    )


def _steps(rows: np.ndarray) -> Iterator[slice]:
    n = max(1, VALUES_PER_STEP // max(1, rows.shape[1]))
    return (slice(start, start + n) for start in range(0, len(rows), n))
