"""``Turns``: one model for the threads of several questions, one thread at a time."""

import bisect
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_AGAIN_S = 0.2
"""Between two calls of one that waits."""
PATIENCE_S = 2.0
"""A part of long work that has waited for so long counts as short: it came first."""

Place = tuple[int, int]
"""Of a thread among those that wait; the smallest is next."""


class Turns:
    """A lock that goes to short work first, for ``PATIENCE_S``, and else to who came first.

    Work of many parts takes a turn for each, always at its own ``place``: between two parts a short
    one comes in, and of two long ones the second does not delay the first. A thread that has the
    turn must not ask for another.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Place] = []
        self._is_taken = False
        self._numbers = itertools.count()

    def place(self) -> Place:
        """Return a place for all parts of long work."""
        return 1, next(self._numbers)

    @contextmanager
    def turn(
        self, place: Place | None = None, waits: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Have the turn; short work has no place of its own.

        ``waits`` is called now and then before the turn comes; its exception ends the wait.
        """
        place = place or (0, next(self._numbers))
        came = called = time.monotonic()
        with self._changed:
            bisect.insort(self._waiting, place)
            try:
                while self._is_taken or self._waiting[0] != place:
                    self._changed.wait(LOOK_AGAIN_S)  # less, where others' turns are short
                    if time.monotonic() - called >= LOOK_AGAIN_S:
                        waits()
                        called = time.monotonic()
                    if place[0] and time.monotonic() - came >= PATIENCE_S:
                        self._waiting.remove(place)
                        place = 0, place[1]
                        bisect.insort(self._waiting, place)
                self._is_taken = True
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()
