"""Scores of sets of queries equal means and maxima of the queries' scores in float64."""

import numpy as np
import pytest
from helpers.analysis_stores import (
    NAMES,
    columns_of,
    dense_curvature,
    dense_scores,
    make_store,
)
from test_scores import assert_scores

from gradproj import ProjectionStore
from gradproj.analysis import (
    CONTROL,
    MEANINGS,
    Preconditioner,
    QuerySets,
    query_sets,
    score,
    scores,
    self_influence,
    top_and_bottom,
)
from gradproj.analysis.ranking import Ranker
from gradproj.errors import ConfigError
from gradproj.store.head_rows import HeadQueries

C = 0.2
KINDS = {"kfac": "kfac", "relatif": "kfac", "ekfac": "ekfac", "preconditioned": "second_moment"}
SETS = np.array([1, 0, CONTROL, 1, 2, 1, CONTROL, 0])
"""Interleaved, of 2, 3 and 1 queries, and 2 of the control set."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {
        "plain": make_store(folder / "plain", "float32"),
        "eigen": make_store(folder / "eigen", eigen=True),
        "signs": make_store(folder / "signs", encoding="signs"),
    }


def queries_for(output, scale=1.0):
    random = np.random.default_rng(5)
    rows = random.standard_normal((len(SETS), output.layout.dim))
    # Of very different lengths, so that it matters whether they are scaled.
    return (rows * scale * 10 ** random.uniform(-2, 2, (len(SETS), 1))).astype(np.float32)


def dense_set_scores(output, queries, of_query, aggregate, unit, kind, layers=None):
    """Return ``(G, N)`` float64 from each query's own scores."""
    values = dense_scores(output, queries, kind, C, layers)
    if unit and kind != "cosine":  # whose queries have unit length anyway
        chosen = queries[:, columns_of(layers)].astype(np.float64)
        inverse = np.eye(chosen.shape[1])
        if kind in KINDS:
            inverse = np.linalg.inv(dense_curvature(output, KINDS[kind], C, layers))
        elif output.path.name == "eigen":
            inverse = np.linalg.inv(dense_curvature(output, "plain", 0, layers))
        values /= np.sqrt(np.einsum("qd,de,qe->q", chosen, inverse, chosen))[:, None]
    combine = {"mean": np.mean, "max": np.max, "none": np.max}[aggregate]
    n_sets = of_query.max() + 1
    of_sets = np.stack([combine(values[of_query == g], axis=0) for g in range(n_sets)])
    return of_sets - (values[of_query == CONTROL].mean(0) if (of_query == CONTROL).any() else 0)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("name", ["plain", "eigen", "signs"])
@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_scores_of_sets_equal_those_of_their_queries(outputs, kind, name, aggregate, monkeypatch):
    output, queries = outputs[name], queries_for(outputs[name])
    settings = {"score": kind} if kind in ("dot", "cosine") else {"score": kind, "damping": C}
    monkeypatch.setattr(query_sets, "_SOLVED_BYTES", 3 * 8 * output.layout.dim)  # three at a time
    for unit, of_query, layers in (
        (True, SETS, None),
        (False, SETS, [NAMES[2], NAMES[0]]),
        (True, SETS[SETS != CONTROL], None),
    ):
        rows = queries[: len(of_query)]
        sets = QuerySets(["a", "b", "c"], of_query, aggregate, unit)
        with ProjectionStore(output.path) as store:
            got = score(rows, store, sets=sets, layers=layers, **settings)
        want = dense_set_scores(output, rows, of_query, aggregate, unit, kind, layers)
        assert_scores(got, want)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_weights_of_queries_count_in_their_sets(outputs, aggregate, unit):
    output, queries = outputs["plain"], queries_for(outputs["plain"])[:5]
    weights = np.array([2.0, 0.5, 3.0, 10.0, 0.1])
    # The projector's rows hold the weights.
    rows = (queries * weights[:, None]).astype(np.float32)
    sets = QuerySets.of_groups(["x", "x", "y", "x"], 1, aggregate, unit, weights)
    with ProjectionStore(output.path) as store:
        got = score(rows, store, score="dot", sets=sets)
    values = queries.astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True) if unit else 1
    values = dense_scores(output, values * weights[:, None], "dot", 0)
    combine = getattr(np, aggregate)
    want = np.stack([combine(values[[0, 1, 3]], axis=0), values[2]]) - values[4]
    assert_scores(got, want)


