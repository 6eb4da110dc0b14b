"""Unfinished or damaged stores: what exists is read, what does not is named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from helpers.stores import Output, make_unfinished, packed

from gradproj.errors import StoreError
from gradproj.store import ProjectionStore
from gradproj.store.unit_record import decode_record, encode_record, record_name
from gradproj.store.writer import update_attributes


@pytest.fixture
def unfinished(tmp_path):
    return make_unfinished(tmp_path)


def test_missing_ranges_join_across_blocks_of_status(tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.store.reader._STATUS_ROWS", 7)
    store = ProjectionStore(Output(tmp_path).path)
    assert store.missing_ranges() == [(0, 70)]
    assert store.missing().tolist() == list(range(70))


def test_merge_between_two_reads_shows_no_row_as_merged_and_empty(unfinished):
    store = ProjectionStore(unfinished.path)
    store.rows([0])  # maps the columns of the first merge
    unfinished.commit(2)
    for unit in (0, 3):
        (unfinished.path / record_name(unit)).touch()
    unfinished.merge([0, 1, 2, 3])
    store._maps.drop([("status", 0)])  # as when other files pushed it out
    np.testing.assert_array_equal(store.rows([40]), unfinished.decoded()[[40]])


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
