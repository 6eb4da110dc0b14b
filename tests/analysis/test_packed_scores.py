"""Scores of packed rows, and of rows in an eigenbasis, equal their definitions in float64."""

import numpy as np
import pytest
import torch
from helpers.analysis_stores import (
    N_SAMPLES,
    NAMES,
    PILOT_DAMPING,
    dense_scores,
    make_store,
    ok_rows,
    rewrite_rows,
)

from gradproj import ProjectionStore
from gradproj.analysis import (
    DEFAULT_SCORE,
    MEANINGS,
    Preconditioner,
    domain_matrix,
    overview,
    score,
    self_influence,
)
from gradproj.analysis.ranking import Ranker
from gradproj.analysis.reduction import length_percentiles
from gradproj.analysis.row_blocks import Block, SampleFilter, decoded_on
from gradproj.analysis.score_types import SELF_SCORES
from gradproj.cli.score_args import ScoreArgs
from gradproj.errors import ConfigError, StoreError
from gradproj.store.writer import write_array, write_column_block

STORES = {
    "signs": {"encoding": "signs", "eigen": True},
    "int2": {"encoding": "int2", "eigen": True},
    "int4": {"encoding": "int4", "eigen": True},
    "int8": {"encoding": "int8", "eigen": True},
    "dense": {"eigen": True},
    "float16": {"proj_dtype": "float16", "eigen": True},
    "signs, random basis": {"encoding": "signs"},
    "int4, random basis": {"encoding": "int4"},
    "signs, compressed": {"encoding": "signs", "eigen": True, "compressor": "zstd"},
}
LAYERS = {"all": None, "two-turned": [NAMES[2], NAMES[0]]}
C = 0.2


@pytest.fixture(scope="module", params=STORES)
def output(request, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("packed") / "out", **STORES[request.param])


@pytest.fixture
def store(output):
    with ProjectionStore(output.path) as opened:
        yield opened


def queries_for(output, n=3):
    return np.random.default_rng(3).standard_normal((n, output.layout.dim)).astype(np.float32)


def settings_for(kind, damping=C):
    return {"score": kind} if kind in ("dot", "cosine") else {"score": kind, "damping": damping}


def assert_scores(got, want, rtol=1e-5):
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=3e-6 * np.nanmax(np.abs(want)))


@pytest.mark.parametrize("n_queries", [3, 5])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_scores_equal_their_definitions_in_float64(output, store, kind, layers, n_queries):
    queries, names = queries_for(output, n_queries), LAYERS[layers]
    got = score(queries, store, layers=names, **settings_for(kind))
    assert_scores(got, dense_scores(output, queries, kind, C, names))


@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_a_device_that_unpacks_rows_gives_the_same_scores(output, store, kind, monkeypatch):
    """Run the code path of a GPU on the CPU."""
    monkeypatch.setattr("gradproj.analysis.score_blocks._parts_fit_tiles", lambda *_: False)
    monkeypatch.setattr(
        "gradproj.analysis.scan.scan_blocks",
        lambda store, layers, domains, device, *rest: blocks_of(store, layers, device),
    )
    queries = queries_for(output)
    got = score(queries, store, **settings_for(kind))
    assert_scores(got, dense_scores(output, queries, kind, C))


def blocks_of(store, layers, device):
    for ids, rows in decoded_on(device, store, layers, 9):
        first, last = int(ids[0]), int(ids[-1]) + 1
        ok = SampleFilter(store, None)(first, store.column("status", first, last))
        yield Block(first, ok, rows)


