"""Causal attention in bfloat16 on a CPU, in two thirds of the time of torch's own kernel.

torch's kernel also multiplies what lies above the diagonal, and converts bfloat16 to float32 on
the way. Here a block of queries is multiplied, by oneDNN's batched products, with the keys up to
its end: in float32 where differences of products follow (the logits, and the gradients of the
weights), else in bfloat16. The backward pass gets the output and the log of each row's sum and
computes the weights again, as FlashAttention does (arXiv:2205.14135).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from gradproj.kernels.transformers_patches import Replacement

ATTENDS = "_gradproj_attends"
"""Attribute of the modules whose attention ``attend`` may compute.

Another name than "sdpa" in the model's config would not do: some models compare it with "sdpa",
and Falcon's attention then sees later tokens.
"""
QUERIES = 64
"""Queries in a block: their weights over 512 keys and a dozen heads stay in a core's cache."""

_NOT_PLAIN = ("position_bias", "cache", "softcap", "s_aux")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute plain causal bfloat16 attention on a CPU; leave anything else to transformers.

    Only in modules with the attribute ``ATTENDS``: those of a ``FrozenModel``. The arguments are
    those of transformers: a query ``(N, heads, S, D)``, key and value with as many heads or fewer,
    and no mask for causal attention. Returns ``(N, S, heads, D)``, and None for the weights.
    """
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = not settings.get("dropout") and all(settings.get(name) is None for name in _NOT_PLAIN)
    same_width = query.shape[2:] == key.shape[2:] == value.shape[2:]
    ours = getattr(module, ATTENDS, False)
    if not (ours and causal and plain and same_width and attention_mask is None and fits(query)):
        return SDPA.original(module, query, key, value, attention_mask, **settings)
    groups = query.shape[1] // key.shape[1]
    scaling = settings.get("scaling") or query.shape[-1] ** -0.5
    out = _Causal.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), scaling)
    return out.transpose(1, 2), None


SDPA = Replacement(
    attend,
    lambda: AttentionInterface()["sdpa"],
    functools.partial(AttentionInterface.register, "sdpa"),
)
"""Makes ``attend`` transformers' "sdpa"."""


def fits(x: Tensor) -> bool:
    """Return whether ``attend`` supports this tensor's device and type."""
    return (
        x.device.type == "cpu" and x.dtype == torch.bfloat16 and bool(torch.backends.mkldnn.enabled)
    )


class _Causal(torch.autograd.Function):
    """``query, key, value, scaling -> output``; ``(N, heads, S, D)`` bfloat16 each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out, sums = _attention(query, key, value, scaling)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_attention_gradients(gradient, *ctx.saved_tensors, ctx.scaling), None


# Custom operations, so that torch.compile does not unroll their loops for one length.


@torch.library.custom_op("gradproj::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the output, and the log of each row's sum ``(N, heads, S, 1)`` float32."""
    out, sums = _empty_attention(query, key, value, scaling)
    for sample in range(len(query)):
        q, k, v = query[sample], key[sample], value[sample]
        q32, k32 = q.float(), k.float()
        for block, seen in _blocks(query.shape[2]):
            logits = torch.bmm(q32[:, block], k32[:, seen].transpose(1, 2)).mul_(scaling)
            _hide_later(logits, -torch.inf)
            top = logits.amax(dim=-1, keepdim=True)
            shares = logits.sub_(top).exp_()
            total = shares.sum(dim=-1, keepdim=True)
            sums[sample, :, block] = top + total.log()
            out[sample, :, block] = torch.bmm(shares.div_(total).to(q.dtype), v[:, seen])
    return out, sums


@_attention.register_fake
def _empty_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    n, heads, length, width = query.shape
    out = query.new_empty(n, length, heads, width).transpose(1, 2)
    return out, query.new_empty(n, heads, length, 1, dtype=torch.float32)


@torch.library.custom_op("gradproj::attention_gradients", mutates_args=())
def _attention_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    to_query, to_key, to_value = (torch.empty_like(x) for x in (query, key, value))
    for sample in range(len(query)):
        q, k, v, g = query[sample], key[sample], value[sample], gradient[sample].contiguous()
        q32, k32, v32, g32 = q.float(), k.float(), v.float(), g.float()
        means = (g32 * out[sample].float()).sum(dim=-1, keepdim=True)
        sum_k, sum_v = (torch.zeros(x.shape) for x in (k, v))
        for block, seen in _blocks(q.shape[1]):
            shares = torch.bmm(q32[:, block], k32[:, seen].transpose(1, 2)).mul_(scaling)
            shares.sub_(sums[sample, :, block]).exp_()
            _hide_later(shares, 0.0)
            sum_v[:, seen] += torch.bmm(shares.to(q.dtype).transpose(1, 2), g[:, block])
            slopes = torch.bmm(g32[:, block], v32[:, seen].transpose(1, 2))
            slopes = slopes.sub_(means[:, block]).mul_(shares).mul_(scaling).to(q.dtype)
            to_query[sample, :, block] = torch.bmm(slopes, k[:, seen])
            sum_k[:, seen] += torch.bmm(slopes.transpose(1, 2), q[:, block])
        to_key[sample], to_value[sample] = sum_k, sum_v
    return to_query, to_key, to_value


@_attention_gradients.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, each with the keys that its last query sees."""
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        yield slice(start, stop), slice(0, stop)


def _hide_later(logits: Tensor, by: float) -> None:
    """Fill the keys after each query: the upper triangle of the last square of keys."""
    size = logits.shape[1]
    later = torch.ones(size, size, dtype=torch.bool).triu_(1)
    logits[:, :, -size:].masked_fill_(later, by)
