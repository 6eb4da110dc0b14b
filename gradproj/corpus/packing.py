"""Turn a record of any input into the JSON that a tar keeps: ``{"text" or "input_ids", "meta"}``."""

from dataclasses import dataclass
from typing import Any

import msgspec

from gradproj.corpus.documents import MAX_DOCUMENT_BYTES, UNKNOWN_DOMAIN

_ABSENT = object()
_SCALARS = (str, int, float)
_encode = msgspec.json.Encoder().encode


class BadRecordError(Exception):
    """One record cannot become a document; the message says why, without the place."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line, row or file of an input, before it is a document."""

    place: str
    """Where in the input, for messages: ``line 7``."""
    value: Any = None
    problem: str | None = None
    """Why there is no value."""


@dataclass(frozen=True, slots=True)
class PackedDocument:
    """What a tar keeps of one sample."""

    domain: str
    payload: bytes
    """UTF-8 JSON: ``{"text": str and/or "input_ids": [int], "meta": {"pile_set_name": domain, ...}}``."""


def pack(record: Record, text_field: str, domain_field: str) -> PackedDocument:
    """The document of a record.

    It keeps the text, the ``input_ids``, or both where there are both. The record's own ``meta`` object is kept,
    its other top-level strings and numbers (``id``, ``url``) are put beside it, and NaN becomes null.

    Raises:
        BadRecordError: not an object; no text and no token ids; a wrong type; a lone surrogate; too large.
    """
    if record.problem is not None:
        raise BadRecordError(record.problem)
    if not isinstance(record.value, dict):
        raise BadRecordError(f"not a JSON object but {_type_name(record.value)}")
    content = _content(record.value, text_field)
    domain = _domain(record.value, domain_field)
    meta = {
        name: value
        for name, value in record.value.items()
        if isinstance(value, _SCALARS) and name not in (text_field, domain_field)
    }
    own = record.value.get("meta")
    if isinstance(own, dict):
        meta |= own
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
    raise BadRecordError(f"field {text_field!r} is {_type_name(text)}, not a string")


def _checked_ids(ids: Any) -> list[int]:
    if not isinstance(ids, list):
        raise BadRecordError(f"'input_ids' is {_type_name(ids)}, not a list of token ids")
    # A set of types is several times faster than a check per id; bool is a subclass of int, so no isinstance.
    strangers = set(map(type, ids)) - {int}
    if strangers:
        raise BadRecordError(f"'input_ids' holds {strangers.pop().__name__}, not only integers")
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
    raise BadRecordError(f"field {domain_field!r} is {_type_name(domain)}, not a domain's name")


def _look_up(value: Any, field: str) -> Any:
    """``value["a.b"]``, else ``value["a"]["b"]``, else ``_ABSENT``."""
    if not isinstance(value, dict):
        return _ABSENT
    if field in value:
        return value[field]
    head, _, rest = field.partition(".")
    return _look_up(value.get(head), rest) if rest else _ABSENT


def _type_name(value: Any) -> str:
    names = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
    }
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else type(value).__name__
    )
