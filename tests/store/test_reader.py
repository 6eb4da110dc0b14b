"""``ProjectionStore`` returns the rows that were written, in any order, from any writer."""

import ctypes
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from helpers.encoding import decode
from helpers.stores import (
    MANY_CHUNKS,
    PACKED_CHUNKS,
    READER_CASES,
    Output,
    packed,
    rewrite_with_zarr,
    stored_part,
)

from gradproj.errors import StoreError
from gradproj.files import crc32c
from gradproj.store import ProjectionStore
from gradproj.store.layout import StoreConfig, StoreLayout
from gradproj.store.writer import create_store
from gradproj.store.zarr_threads import few_zarr_threads


@pytest.fixture(scope="module", params=READER_CASES)
def filled(request, tmp_path_factory):
    """A store of every kind: the tests that use it hold for all of them."""
    return READER_CASES[request.param](tmp_path_factory.mktemp("output"))


def test_rows_are_returned_in_the_order_of_the_ids(filled):
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
            np.testing.assert_array_equal(got, filled.decoded()[np.asarray(ids, int)])


def test_rows_equal_what_zarr_reads_times_the_scale(filled):
    group = zarr.open_group(str(filled.store_path), mode="r")
    stored, scale = group["projections"][...], group["row_scale"][...]
    want = decode(stored, scale, filled.layout, filled.layers)
    np.testing.assert_array_equal(ProjectionStore(filled.store_path).rows(range(len(want))), want)


@pytest.mark.parametrize("rows_per_block", [None, 1, 7, 40, 1_000])
def test_scan_yields_every_row_once_in_order(filled, rows_per_block):
    blocks = list(ProjectionStore(filled.path).scan(rows_per_block))
    np.testing.assert_array_equal(
        np.concatenate([ids for ids, _ in blocks]), np.arange(filled.layout.n_samples)
    )
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), filled.decoded())
    assert rows_per_block is None or max(len(ids) for ids, _ in blocks) <= rows_per_block


def test_selected_layers_are_concatenated_in_the_given_order(filled):
    store = ProjectionStore(filled.path)
    chosen = [layer.name for layer in filled.layers[::-1]]
    want = np.concatenate(
        [filled.decoded()[:, x.slice_start : x.slice_end] for x in filled.layers[::-1]], axis=1
    )
    n = filled.layout.n_samples
    ids = np.random.default_rng(1).permutation(n)
    np.testing.assert_array_equal(store.rows(ids, chosen), want[ids])
    np.testing.assert_array_equal(store.rows(range(n), chosen), want)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(9, chosen)]), want)


def test_layer_view_indexes_like_an_array_of_matrices(filled):
    store = ProjectionStore(filled.path)
    n = filled.layout.n_samples
    for layer in filled.layers:
        want = filled.decoded()[:, layer.slice_start : layer.slice_end].reshape(
            n, layer.k_o, layer.k_i
        )
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


def test_scan_of_a_range_starts_and_stops_there(filled):
    n = filled.layout.n_samples
    start, stop = n // 3, n - n // 4
    blocks = list(ProjectionStore(filled.path).scan(5, start=start, stop=stop))
    np.testing.assert_array_equal(
        np.concatenate([ids for ids, _ in blocks]), np.arange(start, stop)
    )
    np.testing.assert_array_equal(
        np.concatenate([rows for _, rows in blocks]), filled.decoded()[start:stop]
    )
    assert list(ProjectionStore(filled.path).scan(start=n, stop=n)) == []


@pytest.mark.parametrize("write_empty", [True, False])
@pytest.mark.parametrize("index_location", ["end", "start"])
def test_shards_written_by_zarr_python_in_morton_order_are_read(
    tmp_path, write_empty, index_location
):
    output = Output(tmp_path, **MANY_CHUNKS).fill()
    stored = output.stored.copy()
    stored[32:64, :6] = np.nan  # an inner chunk that a writer may leave out
    rewrite_with_zarr(output, stored, index_location, write_empty_chunks=write_empty)
    want = decode(stored, output.row_scale, output.layout, output.layers)
    store = ProjectionStore(tmp_path)
    ids = np.random.default_rng(0).permutation(len(want))
    np.testing.assert_array_equal(store.rows(ids), want[ids])
    np.testing.assert_array_equal(store.rows(ids, ["h.1.mlp"]), want[ids, 6:])
    for rows_per_block in (50, 64):
        np.testing.assert_array_equal(
            np.concatenate([rows for _, rows in store.scan(rows_per_block)]), want
        )


