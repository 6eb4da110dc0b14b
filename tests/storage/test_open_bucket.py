"""The client of remote stores: credentials, retries, and errors in one line without a secret."""

import re
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import obstore
import pytest
from helpers.http_files import http_files

from gradproj.errors import ConfigError, CorpusError, StoreError
from gradproj.storage import retry
from gradproj.storage.address import Address
from gradproj.storage.bucket import open_bucket
from gradproj.storage.failures import explained, reason_of
from gradproj.storage.object_path import object_at
from gradproj.storage.retry import RetryPolicy, retried
from gradproj.storage.stored_object import StoredObject

FAST = RetryPolicy(first_s=0.01, longest_s=0.05, deadline_s=30.0, tries=4, stall_s=1.0)


def fault_of(action):
    with pytest.raises(Exception) as error:
        action()
    return reason_of(error.value)


def test_an_object_comes_back_and_conditions_are_enforced(bucket):
    store, key = open_bucket(bucket / "a b#%20.txt")
    etag = obstore.put(store, key, b"content", mode="create")["e_tag"]
    assert obstore.get(store, key, options={"if_match": etag}).bytes() == b"content"
    assert fault_of(lambda: obstore.put(store, key, b"x", mode="create")) == "exists"
    assert fault_of(lambda: obstore.get(store, key, options={"if_match": '"0"'})) == "changed"
    assert fault_of(lambda: obstore.get(store, "absent")) == "missing"
    absent = bucket / "absent"
    with (
        pytest.raises(CorpusError, match="there is no such") as error,
        explained(absent, CorpusError),
    ):
        obstore.get(store, "absent")
    assert str(error.value).startswith(f"{absent}: ")
    assert "\n" not in str(error.value)


def test_a_missing_bucket_is_told_from_a_missing_object(bucket):
    store, _ = open_bucket(Address(bucket.scheme, "there-is-no-such-bucket"))
    assert fault_of(lambda: obstore.get(store, "x")) == "no bucket"
    assert fault_of(lambda: obstore.list(store).collect()) == "no bucket"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (403, "<Error><Code>AccessDenied</Code></Error>", "denied"),
        (403, "<Error><Code>InvalidAccessKeyId</Code></Error>", "credentials"),
        (403, "<Error><Code>SignatureDoesNotMatch</Code></Error>", "credentials"),
        (400, "<Error><Code>ExpiredToken</Code></Error>", "expired"),
        (403, "", "denied"),
        (401, "", "credentials"),
        (301, "<Error><Code>PermanentRedirect</Code></Error>", "region"),
        (409, "", "conflict"),
        (409, "<Error><Code>BlobAlreadyExists</Code></Error>", "exists"),
        (503, "<Error><Code>SlowDown</Code></Error>", "unavailable"),
        (500, "", "unavailable"),
        (429, "", "unavailable"),
        (400, "", "other"),
    ],
)
def test_an_answer_has_its_reason_and_a_line_that_shows_nothing_of_it(
    status, body, reason, monkeypatch
):
    secret = "what-a-server-says"
    with http_files() as site:
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        site.faults.extend([(status, f"{body}<Message>{secret}</Message>".encode())] * 9)
        address = Address("s3", "bucket", "x")
        store, key = open_bucket(address, policy=FAST)
        assert fault_of(lambda: obstore.get(store, key)) == reason
        with pytest.raises(StoreError, match="s3://bucket/x: ") as error, explained(address):
            obstore.get(store, key)
    assert secret not in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value.__cause__) == "None"


@pytest.mark.parametrize(
    "fault", [500, 503, 429, ("cut", 400_000), ("stall", 400_000, 3.0), ("cut", 0)], ids=str
)
def test_a_request_is_repeated_until_it_succeeds(fault):
    content = bytes(range(256)) * 4096
    with http_files(files={"/a.tar": content}) as site:
        site.faults.append(fault)
        store, key = open_bucket(Address.parse(f"{site.url}/a.tar"), policy=FAST)
        got = obstore.get(store, key, options={"range": (1000, 1_000_000)}).bytes()
        assert got == content[1000:1_000_000]
        assert len(site.gets()) == 2


