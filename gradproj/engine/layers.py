"""One rule per layer type: its widths, and how its input is projected.

For every type the row is that of ``P_o G P_i^T`` with ``G`` the gradient as an ``(out, in)``
matrix, whichever way round the type stores its weight.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradproj.engine.inner_layers import (
    ExpertsLayer,
    InnerLayer,
    RouterLayer,
    beside_experts,
    inner_layers_of,
)
from gradproj.kernels.onednn import project
from gradproj.model.packed_layers import PackedLinear


@dataclass(frozen=True)
class LayerRule:
    """Widths and input projection of a layer type."""

    type_name: str
    """Recorded in the store."""
    widths: Callable[[Any], tuple[int, int]]
    """``module -> (n_i, n_o)``."""
    project_input: Callable[[Any, Tensor, Tensor], Tensor]
    """``(module, a, P_i (k_i, n_i)) -> (..., k_i)`` float32."""
    whole_input: Callable[[Any, Tensor], Tensor]
    """``(module, a) -> (..., n_i)`` float32: ``project_input`` with the identity as ``P_i``."""


def _project_dense(module: Any, a: Tensor, p_i: Tensor) -> Tensor:
    return project(a, p_i)


def _dense(module: Any, a: Tensor) -> Tensor:
    return a.float()


def _project_lookup(module: Any, ids: Tensor, p_i: Tensor) -> Tensor:
    """Gather rows of ``P_i^T``: a token's one-hot vector times ``P_i^T`` is one of them."""
    return _scaled_as_rows(module, ids, p_i.t()[ids])


def _one_hot(module: Any, ids: Tensor) -> Tensor:
    one_hot = torch.nn.functional.one_hot(ids, len(module.weight))
    return _scaled_as_rows(module, ids, one_hot.float())