def test_shard_with_chunks_at_odd_offsets_is_read(tmp_path):
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
    np.testing.assert_array_equal(ProjectionStore(tmp_path).rows(range(150)), output.decoded())


def test_projection_matrices_are_returned_by_layer(tmp_path):
    output = Output(tmp_path, widths=((2, 3), (3, 2)))
    matrices = ProjectionStore(tmp_path).projection_matrices
    assert list(matrices) == [layer.name for layer in output.layers]
    for name, (p_i, p_o) in output.matrices.items():
        np.testing.assert_array_equal(matrices[name][0], p_i)
        np.testing.assert_array_equal(matrices[name][1], p_o)


def test_layers_attributes_and_layout_are_read_back(tmp_path):
    output = Output(tmp_path)
    store = ProjectionStore(tmp_path)
    assert store.layers == output.layers
    assert store.attributes["note"] == "kept"
    assert store.layout == output.layout


def test_few_files_stay_mapped_and_close_unmaps_them(tmp_path):
    output = Output(
        tmp_path, n_samples=200, config=StoreConfig(encoding="dense", rows_per_shard=1)
    ).fill()
    store = ProjectionStore(tmp_path)
    for _ in range(2):
        np.testing.assert_array_equal(store.rows(range(200)), output.decoded())
        assert len(store._maps._items) == 64
        store.close()
        assert len(store._maps._items) == 0


def test_pickled_store_is_its_path(tmp_path):
    output = Output(tmp_path).fill()
    store = ProjectionStore(tmp_path)
    store.rows([1, 2])
    sent = pickle.dumps(store)
    assert len(sent) < 1_000
    np.testing.assert_array_equal(pickle.loads(sent).rows([5]), output.decoded()[[5]])


def test_threads_share_a_store(tmp_path):
    output = Output(
        tmp_path, n_samples=200, config=StoreConfig(encoding="dense", rows_per_shard=1)
    ).fill()
    store = ProjectionStore(tmp_path)
    orders = [np.random.default_rng(seed).permutation(200) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for ids, rows in zip(orders, pool.map(store.rows, orders), strict=True):
            np.testing.assert_array_equal(rows, output.decoded()[ids])


def test_reading_changes_no_setting_of_zarr(filled):
    before = repr(zarr.config.config)
    with ProjectionStore(filled.path) as store:
        store.rows([0])
        list(store.scan())
        store.array("projection_matrices")
    assert repr(zarr.config.config) == before


def test_few_zarr_threads_are_a_setting_of_the_context_only():
    before = repr(zarr.config.config)
    with few_zarr_threads():
        assert zarr.config.get("threading.max_workers") == 2
    assert repr(zarr.config.config) == before


def test_scan_needs_memory_for_its_blocks_only(tmp_path):
    output = Output(
        tmp_path,
        n_samples=4_096,
        widths=((16, 16),),
        config=StoreConfig(encoding="dense", rows_per_shard=512),
    ).fill()
    store = ProjectionStore(tmp_path)
    tracemalloc.start()
    for _ in store.scan(128):
        pass
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    block_bytes = 128 * 256 * 4
    assert peak_bytes < 5 * block_bytes < output.rows.nbytes / 2


def test_no_whole_column_is_loaded(tmp_path):
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


def test_scan_stored_yields_stored_bytes_and_scales(filled):
    store = ProjectionStore(filled.path)
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


@pytest.mark.parametrize("settings", [{}, PACKED_CHUNKS | {"config": packed("int4")}])
def test_rows_of_packed_and_dense_units_that_are_missing_are_nan(tmp_path, settings):
    output = Output(tmp_path, **{"n_samples": 40, **settings})
    output.commit(0)
    output.commit(2)
    want = output.decoded()
    want[16:32] = np.nan
    store = ProjectionStore(tmp_path)
    assert store.missing().tolist() == list(range(16, 32))
    np.testing.assert_array_equal(store.rows(range(40), missing="nan"), want)
    np.testing.assert_array_equal(store.rows([33, 20, 3], missing="nan"), want[[33, 20, 3]])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.scan(7)]), want)
    _, stored, scale = next(store.scan_stored(40))
    np.testing.assert_array_equal(stored[16:32], np.full_like(stored[16:32], store.layout.fill))
    np.testing.assert_array_equal(store.decode(stored, scale), want)
    with pytest.raises(StoreError, match="16 of the requested samples are missing"):
        store.rows(range(40))


