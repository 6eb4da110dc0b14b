"""The routes: the page, and the JSON API behind it."""

import asyncio
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gradproj.errors import GradprojError
from gradproj.formatting import clean
from gradproj.serve.explorer import Explorer
from gradproj.serve.guard import FILES_PREFIX, Guard
from gradproj.serve.scans import Event, Events, QueueFull, ScanQueue, Work

NDJSON = "application/x-ndjson"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FRESH_S = 2.0
"""Seconds for which the status of a job is kept, however often it is asked for."""
_LARGEST_ID = 2**53


@dataclass(frozen=True)
class Access:
    """Hosts and tokens of the clients that may ask."""

    token: str = ""
    """Of every request for data; empty for none."""
    names: Collection[str] = ()
    """Host names that requests may be for, besides addresses and localhost."""
    local_only: bool = True
    """Refuse addresses that are not of the loopback."""


class Server:
    """Answers for some outputs.

    Args:
        explorers: the outputs.
        queue: takes their scans.
        log: called with a line for each request.
        logs_questions: the lines have the questions' fields.
    """

    def __init__(
        self,
        explorers: Sequence[Explorer],
        queue: ScanQueue,
        log: Callable[[str], None] = lambda line: None,
        logs_questions: bool = False,
    ) -> None:
        self._explorers, self._queue = explorers, queue
        self._log, self._logs_questions = log, logs_questions
        self._files = page_files()
        self._status: dict[int, tuple[float, dict[str, Any]]] = {}
        self._status_lock = asyncio.Lock()

    def app(self, access: Access) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            Route("/", self._page),
            Route(FILES_PREFIX + "{name}", self._file),
            Route("/healthz", self._health),
            Route("/api/outputs", self._outputs),
            Route("/api/query", self._query, methods=["POST"]),
            Route("/api/outputs/{number:int}/documents/{id:int}", self._document),
            Route("/api/outputs/{number:int}/overview", self._overview),
            Route("/api/outputs/{number:int}/map", self._map),
            Route("/api/outputs/{number:int}/status", self._job_status),
        ]
        handlers = {
            GradprojError: _shown_error, HTTPException: _http_error, Exception: _unknown_error,
        }  # fmt: skip
        app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
        app.router.redirect_slashes = False
        return Guard(app, access.token, access.names, access.local_only)

    # --- the page ---

    async def _page(self, _: Request) -> Response:
        return self._files["index.html"]()

    async def _file(self, request: Request) -> Response:
        # The names are those of the package's own files: no path reaches the disk.
        make = self._files.get(request.path_params["name"])
        return _not_found() if make is None else make()

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", **self._queue.counts})

    # --- the API ---

    async def _outputs(self, _: Request) -> Response:
        made = [await run_in_threadpool(_facts, explorer) for explorer in self._explorers]
        return JSONResponse({"outputs": made, **self._queue.counts})

    async def _query(self, request: Request) -> Response:
        try:
            question = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            return _problem(400, f"the body is no JSON: {error}")
        if not isinstance(question, dict):
            return _problem(400, "the body is no JSON object")
        number, streams = question.pop("output", 0), question.pop("stream", True)
        if type(number) is not int or not 0 <= number < len(self._explorers):
            return _problem(404, f"there is no output {number!r:.40}")
        asked = {name: value for name, value in question.items() if value is not None}
        shown = json.dumps(asked) if self._logs_questions else ""
        explorer = self._explorers[number]
        ask = explorer.answer if streams else explorer.jsonl
        work = functools.partial(ask, asked)
        return await self._scanned(work, f"question to output {number} {shown}", bool(streams))

    async def _document(self, request: Request) -> Response:
        explorer, sample_id = self._explorer(request), request.path_params["id"]
        start = request.query_params.get("start", "0")
        if explorer is None or sample_id > _LARGEST_ID or not start.isdecimal():
            return _not_found()
        place = min(int(start[:18]), _LARGEST_ID)
        return JSONResponse(await run_in_threadpool(explorer.document, sample_id, place))

    async def _overview(self, request: Request) -> Response:
        explorer = self._explorer(request)
        if explorer is None:
            return _not_found()
        return await self._scanned(explorer.overview, "overview", True)

    async def _map(self, request: Request) -> Response:
        explorer = self._explorer(request)
        if explorer is None:
            return _not_found()
        return await self._scanned(explorer.document_map, "map", True)

    async def _job_status(self, request: Request) -> Response:
        explorer, number = self._explorer(request), request.path_params["number"]
        if explorer is None:
            return _not_found()
        async with self._status_lock:
            made, status = self._status.get(number, (-_FRESH_S, {}))
            if time.monotonic() - made >= _FRESH_S:
                status = await run_in_threadpool(explorer.status)
                self._status[number] = time.monotonic(), status
        return JSONResponse(status)

    def _explorer(self, request: Request) -> Explorer | None:
        number = request.path_params["number"]
        return self._explorers[number] if number < len(self._explorers) else None

    # --- scans ---

    async def _scanned(self, work: Work, what: str, streams: bool) -> Response:
        """Return a response of a scan's events, or of its last one's lines alone."""
        events = self._logged(self._queue.events(work), what)
        try:
            first = await anext(events)
        except QueueFull as error:
            return _problem(503, str(error), {"retry-after": "5"})
        return EventResponse(first, events, streams)

    async def _logged(self, events: Events, what: str) -> Events:
        started, ended = time.monotonic(), "disconnected"
        try:
            async with aclosing(events) as source:
                async for event in source:
                    if event["event"] in ("answer", "error"):
                        ended = event["event"]
                    yield event
        except QueueFull:
            ended = "refused"
            raise
        except GradprojError as error:
            ended = "error"
            yield {"event": "error", "message": str(error)}
        except Exception:
            ended = "failed"
            traceback.print_exc(file=sys.stderr)
            yield {"event": "error", "message": "the server failed; its log says where"}
        finally:
            self._log(clean(f"{what}: {ended} after {time.monotonic() - started:.2f} s"))


