"""Threads beside the device: one makes items ahead of time, one writes. Errors reach the caller."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

AHEAD = 2
"""Items made ahead: one is ready while the next is being made."""
CHECK_EVERY_S = 0.2


@contextmanager
def prefetched(items: Iterable[T], check: Callable[[], None]) -> Iterator[Iterator[T]]:
    """Iterate over ``items``, which a thread makes ahead of time.

    An error in the thread is raised in the loop. ``check`` is called while waiting for an item; its
    error ends the iteration. The exit waits for the item being made.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    ahead: deque[Future[Any]] = deque(pool.submit(next, iterator, end) for _ in range(AHEAD))

    def take() -> Iterator[T]:
        while True:
            while not wait([ahead[0]], timeout=CHECK_EVERY_S).done:
                check()
            item = ahead.popleft().result()
            if item is end:
                return
            ahead.append(pool.submit(next, iterator, end))
            yield item

    try:
        yield take()
    finally:
        pool.shutdown(cancel_futures=True)


class Writer:
    """Runs one action at a time in a thread; the next ``submit`` waits for it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._running: Future | None = None

    def submit(self, action: Callable[[], object]) -> None:
        """Start an action after the previous one has ended, whose error is raised here."""
        self.wait()
        self._running = self._pool.submit(action)

    def check(self) -> None:
        """Raise the error of a failed action."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the running action and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)
