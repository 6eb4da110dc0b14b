"""Sparse head rows: settings, basis, the pass over a batch, and their encoding on the device.

Row v of the head's gradient becomes ``x_v = D_v M sum_t (p_tv - [y_t = v]) h_t`` with ``M = Q w
U^T P`` ``(k, H)``: P is random, U and w whiten the projected hidden states (K-FAC's input side), D
is the inverse root of the second moment of a word's logit gradient (K-FAC's output side, of which
only the diagonal is kept), and Q is a fixed rotation that spreads a vector over the signs. Without
loss of rows and signs, ``sum_v <x_v, x'_v>`` is the K-FAC influence of the head.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.engine.batching import Batch
from gradproj.engine.layers import unwrap
from gradproj.engine.loss import (
    chunk_verdict,
    head_is_bystander,
    output_head,
    run_model,
    softcap_of,
)
from gradproj.engine.projection import ProjectionConfig, projection_matrix
from gradproj.engine.targets import Announce, loss_key
from gradproj.errors import ConfigError, ModelError, damaged
from gradproj.flags import Flags, flag
from gradproj.kernels.head_gradients import HeadLoss, HeadMoments, HeadSink
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import (
    HEAD_MATRIX,
    HEAD_NAME,
    HEAD_SCALE,
    NO_ROW,
    SCALE_BIAS,
    UNUSED,
    HeadSegment,
)

INPUT_DAMPING = 0.03
"""Of the hidden states' eigenvalues, relative to their mean, as of every layer."""

QUERY_ROWS = 4096
"""Rows kept of a query, in full precision."""

WINDOW_ROWS = 4
"""A window of a longer document keeps this multiple of a document's rows."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Flags, title="head rows"):
    """Sparse rows of the vocabulary head. Part of the store's identity."""

    head_rows: str = flag(
        "ROWSxVALUES, such as 64x64: the rows of the vocabulary head's gradient that are kept of a "
        "document, and the signs of each; 0 = none. Needs --basis eigen and packed rows.",
        "0",
        metavar="ROWSxVALUES",
    )
    head_damping: float = flag(
        "Damping of the words' second moments, relative to their mean over the pilot's tokens; "
        "less of it favours rare words.",
        0.2,
        above=0,
        below=math.inf,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.segment(1)

    def segment(self, vocabulary: int, stored_start: int = 0) -> HeadSegment | None:
        """Return the form of the rows for a head of so many words; None without head rows."""
        if self.head_rows == "0":
            return None
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.head_rows)
        if match is None:
            raise ConfigError(
                f"--head_rows is {self.head_rows!r}; give ROWSxVALUES such as 64x64, or 0 for none"
            )
        return HeadSegment(int(match[1]), int(match[2]), vocabulary, stored_start)


@dataclass(frozen=True)
class HeadBasis:
    """The matrices that make a head's gradient into rows."""

    matrix: Tensor
    """M ``(k, H)`` float32."""
    scale: Tensor
    """D ``(V,)`` float32."""

    @classmethod
    def fit(
        cls, hidden: Tensor, logits: Tensor, p: Tensor, rotation: Tensor, damping: float
    ) -> "HeadBasis":
        """Return the basis of a pilot's second moments.

        Args:
            hidden: mean of ``P h h^T P^T`` over target tokens, ``(k, k)`` float64.
            logits: s, mean of ``(p_tv - [y_t = v])^2``, ``(V,)`` float64.
            p: P ``(k, H)``.
            rotation: Q ``(k, k)``.
            damping: added to s, relative to the second moment that a token's gradient meets on
                average, ``sum s^2 / sum s``. The plain mean over the vocabulary would shrink with
                its size, and rare words would take all places.

        Raises:
            ModelError: the moments are not finite.
        """
        if not (hidden.isfinite().all() and logits.isfinite().all()):
            raise ModelError(
                "the vocabulary head's second moments are not finite: its inputs or gradients are "
                "too large for float32. Leave --head_rows out"
            )
        values, vectors = torch.linalg.eigh(hidden)
        values = values.clamp_min(0)
        whitening = (values + INPUT_DAMPING * values.mean()).rsqrt()
        matrix = (rotation.double() * whitening) @ vectors.T @ p.double()
        scale = (logits + damping * logits.square().sum() / logits.sum()).rsqrt()
        return cls(matrix.float(), scale.float())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a store's group."""
        named = {HEAD_MATRIX: self.matrix, HEAD_SCALE: self.scale}
        return {name: values.cpu().numpy().reshape(-1) for name, values in named.items()}

    def digest(self) -> str:
        """Return a digest of the arrays."""
        digest = hashlib.sha256()
        for values in self.arrays().values():
            digest.update(values.data)
        return digest.hexdigest()[:32]

    @classmethod
    def of_store(cls, store: ProjectionStore, device: torch.device) -> "HeadBasis | None":
        """Return the basis of a store's head rows, on a device; None if it has none."""
        if store.head is None:
            return None
        segment = store.head.segment
        matrix, scale = (torch.from_numpy(store.array(x)) for x in (HEAD_MATRIX, HEAD_SCALE))
        if len(matrix) % segment.k or len(scale) != segment.vocabulary:
            raise damaged(store.path, f"{HEAD_MATRIX} or {HEAD_SCALE} is not of its head rows")
        return cls(matrix.view(segment.k, -1).to(device), scale.to(device))


