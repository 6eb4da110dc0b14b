"""A range of an object is read whole, of one version, and an early end is never its end."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers.http_files import http_files

from gradproj.errors import CorpusError
from gradproj.storage.address import Address
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.listing import all_facts, glob_objects, list_folder
from gradproj.storage.object_path import object_at
from gradproj.storage.retry import RetryPolicy
from gradproj.storage.stream import NoRanges, ObjectChanged, ObjectStream

FAST = RetryPolicy(first_s=0.01, longest_s=0.05, deadline_s=30.0, tries=4, stall_s=1.0)
CONTENT = np.random.default_rng(0).bytes(5_000_000)
START, STOP = 1_000, 4_500_000


@pytest.fixture
def site():
    with http_files(files={"/a b/x.tar": CONTENT}) as site:
        yield site


@pytest.fixture
def address(site):
    return Address.parse(f"{site.url}/a%20b/x.tar")


def stream_of(address, start=START, stop=STOP, **changes):
    (facts,) = all_facts([address]).values()
    return ObjectStream(address, replace(facts, **changes), start, stop, FAST)


def test_a_range_is_one_request_however_it_is_read(site, address):
    stream = stream_of(address)
    assert stream.read(10) == CONTENT[START : START + 10]
    assert stream.tell() == START + 10
    stream.seek(START + 5)
    stream.seek(3_000_000)
    assert stream.read(1_500_001) == CONTENT[3_000_000:STOP]
    assert stream.read(5) == b""
    assert [request.headers["range"] for request in site.gets()] == [f"bytes={START}-{STOP - 1}"]
    with pytest.raises(OSError, match="byte 1,000 was read and is gone"):
        stream.seek(START)


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("fault", [("cut", 1_700_000), ("stall", 1_700_000, 3.0), 503, ("cut", 0)])
def test_a_body_that_is_cut_or_stalls_goes_on_from_where_it_stopped(site, address, fault, etags):
    site.etags = etags
    site.faults.append(fault)
    assert stream_of(address).read() == CONTENT[START:STOP]
    first, second = [request.headers["range"] for request in site.gets()]
    assert first == f"bytes={START}-{STOP - 1}"
    start, stop = second.removeprefix("bytes=").split("-")
    n_sent = fault[1] if isinstance(fault, tuple) else 0
    assert int(stop) == STOP - 1
    assert 0 <= n_sent - (int(start) - START) < 2**20


def test_a_body_that_never_comes_whole_is_an_error(site, address):
    site.faults.extend([("cut", 100)] + [("cut", 0)] * 50)
    with pytest.raises(CorpusError, match=r"x.tar: its bytes end at 1,.00 of 4,500,000"):
        stream_of(address).read()


@pytest.mark.parametrize("etags", [True, False])
def test_another_version_is_an_error_before_and_in_the_middle(site, address, etags):
    site.etags = etags
    (facts,) = all_facts([address]).values()
    site.files["/a b/x.tar"] = CONTENT[:-1] + b"?"
    if etags:
        with pytest.raises(ObjectChanged, match="its etag"):
            ObjectStream(address, facts, START, STOP, FAST)
    site.files["/a b/x.tar"] = CONTENT[:-512]
    with pytest.raises(ObjectChanged):
        ObjectStream(address, facts, START, STOP, FAST)
    del site.files["/a b/x.tar"]
    with pytest.raises(ObjectChanged, match="does not exist any more"):
        ObjectStream(address, facts, START, STOP, FAST)


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(site, address):
    site.faults.append(("cut", 1_200_000))
    stream = stream_of(address)
    stream.read(10)
    site.files["/a b/x.tar"] = CONTENT[::-1]
    with pytest.raises((ObjectChanged, CorpusError)):
        stream.read()


def test_a_server_without_ranges_sends_whole_objects_only(site, address):
    site.ranges = False
    with pytest.raises(NoRanges, match="whole files only"):
        stream_of(address)
    site.faults.append(("cut", 2_000_000))
    assert stream_of(address, 0, len(CONTENT)).read() == CONTENT


def test_memory_does_not_grow_with_the_range(site, address):
    site.files["/a b/x.tar"] = CONTENT * 4
    ((_, facts),) = all_facts([address]).items()
    stream = ObjectStream(address, facts)  # a busy machine may stall
    tracemalloc.start()
    try:
        while stream.read(512):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


# ---- Buckets


@pytest.fixture
def folder(bucket):
    folder = bucket / "pile"
    for name in ["00.tar", "01.tar", "x.json", "10.tar", "deep/20.tar", *"abcdefgh"]:
        object_at(folder / name).put([name.encode()])
    return folder


def test_objects_are_listed_matched_and_described(folder):
    tars = [folder / name for name in ("00.tar", "01.tar", "10.tar")]
    assert [a for a in list_folder(folder) if a.suffix == ".tar"] == tars
    assert glob_objects(folder / "0?.tar") == tars[:2]
    assert glob_objects(folder / "*.zip") == []
    with pytest.raises(CorpusError, match="only the last part of an address may be a pattern"):
        glob_objects(folder / "*" / "x.tar")
    few = all_facts([*tars, folder / "absent.tar"])
    assert list(few) == tars
    assert few[tars[0]].size_bytes == 6
    many = all_facts([*tars, *(folder / name for name in "abcdefgh"), folder / "absent.tar"])
    assert {tar: many[tar] for tar in tars} == few
    assert len(many) == 11


def test_a_range_of_an_object_in_a_bucket_is_of_the_version_asked_for(folder):
    address = folder / "x.tar"
    object_at(address).put([CONTENT])
    stream = stream_of(address)
    object_at(address).put([CONTENT[::-1]])
    with pytest.raises(ObjectChanged, match="its etag or size is not that of the index"):
        ObjectStream(address, stream._facts, START, STOP, FAST)
    assert stream_of(address).read() == CONTENT[::-1][START:STOP]
    object_at(address).delete()
    with pytest.raises(ObjectChanged, match="does not exist any more"):
        ObjectStream(address, ObjectFacts(9), 0, 5, FAST)


def test_a_missing_bucket_is_one_line(bucket):
    absent = Address(bucket.scheme, "no-such-bucket", "x")
    with pytest.raises(CorpusError, match=r"://no-such-bucket/x: there is no such bucket"):
        object_at(absent).read_bytes()
    with pytest.raises(CorpusError, match="there is no such bucket"):
        list_folder(absent)
