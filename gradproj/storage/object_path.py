"""``ObjectPath``: the part of ``pathlib.Path`` that gradproj uses, for objects of a bucket.

Code that handles an output writes ``output / NAME`` and works on disk and in a bucket. An
``ObjectPath`` has no ``__fspath__``: whatever needs a file of the operating system fails loudly.
A bucket has no folders, only keys: a folder exists as long as a key begins with it.
"""

import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import total_ordering
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar, cast

from gradproj.errors import ConfigError
from gradproj.storage.address import Address, is_remote
from gradproj.storage.bucket import open_bucket
from gradproj.storage.failures import explained, reason_of
from gradproj.storage.retry import retried

T = TypeVar("T")

WRITABLE = ("s3", "gs", "az")
"""Schemes of stores that an output may lie in: they have conditional writes."""
_BUFFER_BYTES = 2**20


def path_of(place: "str | Path | ObjectPath", *, anonymous: bool = False) -> Path:
    """Return the path of a file or folder, on disk or in a bucket.

    Declared as a ``Path``, since an ``ObjectPath`` stands in for one.

    Raises:
        ConfigError: an address that cannot hold an output, or a bucket that cannot be opened.
    """
    if isinstance(place, ObjectPath):
        return cast(Path, place)
    text = str(place)
    if not is_remote(text):
        return Path(place)
    address = Address.parse(text)
    if address.scheme not in WRITABLE:
        raise ConfigError(
            f"{address}: outputs lie on disk or in a bucket ({'://, '.join(WRITABLE)}://)"
        )
    store, _ = open_bucket(address, anonymous=anonymous)
    return cast(Path, ObjectPath(store, address, anonymous))


class ObjectStat(NamedTuple):
    """The part of ``os.stat_result`` that a bucket knows."""

    st_size: int
    st_mtime: float
    st_mtime_ns: int


