"""A scan by bands yields every stored value once, from any layout."""

import os
import re

import numpy as np
import pytest
from helpers.stores import MANY_CHUNKS, READER_CASES, Output, stored_part

from gradproj.errors import StoreError
from gradproj.store import STATUS, ProjectionStore


@pytest.fixture(scope="module", params=READER_CASES)
def filled(request, tmp_path_factory):
    return READER_CASES[request.param](tmp_path_factory.mktemp("output"))


def joined(store, layers=None, width=None, **options):
    """All bands' values as one array, and how often each was given; ids and scales."""
    width = width or store.layout.stored_width
    bands, first = [], options.get("start", 0)
    for band in store.scan_bands(layers=layers, **options):
        assert band.first == first
        first = band.last
        stored = np.full((len(band.status), width), store.layout.fill)
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
    want = stored_part(filled, chosen)
    names = [layer.name for layer in chosen]
    n = filled.layout.n_samples
    start, stop = n // 10, n - n // 15
    got = joined(ProjectionStore(filled.path), names, want.shape[1], start=start, stop=stop)[0]
    assert got.tobytes() == want[start:stop].tobytes()


def test_band_lies_in_one_chunk_and_one_shard(tmp_path):
    Output(tmp_path, **MANY_CHUNKS).fill()
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
    output = Output(tmp_path, **MANY_CHUNKS)
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
