"""The corpus index: stable ids, and an error for every damage or change."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.corpora import plain_members, slow_domain, slow_samples, write_tar
from helpers.jobs import processes_with

from gradproj.corpus.index import build_index, check_unchanged
from gradproj.corpus.index_file import load_index, open_corpus, save_index
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar import scan_pool
from gradproj.corpus.tar.paths import default_index_path, list_tars
from gradproj.errors import CorpusError


def index_of(*paths: Path, **options):
    return build_index(list(paths), progress=False, **options)


# ---- which tars


@pytest.fixture
def folder(tmp_path):
    for name in ("b.tar", "a.tar", "c.tar", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "my.list").write_text("c.tar\n\n./a.tar\n")
    return tmp_path


@pytest.mark.parametrize(
    ("shards", "want"),
    [
        ("", "abc"),
        ("*.tar", "abc"),
        ("{b,a}.tar", "ba"),
        ("{b..c}.tar", "bc"),
        ("{c,[ab]}.tar", "cab"),
        ("my.list", "ca"),
        ("b.tar", "b"),
    ],
)
def test_shards_define_the_order_of_tars(shards, want, folder):
    assert list_tars(f"{folder}/{shards}") == [folder / f"{letter}.tar" for letter in want]


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("{folder}/x*.tar", "nothing matches"),
        ("{folder}/{{a..e}}.tar", "2 tars: .*d.tar, .*e.tar missing"),
        ("{folder}/nowhere", "does not exist"),
        ("{folder}/notes.md", "not a .tar"),
        ("{folder}/a.tar.gz", "compressed tars cannot be read from the middle; unpack"),
        ("{folder}/a.tgz", "compressed tars"),
        ("{folder}/a.tar.zst", "compressed tars"),
        ("{folder}/{{a,b,a}}.tar", "a.tar comes twice"),
        ("{folder}/{{a,b.tar", "braces do not match"),
        ("pipe:cat a.tar", "are not run"),
        ("ftp://host/a.tar", "is an address, and only local paths are read"),
        ("https://host/x*.tar", "a web server has no listing; name the tars with braces"),
        ("s3://k:secret@bucket/a.tar", "credentials, which do not belong in an address"),
        ("{folder}/empty", "the folder has no .tar; it has 1 compressed file: a.tar.gz: unpack"),
        ("{folder}/none.list", "the list file names no tar"),
        ("{folder}/missing.txt", "the list file cannot be read"),
        ("{folder}/remote.list", "remote.list: ftp://b/a.tar is an address"),
    ],
)
def test_unreadable_shards_are_rejected_with_the_reason(shards, words, folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "a.tar.gz").touch()
    (folder / "none.list").write_text("\n")
    (folder / "remote.list").write_text("ftp://b/a.tar\n")
    with pytest.raises(CorpusError, match=words):
        list_tars(shards.format(folder=folder))


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{a,b", "--val_shards {0}: its braces do not match"),
        ("notes.md", "{0}: not a .tar; --val_shards takes tars"),
        ("a.tar", "--val_shards names another corpus than the index: "),
    ],
)
def test_messages_name_the_flag_and_leave_paths_alone(shards, message, tars):
    folder = tars[0].parents[1] / "of --shards"
    folder.mkdir()
    (folder / "notes.md").touch()
    shutil.copy(tars[0], folder / "a.tar")
    save_index(index_of(*tars), folder / "corpus.json")
    with pytest.raises(CorpusError, match=re.escape(message.replace("{0}", f"{folder}/{shards}"))):
        open_corpus(f"{folder}/{shards}", flag="--val_shards", progress=False)


def test_link_to_a_listed_tar_counts_as_the_same_tar(folder):
    (folder / "z.tar").symlink_to(folder / "a.tar")
    with pytest.raises(CorpusError, match=r"z\.tar comes twice \(also as .*a\.tar\)"):
        list_tars(str(folder))


def test_default_index_path_is_in_the_common_folder_of_the_tars(folder):
    assert default_index_path(list_tars(str(folder))) == folder / "corpus.json"
    (folder / "sub").mkdir()
    (folder / "sub" / "d.tar").touch()
    assert default_index_path(list_tars(f"{folder}/{{a.tar,sub/d.tar}}")) is None


# ---- the index


@pytest.fixture
def tars(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    sizes = [70, 0, 1, 130, 0]
    return [write_tar(corpus / f"{i}.tar", plain_members(n, i)) for i, n in enumerate(sizes)]


def test_ids_count_through_the_tars_in_order(tars):
    index = index_of(*tars)
    slow = [
        (number, position)
        for number, tar in enumerate(index.tars)
        for position in range(tar.n_samples)
    ]
    assert index.n_samples == len(slow) == 201
    assert [index.locate(i) for i in range(201)] == slow
    for start, stop in [(0, 201), (0, 0), (69, 72), (70, 71), (71, 201), (201, 201), (150, 160)]:
        spans = list(index.spans(start, stop))
        assert [(n, p) for n, first, last in spans for p in range(first, last)] == slow[start:stop]
        assert all(first < last for _, first, last in spans)
    for wrong in (-1, 201):
        with pytest.raises(
            CorpusError, match=rf"sample id {wrong} is not in this corpus, whose ids are 0 to 200"
        ):
            index.locate(wrong)
    with pytest.raises(CorpusError, match="sample ids 5 to 202 are not in this corpus"):
        list(index.spans(5, 202))


def test_domain_counts_cover_the_whole_corpus(tars):
    index = index_of(*tars)
    slow = Counter(slow_domain(sample["json"]) for tar in tars for sample in slow_samples(tar))
    assert index.domain_counts() == slow
    assert index.domains == tuple(sorted(slow))


def test_index_does_not_depend_on_the_number_of_processes(tars):
    assert index_of(*tars, processes=2) == index_of(*tars, processes=1)


def test_damage_found_by_a_worker_process_is_reported(tars):
    tars[2].write_bytes(b"")
    with pytest.raises(CorpusError, match=r"2\.tar: damaged at byte 0: an empty file"):
        index_of(*tars, processes=2)


def test_dead_scan_worker_is_an_error_with_tar_and_exit_code(tars, monkeypatch):
    monkeypatch.setattr(scan_pool, "_WORKER", "import sys; sys.stdin.read(); sys.exit(3)")
    with pytest.raises(
        CorpusError, match=r"0\.tar: the process that scanned it ended \(exit code 3\)"
    ):
        index_of(*tars, processes=2)


BUILD = """
    import os, sys
    from pathlib import Path
    from gradproj.corpus.index import build_index
    from gradproj.corpus.tar import scan_pool
    {before}
    index = build_index([Path(path) for path in sys.argv[1:]], processes=2, progress=False)
    print(index.fingerprint)
