"""A copy has the source's ids and passes verify, wherever it lies, also if it was killed."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
from helpers.buckets import memory_path

from gradproj.__main__ import main
from gradproj.errors import StoreError
from gradproj.maintenance import copy_output as module
from gradproj.maintenance.copy_output import MARKER_NAME, copy_output
from gradproj.maintenance.job_output import read_output
from gradproj.maintenance.verify import verify
from gradproj.storage.contents import files_below
from gradproj.storage.copying import copy_file
from gradproj.store import ProjectionStore
from gradproj.store.unit_record import record_name

SHARDS = "projections.zarr/projections"


def content(place):
    """Every file of an output except those of its processes."""
    return {
        name: (place / name).read_bytes()
        for name in files_below(place)
        if name.split("/")[0] not in ("claims", "heartbeats", "tmp", "prepared")
    }


@pytest.fixture
def bucket():
    return memory_path("out")


def test_copies_between_disk_and_buckets_are_the_source(output, bucket, tmp_path):
    places = [output, bucket, memory_path("a/b"), tmp_path / "back"]
    for source, final in pairwise(places):
        result = copy_output(source, final)
        assert (result.n_units, result.n_units_there, result.n_missing) == (5, 0, 0)
    for place in places[1:]:
        assert content(place) == content(output)
        assert verify(place).exit_code == 0
        assert read_output(place).attributes == read_output(output).attributes


@pytest.fixture
def unfinished(output):
    """The output without its fourth unit's record, and that record."""
    path = output / record_name(3)
    record = path.read_bytes()
    path.unlink()
    return output, path, record


def test_a_second_copy_adds_what_is_new(unfinished, bucket):
    output, path, record = unfinished
    assert copy_output(output, bucket).n_missing == 1
    assert read_output(bucket).missing.tolist() == [3]
    assert not (bucket / SHARDS / "c.3.0").is_file()
    path.write_bytes(record)
    result = copy_output(output, bucket)
    assert (result.n_units, result.n_units_there, result.n_missing) == (1, 4, 0)
    assert verify(bucket).exit_code == 0


@pytest.mark.parametrize("n_files", [1, 4, 12, 30])
def test_a_killed_copy_is_no_store_and_is_continued(output, bucket, monkeypatch, n_files):
    left = [n_files]

    def dying(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return copy_file(*args)

    monkeypatch.setattr(module, "copy_file", dying)
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        copy_output(output, bucket)
    with pytest.raises(StoreError):
        ProjectionStore(bucket)
    left[0] = -1
    result = copy_output(output, bucket)
    assert result.n_units_there == min(5, n_files // 2)  # a unit has a shard and a record
    assert content(bucket) == content(output)


def test_a_damaged_shard_is_not_copied(output, bucket):
    path = output / SHARDS / "c.2.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"c\.2\.0 is damaged: it is not what its unit's record"):
        copy_output(output, bucket)
    assert not (bucket / SHARDS / "c.2.0").is_file()


class Flipping:
    """A store that writes one bit wrong."""

    def __init__(self, store):
        self._store = store

    def put(self, key, data, **options):
        if key.endswith("c.1.0"):
            data = bytes([data[0] ^ 1]) + data[1:]
        return self._store.put(key, data, **options)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_what_a_bucket_has_written_wrong_is_found(output, bucket):
    bucket.store = Flipping(bucket.store)
    with pytest.raises(StoreError, match=r"c\.1\.0 does not hold what was written to it"):
        copy_output(output, bucket)
    assert copy_output(output, memory_path("x"), read_back=False).n_units == 5


def test_a_file_of_several_parts_appears_whole_or_not_at_all(tmp_path, bucket):
    path = tmp_path / "x"
    path.write_bytes(np.random.default_rng(0).bytes(20_000_001))
    assert copy_file(path, bucket) == 20_000_001
    assert bucket.read_bytes() == path.read_bytes()
    with pytest.raises(StoreError, match="is damaged"):
        copy_file(path, bucket / "y", {"bytes": 20_000_001, "crc32c": 1})
    assert files_below(bucket) == []


def test_places_that_hold_something_else_are_refused(output, bucket):
    with pytest.raises(StoreError, match="give another place"):
        copy_output(output, output / "copy")
    (bucket / "x").put([b"1"])
    with pytest.raises(StoreError, match="out is not empty, and no copy of a store"):
        copy_output(output, bucket)
    (bucket / MARKER_NAME).put([b'{"store_id": "other"}'])
    with pytest.raises(StoreError, match="holds another store"):
        copy_output(output, bucket)


def test_a_copy_that_a_job_has_worked_on_is_left_alone(unfinished, tmp_path):
    output, _, record = unfinished
    final = tmp_path / "copy"
    copy_output(output, final)
    shutil.copy(output / SHARDS / "c.3.0", final / SHARDS)
    (final / record_name(3)).write_bytes(record)
    with pytest.raises(StoreError, match="is no mere copy"):
        copy_output(output, final)


def test_a_merge_meanwhile_is_an_error_and_the_next_copy_is_right(output, bucket, monkeypatch):
    def merging(source, *args):
        if source.name == "run_config.json":
            assert main(["merge", str(output)]) == 0
            group = output / "projections.zarr/zarr.json"
            group.write_text(group.read_text() + " ")  # as of a merge of more units
        return copy_file(source, *args)

    monkeypatch.setattr(module, "copy_file", merging)
    with pytest.raises(StoreError, match="was merged while it was copied"):
        copy_output(output, bucket)
    monkeypatch.undo()
    copy_output(output, bucket)
    assert verify(bucket).exit_code == 0


def test_the_command_says_what_it_did(output, tmp_path, capsys):
    for line in ("5 units and", "there already 5 units"):
        assert main(["copy", str(output), str(tmp_path / "x")]) == 0
        assert line in capsys.readouterr().out
    assert main(["copy", str(output), str(output / "x")]) == 2
    assert capsys.readouterr().err.count("gradproj: ") == 1
