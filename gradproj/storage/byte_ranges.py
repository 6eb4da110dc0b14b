"""Byte ranges of objects, asked for before they are needed, in bounded memory.

A request to a bucket takes tens of milliseconds whatever its size, and a connection is slower than
the network, so several must be under way at once. ``RangeCache`` holds what was asked for until it
is dropped. When that becomes too much, what was asked for first goes, and is fetched again if
somebody still reads it: dropping never makes a reader wrong.
"""

import os
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np

CONNECTIONS = 32
"""Requests of this process under way at once."""
PART_BYTES = 2**22
"""Most bytes of a request: long beside the latency, and many of them to share the network."""
_FIRST_PART_BYTES = 2**19
"""Bytes of the first requests: all that are under way share the network, so that the first of many
large ones would end with the last."""
AHEAD_BYTES = 2**27
"""Most bytes that are asked for at once: ``CONNECTIONS`` parts."""
MAX_GAP_BYTES = 2**16
"""Bytes read in vain rather than by a further request: about what the network carries in the time
that a request costs when ``CONNECTIONS`` are under way."""

Fetch = Callable[[int, int], Any]
"""Returns the bytes ``[begin, end)`` of an object, in a buffer."""
Range = tuple[int, int]


def executor() -> Executor:
    """Return the threads of this process that wait for requests. Their tasks wait for no other."""
    return _executor(os.getpid())  # threads do not survive a fork


@lru_cache(maxsize=1)
def _executor(_: int) -> Executor:
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")


def joined(begins: np.ndarray, ends: np.ndarray, max_gap: int = 0) -> list[Range]:
    """Return the ranges in order, those at most ``max_gap`` bytes apart as one."""
    if not len(begins):
        return []
    order = np.argsort(begins, kind="stable")
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    cuts = np.flatnonzero(begins[1:] - ends[:-1] > max_gap) + 1
    firsts, lasts = begins[np.concatenate([[0], cuts])], ends[np.concatenate([cuts - 1, [-1]])]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


@dataclass(frozen=True)
class _Part:
    begin: int
    end: int
    data: "Future[Any]"


class RangeCache:
    """Ranges of any number of objects, which several threads may ask for.

    Args:
        limit: bytes of all ranges that are held or under way.
    """

    def __init__(self, limit: int = 3 * AHEAD_BYTES) -> None:
        self._limit = limit
        self._lock = Lock()
        self._parts: dict[tuple[str, int], _Part] = {}  # of all objects, the oldest first
        self._begins: dict[str, list[int]] = {}  # of each object, sorted
        self._n_bytes = 0

    @property
    def has_room(self) -> bool:
        """True while a reader may ask for more than it needs next."""
        return self._n_bytes < AHEAD_BYTES // 2

    def ask(self, name: str, ranges: Iterable[Range], fetch: Fetch) -> None:
        """Begin to fetch disjoint ranges of the object ``name``, the first ``AHEAD_BYTES`` of them.

        What was asked for before is not fetched again.
        """
        left = AHEAD_BYTES
        with self._lock:
            for begin, end in ranges:
                end = min(end, begin + left)
                left -= end - begin
                for first, last in self._absent(name, begin, end):
                    while first < last:
                        eighth = 2 ** (self._n_bytes // 8).bit_length() // 2
                        part = min(max(_FIRST_PART_BYTES, eighth), PART_BYTES, last - first)
                        self._add(name, first, first + part, fetch)
                        first += part
                if not left:
                    break
            while self._n_bytes > self._limit:
                self._remove(next(iter(self._parts)))

    def read_into(self, name: str, out: memoryview, begin: int, fetch: Fetch) -> None:
        """Fill ``out`` with the object's bytes from ``begin`` on; waits for those under way."""
        at, end, has_asked = begin, begin + len(out), False
        while at < end:
            with self._lock:
                part = self._part_at(name, at)
            if part is None and not has_asked:
                self.ask(name, [(at, end)], fetch)
                has_asked = True
                continue
            if part is None:  # others need the room
                stop, first = min(end, at + PART_BYTES), at
                data = memoryview(fetch(at, stop))
            else:
                stop, first = min(end, part.end), part.begin
                try:
                    data = memoryview(part.data.result())
                except CancelledError:  # dropped meanwhile
                    continue
                except BaseException:
                    self.drop(name, [(part.begin, part.end)])
                    raise
            out[at - begin : stop - begin] = data[at - first : stop - first]
            at, has_asked = stop, False

    def drop(self, name: str, ranges: Iterable[Range]) -> None:
        """Forget the requests that lie in these ranges."""
        with self._lock:
            for begin, end in ranges:
                begins = self._begins.get(name, [])
                for at in begins[bisect_left(begins, begin) : bisect_left(begins, end)]:
                    if self._parts[name, at].end <= end:
                        self._remove((name, at))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for key in list(self._parts):
                self._remove(key)

    def _add(self, name: str, begin: int, end: int, fetch: Fetch) -> None:
        self._parts[name, begin] = _Part(begin, end, executor().submit(fetch, begin, end))
        insort(self._begins.setdefault(name, []), begin)
        self._n_bytes += end - begin

    def _remove(self, key: tuple[str, int]) -> None:
        part = self._parts.pop(key)
        part.data.cancel()
        self._n_bytes -= part.end - part.begin
        begins = self._begins[key[0]]
        begins.remove(key[1])
        if not begins:
            del self._begins[key[0]]

    def _absent(self, name: str, begin: int, end: int) -> list[Range]:
        """Return the parts of ``[begin, end)`` that nobody has asked for."""
        gaps, at = [], begin
        while at < end:
            part = self._part_at(name, at)
            if part is None:
                begins = self._begins.get(name, [])
                following = begins[bisect_right(begins, at) :][:1]
                gaps.append((at, min([end, *following])))
            at = gaps[-1][1] if part is None else part.end
        return gaps

    def _part_at(self, name: str, at: int) -> _Part | None:
        begins = self._begins.get(name, [])
        place = bisect_right(begins, at) - 1
        part = self._parts[name, begins[place]] if place >= 0 else None
        return part if part is not None and at < part.end else None
