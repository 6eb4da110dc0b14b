"""Questions that come as JSON: checked, and turned into the flags of ``query``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradproj.cli.query.config import QueryConfig
from gradproj.corpus.content import FIELDS
from gradproj.errors import ConfigError
from gradproj.formatting import listed
from gradproj.query import Query

MAX_LISTED = 200
"""Documents at one end of an answer."""
NAME = "text"


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a text, got {value!r:.60}")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise ConfigError(f"{name} must be a list of texts, got {value!r:.60}")
    return tuple(value)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r:.60}")
    return value


def _number(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_LISTED:
        raise ConfigError(f"{name} must be a number from 0 to {MAX_LISTED}, got {value!r:.60}")
    return value


_FLAGS: dict[str, Callable[[str, Any], Any]] = {
    "score": _text,
    "curvature": _text,
    "damping": _text,
    "reduction": _text,
    "head_sum": _text,
    "layers": _names,
    "domains": _names,
    "top_k": _number,
    "bottom_k": _number,
    "joint": _switch,
    "text_scores": _switch,
    "text_matches": _switch,
    "tokens": _switch,
    "show_text": _switch,
}
"""The flags of ``query`` that a question may have: none of them names a file."""


@dataclass(frozen=True)
class Asked:
    """A question that came as JSON."""

    query: Query
    flags: dict[str, Any]

    @classmethod
    def of(cls, fields: dict[str, Any], most_characters: int) -> "Asked":
        """Check a question: fields of a document, such as ``text``, and flags of ``query``.

        Raises:
            ConfigError: an unknown field, a wrong type, or too long a query.
        """
        content = {name: fields[name] for name in FIELDS if name in fields}
        given = {name: value for name, value in fields.items() if name not in content}
        unknown = sorted(given.keys() - _FLAGS.keys())
        if unknown:
            raise ConfigError(
                f"a question has no {unknown[0]!r}; it has {listed((*FIELDS, *_FLAGS))}"
            )
        n = _n_characters(content)
        if n > most_characters:
            raise ConfigError(
                f"the query has {n:,} characters, and this server takes at most "
                f"{most_characters:,} (--max_query_characters)"
            )
        flags = {name: _FLAGS[name](name, value) for name, value in given.items()}
        return cls(Query.of(NAME, where="the question", **content), flags)

    def config(self, **inputs: Any) -> QueryConfig:
        """Return the flags of ``query``; ``inputs`` are those of the server's own."""
        # The query itself is handed over beside the flags.
        return QueryConfig(text=NAME, format="jsonl", **inputs, **self.flags)


def _n_characters(content: Any) -> int:
    """Return the characters of all texts, and the numbers of all lists of ids."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, dict):
        return sum(len(key) + _n_characters(value) for key, value in content.items())
    if isinstance(content, list):
        return sum(map(_n_characters, content))
    return 1
