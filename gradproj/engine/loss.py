"""Per-sample summed token loss without the full logits.

The loss is computed in slices of the vocabulary (``kernels/chunked_cross_entropy.py``) if that
agrees with the model's own logits, so that neither ``(N, S, V)`` logits nor their fp32 copy exist.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.engine.layers import without_wrappers
from gradproj.kernels.chunked_cross_entropy import TokenLoss
from gradproj.kernels.transformers_patches import one_sequence_a_row
from gradproj.model.loading import positions_of

PROBE_TOKENS = 24
"""Length of the batch that decides whether the chunked loss is used."""

IGNORE = -100
"""The label of a position without a target (torch's and transformers' convention)."""

LOSS_WEIGHTS: "WeakKeyDictionary[nn.Module, Tensor]" = WeakKeyDictionary()
"""``loss_key`` of a model -> ``(N,)`` factors of the samples' losses in the last backward pass.

A backward pass writes it where it leaves ``per_sample_loss``, and the engine reads it. So
``losses.sum()`` and ``losses.mean()`` both give rows of the summed loss. See "Loss weights" in
README.md.
"""


@dataclass(frozen=True)
class Targets:
    """A batch's targets as flat indices, made on the host so that no device is read for them."""

    positions: Tensor
    """``(T,)`` int64 flat positions in ``(N * S)`` that predict a target."""
    tokens: Tensor
    """``(T,)`` int64: the target token at each position."""

    @classmethod
    def from_labels(cls, labels: Tensor) -> "Targets":
        """Make them from unshifted ``(N, S)`` labels: position ``s`` predicts label ``s + 1``."""
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)
        positions = (shifted != IGNORE).nonzero().squeeze(1)
        return cls(positions, shifted[positions])


class _Announce(torch.autograd.Function):
    """Identity on the losses. Its backward stores each sample's weight in ``LOSS_WEIGHTS``."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, key: nn.Module) -> Tensor:
        ctx.key = key
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None]:
        LOSS_WEIGHTS[ctx.key] = weights.detach()
        return weights, None


def unwrap(model: Any) -> Any:
    """Return the transformers model inside wrappers of DDP, ``torch.compile`` or PEFT."""
    while True:
        inner = without_wrappers(model)
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


def loss_key(model: nn.Module) -> nn.Module:
    """Return a model's key in ``LOSS_WEIGHTS``: one module, however the model is wrapped."""
    inner = unwrap(model)
    return inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else inner


def per_sample_loss(model: nn.Module, batch: Any, *, chunked: bool | None = None) -> Tensor:
    """Return every sample's cross-entropy, summed over its target tokens.

    Args:
        model: a causal language model of transformers, also wrapped by PEFT or DDP.
        batch: ``input_ids (N, S)`` int64, or a mapping with ``input_ids`` and optionally ``labels``
            (``(N, S)``, not shifted, -100 = no target), ``attention_mask`` (padding carries no
            target) or ``targets`` (a ``Targets``, in place of labels).
        chunked: whether to make the logits in chunks; None takes the answer of ``chunk_verdict``.

    Returns:
        ``(N,)`` float32, nats. A sample without a target has 0.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    targets = batch.get("targets")
    if targets is None:
        labels = batch.get("labels")
        if labels is None:
            labels = input_ids if mask is None else input_ids.masked_fill(mask == 0, IGNORE)
        targets = Targets.from_labels(labels)
    if chunked is None:
        chunked, _ = chunk_verdict(model)
    inner = unwrap(model)
    if chunked and _head_is_bystander(head := inner.get_output_embeddings()):
        hidden = _hidden_states(model, input_ids, mask).flatten(0, 1)[targets.positions]
        losses = TokenLoss.apply(hidden, head, targets.tokens, _softcap(inner))
    else:
        with one_sequence_a_row():
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        chosen = logits.flatten(0, 1)[targets.positions].float()
        losses = F.cross_entropy(chosen, targets.tokens, reduction="none")
    spread = losses.new_zeros(input_ids.numel()).index_copy(0, targets.positions, losses)
    return _Announce.apply(spread.view(input_ids.shape).sum(dim=1), loss_key(model))


def _head_is_bystander(head: nn.Module) -> bool:
    """Return whether the head needs no gradient: neither trained nor hooked as a target layer."""
    return not head._forward_hooks and not any(p.requires_grad for p in head.parameters())


def _hidden_states(model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``(N, S, H)``, the input of the vocabulary head."""
    with one_sequence_a_row():
        body = unwrap(model).base_model
        return body(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]


def _softcap(model: Any) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


_CHUNKABLE: "WeakKeyDictionary[nn.Module, tuple[bool, str]]" = WeakKeyDictionary()


def chunk_verdict(model: nn.Module) -> tuple[bool, str]:
    """Return whether the chunked loss agrees with the model's own logits, and why in words.

    Models differ in logit scales, extra heads and the like. One short batch decides, once per
    model, not a list of names.
    """
    inner = unwrap(model)
    if inner.training:
        return False, "the model is in training mode"
    if inner not in _CHUNKABLE:
        _CHUNKABLE[inner] = _try_chunk(inner)
    return _CHUNKABLE[inner]


@torch.no_grad()
def _try_chunk(model: Any) -> tuple[bool, str]:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False, f"the model's head is a {type(head).__name__}, not a Linear"
    if getattr(model, "base_model", model) is model:
        return False, "the model has no base model apart from its head"
    size = min(head.weight.shape[0], model.get_input_embeddings().weight.shape[0])
    n_tokens = min(PROBE_TOKENS, positions_of(model.config) or PROBE_TOKENS)
    ids = (torch.arange(n_tokens, device=head.weight.device) * 7919 % size).view(1, n_tokens)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden = _hidden_states(model, ids, None)
    logits = head(hidden).float()
    cap = _softcap(model)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    dtype = head.weight.dtype
    tolerance = 1e-5 if expected.dtype == dtype else 4 * torch.finfo(dtype).eps
    error = ((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not error <= tolerance:
        return False, f"logits from the hidden states differ from the model's own by {error:.1e}"
    return True, f"logits in chunks agree with the model's own to {error:.1e}"
