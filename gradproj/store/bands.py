"""A scan in the shortest way from the disk to a product: bands of rows, tile by tile, as they are stored.

The bytes are read into one small buffer that stays in a core's cache and is used again. No page of a file is mapped,
so a scan of terabytes needs the memory of a tile; and this is faster than mapping, at best by a sixth.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Band:
    """Consecutive samples of one unit, whose values come a tile at a time."""

    first: int
    """The first sample's id."""
    status: np.ndarray
    """``(n,)`` uint8, codes of ``STATUS``."""
    row_scale: np.ndarray
    """``(n,)`` float32: ``row = stored * row_scale``."""
    has_rows: bool
    """Whether there is a shard; without one no tile comes."""
    tiles: Iterator[tuple[int, np.ndarray]]
    """``(at, stored)`` with ``stored (n, w)`` the values ``at`` to ``at + w`` of what was asked for, in the layout's
    ``stored_dtype``. All tiles together are each value once. Take them before the next band; each overwrites the one
    before. Nothing is read before the first is taken."""

    @property
    def last(self) -> int:
        """The id after the last sample's."""
        return self.first + len(self.status)
