"""How far rows move with their batch, with padding beside them and with the precision of the model."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.engine.batching import Batch, BatchConfig, collate, plan_batches
from gradproj.engine.compile import nothing_compiled
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import Targets, per_sample_loss
from gradproj.job.unit_reader import PreparedUnit
from gradproj.kernels.memory import is_out_of_memory
from gradproj.model.loading import positions_of

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
BREAKS_BELOW = 0.99
"""The median cosine of a few documents under which the job warns: rounding moves them less in any sound model."""
CHECKED_DOCUMENTS = 4
CHECKED_TOKENS = 256
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
        cosines = torch.where(finite, F.cosine_similarity(rows, reference, dim=1), 0.0)[
            norms > floor
        ]
        cosines = cosines if len(cosines) else cosines.new_ones(1)
        least, usual, most, median, norm = (
            float(x)
            for x in (
                cosines.min(),
                cosines.median(),
                errors.max(),
                errors.median(),
                norm_errors.max(),
            )
        )
        return cls(
            least, usual, most, median, norm, int((~finite).sum()), int(sound[errors.argmax()])
        )


def rows_of(
    model: nn.Module, engine: GradProjLoraEngine, documents: Documents, way: str, batch: BatchConfig
) -> Tensor:
    """``(n_documents, D)`` float32 on the host: the gradients of the documents' summed losses.

    Args:
        model: frozen, in eval mode, on its device.
        engine: attached to it.
        documents: what to run.
        way: one of ``WAYS``: a sequence at a time, in the job's batches, or a sequence at a time padded to twice
            its length (as far as the model has positions).
        batch: the run's.
    """
    device = next(model.parameters()).device
    rows = torch.zeros(documents.n_documents, engine.total_proj_dim)
    for sequences in _batches(documents, way, batch):
        prepared = collate(documents.sequences, sequences, pad=0)
        if way == "beside padding":
            prepared = _padded(prepared, positions_of(model.config))
        got = _rows_of_batch(model, engine, prepared.to(device)).float().cpu()
        rows.index_add_(0, torch.from_numpy(documents.document_of[sequences]), got)
    return rows


def _batches(documents: Documents, way: str, batch: BatchConfig) -> list[np.ndarray]:
    if way == "batched":
        lengths = [len(tokens) for tokens in documents.sequences]
        return plan_batches(lengths, batch.batch_size, batch.batch_tokens)
    return [np.array([i]) for i in range(len(documents.sequences))]


def _padded(batch: Batch, positions: int | None) -> Batch:
    """A batch of one sequence, longer on the right; its flat positions stay what they were."""
    length = batch.input_ids.shape[1]
    extra = length if positions is None else max(0, min(length, positions - length))
    ids, mask = F.pad(batch.input_ids, (0, extra)), F.pad(batch.token_mask, (0, extra))
    return replace(batch, input_ids=ids, token_mask=mask)


def _rows_of_batch(model: nn.Module, engine: GradProjLoraEngine, batch: Batch) -> Tensor:
    engine.set_token_mask(batch.token_mask)
    targets = Targets(batch.positions, batch.targets)
    per_sample_loss(model, {"input_ids": batch.input_ids, "targets": targets}).sum().backward()
    return engine.collect_batch()


# --- the job's own check ---


def check_precision(
    model: nn.Module, engine: GradProjLoraEngine, unit: PreparedUnit, batch: BatchConfig
) -> tuple[str, bool]:
    """``(one line for a person, whether it is a warning)`` on a model in a lower precision than float32.

    The beginnings of a unit's first documents run in the model's precision, and once more with the same weights made
    float32 in place, which takes as much memory again as the weights have. Where that is not there, nothing is known:
    rows in two batch shapes do not show it, since both round the same values in the same way.

    Args:
        model: frozen, in eval mode, on its device; the same bits afterwards.
        engine: attached to it.
        unit: the documents.
        batch: the run's.
    """
    documents = _beginnings(unit)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not documents.n_documents:
        return f"{dtype} is not checked: the first documents make no row", False
    try:
        rows = rows_of(model, engine, documents, "batched", batch)
        with _in_float32(model), nothing_compiled():
            reference = rows_of(model, engine, documents, "batched", batch)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        unknown = f"{dtype} is not checked: no memory for float32 weights; python -m gradproj diagnose does it"
        return unknown, False
    finally:
        engine.clear_gradients()
        engine.take_token_covariances()
    found = Agreement.of(rows, reference)
    figure = (
        f"{dtype} rows have a cosine of {found.median_cosine:.4f} (least {found.least_cosine:.4f}) with float32's, of "
        f"{documents.n_documents} documents"
    )
    if found.n_not_finite:
        figure = f"{found.n_not_finite} of {documents.n_documents} {dtype} rows are not finite, in float32 they are"
    elif found.median_cosine >= BREAKS_BELOW and found.least_cosine >= LEAST_COSINE:
        return figure, False
    return (
        f"{figure}: {dtype} breaks down in this model. See python -m gradproj diagnose with the same flags, "
        "or give --model_dtype float32",
        True,
    )


def _beginnings(unit: PreparedUnit) -> Documents:
    """The first tokens of the first documents, one sequence each."""
    _, first = np.unique(unit.row_of, return_index=True)
    sequences = [unit.sequences[i][:CHECKED_TOKENS] for i in first[:CHECKED_DOCUMENTS].tolist()]
    return Documents(sequences, np.arange(len(sequences)), len(sequences))


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The model's weights as float32 for a while; back to the same bits, since float32 holds them exactly.

    Raises:
        MemoryError: the host has not enough of it. (A device says so itself.)
    """
    low = [
        t
        for t in (*model.parameters(), *model.buffers())
        if t.is_floating_point() and t.element_size() < 4
    ]
    if any(t.device.type == "cpu" for t in low):
        wanted = sum(4 * t.numel() for t in low)
        if wanted > _free_host_bytes():
            raise MemoryError
    before: list[tuple[Tensor, torch.dtype]] = []
    try:
        for tensor in low:
            before.append((tensor, tensor.dtype))
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _free_host_bytes() -> int:
    """What Linux would give without swapping; elsewhere nobody says, and it is taken to be enough."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
