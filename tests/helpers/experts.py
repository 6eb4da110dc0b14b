"""Fused experts by plain autograd, one sample or routed token at a time: the expected values."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Routed:
    """The routed tokens of a batch in one projection of fused experts."""

    experts: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    """With the gradients of the loss, after its backward pass."""

    def side_by_side(self, n_experts: int) -> tuple[Tensor, Tensor]:
        """Return ``(a (T, E * n_i), g (T, n_o))`` of all experts' weights as one matrix.

        A token's input is in the columns of its expert.
        """
        a = torch.zeros(len(self.experts), n_experts, len(self.inputs[0]), dtype=torch.float64)
        for n, (expert, x) in enumerate(zip(self.experts, self.inputs, strict=True)):
            a[n, expert] = x.detach()
        return a.flatten(1), torch.stack([y.grad for y in self.outputs]).double()


def slow_experts(model: nn.Module) -> dict[str, Routed]:
    """Let gated experts with weights ``(E, n_o, n_i)`` compute token by token, and record it.

    Returns name of the projection -> what it does in the next forward pass.
    """
    seen = {}
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj"):
            up, down = (
                seen.setdefault(f"{name}.{x}", Routed()) for x in ("gate_up_proj", "down_proj")
            )
            module.forward = _Slow(module, up, down)
    return seen


@dataclass
class _Slow:
    module: nn.Module
    up: Routed
    down: Routed

    def __call__(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        tokens = []
        for x, chosen, shares in zip(hidden, experts.tolist(), weights, strict=True):
            total = torch.zeros_like(x)
            for expert, share in zip(chosen, shares, strict=True):
                h = self._product(self.up, self.module.gate_up_proj, expert, x)
                gate, up = h.chunk(2)
                y = self.module.act_fn(gate) * up
                total = total + share * self._product(self.down, self.module.down_proj, expert, y)
            tokens.append(total)
        return torch.stack(tokens)

    def _product(self, routed: Routed, weight: Tensor, expert: int, x: Tensor) -> Tensor:
        y = weight[expert] @ x
        y.retain_grad()
        routed.experts.append(expert)
        routed.inputs.append(x)
        routed.outputs.append(y)
        return y
