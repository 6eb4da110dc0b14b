"""Evidence that scores are right: they foretell what retraining without some documents does to a query's loss."""

from gradproj.evaluation.retrieval import Retrieval, retrieval
from gradproj.evaluation.statistics import lds_by_query, noise_ceiling, rank_values, spearman

__all__ = ["Retrieval", "lds_by_query", "noise_ceiling", "rank_values", "retrieval", "spearman"]
