"""Rows of a sharded array: from the map of an uncompressed shard, else by zarr-python."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from gradproj.errors import StoreError
from gradproj.store.layout import StoreLayout
from gradproj.store.mapped_shard import MappedShard
from gradproj.store.page_cache import LRUCache
from gradproj.store.selection import Selection


class Shards:
    """Reads the rows of one unit at a time. Callers check ``exists`` first."""

    def __init__(
        self, store_path: Path, layout: StoreLayout, maps: LRUCache[tuple[str, int], Any]
    ) -> None:
        self.layout = layout
        self._folder = store_path / layout.array
        self._maps = maps
        metadata = json.loads((self._folder / "zarr.json").read_text())
        self._separator = (
            metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
        )
        sharding = metadata["codecs"][0]["configuration"]
        self._index_at_end = sharding.get("index_location", "end") == "end"
        index_codecs = [codec["name"] for codec in sharding["index_codecs"]]
        codecs = [codec["name"] for codec in sharding["codecs"]]
        self._mappable = index_codecs == ["bytes", "crc32c"] and codecs == ["bytes"]
        self._array: zarr.Array | None = None

    def path(self, unit: int) -> Path:
        return self._folder / self._separator.join(("c", str(unit), "0"))

    def exists(self, unit: int) -> bool:
        return (self.layout.array, unit) in self._maps or self.path(unit).exists()

    def prefetch(self, unit: int, start: int, stop: int, selection: Selection) -> None:
        """Have the disk read rows ``[start, stop)`` of the unit in the background."""
        shard = self._shard(unit)
        if shard is not None:
            shard.prefetch(start, stop, selection)

    def release(self, unit: int) -> None:
        """Release the memory of a unit's rows that were read, if it is mapped."""
        shard = self._shard(unit) if (self.layout.array, unit) in self._maps else None
        if shard is not None:
            shard.file.release()

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
        self.release(unit)

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

    def _shard(self, unit: int) -> MappedShard | None:
        """Return the unit's mapped shard; None if zarr-python has to read it."""
        if not self._mappable:
            return None

        def load() -> MappedShard | None:
            try:
                return MappedShard(self.path(unit), self.layout, self._index_at_end)
            except FileNotFoundError:
                return None

        shard = self._maps.get((self.layout.array, unit), load)
        return shard if shard is not None and shard.regular else None

    def _read_with_zarr(self, rows: slice | np.ndarray, selection: Selection) -> np.ndarray:
        if self._array is None:
            self._array = zarr.open_array(str(self._folder), mode="r")
        try:
            parts = [self._array.oindex[rows, slice(*span)] for span in selection.ranges]
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"cannot decode rows of {self._folder}: {error}. Run `python -m gradproj verify`"
            ) from error
        return np.concatenate(parts, axis=1).view(self.layout.stored_dtype)
