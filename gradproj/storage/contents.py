"""Whole files and objects: streamed, summed, copied to a local file, mapped, locked.

What is here works alike on a disk and in a bucket. A library that needs a file of the system gets a
temporary copy of an object.
"""

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gradproj.errors import GradprojError
from gradproj.files import crc32c, explain_os_errors, file_sum, try_lock
from gradproj.storage.byte_ranges import executor
from gradproj.storage.cache import FileCache
from gradproj.storage.facts import facts_of
from gradproj.storage.folders import read_ahead
from gradproj.storage.object_path import READING, ObjectPath

_READ_BYTES = 2**22
_RANGE_BYTES = 2**23
_RANGES_AT_ONCE = 3
_LOOK_AGAIN_S = 0.2


def chunks_of(path: Path) -> Iterator[memoryview]:
    """Yield the content of a file or of one version of an object.

    Raises:
        FileNotFoundError: there is none.
        StoreError: the object changed meanwhile.
    """
    if not isinstance(path, ObjectPath):
        with open(path, "rb") as file:
            while data := file.read(_READ_BYTES):
                yield memoryview(data)
        return
    meta = path.head()
    size, etag = meta["size"], meta["e_tag"] or ""

    def read(begin: int) -> memoryview:
        return path.read_buffer(begin, min(begin + _RANGE_BYTES, size), etag)

    yield from read_ahead(read, range(0, size, _RANGE_BYTES), path, _RANGES_AT_ONCE)


def read_start(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a file or an object, fewer if it has not so many but some."""
    if isinstance(path, ObjectPath):
        return path.read_range(0, n_bytes)
    with open(path, "rb") as file:
        return file.read(n_bytes)


def sum_of(path: Path) -> dict[str, int]:
    """Return ``{"bytes": size, "crc32c": checksum}`` of a file's or an object's content."""
    if not isinstance(path, ObjectPath):
        return file_sum(path)
    total, checksum = 0, 0
    for data in chunks_of(path):
        total, checksum = total + len(data), crc32c(data, checksum)
    return {"bytes": total, "crc32c": checksum}


def open_whole(path: Path) -> BinaryIO:
    """Open for reading at any place; of an object, all of it in memory."""
    return io.BytesIO(path.read_bytes()) if isinstance(path, ObjectPath) else open(path, "rb")


@contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """Give the file itself, or a temporary copy of an object.

    Raises:
        FileNotFoundError: there is no such object.
        StoreError: the temporary folder is full.
    """
    if not isinstance(path, ObjectPath):
        yield path
        return
    if READING.cache is not None:
        with _cached(path, READING.cache) as file:
            # Readable under this name also if another process deletes it to make room.
            yield Path(f"/proc/self/fd/{file.fileno()}")
        return
    with explain_os_errors(tempfile.gettempdir()), tempfile.NamedTemporaryFile() as file:
        for data in chunks_of(path):
            file.write(data)
        file.flush()
        yield Path(file.name)


def keep_ahead(paths: Iterable[Path]) -> None:
    """Begin to fetch objects into the cache of this process, if it has one."""

    def fetch(path: ObjectPath, cache: FileCache) -> None:
        with suppress(OSError, GradprojError):  # a reader of the object raises it
            _cached(path, cache).close()

    for path in paths:
        if isinstance(path, ObjectPath) and READING.cache is not None:
            executor().submit(fetch, path, READING.cache)


def _cached(path: ObjectPath, cache: FileCache) -> BinaryIO:
    return cache.open(path, facts_of(path.head()))


def map_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file read-only; of an object, a copy that the system deletes when unmapped."""
    with local_file(path) as local:
        return np.load(local, mmap_mode="r", allow_pickle=False)


def folder_stamp(folder: Path) -> str:
    """Return what changes when files are added to a folder, removed or replaced."""
    if not isinstance(folder, ObjectPath):
        return str(folder.stat().st_mtime_ns)
    digest = hashlib.sha256()
    for line in sorted(f"{key} {etag}" for key, etag in folder.etags_below()):
        digest.update(line.encode())
    return digest.hexdigest()


def scratch_folder(folder: Path) -> Path:
    """Return where temporary files beside ``folder`` go: there, if that can be written."""
    if isinstance(folder, ObjectPath) or not os.access(folder, os.W_OK):
        return Path(tempfile.gettempdir())
    return folder


@contextmanager
def locked(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[bool | None]:
    """Lock a folder among the processes of its disk, by its file ``lock``.

    Args:
        folder: exists.
        wait: called once before the lock's holder is waited for. None: do not wait.

    Yields:
        Whether this process has the lock; None if there are no locks, as in a bucket.
    """
    if isinstance(folder, ObjectPath):
        yield None
        return
    with explain_os_errors(folder):
        file = (folder / "lock").open("w")
    with file:
        found = try_lock(file)
        if found is False and wait is not None:
            wait()
            while found is False:
                time.sleep(_LOOK_AGAIN_S)
                found = try_lock(file)
        yield found


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it, sorted; links not followed."""
    if isinstance(folder, ObjectPath):
        return sorted(str(path.relative_to(folder)) for path in folder.walk_files())
    found = []
    for parent, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names]
    return sorted(found)
