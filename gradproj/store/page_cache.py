"""Mapped files of a store: a bounded number of them, and control over which pages are in memory.

By default the kernel reads a mapped file page by page as it is touched, or guesses what comes
next. The parts of a row lie far apart in a shard: page by page waits for the disk dozens of times
a row, and guessing reads neighbours that nobody wants. ``PagedFile`` therefore names byte ranges.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import RLock
from typing import Generic, TypeVar

import numpy as np

from gradproj.errors import damaged
from gradproj.storage.contents import local_file
from gradproj.storage.object_path import READING, ObjectPath

K = TypeVar("K")
V = TypeVar("V")

_libc = ctypes.CDLL(None)
_PAGE_MASK = ~(mmap.PAGESIZE - 1)


class LRUCache(Generic[K, V]):
    """The items loaded last, by key. A load that returns None is not cached but tried again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: dict[K, V] = {}
        self._lock = RLock()  # several threads may read a store

    def get(self, key: K, load: Callable[[], V | None]) -> V | None:
        with self._lock:
            item = self._items.pop(key, None)
            if item is None:
                item = load()
            if item is not None:
                self._items[key] = item
                while len(self._items) > self._limit:
                    del self._items[next(iter(self._items))]
            return item

    def drop(self, keys: Iterable[K]) -> None:
        with self._lock:
            for key in keys:
                self._items.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._items.clear()

    def __contains__(self, key: K) -> bool:
        return key in self._items


def map_file(path: Path) -> mmap.mmap | bytes | None:
    """Map a file read-only, or read an object of a bucket.

    Returns None if it does not exist; an empty file is a StoreError.
    """
    try:
        if isinstance(path, ObjectPath) and READING.cache is None:
            return path.read_bytes()
        with local_file(path) as local, open(local, "rb") as file:
            return _map(file.fileno(), path)
    except FileNotFoundError:
        return None


def _map(descriptor: int, path: Path) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # mmap refuses empty files
        raise damaged(path, "it is empty") from error


class PagedFile:
    """A read-only map of a file without read-ahead: only requested bytes are read from disk.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it is empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with local_file(path) as local:
            self._descriptor = os.open(local, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.data = _map(self._descriptor, path)
        self.data.madvise(mmap.MADV_RANDOM)  # no read-ahead on page faults
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nor on reads
        self._byte = [bytearray(1)]
        self._has_nowait = True

    def is_cached(self, start: int) -> bool:
        """Return whether the page with this byte is in memory; False if unknown."""
        if self._has_nowait:
            try:
                return os.preadv(self._descriptor, self._byte, start, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                return False
            except OSError:  # tmpfs and some network file systems lack RWF_NOWAIT
                self._has_nowait = False
        return self._is_mapped_page_cached(start)

    def _is_mapped_page_cached(self, start: int) -> bool:
        if os.fstat(self._descriptor).st_uid != os.geteuid():
            return False  # mincore reports every page of other users' files as cached
        answer = (ctypes.c_ubyte * 1)()
        address = np.frombuffer(self.data, np.uint8).ctypes.data + (start & _PAGE_MASK)
        found = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), answer) == 0
        return found and bool(answer[0] & 1)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill ``out`` with the bytes from ``start``, without mapping a page of the file.

        Raises:
            StoreError: the file ends before ``out`` is full.
        """
        n_read = os.preadv(self._descriptor, [out], start)
        while n_read < len(out):
            more = os.preadv(self._descriptor, [out[n_read:]], start + n_read)
            if not more:
                raise damaged(self._path, f"it ends at byte {start + n_read}, inside a chunk")
            n_read += more

    def release(self) -> None:
        """Unmap touched pages, which count as this process's memory. The page cache keeps them."""
        self.data.madvise(mmap.MADV_DONTNEED)

    def prefetch(self, start: int, stop: int) -> None:
        """Have the disk read these bytes; returns before they are there."""
        first = start & _PAGE_MASK
        self.data.madvise(mmap.MADV_WILLNEED, first, stop - first)