@pytest.mark.parametrize("layers", LAYERS)
def test_rows_decoded_on_the_device_equal_the_store_s(store, layers):
    names = LAYERS[layers]
    want = np.concatenate([rows for _, rows in store.scan(layers=names)])
    got = torch.cat([rows for _, rows in decoded_on(torch.device("cpu"), store, names, 9)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", SELF_SCORES)
def test_self_influence_is_the_score_with_itself(output, store, kind, layers):
    names, rows = LAYERS[layers], np.nan_to_num(output.decoded())
    got = self_influence(store, layers=names, **settings_for(kind))
    assert_scores(got, np.diagonal(dense_scores(output, rows, kind, C, names)))


def weight_of_plain(store):
    """Factors that make plain gradients of rows, ``(D,)``."""
    eigenvalues = store.basis_eigenvalues
    if eigenvalues is None:
        return np.ones(store.dim)
    parts = [
        np.outer(e_o + PILOT_DAMPING * e_o.mean(), e_i + PILOT_DAMPING * e_i.mean()) ** 0.5
        for e_i, e_o in eigenvalues.values()
    ]
    return np.concatenate([part.ravel() for part in parts])


def test_kfac_in_an_eigenbasis_is_the_plain_product(tmp_path):
    """At the pilot's damping, without covariances and without a merge."""
    output = make_store(tmp_path / "out", encoding="signs", eigen=True)
    queries = queries_for(output)
    want = queries.astype(float) @ output.decoded().astype(float).T
    want[:, ~ok_rows(output)] = np.nan
    with ProjectionStore(output.path) as store:
        assert "covariance_tokens" not in store.attributes
        assert ScoreArgs().score_for(store) == DEFAULT_SCORE
        for damping in ("auto", PILOT_DAMPING):
            assert_scores(score(queries, store, score="kfac", damping=damping), want)


@pytest.mark.parametrize("encoding", ["signs", "int4", "dense"])
@pytest.mark.parametrize("kind", ["relatif", "cosine"])
def test_relatif_divides_by_the_norm_of_the_row_and_cosine_by_the_plain_one(
    tmp_path, encoding, kind, monkeypatch
):
    output = make_store(tmp_path / "out", encoding=encoding, eigen=True)
    queries = queries_for(output)
    want = dense_scores(output, queries, kind, PILOT_DAMPING)
    with ProjectionStore(output.path) as store:
        turned = score(queries, store, score=kind, layers=NAMES)
        if encoding == "signs" or (kind == "relatif" and encoding == "dense"):
            monkeypatch.setattr("gradproj.analysis.score_blocks._score_rows", None)  # no row needed
        got = score(queries, store, score=kind)
    assert_scores(got, want)
    assert_scores(turned, want)


def test_curvatures_in_an_eigenbasis_are_saved_and_loaded(output, store):
    fitted = Preconditioner.fit(store, "kfac", C)
    fitted.save(store)
    queries = queries_for(output)
    loaded = Preconditioner.load(store, "kfac")
    got = score(queries, store, score="kfac", preconditioner=loaded)
    np.testing.assert_array_equal(got, score(queries, store, score="kfac", preconditioner=fitted))
    assert loaded.n_rows == 900


def test_damping_zero_is_refused_where_an_eigenvalue_is_zero(tmp_path):
    output = make_store(tmp_path / "out", encoding="signs", eigen=True)
    path = output.store_path
    with ProjectionStore(output.path) as store:
        flat = store.array("basis_eigenvalues")
    flat[0] = 0
    write_array(path, "basis_eigenvalues", flat)
    with ProjectionStore(output.path) as store:
        with pytest.raises(ConfigError, match=r"h\.0\.mlp's inputs, 3 wide, has no inverse"):
            score(queries_for(output), store, score="kfac", damping=0.0)
        assert np.isfinite(score(queries_for(output), store, score="kfac")).any()


def test_several_dampings_in_one_scan_rank_as_each_alone(output, store):
    queries, dampings = queries_for(output), [0.03, 1.0]
    options = {"score": "kfac", "layers": None, "domains": None}
    fitted = Preconditioner.fit(store, "kfac")
    rankings = Ranker(store, 5, 5, options, fitted).rank(queries, dampings)
    for ranking, damping in zip(rankings, dampings, strict=True):
        scores = dense_scores(output, queries, "kfac", damping)
        order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")
        np.testing.assert_array_equal(ranking.top.ids, order[:, :5])


@pytest.mark.parametrize("kind", ["kfac", "dot", "cosine"])
def test_domains_have_the_mean_score_of_their_documents(output, store, kind):
    matrix = domain_matrix(store, **settings_for(kind))
    rows, ok = np.nan_to_num(output.decoded()), ok_rows(output)
    pairs = dense_scores(output, rows, kind, C)
    domain = np.arange(N_SAMPLES) % 3 - 1
    for i in range(2):
        for j in range(2):
            mean = pairs[np.ix_(ok & (domain == i), ok & (domain == j))].mean()
            np.testing.assert_allclose(matrix.influence[i, j], mean, rtol=1e-5)
    plain = rows * weight_of_plain(store)
    means = np.stack([plain[ok & (domain == i)].mean(axis=0) for i in range(2)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(matrix.cosine, means @ means.T, rtol=1e-5)
    seen = overview(store, 3, **settings_for(kind))
    if kind != "cosine":
        own = self_influence(store, **settings_for(kind))
        want = np.argsort(-np.nan_to_num(own, nan=-1), kind="stable")[:3]
        np.testing.assert_array_equal(seen.ids, want)


@pytest.mark.parametrize("stored", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["kfac", "dot", "relatif"])
def test_reduction_turns_rows_of_sums_and_of_means_into_each_other(tmp_path, kind, stored):
    output = make_store(tmp_path / "out", loss_reduction=stored)
    queries, n_tokens = queries_for(output), np.arange(1, N_SAMPLES + 1)
    plain = dense_scores(output, queries, kind, C)
    factors = {"sum": 1.0, "mean": 1 / n_tokens}
    with ProjectionStore(output.path) as store:
        for wanted in ("sum", "mean"):
            got = score(queries, store, reduction=wanted, **settings_for(kind))
            factor = 1 if kind == "relatif" else factors[wanted] / factors[stored]
            assert_scores(got, plain * factor)
            if kind != "relatif":
                rows = np.nan_to_num(output.decoded())
                own = np.diagonal(dense_scores(output, rows, kind, C)) * factor**2
                assert_scores(self_influence(store, reduction=wanted, **settings_for(kind)), own)
        default = score(queries, store, **settings_for(kind))
        np.testing.assert_array_equal(
            default, score(queries, store, reduction="sum", **settings_for(kind))
        )
        with pytest.raises(ConfigError, match="reduction is 'max'; choose one of sum, mean"):
            score(queries, store, reduction="max")


def test_reduction_is_refused_where_numbers_of_tokens_are_unknown(tmp_path):
    output = make_store(tmp_path / "out")
    tokens = np.zeros(N_SAMPLES, np.int32)
    write_column_block(output.store_path, output.layout, 0, {"n_tokens": tokens})
    with ProjectionStore(output.path) as store:
        assert np.isfinite(score(queries_for(output), store, score="dot")).any()
        with pytest.raises(StoreError, match=r"how many tokens sample 0 has(.|\n)*--reduction sum"):
            score(queries_for(output), store, score="dot", reduction="mean")


def test_lengths_are_those_of_documents_with_a_row(tmp_path):
    output = make_store(tmp_path / "out")
    with ProjectionStore(output.path) as store:
        want = np.percentile(np.arange(1, N_SAMPLES + 1)[ok_rows(output)], (10, 90))
        assert length_percentiles(store) == pytest.approx(want)


@pytest.mark.parametrize("encoding", ["dense", "signs"])
def test_self_influences_are_computed_once_and_again_after_a_change(
    tmp_path, encoding, monkeypatch
):
    output = make_store(tmp_path / "out", encoding=encoding)
    queries, notes = queries_for(output), []
    options = {"score": "relatif", "layers": None, "domains": None}
    folder = output.path / "preconditioners"

    def top(damping):
        with ProjectionStore(output.path) as store:
            ranker = Ranker(store, 5, 0, options, Preconditioner.fit(store), notes.append)
            ends = ranker.rank(queries, [damping])[0].top
        scores = dense_scores(output, queries, "relatif", damping)
        want = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")[:, :5]
        np.testing.assert_array_equal(ends.ids, want)
        np.testing.assert_allclose(ends.scores, np.take_along_axis(scores, want, 1), rtol=1e-4)

    top(C)
    (kept,) = folder.iterdir()
    monkeypatch.setattr("gradproj.analysis.norm_cache.self_products_of_blocks", None)
    top(C)  # from the file
    monkeypatch.undo()
    top(0.5)
    assert len(list(folder.iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    top(C)
    assert [note for note in notes if "damaged" in note]
    rewrite_rows(output)
    top(C)
    (kept,) = folder.iterdir()  # those of the rows before are gone