def _scaled_as_rows(module: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """Scale what stands for a token, ``(..., k)``, as the module scales its embedding."""
    if getattr(module, "padding_idx", None) is not None:
        # torch gives the padding token's embedding no gradient.
        rows = rows * (ids != module.padding_idx).unsqueeze(-1)
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return rows
    # The model rounds the scale to its own dtype before it multiplies.
    scale = scale if isinstance(scale, Tensor) else torch.full((), scale, device=rows.device)
    return rows * scale.to(module.weight.dtype).to(rows)


LAYER_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LayerRule("Linear", lambda m: tuple(m.weight.t().shape), _project_dense, _dense),
    Conv1D: LayerRule("Conv1D", lambda m: tuple(m.weight.shape), _project_dense, _dense),
    nn.Embedding: LayerRule(
        "Embedding", lambda m: tuple(m.weight.shape), _project_lookup, _one_hot
    ),
    RouterLayer: LayerRule("Linear", lambda m: m.widths, _project_dense, _dense),
    ExpertsLayer: LayerRule("Experts", lambda m: m.widths, _project_dense, _dense),
}
"""Type -> rule. The tests need a case for each."""
_PACKED = LayerRule("Linear", lambda m: (m.in_features, m.out_features), _project_dense, _dense)


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule of a layer, or None if no rule describes what it computes.

    A subclass counts as its base if it runs the base's own ``forward``, which a library's quantized
    or sparse layer does not (``PackedLinear`` takes the place of quantized ones). Embeddings that
    scale their output by ``embed_scale`` (Gemma 3) count, and any other layer whose output is shown
    to be ``input W^T + b``.
    """
    if isinstance(module, PackedLinear):
        return _PACKED
    for kind, rule in LAYER_RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return LAYER_RULES[nn.Embedding]
    return LAYER_RULES[nn.Linear] if _is_linear(module) else None


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Return whether a layer of another type computes ``input W^T + b``, by trying a small one."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    weight, others = parameters.get("weight"), parameters.keys() - {"weight", "bias"}
    if weight is None or weight.dim() != 2 or others or module._modules:
        return False
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return False
    # A copy without hooks, whose few weights are on the CPU: the layer's may be on no device.
    n_i, n_o = 3, 2
    values = (
        torch.linspace(-1, 1, 2 * n_i + n_o * n_i + n_o, dtype=torch.float32, device="cpu")
        .cos()
        .split([2 * n_i, n_o * n_i, n_o])
    )
    x, small = values[0].view(1, 2, n_i), {"weight": values[1].view(n_o, n_i), "bias": values[2]}
    trial = copy.copy(module)
    vars(trial).update(
        _parameters={
            name: nn.Parameter(small[name]) if name in parameters else None
            for name in module._parameters
        },
        in_features=n_i,
        out_features=n_o,
        training=False,
    )
    want = nn.functional.linear(x, small["weight"], small["bias"] if "bias" in parameters else None)
    try:
        got = type(module).forward(trial, x)
    except Exception:  # it takes other inputs, or sees that it is not itself
        return False
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want)


@dataclass(frozen=True)
class TargetLayer:
    """A weight whose gradient is projected, and the modules that use it.

    Of a projection of fused experts it is all experts' weights side by side, ``(n_o, E * n_i)``,
    times the signs: inputs ``D_e a``, so that the gradient is ``sum_e G_e D_e``, ``(n_o, n_i)``;
    or one expert's weight.
    """

    uses: dict[str, nn.Module]
    """Dotted name -> module, in model order; more than one if modules share the weight."""
    rule: LayerRule
    expert: int | None = None
    """The one expert of an ``ExpertsLayer``; None for all of them as one layer."""
    signs: Tensor | None = None
    """``(E, n_i)`` int8 of all experts as one layer; ``place_layers`` draws them."""

    @property
    def name(self) -> str:
        """Name of the first module: the layer's name in the store."""
        return next(iter(self.uses))

    @property
    def module(self) -> nn.Module:
        return self.uses[self.name]

    @property
    def widths(self) -> tuple[int, int]:
        """``(n_i, n_o)``."""
        return self.rule.widths(self.module)

    @property
    def weight(self) -> Tensor | None:
        """The parameter. None if it is computed, by a parametrization."""
        module, name = self.module, "weight"
        if isinstance(module, InnerLayer):
            module, name = module.holder, module.weight_name
        return module._parameters.get(name)

    @property
    def n_weights(self) -> int:
        """Entries of the weight."""
        n_experts = 1
        if isinstance(self.module, ExpertsLayer) and self.expert is None:
            n_experts = self.module.n_experts
        return math.prod(self.widths) * n_experts

    def counted_positions(self, slots: int) -> float:
        """Return how many positions one token has in the mean, of ``slots`` that it is routed to.

        With inputs that are a mean over them, K-FAC's product of factors per token is that per
        position. Of one expert it is so if tokens are shared out evenly.
        """
        if isinstance(self.module, ExpertsLayer) and self.expert is not None:
            return slots / self.module.n_experts
        return slots

    @property
    def holders(self) -> list[nn.Module]:
        """The modules of the model that have the weight."""
        return [m.holder if isinstance(m, InnerLayer) else m for m in self.uses.values()]

    @torch.no_grad()
    def input_of(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Return the input that a row is made of, given what a module of the layer was called with.

        Routed tokens are signed, or those of other experts are zero.
        """
        a, *others = args or kwargs.values()
        a = a.detach()
        if self.signs is not None:
            return a * self.signs[others[0]]
        if self.expert is not None:
            return a * (others[0] == self.expert).unsqueeze(-1)
        return a

    def gradient_of(self, gradient: Tensor) -> Tensor:
        """Return ``(n_o, n_i)`` float32 from the gradient of the parameter."""
        module: Any = self.module
        if isinstance(module, ExpertsLayer):
            by_expert = gradient.mT if module.is_transposed else gradient
            if self.expert is not None:
                return by_expert[self.expert].float()
            assert self.signs is not None
            return (by_expert * self.signs.unsqueeze(1)).sum(dim=0, dtype=torch.float32)
        return (gradient if self.rule.type_name == "Linear" else gradient.t()).float()


def without_wrappers(model: Any) -> Any:
    """Return the module inside DistributedDataParallel and ``torch.compile``.

    A layer's name, and with it its matrices, must not depend on them.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def unwrap(model: Any) -> Any:
    """Return the transformers model inside wrappers of DDP, ``torch.compile`` or PEFT."""
    while True:
        inner = without_wrappers(model)
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


EXPERTS = ("joint", "separate", "none")


def every_layer(model: nn.Module, experts: str = "joint") -> list[TargetLayer]:
    """Return every weight of the model that a rule describes, in model order.

    Modules that share a weight are one layer. (A head tied to the embedding is two: as a matrix and
    as a lookup, the weight has different projections.)

    ``experts``: a projection of fused experts as one layer, ``joint``; as one for each expert,
    ``separate``; or, with the routers that are modules of their own, as ``none``.
    """
    layers: dict[tuple[str, int, int | None], TargetLayer] = {}
    never_called: set[nn.Module] = set()
    beside: set[nn.Module] = set()
    for name, module in without_wrappers(model).named_modules():
        if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
            # PEFT's target_parameters: the adapter's layers only hold the weights of a sum.
            never_called |= {*module.lora_A.modules(), *module.lora_B.modules()}
        if module in never_called:
            continue
        rule = rule_for(module)
        found: dict[str, nn.Module] = {} if rule is None else {"": module}
        if experts != "none":
            beside.update(beside_experts(module))
            if rule is None:
                found = dict(inner_layers_of(module, module in beside))
        for part, layer in found.items():
            for use, expert in _uses(name, part, layer, experts):
                rule = rule_for(layer)
                assert rule is not None
                target = TargetLayer({}, rule, expert)
                # A weight that is computed (by a parametrization) has no identity but its module's.
                weight = TargetLayer({use: layer}, rule).weight
                key = rule.type_name, id(layer if weight is None else weight), expert
                layers.setdefault(key, target).uses[use] = layer
    return list(layers.values())


def _uses(name: str, part: str, layer: nn.Module, experts: str) -> list[tuple[str, int | None]]:
    """Return a layer's names, each with its expert if that is a layer of its own."""
    full = f"{name}.{part}" if part else name
    if experts != "separate" or not isinstance(layer, ExpertsLayer):
        return [(full, None)]
    above, _, last = full.rpartition(".")
    return [(f"{above}.{e}.{last}", e) for e in range(layer.n_experts)]


def sum_over_tokens(a_p: Tensor, g_p: Tensor) -> Tensor:
    """Sum a sample's tokens into its projected gradient.

    Args:
        a_p: projected inputs, ``(N, S, k_i)`` float32.
        g_p: projected output gradients (nats of the summed loss), ``(N, S, k_o)`` float32; exactly
            zero at positions that carry no loss.

    Returns:
        ``(N, k_o, k_i)`` float32: ``sum_s g_p[n, s] a_p[n, s]^T``, one batched product.
    """
    return torch.bmm(g_p.transpose(1, 2), a_p)
