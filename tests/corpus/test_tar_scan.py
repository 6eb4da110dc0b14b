"""The scan of a tar: every sample's offset, and an error for every damage."""

import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from helpers.corpora import (
    BLOCK,
    document,
    header,
    padded,
    plain_members,
    slow_crc,
    slow_domain,
    slow_offsets,
    slow_samples,
    write_tar,
)
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from gradproj.corpus.index import build_index
from gradproj.corpus.tar import scan
from gradproj.corpus.tar.scan import key_and_suffix, scan_tar
from gradproj.errors import CorpusError

FIELD = "meta.pile_set_name"
END = bytes(2 * BLOCK)


# ---- what a tar holds


def long_names(n):
    return [(f"{'folder/' * 20}{i:04d}-{'n' * 90}.json", document("x", "long")) for i in range(n)]


TARS = {
    "one member each": plain_members(200),
    "no sample": [],
    "json and txt": [
        (f"{i}.{suffix}", data)
        for i in range(70)
        for suffix, data in (("txt", b"a text"), ("json", document("t", f"d{i % 2}")))
    ],
    "long names": long_names(70),
    "prefix in ustar": [
        (f"{'p' * 90}/{i:04d}-{'n' * 60}.json", document("x", "p")) for i in range(70)
    ],
    "folders": [(f"./a.b/c/{i}.x.JSON", b"no json") for i in range(70)],
    "unicode keys": [(f"schlüssel-\u2028-{i}.json", document("ü", "ö", n=i)) for i in range(70)],
    "skipped members": [
        ("__meta__", b"skipped"),
        ("__folder__/a.json", b"skipped"),
        ("a.json", document("a", "A")),
        (".hidden", b"skipped"),
        ("noext", b"skipped"),
        ("a.txt", b"still a"),
        ("__b.json", document("b", "B")),
    ],
    "a tar in a tar": [
        ("inner.tar", (header(b"x.json", 9) + bytes(BLOCK)) * 5),
        *plain_members(70),
    ],
    "sizes around a block": [(f"{n}.bin", b"x" * n) for n in (0, 1, 511, 512, 513, 1024)],
    "a member of 100 chunks": [
        ("a.json", document("a", "A")),
        ("b.json", document("b" * 200_000, "B")),
    ],
    "metadata in odd forms": [
        ("0.json", b'{"text":"x"}'),
        ("1.json", b'{"meta":{"pile_set_name":"first"},"text":"x"}'),
        ("2.json", b'{"meta": null, "text":"x"}'),
        ("3.json", b'{"text":"x","meta":{"id":7,"pile_set_name":"more"}}'),
        ("4.json", b'{"text":"x","meta":{"pile_set_name":5}}'),
        ("5.json", b'{"text":"\\ud800","meta":{"pile_set_name":"half"},"z":NaN}'),
        ("6.json", b"[]"),
        ("7.json", b"\xef\xbb\xbf{}"),
        ("8.json", b'{"text":"\xff","z":{}}'),
        ("9.txt", b"no json"),
    ],
}
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TARS)
def test_scan_agrees_with_webdataset_and_tarfile(name, form, tmp_path, monkeypatch):
    if name == "long names" and form == "ustar":
        pytest.skip("ustar has no room for them")
    mtime = 1.5 if form == "pax" else 0  # a pax header before every member
    path = write_tar(tmp_path / "a.tar", TARS[name], FORMS[form], mtime)
    samples, offsets = slow_samples(path), slow_offsets(path)
    keys = [sample["__key__"] for sample in samples]
    first_member = {
        key: min(at for name, at in offsets.items() if base_plus_ext(name)[0] == key)
        for key in keys
    }
    for chunk in (scan._CHUNK_BYTES, 1024, 4096):
        monkeypatch.setattr(scan, "_CHUNK_BYTES", chunk)
        facts = scan_tar(path, FIELD)
        assert facts.n_samples == len(samples)
        assert facts.block_offsets.tolist() == [first_member[key] for key in keys[::64]]
        crcs = [slow_crc(keys[i : i + 64]) for i in range(0, len(keys), 64)]
        assert facts.block_key_crcs.tolist() == crcs
        assert facts.longest_key_bytes == max((len(key.encode()) for key in keys), default=0)
        assert facts.domain_counts == Counter(slow_domain(sample.get("json")) for sample in samples)
        read = [len(data) for s in samples for data in s.values() if isinstance(data, bytes)]
        assert facts.largest_member_bytes == max(read, default=0)


