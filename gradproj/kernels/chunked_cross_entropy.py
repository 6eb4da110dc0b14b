"""Token losses and their gradients: from hidden states without ``(T, V)`` logits, or from logits.

``TokenLoss`` makes losses and gradients at the hidden states in one pass. A slice of the vocabulary
at a time is multiplied, exponentiated relative to a running maximum, and multiplied back. The
rescaling to a new maximum is that of the online softmax (arXiv:1805.02867).
"""

from typing import Any

import torch
from torch import Tensor, nn

from gradproj.kernels.onednn import linear

SLICE_VALUES = {"cpu": 2**21, "cuda": 2**25}
"""Logits in memory at once: what fits a CPU's cache (8 MB), and what keeps a GPU busy."""

MAX_TOKENS = 4096
"""Tokens at once. With more, slices of the vocabulary would be too narrow for fast products."""


class TokenLoss(torch.autograd.Function):
    """``(hidden (T, H), head, tokens (T,) int64, softcap) -> (T,)`` float32 losses in nats."""

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, tokens: Tensor, softcap: float | None
    ) -> Tensor:
        # Under autocast the hidden states may have another dtype than the weights.
        weight = head.weight.to(hidden.dtype)
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        # An evaluation needs no gradients, which are half of the work.
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(tokens), MAX_TOKENS):
            part = slice(start, start + MAX_TOKENS)
            softmax = _ChunkedSoftmax(
                hidden[part], tokens[part], weight, bias, softcap, grads is not None
            )
            losses[part] = softmax.losses()
            if grads is not None:
                grads[part] = softmax.gradients()
        if grads is not None:
            ctx.save_for_backward(grads)
        return losses

    @staticmethod
    def backward(ctx: Any, weight_of_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grads,) = ctx.saved_tensors
        # In float32: the engine divides by this weight, so it must not be rounded to bfloat16.
        return (grads.float() * weight_of_loss.unsqueeze(1)).to(grads.dtype), None, None, None


class LogitsLoss(torch.autograd.Function):
    """``(logits (T, V) float32, tokens (T,) int64) -> (T,)`` float32 losses in nats.

    torch's own sums each softmax's denominator in float32. Its error makes the gradients of a token
    not add up to 0, so that what all rows of a head have in common does not cancel: for 50,000
    tokens up to 1e-4 of a row.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        places = tokens.unsqueeze(1)
        top = logits.amax(dim=1, keepdim=True)
        shares = (logits - top).exp_()
        n_values = SLICE_VALUES.get(logits.device.type, SLICE_VALUES["cuda"])
        n_rows = max(1, n_values // logits.shape[1])
        sums = [part.sum(dim=1, keepdim=True, dtype=torch.float64) for part in shares.split(n_rows)]
        total = torch.cat(sums)
        losses = total.log() + (top.double() - logits.gather(1, places))
        if ctx.needs_input_grad[0]:
            others = total - shares.gather(1, places)
            divisor = total.float()
            grads = shares.div_(divisor).scatter_(1, places, (-others / divisor).float())
            ctx.save_for_backward(grads)
        return losses.squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, weight_of_loss: Tensor) -> tuple[Tensor, None]:
        (grads,) = ctx.saved_tensors
        return grads * weight_of_loss.unsqueeze(1), None


class _ChunkedSoftmax:
    """The softmax of some tokens, slice by slice of the vocabulary; in float32 but the products."""

    def __init__(
        self,
        hidden: Tensor,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        with_gradients: bool,
    ) -> None:
        self._hidden, self._tokens, self._softcap = hidden, tokens.unsqueeze(1), softcap
        self._weight, self._bias = weight, bias
        column = torch.zeros(len(tokens), 1, device=hidden.device)
        self._top, self._total, self._chosen = column - torch.inf, column, column.clone()
        self._sum = torch.zeros(hidden.shape, device=hidden.device) if with_gradients else None
        n_values = SLICE_VALUES.get(hidden.device.type, SLICE_VALUES["cuda"])
        width = max(64, n_values // max(1, len(hidden)) // 64 * 64)
        for start in range(0, len(weight), width):
            self._add_chunk(slice(start, start + width))

    def _add_chunk(self, part: slice) -> None:
        weight = self._weight[part]
        logits = linear(
            self._hidden, weight, None if self._bias is None else self._bias[part]
        ).float()
        slope = None
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap)
            slope = 1 - logits**2
            logits = logits * self._softcap
        self._choose(logits, part.start)
        top = torch.maximum(self._top, logits.amax(dim=1, keepdim=True))
        shrink = (self._top - top).exp_()
        self._top = top
        shares = logits.sub_(top).exp_()
        self._total = self._total * shrink + shares.sum(dim=1, keepdim=True)
        if self._sum is not None:
            if slope is not None:
                shares.mul_(slope)
            self._sum.mul_(shrink).add_(linear(shares.to(weight.dtype), weight.t()))

    def _choose(self, logits: Tensor, start: int) -> None:
        """Keep the logits of the target tokens in this slice."""
        places = self._tokens - start
        logit = logits.gather(1, places.clamp(0, logits.shape[1] - 1))
        is_here = (places >= 0) & (places < logits.shape[1])
        self._chosen = torch.where(is_here, logit, self._chosen)

    def losses(self) -> Tensor:
        """Return ``(T,)`` losses, nats."""
        return (self._top + self._total.log() - self._chosen).squeeze(1)

    def gradients(self) -> Tensor:
        """Return ``(T, H)`` float32: the softmax's mean of the weights, minus the target's."""
        assert self._sum is not None
        targets = self._weight[self._tokens.squeeze(1)].float()
        if self._softcap is not None:
            targets = targets * (1 - (self._chosen / self._softcap) ** 2)
        return self._sum.div_(self._total).sub_(targets)
