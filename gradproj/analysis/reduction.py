"""Rows of summed and of mean losses: each is the other times the document's number of tokens."""

import numpy as np

from gradproj.errors import ConfigError, StoreError
from gradproj.store import STATUS, ProjectionStore

REDUCTIONS = ("sum", "mean")
DEFAULT_REDUCTION = "sum"
"""Predicts retraining better where documents have different lengths."""


def check_reduction(reduction: str) -> None:
    """Raise ``ConfigError`` for an unknown one."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")


def stored_reduction(store: ProjectionStore) -> str:
    """Return the reduction of the loss whose gradients the rows are."""
    identity = store.attributes.get("identity") or {}
    return identity.get("--loss_reduction", DEFAULT_REDUCTION)


def reduction_factors(
    store: ProjectionStore, reduction: str, first: int, last: int
) -> np.ndarray | None:
    """Return what the rows ``[first, last)`` are multiplied by, ``(n,)`` float64; None for 1.

    Raises:
        StoreError: the number of tokens of a row is not recorded.
    """
    stored = stored_reduction(store)
    if stored == reduction:
        return None
    n_tokens = store.column("n_tokens", first, last).astype(np.float64)
    has_row = store.column("status", first, last) == STATUS["ok"]
    unknown = np.flatnonzero(has_row & (n_tokens < 1))
    if len(unknown):
        raise StoreError(
            f"{store.path} does not record how many tokens sample {first + unknown[0]} has, so its "
            f"row, of a {stored} over them, cannot be made that of a {reduction}: take "
            f"--reduction {stored}"
        )
    n_tokens[~has_row] = 1
    return n_tokens if reduction == "sum" else 1 / n_tokens
