"""One joint batch on its way through the model: what its layers record in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.errors import ModelError
from gradproj.training.graddotprod.inner_products import (
    Lookup,
    OuterProducts,
    OuterProductsAtRows,
    Share,
    joined,
)
from gradproj.training.graddotprod.joint_batch import JointBatch
from gradproj.training.graddotprod.layer_rules import DotLayer

Deliver = Callable[[nn.Parameter, Tensor], None]


class DotBatch:
    """Record of a joint batch: inputs and gradients of its layers.

    ``deliver`` is called once for each parameter, with its complete gradient over the training
    samples.
    """

    def __init__(self, joint: JointBatch, deliver: Deliver) -> None:
        self.joint, self._deliver = joint, deliver
        self.n_samples, self._n_positions = joint.labels.shape
        self.n_taken = 0
        self._sums: dict[nn.Parameter, _ParameterSums] = {}
        self._over = False

    def tap(self, layer: DotLayer, a: Tensor, output: Tensor, root: Tensor, again: bool) -> Tensor:
        """Return the layer's output, whose backward pass calls ``take``.

        ``root`` is any tensor that requires a gradient; the graph starts here if it has not yet.
        ``again``: a checkpointed block runs again in the backward pass; its first run was counted.
        """
        if self._is_shared(a.shape if layer.is_lookup else a.shape[:-1]):
            # Positions are looked up once for all samples. Expand them: one gradient per sample.
            a = self._for_each_sample(a, a.dim() - (not layer.is_lookup))
            output = self._for_each_sample(output, output.dim() - 1)
        self._check(layer, output.shape[:-1])
        ids = self._by_sample(a.unsqueeze(-1)).squeeze(-1) if layer.is_lookup else None
        if not again:
            for key, kind in layer.kinds.items():
                self._of(getattr(layer.module, key)).expect(kind, ids)
        if a.dtype != output.dtype and ids is None and OuterProducts in layer.kinds.values():
            a = a.to(output.dtype)  # under autocast the product has its input in this type
        in_place = not (output.is_leaf and output.requires_grad)
        return _Tap.apply(output, None if ids is not None else a, root, self, layer, ids, in_place)

    def take(self, layer: DotLayer, a: Tensor, g: Tensor) -> None:
        """Record a layer's input (or ids) and the gradient at its output."""
        if self._over:
            raise ModelError(
                "a backward pass runs through a batch before the last one: run each batch "
                "backward, and call prepare_gradients() and aggregate_and_log(), before the next "
                "runs forward"
            )
        self.n_taken += 1
        if not layer.is_lookup:
            a = self._by_sample(a)
        for key, share in layer.shares(layer.module, a, self._by_sample(g)):
            if key in layer.kinds:
                parameter = getattr(layer.module, key)
                self._of(parameter).add(share)
                self._deliver_whole(parameter)

    def finish(self) -> None:
        """End the backward pass: calls without a part in the loss are no longer waited for."""
        self._over = True
        for parameter, sums in self._sums.items():
            sums.close_all()
            self._deliver_whole(parameter)

    def dots(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return ``(n_train, n_parameters)`` inner products of the joint loss's gradients.

        A parameter without a gradient has 0.
        """
        zeros = torch.zeros(self.joint.n_train, device=parameters[0].device)
        columns = (self._sums[p].dots if p in self._sums else None for p in parameters)
        return torch.stack([zeros if dots is None else dots.to(zeros) for dots in columns], dim=1)

    def _of(self, parameter: nn.Parameter) -> "_ParameterSums":
        if parameter not in self._sums:
            self._sums[parameter] = _ParameterSums(self.joint)
        return self._sums[parameter]

    def _deliver_whole(self, parameter: nn.Parameter) -> None:
        gradient = self._sums[parameter].take_gradient()
        if gradient is not None:
            self._deliver(parameter, gradient)

    def _is_shared(self, places: torch.Size) -> bool:
        """Return whether a layer's positions belong to no sample: ``(1, S)`` or ``(S,)``."""
        return places[0] == 1 < self.n_samples or tuple(places) == (self._n_positions,)

    def _for_each_sample(self, x: Tensor, n_dims: int) -> Tensor:
        """Expand ``(1, S, ...)`` or ``(S, ...)`` of ``n_dims`` place dimensions to all samples."""
        x = x.unsqueeze(0) if n_dims == 1 else x
        return x.expand(self.n_samples, *x.shape[1:]).contiguous()

    def _check(self, layer: DotLayer, places: torch.Size) -> None:
        """Raise ``ModelError`` unless the places are ``(N, ...)`` or ``(N * S,)``."""
        n = self.n_samples
        if places[0] != n and tuple(places) != (n * self._n_positions,):
            raise ModelError(
                f"GradDotProd: a {type(layer.module).__name__} works on {tuple(places)} positions "
                f"in a batch of {n} samples of {self._n_positions} tokens, so its samples cannot "
                "be distinguished; freeze it with requires_grad_(False)"
            )

    def _by_sample(self, x: Tensor) -> Tensor:
        """Reshape ``(N, ..., H)`` or ``(N * S, H)`` to ``(N, S, H)``."""
        return x.reshape(self.n_samples, -1, x.shape[-1])


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward hands gradient and layer input to the batch.

    The input is saved through autograd, so that checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        a: Tensor | None,
        root: Tensor,
        batch: DotBatch,
        layer: DotLayer,
        ids: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.batch, ctx.layer, ctx.ids = batch, layer, ids
        if not in_place:
            return output.view_as(output)
        # Return the output itself and no view: some models add to a layer's output in place.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            ctx.batch.take(ctx.layer, ctx.ids if a is None else a, g)
        return g, None, None, None, None, None, None


class _ParameterSums:
    """Gradient and inner products of a parameter, which several calls may use.

    A tied weight is used as a table and as a matrix.
    """

    def __init__(self, joint: JointBatch) -> None:
        self.dots: Tensor | None = None
        self._n_train, self._scale = joint.n_train, joint.train_scale
        self._expected: dict[type, int] = {}
        self._shares: dict[type, list[Share]] = {}
        self._ids: list[Tensor] = []
        self._gradient: Tensor | None = None
        self._at_rows: OuterProductsAtRows | None = None
        self._lookup: Lookup | None = None

    def expect(self, kind: type, ids: Tensor | None) -> None:
        self._expected[kind] = self._expected.get(kind, 0) + 1
        if ids is not None:
            self._ids.append(ids)

    def add(self, share: Share) -> None:
        """Add a call in the backward pass. The last one of a kind sums and frees all of them."""
        kind = type(share)
        self._shares.setdefault(kind, []).append(share)
        if len(self._shares[kind]) == self._expected[kind]:
            self._close(kind)

    def close_all(self) -> None:
        """Sum what is there; no more calls will come."""
        for kind in list(self._shares):
            self._close(kind)
        self._expected = {}
        self._at_rows = self._lookup = None

    def take_gradient(self) -> Tensor | None:
        """Return the complete gradient once; None while a call is missing."""
        if self._expected:
            return None
        gradient, self._gradient = self._gradient, None
        return gradient

    def _close(self, kind: type) -> None:
        share = joined(self._shares.pop(kind))
        del self._expected[kind]
        gradient, dots = share.sums(self._n_train, self._scale)
        self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)
        self._add_dots(dots)
        if isinstance(share, OuterProducts) and self._ids:
            self._at_rows = OuterProductsAtRows.of(share, torch.cat(self._ids, 1), self._n_train)
        elif isinstance(share, Lookup):
            self._lookup = share
        if self._at_rows is not None and self._lookup is not None:
            # A tied weight's gradient is the sum of both uses, so their cross products count too.
            self._add_dots(self._at_rows.cross(self._lookup, self._n_train))
            self._at_rows = None

    def _add_dots(self, dots: Tensor) -> None:
        self.dots = dots if self.dots is None else self.dots + dots
