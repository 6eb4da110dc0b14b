"""Objects in memory, in place of a bucket."""

import threading
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


class CountedStore:
    """A store of obstore whose ranged requests are counted."""

    def __init__(self, store):
        self._store, self._lock = store, threading.Lock()
        self.before_get = lambda key: None
        self.clear()

    def clear(self):
        """Begin to count."""
        self.ranges = []

    @property
    def n_requests(self):
        """Number of requests for objects or parts of them."""
        return len(self.ranges)

    @property
    def n_bytes(self):
        """Bytes that they brought."""
        return sum(end - begin for begin, end in self.ranges)

    def get(self, key, options=None):
        """Get an object, as obstore's store does."""
        self.before_get(key)
        answer = self._store.get(key, options=options)
        with self._lock:
            self.ranges.append(tuple(answer.range))
        return answer

    def __getattr__(self, name):
        return getattr(self._store, name)
