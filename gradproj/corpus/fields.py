"""Values of a JSON object's fields by their dotted path, as names of groups."""

from collections.abc import Mapping
from typing import Any

from gradproj.corpus.documents import as_object
from gradproj.errors import ConfigError


def check_path(flag: str, field: str) -> list[str]:
    """Return the names of a dotted path; ``ConfigError`` names the flag if one is empty."""
    path = field.split(".")
    if not all(path):
        raise ConfigError(f"{flag} is {field!r}; give field names joined by dots")
    return path


def group_at(fields: Mapping[str, Any], path: list[str]) -> str | None:
    """Return the text, number or boolean at a path as a text.

    None if there is no such field, or null, an empty text, a list or an object.
    """
    value: Any = fields
    for name in path:
        value = (as_object(value) or {}).get(name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, str) and value else None
