"""The query command scores sets of queries as ``gradproj.analysis`` does, in one scan."""

import json

import numpy as np
import pytest
from helpers.corpora import mixed_documents
from helpers.forked_ranks import run_forked
from helpers.outputs import N_SAMPLES, copy_of
from helpers.query_command import TEXT, ask, write_queries

from gradproj import ProjectionStore
from gradproj.analysis import QuerySets, score, scores
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import QueryProjector, read_queries
from gradproj.text.index import make_text_index

assert ask

TEXTS = [d["text"] for d in mixed_documents(N_SAMPLES) if len(d["text"].split()) > 6]
TASKS = ("sums", "dates", "sums", "sums", "dates")
QUERIES = [
    {"text": " ".join(text.split()[:8]), "id": f"q{i}", "meta": {"task": task}}
    for i, (text, task) in enumerate(zip(TEXTS, TASKS, strict=False))
]
CONTROL = [
    {"text": " ".join(TEXTS[8].split()[:6])},
    {"prompt": "the of", "completion": " and to in"},
]


@pytest.fixture
def files(tmp_path):
    return (
        write_queries(tmp_path / "bench.jsonl", *QUERIES),
        write_queries(tmp_path / "control.jsonl", *CONTROL),
    )


def wanted_scores(output, files, groups, aggregate, unit, with_control, **options):
    queries = read_queries(files[0]) + (read_queries(files[1]) if with_control else [])
    n_control = len(CONTROL) if with_control else 0
    sets = QuerySets.of_groups(list(groups), n_control, aggregate, unit)
    with ProjectionStore(output) as store:
        rows = QueryProjector(store, device="cpu").rows(queries)
        return score(rows.rows, store, sets=sets, **options)


@pytest.mark.parametrize(
    ("flags", "groups", "names"),
    [
        (("--aggregate", "mean"), "aaaaa", ["all queries"]),
        (("--aggregate", "max", "--group_by", "meta.task"), TASKS, ["sums", "dates"]),
        (("--aggregate", "mean", "--group_by", "meta.task"), TASKS, ["sums", "dates"]),
        ((), ["q0", "q1", "q2", "q3", "q4"], ["q0", "q1", "q2", "q3", "q4"]),
    ],
)
@pytest.mark.parametrize("unit", [True, False])
def test_sets_are_scored_as_in_python(
    output, files, tmp_path, ask, monkeypatch, flags, groups, names, unit
):
    with_control = unit or not flags
    words = ["--queries", files[0], *flags, "--score", "kfac", "--top_k", 4, "--bottom_k", 2]
    words += [] if unit else ["--no-unit_queries"]
    words += ["--contrast", files[1]] if with_control else []
    scans, scan = [], scores.score_blocks
    monkeypatch.setattr(scores, "score_blocks", lambda *a: scans.append(1) or scan(*a))
    answers = ask.objects(output, *words)
    assert len(scans) == 1
    aggregate = flags[1] if flags else "none"
    want = wanted_scores(output, files, groups, aggregate, unit, with_control, score="kfac")
    assert list(dict.fromkeys(x["query"] for x in answers)) == names
    for number, values in enumerate(want):
        got = answers[6 * number : 6 * number + 6]
        ids = np.flatnonzero(~np.isnan(values))
        order = ids[np.argsort(-values[ids], kind="stable")]
        assert [x["id"] for x in got] == [*order[:4], *order[:-3:-1]]
        np.testing.assert_allclose(
            [x["score"] for x in got], values[[x["id"] for x in got]], rtol=1e-4
        )
        assert got[0]["n_queries"] == groups.count(groups[0]) if number == 0 else True
    saved = tmp_path / "scores.npy"
    ask(output, *words, "--save_scores", saved)
    np.testing.assert_allclose(np.load(saved), want, rtol=1e-4, atol=1e-5)