@contextmanager
def slow_receiver(bytes_per_s):
    """A server that takes the bodies of requests slowly, and then answers 200; yields its URL."""

    def receive(connection):
        with connection, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(2**16)
            head, _, body = data.partition(b"\r\n\r\n")
            left = int(re.search(rb"content-length: (\d+)", head.lower())[1]) - len(body)
            while left:
                n_bytes = len(connection.recv(2**18))
                left = left - n_bytes if n_bytes else 0
                time.sleep(n_bytes / bytes_per_s)
            connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 0\r\n\r\n')

    def accept():
        with suppress(OSError):
            while True:
                threading.Thread(target=receive, args=server.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30.0)
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_large_body_may_take_longer_to_send_than_a_stall(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    address = Address("s3", "bucket", "x")
    with slow_receiver(bytes_per_s=8e6) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = open_bucket(address, policy=replace(FAST, stall_s=0.5, tries=1))[0]
        assert StoredObject(store, address).put_if_absent([bytes(12_000_000)])


def test_retries_end_at_the_deadline_and_other_errors_end_them_at_once():
    class Conflict(Exception):
        """An error of obstore's kind."""

    Conflict.__module__ = "obstore.exceptions"
    calls, slept = [], []

    def fails(text, n):
        calls.append(text)
        if len(calls) <= n:
            raise Conflict(text)
        return "done"

    def run(text, n):
        calls.clear()
        return retried(lambda: fails(text, n), Address("s3", "b"), FAST, sleep=slept.append)

    provider = "External AWS credential provider: "
    assert reason_of(Conflict(provider + "UnauthorizedSSOTokenError: secret")) == "expired"
    assert reason_of(Conflict(provider + "ConnectTimeoutError: x")) == "unavailable"
    assert reason_of(Conflict("performing token request: status code: 403")) == "credentials"
    assert run("status code: 409 Conflict", 3) == "done"
    assert len(slept) == 3
    assert 0 <= max(slept) <= FAST.longest_s
    with pytest.raises(Conflict):
        run("status code: 409 Conflict", 99)
    assert len(calls) == FAST.tries
    with pytest.raises(Conflict):
        run("status code: 400 Bad Request", 1)
    assert len(calls) == 1


def test_a_profile_of_the_credentials_file_opens_a_bucket(bucket, s3_server, tmp_path, monkeypatch):
    if bucket.scheme != "s3":
        pytest.skip("profiles are Amazon's")
    env = s3_server.environment
    (tmp_path / "credentials").write_text(
        f"[other]\naws_access_key_id = {env['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {env['AWS_SECRET_ACCESS_KEY']}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(ConfigError, match="no AWS credentials were found; set AWS_PROFILE"):
        open_bucket(bucket)
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(ConfigError, match=r"profile or login cannot be used \(ProfileNotFound\)"):
        open_bucket(bucket)
    monkeypatch.setenv("AWS_PROFILE", "other")
    store, _ = open_bucket(bucket)
    obstore.put(store, "x", b"1")
    assert obstore.get(store, "x").bytes() == b"1"


def test_anonymous_requests_carry_no_signature(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with http_files(files={"/bucket/x": b"1"}) as site:
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
        for anonymous in (True, False):
            store, key = open_bucket(Address("s3", "bucket", "x"), anonymous=anonymous)
            obstore.get(store, key).bytes()
        headers = [{name.lower() for name in request.headers} for request in site.requests]
    assert ["authorization" in names for names in headers] == [False, True]


@pytest.mark.parametrize("anonymous", [True, False])
def test_buckets_of_google_and_azure_open_with_what_names_them(anonymous, monkeypatch, tmp_path):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    google, azure = Address.parse("gs://bucket/x"), Address.parse("az://container/x")
    assert open_bucket(google, anonymous=anonymous)[1] == "x"
    with pytest.raises(ConfigError, match="az://container: set AZURE_STORAGE_ACCOUNT_NAME"):
        open_bucket(azure, anonymous=anonymous)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    assert open_bucket(azure, anonymous=anonymous)[1] == "x"
    with pytest.raises(ConfigError, match="GOOGLE_APPLICATION_CREDENTIALS names no file"):
        open_bucket(google, anonymous=anonymous)


@pytest.fixture
def unreachable(monkeypatch):
    """Addresses whose servers are not there: nobody listens, or there is no such host."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(retry, "_SEEN", retry._Seen())
    return [Address("s3", "bucket", "x"), Address("http", "no-such-host.invalid", "x")]


def test_a_store_that_no_request_has_reached_is_given_up_soon(unreachable, monkeypatch, capsys):
    monkeypatch.setattr(retry, "FIRST_S", 0.2)
    for address in unreachable:
        with pytest.raises(StoreError, match=r"cannot be reached \(no connection\)") as error:
            object_at(address, StoreError).read_bytes()
        assert str(error.value).startswith(f"{address}: ")
    assert capsys.readouterr().err == ""


def test_after_one_request_was_given_up_the_others_are_at_once(unreachable, monkeypatch):
    pauses = []

    def ask():
        with pytest.raises(ConnectionError):
            retried(
                lambda: (_ for _ in ()).throw(ConnectionError()),
                unreachable[0],
                meaning=lambda error: "unreachable",
                policy=retry.RetryPolicy(tries=20),
                sleep=lambda seconds: (pauses.append(seconds), time.sleep(0.02)),
            )
        return len(pauses)

    monkeypatch.setattr(retry, "FIRST_S", 0.01)
    assert ask() == ask() == 1
    monkeypatch.setenv("SLURM_JOB_ID", "70")  # nobody is there to correct an address
    assert ask() > 10


def test_a_later_outage_is_waited_for_and_told_once(unreachable, monkeypatch, capsys):
    monkeypatch.setattr(retry, "NOTICE_S", 0.0)

    def asks(n_failures):
        left = [ConnectionError()] * n_failures
        return retried(
            lambda: left and (_ for _ in ()).throw(left.pop()),
            unreachable[0],
            meaning=lambda error: "unreachable",
            sleep=lambda seconds: None,
        )

    asks(0)
    for n_outages in (1, 2):
        asks(20)
        err = capsys.readouterr().err
        assert err.startswith("gradproj: s3://bucket cannot be reached, or is too busy; waiting")
        assert (err.count("\n"), n_outages) == (1, n_outages)


def test_without_obstore_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"needs the package obstore: pip install 'gradproj\[cl"):
        open_bucket(Address("s3", "bucket", "x"))
