"""``status``: progress of a store and its processes. Neither it nor ``verify`` writes."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import zarr
from helpers.faults import fake_owner, partial_rows
from helpers.outputs import (
    N_SAMPLES,
    N_UNITS,
    ROWS_PER_UNIT,
    change_record,
    flip_byte,
    owner_of,
    shard_of,
    statuses_by_zarr,
    tree_of,
    uncommit,
    unmerge,
    write_claim,
    write_heartbeat,
)

from gradproj.cli.status import status_lines
from gradproj.coordinator.file_commits import FileCommits
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.partial_rows import PartialLog
from gradproj.errors import StoreError
from gradproj.maintenance.status import read_status
from gradproj.maintenance.verify import verify
from gradproj.store.unit_record import record_name
from gradproj.store.writer import update_attributes


def test_finished_store_is_complete_with_rows_by_status(output):
    status = read_status(output)
    assert (status.complete, status.exit_code) == (True, 0)
    assert (status.n_committed, status.n_units) == (N_UNITS, N_UNITS)
    assert status.by_status == statuses_by_zarr(output) == {"ok": 68, "empty": 1, "no_target": 1}
    assert status_lines(status)[-1] == "complete      yes"


def test_unfinished_store_lists_missing_units_and_how_to_continue(output):
    uncommit(output, 1, 2, 4)
    status = read_status(output)
    assert (status.complete, status.exit_code) == (False, 3)
    assert status.missing_units == [[1, 3], [4, 5]]
    assert (status.n_committed_samples, status.n_samples) == (2 * ROWS_PER_UNIT, N_SAMPLES)
    assert status.by_status == {"missing": N_SAMPLES - 32, "ok": 31, "empty": 1}
    text = "\n".join(status_lines(status))
    assert "5: 2 committed, 0 claimed, 3 left" in text
    assert "no, 3 units missing: 1-2, 4; run the job's command again to resume" in text


def test_store_is_complete_only_once_merged(output):
    unmerge(output)
    status = read_status(output)
    assert (status.complete, status.missing_units, status.exit_code) == (False, [], 3)
    assert (
        f"not merged; `python -m gradproj merge {output}` merges them" in status_lines(status)[-1]
    )


WAYS_TO_BE_UNMERGEABLE = {
    "a record of another store": (
        lambda o: change_record(o, 1, identity="other"),
        "belongs to another store",
    ),
    "another unit's record": (lambda o: change_record(o, 2, place=1), "belongs to another store"),
    "a record without its shard": (lambda o: shard_of(o, 1).unlink(), "has no shard"),
    "a damaged record": (lambda o: flip_byte(o / record_name(1)), "is damaged"),
}


@pytest.mark.parametrize("name", sorted(WAYS_TO_BE_UNMERGEABLE))
def test_verify_is_advised_when_the_merge_would_fail(name, output):
    happens, message = WAYS_TO_BE_UNMERGEABLE[name]
    unmerge(output)
    happens(output)
    status = read_status(output)
    (problem,) = status.problems
    assert "rows of unit 1 cannot be counted" in problem
    assert message in problem
    verdict = status_lines(status)[-1]
    assert "no, every unit is committed but cannot be merged; " in verdict
    assert f"`python -m gradproj verify {output} --repair` deletes damaged units" in verdict


def test_failed_start_is_to_be_fixed_before_the_merge(output):
    unmerge(output)
    (output / "failed.json").write_text(json.dumps(FAILURE))
    assert status_lines(read_status(output))[-1] == (
        "complete      no, every unit is committed but not merged; "
        "fix the error, then run the job's command again"
    )


def test_running_merge_is_reported_instead_of_advised(output, process):
    unmerge(output)
    write_claim(output, "merge.0", owner_of(process))
    assert (
        status_lines(read_status(output))[-1]
        == "complete      no, every unit is committed and being merged"
    )


def test_claimed_unit_names_its_process_and_progress(output, process):
    uncommit(output, 1, 2)
    owner = owner_of(process, rank=3)
    write_claim(output, "00000001.0", owner)
    write_claim(output, "00000002.0", owner)
    progress = RankProgress(n_tokens=600, units=2, unit=1, unit_samples=8, seconds=2.0)
    write_heartbeat(output, owner, progress)
    status = read_status(output)
    first, second = status.claimed
    assert (first.unit, first.n_done, first.n_samples, first.process) == (1, 8, 16, "alive")
    assert (second.unit, second.n_done) == (2, None)
    assert first.owner == owner
    assert first.since
    # 2 finished units and 8 documents in 2 s; 24 of 32 documents are left.
    assert (status.speed.samples_per_s, status.speed.tokens_per_s, status.speed.left_s) == (
        20,
        300,
        1.2,
    )
    text = "\n".join(status_lines(status))
    assert (
        f"unit 1: 8 of 16 documents, by rank 3 on {owner.host} (pid {owner.pid}, job job), since 2"
        in text
    )
    assert "unit 2: no progress reported yet" in text
    assert "run the job's command again" not in text


def test_claim_of_a_dead_process_is_stale(output, process):
    uncommit(output, 1)
    owner = owner_of(process)
    write_claim(output, "00000001.0", owner)
    write_heartbeat(output, owner, RankProgress(unit=1, seconds=1))
    process.kill()
    process.wait()
    status = read_status(output)
    assert [c.process for c in status.claimed] == ["gone"]
    assert status.speed.n_ranks == 0
    text = "\n".join(status_lines(status))
    assert "stale         unit 1" in text
    assert "process exited; will be reclaimed by the job" in text


def test_claims_of_committed_units_are_not_shown(output, process):
    uncommit(output, 1)
    owner = owner_of(process)
    write_claim(output, "00000000.0", owner)  # committed: its owner has not deleted the claim yet
    write_claim(output, "00000001.0", owner)
    write_claim(output, "00000001.1", None, released=True)
    assert read_status(output).claimed == []


def test_unreadable_claim_is_shown_without_an_owner(output):
    uncommit(output, 1)
    write_claim(output, "00000001.0", None)
    (claimed,) = read_status(output).claimed
    assert claimed.owner is None
    assert "by an unreadable claim" in "\n".join(status_lines(read_status(output)))


def test_running_merge_names_its_process(output, process):
    write_claim(output, "merge.0", owner_of(process))
    assert f"merging       rank 1 on {owner_of(process).host}" in "\n".join(
        status_lines(read_status(output))
    )


def test_partial_rows_are_listed_with_their_folder(output):
    uncommit(output, 1)
    commits = FileCommits(output, fake_owner(0))
    log = PartialLog(output / "partial" / "00000001", commits, "key")
    log.append(0, 3, partial_rows())
    log.append(3, 7, partial_rows())
    (partial,) = read_status(output).partial
    size = sum(path.stat().st_size for path in (output / "partial" / "00000001").iterdir())
    assert (partial.unit, partial.n_batches, partial.n_bytes) == (1, 7, size)
    assert "saved rows of unfinished units 1" in "\n".join(status_lines(read_status(output)))


def test_rows_of_unwanted_units_are_not_missing(output):
    uncommit(output, 1, 2)
    update_attributes(output / "projections.zarr", {"wanted_units": [[0, 2], [3, 5]]})
    status = read_status(output)
    assert (status.n_units, status.missing_units) == (4, [[1, 2]])
    assert status.by_status["missing"] == ROWS_PER_UNIT
    assert status.by_status["not_selected"] == ROWS_PER_UNIT


def test_status_answers_despite_a_damaged_record(output):
    unmerge(output)
    flip_byte(output / record_name(1))
    status = read_status(output)
    assert status.by_status == {"ok": 53, "empty": 1}
    assert (status.n_committed, status.n_units_counted) == (N_UNITS, N_UNITS - 1)
    (problem,) = status.problems
    assert "rows of unit 1 cannot be counted" in problem
    assert record_name(1) in problem


def test_slow_row_counts_are_partial_unless_all_are_requested(output, monkeypatch):
    uncommit(output, 4)
    monkeypatch.setattr("gradproj.maintenance.status.COUNT_FOR_S", -1.0)
    status = read_status(output)
    assert (status.by_status, status.n_units_counted) == ({"missing": 6}, 0)
    assert "rows          6 missing (of 0 of 4 committed units; --rows counts all)" in status_lines(
        status
    )
    status = read_status(output, rows=True)
    assert (status.by_status, status.n_units_counted) == (
        {"missing": 6, "ok": 62, "empty": 1, "no_target": 1},
        4,
    )


def test_partial_rows_of_committed_units_are_not_listed(output):
    folder = output / "partial" / "00000001"
    folder.mkdir()
    (folder / "000000-000003.00000000.safetensors").write_bytes(b"rows")
    assert read_status(output).partial == []


# --- failed starts ---

FAILURE = {
    "error": "--max_length 9 is more\nthan it can be",
    "job_id": "slurm-7",
    "when": "2024-01-01T00:00:00",
}


def test_last_failure_is_shown_and_sets_the_exit_code(output):
    uncommit(output, 1)
    (output / "failed.json").write_text(json.dumps(FAILURE))
    status = read_status(output)
    assert (status.failed, status.exit_code) == (FAILURE, 1)
    text = "\n".join(status_lines(status))
    assert "failed        --max_length 9 is more\n              than it can be\n" in text
    assert f"{output / 'failed.json'}: job slurm-7, at 2024-01-01T00:00:00" in text
    assert "fix the error, then run the job's command again" in text


def test_complete_store_ignores_an_earlier_failure(output):
    (output / "failed.json").write_text(json.dumps(FAILURE))
    status = read_status(output)
    assert (status.exit_code, status.failed) == (0, None)


@pytest.mark.parametrize("content", ["", "{", "[1]", "7"])
def test_unreadable_failure_still_counts(content, output):
    uncommit(output, 1)
    (output / "failed.json").write_text(content)
    status = read_status(output)
    assert status.exit_code == 1
    assert any(line.startswith("failed  ") for line in status_lines(status))


def test_status_without_rows_reads_no_record(output):
    unmerge(output)
    flip_byte(output / record_name(1))
    assert read_status(output, rows=False).problems == []


def test_json_of_status_and_verify_holds_all_fields(output, process):
    uncommit(output, 1)
    write_claim(output, "00000001.0", owner_of(process))
    for known in (read_status(output), verify(output)):
        assert json.loads(json.dumps(asdict(known), allow_nan=False)) == asdict(known)


def test_status_and_verify_write_nothing(output, process):
    uncommit(output, 1)
    write_claim(output, "00000001.0", owner_of(process))
    before = tree_of(output)
    read_status(output)
    verify(output)
    assert tree_of(output) == before


def test_status_verify_and_repair_need_no_torch():
    code = "import sys, gradproj.cli.status, gradproj.cli.verify; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("look", [read_status, verify])
def test_directory_that_is_no_output_is_refused(look, tmp_path):
    with pytest.raises(StoreError, match=r"there is no store at .*nowhere: no such folder"):
        look(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is not a gradproj store"):
        look(tmp_path)
    zarr.create_group(tmp_path / "projections.zarr")
    with pytest.raises(StoreError, match="is a Zarr group but not a gradproj store"):
        look(tmp_path)


def test_store_not_written_by_a_job_is_refused(output):
    path = output / "projections.zarr" / "zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["attributes"]["wanted_units"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="is a store but not a job's output"):
        read_status(output)


def test_store_path_is_accepted_instead_of_the_output(output):
    assert read_status(output / "projections.zarr").complete
