"""``gradproj select``: compared with the scores that ``query --save_scores`` writes."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.corpora import mixed_documents, read_back
from helpers.forked_ranks import run_forked
from helpers.outputs import EMPTY, N_SAMPLES, ONE_TOKEN
from helpers.query_command import TEXT, write_queries

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.analysis import Preconditioner
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.stream import Members
from gradproj.corpus.tokenization import Tokenization
from gradproj.job.recorded import config_from, recorded_index
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import QueryProjector, read_queries
from gradproj.selection.writing import json_line, own_fields, with_fields

QUERIES = ("--queries", "{folder}/q.jsonl", "--text", "")


@pytest.fixture
def select(job, capsys):
    """Run the command on the finished job; return its lines and its notes."""

    def run(*words, code=0):
        capsys.readouterr()
        exit_code = main(["select", str(job.output), "--device", "cpu", *map(str, words)])
        printed = capsys.readouterr()
        assert exit_code == code, printed.err
        assert "Traceback" not in printed.err
        return printed.out.splitlines(), printed.err

    return run


@pytest.fixture
def queries(tmp_path):
    texts = [d["text"] for d in mixed_documents(30, seed=3) if 1 < len(d["text"].split()) < 9]
    return write_queries(tmp_path / "q.jsonl", *({"text": text} for text in texts[:3]))


@pytest.fixture
def scores(job, queries, tmp_path, capsys):
    """All scores of the queries, ``(3, N)``, as query writes them."""
    path = tmp_path / "all.npy"
    words = ["--queries", str(queries), "--save_scores", str(path), "--device", "cpu"]
    assert main(["query", str(job.output), *words]) == 0
    return np.load(path)


def best(scores, n):
    return np.lexsort((np.arange(N_SAMPLES), np.nan_to_num(-scores, nan=np.inf)))[:n]


def objects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_hold_rank_score_origin_and_the_documents_own_fields(job, select, tmp_path):
    path = tmp_path / "s.jsonl"
    lines, _ = select("--text", TEXT, "--top", 9, "--to", path)
    words = ["--text", TEXT, "--top_k", "9", "--bottom_k", "0", "--format", "jsonl"]
    documents = mixed_documents(N_SAMPLES)
    with ProjectionStore(job.output) as store:
        main(["query", str(job.output), *words, "--device", "cpu"])
        for rank, got in enumerate(objects(path), start=1):
            (sample,) = store.samples([got["id"]])
            assert got == {
                "rank": rank, "score": got["score"], "id": sample.sample_id, "key": sample.key,
                "domain": sample.domain, "n_tokens": sample.n_tokens, **documents[got["id"]],
            }  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["s.jsonl"]
    assert f"selected 9 of {N_SAMPLES - 2} documents with " in "\n".join(lines)
    assert lines[-1] == f"written  {path}"


@pytest.mark.parametrize("bottom", [False, True])
def test_ids_are_the_ends_of_the_scores(select, queries, scores, tmp_path, bottom):
    one = write_queries(tmp_path / "one.jsonl", json.loads(queries.read_text().split("\n")[0]))
    flags = ["--bottom"] if bottom else []
    select("--queries", one, "--top", "25%", "--to", tmp_path / "ids.npy", *flags)
    got = np.load(tmp_path / "ids.npy")
    assert got.dtype == np.int64
    sign = -1 if bottom else 1
    assert got.tolist() == best(sign * scores[0], (N_SAMPLES - 2) // 4).tolist()


def test_each_query_or_all_in_turn_choose(select, queries, scores, tmp_path):
    select("--queries", queries, "--top", 12, "--per_query", "--to", tmp_path / "own.jsonl")
    own = objects(tmp_path / "own.jsonl")
    assert {x["id"] for x in own} == set(np.concatenate([best(s, 4) for s in scores]).tolist())
    select("--queries", queries, "--top", 12, "--round_robin", "--to", tmp_path / "turn.jsonl")
    turn = objects(tmp_path / "turn.jsonl")
    names = [x["query"] for x in turn]
    assert names == names[:3] * 4
    assert len(set(names)) == 3
    taken = []
    for place, x in enumerate(turn):
        free = [i for i in best(scores[place % 3], N_SAMPLES).tolist() if i not in taken]
        assert x["id"] == free[0]
        taken.append(free[0])


def test_queries_of_a_file_select_by_the_mean_of_their_scores_at_unit_length(
    job, select, queries, scores, tmp_path
):
    # A query's length in the score's own metric is the root of its score for itself.
    with ProjectionStore(job.output) as store:
        run = config_from(RecordedRunArgs(output=str(job.output)))
        rows = QueryProjector(store, run, "cpu").rows(read_queries(queries)).rows
        inverse = Preconditioner.fit(store, "kfac")
        lengths = inverse.self_products(torch.from_numpy(rows).double()).sqrt().numpy()
    unit = scores / lengths[:, None]
    for flags, wanted in (([], unit.mean(axis=0)), (["--aggregate", "max"], unit.max(axis=0))):
        path = tmp_path / f"{len(flags)}.jsonl"
        select("--queries", queries, "--top", 15, "--to", path, *flags)
        got = objects(path)
        assert [x["id"] for x in got] == best(wanted, 15).tolist()
        np.testing.assert_allclose([x["score"] for x in got], wanted[best(wanted, 15)], rtol=1e-4)
        assert "query" not in got[0]


def test_sets_of_a_field_select_in_turn(select, queries, tmp_path):
    lines = [json.loads(line) for line in queries.read_text().splitlines()]
    tasks = [{**line, "task": task} for line, task in zip(lines, "abb", strict=True)]
    path = write_queries(tmp_path / "tasks.jsonl", *tasks)
    words = ("--group_by", "task", "--round_robin", "--top", 6, "--to", tmp_path / "s.jsonl")
    select("--queries", path, *words)
    assert [x["query"] for x in objects(tmp_path / "s.jsonl")] == ["a", "b"] * 3


def test_not_in_domains_and_tokens_restrict_the_choice(job, select, tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    flags = ("--text", TEXT, "--domains", "ArXiv,Github")
    select(*flags, "--top", 10, "--to", first)
    select(*flags, "--tokens", 60, "--not_in", first, "--to", second)
    one, two = objects(first), objects(second)
    assert {x["domain"] for x in one + two} <= {"ArXiv", "Github"}
    assert not {x["id"] for x in one} & {x["id"] for x in two}
    select(*flags, "--top", "100%", "--to", tmp_path / "all.jsonl")
    rest = objects(tmp_path / "all.jsonl")[10:]
    total = np.cumsum([x["n_tokens"] for x in rest])
    assert [x["id"] for x in two] == [x["id"] for x in rest[: int((total <= 60).sum())]]
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{x['key']}\n" for x in one) + "unknown\n")
    _, notes = select(*flags, "--tokens", 60, "--not_in", keys, "--to", tmp_path / "3.jsonl")
    assert (tmp_path / "3.jsonl").read_text() == second.read_text()
    assert "--not_in: 1 key of no document" in notes
    np.save(tmp_path / "left_out.npy", [x["id"] for x in one])
    words = ("--tokens", 60, "--not_in", tmp_path / "left_out.npy", "--to", tmp_path / "4.jsonl")
    select(*flags, *words)
    assert (tmp_path / "4.jsonl").read_text() == second.read_text()


def test_tars_hold_the_members_and_prepare_reads_lines_again(select, tmp_path):
    lines, tars = tmp_path / "s.jsonl", tmp_path / "tars"
    select("--text", TEXT, "--top", 7, "--diverse", "--to", lines)
    out, _ = select("--text", TEXT, "--top", 7, "--diverse", "--to", tars, "--samples_per_shard", 3)
    assert out[-1] == f"written  {tars} (3 tars)"
    wanted = objects(lines)
    documents = mixed_documents(N_SAMPLES)
    assert read_back(tars) == [
        (f"{place:012d}", documents[x["id"]]) for place, x in enumerate(wanted)
    ]
    listed = objects(tars / "selection.jsonl")
    assert listed == [{name: x[name] for name in listed[0]} for x in wanted]
    assert main(["prepare", str(lines), "--output_dir", str(tmp_path / "again")]) == 0
    again = [document for _, document in read_back(tmp_path / "again")]
    assert [d["text"] for d in again] == [x["text"] for x in wanted]
    assert [d["meta"]["pile_set_name"] for d in again] == [x["domain"] for x in wanted]
    assert [d["meta"]["rank"] for d in again] == list(range(1, 8))


def test_tars_of_tokenized_documents_name_their_tokenizer(select, tmp_path, monkeypatch):
    rules = Tokenization(tokenizer="t", special_tokens="none", loss_on="all", chat_template="")

    def tokenized_index(output, shards):
        return dataclasses.replace(recorded_index(output, shards), tokenization=rules)

    monkeypatch.setattr("gradproj.cli.select.recorded_index", tokenized_index)
    select("--text", TEXT, "--top", 2, "--to", tmp_path / "tars")
    assert open_corpus(str(tmp_path / "tars"), progress=False).tokenization == rules


def test_score_by_text_and_both(select, tmp_path):
    for score in ("text", "kfac+text"):
        words = ("--text", TEXT, "--score", score, "--top", 5)
        select(*words, "--to", tmp_path / f"{score}.npy")
        ids = np.load(tmp_path / f"{score}.npy")
        assert len(set(ids.tolist())) == 5
        assert not {EMPTY, ONE_TOKEN} & set(ids.tolist())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top", "0"], "--top is 0; give 1 or more"),
        (["--top", "101%"], "up to 100%"),
        (["--top", "many"], "--top is 'many'; give a number (1000) or a percentage (5%)"),
        ([], "give --top N, --top P% or --tokens T, one of them"),
        (["--top", "5", "--tokens", "7"], "one of them"),
        (["--top", "69"], "--top is 69, and 68 of the 70 documents of"),
        (["--top", "5", "--per_query", "--diverse"], "--per_query and --diverse are given"),
        (["--top", "5", "--pool", "9"], "--pool is for --diverse"),
        (["--top", "9", "--diverse", "--pool", "8"], "--diverse selects 9 documents from --pool 8"),
        (["--top", "5", "--domains", "none"], "has no domain 'none'"),
        (["--top", "5", "--not_in", "{folder}/no.txt"], "no.txt cannot be read"),
        (["--top", "5", "--not_in", "{folder}/bad.npy"], "holds float64 (2,); give a list of"),
        (["--top", "5", "--not_in", "{folder}/far.npy"], "names document 70, and"),
        (["--top", "5", "--not_in", "{folder}/bad.jsonl"], "bad.jsonl, line 2: give an object"),
        (["--top", "5", "--not_in", "{folder}/huge.jsonl"], "line 1: 10000000000000000000000000"),
        (["--top", "5", "--not_in", "{folder}/deep.jsonl"], "deep.jsonl, line 1: not JSON"),
        (["--top", "5", "--not_in", "{folder}/all.npy"], "no document of"),
        (["--tokens", "1"], "--tokens 1: the first document alone has more"),
        (["--tokens", "99999", "--diverse", "--pool", "5"], "--pool 5 is used up before"),
        (["--top", "5", "--to", "{folder}/x.json"], "end the name in .jsonl (documents) or .npy"),
        (["--top", "5", "--to", "{folder}/bad.npy"], "bad.npy exists; give another name"),
        (["--top", "5", "--to", "{folder}"], "is not empty"),
        (["--top", "5", "--damping", "0.1,1"], "select takes one value"),
        (["--top", "5", *QUERIES, "--aggregate", "none"], "none makes several lists: give --per"),
        (["--top", "5", *QUERIES, "--group_by", "task"], "--group_by makes several lists: give"),
        (["--top", "5", *QUERIES, "--aggregate", "max", "--per_query"], "makes one list of all"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(select, tmp_path, queries, words, message):
    np.save(tmp_path / "bad.npy", [0.5, 1.5])
    np.save(tmp_path / "far.npy", [N_SAMPLES])
    np.save(tmp_path / "all.npy", np.arange(N_SAMPLES))
    (tmp_path / "bad.jsonl").write_text('{"id": 3}\n{"name": 4}\n')
    (tmp_path / "huge.jsonl").write_text(f'{{"id": {10**40}}}')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    before = sorted(os.listdir(tmp_path))
    words = [word.format(folder=tmp_path) for word in words]
    base = ["--to", tmp_path / "out.jsonl", "--text", TEXT]
    lines, error = select(*base, *words, code=2)
    assert message in error
    assert lines == []
    notes = [line for line in error.splitlines() if "scores.npy will hold" not in line]
    assert len(notes) == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_two_ranks_select_what_one_process_selects(output, queries, select, tmp_path):
    words = ["--queries", str(queries), "--top", "20", "--device", "cpu", "--to"]
    two = ["gradproj.__main__", "select", str(output), *words, str(tmp_path / "two.npy")]
    job = run_forked(two, ranks=2)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("selected 20 of 68 documents") == 1
    select(*words, tmp_path / "one.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"))
    assert not list(tmp_path.glob("*.preparing"))


KILLED = """
import os, signal, sys
from gradproj.__main__ import main
from gradproj.corpus.tar import writer
from gradproj.selection import writing

