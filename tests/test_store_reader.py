"""Laws of ``ProjectionStore``: the rows that went in, in any order, from any writer, finished or not."""

import json
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
import zarr
from store_cases import DOMAINS, Output

from gradproj.errors import StoreError
from gradproj.store import ProjectionStore, StoreConfig, StoreLayout
from gradproj.store.encoding import decode_rows
from gradproj.store.files import crc32c
from gradproj.store.layout import STATUS
from gradproj.store.records import decode_record, encode_record, record_name
from gradproj.store.writer import create_store, update_attributes

CASES = {
    "mapped": {},
    "bfloat16": {"config": StoreConfig(proj_dtype="bfloat16", rows_per_shard=16)},
    "float32": {"config": StoreConfig(proj_dtype="float32", rows_per_shard=16)},
    "blosc": {"config": StoreConfig(compressor="blosc", rows_per_shard=16)},
    "zstd bfloat16": {"config": StoreConfig(compressor="zstd", proj_dtype="bfloat16", rows_per_shard=16)},
    "odd widths": {"widths": ((3, 5), (1, 7), (4, 1)), "n_samples": 50},
    "whole chunks of a layer's part": {"widths": ((8, 8), (16, 8), (8, 24)), "n_samples": 50},
    "one row a shard": {"config": StoreConfig(rows_per_shard=1), "n_samples": 9},
    "one sample": {"n_samples": 1},
    "many chunks a shard": {
        "n_samples": 150,
        "layout": StoreLayout(150, 12, 64, 16, 6, "float16", "none", 8, 128),
    },
}


@pytest.fixture(scope="module", params=CASES)
def filled(request, tmp_path_factory):
    return Output(tmp_path_factory.mktemp("output"), **CASES[request.param]).fill()


def decoded(output: Output) -> np.ndarray:
    """What every reading has to give: the stored rows by the definition."""
    return decode_rows(output.stored, output.row_scale, output.layout.proj_dtype)


def test_rows_of_any_ids_come_in_the_order_asked_for(filled):
    n = filled.layout.n_samples
    with ProjectionStore(filled.path) as store:
        assert len(store) == n
        assert store.dim == filled.layout.dim
        for ids in (
            np.random.default_rng(0).integers(0, n, 200),
            np.arange(n),
            np.arange(n)[::-1],
            [0],
            [],
            [n - 1, 0],
        ):
            got = store.rows(ids)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, decoded(filled)[np.asarray(ids, int)])


def test_rows_are_what_plain_zarr_and_the_scale_give(filled):
    group = zarr.open_group(str(filled.store_path), mode="r")
    want = decode_rows(group["projections"][...], group["row_scale"][...], filled.layout.proj_dtype)
    np.testing.assert_array_equal(ProjectionStore(filled.store_path).rows(range(len(want))), want)


@pytest.mark.parametrize("rows_per_block", [None, 1, 7, 40, 1_000])
def test_a_scan_gives_every_row_once_in_order(filled, rows_per_block):
    blocks = list(ProjectionStore(filled.path).scan(rows_per_block))
    np.testing.assert_array_equal(
        np.concatenate([ids for ids, _ in blocks]), np.arange(filled.layout.n_samples)
    )
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), decoded(filled))
    assert rows_per_block is None or max(len(ids) for ids, _ in blocks) <= rows_per_block


def test_chosen_layers_stand_one_after_the_other(filled):
    store = ProjectionStore(filled.path)
    chosen = [layer.name for layer in filled.layers[::-1]]
    want = np.concatenate(
        [decoded(filled)[:, x.slice_start : x.slice_end] for x in filled.layers[::-1]], axis=1
    )
    n = filled.layout.n_samples
    ids = np.random.default_rng(1).permutation(n)
    np.testing.assert_array_equal(store.rows(ids, chosen), want[ids])
    np.testing.assert_array_equal(store.rows(range(n), chosen), want)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(9, chosen)]), want)


