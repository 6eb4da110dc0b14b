"""Convert input records to a tar's members: the fields of a document's form, and ``meta``."""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradproj.corpus.content import FIELDS, content_of, fields_of_form
from gradproj.corpus.documents import MAX_DOCUMENT_BYTES, UNKNOWN_DOMAIN, as_object
from gradproj.corpus.inputs.records import Record
from gradproj.corpus.messages import BadContentError, json_type
from gradproj.corpus.token_arrays import ids_bytes, npy_bytes

_ABSENT = object()
_SCALARS = (str, int, float)
_encode = msgspec.json.Encoder().encode


class BadRecordError(Exception):
    """A record cannot become a document. The message does not name the record's place."""


@dataclass(frozen=True, slots=True)
class PackedDocument:
    """One sample as a tar keeps it."""

    domain: str
    members: dict[str, bytes]
    """Suffix -> content, in the tar's order.

    ``json`` is UTF-8 JSON: the fields of its form, ``weight`` and ``meta``, whose ``pile_set_name``
    is the domain. Token ids without a text are ``npy``, their labels ``labels.npy``, and ``json``
    is there only if it says something.
    """

    @property
    def n_bytes(self) -> int:
        """Bytes of all members."""
        return sum(map(len, self.members.values()))


def pack(record: Record, text_field: str, domain_field: str) -> PackedDocument:
    """Convert a record to a document.

    The fields of its form are kept, and so are the fields of the record's ``meta``, which
    may be an object, a map column's pairs, or an object written as JSON;
    its other top-level strings and numbers (``id``, ``url``) are added to ``meta``. NaN becomes
    null.

    Raises:
        BadRecordError: not an object, no form of a document, a wrong type, a lone surrogate, or too
            large.
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
        if isinstance(value, _SCALARS) and name not in (text_field, domain_field, *content)
    }
    record_meta = as_object(record.value.get("meta"))
    if record_meta is not None:
        meta.pop("meta", None)
        meta |= record_meta
    tokens = {}
    if "input_ids" in content and "text" not in content:
        tokens = {name: content.pop(name) for name in ("input_ids", "labels") if name in content}
    try:
        members = _members(content | {"meta": meta | {"pile_set_name": domain}}, **tokens)
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise BadRecordError(
            f"holds a lone surrogate ({surrogate}), which is no character"
        ) from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadRecordError(f"cannot be written as JSON ({error})") from error
    largest = max(map(len, members.values()))
    if largest > MAX_DOCUMENT_BYTES:
        raise BadRecordError(f"a document of {largest:,} bytes; the most is {MAX_DOCUMENT_BYTES:,}")
    return PackedDocument(domain, members)


def _members(fields: dict[str, Any], input_ids: Any = None, labels: Any = None) -> dict[str, bytes]:
    if input_ids is None:
        return {"json": _encode(fields)}
    ids = np.asarray(input_ids, np.int64)
    return token_members(fields, ids, None if labels is None else np.asarray(labels, np.int32))


def token_members(
    fields: dict[str, Any], ids: NDArray[np.integer], labels: NDArray[np.integer] | None
) -> dict[str, bytes]:
    """Return the members of a document of token ids; ``fields`` are its weight and ``meta``."""
    says_nothing = fields == {"meta": {"pile_set_name": UNKNOWN_DOMAIN}}
    members = {} if says_nothing or not fields else {"json": _encode(fields)}
    members["npy"] = ids_bytes(ids)
    if labels is not None:
        members["labels.npy"] = npy_bytes(labels)
    return members


def _content(value: dict[str, Any], text_field: str) -> dict[str, Any]:
    """Return the fields of the document's form and its weight, checked as a reader of tars does."""
    text = _look_up(value, text_field)
    fields = {name: item for name, item in value.items() if name != "text"}
    if text is not _ABSENT:
        fields["text"] = text
    used = fields_of_form(fields)
    if not used and text is _ABSENT and not fields.keys() & set(FIELDS):
        names = ", ".join(repr(name) for name in list(value)[:8]) or "none"
        raise BadRecordError(
            f"no field {text_field!r} and no other form of a document (its fields: {names}; see "
            "--text_field)"
        )
    if ((text is not _ABSENT and not used) or "text" in used) and not isinstance(text, str):
        raise BadRecordError(f"field {text_field!r} is {json_type(text)}, not a string")
    try:
        content_of(fields)
    except BadContentError as bad:
        raise BadRecordError(str(bad)) from None
    weight = ["weight"] if fields.get("weight") is not None else []
    order = [*(["text"] if "text" in used else []), *used, *weight]
    return {name: fields[name] for name in order}


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
    fields = as_object(value)
    if fields is None:
        return _ABSENT
    if field in fields:
        return fields[field]
    head, _, rest = field.partition(".")
    return _look_up(fields.get(head), rest) if rest else _ABSENT
