"""Packed stores of random shapes: every way to read gives the rows of the definition."""

import numpy as np
import pytest
from helpers.stores import Output, packed, rewrite_with_zarr, stored_part

from gradproj import ProjectionStore
from gradproj.store.layout import PACKED_BITS


def random_output(path, seed):
    """An output of random layers and units, of which one is missing."""
    generator = np.random.default_rng(seed)
    encoding = list(PACKED_BITS)[seed % 4]
    n_layers = int(generator.integers(1, 7))
    widths = generator.choice([1, 2, 3, 5, 8, 16], (n_layers, 2)).tolist()
    if seed % 3 == 0:  # all of one width: a chunk for each layer
        widths = [[32, 32]] * 40
    rows_per_shard = int(generator.choice([1, 7, 16, 24]))
    config = packed(
        encoding, rows_per_shard, compressor=generator.choice(["none", "none", "blosc", "zstd"])
    )
    output = Output(path, int(generator.integers(2, 60)), widths, config)
    missing = int(generator.integers(0, output.layout.n_units)) if output.layout.n_units > 1 else -1
    units = [unit for unit in range(output.layout.n_units) if unit != missing]
    for unit in units:
        output.commit(unit)
    output.merge(units[::2])
    want = output.decoded()
    if missing >= 0:
        want[slice(*output.layout.unit_range(missing))] = np.nan
    return output, want, generator


@pytest.mark.parametrize("seed", range(12))
def test_every_way_to_read_gives_the_rows_of_the_definition(tmp_path, seed):
    output, want, generator = random_output(tmp_path, seed)
    n, layers = output.layout.n_samples, output.layers
    chosen = [layers[i] for i in generator.permutation(len(layers))[: 1 + len(layers) // 2]]
    names = [layer.name for layer in chosen]
    part = np.concatenate([want[:, x.slice_start : x.slice_end] for x in chosen], axis=1)
    ids = generator.integers(0, n, 20)
    with ProjectionStore(tmp_path) as store:
        assert store.layout == output.layout
        np.testing.assert_array_equal(store.rows(ids, missing="nan"), want[ids])
        np.testing.assert_array_equal(store.rows(range(n), missing="nan"), want)
        np.testing.assert_array_equal(store.rows(ids, names, missing="nan"), part[ids])
        height = int(generator.integers(1, n + 3))
        for layer_names, rows in ((None, want), (names, part)):
            blocks = list(store.scan(height, layer_names))
            np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), rows)
            stored = store.scan_stored(height, layer_names)
            blocks = [store.decode(codes, scale, layer_names) for _, codes, scale in stored]
            np.testing.assert_array_equal(np.concatenate(blocks), rows)
        width = stored_part(output, chosen).shape[1]
        for band in store.scan_bands(height, names):
            stored = np.full((len(band.status), width), store.layout.fill)
            for at, tile in band.tiles:
                stored[:, at : at + tile.shape[1]] = tile
            rows = store.decode(stored, band.row_scale, names)
            np.testing.assert_array_equal(rows, part[band.first : band.last])


@pytest.mark.parametrize("index_location", ["end", "start"])
def test_packed_shards_of_zarr_python_are_read_with_absent_chunks(tmp_path, index_location):
    output = Output(tmp_path, 70, [[32, 32]] * 40, packed("int2", 32)).fill()
    stored = output.stored.copy()
    stored[32:64, : output.layout.header_width] = 255  # a chunk that a writer may leave out
    rewrite_with_zarr(output, stored, index_location, write_empty_chunks=False)
    want = output.decoded()
    want[32:64] = np.nan
    with ProjectionStore(tmp_path) as store:
        ids = np.random.default_rng(0).permutation(70)
        np.testing.assert_array_equal(store.rows(ids), want[ids])
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(9)]), want)