def test_a_layer_is_an_array_of_k_o_by_k_i(filled):
    store = ProjectionStore(filled.path)
    n = filled.layout.n_samples
    for layer in filled.layers:
        want = decoded(filled)[:, layer.slice_start : layer.slice_end].reshape(n, layer.k_o, layer.k_i)
        view = store.layer(layer.name)
        assert view.shape == want.shape
        assert len(view) == n
        np.testing.assert_array_equal(view[:], want)
        np.testing.assert_array_equal(view[n - 1 : 0 : -2], want[n - 1 : 0 : -2])
        np.testing.assert_array_equal(view[[0, n - 1, 0]], want[[0, n - 1, 0]])
        np.testing.assert_array_equal(view[-1], want[-1])
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in view.scan(7)]), want)
        with pytest.raises(IndexError):
            view[n]


def test_a_scan_of_a_part_starts_and_stops_there(filled):
    n = filled.layout.n_samples
    start, stop = n // 3, n - n // 4
    blocks = list(ProjectionStore(filled.path).scan(5, start=start, stop=stop))
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in blocks]), np.arange(start, stop))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), decoded(filled)[start:stop])
    assert list(ProjectionStore(filled.path).scan(start=n, stop=n)) == []


@pytest.mark.parametrize("write_empty", [True, False])
@pytest.mark.parametrize("index_location", ["end", "start"])
def test_shards_that_zarr_python_wrote_in_its_own_order_are_read(tmp_path, write_empty, index_location):
    output = Output(tmp_path, **CASES["many chunks a shard"]).fill()
    shutil.rmtree(output.store_path / "projections")
    array = zarr.create_array(
        str(output.store_path / "projections"),
        shape=output.rows.shape,
        dtype="float16",
        chunks=(64, 12),
        fill_value=float("nan"),
        compressors=None,
        config={"write_empty_chunks": write_empty},
        serializer=zarr.codecs.ShardingCodec(
            chunk_shape=(16, 6), codecs=[zarr.codecs.BytesCodec()], index_location=index_location
        ),
    )
    stored = output.stored.copy()
    stored[16:32, :6] = np.nan  # an inner chunk that a writer may leave out
    array[...] = stored
    want = decode_rows(stored, output.row_scale, "float16")
    store = ProjectionStore(tmp_path)
    ids = np.random.default_rng(0).permutation(len(want))
    np.testing.assert_array_equal(store.rows(ids), want[ids])
    np.testing.assert_array_equal(store.rows(ids, ["h.1.mlp"]), want[ids, 6:])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(50)]), want)


def test_a_shard_whose_chunks_lie_at_odd_places_is_still_read(tmp_path):
    output = Output(tmp_path, **CASES["many chunks a shard"]).fill()
    path = output.path / output.layout.shard_name(0)
    data = path.read_bytes()
    index = np.frombuffer(data[-4 - 8 * 16 : -4], "<u8").reshape(8, 2).copy()
    index[1:, 0] += 2  # a gap after the first chunk
    moved = index.tobytes()
    chunk = int(index[0, 1])
    path.write_bytes(
        data[:chunk] + b"\0\0" + data[chunk : -4 - 8 * 16] + moved + crc32c(moved).to_bytes(4, "little")
    )
    np.testing.assert_array_equal(ProjectionStore(tmp_path).rows(range(150)), decoded(output))


# --- unfinished stores


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


def test_records_stand_in_for_what_is_not_merged_yet(unfinished):
    store = ProjectionStore(unfinished.path)
    there = np.setdiff1d(np.arange(70), MISSING)
    np.testing.assert_array_equal(store.rows(there), decoded(unfinished)[there])
    want = decoded(unfinished)
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
        StoreError, match=r"22 of the samples asked for are missing from .*: 32, 33, .*, \.\.\.\. Let"
    ):
        store.rows(range(70))
    with pytest.raises(
        StoreError, match=r"1 of the samples asked for are missing from .*: 40\. Let the job finish"
    ):
        store.rows([0, 40, 1])


def test_missing_runs_join_across_column_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.store.reader._STATUS_ROWS", 7)
    store = ProjectionStore(Output(tmp_path).path)
    assert store.missing_ranges() == [(0, 70)]
    assert store.missing().tolist() == list(range(70))


