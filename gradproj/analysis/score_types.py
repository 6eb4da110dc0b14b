"""The table of scores. Adding a score means adding an entry to ``SCORES``."""

from dataclasses import dataclass

SIGN = "positive: training more on the document lowers the query's loss; negative: raises it"
"""Holds for every score."""
_NATS = "nats of the query's loss (mean or sum over its tokens, as the store's rows)"


@dataclass(frozen=True)
class ScoreType:
    """Definition of one score of a query row ``q`` and a document row ``r``.

    A score is ``q C^-1 r`` summed over layers, where C is the damped curvature or the identity,
    divided by what ``divisor`` names.
    """

    meaning: str
    """One phrase for users, including the unit."""
    unit: str
    """Short form of the unit, for tables; empty for a number without unit."""
    curvature: str | None = None
    """Kind of the preconditioner, or None for the identity. The default if ``any_curvature``."""
    any_curvature: bool = False
    """Accepts a preconditioner of any kind."""
    divisor: str | None = None
    """``norms``: both Euclidean norms. ``self_influence``: root of the document's own score."""

    @property
    def is_inner_product(self) -> bool:
        """True if the score of a row with itself (its self-influence) has a meaning."""
        return self.divisor is None

    @property
    def has_domain_means(self) -> bool:
        """True if one vector per domain gives the mean score over all pairs of documents."""
        return self.divisor in (None, "norms")


SCORES = {
    "kfac": ScoreType(
        "influence with the curvature taken from token covariances (K-FAC in the projected "
        f"space): about how many {_NATS} fall per unit of the document's weight in training, up "
        "to a factor that all documents share",
        "nats per unit of weight, up to a factor",
        curvature="kfac",
    ),
    "ekfac": ScoreType(
        "influence with K-FAC's directions and the curvature in each measured on rows (EK-FAC in "
        f"the projected space): about how many {_NATS} fall per unit of the document's weight in "
        "training, up to a factor that all documents share",
        "nats per unit of weight, up to a factor",
        curvature="ekfac",
    ),
    "preconditioned": ScoreType(
        "influence with the curvature taken from the second moment of the rows: about how many "
        f"{_NATS} fall per unit of the document's weight in training, up to a factor that all "
        "documents share",
        "nats per unit of weight, up to a factor",
        curvature="second_moment",
    ),
    "dot": ScoreType(
        f"inner product of the two projected gradients: about how many {_NATS} fall per unit of "
        "learning rate, in one plain gradient step on the document",
        "nats per unit of learning rate",
    ),
    "cosine": ScoreType(
        "cosine of the two projected gradients, without unit, from -1 to 1", "", divisor="norms"
    ),
    "relatif": ScoreType(
        "influence divided by the square root of the document's influence on itself, so that "
        "documents with large gradients do not come first everywhere; comparable within a query "
        "only",
        "comparable within a query only",
        curvature="kfac",
        any_curvature=True,
        divisor="self_influence",
    ),
}
"""Score name -> its definition, in the order in which users see them."""
MEANINGS = {name: score.meaning for name, score in SCORES.items()}
DEFAULT_SCORE = "kfac"
"""Best on average in the retraining experiments (``python -m gradproj lds``)."""
FALLBACK_SCORE = "cosine"
"""Replaces the default for a store without basis and without token covariances, which the merge
writes."""
SELF_SCORES = tuple(name for name, score in SCORES.items() if score.is_inner_product)
DOMAIN_SCORES = tuple(name for name, score in SCORES.items() if score.has_domain_means)

HEAD_SUMS = ("plain", "equal")
"""Ways of adding the scores of head rows to those of the layers; the first is the default."""
