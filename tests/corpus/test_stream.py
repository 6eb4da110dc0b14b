"""The stream: exactly the documents of a range, in id order, or an error that names the tar."""

import json
import os
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import BLOCK, document, plain_members, slow_domain, slow_samples, write_tar

from gradproj.corpus import documents, stream
from gradproj.corpus.content import Text, TokenIds
from gradproj.corpus.index import build_index, check_unchanged
from gradproj.corpus.stream import ReadLimits, read_documents, read_members
from gradproj.corpus.tar import places
from gradproj.errors import ConfigError, CorpusError


def index_of(*paths: Path):
    return build_index(list(paths), progress=False)


@pytest.fixture
def tars(tmp_path):
    """201 samples: tars with more than a block, one sample, none, pax headers, pairs of members."""
    pairs = [
        (f"{i}.{suffix}", data)
        for i in range(66)
        for suffix, data in (
            ("json", b'{"meta":{"pile_set_name":"P"}}'),
            ("txt", f"é\u2028 {i}".encode()),
        )
    ]
    return [
        write_tar(tmp_path / "0.tar", plain_members(70)),
        write_tar(tmp_path / "1.tar", []),
        write_tar(tmp_path / "2.tar", plain_members(1), tarfile.GNU_FORMAT),
        write_tar(
            tmp_path / "3.tar",
            [("k" * 120 + name, data) for name, data in plain_members(64)],
            tarfile.PAX_FORMAT,
        ),
        write_tar(tmp_path / "4.tar", pairs, tarfile.PAX_FORMAT, mtime=1.5),
    ]


def test_documents_equal_those_that_webdataset_reads_from_whole_tars(tars):
    slow = [(number, sample) for number, tar in enumerate(tars) for sample in slow_samples(tar)]
    got = list(read_documents(index_of(*tars), 0, 201))
    assert [d.sample_id for d in got] == list(range(201))
    for d, (number, sample) in zip(got, slow, strict=True):
        text = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["text"]
        assert (d.key, d.tar, d.text) == (sample["__key__"], number, text)
        assert (d.domain, d.content, d.problem) == (slow_domain(sample["json"]), Text(text), None)


def test_any_split_of_a_range_reads_the_same_documents(tars):
    index = index_of(*tars)

    def read(start, stop):
        return list(read_documents(index, start, stop))

    whole = read(0, 201)
    assert whole[:20] == read(0, 7) + read(7, 20)
    for cut in [0, 1, 63, 64, 65, 69, 70, 71, 72, 134, 135, 136, 200, 201]:
        assert read(0, cut) + read(cut, 201) == whole
    for size in (16, 64, 100):
        assert [
            d for start in range(0, 201, size) for d in read(start, min(start + size, 201))
        ] == whole
    for i in range(0, 201, 13):
        assert read(i, i + 1) == [whole[i]]


