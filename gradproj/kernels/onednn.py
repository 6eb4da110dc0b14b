"""Products of layer inputs with weights and projections, by the fastest library for them."""

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
    """Multiply without a graph: ``x weight^T + bias``, ``(..., I), (O, I), (O,) -> (..., O)``.

    In float32 on an x86 CPU it uses oneDNN, elsewhere torch's own product. torch would use MKL,
    which runs an AVX2 kernel on other makers' processors even if they have AVX-512: half the speed
    on an EPYC 9005 (``tests/bench/bench_engine.py``). Both sum in float32.
    ``torch.backends.mkldnn.flags(enabled=False)`` turns it off.
    """
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    product = _traced_onednn if torch.compiler.is_compiling() else _onednn
    return product(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The operation that torch's compiler emits for a Linear on a CPU.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("gradproj::onednn_linear", mutates_args=())
def _traced_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch.compile accepts the operation for constant weights only, so it must not trace it.
    return _onednn(x, weight, bias)


@_traced_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_IN_BFLOAT16 = WeakTensorKeyDictionary()
"""Projection matrix -> its exact bfloat16 copy, and the matrix's version when it was made."""


def cache_bfloat16(p: Tensor) -> None:
    """Cache a bfloat16 copy of a float32 matrix for ``project``, if the conversion is exact.

    It is for rademacher matrices with k = 4, 16, 64, 256: their entries ``+-1/sqrt(k)`` are powers
    of two. Synchronises with the device once.
    """
    low = p.to(torch.bfloat16)
    if torch.equal(low.float(), p) and not p.is_inference():
        _IN_BFLOAT16[p] = low, p._version


def project(x: Tensor, p: Tensor) -> Tensor:
    """Return ``x p^T`` in float32, ``(..., n), (k, n) -> (..., k)``; ``x`` of any precision.

    If ``p`` has a cached bfloat16 copy, bfloat16 ``x`` is multiplied with that: no float32 copy of
    x, and tensor cores on a GPU. Sums are float32; each result is rounded to bfloat16 once.
    """
    return project_with(x, p, cached_bfloat16(p) if x.dtype == torch.bfloat16 else None)


def cached_bfloat16(p: Tensor) -> Tensor | None:
    """Return the cached bfloat16 copy of a matrix. None if it has none or was written to since."""
    low, version = _IN_BFLOAT16.get(p, (None, None))
    return low if low is not None and p._version == version else None


def project_with(x: Tensor, p: Tensor, low: Tensor | None) -> Tensor:
    """Return ``project(x, p)``, given ``low = cached_bfloat16(p)``.

    For code that torch.compile traces, which cannot look up a tensor.
    """
    if low is None or x.dtype != torch.bfloat16:
        return linear(x.float(), p)
    return F.linear(x, low).float()


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``linear`` uses oneDNN for these tensors."""
    return (
        _HAS_ONEDNN
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() > 0
    )
