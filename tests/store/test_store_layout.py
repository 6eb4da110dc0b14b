"""The layout of a store: shard size, chunk shape, units, keys."""

import numpy as np
import pytest
from helpers.stores import make_layers

from gradproj.errors import ConfigError, StoreError
from gradproj.store.chunk_shapes import (
    choose_chunk_width,
    choose_rows_per_shard,
    packed_widths,
)
from gradproj.store.layout import (
    COLUMNS,
    STATUS,
    StoreConfig,
    decode_key,
    empty_columns,
    encode_keys,
    place_stored,
    plan_layout,
)

MB = 10**6


@pytest.mark.parametrize("n_samples", [1, 15, 1_000, 5_000, 100_000, 210_000_000])
@pytest.mark.parametrize("dim", [1, 12_288, 36_864, 500_000, 10**8])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_per_shard_is_the_largest_power_of_two_within_all_bounds(n_samples, dim, itemsize):
    def fits(rows):
        return rows <= 4096 and rows * dim * itemsize <= 512 * MB and n_samples / rows >= 64

    want = max([rows for rows in (2**e for e in range(20)) if fits(rows)], default=0)
    assert choose_rows_per_shard(n_samples, dim * itemsize) == max(want, 16)


@pytest.mark.parametrize(
    ("widths", "want"),
    [
        ([256, 256, 256], 256),
        ([10, 10], 10),
        ([256, 128], 128),
        ([96, 64], 160),
        ([7], 7),
        ([256, 320], 64),
    ],
)
def test_chunk_width_is_the_common_width_or_a_divisor_from_64_or_the_row(widths, want):
    assert choose_chunk_width(widths) == want
    assert sum(widths) % want == 0


@pytest.mark.parametrize(
    ("widths", "bits", "more_bytes", "want"),
    [
        ([4096] * 48, 1, 0, (512, 49 * 512, 512)),  # 416 of 25,088 bytes are padding
        ([4096] * 12, 1, 0, (128, 128 + 12 * 512, 128)),  # with chunks of 256 bytes 3.6 % would be
        ([4096] * 210, 1, 700, (512, 213 * 512, 512)),
        ([4096] * 48, 8, 0, (4096, 49 * 4096, 4096)),
        ([4096, 2048] * 30, 2, 0, (512, 512 + 30 * 1536, 512)),
        ([10, 10], 1, 0, (4, 8, 8)),
        ([10, 3], 4, 5, (4, 4 + 5 + 2 + 5, 16)),
    ],
)
def test_packed_chunk_is_as_wide_as_divides_the_layers_unless_padding_costs_much(
    widths, bits, more_bytes, want
):
    assert packed_widths(widths, bits, more_bytes) == want


