"""``StoredObject``: the requests that one key of a bucket answers, each repeated while it may help.

A key names an object, or the common beginning of several keys.
"""

import errno
import io
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any, Self, TypeVar, cast

from gradproj.errors import GradprojError, StoreError
from gradproj.storage.address import WRITABLE, Address
from gradproj.storage.bucket import open_bucket
from gradproj.storage.failures import RETRIED, explained, reason_of
from gradproj.storage.retry import POLICY, RetryPolicy, retried

T = TypeVar("T")
Version = dict[str, str]
"""Names a version of an object in a condition: its etag, on Google's stores its generation."""


PARTS_AT_ONCE = 4
MAX_PUT_BYTES = 5_000_000_000
"""The most that S3 and Azure take in one request. Parts in several have no conditions there."""
_LARGE_BYTES = 2**23
_UPLOADING = replace(POLICY, stall_s=600.0, deadline_s=1200.0)
"""For large bodies: the client's time without an answer runs while it still sends."""


class Unchanged(Exception):
    """The condition of a request does not hold, so nothing was written, or nothing is new."""


class StoredObject(Address):
    """An address, and the open store that its bucket is.

    Errors are a FileNotFoundError for what does not exist, otherwise of ``kind``, with one line.
    """

    def __init__(
        self, store: Any, address: Address, kind: type[GradprojError] = StoreError
    ) -> None:
        super().__init__(address.scheme, address.bucket, address.key, address.anonymous)
        self.store, self.kind = store, kind

    def of_bucket(self, key: str) -> Self:
        """Return another key of the same bucket."""
        address = Address(self.scheme, self.bucket, key, self.anonymous)
        return type(self)(self.store, address, self.kind)

    # --- what is there ---

    def head(self) -> dict[str, Any]:
        """Return size, time and etag of the object. One request."""
        return self._ask(self._head)

    def meta(self) -> dict[str, Any] | None:
        """Return what ``head`` does; None if there is no object."""
        try:
            return self.head()
        except FileNotFoundError:
            return None

    def _head(self) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], self.store.head(self.key))
        except Exception as error:
            reason = reason_of(error)
            if reason == "missing" or reason in RETRIED:
                raise
            if not self.is_writable:  # a web server that answers no HEAD; the body is not read
                return cast(dict[str, Any], self.store.get(self.key).meta)
            if reason == "denied":  # an answer without a body, which would say why
                self._get({"range": (0, 1)})
            raise

    def version(self) -> Version | None:
        """Return the version of the object; None if there is none."""
        meta = self.meta()
        return None if meta is None else _version(meta)

    def listing(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the keys of the folders in this one, and size, time and etag of the objects.

        One request for each 1,000 of them.
        """
        found = self._ask(lambda: self.store.list_with_delimiter(self._prefix()))
        for meta in found["objects"]:  # Azure lists etags without their quotation marks
            if meta.get("e_tag") and not meta["e_tag"].endswith('"'):
                meta["e_tag"] = f'"{meta["e_tag"]}"'
        return list(found["common_prefixes"]), self._without_own(found["objects"])

    def names(self, *, folders_only: bool = False, min_bytes: int = 0) -> list[str]:
        """Return the names in this folder, sorted.

        ``min_bytes``: size of the smallest objects that are returned.
        """
        keys, objects = self.listing()
        if not folders_only:
            keys += [meta["path"] for meta in objects if meta["size"] >= min_bytes]
        return sorted({key.rstrip("/").rpartition("/")[2] for key in keys})

    def keys_below(self) -> list[str]:
        """Return all keys below this one, in no order. One request for each 1,000 of them."""
        return [key for key, _ in self.etags_below() if key.rstrip("/") != self.key]

    def etags_below(self) -> list[tuple[str, str]]:
        """Return all keys below this one with their etags, in no order."""
        chunks = self._ask(lambda: list(self.store.list(self._prefix())))
        return [(meta["path"], meta.get("e_tag") or "") for chunk in chunks for meta in chunk]

    def has_keys_below(self) -> bool:
        """Return whether some key lies below this one."""

        first = self._ask(lambda: next(iter(self.store.list(self._prefix(), chunk_size=2)), ()))
        return bool(self._without_own(first))

    def _without_own(self, metas: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out this key itself, which some stores list once a folder was made or emptied."""
        return [meta for meta in metas if meta["path"].rstrip("/") != self.key]

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
            raise self.kind(f"{self} has changed while it was read: start again") from None

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

    # --- writing (an object appears when it is whole; see publish.py) ---

    def put(self, chunks: Iterable[Any]) -> None:
        """Write the object, whatever is there."""
        self._send(one_buffer(chunks))

    def put_in_parts(self, read: Callable[[], Iterable[Any]]) -> None:
        """Write an object of any size, ``PARTS_AT_ONCE`` parts of it at a time.

        It appears when all are there. ``read`` gives its chunks, again if it is sent again.
        """

        def put() -> None:
            first, chunks = bytearray(), iter(read())
            for chunk in chunks:
                first += chunk
                if len(first) > _LARGE_BYTES:
                    break
            else:
                return store.put(self.key, bytes(first), use_multipart=False)
            whole = chain([bytes(first)], map(bytes, chunks))
            sizes = {"chunk_size": _LARGE_BYTES, "max_concurrency": PARTS_AT_ONCE}
            return store.put(self.key, whole, use_multipart=True, **sizes)

        store = self._sender(_UPLOADING)
        self._ask(put, _UPLOADING)

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
        policy = _UPLOADING if len(data) > _LARGE_BYTES else POLICY
        store = self._sender(policy)
        self._ask(lambda: store.put(self.key, data, use_multipart=False, **options), policy)

    def _sender(self, policy: RetryPolicy) -> Any:
        """Return the store, with the client of another policy."""
        if not self.is_writable:
            raise self.kind(
                f"{self}: cannot be written to; give a local path or a bucket "
                f"({'://, '.join(WRITABLE)}://)"
            )
        if policy is POLICY or getattr(self.store, "client_options", None) is None:  # in memory
            return self.store
        return open_bucket(self, policy=policy)[0]

    def delete(self) -> None:
        """Delete the object, if there is one."""
        with suppress(FileNotFoundError):  # S3 says nothing of a key that is not there
            self._ask(lambda: self.store.delete(self.key))

    # --- requests ---

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    def _ask(self, action: Callable[[], T], policy: RetryPolicy = POLICY) -> T:
        with explained(self, self.kind):
            try:
                return retried(action, self, policy)
            except Exception as error:
                reason = reason_of(error)
                if reason == "missing":
                    raise self._missing() from None
                if reason in ("exists", "changed") or _is_not_modified(error):
                    raise Unchanged(str(self)) from None
                raise


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