class EventResponse(Response):
    """Events as they come, a JSON object a line; or the lines of the last one, when it comes.

    A client that disconnects closes the events, which ends the scan.
    """

    def __init__(self, first: Event, events: Events, streams: bool) -> None:
        self._first, self._events, self._streams = first, events, streams
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        if self._streams:
            await _start(send, 200)
            await _send_line(send, self._first)
            async for event in self._events:
                await _send_line(send, event)
        else:
            last = self._first
            async for event in self._events:
                last = event
            is_answer = last["event"] == "answer"
            lines = last["lines"] if is_answer else [json.dumps(last)]
            await _start(send, 200 if is_answer else 400)
            text = "".join(f"{line}\n" for line in lines)
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, status: int) -> None:
    headers = [(b"content-type", NDJSON.encode()), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send_line(send: Send, event: Event) -> None:
    line = json.dumps(event, allow_nan=False) + "\n"
    await send({"type": "http.response.body", "body": line.encode(), "more_body": True})


def _facts(explorer: Explorer) -> dict[str, Any]:
    try:
        return explorer.facts()
    except (GradprojError, OSError) as error:
        return {"title": explorer.title, "problem": str(error)}


def page_files() -> dict[str, Callable[[], Response]]:
    """Return the page's files by name, read once."""
    made: dict[str, Callable[[], Response]] = {}
    for file in resources.files("gradproj.serve").joinpath("page").iterdir():
        media = _TYPES.get(file.name.rpartition(".")[2])
        if media is not None:
            made[file.name] = _file_response(file.read_bytes(), media)
    return made


def _file_response(data: bytes, media: str) -> Callable[[], Response]:
    return lambda: Response(data, media_type=media)


def _problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"event": "error", "message": message}, status, headers)


def _not_found() -> JSONResponse:
    return _problem(404, "there is no such page")


async def _shown_error(_: Request, error: Exception) -> Response:
    return _problem(409, str(error))


async def _http_error(_: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _not_found() if status == 404 else _problem(status, "there is no such method here")


async def _unknown_error(_: Request, error: Exception) -> Response:
    return _problem(500, "the server failed; its log says where")
