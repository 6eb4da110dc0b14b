"""Threads beside the device: a bounded prefetch queue, and a writer. Errors reach the caller."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

CHECK_EVERY_S = 0.2


class Prefetcher(Generic[T]):
    """Iterates over ``items`` made ahead of time by a thread, at most ``ahead`` waiting.

    An error in the thread is raised in the loop. As a context manager it ends the thread on exit,
    also in mid-iteration, after the item being made. ``check`` is called while waiting for an item;
    its error ends the iteration.
    """

    def __init__(
        self, items: Iterable[T], ahead: int = 1, check: Callable[[], None] = lambda: None
    ) -> None:
        self._items, self._check = items, check
        self._queue: queue.Queue[tuple[str, T | BaseException | None]]
        self._queue = queue.Queue(maxsize=max(1, ahead))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._take()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:  # raised again in the thread that takes the items
            self._put(("error", error))

    def _put(self, message: tuple[str, T | BaseException | None]) -> bool:
        while not self._ended.is_set():
            try:
                self._queue.put(message, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _take(self) -> Iterator[T]:
        while True:
            try:
                kind, value = self._queue.get(timeout=CHECK_EVERY_S)
            except queue.Empty:
                self._check()
                continue
            if kind == "end":
                return
            if isinstance(value, BaseException):
                raise value
            yield value  # type: ignore[misc]


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
