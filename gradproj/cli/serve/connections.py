"""Connections that do not ask: bounded in time, and closed first when there are too many."""

import asyncio
import math
import time
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 512
"""Connections at once."""
REQUEST_WITHIN_S = 30.0
"""Seconds in which a request must have come, head and body, after the connection or the answer
before it."""
READ_WITHIN_S = 60.0
"""Seconds for which a client may take nothing of an answer that waits for it."""


class Connection(H11Protocol):
    """A connection of HTTP/1.1 that keeps nobody else out.

    uvicorn has no limit for the time of a request's head, so a client that sends none keeps its
    connection for good, and a limit of connections would let such clients lock out all others.
    Here one that waits for a request is closed after ``REQUEST_WITHIN_S``; and at once, the oldest
    first, when there are more than ``MOST``: who asks is let in.
    """

    waits_since = math.inf
    """On the monotonic clock; infinite while a whole request is there and not answered."""
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._note_request()
        if len(self.connections) > MOST:
            all_of_them = [cast(Connection, each) for each in self.connections]
            min(all_of_them, key=lambda each: each.waits_since).drop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(READ_WITHIN_S, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()

    def drop(self) -> None:
        """Close the connection without waiting for what the client has not taken."""
        self.connections.discard(self)
        self.transport.abort()

    def _note_request(self) -> None:
        """Start the time limit of a request, or end it if the request is there."""
        cycle = self.cycle
        is_asked = cycle is not None and not cycle.response_complete and not cycle.more_body
        if is_asked and self._timer is not None:
            self._timer.cancel()
            self.waits_since, self._timer = math.inf, None
        elif not is_asked and self._timer is None:
            self.waits_since = time.monotonic()
            self._timer = self.loop.call_later(REQUEST_WITHIN_S, self.drop)


def settings(app: Any) -> uvicorn.Config:
    """Return how uvicorn serves an ASGI application."""
    return uvicorn.Config(
        app, http=Connection, timeout_keep_alive=30,
        log_level="warning", access_log=False, server_header=False, date_header=False,
        timeout_graceful_shutdown=2, lifespan="off", ws="none", proxy_headers=False,
    )  # fmt: skip
