"""The cache: whole objects, once a machine, within its bytes, whatever is killed."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.http_files import http_files

from gradproj.errors import StoreError
from gradproj.storage.address import Address
from gradproj.storage.cache import FileCache, cache_of
from gradproj.storage.listing import all_facts
from gradproj.storage.stream import ObjectChanged

SIZE = 300_000


@pytest.fixture
def site():
    files = {f"/{name}": name.encode() * SIZE for name in "abcd"}
    with http_files(files=files, ranges=False) as site:
        yield site


@pytest.fixture
def objects(site):
    return list(all_facts([Address.parse(f"{site.url}/{name}") for name in "abcd"]).items())


@pytest.fixture
def cache(tmp_path):
    return FileCache(tmp_path / "cache", 2 * SIZE + 10)


def content(cache, item):
    with cache.open(*item) as file:
        return file.read()


def held(cache):
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_an_object_is_fetched_once_and_the_oldest_used_make_room(cache, objects, site):
    a, b, c, d = objects
    for item in (a, b, a, a):
        assert content(cache, item) == site.files[f"/{item[0].name}"]
        time.sleep(0.01)
    assert len(site.gets()) == 2
    assert content(cache, c)[:1] == b"c"  # b was used longest ago
    assert held(cache) <= cache.max_bytes
    assert cache.find(*b) is None
    assert content(cache, a)[:1] == b"a"
    assert len(site.gets()) == 3
    with cache.open(*c) as reader:
        for item in (a, d, b):
            content(cache, item)
            time.sleep(0.01)
        assert cache.find(*c) is None
        assert reader.read() == site.files["/c"]  # who reads a deleted one reads on
    assert held(cache) <= cache.max_bytes


def test_another_version_is_another_object_and_none_is_kept_of_a_changed_one(cache, objects, site):
    (a, facts), *_ = objects
    content(cache, (a, facts))
    site.files["/a"] = b"A" * SIZE
    ((_, new),) = all_facts([a]).items()
    assert content(cache, (a, new))[:1] == b"A"
    assert content(cache, (a, facts))[:1] == b"a"
    site.files["/b"] = b"B" * SIZE
    with pytest.raises(ObjectChanged):
        cache.open(*objects[1])
    assert cache.find(*objects[1]) is None


def test_an_object_larger_than_the_cache_is_refused(objects, tmp_path):
    with pytest.raises(StoreError, match=r"300,000 bytes, more than the cache .* --cache_gb"):
        cache_of(str(tmp_path), 0.0002).open(*objects[0])
    assert cache_of("", 1.0) is None


def test_many_at_once_fetch_an_object_once(cache, objects, site):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: content(cache, objects[0]), range(8)))
    assert set(found) == {site.files["/a"]}
    assert len(site.gets()) == 1


KILLED = """
import sys
from gradproj.storage.address import Address
from gradproj.storage.cache import FileCache
from gradproj.storage.listing import all_facts
((address, facts),) = all_facts([Address.parse(sys.argv[2])]).items()
FileCache(sys.argv[1], 2_000_000).open(address, facts)
"""


def test_what_a_killed_process_left_is_fetched_again_and_makes_room(cache, objects, site):
    site.faults.append(("stall", 1000, 30.0))
    command = [sys.executable, "-c", KILLED, str(cache.folder), str(objects[0][0])]
    with subprocess.Popen(command, env=os.environ) as process:
        while not list(cache.folder.glob("*.part")) or not site.gets():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert len(list(cache.folder.glob("*.part"))) == 1
    assert content(cache, objects[1])[:1] == b"b"
    assert content(cache, objects[2])[:1] == b"c"
    assert not list(cache.folder.glob("*.part"))  # it made room
    assert content(cache, objects[0]) == site.files["/a"]
    assert held(cache) <= cache.max_bytes


def test_an_object_is_on_disk_before_it_has_its_name(cache, objects, monkeypatch):
    flushed, named = [], []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    rename = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (named.append(os.stat(a).st_ino in flushed), rename(a, b))
    )
    content(cache, objects[0])
    assert named == [True]
