"""Claims, the claim loop and commits, in one process."""

import dataclasses
import errno
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.faults import dead_owner, fill, inconsistent_units, make_store

from gradproj.coordinator import file_commits
from gradproj.coordinator import heartbeats as heartbeats_module
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.file_commits import FileCommits
from gradproj.coordinator.merge import ranges_of, wanted_units
from gradproj.coordinator.process_id import Owner, process_start
from gradproj.coordinator.units import UnitQueue, UnitRows, unit_claim
from gradproj.files import file_sum
from gradproj.store.layout import STATUS, StoreConfig, empty_columns, plan_layout
from gradproj.store.unit_record import UnitRecord, read_record, record_name


def owner_like_me(**changes):
    return dataclasses.replace(Owner.this_process("job", 0, 0), **changes)


@pytest.fixture
def gone_process():
    """The pid and start time of a process that has ended."""
    gone = dead_owner()
    return {"pid": gone.pid, "pid_start": gone.pid_start}


def board(tmp_path, owner, beats=None):
    commits = FileCommits(tmp_path, owner)
    commits.begin()
    (tmp_path / "claims").mkdir(exist_ok=True)
    beats = {} if beats is None else beats
    return ClaimBoard(tmp_path / "claims", commits, lambda other: beats.get(other.name))


def test_only_one_of_two_claimants_gets_the_unit(tmp_path):
    first, second = (
        board(tmp_path, owner_like_me(rank=r, host=f"host{r}", boot_id=str(r))) for r in (0, 1)
    )
    assert first.try_claim("00000003")
    assert not second.try_claim("00000003")
    assert first.owns("00000003")
    assert not second.owns("00000003")


@pytest.fixture
def no_proc(monkeypatch):
    """Hide processes in /proc, as a mount with hidepid does."""
    read_text = Path.read_text
    hidden = lambda path: path.parts[:2] == ("/", "proc") and path.parts[2].isdigit()  # noqa: E731

    def read(path, *args, **options):
        if hidden(path):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)


def test_hidden_process_of_another_user_is_not_known_to_be_gone(no_proc, monkeypatch):
    owner = owner_like_me(pid=os.getppid(), pid_start=7)
    assert process_start(owner.pid) is None
    for error, gone in ((PermissionError, False), (ProcessLookupError, True)):

        def kill(pid, number, error=error):
            assert (pid, number) == (owner.pid, 0)
            raise error

        monkeypatch.setattr(os, "kill", kill)
        assert owner.is_gone(owner_like_me()) is gone
        assert not owner.is_alive(owner_like_me())


def test_impossible_pid_counts_as_dead():
    assert owner_like_me(pid=2**70).is_gone(owner_like_me())


def test_process_is_known_to_be_alive_only_on_its_own_machine(gone_process):
    assert owner_like_me().is_alive(owner_like_me(rank=3, job_id="another"))
    assert not owner_like_me(pid_start=7).is_alive(owner_like_me())
    assert not owner_like_me(**gone_process).is_alive(owner_like_me())
    for place in ("host", "machine", "boot_id", "pid_space"):
        assert not owner_like_me(**{place: "another"}).is_alive(owner_like_me())


def test_released_unit_can_be_claimed_again(tmp_path):
    first, second = (
        board(tmp_path, owner_like_me(rank=r, host=f"host{r}", boot_id=str(r))) for r in (0, 1)
    )
    for _ in range(3):
        assert first.try_claim("00000003")
        first.release_all()
        assert second.try_claim("00000003")
        second.release("00000003")


def test_claim_of_a_dead_process_on_this_host_is_taken_over_at_once(tmp_path, gone_process):
    dead = board(tmp_path, owner_like_me(job_id="other", **gone_process))
    assert dead.try_claim("00000003")
    mine = board(tmp_path, owner_like_me(rank=5))
    assert mine.try_claim("00000003")
    assert not dead.owns("00000003")


def test_reused_pid_is_another_process(tmp_path):
    old = board(tmp_path, owner_like_me(job_id="other", pid_start=1))
    assert old.try_claim("00000003")
    assert board(tmp_path, owner_like_me(rank=5)).try_claim("00000003")


def test_claim_of_an_earlier_generation_is_taken_over_at_once(tmp_path):
    away = {"host": "elsewhere", "boot_id": "other"}
    assert board(tmp_path, owner_like_me(generation=0, **away)).try_claim("00000003")
    assert board(tmp_path, owner_like_me(generation=1)).try_claim("00000003")
    assert not board(tmp_path, owner_like_me(generation=0)).try_claim("00000003")


