"""Files that dead processes left, and units whose files were deleted."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import zarr
from helpers.faults import IDENTITY, dead_owner, fake_owner, fake_rows, fill, make_store

from gradproj.coordinator import unmerge
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.cleanup import remove_leftovers
from gradproj.coordinator.fencing import OWNER_FILE, make_scratch
from gradproj.coordinator.file_commits import FileCommits
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress
from gradproj.coordinator.merge import finish, is_merged
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import UnitQueue
from gradproj.coordinator.unmerge import (
    check_records_have_shards,
    check_records_have_store,
    unmerge_missing_units,
)
from gradproj.errors import StoreError
from gradproj.store import ProjectionStore
from gradproj.store.unit_record import record_name


def here():
    """This process."""
    return Owner.this_process("job", 0, 0)


def test_files_of_dead_processes_are_removed_and_others_kept(tmp_path):
    layout = make_store(tmp_path)
    dead, away, mine = (
        UnitQueue(tmp_path, layout, IDENTITY, [0], owner)
        for owner in (dead_owner(), fake_owner(1), here())
    )
    for queue in (dead, away, mine):
        Heartbeat(tmp_path / "heartbeats", queue.owner, RankProgress()).write()
    assert remove_leftovers(tmp_path, mine.owner) == 1
    assert {path.name for path in (tmp_path / "tmp").iterdir()} == {
        away.owner.name,
        mine.owner.name,
    }
    assert {path.stem for path in (tmp_path / "heartbeats").iterdir()} == {
        away.owner.name,
        mine.owner.name,
    }


@pytest.mark.parametrize(
    ("lost", "named"),
    [([1], "1 committed unit without a shard in .*: 1"), ([0, 2], "2 committed units .*: 0, 2")],
)
def test_committed_units_without_shards_are_listed(tmp_path, lost, named):
    layout = make_store(tmp_path)
    assert fill(tmp_path, layout, here())
    check_records_have_shards(tmp_path)
    for unit in lost:
        (tmp_path / layout.shard_name(unit)).unlink()
    way_out = rf"Restore the files, or .*`python -m gradproj verify {tmp_path} --repair`"
    with pytest.raises(
        StoreError, match=rf"{named}\. {way_out}: this command then computes them again"
    ):
        check_records_have_shards(tmp_path)


def test_units_without_rows_shards_without_records_and_repaired_units_pass_the_check(
    tmp_path, monkeypatch
):
    layout = make_store(tmp_path)
    queue = UnitQueue(tmp_path, layout, IDENTITY, [0, 1], here())
    for unit in queue.take():
        assert queue.commit(dataclasses.replace(fake_rows(layout, unit), stored=None))
    (tmp_path / layout.shard_name(2)).write_bytes(b"of a process that died before its record")
    check_records_have_shards(tmp_path)
    (tmp_path / record_name(0)).unlink()
    monkeypatch.setattr(unmerge, "list_records", lambda folder: np.array([0, 1]))
    check_records_have_shards(tmp_path)


def test_outdated_directory_listing_is_read_again_after_touching_the_directory(
    tmp_path, monkeypatch
):
    layout = make_store(tmp_path)
    assert fill(tmp_path, layout, here())
    folder, when = tmp_path / "projections.zarr" / "projections", []

    def cached_listing(folder_listed):
        when.append(os.stat(folder).st_mtime_ns)
        return np.array([0] if when[0] == when[-1] else [0, 1, 2])

    os.utime(folder, (0, 0))
    monkeypatch.setattr(unmerge, "list_shards", cached_listing)
    check_records_have_shards(tmp_path)
    assert len(when) == 2


def test_records_without_their_store_are_refused(tmp_path):
    check_records_have_store(tmp_path / "nowhere")
    layout = make_store(tmp_path)
    check_records_have_store(tmp_path)
    assert fill(tmp_path, layout, here())
    check_records_have_store(tmp_path)
    shutil.rmtree(tmp_path / "projections.zarr")
    with pytest.raises(
        StoreError, match=r"records of 3 units but no projections\.zarr.*Restore that folder"
    ):
        check_records_have_store(tmp_path)


def test_torn_files_are_removed_whichever_process_wrote_them(tmp_path):
    make_store(tmp_path)
    owner = fake_owner(1)
    make_scratch(tmp_path / "tmp" / owner.name, owner)
    (tmp_path / "tmp" / owner.name / OWNER_FILE).unlink()
    (tmp_path / "tmp" / owner.name / "shard-3").write_bytes(b"torn")
    for ending in ("json", "tmp"):
        (tmp_path / "heartbeats" / f"{owner.name}.{ending}").write_text('{"owner": {"job')
    assert remove_leftovers(tmp_path, here()) == 0
    for folder in ("tmp", "heartbeats"):
        assert list((tmp_path / folder).iterdir()) == []


def test_start_removes_files_that_committed_units_no_longer_need(tmp_path):
    layout = make_store(tmp_path)
    assert fill(tmp_path, layout, here())
    for name in ("00000001.0", "00000001.3"):
        (tmp_path / "claims" / name).write_text(json.dumps(dataclasses.asdict(here())))
    (tmp_path / "partial" / "00000002").mkdir()
    (tmp_path / "tmp" / ".unfinished").mkdir()
    dead = dead_owner(rank=7)
    Heartbeat(tmp_path / "heartbeats", dead, RankProgress()).write()
    (tmp_path / "heartbeats" / f"{dead.name}.tmp").write_text("torn")
    assert remove_leftovers(tmp_path, here()) == 1
    for folder in ("claims", "partial", "tmp", "heartbeats"):
        assert list((tmp_path / folder).iterdir()) == []


def test_completed_store_keeps_heartbeats_of_live_processes_only(tmp_path):
    layout = make_store(tmp_path)
    dead, living = (
        Heartbeat(tmp_path / "heartbeats", fake_owner(n), RankProgress()) for n in (1, 2)
    )
    dead.write()
    with living, Heartbeat(tmp_path / "heartbeats", here(), RankProgress()):
        assert fill(tmp_path, layout, here())
        left = {path.stem for path in (tmp_path / "heartbeats").glob("*.json")}
        assert here().name in left
        assert dead.owner.name not in left
        living.write()
        assert {path.stem for path in (tmp_path / "heartbeats").glob("*.json")} == {
            here().name,
            living.owner.name,
        }
    assert list((tmp_path / "heartbeats").iterdir()) == []


def test_unit_with_deleted_record_is_computed_and_merged_again(tmp_path):
    layout = make_store(tmp_path)
    assert fill(tmp_path, layout, here())
    before = {path: path.read_bytes() for path in (tmp_path / "projections.zarr").rglob("c.*")}
    (tmp_path / record_name(1)).unlink()
    (tmp_path / layout.shard_name(1)).write_bytes(b"damaged")
    queue = UnitQueue(tmp_path, layout, IDENTITY, [0, 1, 2], here())
    assert not finish(tmp_path, queue.claims, wait=True)
    unmerge_missing_units(tmp_path, queue.claims)
    assert not is_merged(tmp_path)
    assert json.loads((tmp_path / "metadata.json").read_text())["complete"] is False
    with ProjectionStore(tmp_path) as store:
        assert store.missing_ranges() == [(16, 32)]
    assert (
        zarr.open_group(tmp_path / "projections.zarr", mode="r")["status"][16:32].tolist()
        == [0] * 16
    )
    assert fill(tmp_path, layout, here())
    assert {path: path.read_bytes() for path in before} == before
    assert is_merged(tmp_path)


def test_unmerge_writes_nothing_when_no_record_is_missing(tmp_path):
    layout = make_store(tmp_path)
    assert fill(tmp_path, layout, here())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    unmerge_missing_units(
        tmp_path, ClaimBoard(tmp_path / "claims", FileCommits(tmp_path, here()), lambda o: 0)
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