def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

{where} = kill
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("where", "to"), [("writing.json_line", "s.jsonl"), ("writer._publish", "tars")]
)
def test_kill_leaves_nothing_under_the_name_and_the_next_call_completes(
    job, select, tmp_path, where, to
):
    words = ["--text", TEXT, "--top", "6", "--to", str(tmp_path / to)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(where=where), "select", str(job.output), *words],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert os.listdir(tmp_path) == [f"{to}.preparing"]
    select(*words)
    assert os.listdir(tmp_path) == [to]


def test_content_of_any_member_and_fields_of_the_same_names_are_in_a_line():
    members = {"json": b'\xef\xbb\xbf{"id": "x7", "meta": {"n": 1}}', "txt": "\ufeffé".encode()}
    fields = own_fields(Members(0, "k", members))
    assert fields == {"id": "x7", "meta": {"n": 1}, "text": "é"}
    assert with_fields({"rank": 1, "id": 0}, fields) == {
        "rank": 1, "id": 0, "document": {"id": "x7"}, "meta": {"n": 1}, "text": "é",
    }  # fmt: skip
    array = io.BytesIO()
    np.save(array, np.array([5, 6], np.uint16))
    assert own_fields(Members(0, "k", {"npy": array.getvalue()})) == {"input_ids": [5, 6]}
    half = json_line({"text": "é", "meta": "\ud800"})
    assert json.loads(half) == {"text": "é", "meta": "\ud800"}
    assert json_line({"text": "é"}) == '{"text": "é"}\n'.encode()
