"""Scores and rankings of a store's documents, and preconditioners. Needs no model."""

from gradproj.analysis.checkpoints import checkpoint_sum
from gradproj.analysis.document_groups import DocumentGroups, GroupScores, group_scores
from gradproj.analysis.domains import DomainMatrix, Overview, domain_matrix, overview
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.query_sets import CONTROL, QuerySets
from gradproj.analysis.score_types import DEFAULT_SCORE, MEANINGS, SCORES, SIGN, ScoreType
from gradproj.analysis.scores import (
    TopDocuments,
    bottom_k,
    iter_scores,
    score,
    self_influence,
    top_and_bottom,
    top_k,
)

__all__ = [
    "CONTROL",
    "DEFAULT_SCORE",
    "MEANINGS",
    "SCORES",
    "SIGN",
    "DocumentGroups",
    "DomainMatrix",
    "GroupScores",
    "Overview",
    "Preconditioner",
    "QuerySets",
    "ScoreType",
    "TopDocuments",
    "bottom_k",
    "checkpoint_sum",
    "domain_matrix",
    "group_scores",
    "iter_scores",
    "overview",
    "score",
    "self_influence",
    "top_and_bottom",
    "top_k",
]
