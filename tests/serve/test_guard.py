"""Requests that the server refuses before any route: hosts, origins, tokens, bodies."""

import asyncio
import json

import pytest

pytest.importorskip("starlette")

from helpers.asgi import Client

from gradproj.serve.app import Access, Server
from gradproj.serve.guard import MAX_BODY_BYTES
from gradproj.serve.scans import ScanQueue

TOKEN = "a token of enough characters"


class Echo:
    """An explorer that answers with the question."""

    title = "echo"

    def facts(self):
        return {"title": self.title}

    def answer(self, question, control):
        return {"event": "answer", "hits": [question]}

    def jsonl(self, question, control):
        return {"event": "answer", "lines": [json.dumps(question)]}

    def document(self, sample_id, start):
        return {"id": sample_id, "start": start}

    def status(self):
        raise RuntimeError("a defect")


def client(lines=None, **access):
    log = (lambda line: None) if lines is None else lines.append
    server = Server([Echo()], ScanQueue(2, 2, 60), log)
    return Client(server.app(Access(**access)))


@pytest.mark.parametrize(
    ("host", "local_only", "status"),
    [
        ("127.0.0.1:8765", True, 200), ("localhost:9000", True, 200), ("[::1]:8765", True, 200),
        ("LOCALHOST", True, 200), ("box.example", True, 200),
        ("evil.example", True, 421), ("evil.example:8765", False, 421), ("", True, 421),
        ("127.0.0.1.evil.example", True, 421), ("localhost@evil.example", True, 421),
        ("[", True, 421), ("[::1", True, 421), ("[evil.example]", False, 421),
        ("192.168.1.7:8765", True, 421), ("192.168.1.7:8765", False, 200), ("a b", False, 421),
    ],
)  # fmt: skip
def test_hosts_other_than_its_own_are_refused_against_dns_rebinding(host, local_only, status):
    asked = client(names=["box.example"], local_only=local_only)
    assert asked.get("/api/outputs", host=host)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1:8765"}, 200),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_pages_of_other_sites_cannot_ask(headers, status):
    assert client().post("/api/query", {"text": "x"}, **headers)[0] == status


def test_data_wants_the_token_and_the_empty_page_does_not():
    asked = client(token=TOKEN)
    for path in ("/api/outputs", "/api/outputs/0/documents/1", "/api/outputs/0/status"):
        assert asked.get(path)[0] == 401
        assert asked.get(path, authorization="Bearer another")[0] == 401
        assert asked.get(path, authorization=TOKEN)[0] == 401
    assert asked.get("/api/outputs", authorization=f"Bearer {TOKEN}")[0] == 200
    assert asked.get("/healthz")[0] == asked.get("/")[0] == asked.get("/page/main.js")[0] == 200


def test_a_large_body_is_refused_before_it_is_parsed():
    asked = client()
    assert asked.post("/api/query", b" " * (MAX_BODY_BYTES + 1))[0] == 413
    assert asked.post("/api/query", b'{"text": "' + b"x" * 1000 + b'"}')[0] == 200


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"7", b"[" * 200_000, b"\xff", b'{"output": 9}']
)
def test_a_body_that_is_no_question_is_an_error(body):
    status, _, answer = client().post("/api/query", body)
    assert status in (400, 404)
    assert json.loads(answer)["message"]


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page//etc/passwd",
     "/etc/passwd",
     "/page/app.py", "/api/outputs/9/overview", "/api/outputs/0/documents/-1",
     "/api/outputs/0/documents/1?start=x", "/api/outputs/0/documents/99999999999999999999999"],
)  # fmt: skip
def test_no_path_but_the_known_ones_is_found(path):
    status, _, body = client().get(path)
    assert status == 404
    assert json.loads(body)["message"] == "there is no such page"


def test_a_long_path_is_refused_before_its_numbers_are_read():
    assert client().get("/api/outputs/0/documents/" + "9" * 5000)[0] == 414


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/api/outputs", "/nothing", "/api/query"])
def test_every_answer_has_the_headers_that_bound_a_browser(path):
    _, headers, _ = client().get(path)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_a_defect_shows_no_traceback_to_the_client(capsys):
    status, headers, body = client().get("/api/outputs/0/status")
    assert (status, json.loads(body)["message"]) == (500, "the server failed; its log says where")
    assert "content-security-policy" in headers
    assert "a defect" in capsys.readouterr().err


def test_logs_hold_no_question_unless_asked():
    lines = []
    assert client(lines).post("/api/query", {"text": "a secret"})[0] == 200
    assert len(lines) == 1
    assert "secret" not in lines[0]


def test_lines_alone_are_answered_without_events():
    status, _, body = client().post("/api/query", {"text": "x", "stream": False})
    assert (status, body) == (200, b'{"text": "x"}\n')


def test_a_client_that_leaves_ends_its_scan():
    ended = []

    class Endless(Echo):
        def answer(self, question, control):
            try:
                while True:
                    control.check()
                    control.post({"event": "progress"})
            finally:
                ended.append(True)

    async def run():
        queue = ScanQueue(1, 1, 60)
        asked = Client(Server([Endless()], queue).app(Access()))
        headers = {"content-type": "application/json"}
        await asked.exchange("POST", "/api/query", {"text": "x"}, headers, leave_after=2)
        while queue.counts["running"]:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert ended == [True]
