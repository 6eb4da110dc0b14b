"""Domain statistics equal their definitions in float64."""

import numpy as np
import pytest
from helpers.analysis_stores import (
    N_SAMPLES,
    NAMES,
    columns_of,
    dense_curvature,
    make_store,
    ok_rows,
)

from gradproj import ProjectionStore
from gradproj.analysis import domain_matrix, domains, overview, score, self_influence
from gradproj.errors import ConfigError

C = 0.1
DOMAIN = np.arange(N_SAMPLES) % 3 - 1


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("domains") / "out", "float16")


def members(output):
    return [ok_rows(output) & (number == DOMAIN) for number in (0, 1)]


@pytest.mark.parametrize("layers", [None, [NAMES[2], NAMES[0]]], ids=["all", "two"])
@pytest.mark.parametrize("kind", ["kfac", "preconditioned", "dot"])
def test_means_cosines_and_influences_equal_their_definitions(output, kind, layers):
    rows = output.decoded().astype(np.float64)[:, columns_of(layers)]
    mean = np.stack([rows[member].mean(axis=0) for member in members(output)])
    curvature = np.eye(rows.shape[1])
    settings = {"score": kind}
    if kind != "dot":
        curvature = dense_curvature(output, {"kfac": "kfac"}.get(kind, "second_moment"), C, layers)
        settings["damping"] = C
    with ProjectionStore(output.path) as store:
        got = domain_matrix(store, layers=layers, rows_per_block=11, **settings)
    assert got.names == ["ArXiv", "Github"]
    np.testing.assert_allclose(got.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(got.influence, mean @ np.linalg.inv(curvature) @ mean.T, rtol=1e-7)
    norms = np.linalg.norm(mean, axis=1)
    np.testing.assert_allclose(got.cosine, mean @ mean.T / np.outer(norms, norms), rtol=1e-9)


@pytest.mark.parametrize("kind", ["kfac", "dot", "cosine"])
def test_influence_is_the_mean_score_over_all_pairs_of_documents(output, kind):
    rows, member = output.decoded(), members(output)
    with ProjectionStore(output.path) as store:
        got = domain_matrix(store, score=kind)
        every = score(rows[member[0] | member[1]], store, score=kind).astype(np.float64)
    query_domain = DOMAIN[member[0] | member[1]]
    for g, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert got.influence[g, h] == pytest.approx(
            every[query_domain == g][:, member[h]].mean(), rel=2e-4
        )


def test_overview_gives_matrix_and_largest_self_influences_in_one_scan(output, monkeypatch):
    with ProjectionStore(output.path) as store:
        self_scores, want = self_influence(store), domain_matrix(store)
        monkeypatch.setattr(store, "scan", count_calls(store.scan))
        got = overview(store, 5, rows_per_block=13)
        assert store.scan.calls == 1
        assert overview(store, 1000).self_influence.shape == (ok_rows(output).sum(),)
        assert not len(overview(store, 5, score="cosine").ids)
        store.domains = []
        without = overview(store, 5)
    assert (
        got.ids.tolist()
        == np.argsort(-np.nan_to_num(self_scores, nan=-1))[:5].tolist()
        == without.ids.tolist()
    )
    np.testing.assert_array_equal(got.self_influence, self_scores[got.ids])
    np.testing.assert_allclose(got.domains.influence, want.influence)
    assert without.domains is None


def count_calls(function):
    def counted(*args, **kwargs):
        counted.calls += 1
        return function(*args, **kwargs)

    counted.calls = 0
    return counted


def test_short_memory_reduces_the_rows_drawn_for_ranks(output, monkeypatch):
    monkeypatch.setattr(domains, "RANK_BYTES", 1)
    monkeypatch.setattr(domains, "MIN_RANK_ROWS", 9)
    with ProjectionStore(output.path) as store:
        got = domain_matrix(store)
    assert got.n_drawn.tolist() == [9, 9]
    assert (got.effective_rank <= 9).all()


def test_counts_losses_and_norms_are_per_domain(output):
    ids = np.arange(N_SAMPLES)
    rows = output.decoded().astype(np.float64)
    with ProjectionStore(output.path) as store:
        got = domain_matrix(store)
    for number, member in enumerate(members(output)):
        tokens = ids[member] + 1
        assert got.n_rows[number] == member.sum()
        assert got.n_tokens[number] == tokens.sum()
        assert got.loss[number] == pytest.approx((ids[member] / 8 * tokens).sum() / tokens.sum())
        assert got.grad_norm[number] == pytest.approx(np.linalg.norm(rows[member], axis=1).mean())


def test_effective_rank_is_computed_from_row_directions(output):
    rows = output.decoded().astype(np.float64)
    with ProjectionStore(output.path) as store:
        got = domain_matrix(store)
    for number, member in enumerate(members(output)):
        unit = rows[member] / np.linalg.norm(rows[member], axis=1, keepdims=True)
        shares = np.linalg.svd(unit, compute_uv=False) ** 2
        shares /= shares.sum()
        assert got.effective_rank[number] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_rows_drawn_for_ranks_do_not_depend_on_block_size(output, monkeypatch):
    monkeypatch.setattr(domains, "RANK_ROWS", 9)
    with ProjectionStore(output.path) as store:
        ranks = [domain_matrix(store, rows_per_block=n).effective_rank for n in (3, 16, 1000)]
    np.testing.assert_allclose(ranks[1:], [ranks[0]] * 2)
    assert (ranks[0] <= 9).all()


def test_domain_without_rows_is_nan(output):
    with ProjectionStore(output.path) as store:
        got = domain_matrix(store, domains=["Github"])
    assert got.n_rows.tolist() == [0, members(output)[1].sum()]
    for values in (
        got.loss,
        got.grad_norm,
        got.effective_rank,
        got.mean,
        got.cosine,
        got.influence,
    ):
        assert np.isnan(values[0]).all()
        assert np.isfinite(np.atleast_1d(values[1])[-1])


def test_unsupported_score_and_missing_domains_are_rejected(output):
    with ProjectionStore(output.path) as store:
        with pytest.raises(
            ConfigError,
            match="domain_matrix does not support score 'relatif'; choose one of kfac, ekf",
        ):
            domain_matrix(store, score="relatif")
        store.domains = []
        with pytest.raises(ConfigError, match="has no domains: its documents name none"):
            domain_matrix(store)
