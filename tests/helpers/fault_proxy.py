"""A proxy between a job and an S3 server that fails as networks and busy stores do.

Each request may meet one fault, chosen at the rates of ``RATES``. Those that end in ``_after`` let
the server act first, so that a write has happened of which the client learns nothing.
"""

import http.client
import random
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

RATES = {
    "lost_after": 0.02,
    "reset": 0.01,
    "500": 0.01,
    "500_after": 0.01,
    "503": 0.01,
    "429": 0.01,
    "409": 0.05,
    "stall": 0.01,
    "cut": 0.02,
}
"""Fault -> share of the requests. 409 answers conditional writes only, ``cut`` bodies that came."""
CODES = {
    "500": "InternalError",
    "503": "SlowDown",
    "429": "SlowDown",
    "409": "ConditionalRequestConflict",
}
STALL_S = 2.0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_conditional = "If-None-Match" in self.headers or "If-Match" in self.headers
        fault = self.server.choose(self.command, self.command == "PUT" and is_conditional)
        if self.server.refusal:
            return self._answer(403, self.server.refusal)
        if fault == "reset":
            return self._hang_up(reset=True)
        if fault in CODES:
            return self._answer(int(fault), CODES[fault])
        with self.server.at_work():
            response, content = self._forward(body)
        if fault == "stall":
            time.sleep(STALL_S)
        if fault == "lost_after":
            return self._hang_up()
        if fault == "500_after":
            return self._answer(500, CODES["500"])
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in (
                "connection",
                "transfer-encoding",
                "content-length",
                "date",
                "server",
            ):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if fault == "cut" and len(content) > 1:
            self.wfile.write(content[: len(content) // 2])
            return self._hang_up()
        self.wfile.write(content)
        return None

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        target = http.client.HTTPConnection(self.server.host, self.server.port, timeout=60)
        target.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # the host is part of the signature
            target.putheader(name, value)
        target.endheaders(body)
        response = target.getresponse()
        content = response.read()
        target.close()
        return response, content

    def _answer(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self, reset: bool = False) -> None:
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str, seed: int, rates: dict[str, float]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        parts = urlsplit(target)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.refusal = ""
        """Error code with which every request is refused (403), if it is set."""
        self.met: Counter[str] = Counter()
        """Requests by what they met."""
        self._n_at_work = 0
        self._random, self._rates, self._lock = random.Random(seed), rates, threading.Lock()

    def choose(self, method: str, is_conditional: bool) -> str:
        with self._lock:
            at, fault = self._random.random(), "nothing"
            for name, rate in self._rates.items():
                if at < rate:
                    fault = name
                    break
                at -= rate
            if (fault == "409" and not is_conditional) or (fault == "cut" and method != "GET"):
                fault = "nothing"
            self.met[fault] += 1
            return fault

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count a request that the target has not answered yet."""
        with self._lock:
            self._n_at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_at_work -= 1

    def wait_until_idle(self) -> None:
        """Return when no request is under way, of clients that live or were killed."""
        while self._n_at_work:
            time.sleep(0.01)

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients are killed in the middle of requests."""


@contextmanager
def fault_proxy(target: str, seed: int, rates: dict[str, float] | None = None) -> Iterator[_Server]:
    """Run a proxy of the server ``http://HOST:PORT``; its ``url`` is ``http://127.0.0.1:PORT``."""
    server = _Server(target, seed, RATES if rates is None else rates)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url_of(server: _Server) -> str:
    """Return the address that clients use."""
    return f"http://127.0.0.1:{server.server_address[1]}"
