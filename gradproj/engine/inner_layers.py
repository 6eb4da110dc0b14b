"""Linear products inside of modules, as layers: fused experts' projections, and routers.

transformers keeps the experts of a block in 3-D parameters, and a router's weight in a module that
does more than multiply. Neither has a module of its own for the product. An ``InnerLayer`` stands
for it: while an engine is attached, the module's forward pass goes through it (``Routes``),
so that hooks see the product's input and output like those of any other layer.

Experts work on a batch's tokens in their own order. Here every tensor between two projections is
``(T, k, n)``, token by token in the batch's order, k slots each; only inside a product are the
routed tokens sorted by expert.
"""

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations import moe

_CASTS = (Tensor.to, Tensor.type, Tensor.float)


class InnerLayer(nn.Module):
    """One weight's product in a module's forward pass. Not a part of the model's tree.

    Args:
        host: the module whose forward pass has the product.
        holder: the module that has the weight: the host, or a part of it.
        weight_name: the parameter's name there. It is looked up in each use, since sharding and
            loading replace parameters.
    """

    def __init__(self, host: nn.Module, holder: nn.Module, weight_name: str = "weight") -> None:
        super().__init__()
        # Weak, also so that the layer has no children: they belong to the model.
        self._host, self._holder = weakref.ref(host), weakref.ref(holder)
        self.weight_name = weight_name

    @property
    def host(self) -> Any:
        return self._host()

    @property
    def holder(self) -> Any:
        return self._holder()

    @property
    def weight(self) -> Any:
        return getattr(self.holder, self.weight_name)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield "weight", self.weight


class RouterLayer(InnerLayer):
    """The ``F.linear`` of a module with its own ``weight``, of whatever follows it there."""

    @property
    def widths(self) -> tuple[int, int]:
        n_o, n_i = self.weight.shape
        return n_i, n_o

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)


class ExpertsLayer(InnerLayer):
    """One projection of all experts of a block: ``(E, n_o, n_i)``, or its transpose."""

    @property
    def is_transposed(self) -> bool:
        return bool(getattr(self.holder, "is_transposed", True))  # Llama 4's are

    @property
    def n_experts(self) -> int:
        return len(self.weight)

    @property
    def widths(self) -> tuple[int, int]:
        _, n_i, n_o = self.weight.shape
        return (n_i, n_o) if self.is_transposed else (n_o, n_i)

    def forward(self, x: Tensor, experts: Tensor, order: "ExpertOrder") -> Tensor:
        """Multiply each routed token with its expert's weight and add that expert's bias.

        Args:
            x: ``(T, k, n_i)``.
            experts: ``(T, k)`` the expert of each; hooks read it.
            order: of the same routing.

        Returns:
            ``(T, k, n_o)``.
        """
        bias = getattr(self.holder, f"{self.weight_name}_bias", None)
        weight = self.weight if self.is_transposed else self.weight.mT
        product = order.product(order.sort(x.flatten(0, 1)), weight, bias)
        return order.unsort(product).view(*experts.shape, -1)


class ExpertOrder:
    """Routed tokens ``(T, k)``, flattened, and how to sort them by expert."""

    def __init__(self, experts: Tensor, n_experts: int) -> None:
        self.experts, self._forth = torch.sort(experts.reshape(-1), stable=True)
        self._back = torch.empty_like(self._forth)
        self._back[self._forth] = torch.arange(len(self._forth), device=experts.device)
        bounds = torch.arange(1, n_experts + 1, device=experts.device, dtype=self.experts.dtype)
        self.ends = torch.searchsorted(self.experts, bounds).to(torch.int32)

    def sort(self, x: Tensor) -> Tensor:
        return _Permuted.apply(x, self._forth, self._back)

    def unsort(self, x: Tensor) -> Tensor:
        return _Permuted.apply(x, self._back, self._forth)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return each expert's ``x W + b`` of sorted ``x``; ``weight`` is ``(E, n_i, n_o)``."""
        if x.device.type == "cpu":
            # torch's grouped product refuses float64 and widths that are no multiple of 16 bytes.
            parts = x.split(self.ends.diff(prepend=self.ends.new_zeros(1)).tolist())
            weights = weight.unbind()
            product = torch.cat([a @ w for a, w in zip(parts, weights, strict=True)])
        elif x.is_meta:
            product = x @ weight[0]  # as large as the grouped product, which wants bfloat16 there
        else:
            product = moe._grouped_mm(x, weight, offs=self.ends)
        return product if bias is None else product + bias[self.experts]


class _Permuted(torch.autograd.Function):
    """``x[forth]``; the gradient goes back by the other order, which needs no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, forth)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g.index_select(0, ctx.back), None, None


# --- the modules that have them ---

_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[str, InnerLayer]]" = weakref.WeakKeyDictionary()


def inner_layers_of(module: nn.Module, is_beside_experts: bool = False) -> dict[str, InnerLayer]:
    """Return the products in a module's own forward pass, by their names below the module's.

    The same objects each time. A router's name is empty: it is known by its module's. A module is
    no router unless it is beside experts.
    """
    known = _KNOWN.get(module) or _experts_in(module)
    if not known and is_beside_experts:
        known = _router_in(module)
    if known:
        _KNOWN[module] = known
    return known


def beside_experts(module: nn.Module) -> list[nn.Module]:
    """Return a module's children if experts are among them: one may be their router."""
    children = list(module.children())
    return children if any(map(_experts_in, (module, *children))) else []


