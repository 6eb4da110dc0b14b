"""A scan by bands yields every stored value once, from any layout."""

import os
import re

import numpy as np
import pytest
from helpers.stores import Output

from gradproj.errors import StoreError
from gradproj.store import STATUS, ProjectionStore, StoreConfig, StoreLayout
from gradproj.store.encoding import nan_rows

CASES = {
    "float16": {},
    "bfloat16": {"config": StoreConfig(proj_dtype="bfloat16", rows_per_shard=16)},
    "float32": {"config": StoreConfig(proj_dtype="float32", rows_per_shard=16)},
    "zstd": {"config": StoreConfig(compressor="zstd", rows_per_shard=16)},
    "whole rows in a chunk": {"widths": ((3, 5), (1, 7), (4, 1)), "n_samples": 50},
    "chunks of a layer's part": {"widths": ((8, 8), (16, 8), (8, 24)), "n_samples": 50},
    "many chunks a shard": {
        "n_samples": 150,
        "layout": StoreLayout(150, 12, 64, 32, 6, "float16", "none", 8, 128),
    },
}


@pytest.fixture(scope="module", params=CASES)
def filled(request, tmp_path_factory):
    return Output(tmp_path_factory.mktemp("output"), **CASES[request.param]).fill()


def joined(store, layers=None, width=None, **asked):
    """All bands' values as one array, and how often each was given; ids and scales."""
    width = width or store.dim
    bands, first = [], asked.get("start", 0)
    for band in store.scan_bands(layers=layers, **asked):
        assert band.first == first
        first = band.last
        stored = nan_rows((len(band.status), width), store.layout.proj_dtype)
        times = np.zeros(stored.shape, int)
        for at, tile in band.tiles:
            assert tile.dtype == stored.dtype
            stored[:, at : at + tile.shape[1]] = tile
            times[:, at : at + tile.shape[1]] += 1
        assert set(np.unique(times)) <= {int(band.has_rows)}
        bands.append((stored, band.row_scale, band.status))
    return [np.concatenate(parts) for parts in zip(*bands, strict=True)]


@pytest.mark.parametrize("rows_per_band", [None, 1, 7, 1_000])
def test_bands_hold_stored_rows_and_their_scales(filled, rows_per_band):
    stored, row_scale, status = joined(ProjectionStore(filled.path), rows_per_band=rows_per_band)
    assert stored.tobytes() == filled.stored.tobytes()
    np.testing.assert_array_equal(row_scale, filled.row_scale)
    assert set(status) == {STATUS["ok"]}


def test_bands_of_selected_layers_and_samples(filled):
    chosen = filled.layers[::-1]
    want = np.concatenate([filled.stored[:, x.slice_start : x.slice_end] for x in chosen], axis=1)
    names = [layer.name for layer in chosen]
    got = joined(ProjectionStore(filled.path), names, want.shape[1], start=5, stop=47)[0]
    assert got.tobytes() == want[5:47].tobytes()


def test_band_lies_in_one_chunk_and_one_shard(tmp_path):
    Output(tmp_path, **CASES["many chunks a shard"]).fill()
    bands = list(ProjectionStore(tmp_path).scan_bands(start=3))
    assert [(band.first, band.last) for band in bands] == [
        (3, 32),
        (32, 64),
        (64, 96),
        (96, 128),
        (128, 150),
    ]


def test_band_of_a_missing_unit_has_no_tile(tmp_path):
    output = Output(tmp_path)
    output.commit(0)
    output.commit(2)
    bands = list(ProjectionStore(tmp_path).scan_bands())
    assert [band.has_rows for band in bands] == [True, False, True, False, False]
    assert np.isnan(bands[1].row_scale).all()
    assert list(bands[1].tiles) == []


def test_absent_chunks_are_nan(tmp_path):
    output = Output(tmp_path, **CASES["many chunks a shard"])
    output.stored = output.stored[:150]
    output.commit(0)
    output.commit(1)
    start, stop = output.layout.unit_range(2)
    full, output.stored = output.stored, output.stored[:0]
    output.commit(2)  # its shard holds no chunk at all
    output.merge([0, 1, 2])
    got = joined(ProjectionStore(tmp_path))[0]
    assert np.isnan(got[start:stop]).all()
    assert got[:start].tobytes() == full[:start].tobytes()


def test_shard_truncated_after_it_was_opened_is_reported(tmp_path):
    output = Output(tmp_path).fill()
    path = output.path / output.layout.shard_name(1)
    store = ProjectionStore(tmp_path)
    store.rows([20])
    os.truncate(path, 70)
    with pytest.raises(
        StoreError, match=re.escape(f"{path} is damaged: it ends at byte 70, inside a chunk")
    ):
        joined(store)
