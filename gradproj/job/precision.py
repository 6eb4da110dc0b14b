"""Measures how far rows move with their batch, with padding and with the model's precision."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.engine.batching import Batch, BatchConfig, collate, plan_batches
from gradproj.engine.compile import nothing_compiled
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.run_batch import run_batch
from gradproj.job.unit_reader import PreparedUnit
from gradproj.kernels.memory import available_host_bytes, is_out_of_memory
from gradproj.model.loading import positions_of
from gradproj.model.sequences import TokenSequence

ALONE, BATCHED, PADDED = WAYS = ("alone", "batched", "beside padding")
FLOOR = 1e-2
"""Rows shorter than this fraction of the median row are left out of the cosines, and their errors
are taken relative to it: the gradient of a memorised document is a difference of nearly equal
numbers, of which only rounding is left.
"""
MAX_ERROR = 1e-4
"""Largest relative distance of a float32 row from itself alone that rounding explains."""
USUAL_COSINE = 0.999
"""Least median cosine of rows in another precision with float32."""
MIN_COSINE = 0.9
"""Least cosine of any such row. Documents whose gradient nearly cancels suffer more."""
BREAKS_BELOW = 0.99
"""The job warns below this median cosine of a few documents; rounding moves a sound model less."""
CHECKED_DOCUMENTS = 4
CHECKED_TOKENS = 256
_NO_NUMBER = 1e30
"""Stands for an infinite or undefined error, for which JSON has no number."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of rows with their reference, over the documents."""

    least_cosine: float
    median_cosine: float
    most_error: float
    """Largest ``|row - reference| / |reference|``."""
    median_error: float
    most_norm_error: float
    """Largest ``| |row| / |reference| - 1 |``."""
    n_not_finite: int
    """Rows with an infinity or NaN whose reference has none."""
    worst: int
    """The document with the largest error."""

    @property
    def holds(self) -> bool:
        """Whether rows of a lower precision can replace their reference."""
        usual = self.median_cosine >= USUAL_COSINE and self.least_cosine >= MIN_COSINE
        return usual and not self.n_not_finite

    @classmethod
    def of(cls, rows: Tensor, reference: Tensor) -> "Agreement":
        """Compare ``(N, D)`` rows with their reference, of which only finite rows count."""
        sound = torch.isfinite(reference).all(dim=1).nonzero().squeeze(1)
        if not len(sound):
            return cls(1.0, 1.0, 0.0, 0.0, 0.0, 0, 0)
        rows, reference = rows[sound].double(), reference[sound].double()
        finite, norms = torch.isfinite(rows).all(dim=1), reference.norm(dim=1)
        floor = FLOOR * norms.median()
        lengths = norms.clamp_min(max(float(floor), torch.finfo(torch.float32).tiny))
        errors = torch.where(finite, (rows - reference).norm(dim=1) / lengths, _NO_NUMBER)
        norm_errors = torch.where(finite, (rows.norm(dim=1) - norms).abs() / lengths, _NO_NUMBER)
        # Rows of zeros (a layer that no token reaches) have no direction to disagree on.
        cosines = torch.where(finite, F.cosine_similarity(rows, reference, dim=1), 0.0)
        cosines = cosines[norms > floor]
        cosines = cosines if len(cosines) else cosines.new_ones(1)
        return cls(
            float(cosines.min()), float(cosines.median()), float(errors.max()),
            float(errors.median()), float(norm_errors.max()),
            int((~finite).sum()), int(sound[errors.argmax()]),
        )  # fmt: skip


def rows_of(
    model: nn.Module,
    engine: GradProjLoraEngine,
    sequences: Sequence[TokenSequence],
    way: str,
    batch: BatchConfig,
) -> Tensor:
    """Return the rows of the sequences' owners, 0 to n - 1, ``(n, D)`` float32 on the host.

    ``way`` is one of ``WAYS``: one sequence at a time, in the job's batches, or one sequence at a
    time padded to twice its length (as far as the model has positions).
    """
    device = next(model.parameters()).device
    owners = torch.tensor([sequence.owner for sequence in sequences])
    rows = torch.zeros(int(owners.max()) + 1, engine.total_proj_dim)
    batches = [np.array([i]) for i in range(len(sequences))]
    if way == BATCHED:
        lengths = list(map(len, sequences))
        batches = plan_batches(lengths, batch.batch_size, batch.batch_tokens, batch.max_padding)
    for chosen in batches:
        prepared = collate(sequences, chosen)
        if way == PADDED:
            prepared = _padded(prepared, positions_of(model))
        batch_rows = run_batch(model, engine, prepared.to(device))[0].float().cpu()
        rows.index_add_(0, owners[torch.from_numpy(chosen)], batch_rows)
    return rows


def _padded(batch: Batch, positions: int | None) -> Batch:
    """Pad a batch of one sequence on the right; its flat positions do not change."""
    length = batch.input_ids.shape[1]
    extra = length if positions is None else max(0, min(length, positions - length))
    ids, mask = F.pad(batch.input_ids, (0, extra)), F.pad(batch.token_mask, (0, extra))
    return replace(batch, input_ids=ids, token_mask=mask)


# --- the job's own check ---


def check_precision(
    model: nn.Module, engine: GradProjLoraEngine, unit: PreparedUnit, batch: BatchConfig
) -> tuple[str, bool]:
    """Compare the rows of a lower-precision model with float32.

    The beginnings of a unit's first documents run in the model's precision, and again with the
    weights converted to float32 in place, which takes as much memory again as the weights. Without
    that memory nothing is checked: rows in two batch shapes do not show the error, since both round
    alike.

    Returns:
        A line of text, and whether it is a warning. The weights' bits are as before.
    """
    # The beginnings of the first documents, one sequence each.
    _, first = np.unique(unit.row_of, return_index=True)
    sequences = [
        TokenSequence.of(unit.sequences[i].ids[:CHECKED_TOKENS], owner=number)
        for number, i in enumerate(first[:CHECKED_DOCUMENTS].tolist())
    ]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not sequences:
        return f"{dtype} is not checked: the first documents make no row", False
    try:
        rows = rows_of(model, engine, sequences, "batched", batch)
        with _in_float32(model), nothing_compiled():
            reference = rows_of(model, engine, sequences, "batched", batch)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        why = "no memory for float32 weights; python -m gradproj diagnose does it"
        return f"{dtype} is not checked: {why}", False
    finally:
        engine.clear_gradients()
        engine.take_token_covariances()
    agreement, n = Agreement.of(rows, reference), len(sequences)
    median, least = agreement.median_cosine, agreement.least_cosine
    if agreement.n_not_finite:
        figure = f"{agreement.n_not_finite} of {n} {dtype} rows are not finite, in float32 they are"
    else:
        figure = (
            f"{dtype} rows have a cosine of {median:.4f} (least {least:.4f}) with float32's, of "
            f"{n} documents"
        )
        if median >= BREAKS_BELOW and least >= MIN_COSINE:
            return figure, False
    return (
        f"{figure}: {dtype} breaks down in this model. See python -m gradproj diagnose with the "
        "same flags, or give --model_dtype float32",
        True,
    )


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Convert the weights to float32 for a while, which holds them exactly.

    ``MemoryError`` if the host has too little; a device raises its own error.
    """
    tensors = (*model.parameters(), *model.buffers())
    low = [t for t in tensors if t.is_floating_point() and t.element_size() < 4]
    needed = sum(4 * t.numel() for t in low)
    if any(t.device.type == "cpu" for t in low) and needed > available_host_bytes():
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
