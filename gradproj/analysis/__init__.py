"""Questions to a store: scores, the best and worst documents, preconditioners. Store in, numbers out; no model."""

from gradproj.analysis.domains import DomainMatrix, domain_matrix
from gradproj.analysis.overview import Overview, overview
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.scan import DEFAULT_SCORE, MEANINGS, SIGN
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
    "DEFAULT_SCORE",
    "MEANINGS",
    "SIGN",
    "DomainMatrix",
    "Overview",
    "Preconditioner",
    "TopDocuments",
    "bottom_k",
    "domain_matrix",
    "iter_scores",
    "overview",
    "score",
    "self_influence",
    "top_and_bottom",
    "top_k",
]
