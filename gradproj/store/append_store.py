"""A store that grows with a training run: rows in the order seen, a rank's in units of its own.

The layout is the job's, with the columns ``step`` and ``sample_id`` besides. Rank r of W writes the units r, W + r,
2 W + r and so on, one after the other: no two processes share a file, and what one has written never waits for another.
A unit that is not full is written again, whole, when more rows have come.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.errors import StoreError, settings_mismatch
from gradproj.files import (
    explain_os_errors,
    fsync_dir,
    fsync_file,
    temporary_beside,
    write_and_replace,
)
from gradproj.store.append_table import refuse_gap
from gradproj.store.encoding import encode_rows, nan_rows
from gradproj.store.layout import (
    COLUMNS,
    STATUS,
    STORE_NAME,
    LayerSlice,
    StoreLayout,
    empty_columns,
)
from gradproj.store.metadata import find_store, read_attributes, read_layout
from gradproj.store.reader import ProjectionStore
from gradproj.store.writer import create_store, shard_chunks

EXTRA = ("step", "sample_id")
"""Columns, int64, that a job's store has not; -1 = none."""

SHARD_BYTES = 16_000_000
"""Of a shard, unless its rows are given: a unit that is not full is cheap to write again."""
LEAST_ROWS, MOST_ROWS = 16, 4096


