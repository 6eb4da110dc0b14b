"""Rows of a store by sample id: finds the units that hold them, and plans the blocks of a scan."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradproj.errors import StoreError
from gradproj.store.column_reader import Columns, group_by_unit
from gradproj.store.layout import STATUS, StoreLayout
from gradproj.store.page_cache import LRUCache
from gradproj.store.selection import Selection
from gradproj.store.shard_reader import UNITS_AHEAD, Shards

Missing = Literal["raise", "nan"]

_NAMED_IDS = 8
_FAULT_BYTES = 2**16
"""Bytes that the kernel maps around a touched one."""
_MAX_TOUCHED_BYTES = 2**29
_BLOCK_BYTES = 2**23  # two of them fit a processor's last cache, and malloc reuses their memory


@dataclass(frozen=True)
class Band:
    """Consecutive samples of one unit, whose stored values come a tile at a time.

    Tiles are read into one small buffer that stays in a core's cache, and no page of a file is
    mapped. So a scan of terabytes needs the memory of a tile, and is up to a sixth faster than
    through a map.
    """

    first: int
    """The first sample's id."""
    status: np.ndarray
    """``(n,)`` uint8, codes of ``STATUS``."""
    row_scale: np.ndarray
    """``(n,)`` float32: ``row = stored * row_scale``."""
    has_rows: bool
    """Whether there is a shard. Without one ``tiles`` is empty."""
    tiles: Iterator[tuple[int, np.ndarray]]
    """``(at, stored)``: ``stored (n, w)`` are the elements ``at`` to ``at + w`` of the selection,
    in the layout's ``stored_dtype``, in ascending order: of packed rows the header comes first. All
    tiles together hold each element once. Take them before the next band; each overwrites the one
    before. Nothing is read before the first is taken."""

    @property
    def last(self) -> int:
        """The id after the last sample's."""
        return self.first + len(self.status)


