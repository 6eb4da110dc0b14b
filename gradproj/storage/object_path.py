"""``ObjectPath``: the part of ``pathlib.Path`` that gradproj uses, for objects of a bucket.

Code that handles an output writes ``output / NAME`` and works on disk and in a bucket. An
``ObjectPath`` has no ``__fspath__``: whatever needs a file of the operating system fails loudly.
A bucket has no folders, only keys: a folder exists as long as a key begins with it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, cast

from gradproj.errors import ConfigError, CorpusError, GradprojError, StoreError
from gradproj.storage.address import WRITABLE, Address, Location, is_remote
from gradproj.storage.bucket import open_bucket
from gradproj.storage.byte_ranges import executor
from gradproj.storage.cache import FileCache
from gradproj.storage.stored_object import StoredObject


@dataclass
class Reading:
    """Settings of this process for reading buckets. A command sets them once, from its flags."""

    anonymous: bool = False
    """Without credentials, as public buckets allow."""
    cache: FileCache | None = None
    """Keeps whole objects on local disk, for commands that read them again."""


READING = Reading()


def path_of(place: "str | Path | ObjectPath", *, anonymous: bool | None = None) -> Path:
    """Return the path of a file or folder, on disk or in a bucket.

    Declared as a ``Path``, since an ``ObjectPath`` stands in for one. ``anonymous``: without
    credentials; default: as ``READING`` says.

    Raises:
        ConfigError: an address that cannot hold an output, or a bucket that cannot be opened.
    """
    if isinstance(place, ObjectPath):
        return cast(Path, place)
    text = str(place)
    if not is_remote(text):
        return Path(place)
    address = Address.parse(text, READING.anonymous if anonymous is None else anonymous)
    if not address.is_writable:
        raise ConfigError(
            f"{address}: outputs lie on disk or in a bucket ({'://, '.join(WRITABLE)}://)"
        )
    return cast(Path, object_at(address, StoreError))


def object_at(address: Address, kind: type[GradprojError] = CorpusError) -> "ObjectPath":
    """Return the object of an address; its errors are of ``kind``, of an ``ObjectPath`` its own."""
    if isinstance(address, ObjectPath):
        return address
    return ObjectPath(open_bucket(address)[0], address, kind)


def opened(place: Location) -> Path:
    """Return the path of a corpus's file, on disk or in a bucket."""
    return cast(Path, object_at(place)) if isinstance(place, Address) else place


def in_bucket(path: Path) -> bool:
    """Return whether a path is in a bucket, where no disk can be full."""
    return isinstance(path, ObjectPath)


def names_in(folder: Path, min_object_bytes: int = 0) -> list[str]:
    """Return the names in a folder, in no order; none if it does not exist.

    In a bucket without objects of fewer bytes than ``min_object_bytes``.
    """
    if isinstance(folder, ObjectPath):
        return folder.names(min_bytes=min_object_bytes)
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def read_each(paths: Sequence[Path]) -> list[bytes | OSError]:
    """Return the content of each file, or why it cannot be read; of objects at the same time."""

    def read(path: Path) -> bytes | OSError:
        try:
            return path.read_bytes()
        except OSError as error:
            return error

    if len(paths) > 1 and isinstance(paths[0], ObjectPath):
        return list(executor().map(read, paths))
    return [read(path) for path in paths]


Stamp = Any
"""Tells two versions of a file or an object apart without reading them."""


def read_if_changed(path: Path, stamp: Stamp) -> tuple[bytes, Stamp] | None:
    """Return a file's content and stamp; None if its stamp still is ``stamp``."""
    if isinstance(path, ObjectPath):
        return path.read_versioned() if stamp is None else path.read_unless(stamp)
    # Opened, not only stat'ed: on NFS an open asks the server, a stat may be cached here.
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        now = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        return None if now == stamp else (file.read(), now)


class ObjectStat(NamedTuple):
    """The part of ``os.stat_result`` that a bucket knows."""

    st_size: int
    st_mtime: float
    st_mtime_ns: int


class ObjectPath(StoredObject):
    """A key of a bucket, as a path."""

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # The address alone: another process finds credentials where its own SDK looks.
        return object_at, (Address(self.scheme, self.bucket, self.key, self.anonymous), self.kind)

    # --- what is there ---

    def is_file(self) -> bool:
        """Return whether there is an object of this key: one request."""
        return self.meta() is not None

    def is_dir(self) -> bool:
        """Return whether some key lies below this one; the bucket itself always is a folder."""
        return not self.key or self.has_keys_below()

    def exists(self) -> bool:
        """Return whether there is an object or a folder. Two requests if there is no object."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Return False: a bucket has no links."""
        return False

    def stat(self) -> ObjectStat:
        """Return size and time of an object; a FileNotFoundError if there is none."""
        meta = self.head()
        when = meta["last_modified"].timestamp()
        return ObjectStat(meta["size"], when, int(when * 1e9))

    def walk_files(self) -> "list[ObjectPath]":
        """Return all objects below this key, in no order."""
        return [self.of_bucket(key) for key in self.keys_below()]

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yield what lies in this folder, sorted; nothing if it does not exist."""
        for name in self.names():
            yield self / name

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Yield what matches in this folder; a pattern that ends in a slash yields folders."""
        if "/" in pattern.rstrip("/") or "**" in pattern:
            raise NotImplementedError(f"{pattern}: patterns of one folder only")
        names = self.names(folders_only=pattern.endswith("/"))
        return (self / name for name in names if fnmatchcase(name, pattern.rstrip("/")))

    # --- reading ---

    def read_bytes(self) -> bytes:
        """Return the whole object."""
        return self.read_versioned()[0]

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode(encoding, errors)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        if not missing_ok:
            self.head()
        self.delete()

    def remove_tree(self) -> None:
        """Delete all objects below this key."""
        for path in self.walk_files():
            path.delete()
