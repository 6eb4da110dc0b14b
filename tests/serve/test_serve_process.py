"""`gradproj serve` as a process: its token, its end, and a kill in the middle of an answer."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from helpers.outputs import tree_of
from helpers.query_command import TEXT

from gradproj.__main__ import main
from gradproj.cli.serve.command import TOKEN_VARIABLE, ServeConfig, shown_host
from gradproj.errors import ConfigError


def start(output):
    """Return the process, its port and its token."""
    flags = ["--device", "cpu", "--port", "0", "--token", "auto"]
    command = [sys.executable, "-m", "gradproj", "serve", str(output), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    port, token = re.search(r"http://127\.0\.0\.1:(\d+)/#token=(\S+)", line).groups()
    return process, int(port), token


def asked(port, token):
    """Return the response to a question whose answer takes a file without a name."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    question = {"text": TEXT, "score": "kfac+text", "top_k": 3}
    connection.request("POST", "/api/query", json.dumps(question), headers)
    return connection.getresponse()


def test_a_kill_in_the_middle_of_an_answer_leaves_nothing_behind(output):
    process, port, token = start(output)
    try:
        assert asked(port, "another").status == 401
        events = [json.loads(line) for line in asked(port, token).read().splitlines()]
        assert events[-1]["event"] == "answer"
        before = tree_of(output)
        response = asked(port, token)
        assert json.loads(response.readline())["event"] in ("asked", "progress", "queued")
        process.kill()
        process.wait(60)
        assert tree_of(output) == before
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_ends_it_with_one_line(output):
    process, _, _ = start(output)
    try:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"token": "short"}, "--token has fewer than 16 characters"),
        ({"token": "sixteen letters, ü"}, "not ASCII"),
        ({"others": ("other",), "model": "m"}, "leave --model out"),
        ({"max_scans": 0}, "--max_scans"),
        ({"time_limit_s": 0}, "--time_limit_s"),
    ],
)
def test_a_wrong_flag_is_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(output="out", **flags)


def test_a_token_of_the_environment_is_used_and_checked(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "of the environment".replace(" ", "-"))
    assert ServeConfig(output="out").given_token == "of-the-environment"
    assert ServeConfig(output="out", token="auto").given_token == "auto"
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match=f"{TOKEN_VARIABLE} has fewer than 16"):
        ServeConfig(output="out")


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("box.example", "box.example"),
     ("0.0.0.0", socket.gethostname()), ("::", socket.gethostname())],
)  # fmt: skip
def test_the_printed_address_is_one_that_a_browser_can_open(host, shown):
    assert shown_host(host) == shown


def test_an_output_without_a_store_and_a_taken_port_are_mistakes(job, tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "is not a gradproj store" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(job.output), "--device", "cpu", "--port", port]) == 2
    assert "cannot be listened at" in capsys.readouterr().err
