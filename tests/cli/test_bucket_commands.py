"""Commands that read a job's output give the same answers from a bucket."""

import re

import pytest
from helpers.query_command import TEXT

from gradproj.__main__ import main
from gradproj.storage.cache import FileCache
from gradproj.storage.object_path import READING, path_of

COMMANDS = {
    "query": ["--text", TEXT, "--device", "cpu"],
    "query jsonl": ["--text", TEXT, "--device", "cpu", "--format", "jsonl"],
    "query ekfac": ["--text", TEXT, "--device", "cpu", "--score", "relatif", "--show_text"],
    "query tokens": ["--text", TEXT, "--device", "cpu", "--tokens", "--top_k", "2"],
    "query by text": ["--text", TEXT, "--device", "cpu", "--score", "kfac+text"],
    "query by groups": ["--text", TEXT, "--device", "cpu", "--by", "meta.pile_set_name"],
    "domains": ["--device", "cpu"],
    "status": ["--json"],
    "verify": [],
    "text": [],
    "curvature": ["--device", "cpu", "--curvature_tokens", "64"],
    "query rescored": ["--text", TEXT, "--device", "cpu", "--rescore", "5"],
    "report": ["--device", "cpu"],
}
"""In this order: later ones need the files of earlier ones."""
MEASURED = re.compile(r"(in )?\d+(\.\d+)? s\b( \(\S+ MB/s\))?|\d+(\.\d+)? [kMG]?B of memory")


@pytest.fixture(scope="module")
def places(job, s3_module, tmp_path_factory):
    """The finished job's output on disk and in a bucket."""
    from helpers.buckets import copy_into
    from helpers.outputs import copy_of

    local = copy_of(job.output, tmp_path_factory.mktemp("local"))
    return local, copy_into(local, path_of(f"{s3_module.new_bucket()}/runs/out"))


@pytest.fixture(scope="module")
def s3_module(s3_server):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        yield s3_server


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_the_same_of_an_output_in_a_bucket(places, name, capsys):
    answers = []
    for place in places:
        code = main([name.split()[0], str(place), *COMMANDS[name]])
        printed = capsys.readouterr()
        lines = MEASURED.sub("", printed.out.replace(str(place), "OUTPUT")).splitlines()
        answers.append((code, lines, "Traceback" in printed.err))
    (code, lines, failed), (other_code, other_lines, other_failed) = answers
    assert not failed
    assert not other_failed
    assert other_code == code, printed.err
    for line, other in zip(lines, other_lines, strict=True):
        assert other == line


@pytest.fixture
def reading(monkeypatch):
    """Restores how this process reads."""
    monkeypatch.setattr(READING, "anonymous", False)
    monkeypatch.setattr(READING, "cache", None)


def test_a_second_query_reads_shards_and_columns_from_the_cache(
    places, reading, tmp_path, monkeypatch, capsys
):
    fetched, fetch = [], FileCache._fetch
    monkeypatch.setattr(
        FileCache, "_fetch", lambda *args: fetched.append(str(args[1])) or fetch(*args)
    )
    flags = ["--text", TEXT, "--device", "cpu", "--score", "cosine", "--format", "jsonl"]
    cached = ["--cache_dir", str(tmp_path / "c")]
    answers, counts = [], []
    for place, more in ((places[0], []), (places[1], cached), (places[1], cached)):
        assert main(["query", str(place), *flags, *more]) == 0
        answers.append(capsys.readouterr().out)
        counts.append(len(fetched))
    assert answers[1:] == 2 * answers[:1]
    # Two threads may ask for the same shard, and one of them then finds it there.
    assert len({name for name in fetched if "/projections/c." in name}) == 5
    assert counts[2] == counts[1] > counts[0] == 0
    monkeypatch.setattr(READING, "cache", None)
    assert main(["verify", str(places[1]), "--cache_dir", str(tmp_path / "c")]) == 2
    assert "verify reads the bucket itself" in capsys.readouterr().err


def test_a_server_answers_the_same_from_a_bucket(places):
    pytest.importorskip("starlette")
    from helpers.asgi import Client

    from gradproj.cli.serve.command import ServeConfig, explorers_of
    from gradproj.serve.app import Access, Server
    from gradproj.serve.scans import ScanQueue

    config = ServeConfig(output=str(places[0]), others=(str(places[1]),), device="cpu")
    client = Client(Server(explorers_of(config), ScanQueue(2, 8, 600)).app(Access()))
    question = {"text": TEXT, "tokens": True, "top_k": 2, "text_matches": True, "show_text": True}
    one, other = (
        client.events("/api/query", {**question, "output": number})[-1] for number in (0, 1)
    )
    assert one["hits"]
    assert other["hits"] == one["hits"]
    for view in ("overview", "map"):
        found = [client.events(f"/api/outputs/{n}/{view}")[-1][view] for n in (0, 1)]
        assert found[0] == found[1]
    for view in ("documents/3", "status"):
        assert client.get(f"/api/outputs/1/{view}")[0] == 200


def test_scores_of_several_outputs_are_summed_wherever_they_lie(places, capsys):
    local, bucket = map(str, places)
    answers, flags = [], ["--text", TEXT, "--device", "cpu", "--format", "jsonl"]
    for outputs in ((bucket, local), (local, bucket)):
        assert main(["query", *outputs, *flags]) == 0, capsys.readouterr().err
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_a_query_store_may_lie_in_a_bucket(places, reading, capsys):
    answers = []
    for place in places:
        assert main(["query", str(places[0]), "--query_store", str(place), "--device", "cpu"]) == 0
        answers.append(MEASURED.sub("", capsys.readouterr().out.replace(str(place), "OUTPUT")))
    assert answers[1].splitlines()[1:] == answers[0].splitlines()[1:]


def test_a_cache_without_room_is_one_line(places, reading, tmp_path, capsys):
    flags = ["--text", TEXT, "--device", "cpu", "--cache_dir", str(tmp_path), "--cache_gb", "1e-7"]
    assert main(["query", str(places[1]), *flags]) == 2
    assert "give a larger --cache_gb" in capsys.readouterr().err
