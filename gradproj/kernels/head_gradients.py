"""Gradients of a vocabulary head's weight, sample by sample, without whole ``(V, H)`` matrices.

``HeadLoss`` gives the losses and gradients of ``TokenLoss``, and hands each group of samples' logit
gradients to a sink, which sums what it needs of them. Row v of a sample's weight gradient is
``sum_t (p_tv - [y_t = v]) h_t``, times the slope of a softcap.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradproj.kernels.onednn import linear

GROUP_VALUES = {"cpu": 2**23, "cuda": 2**26}
"""Logits in memory at once: all of the vocabulary for a group of tokens."""


class HeadSink(Protocol):
    """A taker of the logit gradients of a pass."""

    width: int
    """Values that it holds for each sample and word of the vocabulary meanwhile."""

    def add(self, gradients: Tensor, hidden: Tensor, is_target: Tensor) -> None:
        """Take ``(n, s, V)`` float32, ``(n, s, H)``, and ``(n, s)`` bool: both are 0 elsewhere."""

    def close(self) -> None:
        """The group of n samples is complete."""

    def weigh(self, factors: Tensor) -> None:
        """Multiply the rows of all N samples, which are complete, by ``(N,)`` float32."""


class HeadLoss(torch.autograd.Function):
    """``(hidden (N, S, H), head, tokens (N, S) int64, softcap, sink) -> (N, S)`` losses in nats.

    ``tokens`` are the targets, -1 where there is none (loss 0). The sink gets gradients of each
    sample's own summed loss: the factors of the losses in a backward pass play no part.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Linear,
        tokens: Tensor,
        softcap: float | None,
        sink: HeadSink,
    ) -> Tensor:
        weight = head.weight.to(hidden.dtype)
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        n_samples, length, vocabulary = *tokens.shape, len(weight)
        losses = torch.empty(tokens.shape, device=hidden.device)
        gradients = torch.empty_like(hidden)
        most = GROUP_VALUES.get(hidden.device.type, GROUP_VALUES["cuda"]) // vocabulary
        n_together = max(1, most // max(length, sink.width))
        for first in range(0, n_samples, n_together):
            for start in range(0, length, max(1, most)):
                part = slice(first, first + n_together), slice(start, start + max(1, most))
                losses[part], gradients[part] = _part(
                    hidden[part], tokens[part].unsqueeze(-1), weight, bias, softcap, sink
                )
            sink.close()
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, weight_of_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        # In float32, as in TokenLoss.
        weighted = gradients.float() * weight_of_loss.unsqueeze(-1)
        return weighted.to(gradients.dtype), None, None, None, None


def _part(
    hidden: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    sink: HeadSink,
) -> tuple[Tensor, Tensor]:
    """Return losses ``(n, s)`` and gradients ``(n, s, H)``, and feed the sink."""
    logits, slope = linear(hidden, weight, bias).float(), None
    if softcap is not None:
        logits = torch.tanh(logits / softcap)
        slope = 1 - logits**2
        logits = logits * softcap
    targets, is_target = tokens.clamp_min(0), tokens >= 0
    top = logits.amax(dim=-1, keepdim=True)
    chosen = logits.gather(-1, targets)
    shares = logits.sub_(top).exp_()
    # In float64, so that the gradients of a token add up to 0 (see LogitsLoss).
    total = shares.sum(dim=-1, keepdim=True, dtype=torch.float64)
    losses = torch.where(is_target, total.log() + (top.double() - chosen), 0.0)
    others = total - shares.gather(-1, targets)
    shares = shares.div_(total.float()).scatter_(-1, targets, (-others / total).float())
    if slope is not None:
        shares.mul_(slope)
    # Not a product: padding may overflow in the model, and 0 times infinity is no 0.
    shares = shares.masked_fill_(~is_target, 0.0)
    sink.add(shares, torch.where(is_target, hidden, 0.0), is_target.squeeze(-1))
    return losses.squeeze(-1).float(), linear(shares.to(weight.dtype), weight.t())


class HeadMoments:
    """Sums over target tokens of ``P h h^T P^T`` and of the squared logit gradients.

    Tokens with a value that is not finite are left out.
    """

    width = 1

    def __init__(self, p: Tensor, vocabulary: int) -> None:
        self._p = p
        self.hidden = torch.zeros(len(p), len(p), dtype=torch.float64, device=p.device)
        """``(k, k)`` float64."""
        self.logits = torch.zeros(vocabulary, dtype=torch.float64, device=p.device)
        """``(V,)`` float64: of ``(p_tv - [y_t = v])^2``."""
        self.n_tokens = torch.zeros((), dtype=torch.int64, device=p.device)

    def add(self, gradients: Tensor, hidden: Tensor, is_target: Tensor) -> None:
        projected = linear(hidden.float(), self._p).flatten(0, 1)
        squares = gradients.flatten(0, 1).square()
        is_good = (squares.sum(dim=1) + projected.sum(dim=1)).isfinite().unsqueeze(1)
        projected = projected.where(is_good, 0.0)
        self.hidden += projected.T @ projected
        self.logits += squares.where(is_good, 0.0).sum(dim=0)
        self.n_tokens += (is_good.squeeze(1) & is_target.flatten()).sum()

    def close(self) -> None:
        pass

    def weigh(self, factors: Tensor) -> None:
        """Leave the moments as they are: they are of the losses, as every layer's are."""


class HeadRows:
    """Every sample's rows ``x_v = D_v M sum_t (p_tv - [y_t = v]) h_t``: the largest, or all.

    Args:
        matrix: M ``(k, H)`` float32.
        scale: D ``(V,)`` float32.
        n_rows: the number of rows kept of each sample, by ``|x_v|``; None for all.
    """

    def __init__(self, matrix: Tensor, scale: Tensor, n_rows: int | None) -> None:
        self._matrix, self._scale, self._n_rows = matrix, scale, n_rows
        self.width = len(matrix)
        self._sum: Tensor | None = None
        self._ids: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, gradients: Tensor, hidden: Tensor, is_target: Tensor) -> None:
        part = gradients.transpose(1, 2) @ linear(hidden.float(), self._matrix)
        self._sum = part if self._sum is None else self._sum.add_(part)

    def close(self) -> None:
        assert self._sum is not None
        rows, self._sum = self._sum.mul_(self._scale[:, None]), None
        if self._n_rows is not None:
            ids = rows.square().sum(dim=2).topk(min(self._n_rows, rows.shape[1]), dim=1).indices
            self._ids.append(ids)
            rows = rows.gather(1, ids.unsqueeze(2).expand(-1, -1, rows.shape[2]))
        self._values.append(rows)

    def weigh(self, factors: Tensor) -> None:
        self._values = [torch.cat(self._values) * factors[:, None, None]]

    def largest(self) -> tuple[Tensor, Tensor]:
        """Return ids ``(N, m)`` int64 and values ``(N, m, k)`` float32, the largest first."""
        return torch.cat(self._ids), torch.cat(self._values)

    def all(self) -> Tensor:
        """Return ``(N, V, k)`` float32; needs ``n_rows`` None."""
        return torch.cat(self._values)
