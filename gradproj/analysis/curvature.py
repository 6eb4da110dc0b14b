"""Curvature of a layer and its damped inverse: Kronecker factors, a full or truncated moment.

All matrices are float64. Damping ``c`` adds ``c`` times a matrix's mean diagonal to its diagonal.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from gradproj.errors import ConfigError
from gradproj.kernels.onednn import linear


@dataclass(frozen=True)
class Inverse(ABC):
    """``C^-1`` of one layer, or of several whose values are adjacent in a row."""

    @abstractmethod
    def solve(self, x: Tensor) -> Tensor:
        """Return ``x C^-1`` for ``(n, D)``, in the precision and on the device of ``x``."""

    @abstractmethod
    def self_products(self, x: Tensor) -> Tensor:
        """Return ``x C^-1 x^T`` of every row: ``(n, D)`` -> ``(n,)``."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Convert the matrices once, so that not every block of a scan converts them."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.to(device, dtype) for name, x in tensors.items()})


class Curvature(Protocol):
    """Undamped curvature of a layer: a dataclass of tensors, which a file stores.

    Damping is separate, so that another damping needs no second scan.
    """

    def damped(self, c: float, name: str) -> Inverse:
        """Return the inverse of the damped matrix.

        Raises:
            ConfigError: it has no inverse; the message contains the layer's ``name``.
        """


@dataclass(frozen=True)
class Kronecker:
    """``S (x) A`` of a layer: token covariances of its projected output gradients and inputs."""

    s: Tensor
    """``(k_o, k_o)``, a mean over tokens."""
    a: Tensor
    """``(k_i, k_i)``, a mean over tokens."""

    def damped(self, c: float, name: str) -> "KroneckerInverse":
        return KroneckerInverse(
            inverse_root(self.s, c, f"the token covariance of {name}'s output gradients"),
            inverse_root(self.a, c, f"the token covariance of {name}'s inputs"),
        )


@dataclass(frozen=True)
class Dense:
    """A second moment of rows, ``(D, D)``."""

    moment: Tensor

    def damped(self, c: float, name: str) -> "DenseInverse":
        return DenseInverse(inverse_root(self.moment, c, f"the second moment of {name}'s rows"))


@dataclass(frozen=True)
class Truncated:
    """The largest directions of a second moment of rows, ``U^T diag(e) U``.

    The orthogonal complement is represented by its mean eigenvalue. Omitting that would treat rows
    as zero there, and the inverse would be largest in the directions that are known least (at
    damping 0.1, a spectrum of j^-1.4 and 256 of 2,048 directions, scores correlate with those of
    the whole matrix to 0.95 with it and to 0.92 without; at damping 1 both to 0.9996).
    """

    directions: Tensor
    """``U (r, D)``, orthonormal rows."""
    values: Tensor
    """``e (r,)``, of the second moment."""
    mean_diagonal: Tensor
    """Scalar, of the whole second moment."""

    def damped(self, c: float, name: str) -> "TruncatedInverse":
        d = c * self.mean_diagonal.item()
        if d <= 0 < self.mean_diagonal.item():
            raise ConfigError(
                f"the second moment of {name}'s rows is truncated to {len(self.values)} of "
                f"{self.directions.shape[1]} directions, which has no inverse without damping: "
                "give a damping above 0"
            )
        n_directions, width = self.directions.shape
        trace = self.mean_diagonal.item() * width
        rest = trace - self.values.sum().item()
        # If the directions span all rows, the rest is rounding.
        has_rest = n_directions < width and rest > 1e-9 * trace
        complement_mean = rest / (width - n_directions) if has_rest else 0.0
        return TruncatedInverse(self.directions, self.values + d, complement_mean + d)


@dataclass(frozen=True)
class KroneckerInverse(Inverse):
    """``(S + d_o)^-1 (x) (A + d_i)^-1`` by the roots ``W`` with ``W^T W`` the inverse."""

    root_s: Tensor
    root_a: Tensor

    def solve(self, x: Tensor) -> Tensor:
        root_s, root_a = self.root_s.to(x), self.root_a.to(x)
        return (root_s.T @ self._whitened(x) @ root_a).flatten(1)

    def self_products(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self._whitened(x), dim=(1, 2)).square()

    def _whitened(self, x: Tensor) -> Tensor:
        root_s, root_a = self.root_s.to(x), self.root_a.to(x)
        left = root_s @ x.reshape(len(x), len(root_s), len(root_a))
        return linear(left.flatten(0, 1), root_a).view(left.shape)


@dataclass(frozen=True)
class DenseInverse(Inverse):
    """``(M + d)^-1`` by its root."""

    root: Tensor

    def solve(self, x: Tensor) -> Tensor:
        root = self.root.to(x)
        return x @ root.T @ root

    def self_products(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(linear(x, self.root.to(x)), dim=1).square()


@dataclass(frozen=True)
class TruncatedInverse(Inverse):
    """``1 / along`` along the directions U and ``1 / across`` in their complement (Woodbury)."""

    directions: Tensor
    along: Tensor
    across: float

    def solve(self, x: Tensor) -> Tensor:
        along, across = self._split(x)
        return (along / self.along.to(x)) @ self.directions.to(x) + across / (self.across or 1)

    def self_products(self, x: Tensor) -> Tensor:
        # Not |x|^2 minus the part along U, a small difference of large numbers.
        along, across = self._split(x)
        return (along.square() / self.along.to(x)).sum(1) + across.square().sum(1) / (
            self.across or 1
        )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates along U and the remainder of ``x``."""
        if self.across == 0:  # all rows are zero in this layer
            return x.new_zeros(len(x), len(self.along)), torch.zeros_like(x)
        directions = self.directions.to(x)
        along = x @ directions.T
        return along, x - along @ directions


def inverse_root(matrix: Tensor, c: float, name: str) -> Tensor:
    """Return ``W`` with ``W^T W = (matrix + c mean(diagonal) I)^-1``, float64.

    A matrix of zeros, of a layer in which all rows are zero, gives zeros: the layer then adds
    nothing to a score.

    Args:
        matrix: symmetric, positive semidefinite.
        c: relative damping.
        name: description of the matrix for the error message.

    Raises:
        ConfigError: the damped matrix has no inverse.
    """
    diagonal = matrix.diagonal().mean()
    if diagonal.item() == 0:
        return torch.zeros_like(matrix)
    # Scaled to mean diagonal 1 first: squares of gradients may be far from 1.
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix / diagonal + c * eye)
    if info.item() or not torch.isfinite(factor).all():
        raise ConfigError(
            f"{name}, {len(matrix)} wide, has no inverse with damping {c:g}: give a larger "
            "damping (auto chooses one)"
        )
    return torch.linalg.solve_triangular(factor, eye, upper=False) / diagonal.sqrt()
