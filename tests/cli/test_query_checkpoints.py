"""Several outputs: scores at each checkpoint, and their weighted sum, in one scan of each store."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.forked_ranks import run_forked
from helpers.jobs import run_job
from helpers.models import make_model
from helpers.outputs import ROWS_PER_UNIT, SETTINGS, copy_of, uncommit
from helpers.query_command import TEXT, ask, write_queries

from gradproj import ProjectionStore
from gradproj.analysis import checkpoint_sum, score
from gradproj.query import QueryProjector, read_queries
from gradproj.store.writer import update_attributes

assert ask

RATES = (0.5, -2.0)


@pytest.fixture(scope="module")
def runs(job, tmp_path_factory):
    """Two outputs of one corpus, at other weights and in rows of another width."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_model(folder / "model", initializer_range=0.1)
    settings = {**SETTINGS, "proj_rank_total": 9}
    run_job(shards=job.corpus, model=model, output_dir=folder / "step2", **settings)
    first = copy_of(job.output, folder)
    queries = write_queries(folder / "q.jsonl", {"text": TEXT, "id": "a"}, {"text": "of to in"})
    return SimpleNamespace(outputs=(first, folder / "step2"), queries=queries)


def wanted(runs, **options):
    """Return each checkpoint's scores ``(Q, N)``."""
    each = []
    for output in runs.outputs:
        with ProjectionStore(output) as store:
            rows = QueryProjector(store, device="cpu").rows(read_queries(runs.queries)).rows
            each.append(score(rows, store, **options).astype(np.float64))
    return each


@pytest.mark.parametrize("kind", ["dot", "kfac", "relatif"])
def test_documents_are_ranked_by_the_weighted_sum(runs, tmp_path, ask, kind):
    each = wanted(runs, score=kind)
    total = RATES[0] * each[0] + RATES[1] * each[1]
    words = (runs.outputs[1], "--queries", runs.queries, "--score", kind, "--top_k", 5)
    words += ("--bottom_k", 3, "--learning_rates", ",".join(map(str, RATES)))
    answers = ask.objects(runs.outputs[0], *words, "--combine", "table")
    for number, values in enumerate(total):
        got = answers[8 * number : 8 * number + 8]
        ids = np.flatnonzero(~np.isnan(values))
        order = ids[np.argsort(-values[ids], kind="stable")]
        assert [x["id"] for x in got] == [*order[:5], *order[:-4:-1]]
        chosen = [x["id"] for x in got]
        np.testing.assert_allclose([x["score"] for x in got], values[chosen], rtol=1e-3)
        for name, of_store in zip(("out", "step2"), each, strict=True):
            np.testing.assert_allclose(
                [x[f"score_at_{name}"] for x in got], of_store[number, chosen], rtol=1e-3
            )
    saved = tmp_path / "sums.npy"
    lines, _ = ask(runs.outputs[0], *words, "--save_scores", saved)
    np.testing.assert_allclose(np.load(saved), total, rtol=1e-3, atol=1e-3 * np.nanstd(total))
    assert "sum      0.5 out + -2 step2; losses are those of the first" in lines
    if kind == "dot":
        groups = ask.objects(runs.outputs[0], *words, "--by", "domain")
        with ProjectionStore(runs.outputs[0]) as store:
            domain = store.column("domain") == store.domains.index(groups[0]["group"])
        assert groups[0]["mean"] == pytest.approx(np.nanmean(total[0, domain]), rel=1e-3)


def test_python_gives_the_same_sum_and_reads_every_row_once(runs, monkeypatch):
    stores = [ProjectionStore(output) for output in runs.outputs]
    rows = [
        QueryProjector(store, device="cpu").rows(read_queries(runs.queries)).rows
        for store in stores
    ]
    bands, scan = [], ProjectionStore.scan_bands

    def counted(self, *args):
        for band in scan(self, *args):
            bands.append((self.path, band.first, band.last))
            yield band

    monkeypatch.setattr(ProjectionStore, "scan_bands", counted)
    top, bottom = checkpoint_sum(rows, stores, RATES, score="dot").ends(4, 2)
    for store in stores:
        read = sorted(span for path, *span in bands if path == store.path)
        assert sum(last - first for first, last in read) == len(store)
    each = wanted(runs, score="dot")
    total = RATES[0] * each[0] + RATES[1] * each[1]
    for end, sign in ((top, -1), (bottom, 1)):
        for number, values in enumerate(total):
            order = np.argsort(sign * values, kind="stable")
            assert end.ids[number].tolist() == order[: end.ids.shape[1]].tolist()
    for store in stores:
        store.close()


