"""``query --by`` ranks groups of documents by their mean scores, as all scores say."""

import json

import numpy as np
import pytest
from helpers.forked_ranks import run_forked
from helpers.outputs import copy_of
from helpers.query_command import TEXT, ask, write_queries

from gradproj import ProjectionStore
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.text.index import make_text_index

assert ask


@pytest.fixture(scope="module")
def indexed(job, tmp_path_factory):
    output = copy_of(job.output, tmp_path_factory.mktemp("indexed"))
    with ProjectionStore(output) as store:
        make_text_index(store, RecordedRunArgs(output=str(output)))
    return output


@pytest.fixture
def queries(tmp_path):
    return write_queries(
        tmp_path / "q.jsonl", {"text": TEXT, "id": "a"}, {"text": "the of to", "id": "b"}
    )


@pytest.mark.parametrize("score", ["kfac", "cosine", "text", "relatif+text"])
def test_groups_are_ranked_by_the_mean_of_all_scores(indexed, queries, tmp_path, ask, score):
    path = tmp_path / "scores.npy"
    words = ("--queries", queries, "--score", score, "--save_scores", path, "--show_text")
    words += ("--by", "domain", "--by_documents", 2, "--top_k", 2, "--bottom_k", 2)
    answers = ask.objects(indexed, *words)
    values = np.load(path).astype(np.float64)
    with ProjectionStore(indexed) as store:
        domain, names = store.column("domain"), store.domains
    assert [(x["query"], x["end"], x["rank"]) for x in answers] == [
        (query, *place) for query in "ab" for place in (("top", 1), ("top", 2), ("bottom", 1))
    ]  # of three groups, none twice
    for number, of_query in enumerate(values):
        means = {
            name: of_query[(domain == i) & ~np.isnan(of_query)] for i, name in enumerate(names)
        }
        order = sorted(means, key=lambda name: -means[name].mean())
        got = answers[3 * number : 3 * number + 3]
        assert [x["group"] for x in got] == order
        for x in got:
            of_group = means[x["group"]]
            assert x["n_documents"] == len(of_group)
            assert x["mean"] == pytest.approx(of_group.mean(), rel=1e-4, abs=1e-6)
            error = of_group.std(ddof=1) / np.sqrt(len(of_group))
            assert x["standard_error"] == pytest.approx(error, rel=1e-3)
            best = [d["score"] for d in x["documents"]]
            np.testing.assert_allclose(best, np.sort(of_group)[::-1][:2], rtol=1e-4)
            assert all(d["domain"] == x["group"] and d["text"] for d in x["documents"])


def test_a_field_gives_the_groups_of_the_domains_made_of_it(indexed, queries, ask):
    words = ("--queries", queries, "--score", "cosine")
    by_domain = ask.objects(indexed, *words, "--by", "domain")
    _, errors = ask(indexed, *words, "--by", "meta.pile_set_name")
    assert f"which is kept in {indexed}/columns/meta.pile_set_name-" in errors
    by_field = ask.objects(indexed, *words, "--by", "meta.pile_set_name")
    for x, y in zip(by_domain, by_field, strict=True):
        assert x == {**y, "by": "domain"}
    lines, _ = ask(indexed, *words, "--by", "domain")
    assert "groups   3 by domain, ranked by their mean score" in lines
    (heading,) = {line for line in lines if line.startswith("top ")}
    assert heading.split() == ["top", "mean", "std.", "error", "documents", "domain"]
    x = by_domain[0]
    first = next(line for line in lines if line.split()[:1] == ["1"])
    assert first.split() == [
        "1", f"{x['mean']:+.4f}", f"{x['standard_error']:.1e}", str(x["n_documents"]), x["group"],
    ]  # fmt: skip


def test_two_ranks_rank_groups_as_one_process(output, queries, ask):
    flags = ("--queries", queries, "--score", "dot", "--format", "jsonl")
    flags += ("--by", "meta.pile_set_name", "--aggregate", "mean")
    question = ["gradproj.__main__", "query", str(output), "--device", "cpu", *map(str, flags)]
    job = run_forked(question, ranks=2)
    assert job.returncode == 0, job.stderr
    want = ask.objects(output, *flags)
    for a, b in zip(map(json.loads, job.stdout.splitlines()), want, strict=True):
        for name in ("mean", "standard_error"):
            assert a.pop(name) == pytest.approx(b.pop(name), rel=1e-4)
        for x, y in zip(a["documents"], b["documents"], strict=True):
            assert x.pop("score") == pytest.approx(y.pop("score"), rel=1e-4)
        assert a == b


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--by", "domain", "--rescore", "5"), "--by scores groups of documents: leave --rescore"),
        (("--by", "domain", "--text_scores"), "leave --text_scores out"),
        (("--by", "domain", "--text_matches"), "leave --text_matches out"),
        (("--by", "domain", "--damping", "0.1,1"), "leave --damping 0.1,1 out"),
        (("--by_documents", "5"), "--by_documents requires --by domain or --by FIELD"),
        (("--by", "meta.x"), "of the corpus has a text or number there"),
        (("--by", "a..b"), "--by is 'a..b'; give field names joined by dots"),
    ],
)
def test_flags_that_do_not_fit_are_refused(job, queries, ask, flags, message):
    assert message in ask.mistake(job.output, "--queries", queries, *flags)