def test_tars_of_webdatasets_writer_are_read(tmp_path):
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(100):
            writer.write(
                {"__key__": f"k{i:03d}", "json": {"text": "x", "meta": {"pile_set_name": "D"}}}
            )
    facts = scan_tar(tmp_path / "a.tar", FIELD)
    assert (facts.n_samples, facts.domain_counts) == (100, {"D": 100})


def test_headers_that_tarfile_does_not_write_are_read(tmp_path):
    body = padded(document("x", "D"))
    n = len(document("x", "D"))
    path = tmp_path / "odd.tar"
    base256 = b"\x80" + n.to_bytes(11, "big")
    path.write_bytes(
        header(b"a.json", n, size=base256)
        + body
        + header(b"b.json", n, magic=b"")  # before POSIX
        + body
        + header(b"c.json", n, kind=b"\0")
        + body
        + header(b"d.json", n, kind=b"7")
        + body
        + header(b"folder/", 0, kind=b"\0")
        + header(b"link.json", n, kind=b"1")  # a hard link's size is not followed by data
        + header(b"unknown.json", n, kind=b"Q")
        + body
        + header(b"pax", 29, kind=b"g")
        + padded(b"29 comment=made by a test ok\n")
        + header(b"pax", 21, kind=b"x")
        + padded(b"11 size=%2d\n10 uid=12\n" % n)
        + header(b"e.json", 0)
        + body
        + END
    )
    assert [sample["__key__"] for sample in slow_samples(path)] == ["a", "b", "c", "d", "e"]
    facts = scan_tar(path, FIELD)
    assert (facts.n_samples, facts.domain_counts) == (5, {"D": 5})


@pytest.mark.parametrize(
    "name",
    [
        "a.json",
        "a/b.json",
        "a.b/c.d.JSON",
        "noext",
        ".hidden",
        "a.",
        "a/.b",
        "./a.json",
        "../../a.json",
        "a\n.b",
        "é.x",
        "__a__",
        "__a__.json",
        "__a__/b.json",
        "__a.json",
        "__a.b__",
        "x/__a__/b.json",
        "__a__b.json",
        "a.json\n",
        "a\nb/c.d",
    ],
)
def test_names_are_split_and_skipped_as_webdataset_does(name, tmp_path):
    path = write_tar(tmp_path / "a.tar", [(name, b"x")], tarfile.PAX_FORMAT)
    samples = slow_samples(path)
    want = None
    if samples:
        suffix = next(suffix for suffix in samples[0] if suffix not in ("__key__", "__url__"))
        want = (samples[0]["__key__"], suffix)
    assert key_and_suffix(name) == want
    assert scan_tar(path, FIELD).n_samples == len(samples)


