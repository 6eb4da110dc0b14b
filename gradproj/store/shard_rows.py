"""Rows of one uncompressed shard, decoded. How its bytes are read is left to two kinds of shards.

``MappedShard`` maps a file; ``FetchedShard`` asks for byte ranges of an object.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from gradproj.store.encoding import VALUES_PER_STEP
from gradproj.store.layout import StoreLayout
from gradproj.store.selection import Selection
from gradproj.store.shard_index import ShardIndex

MIN_ROWS_READ = 32
"""Rows of a chunk that are read a tile at a time; fewer are copied one by one."""


class ShardRows(ABC):
    """The rows of one shard; row 0 is the first sample of its unit."""

    layout: StoreLayout
    index: ShardIndex

    @property
    def regular(self) -> bool:
        """Whether the rows can be read here; zarr-python reads any other shard."""
        return self.index.regular

    @property
    def exists(self) -> bool:
        """Whether there are rows; in a bucket the shard of a unit that was given up has none."""
        return self.index.has_chunks

    @abstractmethod
    def prefetch(self, start: int, stop: int, selection: Selection) -> None:
        """Have the rows ``[start, stop)`` read in the background."""

    @abstractmethod
    def prefetch_rows(self, rows: np.ndarray, selection: Selection) -> None:
        """Have single rows read in the background."""

    @abstractmethod
    def release(self, start: int, stop: int, selection: Selection) -> None:
        """Release the memory of the rows ``[start, stop)``, which have been read."""

    @abstractmethod
    def copy_range(self, start: int, selection: Selection, out: np.ndarray) -> None:
        """Copy the stored rows from ``start`` on into ``out`` ``(n, selection.width)``."""

    @abstractmethod
    def _gather(self, rows: np.ndarray, selection: Selection, out: np.ndarray) -> None:
        """Copy the stored values of rows in any order."""

    @abstractmethod
    def _read_into(self, out: memoryview, begin: int) -> None:
        """Fill ``out`` with the shard's bytes from ``begin`` on."""

    def has_tiles(self, start: int, selection: Selection) -> bool:
        """Return whether ``tiles`` can serve the rows from ``start`` on."""
        return self.index.has_tiles(start, selection)

    def tiles(
        self, start: int, stop: int, selection: Selection
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read the stored rows ``[start, stop)`` of one band, a chunk across at a time.

        Yields:
            The position of the tile's first value in the selection, and the values
            ``(n, chunk width)``, which the next tile overwrites.
        """
        tile = np.empty((stop - start, self.layout.chunk_width), self.layout.stored_dtype)
        view = tile.data.cast("B")
        at = 0
        for begin in self.index.tile_begins(start, selection):
            self._read_into(view, begin)
            yield at, tile
            at += self.layout.chunk_width

    def read_range(
        self, start: int, selection: Selection, row_scale: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode the rows from ``start`` on into ``out`` ``(n, decoded width)`` float32."""
        for band, first, last in self.index.bands(start, start + len(out)):
            begin = band * self.layout.chunk_rows + first
            here = slice(begin - start, begin - start + last - first)
            tiled = selection.packed is None and self.has_tiles(begin, selection)
            if last - first >= MIN_ROWS_READ and tiled:
                for value, tile in self.tiles(begin, begin + last - first, selection):
                    target = out[here, value : value + tile.shape[1]]
                    selection.decode_into(tile, row_scale[here], target)
            else:
                copy = partial(self._copy_part, begin, selection)
                self._decode(copy, selection, row_scale[here], out[here])

    def _copy_part(self, start: int, selection: Selection, rows: slice, stored: np.ndarray) -> None:
        self.copy_range(start + rows.start, selection, stored)

    def read_rows(
        self, rows: np.ndarray, selection: Selection, row_scale: np.ndarray
    ) -> np.ndarray:
        """Decode rows (positions in the shard, any order): ``(n, decoded width)`` float32."""
        out = np.empty((len(rows), selection.decoded_width), np.float32)
        self._decode(
            lambda part, stored: self._gather(rows[part], selection, stored),
            selection,
            row_scale,
            out,
        )
        return out

    def _decode(
        self,
        copy: Callable[[slice, np.ndarray], None],
        selection: Selection,
        row_scale: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Decode what ``copy(rows, stored)`` writes, a few rows at a time so that they stay cached.

        float32 rows are copied to ``out`` at once and scaled in place. Packed rows are copied at
        once, too: they are small beside ``out``.
        """
        step = max(1, VALUES_PER_STEP // max(1, out.shape[1]))
        if selection.packed:
            step = max(1, len(out))
        in_place = self.layout.stored_dtype == out.dtype
        buffer = np.empty(
            (0 if in_place else min(step, len(out)), selection.width), self.layout.stored_dtype
        )
        for at in range(0, len(out), step):
            rows = slice(at, min(at + step, len(out)))
            stored = out[rows] if in_place else buffer[: rows.stop - at]
            copy(rows, stored)
            selection.decode_into(stored, row_scale[rows], out[rows])
