"""What ``status`` knows of other hosts' processes: what they wrote, and what is seen of it while it is watched."""

import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from outputs import (
    owner_of,
    uncommit,
    write_claim,
    write_heartbeat,
)

from gradproj.coordinator.heartbeats import Progress
from gradproj.status import read_status, status_lines


@pytest.fixture
def far(output, process):
    """A claim and a heartbeat from another host."""
    uncommit(output, 1)
    owner = replace(owner_of(process, rank=3), host="far", boot_id="other")
    write_claim(output, "00000001.0", owner)
    beat = write_heartbeat(
        output, owner, Progress(n_tokens=80, unit=1, unit_samples=8, batches=1, seconds=2.0)
    )
    return SimpleNamespace(output=output, owner=owner, beat=beat)


def process_of_unit_1(status):
    (claimed,) = status.claimed
    return claimed.process


def test_of_a_process_on_another_host_only_what_it_wrote_is_said(far):
    status = read_status(far.output)
    assert process_of_unit_1(status) == "unknown"
    assert (status.speed.n_ranks, status.speed.n_unknown) == (1, 1)
    text = "\n".join(status_lines(status))
    assert "by rank 3 on far" in text
    assert "whether it lives is not known here (--watch 15 shows it)" in text
    assert "by 1 rank, 1 of them by their last word" in text


@pytest.mark.parametrize(
    "counted", [True, False], ids=["its counter moves", "only its file is written again"]
)
def test_a_heartbeat_that_is_seen_to_move_is_of_a_living_process(far, counted):
    def beat():
        later = Progress(n_tokens=90, unit=1, unit_samples=9, batches=1 + counted, seconds=2.5)
        write_heartbeat(far.output, far.owner, later)

    timer = threading.Timer(0.1, beat)
    timer.start()
    status = read_status(far.output, watch_s=0.3)
    timer.join()
    assert process_of_unit_1(status) == "alive"
    assert (status.claimed[0].n_done, status.speed.n_unknown) == (9, 0)


def test_a_heartbeat_that_stands_still_is_stale_only_after_the_time_of_the_rule(far, monkeypatch):
    assert process_of_unit_1(read_status(far.output, watch_s=0.1)) == "unknown"
    monkeypatch.setattr("gradproj.coordinator.activity.STALE_AFTER_S", 0.1)
    status = read_status(far.output, watch_s=0.1)
    assert process_of_unit_1(status) == "stale"
    assert status.speed.n_ranks == 0
    text = "\n".join(status_lines(status))
    assert "stale         unit 1" in text
    assert "whose heartbeat stands still: the job takes the unit over" in text


def test_an_older_start_of_a_job_has_ended_wherever_it_ran(far, process):
    newer = replace(owner_of(process, rank=0), job_id=far.owner.job_id, generation=far.owner.generation + 1)
    write_heartbeat(far.output, newer, Progress())
    assert process_of_unit_1(read_status(far.output)) == "gone"


@pytest.mark.parametrize("hours", [-5, 5])
def test_clocks_that_differ_by_hours_change_nothing_but_the_time_shown(far, hours):
    before = read_status(far.output)
    for path in (far.beat, far.output / "claims" / "00000001.0"):
        moved = path.stat().st_mtime + 3600 * hours
        os.utime(path, (moved, moved))
    after = read_status(far.output)
    (then,), (now,) = before.claimed, after.claimed
    assert then.since != now.since
    assert replace(before, claimed=[replace(then, since="")]) == replace(
        after, claimed=[replace(now, since="")]
    )
