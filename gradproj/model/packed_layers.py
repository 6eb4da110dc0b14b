"""Linear layers whose weight stays quantized.

A row needs a layer's input and the gradient at its output, never its weight. A packed layer unpacks
its weight for each product and drops it again, so that its rows are those of the dequantized model,
whatever else is in the batch. (LLM.int8's own product rounds the inputs too, and which columns it
rounds depends on the batch.)
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.errors import ModelError
from gradproj.kernels.onednn import linear
from gradproj.model.quantized import BITSANDBYTES, TORCHAO

_TOLERANCE = 1e-4
"""Of the input gradient of the layer that is tried, in float32."""

Unpack = Callable[[dict[str, Tensor]], Tensor]


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight stays quantized; each product unpacks it.

    Args:
        shape: ``(n_o, n_i)``.
        parts: the quantizer's tensors, which become buffers.
        unpack: ``parts -> weight (n_o, n_i)`` in the quantizer's dtype.
        bias: ``(n_o,)`` or None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        parts: Mapping[str, Tensor],
        unpack: Unpack,
        bias: nn.Parameter | None,
    ) -> None:
        nn.Module.__init__(self)  # the weight of nn.Linear is a parameter
        self.out_features, self.in_features = shape
        self._unpack, self._names = unpack, tuple(parts)
        for name, part in parts.items():
            self.register_buffer(f"packed_{name}", part)
        self.register_parameter("bias", bias)
        self._copy: Tensor | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight ``(n_o, n_i)``, unpacked at each access; inside ``unpacked`` the one copy."""
        if self._copy is not None:
            return self._copy
        with torch.no_grad():
            return self._unpack({name: getattr(self, f"packed_{name}") for name in self._names})

    @contextmanager
    def unpacked(self) -> Iterator[Tensor]:
        """Hold a copy of the weight meanwhile, of which autograd can give the gradient."""
        self._copy = self.weight
        try:
            yield self._copy
        finally:
            self._copy = None

    def forward(self, x: Tensor) -> Tensor:
        if self._copy is not None:
            return F.linear(x, self._copy.to(x.dtype), self.bias)
        y = _PackedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias


class _PackedProduct(torch.autograd.Function):
    """``x W^T`` and, for the input's gradient, ``g W``: both unpack the weight and keep nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        # oneDNN's result is a view, which a model could not change in place.
        return linear(x, layer.weight.to(x.dtype)).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return linear(g, ctx.layer.weight.to(g.dtype).t()), None


def pack_quantized(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make a quantized model of one's own fit for the engine: replace its layers by packed ones.

    Args:
        model: of transformers, with layers of bitsandbytes or torchao, before its first forward
            pass and before any adapter is added; changed in place.
        dtype: of embeddings, norms and the head; default: the model's.

    Returns:
        The model.
    """
    settle_quantized(model, dtype or model.get_input_embeddings().weight.dtype, stays_packed=True)
    return model


