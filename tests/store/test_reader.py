"""``ProjectionStore`` returns the rows that were written, in any order, from any writer."""

import ctypes
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import zarr
from helpers.encoding import decode
from helpers.reader_laws import ReaderLaws
from helpers.stores import (
    READER_CASES,
    Output,
)

from gradproj.store import ProjectionStore
from gradproj.store.layout import StoreConfig, StoreLayout
from gradproj.store.writer import create_store
from gradproj.store.zarr_threads import few_zarr_threads


@pytest.fixture(scope="module", params=READER_CASES)
def filled(request, tmp_path_factory):
    """A store of every kind: the tests that use it hold for all of them."""
    return READER_CASES[request.param](tmp_path_factory.mktemp("output"))


class TestStoreOnDisk(ReaderLaws):
    @pytest.fixture
    def put(self):
        return lambda path: path


def test_rows_equal_what_zarr_reads_times_the_scale(filled):
    group = zarr.open_group(str(filled.store_path), mode="r")
    stored, scale = group["projections"][...], group["row_scale"][...]
    want = decode(stored, scale, filled.layout, filled.layers)
    np.testing.assert_array_equal(ProjectionStore(filled.store_path).rows(range(len(want))), want)


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
