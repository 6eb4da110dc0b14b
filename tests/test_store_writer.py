"""Laws of the writer: any Zarr v3 reader sees the rows, encoding is exact to undo, publishing has one winner."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorstore
import zarr
from store_cases import Output, make_rows

from gradproj.errors import StoreError
from gradproj.store import StoreConfig, StoreExists, plan_layout
from gradproj.store import files as store_files
from gradproj.store.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from gradproj.store.encoding import decode_rows, encode_rows
from gradproj.store.files import (
    explain_os_errors,
    file_sum,
    publish_exclusively,
    write_and_replace,
    write_file_durably,
)
from gradproj.store.layout import COLUMNS, empty_columns
from gradproj.store.writer import (
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
def test_zarr_and_tensorstore_read_what_was_written(tmp_path, proj_dtype, compressor, shape):
    n_samples, widths, rows_per_shard = SHAPES[shape]
    config = StoreConfig(proj_dtype=proj_dtype, compressor=compressor, rows_per_shard=rows_per_shard)
    output = Output(tmp_path, n_samples, widths, config).fill()
    want = as_float(output.stored, proj_dtype)
    in_zarr = from_zarr(output.store_path, "projections")
    np.testing.assert_array_equal(as_float(in_zarr, proj_dtype), want)
    np.testing.assert_array_equal(from_tensorstore(output.store_path, "projections").astype(np.float32), want)
    row_scale = from_zarr(output.store_path, "row_scale")
    np.testing.assert_array_equal(row_scale, output.row_scale)
    np.testing.assert_allclose(want * row_scale[:, None], output.rows, rtol=2**-8)


@pytest.mark.parametrize("name", list(COLUMNS))
def test_columns_read_the_same_in_zarr_and_tensorstore(tmp_path, name):
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
def test_what_is_not_written_reads_as_nan_and_never_as_a_number(tmp_path, proj_dtype):
    output = Output(tmp_path, config=StoreConfig(proj_dtype=proj_dtype, rows_per_shard=16))
    output.commit(2)
    want = np.full(output.rows.shape, np.nan, np.float32)
    want[32:48] = as_float(output.stored[32:48], proj_dtype)
    np.testing.assert_array_equal(as_float(from_zarr(output.store_path, "projections"), proj_dtype), want)
    np.testing.assert_array_equal(from_tensorstore(output.store_path, "projections").astype(np.float32), want)
    assert np.isnan(from_zarr(output.store_path, "row_scale")).all()
    assert (from_zarr(output.store_path, "status") == 0).all()


def test_a_float16_store_needs_nothing_of_gradproj_and_bfloat16_is_its_own_type_to_tensorstore(tmp_path):
    half = Output(tmp_path / "half").fill()
    plain = """if True:
        import sys, numpy, zarr
        group = zarr.open_group(sys.argv[1], mode="r")
        assert len(list(group.arrays())) == 10
        numpy.save(sys.argv[2], group["projections"][5:9].astype("f4") * group["row_scale"][5:9][:, None])
        assert not any(name.startswith("gradproj") for name in sys.modules)"""
    subprocess.run(
        [sys.executable, "-c", plain, half.store_path, tmp_path / "rows.npy"], check=True, cwd=tmp_path
    )
    want = half.rows[5:9]
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), want, rtol=2**-11)
    brain = Output(tmp_path / "brain", config=StoreConfig(proj_dtype="bfloat16")).fill()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{brain.store_path}/projections"}}
    assert tensorstore.open(spec).result().dtype.name == "bfloat16"
    assert np.dtype(zarr.open_array(f"{brain.store_path}/projections").dtype) == np.uint16


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_short_shard_leaves_out_chunks_that_would_hold_nothing(compressor):
    layout = plan_layout(2_000, [4, 4], 1, StoreConfig(rows_per_shard=1_024, compressor=compressor))
    stored, _ = encode_rows(make_rows(100, 8), "float16")
    data = b"".join(map(bytes, shard_chunks(stored, layout)))
    index = np.frombuffer(data[-4 - 2 * 2 * 16 : -4], "<u8").reshape(2, 2, 2)
    assert (index[1] == 2**64 - 1).all()
    assert index[0, :, 1].sum() == len(data) - 4 - 2 * 2 * 16
    assert b"".join(map(bytes, shard_chunks(stored[:0], layout)))[:-4] == b"\xff" * 64


def test_a_shard_of_the_wrong_shape_or_type_is_refused():
    layout = plan_layout(100, [4], 1, StoreConfig(rows_per_shard=16))
    for wrong in (
        np.zeros((17, 4), np.float16),
        np.zeros((16, 5), np.float16),
        np.zeros((16, 4), np.float32),
    ):
        with pytest.raises(ValueError, match="is no shard of"):
            list(shard_chunks(wrong, layout))


# --- encoding


def exact_power_of_two(values: np.ndarray) -> np.ndarray:
    return np.frexp(values)[0] == 0.5


@pytest.mark.parametrize("size", [1e-38, 1e-34, 1e-30, 1e-8, 1e-5, 1.0, 65504.0, 1e30, 3e38])
def test_a_float16_row_keeps_eleven_bits_at_any_size_and_its_scale_is_exact_to_undo(size):
    rows = (np.random.default_rng(1).uniform(0.5, 1, (20, 37)) * size).astype(np.float32)
    rows[:, ::2] *= -1
    stored, row_scale = encode_rows(rows, "float16")
    assert exact_power_of_two(row_scale).all()
    if size > 1e-33:
        largest = np.abs(stored.astype(np.float32)).max(axis=1)
        assert ((largest >= 2**14) & (largest <= 2**15)).all()
    want = stored.astype(np.float64) * row_scale.astype(np.float64)[:, None]
    np.testing.assert_array_equal(decode_rows(stored, row_scale, "float16"), want)
    np.testing.assert_allclose(want, rows, rtol=2**-11)


def test_the_largest_magnitude_lands_in_its_binade_at_both_edges():
    rows = np.array([[1.0, 0], [2.0, 0], [np.nextafter(np.float32(2), np.float32(1)), 0]], np.float32)
    stored, row_scale = encode_rows(rows, "float16")
    assert row_scale.tolist() == [2**-14, 2**-13, 2**-14]
    assert stored[:, 0].tolist() == [2**14, 2**14, 2**15]  # the third by rounding


def test_zero_nan_infinite_and_denormal_rows():
    tiny = np.float32(2**-149)
    rows = np.array([[0, -0.0], [np.nan, 1], [np.inf, 1], [tiny, -5 * tiny], [1e38, tiny]], np.float32)
    stored, row_scale = encode_rows(rows, "float16")
    assert row_scale[:3].tolist() == [1, 1, 1]
    assert row_scale[3] == np.float32(2**-126)
    got = decode_rows(stored, row_scale, "float16")
    np.testing.assert_array_equal(got[[0, 2, 3]], rows[[0, 2, 3]])
    assert np.signbit(got[0]).tolist() == [False, True]
    assert np.isnan(got[1, 0])
    np.testing.assert_allclose(got[4], [1e38, 0], rtol=2**-11)


def test_every_half_is_decoded_as_numpy_does():
    stored = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    for scale in (1.0, 2**-126, 2**14, 2**100, np.nan, 0.3):
        row_scale = np.full(64, scale, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            want = stored.astype(np.float32) * row_scale[:, None]
        np.testing.assert_array_equal(decode_rows(stored, row_scale, "float16"), want)


def test_a_missing_row_decodes_to_nan_whatever_is_stored():
    for proj_dtype in DTYPES:
        stored, _ = encode_rows(np.ones((2, 3), np.float32), proj_dtype)
        got = decode_rows(stored, np.array([np.nan, 2], np.float32), proj_dtype)
        assert np.isnan(got[0]).all()
        assert not np.isnan(got[1]).any()


def test_bfloat16_rounds_to_nearest_even_as_tensorstores_own_type_does():
    bfloat16 = tensorstore.bfloat16.numpy_dtype
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    halfway = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, halfway, halfway - 1, halfway + 1]).view(np.float32)
    with np.errstate(invalid="ignore"):
        want = values.astype(bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bfloat16_to_float32(float32_to_bfloat16(values)), want)
    every = np.arange(2**16, dtype=np.uint16)
    number = ~np.isnan(bfloat16_to_float32(every))
    np.testing.assert_array_equal(float32_to_bfloat16(bfloat16_to_float32(every))[number], every[number])


def test_float32_rows_are_stored_as_they_are():
    rows = make_rows(5, 7)
    stored, row_scale = encode_rows(rows, "float32")
    np.testing.assert_array_equal(stored, rows)
    assert (row_scale == 1).all()


def test_no_rows_are_encoded_to_no_rows():
    for proj_dtype in DTYPES:
        stored, row_scale = encode_rows(np.empty((0, 5), np.float32), proj_dtype)
        assert decode_rows(stored, row_scale, proj_dtype).shape == (0, 5)


# --- creating and changing a store


def test_of_many_creators_one_wins_and_the_others_are_told(tmp_path):
    layout = plan_layout(20, [4], 1, StoreConfig())
    barrier, outcomes = threading.Barrier(6), []

    def create():
        barrier.wait()
        try:
            create_store(tmp_path / "projections.zarr", layout, {"layers": []}, np.zeros(3, np.float32))
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


def test_a_creator_that_loses_at_the_last_moment_leaves_the_winners_store(tmp_path, monkeypatch):
    layout = plan_layout(20, [4], 1, StoreConfig())
    path = tmp_path / "projections.zarr"
    monkeypatch.setattr("os.path.lexists", lambda _: False)
    create_store(path, layout, {"layers": [], "winner": 1}, np.zeros(3, np.float32))
    with pytest.raises(StoreExists, match="another process has just made it"):
        create_store(path, layout, {"layers": [], "winner": 2}, np.zeros(3, np.float32))
    assert zarr.open_group(str(path), mode="r").attrs["winner"] == 1
    assert os.listdir(tmp_path) == ["projections.zarr"]


def test_attributes_that_other_readers_refuse_are_refused_before_anything_is_made(tmp_path):
    layout = plan_layout(20, [4], 1, StoreConfig())
    with pytest.raises(ValueError, match="JSON"):
        create_store(tmp_path / "s", layout, {"loss": float("nan")}, np.zeros(0, np.float32))
    assert os.listdir(tmp_path) == []


def test_attributes_change_one_by_one_and_the_arrays_stay(tmp_path):
    output = Output(tmp_path).fill()
    before = from_zarr(output.store_path, "projections")
    update_attributes(output.store_path, {"complete": True, "note": "changed"})
    attributes = zarr.open_group(str(output.store_path), mode="r").attrs.asdict()
    assert attributes["complete"] is True
    assert attributes["note"] == "changed"
    assert attributes["format_version"] == 1
    assert len(attributes["layers"]) == 2
    np.testing.assert_array_equal(from_zarr(output.store_path, "projections"), before)
    with pytest.raises(ValueError, match="JSON"):
        update_attributes(output.store_path, {"x": float("inf")})
    assert json.loads((output.store_path / "zarr.json").read_text())["attributes"]["note"] == "changed"


def test_matrices_are_packed_in_the_layers_order_and_their_shapes_are_checked(tmp_path):
    output = Output(tmp_path)
    want = np.concatenate([m.ravel() for layer in output.layers for m in output.matrices[layer.name]])
    np.testing.assert_array_equal(from_zarr(output.store_path, "projection_matrices"), want)
    swapped = {name: (p_o, p_i) for name, (p_i, p_o) in output.matrices.items()}
    with pytest.raises(ValueError, match=r"matrices of h\.0\.mlp"):
        pack_matrices(output.layers, swapped)


def test_a_store_without_matrices_can_be_made(tmp_path):
    create_store(tmp_path / "s", plan_layout(3, [4], 1, StoreConfig()), {}, np.empty(0, np.float32))
    assert from_zarr(tmp_path / "s", "projection_matrices").shape == (0,)


def test_a_small_array_is_added_and_replaced(tmp_path):
    output = Output(tmp_path)
    for shape in ((3, 4), (5,), (2, 0)):
        values = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        write_array(output.store_path, "sums", values)
        np.testing.assert_array_equal(from_zarr(output.store_path, "sums"), values)
    assert sorted(os.listdir(tmp_path)) == ["projections.zarr", "units"]


def test_column_blocks_of_other_rows_stay_and_the_status_goes_last(tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.store.layout._COLUMN_ROWS", 32)
    output = Output(tmp_path)
    assert output.layout.n_column_blocks == 3
    output.fill()
    written = []
    monkeypatch.setattr(
        "gradproj.store.writer.write_and_replace",
        lambda path, chunks: (written.append(path.parent.name), write_and_replace(path, chunks)),
    )
    columns = empty_columns(32, 8)
    columns["status"][:] = 7
    write_column_block(output.store_path, output.layout, 1, columns)
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
def test_a_column_of_another_shape_or_type_is_refused(tmp_path, wrong, message):
    output = Output(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_column_block(output.store_path, output.layout, 0, wrong)


# --- files


def test_a_written_file_has_the_sum_that_is_returned(tmp_path):
    chunks = [b"abc", np.arange(10, dtype=np.float16).data, b""]
    returned = write_file_durably(tmp_path / "x", chunks)
    assert returned == file_sum(tmp_path / "x")
    assert returned["bytes"] == 23
    (tmp_path / "check").write_bytes(b"123456789")
    assert file_sum(tmp_path / "check")["crc32c"] == 0xE3069283  # the check value of CRC-32C


@pytest.mark.parametrize("links", ["links", "no links", "no links, no exclusive rename"])
def test_of_two_files_under_one_name_the_first_stays(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "links are missing here")

    if links != "links":
        monkeypatch.setattr(os, "link", refuse)
    if links.endswith("rename"):
        monkeypatch.setattr(store_files.ctypes, "CDLL", lambda *_, **__: object())
    for name in ("first", "second"):
        write_file_durably(tmp_path / name, [name.encode()])
        assert publish_exclusively(tmp_path / name, tmp_path / "final") is (name == "first")
    assert (tmp_path / "final").read_bytes() == b"first"
    assert "first" not in os.listdir(tmp_path)


def test_a_link_whose_answer_was_lost_counts_as_published(tmp_path):
    write_file_durably(tmp_path / "tmp", [b"mine"])
    os.link(tmp_path / "tmp", tmp_path / "final")
    assert publish_exclusively(tmp_path / "tmp", tmp_path / "final") is True
    assert os.listdir(tmp_path) == ["final"]


def test_a_full_disk_is_one_clear_error_and_leaves_no_partial_file(tmp_path):
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"cannot write .*/x: No space left on device\. Free space there"):
        write_file_durably(tmp_path / "x", [b"data"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EDQUOT, "Your quota there is used up"),
        (errno.EROFS, "choose another --output_dir"),
        (errno.EACCES, "mend the permissions"),
        (errno.EFBIG, "ulimit -f"),
    ],
)
def test_the_systems_refusals_name_the_path_and_the_way_out(code, message):
    with pytest.raises(StoreError, match=rf"cannot write out/x: .*{message}"), explain_os_errors("out/x"):
        raise OSError(code, os.strerror(code))


def test_a_fault_that_no_user_can_mend_stays_what_it_is():
    with pytest.raises(OSError, match="Bad file descriptor"), explain_os_errors("x"):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