UNREAD = {
    "a name with two dots": (
        [("a.json", b"{}"), ("a.b.json", b"{}"), ("c.json", b"{}")],
        {".json": 2, ".*.json": 1},
        "a.b.json",
        0,
    ),
    "arXiv ids": (
        [(f"2203.{i:05d}.txt", b"x") for i in range(8)],
        {".*.txt": 8},
        "2203.00000.txt",
        1,
    ),
    "one suffix that is not read": (
        [(f"{i}.md", b"x") for i in range(9)],
        {".md": 9},
        "0.md",
        9,
    ),
    "compressed": ([("0.txt.gz", b"x"), ("1.txt", b"x")], {".*.gz": 1, ".txt": 1}, "0.txt.gz", 1),
    "no suffix": (
        [("noext", b"x"), ("__meta__", b"x"), ("a.txt", b"x")],
        {"other names": 1, ".txt": 1},
        "",
        0,
    ),
    "many suffixes": (
        [(f"a.{chr(97 + i)}", b"x") for i in range(26)],
        {**{f".{chr(97 + i)}": 1 for i in range(20)}, "others": 6},
        "a.a",
        1,
    ),
    "a suffix that is not UTF-8": ([("a.\udce9", b"x")], {".\\xe9": 1}, "a.\\xe9", 1),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_members_that_no_document_is_read_from_are_counted(kind, tmp_path):
    members, counts, example, n_without_text = UNREAD[kind]
    facts = scan_tar(write_tar(tmp_path / "a.tar", members), FIELD)
    assert (facts.members, facts.unread_example) == (counts, example)
    assert facts.n_without_text == n_without_text
    lines = "\n".join(build_index([tmp_path / "a.tar"], progress=False).unread_lines())
    assert example in lines
    assert "A key ends at the first dot" in lines


def test_too_many_domains_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "MAX_DOMAINS", 2)
    path = write_tar(tmp_path / "a.tar", plain_members(5))
    with pytest.raises(CorpusError, match="over 2 different values; give --domain_field"):
        scan_tar(path, FIELD)


# ---- damage


def at_byte(raw: bytes, position: int, new: bytes) -> bytes:
    return raw[:position] + new + raw[position + len(new) :]


# Three members of one block of data each: headers at 0, 1024 and 2048, the end at 3072.
DAMAGE = {
    "an empty file": (lambda raw: b"", 0, "an empty file"),
    "cut at a member's end": (lambda raw: raw[:2048], 2048, "cut at a member's end"),
    "cut after one zero block": (
        lambda raw: raw[: 3072 + 512],
        3072,
        "cut inside the two zero blocks",
    ),
    "cut inside a member": (lambda raw: raw[:2600], 2048, "cut inside the member '000002.json'"),
    "cut inside the padding": (
        lambda raw: raw[:3000],
        3000,
        "cut inside the padding after a member",
    ),
    "cut inside a header": (lambda raw: raw[:2100], 2048, "cut inside a header"),
    "a header zeroed": (lambda raw: at_byte(raw, 1024, bytes(512)), 1024, "a header is zeroed"),
    "header and data zeroed": (
        lambda raw: at_byte(raw, 1024, bytes(1024)),
        2048,
        "data after the tar's end",
    ),
    "a bit of a header": (
        lambda raw: at_byte(raw, 1027, bytes([raw[1027] ^ 4])),
        1024,
        "checksum is wrong",
    ),
    "the first header": (
        lambda raw: at_byte(raw, 3, b"!"),
        0,
        "first header's checksum is wrong, or it is no tar",
    ),
    "trailing garbage": (lambda raw: raw + b"garbage", 10240, "trailing garbage"),
    "two tars in one": (lambda raw: raw + raw, 10240, "trailing garbage"),
    "zeros to the end": (
        lambda raw: raw[:3072] + bytes(2 << 20),
        3072,
        "as an interrupted copy leaves them",
    ),
    "only zeros": (lambda raw: bytes(2 << 20), 0, "as an interrupted copy leaves them"),
    "an extension header alone": (
        lambda raw: raw[:3072] + header(b"L", 4, kind=b"L") + padded(b"name") + END,
        4096,
        "a long-name or pax header with no member",
    ),
    "a cut extension header": (
        lambda raw: raw[:3072] + header(b"L", 4, kind=b"L"),
        3072,
        "cut inside an extension",
    ),
    "a malformed pax record": (
        lambda raw: (
            raw[:3072] + header(b"x", 9, kind=b"x") + padded(b"99 path=a") + raw[:1024] + END
        ),
        3584,
        "a pax header's record is malformed",
    ),
    "a malformed pax size": (
        lambda raw: (
            raw[:3072] + header(b"x", 10, kind=b"x") + padded(b"10 size=z\n") + raw[:1024] + END
        ),
        3584,
        "a pax header's size is no number",
    ),
    "a negative size": (
        lambda raw: raw[:3072] + header(b"a", 0, size=b"-0000000512\0") + END,
        3072,
        "a header's size is no number",
    ),
}


