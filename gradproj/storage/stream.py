"""A range of a remote object as a file that is read forward, from one request.

A body that ends early is never its end: a body that is cut or stalls is asked for again from
where it stopped, and the number of bytes is known beforehand.
"""

import io
from collections.abc import Iterator
from time import sleep
from typing import Any

from gradproj.errors import CorpusError, GradprojError
from gradproj.storage.address import Address
from gradproj.storage.bucket import library, open_bucket
from gradproj.storage.facts import ObjectFacts, differences, facts_of
from gradproj.storage.failures import RETRIED, explain, is_of_obstore, reason_of
from gradproj.storage.retry import POLICY, RetryPolicy, retried

_CHUNK_BYTES = 2**20


class ObjectChanged(GradprojError):
    """An object is not the version that was asked for; the message says what differs."""


class NoRanges(GradprojError):
    """The server sends whole objects only."""


class ObjectStream(io.RawIOBase):
    """Bytes ``[start, stop)`` of one version of an object. Positions are those of the object.

    ``seek`` goes forward, or back within the last chunk: about a MiB is in memory.
    """

    def __init__(
        self,
        address: Address,
        facts: ObjectFacts,
        start: int = 0,
        stop: int | None = None,
        policy: RetryPolicy = POLICY,
    ) -> None:
        self.address, self._facts, self._policy = address, facts, policy
        self._stop = facts.size_bytes if stop is None else min(stop, facts.size_bytes)
        self._at = self._chunk_start = start
        self._chunk = b""
        self._body: Iterator[Any] = iter(())
        self._pauses = policy.pauses()
        if start < self._stop:
            self._body = self._request(start)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the object."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position, forward or back within the chunk in memory."""
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stop}[whence]
        if target < self._chunk_start:
            raise io.UnsupportedOperation(f"{self.address}: byte {target:,} was read and is gone")
        while target > self._chunk_stop and self._chunk_stop < self._stop:
            self._next_chunk()
        self._at = target
        return target

    def read(self, size: int | None = -1) -> bytes:
        """Return ``size`` bytes, fewer only at the range's end; -1 for all that are left."""
        left = max(0, self._stop - self._at)
        n_bytes = left if size is None or size < 0 else min(size, left)
        first = self._at - self._chunk_start
        if first + n_bytes <= len(self._chunk):
            self._at += n_bytes
            return self._chunk[first : first + n_bytes]
        pieces = []
        while n_bytes:
            first = self._at - self._chunk_start
            piece = self._chunk[first : first + n_bytes]
            if not piece:
                self._next_chunk()
                continue
            pieces.append(piece)
            self._at += len(piece)
            n_bytes -= len(piece)
        return b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; for ``io``'s wrappers."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    @property
    def _chunk_stop(self) -> int:
        return self._chunk_start + len(self._chunk)

    def _next_chunk(self) -> None:
        """Replace the chunk in memory by the next one, which is not empty."""
        wanted = self._stop - self._chunk_stop
        while True:
            try:
                chunk = bytes(next(self._body, b""))[:wanted]
            except Exception as error:
                # obstore goes on by ranges where the server has etags, and it may lack ranges.
                if reason_of(error) not in (*RETRIED, "unsupported"):
                    raise self._failure(error) from None
                chunk = b""
            if chunk:
                self._chunk_start, self._chunk = self._chunk_stop, chunk
                self._pauses = self._policy.pauses()  # it goes on
                return
            pause = next(self._pauses, None)
            if pause is None:
                raise CorpusError(
                    f"{self.address}: its bytes end at {self._chunk_stop:,} of {self._stop:,}, "
                    "after all retries; try again later, and check the network"
                )
            sleep(pause)
            self._body = self._request(self._chunk_stop)

    def _request(self, start: int) -> Iterator[Any]:
        """Ask for the bytes from ``start`` on, and check that they are of the right version."""
        whole = start == 0 and self._stop == self._facts.size_bytes
        try:
            answer = self._get({} if whole else {"range": (start, self._stop)})
        except NoRanges:
            if self._chunk_start == 0 and self._stop == self._facts.size_bytes:
                return _without(start, iter(self._get({}).stream(_CHUNK_BYTES)))
            raise
        return iter(answer.stream(_CHUNK_BYTES))

    def _get(self, options: dict[str, Any]) -> Any:
        obstore, (store, key) = library("obstore"), open_bucket(self.address, policy=self._policy)
        # Files of the hub are of one commit, and have other etags where a redirect leads.
        is_fixed = self.address.scheme == "hf"
        etag = "" if is_fixed or self._facts.etag.startswith("W/") else self._facts.etag
        if etag:
            options = {**options, "if_match": etag}
        try:
            answer = retried(
                lambda: obstore.get(store, key, options=options), self.address, self._policy
            )
        except Exception as error:
            raise self._failure(error) from None
        now = facts_of(answer.meta)
        if is_fixed:
            now = ObjectFacts(now.size_bytes, self._facts.etag)
        changes = differences(now, self._facts)
        if changes:
            raise ObjectChanged("; ".join(changes))
        return answer

    def _failure(self, error: Exception) -> Exception:
        """Return what is raised for an error of obstore; another library's stays."""
        reason = reason_of(error)
        if reason in ("changed", "range"):
            return ObjectChanged("its etag or size is not that of the index")
        if reason == "missing":
            return ObjectChanged("it does not exist any more")
        if reason == "unsupported":
            return NoRanges(f"{self.address}: the server sends whole files only")
        return CorpusError(explain(error, self.address)) if is_of_obstore(error) else error


def _without(n_bytes: int, chunks: Iterator[Any]) -> Iterator[bytes]:
    """Yield chunks without the first ``n_bytes`` of them all."""
    for chunk in chunks:
        data = bytes(chunk)
        if n_bytes < len(data):
            yield data[n_bytes:]
        n_bytes = max(0, n_bytes - len(data))
