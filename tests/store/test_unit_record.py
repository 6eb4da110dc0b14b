"""A unit's record survives encoding, and damage is always detected."""

import time

import numpy as np
import pytest
from safetensors.numpy import load

from gradproj.errors import StoreError
from gradproj.store.layout import empty_columns
from gradproj.store.unit_record import (
    UnitRecord,
    decode_record,
    encode_record,
    list_records,
    read_record,
    record_name,
)


def make_record(n_rows: int = 5, n_covariances: int = 6) -> UnitRecord:
    generator = np.random.default_rng(0)
    columns = empty_columns(n_rows, 11)
    for name, values in columns.items():
        columns[name] = generator.integers(0, 100, values.shape).astype(values.dtype)
    covariances = {
        name: generator.standard_normal(n_covariances).astype(np.float32) for name in ("a", "s")
    }
    stats = {"seconds": 0.25, "n_tokens": 12, "host": "nöde", "nested": {"x": [1, None]}}
    return UnitRecord(
        12, 12 * n_rows, "f00d", {"bytes": 2**33, "crc32c": 7}, columns, stats, covariances
    )


def assert_same(got: UnitRecord, want: UnitRecord) -> None:
    for name in ("unit", "start", "identity", "shard", "stats"):
        assert getattr(got, name) == getattr(want, name)
    for name in ("columns", "token_covariances"):
        got_arrays, want_arrays = getattr(got, name), getattr(want, name)
        assert set(got_arrays) == set(want_arrays)
        for key, values in want_arrays.items():
            assert got_arrays[key].dtype == values.dtype
            np.testing.assert_array_equal(got_arrays[key], values)


def test_record_survives_encoding():
    want = make_record()
    assert_same(decode_record(encode_record(want)), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_covariances_keep_their_type(dtype):
    want = make_record()
    want.token_covariances = {"a": np.arange(4, dtype=dtype), "s": np.empty(0, dtype)}
    assert_same(decode_record(encode_record(want)), want)


def test_record_without_shard_or_covariances_survives_encoding():
    want = make_record()
    want.shard, want.token_covariances = None, {}
    assert_same(decode_record(encode_record(want)), want)


def test_safetensors_reads_a_record():
    want = make_record()
    tensors = load(encode_record(want))
    np.testing.assert_array_equal(tensors["column.key"], want.columns["key"])
    np.testing.assert_array_equal(tensors["covariance.s"], want.token_covariances["s"])


def test_equal_records_have_equal_bytes():
    assert encode_record(make_record()) == encode_record(make_record())


def test_record_torn_at_any_length_is_an_error():
    data = encode_record(make_record())
    for length in range(len(data)):
        with pytest.raises(StoreError, match=r"r7 is damaged .* Delete that file"):
            decode_record(data[:length], "r7")
    with pytest.raises(StoreError, match="damaged"):
        decode_record(data + b"\0", "r7")


def test_any_flipped_bit_is_an_error():
    data = bytearray(encode_record(make_record()))
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(StoreError, match="damaged"):
                decode_record(bytes(data), "r7")
            data[at] ^= 1 << bit
    decode_record(bytes(data))


def test_newer_record_is_refused(monkeypatch):
    monkeypatch.setattr("gradproj.store.unit_record.RECORD_VERSION", 2)
    data = encode_record(make_record())
    monkeypatch.undo()
    with pytest.raises(StoreError, match=r"by a newer gradproj\. Update gradproj"):
        decode_record(data)


def test_error_names_the_damaged_file(tmp_path):
    path = tmp_path / "00000012.safetensors"
    path.write_bytes(encode_record(make_record())[:-1])
    with pytest.raises(StoreError, match=str(path)):
        read_record(path)


def test_records_are_listed_sorted_without_temporary_files(tmp_path):
    assert list_records(tmp_path / "units").tolist() == []
    (tmp_path / "units").mkdir()
    for unit in (7, 123_456_789, 0):
        (tmp_path / record_name(unit)).touch()
    (tmp_path / "units" / ".00000009.safetensors.17.ab.tmp").touch()
    (tmp_path / "units" / "00000008.safetensors.tmp").touch()
    listed = list_records(tmp_path / "units")
    assert listed.tolist() == [0, 7, 123_456_789]
    assert listed.dtype == np.int64


@pytest.mark.bench
def test_a_thousand_records_of_100_kb_are_read_in_a_second():
    data = encode_record(make_record(2048, 48 * 256))
    assert len(data) > 100_000
    started = time.process_time()
    for _ in range(300):
        decode_record(data)
    assert 300 / (time.process_time() - started) > 1_000
