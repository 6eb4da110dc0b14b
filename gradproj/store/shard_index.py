"""Places of the inner chunks of one shard, by the shard's own index."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradproj.errors import damaged
from gradproj.files import crc32c
from gradproj.store.layout import StoreLayout
from gradproj.store.selection import Selection

EMPTY_CHUNK = 2**64 - 1
_CHECKSUM_BYTES = 4


def index_bytes(layout: StoreLayout) -> int:
    """Return the bytes of a shard's index, with its checksum."""
    n_chunks = (layout.rows_per_shard // layout.chunk_rows) * (
        layout.stored_width // layout.chunk_width
    )
    return 16 * n_chunks + _CHECKSUM_BYTES


class ShardIndex:
    """The places of an uncompressed shard's chunks, in any order (zarr-python's is Morton).

    Args:
        path: the shard, for errors.
        layout: of the array.
        encoded: the index and its checksum.
        n_bytes: of the shard.

    Raises:
        DamagedFile: the index is damaged, or points past the shard's end.
    """

    def __init__(self, path: str | Path, layout: StoreLayout, encoded: bytes, n_bytes: int) -> None:
        self._layout = layout
        n_across = layout.stored_width // layout.chunk_width
        offsets = decode_index(path, layout, encoded, n_bytes)[:, :, 0]
        self.row_bytes = layout.chunk_width * layout.stored_dtype.itemsize
        """Bytes of a row in a chunk."""
        self.chunk_bytes = chunk_bytes = layout.chunk_rows * self.row_bytes
        present = offsets != EMPTY_CHUNK
        self.has_chunks = bool(present.any())
        self.origin = origin = int(offsets.min()) if present.any() else 0
        """Offset of the first chunk."""
        last = int(offsets[present].max()) if present.any() else -chunk_bytes
        if last + chunk_bytes > n_bytes:
            raise damaged(path, f"its index points past its end ({n_bytes} bytes)")
        steps = np.where(present, offsets - np.uint64(origin), 0)
        self.regular = not (steps % np.uint64(chunk_bytes)).any()
        """Whether chunks lie at multiples of their size; zarr-python reads any other shard."""
        self.place = np.where(present, (steps // np.uint64(chunk_bytes)).astype(np.int64), -1)
        """``(bands, chunks across)``: a chunk begins at ``origin + place * chunk_bytes``; -1 for an
        absent one. A band is a row of chunks."""
        self.n_places = (last - origin) // chunk_bytes + 1
        order = self.place.reshape(-1)[: self.n_places]
        self.in_order = self.n_places % n_across == 0 and bool(
            (order == np.arange(self.n_places)).all()
        )
        """Whether the first bands' chunks are there in C order, as we write them, and no others."""
        self.n_bands_in_order = self.n_places // n_across if self.in_order else 0

    def has_tiles(self, start: int, selection: Selection) -> bool:
        """Return whether the rows from ``start`` on can be read a chunk across at a time.

        It needs chunks in C order, all present, and a selection of whole chunks.
        """
        return start // self._layout.chunk_rows < self.n_bands_in_order and all(
            piece.stop - piece.first == self._layout.chunk_width for piece in selection.pieces
        )

    def tile_begins(self, start: int, selection: Selection) -> list[int]:
        """Return the offset of the row ``start`` in each chunk across of a selection."""
        band, inside = divmod(start, self._layout.chunk_rows)
        chunks = [
            np.arange(piece.first_chunk, piece.first_chunk + piece.n_chunks)
            for piece in selection.pieces
        ]
        places = self.place[band, np.concatenate([np.empty(0, int), *chunks])]
        begins = self.origin + self.chunk_bytes * places + inside * self.row_bytes
        return begins.tolist()

    def bands(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield each band of rows ``[start, stop)`` with its first row and its end inside it."""
        height = self._layout.chunk_rows
        for band in range(start // height, -(-stop // height)):
            yield band, max(start - band * height, 0), min(stop - band * height, height)

    def byte_span(self, band: int, first: int, last: int, selection: Selection) -> tuple[int, int]:
        """Return where ``byte_ranges`` begins and ends; (0, 0) if one of its ends is absent."""
        if not selection.pieces:
            return 0, 0
        a, b = selection.pieces[0], selection.pieces[-1]
        begin, end = (
            self.place[band, a.first_chunk],
            self.place[band, b.first_chunk + b.n_chunks - 1],
        )
        if begin < 0 or end < 0:
            return 0, 0
        start, stop = (self.origin + self.chunk_bytes * int(place) for place in (begin, end))
        return start + first * self.row_bytes, stop + last * self.row_bytes

    def byte_ranges(
        self, band: int, first: int, last: int, selection: Selection
    ) -> Iterator[tuple[int, int]]:
        """Yield ``[start, stop)`` of the rows ``[first, last)`` of a band in the shard."""
        whole_band = self.in_order and last - first == self._layout.chunk_rows
        for piece in selection.pieces:
            places = self.place[band, piece.first_chunk : piece.first_chunk + piece.n_chunks]
            starts = self.origin + self.chunk_bytes * places[places >= 0]
            if whole_band and len(starts):
                yield int(starts[0]), int(starts[-1]) + self.chunk_bytes
                continue
            for start in starts.tolist():
                yield start + first * self.row_bytes, start + last * self.row_bytes


def decode_index(path: str | Path, layout: StoreLayout, encoded: bytes, n_bytes: int) -> np.ndarray:
    """Return every chunk's offset and bytes, ``(bands, chunks across, 2)`` uint64."""
    if n_bytes < index_bytes(layout):
        raise damaged(path, f"{n_bytes} bytes cannot hold its index")
    index, checksum = encoded[:-_CHECKSUM_BYTES], encoded[-_CHECKSUM_BYTES:]
    if crc32c(index).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise damaged(path, "the checksum of its index does not match")
    n_across = layout.stored_width // layout.chunk_width
    return np.frombuffer(index, "<u8").reshape(-1, n_across, 2)
