"""``failed.json`` and the marks of Slurm jobs."""

import json

import pytest
from helpers.faults import fill, make_store

from gradproj.coordinator.failure import clear_failure, note_failure
from gradproj.coordinator.process_id import Owner
from gradproj.errors import OtherSettingsError, StoreError


def owner_of(job_id):
    return Owner.this_process(job_id, 0, 0)


def test_failure_is_noted_and_cleared_by_the_next_successful_start(tmp_path):
    owner = owner_of("slurm-7")
    note_failure(tmp_path, owner, StoreError("the disk is full"))
    assert list(tmp_path.iterdir()) == []  # no store, so nothing was begun
    make_store(tmp_path)
    note_failure(tmp_path, owner, StoreError("the disk is full"))
    noted = json.loads((tmp_path / "failed.json").read_text())
    assert noted["error"] == "the disk is full"
    assert (noted["job_id"], noted["kind"], noted["exit_code"]) == ("slurm-7", "StoreError", 2)
    clear_failure(tmp_path)
    clear_failure(tmp_path)
    assert not (tmp_path / "failed.json").exists()


@pytest.mark.parametrize(
    ("starts", "clears"),
    [
        ("slurm-70_1", True),
        ("slurm-70_2", False),
        ("slurm-71", True),
        ("slurm-70", True),
        ("local-a_b", True),
    ],
)
def test_array_element_keeps_the_failure_of_another_element(tmp_path, starts, clears):
    make_store(tmp_path)
    (tmp_path / "logs").mkdir(exist_ok=True)
    note_failure(tmp_path, owner_of("slurm-70_1"), StoreError("a tar is damaged"))
    mark = tmp_path / "logs" / "slurm-70_1.failed"
    assert mark.exists()
    clear_failure(tmp_path, starts)
    assert (tmp_path / "failed.json").exists() != clears
    assert mark.exists() == (starts != "slurm-70_1")


def test_refusal_for_other_settings_marks_only_the_slurm_job(tmp_path):
    make_store(tmp_path)
    note_failure(tmp_path, owner_of("slurm-7"), OtherSettingsError("made with other settings"))
    assert not (tmp_path / "failed.json").exists()
    assert (tmp_path / "logs" / "slurm-7.failed").exists()


def test_completed_store_has_no_failure(tmp_path):
    layout = make_store(tmp_path)
    note_failure(tmp_path, owner_of("local-1"), StoreError("the disk is full"))
    assert fill(tmp_path, layout, owner_of("another"))
    assert not (tmp_path / "failed.json").exists()
