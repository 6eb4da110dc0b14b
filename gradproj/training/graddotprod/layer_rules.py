"""Layer types that GradDotProd supports, and the gradient shares of their parameters."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.layers import rule_for, without_wrappers
from gradproj.errors import ModelError
from gradproj.training.graddotprod.inner_products import (
    Lookup,
    OuterProducts,
    Share,
    Vector,
    widened,
)

SharesOf = Callable[[Any, Tensor, Tensor], Iterator[tuple[str, Share]]]
"""``(layer, its input, the gradient at its output (N, S, O)) -> (parameter name, share)``."""

_WEIGHT_KINDS: dict[str, type] = {
    "Linear": OuterProducts, "Conv1D": OuterProducts, "Embedding": Lookup,
}  # fmt: skip


@dataclass
class DotLayer:
    """A layer with trainable parameters."""

    module: nn.Module
    kinds: dict[str, type]
    """Name in the layer of each trainable parameter -> kind of share."""
    shares: SharesOf

    @property
    def is_lookup(self) -> bool:
        return isinstance(self.module, nn.Embedding)


def find_dot_layers(model: nn.Module) -> list[DotLayer]:
    """Return every layer that has trainable parameters itself, not only in its children.

    ``ModelError`` if one is of an unknown type, or sharded over ranks.
    """
    # FSDP's and tensor parallelism's parameters are DTensors, which have a mesh.
    if any(hasattr(p, "device_mesh") or hasattr(p, "_local_shard") for p in model.parameters()):
        raise ModelError(
            "GradDotProd makes whole gradients itself, so every rank needs the whole model: use "
            "DistributedDataParallel instead of FSDP or tensor parallelism, or "
            "method GradProjLora, which looks at no weight"
        )
    layers, unknown = [], []
    for name, module in without_wrappers(model).named_modules():
        keys = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not keys:
            continue
        rule = rule_for(module)
        type_name = "" if rule is None else rule.type_name
        shares = _shares_of(module, type_name)
        if shares is None:
            unknown += [f"{name}.{key} ({type(module).__name__})".lstrip(".") for key in keys]
            continue
        first = _WEIGHT_KINDS.get(type_name, Vector)
        kinds = {key: first if key == "weight" else Vector for key in keys}
        layers.append(DotLayer(module, kinds, shares))
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise ModelError(
            f"GradDotProd cannot take the gradient of {', '.join(unknown[:6])}{more} sample by "
            "sample: it supports Linear, Conv1D, Embedding, layer norm and RMS norm. Freeze these "
            "parameters with requires_grad_(False), or use another method"
        )
    if not layers:
        raise ModelError(
            f"GradDotProd: {type(without_wrappers(model)).__name__} has no trainable parameter; "
            "call requires_grad_(True) on what is to be trained"
        )
    return layers


def _shares_of(module: Any, type_name: str) -> SharesOf | None:
    if type_name == "Embedding":
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return _lookup if plain else None
    return {"Linear": _linear, "Conv1D": _conv1d}.get(type_name) or _norm(module)


def _linear(module: nn.Linear, a: Tensor, g: Tensor) -> Iterator[tuple[str, Share]]:
    yield "weight", OuterProducts(g, a.to(g.dtype))
    yield "bias", Vector(g)


def _conv1d(module: Any, a: Tensor, g: Tensor) -> Iterator[tuple[str, Share]]:
    yield "weight", OuterProducts(a.to(g.dtype), g)
    yield "bias", Vector(g)


def _lookup(module: Any, ids: Tensor, g: Tensor) -> Iterator[tuple[str, Share]]:
    if module.padding_idx is not None:
        # torch gives the padding token's row no gradient.
        g = g * (ids != module.padding_idx).unsqueeze(-1)
    scale = getattr(module, "embed_scale", None)
    if scale is not None:
        g = g * (scale.to(g) if isinstance(scale, Tensor) else scale)
    yield "weight", Lookup(ids, g, module.num_embeddings)


def _norm(module: nn.Module) -> SharesOf | None:
    """Return the rule of a layer norm or RMS norm of any class, found by trying both; else None."""
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() - {"weight", "bias"} or any(p.dim() != 1 for p in parameters.values()):
        return None
    for normalise in (_centred, _uncentred):
        if _agrees(module, normalise):

            def shares(
                module: Any, a: Tensor, g: Tensor, norm: Any = normalise
            ) -> Iterator[tuple[str, Share]]:
                if "weight" in parameters:
                    yield "weight", Vector(g * norm(module, widened(a)))
                yield "bias", Vector(g)

            return shares
    return None


def _centred(module: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=_epsilon(module, x))


def _uncentred(module: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _epsilon(module, x))


def _epsilon(module: Any, x: Tensor) -> float:
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return torch.finfo(x.dtype).eps  # nn.RMSNorm's default


@torch.enable_grad()
def _agrees(module: nn.Module, normalise: Callable[[Any, Tensor], Tensor]) -> bool:
    """Return whether the rule gives autograd's gradients on a few random tokens."""
    trial = copy.deepcopy(module).to("cpu", torch.float32).requires_grad_(True)
    parameters = dict(trial.named_parameters(recurse=False))
    width = len(next(iter(parameters.values())))
    random = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 2, 3, width, generator=random)
    x = 0.1 * x + 0.05
    try:
        out = trial(x)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            return False
        gradients = torch.autograd.grad(out, list(parameters.values()), g, allow_unused=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # its input is not hidden states
    rule = {"weight": (g * normalise(module, x)).sum((0, 1)), "bias": g.sum((0, 1))}
    return all(
        gradient is not None and torch.allclose(gradient, rule[name], rtol=1e-3, atol=1e-4)
        for name, gradient in zip(parameters, gradients, strict=True)
    )
