"""State that one batch leaves in the target layers: projected inputs, projected gradients, sums."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.inner_layers import ExpertsLayer
from gradproj.engine.layers import TargetLayer, sum_over_tokens
from gradproj.engine.matrix_file import Matrices
from gradproj.engine.patterns import exclusions
from gradproj.engine.projection import (
    ProjectionConfig,
    draw_matrices,
    draw_signs,
    place_widths,
)
from gradproj.engine.selection import find_layers
from gradproj.errors import MixedSamplesError, ModelError, StaleBatchError
from gradproj.kernels.onednn import cache_bfloat16, project

TokenVisit = Callable[[int, Tensor, Tensor], None]
"""``(number of the layer, P_i a (N, S, k_i), P_o g (N, S, k_o))``, called for each use of a layer
in a backward pass, of the losses as they are weighted."""

ONLY_ALONE = (
    "leave it out of proj_layers, or give batches of one sample, uncompiled (the job's "
    "--batch_size 1 without --compile): rows of samples alone are exact"
)


@dataclass
class TokenCovariances:
    """Sums over real tokens of ``(P_i a)(P_i a)^T`` and ``(P_o g)(P_o g)^T`` of every layer.

    They are K-FAC's factors in the projected space. Samples with a non-finite row are left out.
    """

    a: Tensor
    """Flat float64, layer by layer ``k_i * k_i`` values, row-major."""
    s: Tensor
    """Flat float64, layer by layer ``k_o * k_o`` values, row-major; of the summed loss (nats)."""
    n_tokens: Tensor
    """int64 scalar: number of tokens summed."""

    @classmethod
    def zeros(cls, layers: "list[PlacedLayer]") -> "TokenCovariances":
        device = layers[0].p_i.device
        a, g = (
            torch.zeros(sum(len(p) ** 2 for p in side), dtype=torch.float64, device=device)
            for side in ([layer.p_i for layer in layers], [layer.p_o for layer in layers])
        )
        return cls(a, g, torch.zeros((), dtype=torch.int64, device=device))

    def add(self, other: "TokenCovariances") -> None:
        self.a += other.a
        self.s += other.s
        self.n_tokens += other.n_tokens


@dataclass
class PlacedLayer:
    """A target layer with its matrices and its columns of the row."""

    target: TargetLayer
    p_i: Tensor
    p_o: Tensor
    columns: slice


def place_layers(
    module: nn.Module, config: ProjectionConfig, matrices: Matrices | None = None
) -> list[PlacedLayer]:
    """Return the target layers in model order with their matrices (drawn, or the given ones)."""
    placed: list[PlacedLayer] = []
    targets = find_layers(module, config.patterns, config.include_embeddings, config.experts)
    for target, widths in zip(targets, place_widths(targets, config, matrices), strict=True):
        p_i, p_o = draw_matrices(config, widths) if matrices is None else matrices[widths.name]
        module = target.module
        device = next(chain(module.parameters(), module.buffers())).device
        if isinstance(module, ExpertsLayer) and target.expert is None:
            signs = draw_signs(config.seed, target.name, module.n_experts, widths.n_i)
            target = replace(target, signs=signs.to(device))
        columns = slice(widths.slice_start, widths.slice_end)
        p_i, p_o = on_device(p_i, device), on_device(p_o, device)
        for p in (p_i, p_o):
            cache_bfloat16(p)
        placed.append(PlacedLayer(target, p_i, p_o, columns))
    return placed


def on_device(matrix: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Return a matrix, a tensor or an array, as a tensor on ``device``."""
    # A store's arrays are read-only views of its file, hence the copy.
    matrix = matrix if isinstance(matrix, Tensor) else torch.from_numpy(np.array(matrix))
    return matrix.to(device)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast off: projections are float32 also in a training loop that uses it."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def batch_shape(inputs: Any) -> tuple[int, int] | None:
    """Return ``(samples, positions)`` of token ids or embedded tokens. None for any other input."""
    if isinstance(inputs, Tensor) and inputs.dim() == (3 if inputs.is_floating_point() else 2):
        return inputs.shape[0], inputs.shape[1]
    return None


