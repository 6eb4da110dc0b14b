"""The query command ranks by text, adds it to a gradient score, and shows it as a column."""

import errno
import os
import re

import numpy as np
import pytest
from helpers.outputs import N_SAMPLES, copy_of
from helpers.query_command import TEXT, ask, write_queries
from helpers.text import job_tokens, text_score
from transformers import AutoTokenizer

from gradproj import ProjectionStore
from gradproj.analysis import score
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import QueryProjector, read_queries
from gradproj.text.index import make_text_index

assert ask

QUERIES = (
    {"text": TEXT, "id": "first"},
    {"prompt": "the of", "completion": " and to in", "name": "second"},
)


@pytest.fixture(scope="module")
def indexed(job, tmp_path_factory):
    """A copy of the finished job's output with its text index."""
    output = copy_of(job.output, tmp_path_factory.mktemp("indexed"))
    with ProjectionStore(output) as store:
        make_text_index(store, RecordedRunArgs(output=str(output)))
    return output


@pytest.fixture(scope="module")
def wanted(job):
    """Text scores ``(Q, N)`` of ``QUERIES``; NaN without tokens."""
    tokens, scores = job_tokens(job), np.full((2, N_SAMPLES), np.nan)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    whole = tokenizer("the of and to in").input_ids
    first = len(tokenizer("the of").input_ids)
    for number, (ids, start) in enumerate(((tokenizer(TEXT).input_ids, 0), (whole, first))):
        for sample_id, document in tokens.items():
            scores[number, sample_id] = text_score(ids, document, tokens.values(), start)
    return scores


def order_of(scores):
    return np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")


def z_scores(values):
    return (values - np.nanmean(values, 1, keepdims=True)) / np.nanstd(values, 1, keepdims=True)


def test_text_ranks_without_the_weights_of_the_model(
    indexed, job, wanted, tmp_path, ask, monkeypatch
):
    monkeypatch.setattr("gradproj.job.recorded.load_model", None)
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    saved = tmp_path / "scores.npy"
    answers = ask.objects(
        indexed, "--queries", path, "--score", "text", "--top_k", 5, "--save_scores", saved
    )
    assert [x["id"] for x in answers] == order_of(wanted)[:, :5].ravel().tolist()
    assert {x["query_loss"] for x in answers} == {None}
    np.testing.assert_allclose(
        [x["score"] for x in answers], -np.sort(-np.nan_to_num(wanted))[:, :5].ravel(), rtol=1e-5
    )
    np.testing.assert_allclose(np.load(saved), wanted, rtol=1e-5)
    lines, _ = ask(indexed, "--queries", path, "--score", "text", "--top_k", 2)
    assert any(line.startswith("score    text: shared n-grams") for line in lines)
    assert any(re.fullmatch(r"query    second: \d+ target tokens", line) for line in lines)
    assert not any(line.startswith("bottom") for line in lines)


def test_first_query_by_text_makes_the_index(output, wanted, ask):
    words = (output, "--text", TEXT, "--score", "text", "--top_k", 3)
    _, notes = ask(*words)
    assert "reading the tokens of 5 of 5 units" in notes
    lines, notes = ask(*words)
    assert notes == ""
    assert [int(line.split()[2]) for line in lines[-3:]] == order_of(wanted)[0, :3].tolist()


@pytest.mark.parametrize("kind", ["kfac", "cosine"])
def test_text_is_added_to_a_gradient_score_as_z_scores(indexed, wanted, tmp_path, ask, kind):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    with ProjectionStore(indexed) as store:
        rows = QueryProjector(store, device="cpu").rows(read_queries(path)).rows
        sums = z_scores(score(rows, store, score=kind).astype(np.float64)) + z_scores(wanted)
        domain = store.domains[0]
        outside = store.column("domain") != 0
        one = np.where(outside, np.nan, score(rows, store, score=kind).astype(np.float64))
        in_domain = z_scores(one) + z_scores(np.where(outside, np.nan, wanted))
    flags = (indexed, "--queries", path, "--score", f"{kind}+text", "--top_k", 5, "--bottom_k", 2)
    for values, words in ((sums, ()), (in_domain, ("--domains", domain))):
        saved = tmp_path / f"{len(words)}.npy"
        answers = ask.objects(*flags, *words)
        order = order_of(values)
        assert [x["id"] for x in answers if x["end"] == "top"] == order[:, :5].ravel().tolist()
        again = ask.objects(*flags, *words, "--save_scores", saved)
        assert again == answers
        np.testing.assert_allclose(np.load(saved), values, rtol=1e-4, atol=1e-4)
    lines, _ = ask(*flags)
    text = " ".join(" ".join(lines).split())
    assert f"score {kind}+text: z-scores of both, added" in text
    assert "text: shared n-grams" in text


def test_text_scores_are_a_column_of_any_ranking(indexed, wanted, tmp_path, ask):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    flags = (indexed, "--queries", path, "--score", "cosine", "--text_scores", "--top_k", 4)
    answers = ask.objects(*flags)
    number = {"first": 0, "second": 1}
    for x in answers:
        assert x["text_score"] == pytest.approx(wanted[number[x["query"]], x["id"]], rel=1e-5)
    lines, _ = ask(*flags)
    head = next(line for line in lines if line.startswith("top "))
    assert head.split() == ["top", "score", "text", "score", "id", "loss", "domain", "key"]
    row = lines[lines.index(head) + 1].split()
    assert float(row[2]) == pytest.approx(answers[0]["text_score"], rel=1e-2)


def test_documents_of_another_store_are_queries_by_text(indexed, job, output, ask):
    tokens = job_tokens(job)
    answers = ask.objects(indexed, "--query_store", output, "--score", "text", "--top_k", 1)
    assert len(answers) == len(tokens)
    for x, (sample_id, ids) in zip(answers, tokens.items(), strict=True):
        own = text_score(ids, ids, tokens.values())
        assert x["score"] >= own * (1 - 1e-5) or x["id"] == sample_id


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--score", "text", "--layers", "mlp"), "--score text uses no gradients"),
        (("--score", "text", "--damping", "0.1"), "--score text has no damping"),
        (("--score", "cosine+text", "--damping", "0.1"), "--score cosine+text has no damping"),
        (("--score", "text+text"), "choose one of kfac, "),
    ],
)
def test_flags_that_mean_nothing_by_text_are_refused(indexed, ask, words, message):
    assert message in ask.mistake(indexed, "--text", TEXT, *words)


def test_full_disk_is_an_error_that_names_the_folder(indexed, ask, monkeypatch):
    class FullDisk:
        def __init__(self, dir):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", FullDisk)
    message = ask.mistake(indexed, "--text", TEXT, "--score", "cosine+text")
    assert re.search(r"cannot write .*/text/\w+: No space left on device\. Free space", message)
