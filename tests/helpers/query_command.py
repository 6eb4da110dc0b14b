"""The query command in this process: its exit code and what it prints."""

import json

import numpy as np
import pytest

from gradproj.__main__ import main
from gradproj.store.layout import STATUS

TEXT = "the of and to in"
"""Of fewer tokens than the finished job's rows cover."""


class QueryCommand:
    """``python -m gradproj query`` on an output."""

    def __init__(self, capsys):
        self._capsys = capsys

    def __call__(self, output, *words, code=0):
        """``(lines on standard output, standard error)``; the exit code is held against ``code``."""
        self._capsys.readouterr()
        found = main(["query", str(output), "--device", "cpu", *map(str, words)])
        printed = self._capsys.readouterr()
        assert found == code, printed.err
        assert "Traceback" not in printed.err
        return printed.out.splitlines(), printed.err

    def objects(self, output, *words):
        """What ``--format jsonl`` prints."""
        lines, _ = self(output, *words, "--format", "jsonl")
        return [json.loads(line) for line in lines]

    def mistake(self, output, *words):
        """The one message of a question that cannot be answered."""
        lines, message = self(output, *words, code=2)
        assert lines == []
        assert message.startswith("gradproj: ")
        assert message.count("gradproj: ") == 1
        return message


@pytest.fixture
def ask(capsys):
    return QueryCommand(capsys)


def write_queries(path, *queries):
    path.write_text("".join(json.dumps(query) + "\n" for query in queries))
    return path


def ok_ids(store):
    return np.flatnonzero(store.column("status") == STATUS["ok"])
