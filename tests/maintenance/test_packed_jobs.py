"""Jobs with packed rows: what verify, recompute, repair, merge and export find and restore."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.encoding import encode
from helpers.jobs import run_job
from helpers.outputs import N_SAMPLES, SETTINGS, copy_of, flip_byte, shard_of, unmerge

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.coordinator.merge import merge
from gradproj.files import file_sum
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.maintenance.recompute import recompute
from gradproj.maintenance.verify import verify
from gradproj.store.unit_record import encode_record, read_record, record_name
from gradproj.store.writer import shard_chunks, write_array

PACKED = {"encoding": "signs", "basis": "eigen", "pilot_tokens": 300}


@pytest.fixture(scope="module")
def packed_job(job, tmp_path_factory):
    """The settings of a finished job with packed rows."""
    output = tmp_path_factory.mktemp("packed") / "out"
    settings = {
        **SETTINGS, **PACKED, "shards": job.corpus, "model": job.model, "output_dir": output
    }  # fmt: skip
    run_job(**settings)
    return settings


@pytest.fixture
def packed_output(packed_job, tmp_path):
    """A copy of its output, which a test may change."""
    return copy_of(packed_job["output_dir"], tmp_path)


def rows_of(output):
    with ProjectionStore(output) as store:
        return store.rows(range(N_SAMPLES), missing="nan")


def wrong_ids(output):
    inputs = RecordedRunArgs(output=str(output), device="cpu")
    return [check.sample_id for check in recompute(inputs, N_SAMPLES, 0).wrong]


def replace_rows(output, unit, stored):
    """Replace a unit's stored rows, with matching checksums."""
    with ProjectionStore(output) as store:
        chunks = list(shard_chunks(stored, store.layout))
    shard_of(output, unit).write_bytes(b"".join(map(bytes, chunks)))
    path = output / record_name(unit)
    record = replace(read_record(path), shard=file_sum(shard_of(output, unit)))
    path.write_bytes(encode_record(record))
    merge(output)


def test_packed_rows_are_the_encoded_rows_of_a_dense_job(packed_job, tmp_path):
    run_job(**packed_job | {"encoding": "dense", "proj_dtype": "float32", "output_dir": tmp_path})
    rows = rows_of(tmp_path)
    with ProjectionStore(packed_job["output_dir"]) as store:
        stored, scale = encode(rows, store.layout, store.layers)
        _, in_store, scale_in_store = next(store.scan_stored(N_SAMPLES))
        np.testing.assert_array_equal(in_store, stored)
        np.testing.assert_array_equal(scale_in_store, scale)
        np.testing.assert_allclose(store.column("grad_norm"), np.linalg.norm(rows, axis=1), 1e-5)


def test_packed_store_is_sound_and_its_rows_are_computed_again(packed_job):
    assert main(["verify", str(packed_job["output_dir"])]) == 0
    assert wrong_ids(packed_job["output_dir"]) == []


def test_row_of_another_document_under_right_checksums_is_named(packed_output):
    with ProjectionStore(packed_output) as store:
        _, stored, _ = next(store.scan_stored(16, start=16))
    stored[3], stored[9] = stored[9].copy(), stored[3].copy()
    replace_rows(packed_output, 1, stored)
    assert wrong_ids(packed_output) == [19, 25]


def test_damaged_unit_is_found_and_computed_again_to_equal_bits(
    packed_job, packed_output, tmp_path
):
    whole = shard_of(packed_output, 2).read_bytes()
    flip_byte(shard_of(packed_output, 2))
    assert main(["verify", str(packed_output), "--repair"]) == 3
    assert not shard_of(packed_output, 2).exists()
    assert np.isnan(rows_of(packed_output)[32:48]).all()
    run_job(**packed_job | {"output_dir": packed_output})
    assert shard_of(packed_output, 2).read_bytes() == whole
    np.testing.assert_array_equal(rows_of(packed_output), rows_of(packed_job["output_dir"]))


def test_wrong_head_rows_under_right_checksums_are_named(packed_job, tmp_path):
    run_job(**packed_job | {"head_rows": "6x8", "output_dir": tmp_path})
    assert wrong_ids(tmp_path) == []
    with ProjectionStore(tmp_path) as store:
        _, stored, _ = next(store.scan_stored(16, start=16))
        stored, head = stored.copy(), store.head.segment
    segment = slice(head.stored_start, head.stored_end)
    stored[[3, 9], segment] = stored[[9, 3], segment]
    stored[5, segment] = 0
    replace_rows(tmp_path, 1, stored)
    wrong = recompute(RecordedRunArgs(output=str(tmp_path), device="cpu"), N_SAMPLES, 0).wrong
    assert [check.sample_id for check in wrong] == [19, 21, 25]
    assert all("has head rows that are" in check.what for check in wrong)


@pytest.mark.parametrize("name", ["basis_matrices", "basis_eigenvalues"])
@pytest.mark.parametrize("happens", ["lost", "short", "nan", "bit"])
def test_damaged_basis_is_named(packed_output, name, happens):
    store = packed_output / "projections.zarr"
    if happens == "lost":
        shutil.rmtree(store / name)
    else:
        with ProjectionStore(packed_output) as opened:
            values = opened.array(name).copy()
        values.view(np.uint8)[100] ^= happens == "bit"
        changed = {"short": values[:-1], "nan": np.nan * values, "bit": values}
        write_array(store, name, changed[happens])
    (damage,) = verify(packed_output).damage
    assert (damage.kind, damage.unit, damage.path) == ("other", None, str(store / name))
    said = {"lost": "has no array", "short": "ends before", "nan": "not finite"}
    assert said.get(happens, "another digest") in damage.what


def test_no_row_is_computed_in_a_damaged_basis(packed_job, packed_output):
    flip_byte(shard_of(packed_output, 2))
    assert main(["verify", str(packed_output), "--repair"]) == 3
    with ProjectionStore(packed_output) as store:
        values = store.array("basis_matrices").copy()
    values[7] *= 1.25
    write_array(packed_output / "projections.zarr", "basis_matrices", values)
    done = run_job(**packed_job | {"output_dir": packed_output}, expect=2)
    assert "basis_matrices is damaged: its values are not those that were written" in done.stderr


def test_unmerged_store_is_merged_and_exported(packed_job, packed_output, tmp_path):
    unmerge(packed_output)
    assert main(["merge", str(packed_output)]) == 0
    assert main(["export", str(packed_output), "--to", str(tmp_path / "pt")]) == 0
    exported = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("pt/*.pt"))]
    rows = torch.cat([file["proj"] for file in exported]).numpy()
    ids = torch.cat([file["batch_idx"] for file in exported])
    np.testing.assert_array_equal(rows, rows_of(packed_job["output_dir"])[ids])
