"""Decode a sample's members into a document (``content.py`` has its forms) and its domain.

The index and the stream both read the domain with :class:`DomainReader`, so they cannot disagree.
"""

# Neither webdataset nor torch is imported here, so that the index's workers start quickly.
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradproj.corpus.content import Content, content_of, fields_of_form, is_unicode
from gradproj.corpus.messages import BadContentError, json_type
from gradproj.corpus.token_arrays import BadArrayError, read_integers
from gradproj.errors import ConfigError
from gradproj.flags import Flags, flag

UNKNOWN_DOMAIN = "unknown"
MAX_DOCUMENT_BYTES = 256 * 2**20

# Longer last fields take the slower ways. Endings are cached: a corpus of 22 domains has few.
_ENDING_BYTES = 400
_MAX_ENDINGS = 4096

# Strings are matched whole, so that brackets inside them do not count. Possessive quantifiers and
# an optional closing quote keep this linear in any input.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """One sample of the corpus.

    ``content`` is None if ``problem`` says why the sample is bad input. ``weight`` multiplies its
    row. ``tar`` is the tar's position in the index.
    """

    sample_id: int
    key: str
    tar: int
    domain: str
    content: Content | None
    weight: float
    problem: str | None

    @property
    def text(self) -> str:
        """Its text to be shown; empty if it has none."""
        return "" if self.content is None else self.content.plain_text()


@dataclass(frozen=True, kw_only=True)
class ReadLimits(Flags, title="limits of a document"):
    """Limits for untrusted documents. A document beyond a limit is bad input (status 6)."""

    max_document_bytes: int = flag(
        "Largest .json, .txt or .npy of a document, in bytes; a larger one is bad input.",
        MAX_DOCUMENT_BYTES,
        minimum=1,
    )
    # The standard library's decoder fails at a depth of about 1,000, less the caller's stack.
    max_json_depth: int = flag(
        "Deepest nesting of a document's JSON; a deeper one is bad input.",
        64,
        minimum=1,
        maximum=500,
    )


class DomainReader:
    """Reads one string field, by its dotted path, from the bytes of ``{key}.json``.

    A document that cannot be decoded, or has no such non-empty string, belongs to "unknown". Three
    ways are tried in turn: the last field alone (0.4 us; in the Pile ``meta`` is last), msgspec,
    which skips the other fields (2 us for 5 kB), and the standard library. They agree on valid
    JSON; on invalid JSON the first still returns the domain that an intact last field names. An
    object on the path may be written as a JSON string, which only the last way reads.
    """

    def __init__(self, domain_field: str) -> None:
        path = domain_field.split(".")
        if not all(path):
            raise ConfigError(
                f"--domain_field is {domain_field!r}; give field names joined by dots"
            )
        self._path = path
        self._decode_document = msgspec.json.Decoder(_nested(path)).decode
        self._decode_last_field = msgspec.json.Decoder(_nested(path[1:]) | None).decode
        self._first_name = json.dumps(path[0], ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._key = re.compile(
            rb".{0,2}[,{]\s?" + re.escape(self._first_name) + rb"\s?:", re.DOTALL
        ).match
        self._endings: dict[bytes, str] = {}

    def __call__(self, data: bytes) -> str:
        return self.many(data, [0], [len(data)])[0]

    def many(self, buffer: bytes, starts: list[int], stops: list[int]) -> list[str]:
        """Return the domains of the documents at ``[start, stop)`` of a buffer of a tar."""
        first_name, rfind = self._first_name, buffer.rfind
        # If the name is not found, or only in the header before a short document, the slice is
        # not a valid ending and does not match.
        endings = [
            buffer[
                rfind(first_name, stop - _ENDING_BYTES if stop > _ENDING_BYTES else 0, stop)
                - 2 : stop
            ]
            for stop in stops
        ]
        cached = list(map(self._endings.get, endings))
        return [
            domain or self._new_ending(endings[i]) or self._parse(buffer[starts[i] : stops[i]])
            for i, domain in enumerate(cached)
        ]

    def _new_ending(self, ending: bytes) -> str | None:
        """Return the domain if ``ending`` is ``, "meta": VALUE}`` up to the end, else None.

        In valid JSON the first quote follows a comma or a brace, so it is not escaped and begins a
        key. If one whole value and one brace follow up to the end, this is the document's last
        field, which counts even if its name occurs twice.
        """
        key = self._key(ending)
        if key is None or not ending.endswith(b"}"):
            return None
        try:
            domain = self._walk(
                self._decode_last_field(ending[key.end() : -1]), len(self._path) - 1
            )
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        if len(self._endings) < _MAX_ENDINGS:
            self._endings[ending] = domain
        return domain

    def _parse(self, data: bytes) -> str:
        try:
            value = self._decode_document(data)
            # msgspec checks nothing inside the strings it skips.
            if not data.isascii():
                data.decode()
        except RecursionError:
            return UNKNOWN_DOMAIN
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return self._parse_slowly(data)
        return self._walk(value, len(self._path))

    @staticmethod
    def _walk(value: Any, depth: int) -> str:
        for _ in range(depth):
            value = value and value.value
        return value or UNKNOWN_DOMAIN

    def _parse_slowly(self, data: bytes) -> str:
        # The standard library accepts NaN, lone surrogates and a byte order mark.
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return UNKNOWN_DOMAIN
        for name in self._path:
            value = (as_object(value) or {}).get(name)
        return value if isinstance(value, str) and value and is_unicode(value) else UNKNOWN_DOMAIN


def as_object(value: Any) -> dict[str, Any] | None:
    """Return an object's fields, also of a map column (pairs) and of an object written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, msgspec.MsgspecError, RecursionError):  # before 0.21 not a ValueError
            return None
    elif isinstance(value, list) and value and all(type(item) is tuple for item in value):
        value = {str(name): item for name, item in value}
    return value if isinstance(value, dict) else None


