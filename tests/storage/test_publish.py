"""Publishing on disk and in a bucket: laws, the probe, logs."""

import logging
import time
import weakref

import numpy as np
import pytest
from obstore.store import MemoryStore

from gradproj.errors import StoreError
from gradproj.storage import log_file as log_module
from gradproj.storage import publish
from gradproj.storage.address import Address
from gradproj.storage.folders import delete_tree, read_or_none, tree_exists
from gradproj.storage.log_file import log_file
from gradproj.storage.object_path import ObjectPath, names_in, path_of, read_if_changed
from gradproj.storage.probe import check_conditional_writes
from gradproj.storage.publish import ObjectPublisher, Outdated, publisher_of
from gradproj.storage.stored_object import one_buffer


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path, no_fsync):
    if request.param == "disk":
        return tmp_path
    return ObjectPath(MemoryStore(), Address("s3", "memory")) / "out"


class TestPublishers:
    def test_create_keeps_what_is_there(self, root):
        publisher = publisher_of(root)
        assert publisher.create(root / "a", [b"1", memoryview(b"2")])
        assert not publisher.create(root / "a", [b"3"])
        assert (root / "a").read_bytes() == b"12"

    def test_replace_and_update(self, root):
        publisher = publisher_of(root)
        publisher.replace(root / "a", [b"1"])
        publisher.replace(root / "a", [b"2"])
        publisher.update(root / "a", lambda content: content + b"3")
        assert (root / "a").read_bytes() == b"23"
        assert names_in(root) == ["a"]

    def test_a_tree_appears_once_and_whole(self, root):
        publisher, files = publisher_of(root), {"zarr.json": b"{}", "a/c.0": b"1"}
        assert not tree_exists(root / "tree", "zarr.json")
        assert publisher.create_tree(root / "tree", files, "zarr.json")
        assert tree_exists(root / "tree", "zarr.json")
        assert not publisher.create_tree(root / "tree", files | {"zarr.json": b"[]"}, "zarr.json")
        assert (root / "tree" / "zarr.json").read_bytes() == b"{}"
        assert names_in(root) == ["tree"]
        publisher.replace_tree(root / "tree" / "a", {"c.0": b"2"})
        assert (root / "tree" / "a" / "c.0").read_bytes() == b"2"
        delete_tree(root / "tree")
        assert not tree_exists(root / "tree", "zarr.json")
        assert read_or_none(root / "tree" / "zarr.json") is None

    def test_a_file_is_read_again_only_if_it_changed(self, root):
        publisher_of(root).replace(root / "a", [b"1"])
        content, stamp = read_if_changed(root / "a", None)
        assert content == b"1"
        assert read_if_changed(root / "a", stamp) is None
        publisher_of(root).replace(root / "a", [b"22"])
        assert read_if_changed(root / "a", stamp)[0] == b"22"


@pytest.fixture
def memory():
    return ObjectPath(MemoryStore(), Address("s3", "memory")) / "out"


def test_an_empty_object_is_another_writers(memory, monkeypatch):
    memory.put([b""])
    found = iter([b""])  # it is asked for once
    monkeypatch.setattr(publish, "read_or_none", lambda path: next(found))
    assert not ObjectPublisher().create(memory, [b"a"])


def test_a_guarded_replacement_notices_another_writer(memory):
    memory.put([b"old"])

    def another_writes():
        memory.put([b"theirs"])

    with pytest.raises(Outdated):
        ObjectPublisher(another_writes).replace(memory, [b"mine"])
    assert memory.read_bytes() == b"theirs"


def test_the_probe_leaves_nothing(memory):
    check_conditional_writes(memory)
    assert memory.walk_files() == []


def test_a_probe_that_another_start_deletes_is_no_broken_promise(memory):
    class Deleting:
        n_created = 0

        def __getattr__(self, name):
            return getattr(memory.store, name)

        def put(self, key, data, mode=None, **options):
            if mode == "create":
                self.n_created += 1
                if self.n_created == 2:
                    delete_tree(memory / "probe")
            return memory.store.put(key, data, **({"mode": mode} if mode else {}), **options)

    check_conditional_writes(ObjectPath(Deleting(), memory))


@pytest.mark.parametrize("ignored", ["create", "match"])
def test_a_store_that_ignores_conditions_is_refused(memory, ignored):
    class Careless:
        def __init__(self, store):
            self._store = store

        def __getattr__(self, name):
            return getattr(self._store, name)

        def put(self, key, data, mode=None, **options):
            is_create = mode == "create"
            if mode is not None and is_create == (ignored == "create"):
                mode = None
            how = {} if mode is None else {"mode": mode}
            return self._store.put(key, data, **how, **options)

    path = ObjectPath(Careless(memory.store), memory)
    with pytest.raises(StoreError, match="overwrites objects although a write forbids it"):
        check_conditional_writes(path)
    assert path.walk_files() == []


def test_a_log_in_a_bucket_is_copied_at_intervals_and_at_the_end(memory, monkeypatch):
    monkeypatch.setattr(log_module, "COPY_EVERY_S", 0.02)
    handler, copy = (
        log_file(memory / "rank-00000.log", "process"),
        memory / "rank-00000-process.log",
    )
    record = logging.LogRecord("x", logging.INFO, "", 0, "line", (), None)
    handler.emit(record)
    handler.emit(record)
    until = time.monotonic() + 60
    while not copy.exists():
        assert time.monotonic() < until
    handler.close()
    assert copy.read_text() == "line\nline\n"


def test_a_long_log_in_a_bucket_is_put_in_parts(memory, monkeypatch):
    monkeypatch.setattr(log_module, "PART_BYTES", 10)
    handler = log_file(memory / "rank-00000.log", "process")
    for number in range(7):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"{number:03d}", (), None))
        if number in (1, 4):
            handler._copy()
    handler.close()
    parts = [memory / f"rank-00000-process{part}.log" for part in ("", "-1", "-2")]
    assert [part.read_text() for part in parts] == ["000\n001\n00", "2\n003\n004\n", "005\n006\n"]
    assert sorted(path.name for path in memory.iterdir()) == sorted(path.name for path in parts)


def test_buffers_are_joined_one_at_a_time():
    held = []

    def chunks():
        for number in range(4):
            chunk = np.full(2**20, number, np.uint8)
            held.append(weakref.ref(chunk))
            assert sum(ref() is not None for ref in held) <= 2
            yield chunk.data
            del chunk

    assert one_buffer(chunks()) == bytes(np.repeat(np.arange(4, dtype=np.uint8), 2**20))
    assert one_buffer([]) == b""
    data = b"not copied"
    assert one_buffer([data]) is data


def test_errors_of_a_missing_bucket_are_one_line(s3_server, bucket):
    if s3_server.is_shared:
        pytest.skip("SeaweedFS makes a bucket that is missing")
    with pytest.raises(StoreError, match="there is no such bucket") as caught:
        check_conditional_writes(path_of(f"{bucket.scheme}://no-such-bucket-here/out"))
    assert "\n" not in str(caught.value)
