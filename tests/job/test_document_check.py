"""A corpus of which no document can be used is refused, and a store without a row is no success."""

import gzip
import json

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents, write_tar
from helpers.jobs import SMALL_JOB, flags, run_job
from helpers.models import make_model

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.errors import CorpusError
from gradproj.job.config import run_config
from gradproj.job.plan import make_plan
from gradproj.job.summary import plan_lines, stats_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model")


def plan_of(model, shards, output, **changes):
    settings = {"shards": shards, "model": model, "output_dir": output, **changes}
    return make_plan(run_config(flags(**settings), "plan"), progress=False)


def test_corpus_without_a_usable_document_is_refused_with_the_first_reason(model, tmp_path):
    (tmp_path / "tars").mkdir()
    members = [(f"k{i}.txt.gz", gzip.compress(b"hello")) for i in range(8)]
    write_tar(tmp_path / "tars" / "a.tar", members)
    with pytest.raises(CorpusError) as caught:
        plan_of(model, tmp_path / "tars", tmp_path / "out")
    assert "none of 8 documents read all over the corpus can be used: sample 0 (k0 in " in str(
        caught.value
    )
    assert "no text: it has no .json, .txt or .npy, only .txt.gz" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_corpus_whose_ends_alone_are_bad_is_planned_with_a_note(model, tmp_path):
    (tmp_path / "tars").mkdir()
    members = [
        (f"{i}.json", b'{"text": "A good text."}' if 2 <= i < 62 else b"{") for i in range(64)
    ]
    write_tar(tmp_path / "tars" / "a.tar", members)
    notes = plan_of(model, tmp_path / "tars", tmp_path / "out").notes
    assert len(notes) == 1
    assert notes[0].startswith("bad input     all 4 documents read of ")


def test_texts_of_tokens_beyond_the_vocabulary_are_bad_input_with_their_reason(model, tmp_path):
    small = make_model(tmp_path / "small", vocab_size=20)
    corpus = make_corpus(tmp_path / "tars", [{"text": "~~~"}] * 5)
    with pytest.raises(CorpusError, match=r"sample 0 .*token id \d+; the model has ids from 0"):
        plan_of(small, corpus, tmp_path / "out", tokenizer=model)


def test_kind_of_tar_without_a_usable_document_is_named_in_the_plan(model, tmp_path):
    make_corpus(tmp_path / "tars", mixed_documents(80))
    for i in range(3):
        write_tar(tmp_path / "tars" / f"x{i}.tar", [(f"{i}{j}.md", b"x") for j in range(5)])
    text = "\n".join(plan_lines(plan_of(model, tmp_path / "tars", tmp_path / "out"), 0))
    assert "bad input     all 12 documents read of x0.tar and 2 tars like it: sample 80 (00" in text
    assert "not read      15 of 95 members of the tars: 15 .md; such as 00.md." in text
    assert "bad input     15 documents without a .json, a .txt or a .npy" in text


def test_domain_field_that_matches_nowhere_is_named_in_the_plan(model, tmp_path):
    corpus = make_corpus(tmp_path / "tars", mixed_documents(5))
    plan = plan_of(model, corpus, tmp_path / "out", domain_field="meta.source")
    assert plan.notes == (
        "domains       no document names a domain in the field meta.source (--domain_field)",
    )
    assert plan_of(model, corpus, tmp_path / "out").notes == ()


def test_line_of_bad_input_is_the_last_so_that_the_first_one_follows_it():
    lines = stats_lines(
        {
            "n_samples": 3,
            "by_status": {"ok": 2, "bad_input": 1},
            "timing": {"tokens": 9, "rank_seconds": 1.0, "tokens_per_rank_second": 9.0},
            "all": {"loss": 3.0},
        }
    )
    assert [line.split()[0] for line in lines] == ["rows", "computed", "loss", "bad"]


def test_store_without_a_row_is_no_success(model, tmp_path, capsys):
    corpus = make_corpus(tmp_path / "tars", [{"text": ""}, {"text": ""}, {"input_ids": [10**6]}])
    settings = {**SMALL_JOB, "shards": corpus, "model": model, "output_dir": tmp_path / "out"}
    done = run_job(1, 2, **settings)
    assert "3: 2 empty, 1 bad_input" in done.stdout
    assert "the first: sample 2 (000000000002): token id 1000000; the model has " in done.stdout
    assert "The store is complete" not in done.stdout
    assert "every unit was computed, and no document has a row" in done.stderr
    for command in (["query", "--text", "a"], ["domains"]):
        assert main([command[0], str(tmp_path / "out"), *command[1:]]) == 2
        message = capsys.readouterr().err
        assert "is complete and has no row, of 3 documents: 2 empty, 1 bad_input" in message
        assert "start the job again" not in message


def test_member_name_that_is_not_utf8_keeps_its_bytes_in_store_log_and_answers(
    model, tmp_path, capsys
):
    (tmp_path / "tars").mkdir()
    members = [(f"na\udcefve{i}.json", json.dumps({"text": "a cat"}).encode()) for i in range(3)]
    members.append(("b\udcef.json", b"{"))
    write_tar(tmp_path / "tars" / "a.tar", members)
    settings = {**SMALL_JOB, "shards": tmp_path / "tars", "model": model}
    done = run_job(1, 0, **settings, output_dir=tmp_path / "out")
    assert r"sample 3 (b\xef): invalid JSON" in done.stdout
    assert r"sample 3 (b\xef): bad input" in (tmp_path / "out/logs/rank-00000.log").read_text()
    store = ProjectionStore(tmp_path / "out")
    keys = np.ascontiguousarray(store.array("key"))
    assert keys[1].tobytes().rstrip(b"\0") == b"na\xefve1"
    assert store.samples([1])[0].key.encode("utf-8", "surrogateescape") == b"na\xefve1"
    arguments = ["query", str(tmp_path / "out"), "--text", "a cat", "--device", "cpu"]
    assert main([*arguments, "--format", "jsonl"]) == 0
    found = {json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()}
    assert found == {rf"na\xefve{i}" for i in range(3)}
    assert main(arguments) == 0
    assert r"na\xefve1" in capsys.readouterr().out
