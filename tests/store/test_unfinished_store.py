"""Unfinished or damaged stores: what exists is read, what does not is named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from helpers.stores import DOMAINS, Output, packed

from gradproj.errors import StoreError
from gradproj.store import ProjectionStore
from gradproj.store.layout import STATUS, StoreConfig
from gradproj.store.unit_record import decode_record, encode_record, record_name
from gradproj.store.writer import update_attributes


@pytest.fixture
def unfinished(tmp_path):
    """Units 0 and 3 merged, 1 recorded only, 2 nothing, 4 a shard without a record."""
    output = Output(tmp_path)
    output.commit(0)
    output.commit(3)
    output.merge([0, 3])
    output.commit(1)
    output.commit(4)
    (tmp_path / record_name(4)).unlink()
    return output


MISSING = [*range(32, 48), *range(64, 70)]


def test_unmerged_rows_are_read_through_records(unfinished):
    store = ProjectionStore(unfinished.path)
    present = np.setdiff1d(np.arange(70), MISSING)
    np.testing.assert_array_equal(store.rows(present), unfinished.decoded()[present])
    want = unfinished.decoded()
    want[MISSING] = np.nan
    np.testing.assert_array_equal(store.rows(range(70), missing="nan"), want)
    np.testing.assert_array_equal(store.rows(range(69, -1, -1), missing="nan"), want[::-1])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(11)]), want)


def test_missing_samples_are_counted_and_named(unfinished):
    store = ProjectionStore(unfinished.path)
    assert store.missing().tolist() == MISSING
    assert store.missing_ranges() == [(32, 48), (64, 70)]
    assert store.status_counts() == dict.fromkeys(STATUS, 0) | {"missing": 22, "ok": 48}
    with pytest.raises(
        StoreError,
        match=r"22 of the requested samples are missing from .*: 32, 33, .*, \.\.\.\. Let",
    ):
        store.rows(range(70))
    with pytest.raises(
        StoreError, match=r"1 of the requested samples are missing from .*: 40\. Let the job finish"
    ):
        store.rows([0, 40, 1])


def test_missing_ranges_join_across_blocks_of_status(tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.store.reader._STATUS_ROWS", 7)
    store = ProjectionStore(Output(tmp_path).path)
    assert store.missing_ranges() == [(0, 70)]
    assert store.missing().tolist() == list(range(70))


def test_samples_have_columns_of_merged_recorded_and_missing_rows(unfinished):
    store = ProjectionStore(unfinished.path, read_text=lambda sample_id: f"text {sample_id}")
    assert store.domains == DOMAINS
    merged, recorded, missing = store.samples([48, 17, 33], text=True)
    assert (merged.sample_id, merged.key, merged.domain, merged.status) == (48, "é48", None, "ok")
    assert (recorded.sample_id, recorded.key, recorded.domain, recorded.tar) == (
        17,
        "é17",
        "Github",
        2,
    )
    assert (recorded.loss, recorded.n_tokens, recorded.grad_norm) == (17 / 8, 18, 17 / 4)
    assert recorded.text == "text 17"
    assert (missing.status, missing.key, missing.domain, missing.tar) == ("missing", "", None, -1)
    assert store.samples([48])[0].text is None


def test_columns_are_read_by_range_and_by_id(unfinished):
    store = ProjectionStore(unfinished.path)
    want = np.where(np.isin(np.arange(70), MISSING), -1, np.arange(70) // 7)
    np.testing.assert_array_equal(store.column("tar"), want)
    np.testing.assert_array_equal(store.column("tar", 10, 40), want[10:40])
    np.testing.assert_array_equal(store.columns_at(["tar"], [69, 3])["tar"], want[[69, 3]])


def test_open_store_shows_units_committed_since(unfinished):
    store = ProjectionStore(unfinished.path)
    assert 40 in store.missing()
    unfinished.commit(2)
    assert store.missing().tolist() == list(range(64, 70))
    np.testing.assert_array_equal(store.rows([40]), unfinished.decoded()[[40]])


def test_merge_between_two_reads_shows_no_row_as_merged_and_empty(unfinished):
    store = ProjectionStore(unfinished.path)
    store.rows([0])  # maps the columns of the first merge
    unfinished.commit(2)
    for unit in (0, 3):
        (unfinished.path / record_name(unit)).touch()
    unfinished.merge([0, 1, 2, 3])
    store._maps.drop([("status", 0)])  # as when other files pushed it out
    np.testing.assert_array_equal(store.rows([40]), unfinished.decoded()[[40]])


def test_unit_without_shard_is_not_missing_and_reads_as_nan(tmp_path):
    output = Output(tmp_path)
    output.commit(0, with_shard=False)
    path = tmp_path / record_name(0)
    record = decode_record(path.read_bytes())
    record.columns["status"] = np.full(16, STATUS["not_selected"], np.uint8)
    path.write_bytes(encode_record(record))
    store = ProjectionStore(tmp_path)
    assert np.isnan(store.rows(range(16))).all()
    assert np.isnan(store.rows([3, 1])).all()
    assert store.status_counts()["not_selected"] == 16


def test_lost_shard_of_recorded_rows_is_an_error(tmp_path):
    output = Output(tmp_path).fill()
    (tmp_path / output.layout.shard_name(2)).unlink()
    store = ProjectionStore(tmp_path)
    for ids in ([33, 32], range(70)):
        with pytest.raises(StoreError, match=r"recorded as ok but their shard .*c\.2\.0 is gone"):
            store.rows(ids)
    assert np.isnan(store.rows([33], missing="nan")).all()


@pytest.mark.parametrize("damage", ["truncated", "empty", "index", "offsets"])
def test_damaged_shard_is_named(tmp_path, damage):
    output = Output(tmp_path).fill()
    path = tmp_path / output.layout.shard_name(1)
    data = path.read_bytes()
    flipped = data[:-10] + bytes([data[-10] ^ 1]) + data[-9:]
    path.write_bytes(
        {"truncated": data[:20], "empty": b"", "index": flipped, "offsets": data[50:]}[damage]
    )
    with pytest.raises(StoreError, match=r"c\.1\.0 is damaged: [^`]*`python -m gradproj verify`"):
        ProjectionStore(tmp_path).rows([16])


def test_damaged_shard_of_a_compressed_store_is_an_error(tmp_path):
    output = Output(
        tmp_path, config=StoreConfig(encoding="dense", compressor="zstd", rows_per_shard=16)
    ).fill()
    path = tmp_path / output.layout.shard_name(1)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="cannot decode rows of"):
        ProjectionStore(tmp_path).rows([16])


def test_damaged_column_or_record_is_named(unfinished):
    column = unfinished.store_path / "status" / "c.0"
    whole = column.read_bytes()
    column.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"status/c\.0 is damaged: it has 79 bytes"):
        ProjectionStore(unfinished.path).rows([0])
    column.write_bytes(whole)
    record = unfinished.path / record_name(1)
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"00000001\.safetensors is damaged"):
        ProjectionStore(unfinished.path).rows([20])


def test_record_of_another_unit_is_refused(unfinished):
    shutil.copy(unfinished.path / record_name(1), unfinished.path / record_name(2))
    with pytest.raises(
        StoreError, match=r"00000002\.safetensors is not of this store: it is of unit 1"
    ):
        ProjectionStore(unfinished.path).rows([40])


def test_record_of_other_settings_is_refused_even_if_its_shape_fits(unfinished):
    update_attributes(unfinished.store_path, {"identity_hash": "identity"})
    assert len(ProjectionStore(unfinished.path).rows([20])) == 1
    path = unfinished.path / record_name(1)
    path.write_bytes(encode_record(replace(decode_record(path.read_bytes()), identity="other")))
    store = ProjectionStore(unfinished.path)
    for read in (store.rows, store.samples, lambda ids: store.column("loss", 16, 17)):
        with pytest.raises(
            StoreError, match=r"made with other settings \(other, .* identity\)\. .*verify --repair"
        ):
            read([20])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": None}, "zarr.json is damaged"),
        ({"encoding": {"name": "int3", "header_bytes": 4}}, "the encoding 'int3' is unknown"),
        ({"encoding": {"name": "signs", "header_bytes": 2}}, "a header of 2 bytes holds no 2"),
        ({"encoding": {"name": "int2", "header_bytes": 4}}, r"layer h\.0\.mlp is at .* not at"),
        ({"layers": []}, "zarr.json is damaged"),
    ],
)
def test_packed_store_whose_attributes_do_not_fit_its_rows_is_refused(tmp_path, changes, message):
    output = Output(tmp_path, widths=((3, 5), (1, 7)), config=packed("signs"))
    update_attributes(output.store_path, changes)
    with pytest.raises(StoreError, match=message):
        ProjectionStore(output.path)


def test_path_without_a_readable_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        ProjectionStore(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"is not a gradproj store.*--output_dir"):
        ProjectionStore(tmp_path)
    zarr.create_group(str(tmp_path / "other"))
    with pytest.raises(StoreError, match="no format_version or layers"):
        ProjectionStore(tmp_path / "other")
    output = Output(tmp_path / "output")
    update_attributes(output.store_path, {"format_version": 3})
    with pytest.raises(StoreError, match=r"has format 3, newer than the 2 .* update gradproj"):
        ProjectionStore(output.path)
    update_attributes(output.store_path, {"format_version": 2})
    (output.store_path / "loss" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="damaged or not a gradproj store"):
        ProjectionStore(output.path)
    metadata = json.loads((output.store_path / "projections" / "zarr.json").read_text())
    (output.store_path / "loss" / "zarr.json").write_text("{}")
    (output.store_path / "projections" / "zarr.json").write_text(
        json.dumps(metadata | {"data_type": "int8"})
    )
    with pytest.raises(StoreError, match="is not a sharded array of float16, bfloat16, float32"):
        ProjectionStore(output.path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: store.rows([3, 70]), "sample 70 is out of range: .* has samples 0 to 69"),
        (lambda store: store.rows([-1]), "sample -1 is out of range"),
        (lambda store: store.rows([0], missing="zero"), "missing is 'zero'; choose"),
        (lambda store: store.rows([0.5]), "must be a list of integers, got float64"),
        (lambda store: store.rows([[1]]), "must be a list of integers"),
        (
            lambda store: store.rows([0], ["h.9"]),
            r"has no layer 'h\.9'; it has h\.0\.mlp, h\.1\.mlp",
        ),
        (lambda store: store.layer("h.9"), r"has no layer 'h\.9'"),
        (
            lambda store: store.samples([0], text=True),
            r"does not record where its documents are .*read_text=",
        ),
        (lambda store: list(store.scan(stop=71)), "samples 0 to 71 are out of range"),
        (lambda store: store.array("sums"), "has no array 'sums'"),
    ],
)
def test_invalid_arguments_are_refused_with_the_way_out(tmp_path, call, message):
    output = Output(tmp_path)
    with pytest.raises(StoreError, match=message):
        call(ProjectionStore(output.path))
