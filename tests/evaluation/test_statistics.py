"""The linear datamodeling score, its errors and the text baselines, against slow references."""

import numpy as np
import pytest

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