@pytest.mark.parametrize("seed", range(20))
def test_packed_layers_follow_the_header_and_each_other_in_whole_chunks(seed):
    generator = np.random.default_rng(seed)
    sides = generator.choice([1, 3, 16, 64, 128], (int(generator.integers(1, 60)), 2)).tolist()
    encoding = ("signs", "int2", "int4", "int8")[seed % 4]
    layers, more = make_layers(sides), int(generator.integers(0, 800))
    widths = [k_o * k_i for k_o, k_i in sides]
    config = StoreConfig(encoding=encoding, rows_per_shard=1024)
    layout = plan_layout(5_000, widths, 9, config, more)
    placed, at = place_stored(layers, layout), layout.header_width
    assert at >= 2 * len(layers)
    for layer, width in zip(placed, widths, strict=True):
        assert layer.stored_start == at
        at += -(-width * layout.bits // 8)
        assert layer.stored_end == at
    assert (layout.dim, layout.row_bytes) == (sum(widths), layout.stored_width)
    assert 0 <= layout.stored_width - at - more <= 0.02 * layout.stored_width
    assert layout.stored_width % layout.chunk_width == 0
    if layout.chunk_width < layout.stored_width:
        assert all(layer.stored_start % layout.chunk_width == 0 for layer in placed)
    chunk_bytes = layout.chunk_rows * layout.chunk_width
    assert chunk_bytes <= 512_000 or layout.chunk_rows == 1
    assert chunk_bytes > 256_000 or layout.chunk_rows == 1024


@pytest.mark.parametrize("rows_per_shard", [1, 2, 500, 512, 513, 1_000, 1_009, 4_096, 3_000_000])
def test_shard_is_whole_chunks_and_column_chunk_is_whole_shards(rows_per_shard):
    layout = plan_layout(
        5_000, [256] * 3, 9, StoreConfig(encoding="dense", rows_per_shard=rows_per_shard)
    )
    assert layout.rows_per_shard == rows_per_shard
    assert rows_per_shard % layout.chunk_rows == 0
    assert layout.chunk_rows == rows_per_shard or 64 <= layout.chunk_rows <= 512
    assert layout.column_rows % rows_per_shard == 0
    assert layout.column_rows < 5_000 + rows_per_shard


def test_columns_of_a_large_store_have_chunks_of_a_million_rows():
    layout = plan_layout(210_000_000, [256] * 48, 20, StoreConfig(encoding="dense"))
    assert layout.rows_per_shard == 4096
    assert layout.column_rows == 2**20
    assert layout.column_block_range(layout.n_column_blocks - 1)[1] == 210_000_000
    assert layout.n_units == 51_270


def test_units_of_summed_windows_have_fewer_rows_where_float32_rows_are_large():
    rows = {
        (side, sums): plan_layout(
            10**6, [side**2] * 48, 20, StoreConfig(encoding="signs"), keeps_sums=sums
        ).rows_per_shard
        for side in (16, 64)
        for sums in (False, True)
    }
    assert rows == {(16, False): 4096, (16, True): 4096, (64, False): 4096, (64, True): 512}


@pytest.mark.parametrize("n_samples", [1, 16, 17, 100])
def test_units_cover_every_sample_once(n_samples):
    layout = plan_layout(n_samples, [4], 1, StoreConfig(encoding="dense", rows_per_shard=16))
    ids = [i for unit in range(layout.n_units) for i in range(*layout.unit_range(unit))]
    assert ids == list(range(n_samples))
    with pytest.raises(IndexError):
        layout.unit_range(layout.n_units)
    with pytest.raises(IndexError):
        layout.column_block_range(layout.n_column_blocks)


def test_all_shards_lie_in_one_folder():
    layout = plan_layout(100, [4], 1, StoreConfig(encoding="dense", rows_per_shard=16))
    assert layout.shard_name(3) == "projections.zarr/projections/c.3.0"


def test_keys_of_any_bytes_survive_encoding():
    keys = ["a", "", "日本", "x" * 12, "na\udcefve"]
    encoded = encode_keys(keys, 12)
    assert encoded.shape == (5, 12)
    assert encoded[4].tobytes().rstrip(b"\0") == b"na\xefve"
    assert [decode_key(row) for row in encoded] == keys
    with pytest.raises(ValueError, match="13 bytes"):
        encode_keys(["x" * 13], 12)
    assert encode_keys([], 5).shape == (0, 5)


def test_empty_columns_hold_fill_values():
    columns = empty_columns(3, 7)
    assert list(columns) == list(COLUMNS)
    assert columns["key"].shape == (3, 7)
    assert (columns["status"] == STATUS["missing"]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"encoding": "int8", "proj_dtype": "float32"},
            r"--proj_dtype float32 is a type of dense rows, and --encoding int8 stores codes",
        ),
        (
            {"proj_dtype": "float64"},
            r"--proj_dtype is 'float64'; choose one of float16, bfloat16, float32",
        ),
        ({"compressor": "lz4"}, r"--compressor is 'lz4'; choose one of none, blosc, zstd"),
        ({"rows_per_shard": -3}, r"--rows_per_shard must be at least 1, got -3"),
    ],
)
def test_invalid_setting_names_its_flag_and_choices(wrong, message):
    with pytest.raises(ConfigError, match=message):
        StoreConfig(**wrong)


def test_store_without_samples_or_layers_is_refused():
    with pytest.raises(StoreError, match="no sample to store"):
        plan_layout(0, [4], 1, StoreConfig(encoding="dense"))
    with pytest.raises(StoreError, match="nothing to store in a row"):
        plan_layout(3, [], 1, StoreConfig(encoding="dense"))
    assert plan_layout(3, [4], 0, StoreConfig(encoding="dense")).key_bytes == 1
