"""Whole remote objects on local disk: bounded in bytes, shared by the processes of a machine."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gradproj.errors import StoreError
from gradproj.files import explain_os_errors, try_lock
from gradproj.storage.address import Address
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.stream import ObjectStream

_COPY_BYTES = 2**20
_SUFFIX, _PART, _LOCK, _ROOM = ".object", ".part", ".lock", "room.lock"
_WAIT_S = 0.2


class FileCache:
    """A folder of objects, each under a hash of its address and version.

    Processes that want the same object wait for the one that fetches it. An object is visible when
    it is whole: what a killed process left of one is fetched again. Of the objects that were used
    longest ago so many are deleted that the others fit; who reads a deleted one reads on.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileCache) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.folder, self.max_bytes))

    def open(self, address: Address, facts: ObjectFacts) -> BinaryIO:
        """Return the object's file, fetched first if it is not here.

        Raises:
            StoreError: the folder cannot be written, or is smaller than the object.
            ObjectChanged, CorpusError: as ``ObjectStream``.
        """
        path = self._path(address, facts)
        while True:
            file = self.find(address, facts)
            if file is not None:
                return file
            with explain_os_errors(self.folder):
                self._fetch(address, facts, path)

    def find(self, address: Address, facts: ObjectFacts) -> BinaryIO | None:
        """Return the object's file if it is here."""
        path = self._path(address, facts)
        try:
            file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        except OSError:
            return None
        with suppress(OSError):
            os.utime(path)
        return file

    def _path(self, address: Address, facts: ObjectFacts) -> Path:
        version = f"{address} {facts.size_bytes} {facts.etag or facts.modified_ns}"
        name = hashlib.blake2b(version.encode(), digest_size=16).hexdigest()
        return self.folder / (name + _SUFFIX)

    def _fetch(self, address: Address, facts: ObjectFacts, path: Path) -> None:
        """Fetch the object unless another process does so meanwhile."""
        if facts.size_bytes > self.max_bytes:
            raise StoreError(
                f"{address} has {facts.size_bytes:,} bytes, more than the cache {self.folder} may "
                f"hold ({self.max_bytes:,}); give a larger --cache_gb"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(_PART)
        with _locked(path.with_suffix(_LOCK)):
            if path.exists():
                return
            with _locked(self.folder / _ROOM), open(part, "wb") as file:
                self._make_room(facts.size_bytes, part)
                file.truncate(facts.size_bytes)  # counted from now on
            with ObjectStream(address, facts) as stream, open(part, "r+b") as file:
                while data := stream.read(_COPY_BYTES):
                    file.write(data)
                # The part has its full size already: after a crash of the machine, one that was
                # not flushed could be zeros under the object's name.
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)

    def _make_room(self, n_bytes: int, part: Path) -> None:
        """Delete the objects used longest ago until ``n_bytes`` more fit.

        Parts that other processes are fetching are waited for, if need be.
        """
        while True:
            whole = _sizes(self.folder.glob(f"*{_SUFFIX}"))
            parts = _sizes(path for path in self.folder.glob(f"*{_PART}") if path != part)
            over = sum(size for _, size, _ in whole + parts) + n_bytes - self.max_bytes
            for _, size, path in parts + sorted(whole):
                if over <= 0:
                    return
                if path.suffix == _SUFFIX or _is_left(path):
                    path.unlink(missing_ok=True)
                    over -= size
            if over <= 0:
                return
            time.sleep(_WAIT_S)


def cache_of(folder: str, gigabytes: float) -> FileCache | None:
    """Return the cache that flags name; None without a folder."""
    return FileCache(folder, int(gigabytes * 1e9)) if folder else None


def _sizes(paths: Iterable[Path]) -> list[tuple[int, int, Path]]:
    """Return time of last use, size and path of files, as far as they still exist."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    return found


def _is_left(part: Path) -> bool:
    """Return True for a part whose process has ended; its lock ended with it."""
    with open(part.with_suffix(_LOCK), "a") as lock:
        return try_lock(lock) is not False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, which ends with the process. A file system without locks has none."""
    with open(path, "a") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
