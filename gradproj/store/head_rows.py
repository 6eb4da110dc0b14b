"""The head segment of a packed row: a document's largest rows of the vocabulary head's gradient.

An entry is a token id (little-endian), a byte for the scale and the signs of the k values, one bit
each (1: not negative; little bit order, as ``numpy.unpackbits(bitorder="little")``). The scale byte
b is ``2^((b - 128) / 2)``; 0 marks an unused entry, 255 a sample without a row.
"""

import math
from dataclasses import dataclass

import numpy as np

SCALE_BIAS = 128
UNUSED = 0
NO_ROW = 255

SCALES = np.exp2((np.arange(256) - SCALE_BIAS) / 2).astype(np.float32)
"""Scale byte -> scale."""
SCALES[UNUSED], SCALES[NO_ROW] = 0.0, math.nan


@dataclass(frozen=True)
class HeadSegment:
    """Place and form of the head rows in a stored row."""

    n_rows: int
    """Entries of a document."""
    k: int
    """Values of an entry."""
    vocabulary: int
    """Rows of the head."""

    @property
    def id_bytes(self) -> int:
        """Bytes of a token id: 2, 3 or 4."""
        return max(2, ((self.vocabulary - 1).bit_length() + 7) // 8)

    @property
    def entry_bytes(self) -> int:
        return self.id_bytes + 1 + -(-self.k // 8)

    @property
    def n_bytes(self) -> int:
        """Bytes of the segment."""
        return self.n_rows * self.entry_bytes


@dataclass(frozen=True)
class DecodedHead:
    """Head rows of n documents: ``value[j] = scale * (1 if the sign's bit is set, else -1)``."""

    ids: np.ndarray
    """``(n, m)`` int64 token ids; of no meaning in unused entries."""
    scale: np.ndarray
    """``(n, m)`` float32: 0 in unused entries, NaN in samples without a row."""
    signs: np.ndarray
    """``(n, m, ceil(k / 8))`` uint8."""

    def values(self, k: int) -> np.ndarray:
        """Return ``(n, m, k)`` float32."""
        bits = np.unpackbits(self.signs, axis=2, count=k, bitorder="little")
        return (bits.astype(np.float32) * 2 - 1) * self.scale[:, :, None]


def decode_head(stored: np.ndarray, segment: HeadSegment) -> DecodedHead:
    """Decode the segments ``(n, n_bytes)`` uint8 of n rows."""
    entries = stored.reshape(len(stored), segment.n_rows, segment.entry_bytes)
    n_bytes = segment.id_bytes
    ids = np.zeros(entries.shape[:2], np.int64)
    for byte in range(n_bytes):
        ids |= entries[:, :, byte].astype(np.int64) << (8 * byte)
    return DecodedHead(ids, SCALES[entries[:, :, n_bytes]], entries[:, :, n_bytes + 1 :])