def settle_quantized(model: Any, dtype: torch.dtype, stays_packed: bool) -> None:
    """Replace a loaded model's quantized layers by packed ones, or by plain ones of ``dtype``.

    Embeddings, the head (whose weight the loss works with) and weights that are no layer's are
    dequantized in either case. Afterwards transformers takes the model for one without quantizer.

    Raises:
        ModelError: a packed layer does not give its input the gradient of the dequantized layer.
    """
    head = model.get_output_embeddings()
    settled: dict[nn.Module, nn.Module] = {}  # one module may have several names
    is_tried = False
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in settled and isinstance(module, nn.Linear) and _is_quantized(module):
            packed = _packed(module, dtype) if stays_packed else None
            plain = _plain(module, dtype) if packed is None or module is head else None
            if packed is not None and plain is None and not is_tried:
                _try(name, packed, _plain(module, torch.float32))
                is_tried = True
            settled[module] = plain or packed or module
        if module in settled:
            model.set_submodule(name, settled[module])
    _settle_other_weights(model, dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(flag, None)


def _library_of(thing: object) -> str:
    return type(thing).__module__.partition(".")[0]


def _is_quantized(module: nn.Linear) -> bool:
    if _library_of(module) == BITSANDBYTES:
        return not module.weight.dtype.is_floating_point
    return _library_of(module.weight) == TORCHAO


def _dequantized(weight: Any, module: Any) -> Tensor:
    """Return a weight as its library dequantizes it."""
    if _library_of(weight) == TORCHAO:
        return weight.dequantize(**_in_float32(weight))
    unpack = importlib.import_module("transformers.integrations.bitsandbytes").dequantize_bnb_weight
    return unpack(weight, getattr(module, "state", None))


def _plain(module: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    plain = nn.Linear(*_shape(module)[::-1], bias=False, device="meta")
    weight = _dequantized(module.weight, module).detach().to(dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.register_parameter("bias", _bias_of(module, dtype))
    return plain


def _packed(module: Any, dtype: torch.dtype) -> PackedLinear | None:
    """Return the layer with its quantizer's own tensors; None if they are not plain tensors."""
    parts, unpack = (
        _torchao_parts(module.weight)
        if _library_of(module.weight) == TORCHAO
        else _bitsandbytes_parts(module)
    )
    if any(type(part) not in (Tensor, nn.Parameter) for part in parts.values()):
        return None
    parts = {name: part.detach() for name, part in parts.items()}
    return PackedLinear(_shape(module), parts, unpack, _bias_of(module, dtype))


def _shape(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features


def _bias_of(module: nn.Linear, dtype: torch.dtype) -> nn.Parameter | None:
    bias = module.bias
    return None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def _torchao_parts(weight: Any) -> tuple[dict[str, Tensor], Unpack]:
    names, context = weight.__tensor_flatten__()
    restore = type(weight).__tensor_unflatten__
    shape, stride = weight.shape, weight.stride()
    parts, options = {name: getattr(weight, name) for name in names}, _in_float32(weight)
    return parts, lambda parts: restore(parts, context, shape, stride).dequantize(**options)


def _in_float32(weight: Any) -> dict[str, torch.dtype]:
    """Return the argument, if there is one, that spares a product a rounding to the scales' dtype.

    A compiler leaves that rounding out, and rows would depend on it.
    """
    known = "output_dtype" in inspect.signature(type(weight).dequantize).parameters
    return {"output_dtype": torch.float32} if known else {}


def _bitsandbytes_parts(module: Any) -> tuple[dict[str, Tensor], Unpack]:
    functions, weight = importlib.import_module("bitsandbytes.functional"), module.weight
    if type(weight).__name__ == "Int8Params":
        scale = module.state.SCB if weight.SCB is None else weight.SCB  # once it has run
        parts = {"data": weight.data, "scale": scale}
        return parts, lambda p: functions.int8_vectorwise_dequant(p["data"], p["scale"])
    state, scales = weight.quant_state, weight.quant_state.state2
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "bitsandbytes has packed a weight for this CPU as it first ran: pack the model before"
        )
    parts = {"data": weight.data, "scale": state.absmax, "code": state.code}
    if scales is not None:
        parts |= {"offset": state.offset, "scale2": scales.absmax, "code2": scales.code}
    form = {"blocksize": state.blocksize, "quant_type": state.quant_type}
    form |= {"dtype": state.dtype, "shape": state.shape}
    form2 = {"blocksize": scales.blocksize, "dtype": scales.dtype} if scales is not None else {}
    return parts, functools.partial(_unpack_4bit, functions, form, form2)


def _unpack_4bit(
    functions: Any, form: dict[str, Any], form2: dict[str, Any], parts: dict[str, Tensor]
) -> Tensor:
    state2 = None
    if form2:  # the scales are quantized too
        state2 = functions.QuantState(parts["scale2"], code=parts["code2"], **form2)
    state = functions.QuantState(
        parts["scale"], code=parts["code"], offset=parts.get("offset"), state2=state2, **form
    )
    return functions.dequantize_4bit(parts["data"], state)


def _settle_other_weights(model: Any, dtype: torch.dtype) -> None:
    """Dequantize embeddings and fused experts, and bring every weight to ``dtype``.

    Of a quantized checkpoint transformers loads some weights in the dtype that they are stored in.
    """
    in_float32 = [f"*{part}*" for part in model._keep_in_fp32_modules_strict or ()]
    for name, weight in model.named_parameters():
        wanted = torch.float32 if any(fnmatchcase(name, p) for p in in_float32) else dtype
        if _library_of(weight) == TORCHAO:
            values = _dequantized(weight, None).detach().to(wanted)
            plain = nn.Parameter(values, requires_grad=False)
            for module in model.modules():  # a tied weight stays tied
                for key, other in module._parameters.items():
                    module._parameters[key] = plain if other is weight else other
        elif weight.is_floating_point():
            weight.data = weight.data.to(wanted)


def _try(name: str, packed: PackedLinear, plain: nn.Linear) -> None:
    """Compare a packed layer's product and input gradient with those of its dequantized copy."""
    device = plain.weight.device
    x, g = (
        torch.linspace(0, 99, 4 * n, device=device).cos().view(4, n)
        for n in (packed.in_features, packed.out_features)
    )
    x.requires_grad_()
    with torch.enable_grad():
        products = _PackedProduct.apply(x, packed), F.linear(x, plain.weight)
        pairs = [(y.detach(), torch.autograd.grad(y, x, g)[0]) for y in products]
    for got, want in zip(*pairs, strict=True):
        error = (got - want).norm() / want.norm()
        if not error <= _TOLERANCE:  # NaN too
            raise ModelError(
                f"the quantized layer {name} does not compute what its dequantized copy does "
                f"(error {error:.1e}); give --dequantize"
            )
