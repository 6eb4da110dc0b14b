"""Buckets of Azure and Google: Azurite, and fake-gcs-server behind a front.

``GRADPROJ_TEST_AZURE`` and ``GRADPROJ_TEST_GOOGLE`` are the endpoints of the emulators, which
``launch/test_s3.sh`` starts. The tests of buckets then run against that store in place of S3.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from gradproj.storage.address import Address

AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The key that every Azurite has."""
GOOGLE_TOKEN = "token-of-the-tests"
_numbers = count()


def ask(url: str, method: str, path: str, body: bytes = b"", headers: Any = None) -> Any:
    """Send a request; returns status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


@dataclass(frozen=True)
class Emulator:
    """A store and the environment of its users."""

    scheme: str
    url: str
    environment: dict[str, str]
    secret: str
    """The key of its users."""
    is_shared = False

    def new_bucket(self) -> Address:
        """Make an empty bucket."""
        name = f"test-{os.getpid()}-{next(_numbers)}"
        if self.scheme == "gs":
            body = json.dumps({"name": name}).encode()
            upstream = os.environ["GRADPROJ_TEST_GOOGLE"]
            status, _, answer = ask(upstream, "POST", "/storage/v1/b?project=tests", body)
        else:
            status, _, answer = ask(self.url, "PUT", *_new_container(name))
        assert status in (200, 201), answer
        return Address(self.scheme, name)


def _new_container(name: str) -> tuple[str, bytes, dict[str, str]]:
    """Return a signed request, by Azure's rules for a shared key."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    what = f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{name}\nrestype:container"
    text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{what}"
    digest = hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()
    signature = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": signature}
    return f"/{AZURE_ACCOUNT}/{name}?restype=container", b"", headers


@contextmanager
def emulator() -> Iterator[Emulator | None]:
    """Yield the emulator that the environment names, or None."""
    azure, google = (os.environ.get(f"GRADPROJ_TEST_{name}", "") for name in ("AZURE", "GOOGLE"))
    if azure:
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"{azure}/{AZURE_ACCOUNT}",
        }
        yield Emulator("az", azure, environment, AZURE_KEY)
    elif google:
        with _google_front(google) as url:
            environment = {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": GOOGLE_TOKEN}
            yield Emulator("gs", url, environment, GOOGLE_TOKEN)
    else:
        yield None


class _Front(BaseHTTPRequestHandler):
    """Adds to fake-gcs-server what it lacks of Google's XML interface: writes, conditions of reads.

    Writes become uploads of its JSON interface, which knows generations. One request at a time, so
    that a condition is of what is read.
    """

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, True).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        with self.server.lock:
            answer = self._answer(bucket, key, query, body)
        self._reply(*answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _answer(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> Any:
        uploads, upload = self.server.uploads, query.get("uploadId", "")
        if self.command == "POST" and "uploads" in query:
            uploads[str(len(uploads))] = {}
            kind, number = "InitiateMultipartUploadResult", len(uploads) - 1
            return 200, {}, f"<{kind}><UploadId>{number}</UploadId></{kind}>".encode()
        if self.command == "PUT" and upload:
            uploads[upload][int(query["partNumber"])] = body
            return 200, {"ETag": f'"{len(body)}"'}, b""
        if self.command == "POST" and upload:
            whole = b"".join(part for _, part in sorted(uploads[upload].items()))
            status, headers, answer = self._upload(bucket, key, whole)
            kind, etag = "CompleteMultipartUploadResult", headers.get("ETag", "")
            return status, headers, answer or f"<{kind}><ETag>{etag}</ETag></{kind}>".encode()
        if self.command == "PUT":
            return self._upload(bucket, key, body)
        return self._read(bucket)

    def _upload(self, bucket: str, key: str, body: bytes) -> Any:
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
        generation = self.headers.get("x-goog-if-generation-match")
        if generation is not None:
            path += f"&ifGenerationMatch={generation}"
        about, kind = json.dumps({"name": key}).encode(), b"Content-Type: application/"
        lines = [b"--part", kind + b"json\r\n", about]
        lines += [b"--part", kind + b"octet-stream\r\n", body, b"--part--", b""]
        form = b"\r\n".join(lines)
        headers = {"Content-Type": "multipart/related; boundary=part"}
        status, _, answer = ask(self.server.upstream, "POST", path, form, headers)
        if status != 200:
            code = {404: "NoSuchBucket", 412: "PreconditionFailed"}.get(status, "Other")
            return status, {}, f"<Error><Code>{code}</Code></Error>".encode()
        made = json.loads(answer)
        return 200, {"ETag": f'"{made["etag"]}"', "x-goog-generation": made["generation"]}, b""

    def _read(self, bucket: str) -> Any:
        wanted, known = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        sent = {name: value for name, value in self.headers.items() if name.lower() == "range"}
        upstream = self.server.upstream
        if wanted or known:
            status, headers, _ = ask(upstream, "HEAD", self.path)
            etag = headers.get("Etag")
            if status == 200 and wanted not in (None, etag):
                return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
            if status == 200 and known == etag:
                return 304, {"ETag": etag}, b""
        status, headers, answer = ask(upstream, self.command, self.path, b"", sent)
        if status >= 400 and ask(upstream, "GET", f"/storage/v1/b/{bucket}")[0] == 404:
            status, answer = 404, b"<Error><Code>NoSuchBucket</Code></Error>"
        dropped = ("date", "transfer-encoding", "connection")
        headers = {name: value for name, value in headers.items() if name.lower() not in dropped}
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(answer))
        return status, headers, answer

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, quote(value, safe=" !\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    upstream: str
    lock: threading.Lock
    uploads: dict[str, dict[int, bytes]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up; standard error is what tests look at."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def _google_front(upstream: str) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), _Front)
    server.upstream, server.lock, server.uploads = upstream, threading.Lock(), {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
