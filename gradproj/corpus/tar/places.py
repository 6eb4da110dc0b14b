"""Tars on disk and remote ones: their present facts, their bytes, and files beside them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from gradproj.corpus.tar.paths import UNFINISHED_NAME, check_finished, some
from gradproj.errors import CorpusError
from gradproj.storage.address import Address, Location
from gradproj.storage.cache import FileCache
from gradproj.storage.facts import ObjectFacts, differences
from gradproj.storage.listing import all_facts
from gradproj.storage.object_path import object_at
from gradproj.storage.stream import NoRanges, ObjectChanged, ObjectStream

_AGAIN = (
    "Run `python -m gradproj index` again: if it was only touched or copied, the corpus keeps its "
    "fingerprint and a job can continue"
)


class IndexedTar(Protocol):
    """A tar as the index has it."""

    @property
    def path(self) -> Location: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def etag(self) -> str: ...


def present_facts(places: Sequence[Location]) -> list[ObjectFacts]:
    """Return what the tars are now, in their order.

    Raises:
        CorpusError: a tar is missing or cannot be read.
    """
    remote = [place for place in places if isinstance(place, Address)]
    found = all_facts(remote) if remote else {}
    missing = [str(place) for place in remote if place not in found]
    if missing:
        raise CorpusError(f"{some(missing, 'tar')} missing; check the addresses")
    return [
        found[place] if isinstance(place, Address) else _facts_on_disk(place) for place in places
    ]


def check_unchanged(*tars: IndexedTar) -> None:
    """Check that tars are as they were indexed: size, and modification time or etag.

    Raises:
        CorpusError: a tar is missing or differs.
    """
    # A file of a commit of the hub cannot change, and each rank that asks is one more request.
    tars = tuple(tar for tar in tars if not (isinstance(tar.path, Address) and tar.path.is_fixed))
    for tar, now in zip(tars, present_facts([tar.path for tar in tars]), strict=True):
        changes = differences(now, facts_of_tar(tar)) if _is_remote(tar) else _changes(now, tar)
        if changes:
            raise _changed(tar, "; ".join(changes))


def facts_of_tar(tar: IndexedTar) -> ObjectFacts:
    """Return the facts that the index has of a tar."""
    return ObjectFacts(tar.size_bytes, tar.etag, tar.mtime_ns)


def is_other_content(tar: IndexedTar, path: Location, now: ObjectFacts) -> bool:
    """Return True if the tar's new place holds another content. Only the hub's etags can tell."""
    both_of_hub = all(isinstance(p, Address) and p.scheme == "hf" for p in (tar.path, path))
    return both_of_hub and now.etag != tar.etag


def are_in_place(tars: Sequence[IndexedTar]) -> bool:
    """Return True if the tars lie where the index says. Of remote ones that is assumed."""
    return all(isinstance(tar.path, Address) or tar.path.is_file() for tar in tars)


@contextmanager
def open_tar(tar: IndexedTar, start: int, stop: int, cache: FileCache | None) -> Iterator[BinaryIO]:
    """Open a tar at byte ``start``, for reading up to byte ``stop`` and perhaps farther.

    A remote tar is read by one request for these bytes. If its server sends whole files only, the
    tar is kept in ``cache``.

    Raises:
        CorpusError: it cannot be read, or is not the tar that was indexed.
    """
    path = tar.path
    if isinstance(path, Address):
        try:
            with _open_remote(tar, path, start, stop, cache) as file:
                yield file
        except ObjectChanged as error:
            raise _changed(tar, str(error)) from None
        return
    check_unchanged(tar)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise CorpusError(f"{path}: the tar cannot be read: {error.strerror}") from error
    with file:
        file.seek(start)
        yield file


def check_all_finished(places: Iterable[Location]) -> None:
    """Raise ``CorpusError`` if a bucket's folder of these tars has not all its tars yet."""
    for folder in dict.fromkeys(place.parent for place in places):
        if isinstance(folder, Address) and folder.is_writable:
            check_finished(folder, object_at(folder / UNFINISHED_NAME).is_file())


@contextmanager
def _open_remote(
    tar: IndexedTar, path: Address, start: int, stop: int, cache: FileCache | None
) -> Iterator[BinaryIO]:
    facts = facts_of_tar(tar)
    file = cache.find(path, facts) if cache is not None else None
    try:
        file = file or cast(BinaryIO, ObjectStream(path, facts, start, stop))
    except NoRanges:
        if cache is None:
            raise CorpusError(
                f"{path}: its server sends whole files only; give --cache_dir, a folder on local "
                "disk that keeps whole tars"
            ) from None
        file = cache.open(path, facts)
    with file:
        file.seek(start)
        yield file


def _facts_on_disk(path: Path) -> ObjectFacts:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise CorpusError(
            f"{path}: the tar cannot be read: {error.strerror}; restore it or name other tars"
        ) from error
    return ObjectFacts(stat.st_size, "", stat.st_mtime_ns)


def _is_remote(tar: IndexedTar) -> bool:
    return isinstance(tar.path, Address)


def _changes(now: ObjectFacts, tar: IndexedTar) -> list[str]:
    changes = []
    if now.size_bytes != tar.size_bytes:
        changes.append(f"it has {now.size_bytes:,} bytes, the index says {tar.size_bytes:,}")
    if now.modified_ns != tar.mtime_ns:
        times = (f"{ns // 10**9}.{ns % 10**9:09d} s" for ns in (now.modified_ns, tar.mtime_ns))
        changes.append(f"it was modified at {next(times)}, the index says {next(times)}")
    return changes


def _changed(tar: IndexedTar, changes: str) -> CorpusError:
    return CorpusError(f"{tar.path}: changed since it was indexed: {changes}. {_AGAIN}")
