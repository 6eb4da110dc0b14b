"""The corpus index: maps sample ids to tars and byte offsets.

A sample's id is its tar's start id plus its position in the tar. The index is built once, from one
pass over every tar (``tar.scan``), and kept as one JSON file (``index_file``).
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradproj.corpus.tar.paths import some
from gradproj.corpus.tar.places import (
    check_all_finished,
    check_unchanged,
    is_other_content,
    present_facts,
)
from gradproj.corpus.tar.scan import MAX_DOMAINS, READ_SUFFIXES, TarFacts
from gradproj.corpus.tar.scan_journal import ScanJournal
from gradproj.corpus.tar.scan_pool import scan_tars
from gradproj.corpus.tokenization import Tokenization, read_tokenization
from gradproj.errors import CorpusError
from gradproj.formatting import count
from gradproj.storage.address import Address, Location
from gradproj.storage.cache import FileCache

_KINDS_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Tar(TarFacts):
    """One tar of the corpus as it was when it was indexed."""

    name: str
    path: Location
    size_bytes: int
    mtime_ns: int
    start_id: int
    etag: str = ""
    """Of a remote tar, if its server names one."""


@dataclass(frozen=True)
class CorpusIndex:
    """All tars of a corpus in order.

    ``domains`` are the sorted names of all domains; a sample without one belongs to "unknown".
    ``fingerprint`` is a hash of the tars' names, sizes, contents and counts, and of the
    tokenization. It does not depend on their folder or times, so a copied corpus is the same
    corpus.
    """

    tars: tuple[Tar, ...]
    domain_field: str
    domains: tuple[str, ...]
    n_samples: int
    longest_key_bytes: int
    fingerprint: str
    tokenization: Tokenization | None = None
    """The rules of documents that were tokenized ahead."""
    texts_only: bool = False
    """Read only ``text`` or ``input_ids`` of a document, as versions before its forms did: rows of
    a store that one of them began are continued so. Not part of the file."""
    cache: FileCache | None = None
    """Keeps tars of servers that send whole files only. Not part of the file."""

    @cached_property
    def _stop_ids(self) -> NDArray[np.int64]:
        return np.cumsum([tar.n_samples for tar in self.tars], dtype=np.int64)

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Return the number of a sample's tar in ``tars`` and its position in that tar."""
        if not 0 <= sample_id < self.n_samples:
            raise CorpusError(
                f"sample id {sample_id} is not in this corpus, whose ids are 0 to "
                f"{self.n_samples - 1}"
            )
        number = int(np.searchsorted(self._stop_ids, sample_id, side="right"))
        return number, sample_id - self.tars[number].start_id

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield ``(tar number, first position, stop position)`` for ids ``[start, stop)``."""
        if not 0 <= start <= stop <= self.n_samples:
            raise CorpusError(
                f"sample ids {start} to {stop} are not in this corpus of {self.n_samples} samples"
            )
        while start < stop:
            number, first = self.locate(start)
            last = min(stop - self.tars[number].start_id, self.tars[number].n_samples)
            yield number, first, last
            start += last - first

    def domain_counts(self) -> dict[str, int]:
        """Return samples per domain, in the order of ``domains``."""
        total: Counter[str] = Counter()
        for tar in self.tars:
            total.update(tar.domain_counts)
        return {domain: total[domain] for domain in self.domains}

    def unread_lines(self) -> list[str]:
        """Return lines for a person on members that no document is read from; none if all are read.

        An index that an older version wrote does not know them.
        """
        members: Counter[str] = Counter()
        for tar in self.tars:
            members.update(tar.members)
        unread = [(kind, n) for kind, n in members.most_common() if kind[1:] not in READ_SUFFIXES]
        if not unread:
            return []
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in unread[:_KINDS_SHOWN])
        examples = [f"; such as {tar.unread_example}" for tar in self.tars if tar.unread_example]
        lines = [
            f"not read      {sum(n for _, n in unread):,} of {members.total():,} members of the "
            f"tars: {kinds}{', ...' if len(unread) > _KINDS_SHOWN else ''}{''.join(examples[:1])}.",
            "              Only KEY.json, KEY.txt, KEY.npy and KEY.labels.npy are read.",
            "              A key ends at the first dot of a file name, as in webdataset: a.json",
            "              and a.b.json are members of one document, a",
        ]
        n_without = sum(tar.n_without_text for tar in self.tars)
        if n_without:
            documents = count(n_without, "document")
            lines.append(f"bad input     {documents} without a .json, a .txt or a .npy")
        return lines

    def relocated(self, paths: Sequence[Location], flag: str = "--shards") -> "CorpusIndex":
        """Return the index with its tars at these paths.

        A tar at a new path counts as the indexed one if name and size agree, and its new time or
        etag is noted; the stream still checks its keys. A tar at its old path keeps those of the
        index, so that a change in place is still noticed. ``flag`` names the paths in messages.

        Raises:
            CorpusError: other tars, other sizes or another order; lists the differences.
        """
        wrong = []
        if len(paths) != len(self.tars):
            wrong.append(f"{len(paths)} tars, the index has {len(self.tars)}")
        moved = []
        pairs = list(zip(self.tars, paths, strict=False))
        elsewhere = [path for tar, path in pairs if path != tar.path]
        present = dict(zip(elsewhere, present_facts(elsewhere), strict=True))
        for number, (tar, path) in enumerate(pairs):
            if path == tar.path:
                # The address may be another in how it is read.
                moved.append(replace(tar, path=path))
                continue
            now = present[path]
            if path.name != tar.name:
                wrong.append(f"tar {number} is {path.name}, the index has {tar.name}")
            elif now.size_bytes != tar.size_bytes:
                wrong.append(
                    f"{path.name} has {now.size_bytes:,} bytes, the index has {tar.size_bytes:,}"
                )
            elif is_other_content(tar, path, now):
                wrong.append(f"{path.name} has another content than the indexed commit's")
            moved.append(replace(tar, path=path, mtime_ns=now.modified_ns, etag=now.etag))
        if wrong:
            raise CorpusError(
                f"{flag} names another corpus than the index: {some(wrong, 'difference')}. "
                "Name the same tars, or index these with: python -m gradproj index"
            )
        return replace(self, tars=tuple(moved))


def build_index(
    paths: Sequence[Location],
    *,
    domain_field: str = "meta.pile_set_name",
    processes: int | None = None,
    progress: bool = True,
    journal: ScanJournal | None = None,
) -> CorpusIndex:
    """Scan every tar once and number its samples, in the order of ``paths``.

    A ``journal`` keeps the facts of scanned tars, so that a later call goes on where one was ended.

    ``processes`` is the number of worker processes; None for one per CPU, or none if there are less
    than 256 MB to read.

    Raises:
        CorpusError: a tar is damaged, unreadable or changed during the scan; lists up to 20.
    """
    if not paths:
        raise CorpusError("there is no tar to index")
    paths = [path if isinstance(path, Address) else Path(os.path.abspath(path)) for path in paths]
    check_all_finished(paths)
    before = present_facts(paths)
    journal = journal or ScanJournal(None)
    scanned = journal.scanned(paths, before, domain_field)
    left = [number for number, facts in enumerate(scanned) if facts is None]
    new = scan_tars(
        [paths[n] for n in left],
        [before[n] for n in left],
        domain_field,
        processes,
        progress,
        lambda i, facts: journal.note(paths[left[i]], before[left[i]], facts),
    )
    for number, new_facts in zip(left, new, strict=True):
        scanned[number] = new_facts
    tars: list[Tar] = []
    start_id = 0
    for path, version, facts in zip(paths, before, scanned, strict=True):
        assert facts is not None, path
        tars.append(
            Tar(
                name=path.name,
                path=path,
                size_bytes=version.size_bytes,
                mtime_ns=version.modified_ns,
                etag=version.etag,
                start_id=start_id,
                **vars(facts),
            )
        )
        start_id += facts.n_samples
    check_unchanged(*tars)
    return make_index(tuple(tars), domain_field, read_tokenization(paths))


def make_index(
    tars: tuple[Tar, ...], domain_field: str, tokenization: Tokenization | None = None
) -> CorpusIndex:
    """Build the index of these tars, with the totals and the fingerprint."""
    domains = tuple(sorted({domain for tar in tars for domain in tar.domain_counts}))
    if len(domains) > MAX_DOMAINS:
        raise CorpusError(
            f"the field {domain_field} has {len(domains):,} different values, more than the "
            f"{MAX_DOMAINS:,} domains a store can hold; give --domain_field a field that names a "
            "domain"
        )
    return CorpusIndex(
        tars=tars,
        domain_field=domain_field,
        domains=domains,
        n_samples=sum(tar.n_samples for tar in tars),
        longest_key_bytes=max((tar.longest_key_bytes for tar in tars), default=0),
        fingerprint=_fingerprint(tars, domain_field, tokenization),
        tokenization=tokenization,
    )


def _fingerprint(tars: Sequence[Tar], domain_field: str, tokenization: Tokenization | None) -> str:
    # The hash of `[domain_field, [facts of each tar, ...]]` as JSON, made one tar at a time.
    hashed = blake2b(b"[" + msgspec.json.encode(domain_field) + b",[", digest_size=16)
    for number, tar in enumerate(tars):
        counts = sorted(tar.domain_counts.items())
        facts = msgspec.json.encode([tar.name, tar.size_bytes, tar.n_samples, tar.digest, counts])
        hashed.update(b"," + facts if number else facts)
    hashed.update(b"]]")
    if tokenization is not None:
        hashed.update(msgspec.json.encode(tokenization.settings()))
    return hashed.hexdigest()