@pytest.mark.parametrize("step", [1, 3, 40, 130])
def test_members_of_chosen_samples_equal_those_that_webdataset_reads(tars, step):
    slow = [sample for tar in tars for sample in slow_samples(tar)]
    ids = np.arange(step // 2, 201, step)
    got = list(read_members(index_of(*tars), ids))
    assert [sample.sample_id for sample in got] == ids.tolist()
    for sample in got:
        want = {k: v for k, v in slow[sample.sample_id].items() if not k.startswith("__")}
        assert (sample.key, sample.by_suffix) == (slow[sample.sample_id]["__key__"], want)


def test_blocks_without_a_chosen_sample_are_not_read(tars, monkeypatch):
    read = []
    real = stream._samples
    monkeypatch.setattr(stream, "_samples", lambda *a: (read.append(a[1:3]), real(*a))[1])
    assert len(list(read_members(index_of(*tars), np.array([3, 5, 200])))) == 3
    assert read == [(3, 6), (65, 66)]
    assert list(read_members(index_of(*tars), np.array([], int))) == []


def test_member_over_the_limit_of_memory_is_an_error_that_names_it(tars, monkeypatch):
    index = index_of(*tars)
    monkeypatch.setattr(stream, "MAX_DOCUMENT_BYTES", 8)
    monkeypatch.setattr(stream, "_DEFAULT_LIMITS", ReadLimits(max_document_bytes=8))
    with pytest.raises(CorpusError, match=r"000003\.json is over 8 bytes.*leave document 3 out"):
        list(read_members(index, np.array([3])))


def test_range_outside_the_corpus_is_rejected(tars):
    with pytest.raises(
        CorpusError, match="sample ids 200 to 202 are not in this corpus of 201 samples"
    ):
        list(read_documents(index_of(*tars), 200, 202))


# ---- bad input

DEEP = 100_000
BAD = {
    "torn": ({"json": b'{"text": "x'}, "invalid JSON: Unterminated string"),
    "no json": ({"json": b"hello"}, "invalid JSON: Expecting value"),
    "empty json": ({"json": b""}, "invalid JSON: Expecting value"),
    "a list": ({"json": b'["x"]'}, "invalid JSON: not an object but a list"),
    "neither": ({"json": b'{"meta": {}}'}, 'no text: it has none of "text"; "prompt"'),
    "null": ({"json": b'{"text": null}'}, 'no text: it has none of "text"; "prompt"'),
    "other members": (
        {"png": b"x", "cls": b"1"},
        "no text: it has no .json, .txt or .npy, only .cls, .png",
    ),
    "compressed": ({"json.gz": b"x"}, "no text: it has no .json, .txt or .npy, only .json.gz"),
    "latin-1 json": ({"json": b'{"text": "\xe9"}'}, "not UTF-8: byte 10 of its .json is 0xe9"),
    "latin-1 txt": ({"txt": b"caf\xe9"}, "not UTF-8: byte 3 of its .txt is 0xe9"),
    "latin-1 after a byte order mark": (
        {"txt": b"\xef\xbb\xbfcaf\xe9"},
        "not UTF-8: byte 6 of its .txt is 0xe9",
    ),
    "half a pair": (
        {"json": b'{"text": "\\ud83d"}'},
        '"text" is not Unicode: it has half of a surrogate pair',
    ),
    "text a number": ({"json": b'{"text": 5}'}, '"text" is not a string but a number'),
    "ids a string": ({"json": b'{"input_ids": "1 2"}'}, '"input_ids" is not a list but a string'),
    "ids floats": (
        {"json": b'{"input_ids": [1, 2.5]}'},
        '"input_ids" holds 2.5, which is not a token id',
    ),
    "ids negative": ({"json": b'{"input_ids": [1, -100]}'}, '"input_ids" holds -100, which'),
    "ids null": ({"json": b'{"input_ids": [1, null]}'}, '"input_ids" holds null, which'),
    "ids true": ({"json": b'{"input_ids": [true]}'}, '"input_ids" holds true, which'),
    "ids nested": ({"json": b'{"input_ids": [[1]]}'}, '"input_ids" holds [1], which'),
    "deep": (
        {"json": b'{"text": "x", "a": ' + b"[" * DEEP + b"]" * DEEP + b"}"},
        "nested more than 64 deep",
    ),
    "deep and torn": ({"json": b'{"a":' * (DEEP // 2)}, "invalid JSON: nested more than 64 deep"),
    "quotes without end": ({"json": b'{"' + b'\\"[' * 90_000}, "invalid JSON: Unterminated string"),
    "a long number": (
        {"json": b'{"text": "x", "n": ' + b"1" * 5000 + b"}"},
        "invalid JSON: Exceeds the limit",
    ),
    "too large": ({"txt": b"x" * 300_001}, "too large: its .txt is over 300,000 bytes"),
    "json too large": (
        {"json": document("x" * 300_000)},
        "too large: its .json is over 300,000 bytes",
    ),
}
GOOD = {
    "empty": ({"json": b'{"text": ""}'}, "", None),
    "empty txt": ({"txt": b""}, "", None),
    "ids": ({"json": b'{"input_ids": [5, 0, 7]}'}, "", [5, 0, 7]),
    "no ids": ({"json": b'{"input_ids": []}'}, "", []),
    "text and ids": ({"json": b'{"text": "x", "input_ids": [5]}'}, "x", [5]),
    "a text in both": ({"json": b'{"text": "json"}', "txt": b"txt"}, "json", None),
    "txt and metadata": ({"json": b'{"meta": {}}', "txt": b"txt"}, "txt", None),
    "a byte order mark": ({"json": b'\xef\xbb\xbf{"text": "x"}'}, "x", None),
    "a byte order mark in txt": ({"txt": b"\xef\xbb\xbfx"}, "x", None),
    "nan": ({"json": b'{"text": "x", "score": NaN}'}, "x", None),
    "brackets in the text": ({"json": document('[{"' * 1000)}, '[{"' * 1000, None),
    "many brackets side by side": ({"json": document("x", None, a=[[], {}] * 200)}, "x", None),
    "64 deep": ({"json": b'{"text": "x", "a": ' + b"[" * 63 + b"]" * 63 + b"}"}, "x", None),
    "line separators": ({"txt": "a\u2028b\u0085c\r\n\0".encode()}, "a\u2028b\u0085c\r\n\0", None),
    "astral": ({"json": b'{"text": "\\ud83d\\ude00"}'}, "\U0001f600", None),
    "suffix in capitals": ({"JSON": b'{"text": "x"}'}, "x", None),
}


def read_one(tmp_path, members, limits):
    named = [(f"{key}.{suffix}", data) for key in ("a", "b") for suffix, data in members.items()]
    index = index_of(write_tar(tmp_path / "a.tar", named))
    first, second = read_documents(index, 0, 2, limits)
    assert (first.key, second.key, first.problem) == ("a", "b", second.problem)
    assert index.domain_counts() == {first.domain: 2}
    return first


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_has_a_problem_and_the_stream_continues(kind, tmp_path):
    members, words = BAD[kind]
    got = read_one(tmp_path, members, ReadLimits(max_document_bytes=300_000))
    assert got.problem is not None
    assert words in got.problem
    assert got.content is None


@pytest.mark.parametrize("kind", GOOD)
def test_unusual_documents_are_read(kind, tmp_path):
    members, text, input_ids = GOOD[kind]
    got = read_one(tmp_path, members, ReadLimits())
    want = Text(text) if input_ids is None else TokenIds(input_ids, text=text)
    assert (got.content, got.problem) == (want, None)


def test_stream_and_index_count_the_same_domains(tmp_path):
    odd = [*BAD.values(), *(value[:2] for value in GOOD.values())]
    named = [
        (f"{i}.{suffix}", data)
        for i, (members, _) in enumerate(odd)
        for suffix, data in members.items()
    ]
    index = index_of(
        write_tar(tmp_path / "a.tar", named + [(f"p{n}", d) for n, d in plain_members(70)])
    )
    got = list(read_documents(index, 0, index.n_samples))
    assert Counter(d.domain for d in got) == index.domain_counts()


def test_member_over_the_limit_is_not_read(tmp_path, monkeypatch):
    members = [
        ("a.txt", b"x" * 5000),
        *plain_members(70),
        ("__meta__", b"x"),
        ("z.json", document("z" * 5000)),
    ]
    index = index_of(write_tar(tmp_path / "a.tar", members))
    whole = list(read_documents(index, 0, 72))
    monkeypatch.setattr(stream, "MAX_DOCUMENT_BYTES", 4000)
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 4000)
    got = list(read_documents(index, 0, 72, ReadLimits(max_document_bytes=4000)))
    assert got[1:71] == whole[1:71]
    assert [got[i].problem for i in (0, 71)] == [
        "too large: its .txt is over 4,000 bytes",
        "too large: its .json is over 4,000 bytes",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1"])
def test_keys_keep_their_bytes_whatever_the_locale(encoding, tmp_path, monkeypatch):
    names = [b"na\xefve", "schl\u00fcssel".encode(), b"plain"]
    members = [(f"{os.fsdecode(name)}.json", document("x")) for name in names]
    index = index_of(write_tar(tmp_path / "a.tar", members))
    assert index.longest_key_bytes == len("schl\u00fcssel".encode())
    monkeypatch.setattr(tarfile.TarFile, "encoding", encoding)
    keys = [d.key for d in read_documents(index, 0, 3)]
    assert [key.encode("utf-8", "surrogateescape") for key in keys] == names


def test_keys_are_never_used_as_paths(tmp_path):
    (tmp_path / "secret.json").write_bytes(document("secret"))
    keys = ["../secret", "/etc/passwd", "a/../../secret", "-rf", "$(touch x)"]
    index = index_of(write_tar(tmp_path / "a.tar", [(f"{k}.json", document("mine")) for k in keys]))
    before = sorted(os.listdir(tmp_path))
    got = list(read_documents(index, 0, len(keys)))
    assert [(d.key, d.text) for d in got] == [(k, "mine") for k in keys]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "limits", [{"max_document_bytes": 0}, {"max_json_depth": 0}, {"max_json_depth": 501}]
)
def test_impossible_limits_are_rejected(limits):
    with pytest.raises(ConfigError, match=f"--{next(iter(limits))} must be"):
        ReadLimits(**limits)


# ---- changed since it was indexed


def change(tar, edit):
    """Change a tar behind the index's back: same size and time where the edit keeps the size."""
    raw = bytearray(tar.path.read_bytes())
    edit(raw)
    tar.path.write_bytes(raw)
    os.utime(tar.path, ns=(0, tar.mtime_ns))


def rename_member(raw, old: bytes, new: bytes):
    at = raw.index(old.ljust(100, b"\0"))
    raw[at : at + len(new)] = new
    head = raw[at : at + BLOCK]
    head[148:156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(head)


def zero_header_of(raw, name: bytes):
    at = raw.index(name.ljust(100, b"\0"))
    raw[at : at + BLOCK] = bytes(BLOCK)


HIDDEN_CHANGES = {
    "another key": (
        lambda raw: rename_member(raw, b"000100.json", b"9"),
        64,
        127,
        "its keys are not those",
    ),
    "a zeroed header": (
        lambda raw: zero_header_of(raw, b"000100.json"),
        64,
        127,
        "it ends after 100 of 200 samples",
    ),
    "a zeroed first header": (
        lambda raw: zero_header_of(raw, b"000064.json"),
        64,
        127,
        "it ends after 64 of 200",
    ),
    "two samples made one": (
        lambda raw: rename_member(raw, b"000100.json", b"000099.x\0\0\0"),
        64,
        127,
        "its keys are not those",
    ),
}


@pytest.mark.parametrize("kind", HIDDEN_CHANGES)
def test_change_with_equal_size_and_time_is_named_with_its_block(kind, tmp_path):
    edit, first, last, words = HIDDEN_CHANGES[kind]
    index = index_of(write_tar(tmp_path / "a.tar", plain_members(200)))
    change(index.tars[0], edit)
    check_unchanged(index.tars[0])
    with pytest.raises(CorpusError) as caught:
        list(read_documents(index, 0, 200))
    message = str(caught.value)
    assert (
        f"{tmp_path}/a.tar: changed or damaged since it was indexed, in samples {first} to {last}"
        in message
    )
    assert words in message
    assert "python -m gradproj index" in message
    assert len(list(read_documents(index, 0, 64))) == 64


@pytest.mark.parametrize("kind", HIDDEN_CHANGES)
def test_error_precedes_the_last_document_of_the_range(kind, tmp_path):
    index = index_of(write_tar(tmp_path / "a.tar", plain_members(200)))
    change(index.tars[0], HIDDEN_CHANGES[kind][0])
    with pytest.raises(CorpusError):
        # Six documents, without asking for a seventh.
        list(islice(read_documents(index, 65, 71), 6))


def test_truncated_tar_with_equal_time_is_rejected_by_its_size(tmp_path):
    index = index_of(write_tar(tmp_path / "a.tar", plain_members(200)))

    def cut(raw):
        del raw[len(raw) // 2 :]

    change(index.tars[0], cut)
    with pytest.raises(CorpusError, match=r"a\.tar: changed since it was indexed: it has .* bytes"):
        next(read_documents(index, 0, 1))


@pytest.mark.parametrize("where", [100 * 1024, 100 * 1024 + 700])
def test_tar_truncated_while_it_is_read_is_an_error(where, tmp_path, monkeypatch):
    members = [(f"{i:06d}.json", document("x" * 300)) for i in range(200)]  # 1,024 bytes each
    index = index_of(write_tar(tmp_path / "a.tar", members))
    os.truncate(index.tars[0].path, where)
    monkeypatch.setattr(places, "check_unchanged", lambda tar: None)
    with pytest.raises(
        CorpusError, match=r"a\.tar: changed or damaged since it was indexed, in samples 64 to 127"
    ):
        list(read_documents(index, 0, 200))


def test_only_the_tars_of_a_range_are_opened(tars):
    index = index_of(*tars)
    tars[0].unlink()
    assert len(list(read_documents(index, 70, 201))) == 131
    with pytest.raises(CorpusError, match=r"0\.tar: the tar cannot be read: No such file"):
        list(read_documents(index, 69, 201))
