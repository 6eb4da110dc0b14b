"""Objects that lie in a folder or match a pattern, and the facts of many at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

from gradproj.errors import CorpusError
from gradproj.storage import hub
from gradproj.storage.address import Address
from gradproj.storage.facts import ObjectFacts, facts_of
from gradproj.storage.object_path import object_at

LISTABLE = ("s3", "gs", "az", "hf")
"""Schemes whose folders can be listed."""

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
        for address, facts in zip(single, pool.map(_facts, single), strict=True):
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
    _, found = object_at(folder).listing()
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


def _listed_if_allowed(folder: Address) -> dict[Address, ObjectFacts] | None:
    """Return a folder's objects; None if the credentials may read but not list."""
    try:
        return list_folder(folder)
    except CorpusError:
        return None


def _facts(address: Address) -> ObjectFacts | None:
    meta = object_at(address).meta()
    return None if meta is None else facts_of(meta)
