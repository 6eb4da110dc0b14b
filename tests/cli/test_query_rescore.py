"""``query --rescore``: the best of the scan in the order of whole gradients' influence."""

import shutil

import numpy as np
import pytest
import torch
from helpers.outputs import N_SAMPLES, copy_of
from helpers.query_command import TEXT, ask, ok_ids, write_queries
from helpers.whole_gradients import ExactModel, ekfac_scores, kfac_scores

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.curvature.folder import CurvatureFolder
from gradproj.curvature.recorded_model import RecordedModel
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import Query, QueryProjector

assert ask

LAYERS = "o_proj,down_proj"
QUERIES = ({"text": TEXT, "id": "first"}, {"prompt": "the of", "completion": " and to in"})


@pytest.fixture(scope="module")
def measured(job, tmp_path_factory):
    """A copy of the finished job's output with curvature of two of its layers; read only."""
    output = copy_of(job.output, tmp_path_factory.mktemp("measured"))
    words = ["--curvature_tokens", "500", "--layers", LAYERS, "--device", "cpu"]
    assert main(["curvature", str(output), *words]) == 0
    return output


@pytest.fixture(scope="module")
def exact_scores(measured):
    """Return a function: curvature's kind -> exact scores of all documents, ``(2, N)``."""
    run = config_from(RecordedRunArgs(output=str(measured)))
    with ProjectionStore(measured) as store:
        recipe = CurvatureFolder(store).recipe()
        recorded = RecordedModel(store, run, torch.device("cpu"), layers=LAYERS.split(","))
        exact = ExactModel(recorded.model, list(recorded.targets))
        asked = [Query.of(str(n), where="", **_form(q)) for n, q in enumerate(QUERIES)]
        tokens = QueryProjector(store, run, "cpu").rows(asked).sequences
        ids = ok_ids(store)
        documents, sample = (
            [torch.from_numpy(window.ids) for window in recorded.sequences(of)]
            for of in (ids, recipe["sample_ids"])
        )
    queries = [
        exact.gradient(torch.from_numpy(each.ids), len(each) - each.n_targets) for each in tokens
    ]
    gradients = [exact.gradient(each) for each in documents]
    factors, place = exact.factors(sample), {int(i): n for n, i in enumerate(ids)}
    of_sample = [gradients[place[int(i)]] for i in recipe["sample_ids"]]
    query_lengths = np.array([each.n_targets for each in tokens], np.float64)

    def scores(kind):
        if kind == "kfac":
            of_rows = kfac_scores(factors, queries, gradients, 0.03)
        else:
            n_tokens = recipe["n_tokens"]
            of_rows = ekfac_scores(factors, of_sample, n_tokens, queries, gradients, 0.01)
        if run.batch.loss_reduction == "mean":
            of_rows = of_rows / torch.from_numpy(query_lengths)[:, None]  # documents: summed
        all_scores = np.full((2, N_SAMPLES), np.nan)
        all_scores[:, ids] = of_rows.numpy()
        return all_scores

    return scores


def _form(query):
    return {key: value for key, value in query.items() if key != "id"}


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_rescoring_all_documents_gives_the_exact_ranking(
    measured, exact_scores, ask, tmp_path, kind
):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    words = ["--queries", path, "--rescore", N_SAMPLES, "--rescore_by", kind, "--top_k", N_SAMPLES]
    answers = ask.objects(measured, *words)
    scanned = ask.objects(measured, "--queries", path, "--top_k", N_SAMPLES, "--bottom_k", 0)
    for name, want in zip(("first", "line 2"), exact_scores(kind), strict=True):
        mine = [x for x in answers if x["query"] == name]
        ids = np.flatnonzero(~np.isnan(want))
        assert [x["id"] for x in mine] == ids[np.argsort(-want[ids], kind="stable")].tolist()
        got = np.array([x["score"] for x in mine])
        assert np.abs(got - want[[x["id"] for x in mine]]).max() <= 1e-4 * np.nanmax(np.abs(want))
        before = {x["id"]: (x["rank"], x["score"]) for x in scanned if x["query"] == name}
        assert [(x["scan_rank"], x["scan_score"]) for x in mine] == [before[x["id"]] for x in mine]


