"""State of other hosts' processes in ``status``, with and without watching heartbeats."""

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.outputs import owner_of, uncommit, unmerge, write_claim, write_heartbeat

from gradproj.cli.status import status_lines
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.maintenance.status import read_status


@pytest.fixture
def far(output, process):
    """A claim and a heartbeat of another host."""
    uncommit(output, 1)
    owner = replace(owner_of(process, rank=3), host="far", boot_id="other")
    write_claim(output, "00000001.0", owner)
    beat = write_heartbeat(
        output, owner, RankProgress(n_tokens=80, unit=1, unit_samples=8, batches=1, seconds=2.0)
    )
    return SimpleNamespace(output=output, owner=owner, beat=beat)


def process_of_unit_1(status):
    (claimed,) = status.claimed
    return claimed.process


def test_remote_process_is_unknown_without_watching(far):
    status = read_status(far.output)
    assert process_of_unit_1(status) == "unknown"
    assert (status.speed.n_ranks, status.speed.n_unknown) == (1, 1)
    text = "\n".join(status_lines(status))
    assert "by rank 3 on far" in text
    assert "this host cannot tell whether it is alive (--watch_s 15 shows it)" in text
    assert "by 1 rank, 1 of them by their last report" in text


@pytest.fixture
def while_watching(monkeypatch):
    """``while_watching(action)``: act between the two looks at the heartbeats."""
    sleep = time.sleep

    def set_action(action):
        where = "gradproj.maintenance.liveness.time.sleep"
        monkeypatch.setattr(where, lambda seconds: (action(), sleep(seconds)))

    return set_action


@pytest.mark.parametrize(
    "counted", [True, False], ids=["its counter moves", "only its file is written again"]
)
def test_moving_heartbeat_shows_a_live_process(far, counted, while_watching):
    def beat():
        later = RankProgress(n_tokens=90, unit=1, unit_samples=9, batches=1 + counted, seconds=2.5)
        write_heartbeat(far.output, far.owner, later)

    while_watching(beat)
    status = read_status(far.output, watch_s=0.01)
    assert process_of_unit_1(status) == "alive"
    assert (status.claimed[0].n_done, status.speed.n_unknown) == (9, 0)


def test_still_heartbeat_is_stale_only_after_stale_after_s(far, monkeypatch):
    assert process_of_unit_1(read_status(far.output, watch_s=0.1)) == "unknown"
    monkeypatch.setattr("gradproj.maintenance.liveness.STALE_AFTER_S", 0.1)
    status = read_status(far.output, watch_s=0.1)
    assert process_of_unit_1(status) == "stale"
    assert status.speed.n_ranks == 0
    text = "\n".join(status_lines(status))
    assert "stale         unit 1" in text
    assert "heartbeat stopped; will be reclaimed by the job" in text


@pytest.fixture
def short_watch(monkeypatch):
    """Make watching for 0.2 s count like 10 s."""
    monkeypatch.setattr("gradproj.maintenance.liveness.SILENT_BEATS", 0.04)


@pytest.mark.parametrize("has_heartbeat", [True, False])
@pytest.mark.usefixtures("short_watch")
def test_silent_process_is_not_counted_at_work(far, has_heartbeat):
    if not has_heartbeat:
        far.beat.unlink()
    status = read_status(far.output, watch_s=0.2)
    assert process_of_unit_1(status) == "silent"
    assert (status.speed.n_ranks, status.speed.samples_per_s, status.speed.left_s) == (0, 0, None)
    lines = status_lines(status)
    (shown,) = (line for line in lines if line.startswith("silent        unit 1: "))
    assert ("8 of 16 documents" in shown) == has_heartbeat
    assert shown.endswith("; no heartbeat in 0.2 s, reclaimed by the job after 11 min of silence")
    assert not any(line.startswith(("speed", "running")) or "--watch" in line for line in lines)
    assert lines[0] == "units         5: 4 committed, 1 claimed, 0 left"
    assert lines[-1] == "complete      no, 1 unit missing: 1; run the job's command again to resume"


@pytest.mark.usefixtures("short_watch")
def test_process_that_appears_while_watching_is_at_work(far, process, while_watching):
    comes = replace(owner_of(process, rank=4), host="farther", boot_id="other")

    def come():
        write_claim(far.output, "00000001.1", comes)
        write_heartbeat(far.output, comes, RankProgress(unit=1, batches=1, seconds=1.0))

    while_watching(come)
    status = read_status(far.output, watch_s=0.2)
    assert process_of_unit_1(status) == "alive"
    assert (status.speed.n_ranks, status.speed.n_unknown) == (1, 0)
    assert status_lines(status)[-1] == "complete      no, 1 unit missing: 1"


def test_verdict_on_unknown_ranks_names_the_watch_flag(far):
    assert status_lines(read_status(far.output))[-1] == (
        "complete      no, 1 unit missing: 1; "
        "this host cannot tell whether a rank is at work (--watch_s 15 shows it)"
    )


@pytest.mark.usefixtures("short_watch")
def test_silent_merge_is_not_reported_as_running(output, process):
    unmerge(output)
    write_claim(output, "merge.0", replace(owner_of(process), host="far", boot_id="other"))
    assert (
        status_lines(read_status(output))[-1]
        == "complete      no, every unit is committed and being merged"
    )
    lines = status_lines(read_status(output, watch_s=0.2))
    assert any(line.startswith("merging") and "no heartbeat in 0.2 s" in line for line in lines)
    assert "but the process that merges has no heartbeat; " in lines[-1]
    assert "the job's command reclaims the merge after 11 min" in lines[-1]


def test_earlier_generation_counts_as_ended_on_any_host(far, process):
    newer = replace(
        owner_of(process, rank=0), job_id=far.owner.job_id, generation=far.owner.generation + 1
    )
    write_heartbeat(far.output, newer, RankProgress())
    assert process_of_unit_1(read_status(far.output)) == "gone"


@pytest.mark.parametrize("hours", [-5, 5])
def test_clock_differences_change_only_the_time_shown(far, hours):
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
