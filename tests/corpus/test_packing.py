"""Records of an input: the fields that are kept, and the errors of bad ones."""

import io
import json

import numpy as np
import pyarrow
import pytest
from helpers.corpora import (
    input_record,
    line_of,
    packed_documents,
    read_back,
    run_prepare,
    slow_samples,
    write_jsonl,
)
from pyarrow import parquet

from gradproj.corpus import sources
from gradproj.corpus.prepare_config import PrepareConfig
from gradproj.errors import ConfigError, CorpusError


def test_only_line_feeds_end_lines_and_blank_lines_are_skipped(tmp_path):
    raw = b"\xef\xbb\xbf" + line_of(input_record("a\u2028\u0085b"), ensure_ascii=False).replace(
        b"\n", b"\r\n"
    )
    raw += (
        b"\n  \t\r\n"
        + line_of(input_record("c"))
        + b"\n"
        + line_of(input_record("last")).rstrip(b"\n")
    )
    (tmp_path / "in.jsonl").write_bytes(raw)
    report = run_prepare(str(tmp_path / "in.jsonl"), tmp_path / "out")
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == [
        "a\u2028\u0085b",
        "c",
        "last",
    ]
    assert report.n_bad == 0


def test_blank_lines_count_in_line_numbers(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n\n" + line_of(input_record("a")) + b"\nnope\n")
    with pytest.raises(CorpusError, match=r"in\.jsonl, line 5: not valid JSON"):
        run_prepare(str(tmp_path / "in.jsonl"), tmp_path / "out")


def test_token_ids_are_kept_as_an_array_or_beside_their_text(tmp_path):
    values = [
        {"input_ids": [5, 0, 70_000], "meta": {"pile_set_name": "ids"}},
        {"input_ids": [], "text": None},
        {"input_ids": [1], "text": "both"},
        {"input_ids": [3, 4], "labels": [-100, 4], "weight": -0.5},
    ]
    run_prepare(write_jsonl(tmp_path / "in.jsonl", values), tmp_path / "out")
    unknown = {"pile_set_name": "unknown"}
    samples = slow_samples(tmp_path / "out/shard-000000.tar")
    arrays = [
        {name: np.load(io.BytesIO(data)).tolist() for name, data in sample.items() if "npy" in name}
        for sample in samples
    ]
    assert arrays == [
        {"npy": [5, 0, 70_000]},
        {"npy": []},
        {},
        {"npy": [3, 4], "labels.npy": [-100, 4]},
    ]
    assert [json.loads(sample.get("json", "null")) for sample in samples] == [
        {"meta": {"pile_set_name": "ids"}},
        None,
        {"text": "both", "input_ids": [1], "meta": unknown},
        {"weight": -0.5, "meta": unknown},
    ]


def test_dotted_field_reaches_into_objects_unless_a_name_has_the_dot(tmp_path):
    values = [
        {"doc": {"body": "nested"}, "origin": {"site": {"name": "s"}}},
        {"doc.body": "flat", "doc": {"body": "no"}},
    ]
    report = run_prepare(
        write_jsonl(tmp_path / "in.jsonl", values),
        tmp_path / "out",
        text_field="doc.body",
        domain_field="origin.site.name",
    )
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == [
        "nested",
        "flat",
    ]
    assert report.domains == {"s": 1, "unknown": 1}


@pytest.mark.parametrize(
    ("domain", "want"), [(None, "unknown"), ("", "unknown"), (7, "7"), ("Pile-CC é", "Pile-CC é")]
)
def test_domain_is_the_value_of_its_field_or_unknown(domain, want, tmp_path):
    report = run_prepare(
        write_jsonl(tmp_path / "in.jsonl", [input_record("t", domain)]), tmp_path / "out"
    )
    assert report.domains == {want: 1}
    assert packed_documents(tmp_path / "out")[0]["meta"] == {"pile_set_name": want}


def test_meta_object_is_kept_and_top_level_scalars_are_added(tmp_path):
    value = {
        "text": "t",
        "source": "s",
        "id": "outer",
        "url": "u",
        "big": 10**30,
        "list": [1],
        "meta": {
            "id": "inner",
            "deep": {"x": [1, None]},
            "ratio": float("nan"),
            "pile_set_name": "old",
        },
    }
    run_prepare(
        write_jsonl(tmp_path / "in.jsonl", [value]), tmp_path / "out", domain_field="source"
    )
    (document,) = packed_documents(tmp_path / "out")
    want = {"id": "inner", "url": "u", "big": 10**30, "deep": {"x": [1, None]}, "ratio": None}
    assert document == {"text": "t", "meta": {**want, "pile_set_name": "s"}}


MAP = pyarrow.map_(pyarrow.string(), pyarrow.string())
JSON_META = json.dumps({"pile_set_name": "A", "id": "7"})


@pytest.mark.parametrize(
    "column",
    [pyarrow.array([[("pile_set_name", "A"), ("id", "7")]], MAP), pyarrow.array([JSON_META])],
    ids=["map", "JSON string"],
)
def test_meta_may_be_a_map_column_or_an_object_written_as_json(column, tmp_path):
    parquet.write_table(pyarrow.table({"text": ["t"], "meta": column}), tmp_path / "in.parquet")
    report = run_prepare(str(tmp_path / "in.parquet"), tmp_path / "out")
    assert report.domains == {"A": 1}
    want = {"text": "t", "meta": {"pile_set_name": "A", "id": "7"}}
    assert packed_documents(tmp_path / "out") == [want]


def test_domain_field_that_no_document_has_is_named(tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [{"text": "t", "source": "web"}])
    report = run_prepare(name, tmp_path / "out")
    assert "no document names a domain in the field meta.pile_set_name (--domain_field)" in (
        report.summary()
    )
    report = run_prepare(name, tmp_path / "named", domain_field="source")
    assert "--domain_field" not in report.summary()


BAD_LINES = {
    b"{not json}": "not valid JSON (Expecting property name",
    b'{"text": "cut': "not valid JSON (Unterminated string starting at character 10)",
    b'{"text": "a"} {"text": "b"}': "not valid JSON (Extra data",
    b'{"text": "\xff"}': "not UTF-8 (byte 0xff at 11)",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8 (byte 0xed at 11)",
    b'{"text": 1' + b"0" * 5000 + b"}": "not valid JSON (Exceeds the limit",
    b'["text"]': "not a JSON object but a list",
    b'"text"': "not a JSON object but a string",
    b"null": "not a JSON object but null",
    b"[" * 200_000: "JSON nested too deeply",
    b'{"content": "x", "id": 1}': (
        "no field 'text' and no other form of a document (its fields: 'content', 'id'; "
        "see --text_field)"
    ),
    b"{}": "no field 'text' and no other form of a document (its fields: none; see --text_field)",
    b'{"text": null}': "field 'text' is null, not a string",
    b'{"text": 5}': "field 'text' is a number, not a string",
    b'{"text": true}': "field 'text' is a boolean, not a string",
    b'{"text": ["a"]}': "field 'text' is a list, not a string",
    b'{"text": "a \\ud800 b"}': '"text" is not Unicode: it has half of a surrogate pair',
    b'{"text": "a", "meta": {"id": "\\udfff"}}': (
        "holds a lone surrogate (\\udfff), which is no character"
    ),
    b'{"text": "a", "meta": {"pile_set_name": ["x"]}}': (
        "field 'meta.pile_set_name' is a list, not a domain's name"
    ),
    b'{"prompt": "a"}': 'it has "prompt" and no "completion": they come together',
    b'{"chosen": "a", "rejected": null}': 'it has "chosen" and no "rejected"',
    b'{"input_ids": "1 2"}': '"input_ids" is not a list but a string',
    b'{"input_ids": [1, 2.0]}': '"input_ids" holds 2.0, which is not a token id',
    b'{"input_ids": [1, true]}': '"input_ids" holds true, which is not a token id',
    b'{"input_ids": [1, null]}': '"input_ids" holds null, which is not a token id',
    b'{"input_ids": [4, -1]}': '"input_ids" holds -1, which is not a token id (0 to 2^31 - 1)',
    b'{"input_ids": [2147483648]}': '"input_ids" holds 2147483648, which is not a token id',
    b'{"text": 3, "input_ids": [1]}': "field 'text' is a number, not a string",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:30])