def _experts_in(module: Any) -> dict[str, InnerLayer]:
    names, holder, prefix = ("gate_up_proj", "down_proj"), module, ""
    if type(module).__name__ == "Llama4TextMoe":
        holder, prefix = module.experts, "experts."
    elif not hasattr(module, "_is_expert_parallel") or module._is_expert_parallel:
        return {}
    elif not module.has_gate:
        names = ("up_proj", "down_proj")
    weights = [getattr(holder, name, None) for name in names]
    if not all(isinstance(w, Tensor) and w.dim() == 3 and w.is_floating_point() for w in weights):
        return {}  # such as quantized ones
    return {prefix + name: ExpertsLayer(module, holder, name) for name in names}


@torch.no_grad()
def _router_in(module: Any) -> dict[str, InnerLayer]:
    """Return the layer of a module that multiplies with its weight once, found by running it."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return {}
    layer = RouterLayer(module, module)
    was_training, module.training = module.training, False
    x, bias = weight.new_zeros(1, 2, weight.shape[1]), weight.new_zeros(len(weight))
    try:
        # Some take tokens without a dimension for samples, or a bias of the choice as well.
        for given in ((x,), (x[0],), (x, bias), (x[0], bias)):
            seen = _Through(layer)
            try:
                with seen:
                    type(module).forward(module, *given)
            except Exception:  # it takes other inputs
                continue
            return {"": layer} if seen.n_products == 1 and not seen.other_uses else {}
    finally:
        module.training = was_training
    return {}


class _Through(TorchFunctionMode):
    """Sends ``F.linear`` with the weight of a layer's holder through the layer."""

    def __init__(self, layer: InnerLayer) -> None:
        super().__init__()
        self._layer, self._weights = layer, [layer.weight]
        self.n_products, self.other_uses = 0, 0

    def _is_weight(self, x: Any) -> bool:
        return any(x is weight for weight in self._weights)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if func is F.linear and self._is_weight(weight):
            self.n_products += 1
            return self._layer(*args, **kwargs)
        result = func(*args, **kwargs)
        if any(map(self._is_weight, (*args, *kwargs.values()))) and isinstance(result, Tensor):
            if func in _CASTS and self._is_weight(args[0]):
                self._weights.append(result)
            else:
                self.other_uses += 1
        return result


# --- forward passes ---


class Routes:
    """Lets the hosts of the inner layers among ``layers`` compute through them, until ``remove``.

    Several may do so at once.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._hosts = [layer.host for layer in layers if isinstance(layer, InnerLayer)]
        for host in self._hosts:
            if host not in _ROUTED:
                _ROUTED[host] = [0, vars(host).get("forward")]
                is_router = "" in inner_layers_of(host)
                forward = _router_forward if is_router else _experts_forward
                host.forward = functools.partial(forward, host)
            _ROUTED[host][0] += 1

    def remove(self) -> None:
        for host in self._hosts:
            _ROUTED[host][0] -= 1
            if _ROUTED[host][0]:
                continue
            _, own = _ROUTED.pop(host)
            del host.forward
            if own is not None:
                host.forward = own
        self._hosts = []


_ROUTED: "weakref.WeakKeyDictionary[nn.Module, list]" = weakref.WeakKeyDictionary()
"""Host -> number of its routes, and the forward of its own (an offloader's) that it had before."""


def _router_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
    with _Through(inner_layers_of(host)[""]):
        return type(host).forward(host, *args, **kwargs)


def _experts_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
    layers = inner_layers_of(host)
    if type(host).__name__ == "Llama4TextMoe":
        return _llama4_forward(host, layers, *args, **kwargs)
    hidden, experts, weights = (*args, *kwargs.values())
    up, down = layers.values()
    order = ExpertOrder(experts, len(up.weight))
    x = hidden.unsqueeze(1).expand(-1, experts.shape[1], -1)
    x = up(x, experts, order)
    x = host._apply_gate(x) if host.has_gate else host.act_fn(x)
    x = down(x, experts, order)
    if getattr(host, "has_post_expert_norm", False):  # transformers 5.18 has none
        x = host.post_expert_norm(x)
    return (x * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def _llama4_forward(host: Any, layers: dict[str, InnerLayer], hidden: Tensor) -> Any:
    """Compute the chosen experts only; the others' inputs, and so their outputs, are zero."""
    hidden = hidden.reshape(-1, host.hidden_dim)
    scores, logits = host.router(hidden)
    weights, experts = scores.topk(host.top_k, dim=-1)
    up, down = layers.values()
    order = ExpertOrder(experts, len(up.weight))
    gate, x = up(hidden.unsqueeze(1) * weights.unsqueeze(-1), experts, order).chunk(2, dim=-1)
    routed = down(x * host.experts.act_fn(gate), experts, order)
    return host.shared_expert(hidden) + routed.sum(dim=1), logits