"""


@pytest.mark.parametrize("main", ["script", "-c", "-"])
def test_scan_workers_do_not_import_the_main_module(main, tars, tmp_path):
    # A script without `if __name__ == "__main__"`, a command string, and standard input.
    code = textwrap.dedent(BUILD).format(before="print('main')")
    (tmp_path / "script.py").write_text(code)
    program = {"script": [str(tmp_path / "script.py")], "-c": ["-c", code], "-": ["-"]}[main]
    done = subprocess.run(
        [sys.executable, *program, *map(str, tars)], input=code, capture_output=True, text=True
    )
    assert done.stdout.split() == ["main", index_of(*tars).fingerprint], done.stderr


def test_scan_workers_end_with_a_parent_that_is_killed(tars):
    # The parent kills itself at the first result.
    kill = "scan_pool.TarFacts = lambda **_: os.kill(os.getpid(), 9)"
    code, mark = textwrap.dedent(BUILD).format(before=kill), uuid.uuid4().hex
    parent = subprocess.run(
        [sys.executable, "-c", code, *map(str, tars)], env={**os.environ, "MARK": mark}
    )
    assert parent.returncode == -9
    deadline = time.monotonic() + 60
    while processes_with(mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_missing_results_without_an_error_are_not_an_index(tars, monkeypatch):
    in_processes = scan_pool._in_processes
    monkeypatch.setattr(scan_pool, "_in_processes", lambda *args: list(in_processes(*args))[:-1])
    with pytest.raises(AssertionError, match="4 of 5 tars were scanned"):
        index_of(*tars, processes=2)


def test_zero_processes_are_rejected(tars):
    with pytest.raises(CorpusError, match="needs at least 1 process, got 0"):
        index_of(*tars, processes=0)


def test_copied_corpus_keeps_its_fingerprint_and_a_changed_one_does_not(tars, tmp_path):
    index = index_of(*tars)
    shutil.copytree(tars[0].parent, tmp_path / "copy")
    copies = [tmp_path / "copy" / path.name for path in tars]
    assert index_of(*copies).fingerprint == index.fingerprint
    assert index_of(*reversed(copies)).fingerprint != index.fingerprint
    assert index_of(*copies, domain_field="domain").fingerprint != index.fingerprint
    raw = copies[0].read_bytes()
    copies[0].write_bytes(raw.replace(b"text 5 text", b"text 6 text", 1))
    assert index_of(*copies).fingerprint != index.fingerprint


def test_saved_index_loads_equal(tars, tmp_path):
    index = index_of(*tars)
    assert save_index(index, tars[0].parent / "corpus.json") == index
    assert load_index(tars[0].parent / "corpus.json") == index
    save_index(index, tmp_path / "elsewhere.json")
    assert load_index(tmp_path / "elsewhere.json") == index
    assert sorted(os.listdir(tmp_path)) == ["corpus", "elsewhere.json"]


def test_corpus_folder_can_be_moved_with_its_index(tars, tmp_path):
    save_index(index_of(*tars), tars[0].parent / "corpus.json")
    os.rename(tars[0].parent, tmp_path / "moved")
    moved = load_index(tmp_path / "moved" / "corpus.json")
    for tar in moved.tars:
        check_unchanged(tar)


def test_only_one_of_several_builders_publishes_and_all_get_its_index(tars, tmp_path):
    index = index_of(*tars)
    others = [
        replace(index, tars=tuple(replace(t, mtime_ns=i) for t in index.tars)) for i in range(8)
    ]
    got: list = [None] * 8
    barrier = threading.Barrier(8)

    def build(i):
        barrier.wait()
        got[i] = save_index(others[i], tmp_path / "corpus.json")

    threads = [threading.Thread(target=build, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == load_index(tmp_path / "corpus.json") for one in got)
    assert sorted(os.listdir(tmp_path)) == ["corpus", "corpus.json"]


def test_index_of_another_corpus_is_overwritten_only_with_replace_existing(tars, tmp_path):
    first, other = index_of(*tars), index_of(*tars[:3])
    path = tmp_path / "corpus.json"
    save_index(first, path)
    with pytest.raises(CorpusError, match="is the index of another corpus: 5 tars, 201 samples"):
        save_index(other, path)
    assert load_index(path) == first
    save_index(other, path, replace_existing=True)
    assert load_index(path) == other


def test_unwritable_index_path_is_named(tars, tmp_path):
    with pytest.raises(
        CorpusError, match=r"nowhere/corpus.json: the corpus index cannot be written: No such file"
    ):
        save_index(index_of(*tars), tmp_path / "nowhere" / "corpus.json")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_disk_that_refuses_the_index_is_a_corpus_error(tars, tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    message = f"cannot be written: {os.strerror(code)}; name another path for it"
    with pytest.raises(CorpusError, match=message):
        save_index(index_of(*tars), tmp_path / "corpus.json")
    assert os.listdir(tmp_path) == ["corpus"]


def test_index_that_cannot_be_published_leaves_no_temporary_file(tars, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorpusError, match="folder: the corpus index cannot be written: Is a dir"):
        save_index(index_of(*tars), tmp_path / "folder", replace_existing=True)
    assert sorted(os.listdir(tmp_path)) == ["corpus", "folder"]


def test_index_is_published_atomically_without_hard_links(tars, tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    index = index_of(*tars)
    assert (
        save_index(index, tmp_path / "corpus.json") == load_index(tmp_path / "corpus.json") == index
    )
    assert save_index(index, tmp_path / "corpus.json") == index
    assert sorted(os.listdir(tmp_path)) == ["corpus", "corpus.json"]


def test_index_truncated_anywhere_is_rejected(tars, tmp_path):
    path = tmp_path / "corpus.json"
    save_index(index_of(*tars), path)
    raw = path.read_bytes()
    for n in range(0, len(raw), 97):
        path.write_bytes(raw[:n])
        with pytest.raises(
            CorpusError, match=r"(torn|not a) corpus index .*python -m gradproj index"
        ):
            load_index(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: b'{"a": 1}', "not a corpus index"),
        (lambda raw: b"\x93NUMPY", "not a corpus index"),
        (
            lambda raw: raw.replace(b"gradproj corpus index", b"another thing"),
            "not a corpus index but 'another thing'",
        ),
        (
            lambda raw: raw.replace(b'"format_version":1', b'"format_version":2'),
            "format version 2; this gradproj reads",
        ),
        (lambda raw: raw.replace(b'"n_samples":70', b'"n_samples":71'), "damaged or was edited"),
    ],
)
def test_file_that_is_no_index_of_this_version_is_rejected(change, words, tars, tmp_path):
    path = tmp_path / "corpus.json"
    save_index(index_of(*tars), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorpusError, match=words):
        load_index(path)


def test_changed_tar_is_rejected_by_name(tars):
    tar = index_of(*tars).tars[0]
    check_unchanged(tar)
    os.utime(tar.path, ns=(0, tar.mtime_ns + 1))
    with pytest.raises(
        CorpusError, match=r"0\.tar: changed since it was indexed: it was modified at"
    ) as caught:
        check_unchanged(tar)
    assert "Run `python -m gradproj index` again" in str(caught.value)
    tar.path.write_bytes(b"")
    with pytest.raises(CorpusError, match=r"0\.tar: changed .*: it has 0 bytes, the index says"):
        check_unchanged(tar)
    tar.path.unlink()
    with pytest.raises(CorpusError, match=r"0\.tar: the tar cannot be read: No such file"):
        check_unchanged(tar)


def test_index_is_relocated_to_copies_of_its_tars(tars, tmp_path):
    index = index_of(*tars)
    shutil.copytree(tars[0].parent, tmp_path / "copy")
    copies = [tmp_path / "copy" / path.name for path in tars]
    for path in copies:
        os.utime(path, ns=(0, 12345))
    moved = index.relocated(copies)
    assert (moved.fingerprint, [tar.path for tar in moved.tars]) == (index.fingerprint, copies)
    for tar in moved.tars:
        check_unchanged(tar)
    assert index.relocated(tars) == index
    copies[2].write_bytes(b"short")
    with pytest.raises(CorpusError) as caught:
        index.relocated([copies[1], copies[0], *copies[2:4]])
    assert "4 differences: 4 tars, the index has 5, tar 0 is 1.tar, the index has 0.tar" in str(
        caught.value
    )
    assert "2.tar has 5 bytes" in str(caught.value)


def test_touched_tar_is_still_noticed_after_relocation(tars):
    index = index_of(*tars)
    os.utime(tars[0], ns=(0, 1))
    with pytest.raises(CorpusError, match="changed since it was indexed"):
        check_unchanged(index.relocated(tars).tars[0])


def test_tar_that_changes_during_the_scan_is_rejected(tars, monkeypatch):
    def scan_and_touch(paths, *options):
        facts = scan_pool.scan_tars(paths, *options)
        os.utime(paths[3], ns=(0, 1))
        return facts

    monkeypatch.setattr("gradproj.corpus.index.scan_tars", scan_and_touch)
    with pytest.raises(CorpusError, match=r"3\.tar: changed since it was indexed"):
        index_of(*tars)


def test_index_of_no_tars_is_rejected():
    with pytest.raises(CorpusError, match="there is no tar to index"):
        build_index([])


def test_all_damaged_tars_are_named_in_one_error(tmp_path):
    tars = [write_tar(tmp_path / f"{i}.tar", plain_members(3)) for i in range(4)]
    tars[1].write_bytes(b"")
    tars[3].write_bytes(tars[3].read_bytes()[:512])
    with pytest.raises(CorpusError) as caught:
        index_of(*tars)
    assert [str(path) in str(caught.value) for path in tars] == [False, True, False, True]


def test_index_of_a_version_that_counted_no_members_is_read(tars, tmp_path):
    index = index_of(*tars)
    save_index(index, tmp_path / "corpus.json")
    envelope = json.loads((tmp_path / "corpus.json").read_text())
    body = envelope.pop("index")
    for tar in body["tars"]:
        for name in ("n_without_text", "members", "unread_example"):
            del tar[name]
    raw = json.dumps(body)
    envelope["checksum"] = hashlib.blake2b(raw.encode(), digest_size=16).hexdigest()
    (tmp_path / "corpus.json").write_text(f'{json.dumps(envelope)[:-1]}, "index": {raw}}}')
    older = load_index(tmp_path / "corpus.json")
    assert older.fingerprint == index.fingerprint
    assert older.unread_lines() == []
    assert list(read_documents(older, 0, 3)) == list(read_documents(index, 0, 3))
