"""Evaluates attribution scores against retraining: LDS, leave-out, retrieval."""

from gradproj.evaluation.retrieval import Retrieval, retrieval
from gradproj.evaluation.statistics import lds_by_query, noise_ceiling, rank_values, spearman

__all__ = ["Retrieval", "lds_by_query", "noise_ceiling", "rank_values", "retrieval", "spearman"]
