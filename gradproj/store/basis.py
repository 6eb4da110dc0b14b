"""The weights of a basis: how a side's eigenvalues scale the values of a row.

A layer's row is ``R_o (P_o G P_i^T) R_i^T``, ``R = diag(weights_of(E)) U^T`` of a side's covariance
``U diag(E) U^T`` (``engine/basis.py``).
"""

import numpy as np

DAMPING = 0.03
"""Added to a side's eigenvalues, as a fraction of their mean."""


def weights_of(eigenvalues: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Return ``(E + damping mean(E))^(-1/2)``, ``(k,)`` float64; ones if all of E is 0."""
    values = np.asarray(eigenvalues, np.float64)
    mean = values.mean()
    return (values + damping * mean) ** -0.5 if mean > 0 else np.ones_like(values)
