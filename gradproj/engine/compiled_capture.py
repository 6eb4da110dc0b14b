"""Engine hooks that torch.compile can trace into a block's graph: tensors in, tensors out.

Every layer has gradient buffers: leaf tensors whose "gradients" are the layer's part of the rows
and its token covariances. The compiled backward pass returns them like any other gradient, so a
block and its projections are one graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.capture import BatchCapture, PlacedLayer, by_sample, mixed_samples_error
from gradproj.engine.inner_layers import InnerLayer
from gradproj.engine.layers import TargetLayer, sum_over_tokens
from gradproj.engine.patterns import exclusions
from gradproj.errors import ModelError
from gradproj.kernels.onednn import cached_bfloat16, project_with


class CompiledCapture(BatchCapture):
    """A ``BatchCapture`` filled by ``hooks``, the layers' forward hooks in model order."""

    def __init__(self, layers: list[PlacedLayer], sum_covariances: bool) -> None:
        check_compilable([layer.target for layer in layers])
        self._batch = _SharedBatch()
        self.hooks = [CompiledHook(layer, self._batch) for layer in layers]
        super().__init__(layers, sum_covariances)
        self.called = set(range(len(layers)))

    def begin(self, shape: tuple[int, int] | None) -> None:
        self._fetch()
        super().begin(shape)
        if shape is not None:
            p_i = self._layers[0].p_i
            # Always a mask: batches with and without one would be two graphs.
            mask = self.token_mask
            self._batch.mask = p_i.new_ones(shape) if mask is None else mask.to(p_i.dtype)
            for hook in self.hooks:
                hook.make_grad_buffers(shape[0], self._sum_covariances)

    def forget(self) -> None:
        super().forget()
        self._batch.mask = None
        for hook in self.hooks:
            hook.grad_buffers = None

    def parts_of(self, loss: Tensor, weights: Sequence[Tensor]) -> dict[int, Tensor]:
        buffers = [buffer for hook in self.hooks for buffer in hook.grad_buffers or ()]
        grads = torch.autograd.grad(loss, [*weights, *buffers], allow_unused=True)
        for buffer, grad in zip(buffers, grads[len(weights) :], strict=True):
            buffer.grad = grad
        self._fetch()
        return self.parts

    def rows(self) -> Tensor:
        self._fetch()
        return super().rows()

    def _fetch(self) -> None:
        """Take the backward pass's results from the buffers."""
        for index, hook in enumerate(self.hooks):
            grads = [buffer.grad for buffer in hook.grad_buffers or () if buffer.grad is not None]
            if grads:
                self.parts[index] = grads[0]
            if len(grads) > 1:
                self._covariances[index] = (grads[1], grads[2])


def check_compilable(targets: Sequence[TargetLayer]) -> None:
    """Raise ``ModelError`` if a layer is no module of the model's."""
    inner = [target.name for target in targets if isinstance(target.module, InnerLayer)]
    if inner:
        kept = [target.name for target in targets if target.name not in inner]
        raise ModelError(
            f"--compile: experts and routers ({inner[0]}, for example) run uncompiled only: leave "
            f"--compile out, or leave them out: add {','.join(exclusions(inner, kept))} to "
            "--proj_layers"
        )


class _SharedBatch:
    """State that all hooks of one engine share."""

    mask: Tensor | None = None
    """``(N, S)`` float32 token mask. Its shape is the batch's."""


class CompiledHook:
    """A layer's forward hook (``with_kwargs``) that projects the gradient of the layer's output.

    Everything read here is a tensor, or equal in every layer: torch.compile would otherwise compile
    one graph per layer.
    """

    grad_buffers: tuple[Tensor, ...] | None = None
    """``(N, k_o, k_i)``, and with covariances ``(N, k_i, k_i)`` and ``(N, k_o, k_o)``."""

    def __init__(self, layer: PlacedLayer, batch: _SharedBatch) -> None:
        self._layer, self._batch = layer, batch
        self._p_i, self._p_o = layer.p_i, layer.p_o
        self._low_i, self._low_o = cached_bfloat16(layer.p_i), cached_bfloat16(layer.p_o)
        rule = layer.target.rule
        self._lookup = rule.project_input if rule.type_name == "Embedding" else None

    def make_grad_buffers(self, n: int, with_covariances: bool) -> None:
        """Make buffers for a batch of ``n`` samples. Their values are never read."""
        k_i, k_o = len(self._p_i), len(self._p_o)
        sides = [(k_o, k_i), (k_i, k_i), (k_o, k_o)][: 3 if with_covariances else 1]
        self.grad_buffers = tuple(self._p_i.new_empty(n, *side).requires_grad_() for side in sides)

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor | None:
        # An evaluation makes no gradient.
        if not torch.is_grad_enabled():
            return None
        a = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            if self._lookup is not None:
                a_p = self._lookup(module, a, self._p_i)
            else:
                a_p = project_with(a.detach(), self._p_i, self._low_i)
            a_p = self._by_sample(a_p)
        assert self.grad_buffers is not None  # set together with ``mask``
        constants = (self._p_o, self._low_o, self._batch.mask)
        return _ProjectGradient.apply(output, a_p, *constants, *self.grad_buffers)

    def _by_sample(self, x: Tensor) -> Tensor:
        mask = self._batch.mask
        if mask is None:
            raise ModelError(
                "a compiled model takes (N, S) input_ids or (N, S, H) inputs_embeds, and got "
                "neither"
            )
        n, s = mask.shape
        separated = by_sample(x, n, s)
        if separated is None:
            raise mixed_samples_error(self._layer, x, (n, s))
        return separated


class _ProjectGradient(torch.autograd.Function):
    """Identity on a layer's output; its backward fills the buffers from the output's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        a_p: Tensor,
        p_o: Tensor,
        low_o: Tensor | None,
        mask: Tensor,
        *grad_buffers: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(a_p, p_o, low_o, mask)
        ctx.with_covariances = len(grad_buffers) > 1
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a_p, p_o, low_o, mask = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            g_p = project_with(g, p_o, low_o)
            g_p = g_p.view(a_p.shape[0], -1, g_p.shape[-1])
            grads: tuple[Tensor, ...] = (sum_over_tokens(a_p, g_p),)
            if ctx.with_covariances:
                real = a_p * mask.unsqueeze(-1)
                grads = (*grads, sum_over_tokens(real, real), sum_over_tokens(g_p, g_p))
        return g, None, None, None, None, *grads
