"""A small HTTP server of files in memory, with and without ranges, that fails on request."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    """A request as the server got it."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class HttpFiles:
    """The server's files and behaviour; a test may change both at any time."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path, with its slash at the beginning, to content."""
    ranges: bool = True
    etags: bool = True
    faults: deque = field(default_factory=deque)
    """Faults of the next GETs, each one of: a status such as 503, or ``(status, body)``;
    ``("cut", n)``, the connection ends after n bytes of the body; ``("stall", n, seconds)``, a
    pause after n bytes; None, none."""
    fails_head: bool = False
    """Whether faults are those of HEADs too."""
    redirects: dict[str, str] = field(default_factory=dict)
    """Path to the address that a 302 names."""
    answers: dict[str, Callable[[bytes], object]] = field(default_factory=dict)
    """Path to a function from a request's body to an answer, sent as JSON; None is a 404."""
    requests: list[Request] = field(default_factory=list)

    def etag(self, path: str) -> str:
        return f'"{md5(self.files[path]).hexdigest()}"'

    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(with_body=True, sent=body)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool, sent: bytes = b"") -> None:
        site = self.server.site
        path = unquote(urlsplit(self.path).path)
        site.requests.append(Request(self.command, self.path, dict(self.headers)))
        fails = with_body or site.fails_head
        fault = site.faults.popleft() if fails and site.faults else None
        if isinstance(fault, int):
            return self._send(fault, b"out of order")
        if fault and isinstance(fault[0], int):
            return self._send(*fault)
        if path in site.answers:
            answer = site.answers[path](sent)
            if answer is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return self._send(200, json.dumps(answer).encode())
        if path in site.redirects:
            return self._send(302, b"", {"Location": site.redirects[path]})
        if path not in site.files:
            return self._send(404, b"no such file")
        content, headers = site.files[path], {}
        if site.etags:
            headers["ETag"] = etag = site.etag(path)
            if self.headers.get("If-Match", etag) != etag:
                return self._send(412, b"changed")
        status, wanted = 200, self.headers.get("Range")
        if site.ranges:
            headers["Accept-Ranges"] = "bytes"
        if wanted and site.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            if start >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self._send(status, content, headers, fault, with_body)

    def _send(self, status, content, headers=None, fault=None, with_body=True) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not with_body:
            return
        if fault is None:
            self.wfile.write(content)
            return
        kind, n_bytes, *seconds = fault
        self.wfile.write(content[:n_bytes])
        self.wfile.flush()
        if kind == "stall":
            time.sleep(seconds[0])
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    site: HttpFiles

    def handle_error(self, *_: object) -> None:
        pass  # a client that left


@contextmanager
def http_files(**settings: object) -> Iterator[HttpFiles]:
    """Serve files on a port of this machine."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.site = HttpFiles(f"http://127.0.0.1:{server.server_address[1]}", **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
