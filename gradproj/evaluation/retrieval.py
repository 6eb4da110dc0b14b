"""Retrieval of the queries' near-copies that were planted among the documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.evaluation.baselines import ngram_overlap


@dataclass(frozen=True)
class Retrieval:
    """Rank of the first near-copy, over all queries that have one."""

    recall: dict[int, float]
    """k -> fraction of the queries with a near-copy among the k highest scores."""
    mrr: float
    """Mean of 1 / rank of the first."""
    n_queries: int


def near_copies(documents: np.ndarray, queries: np.ndarray, planted: np.ndarray) -> np.ndarray:
    """Return ``(Q, N)`` bool: the planted documents, and those with no fewer 4-grams in common.

    A corpus has copies of its own (licences, generated tables), which are correct answers too.
    ``planted`` is each query's near-copy, ``(Q,)`` int.
    """
    overlap = ngram_overlap(documents, queries)
    copies = overlap >= np.maximum(np.take_along_axis(overlap, planted[:, None], axis=1), 1)
    np.put_along_axis(copies, planted[:, None], True, axis=1)
    return copies


def retrieval(scores: np.ndarray, copies: np.ndarray, at: Sequence[int]) -> Retrieval:
    """Measure the rank of each query's first near-copy. Scores and copies are ``(Q, N)``."""
    best = np.where(copies, scores, -np.inf).max(axis=1, keepdims=True)
    # Among equal scores the copy ranks last, so that a constant score finds nothing.
    rank = 1 + ((scores >= best) & ~copies).sum(axis=1)
    recall = {k: float((rank <= k).mean()) for k in at}
    return Retrieval(recall, float((1.0 / rank).mean()), len(copies))