def small_tar(path: Path) -> Path:
    return write_tar(path, [(f"{i:06d}.json", document("x" * 300, "D")) for i in range(3)])


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_names_the_tar_the_byte_and_the_kind(kind, tmp_path):
    damage, offset, words = DAMAGE[kind]
    path = small_tar(tmp_path / "bad.tar")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorpusError) as caught:
        scan_tar(path, FIELD)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged at byte {offset:,}: ")
    assert words in message
    assert "Copy or make this tar again" in message


def test_tar_truncated_anywhere_is_damaged(tmp_path):
    raw = small_tar(tmp_path / "a.tar").read_bytes()
    for n in [*range(0, 3072 + 1024, 61), *range(0, 3072 + 1024, 512)]:
        (tmp_path / "a.tar").write_bytes(raw[:n])
        with pytest.raises(CorpusError, match="damaged at byte"):
            scan_tar(tmp_path / "a.tar", FIELD)


@pytest.mark.parametrize("form", FORMS)
def test_flipped_bit_is_an_error_or_changes_the_digest(form, tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("a.json", document("a", "D")), ("b.txt", b"b")], FORMS[form], 1.5
    )
    raw = path.read_bytes()
    whole = scan_tar(path, FIELD)
    rng = random.Random(5)
    n_errors = 0
    for _ in range(600):
        at, bit = rng.randrange(len(raw) - 6000), 1 << rng.randrange(8)
        path.write_bytes(at_byte(raw, at, bytes([raw[at] ^ bit])))
        try:
            assert scan_tar(path, FIELD).digest != whole.digest
        except CorpusError:
            n_errors += 1
    assert n_errors > 100


GROUPING = {
    "a key comes back": (
        [("a.json", b""), ("b.json", b""), ("a.txt", b"")],
        1024,
        "the key 'a' comes a second time",
    ),
    "a name twice": (
        [("a.json", b""), ("a.json", b"")],
        512,
        "the sample 'a' has two members 'json'",
    ),
    "a name twice but for case": (
        [("a.json", b""), ("a.JSON", b"")],
        512,
        "has two members 'json'",
    ),
    "webdataset's own name": (
        [("a.__bad__", b"x")],
        0,
        "the suffix '__bad__' of the sample 'a' is webdataset's own",
    ),
    "far apart": (
        [(f"{i % 100}.json", b"") for i in range(101)],
        51_200,
        "the key '0' comes a second time",
    ),
}


@pytest.mark.parametrize("kind", GROUPING)
def test_samples_that_webdataset_would_split_or_lose_are_rejected(kind, tmp_path):
    members, offset, words = GROUPING[kind]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(CorpusError) as caught:
        scan_tar(path, FIELD)
    assert f"{path}: at byte {offset:,}: " in str(caught.value)
    assert words in str(caught.value)


UNSUPPORTED = {
    "compressed with gzip": b"\x1f\x8b" + bytes(1022),
    "a GNU sparse member": header(b"a.json", 0, kind=b"S") + END,
    "sets 'GNU.sparse.major'": header(b"x", 22, kind=b"x")
    + padded(b"22 GNU.sparse.major=1\n")
    + header(b"a", 0)
    + END,
    "sets 'path' for all members": header(b"g", 10, kind=b"g")
    + padded(b"10 path=a\n")
    + header(b"a", 0)
    + END,
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_unsupported_kinds_of_tars_are_rejected_by_name(words, tmp_path):
    (tmp_path / "a.tar").write_bytes(UNSUPPORTED[words])
    with pytest.raises(CorpusError, match=words) as caught:
        scan_tar(tmp_path / "a.tar", FIELD)
    assert str(tmp_path / "a.tar") in str(caught.value)
