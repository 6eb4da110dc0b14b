"""A table that grows: appended rows are there, cut or half-written rows are not."""

import itertools

import numpy as np
import pytest
import zarr

from gradproj.errors import StoreError
from gradproj.store.append_table import ROWS_PER_CHUNK, AppendTable

COLUMNS = {"step": (np.dtype(np.int64), None), "values": (np.dtype(np.float32), 3)}


def rows(start, stop):
    steps = np.arange(start, stop)
    return {"step": steps, "values": np.stack([steps, 2 * steps, -steps], 1).astype(np.float32)}


def assert_holds(path, start, stop):
    """Any Zarr reader sees these rows."""
    group = zarr.open_group(str(path), mode="r")
    for name, want in rows(start, stop).items():
        np.testing.assert_array_equal(group[name][:], want)


def test_rows_appended_in_parts_equal_rows_appended_at_once(tmp_path):
    parts = [0, 1, 5, 5, ROWS_PER_CHUNK - 1, ROWS_PER_CHUNK + 1, 3 * ROWS_PER_CHUNK]
    for start, stop in itertools.pairwise(parts):
        AppendTable(tmp_path / "table", COLUMNS, {"kind": "a"}).append(rows(start, stop))
        assert_holds(tmp_path / "table", 0, stop)


def test_rows_can_be_cut_and_others_appended(tmp_path):
    table = AppendTable(tmp_path / "table", COLUMNS, {})
    table.append(rows(0, 10))
    table.cut(4)
    assert_holds(table.path, 0, 4)
    table.append(rows(4, 7))
    assert_holds(table.path, 0, 7)
    assert table.n_rows == 7


@pytest.mark.parametrize("column", COLUMNS)
def test_reopening_cuts_off_an_append_that_crashed(tmp_path, column, monkeypatch):
    table = AppendTable(tmp_path / "table", COLUMNS, {})
    table.append(rows(0, 3))
    write = table._write_chunks

    def die(name, values):
        if name == column:
            raise KeyboardInterrupt
        write(name, values)

    # The process dies before this column is written.
    monkeypatch.setattr(table, "_write_chunks", die)
    with pytest.raises(KeyboardInterrupt):
        table.append(rows(3, 6))
    again = AppendTable(tmp_path / "table", COLUMNS, {})
    assert again.n_rows == 3
    again.append(rows(3, 5))
    assert_holds(again.path, 0, 5)


def test_another_table_or_file_is_refused_and_unchanged(tmp_path):
    AppendTable(tmp_path / "table", COLUMNS, {"kind": "a"}).append(rows(0, 2))
    with pytest.raises(
        StoreError, match="by a run with other settings\n  kind: table 'a', this run 'b'"
    ):
        AppendTable(tmp_path / "table", COLUMNS, {"kind": "b"})
    zarr.create_group(str(tmp_path / "foreign"))
    with pytest.raises(StoreError, match="is a Zarr group but no table of a training run"):
        AppendTable(tmp_path / "foreign", COLUMNS, {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="exists and is no Zarr group"):
        AppendTable(tmp_path / "file", COLUMNS, {})
    assert_holds(tmp_path / "table", 0, 2)
