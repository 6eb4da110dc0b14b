"""Rows of the ``projections`` array: mapped where a shard is uncompressed, through zarr-python where not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from gradproj.errors import StoreError
from gradproj.store.encoding import decode_rows
from gradproj.store.layout import StoreLayout
from gradproj.store.mapped_files import LRUCache, damaged
from gradproj.store.mapped_shard import MappedShard, Selection
from gradproj.store.page_cache import PagedFile


class Shards:
    """Reads the rows of one unit at a time, given the scale of each row. No shard: NaN rows."""

    def __init__(
        self, store_path: Path, layout: StoreLayout, maps: LRUCache[tuple[str, int], Any]
    ) -> None:
        self.layout = layout
        self._folder = store_path / "projections"
        self._maps = maps
        metadata = json.loads((self._folder / "zarr.json").read_text())
        self._separator = (
            metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
        )
        sharding = metadata["codecs"][0]["configuration"]
        self._index_at_end = sharding.get("index_location", "end") == "end"
        index_codecs = [codec["name"] for codec in sharding["index_codecs"]]
        self._mappable = index_codecs == ["bytes", "crc32c"] and [
            c["name"] for c in sharding["codecs"]
        ] == ["bytes"]
        self._array: zarr.Array | None = None

    def path(self, unit: int) -> Path:
        return self._folder / self._separator.join(("c", str(unit), "0"))

    def exists(self, unit: int) -> bool:
        return ("projections", unit) in self._maps or self.path(unit).exists()

    def fetch(self, unit: int, start: int, stop: int, selection: Selection) -> None:
        """Have the disk read rows ``[start, stop)`` of the unit while this process does something else."""
        shard = self._shard(unit)
        if shard is not None:
            shard.fetch(start, stop, selection)

    def let_go(self, unit: int) -> None:
        """Give back the memory of a unit's rows that were read, if it is mapped."""
        shard = self._shard(unit) if ("projections", unit) in self._maps else None
        if shard is not None:
            shard.let_go()

    def tiles(
        self, unit: int, start: int, stop: int, selection: Selection
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The stored rows ``[start, stop)`` of the unit, which lie in one chunk down; see ``Band.tiles``."""
        shard = self._shard(unit)
        if shard is not None and shard.has_tiles(start, selection):
            yield from shard.tiles(start, stop, selection)
            return
        stored = np.empty((stop - start, selection.width), self.layout.stored_dtype)
        self.copy_range(unit, start, selection, stored)
        yield 0, stored
        self.let_go(unit)

    def copy_range(self, unit: int, start: int, selection: Selection, out: np.ndarray) -> None:
        """The stored rows ``start...`` of the unit into ``out`` ``(n, selection.width)``, not decoded."""
        shard = self._shard(unit)
        if shard is not None:
            shard.copy_range(start, selection, out)
        else:
            first = unit * self.layout.rows_per_shard + start
            out[...] = self._read_with_zarr(slice(first, first + len(out)), selection)

    def read_range(
        self, unit: int, start: int, selection: Selection, scale: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode rows ``start...`` of the unit into ``out`` ``(n, selection.width)``; n is the scales' number."""
        shard = self._shard(unit)
        if shard is not None:
            shard.read_range(start, selection, scale, out)
        else:
            first = unit * self.layout.rows_per_shard + start
            stored = self._read_with_zarr(slice(first, first + len(scale)), selection)
            out[:] = decode_rows(stored, scale, self.layout.proj_dtype)

    def read_rows(
        self, unit: int, rows: np.ndarray, selection: Selection, scale: np.ndarray
    ) -> np.ndarray:
        """Decode rows (positions in the unit, ascending): ``(n, selection.width)`` float32."""
        shard = self._shard(unit)
        if shard is not None:
            return shard.read_rows(rows, selection, scale)
        ids, inverse = np.unique(rows + unit * self.layout.rows_per_shard, return_inverse=True)
        return decode_rows(
            self._read_with_zarr(ids, selection)[inverse], scale, self.layout.proj_dtype
        )

    def _shard(self, unit: int) -> MappedShard | None:
        if not self._mappable:
            return None

        def load() -> MappedShard | None:
            path = self.path(unit)
            try:
                return MappedShard(path, PagedFile(path), self.layout, self._index_at_end)
            except FileNotFoundError:
                return None
            except ValueError as error:  # an empty file cannot be mapped
                raise damaged(path, "it is empty") from error

        shard = self._maps.get(("projections", unit), load)
        return shard if shard is not None and shard.regular else None

    def _read_with_zarr(self, rows: slice | np.ndarray, selection: Selection) -> np.ndarray:
        if self._array is None:
            self._array = zarr.open_array(str(self._folder), mode="r")
        try:
            parts = [self._array.oindex[rows, slice(*wanted)] for wanted in selection.ranges]
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"cannot decode rows of {self._folder}: {error}. Run `python -m gradproj verify`"
            ) from error
        return np.concatenate(parts, axis=1).view(self.layout.stored_dtype)
