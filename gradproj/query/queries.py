"""Queries and JSONL files of them, one query per line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gradproj.corpus.content import FIELDS, FORMS, Completion, Content, TokenIds, content_of
from gradproj.corpus.fields import check_path, group_at
from gradproj.corpus.messages import BadContentError
from gradproj.errors import ConfigError
from gradproj.formatting import listed

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question in a form that documents have; ``Query.of`` makes it from their fields.

    Raises:
        ConfigError: an empty text, or a weight of 0.
    """

    name: str
    content: Content
    weight: float = 1.0
    """The row is multiplied by it."""
    where: str = ""
    """Place named in messages; default: the query's name."""
    group: str = ""
    """Name of the set that the query belongs to, if it was read by a field of its line."""

    @classmethod
    def of(cls, name: str, where: str = "", group: str = "", **fields: Any) -> Self:
        """Return the query of a document's fields, such as ``text="..."`` or ``messages=[...]``.

        Raises:
            ConfigError: the fields make no document, or an empty one.
        """
        try:
            content, weight = content_of(fields)
        except BadContentError as problem:
            place = where or f"query {name!r}"
            raise ConfigError(f"{place}: {problem}") from problem
        return cls(name=name, content=content, weight=weight, where=where, group=group)

    def __post_init__(self) -> None:
        content = self.content
        answer = content.completion if isinstance(content, Completion) else content.plain_text()
        if content.is_empty() or not (isinstance(content, TokenIds) or answer.strip()):
            raise ConfigError(f"{self.place}: it is empty; give the text of the query")
        if not self.weight:
            raise ConfigError(f"{self.place}: its weight is 0, so it asks nothing; leave it out")

    @property
    def place(self) -> str:
        """File and line, or the name."""
        return self.where or f"query {self.name!r}"


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
    content = {name: fields[name] for name in FIELDS if name in fields}
    return Query.of(str(given), where, _group(fields, group_by, where), **content)


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
