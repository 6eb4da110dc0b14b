"""Whether a method finds the near-copies of the queries that were planted in the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.evaluation.text_methods import ngram_overlap


@dataclass(frozen=True)
class Retrieval:
    """How high the first near-copy comes, over all queries that have one."""

    recall: dict[int, float]
    """k -> share of the queries with a near-copy among the k highest scores."""
    mrr: float
    """Mean of 1 / rank of the first."""
    n_queries: int


def near_copies(documents: np.ndarray, queries: np.ndarray, planted: np.ndarray) -> np.ndarray:
    """``(Q, N)`` bool: the planted document, and those that have no fewer of the query's 4-grams.

    A corpus holds copies of its own (licences, generated tables), which are as right an answer.

    Args:
        documents: token ids ``(N, S)``.
        queries: ``(Q, S)``.
        planted: ``(Q,)`` int, each query's near-copy.
    """
    overlap = ngram_overlap(documents, queries)
    found = overlap >= np.maximum(np.take_along_axis(overlap, planted[:, None], axis=1), 1)
    np.put_along_axis(found, planted[:, None], True, axis=1)
    return found


def retrieval(scores: np.ndarray, copies: np.ndarray, at: Sequence[int]) -> Retrieval:
    """Where each query's first near-copy stands.

    Args:
        scores: ``(Q, N)``.
        copies: ``(Q, N)`` bool, at least one a query.
        at: the k's.
    """
    best = np.where(copies, scores, -np.inf).max(axis=1, keepdims=True)
    # Of equal scores the copy comes last: a score that cannot tell documents apart finds nothing.
    rank = 1 + ((scores >= best) & ~copies).sum(axis=1)
    recall = {k: float((rank <= k).mean()) for k in at}
    return Retrieval(recall, float((1.0 / rank).mean()), len(copies))
