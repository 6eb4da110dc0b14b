"""Decoding of dense rows: ``row = stored * row_scale``. ``row_encoder.py`` encodes.

``packing.py`` decodes packed rows.
"""

import sys
from collections.abc import Iterator

import numpy as np

from gradproj.store.bfloat16 import bfloat16_to_float32
from gradproj.store.layout import StoreLayout

VALUES_PER_STEP = 2**17
"""Values to decode at once. The temporaries stay in the cache, which is several times
faster than whole arrays."""


def row_formula(layout: StoreLayout) -> str:
    """Return a row as a formula, for people who have the store and no documentation."""
    if not layout.is_packed:
        return "row = projections[i] * row_scale[i]"
    return (
        f"row = (2 code - {2**layout.bits - 1}) * scale of the layer * row_scale[i]; a stored "
        f"row has a float16 scale for each layer, then from each layer's stored_start on codes "
        f"of {layout.bits} bits in little bit order"
    )


def decode_rows(stored: np.ndarray, row_scale: np.ndarray, proj_dtype: str) -> np.ndarray:
    """Return ``stored * row_scale``, ``(n, D)`` float32."""
    out = np.empty(stored.shape, np.float32)
    for step in _steps(stored):
        decode_into(stored[step], row_scale[step], proj_dtype, out[step])
    return out


def decode_into(
    stored: np.ndarray, row_scale: np.ndarray, proj_dtype: str, out: np.ndarray
) -> None:
    """Decode some rows into ``out`` (same shape, float32).

    Fastest with ``VALUES_PER_STEP`` values a call. ``out`` may be ``stored`` itself if that is
    float32.
    """
    torch = sys.modules.get("torch")
    if torch is not None and stored.flags.writeable:
        # torch converts and multiplies at once, in a third of numpy's time, but is not imported for
        # it. Both are exact.
        if proj_dtype == "bfloat16":
            values = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        else:
            values = torch.from_numpy(stored)
        scale = torch.from_numpy(row_scale if row_scale.flags.writeable else row_scale.copy())
        torch.mul(values, scale[:, None], out=torch.from_numpy(out))
    elif proj_dtype == "float16":
        _decode_float16_into(stored, row_scale, out)
    else:
        values = bfloat16_to_float32(stored) if proj_dtype == "bfloat16" else stored
        np.multiply(values, row_scale[:, None], out=out)


def _decode_float16_into(stored: np.ndarray, row_scale: np.ndarray, out: np.ndarray) -> None:
    # A half's bits, shifted into a float's, are value * 2^-112, denormals included. One
    # multiplication corrects that and applies the row's scale: four times as fast as numpy's own
    # conversion. Infinities and NaN come out wrong and are converted again below.
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
        with np.errstate(invalid="ignore"):  # signalling NaN are expected here
            values = stored[special].view(np.float16).astype(np.float32)
            out[special] = values * row_scale[special, None]


def _steps(rows: np.ndarray) -> Iterator[slice]:
    n = max(1, VALUES_PER_STEP // max(1, rows.shape[1]))
    return (slice(start, start + n) for start in range(0, len(rows), n))
