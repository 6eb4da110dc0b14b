"""``prepare`` from and to addresses: the bytes of the disk, and no half corpus."""

from contextlib import ExitStack

import pytest
from helpers.corpora import COMPRESS, input_record, run_prepare, write_as
from helpers.http_files import http_files
from helpers.token_corpora import write_datatrove

from gradproj.corpus.index import build_index
from gradproj.corpus.tar.paths import UNFINISHED_NAME, list_tars
from gradproj.corpus.tar.remote_writer import tars_published
from gradproj.errors import ConfigError, CorpusError, StoreError
from gradproj.storage.listing import list_folder
from gradproj.storage.object_path import object_at

RECORDS = [input_record(f"text {i} " * 50, f"domain {i % 3}") for i in range(50)]


@pytest.fixture
def source(tmp_path):
    return write_as(".jsonl", tmp_path / "in", RECORDS)


def names_of(folder):
    return [address.name for address in list_folder(folder)]


@pytest.mark.parametrize("settings", [{}, {"group_by_domain": True}], ids=str)
def test_tars_in_a_bucket_have_the_bytes_of_those_on_disk(settings, source, bucket, tmp_path):
    settings = {"samples_per_shard": 20, **settings}
    run_prepare(source, tmp_path / "out", **settings)
    report = run_prepare(source, bucket / "out", **settings)
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert report.n_tars == len(local)
    assert names_of(bucket / "out") == sorted(local)
    assert {a.name: object_at(a).read_bytes() for a in list_folder(bucket / "out")} == local
    with pytest.raises(StoreError, match=r"has \d tars already \(shard-000000\.tar\); prepare nei"):
        run_prepare(source, bucket / "out")


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".json.gz", ".parquet", ".arrow"])
def test_remote_inputs_give_the_documents_of_local_ones(kind, tmp_path):
    path = write_as(kind, tmp_path / "in", RECORDS)
    run_prepare([path, path], tmp_path / "local")
    with open(path, "rb") as file, http_files(files={f"/f/in{kind}": file.read()}) as site:
        address = f"{site.url}/f/in{kind}"
        run_prepare([address, path], tmp_path / "remote")
        assert len(site.gets()) == 1
        site.faults.append(("cut", 200))
        run_prepare([address, address], tmp_path / "cut")
        with pytest.raises(CorpusError, match=r"INPUT http://.*/f/no\.jsonl: no such file"):
            run_prepare(f"{site.url}/f/no.jsonl", tmp_path / "none")
    want = [path.read_bytes() for path in sorted((tmp_path / "local").iterdir())]
    for name in ("remote", "cut"):
        assert [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] == want


def test_files_that_belong_together_are_fetched_together(tmp_path):
    write_datatrove(tmp_path / "x.ds", [[1, 2, 3], [4, 5]])
    files = {f"/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) > 1
    run_prepare(str(tmp_path / "x.ds"), tmp_path / "local")
    with http_files(files=files) as site:
        run_prepare(f"{site.url}/x.ds", tmp_path / "remote")
    for name in ("local", "remote"):
        (tar,) = (tmp_path / name).iterdir()
        files[name] = tar.read_bytes()
    assert files["local"] == files["remote"]


def test_messages_name_the_address_and_the_line(tmp_path):
    content = COMPRESS[".zst"](b'{"text": "a"}\nno JSON\n')
    with http_files(files={"/in.jsonl.zst": content, "/in.parquet": b"PAR1"}) as site:
        with pytest.raises(CorpusError, match=rf"{site.url}/in\.jsonl\.zst, line 2: not v"):
            run_prepare(f"{site.url}/in.jsonl.zst", tmp_path / "out")
        with pytest.raises(CorpusError, match=rf"{site.url}/in\.parquet") as error:
            run_prepare(f"{site.url}/in.parquet", tmp_path / "out")
        assert "gradproj-input" not in str(error.value)


def test_half_a_corpus_in_a_bucket_is_never_taken_for_a_whole(source, bucket, tmp_path):
    folder = bucket / "out"
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(KeyboardInterrupt))
        work, at_end = stack.enter_context(tars_published(str(folder)))
        (work / "tars" / "shard-000000.tar").write_bytes(b"content")
        at_end(work / "tars" / "shard-000000.tar")
        assert names_of(folder) == ["shard-000000.tar", UNFINISHED_NAME]
        kept = object_at(folder / UNFINISHED_NAME).read_bytes()
        for read in (lambda: list_tars(str(folder)), lambda: build_index([folder / "x.tar"])):
            with pytest.raises(CorpusError, match="its tars are not all there: a prepare still"):
                read()
        with pytest.raises(StoreError, match="a prepare that was killed left tars there, or one"):
            run_prepare(source, folder)
        raise KeyboardInterrupt
    assert names_of(folder) == []  # an error, or Ctrl-C, cleans up
    object_at(folder / UNFINISHED_NAME).put([kept])  # as a killed one leaves it
    with pytest.raises(StoreError, match="delete the folder, or give a new one"):
        run_prepare(source, folder)
    object_at(folder / UNFINISHED_NAME).delete()
    with pytest.raises(CorpusError, match="no document in"):
        run_prepare(write_as(".jsonl", tmp_path / "empty", []), folder)
    assert names_of(folder) == []


def test_a_web_server_takes_no_tars(source):
    with pytest.raises((StoreError, ConfigError), match="https://host/out"):
        run_prepare(source, "https://host/out")
