"""``status`` says how far a store is and who works on it; neither it nor ``verify`` ever writes."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import zarr
from outputs import (
    N_SAMPLES,
    N_UNITS,
    ROWS_PER_UNIT,
    copy_of,
    finished_job,
    flip_byte,
    owner_of,
    sleeping_process,
    statuses_by_zarr,
    tree_of,
    uncommit,
    unmerge,
    write_claim,
)

from gradproj.coordinator.heartbeats import Heartbeat, Progress
from gradproj.coordinator.partial import PartialLog, PartialRows
from gradproj.errors import StoreError
from gradproj.status import read_status, status_json, status_lines
from gradproj.store.records import record_name
from gradproj.store.writer import update_attributes
from gradproj.verify import verification_json, verify


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return finished_job(tmp_path_factory)


@pytest.fixture
def output(job, tmp_path):
    return copy_of(job.output, tmp_path)


@pytest.fixture
def process():
    running = sleeping_process()
    yield running
    running.kill()
    running.wait()


def test_a_finished_store_is_complete_with_the_rows_that_its_status_column_has(output):
    status = read_status(output)
    assert (status.complete, status.exit_code) == (True, 0)
    assert (status.n_committed, status.n_units) == (N_UNITS, N_UNITS)
    assert status.by_status == statuses_by_zarr(output) == {"ok": 68, "empty": 1, "no_target": 1}
    assert status_lines(status)[-1] == "complete      yes"


def test_an_unfinished_store_says_which_units_are_missing_and_how_to_go_on(output):
    uncommit(output, 1, 2, 4)
    status = read_status(output)
    assert (status.complete, status.exit_code) == (False, 3)
    assert status.missing_units == [[1, 3], [4, 5]]
    assert (status.n_committed_samples, status.n_samples) == (2 * ROWS_PER_UNIT, N_SAMPLES)
    assert status.by_status == {"missing": N_SAMPLES - 32, "ok": 31, "empty": 1}
    text = "\n".join(status_lines(status))
    assert "5: 2 committed, 0 claimed, 3 left" in text
    assert "no, 3 units missing: 1-2, 4; run the job's command again to go on" in text


def test_a_store_whose_units_are_all_committed_is_complete_only_once_merged(output):
    unmerge(output)
    status = read_status(output)
    assert (status.complete, status.missing_units, status.exit_code) == (False, [], 3)
    assert "not merged; `python -m gradproj merge` ends it" in status_lines(status)[-1]


def test_a_claimed_unit_names_its_process_and_how_far_it_is(output, process):
    uncommit(output, 1, 2)
    owner = owner_of(process, rank=3)
    write_claim(output, "00000001.0", owner)
    write_claim(output, "00000002.0", owner)
    progress = Progress(n_tokens=600, units=2, unit=1, unit_samples=8, seconds=2.0)
    Heartbeat(output / "heartbeats", owner, progress, lambda: None)._write()
    status = read_status(output)
    first, second = status.claimed
    assert (first.unit, first.n_done, first.n_samples, first.process) == (1, 8, 16, "alive")
    assert (second.unit, second.n_done) == (2, None)
    assert first.owner == owner
    assert first.since
    # 2 finished units and 8 documents in 2 s; 24 of 32 documents are left.
    assert (status.speed.samples_per_s, status.speed.tokens_per_s, status.speed.left_s) == (20, 300, 1.2)
    text = "\n".join(status_lines(status))
    assert f"unit 1: 8 of 16 documents, by rank 3 on {owner.host} (pid {owner.pid}, job job), since 2" in text
    assert "unit 2: nothing reported yet" in text
    assert "run the job's command again" not in text


def test_a_claim_of_a_process_that_has_ended_is_given_up(output, process):
    uncommit(output, 1)
    owner = owner_of(process)
    write_claim(output, "00000001.0", owner)
    Heartbeat(output / "heartbeats", owner, Progress(unit=1, seconds=1), lambda: None)._write()
    process.kill()
    process.wait()
    status = read_status(output)
    assert [c.process for c in status.claimed] == ["gone"]
    assert status.speed.n_ranks == 0
    text = "\n".join(status_lines(status))
    assert "given up      unit 1" in text
    assert "which has ended: the job takes the unit over" in text


def test_of_a_process_on_another_host_only_what_it_wrote_is_said(output, process):
    uncommit(output, 1)
    write_claim(output, "00000001.0", replace(owner_of(process), host="far", boot_id="other"))
    (claimed,) = read_status(output).claimed
    assert claimed.process == "unknown"


def test_claims_that_say_nothing_of_work_left_are_not_shown(output, process):
    uncommit(output, 1)
    owner = owner_of(process)
    write_claim(output, "00000000.0", owner)  # committed: its owner has not deleted the claim yet
    write_claim(output, "00000001.0", owner)
    write_claim(output, "00000001.1", None, released=True)
    assert read_status(output).claimed == []


def test_a_claim_that_cannot_be_read_is_shown_without_an_owner(output):
    uncommit(output, 1)
    write_claim(output, "00000001.0", None)
    (claimed,) = read_status(output).claimed
    assert claimed.owner is None
    assert "by an unreadable claim" in "\n".join(status_lines(read_status(output)))


def test_a_running_merge_names_its_process(output, process):
    write_claim(output, "merge.0", owner_of(process))
    assert f"merging       rank 1 on {owner_of(process).host}" in "\n".join(status_lines(read_status(output)))


def test_saved_rows_of_an_unfinished_unit_are_listed_with_their_place(output):
    uncommit(output, 1)
    log = PartialLog(output / "partial" / "00000001", output / "tmp", "key")
    nothing = np.empty(0, np.int64)
    rows = PartialRows(nothing, np.zeros((3, 5), np.float32), np.zeros(3, np.float32), nothing, {})
    log.append(0, 3, rows)
    log.append(3, 7, rows)
    (partial,) = read_status(output).partial
    size = sum(path.stat().st_size for path in (output / "partial" / "00000001").iterdir())
    assert (partial.unit, partial.n_batches, partial.n_bytes) == (1, 7, size)
    assert "saved rows of unfinished units 1" in "\n".join(status_lines(read_status(output)))


def test_rows_of_units_that_nobody_wants_are_not_missing(output):
    uncommit(output, 1, 2)
    update_attributes(output / "projections.zarr", {"wanted_units": [[0, 2], [3, 5]]})
    status = read_status(output)
    assert (status.n_units, status.missing_units) == (4, [[1, 2]])
    assert status.by_status["missing"] == ROWS_PER_UNIT
    assert status.by_status["not_selected"] == ROWS_PER_UNIT


def test_a_damaged_record_does_not_keep_status_from_answering(output):
    unmerge(output)
    flip_byte(output / record_name(1))
    status = read_status(output)
    assert status.by_status is None
    assert status.n_committed == N_UNITS
    assert "rows cannot be counted" in status.problems[0]
    assert record_name(1) in status.problems[0]


def test_status_without_rows_reads_no_record(output):
    unmerge(output)
    flip_byte(output / record_name(1))
    assert read_status(output, rows=False).problems == []


def test_the_json_of_status_and_verify_holds_all_they_know(output, process):
    uncommit(output, 1)
    write_claim(output, "00000001.0", owner_of(process))
    status, found = read_status(output), verify(output)
    assert json.loads(status_json(status)) == asdict(status)
    assert json.loads(verification_json(found)) == asdict(found)


def test_status_and_verify_write_nothing(output, process):
    uncommit(output, 1)
    write_claim(output, "00000001.0", owner_of(process))
    before = tree_of(output)
    read_status(output)
    verify(output)
    assert tree_of(output) == before


def test_status_and_verify_need_no_torch():
    code = "import sys, gradproj.status, gradproj.verify; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("look", [read_status, verify])
def test_what_is_no_jobs_output_is_refused(look, tmp_path):
    with pytest.raises(StoreError, match=r"there is no store at .*nowhere: no such folder"):
        look(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is not a gradproj store"):
        look(tmp_path)
    zarr.create_group(tmp_path / "projections.zarr")
    with pytest.raises(StoreError, match="is a Zarr group but not a gradproj store"):
        look(tmp_path)


def test_a_store_that_no_job_made_is_refused(output):
    path = output / "projections.zarr" / "zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["attributes"]["wanted_units"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="is a store but not a job's output"):
        read_status(output)


def test_the_store_itself_may_be_named_instead_of_the_output(output):
    assert read_status(output / "projections.zarr").complete