class Rows:
    """Reads rows of any units; NaN for samples without one."""

    def __init__(
        self,
        store_path: Path,
        layout: StoreLayout,
        columns: Columns,
        maps: LRUCache[tuple[str, int], Any],
    ) -> None:
        self.layout = layout
        self._store_path = store_path
        self._columns = columns
        self._shards = Shards(store_path, layout, maps)
        self._touched_bytes: dict[int, int] = {}

    def read(self, ids: np.ndarray, selection: Selection, missing: Missing) -> np.ndarray:
        """Decode rows in any order: ``(n, selection.decoded_width)`` float32.

        Raises:
            StoreError: samples are missing, and ``missing`` is ``raise``.
        """
        first, in_a_row = _range_of(ids)
        if in_a_row:
            columns = self._columns.read_range(["row_scale"], first, first + len(ids))
        else:
            columns = self._columns.read(["row_scale"], ids)
        if missing == "raise":
            self._refuse_missing(ids[columns["status"] == STATUS["missing"]])
        out = np.empty((len(ids), selection.decoded_width), np.float32)
        if in_a_row:
            self._prefetch(first, first + len(ids), selection)
            self._read_range(first, selection, columns, out, missing)
            # The pages of a few rows stay mapped: they may be read again.
            if len(ids) >= self.layout.chunk_rows:
                self._release(first, first + len(ids), selection)
            return out
        for unit, group in self._asked_ahead(ids, columns["status"], selection):
            if self._has_rows(unit, columns["status"][group], missing):
                inside = ids[group] - unit * self.layout.rows_per_shard
                out[group] = self._shards.read_rows(
                    unit, inside, selection, columns["row_scale"][group]
                )
                self._count_touched(unit, len(group), selection)
            else:
                out[group] = np.nan
        return out

    def _asked_ahead(
        self, ids: np.ndarray, status: np.ndarray, selection: Selection
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each unit among the ids, with positions in ``ids``, as ``group_by_unit`` does.

        Its rows are being read, and so are those of units that follow, where that helps.
        """
        height = self.layout.rows_per_shard
        groups, asked = list(group_by_unit(ids, height)), 0
        for number, (unit, group) in enumerate(groups):
            while asked < len(groups) and asked <= number + self._shards.units_ahead:
                other, positions = groups[asked]
                self._shards.open_ahead([u for u, _ in groups[asked : asked + UNITS_AHEAD]])
                if status[positions].any():
                    self._shards.prefetch_rows(other, ids[positions] - other * height, selection)
                asked += 1
            yield unit, group

    def _refuse_missing(self, ids: np.ndarray) -> None:
        if len(ids):
            named = ", ".join(map(str, ids[:_NAMED_IDS].tolist()))
            more = ", ..." if len(ids) > _NAMED_IDS else ""
            raise StoreError(
                f"{len(ids)} of the requested samples are missing from {self._store_path}: "
                f'{named}{more}. Let the job finish, or pass missing="nan"'
            )

    def clear(self) -> None:
        """Forget what was asked for ahead."""
        self._shards.clear()

    # A scan keeps no reference to a block, so that malloc reuses its memory for a later one.

    def decoded(self, first: int, last: int, selection: Selection) -> np.ndarray:
        """Read the rows ``[first, last)``, float32."""
        columns = self._columns.read_range(["row_scale"], first, last)
        out = np.empty((last - first, selection.decoded_width), np.float32)
        self._read_range(first, selection, columns, out, "nan")
        return out

    def stored(self, first: int, last: int, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        """Read the rows ``[first, last)`` as stored, and their scales."""
        columns = self._columns.read_range(["row_scale"], first, last)
        out = np.empty((last - first, selection.width), self.layout.stored_dtype)
        for unit, row, here, has_rows in self._parts(first, columns["status"], "nan"):
            if has_rows:
                self._shards.copy_range(unit, row, selection, out[here])
            else:
                out[here] = self.layout.fill
        return out, columns["row_scale"]

    def bands(
        self, rows_per_band: int | None, selection: Selection, start: int, stop: int | None
    ) -> Iterator[Band]:
        """Yield the samples ``[start, stop)`` in order, while the disk reads ahead.

        Raises:
            StoreError: ``start`` or ``stop`` is out of range.
        """
        stop = self._checked_stop(start, stop)
        height = min(rows_per_band or self.layout.chunk_rows, self._band_rows(selection))
        bytes_a_band = height * selection.width * self.layout.stored_dtype.itemsize
        ahead = max(_BLOCK_BYTES, self._shards.bytes_ahead)
        n_ahead = 1 + ahead // max(1, bytes_a_band)
        waiting: deque[Band] = deque()
        for band in self._bands_to_read(height, selection, start, stop):
            waiting.append(band)
            if len(waiting) > n_ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _bands_to_read(
        self, height: int, selection: Selection, start: int, stop: int
    ) -> Iterator[Band]:
        """Yield bands of at most ``height`` rows, each in one chunk, and begin to read each."""
        grid, step = self.layout.chunk_rows, 1
        if self._shards.asks_for_whole_bands(selection):
            step = grid
        for unit, first, last in self._units(start, stop):
            self._open_ahead(unit, stop)
            columns, begin, asked = (
                self._columns.read_range(["row_scale"], first, last),
                first,
                first,
            )
            has_rows = self._has_rows(unit, columns["status"], "nan")
            origin = unit * self.layout.rows_per_shard
            while first < last:
                end = min(first + height, (first // grid + 1) * grid, last)
                here = slice(first - begin, end - begin)
                row = first - origin
                tiles: Iterator[tuple[int, np.ndarray]] = iter(())
                if has_rows:  # it is read while earlier bands are worked on
                    if end > asked:
                        until = min(max(end, (first // step + 1) * step), last)
                        self._shards.prefetch(unit, asked - origin, until - origin, selection)
                        asked = until
                    tiles = self._shards.tiles(unit, row, row + end - first, selection)
                status, row_scale = columns["status"][here], columns["row_scale"][here]
                yield Band(first, status, row_scale, has_rows, tiles)
                first = end

    def blocks(
        self,
        rows_per_block: int | None,
        selection: Selection,
        row_bytes: int,
        start: int,
        stop: int | None,
    ) -> Iterator[tuple[int, int]]:
        """Yield ``[first, last)`` of a scan's blocks, while the disk reads ahead by whole chunks.

        ``row_bytes`` are those of a row in a block.

        Raises:
            StoreError: ``start`` or ``stop`` is out of range.
        """
        stop, band = self._checked_stop(start, stop), self.layout.chunk_rows
        height = rows_per_block or self._block_rows(row_bytes)
        fetched = released = start
        stored_bytes = max(1, selection.width * self.layout.stored_dtype.itemsize)
        lead = max(height, band, self._shards.bytes_ahead // stored_bytes)
        for first in range(start, stop, height):
            last = min(first + height, stop)
            ahead = min(-(-(last + lead) // band) * band, stop)
            if ahead > fetched:
                self._open_ahead(fetched // self.layout.rows_per_shard, stop)
                self._prefetch(fetched, ahead, selection)
                fetched = ahead
            yield first, last
            if last // band > released // band:
                self._release(released, last, selection)
                released = last

    def _checked_stop(self, start: int, stop: int | None) -> int:
        stop = self.layout.n_samples if stop is None else stop
        if not 0 <= start <= stop <= self.layout.n_samples:
            raise StoreError(
                f"samples {start} to {stop} are out of range: {self._store_path} has "
                f"{self.layout.n_samples}"
            )
        return stop

    def _band_rows(self, selection: Selection) -> int:
        """Return the rows of a band whose tile stays in the cache."""
        if self.layout.compressor != "none":  # decode each compressed chunk once, whatever its size
            return self.layout.chunk_rows
        widths = {piece.stop - piece.first for piece in selection.pieces}
        whole = widths == {self.layout.chunk_width}
        width = self.layout.chunk_width if whole else selection.width
        return max(1, _BLOCK_BYTES // (width * self.layout.stored_dtype.itemsize))

    def _block_rows(self, row_bytes: int) -> int:
        rows, grid = max(1, _BLOCK_BYTES // max(1, row_bytes)), self.layout.chunk_rows
        if rows >= grid or self.layout.compressor != "none":  # decode a compressed chunk once
            return max(1, rows // grid) * grid
        return -(-grid // -(-grid // rows))  # equal parts of a band, none with a few rows of it

    def _read_range(
        self,
        first: int,
        selection: Selection,
        columns: dict[str, np.ndarray],
        out: np.ndarray,
        missing: Missing,
    ) -> None:
        for unit, row, here, has_rows in self._parts(first, columns["status"], missing):
            if has_rows:
                self._shards.read_range(unit, row, selection, columns["row_scale"][here], out[here])
            else:
                out[here] = np.nan

    def _parts(
        self, first: int, status: np.ndarray, missing: Missing
    ) -> Iterator[tuple[int, int, slice, bool]]:
        """Split the samples ``first, ...`` by unit: unit, first row inside, slice, has rows."""
        for unit, start, stop in self._units(first, first + len(status)):
            here = slice(start - first, stop - first)
            row = start - unit * self.layout.rows_per_shard
            yield unit, row, here, self._has_rows(unit, status[here], missing)

    def _units(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield the units of the samples ``[first, last)``, each with its part of that range."""
        height = self.layout.rows_per_shard
        for unit in range(first // height, -(-last // height)):
            yield unit, max(first, unit * height), min(last, (unit + 1) * height)

    def _prefetch(self, first: int, last: int, selection: Selection) -> None:
        """Have the disk read these samples' rows in the background."""
        for unit, start, stop in self._units(first, last):
            if self._columns.read_range([], start, stop)["status"].any():
                begin = unit * self.layout.rows_per_shard
                self._shards.prefetch(unit, start - begin, stop - begin, selection)

    def _open_ahead(self, unit: int, stop: int) -> None:
        """Begin to open the shards of a scan to the sample ``stop``, from a unit on."""
        last = -(-stop // self.layout.rows_per_shard)
        self._shards.open_ahead(range(unit, min(unit + UNITS_AHEAD, last)))

    def _release(self, first: int, last: int, selection: Selection) -> None:
        """Release the memory of these samples' rows."""
        for unit, start, stop in self._units(first, last):
            begin = unit * self.layout.rows_per_shard
            self._shards.release(unit, start - begin, stop - begin, selection)

    def _count_touched(self, unit: int, n_rows: int, selection: Selection) -> None:
        """Count the memory of touched pages, which stay mapped, and release it above a limit."""
        pieces = sum(piece.n_chunks for piece in selection.pieces)
        row_bytes = self.layout.row_bytes
        touched = self._touched_bytes.get(unit, 0) + n_rows * pieces * _FAULT_BYTES
        self._touched_bytes[unit] = min(touched, self.layout.rows_per_shard * row_bytes)
        counted = list(self._touched_bytes.items())  # a copy, since threads may share a store
        if sum(n_bytes for _, n_bytes in counted) > _MAX_TOUCHED_BYTES:
            self._touched_bytes.clear()
            for number, _ in counted:
                self._shards.release(number, 0, self.layout.rows_per_shard, selection)

    def _has_rows(self, unit: int, status: np.ndarray, missing: Missing) -> bool:
        """Return whether there is a shard to read for samples of one unit."""
        if not status.any():
            return False
        exists = self._shards.exists(unit)
        if not exists and missing == "raise" and (status == STATUS["ok"]).any():
            raise StoreError(
                f"rows of unit {unit} are recorded as ok but their shard {self._shards.path(unit)} "
                "is gone. Run `python -m gradproj verify` to see all damage"
            )
        return exists


def _range_of(ids: np.ndarray) -> tuple[int, bool]:
    """Return the first id, and whether the ids are consecutive."""
    if len(ids) < 2:
        return (int(ids[0]), True) if len(ids) else (0, False)
    first, last = int(ids[0]), int(ids[-1])
    return first, last - first == len(ids) - 1 and bool((np.diff(ids) == 1).all())