def test_claims_from_before_a_reboot_are_taken_over_at_once(tmp_path):
    machine = {"machine": "a"}
    assert board(tmp_path, owner_like_me(job_id="other", boot_id="before", **machine)).try_claim(
        "00000003"
    )
    assert board(tmp_path, owner_like_me(**machine)).try_claim("00000003")


@pytest.mark.parametrize(
    "changes",
    [
        {"boot_id": "other", "machine": ""},
        {"boot_id": "other", "machine": "another"},
        {"pid_space": "another container"},
        {"pid_start": 0},
    ],
)
def test_processes_of_a_machine_of_the_same_name_are_not_known_to_be_gone(
    tmp_path, gone_process, changes
):
    mine = owner_like_me(machine="" if changes.get("machine") == "" else "mine")
    theirs = dataclasses.replace(mine, job_id="other", **gone_process)
    assert theirs.is_gone(mine)
    assert not dataclasses.replace(theirs, **changes).is_gone(mine)


def test_foreign_claim_is_stale_after_its_heartbeat_stood_still_by_the_observers_clock(
    tmp_path, monkeypatch
):
    now = [1000.0]
    monkeypatch.setattr(heartbeats_module.time, "monotonic", lambda: now[0])
    other = owner_like_me(job_id="other", host="elsewhere", boot_id="other")
    beats = {other.name: 1}
    assert board(tmp_path, other).try_claim("00000003")
    mine = board(tmp_path, owner_like_me(), beats)
    assert not mine.try_claim("00000003")
    now[0] += heartbeats_module.STALE_AFTER_S - 1
    assert not mine.try_claim("00000003")
    beats[other.name] = 2  # it moved: the wait starts again
    now[0] += 2
    assert not mine.try_claim("00000003")
    now[0] += heartbeats_module.STALE_AFTER_S - 1
    assert not mine.try_claim("00000003")
    now[0] += 1
    assert not mine.try_claim("00000003")  # suspected, and given time to show that it runs
    now[0] += heartbeats_module.CONFIRM_AFTER_S
    assert mine.try_claim("00000003")


