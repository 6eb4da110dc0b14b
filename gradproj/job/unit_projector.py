"""Runs one unit through the engine: its batches become rows, and the rows a record to commit."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.coordinator import fault_points
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.partial_rows import PartialLog
from gradproj.coordinator.units import UnitRows
from gradproj.engine.batching import collate
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadBasis
from gradproj.engine.hidden_states import hidden_width
from gradproj.engine.loss import chunk_verdict
from gradproj.engine.row_columns import ZERO_ROWS, finish_columns
from gradproj.engine.run_batch import run_batch, run_in_halves
from gradproj.errors import StoreError
from gradproj.job.head_sums import HeadSums
from gradproj.job.hidden_sums import HiddenSums
from gradproj.job.unit_reader import PreparedUnit, UnitSettings
from gradproj.job.unit_sums import BatchResult, UnitSums
from gradproj.kernels.device_copy import record_event, seconds_between, to_host
from gradproj.store.head_rows import HeadSegment
from gradproj.store.layout import STATUS
from gradproj.store.row_encoder import RowEncoder
from gradproj.store.unit_record import UnitRecord

log = logging.getLogger(__name__)


class UnitProjector:
    """Runs a prepared unit through the engine.

    Rows are summed and encoded on the device. They reach the host once a unit, in the thread that
    writes them, while the next unit runs. Within a unit no value is read back and nothing waits for
    the device. (A few models wait in each forward pass: BioGPT, GPT-Neo, rotary embeddings of the
    type ``dynamic``.)

    The engine is attached to the frozen model; ``encoder`` is the store's, and ``head`` what makes
    its head rows, if it has any; ``hidden`` is the job's ``--hidden_state``. ``stopping`` is called
    after every batch; True saves the rows so far and returns None.
    """

    _width = 1
    """Batches that run side by side."""

    def __init__(
        self,
        model: nn.Module,
        engine: GradProjLoraEngine,
        settings: UnitSettings,
        encoder: RowEncoder,
        progress: RankProgress,
        stopping: Callable[[], bool] = lambda: False,
        head: tuple[HeadBasis, HeadSegment] | None = None,
        hidden: str = "none",
    ) -> None:
        self._model, self._engine, self._settings = model, engine, settings
        self._encoder, self._head = encoder, head
        self._hidden = None if hidden == "none" else (hidden, hidden_width(model))
        self._progress, self._stopping = progress, stopping
        self._device = next(model.parameters()).device
        self._chunked, _ = chunk_verdict(model)
        self._started = time.monotonic()

    def project(
        self, prepared: PreparedUnit, partial: PartialLog | None = None, save_interval: int = 0
    ) -> "ProjectedUnit | None":
        """Return the unit's rows. None if a stop was requested, after saving the rows so far."""
        started_at, started = time.time(), time.perf_counter()
        begun = record_event(self._device)
        total = self._sums_of(prepared)
        done, saved = (0, []) if partial is None else partial.read()
        self._begin(prepared, done)
        for n_batches, part in saved:
            total.replay(part, n_batches)
        n_batches = len(prepared.batches)
        for first in range(done, n_batches, self._width):
            last = min(first + self._width, n_batches)
            self._run(prepared, range(first, last), total)
            for number in range(first, last):
                self._count(prepared, number)
            if partial is None or last == n_batches:
                continue
            if self._stopping():
                try:
                    partial.append(done, last, total.take_touched())
                except StoreError as error:
                    # These rows will be computed again. A full disk must not prevent the stop.
                    log.warning("rows of an unfinished unit are not saved: %s", error)
                return None
            if save_interval and last - done >= save_interval:
                partial.append(done, last, total.take_touched())
                done = last
        stats = {"started_at": started_at, "seconds": time.perf_counter() - started}
        stats["finished_at"] = time.time()
        return ProjectedUnit(total, self._settings, stats, begun)

    def _begin(self, prepared: PreparedUnit, done: int) -> None:
        """Called before a unit whose first ``done`` batches are saved."""

    def wait(self) -> None:
        """Called now and then while there is no unit to project."""

    def close(self) -> None:
        """Called after the last unit, unless an error ended the loop."""

    def follow(self) -> None:
        """Help another rank with its units until it has no more. Only of a group's members."""
        raise NotImplementedError

    def _sums_of(self, prepared: PreparedUnit) -> UnitSums:
        head, reduction = None, self._settings.batch.loss_reduction
        if self._head is not None:
            divisor = prepared.columns["n_tokens"].astype(np.float32).clip(1)
            divisor = divisor if reduction == "mean" else np.ones_like(divisor)
            head = HeadSums(*self._head, prepared.row_of, divisor)
        hidden = None
        if self._hidden is not None:
            lengths = [len(sequence) for sequence in prepared.sequences]
            n_tokens = prepared.columns["n_tokens"]
            hidden = HiddenSums(*self._hidden, prepared.row_of, lengths, n_tokens, self._device)
        made = prepared, self._engine, self._encoder, reduction, self._device
        return UnitSums(*made, head, hidden)

    def _run(self, prepared: PreparedUnit, numbers: range, total: UnitSums) -> None:
        """Run some batches, ``_width`` at most, and add what they give."""

        def run(sequences: np.ndarray) -> bool:
            total.add(sequences, self._forward_backward(total, sequences))
            return True

        for number in numbers:
            for sequences, fitted in run_in_halves(self._engine, prepared.batches[number], run):
                if fitted is None:
                    total.fail(sequences)

    def _forward_backward(self, total: UnitSums, sequences: np.ndarray) -> BatchResult:
        batch = collate(total.prepared.sequences, sequences).to(self._device)
        head = None if total.head is None else total.head.sink()
        watched: AbstractContextManager[list[Tensor]] = nullcontext([])
        if total.hidden is not None:
            watched = total.hidden.watching(self._model, batch)
        with watched as states:
            rows, losses = run_batch(self._model, self._engine, batch, self._chunked, head)
        found: dict[str, Any] = {"states": states[0]} if states else {}
        if head is not None:
            found["head_ids"], found["head_values"] = head.largest()
        covariances = self._engine.take_token_covariances()
        return BatchResult(rows, losses, covariances=covariances, **found)

    def _count(self, prepared: PreparedUnit, number: int) -> None:
        progress, n_batches = self._progress, len(prepared.batches)
        lengths = [len(prepared.sequences[i]) for i in prepared.batches[number]]
        progress.batches += 1
        progress.seconds = time.monotonic() - self._started
        progress.n_tokens += sum(lengths)
        progress.unit = prepared.unit
        progress.unit_samples = len(prepared.columns["status"]) * (number + 1) // n_batches
        shape = (len(lengths), max(lengths))
        log.debug("unit %d: batch %d of %d, %s tokens", prepared.unit, number + 1, n_batches, shape)
        fault_points.reach("batch done")


