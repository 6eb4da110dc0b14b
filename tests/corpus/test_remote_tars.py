"""Tars of buckets and web servers give what the same tars give on disk, or an error with a name."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from corpus.test_tar_scan import DAMAGE, FIELD, TARS, small_tar
from helpers.corpora import document, plain_members, write_tar
from helpers.http_files import http_files

from gradproj.__main__ import main
from gradproj.corpus.index import build_index
from gradproj.corpus.index_file import load_index, open_corpus, save_index
from gradproj.corpus.stream import read_documents, read_members
from gradproj.corpus.tar import scan
from gradproj.corpus.tar.paths import default_index_path, list_tars
from gradproj.corpus.tar.places import check_unchanged
from gradproj.corpus.tar.scan import scan_tar
from gradproj.corpus.tar.scan_journal import ScanJournal
from gradproj.errors import CorpusError
from gradproj.storage.address import Address
from gradproj.storage.cache import FileCache
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.listing import all_facts
from gradproj.storage.object_path import object_at


@pytest.fixture
def site():
    with http_files() as site:
        yield site


@pytest.fixture
def tars(tmp_path):
    """200 samples in 4 tars: several blocks, one sample, none, long names."""
    folder = tmp_path / "tars"
    folder.mkdir()
    return [
        write_tar(folder / "0.tar", plain_members(130)),
        write_tar(folder / "1.tar", []),
        write_tar(folder / "2.tar", plain_members(1)),
        write_tar(
            folder / "3.tar",
            [("k" * 120 + name, data) for name, data in plain_members(69)],
            tarfile.PAX_FORMAT,
        ),
    ]


@pytest.fixture(params=["s3", "http"])
def folder(request, tars, site):
    """The address of a folder with the same tars."""
    if request.param == "http":
        site.files = {f"/pile/{tar.name}": tar.read_bytes() for tar in tars}
        return Address.parse(f"{site.url}/pile")
    folder = request.getfixturevalue("bucket") / "pile"
    for tar in tars:
        object_at(folder / tar.name).put([tar.read_bytes()])
    return folder


def index_of(shards, **options):
    return build_index(list_tars(str(shards)), progress=False, **options)


def contents(documents):
    return [(d.sample_id, d.key, d.tar, d.domain, d.content) for d in documents]


def scanned(place, facts=None):
    try:
        return scan_tar(place, FIELD, facts)
    except CorpusError as error:
        return str(error).replace(str(place), "TAR")


# ---- the index


def test_a_scan_finds_what_it_finds_on_disk_damage_included(site, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_CHUNK_BYTES", 4096)  # members and headers span chunks
    for number, members in enumerate(TARS.values()):
        write_tar(tmp_path / f"{number}.tar", members, tarfile.PAX_FORMAT)
    for number, (damage, _, _) in enumerate(DAMAGE.values()):
        path = small_tar(tmp_path / f"damaged-{number}.tar")
        path.write_bytes(damage(path.read_bytes()))
    (tmp_path / "empty.tar").touch()
    outcomes = []
    for path in sorted(tmp_path.glob("*.tar")):
        site.files[f"/{path.name}"] = path.read_bytes()
        (item,) = all_facts([Address.parse(f"{site.url}/{path.name}")]).items()
        outcomes.append(scanned(*item))
        assert outcomes[-1] == scanned(path), path
    assert sum(isinstance(outcome, str) for outcome in outcomes) == len(DAMAGE) + 1
    assert len(site.gets()) == sum(map(bool, site.files.values()))  # one request a tar


def test_the_index_is_that_of_the_tars_on_disk(folder, tars):
    local = index_of(tars[0].parent)
    remote = index_of(f"{folder}/{{0..3}}.tar", processes=2 if folder.scheme == "s3" else 1)
    assert remote.fingerprint == local.fingerprint
    assert remote.domain_counts() == local.domain_counts()
    for mine, other in zip(remote.tars, local.tars, strict=True):
        assert mine.path == folder / other.name
        assert mine.etag
        changed = {"path": other.path, "mtime_ns": other.mtime_ns, "etag": ""}
        assert replace(mine, **changed) == other


def test_a_folder_a_glob_and_a_list_name_the_tars_of_a_bucket(bucket, tars, tmp_path):
    folder = bucket / "pile"
    for tar in tars:
        object_at(folder / tar.name).put([tar.read_bytes()])
    notes = b"# order\n3.tar\n" + f"{folder}/0.tar\n".encode()
    object_at(folder / "notes.txt").put([notes])
    (tmp_path / "all.list").write_text(f"tars/1.tar\n{folder}/{{2..3}}.tar\n")
    names = {
        f"{folder}": "0123",
        f"{folder}/*.tar": "0123",
        f"{folder}/[13].tar": "13",
        f"{folder}/{{2,0}}.tar": "20",
        f"{folder}/notes.txt": "30",
        f"{tmp_path}/all.list": "123",
    }
    for shards, wanted in names.items():
        assert [tar.name for tar in list_tars(shards)] == [f"{n}.tar" for n in wanted], shards
    mixed = index_of(tmp_path / "all.list")
    assert [type(tar.path) is Address for tar in mixed.tars] == [False, True, True]
    assert len(list(read_documents(mixed, 0, mixed.n_samples))) == 70
    with pytest.raises(CorpusError, match="nothing matches"):
        list_tars(f"{folder}/x*.tar")
    with pytest.raises(CorpusError, match=r"the folder has no \.tar"):
        list_tars(f"{bucket}/nothing")
    with pytest.raises(CorpusError, match=r"2 tars: .*8\.tar, .*9\.tar missing"):
        index_of(f"{folder}/{{3,8,9}}.tar")


def test_the_index_lies_beside_the_tars_and_is_read_from_there(folder, tars, tmp_path):
    index = index_of(f"{folder}/{{0..3}}.tar")
    place = default_index_path(tar.path for tar in index.tars)
    if place.scheme == "http":
        with pytest.raises(
            CorpusError, match="cannot be written to; give a local path or a bucket"
        ):
            save_index(index, place)
        place = tmp_path / "corpus.json"
        save_index(index, place)
        assert load_index(place) == index
        return
    assert save_index(index, place) == index
    assert str(folder) not in object_at(place).read_bytes().decode()  # so the folder can be copied
    assert save_index(index, place) == index  # of two builders one wins
    assert load_index(place) == index
    assert open_corpus(str(place)) == index
    other = index_of(f"{folder}/{{0..1}}.tar")
    with pytest.raises(CorpusError, match="is the index of another corpus"):
        save_index(other, place)
    assert save_index(other, place, replace_existing=True) == other


def test_an_index_of_local_tars_is_the_file_that_earlier_versions_wrote(tars):
    place = tars[0].parent / "corpus.json"
    save_index(index_of(tars[0].parent), place)
    body = json.loads(place.read_text())["index"]
    assert set(body) == {"domain_field", "fingerprint", "tars"}
    assert not {"etag", "anonymous"} & set(body["tars"][0])


def test_a_copied_corpus_keeps_its_index(bucket, tars, tmp_path):
    index = save_index(index_of(tars[0].parent), tmp_path / "corpus.json")
    for tar in tars:
        object_at(bucket / "copy" / tar.name).put([tar.read_bytes()])
    moved = index.relocated(list_tars(f"{bucket}/copy"))
    assert moved.fingerprint == index.fingerprint
    check_unchanged(*moved.tars)
    assert contents(read_documents(moved, 0, 200)) == contents(read_documents(index, 0, 200))
    object_at(bucket / "copy" / "2.tar").put([tars[0].read_bytes()])
    with pytest.raises(CorpusError, match=r"2\.tar has .* bytes, the index has"):
        index.relocated(list_tars(f"{bucket}/copy"))


def test_an_interrupted_scan_goes_on_with_the_tars_that_are_left(
    folder, site, monkeypatch, tmp_path
):
    monkeypatch.setattr("gradproj.corpus.tar.scan_journal._SAVE_EVERY_S", 0.0)
    paths, calls = list_tars(f"{folder}/{{0..3}}.tar"), []

    def scan_three(path, *rest):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scan_tar(path, *rest)

    place = tmp_path / "j.partial" if folder.scheme == "http" else folder / "j.partial"
    whole = build_index(paths, progress=False)
    monkeypatch.setattr("gradproj.corpus.tar.scan_pool.scan_tar", scan_three)
    with pytest.raises(KeyboardInterrupt):
        build_index(paths, progress=False, journal=ScanJournal(place))
    journal = ScanJournal(place)
    assert build_index(paths, progress=False, journal=journal) == whole
    assert calls == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar"]
    journal.discard()
    assert ScanJournal(place).scanned(paths, [ObjectFacts(1)] * 4, FIELD) == [None] * 4


# ---- the stream


@pytest.mark.parametrize("part", [(0, 200), (0, 1), (63, 65), (100, 131), (128, 200), (199, 200)])
def test_documents_are_those_of_the_tars_on_disk(folder, tars, part):
    local, remote = index_of(tars[0].parent), index_of(f"{folder}/{{0..3}}.tar")
    assert contents(read_documents(remote, *part)) == contents(read_documents(local, *part))
    ids = np.arange(*part, 7)
    assert list(read_members(remote, ids)) == list(read_members(local, ids))


def test_a_range_of_documents_is_one_request_a_tar(site, tars):
    site.files = {f"/{tar.name}": tar.read_bytes() for tar in tars}
    index = index_of(f"{site.url}/{{0..3}}.tar")
    offsets = index.tars[0].block_offsets
    for part, ranges in {
        (0, 64): [("0.tar", 0, offsets[1])],
        (70, 100): [("0.tar", offsets[1], offsets[2])],
        (100, 132): [("0.tar", offsets[1], None), ("2.tar", 0, None), ("3.tar", 0, 1)],
    }.items():
        site.requests.clear()
        list(read_documents(index, *part))
        asked = [(r.path[1:], r.headers.get("range")) for r in site.requests]
        assert [name for name, _ in asked] == [name for name, _, _ in ranges]
        for (_, got), (name, start, stop) in zip(asked[:1], ranges[:1], strict=True):
            last = (stop or len(site.files[f"/{name}"])) - 1
            assert got == f"bytes={start}-{last}"
        etags = [r.headers["if-match"] for r in site.requests]
        assert etags == [site.etag(f"/{name}") for name, _, _ in ranges]


def test_a_tar_that_changed_after_the_index_is_named(folder, tars, site):
    index = index_of(f"{folder}/{{0..3}}.tar")
    content = tars[0].read_bytes().replace(b'"text"', b'"next"')
    if folder.scheme == "http":
        site.files["/pile/0.tar"] = content
    else:
        object_at(folder / "0.tar").put([content])
    for read in (
        lambda: check_unchanged(*index.tars),
        lambda: list(read_documents(index, 0, 64)),
        lambda: list(read_documents(index, 0, 130)),
        lambda: list(read_documents(index, 128, 130)),
    ):
        with pytest.raises(CorpusError, match=r"pile/0\.tar: changed since it was indexed: .*etag"):
            read()
    assert list(read_documents(index, 130, 200))


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("fault", [("cut", 70_000), 503, ("cut", 0)], ids=str)
def test_a_body_that_is_cut_is_never_the_end_of_a_tar(fault, etags, site, tmp_path):
    members = [(f"{i:06d}.json", document("x" * 900)) for i in range(200)]
    tar = write_tar(tmp_path / "a.tar", members)
    site.files["/a.tar"], site.etags = tar.read_bytes(), etags
    site.faults.append(fault)
    index = index_of(f"{site.url}/a.tar")
    assert index.fingerprint == index_of(tar).fingerprint
    site.faults.append(fault)
    assert contents(read_documents(index, 0, 200)) == contents(
        read_documents(index_of(tar), 0, 200)
    )


# ---- servers without ranges


def test_a_server_without_ranges_is_read_through_the_cache(site, tars, tmp_path):
    site.ranges = False
    site.files = {f"/{tar.name}": tar.read_bytes() for tar in tars}
    index = index_of(f"{site.url}/{{0..3}}.tar")
    with pytest.raises(CorpusError, match=r"0\.tar: .* whole files only; give --cache_dir"):
        list(read_documents(index, 64, 70))
    cached = replace(index, cache=FileCache(tmp_path / "cache", 10**9))
    local = index_of(tars[0].parent)
    for _ in range(2):
        site.requests.clear()
        for part in [(64, 70), (199, 200), (0, 200)]:
            assert contents(read_documents(cached, *part)) == contents(read_documents(local, *part))
    # A tar that is wanted whole is streamed; parts of others are read from the cache.
    assert [request.path for request in site.requests] == ["/2.tar"]


# ---- the command


def test_the_command_writes_an_index_beside_the_tars_once(folder, capsys, tmp_path):
    argv = ["index", f"{folder}/{{0..3}}.tar"]
    if folder.scheme == "http":
        assert main(argv) == 2
        assert "--index_file must be given: the tars lie where none is w" in capsys.readouterr().err
        argv += ["--index_file", str(tmp_path / "corpus.json")]
    for words in ("corpus.json written", "corpus.json is up to date"):
        assert main(argv) == 0
        assert words in capsys.readouterr().out
    if folder.scheme == "s3":
        # In parts, a tar of the same content has another etag.
        tar = object_at(folder / "0.tar")
        tar.store.put(tar.key, [tar.read_bytes()], use_multipart=True)
        assert main(argv) == 0
        assert "corpus.json renewed: same corpus" in capsys.readouterr().out
