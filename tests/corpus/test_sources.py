"""Readers yield each record once, in order, unchanged, or raise an error at the damage."""

import gzip
import io
import itertools
import json
import os
import random
import threading
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from helpers.corpora import (
    COMPRESS,
    input_record,
    line_of,
    packed_documents,
    read_back,
    run_prepare,
    write_as,
    write_jsonl,
)
from pyarrow import parquet

from gradproj.corpus.inputs.records import InputReader
from gradproj.corpus.inputs.tokens import TOKEN_INPUTS
from gradproj.corpus.sources import SOURCES, read_records
from gradproj.errors import ConfigError, CorpusError

ODD_TEXTS = [
    "plain",
    "",
    "line\u2028and\u2029paragraph separators",
    "next line \u0085 and \u000b \u000c \u001c \u001d \u001e",
    "emoji \U0001f9ea, flags \U0001f1e9\U0001f1ea, combining e\u0301",
    "a NUL \x00 inside",
    "ends of lines \r\n\r\n and \n",
    'quotes " and \\ backslashes \\u0041',
    "\ufeffbegins with a byte order mark",
    "long " * 200_000,
]


@pytest.mark.parametrize("kind", sorted(SOURCES.keys() - TOKEN_INPUTS.keys() - {"stdlib:", "-"}))
def test_webdataset_reads_back_every_text_unchanged_and_in_order(kind, tmp_path):
    values = [input_record(text, domain=f"d{i % 3}", n=i) for i, text in enumerate(ODD_TEXTS)]
    report = run_prepare(
        write_as(kind, tmp_path / "in", values), tmp_path / "out", samples_per_shard=4
    )
    assert read_back(tmp_path / "out") == [(f"{i:012d}", value) for i, value in enumerate(values)]
    assert sorted(os.listdir(tmp_path / "out")) == [f"shard-00000{i}.tar" for i in range(3)]
    assert (report.n_samples, report.n_bad, report.n_tars) == (10, 0, 3)
    assert report.domains == {"d0": 4, "d1": 3, "d2": 3}


@pytest.mark.parametrize("kind", sorted(SOURCES.keys() - TOKEN_INPUTS.keys() - {"-"}))
def test_any_split_of_an_input_reads_the_same_records(kind, tmp_path):
    name = write_as(kind, tmp_path / "in", [input_record(f"text {i}") for i in range(20)])

    def read(ids):
        return list(
            itertools.islice(read_records(InputReader(name, ("text", "meta"))), ids.start, ids.stop)
        )

    assert len(read(range(20))) == 20
    assert read(range(20)) == read(range(7)) + read(range(7, 20))


@pytest.mark.parametrize(
    "kind", [".jsonl", ".jsonl.gz", ".json.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet"]
)
def test_reader_reports_its_position_in_the_file(kind, tmp_path):
    noise = random.Random(0)
    name = write_as(
        kind, tmp_path / "in", [input_record(noise.randbytes(500_000).hex()) for _ in range(12)]
    )
    reading = InputReader(name, ("text", "meta"))
    positions = [reading.position() for _ in read_records(reading)]
    assert positions == sorted(positions)
    assert 0 < positions[0] < 0.5 * os.path.getsize(name)
    assert 0.9 * os.path.getsize(name) < positions[-1] <= os.path.getsize(name)


def test_inputs_of_several_kinds_are_read_in_the_order_given(tmp_path):
    kinds = [".jsonl.zst", ".parquet", ".jsonl"]
    names = [
        write_as(kind, tmp_path / kind, [input_record(f"{kind} {i}") for i in range(3)])
        for kind in kinds
    ]
    run_prepare(names, tmp_path / "out", samples_per_shard=2)
    want = [f"{kind} {i}" for kind in kinds for i in range(3)]
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == want


def test_standard_library_gives_source_files_with_packages_as_domains(tmp_path):
    report = run_prepare("stdlib:", tmp_path / "out")
    by_path = {
        document["meta"]["path"]: document for document in packed_documents(tmp_path / "out")
    }
    assert list(by_path) == sorted(by_path)
    assert by_path["json/decoder.py"]["text"].encode() == Path(json.decoder.__file__).read_bytes()
    assert by_path["json/decoder.py"]["meta"]["pile_set_name"] == "json"
    assert by_path["textwrap.py"]["meta"]["pile_set_name"] == "modules"
    assert not [
        path for path in by_path if {"test", "tests", "site-packages"} & set(path.split("/"))
    ]
    assert report.n_samples == len(by_path) > 300


