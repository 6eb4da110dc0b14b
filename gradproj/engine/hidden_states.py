"""Final hidden states of a batch, as the vocabulary head sees them, summed while the model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.capture import full_precision
from gradproj.engine.layers import unwrap
from gradproj.engine.loss import output_head
from gradproj.errors import ModelError


def hidden_width(model: nn.Module) -> int:
    """Return the values of a token's final hidden state.

    Raises:
        ModelError: the model has no body apart from a linear head, which would tell them.
    """
    inner, head = unwrap(model), output_head(model)
    if type(head) is not nn.Linear or getattr(inner, "base_model", inner) is inner:
        raise ModelError(
            f"--hidden_state: {type(inner).__name__} has no body apart from a linear vocabulary "
            "head, so what its final hidden states are is not known. Leave it out "
            "(--hidden_state none)"
        )
    return head.in_features


@contextmanager
def summed_states(model: nn.Module, weights: Tensor) -> Iterator[list[Tensor]]:
    """Yield a list that gets ``sum_s weights[n, s] h[n, s]`` once the model has run on a batch.

    ``h`` are the outputs of the model's body, after its final norm. ``weights`` are ``(N, S)``
    float32 on the device, 0 at padding; the sums ``(N, d)`` float32.
    """
    sums: list[Tensor] = []

    @torch.no_grad()
    @full_precision()
    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        # The virtual tokens of prompt learning come first.
        states = output[0].detach()[:, -weights.shape[1] :]
        sums.append(torch.bmm(weights[:, None], states.float())[:, 0])

    handle = unwrap(model).base_model.register_forward_hook(add)
    try:
        yield sums
    finally:
        handle.remove()


def pooling_weights(kind: str, token_mask: Tensor, last: Tensor) -> Tensor:
    """Return the weights of ``summed_states`` for a kind of ``--hidden_state``, ``(N, S)`` float32.

    Args:
        kind: ``mean``, whose sums are still to be divided by the number of targets, or ``last``.
        token_mask: ``(N, S)`` bool: the positions that predict a target.
        last: ``(N,)`` int64: each sequence's last position; -1 if it is not its document's last.
    """
    if kind == "mean":
        return token_mask.float()
    return (torch.arange(token_mask.shape[1], device=last.device) == last[:, None]).float()
