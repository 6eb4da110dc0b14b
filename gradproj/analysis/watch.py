"""Watching the scans of one thread: their progress, what they have found so far, and an early end.

A scan is far from the code that shows it, below the queries, curvature, sets and parts of a score.
So a watch is named for a block of code, and every scan within it reports: those of an answer, and
those that it needs beforehand, such as the fit of a second moment.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm


class ScanWatch:
    """Called by a scan between its blocks; an exception from either method ends the scan."""

    def advanced(self, n_done: int, n_total: int, what: str) -> None:
        """Note that ``n_done`` of ``n_total`` are done, of ``what``: ``documents``, ``texts``."""

    def found(self, ends: Callable[[], tuple[Any, Any]]) -> None:
        """``ends()`` returns both ends of the scores so far, two ``TopDocuments`` of numpy arrays.

        It sorts what was found and, on a GPU, waits for it, so call it a few times a second.
        """


_WATCH: ContextVar[ScanWatch | None] = ContextVar("scan_watch", default=None)


@contextmanager
def watching(watch: ScanWatch | None) -> Iterator[None]:
    """Have ``watch`` called by every scan within the ``with`` block, in this thread."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def present_watch() -> ScanWatch | None:
    """Return who watches this thread's scans; None if nobody does."""
    return _WATCH.get()


class ScanProgress:
    """Progress of one scan: a bar on standard error, if it has a label, and calls of the watch."""

    def __init__(self, n_total: int, label: str | None = None, what: str = "documents") -> None:
        self._bar = tqdm(
            total=n_total, desc=label, unit="row", unit_scale=True, disable=label is None
        )
        self._n_done, self._n_total, self._what = 0, n_total, what
        self._watch = present_watch()

    def __enter__(self) -> "ScanProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n: int) -> None:
        """Count ``n`` more."""
        self._bar.update(n)
        self._n_done += n
        if self._watch is not None:
            self._watch.advanced(self._n_done, self._n_total, self._what)
