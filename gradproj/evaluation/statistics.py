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
    varies = spread > 1e-12
    return np.where(varies, (share * x * y).sum(-1) / np.where(varies, spread, 1.0), 0.0)


def predictions(scores: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """Sum the scores ``(Q, N)`` over each subset's ``(M, N)`` documents, ``(Q, M)`` float64.

    The sum predicts the training on the subset.
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
    and correlates with the expected losses by ``sqrt(R)``. ``losses`` are ``(M, S, Q)``. One seed
    cannot separate noise from signal and gives NaN.
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

    The M subsets ``(M, N)`` bool, with losses ``(M, S, Q)``, are resampled ``n_samples`` times.
    """

    def __init__(self, subsets: np.ndarray, losses: np.ndarray, n_samples: int, seed: int) -> None:
        n = len(subsets)
        drawn = np.random.default_rng([seed, 7]).integers(0, n, (n_samples, n))
        self._subsets, self._losses = subsets, losses
        counts = [np.bincount(chosen, minlength=n) for chosen in drawn]
        self._weights = np.stack(counts).astype(np.float64)
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
        over_subsets = float(of_samples.std(ddof=1))
        return Estimate(float(by_query.mean()), standard_error(by_query), over_subsets)


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean; NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def permutation_baseline(
    scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray, n_permutations: int, seed: int
) -> tuple[float, float]:
    """Return mean and standard deviation of the LDS with shuffled documents: the chance level."""
    random = np.random.default_rng([seed, 8])
    draws = (random.permutation(scores.shape[1]) for _ in range(n_permutations))
    shuffled = [lds_by_query(scores[:, order], subsets, losses).mean() for order in draws]
    return float(np.mean(shuffled)), float(np.std(shuffled, ddof=1))
