"""The product of a layer's input with its weight, by the fastest library that the machine has for it."""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and platform.machine().lower() in ("x86_64", "amd64")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` without a graph: ``(..., I)``, ``(O, I)``, ``(O,)`` -> ``(..., O)``.

    In float32 on an x86 CPU it is oneDNN's product, elsewhere torch's own. torch takes MKL there, which gives
    processors of other makers an AVX2 kernel where they have AVX-512: half the speed on an EPYC 9005
    (``tests/bench/bench_engine.py``). Both sum in float32. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off.

    Args:
        x: contiguous or not.
        weight: may be a transposed view.
        bias: None for none.
    """
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    return (
        _traced_onednn(x, weight, bias)
        if torch.compiler.is_compiling()
        else _onednn(x, weight, bias)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The operation that torch's own compiler emits for a Linear on the CPU.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("gradproj::onednn_linear", mutates_args=())
def _traced_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch's compiler takes the operation for constant weights only, and must not look inside.
    return _onednn(x, weight, bias)


@_traced_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_IN_BFLOAT16 = WeakTensorKeyDictionary()
"""Projection matrix -> the same in bfloat16, where that is exact."""


def cache_bfloat16(p: Tensor) -> None:
    """Have ``project`` multiply in bfloat16 by this float32 matrix, if no entry of it changes: all of a rademacher
    matrix are ``+-1/sqrt(k)``, and for k = 4, 16, 64, 256 that is a power of two. Asks the device, once."""
    low = p.to(torch.bfloat16)
    if torch.equal(low.float(), p):
        _IN_BFLOAT16[p] = low


def project(x: Tensor, p: Tensor) -> Tensor:
    """``x p^T`` in float32: ``(..., n)`` of any precision, ``(k, n)`` float32 -> ``(..., k)``.

    bfloat16 is multiplied as it is where ``p`` was remembered: no float32 copy of x, and on a GPU its tensor cores.
    Sums are float32; each result is rounded to bfloat16 once, as x itself was.
    """
    return project_with(x, p, cached_bfloat16(p) if x.dtype == torch.bfloat16 else None)


def cached_bfloat16(p: Tensor) -> Tensor | None:
    """The same matrix in bfloat16, where it was remembered."""
    return _IN_BFLOAT16.get(p)


def project_with(x: Tensor, p: Tensor, low: Tensor | None) -> Tensor:
    """``project`` for code that torch's compiler traces, which can look up no tensor: ``low`` is ``cached_bfloat16(p)``."""
    if low is None or x.dtype != torch.bfloat16:
        return linear(x.float(), p)
    return F.linear(x, low).float()


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` takes oneDNN for these."""
    return (
        _HAS_ONEDNN
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() > 0
    )
