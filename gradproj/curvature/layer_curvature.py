"""One layer's Kronecker-factored curvature in its eigenbasis, by K-FAC and EK-FAC.

Sources: K-FAC, arXiv:1503.05671; EK-FAC, arXiv:1806.03884; influence with it, arXiv:2308.03296.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradproj.errors import ConfigError, ModelError
from gradproj.kernels.onednn import linear

AUTO_DAMPING = {"kfac": 0.03, "ekfac": 0.01}
"""Kind of curvature -> the damping that ``auto`` stands for, in units of the mean diagonal."""
KINDS = tuple(AUTO_DAMPING)
MAX_SIDE = 20_000
"""Wider sides, which are vocabularies, keep the diagonal of their factor only."""


@dataclass(frozen=True)
class Side:
    """A Kronecker factor ``U diag(e) U^T``, of a layer's inputs or of its output gradients."""

    values: Tensor
    """``e (n,)`` float64, not negative, ascending."""
    basis: Tensor | None
    """``U (n, n)`` float32, its columns the directions; None for the identity (a diagonal)."""

    @classmethod
    def of(cls, factor: Tensor, name: str) -> "Side":
        """Decompose a factor: ``(n, n)`` symmetric or ``(n,)``, its diagonal; float64.

        Raises:
            ModelError: it is not finite; ``name`` says what it is.
        """
        if not torch.isfinite(factor).all():
            raise ModelError(
                f"{name} are not finite in the sample of documents: the model overflows there; "
                "another --model_dtype avoids it"
            )
        if factor.dim() == 1:
            return cls(factor, None)
        values, basis = torch.linalg.eigh((factor + factor.T) / 2)
        return cls(values.clamp(min=0), basis.float())

    def rotate(self, x: Tensor) -> Tensor:
        """Return coordinates ``x U`` of ``(..., n)``."""
        return x if self.basis is None else linear(x, self.basis.T.contiguous())

    def rotate_back(self, x: Tensor) -> Tensor:
        """Return ``x U^T``: from coordinates to ``(..., n)``."""
        return x if self.basis is None else linear(x, self.basis)

    def to(self, device: torch.device) -> "Side":
        basis = None if self.basis is None else self.basis.to(device)
        return Side(self.values.to(device), basis)


@dataclass(frozen=True)
class LayerCurvature:
    """Curvature of one layer, from a sample of documents."""

    i: Side
    """Of ``A``, the mean of ``a a^T`` over target tokens."""
    o: Side
    """Of ``S``, the mean of ``g g^T`` over target tokens, of the summed loss in nats."""
    second_moments: Tensor | None
    """``L (n_o, n_i)`` float64: sum over documents of ``(U_o^T G U_i)^2``, per target token. A
    window counts as a document. None if it has not been measured."""

    def inverse(self, kind: str, damping: float, name: str) -> Tensor:
        """Return the damped inverse in the eigenbasis, ``(n_o, n_i)`` float64.

        kfac: ``1 / ((e_o + c mean e_o) (e_i + c mean e_i))``; ekfac: ``1 / (L + c mean L)``. A
        layer whose gradients are all zero has 0, and adds nothing to a score.

        Raises:
            ConfigError: without damping it has no inverse; ``name`` is the layer's.
        """
        if kind == "ekfac":
            assert self.second_moments is not None
            damped = _damped(self.second_moments, damping)
        else:
            o, i = (_damped(side.values, damping) for side in (self.o, self.i))
            damped = torch.outer(o, i)
        if not damped.any():
            return damped
        if not (damped > 0).all():
            raise ConfigError(
                f"the curvature of {name} has no inverse with damping {damping:g}: give a larger "
                "--rescore_damping"
            )
        return 1 / damped

    def to(self, device: torch.device) -> "LayerCurvature":
        moments = self.second_moments
        moved = None if moments is None else moments.to(device)
        return LayerCurvature(self.i.to(device), self.o.to(device), moved)

    def solve(self, gradients: Tensor, inverse: Tensor) -> Tensor:
        """Return ``U_o (inverse * U_o^T G U_i) U_i^T`` of ``(..., n_o, n_i)`` float32."""
        rotated = self.coordinates(gradients) * inverse.float()
        return self.o.rotate_back(self.i.rotate_back(rotated).mT).mT

    def coordinates(self, gradients: Tensor) -> Tensor:
        """Return ``U_o^T G U_i`` of ``(..., n_o, n_i)`` float32."""
        return self.o.rotate(self.i.rotate(gradients).mT).mT


def _damped(values: Tensor, damping: float) -> Tensor:
    return values + damping * values.mean()
