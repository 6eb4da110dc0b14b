"""Claims, commits, merges and repairs on disk and in a bucket: the same tests for both."""

import dataclasses
import json
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from helpers.buckets import memory_path
from helpers.faults import (
    IDENTITY,
    fake_owner,
    fake_rows,
    fill,
    inconsistent_units,
    make_store,
    partial_rows,
)
from obstore.store import MemoryStore

from gradproj.coordinator import partial_rows as partial_rows_module
from gradproj.coordinator.cleanup import remove_leftovers
from gradproj.coordinator.failure import clear_failure, note_failure
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress, heartbeat_counter
from gradproj.coordinator.merge import is_merged
from gradproj.coordinator.object_commits import ObjectCommits
from gradproj.coordinator.store_guard import StoreReplaced
from gradproj.coordinator.units import UnitQueue, unit_claim
from gradproj.coordinator.unmerge import check_records_have_shards, unmerge_missing_units
from gradproj.errors import StoreError
from gradproj.maintenance.merge import MergeLock
from gradproj.maintenance.repair import repair
from gradproj.maintenance.verify import verify
from gradproj.storage import object_path
from gradproj.storage.address import Address
from gradproj.storage.folders import delete_tree
from gradproj.storage.object_path import READING, ObjectPath
from gradproj.storage.publish import replace
from gradproj.store import ProjectionStore
from gradproj.store.layout import STATUS, StoreConfig, plan_layout
from gradproj.store.unit_record import given_up_mark, list_records, read_record, record_name


@pytest.fixture(params=["disk", "bucket"])
def output(request, tmp_path, no_fsync, monkeypatch):
    if request.param == "disk":
        return tmp_path / "out"
    path = ObjectPath(MemoryStore(), Address("s3", "memory")) / "out"
    monkeypatch.setattr(object_path, "open_bucket", lambda address: (path.store, address.key))
    return path


@pytest.fixture
def layout(output):
    return make_store(output)


def queue_of(output, layout, number, **options):
    owner = fake_owner(number)
    return UnitQueue(output, layout, IDENTITY, range(layout.n_units), owner, **options)