def test_only_the_best_of_the_scan_are_scored_again_and_the_table_says_so(measured, ask):
    lines, _ = ask(measured, "--text", TEXT, "--rescore", 7, "--top_k", 5, "--score", "cosine")
    text = "\n".join(lines)
    assert "rescored by ekfac of whole gradients, damping 0.01: 7 documents of" in text
    assert "4 layers in 1 group;" in text
    assert "of memory beside the model" in " ".join(text.split())
    head = next(n for n, line in enumerate(lines) if line.startswith("top"))
    assert lines[head].split()[:5] == ["top", "score", "scan", "scan", "score"]
    ranks = [int(line.split()[2]) for line in lines[head + 1 : head + 6]]
    assert len(set(ranks)) == 5
    assert max(ranks) <= 7
    assert not any(line.startswith("bottom") for line in lines)


def test_few_gigabytes_give_the_same_scores_in_more_groups(measured, ask, tmp_path):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    words = ["--queries", path, "--rescore", 5, "--top_k", 5]
    whole = ask.objects(measured, *words)
    _, errors = ask(measured, *words, "--rescore_memory", 1e-9, "--format", "jsonl")
    assert "in 8 groups" in errors
    parts = ask.objects(measured, *words, "--rescore_memory", 1e-9)
    assert [x["id"] for x in parts] == [x["id"] for x in whole]
    np.testing.assert_allclose(
        [x["score"] for x in parts], [x["score"] for x in whole], rtol=1e-4, atol=1e-5
    )


def test_documents_of_another_output_are_queries_too(measured, ask):
    answers = ask.objects(measured, "--query_store", measured, "--rescore", 3, "--top_k", 1)
    with ProjectionStore(measured) as store:
        assert len(answers) == len(ok_ids(store))
    found = [x["query"].split("#")[0].lstrip("0") == str(x["id"] or "") for x in answers]
    assert np.mean(found) > 0.9


def test_best_by_text_join_the_candidates(measured, ask, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(measured, output)
    words = ["--text", TEXT, "--rescore", 4, "--rescore_text", "--top_k", 4]
    assert "python -m gradproj text" in " ".join(ask.mistake(output, *words).split())
    assert main(["text", str(output)]) == 0
    answers = ask.objects(output, *words)
    assert all(x["scan_rank"] or x["text_rank"] for x in answers)
    lines, _ = ask(output, *words)
    assert any(
        line.split()[:6] == ["top", "score", "scan", "scan", "score", "text"] for line in lines
    )
    assert any("documents of" in line and "by ekfac" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rescore 5 --top_k 6", "--top_k 6 is more than --rescore 5"),
        ("--rescore 5 --bottom_k 2", "leave --bottom_k out"),
        ("--rescore 5 --damping 0.1,1", "--rescore takes one --damping"),
        ("--rescore 5 --rescore_damping -1", "--rescore_damping is '-1'"),
        ("--rescore_damping 1", "--rescore_damping requires --rescore N"),
        ("--rescore_text", "--rescore_text requires --rescore N"),
        (
            "--rescore_by ekfac --rescore_memory 1",
            "--rescore_by and --rescore_memory require --rescore N",
        ),
        ("--rescore 5 --layers mlp", "lacks ekfac curvature of 4 layers"),
    ],
)
def test_mistake_is_refused_by_name(measured, ask, words, message):
    assert message in " ".join(ask.mistake(measured, "--text", TEXT, *words.split()).split())


def test_without_curvature_the_command_that_measures_it_is_named(job, ask):
    message = ask.mistake(job.output, "--text", TEXT, "--rescore", 5)
    assert f"run `python -m gradproj curvature {job.output}`" in " ".join(message.split())
