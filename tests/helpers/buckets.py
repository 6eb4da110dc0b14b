"""Objects in memory, in place of a bucket."""

from pathlib import Path

from obstore.store import MemoryStore

from gradproj.storage.address import Address
from gradproj.storage.object_path import ObjectPath


def memory_path(key: str) -> ObjectPath:
    """Return a key of a new store in memory."""
    return ObjectPath(MemoryStore(), Address("s3", "bucket", key))


def copy_into(folder: Path, place: ObjectPath) -> ObjectPath:
    """Make the objects below ``place`` those of a folder's files."""
    place.remove_tree()
    for path in folder.rglob("*"):
        if path.is_file():
            place.joinpath(*path.relative_to(folder).parts).put([path.read_bytes()])
    return place
