"""Rows in the eigenbasis of token covariances: ``X = R_o (P_o G P_i^T) R_i^T`` for each layer.

With ``A = mean P_i a a^T P_i^T = U_i diag(E_i) U_i^T`` over some tokens, ``S`` likewise of the
output's gradients, ``R = diag((E + d mean(E))^(-1/2)) U^T``. An inner product of two such rows is
that of their gradients preconditioned by K-FAC's damped factors in the projected space.

Source: K-FAC's factors, arXiv:1503.05671; their eigenbasis, arXiv:1806.03884.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.engine.capture import PlacedLayer, full_precision, on_device
from gradproj.engine.matrix_file import Matrices
from gradproj.errors import ConfigError
from gradproj.store.basis import DAMPING, weights_of

_VALUES_AT_ONCE = 2**17
"""Values of a sample's row that are transformed at once, which bounds the temporary copies."""


def eigenbasis(covariance: np.ndarray, damping: float = DAMPING) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(R (k, k) float32, E (k,) float64)`` of a covariance ``(k, k)`` float64.

    R is finite for every finite covariance: directions without any variance get the weight of the
    damping, and a covariance of zeros, of which nothing is known, the identity.
    """
    if not covariance.any():
        return np.eye(len(covariance), dtype=np.float32), np.zeros(len(covariance))
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    values = np.maximum(values, 0.0)  # rounding makes some of a singular matrix negative
    return (weights_of(values, damping)[:, None] * vectors.T).astype(np.float32), values


@dataclass(frozen=True)
class _Group:
    """Layers of one shape, with their matrices one after the other."""

    columns: list[slice]
    """Each layer's columns of a row."""
    r_i: Tensor
    """``(L, k_i, k_i)``."""
    r_o: Tensor
    """``(L, k_o, k_o)``."""

    def transform(self, rows: Tensor, out: Tensor) -> None:
        n, (n_layers, k_o, _), k_i = len(rows), self.r_o.shape, self.r_i.shape[-1]
        x = torch.stack([rows[:, columns] for columns in self.columns])
        x = (x.view(n_layers, n * k_o, k_i) @ self.r_i.mT).view(n_layers, n, k_o, k_i)
        x = self.r_o @ x.transpose(1, 2).reshape(n_layers, k_o, n * k_i)
        x = x.view(n_layers, k_o, n, k_i)
        for layer, columns in zip(x, self.columns, strict=True):
            out[:, columns].view(n, k_o, k_i).copy_(layer.transpose(0, 1))


class RowBasis:
    """The matrices R of every layer, and the rows in their basis.

    Args:
        layers: the engine's layers in row order.
        basis: layer -> ``(R_i (k_i, k_i), R_o (k_o, k_o))``, tensors or arrays.

    Raises:
        ConfigError: a layer has no matrices, or they are of another size.
    """

    def __init__(self, layers: Sequence[PlacedLayer], basis: Matrices) -> None:
        by_shape: dict[tuple[int, int], list[PlacedLayer]] = {}
        for layer in layers:
            k_o, k_i = len(layer.p_o), len(layer.p_i)
            name = layer.target.name
            shapes = [tuple(r.shape) for r in basis[name]] if name in basis else []
            if shapes != [(k_i, k_i), (k_o, k_o)]:
                raise ConfigError(
                    f"the basis of layer {name} is {shapes or 'missing'}; R_i must be "
                    f"{(k_i, k_i)} and R_o {(k_o, k_o)}: take the store's own basis"
                )
            by_shape.setdefault((k_o, k_i), []).append(layer)
        self._groups: list[_Group] = []
        for (k_o, k_i), members in by_shape.items():
            n_at_once = max(1, _VALUES_AT_ONCE // (k_o * k_i))
            for first in range(0, len(members), n_at_once):
                some = members[first : first + n_at_once]
                r_i, r_o = (
                    torch.stack([on_device(basis[x.target.name][side], x.p_i.device) for x in some])
                    for side in (0, 1)
                )
                self._groups.append(_Group([x.columns for x in some], r_i, r_o))

    @torch.no_grad()
    @full_precision()
    def transform(self, rows: Tensor) -> Tensor:
        """Return rows of ``P_o G P_i^T``, ``(N, D)`` float32, in the basis."""
        out = torch.empty_like(rows)
        for group in self._groups:
            group.transform(rows, out)
        return out
