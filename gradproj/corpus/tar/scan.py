"""Scan a tar in one pass: its samples, their offsets and domains, and every damage.

Samples are grouped and members skipped by webdataset's rules, so the stream, which decodes with
webdataset, finds exactly the samples that were counted here. The tar is read in chunks. Headers of
common form are checked a chunk at a time (``plain_headers``), the others one by one (``headers``).
"""

import base64
import re
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from zlib import crc32

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from gradproj.corpus.documents import MAX_DOCUMENT_BYTES, UNKNOWN_DOMAIN, DomainReader
from gradproj.corpus.tar.headers import TarBytes, open_tar_bytes, read_member
from gradproj.corpus.tar.plain_headers import PlainHeaders, Run
from gradproj.errors import CorpusError
from gradproj.formatting import escaped
from gradproj.storage.address import Location
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.stream import ObjectChanged

SAMPLES_PER_BLOCK = 64
READ_SUFFIXES = frozenset({"json", "txt", "npy", "labels.npy"})
"""Suffixes of the members that documents are read from."""
MAX_MEMBER_KINDS = 20
MAX_DOMAINS = 32_767
"""A store keeps a sample's domain as int16."""

# Part of the digest: another value would change every corpus's fingerprint. 2 MiB is the fastest.
_CHUNK_BYTES = 2**21

_BASE_PLUS_EXT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$").match
_META_FOLDER = re.compile(r"__[^/]*__($|/)").match
# webdataset keeps these in the same dictionary as the members.
_RESERVED_SUFFIXES = frozenset({"__key__", "__url__", "__local_path__", "__bad__"})


@dataclass(frozen=True)
class TarFacts:
    """Result of a scan. Arrays are kept as base64 text, as in the index."""

    n_samples: int
    longest_key_bytes: int
    largest_member_bytes: int
    digest: str
    domain_counts: dict[str, int]
    block_offsets_base64: str
    block_key_crcs_base64: str
    # Indexes of older versions lack these.
    n_without_text: int = 0
    """Samples without a ``json``, a ``txt`` and a ``npy`` member."""
    members: dict[str, int] = field(default_factory=dict)
    """Members by the end of their names: ``.json``, ``.*.json`` with dots before."""
    unread_example: str = ""
    """Name of the first member that no document is read from."""

    @property
    def block_offsets(self) -> NDArray[np.int64]:
        """Byte offset of every 64th sample's first header, long-name and pax headers included."""
        return np.frombuffer(base64.b64decode(self.block_offsets_base64), "<i8")

    @property
    def block_key_crcs(self) -> NDArray[np.uint32]:
        """crc32 of each block's keys, joined by newlines."""
        return np.frombuffer(base64.b64decode(self.block_key_crcs_base64), "<u4")


def scan_tar(path: Location, domain_field: str, facts: ObjectFacts | None = None) -> TarFacts:
    """Read a tar once and return its facts. What a remote one is now must be known.

    Raises:
        CorpusError: the tar is damaged or cannot be read; names the tar, the byte and the kind.
    """
    try:
        with open_tar_bytes(path, facts) as data:
            if len(data) == 0:
                raise data.damage(0, "an empty file")
            return _Scan(data, domain_field).run()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ObjectChanged as error:
        raise CorpusError(f"{path}: changed while it was read: {error}; index it again") from None


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Split a member's name by webdataset's rules; None for a member that webdataset skips."""
    if name.startswith("__") and (("/" not in name and name.endswith("__")) or _META_FOLDER(name)):
        return None
    match = _BASE_PLUS_EXT(name)
    return (match[1], match[2].lower()) if match else None


def crc_of_keys(keys: list[str]) -> int:
    """Return the crc32 of a block's keys, as the index keeps it."""
    return crc32("\n".join(keys).encode("utf-8", "surrogateescape"))


def _base64(numbers: list[int], dtype: str) -> str:
    return base64.b64encode(np.array(numbers, dtype).tobytes()).decode()


