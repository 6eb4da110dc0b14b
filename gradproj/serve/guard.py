"""Checks before the routes: who may ask, how much, and what a browser may do with the page."""

import ipaddress
import secrets
import sys
import traceback
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**20
MAX_PATH = 2000
OPEN_PATHS = ("/", "/healthz")
"""Paths, besides those of the page's files, that need no token: none shows anything of a store."""
FILES_PREFIX = "/page/"

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware: checks of Host, Origin and token, bounds of the body, security headers.

    A page of another site may send requests here, and by DNS rebinding even from a name of its own
    that points to this machine. It cannot choose the ``Host`` header, which has the name that the
    browser believes in, nor hide its ``Origin``.

    Args:
        app: what follows.
        token: of every request for data, as ``Authorization: Bearer TOKEN``; "" for none.
        names: names of hosts that a request may be for, besides addresses and localhost.
        local_only: refuse other addresses than those of the loopback, too.
    """

    def __init__(self, app: ASGIApp, token: str, names: Collection[str], local_only: bool) -> None:
        self._app, self._token = app, token
        self._names, self._local_only = {name.lower() for name in names}, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no web sockets
        answer = self._refusal(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        if answer is not None:
            await answer(scope, receive, send_guarded)
            return
        body = await _body(scope, receive)
        if isinstance(body, JSONResponse):
            await body(scope, receive, send_guarded)
            return
        try:
            await self._app(scope, _replayed(body, receive), send_guarded)
        except Exception:  # a defect, which the app has answered already
            traceback.print_exc(file=sys.stderr)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _name_of(host)
        if not self._knows(name):
            return _refused(421, f"this server does not answer for the host {name!r:.80}")
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return _refused(403, "requests from pages of other sites are refused")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _refused(403, "requests from pages of other sites are refused")
        path = scope["path"]
        if len(path) > MAX_PATH:
            return _refused(414, f"the path has more than {MAX_PATH:,} characters")
        is_open = path in OPEN_PATHS or path.startswith(FILES_PREFIX)
        if self._token and not is_open and not self._has_token(headers):
            return _refused(401, "this server wants its token, which it printed or got by --token")
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and content_type != "application/json":
            # Other types may be sent by forms of any site.
            return _refused(415, "the body must be application/json")
        return None

    def _knows(self, name: str) -> bool:
        if name.lower() in self._names or is_loopback(name):
            return True
        # An address is no name, so that no DNS points it elsewhere.
        return not self._local_only and _is_address(name)

    def _has_token(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and secrets.compare_digest(
            given.encode(), self._token.encode()
        )


def _name_of(host: str) -> str:
    """Return the name or address in a ``Host`` header; empty if it has none."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if _is_plain(host) else ""
    except ValueError:  # brackets that hold no address
        return ""


def _is_plain(host: str) -> bool:
    return host.isascii() and not any(c.isspace() or c in "/@?#\\" for c in host)


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"event": "error", "message": message}, status)


async def _body(scope: Scope, receive: Receive) -> bytes | JSONResponse:
    """Read the whole body, or return why it is not taken."""
    if scope["method"] != "POST":
        return b""
    too_large = _refused(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
    parts, n_bytes = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return _refused(400, "the body did not come to its end")
        parts.append(message.get("body", b""))
        n_bytes += len(parts[-1])
        if n_bytes > MAX_BODY_BYTES:
            return too_large
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives a body that was read already, and then what follows."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
