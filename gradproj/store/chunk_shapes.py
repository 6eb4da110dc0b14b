"""Shapes of shards and chunks, chosen from the sizes of rows."""

import math
from collections.abc import Sequence

SCALE_BYTES = 2
"""A layer's scale in the header of a packed row, float16."""
MAX_CHUNK_ROWS = 512
"""Of dense rows."""
_MAX_SHARD_BYTES = 512_000_000
_MAX_ROWS_PER_SHARD = 4096
_MIN_ROWS_PER_SHARD = 16
_MIN_UNITS = 64
_MAX_PACKED_CHUNK_BYTES = 512_000
_MIN_PACKED_CHUNK_WIDTH = 128
_MAX_PADDING = 0.02  # of a packed row


def choose_rows_per_shard(n_samples: int, row_bytes: int) -> int:
    """Return the largest power of two <= 4096 with shards <= 512 MB and >= 64 shards; >= 16."""
    rows = _MAX_ROWS_PER_SHARD
    while rows > _MIN_ROWS_PER_SHARD and (
        rows * row_bytes > _MAX_SHARD_BYTES or n_samples < _MIN_UNITS * rows
    ):
        rows //= 2
    return rows


def choose_chunk_width(widths: Sequence[int]) -> int:
    """Return the layers' common width, else their gcd if at least 64, else the whole row's."""
    common = math.gcd(*widths)
    if len(set(widths)) == 1 or common >= 64:
        return common
    return sum(widths)


def packed_widths(widths: Sequence[int], bits: int, more_bytes: int = 0) -> tuple[int, int, int]:
    """Return the bytes of a packed row's header, of the whole row, and of a chunk's part of a row.

    A chunk is as wide as divides every layer, so that one layer's bytes can be read alone; but if
    the padding which that takes is over 2 % of a row, it is as wide as the row. ``more_bytes``
    follow the layers.
    """
    codes = [-(-width * bits // 8) for width in widths]
    header = SCALE_BYTES * len(widths)
    used = header + sum(codes) + more_bytes
    common = math.gcd(*codes)
    chunk = common & -common  # the largest power of two that divides it
    while chunk >= _MIN_PACKED_CHUNK_WIDTH:
        start = _round_up(header, chunk)
        row = _round_up(start + sum(codes) + more_bytes, chunk)
        if row - used <= _MAX_PADDING * row:
            return start, row, chunk
        chunk //= 2
    return header, used, used


def packed_chunk_rows(chunk_width: int) -> int:
    """Return the most rows of a chunk of packed rows."""
    return max(1, _MAX_PACKED_CHUNK_BYTES // chunk_width)


def choose_chunk_rows(rows_per_shard: int, most: int) -> int:
    """Return the rows of a chunk: all of a shard's, or a divisor of them, ``most`` at most."""
    if rows_per_shard <= most:
        return rows_per_shard
    # A shard is a whole number of chunks; chunks of a few rows would make the index as large as
    # the data.
    divisors = (n for n in range(most, max(most // 8, 1) - 1, -1) if rows_per_shard % n == 0)
    return next(divisors, rows_per_shard)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
