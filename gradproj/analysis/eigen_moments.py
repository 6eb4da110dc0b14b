"""EK-FAC in the projected space: second moments of rows in the eigenbasis of K-FAC's factors.

K-FAC takes the product of two eigenvalues for the curvature in a direction; EK-FAC measures it, on
some rows. Source: arXiv:1806.03884.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.curvature import Curvature, Inverse, Kronecker
from gradproj.analysis.eigenbasis import DiagonalInverse, has_weighted_rows, unweighted
from gradproj.analysis.reduction import stored_reduction
from gradproj.corpus.sampling import spread_order
from gradproj.errors import ConfigError, StoreError
from gradproj.store import STATUS, ProjectionStore

MAX_ROWS = 256
"""Rows that are measured, at equal steps through the store; fewer if it has no more."""
_LOOKED_UP_AT_ONCE = 1024


@dataclass(frozen=True)
class EigenMoments:
    """Second moments of a layer's rows in the eigenbasis of its token covariances."""

    u_o: Tensor
    """``(k_o, k_o)`` float64, columns are directions."""
    u_i: Tensor
    """``(k_i, k_i)``."""
    moments: Tensor
    """``(k_o, k_i)``: mean of ``(U_o^T X U_i)^2`` over the measured rows, of summed losses."""

    def damped(self, c: float, name: str) -> "EigenInverse":
        return EigenInverse(self.u_o, self.u_i, _inverse_root(self.moments, c, name))


@dataclass(frozen=True)
class WeightedMoments:
    """Second moments of rows that are weighted in an eigenbasis: their values are coordinates."""

    moments: Tensor
    """``(k_o, k_i)`` float64, of rows without their weights."""
    weights: Tensor
    """``(k_o, k_i)``: what the stored values are multiplied by."""

    def damped(self, c: float, name: str) -> DiagonalInverse:
        return DiagonalInverse((_inverse_root(self.moments, c, name) / self.weights).flatten())


@dataclass(frozen=True)
class EigenInverse(Inverse):
    """``U_o (w * U_o^T X U_i) U_i^T``, by the root of w."""

    u_o: Tensor
    u_i: Tensor
    root: Tensor
    """``(k_o, k_i)``."""

    def solve(self, x: Tensor) -> Tensor:
        root, u_o, u_i = self.root.to(x), self.u_o.to(x), self.u_i.to(x)
        return (u_o @ (self._coordinates(x) * root * root) @ u_i.T).flatten(1)

    def self_products(self, x: Tensor) -> Tensor:
        weighted = self._coordinates(x) * self.root.to(x)
        return torch.linalg.vector_norm(weighted, dim=(1, 2)).square()

    def _coordinates(self, x: Tensor) -> Tensor:
        return self.u_o.to(x).T @ x.view(len(x), *self.root.shape) @ self.u_i.to(x)


def fit_eigen_moments(
    store: ProjectionStore, layers: Sequence[str], factors: Mapping[str, Curvature]
) -> tuple[dict[str, Curvature], int]:
    """Return EK-FAC's curvature of each layer, and the number of rows measured.

    ``factors`` are K-FAC's of the store's rows.

    Raises:
        StoreError: no document has a row.
    """
    ids = _sample(store)
    factor = np.ones(len(ids))
    if stored_reduction(store) == "mean":  # the curvature is that of summed losses
        factor = store.columns_at(("n_tokens",), ids)["n_tokens"].astype(np.float64)
    plain = unweighted(store) if has_weighted_rows(store) else {}
    curvatures: dict[str, Curvature] = {}
    for layer in store.layers:
        if layer.name in layers:  # one at a time: in float64 all would be large
            rows = torch.from_numpy(store.rows(ids, [layer.name]) * factor[:, None])
            x = rows.view(len(ids), layer.k_o, layer.k_i)
            curvatures[layer.name] = _moments(x, factors[layer.name], plain.get(layer.name))
    return curvatures, len(ids)


def _moments(x: Tensor, factors: Curvature, plain: Curvature | None) -> Curvature:
    """Return the curvature of a layer's rows ``(n, k_o, k_i)``."""
    if plain is not None:
        inverse = plain.damped(0.0, "")  # values of rows without weights: times this root
        assert isinstance(inverse, DiagonalInverse)
        root = inverse.root.view(x.shape[1:])
        return WeightedMoments((x * root).square().mean(0), 1 / root)
    assert isinstance(factors, Kronecker)
    u_o, u_i = (torch.linalg.eigh(factor)[1] for factor in (factors.s, factors.a))
    return EigenMoments(u_o, u_i, (u_o.T @ x @ u_i).square().mean(0))


def _sample(store: ProjectionStore) -> np.ndarray:
    """Return sorted ids of at most ``MAX_ROWS`` documents with a row, spread over the store."""
    order, chosen = spread_order(len(store)), np.empty(0, np.int64)
    while len(chosen) < MAX_ROWS and (ids := list(islice(order, _LOOKED_UP_AT_ONCE))):
        some = np.array(ids, np.int64)
        status = store.columns_at(("status",), some)["status"]
        chosen = np.concatenate([chosen, some[status == STATUS["ok"]]])
    if not len(chosen):
        raise StoreError(f"{store.path} has no row, so there is nothing to measure ekfac on")
    return np.sort(chosen[:MAX_ROWS])


def _inverse_root(moments: Tensor, c: float, name: str) -> Tensor:
    """Return ``(L + c mean(L))^(-1/2)``; zeros for a layer in which all rows are zero."""
    if not moments.any():
        return torch.zeros_like(moments)
    damped = moments + c * moments.mean()
    if damped.min() <= 0:
        raise ConfigError(
            f"the second moments of {name} have no inverse with damping {c:g}: give a larger "
            "damping (auto chooses one)"
        )
    return damped.rsqrt()
