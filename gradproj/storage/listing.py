"""Facts on remote objects, and whole small ones: size, etag, listing, reading, writing."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

from gradproj.errors import CorpusError, GradprojError
from gradproj.storage import hub
from gradproj.storage.address import Address, Location
from gradproj.storage.bucket import library, open_bucket
from gradproj.storage.facts import ObjectFacts, facts_of
from gradproj.storage.failures import explained, reason_of
from gradproj.storage.retry import retried

LISTABLE = ("s3", "gs", "az", "hf")
"""Schemes whose folders can be listed."""
WRITABLE = ("s3", "gs", "az")

_AT_ONCE = 16
# From so many objects of one folder on, one listing costs less than asking for each.
_LIST_FROM = 8


def all_facts(addresses: Sequence[Address]) -> dict[Address, ObjectFacts]:
    """Return the facts of many objects; those that do not exist are left out.

    Objects of one folder are listed together where the store can list; others are asked for one by
    one, many at once.

    Raises:
        CorpusError: a store cannot be reached, or refuses.
    """
    found: dict[Address, ObjectFacts] = {}
    folders: dict[Address, list[Address]] = {}
    for address in addresses:
        folders.setdefault(address.parent, []).append(address)
    single: list[Address] = []
    for folder, members in folders.items():
        if folder.scheme == "hf":
            found |= hub.facts(members)
        elif folder.scheme in LISTABLE and len(members) >= _LIST_FROM:
            listed = _listed_if_allowed(folder)
            if listed is None:
                single += members
            else:
                found |= {member: listed[member] for member in members if member in listed}
        else:
            single += members
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for address, facts in zip(single, pool.map(_head, single), strict=True):
            if facts is not None:
                found[address] = facts
    return found


def list_folder(folder: Address) -> dict[Address, ObjectFacts]:
    """Return the objects of a folder, without those of folders in it, sorted by name.

    Raises:
        CorpusError: it cannot be listed.
    """
    if folder.scheme == "hf":
        return hub.list_folder(folder)
    if folder.scheme not in LISTABLE:
        raise CorpusError(
            f"{folder}: a web server has no listing; name the tars with braces "
            "(shard-{000..099}.tar) or in a list file"
        )
    obstore, (store, key) = library("obstore"), open_bucket(folder)
    prefix = f"{key}/" if key else None
    with explained(folder, CorpusError):
        listing = retried(lambda: obstore.list_with_delimiter(store, prefix))
    # An object with the folder's own name and a slash stands for an empty folder.
    found = [meta for meta in listing["objects"] if meta["path"].rstrip("/") != key]
    objects = {folder.of_bucket(meta["path"]): facts_of(meta) for meta in found}
    return dict(sorted(objects.items()))


def glob_objects(pattern: Address) -> list[Address]:
    """Return the objects whose keys match a pattern, sorted. ``*`` does not match a slash."""
    done, left = pattern.origin, pattern.key.split("/")
    while left and not has_magic(left[0]) and len(left) > 1:
        done, left = done / left[0], left[1:]
    if len(left) == 1:
        return [found for found in list_folder(done) if fnmatchcase(found.name, left[0])]
    raise CorpusError(
        f"{pattern}: only the last part of an address may be a pattern (*, ?, [...]); use braces "
        "for the others"
    )


def has_magic(text: str) -> bool:
    """Return True if the text is a pattern."""
    return any(sign in text for sign in "*?[")


def read_object(address: Address) -> bytes | None:
    """Return a small object's content; None if there is none.

    Raises:
        CorpusError: it cannot be read.
    """
    obstore, (store, key) = library("obstore"), open_bucket(address)

    def get() -> bytes | None:
        try:
            return bytes(obstore.get(store, key).bytes())
        except Exception as error:
            if reason_of(error) == "missing":
                return None
            raise

    with explained(address, CorpusError):
        return retried(get)


def write_object(
    address: Address,
    content: Any,
    *,
    exclusive: bool = False,
    kind: type[GradprojError] = CorpusError,
) -> bool:
    """Write an object: bytes, or a file's ``Path`` in parts. It is visible when it is whole.

    Returns:
        False if ``exclusive`` and there is one already. It may be this very one, if a reply was
        lost: compare its content.

    Raises:
        GradprojError: of ``kind``: the address is of no bucket, or the store refuses.
    """
    if address.scheme not in WRITABLE:
        raise kind(
            f"{address}: cannot be written to; give a local path or a bucket "
            f"({'://, '.join(WRITABLE)}://)"
        )
    obstore, (store, key) = library("obstore"), open_bucket(address)

    def put() -> bool:
        try:
            obstore.put(store, key, content, mode="create" if exclusive else None, **_PARTS)
        except Exception as error:
            if exclusive and reason_of(error) in ("exists", "changed"):
                return False
            raise
        return True

    with explained(address, kind):
        return retried(put)


_PARTS = {"chunk_size": 8 * 2**20, "max_concurrency": 4}


def is_writable(place: Location) -> bool:
    """Return False for an address whose server takes no objects."""
    return not isinstance(place, Address) or place.scheme in WRITABLE


def delete_objects(addresses: Iterable[Address]) -> None:
    """Delete objects; those that do not exist are no error."""
    for address in addresses:
        store, key = open_bucket(address)
        with explained(address, CorpusError):
            retried(lambda store=store, key=key: store.delete(key))  # type: ignore[misc]


def _listed_if_allowed(folder: Address) -> dict[Address, ObjectFacts] | None:
    """Return a folder's objects; None if the credentials may read but not list."""
    try:
        return list_folder(folder)
    except CorpusError:
        return None


def _head(address: Address) -> ObjectFacts | None:
    obstore, (store, key) = library("obstore"), open_bucket(address)

    def head() -> ObjectFacts | None:
        try:
            return facts_of(obstore.head(store, key))
        except Exception as error:
            if reason_of(error) == "missing":
                return None
            if address.scheme in WRITABLE or reason_of(error) == "unavailable":
                raise
        # A web server that answers no HEAD. The body is not read.
        return facts_of(obstore.get(store, key).meta)

    with explained(address, CorpusError):
        return retried(head)