def test_standard_library_keeps_its_fields_beside_other_inputs(tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [{"body": "mine", "kind": "k"}])
    report = run_prepare(
        [name, "stdlib:"], tmp_path / "out", text_field="body", domain_field="kind"
    )
    assert report.domains["k"] == 1
    assert report.domains["json"] > 1


@pytest.mark.parametrize("split", ["", ":train", "@default:train"])
def test_hugging_face_data_set_is_read_with_configuration_and_split(split, tmp_path):
    write_as("hf:", tmp_path / "in", [input_record("one"), input_record("two")])
    run_prepare(f"hf:{tmp_path / 'in'}{split}", tmp_path / "out")
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == ["one", "two"]


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [(":nope", "Bad split: nope"), ("@nope", "'nope' not found"), ("/nowhere", "nowhere")],
)
def test_hugging_face_data_set_that_cannot_be_opened_is_one_line(suffix, reason, tmp_path):
    write_as("hf:", tmp_path / "in", [input_record("one")])
    with pytest.raises(CorpusError) as caught:
        run_prepare(f"hf:{tmp_path / 'in'}{suffix}", tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"INPUT hf:{tmp_path / 'in'}{suffix}: ")
    assert reason in message
    assert "hf:NAME[@CONFIG][:SPLIT]" in message
    assert "\n" not in message


def test_folder_of_save_to_disk_is_read_with_or_without_prefix(tmp_path):
    rows = datasets.Dataset.from_list([input_record("one"), input_record("two")])
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "both")
    for name, texts in (
        (f"hf:{tmp_path / 'rows'}", ["one", "two"]),
        (str(tmp_path / "rows"), ["one", "two"]),
        (f"hf:{tmp_path / 'both'}", ["one", "two"]),
        (f"hf:{tmp_path / 'both'}:test", ["two"]),
    ):
        records = read_records(InputReader(name, ("text", "meta")))
        assert [record.value["text"] for record in records] == texts
    with pytest.raises(CorpusError, match="its splits are train, test"):
        list(read_records(InputReader(f"hf:{tmp_path / 'both'}:nope")))
    with pytest.raises(ConfigError, match=r"is a folder; name its files"):
        run_prepare(str(tmp_path), tmp_path / "out")


def test_json_lines_come_from_standard_input_or_a_pipe(tmp_path, monkeypatch):
    raw = b"".join(line_of(input_record(text)) for text in ("one", "two"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + raw)))
    report = run_prepare("-", tmp_path / "out")
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == ["one", "two"]
    assert report.domains == {"web": 2}
    os.mkfifo(tmp_path / "pipe.json.gz")
    writer = threading.Thread(
        target=lambda: (tmp_path / "pipe.json.gz").write_bytes(gzip.compress(raw))
    )
    writer.start()
    assert len(list(read_records(InputReader(str(tmp_path / "pipe.json.gz"))))) == 2
    writer.join()


@pytest.mark.parametrize("raw", [b'[{"text": "a"}]', b"[\n{}\n]", b'{\n"text": "a"\n}'])
def test_json_that_is_not_one_object_a_line_is_an_error_with_the_way_out(raw, tmp_path):
    (tmp_path / "in.json").write_bytes(raw)
    with pytest.raises(CorpusError, match=r"in\.json: a JSON array or an object .* jq -c '\.\[\]'"):
        run_prepare(str(tmp_path / "in.json"), tmp_path / "out", on_bad_input="skip")


def test_unreachable_hugging_face_name_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CorpusError, match=r"Couldn't reach 'nobody/nothing' on the Hub .* and the network, or give"
    ):
        run_prepare("hf:nobody/nothing", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_unneeded_parquet_columns_are_not_read(tmp_path):
    rows = [
        {"text": f"t{i}", "id": i, "vector": [0.5] * 9, "blob": b"\xff", "meta": None}
        for i in range(100)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    (first, *_) = read_records(InputReader(str(tmp_path / "in.parquet"), ("text", "meta")))
    assert first.value == {"text": "t0", "id": 0, "meta": None}
    run_prepare(str(tmp_path / "in.parquet"), tmp_path / "out")
    assert packed_documents(tmp_path / "out")[99] == {
        "text": "t99",
        "meta": {"id": 99, "pile_set_name": "unknown"},
    }


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    raw = pyarrow.array([b"fine", b"\xff\xfe", b"also fine"], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())})
    parquet.write_table(table, tmp_path / "in.parquet")
    report = run_prepare(str(tmp_path / "in.parquet"), tmp_path / "out", on_bad_input="skip")
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == [
        "fine",
        "also fine",
    ]
    assert "in.parquet, row 2: not UTF-8" in report.bad_examples[0]


