"""Columns of a store at any sample ids: the merged arrays, and the units' records where a merge is still to come."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.errors import StoreError
from gradproj.store.layout import COLUMNS, STATUS, StoreLayout
from gradproj.store.mapped_files import LRUCache, damaged, map_file
from gradproj.store.metadata import read_attributes
from gradproj.store.unit_record import UnitRecord, read_record, record_name

_MOST_RECORDS = 64
_LARGEST_STATUS = max(STATUS.values())
_WAY_OUT = "`python -m gradproj verify --repair` turns its unit into a missing one, which the job computes again"


def group_by_unit(ids: np.ndarray, rows_per_shard: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each unit among the ids, ascending, with the positions in ``ids`` of its samples, by ascending id."""
    order = np.argsort(ids, kind="stable")
    units = ids[order] // rows_per_shard
    for group in np.split(order, np.flatnonzero(np.diff(units)) + 1):
        if len(group):  # of no ids, one empty group comes out
            yield int(ids[group[0]] // rows_per_shard), group


class Columns:
    """Reads parts of columns without ever loading a whole one (210 M samples)."""

    def __init__(
        self, store_path: Path, layout: StoreLayout, maps: LRUCache[tuple[str, int], Any]
    ) -> None:
        self.layout = layout
        self._store_path = store_path
        self._maps = maps
        self._records: LRUCache[int, UnitRecord] = LRUCache(_MOST_RECORDS)

    def read(self, names: Sequence[str], ids: np.ndarray) -> dict[str, np.ndarray]:
        """Values at the given sample ids, in any order, and always the ``status``."""
        blocks = ids // self.layout.column_rows
        values = {name: self._filled(name, len(ids)) for name in ("status", *names)}
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            for name, chunk in self._chunks(values, int(block)):
                values[name][here] = chunk[ids[here] - block * self.layout.column_rows]
        if not values["status"].all():
            unmerged = np.flatnonzero(values["status"] == STATUS["missing"])
            self._overlay(values, unmerged, ids[unmerged])
        return values

    def read_range(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Values of the samples ``start`` to ``stop``, and always the ``status``."""
        values = {name: self._filled(name, stop - start) for name in ("status", *names)}
        height = self.layout.column_rows
        for block in range(start // height, -(-stop // height)):
            first, last = max(start, block * height), min(stop, (block + 1) * height)
            for name, chunk in self._chunks(values, block):
                here = chunk[first - block * height : last - block * height]
                values[name][first - start : last - start] = here
        if not values["status"].all():
            unmerged = np.flatnonzero(values["status"] == STATUS["missing"])
            self._overlay(values, unmerged, start + unmerged)
        return values

    def clear(self) -> None:
        self._records.clear()

    def _filled(self, name: str, n_rows: int) -> np.ndarray:
        dtype, fill = COLUMNS[name]
        return np.full((n_rows, self.layout.key_bytes) if name == "key" else n_rows, fill, dtype)

    def _chunks(self, names: Iterable[str], block: int) -> Iterator[tuple[str, np.ndarray]]:
        """Those of a block's chunks that are there, the status first; it was written last, so beside it none lacks."""
        is_merged = False
        for name in names:
            chunk = self._chunk(name, block)
            if chunk is not None:
                is_merged |= name == "status"
                yield name, chunk
            elif is_merged:
                raise damaged(self._path(name, block), "it is gone, and the rows' status is there")

    def _path(self, name: str, block: int) -> Path:
        return self._store_path / name / (f"c.{block}.0" if name == "key" else f"c.{block}")

    def _chunk(self, name: str, block: int) -> np.ndarray | None:
        def load() -> np.ndarray | None:
            path = self._path(name, block)
            data = map_file(path)
            if data is None:
                return None
            if name == "status":
                # A merge writes the status last and every reading starts with it. So beside a status that was
                # just mapped no older map of another column may stay: its rows would look merged and be empty.
                self._maps.drop([(other, block) for other in COLUMNS])
            shape = (
                (self.layout.column_rows, self.layout.key_bytes)
                if name == "key"
                else (self.layout.column_rows,)
            )
            dtype = COLUMNS[name][0]
            if len(data) != dtype.itemsize * np.prod(shape):
                raise damaged(path, f"it has {len(data)} bytes, not those of {shape} {dtype}")
            values = np.ndarray(shape, dtype, data)
            if name == "status" and values.max(initial=0) > _LARGEST_STATUS:
                raise damaged(path, f"{values.max()} is no status")
            return values

        return self._maps.get((name, block), load)

    def _overlay(
        self, values: dict[str, np.ndarray], positions: np.ndarray, ids: np.ndarray
    ) -> None:
        """Fill in, at ``positions``, what the records say of ``ids``."""
        for unit, group in group_by_unit(ids, self.layout.rows_per_shard):
            record = self._record(unit)
            if record is not None:
                for name, out in values.items():
                    out[positions[group]] = record.columns[name][ids[group] - record.start]

    @cached_property
    def _identity(self) -> str | None:
        """What every record of a job's store carries."""
        return read_attributes(self._store_path).get("identity_hash")

    def _record(self, unit: int) -> UnitRecord | None:
        def load() -> UnitRecord | None:
            path = self._store_path.parent / record_name(unit)
            try:
                record = read_record(path)
            except FileNotFoundError:
                return None
            start, stop = self.layout.unit_range(unit)
            shapes = {name: values.shape[0] for name, values in record.columns.items()}
            if record.start != start or shapes != dict.fromkeys(COLUMNS, stop - start):
                raise StoreError(
                    f"{path} is not of this store: it is of unit {record.unit} from sample {record.start}. {_WAY_OUT}"
                )
            if record.identity != (self._identity or record.identity):
                # Its rows may be as long as this store's and still mean something else.
                raise StoreError(
                    f"{path} is not of this store: it was made with other settings ({record.identity}, the store "
                    f"has {self._identity}). {_WAY_OUT}"
                )
            return record

        return self._records.get(unit, load)
