"""What is asked about, and files of it: a query a line, in JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradproj.errors import ConfigError

FORMS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"input_ids": [...]}'
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Query:
    """One thing to ask about: a text, a completion after a prompt, or token ids; ``ConfigError`` unless just one."""

    name: str
    text: str | None = None
    prompt: str | None = None
    """Read, and no part of the loss; ``completion`` comes with it. May be empty."""
    completion: str | None = None
    input_ids: Sequence[int] | None = None
    """As they are: no special token is added."""
    where: str = ""
    """What messages call it; by default its name."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ConfigError(f"{self.place}: {problem}")

    @property
    def place(self) -> str:
        """File and line, or the name."""
        return self.where or f"query {self.name!r}"

    def _problem(self) -> str | None:
        if (self.prompt is None) != (self.completion is None):
            lacking = "completion" if self.completion is None else "prompt"
            return f"there is no {lacking}: prompt and completion come together. A query is {FORMS}"
        n_forms = sum(form is not None for form in (self.text, self.completion, self.input_ids))
        if n_forms != 1:
            what = "nothing to ask about" if n_forms == 0 else "more than one thing to ask about"
            return f"{what}; give one of {FORMS}"
        for key in ("text", "prompt", "completion"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                return f"{key} must be a text, got {value!r:.60}"
            if value is not None and key != "prompt" and not value.strip():
                return f"{key} is empty; give the text to ask about"
        return None if self.input_ids is None else self._problem_of_ids(self.input_ids)

    def _problem_of_ids(self, ids: Any) -> str | None:
        if not isinstance(ids, Sequence) or isinstance(ids, str):
            return f"input_ids must be a list of whole numbers, got {ids!r:.60}"
        if not len(ids):
            return "input_ids is empty; give at least a token and its target"
        bad = next((x for x in ids if type(x) is not int or x < 0), None)
        return (
            None
            if bad is None
            else f"input_ids must be whole numbers, 0 or more, and one is {bad!r:.60}"
        )


def read_queries(path: str | Path) -> list[Query]:
    """The queries of a JSONL file, in its order; ``id`` or ``name`` names one, else its line does.

    Raises:
        ConfigError: file, line, what is wrong there, and what it should be.
    """
    queries: list[Query] = []
    lines: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:  # not splitlines(): texts hold U+2028
            for number, line in enumerate(file, start=1):
                if line.strip():
                    query = _query_of(line, f"{path}, line {number}", f"line {number}")
                    if query.name in lines:
                        raise ConfigError(
                            f"{query.where}: the name {query.name!r} is that of line {lines[query.name]} too; "
                            "give each query its own"
                        )
                    lines[query.name] = number
                    queries.append(query)
    except OSError as error:
        raise ConfigError(f"the queries' file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: {error}; give JSONL, a query a line"
        ) from error
    if not queries:
        raise ConfigError(f"{path} holds no query; give one a line: {FORMS}")
    return queries


def _query_of(line: str, where: str, name: str) -> Query:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON ({error}); give an object a line: {FORMS}") from error
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}: not an object but {line.strip()!r:.60}; give {FORMS}")
    given = next((fields[key] for key in ("id", "name") if fields.get(key) not in (None, "")), name)
    if type(given) not in (str, int):
        raise ConfigError(f"{where}: its id must be a text or a whole number, got {given!r:.60}")
    forms = {key: fields.get(key) for key in ("text", "prompt", "completion", "input_ids")}
    return Query(name=str(given), where=where, **forms)
