"""A table that grows: columns of a Zarr group, rows appended while a run goes on, cut where it resumes.

One process owns it. Every file is on the disk for good before the next one is changed, and ``n_rows`` in the group's
attributes comes last: what a crash left behind it is cut off at the next opening. Chunks are written here, as they are
in memory: zarr-python would change files in place, and a crash tear them.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from gradproj.errors import StoreError, settings_mismatch
from gradproj.files import (
    explain_os_errors,
    fsync_dir,
    fsync_tree,
    temporary_beside,
    write_and_replace,
)

ROWS_PER_CHUNK = 1024

Columns = Mapping[str, tuple[np.dtype, int | None]]
"""Column name -> (dtype, width); width None for ``[rows]``, else ``[rows, width]``."""


class AppendTable:
    """A Zarr v3 group at ``path`` with one array a column, all of ``n_rows`` rows.

    Args:
        path: the group's folder, made where it is missing.
        columns: what the arrays are.
        attributes: kept in the group; a table that is there already must have the same.

    Raises:
        StoreError: another table, a damaged one, or something else is there; or the folder cannot be written.
    """

    def __init__(self, path: str | Path, columns: Columns, attributes: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._columns = columns
        with explain_os_errors(self.path):
            if (self.path / "zarr.json").is_file():
                self._check(attributes)
            elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise StoreError(
                    f"{self.path} is there and is not a Zarr group; give another folder"
                )
            else:
                self._create(attributes)
        self.n_rows = int(self._metadata(self.path)["attributes"]["n_rows"])
        self.cut(self.n_rows)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows: every column's values, all of one length."""
        stop = self.n_rows + len(next(iter(columns.values())))
        with explain_os_errors(self.path):
            for name in self._columns:
                self._write_chunks(name, columns[name])
                self._set_length(name, stop)
            self._note(stop)

    def cut(self, n_rows: int) -> None:
        """Drop the rows from ``n_rows`` on."""
        with explain_os_errors(self.path):
            # The count comes first where rows go, and last where they come.
            if n_rows < self.n_rows:
                self._note(n_rows)
            for name in self._columns:
                self._set_length(name, n_rows)
                for path in (self.path / name).glob("c.*"):
                    if int(path.name.split(".")[1]) * ROWS_PER_CHUNK >= n_rows:
                        path.unlink()

    def read(self, name: str) -> np.ndarray:
        """A whole column."""
        return np.asarray(zarr.open_array(str(self.path / name), mode="r")[:])

    def _write_chunks(self, name: str, values: np.ndarray) -> None:
        """The values after the ``n_rows`` that are there; the chunk in which they begin is written again."""
        (dtype, width), first = self._columns[name], self.n_rows // ROWS_PER_CHUNK
        shape = (ROWS_PER_CHUNK,) if width is None else (ROWS_PER_CHUNK, max(1, width))
        block = np.full(shape, np.nan if dtype.kind == "f" else -1, dtype.newbyteorder("<"))
        filled = self.n_rows % ROWS_PER_CHUNK
        if filled:
            block[:filled] = np.fromfile(self._chunk(name, first), block.dtype).reshape(shape)[
                :filled
            ]
        for at in range(-filled, len(values), ROWS_PER_CHUNK):
            part = values[max(0, at) : at + ROWS_PER_CHUNK]
            start = max(0, -at)
            block[start : start + len(part)] = part
            write_and_replace(
                self._chunk(name, first + (at + filled) // ROWS_PER_CHUNK), [block.tobytes()]
            )

    def _chunk(self, name: str, number: int) -> Path:
        return (
            self.path
            / name
            / (f"c.{number}" if self._columns[name][1] is None else f"c.{number}.0")
        )

    def _set_length(self, name: str, n_rows: int) -> None:
        metadata = self._metadata(self.path / name)
        if metadata["shape"][0] != n_rows:
            metadata["shape"][0] = n_rows
            _write_json(self.path / name, metadata)

    def _create(self, attributes: Mapping[str, Any]) -> None:
        # Under another name until it is whole: a run killed here starts again as if it had never been.
        unfinished = temporary_beside(self.path)
        unfinished.mkdir(parents=True)
        group = zarr.create_group(str(unfinished), attributes={**attributes, "n_rows": 0})
        for name, (dtype, width) in self._columns.items():
            shape = (0,) if width is None else (0, width)
            chunks = (ROWS_PER_CHUNK,) if width is None else (ROWS_PER_CHUNK, max(1, width))
            group.create_array(
                name, shape=shape, chunks=chunks, dtype=dtype, fill_value=np.nan if dtype.kind == "f" else -1,
                compressors=None, filters=None, chunk_key_encoding={"name": "default", "separator": "."},
            )  # fmt: skip
        fsync_tree(unfinished)
        unfinished.replace(self.path)
        fsync_dir(self.path.parent)

    def _check(self, attributes: Mapping[str, Any]) -> None:
        there = self._metadata(self.path)["attributes"]
        if "n_rows" not in there:
            raise StoreError(
                f"{self.path} is a Zarr group but no table of a training run; give another folder"
            )
        mismatch = settings_mismatch(
            f"{self.path} was written by a run with other settings",
            there,
            attributes,
            "Give another folder",
            labels=("table", "this run"),
            show=reprlib.repr,
        )
        if mismatch:
            raise StoreError(mismatch)

    def _metadata(self, folder: Path) -> dict[str, Any]:
        try:
            return {"attributes": {}, **json.loads((folder / "zarr.json").read_bytes())}
        except (FileNotFoundError, ValueError) as error:
            raise StoreError(
                f"{self.path} is damaged ({folder.name}/zarr.json: {error}): delete it, and train without --resume "
                "into a new folder"
            ) from error

    def _note(self, n_rows: int) -> None:
        metadata = self._metadata(self.path)
        metadata["attributes"]["n_rows"] = n_rows
        _write_json(self.path, metadata)
        self.n_rows = n_rows


def refuse_gap(path: Path, last_step: int, resume_step: int) -> None:
    """Refuse to go on from a step before which rows were lost, which nobody would see afterwards.

    Raises:
        StoreError: the last step that has rows (-1: none) comes before ``resume_step``, which is not 0, the beginning.
    """
    if last_step < resume_step and resume_step > 0:
        has = f"ends with step {last_step}" if last_step >= 0 else "has no row"
        raise StoreError(
            f"{path} {has}, so the rows up to step {resume_step}, from which training is to go on, are not all there: "
            "go on from a checkpoint of that step, or begin in a new result_dir. A loop of your own calls "
            "engine.state_dict() before it saves a checkpoint"
        )


def _write_json(folder: Path, metadata: dict[str, Any]) -> None:
    write_and_replace(folder / "zarr.json", [json.dumps(metadata, indent=2).encode()])
