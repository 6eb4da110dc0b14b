"""Mean, standard error and best documents of groups equal those of all scores in float64."""

import sys

import numpy as np
import pytest
from helpers.analysis_stores import N_SAMPLES, dense_scores, make_store, ok_rows

from gradproj import ProjectionStore
from gradproj.analysis import (
    CONTROL,
    MEANINGS,
    DocumentGroups,
    Preconditioner,
    QuerySets,
    document_groups,
    group_scores,
    score,
)
from gradproj.analysis.ranking import Ranker
from gradproj.errors import ConfigError

C, K = 0.2, 4
NUMBERS = np.random.default_rng(1).integers(-1, 5, N_SAMPLES)
NUMBERS[NUMBERS == 3] = 2
NUMBERS[[0, 5, 33]] = 3, 5, 5
"""Groups of many documents, one of a single document (3), one of documents without rows (5)."""
NAMES = ["a", "b", "c", "single", "e", "without a row"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("groups") / "plain", "float32")


def groups_of(numbers):
    return DocumentGroups(NAMES, "kind", lambda first, last: numbers[first:last])


def queries_for(output, n=3):
    return np.random.default_rng(3).standard_normal((n, output.layout.dim)).astype(np.float32)


def assert_groups(got, values, rtol=1e-5):
    """Compare with scores ``(Q, N)``."""
    ok = ok_rows(None)
    assert got.n_scored == ok.sum()
    for number in range(len(NAMES)):
        ids = np.flatnonzero((number == NUMBERS) & ok)
        assert got.n_documents[number] == len(ids)
        for query, of_query in enumerate(values):
            mean, error = got.mean[query, number], got.standard_error[query, number]
            if len(ids):
                assert mean == pytest.approx(of_query[ids].mean(), rel=rtol, abs=1e-5)
            else:
                assert np.isnan(mean)
            if len(ids) > 1:
                want = of_query[ids].std(ddof=1) / np.sqrt(len(ids))
                assert error == pytest.approx(want, rel=1e-4)
            else:
                assert np.isnan(error)
            best = ids[np.argsort(-of_query[ids], kind="stable")][:K]
            padding = [-1] * (K - len(best))
            assert got.ids[query, number].tolist() == [*best, *padding]
            np.testing.assert_allclose(
                got.scores[query, number, : len(best)], of_query[best], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("rows_per_block", [None, 1, 7])
@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_groups_have_the_moments_of_their_documents_scores(output, kind, rows_per_block):
    settings = {"score": kind} if kind in ("dot", "cosine") else {"score": kind, "damping": C}
    settings["rows_per_block"] = rows_per_block
    with ProjectionStore(output.path) as store:
        got = group_scores(queries_for(output), store, groups_of(NUMBERS), K, **settings)
    assert_groups(got, dense_scores(output, queries_for(output), kind, C))
    order = got.order(0)
    assert set(order) == {0, 1, 2, 3, 4}
    assert (np.diff(got.mean[0, order]) <= 0).all()


def test_groups_of_sets_of_queries_and_through_a_file(output, tmp_path, monkeypatch):
    """Also in several scans, and with so few bytes that the best are sorted often."""
    monkeypatch.setattr(sys.modules["gradproj.analysis.top_k"], "_MIN_PENDING", 1)
    monkeypatch.setattr("gradproj.analysis.ranking._QUERY_BYTES_PER_SCAN", 1)
    queries = queries_for(output, 4)
    sets = QuerySets(["x", "y"], np.array([1, 0, CONTROL, 1]), "max")
    with ProjectionStore(output.path) as store:
        for chosen in (sets, None):
            options = {"score": "kfac", "layers": None, "sets": chosen}
            values = score(queries, store, **options)
            ranker = Ranker(store, 1, 1, options, Preconditioner.fit(store, "kfac"))
            stream = ranker.stream(queries, "auto")
            assert len(stream.parts) == (1 if chosen else 4)
            assert_groups(stream.groups(groups_of(NUMBERS), K), values)
            path = tmp_path / f"{chosen is None}.npy"
            assert_groups(stream.groups(groups_of(NUMBERS), K, path), values)
            np.testing.assert_allclose(np.load(path), values, rtol=1e-5, atol=1e-5)


def test_groups_beyond_the_memory_are_refused(output, monkeypatch):
    monkeypatch.setattr(document_groups, "MAX_BYTES", 3 * 6 * (16 + 12 * K) - 1)
    with (
        ProjectionStore(output.path) as store,
        pytest.raises(ConfigError, match="6 groups by kind, for 3 queries: their sums take"),
    ):
        group_scores(queries_for(output), store, groups_of(NUMBERS), K)
