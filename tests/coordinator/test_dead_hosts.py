"""Dead hosts: their heartbeats, and the notice about units that are waited for."""

import itertools
from types import SimpleNamespace

import pytest
from helpers.faults import IDENTITY, fake_owner, make_store

from gradproj.coordinator import heartbeats as heartbeats_module
from gradproj.coordinator import units as units_module
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress, read_heartbeats
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import UnitQueue


@pytest.fixture
def queue_of(tmp_path):
    """``(owner, units, **options) -> UnitQueue`` on one store."""
    layout = make_store(tmp_path, n_samples=64)

    def make(owner, units, **options):
        return UnitQueue(tmp_path, layout, IDENTITY, units, owner, **options)

    return make


@pytest.fixture
def now(monkeypatch):
    """The observer's clock, which advances only when it is set."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(heartbeats_module, "time", clock)
    monkeypatch.setattr(units_module, "time", clock)
    return now


def test_heartbeat_is_deleted_when_its_owners_claim_is_taken_over(tmp_path, queue_of, monkeypatch):
    old, mine = queue_of(fake_owner(1), [0]), queue_of(Owner.this_process("job", 0, 0), [0])
    with Heartbeat(tmp_path / "heartbeats", mine.owner, RankProgress()):
        left = Heartbeat(tmp_path / "heartbeats", old.owner, RankProgress(batches=3))
        left.write()
        assert next(old.take()) == 0
        monkeypatch.setattr(heartbeats_module, "STALE_AFTER_S", 0.0)
        monkeypatch.setattr(heartbeats_module, "CONFIRM_AFTER_S", 0.0)
        assert next(mine.take()) == 0
        assert [owner for owner, _ in read_heartbeats(tmp_path / "heartbeats")] == [mine.owner]
        left.write()  # its process had only hung
        assert len(read_heartbeats(tmp_path / "heartbeats")) == 2


def test_deleted_heartbeat_is_no_sign_of_life(queue_of, now):
    far, beats = queue_of(fake_owner(1), [0]), {}
    assert next(far.take()) == 0
    mine = queue_of(Owner.this_process("job", 0, 0), [0]).claims
    mine.heartbeat_of = lambda owner: beats.get(owner.name)
    beats[far.owner.name] = 7
    claim = mine.read("00000000", 0)
    assert not mine.is_stale(claim)
    now[0] = heartbeats_module.STALE_AFTER_S - 1
    beats.clear()  # deleted by a process that took over another of its claims
    assert not mine.is_stale(claim)
    assert not mine.is_at_work(claim)
    now[0] += 2
    assert not mine.is_stale(claim)
    now[0] += heartbeats_module.CONFIRM_AFTER_S
    assert mine.is_stale(claim)
    beats[far.owner.name] = 8  # it runs after all
    assert not mine.is_stale(claim)
    assert mine.is_at_work(claim)


@pytest.mark.parametrize("rank", [0, 1])
def test_hosts_waited_for_are_named_once_by_rank_0(rank, queue_of, now, capsys):
    dead, working = queue_of(fake_owner(1), [0, 1]), queue_of(fake_owner(2), [2])
    here = queue_of(Owner.this_process("job", 0, 1), [3])
    assert len(list(itertools.islice(dead.take(), 2))) == 2
    assert (next(working.take()), next(here.take())) == (2, 3)

    def stopping():
        now[0] += 1.0
        if now[0] == 20:  # a claim first seen later than the other
            dead.claims.release("00000001")
            assert dead.claims.try_claim("00000001")
        return now[0] > 100

    mine = queue_of(Owner.this_process("another", 0, rank), [0, 1, 2, 3], stopping=stopping)
    mine.claims.heartbeat_of = lambda owner: now[0] if owner == working.owner else 5
    assert list(mine.take()) == []
    line = "waiting for 2 units of host1, taken over after 11 minutes without a sign of life\n"
    assert capsys.readouterr().err == (line if rank == 0 else "")