def test_torn_claim_is_taken_over_after_the_same_wait(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(heartbeats_module.time, "monotonic", lambda: now[0])
    mine = board(tmp_path, owner_like_me())
    (tmp_path / "claims" / "00000003.0").write_text('{"job_')
    assert not mine.try_claim("00000003")
    now[0] += heartbeats_module.STALE_AFTER_S
    assert not mine.try_claim("00000003")
    now[0] += heartbeats_module.CONFIRM_AFTER_S
    assert mine.try_claim("00000003")


def test_owner_name_is_a_valid_file_name(tmp_path):
    name = owner_like_me(job_id="../../etc/passwd x").name
    assert os.path.basename(name) == name
    assert json.dumps(name)
    assert unit_claim(5) == "00000005"


# --- units ---

LAYOUT = plan_layout(40, [8, 8], 12, StoreConfig(encoding="dense", rows_per_shard=16))


def queue(tmp_path, owner, wanted=(0, 1, 2), **options):
    for folder in (
        "units",
        "claims",
        "heartbeats",
        "partial",
        "tmp",
        "projections.zarr/projections",
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    return UnitQueue(tmp_path, LAYOUT, "identity", wanted, owner, **options)


def unit_rows(unit, value=1.0):
    start, stop = LAYOUT.unit_range(unit)
    columns = empty_columns(stop - start, LAYOUT.key_bytes)
    columns["status"][:] = STATUS["ok"]
    stored = np.full((stop - start, LAYOUT.dim), value, LAYOUT.stored_dtype)
    return UnitRows(UnitRecord(unit, start, "identity", None, columns), stored)


def test_process_takes_every_unit_once_in_its_own_order(tmp_path):
    orders = []
    for rank in range(16):  # the orders are random
        q = queue(tmp_path / str(rank), owner_like_me(rank=rank), wanted=range(3))
        taken = []
        for unit in q.take():
            taken.append(unit)
            assert q.commit(unit_rows(unit))
        assert sorted(taken) == [0, 1, 2]
        orders.append(tuple(taken))
    assert len(set(orders)) > 1


def test_commit_leaves_matching_shard_and_record_and_no_claim(tmp_path):
    q = queue(tmp_path, owner_like_me())
    assert next(q.take()) in (0, 1, 2)
    unit = int(next(iter(q.claims.current())))
    assert q.commit(unit_rows(unit))
    record = read_record(tmp_path / record_name(unit))
    assert record.shard == file_sum(tmp_path / LAYOUT.shard_name(unit))
    assert not q.claims.current()
    assert [p.name for p in q.commits.scratch.iterdir()] == ["owner.json"]


def test_owner_whose_claim_was_taken_over_cannot_publish(tmp_path, gone_process):
    old = queue(tmp_path, owner_like_me(rank=1, **gone_process), wanted=[0])
    new = queue(tmp_path, owner_like_me(rank=2), wanted=[0])
    assert next(old.take()) == 0
    assert next(new.take()) == 0
    assert not old.commit(unit_rows(0, value=5.0))
    assert not (tmp_path / LAYOUT.shard_name(0)).exists()
    assert new.commit(unit_rows(0, value=2.0))
    before = (tmp_path / LAYOUT.shard_name(0)).read_bytes()
    assert not old.commit(unit_rows(0, value=5.0))
    assert (tmp_path / LAYOUT.shard_name(0)).read_bytes() == before
    assert read_record(tmp_path / record_name(0)).shard == file_sum(tmp_path / LAYOUT.shard_name(0))


def test_shard_without_a_record_is_replaced(tmp_path):
    q = queue(tmp_path, owner_like_me(), wanted=[0])
    (tmp_path / LAYOUT.shard_name(0)).write_bytes(b"left by an owner that died")
    assert next(q.take()) == 0
    assert q.commit(unit_rows(0))
    assert read_record(tmp_path / record_name(0)).shard == file_sum(tmp_path / LAYOUT.shard_name(0))


def test_unit_without_stored_rows_has_a_record_and_no_shard(tmp_path):
    q = queue(tmp_path, owner_like_me(), wanted=[0])
    assert next(q.take()) == 0
    assert q.commit(dataclasses.replace(unit_rows(0), stored=None))
    assert read_record(tmp_path / record_name(0)).shard is None
    assert not (tmp_path / LAYOUT.shard_name(0)).exists()


def test_stopping_process_takes_no_more_units_and_releases_its_claims(tmp_path):
    stop = []
    q = queue(tmp_path, owner_like_me(), stopping=lambda: bool(stop))
    units = q.take()
    unit = next(units)
    stop.append(True)
    assert list(units) == []
    q.release()
    assert not q.commits.scratch.exists()
    other = queue(tmp_path, owner_like_me(rank=1), wanted=[unit])
    assert next(other.take()) == unit


AWAY = {"job_id": "other", "host": "elsewhere", "boot_id": "other"}


def test_units_of_another_running_job_are_not_waited_for(tmp_path):
    assert next(queue(tmp_path, owner_like_me(**AWAY), wanted=[0]).take()) == 0
    mine, beats = queue(tmp_path, owner_like_me(), wanted=[0]), itertools.count()
    mine.claims.heartbeat_of = lambda other: next(beats)
    assert list(mine.take()) == []


def test_unit_of_a_silent_owner_is_waited_for_and_then_computed(tmp_path, monkeypatch):
    assert next(queue(tmp_path, owner_like_me(**AWAY), wanted=[0]).take()) == 0
    monkeypatch.setattr(heartbeats_module, "STALE_AFTER_S", 0.3)
    monkeypatch.setattr(heartbeats_module, "CONFIRM_AFTER_S", 0.3)
    mine, started = queue(tmp_path, owner_like_me(), wanted=[0]), time.monotonic()
    assert next(mine.take()) == 0
    assert time.monotonic() - started > 0.5
    assert mine.commit(unit_rows(0))


def test_stop_request_ends_a_pause(tmp_path, monkeypatch):
    pace = dataclasses.replace(file_commits.ON_DISK, wait_s=(60.0, 60.0))
    monkeypatch.setattr(file_commits, "ON_DISK", pace)
    assert next(queue(tmp_path, owner_like_me(**AWAY), wanted=[0]).take()) == 0
    started = time.monotonic()
    stopping = lambda: time.monotonic() - started > 0.5  # noqa: E731
    assert list(queue(tmp_path, owner_like_me(), wanted=[0], stopping=stopping).take()) == []
    assert time.monotonic() - started < 30


def test_commits_work_without_hard_links(tmp_path, monkeypatch):
    def no_links(*names, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    layout = make_store(tmp_path)
    (tmp_path / layout.shard_name(1)).write_bytes(b"left by an owner that died")
    assert fill(tmp_path, layout, owner_like_me())
    assert inconsistent_units(tmp_path, layout) == []
    assert list((tmp_path / "claims").iterdir()) == []


@pytest.mark.parametrize("units", [[], [0], [3, 4, 5], [0, 1, 5, 7, 8]])
def test_ranges_round_trip_units(units):
    attributes = {"wanted_units": ranges_of(np.array(units, dtype=np.int64))}
    assert wanted_units(attributes).tolist() == units
