"""Whole inputs and output gradients of a model's layers, handed over layer by layer.

Rows keep a projection of both. Exact curvature and the second stage of a query need them whole,
for a few documents: here a function sees each layer's ``a`` and ``g`` once a batch, in the backward
pass, and nothing else of them is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gradproj.engine.batching import Batch
from gradproj.engine.capture import ONLY_ALONE, StartGraph, by_sample
from gradproj.engine.frozen_model import FrozenModel
from gradproj.engine.inner_layers import ExpertsLayer, Routes
from gradproj.engine.layers import TargetLayer, sum_over_tokens
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.targets import LOSS_WEIGHTS, Targets, loss_key
from gradproj.errors import MixedSamplesError

VALUES_AT_ONCE = 2**26
"""Values of whole gradients, or of inputs and output gradients, that are made at once: 268 MB."""


@dataclass(frozen=True)
class LayerBatch:
    """One layer in one batch. A weight that is used twice has twice as many positions."""

    layer: TargetLayer
    a: Tensor
    """Inputs ``(N, S, n_i)`` in the model's dtype; token ids ``(N, S)`` of an embedding."""
    g: Tensor
    """``(N, S, n_o)`` in the model's dtype: gradient of the summed losses (nats) at the output."""
    mask: Tensor
    """``(N, S)`` bool: the positions that predict a target."""
    factors: Tensor | None = None
    """See ``Batch``."""
    positions: float = 1
    """See ``TargetLayer.counted_positions``."""

    def inputs(self, samples: slice = slice(None)) -> Tensor:
        """Return ``(n, S, n_i)`` float32; one-hot vectors (scaled) of an embedding."""
        return self.layer.rule.whole_input(self.layer.module, self.a[samples])

    def gradients(self, samples: slice = slice(None)) -> Tensor:
        """Return the samples' whole weight gradients times their factors.

        ``(n, n_o, n_i)`` float32.
        """
        found = sum_over_tokens(self.inputs(samples), self.g[samples].float())
        return found if self.factors is None else found * self.factors[samples, None, None]

    def parts(self) -> Iterator[slice]:
        """Yield spans of samples, at least one, that have at most ``VALUES_AT_ONCE`` values."""
        n_i, n_o = self.layer.widths
        positions = self.mask.shape[1]
        step = max(1, VALUES_AT_ONCE // max(n_i * n_o, positions * (n_i + n_o)))
        for first in range(0, len(self.g), step):
            yield slice(first, first + step)


Visit = Callable[[int, LayerBatch], None]
"""``(number of the layer, its batch)``; called once for every layer that a batch reached."""


class WholeGradients:
    """Runs batches and shows every layer's whole inputs and output gradients to a function.

    Use it as a context manager: inside, the model's weights are frozen, as in the job. What
    ``run`` holds at once is the model's activations and the layers' inputs.

    Args:
        model: a causal language model of transformers, on its device.
        layers: of the model.
        gradient_checkpointing: run each block again in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TargetLayer],
        gradient_checkpointing: bool = False,
    ) -> None:
        self._model, self._layers = model, list(layers)
        self._checkpoint = gradient_checkpointing
        self._root = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
        self._visit: Visit | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "WholeGradients":
        with ExitStack() as stack:
            stack.callback(FrozenModel(self._model, self._checkpoint).undo)
            for number, layer in enumerate(self._layers):
                stack.callback(Routes(layer.uses.values()).remove)
                for use in layer.uses.values():
                    hook = use.register_forward_hook(partial(self._hook, number), with_kwargs=True)
                    stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, batch: Batch, visit: Visit, chunked: bool | None = None) -> Tensor:
        """Run a batch forward and backward; return its losses ``(N,)``, summed nats.

        Args:
            batch: on the model's device.
            visit: sees each layer's batch; what it keeps stays in memory.
            chunked: see ``run_batch``.

        Raises:
            MixedSamplesError: a layer's positions belong to no known sample.
        """
        self._visit, self._mask, self._in_backward = visit, batch.token_mask, False
        self._factors = batch.factors
        self._calls = [0] * len(self._layers)
        self._taken: dict[int, list[tuple[Tensor, Tensor]]] = {}
        inputs = {"input_ids": batch.input_ids, "targets": Targets(batch.positions, batch.targets)}
        try:
            losses = per_sample_loss(self._model, inputs, chunked=chunked, causal=chunked is None)
            self._in_backward = True
            losses.sum().backward()
            for number in list(self._taken):  # a use that got no gradient completes no other
                self._show(number)
        finally:
            self._visit, self._taken = None, {}
            LOSS_WEIGHTS.pop(loss_key(self._model), None)
        return losses.detach()

    def _hook(
        self, number: int, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled() or self._visit is None:
            return None
        a = self._layers[number].input_of(args, kwargs)
        if not output.requires_grad:
            output = StartGraph.apply(output.detach(), self._root)
        if not self._in_backward:  # else a checkpointed block runs again, for its tensors alone
            self._calls[number] += 1
            output.register_hook(partial(self._take, number, a))
        return output

    @torch.no_grad()
    def _take(self, number: int, a: Tensor, g: Tensor) -> None:
        self._taken.setdefault(number, []).append((a, g))
        if len(self._taken[number]) == self._calls[number]:
            self._show(number)

    def _show(self, number: int) -> None:
        layer, (n, s) = self._layers[number], self._mask.shape
        lookup = layer.rule.type_name == "Embedding"
        parts, slots = [], 1
        for a, g in self._taken.pop(number):
            a = a.unsqueeze(-1) if lookup else a
            a, g = (_by_sample(layer, x, n, s) for x in (a, g))
            # Where the tokens' order is not known, one without a target has no gradient.
            mask = self._mask if g.shape[1] == s else (g != 0).any(dim=-1)
            if isinstance(layer.module, ExpertsLayer):
                slots = g.shape[1] // s
                mask = self._mask.repeat_interleave(slots, dim=1)
                if layer.expert is not None:
                    g = g * (a != 0).any(dim=-1, keepdim=True)
            parts.append((a.squeeze(-1) if lookup else a, g, mask))
        a, g, mask = (
            torch.cat(x, dim=1) if len(parts) > 1 else x[0] for x in zip(*parts, strict=True)
        )
        assert self._visit is not None
        self._visit(
            number, LayerBatch(layer, a, g, mask, self._factors, layer.counted_positions(slots))
        )


def _by_sample(layer: TargetLayer, x: Tensor, n: int, s: int) -> Tensor:
    separated = by_sample(x, n, s)
    if separated is None:
        raise MixedSamplesError(
            f"layer {layer.name} works on {tuple(x.shape[:-1])} positions in a batch of {n} "
            f"samples of {s} tokens, so its samples cannot be separated; {ONLY_ALONE}"
        )
    return separated
