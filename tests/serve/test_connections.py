"""Connections that send nothing, half a request, or read nothing, by raw sockets."""

import socket
import time
from contextlib import ExitStack, suppress

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from helpers.served import running

from gradproj.cli.serve import connections

GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HALF = [b"", b"GET / HT", GET[:-2], b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"]
LARGE = 2**26


async def app(scope, receive, send):
    """Answers at once; with much at /large, and with the body's length to a POST."""
    n = LARGE if scope["path"] == "/large" else 2
    while scope["method"] == "POST" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"%d" % n)]})  # fmt: skip
    for _ in range(max(1, n // 2**20)):
        body = b"x" * min(n, 2**20)
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def port(monkeypatch):
    """A server with little patience."""
    monkeypatch.setattr(connections, "MOST", 8)
    monkeypatch.setattr(connections, "REQUEST_WITHIN_S", 0.5)
    monkeypatch.setattr(connections, "READ_WITHIN_S", 0.5)
    with running(app) as found:
        yield found


@pytest.fixture
def connect(port):
    with ExitStack() as stack:

        def connected(*sent):
            made = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for data in sent:
                made.sendall(data)
            return made

        yield connected


def is_closed(connection):
    """Return whether the server closes a connection, without an answer."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", HALF)
def test_a_request_that_does_not_come_in_time_ends_its_connection(connect, sent):
    started = time.monotonic()
    assert is_closed(connect(sent))
    assert time.monotonic() - started > 0.4


def test_one_byte_now_and_then_does_not_gain_time(connect):
    dripping = connect(GET[:-2] + b"X-Slow: ")

    def drip():
        for _ in range(100):
            dripping.sendall(b"s")
            time.sleep(0.05)

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        drip()


def test_a_kept_connection_is_answered_again_and_ends_when_it_idles(connect):
    kept = connect()
    for _ in range(2):
        kept.sendall(GET)
        assert kept.recv(15) == b"HTTP/1.1 200 OK"
        time.sleep(0.3)
        kept.recv(4096)
    assert is_closed(kept)


@pytest.mark.parametrize("sent", HALF)
def test_connections_that_do_not_ask_keep_nobody_out(monkeypatch, connect, sent):
    monkeypatch.setattr(connections, "REQUEST_WITHIN_S", 60)
    idle = [connect(sent) for _ in range(30)]
    for _ in range(3):
        assert connect(GET).recv(15) == b"HTTP/1.1 200 OK"
    assert is_closed(idle[0])


def test_an_answer_that_nobody_reads_ends_its_connection(connect):
    deaf = connect(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(1.5)
    n_bytes = 0
    with suppress(ConnectionResetError):
        while more := len(deaf.recv(2**20)):
            n_bytes += more
    assert n_bytes < LARGE


def test_a_slow_reader_gets_its_whole_answer(connect):
    slow, n_bytes = connect(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"), 0
    while n_bytes < LARGE:
        n_bytes += len(slow.recv(2**21)) or pytest.fail("it was cut")
        time.sleep(0.02)
