"""Rows of summed and of mean losses: each is the other times the document's number of tokens."""

from collections.abc import Sequence

import numpy as np

from gradproj.analysis.row_blocks import SampleFilter
from gradproj.errors import ConfigError, StoreError
from gradproj.store import STATUS, ProjectionStore

REDUCTIONS = ("sum", "mean")
DEFAULT_REDUCTION = "sum"
"""Predicts retraining better where documents have different lengths."""

_RUN, _RUNS = 2**12, 2**8


def check_reduction(reduction: str) -> None:
    """Raise ``ConfigError`` for an unknown one."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")


def length_percentiles(
    store: ProjectionStore, domains: Sequence[str] | None = None
) -> tuple[float, float] | None:
    """Return the 10th and 90th percentile of the tokens of documents with a row.

    From evenly spaced runs of documents in a large store; None if none of them has a row.
    """
    selected = SampleFilter(store, domains)
    step = max(_RUN, -(-len(store) // _RUNS))
    runs = []
    for first in range(0, len(store), step):
        last = min(first + _RUN, len(store))
        ok = selected(first, store.column("status", first, last))
        runs.append(store.column("n_tokens", first, last)[ok])
    n_tokens = np.concatenate(runs)
    if not len(n_tokens):
        return None
    low, high = np.percentile(n_tokens, (10, 90))
    return float(low), float(high)


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