def test_document_without_a_row_at_one_checkpoint_has_no_score(runs, tmp_path, ask):
    other = copy_of(runs.outputs[1], tmp_path)
    uncommit(other, 1)
    saved = tmp_path / "sums.npy"
    words = (other, "--queries", runs.queries, "--score", "dot", "--save_scores", saved)
    lines, _ = ask(runs.outputs[0], *words)
    total = sum(wanted(runs, score="dot"))
    has_no_row = np.arange(total.shape[1]) // ROWS_PER_UNIT == 1
    assert not np.isnan(total[:, has_no_row]).all()
    total[:, has_no_row] = np.nan
    np.testing.assert_allclose(np.load(saved), total, rtol=1e-3, atol=1e-3 * np.nanstd(total))
    n_scored = int((~np.isnan(total[0])).sum())
    assert f"{n_scored} documents compared" in lines[1]
    assert "15 without a row at another checkpoint" in " ".join(" ".join(lines[:4]).split())


def test_two_ranks_sum_as_one_process(runs, ask):
    flags = (runs.outputs[1], "--queries", runs.queries, "--score", "dot", "--format", "jsonl")
    flags += ("--combine", "table", "--aggregate", "mean")
    question = ["gradproj.__main__", "query", str(runs.outputs[0]), *map(str, flags)]
    job = run_forked([*question, "--device", "cpu"], ranks=2)
    assert job.returncode == 0, job.stderr
    want = ask.objects(runs.outputs[0], *flags)
    for a, b in zip(map(json.loads, job.stdout.splitlines()), want, strict=True):
        for name in ("score", "score_at_out", "score_at_step2"):
            assert a.pop(name) == pytest.approx(b.pop(name), rel=1e-4)
        assert a == b


@pytest.mark.parametrize(
    ("several", "flags", "message"),
    [
        (False, ("--combine", "table"), "--combine requires several outputs"),
        (False, ("--learning_rates", "1"), "--learning_rates requires several outputs"),
        (True, ("--learning_rates", "1,2,3"), "--learning_rates has 3 numbers for 2 outputs"),
        (True, ("--learning_rates", "1,nan"), "a number that is not finite"),
        (True, ("--learning_rates", "1,x"), "--learning_rates: invalid list of float value: '1,x'"),
        (True, ("--score", "hidden"), "with several outputs, leave --score hidden out"),
        (True, ("--query_model", "x"), "with several outputs, leave --query_model out"),
        (True, ("--score", "text"), "with several outputs, leave --score text out"),
        (True, ("--rescore", "5"), "with several outputs, leave --rescore 5 out"),
        (True, ("--text_scores",), "with several outputs, leave --text_scores out"),
        (True, ("--damping", "0.1,1"), "with several outputs, leave --damping 0.1,1 out"),
        (True, ("--by", "domain", "--combine", "table"), "leave --by domain, or --combine table"),
    ],
)
def test_flags_that_do_not_fit_are_refused(runs, ask, several, flags, message):
    others = runs.outputs[1:] if several else ()
    words = (*others, "--queries", runs.queries, *flags)
    assert message in ask.mistake(runs.outputs[0], *words)


def test_stores_that_do_not_belong_together_are_refused_by_name(runs, job, tmp_path, ask):
    first = runs.outputs[0]
    words = ("--queries", runs.queries)
    assert "an output is given twice" in ask.mistake(first, first, *words)
    make_corpus(tmp_path / "tars", mixed_documents(70, seed=5))
    settings = {**SETTINGS, "shards": tmp_path / "tars", "model": job.model}
    run_job(output_dir=tmp_path / "other", **settings, proj_layers="mlp")
    message = ask.mistake(first, tmp_path / "other", *words)
    assert (
        f"{tmp_path}/other/projections.zarr does not belong to {first}/projections.zarr" in message
    )
    assert "\n  --shards (corpus index): " in message
    assert "\n  layers: " in message
    update_attributes(tmp_path / "other" / "projections.zarr", {"identity": {}})
    message = ask.mistake(first, tmp_path / "other", *words)
    assert "does not record which documents its ids are" in message


def test_tokens_are_the_weighted_sum_of_those_at_each_checkpoint(runs, ask):
    words = ["--queries", runs.queries, "--tokens", "--top_k", 3, "--bottom_k", 2]
    both = [runs.outputs[1], *words, "--learning_rates", ",".join(map(str, RATES))]
    whole = [*words[:-4], "--top_k", 68, "--bottom_k", 0]
    each = [
        {(hit["query"], hit["id"]): hit for hit in ask.objects(output, *whole)}
        for output in runs.outputs
    ]
    for hit in ask.objects(runs.outputs[0], *both):
        pair = [of[hit["query"], hit["id"]] for of in each]
        for name in ("tokens", "query_tokens"):
            parts = [[token["part"] for token in one[name]] for one in (*pair, hit)]
            want = RATES[0] * np.array(parts[0]) + RATES[1] * np.array(parts[1])
            np.testing.assert_allclose(parts[2], want, rtol=1e-4, atol=1e-5 * abs(want).max())
            assert sum(parts[2]) == pytest.approx(hit["recomputed_score"], rel=1e-5)
        assert sum(hit["layers"].values()) == pytest.approx(hit["recomputed_score"], rel=1e-5)
