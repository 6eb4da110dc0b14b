"""``StoredObject``: the requests that one key of a bucket answers, each repeated while it may help.

A key names an object, or the common beginning of several keys.
"""

import errno
import io
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar, cast

from gradproj.errors import StoreError
from gradproj.storage.address import Address
from gradproj.storage.bucket import open_bucket
from gradproj.storage.failures import explained, reason_of
from gradproj.storage.retry import POLICY, RetryPolicy, retried

T = TypeVar("T")
Version = dict[str, str]
"""Names a version of an object in a condition: its etag, on Google's stores its generation."""


MAX_PUT_BYTES = 5_000_000_000
"""The most that S3 and Azure take in one request. Parts in several have no conditions there."""
_LARGE_BYTES = 2**23
_UPLOADING = replace(POLICY, stall_s=600.0, deadline_s=1200.0)
"""For large bodies: the client's time without an answer runs while it still sends."""


class Unchanged(Exception):
    """The condition of a request does not hold, so nothing was written, or nothing is new."""


class StoredObject:
    """A key of a bucket.

    Errors are a FileNotFoundError for what does not exist, otherwise a ``StoreError`` of one line.
    """

    __slots__ = ("address", "store")

    def __init__(self, store: Any, address: Address) -> None:
        self.store, self.address = store, address

    @property
    def key(self) -> str:
        """The key in the bucket, without slashes at its ends."""
        return self.address.key

    def __str__(self) -> str:
        return str(self.address)

    # --- what is there ---

    def meta(self) -> dict[str, Any] | None:
        """Return size, time and etag of the object; None if there is none. One request."""
        try:
            return self._ask(self._head)
        except FileNotFoundError:
            return None

    def _head(self) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], self.store.head(self.key))
        except Exception as error:
            if reason_of(error) == "denied":  # an answer without a body, which would say why
                self._get({"range": (0, 1)})
            raise

    def version(self) -> Version | None:
        """Return the version of the object; None if there is none."""
        meta = self.meta()
        return None if meta is None else _version(meta)

    def names(self, *, folders_only: bool = False, min_bytes: int = 0) -> list[str]:
        """Return the names in this folder, sorted. One request for each 1,000 of them.

        ``min_bytes``: size of the smallest objects that are returned.
        """
        found = self._ask(lambda: self.store.list_with_delimiter(self._prefix()))
        keys = list(found["common_prefixes"])
        if not folders_only:
            large = (meta["path"] for meta in found["objects"] if meta["size"] >= min_bytes)
            keys += self._without_own(large)
        return sorted({key.rstrip("/").rpartition("/")[2] for key in keys})

    def keys_below(self) -> list[str]:
        """Return all keys below this one, in no order. One request for each 1,000 of them."""
        chunks = self._ask(lambda: list(self.store.list(self._prefix())))
        return self._without_own(meta["path"] for chunk in chunks for meta in chunk)

    def etags_below(self) -> list[tuple[str, str]]:
        """Return all keys below this one with their etags, in no order."""
        chunks = self._ask(lambda: list(self.store.list(self._prefix())))
        return [(meta["path"], meta["e_tag"] or "") for chunk in chunks for meta in chunk]

    def has_keys_below(self) -> bool:
        """Return whether some key lies below this one."""

        def first() -> list[str]:
            chunk = next(iter(self.store.list(self._prefix(), chunk_size=2)), ())
            return self._without_own(meta["path"] for meta in chunk)

        return bool(self._ask(first))

    def _without_own(self, keys: Iterable[str]) -> list[str]:
        """Leave out this key itself, which some stores list once a folder was made or emptied."""
        return [key for key in keys if key.rstrip("/") != self.key]

    def _prefix(self) -> str | None:
        return f"{self.key}/" if self.key else None

    # --- reading ---

    def read_versioned(self) -> tuple[bytes, Version]:
        """Return the whole object and its version."""
        return self._ask(lambda: self._get({}))

    def read_unless(self, version: Version) -> tuple[bytes, Version] | None:
        """Return the object and its version; None, without a body, if it is still ``version``."""
        etag = version.get("e_tag")
        try:
            return self._ask(lambda: self._get({"if_none_match": etag} if etag else {}))
        except Unchanged:
            return None

    def _get(self, options: dict[str, Any]) -> tuple[bytes, Version]:
        answer = self.store.get(self.key, options=options)
        return bytes(answer.bytes()), _version(answer.meta)

    def read_range(self, start: int, stop: int, etag: str = "") -> bytes:
        """Return the bytes ``[start, stop)``, of the version ``etag`` if that is given."""
        return bytes(self.read_buffer(start, stop, etag))

    def read_buffer(self, start: int, stop: int, etag: str = "") -> memoryview:
        """Return what ``read_range`` does, without a copy."""
        if stop <= start:
            return memoryview(b"")
        options: dict[str, Any] = {"range": (start, stop)}
        if etag:
            options["if_match"] = etag
        try:
            return memoryview(self._ask(lambda: self.store.get(self.key, options=options).bytes()))
        except Unchanged:
            raise StoreError(f"{self} has changed while it was read: start again") from None

    def read_end(self, n_bytes: int) -> tuple[bytes, int, str]:
        """Return the last bytes of an object, its whole size and its etag, of one version."""

        def get(options: dict[str, Any]) -> tuple[bytes, int, str]:
            answer = self.store.get(self.key, options=options)
            return bytes(answer.bytes()), answer.meta["size"], answer.meta["e_tag"] or ""

        def end() -> tuple[bytes, int, str]:
            try:
                return get({"range": {"suffix": n_bytes}})
            except Exception as error:
                if reason_of(error) not in ("unsupported", "range"):
                    raise
            # Azure has no ranges from the end, and no store has one of an empty object.
            meta = self.store.head(self.key)
            size, etag = meta["size"], meta["e_tag"] or ""
            if not size:
                return b"", 0, etag
            first = max(0, size - n_bytes)
            return get({"range": (first, size)} | ({"if_match": etag} if etag else {}))

        return self._ask(end)

    # --- writing (whole objects only; see publish.py) ---

    def put(self, chunks: Iterable[Any]) -> None:
        """Write the object, whatever is there."""
        data = one_buffer(chunks)
        self._send(data)

    def put_if_absent(self, chunks: Iterable[Any]) -> bool:
        """Write the object unless there is one. Returns whether this call wrote it.

        False is no proof of another writer: a reply may have been lost, and then this object is
        the one that is there.
        """
        return self._put_if(chunks, "create")

    def put_if_match(self, chunks: Iterable[Any], version: Version) -> bool:
        """Replace this version. False as for ``put_if_absent``; also if there is no object."""
        return self._put_if(chunks, dict(version))

    def _put_if(self, chunks: Iterable[Any], mode: Any) -> bool:
        data = one_buffer(chunks)
        try:
            self._send(data, mode=mode)
        except (Unchanged, FileNotFoundError):
            return False
        return True

    def _send(self, data: Any, **options: Any) -> None:
        store, policy = self.store, tuple[RetryPolicy, ...]()
        if len(data) > _LARGE_BYTES and getattr(store, "client_options", None):  # not in memory
            store, policy = open_bucket(self.address, policy=_UPLOADING)[0], (_UPLOADING,)
        self._ask(lambda: store.put(self.key, data, use_multipart=False, **options), *policy)

    def delete(self) -> None:
        """Delete the object, if there is one."""
        with suppress(FileNotFoundError):  # S3 says nothing of a key that is not there
            self._ask(lambda: self.store.delete(self.key))

    # --- requests ---

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    def _ask(self, action: Callable[[], T], *policy: RetryPolicy) -> T:
        with explained(self.address):
            try:
                return retried(action, *policy)
            except Exception as error:
                reason = reason_of(error)
                if reason == "missing":
                    raise self._missing() from None
                if reason in ("exists", "changed") or _is_not_modified(error):
                    raise Unchanged(str(self)) from None
                raise


class ObjectReader(io.RawIOBase):
    """A seekable file of one version of an object."""

    def __init__(self, path: StoredObject, size: int, etag: str) -> None:
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


def one_buffer(chunks: Iterable[Any]) -> bytes:
    """Return buffers as one, which a request can send again. Holds a chunk at a time besides it."""
    chunks = iter(chunks)
    first = next(chunks, b"")
    second = next(chunks, None)
    if second is None:
        return bytes(first)  # no copy of bytes
    joined = io.BytesIO()
    for chunk in (first, second):
        joined.write(chunk)
    del first, second
    for chunk in chunks:
        joined.write(chunk)
    return joined.getvalue()  # shares its buffer


def _version(meta: Any) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name]}


def _is_not_modified(error: Exception) -> bool:
    return type(error).__name__ == "NotModifiedError"
