"""The linear datamodeling score, its errors and the text baselines, against slow references."""

import numpy as np
import pytest

from gradproj.errors import ConfigError
from gradproj.evaluation.baselines import bm25, ngram_overlap
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.leave_out import _result, best_of_all
from gradproj.evaluation.methods import names_of
from gradproj.evaluation.retrieval import near_copies, retrieval
from gradproj.evaluation.statistics import (
    Bootstrap,
    lds_by_query,
    noise_ceiling,
    permutation_baseline,
    rank_values,
    spearman,
)


def rank_by_hand(values: list[float], i: int) -> float:
    """Return the position in sorted order, the mean position of equal values."""
    places = [place for place, value in enumerate(sorted(values), start=1) if value == values[i]]
    return sum(places) / len(places)


def spearman_by_hand(x: list[float], y: list[float]) -> float:
    a = [rank_by_hand(x, i) for i in range(len(x))]
    b = [rank_by_hand(y, i) for i in range(len(y))]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    product = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    squares = sum((p - mean_a) ** 2 for p in a) * sum((q - mean_b) ** 2 for q in b)
    return product / squares**0.5


@pytest.fixture
def toy():
    """Return ``(scores, subsets, losses)``: losses are minus the summed true scores, plus noise."""
    random = np.random.default_rng(0)
    n_queries, n, n_subsets, n_seeds = 12, 60, 300, 2
    truth = random.standard_normal((n_queries, n))
    subsets = np.zeros((n_subsets, n), bool)
    for subset in subsets:
        subset[random.permutation(n)[: n // 2]] = True
    signal = (truth @ subsets.T).T
    noise = random.standard_normal((n_subsets, n_seeds, n_queries)) * signal.std(axis=0)
    return truth, subsets, 5.0 - signal[:, None, :] + noise


def test_equal_values_share_their_mean_rank():
    values = [3.0, 1.0, 3.0, 2.0, 3.0, 1.0]
    assert rank_values(np.array(values)).tolist() == [rank_by_hand(values, i) for i in range(6)]
    assert rank_values(np.array([1.0, 1.0, 4.0])).tolist() == [1.5, 1.5, 3.0]


def test_spearman_is_the_correlation_of_ranks_with_ties():
    random = np.random.default_rng(1)
    x, y = random.integers(0, 5, (3, 11)).astype(float), random.standard_normal((3, 11))
    want = [spearman_by_hand(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    np.testing.assert_allclose(spearman(x, y), want, atol=1e-12)


def test_constant_values_have_correlation_zero():
    assert spearman(np.ones(5), np.arange(5.0)) == 0


def test_lds_is_spearman_of_summed_scores_with_minus_the_mean_loss(toy):
    scores, subsets, losses = toy[0][:3], toy[1][:9], toy[2][:9, :, :3]
    for query, got in enumerate(lds_by_query(scores, subsets, losses)):
        predicted = [sum(scores[query][i] for i in range(60) if subset[i]) for subset in subsets]
        measured = [-sum(losses[m, :, query].tolist()) / 2 for m in range(9)]
        assert got == pytest.approx(spearman_by_hand(predicted, measured), abs=1e-12)


def test_ceiling_is_what_the_noise_of_the_seeds_allows(toy):
    # Noise as large as the signal, two seeds: reliability 1 / (1 + 1/2).
    assert noise_ceiling(toy[2]) == pytest.approx((2 / 3) ** 0.5, abs=0.03)
    assert noise_ceiling(np.repeat(toy[2][:, :1], 2, axis=1)) == pytest.approx(1)
    assert np.isnan(noise_ceiling(toy[2][:, :1]))
    assert noise_ceiling(np.random.default_rng(2).standard_normal((200, 2, 8))) < 0.3


def test_true_scores_reach_the_ceiling_and_shuffled_ones_zero(toy):
    scores, subsets, losses = toy
    assert lds_by_query(scores, subsets, losses).mean() == pytest.approx(
        noise_ceiling(losses), abs=0.03
    )
    mean, spread = permutation_baseline(scores, subsets, losses, 20, seed=0)
    assert abs(mean) < 4 * spread / 20**0.5 + 0.01
    assert spread < 0.1


def test_negated_scores_have_the_negated_lds(toy):
    scores, subsets, losses = toy
    np.testing.assert_allclose(
        lds_by_query(-scores, subsets, losses), -lds_by_query(scores, subsets, losses), atol=1e-12
    )


def test_bootstrap_sample_is_the_lds_on_the_drawn_subsets(toy):
    scores, subsets, losses = toy[0], toy[1][:20], toy[2][:20]
    bootstrap = Bootstrap(subsets, losses, n_samples=5, seed=3)
    _, of_samples = bootstrap.by_query(scores)
    drawn = np.random.default_rng([3, 7]).integers(0, 20, (5, 20))
    want = [lds_by_query(scores, subsets[chosen], losses[chosen]).mean() for chosen in drawn]
    np.testing.assert_allclose(of_samples, want, atol=1e-12)


def test_bootstrap_error_matches_the_spread_over_other_subsets(toy):
    scores, subsets, losses = toy
    bootstrap = Bootstrap(subsets[:60], losses[:60], 400, 0)
    error = Bootstrap.estimate(*bootstrap.by_query(scores)).over_subsets
    others = [
        lds_by_query(scores, subsets[i : i + 60], losses[i : i + 60]).mean()
        for i in range(0, 300, 60)
    ]
    assert np.std(others, ddof=1) / 3 < error < np.std(others, ddof=1) * 3


def test_equal_methods_differ_by_zero_without_error(toy):
    scores, subsets, losses = toy
    bootstrap = Bootstrap(subsets[:20], losses[:20], 10, 0)
    (a, a_samples), (b, b_samples) = bootstrap.by_query(scores), bootstrap.by_query(2 * scores)
    difference = Bootstrap.estimate(a - b, a_samples - b_samples)
    assert difference.mean == difference.over_queries == difference.over_subsets == 0


# --- baselines and retrieval


def test_each_common_ngram_counts_once():
    documents = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 1, 2], [9, 9, 9, 9, 9, 9]])
    queries = np.array([[1, 2, 3, 4, 5, 9], [9, 9, 9, 9, 9, 9]])
    assert ngram_overlap(documents, queries).tolist() == [[2, 1, 0], [0, 0, 1]]


def test_bm25_is_lucenes_formula():
    pytest.importorskip("bm25s")
    documents, queries = (
        np.array([[5, 5, 7, 8], [5, 6, 6, 6], [1, 2, 3, 4]]),
        np.array([[5, 6, 6, 99]]),
    )
    k1, b, n, mean_length = 1.5, 0.75, 3, 4.0

    def weight(token: int, document: list[int]) -> float:
        df = sum(token in d for d in documents.tolist())
        tf, length = document.count(token), len(document)
        idf = np.log(1 + (n - df + 0.5) / (df + 0.5))
        return idf * tf / (tf + k1 * (1 - b + b * length / mean_length)) if df else 0.0

    want = [[sum(weight(t, d) for t in q) for d in documents.tolist()] for q in queries.tolist()]
    np.testing.assert_allclose(bm25(documents, queries), want, rtol=1e-5)


def test_copy_is_found_if_its_score_is_among_the_k_highest():
    scores = np.array([[9.0, 1, 2, 3], [0, 5, 7, 6], [1, 1, 1, 1]])
    copies = np.zeros((3, 4), bool)
    copies[[0, 1, 2], [0, 3, 2]] = True
    result = retrieval(scores, copies, at=(1, 2))
    assert result.recall == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    assert result.mrr == pytest.approx(
        (1 + 1 / 2 + 1 / 4) / 3
    )  # among equal scores the copy is last


def test_first_of_several_copies_counts():
    scores, copies = np.array([[9.0, 8, 7, 6]]), np.array([[False, True, True, False]])
    assert retrieval(scores, copies, at=(1, 2)).recall == {1: 0.0, 2: 1.0}


def test_document_with_as_many_common_ngrams_as_the_planted_one_is_a_copy():
    queries = np.array([[1, 2, 3, 4, 5, 6]])
    documents = np.array(
        [[1, 2, 3, 4, 5, 9], [9, 9, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]]
    )
    assert near_copies(documents, queries, np.array([0])).tolist() == [[True, False, True, True]]
    # If the planted document has no common 4-gram, others need at least one.
    strangers = np.array([[9, 9, 9, 9, 9, 9], [8, 8, 8, 8, 8, 8]])
    assert near_copies(strangers, queries, np.array([1])).tolist() == [[False, True]]


def test_documents_of_a_group_are_each_querys_best_in_turn():
    scores = np.array([[9.0, 8, 7, 0, 0], [8, 9, 0, 7, 0]])
    assert best_of_all(scores, 2).tolist() == [0, 1]
    assert best_of_all(scores, 3).tolist() == [0, 1, 2]  # both seconds are taken already
    assert best_of_all(scores, 4).tolist() == [0, 1, 2, 3]


def test_leave_out_is_the_rise_above_the_mean_of_the_controls():
    controls = np.array([[2.0, 3.0], [2.2, 3.4]])
    result = _result(np.array([2.5, 3.3]), controls)
    assert result.by_query == pytest.approx([0.4, 0.1])
    assert result.mean == pytest.approx(0.25)
    assert result.standard_error == pytest.approx(0.15)
    assert result.share_above_controls == 0.5


# --- user errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subsets": 2}, r"--subsets must be at least 3, got 2 \(a rank correlation"),
        ({"n_documents": 0}, "--n_documents must be at least 1, got 0"),
        (
            {"n_documents": 10, "n_near_copies": 6},
            "--n_documents must be at least 12, got 10",
        ),
        ({"corruption": 1.0}, "--corruption must be at least 0 and less than 1"),
        ({"leave_out": 72}, "--leave_out 72 is more than --n_queries 64"),
        ({"leave_out_k": 65}, "are 520 documents, over half of the 1,024"),
        (
            {"leave_out": 12},
            "--leave_out 12 is not a multiple of --leave_out_group 8",
        ),
        ({"leave_out_controls": 0}, "--leave_out_controls must be at least 1, got 0"),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ConfigError, match=message):
        LdsConfig(shards="x", output_dir="y", **given)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("", "--methods is empty"),
        ("bm25,trak", "unknown method 'trak'; choose from random, .*SCORE@K"),
        ("bm25,bm25", "--methods names bm25 twice"),
        ("euclid@16", "there is no score 'euclid'; choose one of kfac"),
        ("dot@16:0.1", "dot has no damping; write dot@16"),
        ("kfac@0", "K must be at least 1"),
        ("kfac@16:1.2.3", "'1.2.3' is not a number"),
    ],
)
def test_invalid_methods_are_rejected(listed, message):
    with pytest.raises(ConfigError, match=message):
        names_of(listed, "--methods")
