"""The linear datamodeling score, its noise ceiling and its errors.

Source: the linear datamodeling score of TRAK, arXiv:2303.14186.
"""

from dataclasses import dataclass

import numpy as np


def rank_values(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1 along the last axis, float64; equal values share their mean rank."""
    return _compared(values).sum(axis=-1) + 0.5


def _compared(values: np.ndarray) -> np.ndarray:
    """Compare all pairs, ``(..., M, M)``: ``[i, j]`` is 1 if value j < value i, 0.5 if equal."""
    at, other = values[..., :, None], values[..., None, :]
    return (other < at) + 0.5 * (other == at)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation along the last axis; 0 if one side is constant."""
    return _weighted_correlation(rank_values(x), rank_values(y), np.ones(x.shape[-1]))


def _weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    share = weights / weights.sum(axis=-1, keepdims=True)
    x = x - (share * x).sum(axis=-1, keepdims=True)
    y = y - (share * y).sum(axis=-1, keepdims=True)
    spread = np.sqrt((share * x * x).sum(-1) * (share * y * y).sum(-1))
    return np.where(
        spread > 1e-12, (share * x * y).sum(-1) / np.where(spread > 1e-12, spread, 1.0), 0.0
    )


def predictions(scores: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """Sum the scores over each subset's documents, which predicts the training on it.

    Args:
        scores: ``(Q, N)``.
        subsets: ``(M, N)`` bool, true for the documents trained on.

    Returns:
        ``(Q, M)`` float64.
    """
    return scores.astype(np.float64) @ subsets.T.astype(np.float64)


def lds_by_query(scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return every query's linear datamodeling score, ``(Q,)``, from -1 to 1.

    It is Spearman's correlation, over the subsets, of the sum of a subset's scores with minus the
    query's loss after training on the subset, averaged over the seeds.

    Args:
        scores: ``(Q, N)``, positive if a document lowers the query's loss.
        subsets: ``(M, N)`` bool.
        losses: ``(M, S, Q)`` nats, S seeds of each subset.
    """
    return spearman(predictions(scores, subsets), -losses.mean(axis=1).T)


def noise_ceiling(losses: np.ndarray) -> float:
    """Return the LDS of a method that knows every subset's expected loss over seeds.

    Let ``r`` be the correlation over subsets of two seeds' losses, averaged over queries and pairs
    of seeds. The mean of S seeds has reliability ``R = S r / (1 + (S - 1) r)`` (Spearman and Brown)
    and correlates with the expected losses by ``sqrt(R)``.

    Args:
        losses: ``(M, S, Q)``.

    Returns:
        0 to 1; NaN for one seed, which cannot separate noise from signal.
    """
    n_seeds = losses.shape[1]
    pairs = [(a, b) for a in range(n_seeds) for b in range(a)]
    if not pairs:
        return float("nan")
    r = float(np.mean([spearman(losses[:, a].T, losses[:, b].T) for a, b in pairs]))
    return float(np.sqrt(max(0.0, n_seeds * r / (1 + (n_seeds - 1) * r)))) if r > 0 else 0.0


@dataclass(frozen=True)
class Estimate:
    """A mean over queries with its standard errors over queries and over subsets."""

    mean: float
    over_queries: float
    """Standard deviation over the queries / sqrt(Q)."""
    over_subsets: float
    """Standard deviation over bootstrap samples of the subsets."""


class Bootstrap:
    """Means over queries with bootstrap errors; one resampling for all methods pairs differences.

    Args:
        subsets: ``(M, N)`` bool.
        losses: ``(M, S, Q)``.
        n_samples: bootstrap samples of the M subsets.
        seed: of the resampling.
    """

    def __init__(self, subsets: np.ndarray, losses: np.ndarray, n_samples: int, seed: int) -> None:
        n = len(subsets)
        drawn = np.random.default_rng([seed, 7]).integers(0, n, (n_samples, n))
        self._subsets, self._losses = subsets, losses
        self._weights = np.stack([np.bincount(chosen, minlength=n) for chosen in drawn]).astype(
            np.float64
        )
        self._truth = _compared(-losses.mean(axis=1).T)

    def by_query(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each query's LDS ``(Q,)``, and each sample's mean over the queries ``(B,)``."""
        predicted = _compared(predictions(scores, self._subsets))
        of_samples = [
            _weighted_correlation(predicted @ weights, self._truth @ weights, weights).mean()
            for weights in self._weights
        ]
        return lds_by_query(scores, self._subsets, self._losses), np.array(of_samples)

    @staticmethod
    def estimate(by_query: np.ndarray, of_samples: np.ndarray) -> Estimate:
        """Return mean and errors of the result of ``by_query``, or of a difference of two."""
        return Estimate(
            float(by_query.mean()), standard_error(by_query), float(of_samples.std(ddof=1))
        )


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean; NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def permutation_baseline(
    scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray, n_permutations: int, seed: int
) -> tuple[float, float]:
    """Return mean and standard deviation of the LDS with shuffled documents: the chance level."""
    random = np.random.default_rng([seed, 8])
    shuffled = [
        lds_by_query(scores[:, random.permutation(scores.shape[1])], subsets, losses).mean()
        for _ in range(n_permutations)
    ]
    return float(np.mean(shuffled)), float(np.std(shuffled, ddof=1))