class HeadPilot:
    """Sums the second moments of the pilot's batches, and makes the basis of them."""

    def __init__(self, model: nn.Module, kind: str, seed: int, k: int) -> None:
        check_head(model)
        weight: Tensor = unwrap(model).get_output_embeddings().weight
        p, self._rotation = draw_head_matrices(kind, seed, k, weight.shape[1])
        self._p, self._vocabulary = p.to(weight.device), len(weight)
        self._total = self.sink()

    @classmethod
    def of(
        cls, model: nn.Module, projection: ProjectionConfig, segment: HeadSegment | None
    ) -> "HeadPilot | None":
        """Return the pilot of a run's head rows; None if it has none."""
        if segment is None:
            return None
        return cls(model, projection.kind, projection.seed, segment.k)

    def sink(self) -> HeadMoments:
        """Return what takes one batch, which may fail."""
        return HeadMoments(self._p, self._vocabulary)

    def add(self, hidden: Tensor, logits: Tensor, n_tokens: Tensor) -> None:
        """Add the sums of a batch's ``HeadMoments``."""
        self._total.hidden += hidden
        self._total.logits += logits
        self._total.n_tokens += n_tokens

    def basis(self, damping: float) -> HeadBasis:
        """Return the basis of all batches, on the CPU."""
        total = self._total
        hidden, logits = ((x / total.n_tokens).cpu() for x in (total.hidden, total.logits))
        return HeadBasis.fit(hidden, logits, self._p.cpu(), self._rotation, damping)


def draw_head_matrices(kind: str, seed: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """Return ``(P (k, n), Q (k, k))`` float32 on the CPU, of their arguments alone."""
    p = projection_matrix(kind, seed, HEAD_NAME, "i", k, n)
    return p, projection_matrix("orthonormal", seed, HEAD_NAME, "rotation", k, k)


def head_loss(model: Any, batch: Batch, sink: HeadSink) -> Tensor:
    """Return ``per_sample_loss`` of a batch, ``(N,)`` nats, and feed the sink.

    Only for a model of which ``check_head`` says that it has its logits from the head alone.
    """
    inner, shape = unwrap(model), batch.input_ids.shape
    hidden = run_model(inner.base_model, {"input_ids": batch.input_ids})[0]
    tokens = batch.input_ids.new_full((shape.numel(),), -1)
    tokens = tokens.index_copy(0, batch.positions, batch.targets).view(shape)
    head = inner.get_output_embeddings()
    losses = HeadLoss.apply(hidden, head, tokens, softcap_of(inner), sink).sum(dim=1)
    return Announce.apply(losses, loss_key(model), batch.positions, shape[1])


def check_head(model: nn.Module) -> None:
    """Raise ``ModelError`` if the model's head gives no rows."""
    is_chunked, reason = chunk_verdict(model)
    if not is_chunked:
        raise ModelError(
            f"--head_rows takes a model whose logits are its head's own output: {reason}. Leave it "
            "out (--head_rows 0)"
        )
    head = output_head(model)
    if head is None or not head_is_bystander(head):
        raise ModelError(
            "--head_rows and --proj_layers both name the vocabulary head: leave one of them out"
        )


def encode_head(ids: Tensor, values: Tensor, segment: HeadSegment) -> Tensor:
    """Encode rows for storage, as ``store/head_rows.py`` describes it.

    A row's scale is the mean of its magnitudes, rounded to half an octave. A row of zeros is an
    unused entry.

    Args:
        ids: ``(n, m)`` int64, m at most ``segment.n_rows``.
        values: ``(n, m, k)`` float32.
        segment: the form.

    Returns:
        ``(n, segment.n_bytes)`` uint8 on the device.
    """
    scale = values.abs().mean(dim=2)
    steps = (2 * scale.log2()).round() + SCALE_BIAS
    # NaN is left to the status of the sample, which has no row then.
    steps = torch.where(scale > 0, steps.clamp(UNUSED + 1, NO_ROW - 1), UNUSED).to(torch.uint8)
    shifts = torch.arange(segment.id_bytes, device=ids.device) * 8
    id_bytes = ((torch.where(scale > 0, ids, 0).unsqueeze(2) >> shifts) & 255).to(torch.uint8)
    bits = F.pad(values >= 0, (0, -values.shape[2] % 8)).unflatten(2, (-1, 8))
    weights = 2 ** torch.arange(8, device=ids.device)
    signs = (bits & (scale > 0)[:, :, None, None]).mul(weights).sum(dim=3).to(torch.uint8)
    entries = torch.cat([id_bytes, steps.unsqueeze(2), signs], dim=2)
    unused = segment.n_rows - ids.shape[1]
    return F.pad(entries, (0, 0, 0, unused)).flatten(1)


def sum_windows(ids: Tensor, values: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Add the rows of a document's windows, ``(w, m)`` and ``(w, m, k)``, by their ids.

    Returns ``(1, n_rows)`` and ``(1, n_rows, k)``, the largest first. Nothing waits for the device.
    """
    ids, order = ids.flatten().sort()
    values = values.flatten(0, 1)[order]
    starts = F.pad(ids[1:] != ids[:-1], (1, 0))
    place = starts.cumsum(dim=0)
    sums = torch.zeros_like(values).index_add_(0, place, values)
    ids = torch.zeros_like(ids).index_copy_(0, place, ids)
    largest = sums.square().sum(dim=1).topk(min(n_rows, len(ids))).indices
    return ids[None, largest], sums[None, largest]
