"""The columns that a row's own sums decide: loss, gradient norm, and whether it is finite."""

from collections.abc import Mapping

import numpy as np

from gradproj.store.layout import STATUS

ZERO_ROWS = (STATUS["empty"], STATUS["no_target"])
"""Statuses of documents without a target token. Their rows are zero."""


def finish_rows(
    rows: np.ndarray, losses: np.ndarray, columns: Mapping[str, np.ndarray], loss_reduction: str
) -> tuple[np.ndarray, np.ndarray]:
    """Divide sums over target tokens, and mark rows that are not finite in ``columns["status"]``.

    Args:
        rows: ``(N, D)`` float32 gradients of summed losses; divided in place for ``mean``.
        losses: ``(N,)`` summed losses, nats.
        columns: ``n_tokens`` (target tokens) and ``status``, which is changed in place.
        loss_reduction: ``mean`` or ``sum``, what a row is the gradient of.

    Returns:
        ``(loss, grad_norm)``, both ``(N,)``: nats per target token, and the row's length (NaN for
        a document that has no row).
    """
    if loss_reduction == "mean":
        rows /= _targets(columns)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)).astype(np.float32)
    return finish_columns(norms, losses, columns)


def _targets(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.maximum(columns["n_tokens"], 1).astype(np.float32)


def finish_columns(
    norms: np.ndarray, losses: np.ndarray, columns: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``finish_rows`` does, of rows of these lengths: ``norms`` ``(N,)`` float32."""
    status = columns["status"]
    with np.errstate(over="ignore", invalid="ignore"):
        loss = losses / _targets(columns)
    has_row = np.isin(status, (STATUS["ok"], *ZERO_ROWS))
    status[has_row & ~np.isfinite(norms)] = STATUS["non_finite"]
    return loss, np.where(has_row & np.isfinite(norms), norms, np.nan)
