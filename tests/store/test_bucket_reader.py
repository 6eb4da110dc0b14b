"""Reading a store in a bucket: rows as from a disk, and what is asked of the bucket."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers.buckets import CountedStore, copy_into, memory_path
from helpers.reader_laws import ReaderLaws
from helpers.stores import PACKED_CHUNKS, READER_CASES, Output, packed
from obstore.exceptions import PermissionDeniedError

from gradproj.__main__ import main
from gradproj.errors import StoreError
from gradproj.storage.byte_ranges import RangeCache, joined
from gradproj.store import ProjectionStore
from gradproj.store.layout import StoreConfig, StoreLayout, plan_layout

CASES = [
    "float16", "zstd bfloat16", "whole rows in a chunk", "several chunks a layer",
    "many chunks a shard", "written by zarr-python", "training store", "signs, a chunk a layer",
    "int4 written by zarr-python",
]  # fmt: skip
"""Every form of shard and of rows, once."""


class TestStoreInABucket(ReaderLaws):
    @pytest.fixture(scope="class", params=CASES)
    @classmethod
    def filled(cls, request, tmp_path_factory):
        return READER_CASES[request.param](tmp_path_factory.mktemp("output"))

    @pytest.fixture
    def put(self):
        place = memory_path("out")
        return lambda path: copy_into(path, place)


N_LAYERS, WIDTH, N_ROWS, CHUNK_ROWS = 4, 256, 1024, 128
CHUNK_BYTES = CHUNK_ROWS * WIDTH * 2
INDEX_BYTES = 16 * N_LAYERS * 512 // CHUNK_ROWS + 4


@pytest.fixture
def counted(tmp_path):
    """An opened store of two units, four bands each; its columns have been read. Its requests."""
    layout = StoreLayout(
        N_ROWS, N_LAYERS * WIDTH, 512, CHUNK_ROWS, WIDTH, "float16", "none", 8, N_ROWS
    )
    output = Output(tmp_path, n_samples=N_ROWS, widths=((16, 16),) * N_LAYERS, layout=layout)
    place = copy_into(output.fill().path, memory_path("out"))
    place.store = requests = CountedStore(place.store)
    store = ProjectionStore(place)
    store.column("row_scale")
    requests.clear()
    return output, store, requests


def test_a_scan_asks_for_each_byte_once_in_large_ranges(counted):
    output, store, requests = counted
    for scan in (store.scan, store.scan_stored):
        blocks = list(scan())
        assert sum(len(block[0]) for block in blocks) == N_ROWS
        assert requests.n_bytes == N_ROWS * N_LAYERS * WIDTH * 2 + 2 * INDEX_BYTES
        assert requests.n_requests <= 2 + 2 * 4  # the indexes, and at most a request a band
        store.close()
        store.column("row_scale")
        requests.clear()
    stored = np.concatenate([tile for band in store.scan_bands(50) for _, tile in _copied(band)])
    assert stored.size == output.stored.size
    assert requests.n_bytes == N_ROWS * N_LAYERS * WIDTH * 2 + 2 * INDEX_BYTES


def _copied(band):
    return [(at, tile.copy()) for at, tile in band.tiles]


@pytest.mark.parametrize("rows_per_block", [None, 50])
def test_one_layer_of_all_rows_fetches_its_bytes_only(counted, rows_per_block):
    output, store, requests = counted
    rows = [rows for _, rows in store.scan(rows_per_block, layers=["h.2.mlp"])]
    np.testing.assert_array_equal(np.concatenate(rows), output.decoded()[:, 512:768])
    assert requests.n_bytes == N_ROWS * WIDTH * 2 + 2 * INDEX_BYTES
    assert requests.n_requests == 2 + 8  # a chunk of each band
    for begin, end in requests.ranges:
        if end - begin != INDEX_BYTES:
            assert (end - begin, begin // CHUNK_BYTES % N_LAYERS) == (CHUNK_BYTES, 2)


def test_random_rows_are_fetched_in_joined_ranges(counted):
    output, store, requests = counted
    ids = np.array([900, 3, 5, 60, 700, 3])
    np.testing.assert_array_equal(store.rows(ids), output.decoded()[ids])
    # Rows 3, 5 and 60 are near each other and near those of the next chunk; 700 and 900 are not.
    assert requests.n_requests <= 2 + 3
    assert requests.n_bytes < 3 * N_LAYERS * CHUNK_BYTES
    requests.clear()
    store.rows([900])
    assert requests.n_requests <= N_LAYERS
    assert requests.n_bytes == N_LAYERS * WIDTH * 2


def test_rows_of_many_units_are_asked_for_at_the_same_time(tmp_path):
    output = Output(tmp_path, **PACKED_CHUNKS, config=packed("int4", rows_per_shard=16))
    place = copy_into(output.fill().path, memory_path("out"))
    place.store = requests = CountedStore(place.store)
    store = ProjectionStore(place)
    store.column("row_scale")
    waiting, all_there = [], threading.Event()

    def wait(key):
        """Answer no shard's index before those of all three were asked for."""
        waiting.append(key)
        if len({key for key in waiting if "/c." in key}) == 3:
            all_there.set()
        assert all_there.wait(60)

    requests.before_get = wait
    np.testing.assert_array_equal(store.rows([39, 2, 20]), output.decoded()[[39, 2, 20]])