def choose_rows(row_bytes: int, rows_per_step: int, max_steps: int, world_size: int) -> int:
    """Rows of a shard.

    With several ranks a rank's last unit stays empty at its end unless the run fills it: so, where a number of whole
    steps divides the run, it is taken.

    Args:
        row_bytes: of a stored row.
        rows_per_step: of one rank; 0 = not known.
        max_steps: of the run; 0 = not known.
        world_size: ranks.
    """
    most = min(MOST_ROWS, max(LEAST_ROWS, SHARD_BYTES // row_bytes))
    if world_size == 1 or not rows_per_step:
        return most
    steps = max(1, most // rows_per_step)
    even = [n for n in range(1, min(steps, max_steps) + 1) if max_steps % n == 0]
    best = max(even, default=0)
    # One row a shard, for a run of a prime number of steps, would be worse than places left empty.
    return rows_per_step * (best if best and (8 * best >= steps or best == max_steps) else steps)


def create_row_store(
    folder: Path, layout: StoreLayout, attributes: dict[str, Any], matrices: np.ndarray
) -> None:
    """Make an empty store in ``folder``, under another name first.

    Args:
        folder: made if it is not there.
        layout: its ``column_rows`` are its ``rows_per_shard``, so that a unit's files are its own.
        attributes: of the group.
        matrices: as ``pack_matrices`` gives them.

    Raises:
        StoreError: the folder cannot be written.
    """
    making = folder / "tmp" / "new"
    with explain_os_errors(folder):
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        create_store(making / STORE_NAME, layout, attributes, matrices)
        for name in EXTRA:
            _add_column(making / STORE_NAME, name)
        os.rename(making / STORE_NAME, folder / STORE_NAME)
        making.rmdir()
        fsync_dir(folder)


def _add_column(store: Path, name: str) -> None:
    """An int64 column with the shape and chunks of ``tar``."""
    metadata = json.loads((store / "tar" / "zarr.json").read_text())
    metadata |= {"data_type": "int64", "fill_value": -1}
    (store / name).mkdir()
    write_and_replace(store / name / "zarr.json", [json.dumps(metadata, indent=2).encode()])


class AppendStore:
    """One rank's part of a run's store, open for writing.

    Args:
        folder: holds the store, which exists.
        rank: of this process.
        world_size: processes that write.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = find_store(folder), rank, world_size
        self.layout = read_layout(self._store)
        self._height = self.layout.rows_per_shard
        self._scratch = folder / "tmp" / f"rank-{rank:05d}"
        self._lock = folder / "tmp" / "lock"
        with explain_os_errors(folder):
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir(parents=True)
        self._number = self._filled = self._written = 0
        self._unsafe: set[Path] = set()
        self._stored = np.empty((0, 0))
        self._columns: dict[str, np.ndarray] = {}
        self._open_unit(0)

    @property
    def n_rows(self) -> int:
        """This rank's, written or not."""
        return self._number * self._height + self._filled

    def add(self, rows: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Put rows after those before; full units go to disk.

        Args:
            rows: ``(n, D)`` float32.
            columns: of these rows: ``status``, ``loss``, ``n_tokens``, ``grad_norm``, ``step``, ``sample_id``.
        """
        stored, scale = encode_rows(rows, self.layout.proj_dtype)
        bad = columns["status"] == STATUS["non_finite"]
        stored[bad] = nan_rows((), self.layout.proj_dtype)
        columns = {**columns, "row_scale": scale}
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
        """Write the open unit as far as it is. A reader sees its rows from here on, and a kill cannot take them."""
        if self.n_rows == self._written or not self._filled:
            return
        self._write_unit()
        self._written = self.n_rows

    def fsync(self) -> None:
        """As ``flush``, and a loss of power cannot take them either: before a checkpoint that counts on them."""
        self.flush()
        with explain_os_errors(self._store):
            for path in self._unsafe:
                fsync_file(path)
            for folder in {path.parent for path in self._unsafe}:
                fsync_dir(folder)
        self._unsafe.clear()

    def cut(self, n_rows: int) -> None:
        """Keep this rank's first rows only, and go on after them.

        Raises:
            StoreError: they are not all there.
        """
        number, kept = divmod(n_rows, self._height)
        last = self._unit(number)
        self._refuse_lost(n_rows)
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
        """Have the store long enough for this rank's rows: after all ranks' ``cut``, in which one sets its length."""
        wanted = self._length_with(self._number)
        with self._lock.open("w") as lock:
            # Ranks that are not in step would take each other's length back.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._n_samples() < wanted:
                self._set_length(wanted)

    def n_rows_to(self, step: int) -> int:
        """How many of this rank's rows on disk are of steps up to this one; steps ascend.

        Raises:
            StoreError: rows of the last steps before it were never written.
        """
        n_rows, number, last = 0, 0, -1
        while (path := self._store / "step" / f"c.{self._unit(number)}").exists():
            steps = np.fromfile(path, "<i8")
            n_rows += int(((steps >= 0) & (steps <= step)).sum())
            last = max(last, int(steps.max()))
            number += 1
        refuse_gap(self._store, last, step)
        return n_rows

    def close(self) -> None:
        """Write what is left. What a rank's last unit has no row for is marked as such, or cut off."""
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
        """The store's number of this rank's unit."""
        return number * self._world_size + self._rank

    def _open_unit(self, number: int) -> None:
        layout = self.layout
        self._number, self._filled = number, 0
        self._stored = nan_rows((self._height, layout.dim), layout.proj_dtype)
        self._columns = empty_columns(self._height, layout.key_bytes)
        self._columns |= {name: np.full(self._height, -1, np.int64) for name in EXTRA}

    def _write_unit(self) -> None:
        """Shard first, status last: a row shows once all of it is there."""
        unit, folder = self._unit(self._number), self._store
        rows = self._stored[: self._filled]
        self._put(folder / "projections" / f"c.{unit}.0", shard_chunks(rows, self.layout))
        self.extend()
        for name in (*EXTRA, *COLUMNS):
            file_name = f"c.{unit}.0" if name == "key" else f"c.{unit}"
            self._put(
                folder / name / file_name, [self._columns[name].view(np.uint8).reshape(-1).data]
            )

    def _put(self, path: Path, chunks: Iterable[Any]) -> None:
        """Write a file and put it in its place; it is flushed to disk by ``fsync``."""
        temporary = temporary_beside(path, self._scratch)
        with explain_os_errors(path):
            with temporary.open("wb") as file:
                file.writelines(chunks)
                if path.exists():
                    # What goes may be on the disk for good, and a checkpoint count on it: so must be what comes.
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        self._unsafe.add(path)

    def _read_back(self, unit: int, kept: int) -> None:
        first = unit * self._height
        with ProjectionStore(self._store) as store:
            _, stored, _ = next(store.scan_stored(kept, start=first, stop=first + kept))
            self._stored[:kept] = stored
            for name in COLUMNS:
                self._columns[name][:kept] = store.column(name, first, first + kept)
        for name in EXTRA:
            self._columns[name][:kept] = np.fromfile(self._store / name / f"c.{unit}", "<i8")[:kept]
        self._filled = kept

    def _refuse_lost(self, n_rows: int) -> None:
        length = self._n_samples()
        with ProjectionStore(self._store) as store:
            for number in range(-(-n_rows // self._height)):
                first = self._unit(number) * self._height
                stop = first + min(self._height, n_rows - number * self._height)
                if stop > length or not store.column("status", first, stop).all():
                    raise StoreError(
                        f"{self._store}: rows {first} to {stop - 1}, which the checkpoint counts on, are not all "
                        "there. Train without --resume, into a new --result_dir"
                    )

    def _units_on_disk(self) -> list[int]:
        found = {
            int(path.name.split(".")[1])
            for name in (*COLUMNS, *EXTRA, "projections")
            for path in (self._store / name).glob("c.*")
        }
        return sorted(unit for unit in found if unit % self._world_size == self._rank)

    def _remove(self, unit: int) -> None:
        for name in (*reversed(COLUMNS), *EXTRA, "projections"):
            for path in (self._store / name / f"c.{unit}", self._store / name / f"c.{unit}.0"):
                path.unlink(missing_ok=True)
                self._unsafe.discard(path)

    # --- length ---

    def _length_with(self, number: int) -> int:
        """Rows that the store has places for once every rank's units up to this one are there."""
        return (number + 1) * self._world_size * self._height

    def _n_samples(self) -> int:
        return read_layout(self._store).n_samples

    def _set_length(self, n_samples: int) -> None:
        """Change the arrays' shape; a reader takes the store's from ``projections``, which is never ahead."""
        now = self._n_samples()
        names = [*COLUMNS, *EXTRA, "projections"]
        for name in names if n_samples > now else reversed(names):
            path = self._store / name / "zarr.json"
            metadata = json.loads(path.read_text())
            if metadata["shape"][0] != n_samples:
                metadata["shape"][0] = n_samples
                self._put(path, [json.dumps(metadata, indent=2).encode()])


def holds_rows(folder: Path) -> bool:
    """Whether anything was written to the store in a folder; a store that is not there holds nothing."""
    return any((folder / STORE_NAME / "status").glob("c.*"))


def check_same(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Refuse to go on with a store that was made with other settings.

    Raises:
        StoreError: every difference.
    """
    mismatch = settings_mismatch(
        f"cannot go on with {folder}: it was made with other settings",
        read_attributes(find_store(folder))["identity"],
        attributes["identity"],
        "Resume with the same settings, or give --result_dir a new path",
    )
    if mismatch:
        raise StoreError(mismatch)


def layers_as_json(layers: list[LayerSlice]) -> list[dict[str, Any]]:
    """The attribute ``layers``."""
    return [asdict(layer) for layer in layers]
