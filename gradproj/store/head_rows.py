"""The head rows of packed rows: each document's largest rows of the vocabulary head's gradient.

An entry is a token id (little-endian), a byte for the scale and the signs of the k values, one bit
each (1: not negative; little bit order, as ``numpy.unpackbits(bitorder="little")``). The scale byte
b is ``2^((b - 128) / 2)``; 0 marks an unused entry, 255 a sample without a row. The entries of a
document follow the layers of its row. ``engine/head_rows.py`` encodes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

HEAD_NAME = "lm_head rows"
"""Name of the head rows where layers are chosen by name."""
HEAD_MATRIX, HEAD_SCALE = "head_matrix", "head_scale"
"""Arrays of the group, flat float32: M ``(k, H)`` and D ``(V,)``."""

SCALE_BIAS = 128
UNUSED = 0
NO_ROW = 255

SCALES = np.exp2((np.arange(256) - SCALE_BIAS) / 2).astype(np.float32)
"""Scale byte -> scale."""
SCALES[UNUSED], SCALES[NO_ROW] = 0.0, math.nan


@dataclass(frozen=True)
class HeadSegment:
    """Form of the head rows, and their place in a stored row."""

    n_rows: int
    """Entries of a document."""
    k: int
    """Values of an entry."""
    vocabulary: int
    """Rows of the head."""
    stored_start: int = 0
    """First byte in a stored row."""

    @classmethod
    def of(cls, attributes: Mapping[str, Any], row_bytes: int) -> "HeadSegment | None":
        """Return the segment of a store's attributes; None for a store without head rows.

        Raises:
            KeyError, TypeError, ValueError: the attribute is damaged.
        """
        recorded = attributes.get("head")
        if recorded is None:
            return None
        segment = cls(**{name: int(recorded[name]) for name in cls.__dataclass_fields__})
        if min(segment.n_rows, segment.k, segment.vocabulary) < 1:
            raise ValueError(f"head rows of this form do not exist: {segment}")
        if not 0 <= segment.stored_start <= segment.stored_end <= row_bytes:
            raise ValueError(f"the head rows end at {segment.stored_end}, a row at {row_bytes}")
        return segment

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

    @property
    def stored_end(self) -> int:
        return self.stored_start + self.n_bytes

    def as_attribute(self) -> dict[str, int]:
        """Return the attribute ``head`` of a store's group."""
        derived = {"id_bytes": self.id_bytes, "stored_end": self.stored_end}
        return asdict(self) | derived


@dataclass(frozen=True)
class DecodedHead:
    """Head rows of n documents: a value is its entry's scale, with the sign of its bit."""

    ids: np.ndarray
    """``(n, m)`` int64 token ids; of no meaning in unused entries."""
    scale: np.ndarray
    """``(n, m)`` float32: 0 in unused entries, NaN in samples without a row."""
    signs: np.ndarray
    """``(n, m, ceil(k / 8))`` uint8; a set bit is a value that is not negative."""

    def values(self, k: int) -> np.ndarray:
        """Return ``(n, m, k)`` float32."""
        bits = np.unpackbits(self.signs, axis=2, count=k, bitorder="little")
        return (bits.astype(np.float32) * 2 - 1) * self.scale[:, :, None]


@dataclass(frozen=True)
class HeadQueries:
    """The largest head rows of queries, in full precision."""

    ids: np.ndarray
    """``(Q, M)`` int64 token ids."""
    values: np.ndarray
    """``(Q, M, k)`` float32: x of these tokens; rows of zeros are unused."""

    def __getitem__(self, chosen: slice | np.ndarray) -> "HeadQueries":
        return HeadQueries(self.ids[chosen], self.values[chosen])

    def squares(self) -> np.ndarray:
        """Return each query's score with itself by its head rows, ``(Q,)`` float64."""
        return np.square(self.values, dtype=np.float64).sum(axis=(1, 2))

    def summed(self, row_of: np.ndarray, factors: np.ndarray, n_rows: int) -> "HeadQueries":
        """Return the sums over queries: query i is added to ``row_of[i]``, times ``factors[i]``."""
        n_tokens = int(self.ids.max(initial=0)) + 1
        used = self.values.any(axis=2)
        key = (row_of[:, None] * n_tokens + self.ids)[used]
        distinct, number = np.unique(key, return_inverse=True)
        order = np.argsort(number, kind="stable")
        values = (self.values * factors[:, None, None])[used][order].astype(np.float64)
        starts = np.searchsorted(number[order], np.arange(len(distinct)))
        sums = np.add.reduceat(values, starts, axis=0) if len(values) else values
        rows, tokens = np.divmod(distinct, n_tokens)
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        shape = n_rows, int(place.max(initial=0)) + 1
        ids, out = np.zeros(shape, np.int64), np.zeros((*shape, values.shape[1]), np.float32)
        ids[rows, place], out[rows, place] = tokens, sums
        return HeadQueries(ids, out)


def decode_head(stored: np.ndarray, segment: HeadSegment) -> DecodedHead:
    """Decode the segments ``(n, n_bytes)`` uint8 of n rows."""
    entries = stored.reshape(len(stored), segment.n_rows, segment.entry_bytes)
    n_bytes = segment.id_bytes
    ids = np.zeros(entries.shape[:2], np.int64)
    for byte in range(n_bytes):
        ids |= entries[:, :, byte].astype(np.int64) << (8 * byte)
    return DecodedHead(ids, SCALES[entries[:, :, n_bytes]], entries[:, :, n_bytes + 1 :])