def test_a_contrast_alone_keeps_the_queries_apart(outputs):
    output, queries = outputs["plain"], queries_for(outputs["plain"])[:4]
    sets = QuerySets.of_groups(["x", "y", "z"], 1, "none")
    np.testing.assert_array_equal(sets.of_query, [0, 1, 2, CONTROL])
    with ProjectionStore(output.path) as store:
        got = score(queries, store, score="dot", sets=sets)
    assert_scores(got, dense_set_scores(output, queries, sets.of_query, "none", True, "dot"))


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_rankings_of_sets_take_one_scan_for_all_dampings(outputs, aggregate, monkeypatch):
    """Queries of any number and size are one scan, in which each byte is read once."""
    output, queries = outputs["plain"], queries_for(outputs["plain"])
    sets = QuerySets(["a", "b", "c"], SETS, aggregate)
    scans, scan = [], scores.score_blocks
    monkeypatch.setattr(scores, "score_blocks", lambda *a: scans.append(1) or scan(*a))
    monkeypatch.setattr("gradproj.analysis.ranking._QUERY_BYTES_PER_SCAN", 1)
    with ProjectionStore(output.path) as store:
        fitted = Preconditioner.fit(store, "kfac")
        options = {"score": "kfac", "layers": None, "sets": sets}
        rankings = Ranker(store, 6, 3, options, fitted).rank(queries, [C, 5.0])
        assert len(scans) == 1
        for ranking in rankings:
            want = top_and_bottom(
                queries, store, 6, 3, score="kfac", damping=ranking.damping, sets=sets
            )
            for end, wanted in zip((ranking.top, ranking.bottom), want, strict=True):
                np.testing.assert_array_equal(end.ids, wanted.ids)
                np.testing.assert_allclose(end.scores, wanted.scores, rtol=1e-4)


def test_head_rows_of_a_set_are_summed_by_token():
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(9)[:4] for _ in range(5)])
    head = HeadQueries(ids, random.standard_normal((5, 4, 3)).astype(np.float32))
    head.values[2, 1:] = 0
    row_of, factors = np.array([1, 0, 1, 1, 0]), np.arange(1.0, 6)
    want = np.zeros((2, 9, 3))
    for query in range(5):
        np.add.at(want[row_of[query]], ids[query], factors[query] * head.values[query])
    got, dense = head.summed(row_of, factors, 2), np.zeros((2, 9, 3))
    for row in range(2):
        used = got.values[row].any(axis=1)
        assert len(set(got.ids[row, used])) == used.sum()
        np.add.at(dense[row], got.ids[row], got.values[row])
    np.testing.assert_allclose(dense, want, rtol=1e-6)


def test_a_query_without_gradient_counts_nothing(outputs):
    output, queries = outputs["plain"], queries_for(outputs["plain"])[:2]
    with ProjectionStore(output.path) as store:
        alone = score(queries[:1], store, score="dot", sets=QuerySets.of_groups(["a"]))
        queries[1] = 0
        both = score(queries, store, score="dot", sets=QuerySets.of_groups(["a", "a"]))
    np.testing.assert_allclose(both, alone / 2)


def test_sets_that_fit_no_queries_are_refused(outputs):
    for names, of_query, aggregate, message in (
        (["a", "b"], [0, 0], "mean", "every set needs a query"),
        (["a"], [CONTROL], "mean", "every set needs a query"),
        (["a"], [0, 3], "mean", "one of the named sets"),
        (["a"], [0, 0], "none", "take mean or max"),
        (["a"], [0], "median", "choose one of none, mean, max"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuerySets(names, np.array(of_query), aggregate)
    sets = QuerySets.of_groups(["a"])
    with ProjectionStore(outputs["plain"].path) as store:
        with pytest.raises(ConfigError, match="sets are of 1 queries, not of 8"):
            score(queries_for(outputs["plain"]), store, sets=sets)
        with pytest.raises(ConfigError, match="self_influence does not take sets"):
            self_influence(store, sets=sets)
