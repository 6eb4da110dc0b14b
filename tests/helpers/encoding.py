"""Stored rows in numpy: made with the job's encoder, decoded by the definition of the format."""

from collections.abc import Sequence

import numpy as np
import torch

from gradproj.store.encoding import decode_rows
from gradproj.store.layout import LayerSlice, StoreConfig, StoreLayout, plan_layout
from gradproj.store.row_encoder import RowEncoder


def encode(
    rows: np.ndarray, layout: StoreLayout, layers: Sequence[LayerSlice] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Encode float32 rows as the job does. Dense rows need no layers."""
    stored, row_scale = RowEncoder(layout, layers).encode(torch.from_numpy(rows))
    return stored.numpy(), row_scale.numpy()


def encode_rows(rows: np.ndarray, proj_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode dense rows of any width."""
    config = StoreConfig(encoding="dense", proj_dtype=proj_dtype)
    return encode(rows, plan_layout(1, [rows.shape[1]], 1, config))


def decode(
    stored: np.ndarray, row_scale: np.ndarray, layout: StoreLayout, layers: Sequence[LayerSlice]
) -> np.ndarray:
    """Decode whole stored rows, ``(n, D)`` float32; packed ones a value at a time."""
    if not layout.is_packed:
        return decode_rows(stored, row_scale, layout.proj_dtype)
    b, rows = layout.bits, np.empty((len(stored), layout.dim))
    for row, scale, out in zip(stored, row_scale.astype(np.float64), rows, strict=True):
        for number, x in enumerate(layers):
            layer_scale = row[2 * number : 2 * number + 2].copy().view("<f2").astype(np.float64)
            bits = np.unpackbits(row[x.stored_start : x.stored_end], bitorder="little")
            width = x.slice_end - x.slice_start
            codes = bits[: width * b].reshape(width, b) @ 2 ** np.arange(b)
            out[x.slice_start : x.slice_end] = (2 * codes - (2**b - 1)) * layer_scale * scale
    return rows.astype(np.float32)
