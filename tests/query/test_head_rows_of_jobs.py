"""Head rows of a small job and of its queries against autograd of the head's weight in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.corpora import mixed_documents
from helpers.jobs import run_job
from helpers.query_command import ask
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, score
from gradproj.analysis.head_scores import HeadScorer
from gradproj.analysis.ranking import Ranker
from gradproj.engine.head_rows import QUERY_ROWS, WINDOW_ROWS
from gradproj.errors import ConfigError, StoreError
from gradproj.query import Query, QueryProjector, check_rows_fit
from gradproj.query.projector import query_head_bytes
from gradproj.query.query_store import rows_of_query_store
from gradproj.store.head_rows import HeadQueries
from gradproj.store.layout import STATUS

assert ask

N_DOCUMENTS, MAX_LENGTH, N_ROWS, K = 20, 10, 6, 8
SETTINGS = {
    "proj_rank_total": 16, "proj_rank_min": 4, "max_samples": N_DOCUMENTS, "pilot_tokens": 200,
    "max_length": MAX_LENGTH, "long_documents": "windows", "basis": "eigen", "encoding": "signs",
    "head_rows": f"{N_ROWS}x{K}", "proj_save_interval": 1, "batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module", params=["sum", "mean"])
def made(request, job, tmp_path_factory):
    """Return ``(store, model folder, loss reduction)`` of a job with head rows."""
    output = tmp_path_factory.mktemp("head") / "out"
    settings = SETTINGS | {"loss_reduction": request.param}
    run_job(shards=job.corpus, model=job.model, output_dir=output, **settings)
    with ProjectionStore(output) as store:
        yield store, job.model, request.param


def slow_rows(model, store, ids, reduction, kept):
    """Return x of all words ``(V, k)`` float64, by the definition and the store's arrays.

    Of each window of a longer document, the ``kept`` largest rows count.
    """
    head = model.get_output_embeddings()
    matrix = torch.tensor(store.array("head_matrix"), dtype=torch.float64).view(K, -1)
    scale = torch.tensor(store.array("head_scale"), dtype=torch.float64)
    total = torch.zeros(len(scale), K, dtype=torch.float64)
    for start in range(0, len(ids) - 1, MAX_LENGTH - 1):
        tokens = torch.tensor(ids[start : start + MAX_LENGTH])
        hidden = model.base_model(input_ids=tokens[None], use_cache=False)[0][0].detach()
        weight = head.weight.detach().clone().requires_grad_()
        logits = F.linear(hidden, weight, head.bias)
        loss = F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        rows = scale[:, None] * (torch.autograd.grad(loss, weight)[0] @ matrix.T)
        largest = rows.norm(dim=1).argsort(descending=True)[:kept]
        total[largest] += rows[largest]
    return total / (len(ids) - 1) if reduction == "mean" else total


def test_stored_rows_and_scores_are_those_of_autograd(made):
    store, folder, reduction = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [document["text"] for document in mixed_documents(N_DOCUMENTS)]
    ok = np.flatnonzero(store.column("status") == STATUS["ok"])
    decoded = store.head.rows(ok)
    dense = np.zeros((len(ok), len(store.array("head_scale")), K))
    n_long = 0
    for n, sample_id in enumerate(ok):
        ids = tokenizer(texts[sample_id]).input_ids
        n_long += len(ids) > MAX_LENGTH
        want = slow_rows(model, store, ids, reduction, WINDOW_ROWS * N_ROWS)
        largest = want.norm(dim=1).argsort(descending=True)[:N_ROWS]
        assert sorted(decoded.ids[n]) == sorted(largest.tolist())
        exact = want[decoded.ids[n]]
        octaves = np.log2(exact.abs().mean(dim=1).numpy() / decoded.scale[n])
        assert np.abs(octaves).max() < 0.2501
        signs = decoded.values(K)[n] > 0
        assert (signs == (exact.numpy() >= 0)).mean() > 0.97  # of values near 0 either is right
        dense[n, decoded.ids[n]] = decoded.values(K)[n]
    assert 3 < n_long < len(ok)
    absent = np.setdiff1d(np.arange(N_DOCUMENTS), ok)
    assert not np.nan_to_num(store.head.rows(absent).scale, nan=0.0).any()

    chosen = ok[:4]
    queries = QueryProjector(store, device="cpu").rows(
        [Query.of(str(i), text=texts[i]) for i in chosen]
    )
    rows = [
        slow_rows(model, store, tokenizer(texts[i]).input_ids, reduction, QUERY_ROWS)
        for i in chosen
    ]
    want = torch.stack(rows).flatten(1).numpy() @ dense.reshape(len(ok), -1).T
    got = HeadScorer(queries.head, store.head.segment).scores(store.head.stored(0, N_DOCUMENTS))
    np.testing.assert_allclose(got[:, ok], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("head_sum", ["plain", "equal"])
def test_kfac_adds_the_head_rows_scores(made, head_sum):
    store, _, reduction = made
    ok = np.flatnonzero(store.column("status") == STATUS["ok"])
    queries = HeadQueries(*decoded_queries(store, ok[:3]))
    rows, n_tokens = store.rows(ok[:3]), store.column("n_tokens")
    layers = score(rows, store, score="kfac", reduction=reduction)
    head = HeadScorer(queries, store.head.segment).scores(store.head.stored(0, N_DOCUMENTS))
    if head_sum == "equal":
        head *= layers[:, ok].std(axis=1, keepdims=True) / head[:, ok].std(axis=1, keepdims=True)
    want = (layers + head)[:, ok]
    options = {"score": "kfac", "layers": None, "reduction": reduction}
    options |= {"head": queries, "head_sum": head_sum}
    got = score(rows, store, **options)
    np.testing.assert_allclose(got[:, ok], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    ranked = Ranker(store, len(ok), 0, options, Preconditioner.fit(store, "kfac"))
    for ranking in ranked.rank(rows, ["auto", 0.03]):  # one scan for both
        by_id = np.take_along_axis(got, ranking.top.ids, axis=1)
        np.testing.assert_allclose(by_id, ranking.top.scores, rtol=1e-4)
    if head_sum == "plain":
        other = "mean" if reduction == "sum" else "sum"
        factors = n_tokens if other == "sum" else 1 / np.maximum(n_tokens, 1)
        got = score(rows, store, **{**options, "reduction": other})
        np.testing.assert_allclose(got[:, ok], want * factors[ok], rtol=1e-3, atol=1e-3)


def decoded_queries(store, ids):
    rows = store.head.rows(ids)
    return rows.ids, rows.values(K)


def test_head_rows_are_refused_where_they_do_not_count(made):
    store, _, _ = made
    queries = HeadQueries(*decoded_queries(store, [0]))
    rows = np.ones((1, store.dim), np.float32)
    with pytest.raises(ConfigError, match="score 'dot' takes no head rows"):
        score(rows, store, score="dot", head=queries)
    with pytest.raises(ConfigError, match="head_sum is 'best'; choose one of plain, equal"):
        score(rows, store, head=queries, head_sum="best")
    with pytest.raises(ConfigError, match="head rows of 1 queries for 2"):
        score(np.concatenate([rows, rows]), store, head=queries)


def test_equal_sums_count_scored_documents_whose_rows_can_be_read(made, monkeypatch):
    store, _, reduction = made
    ok = np.flatnonzero(store.column("status") == STATUS["ok"])
    queries, rows = HeadQueries(*decoded_queries(store, ok[:2])), store.rows(ok[:2])
    options = {"score": "kfac", "reduction": reduction, "head": queries}
    read, domain = store.rows, store.column("domain")
    lost = [int(ok[-1])]

    def with_lost(ids, *args, **kwargs):
        found = read(ids, *args, **kwargs)
        found[np.isin(ids, lost)] = np.nan
        return found

    monkeypatch.setattr(store, "rows", with_lost)
    layers, both = (score(rows, store, **(options | {"head": h})) for h in (None, queries))
    kept = np.setdiff1d(ok, lost)
    factors = layers[:, kept].std(axis=1) / (both - layers)[:, kept].std(axis=1)
    want = layers + (both - layers) * factors[:, None]
    got = score(rows, store, **options, head_sum="equal")
    np.testing.assert_allclose(got[:, kept], want[:, kept], rtol=1e-3, atol=1e-3)
    # Of one domain, only its documents count.
    names, of_last = [store.domains[domain[kept[-1]]]], domain == domain[kept[-1]]
    assert 2 <= of_last[kept].sum() < len(kept)
    kept = kept[of_last[kept]]
    factors = layers[:, kept].std(axis=1) / (both - layers)[:, kept].std(axis=1)
    want = layers + (both - layers) * factors[:, None]
    got = score(rows, store, **options, head_sum="equal", domains=names)
    np.testing.assert_allclose(got[:, kept], want[:, kept], rtol=1e-3, atol=1e-3)
    lost[:] = ok[1:].tolist()
    with pytest.raises(StoreError, match=r"1 of \d+ sampled documents of these domains"):
        score(rows, store, **options, head_sum="equal")


def test_stores_are_queries_by_their_layers_if_one_has_head_rows(made, job, tmp_path, ask):
    store, model, reduction = made
    changes = {"loss_reduction": reduction, "head_rows": "0", "max_samples": 4}
    inputs = {"shards": job.corpus, "model": model, "basis_from": store.path.parent}
    run_job(output_dir=tmp_path / "out", **inputs, **{**SETTINGS, **changes})
    with ProjectionStore(tmp_path / "out") as plain:
        assert rows_of_query_store(plain, store).head is None
        assert rows_of_query_store(store, plain).head is None
    head = rows_of_query_store(store, store).head
    assert head.values.shape[1:] == (N_ROWS, K)
    _, errors = ask(store.path.parent, "--query_store", tmp_path / "out", "--top_k", 2)
    assert "the queries have no head rows: scores are those of the layers alone" in errors


def test_query_model_with_further_words_has_rows_of_the_layers_alone(made, tmp_path):
    store, folder, _ = made
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(tmp_path)
    rows = QueryProjector(store, device="cpu", query_model=str(tmp_path)).rows(
        [Query.of("q", text="the of and to in")]
    )
    assert rows.head is None
    assert rows.rows.any()


def test_head_rows_of_queries_count_against_the_memory_of_rows(made):
    n_bytes = query_head_bytes(made[0])
    assert n_bytes == min(QUERY_ROWS, len(made[0].array("head_scale"))) * (8 + 4 * K)
    check_rows_fit("--queries q", 4, 2**28, 0, "")
    with pytest.raises(ConfigError, match=r"and head rows of .* take 4\.\d+ G"):
        check_rows_fit("--queries q", 4, 2**28, n_bytes, "")
