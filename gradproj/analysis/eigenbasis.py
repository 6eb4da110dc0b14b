"""Curvature of stores whose rows are weighted in an eigenbasis, which a pilot measured.

A layer's row is ``w_o X w_i`` there, elementwise, with X the projected gradient in the eigenbasis
of K-FAC's factors and ``w = (e + d mean(e))^(-1/2)`` of their eigenvalues e and the pilot's damping
d. So every curvature of these rows is diagonal, and K-FAC's at the pilot's damping is the identity:
its influence is the plain inner product. No token covariances are needed, nor a merge.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.curvature import Curvature, Inverse
from gradproj.errors import ConfigError, damaged
from gradproj.store import ProjectionStore

_NO_INVERSE = 1e-12
"""A damped eigenvalue smaller than this part of the largest cannot be divided by."""


def has_weighted_rows(store: ProjectionStore) -> bool:
    """Return whether the store's rows are weighted in an eigenbasis."""
    basis = store.attributes.get("basis")
    return isinstance(basis, Mapping) and basis.get("kind") != "random"


def read_eigenvalues(store: ProjectionStore) -> tuple[dict[str, "Eigenvalues"], int]:
    """Return every layer's eigenvalues, and the number of the pilot's tokens.

    Raises:
        StoreError: they are damaged.
    """
    pairs, basis = store.basis_eigenvalues, store.attributes["basis"]
    damping, n_tokens = basis.get("damping"), basis.get("tokens")
    if not isinstance(damping, float | int) or not 0 < damping < np.inf:
        raise damaged(store.path, f"its basis has the damping {damping!r}")
    if not isinstance(n_tokens, int) or n_tokens < 1:
        raise damaged(store.path, f"its basis has {n_tokens!r} tokens")
    values = {}
    for name, (e_i, e_o) in (pairs or {}).items():
        for e in (e_i, e_o):
            if not np.isfinite(e).all() or e.min() < -1e-6 * e.max():
                raise damaged(store.path, f"basis_eigenvalues of {name} are no eigenvalues")
        scalar = torch.tensor(damping, dtype=torch.float64)
        values[name] = Eigenvalues(torch.from_numpy(e_o), torch.from_numpy(e_i), scalar)
    return values, n_tokens


@dataclass(frozen=True)
class Eigenvalues:
    """K-FAC's factors of a layer whose rows are weighted in their eigenbasis."""

    e_o: Tensor
    """``(k_o,)`` float64: of the mean of ``g g^T`` over the pilot's tokens, projected."""
    e_i: Tensor
    """``(k_i,)`` float64: of the mean of ``a a^T``."""
    damping: Tensor
    """Scalar, of the rows' weights."""

    def damped(self, c: float, name: str) -> "DiagonalInverse":
        return _outer(
            self._reweighted(self.e_o, c, f"the curvature of {name}'s output gradients"),
            self._reweighted(self.e_i, c, f"the curvature of {name}'s inputs"),
        )

    def _reweighted(self, e: Tensor, c: float, name: str) -> Tensor:
        """Return ``(w_c / w)^2`` of the eigenvalues."""
        if c == self.damping.item() or not e.any():
            return torch.ones_like(e)
        damped = e + c * e.mean()
        if damped.min() < _NO_INVERSE * e.max():
            raise ConfigError(
                f"{name}, {len(e)} wide, has no inverse with damping {c:g}: give a larger damping "
                "(auto chooses one)"
            )
        return self.inverse_square(e) / damped

    def inverse_square(self, e: Tensor) -> Tensor:
        """Return ``1 / w^2`` of the eigenvalues; ones if all are 0."""
        return e + self.damping * e.mean() if e.any() else torch.ones_like(e)


@dataclass(frozen=True)
class Unweighted:
    """The identity on plain projected gradients, for rows weighted in an eigenbasis."""

    eigenvalues: Eigenvalues

    def damped(self, c: float, name: str) -> "DiagonalInverse":
        """Return ``1 / w^2``; there is nothing to damp."""
        of = self.eigenvalues
        return _outer(of.inverse_square(of.e_o), of.inverse_square(of.e_i))


@dataclass(frozen=True)
class DiagonalInverse(Inverse):
    """A diagonal ``C^-1``, by its root: its values may be out of float32's range."""

    root: Tensor
    """``(D,)``."""

    def solve(self, x: Tensor) -> Tensor:
        root = self.root.to(x)
        return x * root * root

    def self_products(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x * self.root.to(x), dim=1).square()

    @property
    def trace(self) -> float:
        """Score with itself of a row of values 1 and -1."""
        return self.root.double().square().sum().item()

    @property
    def is_identity(self) -> bool:
        return bool((self.root == 1).all())


def _outer(of_outputs: Tensor, of_inputs: Tensor) -> DiagonalInverse:
    return DiagonalInverse(torch.outer(of_outputs.sqrt(), of_inputs.sqrt()).flatten())


def unweighted(store: ProjectionStore) -> dict[str, Curvature]:
    """Return the curvature of every layer by which inner products are those of plain gradients."""
    return {name: Unweighted(values) for name, values in read_eigenvalues(store)[0].items()}
