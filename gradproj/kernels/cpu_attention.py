"""Causal attention in bfloat16 on a CPU, by oneDNN's batched products: two thirds of the time of torch's own kernel.

torch's kernel multiplies what lies above the diagonal too, and turns bfloat16 into float32 on the way. Here a block of
queries meets the keys up to its end: in float32 where a difference is taken of the products (the logits, and the
gradients of the weights), in bfloat16 elsewhere. Saved for the way back are the output and the log of each row's sum;
the weights are computed again, as in FlashAttention (arXiv:2205.14135).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

ATTENDS = "_gradproj_attends"
"""Attribute of the modules whose attention is ``attend``'s own. (Another name in the model's config would not do: some
models compare it with "sdpa", and Falcon's attention then sees later tokens.)"""
QUERIES = 64
"""Queries in a block: their weights over 512 keys and a dozen heads stay in a core's cache."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """As transformers' ``sdpa``, to which all is left but plain causal bfloat16 attention on a CPU in a frozen model.

    Args:
        module: the layer.
        query: ``(N, heads, S, D)``; key and value may have fewer heads.
        key: ``(N, key heads, S, D)``.
        value: as the key.
        attention_mask: None where it is causal.
        settings: transformers' own.
    """
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = not settings.get("dropout") and all(settings.get(name) is None for name in _NOT_PLAIN)
    same_width = query.shape[2:] == key.shape[2:] == value.shape[2:]
    ours = getattr(module, ATTENDS, False)
    if not (ours and causal and plain and same_width and attention_mask is None and fits(query)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    groups = query.shape[1] // key.shape[1]
    scaling = settings.get("scaling") or query.shape[-1] ** -0.5
    out = _Causal.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), scaling)
    return out.transpose(1, 2), None


_NOT_PLAIN = ("position_bias", "cache", "softcap", "s_aux")
AttentionInterface.register("sdpa", attend)


def fits(x: Tensor) -> bool:
    """Whether ``attend`` computes this itself."""
    return (
        x.device.type == "cpu" and x.dtype == torch.bfloat16 and bool(torch.backends.mkldnn.enabled)
    )


class _Causal(torch.autograd.Function):
    """``(N, heads, S, D)`` each, bfloat16."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out, sums = _attention(query, key, value, scaling)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_attention_gradients(gradient, *ctx.saved_tensors, ctx.scaling), None


# Both are operations of their own, so that torch's compiler does not write out their loops for one length.


@torch.library.custom_op("gradproj::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The output and the logs of the rows' sums; sample by sample, block of queries by block of queries."""
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
    to_query, to_key, to_value = _empty_gradients(gradient, query, key, value, out, sums, scaling)
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
def _empty_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that its last query sees."""
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        yield slice(start, stop), slice(0, stop)


def _hide_later(logits: Tensor, by: float) -> None:
    """Fill what a query must not see: in ``(heads, queries, keys)`` the last square's upper triangle."""
    size = logits.shape[1]
    later = torch.ones(size, size, dtype=torch.bool).triu_(1)
    logits[:, :, -size:].masked_fill_(later, by)
