"""Hosts that hang and wake up, on one store: every id once, every shard matches its record."""

import dataclasses
import errno
import os
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.faults import (
    IDENTITY,
    at_change,
    before_each_change,
    dead_owner,
    fake_owner,
    fake_rows,
    inconsistent_units,
    make_store,
)

from gradproj.coordinator import fault_points, file_commits
from gradproj.coordinator import heartbeats as heartbeats_module
from gradproj.coordinator import units as units_module
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress
from gradproj.coordinator.merge import finish, is_complete, is_merged
from gradproj.coordinator.units import UnitQueue
from gradproj.files import file_sum
from gradproj.store import ProjectionStore
from gradproj.store.unit_record import list_records, read_record, record_name


def one_unit(tmp_path, number=0):
    """Make a store of one unit, and a process that has claimed it."""
    layout = make_store(tmp_path / "out", n_samples=4, rows_per_shard=16)
    queue = UnitQueue(tmp_path / "out", layout, IDENTITY, [0], fake_owner(number))
    assert next(queue.take()) == 0
    return layout, queue


def count_changes(tmp_path):
    """Return the number of file system changes of a commit."""
    layout, queue = one_unit(tmp_path)
    with at_change(-1, lambda: None) as counter:
        assert queue.commit(fake_rows(layout, 0))
    return next(counter)


def commit_in_a_thread(output, layout, pause_before):
    """Take the unit over in a thread that pauses before its change of that number."""
    reached, go_on = threading.Event(), threading.Event()

    def work():
        queue = UnitQueue(output, layout, IDENTITY, [0], fake_owner(1))
        with at_change(pause_before, lambda: (reached.set(), go_on.wait(120))):
            for unit in queue.take():
                queue.commit(fake_rows(layout, unit, writer=1))
        reached.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(120)
    return thread, go_on


@pytest.mark.usefixtures("no_stale_wait", "no_fsync")
def test_owner_that_wakes_up_in_its_commit_never_replaces_the_shard_of_anothers_record(tmp_path):
    n_changes = count_changes(tmp_path / "count")
    writers = set()
    for paused_at in range(n_changes):
        # 1000: the other commits before the first wakes up. Else the first runs to its end while
        # the other is in the middle of its commit.
        for other_paused_at in (1000, 6, 14, 22):
            layout, queue = one_unit(tmp_path / f"{paused_at}-{other_paused_at}")
            other = []
            with at_change(
                paused_at,
                lambda: other.append(commit_in_a_thread(queue.output, layout, other_paused_at)),  # noqa: B023
            ):
                queue.commit(fake_rows(layout, 0))
            thread, go_on = other[0]
            go_on.set()
            thread.join()
            queue.release()
            assert inconsistent_units(queue.output, layout) == []
            assert list_records(queue.output / "units").tolist() == [0]
            writers.add(int(read_record(queue.output / record_name(0)).columns["loss"][0]))
    assert writers == {0, 1}


@pytest.mark.usefixtures("no_stale_wait")
def test_fenced_owner_continues_with_its_other_units(tmp_path):
    layout = make_store(tmp_path, n_samples=32)
    old = UnitQueue(tmp_path, layout, IDENTITY, [0, 1], fake_owner(0))
    units = old.take()
    lost, kept = next(units), next(units)
    new = UnitQueue(tmp_path, layout, IDENTITY, [lost], fake_owner(1))
    assert next(new.take()) == lost
    assert not old.commits.scratch.exists()
    assert not old.commit(fake_rows(layout, lost))
    assert old.commit(fake_rows(layout, kept))
    assert new.commit(fake_rows(layout, lost, writer=1))
    assert inconsistent_units(tmp_path, layout) == []


@pytest.mark.usefixtures("no_stale_wait")
def test_owner_before_a_dead_successor_is_fenced_too(tmp_path, monkeypatch):
    layout, first = one_unit(tmp_path)
    out = tmp_path / "out"
    second = UnitQueue(out, layout, IDENTITY, [0], dead_owner())
    with monkeypatch.context() as patch:
        patch.setattr(
            ClaimBoard, "_fence_older", lambda *claim: None
        )  # it dies between claim and fence
        assert next(second.take()) == 0
    assert first.commits.scratch.exists()
    third = UnitQueue(out, layout, IDENTITY, [0], dataclasses.replace(fake_owner(2)))
    assert next(third.take()) == 0
    assert not first.commits.scratch.exists()


@pytest.mark.usefixtures("no_stale_wait")
def test_owner_that_released_a_unit_is_not_fenced(tmp_path):
    layout, first = one_unit(tmp_path)
    first.claims.release("00000000")
    second = UnitQueue(first.output, layout, IDENTITY, [0], fake_owner(1))
    assert next(second.take()) == 0
    assert first.commits.scratch.exists()
    third = UnitQueue(first.output, layout, IDENTITY, [0], fake_owner(2))
    assert next(third.take()) == 0
    assert first.commits.scratch.exists()
    assert not second.commits.scratch.exists()


