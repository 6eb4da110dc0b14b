"""The progress display."""

import dataclasses
import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from gradproj.coordinator.heartbeats import LiveRanks, RankProgress, read_heartbeats
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.progress import ProgressDisplay, take_snapshot
from gradproj.formatting import human_seconds
from gradproj.store.layout import StoreConfig, plan_layout
from gradproj.store.unit_record import record_name

LAYOUT = plan_layout(
    100, [8], 12, StoreConfig(encoding="dense", rows_per_shard=16)
)  # 7 units, the last one of 4 rows


@pytest.fixture
def output(tmp_path):
    for folder in ("units", "heartbeats"):
        (tmp_path / folder).mkdir()
    return tmp_path


def record(output, *units):
    for unit in units:
        (output / record_name(unit)).touch()


def beat(output, rank, **progress):
    owner = dataclasses.replace(
        Owner.this_process("job", 0, rank), host="elsewhere", boot_id="other"
    )
    content = {"owner": asdict(owner), "progress": asdict(RankProgress(**progress))}
    (output / "heartbeats" / f"{owner.name}.json").write_text(json.dumps(content))


def test_snapshot_counts_committed_units_and_finished_batches(output):
    record(output, 0, 6)
    beat(output, 0, unit=2, unit_samples=5, n_tokens=300, seconds=3.0)
    beat(output, 1, unit=6, unit_samples=4, n_tokens=100, seconds=2.0)  # committed meanwhile
    now = take_snapshot(output, LAYOUT, np.arange(7), read_heartbeats(output / "heartbeats"))
    assert (now.done, now.total) == (16 + 4 + 5, 100)
    assert now.rates == (100.0, 50.0)


def test_snapshot_counts_wanted_units_only(output):
    record(output, 0, 1)
    now = take_snapshot(output, LAYOUT, np.array([1, 2]), [])
    assert (now.done, now.total) == (16, 32)


def test_display_prints_lines_without_a_terminal(output, capsys):
    with ProgressDisplay(output, LAYOUT, np.arange(7), Owner.this_process("job", 0, 0)):
        record(output, *range(7))
    assert capsys.readouterr().err == "100 of 100 documents (100.0 %)\n"


def test_remote_rank_counts_while_its_heartbeat_moves(output, monkeypatch):
    now, seen = [0.0], []
    monkeypatch.setattr(
        "gradproj.coordinator.heartbeats.time", SimpleNamespace(monotonic=lambda: now[0])
    )
    here = Owner.this_process("job", 0, 0)
    content = {"owner": asdict(here), "progress": asdict(RankProgress(n_tokens=50, seconds=1.0))}
    (output / "heartbeats" / f"{here.name}.json").write_text(json.dumps(content))
    ranks = LiveRanks(output / "heartbeats", here)
    for at, batches in ((0, 7), (5, 7), (10, 8), (60, 8), (71, 8), (75, 9)):
        now[0] = at
        beat(output, 1, unit=2, unit_samples=5, n_tokens=300, seconds=3.0, batches=batches)
        path = next(
            path for path in (output / "heartbeats").iterdir() if here.name not in path.name
        )
        os.utime(path, (1, 1))
        shot = take_snapshot(output, LAYOUT, np.arange(7), ranks.read())
        seen.append((at, len(shot.rates), shot.done, sum(shot.rates)))
    dead, alive = (1, 0, 50.0), (2, 5, 150.0)
    assert seen == [(0, *dead), (5, *dead), (10, *alive), (60, *alive), (71, *dead), (75, *alive)]


def test_rewritten_heartbeat_counts_as_moved_without_a_new_batch(output):
    beat(output, 1, batches=7)
    (path,) = (output / "heartbeats").iterdir()
    ranks = LiveRanks(output / "heartbeats", Owner.this_process("job", 0, 0))
    os.utime(path, (1, 1))
    assert ranks.read() == []
    os.utime(path, (2, 2))
    assert [owner.rank for owner, _ in ranks.read()] == [1]


def test_display_does_not_count_a_dead_host(output, capsys):
    beat(output, 1, unit=2, unit_samples=5, n_tokens=300, seconds=3.0)
    display = ProgressDisplay(output, LAYOUT, np.arange(7), Owner.this_process("job", 0, 0))
    display._show()
    display._bar.close()
    assert "0 of 100 documents (0.0 %), 0 tokens/s, 0 ranks" in capsys.readouterr().err


def test_invisible_display_reads_nothing(output, capsys, monkeypatch):
    monkeypatch.setattr(
        "gradproj.coordinator.progress.take_snapshot", lambda *a: pytest.fail("looked")
    )
    with ProgressDisplay(
        output, LAYOUT, np.arange(7), Owner.this_process("job", 0, 1), visible=False
    ):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (7200, "2.0 h"), (200000, "2.3 d")],
)
def test_durations_are_formatted_briefly(seconds, text):
    assert human_seconds(seconds) == text