def test_table_says_what_a_set_is(job, files, ask):
    words = ("--queries", files[0], "--aggregate", "mean", "--group_by", "meta.task")
    lines, _ = ask(job.output, *words, "--contrast", files[1], "--score", "cosine", "--top_k", 1)
    text = " ".join(" ".join(lines).split())
    assert "sets mean of queries, each of unit length in the score's own metric; less" in text
    assert f"lessthemeanofthe2of{files[1]}" in "".join(text.split())
    with ProjectionStore(job.output) as store:
        rows = QueryProjector(store, device="cpu").rows(read_queries(files[0]))
    sums = [i for i, task in enumerate(TASKS) if task == "sums"]
    n_tokens = rows.n_tokens[sums]
    loss = (rows.loss[sums] * n_tokens).sum() / n_tokens.sum()
    assert f"set sums: 3 queries, {n_tokens.sum():,} target tokens, loss {loss:.3f} nats" in text


def test_text_scores_of_sets(job, files, tmp_path, ask):
    """Of text alone: tests/text. Both scores of a set are turned to z-scores and added."""
    output = copy_of(job.output, tmp_path / "out")
    with ProjectionStore(output) as store:
        make_text_index(store, RecordedRunArgs(output=str(output)))
    flags = ("--aggregate", "max", "--group_by", "meta.task", "--contrast", files[1])
    saved = {kind: tmp_path / f"{kind}.npy" for kind in ("text", "kfac", "kfac+text")}
    for kind, path in saved.items():
        words = ("--queries", files[0], *flags, "--score", kind, "--save_scores", path)
        answers = ask.objects(output, *words, "--text_scores", "--top_k", 3)
    text, kfac, got = (np.load(path) for path in saved.values())
    assert got.shape == (2, N_SAMPLES)
    for x in answers:  # the column is the set's text score
        assert x["text_score"] == pytest.approx(text[TASKS.index(x["query"]), x["id"]], rel=1e-4)
    z = [(v - np.nanmean(v, 1)[:, None]) / np.nanstd(v, 1)[:, None] for v in (text, kfac)]
    np.testing.assert_allclose(got, z[0] + z[1], rtol=1e-4, atol=1e-4)


def test_two_ranks_score_sets_as_one_process(output, files, tmp_path, ask):
    flags = ("--queries", files[0], "--aggregate", "max", "--group_by", "meta.task")
    flags += ("--contrast", files[1], "--score", "cosine", "--format", "jsonl", "--top_k", 6)
    question = ["gradproj.__main__", "query", str(output), "--device", "cpu", *map(str, flags)]
    job = run_forked(question, ranks=2)
    assert job.returncode == 0, job.stderr
    want = ask.objects(output, *flags)
    for a, b in zip(map(json.loads, job.stdout.splitlines()), want, strict=True):
        assert a.pop("score") == pytest.approx(b.pop("score"), rel=1e-4)
        assert a == b


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--group_by", "meta.task"), "--group_by requires --queries FILE and --aggregate"),
        (("--aggregate", "mean", "--group_by", "meta..task"), "give field names joined by dots"),
        (("--aggregate", "mean", "--group_by", "task"), "line 1: no text or number in 'task'"),
        (("--no-unit_queries",), "--no-unit_queries requires --aggregate or --contrast"),
        (
            ("--no-unit_queries", "--aggregate", "mean", "--score", "cosine"),
            "--score cosine scales every query to unit length",
        ),
        (("--aggregate", "max", "--rescore", "5"), "for single queries: leave --aggregate out"),
        (("--aggregate", "mean", "--text_matches"), "of single queries: leave --aggregate out"),
        (("--contrast", "none.jsonl"), "the queries' file none.jsonl cannot be read"),
        (("--aggregate", "median"), "--aggregate is 'median'; choose one of none, mean, max"),
    ],
)
def test_flags_that_do_not_fit_are_refused(job, files, ask, flags, message):
    assert message in ask.mistake(job.output, "--queries", files[0], *flags)


def test_a_contrast_needs_queries_to_project(job, files, ask):
    words = ("--query_store", job.output, "--contrast", files[1])
    assert "--contrast takes a file of queries" in ask.mistake(job.output, *words)
    message = ask.mistake(job.output, "--text", TEXT, "--group_by", "x", "--aggregate", "mean")
    assert "--group_by requires --queries" in message


def test_all_documents_of_a_query_store_are_one_set(output, ask):
    answers = ask.objects(
        output, "--query_store", output, "--aggregate", "mean", "--top_k", 2, "--score", "dot"
    )
    assert {x["query"] for x in answers} == {"all queries"}
    with ProjectionStore(output) as store:
        assert answers[0]["n_queries"] == store.status_counts()["ok"]