@pytest.mark.usefixtures("no_stale_wait")
def test_claimant_that_failed_to_fence_does_not_release_the_unit(tmp_path, monkeypatch):
    layout, first = one_unit(tmp_path)
    second = UnitQueue(first.output, layout, IDENTITY, [0], fake_owner(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse_by(errno.ESTALE))
        with pytest.raises(OSError, match="Stale file handle"):
            next(second.take())
    second.release()
    third = UnitQueue(first.output, layout, IDENTITY, [0], fake_owner(2))
    assert next(third.take()) == 0
    assert not first.commits.scratch.exists()


def refuse_by(code):
    def refuse(*names):
        raise OSError(code, os.strerror(code))

    return refuse


def test_process_that_hung_itself_gives_others_time_before_taking_over(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(heartbeats_module.time, "monotonic", lambda: now[0])
    layout, _ = one_unit(tmp_path)
    beats = [5]
    mine = UnitQueue(tmp_path / "out", layout, IDENTITY, [0], fake_owner(1)).claims
    mine.heartbeat_of = lambda other: beats[0]
    assert not mine.try_claim("00000000")
    now[0] += 3600  # a file system that hung: no process could write a heartbeat
    assert not mine.try_claim("00000000")
    beats[0], now[0] = 6, now[0] + 5
    assert not mine.try_claim("00000000")
    now[0] += heartbeats_module.STALE_AFTER_S - 1
    assert not mine.try_claim("00000000")


# --- eight of them ---

N_HOSTS, N_UNITS = 8, 32


class Host:
    """A simulated machine with its own clock and heartbeat, which hangs now and then."""

    def __init__(self, number, output, layout, seed):
        self.number, self.output, self.layout = number, output, layout
        self.owner, self.random = fake_owner(number), random.Random(f"{seed} {number}")
        self.clock_start, self.clock_speed = (
            self.random.uniform(-1e6, 1e6),
            self.random.uniform(0.9, 1.1),
        )
        self.heartbeat = Heartbeat(output / "heartbeats", self.owner, RankProgress())
        self.asleep_until = 0.0
        self.error = None

    def monotonic(self):
        return self.clock_start + self.clock_speed * time.perf_counter()

    def maybe_freeze(self, chance=0.04):
        if self.random.random() < chance:
            self.asleep_until = time.perf_counter() + self.random.uniform(0.4, 1.0)
            time.sleep(max(0.0, self.asleep_until - time.perf_counter()))

    def beat(self):
        if time.perf_counter() >= self.asleep_until:
            self.heartbeat.progress.batches += 1
            self.heartbeat.write()

    def work(self):
        try:
            queue = UnitQueue(self.output, self.layout, IDENTITY, range(N_UNITS), self.owner)
            for unit in queue.take():
                self.maybe_freeze(0.4)
                queue.commit(fake_rows(self.layout, unit, writer=self.number))
            finish(self.output, queue.claims, wait=True)
            queue.release()
        except BaseException as error:
            self.error = error


@pytest.fixture
def here(monkeypatch):
    """Give each host a clock of its own, and shorten the times until a claim is stale."""
    here = threading.local()

    def clock():
        return here.host.monotonic() if hasattr(here, "host") else time.perf_counter()

    for module in (heartbeats_module, units_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    for name, seconds in (("STALE_AFTER_S", 0.15), ("CONFIRM_AFTER_S", 0.05)):
        monkeypatch.setattr(heartbeats_module, name, seconds)
    pace = dataclasses.replace(file_commits.ON_DISK, wait_s=(0.02, 0.1), moving_for_s=0.1)
    monkeypatch.setattr(file_commits, "ON_DISK", pace)
    return here


def run_hosts(output, seed, here):
    """Fill a store by eight hosts, each hanging now and then before a file system change."""
    layout = make_store(output, n_samples=8 * N_UNITS - 3, rows_per_shard=8)
    hosts = [Host(number, output, layout, seed) for number in range(N_HOSTS)]
    outcome = SimpleNamespace(hosts=hosts, layout=layout, output=output, seen={}, changed=[])
    ended = threading.Event()

    def run(host):
        here.host = host
        host.work()

    def freeze(name, args):
        if hasattr(here, "host") and name != "fsync":
            here.host.maybe_freeze()

    watcher = threading.Thread(target=watch, args=(outcome, ended))
    threads = [threading.Thread(target=run, args=(host,)) for host in hosts]
    with before_each_change(freeze):
        for thread in (watcher, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()
        watcher.join()
    return outcome


def watch(outcome, ended):
    """Write heartbeats of hosts that are awake; note published files that change."""
    while not ended.wait(0.03):
        for host in outcome.hosts:
            host.beat()
        for unit in list_records(outcome.output / "units").tolist():
            shard = file_sum(outcome.output / outcome.layout.shard_name(unit))
            if outcome.seen.setdefault(unit, shard) != shard:
                outcome.changed.append(unit)


def test_eight_hosts_that_hang_and_wake_up_commit_every_id_once(tmp_path, here, monkeypatch):
    fenced = []
    monkeypatch.setattr(
        fault_points,
        "reach",
        lambda step: fenced.append(step) if step == "old owner fenced" else None,
    )
    for seed in range(5):
        outcome = run_hosts(tmp_path / str(seed), seed, here)
        assert [host.error for host in outcome.hosts] == [None] * N_HOSTS
        assert_sound(outcome)
        if len(fenced) > 5:
            return
    pytest.fail(f"{len(fenced)} takeovers in five runs: the test shows nothing")


def assert_sound(outcome):
    """Check that every unit is committed once, with rows and columns of one host."""
    output, layout = outcome.output, outcome.layout
    assert outcome.changed == []
    assert inconsistent_units(output, layout) == []
    assert list_records(output / "units").tolist() == list(range(N_UNITS))
    assert is_complete(output)
    assert is_merged(output)
    with ProjectionStore(output) as store:
        hosts = store.column("loss").astype(int)
        for unit in range(N_UNITS):
            start, stop = layout.unit_range(unit)
            want = fake_rows(layout, unit, hosts[start])
            scale = want.record.columns["row_scale"][:, None]
            np.testing.assert_array_equal(
                store.rows(range(start, stop)), want.stored.astype(np.float32) * scale
            )
    assert not [path for path in (output / "claims").iterdir() if not path.name.startswith("merge")]
