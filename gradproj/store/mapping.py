"""Memory-mapped files of a store: a bounded number of maps, and shards addressed through their own index."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Generic, TypeVar

import numpy as np

from gradproj.errors import StoreError
from gradproj.store.encoding import VALUES_PER_STEP, decode_into, nan_rows
from gradproj.store.files import crc32c
from gradproj.store.layout import StoreLayout

_EMPTY_CHUNK = 2**64 - 1
_LEAST_TILE_ROWS = 32  # below, one gather of all columns costs less than a call for each

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last few things that were loaded, by key. What could not be loaded (None) is asked for again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: dict[K, V] = {}
        self._lock = RLock()  # a store may be read by several threads

    def get(self, key: K, load: Callable[[], V | None]) -> V | None:
        with self._lock:
            item = self._items.pop(key, None)
            if item is None:
                item = load()
            if item is not None:
                self._items[key] = item
                while len(self._items) > self._limit:
                    del self._items[next(iter(self._items))]
            return item

    def drop(self, keys: Iterable[K]) -> None:
        with self._lock:
            for key in keys:
                self._items.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._items.clear()

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)


def map_file(path: Path) -> mmap.mmap | None:
    """A read-only map of a file; None when there is no such file."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except ValueError as error:  # an empty file cannot be mapped
        raise damaged(path, "it is empty") from error


def damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {what}. Run `python -m gradproj verify` on the output to see all damage"
    )


@dataclass(frozen=True)
class Selection:
    """Which values of a row are wanted: as ranges, and as the parts of the chunks across that hold them."""

    ranges: tuple[tuple[int, int], ...]
    width: int
    pieces: list[tuple[np.ndarray, int, int]]
    """(chunk numbers across, first, one past the last value inside each)."""


@lru_cache(maxsize=256)
def select_values(layout: StoreLayout, ranges: tuple[tuple[int, int], ...]) -> Selection:
    """The given ``[start, end)`` ranges of a row, one after the other."""
    width = layout.chunk_width
    pieces: list[tuple[list[int], int, int]] = []
    for start, end in ranges:
        for chunk in range(start // width, -(-end // width)):
            first, last = max(start - chunk * width, 0), min(end - chunk * width, width)
            if pieces and pieces[-1][1:] == (first, last) == (0, width):
                pieces[-1][0].append(chunk)
            else:
                pieces.append(([chunk], first, last))
    arrays = [(np.array(chunks), first, last) for chunks, first, last in pieces]
    return Selection(ranges, sum(end - start for start, end in ranges), arrays)


class MappedShard:
    """One uncompressed shard file, its inner chunks in whatever order its writer chose (Morton, say)."""

    def __init__(self, path: Path, data: mmap.mmap, layout: StoreLayout, index_at_end: bool) -> None:
        self.layout = layout
        self._data = data
        self._advice = mmap.MADV_NORMAL
        grid = (layout.rows_per_shard // layout.chunk_rows, layout.dim // layout.chunk_width)
        offsets = self._read_offsets(path, grid, index_at_end)
        shape = (layout.chunk_rows, layout.chunk_width)
        chunk_bytes = shape[0] * shape[1] * layout.stored_dtype.itemsize
        present = offsets != _EMPTY_CHUNK
        origin = int(offsets.min()) if present.any() else 0
        last = int(offsets[present].max()) if present.any() else -chunk_bytes
        if last + chunk_bytes > len(data):
            raise damaged(path, f"its index points past its end ({len(data)} bytes)")
        steps = np.where(present, offsets - np.uint64(origin), 0)
        self.regular = not (steps % np.uint64(chunk_bytes)).any()
        """Whether chunks lie at multiples of their size; the others are for zarr-python."""
        self._place = np.where(present, (steps // np.uint64(chunk_bytes)).astype(np.int64), -1)
        self._n_places = (last - origin) // chunk_bytes + 1
        self._chunks = np.ndarray((self._n_places, *shape), layout.stored_dtype, data, origin)

    def _read_offsets(self, path: Path, grid: tuple[int, int], index_at_end: bool) -> np.ndarray:
        index_bytes = grid[0] * grid[1] * 16
        if len(self._data) < index_bytes + 4:
            raise damaged(path, f"{len(self._data)} bytes cannot hold its index")
        start = len(self._data) - index_bytes - 4 if index_at_end else 0
        tail = self._data[start : start + index_bytes + 4]
        if crc32c(tail[:-4]).to_bytes(4, "little") != tail[-4:]:
            raise damaged(path, "the checksum of its index does not match")
        return np.frombuffer(tail, "<u8", grid[0] * grid[1] * 2).reshape(*grid, 2)[:, :, 0]

    def read_range(self, start: int, selection: Selection, row_scale: np.ndarray, out: np.ndarray) -> None:
        """Decode the rows ``start, start + 1, ...`` of the shard into ``out`` ``(n, selection.width)``."""
        self._advise(mmap.MADV_NORMAL)
        height = self.layout.chunk_rows
        done = 0
        while done < len(out):
            band, first = divmod(start + done, height)
            n = min(height - first, len(out) - done)
            rows = slice(done, done + n)
            if n < _LEAST_TILE_ROWS:
                self._gather(np.arange(start + done, start + done + n), selection, row_scale[rows], out[rows])
            else:
                self._decode_tiles(band, slice(first, first + n), selection, row_scale[rows], out[rows])
            done += n

    def read_rows(self, rows: np.ndarray, selection: Selection, row_scale: np.ndarray) -> np.ndarray:
        """Decode rows (positions in the shard, any order): ``(n, selection.width)`` float32."""
        # Without this advice each of a row's pages brings its neighbours from the disk: 30 times the bytes.
        self._advise(mmap.MADV_RANDOM)
        out = np.empty((len(rows), selection.width), np.float32)
        step = max(1, VALUES_PER_STEP // max(1, selection.width))
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            self._gather(rows[part], selection, row_scale[part], out[part])
        return out

    def _decode_tiles(
        self, band: int, rows: slice, selection: Selection, row_scale: np.ndarray, out: np.ndarray
    ) -> None:
        at = 0
        for chunks, first, last in selection.pieces:
            for place in self._place[band, chunks]:
                target = out[:, at : at + last - first]
                if place < 0:
                    target[:] = np.nan
                else:
                    decode_into(
                        self._chunks[place, rows, first:last], row_scale, self.layout.proj_dtype, target
                    )
                at += last - first

    def _gather(self, rows: np.ndarray, selection: Selection, row_scale: np.ndarray, out: np.ndarray) -> None:
        bands, inside = np.divmod(rows, self.layout.chunk_rows)
        at = 0
        for chunks, first, last in selection.pieces:
            places = self._place[bands[:, None], chunks]
            width = len(chunks) * (last - first)
            if self._n_places:
                values = self._chunks[places, inside[:, None], first:last]
            else:
                values = np.empty((*places.shape, last - first), self.layout.stored_dtype)
            if (places < 0).any():
                values[places < 0] = nan_rows((), self.layout.proj_dtype)
            target = out[:, at : at + width]
            decode_into(values.reshape(len(rows), width), row_scale, self.layout.proj_dtype, target)
            at += width

    def _advise(self, advice: int) -> None:
        if self._advice != advice:
            self._data.madvise(advice)
            self._advice = advice