def test_a_scan_holds_a_bounded_part_of_the_store(counted, monkeypatch):
    _, store, _ = counted
    limit = 4 * N_LAYERS * CHUNK_BYTES  # four of eight bands
    monkeypatch.setattr("gradproj.storage.byte_ranges.AHEAD_BYTES", limit // 2)
    monkeypatch.setattr("gradproj.store.shard_reader.AHEAD_BYTES", limit // 2)
    cache = store._rows._shards._ranges = RangeCache(limit)
    most = 0
    for _ in store.scan(64):
        most = max(most, cache._n_bytes)
    assert N_LAYERS * CHUNK_BYTES <= most <= limit
    assert cache._n_bytes == 0  # dropped once it was read


def test_a_reader_whose_ranges_were_dropped_is_still_right(counted, monkeypatch):
    output, store, _ = counted
    store._rows._shards._ranges = RangeCache(limit=CHUNK_BYTES)
    np.testing.assert_array_equal(store.rows(range(N_ROWS)), output.decoded())
    np.testing.assert_array_equal(
        np.concatenate([rows for _, rows in store.scan(100)]), output.decoded()
    )


def test_ranges_asked_of_a_shard_are_not_taken_for_its_next_version(counted):
    _, store, _ = counted
    store._rows._shards.prefetch(1, 0, CHUNK_ROWS, store._selection(None))
    store._maps.clear()  # as if many others had been opened since
    shard = store.path / "projections/c.1.0"
    data = shard.read_bytes()
    shard.put([bytes(len(data) - INDEX_BYTES) + data[-INDEX_BYTES:]])
    assert not store.rows(range(512, 512 + CHUNK_ROWS)).any()


@pytest.mark.parametrize("change", ["written again", "deleted", "truncated"])
def test_a_shard_that_changes_during_a_scan_is_an_error_with_its_name(counted, change):
    _, store, _ = counted
    shard = store.path / "projections/c.1.0"
    store.rows([600])  # its index has been read
    data = shard.read_bytes()
    if change == "deleted":
        shard.delete()
    else:
        shard.put([data if change == "written again" else data[:100_000]])
    with pytest.raises(StoreError, match=r"c\.1\.0.* (has changed|was deleted) while it was read"):
        list(store.scan())


def compressed_store(output):
    """Return the output's store as one in a bucket, and its counted requests."""
    place = copy_into(output.path, memory_path("out"))
    place.store = requests = CountedStore(place.store)
    store = ProjectionStore(place)
    store.column("row_scale")
    requests.clear()
    return store, requests


@pytest.mark.parametrize("compressor", ["zstd", "blosc"])
def test_compressed_chunks_are_asked_for_ahead_and_once(tmp_path, monkeypatch, compressor):
    config = StoreConfig(encoding="dense", compressor=compressor, rows_per_shard=64)
    layout = replace(plan_layout(256, [256] * 2, 8, config), chunk_rows=32)
    output = Output(tmp_path, n_samples=256, widths=((16, 16),) * 2, layout=layout)
    store, requests = compressed_store(output.fill())
    sizes = [(output.path / layout.shard_name(unit)).stat().st_size for unit in range(4)]
    keys, all_there = [], threading.Event()

    def wait(key):
        """Answer no chunk before all were asked for; the first request of a shard is its index."""
        keys.append(key)
        if len(keys) == 4 + 8:  # a request a band
            all_there.set()
        assert keys.count(key) == 1 or all_there.wait(60)

    requests.before_get = wait
    for ids, rows in store.scan(16):
        np.testing.assert_array_equal(rows, output.decoded()[ids])
    assert requests.n_requests == 4 + 8
    assert requests.n_bytes == sum(sizes)
    requests.clear()
    layer = [rows for _, rows in store.scan(layers=["h.1.mlp"])]
    np.testing.assert_array_equal(np.concatenate(layer), output.decoded()[:, 256:])
    assert requests.n_requests == 8
    assert requests.n_bytes < 0.6 * sum(sizes)
    requests.clear()
    np.testing.assert_array_equal(store.rows([3, 200, 5]), output.decoded()[[3, 200, 5]])
    assert requests.n_requests == 2


def test_a_refused_read_of_compressed_rows_is_one_line(tmp_path):
    store, requests = compressed_store(READER_CASES["zstd bfloat16"](tmp_path))

    def refuse(key):
        raise PermissionDeniedError("status code: 400 <Code>ExpiredToken</Code>\nsecret")

    requests.before_get = refuse
    with pytest.raises(StoreError, match="the credentials have expired") as error:
        store.rows([0])
    assert "secret" not in str(error.value)


def test_ranges_are_joined():
    begins, ends = np.array([10, 0, 30, 12, 100]), np.array([12, 5, 40, 20, 101])
    assert joined(begins, ends) == [(0, 5), (10, 20), (30, 40), (100, 101)]
    assert joined(begins, ends, 10) == [(0, 40), (100, 101)]
    assert joined(begins[:0], ends[:0]) == []


def test_a_failed_request_is_made_again_by_the_next_reader():
    cache, fails = RangeCache(), [True]

    def fetch(begin, end):
        if fails.pop():
            raise StoreError("the bucket is away")
        return bytes(range(begin, end))

    out = bytearray(4)
    cache.ask("x", [(0, 8)], fetch)
    with pytest.raises(StoreError, match="away"):
        cache.read_into("x", memoryview(out), 2, fetch)
    fails.append(False)
    cache.read_into("x", memoryview(out), 2, fetch)
    assert bytes(out) == bytes([2, 3, 4, 5])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("SCHEME://there-is-none/out", "no such bucket"),
        ("BUCKET/out", "there is no store at"),
        ("https://example.org/out", "outputs lie on disk or in a bucket"),
        ("s3://user:secret@bucket/out", "credentials, which do not belong in an address"),
    ],
)
def test_a_store_that_is_not_there_is_one_line(bucket, capsys, place, message):
    for command in (["status"], ["query", "--text", "x"], ["verify"]):
        place = place.replace("BUCKET", str(bucket)).replace("SCHEME", bucket.scheme)
        assert main([command[0], place, *command[1:]]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert "secret" not in printed.err
        assert printed.err.startswith("gradproj: ")
        assert printed.err.count("\n") == 1
