"""A model whose weights are frozen for a while: no gradient for any weight, eval mode, and faster forms of its modules.

The forms compute what the modules compute, to rounding. All is undone at the end: flags, modes, methods.
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
from gradproj.errors import ModelError
from gradproj.kernels.cpu_attention import ATTENDS, fits, register_sdpa, unregister_sdpa
from gradproj.kernels.onednn import linear, uses_onednn


class FrozenModel:
    """Freezes a model when made; ``undo`` leaves it as it was found.

    Args:
        module: the model.
        gradient_checkpointing: keep the inputs of the model's blocks only, and run each block forward again on the
            way back: less memory for a third more time. (transformers' own does it in training mode alone.)

        compiled: run each block through torch's compiler.

    Raises:
        ModelError: checkpointing or compiling was asked for, and transformers marks no block of the model.
    """

    def __init__(
        self, module: nn.Module, gradient_checkpointing: bool = False, compiled: bool = False
    ) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self._swapped: list[nn.Module] = []
        self._attending: list[nn.Module] = []
        for parameter in module.parameters():
            self._set(parameter, "requires_grad", False)
        own_attention = any(fits(parameter) for parameter in module.parameters())
        for part in module.modules():
            self._set(part, "training", False)
            if own_attention and ATTENDS not in vars(part):
                setattr(part, ATTENDS, True)
                self._attending.append(part)
            form = _FORMS.get(type(part))
            if isinstance(part, GradientCheckpointingLayer) and (
                gradient_checkpointing or compiled
            ):
                form = functools.partial(_block, gradient_checkpointing, compiled)
            # A forward of the module's own (a quantizer's, an offloader's) does something that no form knows.
            if form is not None and "forward" not in vars(part):
                part.forward = form(part)
                self._swapped.append(part)
        if self._attending:
            register_sdpa()
        asked = (
            "gradient_checkpointing" if gradient_checkpointing else "compile" if compiled else ""
        )
        if asked and not any(
            isinstance(part, GradientCheckpointingLayer) for part in self._swapped
        ):
            self.undo()
            raise ModelError(
                f"--{asked}: transformers marks no block of {type(module).__name__} for it; leave it out"
            )

    def undo(self) -> None:
        """Give the model back its flags, modes and methods."""
        for part in self._swapped:
            del part.forward
        for part in self._attending:
            delattr(part, ATTENDS)
        if self._attending:
            unregister_sdpa()
        for owner, attribute, value in reversed(self._before):
            setattr(owner, attribute, value)
        self._before, self._swapped, self._attending = [], [], []

    def _set(self, owner: Any, attribute: str, value: Any) -> None:
        self._before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer of which only the input has a gradient, both ways by ``products.linear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return linear(g, ctx.weight.t()), None, None


def _dense(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if weight.requires_grad or not uses_onednn(x, weight):
            return F.linear(x, weight, bias)
        return _FrozenLinear.apply(x, weight, bias)

    return forward


def _conv1d(module: Conv1D) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if weight.requires_grad or not uses_onednn(x, weight):
            return Conv1D.forward(module, x)
        return _FrozenLinear.apply(x, weight.t(), bias)

    return forward


def _new_gelu(module: NewGELUActivation) -> Callable[[Tensor], Tensor]:
    # The same formula in one kernel: transformers' keeps four tensors for the backward pass, this one.
    return lambda x: F.gelu(x, approximate="tanh")


def _block(
    checkpointed: bool, compiled: bool, module: GradientCheckpointingLayer
) -> Callable[..., Any]:
    forward = compiled_block(module) if compiled else module.forward
    if not checkpointed:
        return forward
    return functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


_FORMS: dict[type[nn.Module], Callable[[Any], Callable[..., Any]]] = {
    nn.Linear: _dense,
    Conv1D: _conv1d,
    NewGELUActivation: _new_gelu,
}
"""Type -> ``module -> its forward while frozen``. Subclasses may compute something else and are left alone."""
