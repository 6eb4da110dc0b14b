"""Whether a method finds the near-copies of the queries that were planted in the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Retrieval:
    """How high the planted documents come, over all queries that have one."""

    recall: dict[int, float]
    """k -> share of the queries whose copy is among the k highest scores."""
    mrr: float
    """Mean of 1 / rank."""
    n_queries: int


def retrieval(scores: np.ndarray, copies: np.ndarray, at: Sequence[int]) -> Retrieval:
    """Where each query's copy stands.

    Args:
        scores: ``(Q, N)``.
        copies: ``(Q,)`` int, the document that is a near-copy of the query.
        at: the k's.
    """
    own = np.take_along_axis(scores, copies[:, None], axis=1)
    # Of equal scores the copy comes last: a score that cannot tell documents apart finds nothing.
    rank = (scores >= own).sum(axis=1)
    recall = {k: float((rank <= k).mean()) for k in at}
    return Retrieval(recall, float((1.0 / rank).mean()), len(copies))
