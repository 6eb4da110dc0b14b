"""The corpus index as a JSON file: save, load, and open the corpus that ``--shards`` names."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import msgspec

from gradproj.corpus.index import CorpusIndex, Tar, build_index, make_index
from gradproj.corpus.tar.paths import default_index_path, list_tars
from gradproj.corpus.tokenization import Tokenization
from gradproj.errors import CorpusError, StoreError
from gradproj.storage.address import Address, Location, is_remote, parse_location
from gradproj.storage.cache import FileCache
from gradproj.storage.folders import read_or_none
from gradproj.storage.object_path import opened
from gradproj.storage.publish import publisher_of

FORMAT = "gradproj corpus index"
FORMAT_VERSION = 1
INDEX_MODE = 0o644
"""Readable whatever the umask: other users' jobs read the index too."""
_AGAIN = "Make it again with: python -m gradproj index"


def _publish(path: Location, content: Iterable[bytes], replace_existing: bool) -> bool:
    """Write the index file atomically. Returns False if another index exists and stays."""
    final = opened(path)
    publisher = publisher_of(final)
    try:
        if not replace_existing:
            return publisher.create(final, content, INDEX_MODE)
        publisher.replace(final, content, INDEX_MODE)
        return True
    except (OSError, StoreError) as error:
        # A StoreError advises another --output_dir, and the index may lie elsewhere.
        cause = error.__cause__ if isinstance(error, StoreError) else error
        reason = getattr(cause, "strerror", None) or error
        raise CorpusError(
            f"{path}: the corpus index cannot be written: {reason}; name another path for it"
        ) from error


def _checksum(parts: Iterable[bytes | memoryview]) -> str:
    hashed = blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


class _Envelope(msgspec.Struct):
    """The file's outer object, the same in every format version."""

    format: str
    format_version: int
    checksum: str
    index: msgspec.Raw


@dataclass(frozen=True, kw_only=True)
class _StoredTar(Tar):
    """A tar in the file: its path as text, relative to the file's folder if it lies below."""

    path: str  # type: ignore[assignment]

    def located(self, folder: Location, anonymous: bool) -> Tar:
        """Return the tar with its path as it is."""
        path: Location
        if is_remote(self.path) or os.path.isabs(self.path):
            path = parse_location(self.path, anonymous)
        else:
            path = folder / self.path
        return Tar(**{**vars(self), "path": path})


class _Body(msgspec.Struct, kw_only=True, omit_defaults=True):
    domain_field: str
    fingerprint: str
    tokenization: Tokenization | None = None
    anonymous: bool = False
    """Remote tars are read without credentials."""
    tars: list[_StoredTar]


def index_content(index: CorpusIndex, folder: Location | None = None) -> Iterator[bytes]:
    """Yield the file's content. Tars below ``folder`` are named relative to it."""
    checksum = _checksum(_body_parts(index, folder))
    envelope = msgspec.json.encode(
        _Envelope(FORMAT, FORMAT_VERSION, checksum, msgspec.Raw(b"null"))
    )
    yield from chain([envelope.removesuffix(b"null}")], _body_parts(index, folder), [b"}"])


def save_index(
    index: CorpusIndex, path: Location, *, replace_existing: bool = False
) -> CorpusIndex:
    """Write the index atomically and return the index that the file now holds.

    If several processes build the same index, the first one's file stays and all return it, unless
    ``replace_existing``. Tars below the file's folder are named relative to it, so the folder can
    be moved.

    Raises:
        CorpusError: the existing index belongs to another corpus, or no file can be written there.
    """
    path = _absolute(path)
    if _publish(path, index_content(index, path.parent), replace_existing):
        return index
    winner = load_index(path)
    if winner.fingerprint != index.fingerprint:
        raise CorpusError(
            f"{path}: is the index of another corpus: {len(winner.tars)} tars, "
            f"{winner.n_samples:,} samples, field {winner.domain_field}; these are "
            f"{len(index.tars)} tars, {index.n_samples:,} samples, field {index.domain_field}. "
            "Name another path for the index, or replace it with: python -m gradproj index"
        )
    return winner


def _absolute(path: Location) -> Location:
    return Path(os.path.abspath(path)) if isinstance(path, Path) else path


def _body_parts(index: CorpusIndex, folder: Location | None) -> Iterator[bytes]:
    # The JSON of a `_Body`, a tar at a time: the Pile's index is 70 MB.
    body = _Body(
        domain_field=index.domain_field,
        fingerprint=index.fingerprint,
        tokenization=index.tokenization,
        anonymous=any(isinstance(t.path, Address) and t.path.anonymous for t in index.tars),
        tars=[],
    )
    yield msgspec.json.encode(body).removesuffix(b"]}")
    for number, tar in enumerate(index.tars):
        path: object = tar.path
        if type(tar.path) is type(folder) and tar.path.is_relative_to(folder):  # type: ignore[arg-type]
            path = tar.path.relative_to(folder)  # type: ignore[arg-type]
        yield (b"," if number else b"") + msgspec.json.encode(_fields(tar, path))
    yield b"]}"


