"""A table that grows: columns of a Zarr group, rows appended while a run goes on, cut where it resumes.

One process owns it. ``n_rows`` in the group's attributes is written after the rows it counts: what a crash left behind
it is cut off at the next opening.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from gradproj.errors import StoreError
from gradproj.store.files import explain_os_errors, temporary_beside

ROWS_PER_CHUNK = 1024

Columns = Mapping[str, tuple[np.dtype, int | None]]
"""Column name -> (dtype, width); width None for ``[rows]``, else ``[rows, width]``."""


class GrowingTable:
    """A Zarr v3 group at ``path`` with one array a column, all of ``n_rows`` rows.

    Args:
        path: the group's folder, made where it is missing.
        columns: what the arrays are.
        attributes: kept in the group; a table that is there already must have the same.

    Raises:
        StoreError: another table, or something else, is there; or the folder cannot be written.
    """

    def __init__(self, path: str | Path, columns: Columns, attributes: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._columns = columns
        with explain_os_errors(self.path):
            if (self.path / "zarr.json").is_file():
                self._group = zarr.open_group(str(self.path), mode="r+")
                self._check(attributes)
            elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise StoreError(f"{self.path} is there and is not a Zarr group; give another folder")
            else:
                self._group = self._create(attributes)
        self.n_rows = int(str(self._group.attrs["n_rows"]))
        self._arrays = {name: self._array(name) for name in columns}
        self.cut(self.n_rows)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows: every column's values, all of one length."""
        n_new = len(next(iter(columns.values())))
        stop = self.n_rows + n_new
        with explain_os_errors(self.path):
            for name, array in self._arrays.items():
                array.resize((stop, *array.shape[1:]))
                array[self.n_rows : stop] = columns[name]
            self._note(stop)

    def cut(self, n_rows: int) -> None:
        """Drop the rows from ``n_rows`` on."""
        with explain_os_errors(self.path):
            # The count comes first where rows go, and last where they come.
            if n_rows < self.n_rows:
                self._note(n_rows)
            for array in self._arrays.values():
                if array.shape[0] != n_rows:
                    array.resize((n_rows, *array.shape[1:]))

    def read(self, name: str) -> np.ndarray:
        """A whole column."""
        return np.asarray(self._arrays[name][:])

    def _create(self, attributes: Mapping[str, Any]) -> zarr.Group:
        # Under another name until it is whole: a run killed here starts again as if it had never been.
        unfinished = temporary_beside(self.path)
        unfinished.mkdir(parents=True)
        group = zarr.create_group(str(unfinished))
        for name, (dtype, width) in self._columns.items():
            shape = (0,) if width is None else (0, width)
            chunks = (ROWS_PER_CHUNK,) if width is None else (ROWS_PER_CHUNK, max(1, width))
            fill = np.nan if dtype.kind == "f" else -1
            group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, fill_value=fill)
        group.attrs.update({**attributes, "n_rows": 0})
        unfinished.replace(self.path)
        return zarr.open_group(str(self.path), mode="r+")

    def _check(self, attributes: Mapping[str, Any]) -> None:
        there = dict(self._group.attrs)
        if "n_rows" not in there:
            raise StoreError(
                f"{self.path} is a Zarr group but no table of a training run; give another folder"
            )
        differing = [name for name, value in attributes.items() if there.get(name) != value]
        if differing:
            raise StoreError(
                f"{self.path} was written by a run of another kind: {', '.join(differing)} differ. Give another folder"
            )

    def _array(self, name: str) -> Any:
        return self._group[name]

    def _note(self, n_rows: int) -> None:
        self._group.attrs.update({"n_rows": n_rows})
        self.n_rows = n_rows