def by_sample(x: Tensor, n: int, s: int) -> Tensor | None:
    """Return ``(N, S, k)`` from ``(N, ..., k)`` or ``(N * S, ..., k)``. None for any other shape.

    All positions belong to a sample that is alone. That several samples' positions are in the
    batch's order is checked at the start (``row_check.py``).
    """
    if n == 1:
        return x.reshape(1, -1, x.shape[-1])
    if x.dim() >= 3 and x.shape[0] == n:
        return x.flatten(1, -2)
    if x.shape[0] == n * s:
        return x.reshape(n, -1, x.shape[-1])
    return None


def mixed_samples_error(layer: PlacedLayer, x: Tensor, shape: tuple[int, int]) -> ModelError:
    """Return the error for a layer whose positions belong to no known sample."""
    return MixedSamplesError(
        f"layer {layer.target.name} works on {tuple(x.shape[:-1])} positions in a batch of "
        f"{shape[0]} samples of {shape[1]} tokens (an expert, or an input shared by the batch), so "
        f"its samples cannot be separated; {ONLY_ALONE}"
    )


class StartGraph(torch.autograd.Function):
    """Identity that makes its output need a gradient. No leaf: a model may change it in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        return None, None


class BatchCapture:
    """One batch's state between its forward pass and ``rows``; the layers are in model order."""

    probed: "ClassVar[BatchCapture | None]" = None
    """The engine's that tries its samples (``row_check.py``). Other engines ignore them."""

    def __init__(self, layers: list[PlacedLayer], sum_covariances: bool) -> None:
        self._layers = layers
        self._sum_covariances = sum_covariances
        self.token_mask: Tensor | None = None
        self.visit: TokenVisit | None = None
        self.only_alone = ""
        """Why batches of several samples are refused; empty if they are not."""
        self.unchecked = ""
        """Why the model's rows were not checked; empty if they were."""
        self.mixed: set[str] = set()
        """Layers whose positions belonged to no known sample when a batch was tried."""
        self.serial = 0
        self.shape: tuple[int, int] | None = None
        self.forget()

    def is_ignoring(self) -> bool:
        """Return whether the present forward pass is none of this engine's."""
        # An evaluation and the first pass of a checkpointed block make no gradient.
        return not torch.is_grad_enabled() or BatchCapture.probed not in (None, self)

    def begin(self, shape: tuple[int, int] | None) -> None:
        """Start a batch of ``shape`` (samples, positions), None if unknown."""
        if self.parts:
            raise ModelError(
                "the previous batch ran backward and was not collected: call collect_batch() after "
                "each backward pass, or clear_gradients() to drop its rows"
            )
        if self.only_alone and shape is not None and shape[0] > 1:
            raise MixedSamplesError(self.only_alone)
        self.forget()
        self.shape = shape

    def forget(self) -> None:
        self.serial += 1
        self.shape = None
        self.parts: dict[int, Tensor] = {}
        self.called: set[int] = set()
        self._covariances: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    @full_precision()
    def project_input(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Return the projected input, ``(..., k_i)`` float32, all that is kept of it."""
        self.called.add(index)
        layer = self._layers[index]
        a = layer.target.input_of(args, kwargs)
        return layer.target.rule.project_input(module, a, layer.p_i)

    @torch.no_grad()
    @full_precision()
    def take_gradient(self, serial: int, index: int, a_p: Tensor, g: Tensor) -> None:
        """Project a layer's output gradient and sum it with ``a_p`` over each sample's tokens."""
        if serial != self.serial:
            raise StaleBatchError(
                "a backward pass runs through a batch before the last one: run each batch "
                "backward and collect it before the next runs forward"
            )
        layer = self._layers[index]
        # Not before: DoRA's layers also run on a unit matrix, which gets no gradient of the loss.
        a_p = self._by_sample(layer, a_p)
        g_p = self._by_sample(layer, project(g, layer.p_o))
        if self.visit is not None:
            self.visit(index, a_p, g_p)
        part = sum_over_tokens(a_p, g_p)
        # The gradient of a weight that is used twice is the sum of both uses.
        self.parts[index] = self.parts[index] + part if index in self.parts else part
        if self._sum_covariances:
            a, s = self._squares(layer, a_p, g_p)
            before = self._covariances.get(index)
            self._covariances[index] = (before[0] + a, before[1] + s) if before else (a, s)

    def _squares(self, layer: PlacedLayer, a_p: Tensor, g_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's sums of ``a_p a_p^T`` and ``g_p g_p^T`` over its real tokens."""
        mask = self.token_mask
        slots = 1
        if isinstance(layer.target.module, ExpertsLayer):
            slots = a_p.shape[1] // self.shape[1] if self.shape else 1
            if mask is not None:
                mask = mask.repeat_interleave(slots, dim=1)
        if self.only_alone or (mask is not None and a_p.shape[:2] != mask.shape):
            # The tokens' order is not known, but a token without a target has no gradient.
            a_p = a_p * (g_p != 0).any(dim=-1, keepdim=True)
        elif mask is not None:
            a_p = a_p * mask.unsqueeze(-1)
        if layer.target.expert is not None:
            g_p = g_p * (a_p != 0).any(dim=-1, keepdim=True)
        a, s = sum_over_tokens(a_p, a_p), sum_over_tokens(g_p, g_p)
        n = layer.target.counted_positions(slots)
        return (a if n == 1 else a / n), s

    def _by_sample(self, layer: PlacedLayer, x: Tensor) -> Tensor:
        """Return ``(N, S, k)`` whatever shape the layer works on, or raise ``ModelError``."""
        if self.shape is None:
            return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        separated = by_sample(x, *self.shape)
        if separated is not None:
            return separated
        if BatchCapture.probed is not self:
            raise mixed_samples_error(layer, x, self.shape)
        self.mixed.add(layer.target.name)
        return x.reshape(1, -1, x.shape[-1])

    def parts_of(self, loss: Tensor, weights: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return each layer's part of the rows; runs backward to weights that need a gradient."""
        torch.autograd.grad(loss, weights, allow_unused=True)
        return self.parts

    def rows(self) -> Tensor:
        """Return ``(N, D)`` float32, the gradient of the loss as it was weighted."""
        self._check_complete()
        return torch.cat([self.parts[i].flatten(1) for i in range(len(self._layers))], dim=1)

    def fill_unreached(self) -> None:
        """Give zeros to the layers that a loss of the batch does not reach, unless it reaches none.

        Only for a caller to whom such a layer is no mistake.
        """
        if not self.parts or self.shape is None:
            return
        n = self.shape[0]
        for index, layer in enumerate(self._layers):
            if index not in self.parts:
                k_i, k_o, device = len(layer.p_i), len(layer.p_o), layer.p_i.device
                self.parts[index] = torch.zeros(n, k_o, k_i, device=device)
                squares = ((k_i, k_i), (k_o, k_o))
                a, s = (torch.zeros(n, *square, device=device) for square in squares)
                self._covariances[index] = a, s

    def covariances(self, rows: Tensor, weights: Tensor) -> TokenCovariances:
        """Return the batch's sums. ``weights`` (scalar or ``(N, 1)``) undo the loss weights."""
        # One bad sample, or one of weight 0, must not spoil a unit's sums. The mask stays on the
        # device: nothing waits.
        good = torch.isfinite(rows).all(dim=1) & (weights != 0).view(-1)
        pairs = [self._covariances[i] for i in range(len(self._layers))]
        a = torch.cat([pair[0].flatten(1) for pair in pairs], dim=1)
        g = torch.cat([pair[1].flatten(1) for pair in pairs], dim=1) / weights**2
        a, g = (torch.where(good[:, None], x, 0.0).sum(0, dtype=torch.float64) for x in (a, g))
        if self.token_mask is not None:
            counts = self.token_mask.sum(dim=1, dtype=torch.int64)
        else:
            counts = torch.full_like(good, self.shape[1] if self.shape else 1, dtype=torch.int64)
        return TokenCovariances(a, g, torch.where(good, counts, 0).sum())

    def _check_complete(self) -> None:
        names = [layer.target.name for layer in self._layers]
        if not self.parts:
            raise ModelError(
                "no backward pass has run through the target layers since the last batch: attach() "
                "the engine before the forward pass, and call backward() before collect_batch()"
            )
        missing = [name for i, name in enumerate(names) if i not in self.parts]
        if missing:
            uncalled = [name for i, name in enumerate(names) if i not in self.called]
            reason = "were never called" if uncalled else "got no gradient of the loss"
            shown = uncalled or missing
            out = exclusions(missing, [name for name in names if name not in missing])
            raise ModelError(
                f"{len(shown)} of {len(names)} target layers {reason}: {', '.join(shown[:5])}; "
                f"leave them out: add {','.join(out)} to --proj_layers"
            )
