"""Rows of one uncompressed shard in a bucket, by ranged requests.

Only the bytes of the rows and layers that are read are asked for, rounded to whole inner chunks in
a scan. All requests name the version of the object whose index was read, so a shard that changes
meanwhile is an error, never a mixture.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from gradproj.errors import damaged
from gradproj.storage.byte_ranges import MAX_GAP_BYTES, Range, RangeCache, executor, joined
from gradproj.storage.object_path import ObjectPath
from gradproj.store.layout import StoreLayout
from gradproj.store.selection import Selection
from gradproj.store.shard_index import ShardIndex, index_bytes
from gradproj.store.shard_rows import ShardRows


class FetchedShard(ShardRows):
    """One uncompressed shard in a bucket. Its index is asked for at once, and waited for later.

    Args:
        path: the object, which may not exist.
        layout: of the array.
        index_at_end: where the index is.
        cache: of the ranges under way, shared by all shards of a store.
    """

    _index_type = ShardIndex

    def __init__(
        self, path: ObjectPath, layout: StoreLayout, index_at_end: bool, cache: RangeCache
    ) -> None:
        self.layout = layout
        self._object, self._path = path, cast(Path, path)
        self._cache = cache
        self._opened: Future[tuple[ShardIndex, str]] = executor().submit(
            _read_index, path, layout, index_at_end, self._index_type
        )

    @cached_property
    def exists(self) -> bool:
        """Whether there is an object with rows; that of a unit that was given up has none."""
        try:
            return self.index.has_chunks
        except FileNotFoundError:
            return False

    @cached_property
    def index(self) -> ShardIndex:  # type: ignore[override]
        return self._opened.result()[0]

    @cached_property
    def _name(self) -> str:
        """Of this version in the cache, which may still hold ranges of an earlier one."""
        return f"{self._path} {self._opened.result()[1]}"

    def _fetch(self, begin: int, end: int) -> memoryview:
        try:
            data = self._object.read_buffer(begin, end, self._opened.result()[1])
        except FileNotFoundError:
            raise damaged(self._path, "it was deleted while it was read") from None
        if len(data) != end - begin:
            raise damaged(self._path, f"it ends at byte {begin + len(data)}, inside a chunk")
        return data

    def prefetch(self, start: int, stop: int, selection: Selection) -> None:
        self._cache.ask(self._name, self._ranges(start, stop, selection), self._fetch)

    def _ranges(self, start: int, stop: int, selection: Selection) -> Iterator[Range]:
        """Yield the byte ranges of the rows ``[start, stop)``, band by band."""
        for band, first, last in self.index.bands(start, stop):
            ranges = list(self.index.byte_ranges(band, first, last, selection))
            yield from joined(*np.array(ranges, np.int64).reshape(-1, 2).T)

    def prefetch_rows(self, rows: np.ndarray, selection: Selection) -> None:
        ranges = (r for _, group in self._by_band(rows) for r in self._row_ranges(group, selection))
        self._cache.ask(self._name, ranges, self._fetch)

    def _by_band(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the position of the first of each band's rows, and these rows; all ascending."""
        cuts = np.flatnonzero(np.diff(rows // self.layout.chunk_rows)) + 1
        at = 0
        for group in np.split(rows, cuts):
            yield at, group
            at += len(group)

    def _row_ranges(self, rows: np.ndarray, selection: Selection) -> list[Range]:
        """Return the ranges of single rows of a band, near ones as one."""
        if not len(rows) or not selection.pieces:
            return []
        band, first = divmod(int(rows[0]), self.layout.chunk_rows)
        inside, begins, ends = rows - rows[0] + first, [], []
        itemsize = self.layout.stored_dtype.itemsize
        for piece in selection.pieces:
            places = self.index.place[band, piece.first_chunk : piece.first_chunk + piece.n_chunks]
            chunks = self.index.origin + self.index.chunk_bytes * places[places >= 0]
            at = (chunks[:, None] + inside * self.index.row_bytes).ravel()
            begins.append(at + piece.first * itemsize)
            ends.append(at + piece.stop * itemsize)
        return joined(np.concatenate(begins), np.concatenate(ends), MAX_GAP_BYTES)

    def release(self, start: int, stop: int, selection: Selection) -> None:
        """Drop the bands that the rows ``[start, stop)`` end in, up to ``stop``."""
        begin = start // self.layout.chunk_rows * self.layout.chunk_rows
        self._cache.drop(self._name, self._ranges(begin, stop, selection))

    def _read_into(self, out: memoryview, begin: int) -> None:
        self._cache.read_into(self._name, out, begin, self._fetch)

    def tiles(
        self, start: int, stop: int, selection: Selection
    ) -> Iterator[tuple[int, np.ndarray]]:
        self.prefetch(start, stop, selection)
        yield from super().tiles(start, stop, selection)
        self.release(start, stop, selection)

    def copy_range(self, start: int, selection: Selection, out: np.ndarray) -> None:
        index, stop = self.index, start + len(out)
        for band, first, last in index.bands(start, stop):
            row = band * self.layout.chunk_rows + first
            self.prefetch(row, stop, selection)
            target = out[row - start : row - start + last - first]
            chunk = np.empty((last - first, self.layout.chunk_width), self.layout.stored_dtype)
            view, at = chunk.data.cast("B"), 0
            for piece in selection.pieces:
                width = piece.stop - piece.first
                for number in range(piece.first_chunk, piece.first_chunk + piece.n_chunks):
                    place = int(index.place[band, number])
                    if place < 0:
                        target[:, at : at + width] = self.layout.fill
                    else:
                        begin = index.origin + place * index.chunk_bytes + first * index.row_bytes
                        self._read_into(view, begin)
                        target[:, at : at + width] = chunk[:, piece.first : piece.stop]
                    at += width

    def read_rows(
        self, rows: np.ndarray, selection: Selection, row_scale: np.ndarray
    ) -> np.ndarray:
        out = np.empty((len(rows), selection.decoded_width), np.float32)
        for at, group in self._by_band(rows):
            self.prefetch_rows(rows[at:], selection)
            here = slice(at, at + len(group))
            out[here] = super().read_rows(group, selection, row_scale[here])
            self._cache.drop(self._name, self._row_ranges(group, selection))
        return out

    def _gather(self, rows: np.ndarray, selection: Selection, out: np.ndarray) -> None:
        for i, row in enumerate(rows.tolist()):
            self._copy_row(row, selection, out[i])

    def _copy_row(self, row: int, selection: Selection, out: np.ndarray) -> None:
        """Copy the stored values of one row into ``out`` ``(selection.width,)``."""
        (band, inside), index = divmod(row, self.layout.chunk_rows), self.index
        itemsize, at = self.layout.stored_dtype.itemsize, 0
        for piece in selection.pieces:
            width = piece.stop - piece.first
            for number in range(piece.first_chunk, piece.first_chunk + piece.n_chunks):
                place, target = int(index.place[band, number]), out[at : at + width]
                begin = index.origin + place * index.chunk_bytes + inside * index.row_bytes
                if place < 0:
                    target[...] = self.layout.fill
                else:
                    self._read_into(target.data.cast("B"), begin + piece.first * itemsize)
                at += width


def _read_index(
    path: ObjectPath, layout: StoreLayout, index_at_end: bool, index_type: type[ShardIndex]
) -> tuple[ShardIndex, str]:
    """Return the index and the object's etag."""
    n_index = index_bytes(layout)
    data, n_bytes, etag = path.read_end(n_index)
    if not index_at_end:
        data = path.read_range(0, min(n_index, n_bytes), etag)
    return index_type(cast(Path, path), layout, data, n_bytes), etag