def test_stored_parts_of_packed_rows_are_decoded_with_their_layers(tmp_path):
    output = Output(tmp_path, **PACKED_CHUNKS, config=packed("int2")).fill()
    store, chosen = ProjectionStore(tmp_path), ["h.7.mlp", "h.3.mlp"]
    want = np.concatenate([store.layer(name)[:].reshape(40, -1) for name in chosen], axis=1)
    (ids, stored, scale) = next(store.scan_stored(40, chosen))
    assert stored.shape == (40, output.layout.header_width + 2 * 256)
    np.testing.assert_array_equal(store.decode(stored, scale, chosen), want[ids])


def test_scan_stored_yields_nan_for_a_missing_unit(tmp_path):
    output = Output(tmp_path)
    output.commit(0)
    output.commit(2)
    _, stored, scale = next(ProjectionStore(tmp_path).scan_stored())
    assert np.isnan(scale[16:32]).all()
    assert np.isnan(stored[16:32]).all()
    np.testing.assert_array_equal(stored[32:48], output.stored[32:48])


ONE_LAYER_ALONE = """
import ctypes, mmap, pathlib, sys
import numpy as np
from gradproj.store import ProjectionStore
from gradproj.store.mapped_shard import MappedShard

output, protect, read = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
made, make = [], MappedShard.__init__
def remember(shard, *args):
    make(shard, *args)
    made.append(shard)
MappedShard.__init__ = remember
store = ProjectionStore(output)
store.rows([0], [read])  # the shard is mapped and its index has been read
names = [layer.name for layer in store.layers]
chunk = store.layout.chunk_rows * store.layout.chunk_width * 2
assert chunk % mmap.PAGESIZE == 0
address = np.frombuffer(made[0].file.data, np.uint8).ctypes.data
for band in range(2):
    for number, name in enumerate(names):
        if name != protect:  # touching these pages kills the process
            at = address + (band * len(names) + number) * chunk
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), ctypes.c_size_t(chunk), 0) == 0
n = len(store)
for rows in (store.layer(read)[:], store.layer(read)[[n - 1, 0, 7]], store.layer(read)[n // 2]):
    assert np.isfinite(rows).all()
list(store.layer(read).scan(33)), list(store.scan_stored(layers=[read]))
print("read", len(made))
"""


def test_reading_one_layer_touches_no_bytes_of_others(tmp_path):
    layout = StoreLayout(256, 4 * 256, 256, 128, 256, "float16", "none", 8, 256)
    Output(tmp_path, n_samples=256, widths=((16, 16),) * 4, layout=layout).fill()

    def run(protect: str, read: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", ONE_LAYER_ALONE, str(tmp_path), protect, read]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    alone = run("h.2.mlp", "h.2.mlp")
    assert alone.stdout == "read 1\n", alone.stderr
    assert run("h.2.mlp", "h.1.mlp").returncode == -signal.SIGSEGV


def test_disk_reads_one_layer_and_not_its_neighbours(tmp_path):
    layout = StoreLayout(1024, 4 * 256, 1024, 512, 256, "float16", "none", 8, 1024)
    output = Output(tmp_path, n_samples=1024, widths=((16, 16),) * 4, layout=layout).fill()
    path = output.path / output.layout.shard_name(0)
    chunk_pages = 512 * 256 * 2 // mmap.PAGESIZE
    for read in (
        lambda store: store.layer("h.2.mlp")[:],
        lambda store: list(store.layer("h.2.mlp").scan(100)),
        lambda store: store.layer("h.2.mlp")[[3, 900]],
    ):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if pages_in_memory(path).any():
            pytest.skip("this file system keeps its files in memory")
        read(ProjectionStore(tmp_path))
        in_memory = pages_in_memory(path)[: 8 * chunk_pages].reshape(8, chunk_pages)
        assert in_memory[[2, 6]].any(axis=1).all()
        assert not in_memory[[0, 1, 4, 5]].any()
        assert not in_memory[[3, 7], chunk_pages // 2 :].any()  # the kernel may round a request up


def pages_in_memory(path) -> np.ndarray:
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    flags = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
    where = (
        ctypes.c_void_p(data.ctypes.data),
        ctypes.c_size_t(len(data)),
        ctypes.c_void_p(flags.ctypes.data),
    )
    assert ctypes.CDLL(None).mincore(*where) == 0
    return (flags & 1).astype(bool)
