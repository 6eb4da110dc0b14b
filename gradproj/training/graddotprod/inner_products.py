"""A parameter's training gradient, and each sample's inner product with the validation gradient.

A batch has training samples first, then validation samples. A parameter's gradient consists of
shares of three kinds: outer products over tokens (``OuterProducts``), rows of a table
(``Lookup``), and sums over tokens (``Vector``). No per-sample gradient is kept: at most one tile of
one sample's gradient exists at a time, or none if inner products of tokens replace it ("ghost":
arXiv:2009.03106 for norms, arXiv:2406.11011 for inner products).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradproj.kernels.onednn import linear

TILE_VALUES = {"cpu": 2**20, "cuda": 2**22}
"""Values of a gradient tile: three tiles fit the last-level cache of a CPU and of a GPU."""

ELEMENTWISE_FLOPS = {"cpu": 60, "cuda": 800}
"""Cost per value of reading a tile again for its inner product and its sum, in FLOPs of a product.

Measured on a CPU; computed from an H100's bandwidths for a GPU."""

START_FLOPS = 1e6
"""Cost of starting a product, in FLOPs."""

MIN_ONEDNN_FLOPS = 2**26
"""oneDNN compiles a kernel for each new shape (1 to 2 ms), which a small product never repays."""


@dataclass
class OuterProducts:
    """``sum over tokens of left right^T``: weight of a Linear (g and a) or a Conv1D (a and g)."""

    left: Tensor
    """``(N, S, L)``."""
    right: Tensor
    """``(N, S, R)``; the weight is ``(L, R)``."""

    def sums(self, n_train: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return gradient ``(L, R)`` and inner products; see ``Vector.sums``."""
        train = self.left[:n_train], self.right[:n_train]
        validation = self.left[n_train:].flatten(0, 1), self.right[n_train:].flatten(0, 1)
        way = self.way(n_train)
        if way == "samples":
            return _sample_by_sample(*train, *validation, scale)
        left, right = (side.flatten(0, 1) for side in train)
        if way == "pairs":
            dots = token_pairs(_pairs(left, validation[0]), (right, validation[1]), n_train)
        else:
            validation_gradient = _product(*validation).to(left.dtype)
            dots = _pairs(left, validation_gradient.t()).mul_(right).view(n_train, -1).sum(1)
        if len(left) < left.shape[1] and right.dtype == _wide_dtype(right):
            # Scale the operand when it is smaller than the product.
            return _product(left, right * scale), dots
        return _product(left, right).mul_(scale), dots

    def way(self, n_train: int) -> str:
        """Return the cheapest way to the inner products, by FLOPs.

        ``samples``: each sample's gradient, tile by tile. ``pairs``: inner products of all training
        with all validation tokens. ``product``: training tokens times the validation gradient,
        which takes one more product.
        """
        n, length, left = self.left.shape
        right = self.right.shape[-1]
        tokens, validation = n_train * length, (n - n_train) * length
        n_tiles = max(1, left * right // _on_device(TILE_VALUES, self.left))
        reads = n_train * _on_device(ELEMENTWISE_FLOPS, self.left)
        starts = n_train * n_tiles * START_FLOPS
        costs = {
            "samples": left * right * (2 * validation + reads) + 3 * starts,
            "pairs": 2 * tokens * validation * (left + right) + 4 * START_FLOPS,
            "product": left * right * 2 * (validation + tokens) + 4 * START_FLOPS,
        }
        return min(costs, key=lambda name: costs[name])


@dataclass
class Lookup:
    """Rows of a table: the weight of an Embedding."""

    ids: Tensor
    """``(N, S)`` int64."""
    values: Tensor
    """``(N, S, R)``: the gradient at the looked-up rows; zero at tokens whose row gets none."""
    n_rows: int
    """L, of the ``(L, R)`` table."""

    def sums(self, n_train: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return gradient ``(L, R)`` and inner products; see ``Vector.sums``."""
        ids, validation_ids = self.ids[:n_train].flatten(), self.ids[n_train:].flatten()
        values, validation_values = _sides(self.values, n_train)
        backward = torch.ops.aten.embedding_dense_backward
        gradient = backward(values * scale, ids, self.n_rows, -1, False)
        # Only the rows of the validation table that are not zero are computed.
        rows, place = validation_ids.unique(return_inverse=True)
        validation = widened(values.new_zeros(len(rows), values.shape[-1]))
        validation.index_add_(0, place, validation_values.to(validation.dtype))
        nearest = torch.searchsorted(rows, ids).clamp_max_(len(rows) - 1)
        dots = (values * validation[nearest]).sum(-1) * (rows[nearest] == ids)
        return gradient, dots.view(n_train, -1).sum(1)


@dataclass
class Vector:
    """``sum over tokens``: a bias (g) or the weight of a norm (g times the normalised input)."""

    values: Tensor
    """``(N, S, H)``."""

    def sums(self, n_train: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return the training gradient, and each training sample's inner product.

        Args:
            n_train: number of training samples; the others are validation samples.
            scale: factor for the gradient, not for the inner products.

        Returns:
            The gradient, float32 (or float64), and ``(n_train,)`` inner products.
        """
        values = widened(self.values)
        train = values[:n_train]
        dots = (train @ values[n_train:].sum((0, 1))).sum(1)
        return train.sum((0, 1)).mul_(scale), dots


Share = OuterProducts | Lookup | Vector


def joined(shares: list[Any]) -> Any:
    """Join the shares of several calls of one kind: a sample's tokens are those of all calls."""
    if len(shares) == 1:
        return shares[0]
    sides = [name for name, side in vars(shares[0]).items() if isinstance(side, Tensor)]
    return replace(
        shares[0], **{name: torch.cat([getattr(s, name) for s in shares], 1) for name in sides}
    )


@dataclass
class OuterProductsAtRows:
    """Parts of ``OuterProducts`` for the inner product with a lookup of the same (tied) weight.

    The left sides are as wide as the vocabulary; only the columns of looked-up tokens are kept.
    """

    train_left: Tensor
    """``(n_train * S, T_v)``: training tokens' left side at the rows validation tokens look up."""
    validation_left: Tensor
    """``(V * S, T)``: validation tokens' left side at the rows training tokens look up."""
    right: Tensor
    """``(N, S, R)``."""

    @classmethod
    def of(cls, share: OuterProducts, ids: Tensor, n_train: int) -> "OuterProductsAtRows":
        """Select the columns of the looked-up ``ids``, ``(N, S)``."""
        train, validation = _sides(share.left, n_train)
        train = train[:, ids[n_train:].flatten()]
        return cls(train, validation[:, ids[:n_train].flatten()], share.right)

    def cross(self, lookup: Lookup, n_train: int) -> Tensor:
        """Return ``(n_train,)`` cross products of the two uses, each use's training side once."""
        train, validation = _sides(self.right, n_train)
        train_rows, validation_rows = _sides(lookup.values, n_train)
        first = token_pairs(self.train_left, (train, validation_rows), n_train)
        return first + token_pairs(self.validation_left.t(), (train_rows, validation), n_train)


def token_pairs(left_products: Tensor, right: tuple[Tensor, Tensor], n: int) -> Tensor:
    """Return ``<sum_s l_s r_s^T, sum_v l_v r_v^T> = sum_{s, v} <l_s, l_v> <r_s, r_v>`` per sample.

    ``left_products`` are ``(T, T_v)`` of ``<l_s, l_v>``, training tokens by validation tokens;
    ``right`` are the right sides, ``(T, R)`` and ``(T_v, R)``, of ``n`` training samples.
    """
    return _pairs(*right).mul_(left_products).view(n, -1).sum(1)


def _sample_by_sample(
    left: Tensor, right: Tensor, validation_left: Tensor, validation_right: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute gradient and inner products tile by tile, with each tile read once."""
    width, height = right.shape[-1], left.shape[-1]
    rows = max(1, min(height, _on_device(TILE_VALUES, left) // width))
    gradient = torch.empty(height, width, dtype=_wide_dtype(left), device=left.device)
    dots = []
    for start in range(0, height, rows):
        part = slice(start, start + rows)
        validation = _product(validation_left[:, part], validation_right).flatten()
        total = gradient[part]
        for n in range(len(left)):
            tile = _product(left[n, :, part], right[n])
            dots.append(torch.dot(tile.flatten(), validation))
            if n:
                total.add_(tile, alpha=scale)
            else:
                torch.mul(tile, scale, out=total)
    return gradient, torch.stack(dots).view(-1, len(left)).sum(0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T right`` of ``(S, L)`` and ``(S, R)``, float32 (or float64)."""
    return _pairs(left.t(), right.t())


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x y^T`` of ``(X, K)`` and ``(Y, K)``, float32 (or float64)."""
    y = y.to(x.dtype)
    small = 2 * x.numel() * len(y) < MIN_ONEDNN_FLOPS
    return widened(x @ y.t() if small else linear(x, y))


def _sides(x: Tensor, n_train: int) -> tuple[Tensor, Tensor]:
    """Return the training and the validation samples' tokens of ``(N, S, H)``."""
    return x[:n_train].flatten(0, 1), x[n_train:].flatten(0, 1)


def _on_device(values: Mapping[str, int], x: Tensor) -> int:
    return values.get(x.device.type, values["cuda"])


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """Return the tensor in float32, or float64 if it is that."""
    return x.to(_wide_dtype(x))