def test_samples_tell_what_is_known_of_each(unfinished):
    store = ProjectionStore(unfinished.path, read_text=lambda sample_id: f"text {sample_id}")
    assert store.domains == DOMAINS
    merged, recorded, missing = store.samples([48, 17, 33], text=True)
    assert (merged.sample_id, merged.key, merged.domain, merged.status) == (48, "é48", None, "ok")
    assert (recorded.sample_id, recorded.key, recorded.domain, recorded.tar) == (17, "é17", "Github", 2)
    assert (recorded.loss, recorded.n_tokens, recorded.grad_norm) == (17 / 8, 18, 17 / 4)
    assert recorded.text == "text 17"
    assert (missing.status, missing.key, missing.domain, missing.tar) == ("missing", "", None, -1)
    assert store.samples([48])[0].text is None


def test_columns_are_read_in_parts(unfinished):
    store = ProjectionStore(unfinished.path)
    want = np.where(np.isin(np.arange(70), MISSING), -1, np.arange(70) // 7)
    np.testing.assert_array_equal(store.column("tar"), want)
    np.testing.assert_array_equal(store.column("tar", 10, 40), want[10:40])
    np.testing.assert_array_equal(store.columns_at(["tar"], [69, 3])["tar"], want[[69, 3]])


def test_a_store_seen_while_it_grows_shows_what_was_committed_since(unfinished):
    store = ProjectionStore(unfinished.path)
    assert 40 in store.missing()
    unfinished.commit(2)
    assert store.missing().tolist() == list(range(64, 70))
    np.testing.assert_array_equal(store.rows([40]), decoded(unfinished)[[40]])


def test_a_unit_without_stored_rows_is_not_missing_and_reads_nan(tmp_path):
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


# --- what is wrong with a store


def test_a_lost_shard_of_recorded_rows_is_an_error(tmp_path):
    output = Output(tmp_path).fill()
    (tmp_path / output.layout.shard_name(2)).unlink()
    store = ProjectionStore(tmp_path)
    for ids in ([33, 32], range(70)):
        with pytest.raises(StoreError, match=r"recorded as ok but their shard .*c\.2\.0 is gone"):
            store.rows(ids)
    assert np.isnan(store.rows([33], missing="nan")).all()


@pytest.mark.parametrize("damage", ["truncated", "empty", "index", "offsets"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    output = Output(tmp_path).fill()
    path = tmp_path / output.layout.shard_name(1)
    data = path.read_bytes()
    flipped = data[:-10] + bytes([data[-10] ^ 1]) + data[-9:]
    path.write_bytes({"truncated": data[:20], "empty": b"", "index": flipped, "offsets": data[50:]}[damage])
    with pytest.raises(StoreError, match=r"c\.1\.0 is damaged: [^`]*`python -m gradproj verify`"):
        ProjectionStore(tmp_path).rows([16])


def test_a_damaged_shard_of_a_compressed_store_is_an_error(tmp_path):
    output = Output(tmp_path, config=StoreConfig(compressor="zstd", rows_per_shard=16)).fill()
    path = tmp_path / output.layout.shard_name(1)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="cannot decode rows of"):
        ProjectionStore(tmp_path).rows([16])


def test_a_damaged_column_or_record_is_named(unfinished):
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


def test_a_record_of_another_store_is_refused(unfinished):
    shutil.copy(unfinished.path / record_name(1), unfinished.path / record_name(2))
    with pytest.raises(StoreError, match=r"00000002\.safetensors is not of this store: it is of unit 1"):
        ProjectionStore(unfinished.path).rows([40])


def test_what_is_not_a_store_is_told_apart(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        ProjectionStore(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"is not a gradproj store.*--output_dir"):
        ProjectionStore(tmp_path)
    zarr.create_group(str(tmp_path / "other"))
    with pytest.raises(StoreError, match="no format_version or layers"):
        ProjectionStore(tmp_path / "other")
    output = Output(tmp_path / "output")
    update_attributes(output.store_path, {"format_version": 2})
    with pytest.raises(StoreError, match=r"has format 2, newer than the 1 .* update gradproj"):
        ProjectionStore(output.path)
    update_attributes(output.store_path, {"format_version": 1})
    (output.store_path / "loss" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="damaged or not a gradproj store"):
        ProjectionStore(output.path)
    metadata = json.loads((output.store_path / "projections" / "zarr.json").read_text())
    (output.store_path / "loss" / "zarr.json").write_text("{}")
    (output.store_path / "projections" / "zarr.json").write_text(json.dumps(metadata | {"data_type": "int8"}))
    with pytest.raises(StoreError, match="is not a sharded array of float16, bfloat16, float32"):
        ProjectionStore(output.path)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda store: store.rows([3, 70]), "sample 70 is out of range: .* has samples 0 to 69"),
        (lambda store: store.rows([-1]), "sample -1 is out of range"),
        (lambda store: store.rows([0.5]), "must be a list of whole numbers, got float64"),
        (lambda store: store.rows([[1]]), "must be a list of whole numbers"),
        (lambda store: store.rows([0], ["h.9"]), r"has no layer 'h\.9'; it has h\.0\.mlp, h\.1\.mlp"),
        (lambda store: store.layer("h.9"), r"has no layer 'h\.9'"),
        (lambda store: store.samples([0], text=True), r"keeps no texts: open it with .*read_text="),
        (lambda store: list(store.scan(stop=71)), "samples 0 to 71 are out of range"),
        (lambda store: store.array("sums"), "has no array 'sums'"),
    ],
)
def test_a_wrong_question_is_answered_with_the_way_out(tmp_path, ask, message):
    output = Output(tmp_path)
    with pytest.raises(StoreError, match=message):
        ask(ProjectionStore(output.path))


