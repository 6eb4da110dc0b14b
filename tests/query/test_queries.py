"""Query files: the forms of documents, names in order, and errors with file and line."""

import json

import pytest

from gradproj.corpus.content import Completion, Conversation, Preference, Text, TokenIds
from gradproj.errors import ConfigError
from gradproj.query import Query, read_queries

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def test_line_holds_a_document_of_any_form(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"text": "a text\u2028with a separator", "id": "first"},
        "\n",
        {"prompt": "p", "completion": " c", "name": "second", "label": 3},
        {"input_ids": [1, 2], "labels": [-100, 2], "weight": -0.5, "id": 7},
        {"prompt": "", "completion": "c", "text": None},
        {"text": "a text that is not read", "input_ids": [3, 4], "id": "both"},
        {"messages": TURNS, "id": "chat"},
        {"prompt": "p", "chosen": "good", "rejected": "bad", "id": "pair"},
    )
    got = read_queries(path)
    assert [(q.name, q.content, q.weight) for q in got] == [
        ("first", Text("a text\u2028with a separator"), 1),
        ("second", Completion("p", " c"), 1),
        ("7", TokenIds([1, 2], [-100, 2]), -0.5),
        ("line 5", Completion("", "c"), 1),
        ("both", TokenIds([3, 4], text="a text that is not read"), 1),
        ("chat", Conversation(TURNS), 1),
        ("pair", Preference(Completion("p", "good"), Completion("p", "bad")), 1),
    ]


def test_a_field_of_the_lines_names_the_queries_groups(tmp_path):
    lines = [
        {"text": "a", "task": {"name": "sums", "shots": 5}},
        {"text": "b", "task": '{"name": "dates", "shots": 0.5}'},
        {"text": "c", "task": {"name": None, "shots": True}},
    ]
    path = write(tmp_path / "q.jsonl", *lines)
    groups = [query.group for query in read_queries(path, "task.shots")]
    assert groups == ["5", "0.5", "true"]
    assert [query.group for query in read_queries(path)] == ["", "", ""]
    with pytest.raises(ConfigError, match=r"line 3: no text or number in 'task.name'.*text, task"):
        read_queries(path, "task.name")
    with pytest.raises(ConfigError, match=r"--group_by is 'task\.'; give field names"):
        read_queries(path, "task.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{torn\n", "invalid JSON"),
        ("[" * 100_000 + "\n", "invalid JSON"),
        ('["text"]\n', "not an object but"),
        ({}, 'no text: it has none of "text"'),
        ({"txt": "a"}, 'no text: it has none of "text"'),
        ({"prompt": "p"}, 'it has "prompt" and no "completion": they come together'),
        ({"completion": "c"}, 'it has "completion" and no "prompt": they come together'),
        ({"text": " \n"}, "it is empty; give the text of the query"),
        ({"prompt": "p", "completion": ""}, "it is empty"),
        ({"messages": []}, "it is empty"),
        ({"text": "a", "weight": 0}, "its weight is 0, so it asks nothing"),
        ({"text": "a", "weight": "x"}, '"weight" is not a number but a string'),
        ({"text": 3}, '"text" is not a string but a number'),
        ({"input_ids": [1, 2], "labels": [1, 3]}, '"labels" holds 3 at position 1'),
        ({"input_ids": []}, "it is empty"),
        ({"input_ids": "12"}, '"input_ids" is not a list but a string'),
        ({"input_ids": 12}, '"input_ids" is not a list but a number'),
        ({"input_ids": [1, -1]}, '"input_ids" holds -1, which is not a token id'),
        ({"input_ids": [1, 2.0]}, '"input_ids" holds 2.0, which is not a token id'),
        ({"input_ids": [1, True]}, '"input_ids" holds true, which is not a token id'),
        ({"text": "a", "input_ids": []}, "it is empty"),
        ({"text": "a", "id": [1]}, r"its id must be a text or a whole number, got \[1\]"),
        ({"text": "a", "id": "one"}, "the name 'one' is already used in line 1"),
    ],
)
def test_error_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "q.jsonl", {"text": "fine", "id": "one"}, line)
    with pytest.raises(ConfigError, match=rf"^.*q\.jsonl, line 2: {message}"):
        read_queries(path)


def test_missing_binary_or_empty_file_is_rejected(tmp_path):
    with pytest.raises(
        ConfigError, match=r"the queries' file .*none\.jsonl cannot be read: No such file"
    ):
        read_queries(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_queries(tmp_path)
    (tmp_path / "q.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ConfigError, match=r"q\.jsonl is not UTF-8 text"):
        read_queries(tmp_path / "q.jsonl")
    with pytest.raises(ConfigError, match=r"q\.jsonl holds no query; give one per line"):
        read_queries(write(tmp_path / "q.jsonl", "\n"))


def test_query_made_in_python_is_validated_too(tmp_path):
    with pytest.raises(ConfigError, match="query 'mine': it is empty"):
        Query.of("mine", text="")
