"""Targets of a batch, and what a backward pass leaves behind: how its losses were weighted."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.engine.layers import unwrap

IGNORE = -100
"""The label of a position without a target (torch's and transformers' convention)."""


@dataclass(frozen=True)
class Targets:
    """A batch's targets as flat indices, made on the host so that no device is read for them."""

    positions: Tensor
    """``(T,)`` int64 flat positions in ``(N * S)`` that predict a target."""
    tokens: Tensor
    """``(T,)`` int64: the target token at each position."""

    @classmethod
    def from_labels(cls, labels: Tensor, mask: Tensor | None = None) -> "Targets":
        """Make them from unshifted ``(N, S)`` labels: position ``s`` predicts label ``s + 1``.

        Where ``mask``, an attention mask of that shape, is 0, nothing is predicted.
        """
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if mask is not None:
            shifted = shifted.masked_fill(mask == 0, IGNORE)
        shifted = shifted.reshape(-1)
        positions = (shifted != IGNORE).nonzero().squeeze(1)
        return cls(positions, shifted[positions])


@dataclass(frozen=True)
class LossWeights:
    """The factors of a batch's losses in a backward pass, and where the targets were."""

    values: Tensor
    """``(N,)``, one factor a sample."""
    positions: Tensor | None = None
    """``Targets.positions``; None if they are not known."""
    length: int = 0
    """Positions of a sample in the batch."""


LOSS_WEIGHTS: "WeakKeyDictionary[nn.Module, LossWeights]" = WeakKeyDictionary()
"""``loss_key`` of a model -> the weights of its last backward pass.

A backward pass writes it where it leaves ``per_sample_loss``, and the engine reads it ("Loss
weights" in README.md).
"""


def loss_key(model: nn.Module) -> nn.Module:
    """Return a model's key in ``LOSS_WEIGHTS``: one module, however the model is wrapped."""
    inner = unwrap(model)
    return inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else inner


class Announce(torch.autograd.Function):
    """Identity on the losses. Its backward stores each sample's weight in ``LOSS_WEIGHTS``."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, key: nn.Module, positions: Tensor, length: int) -> Tensor:
        ctx.key, ctx.targets = key, (positions, length)
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None, None]:
        LOSS_WEIGHTS[ctx.key] = LossWeights(weights.detach(), *ctx.targets)
        return weights, None, None, None


def count_targets(model: nn.Module, labels: Tensor) -> Tensor:
    """Return ``(N,)`` int64: the targets of each sample in the last backward pass.

    What an attention mask hides is no target, and only ``per_sample_loss`` knows it. Of another
    loss the unshifted labels ``(N, S)`` tell.
    """
    weights = LOSS_WEIGHTS.get(loss_key(model))
    if weights is None or weights.positions is None:
        return (labels[:, 1:] != IGNORE).sum(dim=1)
    samples = weights.positions // weights.length
    counts = torch.zeros(len(labels), dtype=torch.int64, device=samples.device)
    return counts.index_add(0, samples, torch.ones_like(samples))
