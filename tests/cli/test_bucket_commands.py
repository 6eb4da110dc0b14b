"""Commands that read a job's output give the same answers from a bucket."""

import json
import pickle
import re

import numpy as np
import pytest
import xarray as xr
from helpers.query_command import TEXT

from gradproj.__main__ import main
from gradproj.storage.cache import FileCache
from gradproj.storage.object_path import READING, path_of
from gradproj.store import ProjectionStore

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
    "verify recomputed": ["--recompute", "2", "--device", "cpu"],
    "merge": [],
    "export": ["--to", "FOLDER"],
    "select": ["--text", TEXT, "--top", "3", "--to", "FOLDER/tars", "--device", "cpu"],
    "text": [],
    "curvature": ["--device", "cpu", "--curvature_tokens", "64"],
    "query rescored": ["--text", TEXT, "--device", "cpu", "--rescore", "5"],
    "report": ["--device", "cpu"],
}
"""In this order: later ones need the files of earlier ones."""
MEASURED = re.compile(r"(in )?[\d.]+ s\b( \(\S+ MB/s\))?|[\d.]+ [kMG]?B( of memory|; open)")


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
def test_a_command_says_the_same_of_an_output_in_a_bucket(places, name, tmp_path, capsys):
    answers = []
    for number, place in enumerate(places):
        folder = tmp_path / str(number)
        flags = [flag.replace("FOLDER", str(folder)) for flag in COMMANDS[name]]
        code = main([name.split()[0], str(place), *flags])
        printed = capsys.readouterr()
        shown = printed.out.replace(str(place), "OUTPUT").replace(str(folder), "FOLDER")
        lines = MEASURED.sub("", shown).splitlines()
        answers.append((code, lines, written(folder, place), "Traceback" in printed.err))
    (code, lines, files, failed), (other_code, other_lines, other_files, other_failed) = answers
    assert not failed
    assert not other_failed
    assert other_code == code, printed.err
    for line, other in zip(lines, other_lines, strict=True):
        assert other == line
    assert other_files == files
    assert bool(files) == ("--to" in COMMANDS[name])


def written(folder, place):
    """Return the files that a command has written, by their names."""
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(place).encode(), b"OUTPUT")
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_store_in_a_bucket_is_pickled_and_opened_by_xarray(places, s3_server):
    local, remote = (ProjectionStore(place) for place in places)
    packed = pickle.dumps(remote)
    assert s3_server.secret.encode() not in packed
    ids = range(len(local))
    np.testing.assert_array_equal(pickle.loads(packed).rows(ids), local.rows(ids))
    want = local.to_xarray()
    opened = xr.open_dataset(str(places[1]), engine="gradproj", chunks={})
    for dataset in (remote.to_xarray(), opened, pickle.loads(pickle.dumps(opened))):
        xr.testing.assert_identical(dataset.compute(), want.compute())
        name = remote.layers[1].name
        part = dataset.rows.sel(layer=name).compute()
        np.testing.assert_array_equal(part, local.layer(name)[:].reshape(len(local), -1))


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


@pytest.mark.parametrize("name", ["status", "text", "copy"])
def test_an_output_in_a_public_bucket_is_read_without_credentials(
    places, s3_module, reading, name, tmp_path, monkeypatch, capsys
):
    if places[1].scheme != "s3":
        pytest.skip("the bucket is made public as in S3")
    bucket = places[1].bucket
    statement = {"Effect": "Allow", "Principal": "*", "Action": "s3:*"}
    statement["Resource"] = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    s3_module.client.put_bucket_policy(Bucket=bucket, Policy=policy)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # and no ~/.aws
    line = [name, str(places[1]), *([str(tmp_path / "copied")] if name == "copy" else [])]
    assert main(line) == 2
    assert "credentials" in capsys.readouterr().err
    assert main([*line, "--anonymous"]) == 0
    assert capsys.readouterr().out
