"""What the display counts and shows."""

import dataclasses
import json
from dataclasses import asdict

import numpy as np
import pytest

from gradproj.coordinator.claims import Owner
from gradproj.coordinator.heartbeats import Progress
from gradproj.coordinator.progress import ProgressDisplay, human_seconds, take_snapshot
from gradproj.store.layout import StoreConfig, plan_layout
from gradproj.store.records import record_name

LAYOUT = plan_layout(100, [8], 12, StoreConfig(rows_per_shard=16))  # 7 units, the last one of 4 rows


@pytest.fixture
def output(tmp_path):
    for folder in ("units", "heartbeats"):
        (tmp_path / folder).mkdir()
    return tmp_path


def record(output, *units):
    for unit in units:
        (output / record_name(unit)).touch()


def beat(output, rank, **progress):
    owner = dataclasses.replace(Owner.this_process("job", 0, rank), host="elsewhere", boot_id="other")
    content = {"owner": asdict(owner), "progress": asdict(Progress(**progress))}
    (output / "heartbeats" / f"{owner.name}.json").write_text(json.dumps(content))


def test_committed_units_and_the_done_part_of_running_ones_count(output):
    record(output, 0, 6)
    beat(output, 0, unit=2, unit_samples=5, n_tokens=300, seconds=3.0)
    beat(output, 1, unit=6, unit_samples=4, n_tokens=100, seconds=2.0)  # committed meanwhile
    now = take_snapshot(output, LAYOUT, np.arange(7))
    assert (now.done, now.total) == (16 + 4 + 5, 100)
    assert now.rates == (100.0, 50.0)
    assert now.tokens_per_second == 150.0


def test_only_wanted_units_count(output):
    record(output, 0, 1)
    now = take_snapshot(output, LAYOUT, np.array([1, 2]))
    assert (now.done, now.total) == (16, 32)


def test_without_a_terminal_there_are_lines_and_the_last_one_says_how_far(output, capsys):
    with ProgressDisplay(output, LAYOUT, np.arange(7), Owner.this_process("job", 0, 0)):
        record(output, *range(7))
    assert capsys.readouterr().err == "100 of 100 documents (100.0 %)\n"


def test_a_rank_that_shows_nothing_looks_at_nothing(output, capsys, monkeypatch):
    monkeypatch.setattr("gradproj.coordinator.progress.take_snapshot", lambda *a: pytest.fail("looked"))
    with ProgressDisplay(output, LAYOUT, np.arange(7), Owner.this_process("job", 0, 1), visible=False):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (7200, "2.0 h"), (200000, "2.3 d")]
)
def test_durations_are_short(seconds, text):
    assert human_seconds(seconds) == text