def _fields(tar: Tar, path: object) -> dict[str, object]:
    fields = {**vars(tar), "path": str(path)}
    return fields if tar.etag else {k: v for k, v in fields.items() if k != "etag"}


def load_index(path: Location) -> CorpusIndex:
    """Read an index file.

    Raises:
        CorpusError: not an index, one of another format version, or one that was damaged or edited.
    """
    path = _absolute(path)
    try:
        raw = opened(path).read_bytes()
    except OSError as error:
        raise CorpusError(
            f"{path}: the corpus index cannot be read: {error.strerror}. {_AGAIN}"
        ) from error
    return _decode(path, raw)


def _decode(path: Location, raw: bytes) -> CorpusIndex:
    try:
        envelope = msgspec.json.decode(raw, type=_Envelope)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        kind = "a torn corpus index" if FORMAT.encode() in raw[:100] else "not a corpus index"
        raise CorpusError(f"{path}: {kind} ({error}). {_AGAIN}") from error
    if envelope.format != FORMAT:
        raise CorpusError(f"{path}: not a corpus index but {envelope.format[:80]!r}. {_AGAIN}")
    if envelope.format_version != FORMAT_VERSION:
        raise CorpusError(
            f"{path}: a corpus index of format version {envelope.format_version}; this gradproj "
            f"reads version {FORMAT_VERSION}. Use the gradproj that made it, or make it again "
            "with: python -m gradproj index"
        )
    # A view, no copy: the Pile's index is 70 MB, and every rank reads it.
    content = memoryview(envelope.index)
    if _checksum([content]) != envelope.checksum:
        raise CorpusError(
            f"{path}: the corpus index is damaged or was edited: its checksum differs. {_AGAIN}"
        )
    body = msgspec.json.decode(content, type=_Body)
    del raw, envelope, content
    tars = tuple(tar.located(path.parent, body.anonymous) for tar in body.tars)
    index = make_index(tars, body.domain_field, body.tokenization)
    if index.fingerprint != body.fingerprint:
        raise CorpusError(
            f"{path}: the corpus index's fingerprint is not that of its tars. {_AGAIN}"
        )
    return index


def load_index_if_any(path: Location | None) -> CorpusIndex | None:
    """Read an index file; None if there is none."""
    if isinstance(path, Address):
        raw = read_or_none(opened(path))
        return None if raw is None else _decode(path, raw)
    return load_index(path) if path is not None and path.is_file() else None


def open_corpus(
    shards: str,
    *,
    flag: str = "--shards",
    output_index: Path | None = None,
    domain_field: str = "meta.pile_set_name",
    most_tars: int | None = None,
    progress: bool = True,
    anonymous: bool = False,
    cache: FileCache | None = None,
) -> CorpusIndex:
    """Return the index of the corpus that ``shards`` names, building it if there is none.

    An index file (``.json``) is loaded as it is. For tars the index is ``output_index``, which an
    earlier run kept, or the one beside the tars, with the tars' present paths; without either, at
    most ``most_tars`` tars are scanned. ``flag`` names ``shards`` in messages.
    ``anonymous`` reads remote tars without credentials; ``cache`` keeps those of servers that send
    whole files only.

    Raises:
        CorpusError: there is no such corpus, it has more than ``most_tars`` tars and no index, or
            the index belongs to other tars.
    """
    if shards.endswith(".json"):
        return replace(load_index(parse_location(shards, anonymous)), cache=cache)
    paths = list_tars(shards, flag, anonymous)
    found = [load_index_if_any(p) for p in (output_index, default_index_path(paths))]
    indexes = [index for index in found if index is not None]
    # Tars that were touched or copied are indexed again beside them. If that is the same
    # corpus, the newer index is used: it has the tars' present times.
    for index in reversed(indexes):
        if index.fingerprint == indexes[0].fingerprint:
            return replace(index.relocated(paths, flag), cache=cache)
    if most_tars is not None and len(paths) > most_tars:
        raise CorpusError(
            f"{flag} {shards}: {len(paths):,} tars and no corpus index. Build it once: "
            f"python -m gradproj index '{shards}' (or sbatch slurm/index_pile.sbatch)"
        )
    built = build_index(paths, domain_field=domain_field, progress=progress)
    return replace(built, cache=cache)