def damage_in(output):
    """Return damage but that of files which only a real job writes."""
    return [damage for damage in verify(output).damage if damage.kind != "other"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def copied_to(path):
    """Return what copies an object to a file and opens that, as ``FileCache.open`` does."""

    def open_copy(place, facts):
        path.write_bytes(place.read_bytes())
        return path.open("rb")

    return open_copy


class TestCommits:
    def test_one_process_fills_a_store(self, output, layout):
        assert fill(output, layout, fake_owner(0))
        assert inconsistent_units(output, layout) == []
        assert names(output / "claims") == []
        assert damage_in(output) == []
        with ProjectionStore(output) as store:
            assert store.missing_ranges() == []

    def test_a_unit_is_committed_once(self, output, layout):
        first, second = (queue_of(output, layout, number) for number in (0, 1))
        assert first.claims.try_claim(unit_claim(1))
        assert not second.claims.try_claim(unit_claim(1))
        assert first.commit(fake_rows(layout, 1, 0))
        before = (output / record_name(1)).read_bytes()
        assert not second.commit(fake_rows(layout, 1, 1))
        assert not first.commit(fake_rows(layout, 1, 0))
        assert (output / record_name(1)).read_bytes() == before
        assert inconsistent_units(output, layout) == []

    def test_an_owner_that_lost_its_claim_does_no_harm(self, output, layout, no_stale_wait):
        old, new = (queue_of(output, layout, number) for number in (0, 1))
        assert old.claims.try_claim(unit_claim(2))
        assert new.claims.try_claim(unit_claim(2))
        assert not old.claims.owns(unit_claim(2))
        assert not old.commit(fake_rows(layout, 2, 0))
        assert new.commit(fake_rows(layout, 2, 1))
        assert read_record(output / record_name(2)).columns["loss"][0] == 1
        assert inconsistent_units(output, layout) == []

    def test_released_claims_are_free(self, output, layout):
        first, second = (queue_of(output, layout, number) for number in (0, 1))
        assert first.claims.try_claim(unit_claim(0))
        first.release()
        assert second.claims.try_claim(unit_claim(0))

    def test_saved_rows_come_back_until_the_commit(self, output, layout):
        first, second = (queue_of(output, layout, number) for number in (0, 1))
        assert first.claims.try_claim(unit_claim(0))
        for number in range(2):
            first.partial_log(0, "key").append(number, number + 1, partial_rows(number))
        done, parts = second.partial_log(0, "key").read()
        assert done == 2
        assert [last for last, _ in parts] == [1, 2]
        assert second.partial_log(0, "other").read() == (0, [])
        assert first.commit(fake_rows(layout, 0))
        assert second.partial_log(0, "key").read() == (0, [])

    def test_a_store_is_created_once(self, output, layout):
        before = (output / "projections.zarr" / "zarr.json").read_bytes()
        with pytest.raises(StoreError, match="exists already"):
            make_store(output)
        assert (output / "projections.zarr" / "zarr.json").read_bytes() == before

    def test_a_replaced_store_is_noticed(self, output, layout):
        queue = queue_of(output, layout, 0)
        assert queue.claims.try_claim(unit_claim(0))
        delete_tree(output)
        make_store(output)
        with pytest.raises(StoreReplaced, match="new store with the same settings"):
            queue.commit(fake_rows(layout, 0))
        assert len(list_records(output / "units")) == 0

    def test_a_deleted_record_makes_its_unit_a_missing_one(self, output, layout):
        fill(output, layout, fake_owner(0))
        (output / record_name(1)).unlink()
        unmerge_missing_units(output, queue_of(output, layout, 1).claims)
        assert not is_merged(output)
        with ProjectionStore(output) as store:
            assert store.missing_ranges() == [(16, 32)]
        assert fill(output, layout, fake_owner(2))
        assert damage_in(output) == []

    @pytest.mark.parametrize("what", ["shard", "record"])
    def test_a_damaged_unit_is_repaired(self, output, layout, what):
        fill(output, layout, fake_owner(0))
        path = output / (layout.shard_name(1) if what == "shard" else record_name(1))
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        replace(path, [bytes(content)])
        verification = verify(output)
        assert verification.damaged_units == {1}
        assert repair(verification).units == [1]
        assert list_records(output / "units").tolist() == [0, 2]
        assert fill(output, layout, fake_owner(1), writer=1)
        assert damage_in(output) == []
        assert inconsistent_units(output, layout) == []

    def test_a_lost_shard_is_named(self, output, layout):
        fill(output, layout, fake_owner(0))
        (output / layout.shard_name(1)).unlink()
        with pytest.raises(StoreError, match="1 committed unit without a shard"):
            check_records_have_shards(output)
        assert repair(verify(output)).units == [1]
        assert fill(output, layout, fake_owner(1))

    def test_a_shard_without_its_record_does_not_stop_a_job(self, output, layout):
        """A record was deleted by hand, and another device's rows differ from the shard left."""
        fill(output, layout, fake_owner(0))
        (output / record_name(1)).unlink()
        repair(verify(output))
        assert fill(output, layout, fake_owner(1), writer=1)
        assert damage_in(output) == []
        assert inconsistent_units(output, layout) == []

    def test_a_start_gives_up_shards_of_no_unit(self, output, layout):
        fill(output, layout, fake_owner(0))
        (output / record_name(1)).unlink()
        queue = queue_of(output, layout, 1)
        in_bucket = isinstance(output, ObjectPath)  # on disk such a shard is replaced
        if in_bucket:  # as an earlier version has named it
            replace(output / "prepared" / "00000001.100-12345678", [b"not for this one"])
        assert queue.give_up_orphans() == ([1] if in_bucket else [])
        assert queue.give_up_orphans() == []
        assert list_records(output / "units").tolist() == [0, 2]
        unmerge_missing_units(output, queue.claims)
        with ProjectionStore(output) as store:
            assert store.missing_ranges() == [(16, 32)]
            assert np.isnan(store.rows(range(16, 32), missing="nan")).all()
        if in_bucket:  # to plain zarr too
            store = zarr.storage.ObjectStore(output.store, read_only=True)
            group = zarr.open_group(store, path="out/projections.zarr", mode="r")
            assert np.isnan(group["projections"][16:32]).all()
        assert fill(output, layout, fake_owner(2), writer=1)
        assert damage_in(output) == []

    @pytest.mark.parametrize("output", ["disk"], indirect=True)
    def test_a_mark_that_another_program_copied_to_a_disk_is_named(self, output, layout):
        replace(output / record_name(1), [given_up_mark("0" * 16)])
        with pytest.raises(StoreError, match="mark of a unit that was given up in a bucket"):
            fill(output, layout, fake_owner(0))
        assert repair(verify(output)).units == [1]
        assert fill(output, layout, fake_owner(1))
        assert damage_in(output) == []

    @pytest.mark.parametrize("output", ["bucket"], indirect=True)  # on disk: a torn record, named
    @pytest.mark.parametrize("content", [b"", b"version https://git-lfs"], ids=["empty", "text"])
    def test_what_is_too_small_for_a_record_does_not_stop_a_job(self, output, layout, content):
        """Somebody has written an object in place of a record."""
        replace(output / record_name(1), [content])
        queue = queue_of(output, layout, 1)
        assert queue.give_up_orphans() == [1]
        assert queue.claims.try_claim(unit_claim(1))
        assert queue.commit(fake_rows(layout, 1))
        assert list_records(output / "units").tolist() == [1]

    @pytest.mark.parametrize("cached", [False, True])
    def test_a_reader_that_knows_nothing_of_a_repair_is_told(
        self, output, layout, cached, tmp_path, monkeypatch
    ):
        if cached:  # FileCache would ask a real bucket
            monkeypatch.setattr(READING, "cache", SimpleNamespace(open=copied_to(tmp_path / "f")))
        fill(output, layout, fake_owner(0))
        with ProjectionStore(output) as store:
            store.column("status")
            commits = queue_of(output, layout, 1).commits
            commits.give_up([1], layout)
            commits.clean_up(1, layout)
            with pytest.raises(StoreError, match=r"recorded as ok but their shard .* is gone"):
                store.rows([16])

    def test_a_repaired_unit_may_turn_out_to_have_no_rows(self, output, layout):
        fill(output, layout, fake_owner(0))
        replace(output / layout.shard_name(1), [b"damaged"])
        repair(verify(output))
        assert verify(output).shards_without_record == []
        queue, rows = queue_of(output, layout, 1), fake_rows(layout, 1)
        rows.record.columns["status"][:] = STATUS["out_of_memory"]
        assert queue.claims.try_claim(unit_claim(1))
        assert queue.commit(dataclasses.replace(rows, stored=None))
        assert damage_in(output) == []

    def test_rows_computed_after_a_killed_repair_are_not_read_with_old_columns(
        self, output, layout, monkeypatch, no_stale_wait
    ):
        fill(output, layout, fake_owner(0))
        replace(output / layout.shard_name(1), [b"damaged"])
        monkeypatch.setattr(MergeLock, "merge", lambda lock: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            repair(verify(output))
        running = queue_of(output, layout, 1)  # it began before the repair
        assert running.claims.try_claim(unit_claim(1))
        assert running.commit(fake_rows(layout, 1, writer=1))
        with ProjectionStore(output) as store:
            assert store.column("loss", 16, 32).tolist() == [1.0] * 16

    def test_rows_saved_for_a_unit_that_is_committed_meanwhile(self, output, layout, monkeypatch):
        log = queue_of(output, layout, 0).partial_log(0, "key")
        log.append(0, 1, partial_rows(0))
        listed = list(partial_rows_module.names_in(log.folder))
        delete_tree(log.folder)
        monkeypatch.setattr(partial_rows_module, "names_in", lambda folder: listed)
        assert log.read() == (0, [])

    def test_heartbeats_move(self, output, layout):
        progress, folder = RankProgress(batches=1), output / "heartbeats"
        with Heartbeat(folder, fake_owner(0), progress) as heartbeat:
            assert heartbeat_counter(folder, fake_owner(0)) == 1
            progress.batches = 7
            heartbeat.write()
            assert heartbeat_counter(folder, fake_owner(0)) == 7
        assert heartbeat_counter(folder, fake_owner(0)) is None

    def test_failures_are_noted_and_cleared(self, output, layout):
        note_failure(
            output, dataclasses.replace(fake_owner(0), job_id="slurm-7_1"), StoreError("x")
        )
        assert json.loads((output / "failed.json").read_text())["error"] == "x"
        assert names(output / "logs") == ["slurm-7_1.failed"]
        clear_failure(output, "slurm-7_1")
        assert not (output / "failed.json").exists()
        assert names(output / "logs") == []

    def test_leftovers_of_committed_units_are_deleted(self, output, layout):
        queue = queue_of(output, layout, 0)
        assert queue.claims.try_claim(unit_claim(0))
        assert queue.claims.try_claim(unit_claim(1))
        queue.commits.commit(fake_rows(layout, 0), layout, lambda: True, lambda: None)
        remove_leftovers(output, fake_owner(1))
        assert names(output / "claims") == ["00000001.0"]
        assert names(output / "partial") == []

    def test_rows_are_the_same_in_both_places(self, output, layout, tmp_path):
        fill(output, layout, fake_owner(0))
        make_store(tmp_path / "disk")
        fill(tmp_path / "disk", layout, fake_owner(0))
        for unit in range(layout.n_units):
            for name in (layout.shard_name(unit), record_name(unit)):
                assert (output / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()


class Counted:
    """A store that counts requests."""

    def __init__(self):
        self.store, self.requests = MemoryStore(), Counter()

    def __getattr__(self, name):
        self.requests[name.removesuffix("_with_delimiter")] += 1
        return getattr(self.store, name)


def test_requests_of_a_unit():
    """The figures of the README."""
    store = Counted()
    output = ObjectPath(store, Address("s3", "memory")) / "out"
    layout = make_store(output)
    queue = queue_of(output, layout, 0)
    units = queue.take()
    next(units)
    queue.commit(fake_rows(layout, next(units)))
    store.requests.clear()
    queue.commit(fake_rows(layout, next(units)))
    assert store.requests == {"put": 4, "list": 3, "get": 3, "head": 7, "delete": 2}


def test_a_commit_in_a_bucket_holds_the_unit_once_more():
    layout = plan_layout(4096, [1024], 12, StoreConfig(encoding="dense", rows_per_shard=4096))
    rows = fake_rows(layout, 0, 0)
    commits = ObjectCommits(memory_path("out"), fake_owner(0))
    tracemalloc.start()
    try:
        assert commits.commit(rows, layout, lambda: True, lambda: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.4 * rows.stored.nbytes