# --- the rest


def test_matrices_come_back_by_layer(tmp_path):
    output = Output(tmp_path, widths=((2, 3), (3, 2)))
    matrices = ProjectionStore(tmp_path).projection_matrices
    assert list(matrices) == [layer.name for layer in output.layers]
    for name, (p_i, p_o) in output.matrices.items():
        np.testing.assert_array_equal(matrices[name][0], p_i)
        np.testing.assert_array_equal(matrices[name][1], p_o)


def test_layers_and_attributes_are_those_of_the_job(tmp_path):
    output = Output(tmp_path)
    store = ProjectionStore(tmp_path)
    assert store.layers == output.layers
    assert store.attributes["note"] == "kept"
    assert store.layout == output.layout


def test_few_files_stay_mapped_and_closing_lets_go_of_them(tmp_path):
    output = Output(tmp_path, n_samples=200, config=StoreConfig(rows_per_shard=1)).fill()
    store = ProjectionStore(tmp_path)
    for _ in range(2):
        np.testing.assert_array_equal(store.rows(range(200)), decoded(output))
        assert len(store._maps) == 64
        store.close()
        assert len(store._maps) == 0


def test_a_store_goes_to_a_worker_process_by_its_path(tmp_path):
    output = Output(tmp_path).fill()
    store = ProjectionStore(tmp_path)
    store.rows([1, 2])
    sent = pickle.dumps(store)
    assert len(sent) < 1_000
    np.testing.assert_array_equal(pickle.loads(sent).rows([5]), decoded(output)[[5]])


def test_a_scan_needs_memory_for_its_blocks_only(tmp_path):
    output = Output(
        tmp_path, n_samples=4_096, widths=((16, 16),), config=StoreConfig(rows_per_shard=512)
    ).fill()
    store = ProjectionStore(tmp_path)
    tracemalloc.start()
    for _ in store.scan(128):
        pass
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    block_bytes = 128 * 256 * 4
    assert peak_bytes < 5 * block_bytes < output.rows.nbytes / 2


def test_a_columns_reader_never_loads_a_whole_column(tmp_path):
    n_samples = 50_000_000
    layout = StoreLayout(n_samples, 4, 2**20, 512, 4, "float16", "none", 4, 2**20)
    create_store(tmp_path / "projections.zarr", layout, {"layers": []}, np.empty(0, np.float32))
    store = ProjectionStore(tmp_path)
    tracemalloc.start()
    assert store.samples([49_999_999])[0].status == "missing"
    assert np.isnan(store.rows([3, 40_000_000], missing="nan")).all()
    assert store.missing_ranges() == [(0, n_samples)]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < n_samples / 2
