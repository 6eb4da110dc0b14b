"""Columns of a store at any sample ids, from the merged arrays or the units' records."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.errors import StoreError, damaged
from gradproj.store.layout import COLUMNS, STATUS, StoreLayout, column_chunk_path, column_shape
from gradproj.store.metadata import read_attributes
from gradproj.store.page_cache import LRUCache, map_file
from gradproj.store.unit_record import UnitRecord, read_record, record_name

_MAX_RECORDS = 64
_MAX_STATUS = max(STATUS.values())
_WAY_OUT = (
    "`python -m gradproj verify --repair` deletes it, so that the job computes its unit again"
)


def group_by_unit(ids: np.ndarray, rows_per_shard: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each unit among the ids, ascending, and its samples' positions in ``ids``, by id."""
    order = np.argsort(ids, kind="stable")
    units = ids[order] // rows_per_shard
    for group in np.split(order, np.flatnonzero(np.diff(units)) + 1):
        if len(group):  # splitting no ids gives one empty group
            yield int(ids[group[0]] // rows_per_shard), group


def read_column_chunk(
    store_path: Path, layout: StoreLayout, name: str, block: int
) -> np.ndarray | None:
    """Map one chunk of a merged column: ``(column_rows,)`` or ``(column_rows, key_bytes)``.

    Returns:
        None if the chunk does not exist: no row of the block is merged.

    Raises:
        StoreError: the file has another size.
    """
    path = column_chunk_path(store_path, name, block)
    data = map_file(path)
    if data is None:
        return None
    dtype, shape = COLUMNS[name][0], column_shape(name, layout.column_rows, layout.key_bytes)
    if len(data) != dtype.itemsize * np.prod(shape):
        raise damaged(path, f"it has {len(data)} bytes, not those of {shape} {dtype}")
    return np.ndarray(shape, dtype, data)


class Columns:
    """Reads parts of columns without loading a whole one (a store may have 210 M samples)."""

    def __init__(
        self, store_path: Path, layout: StoreLayout, maps: LRUCache[tuple[str, int], Any]
    ) -> None:
        self.layout = layout
        self._store_path = store_path
        self._maps = maps
        self._records: LRUCache[int, UnitRecord] = LRUCache(_MAX_RECORDS)

    def read(self, names: Sequence[str], ids: np.ndarray) -> dict[str, np.ndarray]:
        """Read values at the given sample ids, in any order; always includes the ``status``."""
        blocks = ids // self.layout.column_rows
        values = {name: self._filled(name, len(ids)) for name in ("status", *names)}
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            for name, chunk in self._chunks(values, int(block)):
                values[name][here] = chunk[ids[here] - block * self.layout.column_rows]
        return self._with_records(values, lambda positions: ids[positions])

    def read_range(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Read values of the samples ``[start, stop)``; always includes the ``status``."""
        values = {name: self._filled(name, stop - start) for name in ("status", *names)}
        height = self.layout.column_rows
        for block in range(start // height, -(-stop // height)):
            first, last = max(start, block * height), min(stop, (block + 1) * height)
            for name, chunk in self._chunks(values, block):
                here = chunk[first - block * height : last - block * height]
                values[name][first - start : last - start] = here
        return self._with_records(values, lambda positions: start + positions)

    def clear(self) -> None:
        self._records.clear()

    def _filled(self, name: str, n_rows: int) -> np.ndarray:
        dtype, fill = COLUMNS[name]
        return np.full(column_shape(name, n_rows, self.layout.key_bytes), fill, dtype)

    def _chunks(self, names: Iterable[str], block: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a block's existing chunks, the status first."""
        # A merge writes the status last, so beside it every other chunk must exist.
        is_merged = False
        for name in names:
            chunk = self._chunk(name, block)
            if chunk is not None:
                is_merged |= name == "status"
                yield name, chunk
            elif is_merged:
                path = column_chunk_path(self._store_path, name, block)
                raise damaged(path, "it is gone, and the rows' status is there")

    def _chunk(self, name: str, block: int) -> np.ndarray | None:
        def load() -> np.ndarray | None:
            values = read_column_chunk(self._store_path, self.layout, name, block)
            if name == "status" and values is not None:
                # A merge writes the status last and every read starts with it. Older maps of the
                # other columns must not stay beside a newer status: their rows would look merged
                # and be empty.
                self._maps.drop([(other, block) for other in COLUMNS])
                if values.max(initial=0) > _MAX_STATUS:
                    path = column_chunk_path(self._store_path, name, block)
                    raise damaged(path, f"{values.max()} is no status")
            return values

        return self._maps.get((name, block), load)

    def _with_records(
        self, values: dict[str, np.ndarray], ids_at: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Fill in the records' values of samples that are not merged yet."""
        if not values["status"].all():
            positions = np.flatnonzero(values["status"] == STATUS["missing"])
            ids = ids_at(positions)
            for unit, group in group_by_unit(ids, self.layout.rows_per_shard):
                record = self._record(unit)
                if record is not None:
                    for name, out in values.items():
                        out[positions[group]] = record.columns[name][ids[group] - record.start]
        return values

    @cached_property
    def _identity(self) -> str | None:
        """The hash of settings in every record of a job's store; None for other stores."""
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
                    f"{path} is not of this store: it is of unit {record.unit} from sample "
                    f"{record.start}. {_WAY_OUT}"
                )
            if record.identity != (self._identity or record.identity):
                # Rows of the same width may still come from another model or projection.
                raise StoreError(
                    f"{path} is not of this store: it was made with other settings "
                    f"({record.identity}, the store has {self._identity}). {_WAY_OUT}"
                )
            return record

        return self._records.get(unit, load)
