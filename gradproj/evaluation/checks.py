"""Two checks of scores that need no training: do they depend on the query, and on the model?"""

import numpy as np

from gradproj.evaluation.statistics import spearman

TOP = 10


def distinct_top(scores: np.ndarray, k: int = TOP) -> float:
    """Return how different the queries' best documents are, from 0 to 1.

    It is the number of distinct documents among the ``k`` best of each of Q queries, as a fraction
    of the most that are possible, ``min(Q k, N)``. The same documents for every query give
    ``k / min(Q k, N)``. ``scores`` are ``(Q, N)``.
    """
    k = min(k, scores.shape[1])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return len(np.unique(best)) / min(best.size, scores.shape[1])


def rank_agreement(scores: np.ndarray, others: np.ndarray) -> float:
    """Return Spearman's correlation over documents of two ``(Q, N)`` scores, mean over queries.

    Scores of a trained model should not agree with those of a model with random weights: what
    remains is of the texts alone (the sanity check of Adebayo et al., arXiv:1810.03292).
    """
    return float(np.mean([spearman(a, b) for a, b in zip(scores, others, strict=True)]))
