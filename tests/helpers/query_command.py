"""Run the query command in this process."""

import itertools
import json

import numpy as np
import pytest

from gradproj.__main__ import main
from gradproj.store.layout import STATUS

TEXT = "the of and to in"
"""Shorter than the ``max_length`` of the finished job."""


class QueryCommand:
    """``python -m gradproj query`` on an output."""

    def __init__(self, capsys):
        self._capsys = capsys

    def __call__(self, output, *words, code=0):
        """Return ``(lines on standard output, standard error)``; check the exit code."""
        self._capsys.readouterr()
        flags = [str(word) for word in words]
        others = list(itertools.takewhile(lambda word: not word.startswith("-"), flags))
        flags = ["--device", "cpu", *flags[len(others) :]]
        exit_code = main(["query", str(output), *others, *flags])
        printed = self._capsys.readouterr()
        assert exit_code == code, printed.err
        assert "Traceback" not in printed.err
        return printed.out.splitlines(), printed.err

    def objects(self, output, *words):
        """Return the objects that ``--format jsonl`` prints."""
        lines, _ = self(output, *words, "--format", "jsonl")
        return [json.loads(line) for line in lines]

    def mistake(self, output, *words):
        """Return the single error message of a query with exit code 2."""
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