class ProjectedUnit:
    """A unit whose batches have all been submitted to the device.

    Make it in the thread that submitted them; ``on_host`` may run in another. ``begun`` is a CUDA
    event before the first batch; None on the CPU.
    """

    def __init__(
        self,
        total: UnitSums,
        settings: UnitSettings,
        stats: dict[str, Any],
        begun: torch.cuda.Event | None = None,
    ) -> None:
        self._total, self._settings, self._stats, self._begun = total, settings, stats, begun
        if total.head is not None:
            total.head.write_into(total.stored)
        self._tensors = [total.stored, total.row_scale, total.norms, total.losses]
        if total.hidden is not None:
            self._tensors.append(total.hidden.finished())
        if (sums := total.covariances) is not None:
            self._tensors += [sums.a.float(), sums.s.float(), sums.n_tokens]
        self._computed = record_event(total.stored.device)

    def on_host(self) -> UnitRows:
        """Copy the encoded rows to the host and fill the columns."""
        total, settings, stats = self._total, self._settings, self._stats
        columns, prepared = total.prepared.columns, total.prepared
        fetched = to_host(self._tensors, self._computed)
        on_device = seconds_between(self._begun, self._computed)
        if on_device is not None:
            stats |= {"seconds": on_device, "finished_at": time.time()}
        stored, scale, norms, losses, *more = (tensor.numpy() for tensor in fetched)
        hidden = None if total.hidden is None else more.pop(0)
        *sums, n_tokens = more or [np.zeros(())]
        columns["status"][total.failed()] = STATUS["out_of_memory"]
        loss, columns["grad_norm"][:] = finish_columns(norms, losses, columns)
        ok = columns["status"] == STATUS["ok"]
        has_row = ok | np.isin(columns["status"], ZERO_ROWS)
        stored = stored.view(settings.layout.stored_dtype)
        stored[~has_row] = settings.layout.fill
        if hidden is not None:
            hidden[~ok] = np.nan
        columns["loss"][:] = np.where(ok, loss, np.nan)
        columns["row_scale"][:] = np.where(has_row, scale, 1.0)
        sequences = prepared.sequences
        stats |= {
            "real_tokens": sum(map(len, sequences)),
            "computed_tokens": sum(len(b) * len(sequences[b[0]]) for b in prepared.batches),
            "covariance_tokens": int(n_tokens),
        }
        place, named = (prepared.unit, prepared.start), dict(zip("as", sums, strict=False))
        record = UnitRecord(*place, settings.identity, None, columns, stats, named)
        return UnitRows(record, stored, hidden) if has_row.any() else UnitRows(record, None)
