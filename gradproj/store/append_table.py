"""A table that grows: a Zarr group with an array a column. Rows are appended, and cut on resume.

One process owns it. Each file is flushed before the next one is changed, and ``n_rows`` in the
group's attributes is written last: the next opening cuts off what a crash left after it. Chunks
are written here, because zarr-python changes files in place and a crash could tear them.
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

    It is made if it does not exist; an existing table must have the same ``attributes``.

    Raises:
        StoreError: there is another table, a damaged one or something else; or the folder cannot
            be written.
    """

    def __init__(self, path: str | Path, columns: Columns, attributes: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._columns = columns
        with explain_os_errors(self.path):
            if (self.path / "zarr.json").is_file():
                self._check(attributes)
            elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise StoreError(f"{self.path} exists and is no Zarr group; give another folder")
            else:
                self._create(attributes)
        self.n_rows = int(self._metadata(self.path)["attributes"]["n_rows"])
        self.cut(self.n_rows)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows: every column's values, all of one length."""
        stop = self.n_rows + len(next(iter(columns.values())))
        with explain_os_errors(self.path):
            for name in self._columns:
                self._write_chunks(name, columns[name])
                self._set_length(name, stop)
            self._set_n_rows(stop)

    def cut(self, n_rows: int) -> None:
        """Drop the rows from ``n_rows`` on."""
        with explain_os_errors(self.path):
            # The count is written before rows are dropped, and after rows are appended.
            if n_rows < self.n_rows:
                self._set_n_rows(n_rows)
            for name in self._columns:
                self._set_length(name, n_rows)
                for path in (self.path / name).glob("c.*"):
                    if int(path.name.split(".")[1]) * ROWS_PER_CHUNK >= n_rows:
                        path.unlink()

    def read(self, name: str) -> np.ndarray:
        """Read a whole column."""
        return np.asarray(zarr.open_array(str(self.path / name), mode="r")[:])

    def _write_chunks(self, name: str, values: np.ndarray) -> None:
        """Write values after row ``n_rows``; the chunk that they begin in is written again."""
        (dtype, _), (first, filled) = self._columns[name], divmod(self.n_rows, ROWS_PER_CHUNK)
        block = np.full(self._chunk_shape(name), _fill(dtype), dtype.newbyteorder("<"))
        if filled:
            chunk = np.fromfile(self._chunk(name, first), block.dtype).reshape(block.shape)
            block[:filled] = chunk[:filled]
        for at in range(-filled, len(values), ROWS_PER_CHUNK):
            part = values[max(0, at) : at + ROWS_PER_CHUNK]
            start = max(0, -at)
            block[start : start + len(part)] = part
            number = first + (at + filled) // ROWS_PER_CHUNK
            write_and_replace(self._chunk(name, number), [block.tobytes()])

    def _chunk_shape(self, name: str) -> tuple[int, ...]:
        width = self._columns[name][1]
        return (ROWS_PER_CHUNK,) if width is None else (ROWS_PER_CHUNK, max(1, width))

    def _chunk(self, name: str, number: int) -> Path:
        has_width = self._columns[name][1] is not None
        return self.path / name / (f"c.{number}.0" if has_width else f"c.{number}")

    def _set_length(self, name: str, n_rows: int) -> None:
        metadata = self._metadata(self.path / name)
        if metadata["shape"][0] != n_rows:
            metadata["shape"][0] = n_rows
            _write_json(self.path / name, metadata)

    def _create(self, attributes: Mapping[str, Any]) -> None:
        # Under another name until it is whole, so that a kill leaves no unfinished table.
        unfinished = temporary_beside(self.path)
        unfinished.mkdir(parents=True)
        group = zarr.create_group(str(unfinished), attributes={**attributes, "n_rows": 0})
        for name, (dtype, width) in self._columns.items():
            group.create_array(
                name,
                shape=(0,) if width is None else (0, width),
                chunks=self._chunk_shape(name),
                dtype=dtype,
                fill_value=_fill(dtype),
                compressors=None,
                filters=None,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=("row",) if width is None else ("row", f"{name}_value"),
            )
        fsync_tree(unfinished)
        unfinished.replace(self.path)
        fsync_dir(self.path.parent)

    def _check(self, attributes: Mapping[str, Any]) -> None:
        recorded = self._metadata(self.path)["attributes"]
        if "n_rows" not in recorded:
            raise StoreError(
                f"{self.path} is a Zarr group but no table of a training run; give another folder"
            )
        mismatch = settings_mismatch(
            f"{self.path} was written by a run with other settings",
            recorded,
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
                f"{self.path} is damaged ({folder.name}/zarr.json: {error}): delete it, and train "
                "without --resume into a new folder"
            ) from error

    def _set_n_rows(self, n_rows: int) -> None:
        metadata = self._metadata(self.path)
        metadata["attributes"]["n_rows"] = n_rows
        _write_json(self.path, metadata)
        self.n_rows = n_rows


def _fill(dtype: np.dtype) -> float:
    return np.nan if dtype.kind == "f" else -1


def refuse_gap(path: Path, last_step: int, resume_step: int) -> None:
    """Refuse to resume from a step before which rows were lost: later the gap could not be seen.

    Raises:
        StoreError: ``last_step``, the last with rows (-1 for none), is before ``resume_step``,
            which is not 0.
    """
    if last_step < resume_step and resume_step > 0:
        has = f"ends with step {last_step}" if last_step >= 0 else "has no row"
        raise StoreError(
            f"{path} {has}, so the rows up to step {resume_step}, from which training resumes, are "
            "not all there: resume from a checkpoint of that step, or start in a new result_dir. A "
            "loop of your own calls engine.state_dict() before it saves a checkpoint"
        )


def _write_json(folder: Path, metadata: dict[str, Any]) -> None:
    write_and_replace(folder / "zarr.json", [json.dumps(metadata, indent=2).encode()])
