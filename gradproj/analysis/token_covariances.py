"""K-FAC factors of a store's layers, from the token covariances that its job summed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.curvature import Curvature, Kronecker
from gradproj.errors import StoreError
from gradproj.store import ProjectionStore

_ROUNDING = 0.01
"""Relative error allowed in sums that a device computed in low precision."""


def read_kronecker_factors(store: ProjectionStore) -> tuple[dict[str, Curvature], int]:
    """Return the mean token covariances of every layer, and the number of tokens.

    Raises:
        StoreError: the store has none yet, or they are damaged.
    """
    n_tokens = store.attributes.get("covariance_tokens") or 0
    if not isinstance(n_tokens, int) or n_tokens < 0:
        raise _damaged(
            store, f"its attribute covariance_tokens is {n_tokens!r}, not a number of tokens"
        )
    if not n_tokens:
        raise StoreError(
            f"{store.path} has no token covariances, which kfac is made of: they are written when "
            f"its units are merged. Run `python -m gradproj merge {store.path.parent}`, or take "
            "the second moment of its rows (--score preconditioned) or no preconditioner (dot, "
            "cosine)"
        )
    s = _read_sums(store, "token_covariance_s", [layer.k_o for layer in store.layers])
    a = _read_sums(store, "token_covariance_a", [layer.k_i for layer in store.layers])
    factors: dict[str, Curvature] = {
        layer.name: Kronecker(s_l / n_tokens, a_l / n_tokens)
        for layer, s_l, a_l in zip(store.layers, s, a, strict=True)
    }
    return factors, n_tokens


def _read_sums(store: ProjectionStore, array: str, sides: Sequence[int]) -> list[Tensor]:
    """Return the matrices that an array holds one after the other, made exactly symmetric."""
    flat = store.array(array).astype(np.float64)
    sizes = [side**2 for side in sides]
    if flat.shape != (sum(sizes),) or not np.isfinite(flat).all() or not flat.any():
        raise _damaged(store, f"{array} does not hold the layers' finite sums")
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    matrices = [
        torch.from_numpy(part.reshape(side, side)) for part, side in zip(parts, sides, strict=True)
    ]
    for layer, matrix in zip(store.layers, matrices, strict=True):
        if not _may_be_covariance(matrix):
            raise _damaged(store, f"{array} holds no token covariance of {layer.name}")
    return [(matrix + matrix.T) / 2 for matrix in matrices]


def _may_be_covariance(matrix: Tensor) -> bool:
    """Check symmetry and the Cauchy-Schwarz bound, which most flipped bits violate."""
    diagonal = matrix.diagonal()
    rounding = _ROUNDING * diagonal.max()
    bound = (diagonal.clamp(min=0)[:, None] * diagonal.clamp(min=0)).sqrt() * (
        1 + _ROUNDING
    ) + rounding
    is_bounded = bool((matrix.abs() <= bound).all()) and bool((diagonal >= -rounding).all())
    return is_bounded and bool(((matrix - matrix.T).abs() <= _ROUNDING * bound + rounding).all())


def _damaged(store: ProjectionStore, problem: str) -> StoreError:
    return StoreError(
        f"{store.path} is damaged: {problem}. Run `python -m gradproj verify {store.path.parent}` "
        "to see all damage"
    )
