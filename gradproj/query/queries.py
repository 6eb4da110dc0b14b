"""Queries and JSONL files of them, one query per line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradproj.corpus.content import problem_of_token_ids
from gradproj.corpus.fields import check_path, group_at
from gradproj.errors import ConfigError
from gradproj.formatting import listed

FORMS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"input_ids": [...]}'
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Query:
    """A text, a completion after a prompt, or token ids.

    Raises:
        ConfigError: not exactly one of the three forms, or an empty or malformed one.
    """

    name: str
    text: str | None = None
    prompt: str | None = None
    """Context before ``completion``, excluded from the loss. May be empty."""
    completion: str | None = None
    input_ids: Sequence[int] | None = None
    """Used as they are, without special tokens, and instead of a ``text``, as in a document."""
    where: str = ""
    """Place named in messages; default: the query's name."""
    group: str = ""
    """Name of the set that the query belongs to, if it was read by a field of its line."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ConfigError(f"{self.place}: {problem}")

    @property
    def place(self) -> str:
        """File and line, or the name."""
        return self.where or f"query {self.name!r}"

    def _problem(self) -> str:
        if (self.prompt is None) != (self.completion is None):
            missing = "completion" if self.completion is None else "prompt"
            return f"there is no {missing}: prompt and completion come together. A query is {FORMS}"
        has_text = self.text is not None or self.input_ids is not None
        n_forms = has_text + (self.completion is not None)
        if n_forms != 1:
            return f"{'no query' if n_forms == 0 else 'more than one query'}; give one of {FORMS}"
        if self.input_ids is not None:
            problem = problem_of_token_ids(self.input_ids)
            if problem or self.input_ids:
                return problem
            return "input_ids is empty; give at least a token and its target"
        for key in ("text", "prompt", "completion"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                return f"{key} must be a text, got {value!r:.60}"
            if value is not None and key != "prompt" and not value.strip():
                return f"{key} is empty; give the text of the query"
        return ""


def read_queries(path: str | Path, group_by: str = "") -> list[Query]:
    """Read the queries of a JSONL file in order, named by ``id``, ``name`` or their line number.

    ``group_by`` is the dotted path of the field that names each query's ``group``.

    Raises:
        ConfigError: file, line, the problem and the expected form.
    """
    queries: list[Query] = []
    lines: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):  # splitlines() would split at U+2028
                if not line.strip():
                    continue
                query = _parse_query(line, f"{path}, line {number}", f"line {number}", group_by)
                if query.name in lines:
                    raise ConfigError(
                        f"{query.where}: the name {query.name!r} is already used in line "
                        f"{lines[query.name]}; give each query its own"
                    )
                lines[query.name] = number
                queries.append(query)
    except OSError as error:
        raise ConfigError(f"the queries' file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: {error}; give JSONL, one query per line"
        ) from error
    if not queries:
        raise ConfigError(f"{path} holds no query; give one per line: {FORMS}")
    return queries


def _parse_query(line: str, where: str, name: str, group_by: str) -> Query:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: invalid JSON ({error}); give one object per line: {FORMS}"
        ) from error
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}: not an object but {line.strip()!r:.60}; give {FORMS}")
    given = next((fields[key] for key in ("id", "name") if fields.get(key) not in (None, "")), name)
    if type(given) not in (str, int):
        raise ConfigError(f"{where}: its id must be a text or a whole number, got {given!r:.60}")
    forms = {key: fields.get(key) for key in ("text", "prompt", "completion", "input_ids")}
    return Query(name=str(given), where=where, group=_group(fields, group_by, where), **forms)


def _group(fields: Mapping[str, Any], group_by: str, where: str) -> str:
    if not group_by:
        return ""
    group = group_at(fields, check_path("--group_by", group_by))
    if group is None:
        raise ConfigError(
            f"{where}: no text or number in {group_by!r}, by which --group_by groups the queries; "
            f"the line has {listed(map(str, fields))}"
        )
    return group