# ---- Damaged and missing inputs


def test_compressed_files_of_several_members_are_read_to_their_end(tmp_path):
    parts = [b"".join(line_of(input_record(f"{i} {j}")) for j in range(50)) for i in range(3)]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    (tmp_path / "in.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "in.jsonl.zst").write_bytes(
        skippable
        + b"".join(zstandard.ZstdCompressor().compress(part) + skippable for part in parts)
    )
    for kind in ("gz", "zst"):
        run_prepare(str(tmp_path / f"in.jsonl.{kind}"), tmp_path / kind)
        want = [f"{i} {j}" for i in range(3) for j in range(50)]
        assert [document["text"] for document in packed_documents(tmp_path / kind)] == want


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("cut", [0.3, 0.6, 0.999])
@pytest.mark.parametrize("on_bad_input", ["error", "skip"])
def test_truncated_compressed_file_is_an_error_with_the_line_reached(
    kind, cut, on_bad_input, tmp_path
):
    noise = random.Random(1)
    raw = b"".join(line_of(input_record(noise.randbytes(2000).hex())) for _ in range(100))
    packed = COMPRESS[f".{kind}"](raw)
    path = tmp_path / f"in.jsonl.{kind}"
    path.write_bytes(packed[: int(cut * len(packed))])
    with pytest.raises(
        CorpusError, match=r"line \d+: the file is cut short or damaged here .* fetch"
    ) as caught:
        run_prepare(str(path), tmp_path / "out", on_bad_input=on_bad_input)
    assert str(path) in str(caught.value)
    line = int(str(caught.value).split(", line ")[1].split(":")[0])
    assert 100 * cut - 70 < line <= 101
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_damaged_compressed_file_is_an_error(kind, tmp_path):
    noise = random.Random(2)
    raw = b"".join(line_of(input_record(noise.randbytes(2000).hex())) for _ in range(100))
    packed = bytearray(COMPRESS[f".{kind}"](raw))
    packed[len(packed) // 2] ^= 0xFF
    for name, content in (("flipped", packed), ("foreign", raw), ("nothing", b"")):
        path = tmp_path / f"{name}.jsonl.{kind}"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match="cut short"):
            run_prepare(str(path), tmp_path / "out", on_bad_input="skip")


def test_truncated_parquet_file_is_an_error(tmp_path):
    name = write_as(".parquet", tmp_path / "in", [input_record(f"{i}") for i in range(100)])
    Path(name).write_bytes(Path(name).read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"in\.parquet, after row 0: not whole parquet"):
        run_prepare(name, tmp_path / "out")


@pytest.mark.parametrize("raw", [b"", b"\n\n"])
def test_inputs_without_a_document_are_an_error(raw, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(raw)
    with pytest.raises(CorpusError, match=r"^no document in .*in\.jsonl$"):
        run_prepare(str(tmp_path / "in.jsonl"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_inputs_with_only_bad_lines_are_an_error_with_the_first(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"content": "x"}\n' * 5)
    with pytest.raises(CorpusError, match=r"first of 5 bad inputs: .*line 1: no field 'text'"):
        run_prepare(str(tmp_path / "in.jsonl"), tmp_path / "out", on_bad_input="skip")


def test_missing_file_or_folder_is_an_error_before_anything_is_read(tmp_path):
    good = write_jsonl(tmp_path / "in.jsonl", [input_record("a")])
    with pytest.raises(CorpusError, match=r"no\.jsonl: no such file; check the path"):
        run_prepare([good, str(tmp_path / "no.jsonl")], tmp_path / "out")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(
        CorpusError, match=r"is a folder; name its files, for instance .*folder\.jsonl/\*\.jsonl"
    ):
        run_prepare([good, str(tmp_path / "folder.jsonl")], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["folder.jsonl", "in.jsonl"]
