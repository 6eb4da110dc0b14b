"""Diverse choices: compared with the obvious greedy loop over float64 cosines."""

import numpy as np
import pytest
from helpers.analysis_stores import NAMES, dense_scores, make_store, ok_rows

from gradproj import ProjectionStore
from gradproj.selection.diverse import cosines_of, diverse
from gradproj.selection.score_lists import Chosen


def slow_choice(scores, cosines, weight, costs, budget):
    """Return the order of choice by the formula in the module's text, one candidate at a time."""
    relevance = (scores - scores[-1]) / (scores[0] - scores[-1])
    chosen = [0]
    while len(chosen) < len(scores):
        values = {
            d: (1 - weight) * relevance[d] - weight * max(cosines[d, c] for c in chosen)
            for d in range(len(scores))
            if d not in chosen
        }
        chosen.append(max(values, key=lambda d: (values[d], -d)))
    total = np.cumsum(costs[chosen])
    return chosen[: int((total <= budget).sum())]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bottom", [False, True])
@pytest.mark.parametrize("in_tokens", [False, True])
def test_choices_equal_the_obvious_greedy_loop(weight, bottom, in_tokens):
    generator = np.random.default_rng(4)
    rows = generator.standard_normal((40, 6))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    scores = -np.sort(-generator.standard_normal(40)).astype(np.float32) * (-1 if bottom else 1)
    costs = generator.integers(1, 9, 40) if in_tokens else np.ones(40, int)
    budget = 60 if in_tokens else 15
    cosines = (rows @ rows.T).astype(np.float32)
    got = diverse(Chosen(np.arange(40), scores), cosines, weight, costs, budget)
    want = slow_choice(scores.astype(float), cosines.astype(float), weight, costs, budget)
    assert got.tolist() == want
    assert 1 < len(got) < 40


def test_a_copy_is_chosen_last():
    rows = np.eye(4)[[0, 0, 1, 2]]
    pool = Chosen(np.arange(4), np.array([1, 1, 0.5, 0.4], np.float32))
    assert diverse(pool, rows @ rows.T, 0.6, np.ones(4, int), 4).tolist() == [0, 2, 3, 1]


def test_equal_scores_and_one_candidate_are_chosen_in_order():
    one = np.ones((1, 1), np.float32)
    assert diverse(Chosen(np.array([7]), np.array([3.0])), one, 0.5, np.ones(1, int), 1) == [0]
    same = Chosen(np.arange(3), np.full(3, 2.0))
    assert diverse(same, np.eye(3), 0.5, np.ones(3, int), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize("layers", [None, NAMES[1:]])
def test_cosines_are_those_of_the_cosine_score(tmp_path, eigen, layers):
    output = make_store(tmp_path / "out", eigen=eigen)
    ids = np.flatnonzero(ok_rows(output))[::-3].copy()
    rows = output.decoded()
    want = dense_scores(output, rows[ids], "cosine", 0, layers)[:, ids]
    with ProjectionStore(output.path) as store:
        got = cosines_of(store, ids, layers)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_row_of_zeros_has_the_cosine_0(tmp_path):
    output = make_store(tmp_path / "out")
    with ProjectionStore(output.path) as store:
        rows = store.rows
        store.rows = lambda ids, layers: rows(ids, layers) * (np.asarray(ids) != 2)[:, None]
        got = cosines_of(store, np.array([1, 2, 3]))
    assert (got[1] == 0).all()
    assert got[0, 2] != 0
    assert got[0, 0] == pytest.approx(1)