def _longest_bytes(keys: list[str]) -> int:
    if "".join(keys).isascii():
        return max(map(len, keys), default=0)
    return max(len(key.encode("utf-8", "surrogateescape")) for key in keys)


class _Scan:
    """Groups a tar's members into samples. All lists are in the order of the samples."""

    def __init__(self, data: TarBytes, domain_field: str) -> None:
        self._data = data
        self._domain_of = DomainReader(domain_field)
        self._seen: set[str] = set()
        self._keys: list[str] = []
        self._starts: list[int] = []
        self._domain_counts: Counter[str] = Counter()
        self._largest = 0
        self._crcs: list[int] = []
        self._position = 0
        self._ended = False
        self._n_without_text = 0
        self._suffix_counts: Counter[str] = Counter()
        self._unread_example = ""
        # The open sample: more of its members may follow.
        self._suffixes: list[str] = []
        self._domain = UNKNOWN_DOMAIN

    def run(self) -> TarFacts:
        for first in range(0, len(self._data), _CHUNK_BYTES):
            self._scan_chunk(first)
        if not self._ended:
            self._add_member_at(self._position)
        self._close_sample()
        return self._facts()

    def _scan_chunk(self, first: int) -> None:
        chunk = self._data.load(first, _CHUNK_BYTES)
        self._crcs.append(google_crc32c.value(chunk))
        last = first + len(chunk)
        if self._ended or self._position >= last:
            return
        headers = PlainHeaders(chunk)
        while self._position < last and not self._ended:
            run = headers.run_from(self._position - first)
            if run is None:
                self._add_member_at(self._position)
            else:
                self._add_run(run, chunk, first)
                self._position = first + run.following

    def _add_member_at(self, position: int) -> None:
        """Read one member of any form, or the tar's end."""
        result = read_member(self._data, position)
        if result is None:
            self._ended = True
            return
        member, self._position = result
        split = key_and_suffix(member.name)
        self._count([member.name], [split])
        if split is None:
            return
        self._largest = max(self._largest, member.n_bytes)
        self._add(split, member.start)
        if split[1] == "json" and member.n_bytes <= MAX_DOCUMENT_BYTES:
            self._domain = self._domain_of(
                self._data[member.payload : member.payload + member.n_bytes]
            )

    def _add_run(self, run: Run, chunk: bytes, first: int) -> None:
        """Add a run of members of the chunk that begins at byte ``first``."""
        one_each = run.keys_of_one_suffix()
        if one_each is not None and self._add_samples(*one_each, run, chunk, first):
            return
        names = run.names()
        splits = [key_and_suffix(name) for name in names]
        self._count(names, splits)
        read = [i for i, split in enumerate(splits) if split is not None]
        with_json = [i for i in read if splits[i][1] == "json"]  # type: ignore[index]
        domains = dict(zip(with_json, self._domains_of(run, with_json, chunk), strict=True))
        self._largest = max(self._largest, int(run.n_bytes[read].max(initial=0)))
        starts = (run.starts + first).tolist()
        for i in read:
            self._add(splits[i], starts[i])  # type: ignore[arg-type]
            self._domain = domains.get(i, self._domain)

    def _add_samples(
        self, keys: list[str], suffix: str, run: Run, chunk: bytes, first: int
    ) -> bool:
        """Add a run in which every member is one sample. Returns False if that is not so."""
        unique = set(keys)
        if (
            len(unique) < len(keys)
            or not self._seen.isdisjoint(unique)
            or suffix in _RESERVED_SUFFIXES
        ):
            return False
        self._close_sample()
        self._seen |= unique
        self._keys += keys
        self._starts += (run.starts + first).tolist()
        self._largest = max(self._largest, int(run.n_bytes.max()))
        is_json = suffix == "json"
        domains = (
            self._domains_of(run, slice(None), chunk) if is_json else [UNKNOWN_DOMAIN] * len(keys)
        )
        self._suffix_counts[suffix] += len(keys)
        if suffix not in READ_SUFFIXES:
            self._n_without_text += len(keys) - 1  # and the open sample when it is closed
            self._unread_example = self._unread_example or f"{keys[0]}.{suffix}"
        self._suffixes, self._domain = [suffix], domains.pop()
        self._domain_counts.update(domains)
        return True

    def _domains_of(self, run: Run, which: slice | list[int], chunk: bytes) -> list[str]:
        payloads, n_bytes = run.payloads[which], run.n_bytes[which]
        return self._domain_of.many(chunk, payloads.tolist(), (payloads + n_bytes).tolist())

    def _add(self, split: tuple[str, str], start: int) -> None:
        """Add one member to the open sample or to a new one."""
        key, suffix = split
        if not self._keys or key != self._keys[-1]:
            if key in self._seen:
                raise self._not_grouped(
                    start, f"the key {key!r} comes a second time, apart from the first"
                )
            self._close_sample()
            self._seen.add(key)
            self._keys.append(key)
            self._starts.append(start)
        if suffix in self._suffixes:
            raise self._not_grouped(start, f"the sample {key!r} has two members {suffix!r}")
        if suffix in _RESERVED_SUFFIXES:
            raise self._not_grouped(
                start, f"the suffix {suffix!r} of the sample {key!r} is webdataset's own"
            )
        self._suffixes.append(suffix)
        if suffix not in READ_SUFFIXES and not self._unread_example:
            self._unread_example = f"{key}.{suffix}"

    def _close_sample(self) -> None:
        if self._suffixes:
            self._domain_counts[self._domain] += 1
            self._n_without_text += READ_SUFFIXES.isdisjoint(self._suffixes)
        self._suffixes, self._domain = [], UNKNOWN_DOMAIN
        if len(self._domain_counts) > MAX_DOMAINS:
            raise CorpusError(
                f"{self._data.path}: the domain field has over {MAX_DOMAINS:,} different values; "
                "give --domain_field a field that names a domain"
            )

    def _facts(self) -> TarFacts:
        keys = self._keys
        blocks = [keys[i : i + SAMPLES_PER_BLOCK] for i in range(0, len(keys), SAMPLES_PER_BLOCK)]
        key_crcs = [crc_of_keys(block) for block in blocks]
        digest = blake2b(digest_size=16)
        for crc in self._crcs + key_crcs:
            digest.update(crc.to_bytes(4, "little"))
        return TarFacts(
            n_samples=len(keys),
            longest_key_bytes=_longest_bytes(keys),
            largest_member_bytes=self._largest,
            digest=digest.hexdigest(),
            domain_counts=dict(sorted(self._domain_counts.items())),
            block_offsets_base64=_base64(self._starts[::SAMPLES_PER_BLOCK], "<i8"),
            block_key_crcs_base64=_base64(key_crcs, "<u4"),
            n_without_text=self._n_without_text,
            members=self._members_by_ending(),
            unread_example=escaped(self._unread_example),
        )

    def _count(self, names: list[str], splits: list[tuple[str, str] | None]) -> None:
        """Count members by suffix, except webdataset's own and what is no file."""
        self._suffix_counts.update([split[1] for split in splits if split])
        if None in splits:
            skipped = [name for name, split in zip(names, splits, strict=True) if split is None]
            self._suffix_counts[""] += sum(name[:2] not in ("", "__") for name in skipped)

    def _members_by_ending(self) -> dict[str, int]:
        members: Counter[str] = Counter()
        for suffix, n in (+self._suffix_counts).items():
            *inner, end = [suffix] if suffix in READ_SUFFIXES else suffix.split(".")
            kind = f"{'.*' if inner else ''}.{end}" if suffix else "other names"
            is_one_more = kind not in members and len(members) >= MAX_MEMBER_KINDS
            members["others" if is_one_more else escaped(kind)] += n
        return dict(members)

    def _not_grouped(self, start: int, problem: str) -> CorpusError:
        return CorpusError(
            f"{self._data.path}: at byte {start:,}: {problem}. A sample's members must be adjacent "
            "and have different suffixes, under a key used once in the tar; make this tar again "
            "(python -m gradproj prepare does)"
        )
