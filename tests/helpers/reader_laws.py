"""Reading a store: tests that hold wherever it lies, for those of each place to inherit.

A subclass has a fixture ``put``, which takes the path of an output on disk, and returns what
``ProjectionStore`` takes to read the same files in that place.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.encoding import decode
from helpers.stores import (
    DOMAINS,
    MANY_CHUNKS,
    MISSING,
    PACKED_CHUNKS,
    READER_CASES,
    Output,
    make_unfinished,
    packed,
    rewrite_with_zarr,
    stored_part,
)

from gradproj.errors import StoreError
from gradproj.files import crc32c
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.layout import StoreConfig
from gradproj.store.unit_record import decode_record, encode_record, record_name


def joined_bands(store, layers=None, width=None, **options):
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


class ReaderLaws:
    @pytest.fixture(scope="class", params=READER_CASES)
    @classmethod
    def filled(cls, request, tmp_path_factory):
        """A store of every kind: the laws that use it hold for all of them."""
        return READER_CASES[request.param](tmp_path_factory.mktemp("output"))

    @pytest.fixture
    def place(self, filled, put):
        return put(filled.path)

    @pytest.fixture
    def unfinished(self, tmp_path):
        return make_unfinished(tmp_path)

    def test_rows_are_returned_in_the_order_of_the_ids(self, filled, place):
        n, decoded = filled.layout.n_samples, filled.decoded()
        with ProjectionStore(place) as store:
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
                np.testing.assert_array_equal(got, decoded[np.asarray(ids, int)])

    @pytest.mark.parametrize("rows_per_block", [None, 1, 7, 40, 1_000])
    def test_scan_yields_every_row_once_in_order(self, filled, place, rows_per_block):
        blocks = list(ProjectionStore(place).scan(rows_per_block))
        np.testing.assert_array_equal(
            np.concatenate([ids for ids, _ in blocks]), np.arange(filled.layout.n_samples)
        )
        np.testing.assert_array_equal(
            np.concatenate([rows for _, rows in blocks]), filled.decoded()
        )
        assert rows_per_block is None or max(len(ids) for ids, _ in blocks) <= rows_per_block

    def test_selected_layers_are_concatenated_in_the_given_order(self, filled, place):
        store, decoded = ProjectionStore(place), filled.decoded()
        chosen = [layer.name for layer in filled.layers[::-1]]
        want = np.concatenate(
            [decoded[:, x.slice_start : x.slice_end] for x in filled.layers[::-1]], axis=1
        )
        n = filled.layout.n_samples
        ids = np.random.default_rng(1).permutation(n)
        np.testing.assert_array_equal(store.rows(ids, chosen), want[ids])
        np.testing.assert_array_equal(store.rows(range(n), chosen), want)
        np.testing.assert_array_equal(
            np.concatenate([rows for _, rows in store.scan(9, chosen)]), want
        )

    def test_layer_view_indexes_like_an_array_of_matrices(self, filled, place):
        store, decoded = ProjectionStore(place), filled.decoded()
        n = filled.layout.n_samples
        for layer in filled.layers:
            want = decoded[:, layer.slice_start : layer.slice_end].reshape(n, layer.k_o, layer.k_i)
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

    def test_scan_of_a_range_starts_and_stops_there(self, filled, place):
        n = filled.layout.n_samples
        start, stop = n // 3, n - n // 4
        blocks = list(ProjectionStore(place).scan(5, start=start, stop=stop))
        np.testing.assert_array_equal(
            np.concatenate([ids for ids, _ in blocks]), np.arange(start, stop)
        )
        np.testing.assert_array_equal(
            np.concatenate([rows for _, rows in blocks]), filled.decoded()[start:stop]
        )
        assert list(ProjectionStore(place).scan(start=n, stop=n)) == []

    def test_scan_stored_yields_stored_bytes_and_scales(self, filled, place):
        store = ProjectionStore(place)
        for rows_per_block in (None, 7):
            blocks = list(store.scan_stored(rows_per_block))
            np.testing.assert_array_equal(
                np.concatenate([ids for ids, _, _ in blocks]), np.arange(filled.layout.n_samples)
            )
            stored = np.concatenate([rows for _, rows, _ in blocks])
            assert stored.dtype == filled.stored.dtype
            assert stored.tobytes() == filled.stored.tobytes()
            np.testing.assert_array_equal(
                np.concatenate([scale for _, _, scale in blocks]), filled.row_scale
            )
        chosen = filled.layers[-1]
        part = np.concatenate([rows for _, rows, _ in store.scan_stored(layers=[chosen.name])])
        assert part.tobytes() == stored_part(filled, [chosen]).tobytes()

    @pytest.mark.parametrize("rows_per_band", [None, 1, 7, 1_000])
    def test_bands_hold_stored_rows_and_their_scales(self, filled, place, rows_per_band):
        stored, row_scale, status = joined_bands(
            ProjectionStore(place), rows_per_band=rows_per_band
        )
        assert stored.tobytes() == filled.stored.tobytes()
        np.testing.assert_array_equal(row_scale, filled.row_scale)
        assert set(status) == {STATUS["ok"]}

    def test_bands_of_selected_layers_and_samples(self, filled, place):
        chosen = filled.layers[::-1]
        want = stored_part(filled, chosen)
        names = [layer.name for layer in chosen]
        n = filled.layout.n_samples
        start, stop = n // 10, n - n // 15
        got = joined_bands(ProjectionStore(place), names, want.shape[1], start=start, stop=stop)[0]
        assert got.tobytes() == want[start:stop].tobytes()

    @pytest.mark.parametrize("write_empty", [True, False])
    @pytest.mark.parametrize("index_location", ["end", "start"])
    def test_shards_written_by_zarr_python_in_morton_order_are_read(
        self, put, tmp_path, write_empty, index_location
    ):
        output = Output(tmp_path, **MANY_CHUNKS).fill()
        stored = output.stored.copy()
        stored[32:64, :6] = np.nan  # an inner chunk that a writer may leave out
        rewrite_with_zarr(output, stored, index_location, write_empty_chunks=write_empty)
        want = decode(stored, output.row_scale, output.layout, output.layers)
        store = ProjectionStore(put(tmp_path))
        ids = np.random.default_rng(0).permutation(len(want))
        np.testing.assert_array_equal(store.rows(ids), want[ids])
        np.testing.assert_array_equal(store.rows(ids, ["h.1.mlp"]), want[ids, 6:])
        for rows_per_block in (50, 64):
            np.testing.assert_array_equal(
                np.concatenate([rows for _, rows in store.scan(rows_per_block)]), want
            )

    def test_shard_with_chunks_at_odd_offsets_is_read(self, put, tmp_path):
        output = Output(tmp_path, **MANY_CHUNKS).fill()
        path = output.path / output.layout.shard_name(0)
        data = path.read_bytes()
        index = np.frombuffer(data[-4 - 4 * 16 : -4], "<u8").reshape(4, 2).copy()
        index[1:, 0] += 2  # a gap after the first chunk
        moved = index.tobytes()
        chunk = int(index[0, 1])
        path.write_bytes(
            data[:chunk]
            + b"\0\0"
            + data[chunk : -4 - 4 * 16]
            + moved
            + crc32c(moved).to_bytes(4, "little")
        )
        np.testing.assert_array_equal(
            ProjectionStore(put(tmp_path)).rows(range(150)), output.decoded()
        )

    def test_projection_matrices_are_returned_by_layer(self, put, tmp_path):
        output = Output(tmp_path, widths=((2, 3), (3, 2)))
        matrices = ProjectionStore(put(tmp_path)).projection_matrices
        assert list(matrices) == [layer.name for layer in output.layers]
        for name, (p_i, p_o) in output.matrices.items():
            np.testing.assert_array_equal(matrices[name][0], p_i)
            np.testing.assert_array_equal(matrices[name][1], p_o)

    def test_layers_attributes_and_layout_are_read_back(self, put, tmp_path):
        output = Output(tmp_path)
        store = ProjectionStore(put(tmp_path))
        assert store.layers == output.layers
        assert store.attributes["note"] == "kept"
        assert store.layout == output.layout

    def test_threads_share_a_store(self, put, tmp_path):
        output = Output(
            tmp_path, n_samples=200, config=StoreConfig(encoding="dense", rows_per_shard=1)
        ).fill()
        store = ProjectionStore(put(tmp_path))
        orders = [np.random.default_rng(seed).permutation(200) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            decoded = output.decoded()
            for ids, rows in zip(orders, pool.map(store.rows, orders), strict=True):
                np.testing.assert_array_equal(rows, decoded[ids])

    @pytest.mark.parametrize("settings", [{}, PACKED_CHUNKS | {"config": packed("int4")}])
    def test_rows_of_packed_and_dense_units_that_are_missing_are_nan(self, put, tmp_path, settings):
        output = Output(tmp_path, **{"n_samples": 40, **settings})
        output.commit(0)
        output.commit(2)
        want = output.decoded()
        want[16:32] = np.nan
        store = ProjectionStore(put(tmp_path))
        assert store.missing().tolist() == list(range(16, 32))
        np.testing.assert_array_equal(store.rows(range(40), missing="nan"), want)
        np.testing.assert_array_equal(store.rows([33, 20, 3], missing="nan"), want[[33, 20, 3]])
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(7)]), want)
        _, stored, scale = next(store.scan_stored(40))
        np.testing.assert_array_equal(stored[16:32], np.full_like(stored[16:32], store.layout.fill))
        np.testing.assert_array_equal(store.decode(stored, scale), want)
        with pytest.raises(StoreError, match="16 of the requested samples are missing"):
            store.rows(range(40))

    def test_stored_parts_of_packed_rows_are_decoded_with_their_layers(self, put, tmp_path):
        output = Output(tmp_path, **PACKED_CHUNKS, config=packed("int2")).fill()
        store, chosen = ProjectionStore(put(tmp_path)), ["h.7.mlp", "h.3.mlp"]
        want = np.concatenate([store.layer(name)[:].reshape(40, -1) for name in chosen], axis=1)
        (ids, stored, scale) = next(store.scan_stored(40, chosen))
        assert stored.shape == (40, output.layout.header_width + 2 * 256)
        np.testing.assert_array_equal(store.decode(stored, scale, chosen), want[ids])

    def test_scan_stored_yields_nan_for_a_missing_unit(self, put, tmp_path):
        output = Output(tmp_path)
        output.commit(0)
        output.commit(2)
        _, stored, scale = next(ProjectionStore(put(tmp_path)).scan_stored())
        assert np.isnan(scale[16:32]).all()
        assert np.isnan(stored[16:32]).all()
        np.testing.assert_array_equal(stored[32:48], output.stored[32:48])

    def test_band_of_a_missing_unit_has_no_tile(self, put, tmp_path):
        output = Output(tmp_path)
        output.commit(0)
        output.commit(2)
        bands = list(ProjectionStore(put(tmp_path)).scan_bands())
        assert [band.has_rows for band in bands] == [True, False, True, False, False]
        assert np.isnan(bands[1].row_scale).all()
        assert list(bands[1].tiles) == []

    def test_absent_chunks_are_nan(self, put, tmp_path):
        output = Output(tmp_path, **MANY_CHUNKS)
        output.stored = output.stored[:150]
        output.commit(0)
        output.commit(1)
        start, stop = output.layout.unit_range(2)
        full, output.stored = output.stored, output.stored[:0]
        output.commit(2)  # its shard holds no chunk at all
        output.merge([0, 1, 2])
        got = joined_bands(ProjectionStore(put(tmp_path)))[0]
        assert np.isnan(got[start:stop]).all()
        assert got[:start].tobytes() == full[:start].tobytes()

    def test_unmerged_rows_are_read_through_records(self, put, unfinished):
        store = ProjectionStore(put(unfinished.path))
        present = np.setdiff1d(np.arange(70), MISSING)
        np.testing.assert_array_equal(store.rows(present), unfinished.decoded()[present])
        want = unfinished.decoded()
        want[MISSING] = np.nan
        np.testing.assert_array_equal(store.rows(range(70), missing="nan"), want)
        np.testing.assert_array_equal(store.rows(range(69, -1, -1), missing="nan"), want[::-1])
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(11)]), want)

    def test_missing_samples_are_counted_and_named(self, put, unfinished):
        store = ProjectionStore(put(unfinished.path))
        assert store.missing().tolist() == MISSING
        assert store.missing_ranges() == [(32, 48), (64, 70)]
        assert store.status_counts() == dict.fromkeys(STATUS, 0) | {"missing": 22, "ok": 48}
        with pytest.raises(
            StoreError,
            match=r"22 of the requested samples are missing from .*: 32, 33, .*, \.\.\.\. Let",
        ):
            store.rows(range(70))
        with pytest.raises(
            StoreError,
            match=r"1 of the requested samples are missing from .*: 40\. Let the job finish",
        ):
            store.rows([0, 40, 1])

    def test_samples_have_columns_of_merged_recorded_and_missing_rows(self, put, unfinished):
        store = ProjectionStore(
            put(unfinished.path), read_text=lambda sample_id: f"text {sample_id}"
        )
        assert store.domains == DOMAINS
        merged, recorded, missing = store.samples([48, 17, 33], text=True)
        assert (merged.sample_id, merged.key, merged.domain, merged.status) == (
            48,
            "é48",
            None,
            "ok",
        )
        assert (recorded.sample_id, recorded.key, recorded.domain, recorded.tar) == (
            17,
            "é17",
            "Github",
            2,
        )
        assert (recorded.loss, recorded.n_tokens, recorded.grad_norm) == (17 / 8, 18, 17 / 4)
        assert recorded.text == "text 17"
        assert (missing.status, missing.key, missing.domain, missing.tar) == (
            "missing",
            "",
            None,
            -1,
        )
        assert store.samples([48])[0].text is None

    def test_columns_are_read_by_range_and_by_id(self, put, unfinished):
        store = ProjectionStore(put(unfinished.path))
        want = np.where(np.isin(np.arange(70), MISSING), -1, np.arange(70) // 7)
        np.testing.assert_array_equal(store.column("tar"), want)
        np.testing.assert_array_equal(store.column("tar", 10, 40), want[10:40])
        np.testing.assert_array_equal(store.columns_at(["tar"], [69, 3])["tar"], want[[69, 3]])

    def test_open_store_shows_units_committed_since(self, put, unfinished):
        store = ProjectionStore(put(unfinished.path))
        assert 40 in store.missing()
        unfinished.commit(2)
        put(unfinished.path)
        assert store.missing().tolist() == list(range(64, 70))
        np.testing.assert_array_equal(store.rows([40]), unfinished.decoded()[[40]])

    def test_unit_without_shard_is_not_missing_and_reads_as_nan(self, put, tmp_path):
        output = Output(tmp_path)
        output.commit(0, with_shard=False)
        path = tmp_path / record_name(0)
        record = decode_record(path.read_bytes())
        record.columns["status"] = np.full(16, STATUS["not_selected"], np.uint8)
        path.write_bytes(encode_record(record))
        store = ProjectionStore(put(tmp_path))
        assert np.isnan(store.rows(range(16))).all()
        assert np.isnan(store.rows([3, 1])).all()
        assert store.status_counts()["not_selected"] == 16

    def test_lost_shard_of_recorded_rows_is_an_error(self, put, tmp_path):
        output = Output(tmp_path).fill()
        (tmp_path / output.layout.shard_name(2)).unlink()
        store = ProjectionStore(put(tmp_path))
        for ids in ([33, 32], range(70)):
            with pytest.raises(
                StoreError, match=r"recorded as ok but their shard .*c\.2\.0 is gone"
            ):
                store.rows(ids)
        assert np.isnan(store.rows([33], missing="nan")).all()

    @pytest.mark.parametrize("damage", ["truncated", "empty", "index", "offsets"])
    def test_damaged_shard_is_named(self, put, tmp_path, damage):
        output = Output(tmp_path).fill()
        path = tmp_path / output.layout.shard_name(1)
        data = path.read_bytes()
        flipped = data[:-10] + bytes([data[-10] ^ 1]) + data[-9:]
        path.write_bytes(
            {"truncated": data[:20], "empty": b"", "index": flipped, "offsets": data[50:]}[damage]
        )
        with pytest.raises(
            StoreError, match=r"c\.1\.0 is damaged: [^`]*`python -m gradproj verify`"
        ):
            ProjectionStore(put(tmp_path)).rows([16])

    def test_damaged_shard_of_a_compressed_store_is_an_error(self, put, tmp_path):
        output = Output(
            tmp_path, config=StoreConfig(encoding="dense", compressor="zstd", rows_per_shard=16)
        ).fill()
        path = tmp_path / output.layout.shard_name(1)
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"cannot decode rows of|c\.1\.0 is damaged"):
            ProjectionStore(put(tmp_path)).rows([16])

    def test_damaged_column_or_record_is_named(self, put, unfinished):
        column = unfinished.store_path / "status" / "c.0"
        whole = column.read_bytes()
        column.write_bytes(whole[:-1])
        with pytest.raises(StoreError, match=r"status/c\.0 is damaged: it has 79 bytes"):
            ProjectionStore(put(unfinished.path)).rows([0])
        column.write_bytes(whole)
        record = unfinished.path / record_name(1)
        record.write_bytes(record.read_bytes()[:-1])
        with pytest.raises(StoreError, match=r"00000001\.safetensors is damaged"):
            ProjectionStore(put(unfinished.path)).rows([20])
