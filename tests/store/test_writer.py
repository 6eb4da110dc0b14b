"""The writer: any Zarr v3 reader sees the rows, and one process publishes each file."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorstore
import zarr
from helpers.encoding import encode_rows
from helpers.stores import Output, make_rows, packed

from gradproj.storage.publish import FilePublisher
from gradproj.store.bfloat16 import bfloat16_to_float32
from gradproj.store.layout import COLUMNS, PACKED_BITS, StoreConfig, empty_columns, plan_layout
from gradproj.store.writer import (
    StoreExists,
    create_store,
    pack_matrices,
    shard_chunks,
    update_attributes,
    write_array,
    write_column_block,
)

DTYPES = ["float16", "bfloat16", "float32"]
COMPRESSORS = ["none", "blosc", "zstd"]
# name -> (samples, widths of layers, rows per shard)
SHAPES = {
    "ragged last shard": (70, ((2, 3), (2, 3)), 16),
    "odd widths": (40, ((3, 5), (1, 7)), 16),
    "one row per shard": (3, ((2, 2),), 1),
    "one sample": (1, ((8, 8), (8, 8)), 16),
    "several chunk rows per shard": (1_500, ((2, 2), (2, 2)), 1_024),
}


def from_tensorstore(store_path, name: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store_path}/{name}"}}
    array = tensorstore.open(spec, open=True).result()
    if name == "projections" and array.dtype.name == "bfloat16":
        return array.read().result().astype(np.float32)
    return array.read().result()


def from_zarr(store_path, name: str) -> np.ndarray:
    return zarr.open_group(str(store_path), mode="r")[name][...]


def as_float(stored: np.ndarray, proj_dtype: str) -> np.ndarray:
    return bfloat16_to_float32(stored) if proj_dtype == "bfloat16" else stored.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("proj_dtype", DTYPES)
def test_zarr_and_tensorstore_read_the_written_rows(tmp_path, proj_dtype, compressor, shape):
    n_samples, widths, rows_per_shard = SHAPES[shape]
    config = StoreConfig(
        encoding="dense",
        proj_dtype=proj_dtype,
        compressor=compressor,
        rows_per_shard=rows_per_shard,
    )
    output = Output(tmp_path, n_samples, widths, config).fill()
    want = as_float(output.stored, proj_dtype)
    in_zarr = from_zarr(output.store_path, "projections")
    np.testing.assert_array_equal(as_float(in_zarr, proj_dtype), want)
    np.testing.assert_array_equal(
        from_tensorstore(output.store_path, "projections").astype(np.float32), want
    )
    row_scale = from_zarr(output.store_path, "row_scale")
    np.testing.assert_array_equal(row_scale, output.row_scale)
    np.testing.assert_allclose(want * row_scale[:, None], output.rows, rtol=2**-8)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("encoding", PACKED_BITS)
def test_zarr_and_tensorstore_read_packed_rows_and_255_where_none_is(
    tmp_path, encoding, compressor
):
    config = packed(encoding, 32, compressor=compressor)
    output = Output(tmp_path, 70, ((3, 5), (1, 7)), config)
    output.commit(0)
    output.commit(2)  # of six rows
    want = output.stored.copy()
    want[32:64] = 255
    np.testing.assert_array_equal(from_zarr(output.store_path, "projections"), want)
    np.testing.assert_array_equal(from_tensorstore(output.store_path, "projections"), want)
    if compressor == "none":
        data = (output.path / output.layout.shard_name(2)).read_bytes()
        rows = np.frombuffer(data, np.uint8, 32 * want.shape[1]).reshape(32, -1)
        assert (rows[6:] == 255).all()


@pytest.mark.parametrize("name", list(COLUMNS))
def test_zarr_and_tensorstore_read_the_written_columns(tmp_path, name):
    output = Output(tmp_path).fill()
    got = from_zarr(output.store_path, name)
    assert got.dtype == COLUMNS[name][0]
    np.testing.assert_array_equal(got, from_tensorstore(output.store_path, name))
    assert len(np.unique(got, axis=0)) == {
        "status": 1,
        "domain": 3,
        "tar": 10,
        "row_scale": len(np.unique(got)),
    }.get(name, 70)


@pytest.mark.parametrize("proj_dtype", DTYPES)
def test_unwritten_rows_read_as_nan(tmp_path, proj_dtype):
    output = Output(
        tmp_path, config=StoreConfig(encoding="dense", proj_dtype=proj_dtype, rows_per_shard=16)
    )
    output.commit(2)
    want = np.full(output.rows.shape, np.nan, np.float32)
    want[32:48] = as_float(output.stored[32:48], proj_dtype)
    np.testing.assert_array_equal(
        as_float(from_zarr(output.store_path, "projections"), proj_dtype), want
    )
    np.testing.assert_array_equal(
        from_tensorstore(output.store_path, "projections").astype(np.float32), want
    )
    assert np.isnan(from_zarr(output.store_path, "row_scale")).all()
    assert (from_zarr(output.store_path, "status") == 0).all()


def test_zarr_alone_reads_float16_and_tensorstore_reads_bfloat16(tmp_path):
    half = Output(tmp_path / "half").fill()
    plain = """if True:
        import sys, numpy, zarr
        group = zarr.open_group(sys.argv[1], mode="r")
        assert len(list(group.arrays())) == 10
        rows = group["projections"][5:9].astype("f4") * group["row_scale"][5:9][:, None]
        numpy.save(sys.argv[2], rows)
        assert not any(name.startswith("gradproj") for name in sys.modules)"""
    subprocess.run(
        [sys.executable, "-c", plain, half.store_path, tmp_path / "rows.npy"],
        check=True,
        cwd=tmp_path,
    )
    want = half.rows[5:9]
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), want, rtol=2**-11)
    brain = Output(
        tmp_path / "brain", config=StoreConfig(encoding="dense", proj_dtype="bfloat16")
    ).fill()
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{brain.store_path}/projections"},
    }
    assert tensorstore.open(spec).result().dtype.name == "bfloat16"
    assert np.dtype(zarr.open_array(f"{brain.store_path}/projections").dtype) == np.uint16


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_short_shard_leaves_out_empty_chunks(compressor):
    layout = plan_layout(
        2_000, [4, 4], 1, StoreConfig(encoding="dense", rows_per_shard=1_024, compressor=compressor)
    )
    stored, _ = encode_rows(make_rows(100, 8), "float16")
    data = b"".join(map(bytes, shard_chunks(stored, layout)))
    index = np.frombuffer(data[-4 - 2 * 2 * 16 : -4], "<u8").reshape(2, 2, 2)
    assert (index[1] == 2**64 - 1).all()
    assert index[0, :, 1].sum() == len(data) - 4 - 2 * 2 * 16
    assert b"".join(map(bytes, shard_chunks(stored[:0], layout)))[:-4] == b"\xff" * 64


@pytest.mark.parametrize("proj_dtype", DTYPES)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_rows_beyond_a_short_shard_read_as_nan(tmp_path, proj_dtype, compressor):
    output = Output(
        tmp_path,
        config=StoreConfig(
            encoding="dense", proj_dtype=proj_dtype, compressor=compressor, rows_per_shard=16
        ),
    )
    chunks = shard_chunks(output.stored[:10], output.layout)
    (tmp_path / output.layout.shard_name(0)).write_bytes(b"".join(map(bytes, chunks)))
    got = as_float(from_zarr(output.store_path, "projections"), proj_dtype)
    assert np.isnan(got[10:]).all()
    np.testing.assert_array_equal(got[:10], as_float(output.stored[:10], proj_dtype))


def test_shard_of_wrong_shape_or_type_is_refused():
    layout = plan_layout(100, [4], 1, StoreConfig(encoding="dense", rows_per_shard=16))
    for wrong in (
        np.zeros((17, 4), np.float16),
        np.zeros((16, 5), np.float16),
        np.zeros((16, 4), np.float32),
    ):
        with pytest.raises(ValueError, match="is no shard of"):
            list(shard_chunks(wrong, layout))


# --- creating and changing a store


def test_one_of_many_concurrent_creators_wins(tmp_path):
    layout = plan_layout(20, [4], 1, StoreConfig(encoding="dense"))
    barrier, outcomes = threading.Barrier(6), []

    def create():
        barrier.wait()
        try:
            create_store(
                tmp_path / "projections.zarr", layout, {"layers": []}, np.zeros(3, np.float32)
            )
            outcomes.append("made")
        except StoreExists as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("made") == 1
    assert sum("exists already" in outcome for outcome in outcomes) == 5
    assert os.listdir(tmp_path) == ["projections.zarr"]


def test_creator_that_loses_at_the_last_moment_leaves_the_winners_store(tmp_path, monkeypatch):
    layout = plan_layout(20, [4], 1, StoreConfig(encoding="dense"))
    path = tmp_path / "projections.zarr"
    monkeypatch.setattr("os.path.lexists", lambda _: False)
    create_store(path, layout, {"layers": [], "winner": 1}, np.zeros(3, np.float32))
    with pytest.raises(StoreExists, match="another process has just made it"):
        create_store(path, layout, {"layers": [], "winner": 2}, np.zeros(3, np.float32))
    assert zarr.open_group(str(path), mode="r").attrs["winner"] == 1
    assert os.listdir(tmp_path) == ["projections.zarr"]


def test_attributes_with_nan_are_refused_before_anything_is_made(tmp_path):
    layout = plan_layout(20, [4], 1, StoreConfig(encoding="dense"))
    with pytest.raises(ValueError, match="JSON"):
        create_store(tmp_path / "s", layout, {"loss": float("nan")}, np.zeros(0, np.float32))
    assert os.listdir(tmp_path) == []


def test_updating_one_attribute_keeps_others_and_arrays(tmp_path):
    output = Output(tmp_path).fill()
    before = from_zarr(output.store_path, "projections")
    update_attributes(output.store_path, {"complete": True, "note": "changed"})
    attributes = zarr.open_group(str(output.store_path), mode="r").attrs.asdict()
    assert attributes["complete"] is True
    assert attributes["note"] == "changed"
    assert attributes["format_version"] == 2
    assert len(attributes["layers"]) == 2
    np.testing.assert_array_equal(from_zarr(output.store_path, "projections"), before)
    with pytest.raises(ValueError, match="JSON"):
        update_attributes(output.store_path, {"x": float("inf")})
    assert (
        json.loads((output.store_path / "zarr.json").read_text())["attributes"]["note"] == "changed"
    )


def test_matrices_are_packed_in_layer_order_and_their_shapes_checked(tmp_path):
    output = Output(tmp_path)
    want = np.concatenate(
        [m.ravel() for layer in output.layers for m in output.matrices[layer.name]]
    )
    np.testing.assert_array_equal(from_zarr(output.store_path, "projection_matrices"), want)
    swapped = {name: (p_o, p_i) for name, (p_i, p_o) in output.matrices.items()}
    with pytest.raises(ValueError, match=r"projection_matrices of h\.0\.mlp"):
        pack_matrices(output.layers, swapped)


def test_store_without_matrices_can_be_created(tmp_path):
    create_store(
        tmp_path / "s",
        plan_layout(3, [4], 1, StoreConfig(encoding="dense")),
        {},
        np.empty(0, np.float32),
    )
    assert from_zarr(tmp_path / "s", "projection_matrices").shape == (0,)


def test_small_array_is_added_and_replaced(tmp_path):
    output = Output(tmp_path)
    for size in (5, 12, 0):
        values = np.arange(size, dtype=np.float64)
        write_array(output.store_path, "sums", values)
        np.testing.assert_array_equal(from_zarr(output.store_path, "sums"), values)
    assert sorted(os.listdir(tmp_path)) == ["projections.zarr", "units"]


def test_writing_a_column_block_keeps_others_and_writes_status_last(tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.store.layout._COLUMN_ROWS", 32)
    output = Output(tmp_path)
    assert output.layout.n_column_blocks == 3
    output.fill()
    written = []

    class Recorded(FilePublisher):
        def replace(self, final, chunks, mode=None):
            written.append(final.parent.name)
            super().replace(final, chunks, mode)

    columns = empty_columns(32, 8)
    columns["status"][:] = 7
    write_column_block(output.store_path, output.layout, 1, columns, Recorded())
    assert written[-1] == "status"
    assert sorted(written) == sorted(COLUMNS)
    assert from_zarr(output.store_path, "status").tolist() == [1] * 32 + [7] * 32 + [1] * 6
    tars = from_zarr(output.store_path, "tar")
    assert (tars[32:64] == -1).all()
    np.testing.assert_array_equal(tars[64:], np.arange(64, 70) // 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nonsense": np.zeros(70)}, "no such columns"),
        ({"loss": np.zeros(69, np.float32)}, "column loss of block 0"),
        ({"loss": np.zeros(70, np.float64)}, "column loss of block 0"),
        ({"key": np.zeros((70, 9), np.uint8)}, "column key of block 0"),
    ],
)
def test_column_of_wrong_shape_or_type_is_refused(tmp_path, wrong, message):
    output = Output(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_column_block(output.store_path, output.layout, 0, wrong)
