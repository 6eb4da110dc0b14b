"""Reads the head rows of a store."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.store.head_rows import DecodedHead, HeadSegment, decode_head
from gradproj.store.metadata import head_of
from gradproj.store.row_reader import Rows
from gradproj.store.selection import select_elements


class HeadView:
    """The head rows of a store, read when they are asked for."""

    def __init__(self, segment: HeadSegment, rows: Rows) -> None:
        self.segment = segment
        self._rows = rows
        place = segment.stored_start, segment.stored_end
        self._selection = select_elements(rows.layout, (place,))

    @classmethod
    def of(cls, store_path: Path, attributes: dict[str, Any], rows: Rows) -> "HeadView | None":
        """Return the view of a store; None for a store without head rows."""
        segment = head_of(store_path, attributes, rows.layout)
        return None if segment is None else cls(segment, rows)

    def stored(self, first: int, last: int) -> np.ndarray:
        """Read the segments of the samples ``[first, last)``, ``(n, n_bytes)`` uint8."""
        return self._rows.stored(first, last, self._selection)[0]

    def rows(self, ids: Sequence[int] | np.ndarray) -> DecodedHead:
        """Read the head rows of samples, decoded."""
        parts = [self.stored(int(i), int(i) + 1) for i in ids]
        empty = np.empty((0, self.segment.n_bytes), np.uint8)
        return decode_head(np.concatenate([empty, *parts]), self.segment)

    def scan(
        self, rows_per_block: int | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[np.ndarray, DecodedHead]]:
        """Yield ``(ids (n,) int64, rows)`` of all samples in order, a block at a time."""
        n_bytes = self.segment.n_bytes
        for first, last in self._rows.blocks(rows_per_block, self._selection, n_bytes, start, stop):
            yield np.arange(first, last), decode_head(self.stored(first, last), self.segment)