def test_bad_line_is_an_error_or_skipped_and_counted(line, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        line_of(input_record("before")) + line + b"\n" + line_of(input_record("after"))
    )
    with pytest.raises(CorpusError) as caught:
        run_prepare(str(path), tmp_path / "out")
    assert str(caught.value).startswith(f"{path}, line 2: {BAD_LINES[line]}")
    assert str(caught.value).endswith("--on_bad_input skip")
    assert not (tmp_path / "out").exists()
    report = run_prepare(str(path), tmp_path / "out", on_bad_input="skip")
    assert read_back(tmp_path / "out") == [
        ("000000000000", input_record("before")),
        ("000000000001", input_record("after")),
    ]
    assert (report.n_samples, report.n_bad) == (2, 1)
    assert report.bad_examples[0].startswith(f"{path}, line 2: {BAD_LINES[line]}")


def test_escaped_surrogate_pair_becomes_one_character(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    run_prepare(str(tmp_path / "in.jsonl"), tmp_path / "out")
    assert packed_documents(tmp_path / "out")[0]["text"] == "\U0001f600"


def test_report_counts_all_bad_lines_and_shows_ten(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"nope\n" * 1000 + line_of(input_record("good", "dom")))
    report = run_prepare(str(tmp_path / "in.jsonl"), tmp_path / "out", on_bad_input="skip")
    assert (report.n_bad, len(report.bad_examples)) == (1000, 10)
    assert (
        "1 documents of 1 domains in 1 tars\n             1  dom\n1,000 bad inputs"
        in report.summary()
    )


def test_line_over_the_size_limit_is_a_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 4096)
    lines = [line_of(input_record("x" * n)) for n in (10, 4096, 40_960, 400_000)] + [
        line_of(input_record("end"))
    ]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines) + b"y" * 12_288)
    report = run_prepare(str(tmp_path / "in.jsonl"), tmp_path / "out", on_bad_input="skip")
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == [
        "x" * 10,
        "end",
    ]
    assert [example.split("in.jsonl, ")[1].split(":")[0] for example in report.bad_examples] == [
        f"line {n}" for n in (2, 3, 4, 6)
    ]
    reason = "longer than 4,096 bytes; is the file JSON lines, one object a line?"
    assert all(example.endswith(reason) for example in report.bad_examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": ()}, "INPUT is empty"),
        (
            {"inputs": ("a.csv",)},
            r"INPUT 'a.csv' is of no known kind; give a file ending in \.jsonl",
        ),
        ({"output_dir": ""}, "--output_dir is empty"),
        ({"samples_per_shard": 0}, "--samples_per_shard must be at least 1, got 0"),
        ({"text_field": ""}, "--text_field is empty"),
        ({"domain_field": ""}, "--domain_field is empty"),
        ({"on_bad_input": "ignore"}, "--on_bad_input is 'ignore'; choose one of error, skip"),
    ],
)
def test_wrong_setting_is_an_error_that_names_the_flag(settings, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**{"inputs": ("a.jsonl",), "output_dir": "out", **settings})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", r"names no data set; write hf:NAME\[@CONFIG\]\[:SPLIT\]"),
        ("stdlib:json", "takes no name"),
    ],
)
def test_wrong_name_after_a_prefix_is_an_error(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_prepare(name, tmp_path / "out")
