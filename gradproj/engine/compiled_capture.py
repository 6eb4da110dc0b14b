"""The engine's hooks in a form that torch's compiler takes into a block's graph: tensors in, tensors out.

Every layer has slots, leaf tensors whose gradients are the layer's part of the rows and its token covariances. The
compiled backward pass hands them out as it hands out any gradient, so a block is one graph with its projections in it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.capture import BatchCapture, PlacedLayer, by_sample, not_told_apart
from gradproj.engine.layers import project_tokens
from gradproj.errors import ModelError
from gradproj.kernels.onednn import cached_bfloat16, project_with


class CompiledCapture(BatchCapture):
    """A ``BatchCapture`` whose layers are tapped. ``taps`` are the layers' forward hooks, in their order."""

    def __init__(self, layers: list[PlacedLayer], sum_covariances: bool) -> None:
        self._batch = _BatchOnTap()
        self.taps = [CompiledHook(layer, self._batch) for layer in layers]
        super().__init__(layers, sum_covariances)
        self.called = set(range(len(layers)))

    def begin(self, shape: tuple[int, int] | None) -> None:
        """As ``BatchCapture``."""
        self._fetch()
        super().begin(shape)
        if shape is not None:
            p_i = self._layers[0].p_i
            # Always a tensor of one kind: graphs with and without a mask would be two.
            self._batch.mask = (
                p_i.new_ones(shape) if self.token_mask is None else self.token_mask.to(p_i.dtype)
            )
            for tap in self.taps:
                tap.make_slots(shape[0], self._sum_covariances)

    def forget(self) -> None:
        """As ``BatchCapture``."""
        super().forget()
        self._batch.mask = None
        for tap in self.taps:
            tap.slots = None

    def rows(self) -> Tensor:
        """As ``BatchCapture``."""
        self._fetch()
        return super().rows()

    def _fetch(self) -> None:
        """Take what the backward pass has left in the slots."""
        for index, tap in enumerate(self.taps):
            found = [slot.grad for slot in tap.slots or () if slot.grad is not None]
            if found:
                self.parts[index] = found[0]
            if len(found) > 1:
                self._squares[index] = (found[1], found[2])


class _BatchOnTap:
    """What the taps of one engine share."""

    mask: Tensor | None = None
    """``(N, S)`` float32: the token mask, and by its shape the batch's."""


class CompiledHook:
    """A layer's forward hook (``with_kwargs``): hands the output on, with its gradient tapped on the way back.

    All that is read here is a tensor or the same in every layer: whatever differs would be compiled once a layer.
    """

    slots: tuple[Tensor, ...] | None = None
    """The batch's: ``(N, k_o, k_i)``, and with covariances ``(N, k_i, k_i)`` and ``(N, k_o, k_o)``."""

    def __init__(self, layer: PlacedLayer, batch: _BatchOnTap) -> None:
        self._layer, self._batch = layer, batch
        self._p_i, self._p_o = layer.p_i, layer.p_o
        self._low_i, self._low_o = cached_bfloat16(layer.p_i), cached_bfloat16(layer.p_o)
        rule = layer.target.rule
        self._lookup = rule.project_input if rule.type_name == "Embedding" else None

    def make_slots(self, n: int, with_covariances: bool) -> None:
        """New ones for a batch of ``n`` samples; what they hold is never read."""
        k_i, k_o = len(self._p_i), len(self._p_o)
        sides = [(k_o, k_i), (k_i, k_i), (k_o, k_o)][: 3 if with_covariances else 1]
        self.slots = tuple(self._p_i.new_empty(n, *side).requires_grad_() for side in sides)

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
        return _Tapped.apply(output, a_p, self._p_o, self._low_o, self._batch.mask, *self._slots())

    def _by_sample(self, x: Tensor) -> Tensor:
        mask = self._batch.mask
        if mask is None:
            raise ModelError(
                "a compiled model takes (N, S) input_ids or (N, S, H) inputs_embeds, and got neither"
            )
        found = by_sample(x, mask.shape[0], mask.shape[1])
        if found is None:
            raise not_told_apart(self._layer, x, (mask.shape[0], mask.shape[1]))
        return found

    def _slots(self) -> tuple[Tensor, ...]:
        assert self.slots is not None  # made together with ``mask``
        return self.slots


class _Tapped(torch.autograd.Function):
    """Passes a layer's output through; the gradients of the slots are what its own gradient projects to."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        a_p: Tensor,
        p_o: Tensor,
        low_o: Tensor | None,
        mask: Tensor,
        *slots: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(a_p, p_o, low_o, mask)
        ctx.with_covariances = len(slots) > 1
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a_p, p_o, low_o, mask = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            g_p = project_with(g, p_o, low_o)
            g_p = g_p.view(a_p.shape[0], -1, g_p.shape[-1])
            found: tuple[Tensor, ...] = (project_tokens(a_p, g_p),)
            if ctx.with_covariances:
                real = a_p * mask.unsqueeze(-1)
                found = (*found, project_tokens(real, real), project_tokens(g_p, g_p))
        return g, None, None, None, None, *found
