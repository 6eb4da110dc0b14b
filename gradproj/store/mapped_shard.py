"""Rows of one uncompressed shard file.

A few rows are copied from the map. Many rows are read into a small buffer: that costs no page
faults, and the pages of a store larger than memory do not count as this process's.
"""

from pathlib import Path

import numpy as np

from gradproj.store.layout import StoreLayout
from gradproj.store.page_cache import PagedFile
from gradproj.store.selection import Selection
from gradproj.store.shard_index import ShardIndex, index_bytes
from gradproj.store.shard_rows import MIN_ROWS_READ, ShardRows

_MAX_ROWS_ONE_BY_ONE = 4  # gathering more of them at once is cheaper than copying each


class MappedShard(ShardRows):
    """One uncompressed shard file.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it is damaged.
    """

    def __init__(self, path: Path, layout: StoreLayout, index_at_end: bool) -> None:
        self.layout = layout
        self.file = file = PagedFile(path)
        data, n_index = file.data, index_bytes(layout)
        start = max(0, len(data) - n_index) if index_at_end else 0
        self.index = index = ShardIndex(path, layout, data[start : start + n_index], len(data))
        shape = (layout.chunk_rows, layout.chunk_width)
        self._chunks = np.ndarray(
            (index.n_places, *shape), layout.stored_dtype, file.data, index.origin
        )
        n_across = index.place.shape[1]
        self._grid = self._chunks.reshape(-1, n_across, *shape) if index.in_order else None
        """``(bands, chunks across, chunk_rows, chunk_width)`` if the chunks are in C order."""

    def prefetch(self, start: int, stop: int, selection: Selection) -> None:
        """Have the disk read the rows ``[start, stop)`` of the shard, unless they are in memory."""
        index = self.index
        for band, first, last in index.bands(start, stop):
            # Only the ends are checked: rows are read as whole ranges, so what lies between has
            # been read with them.
            begin, end = index.byte_span(band, first, last, selection)
            if end and not (self.file.is_cached(begin) and self.file.is_cached(end - 1)):
                for begin, end in index.byte_ranges(band, first, last, selection):
                    self.file.prefetch(begin, end)

    def prefetch_rows(self, rows: np.ndarray, selection: Selection) -> None:
        for row in rows.tolist():
            self.prefetch(row, row + 1, selection)

    def release(self, start: int, stop: int, selection: Selection) -> None:
        """Unmap all pages of the shard; the page cache keeps them."""
        self.file.release()

    def _read_into(self, out: memoryview, begin: int) -> None:
        self.file.read_into(out, begin)

    def copy_range(self, start: int, selection: Selection, out: np.ndarray) -> None:
        for band, first, last in self.index.bands(start, start + len(out)):
            begin = band * self.layout.chunk_rows + first
            target = out[begin - start : begin - start + last - first]
            if len(target) >= MIN_ROWS_READ and self.has_tiles(begin, selection):
                for value, tile in self.tiles(begin, begin + len(target), selection):
                    target[:, value : value + tile.shape[1]] = tile
            elif self._grid is None:
                self._gather(np.arange(begin, begin + len(target)), selection, target)
            elif band >= len(self._grid):
                target[...] = self.layout.fill
            else:
                self._copy_from_grid(self._grid[band, :, first:last], selection, target)

    def _copy_from_grid(self, rows: np.ndarray, selection: Selection, out: np.ndarray) -> None:
        """Copy ``(chunks across, n, chunk_width)`` mapped values into ``(n, selection.width)``."""
        at = 0
        for piece in selection.pieces:
            chunks = slice(piece.first_chunk, piece.first_chunk + piece.n_chunks)
            source = rows[chunks, :, piece.first : piece.stop]
            target = out[:, at : at + piece.width]
            target.reshape(len(out), piece.n_chunks, -1)[...] = source.transpose(1, 0, 2)
            at += piece.width

    def _gather(self, rows: np.ndarray, selection: Selection, out: np.ndarray) -> None:
        if self._grid is not None and len(rows) <= _MAX_ROWS_ONE_BY_ONE:
            for i, row in enumerate(rows.tolist()):
                self.copy_range(row, selection, out[i : i + 1])
            return
        bands, inside = np.divmod(rows, self.layout.chunk_rows)
        at = 0
        for piece in selection.pieces:
            target = out[:, at : at + piece.width].reshape(len(rows), piece.n_chunks, -1)
            places = self.index.place[bands, piece.first_chunk : piece.first_chunk + piece.n_chunks]
            if len(self._chunks):
                target[...] = self._chunks[places, inside[:, None], piece.first : piece.stop]
            target[places < 0] = self.layout.fill
            at += piece.width
