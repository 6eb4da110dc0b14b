"""``verify`` locates every damage and reports nothing else."""

import numpy as np
import pytest
from helpers.jobs import assert_same_bits, run_job
from helpers.outputs import (
    DAMAGES,
    EMPTY,
    N_UNITS,
    ONE_TOKEN,
    SETTINGS,
    change_record,
    flip_byte,
    shard_of,
    statuses_by_zarr,
    uncommit,
    unmerge,
)

from gradproj.cli.verify import verdict_lines, verification_lines
from gradproj.coordinator.merge import merge
from gradproj.formatting import ranges_text
from gradproj.maintenance.job_output import read_output
from gradproj.maintenance.verify import BoundedRanges, verify
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.unit_record import record_name


def test_finished_store_is_sound_and_every_byte_is_read(output):
    result = verify(output)
    shards = list((output / "projections.zarr" / "projections").glob("c.*"))
    records = list((output / "units").iterdir())
    assert result.damage == []
    assert (result.complete, result.exit_code) == (True, 0)
    assert result.n_bytes == sum(path.stat().st_size for path in [*shards, *records])
    assert (result.n_records, result.n_shards) == (N_UNITS, N_UNITS)
    assert result.by_status == statuses_by_zarr(output)
    assert verdict_lines(result)[-1] == "result        sound and complete"


def test_unfinished_store_is_sound_and_lists_missing_ids(output):
    uncommit(output, 1, 2, 4)
    result = verify(output)
    assert (result.damage, result.complete, result.exit_code) == ([], False, 3)
    with ProjectionStore(output) as store:
        assert (
            [list(r) for r in store.missing_ranges()]
            == result.missing.ranges
            == [[16, 48], [64, 70]]
        )
    assert result.missing.n_ids == 38
    assert "missing       38 documents: ids 16-47, 64-69" in verification_lines(result)


def test_unmerged_store_is_sound_and_incomplete(output):
    unmerge(output)
    result = verify(output)
    assert (result.damage, result.exit_code) == ([], 3)
    assert verdict_lines(result)[-1] == "result        sound, but incomplete: not merged yet"


def test_shard_without_a_record_is_no_damage(output):
    uncommit(output, 1)
    (output / "projections.zarr" / "projections" / "c.1.0").write_bytes(b"half")
    result = verify(output)
    assert (result.shards_without_record, result.damage, result.exit_code) == ([1], [], 3)
    assert "left over     1 shard without a record, of units 1" in "\n".join(
        verification_lines(result)
    )


def test_non_finite_rows_are_listed(output):
    change_record(output, 1, statuses={2: STATUS["non_finite"], 3: STATUS["non_finite"]})
    change_record(output, 3, statuses={15: STATUS["non_finite"]})
    merge(output)
    result = verify(output)
    assert result.damage == []
    assert result.non_finite == BoundedRanges(3, [[18, 20], [63, 64]])
    assert "non-finite    3 documents: ids 18-19, 63" in verification_lines(result)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_located(name, output):
    happens, kind, unit, message = DAMAGES[name]
    happens(output)
    result = verify(output)
    assert result.exit_code == 1
    first = result.damage[0]
    assert (first.kind, first.unit) == (kind, unit)
    assert message in first.what
    assert {d.unit for d in result.damage if d.kind == "unit"} <= {unit}
    lines = verification_lines(result) + verdict_lines(result)
    assert any(line.startswith("DAMAGED") for line in lines)
    assert lines[-1].startswith("result        damaged, in")
    ways_out = [line for line in lines if line.startswith("way out")]
    assert len(ways_out) == 1
    assert (f"`python -m gradproj verify {output} --repair` deletes" in ways_out[0]) == (
        kind != "other"
    )


@pytest.mark.parametrize("name", ["a column cut short", "a record cut short"])
def test_damage_is_located_below_a_path_like_a_message(name, output):
    happens, kind, unit, message = DAMAGES[name]
    like_a_message = output.rename(output.with_name("a is damaged: b. Run `c`. Delete that file"))
    happens(like_a_message)
    first = verify(like_a_message).damage[0]
    assert (first.kind, first.unit) == (kind, unit)
    assert first.path.startswith(f"{like_a_message}/")
    assert first.what.startswith("is damaged")
    assert message in first.what
    assert "Run" not in first.what
    assert "Delete" not in first.what


def test_merge_restores_damaged_columns_and_sums(output, job):
    for name in (
        "a column changed",
        "a column cut short",
        "statuses deleted",
        "a sum changed",
        "metadata torn",
    ):
        DAMAGES[name][0](output)
    assert verify(output).exit_code == 1
    merge(output)
    assert verify(output).exit_code == 0
    assert_same_bits(output, job.output)


def test_damaged_unit_is_recomputed_once_its_record_is_deleted(output, job):
    flip_byte(shard_of(output, 1), 100)
    (output / record_name(1)).unlink()
    run_job(1, shards=job.corpus, model=job.model, output_dir=output, **SETTINGS)
    assert verify(output).exit_code == 0
    assert_same_bits(output, job.output)


def test_many_damages_are_shown_in_part_and_all_in_json(output, monkeypatch):
    monkeypatch.setattr("gradproj.cli.verify.MAX_DAMAGE_SHOWN", 2)
    for unit in range(N_UNITS):
        flip_byte(shard_of(output, unit), 7)
    result = verify(output)
    assert len(result.damage) == N_UNITS
    assert sum(line.startswith("DAMAGED") for line in verification_lines(result)) == 2
    assert "and 3 more; --json lists them all" in "\n".join(verification_lines(result))


def test_id_ranges_join_and_are_bounded(monkeypatch):
    monkeypatch.setattr("gradproj.maintenance.verify.MAX_RANGES_KEPT", 2)
    ids = BoundedRanges()
    for start, stop in [(0, 3), (3, 4), (6, 8), (10, 20)]:
        ids.add(start, stop)
    assert ids == BoundedRanges(16, [[0, 4], [6, 8]])
    assert ranges_text(ids.ranges, most=1) == "0-3, and 1 more ranges"


def test_samples_are_counted_with_a_short_last_unit(output):
    result = read_output(output)
    assert [
        result.layout.n_samples_in(np.array(units, np.int64)) for units in ([], [0], [4], [1, 4])
    ] == [0, 16, 6, 22]
    assert result.id_ranges(np.array([1, 2, 4])) == [[16, 48], [64, 70]]


def test_unusual_documents_are_at_their_ids(output):
    with ProjectionStore(output) as store:
        assert [s.status for s in store.samples([EMPTY, ONE_TOKEN])] == ["empty", "no_target"]
