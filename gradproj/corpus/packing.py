"""Convert input records to the JSON of a tar: ``{"text" or "input_ids", "meta"}``."""

from dataclasses import dataclass
from typing import Any

import msgspec

from gradproj.corpus.documents import MAX_DOCUMENT_BYTES, UNKNOWN_DOMAIN, json_type

_ABSENT = object()
_SCALARS = (str, int, float)
_encode = msgspec.json.Encoder().encode


class BadRecordError(Exception):
    """A record cannot become a document. The message does not name the record's place."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line, row or file of an input."""

    place: str
    """Position in the input, for messages: ``line 7``."""
    value: Any = None
    problem: str | None = None
    """The reason if ``value`` could not be read."""


@dataclass(frozen=True, slots=True)
class PackedDocument:
    """One sample as a tar keeps it."""

    domain: str
    payload: bytes
    """UTF-8 JSON: ``text``, ``input_ids`` or both; the domain is ``meta.pile_set_name``."""


def pack(record: Record, text_field: str, domain_field: str) -> PackedDocument:
    """Convert a record to a document.

    The text and the ``input_ids`` are kept, and so are the fields of the record's ``meta`` object;
    its other top-level strings and numbers (``id``, ``url``) are added to ``meta``. NaN becomes
    null.

    Raises:
        BadRecordError: not an object, neither text nor token ids, a wrong type, a lone surrogate,
            or too large.
    """
    if record.problem is not None:
        raise BadRecordError(record.problem)
    if not isinstance(record.value, dict):
        raise BadRecordError(f"not a JSON object but {json_type(record.value)}")
    content = _content(record.value, text_field)
    domain = _domain(record.value, domain_field)
    meta = {
        name: value
        for name, value in record.value.items()
        if isinstance(value, _SCALARS) and name not in (text_field, domain_field)
    }
    record_meta = record.value.get("meta")
    if isinstance(record_meta, dict):
        meta |= record_meta
    try:
        payload = _encode(content | {"meta": meta | {"pile_set_name": domain}})
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise BadRecordError(
            f"holds a lone surrogate ({surrogate}), which is no character"
        ) from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadRecordError(f"cannot be written as JSON ({error})") from error
    if len(payload) > MAX_DOCUMENT_BYTES:
        raise BadRecordError(
            f"a document of {len(payload):,} bytes; the most is {MAX_DOCUMENT_BYTES:,}"
        )
    return PackedDocument(domain, payload)


def _content(value: dict[str, Any], text_field: str) -> dict[str, Any]:
    text, ids = _look_up(value, text_field), value.get("input_ids")
    tokens = {} if ids is None else {"input_ids": _checked_ids(ids)}
    if isinstance(text, str):
        return {"text": text, **tokens}
    if tokens and (text is None or text is _ABSENT):
        return tokens
    if text is _ABSENT:
        names = ", ".join(repr(name) for name in list(value)[:8]) or "none"
        raise BadRecordError(
            f"no field {text_field!r} and no 'input_ids' (its fields: {names}; see --text_field)"
        )
    raise BadRecordError(f"field {text_field!r} is {json_type(text)}, not a string")


def _checked_ids(ids: Any) -> list[int]:
    if not isinstance(ids, list):
        raise BadRecordError(f"'input_ids' is {json_type(ids)}, not a list of token ids")
    # All types at once, several times faster than id by id. `isinstance` would accept a bool.
    wrong_types = set(map(type, ids)) - {int}
    if wrong_types:
        raise BadRecordError(f"'input_ids' holds {wrong_types.pop().__name__}, not only integers")
    if ids and not (min(ids) >= 0 and max(ids) < 1 << 31):
        raise BadRecordError(
            f"'input_ids' reaches from {min(ids)} to {max(ids)}; ids are 0 to 2^31 - 1"
        )
    return ids


def _domain(value: dict[str, Any], domain_field: str) -> str:
    domain = _look_up(value, domain_field)
    if domain is _ABSENT or domain is None or domain == "":
        return UNKNOWN_DOMAIN
    if isinstance(domain, str):
        return domain
    if type(domain) is int:
        return str(domain)
    raise BadRecordError(f"field {domain_field!r} is {json_type(domain)}, not a domain's name")


def _look_up(value: Any, field: str) -> Any:
    """Return ``value["a.b"]``, else ``value["a"]["b"]``, else ``_ABSENT``."""
    if not isinstance(value, dict):
        return _ABSENT
    if field in value:
        return value[field]
    head, _, rest = field.partition(".")
    return _look_up(value.get(head), rest) if rest else _ABSENT
