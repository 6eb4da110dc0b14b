"""A training run's store, which grows: each rank appends rows to units of its own.

The layout is the job's, plus the columns ``step`` and ``sample_id``. Rank r of W writes the units
r, W + r, 2 W + r and so on: no two processes share a file or wait for each other. A unit that is
not full is written again, whole, when it has more rows.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradproj.errors import StoreError, settings_mismatch
from gradproj.files import explain_os_errors, fsync_dir, fsync_file, temporary_beside
from gradproj.storage.publish import FilePublisher
from gradproj.store.append_table import refuse_gap
from gradproj.store.layout import (
    COLUMNS,
    SCRATCH_DIR,
    STATUS,
    STORE_NAME,
    StoreLayout,
    column_chunk_path,
    empty_columns,
)
from gradproj.store.metadata import find_store, layers_of, read_attributes, read_layout
from gradproj.store.reader import ProjectionStore
from gradproj.store.row_encoder import RowEncoder
from gradproj.store.writer import create_store, shard_chunks

EXTRA = ("step", "sample_id")
"""Columns that only training stores have, int64; -1 = none."""

SHARD_BYTES = 16_000_000
"""Default size of a shard. Small, because a unit that is not full is written again."""
MIN_ROWS, MAX_ROWS = 16, 4096


def choose_rows(row_bytes: int, rows_per_step: int, max_steps: int, world_size: int) -> int:
    """Choose the rows of a shard. ``rows_per_step`` (one rank's) or ``max_steps`` 0 = unknown.

    With several ranks, the end of each rank's last unit stays empty unless the run fills it. So a
    shard has a number of whole steps that divides the run, if there is a suitable one.
    """
    limit = min(MAX_ROWS, max(MIN_ROWS, SHARD_BYTES // row_bytes))
    if world_size == 1 or not rows_per_step:
        return limit
    steps = max(1, limit // rows_per_step)
    divisors = (n for n in range(1, min(steps, max_steps) + 1) if max_steps % n == 0)
    best = max(divisors, default=0)
    # A prime number of steps would give shards of one step: worse than a unit's empty end.
    return rows_per_step * (best if best and (8 * best >= steps or best == max_steps) else steps)


def create_row_store(
    folder: Path, layout: StoreLayout, attributes: dict[str, Any], matrices: np.ndarray
) -> None:
    """Make an empty store in ``folder``, which is made if needed; see ``create_store``.

    The layout's ``column_rows`` equal its ``rows_per_shard``, so that units share no file.
    """
    scratch = folder / SCRATCH_DIR
    with explain_os_errors(folder):
        shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed here
        scratch.mkdir(parents=True)
    publisher = FilePublisher(scratch)
    create_store(folder / STORE_NAME, layout, attributes, matrices, publisher, EXTRA)


class AppendStore:
    """One rank's part of a training run's store, which exists in ``folder``, open for writing."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = find_store(folder), rank, world_size
        self.layout = read_layout(self._store)
        self._encoder = RowEncoder(self.layout, layers_of(read_attributes(self._store)))
        self._height = self.layout.rows_per_shard
        self._scratch = folder / SCRATCH_DIR / f"rank-{rank:05d}"
        self._lock = folder / SCRATCH_DIR / "lock"
        with explain_os_errors(folder):
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir(parents=True)
        self._number = self._filled = self._written = 0
        self._unflushed: set[Path] = set()
        self._stored = np.empty((0, 0))
        self._columns: dict[str, np.ndarray] = {}
        self._open_unit(0)

    @property
    def n_rows(self) -> int:
        """Rows of this rank, written or not."""
        return self._number * self._height + self._filled

    def add(self, rows: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows ``(n, D)`` float32. Full units are written to disk.

        Their columns are ``status``, ``loss``, ``n_tokens``, ``grad_norm``, and those of ``EXTRA``.
        """
        encoded, row_scale = self._encoder.encode(torch.from_numpy(rows))
        stored = encoded.numpy()
        bad = columns["status"] == STATUS["non_finite"]
        if bad.any():  # a copy: dense float32 rows are the caller's own
            stored = stored.copy()
            stored[bad] = self.layout.fill
        columns = {**columns, "row_scale": row_scale.numpy()}
        done = 0
        while done < len(rows):
            taken = slice(done, done + min(len(rows) - done, self._height - self._filled))
            place = slice(self._filled, self._filled + taken.stop - done)
            self._stored[place] = stored[taken]
            for name, values in columns.items():
                self._columns[name][place] = values[taken]
            self._filled, done = place.stop, taken.stop
            if self._filled == self._height:
                self.flush()
                self._open_unit(self._number + 1)

    def flush(self) -> None:
        """Write the open unit's rows: readers see them, and a kill of this process loses none."""
        if self.n_rows == self._written or not self._filled:
            return
        self._write_unit()
        self._written = self.n_rows

    def fsync(self) -> None:
        """Write all rows and flush them to disk, before a checkpoint that counts on them."""
        self.flush()
        with explain_os_errors(self._store):
            for path in self._unflushed:
                fsync_file(path)
            for folder in {path.parent for path in self._unflushed}:
                fsync_dir(folder)
        self._unflushed.clear()

    def cut(self, n_rows: int) -> None:
        """Keep this rank's first ``n_rows`` rows only, and append after them.

        Raises:
            StoreError: some of them are lost.
        """
        number, kept = divmod(n_rows, self._height)
        last = self._unit(number)
        self._check_rows_exist(n_rows)
        self._open_unit(number)
        self.extend()
        if kept:
            self._read_back(last, kept)
        for unit in self._units_on_disk():
            if unit > last or (unit == last and not kept):
                self._remove(unit)
        if kept:
            self._write_unit()
        if self._rank == 0:
            self._set_length(self._length_with(number))
        self._written = n_rows

    def extend(self) -> None:
        """Lengthen the store for this rank's rows. Call it after all ranks' ``cut``."""
        length = self._length_with(self._number)
        with self._lock.open("w") as lock:
            # Ranks extend at different times; without a lock a shorter length could win.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._n_samples() < length:
                self._set_length(length)

    def n_rows_to(self, step: int) -> int:
        """Count this rank's rows on disk of steps up to ``step``; steps ascend.

        Raises:
            StoreError: rows of the last steps before it were never written.
        """
        n_rows, number, last = 0, 0, -1
        while (path := column_chunk_path(self._store, "step", self._unit(number))).exists():
            steps = np.fromfile(path, "<i8")
            n_rows += int(((steps >= 0) & (steps <= step)).sum())
            last = max(last, int(steps.max()))
            number += 1
        refuse_gap(self._store, last, step)
        return n_rows

    def close(self) -> None:
        """Write all rows. The empty end of the last unit is cut off or marked as not selected."""
        if self._filled:
            self._columns["status"][self._filled :] = STATUS["not_selected"]
            self._write_unit()
            self._written = self.n_rows
        if self._world_size == 1:
            self._set_length(max(1, self.n_rows))
        self.fsync()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # --- units ---

    def _unit(self, number: int) -> int:
        """Return the store-wide number of a unit of this rank."""
        return number * self._world_size + self._rank

    def _open_unit(self, number: int) -> None:
        layout = self.layout
        self._number, self._filled = number, 0
        self._stored = np.full((self._height, layout.stored_width), layout.fill)
        self._columns = empty_columns(self._height, layout.key_bytes)
        self._columns |= {name: np.full(self._height, -1, np.int64) for name in EXTRA}

    def _write_unit(self) -> None:
        """Write the shard first and the status last, so that readers see whole rows only."""
        unit = self._unit(self._number)
        rows = self._stored[: self._filled]
        self._replace(self._shard_path(unit), shard_chunks(rows, self.layout))
        self.extend()
        for name in (*EXTRA, *COLUMNS):
            content = self._columns[name].view(np.uint8).reshape(-1).data
            self._replace(column_chunk_path(self._store, name, unit), [content])

    def _shard_path(self, unit: int) -> Path:
        return self._store.parent / self.layout.shard_name(unit)

    def _replace(self, path: Path, chunks: Iterable[Any]) -> None:
        """Write a file and rename it to ``path``. ``fsync`` flushes it later."""
        temporary = temporary_beside(path, self._scratch)
        with explain_os_errors(path):
            with temporary.open("wb") as file:
                file.writelines(chunks)
                if path.exists():
                    # A checkpoint may count on the old file, so the new one is flushed before the
                    # rename.
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        self._unflushed.add(path)

    def _read_back(self, unit: int, kept: int) -> None:
        first = unit * self._height
        with ProjectionStore(self._store) as store:
            _, stored, _ = next(store.scan_stored(kept, start=first, stop=first + kept))
            self._stored[:kept] = stored
            for name in COLUMNS:
                self._columns[name][:kept] = store.column(name, first, first + kept)
        for name in EXTRA:
            values = np.fromfile(column_chunk_path(self._store, name, unit), "<i8")
            self._columns[name][:kept] = values[:kept]
        self._filled = kept

    def _check_rows_exist(self, n_rows: int) -> None:
        length = self._n_samples()
        with ProjectionStore(self._store) as store:
            for number in range(-(-n_rows // self._height)):
                first = self._unit(number) * self._height
                stop = first + min(self._height, n_rows - number * self._height)
                if stop > length or not store.column("status", first, stop).all():
                    raise StoreError(
                        f"{self._store}: rows {first} to {stop - 1}, which the checkpoint counts "
                        "on, are not all there. Train without --resume, into a new --result_dir"
                    )

    def _units_on_disk(self) -> list[int]:
        units = {
            int(path.name.split(".")[1])
            for name in (*COLUMNS, *EXTRA, "projections")
            for path in (self._store / name).glob("c.*")
        }
        return sorted(unit for unit in units if unit % self._world_size == self._rank)

    def _remove(self, unit: int) -> None:
        """Delete a unit's files, the status first: its rows must not look complete meanwhile."""
        columns = [
            column_chunk_path(self._store, name, unit) for name in (*reversed(COLUMNS), *EXTRA)
        ]
        for path in (*columns, self._shard_path(unit)):
            path.unlink(missing_ok=True)
            self._unflushed.discard(path)

    # --- length ---

    def _length_with(self, number: int) -> int:
        """Return the store's length with every rank's units up to this one."""
        return (number + 1) * self._world_size * self._height

    def _n_samples(self) -> int:
        return read_layout(self._store).n_samples

    def _set_length(self, n_samples: int) -> None:
        """Change the length of all arrays."""
        # Readers use that of ``projections``, which is therefore never longer than the columns.
        current = self._n_samples()
        names = [*COLUMNS, *EXTRA, "projections"]
        for name in names if n_samples > current else reversed(names):
            path = self._store / name / "zarr.json"
            metadata = json.loads(path.read_text())
            if metadata["shape"][0] != n_samples:
                metadata["shape"][0] = n_samples
                self._replace(path, [json.dumps(metadata, indent=2).encode()])


def holds_rows(folder: Path) -> bool:
    """Return whether there is a store in the folder with any rows."""
    return any((folder / STORE_NAME / "status").glob("c.*"))


def check_same(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Refuse to continue a store that was made with other settings.

    Raises:
        StoreError: lists every difference.
    """
    mismatch = settings_mismatch(
        f"cannot continue {folder}: it was made with other settings",
        read_attributes(find_store(folder))["identity"],
        attributes["identity"],
        "Resume with the same settings, or give --result_dir a new path",
    )
    if mismatch:
        raise StoreError(mismatch)
