"""Long work of a server, a scan each: a bounded number at once, a queue, cancel and a time limit.

A scan runs in a thread and reports events; the request that asked for it reads them in the event
loop. A slow reader holds nothing up: of a kind of event, it gets the latest.
"""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gradproj.errors import GradprojError

Event = dict[str, Any]
"""An object of the stream: ``event`` is its kind."""
Events = AsyncGenerator[Event, None]
QUEUE_NEWS_S = 1.0
"""Seconds between two messages to one that waits, which also show whether it is still there."""


class ScanEnded(GradprojError):
    """A scan was cancelled, or ran out of time."""


class QueueFull(GradprojError):
    """Too many scans wait already."""


@dataclass
class ScanControl:
    """The thread's side of a scan: it posts events here and asks whether to go on."""

    deadline: float
    post: Callable[[Event], None]
    """Sends an event, from any thread; of a kind of event the latest counts."""
    leave_place: Callable[[], object] = lambda: None
    """Lets the next scan start, from any thread: what follows is no scan."""
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise ``ScanEnded`` if the scan should end."""
        if self.is_cancelled.is_set():
            raise ScanEnded("the scan was cancelled")
        if time.monotonic() > self.deadline:
            raise ScanEnded("the scan took longer than --time_limit_s allows")


Work = Callable[[ScanControl], Event]
"""Runs in a thread; returns the last event. A ``GradprojError`` becomes an event ``error``."""


class ScanQueue:
    """Runs scans, ``most_running`` at a time; the others wait in the order in which they came.

    ``most_waiting`` counts those that wait for a place, and those that have left theirs.
    """

    def __init__(self, most_running: int, most_waiting: int, time_limit_s: float) -> None:
        self._most_running = most_running
        self._time_limit_s = time_limit_s
        self._most = most_running + most_waiting
        self._threads = ThreadPoolExecutor(self._most, thread_name_prefix="scan")
        self._waiting: list[object] = []
        self._running = self._aside = 0
        self._changed = asyncio.Event()

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of scans that run and that wait."""
        return {"running": self._running + self._aside, "waiting": len(self._waiting)}

    async def events(self, work: Work) -> Events:
        """Wait for a place, run ``work`` and yield its events, ``queued`` ones before it starts.

        Closing the iterator cancels the scan: its thread ends at its next block.

        Raises:
            QueueFull: so many wait that this one is not accepted.
        """
        if sum(self.counts.values()) >= self._most:
            raise QueueFull(f"{self._most} questions are here already; try again later")
        ticket = object()
        self._waiting.append(ticket)
        try:
            while not self._may_start(ticket):
                yield {"event": "queued", "ahead": self._waiting.index(ticket), **self.counts}
                await self._next_news()
        except BaseException:
            self._waiting.remove(ticket)
            raise
        self._waiting.remove(ticket)
        self._running += 1
        async with contextlib.aclosing(self._run(work)) as events:
            async for event in events:
                yield event

    def _may_start(self, ticket: object) -> bool:
        return self._running < self._most_running and self._waiting[0] is ticket

    async def _next_news(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), QUEUE_NEWS_S)

    async def _run(self, work: Work) -> Events:
        latest: dict[str, Event] = {}
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()

        def receive(event: Event) -> None:
            latest[event["event"]] = event
            arrived.set()

        def post(event: Event) -> None:
            loop.call_soon_threadsafe(receive, event)

        has_place = True

        def leave() -> None:
            nonlocal has_place
            if has_place:
                has_place = False
                self._running, self._aside = self._running - 1, self._aside + 1
                self._changed.set()
                self._changed = asyncio.Event()

        def ended(_: object) -> None:
            leave()
            self._aside -= 1

        leave_place = functools.partial(loop.call_soon_threadsafe, leave)
        control = ScanControl(time.monotonic() + self._time_limit_s, post, leave_place)
        running = loop.run_in_executor(self._threads, _guarded, work, control)
        running.add_done_callback(ended)
        running.add_done_callback(lambda _: arrived.set())
        try:
            while not running.done():
                await arrived.wait()
                arrived.clear()
                while latest:
                    yield latest.pop(next(iter(latest)))
            yield running.result()
        finally:
            control.is_cancelled.set()

    def close(self) -> None:
        """Wait for no thread: a server that ends takes its scans with it."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _guarded(work: Work, control: ScanControl) -> Event:
    try:
        control.check()
        return work(control)
    except GradprojError as error:
        return {"event": "error", "message": str(error)}
    except RecursionError:
        return {"event": "error", "message": "the question is nested too deeply"}
    except OSError as error:
        return {"event": "error", "message": f"a file of the output cannot be read: {error}"}