def _nested(path: list[str]) -> Any:
    # A msgspec type that reads one string at a path and skips all else; each level's field is
    # `value`.

    def wrap(inner: Any, name: str) -> Any:
        return msgspec.defstruct(
            "Level", [("value", inner | None, msgspec.field(name=name, default=None))]
        )

    return reduce(wrap, reversed(path), str)


def read_document(
    members: Mapping[str, bytes | None],
    sample_id: int,
    key: str,
    tar: int,
    domain_of: DomainReader,
    limits: ReadLimits,
    texts_only: bool = False,
) -> Document:
    """Decode a sample's members. Bad content is reported in ``problem``.

    ``{key}.json`` holds the fields of a document. If they make none, the JSON is only metadata, and
    ``{key}.txt`` is the text, or without one ``{key}.npy`` the token ids and ``{key}.labels.npy``
    their labels. A member too large to be read at all is None in ``members``. ``texts_only`` is
    that of the index.
    """
    data = members.get("json")
    domain = (
        domain_of(data) if data is not None and len(data) <= MAX_DOCUMENT_BYTES else UNKNOWN_DOMAIN
    )
    try:
        content, weight = content_of(fields_of_members(members, limits, texts_only))
    except BadContentError as bad:
        return Document(sample_id, key, tar, domain, None, 1.0, str(bad))
    return Document(sample_id, key, tar, domain, content, weight, None)


def fields_of_members(
    members: Mapping[str, bytes | None], limits: ReadLimits, texts_only: bool = False
) -> dict[str, Any]:
    """Return the fields of ``{key}.json``, with the content of the member that has it.

    Token ids of a ``.npy`` are numpy arrays.

    Raises:
        BadContentError: a member cannot be decoded, or none is read.
    """
    fields: dict[str, Any] = {}
    if "json" in members:
        fields = _json_object(_within_limit(members["json"], "json", limits), limits)
    if texts_only:
        fields = {name: fields[name] for name in ("text", "input_ids") if name in fields}
    if not fields_of_form(fields):
        if "txt" in members:
            fields["text"] = _utf8(_within_limit(members["txt"], "txt", limits), "txt")
        elif "npy" in members and not texts_only:
            fields["input_ids"] = _integers(members["npy"], "npy", limits)
            if "labels.npy" in members:
                fields["labels"] = _integers(members["labels.npy"], "labels.npy", limits)
    if not fields and "json" not in members:
        raise BadContentError(_nothing_to_read(members))
    return fields


def _nothing_to_read(members: Mapping[str, bytes | None]) -> str:
    suffixes = ", ".join(sorted(f".{suffix}" for suffix in members if not suffix.startswith("__")))
    return f"no text: it has no .json, .txt or .npy, only {suffixes}"


def _within_limit(data: bytes | None, suffix: str, limits: ReadLimits) -> bytes:
    if data is None or len(data) > limits.max_document_bytes:
        raise BadContentError(
            f"too large: its .{suffix} is over {limits.max_document_bytes:,} bytes"
        )
    return data


def _integers(data: bytes | None, suffix: str, limits: ReadLimits) -> NDArray[np.integer]:
    try:
        return read_integers(_within_limit(data, suffix, limits))
    except BadArrayError as error:
        raise BadContentError(f"its .{suffix} {error}") from None


def _utf8(data: bytes, suffix: str) -> str:
    try:
        return data.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(error.object)
        raise BadContentError(
            f"not UTF-8: byte {at:,} of its .{suffix} is 0x{data[at]:02x}"
        ) from None


def _json_object(data: bytes, limits: ReadLimits) -> dict[str, Any]:
    string = _utf8(data, "json")
    if _deeper_than(limits.max_json_depth, data):
        raise BadContentError(f"invalid JSON: nested more than {limits.max_json_depth} deep")
    try:
        value = json.loads(string)
    except ValueError as error:
        raise BadContentError(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadContentError(f"invalid JSON: not an object but {json_type(value)}")
    return value


def _deeper_than(depth: int, data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= depth:
        return False
    level = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        byte = data[match.start()]
        if byte in b"[{":
            level += 1
            if level > depth:
                return True
        elif byte in b"]}":
            level -= 1
    return False
