"""Decoding of packed rows in numpy: codes of a few bits, with one scale a layer.

The bytes of a row are a header of float16 scales, one a layer, then each layer's codes. Value j of
a layer has the bits ``[j b, (j + 1) b)`` of the layer's bytes, in little bit order, and is
``(2 code - (2^b - 1)) * scale * row_scale``. ``row_encoder.py`` encodes.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np

from gradproj.store.chunk_shapes import SCALE_BYTES
from gradproj.store.layout import LayerSlice

_VALUES_PER_STEP = 2**17  # to decode at once: they stay in the cache


class PackedDecoder:
    """Decodes stored rows of some layers: the whole header, then these layers' bytes.

    Args:
        layers: the layers to decode, in the order of their bytes.
        numbers: their positions among all of the store's layers.
        header_width: bytes of the header.
        bits: of a code: 1, 2, 4 or 8.
    """

    def __init__(
        self, layers: Sequence[LayerSlice], numbers: Sequence[int], header_width: int, bits: int
    ) -> None:
        self._numbers = list(numbers)
        self._scale_bytes = SCALE_BYTES * (max(self._numbers, default=-1) + 1)
        self._bits = bits
        widths = [layer.slice_end - layer.slice_start for layer in layers]
        self.width = sum(widths)
        """Decoded values of a row."""
        self._groups: list[tuple[slice, slice, slice, int]] = []
        """Neighbours of one width: scales, bytes and values of all of them, and values of one."""
        number, byte, value = 0, header_width, 0
        for width, group in groupby(widths):
            n = len(list(group))
            n_bytes = n * -(-width * bits // 8)
            self._groups.append(
                (
                    slice(number, number + n),
                    slice(byte, byte + n_bytes),
                    slice(value, value + n * width),
                    width,
                )
            )
            number, byte, value = number + n, byte + n_bytes, value + n * width

    def decode(self, stored: np.ndarray, row_scale: np.ndarray) -> np.ndarray:
        """Decode ``(n, bytes)`` uint8 to ``(n, width)`` float32."""
        out = np.empty((len(stored), self.width), np.float32)
        self.decode_into(stored, row_scale, out)
        return out

    def decode_into(self, stored: np.ndarray, row_scale: np.ndarray, out: np.ndarray) -> None:
        """Decode rows into ``out`` ``(n, width)`` float32. Rows of NaN scales become NaN."""
        step = max(1, _VALUES_PER_STEP // max(1, self.width))
        for start in range(0, len(stored), step):
            rows = slice(start, start + step)
            self._decode_some(stored[rows], row_scale[rows], out[rows])

    def _decode_some(self, stored: np.ndarray, row_scale: np.ndarray, out: np.ndarray) -> None:
        header = np.ascontiguousarray(stored[:, : self._scale_bytes]).view("<f2")
        # Scales are exact: row_scale is a power of two. NaN signal in rows that do not exist.
        with np.errstate(invalid="ignore"):
            scales = header[:, self._numbers].astype(np.float32) * row_scale[:, None]
        levels, n = _levels(self._bits), len(stored)
        for numbers, places, values, width in self._groups:
            n_layers = numbers.stop - numbers.start
            decoded = levels[stored[:, places]].reshape(n, n_layers, -1)[:, :, :width]
            target = out[:, values].reshape(n, n_layers, width)
            np.multiply(decoded, scales[:, numbers, None], out=target)


@lru_cache
def _levels(bits: int) -> np.ndarray:
    """Return the odd integers ``2 code - (2^bits - 1)`` of each byte: ``(256, 8 / bits)``."""
    shifts = np.arange(0, 8, bits)
    codes = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    return (2 * codes - (2**bits - 1)).astype(np.float32)
