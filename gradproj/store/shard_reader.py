"""Rows of a sharded array: from a shard's map or ranges, else by zarr-python.

zarr-python reads compressed shards on disk, and those of other programs' codecs.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from gradproj.errors import StoreError
from gradproj.storage.byte_ranges import AHEAD_BYTES, RangeCache
from gradproj.storage.contents import keep_ahead
from gradproj.storage.failures import explained
from gradproj.storage.object_path import READING, ObjectPath
from gradproj.store.compressed_shard import CompressedShard
from gradproj.store.fetched_shard import FetchedShard
from gradproj.store.layout import StoreLayout
from gradproj.store.mapped_shard import MappedShard
from gradproj.store.page_cache import LRUCache
from gradproj.store.selection import Selection
from gradproj.store.shard_rows import ShardRows
from gradproj.store.zarr_arrays import open_array

UNITS_AHEAD = 16
"""Shards that are opened ahead where that takes long."""
_SHARDS_KEPT_AHEAD = 4
"""Whole shards that are fetched into a cache at the same time."""


class Shards:
    """Reads the rows of one unit at a time. Callers check ``exists`` first."""

    def __init__(
        self, store_path: Path, layout: StoreLayout, maps: LRUCache[tuple[str, int], Any]
    ) -> None:
        self.layout = layout
        self._folder = store_path / layout.array
        self._maps = maps
        self._compressed = layout.compressor != "none"
        remote = isinstance(self._folder, ObjectPath)
        by_range = remote and (self._compressed or READING.cache is None)
        self._ranges = RangeCache() if by_range else None
        """Of shards in a bucket; None for files, of which the system has a cache."""
        metadata = json.loads((self._folder / "zarr.json").read_text())
        self._separator = (
            metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
        )
        sharding = metadata["codecs"][0]["configuration"]
        self._index_at_end = sharding.get("index_location", "end") == "end"
        index_codecs = [codec["name"] for codec in sharding["index_codecs"]]
        codecs = [codec["name"] for codec in sharding["codecs"]]
        known = [["bytes"], ["bytes", "zstd"], ["bytes", "blosc"]] if remote else [["bytes"]]
        self._is_ours = index_codecs == ["bytes", "crc32c"] and codecs in known
        self._array: zarr.Array | None = None

    def path(self, unit: int) -> Path:
        return self._folder / self._separator.join(("c", str(unit), "0"))

    def exists(self, unit: int) -> bool:
        if isinstance(self._folder, ObjectPath) and self._is_ours:
            return self._opened(unit) is not None
        return (self.layout.array, unit) in self._maps or self.path(unit).exists()

    @property
    def bytes_ahead(self) -> int:
        """Bytes that a scan asks for ahead, where the system does not read ahead enough.

        With a band and a block more it is below ``AHEAD_BYTES``, so that all of it is asked for.
        """
        return 0 if self._ranges is None else AHEAD_BYTES * 3 // 4

    @property
    def units_ahead(self) -> int:
        """Units whose single rows a reader may ask for ahead now."""
        return UNITS_AHEAD if self._ranges is not None and self._ranges.has_room else 0

    def asks_for_whole_bands(self, selection: Selection) -> bool:
        """Return whether a scan asks for all rows of a band of chunks at once."""
        band_bytes = self.layout.chunk_rows * selection.width * self.layout.stored_dtype.itemsize
        return 6 * band_bytes <= self.bytes_ahead

    def open_ahead(self, units: Iterable[int]) -> None:
        """Begin to open shards that are read soon, if that takes long."""
        if self._ranges is not None and self._is_ours:
            for unit in units:
                self._load(unit)
        else:
            keep_ahead(self.path(unit) for unit in list(units)[:_SHARDS_KEPT_AHEAD])

    def prefetch(self, unit: int, start: int, stop: int, selection: Selection) -> None:
        """Have rows ``[start, stop)`` of the unit read in the background."""
        shard = self._shard(unit)
        if shard is not None:
            shard.prefetch(start, stop, selection)

    def prefetch_rows(self, unit: int, rows: np.ndarray, selection: Selection) -> None:
        """Have single rows of the unit read in the background."""
        shard = self._shard(unit)
        if shard is not None:
            shard.prefetch_rows(rows, selection)

    def release(self, unit: int, start: int, stop: int, selection: Selection) -> None:
        """Release the memory of a unit's rows that were read, if it is open."""
        shard = self._shard(unit) if (self.layout.array, unit) in self._maps else None
        if shard is not None:
            shard.release(start, stop, selection)

    def clear(self) -> None:
        """Forget what was asked for ahead."""
        if self._ranges is not None:
            self._ranges.clear()

    def tiles(
        self, unit: int, start: int, stop: int, selection: Selection
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the tiles of the rows ``[start, stop)`` of one band; see ``Band.tiles``."""
        shard = self._shard(unit)
        if shard is not None and shard.has_tiles(start, selection):
            yield from shard.tiles(start, stop, selection)
            return
        stored = np.empty((stop - start, selection.width), self.layout.stored_dtype)
        self.copy_range(unit, start, selection, stored)
        yield 0, stored
        self.release(unit, start, stop, selection)

    def copy_range(self, unit: int, start: int, selection: Selection, out: np.ndarray) -> None:
        """Copy the unit's stored rows from ``start`` on into ``out`` ``(n, selection.width)``."""
        shard = self._shard(unit)
        if shard is not None:
            shard.copy_range(start, selection, out)
        else:
            first = unit * self.layout.rows_per_shard + start
            out[...] = self._read_with_zarr(slice(first, first + len(out)), selection)

    def read_range(
        self, unit: int, start: int, selection: Selection, scale: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode the unit's rows from ``start`` on into ``out`` ``(n, decoded width)``."""
        shard = self._shard(unit)
        if shard is not None:
            shard.read_range(start, selection, scale, out)
        else:
            first = unit * self.layout.rows_per_shard + start
            stored = self._read_with_zarr(slice(first, first + len(scale)), selection)
            out[:] = selection.decode(stored, scale)

    def read_rows(
        self, unit: int, rows: np.ndarray, selection: Selection, scale: np.ndarray
    ) -> np.ndarray:
        """Decode rows (positions in the unit, ascending): ``(n, decoded width)`` float32."""
        shard = self._shard(unit)
        if shard is not None:
            return shard.read_rows(rows, selection, scale)
        ids, inverse = np.unique(rows + unit * self.layout.rows_per_shard, return_inverse=True)
        stored = self._read_with_zarr(ids, selection)[inverse]
        return selection.decode(stored, scale)

    def _shard(self, unit: int) -> ShardRows | None:
        """Return the unit's shard; None if zarr-python has to read it."""
        shard = self._opened(unit) if self._is_ours else None
        return shard if shard is not None and shard.regular else None

    def _opened(self, unit: int) -> ShardRows | None:
        shard = self._load(unit)
        if shard is not None and not shard.exists:
            self._maps.drop([(self.layout.array, unit)])  # a job may write it any time
            return None
        return shard

    def _load(self, unit: int) -> ShardRows | None:
        def load() -> ShardRows | None:
            path = self.path(unit)
            if isinstance(path, ObjectPath) and self._ranges is not None:
                kind = CompressedShard if self._compressed else FetchedShard
                return kind(path, self.layout, self._index_at_end, self._ranges)
            try:
                return MappedShard(path, self.layout, self._index_at_end)
            except FileNotFoundError:
                return None

        return self._maps.get((self.layout.array, unit), load)

    def _read_with_zarr(self, rows: slice | np.ndarray, selection: Selection) -> np.ndarray:
        try:
            with explained(str(self._folder)):
                if self._array is None:
                    self._array = open_array(self._folder)
                parts = [self._array.oindex[rows, slice(*span)] for span in selection.ranges]
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"cannot decode rows of {self._folder}: {error}. Run `python -m gradproj verify`"
            ) from error
        return np.concatenate(parts, axis=1).view(self.layout.stored_dtype)
