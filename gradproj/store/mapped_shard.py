"""Rows of one uncompressed shard, addressed through the shard's own index.

A few rows are copied from the map. Many rows are read into a small buffer: that costs no page
faults, and the pages of a store larger than memory do not count as this process's.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from gradproj.errors import damaged
from gradproj.files import crc32c
from gradproj.store.encoding import VALUES_PER_STEP
from gradproj.store.layout import StoreLayout
from gradproj.store.page_cache import PagedFile
from gradproj.store.selection import Selection

_EMPTY_CHUNK = 2**64 - 1
_MAX_ROWS_ONE_BY_ONE = 4  # gathering more of them at once is cheaper than copying each
_MIN_ROWS_READ = 32  # of a chunk; fewer are copied from mapped pages instead of read


class MappedShard:
    """One uncompressed shard file, with its inner chunks in any order (zarr-python's is Morton).

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it is damaged.
    """

    def __init__(self, path: Path, layout: StoreLayout, index_at_end: bool) -> None:
        self.layout = layout
        self.file = file = PagedFile(path)
        grid = (
            layout.rows_per_shard // layout.chunk_rows,
            layout.stored_width // layout.chunk_width,
        )
        offsets = self._read_offsets(path, grid, index_at_end)
        shape = (layout.chunk_rows, layout.chunk_width)
        self._row_bytes = shape[1] * layout.stored_dtype.itemsize
        self._chunk_bytes = chunk_bytes = shape[0] * self._row_bytes
        present = offsets != _EMPTY_CHUNK
        self._origin = origin = int(offsets.min()) if present.any() else 0
        last = int(offsets[present].max()) if present.any() else -chunk_bytes
        if last + chunk_bytes > len(file.data):
            raise damaged(path, f"its index points past its end ({len(file.data)} bytes)")
        steps = np.where(present, offsets - np.uint64(origin), 0)
        self.regular = not (steps % np.uint64(chunk_bytes)).any()
        """Whether chunks lie at multiples of their size; zarr-python reads any other shard."""
        self._place = np.where(present, (steps // np.uint64(chunk_bytes)).astype(np.int64), -1)
        n_places = (last - origin) // chunk_bytes + 1
        self._chunks = np.ndarray((n_places, *shape), layout.stored_dtype, file.data, origin)
        order = self._place.reshape(-1)[:n_places]
        in_order = n_places % grid[1] == 0 and bool((order == np.arange(n_places)).all())
        self._grid = self._chunks.reshape(-1, grid[1], *shape) if in_order else None
        """``(bands, chunks across, chunk_rows, chunk_width)`` if the chunks are in C order, as we
        write them; else None. A band is a row of chunks."""

    def _read_offsets(self, path: Path, grid: tuple[int, int], index_at_end: bool) -> np.ndarray:
        data, index_bytes = self.file.data, grid[0] * grid[1] * 16
        if len(data) < index_bytes + 4:
            raise damaged(path, f"{len(data)} bytes cannot hold its index")
        start = len(data) - index_bytes - 4 if index_at_end else 0
        tail = data[start : start + index_bytes + 4]
        if crc32c(tail[:-4]).to_bytes(4, "little") != tail[-4:]:
            raise damaged(path, "the checksum of its index does not match")
        return np.frombuffer(tail, "<u8", grid[0] * grid[1] * 2).reshape(*grid, 2)[:, :, 0]

    def prefetch(self, start: int, stop: int, selection: Selection) -> None:
        """Have the disk read the rows ``[start, stop)`` of the shard, unless they are in memory."""
        for band, first, last in self._bands(start, stop):
            # Only the ends are checked: rows are read as whole ranges, so what lies between has
            # been read with them.
            begin, end = self._byte_span(band, first, last, selection)
            if end and not (self.file.is_cached(begin) and self.file.is_cached(end - 1)):
                for begin, end in self._byte_ranges(band, first, last, selection):
                    self.file.prefetch(begin, end)

    def copy_range(self, start: int, selection: Selection, out: np.ndarray) -> None:
        """Copy the stored rows from ``start`` on into ``out`` ``(n, selection.width)``."""
        for band, first, last in self._bands(start, start + len(out)):
            begin = band * self.layout.chunk_rows + first
            target = out[begin - start : begin - start + last - first]
            if len(target) >= _MIN_ROWS_READ and self.has_tiles(begin, selection):
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

    def has_tiles(self, start: int, selection: Selection) -> bool:
        """Return whether ``tiles`` can serve the rows from ``start`` on.

        It needs chunks in C order, all present, and a selection of whole chunks.
        """
        return (
            self._grid is not None
            and start // self.layout.chunk_rows < len(self._grid)
            and all(
                piece.stop - piece.first == self.layout.chunk_width for piece in selection.pieces
            )
        )

    def tiles(
        self, start: int, stop: int, selection: Selection
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read the stored rows ``[start, stop)`` of one band, a chunk across at a time.

        No page of the file is mapped.

        Yields:
            The position of the tile's first value in the selection, and the values
            ``(n, chunk width)``, which the next tile overwrites.
        """
        band, inside = divmod(start, self.layout.chunk_rows)
        tile = np.empty((stop - start, self.layout.chunk_width), self.layout.stored_dtype)
        view = tile.data.cast("B")
        chunks = [
            np.arange(piece.first_chunk, piece.first_chunk + piece.n_chunks)
            for piece in selection.pieces
        ]
        places = self._place[band, np.concatenate([np.empty(0, int), *chunks])]
        begins = self._origin + self._chunk_bytes * places + inside * self._row_bytes
        at = 0
        for begin in begins.tolist():
            self.file.read_into(view, begin)
            yield at, tile
            at += self.layout.chunk_width

    def read_range(
        self, start: int, selection: Selection, row_scale: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode the rows from ``start`` on into ``out`` ``(n, decoded width)`` float32."""
        for band, first, last in self._bands(start, start + len(out)):
            begin = band * self.layout.chunk_rows + first
            here = slice(begin - start, begin - start + last - first)
            tiled = selection.packed is None and self.has_tiles(begin, selection)
            if last - first >= _MIN_ROWS_READ and tiled:
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
        for row in rows.tolist():
            self.prefetch(row, row + 1, selection)
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

    def _gather(self, rows: np.ndarray, selection: Selection, out: np.ndarray) -> None:
        """Copy the stored values of rows in any order."""
        if self._grid is not None and len(rows) <= _MAX_ROWS_ONE_BY_ONE:
            for i, row in enumerate(rows.tolist()):
                self.copy_range(row, selection, out[i : i + 1])
            return
        bands, inside = np.divmod(rows, self.layout.chunk_rows)
        at = 0
        for piece in selection.pieces:
            target = out[:, at : at + piece.width].reshape(len(rows), piece.n_chunks, -1)
            places = self._place[bands, piece.first_chunk : piece.first_chunk + piece.n_chunks]
            if len(self._chunks):
                target[...] = self._chunks[places, inside[:, None], piece.first : piece.stop]
            target[places < 0] = self.layout.fill
            at += piece.width

    def _bands(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield each band of rows ``[start, stop)`` with its first row and its end inside it."""
        height = self.layout.chunk_rows
        for band in range(start // height, -(-stop // height)):
            yield band, max(start - band * height, 0), min(stop - band * height, height)

    def _byte_span(self, band: int, first: int, last: int, selection: Selection) -> tuple[int, int]:
        """Return where ``_byte_ranges`` begins and ends; (0, 0) if one of its ends is absent."""
        if not selection.pieces:
            return 0, 0
        a, b = selection.pieces[0], selection.pieces[-1]
        begin, end = (
            self._place[band, a.first_chunk],
            self._place[band, b.first_chunk + b.n_chunks - 1],
        )
        if begin < 0 or end < 0:
            return 0, 0
        start, stop = (self._origin + self._chunk_bytes * int(place) for place in (begin, end))
        return start + first * self._row_bytes, stop + last * self._row_bytes

    def _byte_ranges(
        self, band: int, first: int, last: int, selection: Selection
    ) -> Iterator[tuple[int, int]]:
        """Yield ``[start, stop)`` of the rows ``[first, last)`` of a band in the file."""
        whole_band = self._grid is not None and last - first == self.layout.chunk_rows
        for piece in selection.pieces:
            places = self._place[band, piece.first_chunk : piece.first_chunk + piece.n_chunks]
            starts = self._origin + self._chunk_bytes * places[places >= 0]
            if whole_band and len(starts):
                yield int(starts[0]), int(starts[-1]) + self._chunk_bytes
                continue
            for start in starts.tolist():
                yield start + first * self._row_bytes, start + last * self._row_bytes
