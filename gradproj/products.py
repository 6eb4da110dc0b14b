"""The product of a layer's input with its weight, by the fastest library that the machine has for it."""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

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
    # The operation that torch's own compiler emits for a Linear on the CPU.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` takes oneDNN for these."""
    return (
        _HAS_ONEDNN
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() > 0
    )
