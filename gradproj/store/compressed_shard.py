"""Rows of one compressed shard in a bucket, by ranged requests as in ``fetched_shard.py``.

zarr-python decodes those on disk. From a bucket it would ask for a few chunks at a time and wait
for them; here chunks are asked for ahead, and only decoded when their rows are read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

from gradproj.errors import StoreError, damaged
from gradproj.storage.byte_ranges import MAX_GAP_BYTES, Range, joined
from gradproj.store.fetched_shard import FetchedShard
from gradproj.store.layout import StoreLayout
from gradproj.store.selection import Selection
from gradproj.store.shard_index import EMPTY_CHUNK, ShardIndex, decode_index


class CompressedIndex(ShardIndex):
    """The places of a shard's chunks, which have different sizes.

    Arguments and errors are those of ``ShardIndex``.
    """

    def __init__(self, path: str | Path, layout: StoreLayout, encoded: bytes, n_bytes: int) -> None:
        self._layout = layout
        entries = decode_index(path, layout, encoded, n_bytes)
        self.present = entries[:, :, 0] != EMPTY_CHUNK
        """``(bands, chunks across)``."""
        self.has_chunks = bool(self.present.any())
        self.spans = np.where(self.present[:, :, None], entries, 0).astype(np.int64)
        """``(bands, chunks across, 2)``: where a chunk begins and ends."""
        self.spans[:, :, 1] += self.spans[:, :, 0]
        if self.spans.max(initial=0) > n_bytes:
            raise damaged(path, f"its index points past its end ({n_bytes} bytes)")
        self.regular = True

    def has_tiles(self, start: int, selection: Selection) -> bool:
        return False

    def byte_ranges(
        self, band: int, first: int, last: int, selection: Selection
    ) -> Iterator[tuple[int, int]]:
        """Yield ``[start, stop)`` of the chunks with these rows: they are decoded whole."""
        for piece in selection.pieces:
            chunks = slice(piece.first_chunk, piece.first_chunk + piece.n_chunks)
            yield from self.spans[band, chunks][self.present[band, chunks]].tolist()


class CompressedShard(FetchedShard):
    """One shard in a bucket whose chunks are compressed by what the layout names."""

    index: CompressedIndex
    _index_type = CompressedIndex

    def release(self, start: int, stop: int, selection: Selection) -> None:
        """Drop the bands of the rows ``[start, stop)`` that end in them."""
        height = self.layout.chunk_rows
        begin, end = (row // height * height for row in (start, stop))
        self._cache.drop(self._name, self._ranges(begin, end, selection))

    def _row_ranges(self, rows: np.ndarray, selection: Selection) -> list[Range]:
        if not len(rows):
            return []
        band = int(rows[0]) // self.layout.chunk_rows
        ranges = list(self.index.byte_ranges(band, 0, self.layout.chunk_rows, selection))
        begins, ends = np.array(ranges, np.int64).reshape(-1, 2).T
        return joined(begins, ends, MAX_GAP_BYTES)

    def copy_range(self, start: int, selection: Selection, out: np.ndarray) -> None:
        stop = start + len(out)
        for band, first, last in self.index.bands(start, stop):
            row = band * self.layout.chunk_rows + first
            self.prefetch(row, stop, selection)
            target = out[row - start : row - start + last - first]
            self._copy(band, slice(first, last), selection, target)

    def _gather(self, rows: np.ndarray, selection: Selection, out: np.ndarray) -> None:
        for at, group in self._by_band(rows):
            band, first = divmod(int(group[0]), self.layout.chunk_rows)
            self._copy(band, group - group[0] + first, selection, out[at : at + len(group)])

    def _copy(
        self, band: int, rows: slice | np.ndarray, selection: Selection, out: np.ndarray
    ) -> None:
        """Copy rows of a band into ``out`` ``(n, selection.width)``."""
        at = 0
        for piece in selection.pieces:
            width = piece.stop - piece.first
            for number in range(piece.first_chunk, piece.first_chunk + piece.n_chunks):
                target = out[:, at : at + width]
                if self.index.present[band, number]:
                    target[...] = self._chunk(band, number)[rows, piece.first : piece.stop]
                else:
                    target[...] = self.layout.fill
                at += width

    def _chunk(self, band: int, number: int) -> np.ndarray:
        """Return one chunk's stored values ``(chunk_rows, chunk_width)``."""
        begin, end = self.index.spans[band, number].tolist()
        encoded = bytearray(end - begin)
        self._read_into(memoryview(encoded), begin)
        shape = self.layout.chunk_rows, self.layout.chunk_width
        codec: Any = numcodecs.get_codec({"id": self.layout.compressor})
        try:
            return np.frombuffer(codec.decode(encoded), self.layout.stored_dtype).reshape(shape)
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"cannot decode rows of {self._path}: {error}. Run `python -m gradproj verify`"
            ) from error

    def _decode(
        self,
        copy: Callable[[slice, np.ndarray], None],
        selection: Selection,
        row_scale: np.ndarray,
        out: np.ndarray,
    ) -> None:
        # All rows at once, since each chunk is decoded whole.
        stored = np.empty((len(out), selection.width), self.layout.stored_dtype)
        copy(slice(0, len(out)), stored)
        out[:] = selection.decode(stored, row_scale)