@total_ordering
class ObjectPath:
    """A key of a bucket, or the common beginning of several keys.

    Errors are those of ``pathlib`` for what does not exist, otherwise a ``StoreError`` of one line.
    Requests are repeated while the store is busy (``retry.py``).
    """

    __slots__ = ("address", "anonymous", "store")

    def __init__(self, store: Any, address: Address, anonymous: bool = False) -> None:
        self.store, self.address, self.anonymous = store, address, anonymous

    @property
    def key(self) -> str:
        """The key in the bucket, without slashes at its ends."""
        return self.address.key

    def _at(self, address: Address) -> "ObjectPath":
        return ObjectPath(self.store, address, self.anonymous)

    # --- names ---

    def __truediv__(self, name: str) -> "ObjectPath":
        return self._at(self.address / str(name)) if str(name) not in ("", ".") else self

    def joinpath(self, *names: str) -> "ObjectPath":
        """Return the path with further parts."""
        return self / "/".join(map(str, names))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.address.name

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The end of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "ObjectPath":
        """The folder; the bucket itself is its own."""
        return self._at(self.address.parent)

    @property
    def parents(self) -> tuple["ObjectPath", ...]:
        """All folders above, the nearest first."""
        above, path = [], self
        while path.key:
            path = path.parent
            above.append(path)
        return tuple(above)

    def with_name(self, name: str) -> "ObjectPath":
        """Return the path with another name in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "ObjectPath":
        """Return the path with another last suffix."""
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    def relative_to(self, folder: "ObjectPath") -> PurePosixPath:
        """Return the part of the key below ``folder``; a ValueError if it is not there."""
        return PurePosixPath(self.address.relative_to(folder.address))

    def is_relative_to(self, folder: object) -> bool:
        """Return whether the path lies below ``folder``."""
        return isinstance(folder, ObjectPath) and self.address.is_relative_to(folder.address)

    def absolute(self) -> "ObjectPath":
        """Return the path: an address is always absolute."""
        return self

    def resolve(self) -> "ObjectPath":
        """Return the path: a bucket has no links."""
        return self

    def expanduser(self) -> "ObjectPath":
        """Return the path."""
        return self

    def as_posix(self) -> str:
        """Return the address."""
        return str(self)

    def __str__(self) -> str:
        return str(self.address)

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and self.address == other.address

    def __lt__(self, other: "ObjectPath") -> bool:
        return self.address < other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __reduce__(self) -> tuple[Any, ...]:
        # The address alone: another process finds credentials where its own SDK looks.
        return _reopen, (str(self), self.anonymous)

    # --- what is there ---

    def is_file(self) -> bool:
        """Return whether there is an object of this key: one request."""
        return self._meta() is not None

    def is_dir(self) -> bool:
        """Return whether some key lies below this one; the bucket itself always is a folder."""

        def first() -> Any:
            return next(iter(self.store.list(self._prefix(), chunk_size=1)), None)

        return not self.key or bool(self._ask(first))

    def exists(self) -> bool:
        """Return whether there is an object or a folder. Two requests if there is no object."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Return False: a bucket has no links."""
        return False

    def stat(self) -> ObjectStat:
        """Return size and time of an object; a FileNotFoundError if there is none."""
        meta = self._meta()
        if meta is None:
            raise self._missing()
        when = meta["last_modified"].timestamp()
        return ObjectStat(meta["size"], when, int(when * 1e9))

    def _meta(self) -> dict[str, Any] | None:
        try:
            return cast(dict[str, Any], self._ask(lambda: self.store.head(self.key)))
        except FileNotFoundError:
            return None

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yield what lies in this folder, sorted; nothing if it does not exist."""
        for name in self.names():
            yield self / name

    def names(self, *, folders_only: bool = False) -> list[str]:
        """Return the names in this folder, sorted. One request for each 1,000 of them."""
        found = self._ask(lambda: self.store.list_with_delimiter(self._prefix()))
        keys = list(found["common_prefixes"])
        if not folders_only:
            keys += [meta["path"] for meta in found["objects"]]
        return sorted({key.rstrip("/").rpartition("/")[2] for key in keys})

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Yield what matches in this folder; a pattern that ends in a slash yields folders."""
        if "/" in pattern.rstrip("/") or "**" in pattern:
            raise NotImplementedError(f"{pattern}: patterns of one folder only")
        names = self.names(folders_only=pattern.endswith("/"))
        return (self / name for name in names if fnmatchcase(name, pattern.rstrip("/")))

    def walk_files(self) -> Iterator["ObjectPath"]:
        """Yield all objects below this key, in no order."""
        for chunk in self._ask(lambda: list(self.store.list(self._prefix()))):
            for meta in chunk:
                yield self._at(Address(self.address.scheme, self.address.bucket, meta["path"]))

    def _prefix(self) -> str | None:
        return f"{self.key}/" if self.key else None

    # --- reading ---

    def read_bytes(self) -> bytes:
        """Return the whole object."""
        return self.read_versioned()[0]

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode(encoding, errors)

    def read_versioned(self) -> tuple[bytes, str]:
        """Return the whole object and its etag, of one version."""

        def get() -> tuple[bytes, str]:
            answer = self.store.get(self.key)
            return bytes(answer.bytes()), answer.meta["e_tag"] or ""

        return self._ask(get)

    def read_unless(self, etag: str) -> tuple[bytes, str] | None:
        """Return the object and its etag; None if the etag is this one (an answer without body)."""

        def get() -> tuple[bytes, str]:
            answer = self.store.get(self.key, options={"if_none_match": etag})
            return bytes(answer.bytes()), answer.meta["e_tag"] or ""

        try:
            return self._ask(get)
        except Unchanged:
            return None

    def read_range(self, start: int, stop: int, etag: str = "") -> bytes:
        """Return the bytes ``[start, stop)``, of the version ``etag`` if that is given."""
        if stop <= start:
            return b""
        options: dict[str, Any] = {"range": (start, stop)}
        if etag:
            options["if_match"] = etag
        return self._ask(lambda: bytes(self.store.get(self.key, options=options).bytes()))

    def open(
        self, mode: str = "r", buffering: int = -1, encoding: str = "utf-8", errors: str = "strict"
    ) -> Any:
        """Open the object for reading, in mode ``rb`` or ``r``. Reads ask for ranges of bytes."""
        if mode not in ("r", "rb", "rt"):
            raise io.UnsupportedOperation(f"{self}: objects are opened for reading only")
        meta = self._meta()
        if meta is None:
            raise self._missing()
        raw = _ObjectReader(self, meta["size"], meta["e_tag"] or "")
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw, buffering if buffering > 1 else _BUFFER_BYTES)
        return buffered if mode == "rb" else io.TextIOWrapper(buffered, encoding, errors)

    # --- writing (whole objects only; see publish.py) ---

    def put(self, chunks: Iterable[Any]) -> None:
        """Write the object, whatever is there."""
        data = _joined(chunks)
        self._ask(lambda: self.store.put(self.key, data, use_multipart=False))

    def put_if_absent(self, chunks: Iterable[Any]) -> bool:
        """Write the object unless there is one. Returns whether this call wrote it.

        False is no proof of another writer: a reply may have been lost, and then this object is
        the one that is there.
        """
        return self._put_if(chunks, "create")

    def put_if_match(self, chunks: Iterable[Any], etag: str) -> bool:
        """Replace the version ``etag``. False as for ``put_if_absent``; also if there is none."""
        return self._put_if(chunks, {"e_tag": etag})

    def _put_if(self, chunks: Iterable[Any], mode: Any) -> bool:
        data = _joined(chunks)
        try:
            self._ask(lambda: self.store.put(self.key, data, mode=mode, use_multipart=False))
        except (Unchanged, FileNotFoundError):
            return False
        return True

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        if not missing_ok and not self.is_file():
            raise self._missing()
        with suppress(FileNotFoundError):  # S3 says nothing of a key that is not there
            self._ask(lambda: self.store.delete(self.key))

    def remove_tree(self) -> None:
        """Delete all objects below this key."""
        for path in list(self.walk_files()):
            path.unlink(missing_ok=True)

    # --- requests ---

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    def _ask(self, action: Callable[[], T]) -> T:
        with explained(self.address):
            try:
                return retried(action)
            except Exception as error:
                reason = reason_of(error)
                if reason == "missing":
                    raise self._missing() from None
                if reason in ("exists", "changed") or _is_not_modified(error):
                    raise Unchanged(str(self)) from None
                raise


class Unchanged(Exception):
    """The condition of a request does not hold, so nothing was written, or nothing is new."""


class _ObjectReader(io.RawIOBase):
    """A seekable file of one version of an object."""

    def __init__(self, path: ObjectPath, size: int, etag: str) -> None:
        self._path, self._size, self._etag, self._at = path, size, etag, 0
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"{self._path}: negative position {start + offset}")
        self._at = start + offset
        return self._at

    def readall(self) -> bytes:
        data = self._path.read_range(self._at, self._size, self._etag)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        data = self._path.read_range(self._at, stop, self._etag)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _reopen(address: str, anonymous: bool) -> Path:
    return path_of(address, anonymous=anonymous)


def _joined(chunks: Iterable[Any]) -> Any:
    """Return buffers as one, which a request can send again."""
    parts = list(chunks)
    return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)


def _is_not_modified(error: Exception) -> bool:
    return type(error).__name__ == "NotModifiedError"
