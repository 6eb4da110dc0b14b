"""Query files: three forms, names in order, and errors with file and line."""

import json

import pytest

from gradproj.errors import ConfigError
from gradproj.query import Query, read_queries


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def test_line_holds_text_or_prompt_and_completion_or_token_ids(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"text": "a text\u2028with a separator", "id": "first"},
        "\n",
        {"prompt": "p", "completion": " c", "name": "second", "label": 3},
        {"input_ids": [1, 2], "id": 7},
        {"prompt": "", "completion": "c", "text": None},
        {"text": "a text that is not read", "input_ids": [3, 4], "id": "both"},
    )
    got = read_queries(path)
    assert [(q.name, q.text, q.prompt, q.completion, q.input_ids) for q in got] == [
        ("first", "a text\u2028with a separator", None, None, None),
        ("second", None, "p", " c", None),
        ("7", None, None, None, [1, 2]),
        ("line 5", None, "", "c", None),
        ("both", "a text that is not read", None, None, [3, 4]),
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
    with pytest.raises(ConfigError, match="--group_by is 'task.'; give field names"):
        read_queries(path, "task.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{torn\n", "invalid JSON"),
        ("[" * 100_000 + "\n", "invalid JSON"),
        ('["text"]\n', "not an object but"),
        ({}, r'no query; give one of \{"text"'),
        ({"txt": "a"}, "no query; give one of"),
        ({"prompt": "p", "completion": "c", "input_ids": [1, 2]}, "more than one query"),
        ({"text": "a", "prompt": "p", "completion": "c"}, "more than one query"),
        ({"prompt": "p"}, "there is no completion: prompt and completion come together"),
        ({"completion": "c"}, "there is no prompt: prompt and completion come together"),
        ({"text": " \n"}, "text is empty"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"text": 3}, "text must be a text, got 3"),
        ({"prompt": ["p"], "completion": "c"}, r"prompt must be a text, got \['p'\]"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": "12"}, '"input_ids" is not a list but a string'),
        ({"input_ids": 12}, '"input_ids" is not a list but a number'),
        ({"input_ids": [1, -1]}, '"input_ids" holds -1, which is not a token id'),
        ({"input_ids": [1, 2.0]}, '"input_ids" holds 2.0, which is not a token id'),
        ({"input_ids": [1, True]}, '"input_ids" holds true, which is not a token id'),
        ({"text": "a", "input_ids": []}, "input_ids is empty"),
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
    with pytest.raises(ConfigError, match="query 'mine': text is empty"):
        Query.of("mine", text="")
