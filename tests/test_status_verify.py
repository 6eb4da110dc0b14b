"""``status`` says how far a store is and who works on it; ``verify`` finds every damage and nothing else."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import zarr
from jobs import arrays_of, assert_same_bits, run_job
from outputs import (
    EMPTY,
    N_SAMPLES,
    N_UNITS,
    ONE_TOKEN,
    ROWS_PER_UNIT,
    SETTINGS,
    change_record,
    copy_of,
    finished_job,
    flip_byte,
    owner_of,
    sleeping_process,
    tree_of,
    uncommit,
    unmerge,
    write_claim,
)

from gradproj.coordinator.heartbeats import Heartbeat, Progress
from gradproj.coordinator.merge import merge, write_metadata
from gradproj.coordinator.output import ranges_text, read_output
from gradproj.coordinator.partial import PartialLog, PartialRows
from gradproj.corpus.index import build_index, list_tars, save_index
from gradproj.errors import StoreError
from gradproj.status import read_status, status_json, status_lines
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.records import record_name
from gradproj.store.writer import update_attributes, write_array
from gradproj.verify import IdRanges, verification_json, verification_lines, verify


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


def statuses_by_zarr(output):
    values = zarr.open_group(output / "projections.zarr", mode="r")["status"][...]
    names = {code: name for name, code in STATUS.items()}
    return {names[code]: int(n) for code, n in zip(*np.unique(values, return_counts=True), strict=True)}


# --- status ---


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
    assert "unit 2: not begun" in text
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


# --- verify ---


def test_a_finished_store_is_sound_and_every_byte_of_it_was_read(output):
    found = verify(output)
    shards = list((output / "projections.zarr" / "projections").glob("c.*"))
    records = list((output / "units").iterdir())
    assert found.damage == []
    assert (found.complete, found.exit_code) == (True, 0)
    assert found.n_bytes == sum(path.stat().st_size for path in [*shards, *records])
    assert (found.n_records, found.n_shards) == (N_UNITS, N_UNITS)
    assert found.by_status == statuses_by_zarr(output)
    assert verification_lines(found)[-1] == "result        sound and complete"


def test_an_unfinished_store_is_sound_and_lists_the_ids_that_are_missing(output):
    uncommit(output, 1, 2, 4)
    found = verify(output)
    assert (found.damage, found.complete, found.exit_code) == ([], False, 3)
    with ProjectionStore(output) as store:
        assert [list(r) for r in store.missing_ranges()] == found.missing.ranges == [[16, 48], [64, 70]]
    assert found.missing.n_ids == 38
    assert "missing       38 documents: ids 16-47, 64-69" in verification_lines(found)


def test_a_store_that_waits_for_its_merge_is_sound_and_incomplete(output):
    unmerge(output)
    found = verify(output)
    assert (found.damage, found.exit_code) == ([], 3)
    assert verification_lines(found)[-1] == "result        sound, but incomplete: not merged yet"


def test_a_shard_without_a_record_is_no_damage(output):
    uncommit(output, 1)
    (output / "projections.zarr" / "projections" / "c.1.0").write_bytes(b"half")
    found = verify(output)
    assert (found.shards_without_record, found.damage, found.exit_code) == ([1], [], 3)
    assert "left over     1 shard without a record, of units 1" in "\n".join(verification_lines(found))


def test_rows_that_are_not_finite_are_listed(output):
    change_record(output, 1, statuses={2: STATUS["non_finite"], 3: STATUS["non_finite"]})
    change_record(output, 3, statuses={15: STATUS["non_finite"]})
    merge(output)
    found = verify(output)
    assert found.damage == []
    assert found.non_finite == IdRanges(3, [[18, 20], [63, 64]])
    assert "non-finite    3 documents: ids 18-19, 63" in verification_lines(found)


def shard_of(output, unit):
    return output / "projections.zarr" / "projections" / f"c.{unit}.0"


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def swap_corpus(output):
    (output / "corpus.json").unlink()
    save_index(build_index(list_tars(str(output.parent / "other")), progress=False), output / "corpus.json")


DAMAGES = {
    "a flipped bit in a shard": (lambda o: flip_byte(shard_of(o, 1), 100), "unit", 1, "has the checksum"),
    "a shard cut short": (lambda o: cut(shard_of(o, 1)), "unit", 1, "bytes, its record says"),
    "a shard deleted": (lambda o: shard_of(o, 1).unlink(), "unit", 1, "is gone"),
    "a flipped bit in a record": (lambda o: flip_byte(o / record_name(1)), "unit", 1, "damaged (torn or alt"),
    "a record cut short": (lambda o: cut(o / record_name(1)), "unit", 1, "damaged (torn or altered"),
    "an empty record": (lambda o: (o / record_name(1)).write_bytes(b""), "unit", 1, "damaged (torn or altered"),
    "a merged unit's record deleted": (lambda o: (o / record_name(1)).unlink(), "unit", 1, "was merged"),
    "another unit's record": (lambda o: change_record(o, 2, place=1), "unit", 1, "is the record of unit 2"),
    "a record of other settings": (lambda o: change_record(o, 1, identity="other"), "unit", 1, "other settings"),
    "a record that starts elsewhere": (lambda o: change_record(o, 1, start=0), "unit", 1, "starts at sample 0"),
    "a record without its shard": (lambda o: change_record(o, 1, shard=None), "unit", 1, "names no shard"),
    "a record without statuses": (
        lambda o: change_record(o, 1, statuses={4: 0}), "unit", 1, "documents without a status",
    ),
    "a record of no unit": (lambda o: change_record(o, 1, place=99, unit=99), "unit", 99, "does not want"),
    "a column changed": (
        lambda o: flip_byte(o / "projections.zarr" / "n_tokens" / "c.0", 4 * 37),
        "columns", 2, "first at sample 37",
    ),
    "a column cut short": (
        lambda o: cut(o / "projections.zarr" / "key" / "c.0.0"), "columns", 0, "bytes in key/c.0.0",
    ),
    "a column deleted": (
        lambda o: (o / "projections.zarr" / "loss" / "c.0").unlink(), "columns", 0, "first at sample 0",
    ),
    "statuses deleted": (
        lambda o: (o / "projections.zarr" / "status" / "c.0").unlink(), "columns", 0, "never merged",
    ),
    "a sum changed": (
        lambda o: write_array(o / "projections.zarr", "token_covariance_a", np.zeros(3)),
        "columns", None, "not the sum of the records' covariances",
    ),
    "matrices that are not finite": (
        lambda o: write_array(
            o / "projections.zarr", "projection_matrices", np.full(10**5, np.nan, np.float32)
        ),
        "other", None, "that are not finite",
    ),
    "metadata changed": (lambda o: (o / "metadata.json").write_text("{}"), "other", None, "not a copy"),
    "metadata torn": (lambda o: (o / "metadata.json").write_text("{"), "other", None, "cannot be read: Expecting"),
    "the index of another corpus": (swap_corpus, "other", None, "index of another corpus"),
    "a torn index": (lambda o: cut(o / "corpus.json"), "other", None, "torn corpus index"),
}  # fmt: skip
"""Name -> (what happens to the output, kind, unit, a part of what is said)."""


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_where_it_is(name, output, job):
    (output.parent / "other").mkdir()
    for tar in list_tars(str(job.corpus))[:1]:
        (output.parent / "other" / tar.name).write_bytes(tar.read_bytes())
    happens, kind, unit, what = DAMAGES[name]
    happens(output)
    found = verify(output)
    assert found.exit_code == 1
    first = found.damage[0]
    assert (first.kind, first.unit) == (kind, unit)
    assert what in first.what
    assert {d.unit for d in found.damage if d.kind == "unit"} <= {unit}
    lines = verification_lines(found)
    assert any(line.startswith("DAMAGED") for line in lines)
    assert lines[-1].startswith("result        damaged, in")


def test_a_merge_makes_damaged_columns_and_sums_again(output, job):
    for name in (
        "a column changed",
        "a column cut short",
        "statuses deleted",
        "a sum changed",
        "metadata torn",
    ):
        DAMAGES[name][0](output)
    found = verify(output)
    assert f"`python -m gradproj merge {output}`" in "\n".join(verification_lines(found))
    merge(output)
    assert verify(output).exit_code == 0
    assert_same_bits(output, job.output)


def test_a_damaged_unit_is_computed_again_once_its_record_is_deleted(output, job):
    flip_byte(shard_of(output, 1), 100)
    text = "\n".join(verification_lines(verify(output)))
    assert (
        f"delete the records of units 1 ({record_name(1)} and so on) and run the job's command again" in text
    )
    (output / record_name(1)).unlink()
    run_job(1, shards=job.corpus, model=job.model, output_dir=output, **SETTINGS)
    assert verify(output).exit_code == 0
    assert_same_bits(output, job.output)


def test_many_damages_are_shown_in_part_and_listed_in_json(output, monkeypatch):
    monkeypatch.setattr("gradproj.verify.MOST_DAMAGE_SHOWN", 2)
    for unit in range(N_UNITS):
        flip_byte(shard_of(output, unit), 7)
    found = verify(output)
    assert len(found.damage) == N_UNITS
    assert sum(line.startswith("DAMAGED") for line in verification_lines(found)) == 2
    assert "and 3 more; --json lists them all" in "\n".join(verification_lines(found))


def test_id_ranges_join_and_are_bounded(monkeypatch):
    monkeypatch.setattr("gradproj.verify.MOST_RANGES_KEPT", 2)
    ids = IdRanges()
    for start, stop in [(0, 3), (3, 4), (6, 8), (10, 20)]:
        ids.add(start, stop)
    assert ids == IdRanges(16, [[0, 4], [6, 8]])
    assert ranges_text(ids.ranges, most=1) == "0-3, and 1 more ranges"


def test_samples_of_units_are_counted_with_a_short_last_one(output):
    found = read_output(output)
    assert [found.n_samples_in(np.array(units, np.int64)) for units in ([], [0], [4], [1, 4])] == [
        0,
        16,
        6,
        22,
    ]
    assert found.id_ranges(np.array([1, 2, 4])) == [[16, 48], [64, 70]]


def test_the_odd_documents_are_where_they_were_put(output):
    write_metadata(output)  # nothing but what is there already
    with ProjectionStore(output) as store:
        assert [s.status for s in store.samples([EMPTY, ONE_TOKEN])] == ["empty", "no_target"]
    assert "status" in arrays_of(output)
