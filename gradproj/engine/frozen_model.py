"""Freezes a model temporarily: no weight gradients, eval mode, faster forwards of some modules.

The faster forwards compute what the modules compute, up to rounding. ``undo`` restores flags, modes
and methods.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from gradproj.engine.compile import compiled_block
from gradproj.engine.loss import output_head
from gradproj.errors import ModelError
from gradproj.kernels.cpu_attention import ATTENDS, SDPA, fits
from gradproj.kernels.onednn import linear, uses_onednn

CENTRED_ROWS = 4096
"""Rows of a head's weight at once."""


class FrozenModel:
    """Freezes a model when made; ``undo`` restores it.

    Args:
        module: the model.
        gradient_checkpointing: keep only the inputs of the model's blocks and run each block
            forward again in the backward pass: less memory for a third more time. (transformers'
            own checkpointing works in training mode only.)
        compiled: run each block through ``torch.compile``.

    Raises:
        ModelError: checkpointing or compiling was requested, and transformers marks no block of the
            model for it.
    """

    def __init__(
        self, module: nn.Module, gradient_checkpointing: bool = False, compiled: bool = False
    ) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self._swapped: list[nn.Module] = []
        self._attending: list[nn.Module] = []
        for parameter in module.parameters():
            self._set(parameter, "requires_grad", False)
        by_block = gradient_checkpointing or compiled
        head = output_head(module)
        own_attention = any(fits(parameter) for parameter in module.parameters())
        for part in module.modules():
            self._set(part, "training", False)
            if own_attention and ATTENDS not in vars(part):
                setattr(part, ATTENDS, True)
                self._attending.append(part)
            form = _FORMS.get(type(part))
            if part is head and form is _dense:
                form = _head
            if by_block and isinstance(part, GradientCheckpointingLayer):
                form = functools.partial(_block, gradient_checkpointing, compiled)
            # Leave a module that already has its own forward (a quantizer's, an offloader's).
            if form is not None and "forward" not in vars(part):
                part.forward = form(part)
                self._swapped.append(part)
        if self._attending:
            SDPA.begin()
        flag = "gradient_checkpointing" if gradient_checkpointing else "compile"
        has_blocks = any(isinstance(part, GradientCheckpointingLayer) for part in self._swapped)
        if by_block and not has_blocks:
            self.undo()
            raise ModelError(
                f"--{flag}: transformers marks no block of {type(module).__name__} for it; "
                "leave it out"
            )

    def undo(self) -> None:
        """Restore the model's flags, modes and methods."""
        for part in self._swapped:
            del part.forward
        for part in self._attending:
            delattr(part, ATTENDS)
        if self._attending:
            SDPA.end()
        for owner, attribute, value in reversed(self._before):
            setattr(owner, attribute, value)
        self._before, self._swapped, self._attending = [], [], []

    def _set(self, owner: Any, attribute: str, value: Any) -> None:
        self._before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that gives only its input a gradient; both passes use ``onednn.linear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        # oneDNN's result is a view, which a model could not change in place (OLMo's clip_qkv does).
        return linear(x, weight, bias).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return linear(g, ctx.weight.t()), None, None


class _FrozenHead(_FrozenLinear):
    """A vocabulary head, whose backward product is centred.

    A token's gradients add up to about 0, so what the thousands of rows of the weight have in
    common must cancel: in one float32 sum it leaves up to 1e-4 of a row in rounding.
    """

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        weight: Tensor = ctx.weight
        common = weight[:CENTRED_ROWS].mean(dim=0)
        result = g.sum(dim=-1, keepdim=True, dtype=torch.float64).float() * common
        parts = zip(g.split(CENTRED_ROWS, dim=-1), weight.split(CENTRED_ROWS), strict=True)
        for g_part, rows in parts:
            result += linear(g_part, (rows - common).t())
        return result, None, None


def _head(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        low = autocast or x.dtype != torch.float32
        if low or module.weight.dtype != torch.float32 or module.weight.requires_grad:
            return nn.Linear.forward(module, x)
        return _FrozenHead.apply(x, module.weight, module.bias)

    return forward


def _dense(module: nn.Linear | Conv1D) -> Callable[[Tensor], Tensor]:
    original: Callable[..., Tensor] = type(module).forward
    transposed = isinstance(module, Conv1D)

    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        if weight.requires_grad or not uses_onednn(x, weight):
            return original(module, x)
        return _FrozenLinear.apply(x, weight.t() if transposed else weight, module.bias)

    return forward


def _block(
    checkpointed: bool, compiled: bool, module: GradientCheckpointingLayer
) -> Callable[..., Any]:
    forward = compiled_block(module) if compiled else module.forward
    if not checkpointed:
        return forward
    return functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


_FORMS: dict[type[nn.Module], Callable[[Any], Callable[..., Any]]] = {
    nn.Linear: _dense,
    Conv1D: _dense,
    # One kernel, which saves one tensor for the backward pass; transformers' version saves four.
    NewGELUActivation: lambda module: functools.partial(F.gelu, approximate="tanh"),
}
"""Exact type -> ``module -> its forward while frozen``. A subclass may compute something else."""
