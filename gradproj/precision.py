"""How far rows move with their batch, with padding beside them and with the precision of the model."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.batching import Batch, BatchConfig, collate, plan_batches
from gradproj.engine import GradProjLoraEngine
from gradproj.loss import Targets, per_sample_loss

WAYS = ("alone", "batched", "beside padding")
FLOOR = 1e-2
"""Rows shorter than this part of a usual row are left out of the cosines, and their errors are taken relative to it:
the gradient of a document known by heart is a difference of nearly equal numbers, and rounding is all that is left."""
MOST_ERROR = 1e-4
"""How far a float32 row may be from itself alone, relative to its length, for rounding to explain it."""
USUAL_COSINE = 0.999
"""What the median row in another precision must keep with its float32 self."""
LEAST_COSINE = 0.9
"""What every such row must keep: single documents may be hit harder, as where a gradient nearly cancels."""
_NO_NUMBER = 1e30
"""Stands for an error that is infinite or undefined, which JSON has no number for."""


@dataclass(frozen=True)
class Documents:
    """Some documents' token sequences."""

    sequences: list[np.ndarray]
    document_of: np.ndarray
    """``(n_sequences,)`` int64: the document that a sequence's gradient belongs to."""
    n_documents: int

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Agreement:
    """How rows agree with their reference, over the documents."""

    least_cosine: float
    median_cosine: float
    most_error: float
    """Of ``|row - reference| / |reference|``."""
    median_error: float
    most_norm_error: float
    """Of ``| |row| / |reference| - 1 |``."""
    n_not_finite: int
    """Rows that hold an infinity or NaN where their reference does not."""
    worst: int
    """The document with the largest error."""

    @property
    def holds(self) -> bool:
        """Whether rows of a lower precision can stand for their reference."""
        usual = self.median_cosine >= USUAL_COSINE and self.least_cosine >= LEAST_COSINE
        return usual and not self.n_not_finite

    @classmethod
    def of(cls, rows: Tensor, reference: Tensor) -> "Agreement":
        """Of ``(N, D)`` rows with theirs; documents whose reference is not finite are left out."""
        sound = torch.isfinite(reference).all(dim=1).nonzero().squeeze(1)
        if not len(sound):
            return cls(1.0, 1.0, 0.0, 0.0, 0.0, 0, 0)
        rows, reference = rows[sound].double(), reference[sound].double()
        finite, norms = torch.isfinite(rows).all(dim=1), reference.norm(dim=1)
        floor = FLOOR * norms.median()
        lengths = norms.clamp_min(max(float(floor), torch.finfo(torch.float32).tiny))
        errors = torch.where(finite, (rows - reference).norm(dim=1) / lengths, _NO_NUMBER)
        norm_errors = torch.where(finite, (rows.norm(dim=1) - norms).abs() / lengths, _NO_NUMBER)
        # Where all are zero (a layer that no token reaches) there is no direction, and nothing to disagree on.
        cosines = torch.where(finite, F.cosine_similarity(rows, reference, dim=1), 0.0)[norms > floor]
        cosines = cosines if len(cosines) else cosines.new_ones(1)
        least, usual, most, median, norm = (
            float(x)
            for x in (cosines.min(), cosines.median(), errors.max(), errors.median(), norm_errors.max())
        )
        return cls(least, usual, most, median, norm, int((~finite).sum()), int(sound[errors.argmax()]))


def rows_of(
    model: nn.Module, engine: GradProjLoraEngine, documents: Documents, way: str, batch: BatchConfig
) -> Tensor:
    """``(n_documents, D)`` float32 on the host: the gradients of the documents' summed losses.

    Args:
        model: frozen, in eval mode, on its device.
        engine: attached to it.
        documents: what to run.
        way: one of ``WAYS``: a sequence at a time, in the job's batches, or a sequence at a time padded to twice
            its length (as far as ``max_length`` allows).
        batch: the run's.
    """
    device = next(model.parameters()).device
    rows = torch.zeros(documents.n_documents, engine.total_proj_dim)
    for sequences in _batches(documents, way, batch):
        prepared = collate(documents.sequences, sequences, pad=0)
        if way == "beside padding":
            prepared = _padded(prepared, batch.max_length)
        got = _rows_of_batch(model, engine, prepared.to(device)).float().cpu()
        rows.index_add_(0, torch.from_numpy(documents.document_of[sequences]), got)
    return rows


def _batches(documents: Documents, way: str, batch: BatchConfig) -> list[np.ndarray]:
    if way == "batched":
        lengths = [len(tokens) for tokens in documents.sequences]
        return plan_batches(lengths, batch.batch_size, batch.batch_tokens)
    return [np.array([i]) for i in range(len(documents.sequences))]


def _padded(batch: Batch, max_length: int) -> Batch:
    """A batch of one sequence, longer on the right; its flat positions stay what they were."""
    length = batch.input_ids.shape[1]
    extra = max(0, min(length, max_length - length))
    ids, mask = F.pad(batch.input_ids, (0, extra)), F.pad(batch.token_mask, (0, extra))
    return replace(batch, input_ids=ids, token_mask=mask)


def _rows_of_batch(model: nn.Module, engine: GradProjLoraEngine, batch: Batch) -> Tensor:
    engine.set_token_mask(batch.token_mask)
    targets = Targets(batch.positions, batch.targets)
    per_sample_loss(model, {"input_ids": batch.input_ids, "targets": targets}).sum().backward()
    return engine.collect_batch()
