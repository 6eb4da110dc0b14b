"""One unit through the engine: its batches to rows, and the rows to what is committed."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.coordinator import fault_points
from gradproj.coordinator.heartbeats import Progress
from gradproj.coordinator.partial_rows import PartialLog, PartialRows
from gradproj.coordinator.units import UnitRows
from gradproj.engine.batching import Batch, collate
from gradproj.engine.capture import TokenCovariances
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import Targets, per_sample_loss
from gradproj.errors import StoreError
from gradproj.job.unit_reader import PreparedUnit, UnitSettings
from gradproj.kernels.device_copy import fetch, record_event, seconds_between, send
from gradproj.kernels.memory import is_out_of_memory
from gradproj.store.encoding import encode_rows, nan_rows
from gradproj.store.layout import STATUS
from gradproj.store.unit_record import UnitRecord

log = logging.getLogger(__name__)


class UnitProjector:
    """Runs a prepared unit through the engine.

    Rows are summed on the device and cross to the host once a unit, in the thread that writes them, while the next
    unit runs. Batch by batch no value is read back and nothing waits for the device. (Some rare models wait by
    themselves in each forward pass: BioGPT, GPT-Neo, rotary embeddings of the type ``dynamic``.)

    Args:
        model: frozen, in eval mode, on its device.
        engine: attached to the model, summing token covariances.
        settings: the run's.
        progress: counted up batch by batch.
        stopping: asked after every batch; true = save what there is and return None.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: GradProjLoraEngine,
        settings: UnitSettings,
        progress: Progress,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model, self._engine, self._settings = model, engine, settings
        self._progress, self._stopping = progress, stopping
        self._device = next(model.parameters()).device
        self._started = time.monotonic()

    def project(
        self, prepared: PreparedUnit, partial: PartialLog, save_interval: int = 0
    ) -> "ProjectedUnit | None":
        """The unit's rows; None if it was told to stop, after saving what it had."""
        started_at, started = time.time(), time.perf_counter()
        begun = record_event(self._device)
        total = UnitSums(prepared, self._engine, self._device)
        done, saved = partial.read()
        for part in saved:
            total.replay(part)
        for number in range(done, len(prepared.batches)):
            batch = collate(prepared.sequences, prepared.batches[number], pad=0)
            self._run(batch, total)
            self._count(batch, prepared, number + 1)
            if number + 1 == len(prepared.batches):
                break
            if self._stopping():
                self._save_on_leaving(partial, done, number + 1, total)
                return None
            if save_interval and number + 1 - done >= save_interval:
                partial.append(done, number + 1, total.take_touched())
                done = number + 1
        stats = {
            "started_at": started_at,
            "seconds": time.perf_counter() - started,
            "finished_at": time.time(),
        }
        return ProjectedUnit(total, self._settings, stats, begun)

    def _save_on_leaving(
        self, partial: PartialLog, first: int, last: int, total: "UnitSums"
    ) -> None:
        try:
            partial.append(first, last, total.take_touched())
        except StoreError as error:
            # These rows are computed again; the way out must stay open on a full disk too.
            log.warning("rows of an unfinished unit are not saved: %s", error)

    def _run(self, batch: Batch, total: "UnitSums") -> None:
        """One batch; halved and tried again where the device has no memory for it."""
        try:
            self._forward_backward(batch.to(self._device), total)
            return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Whatever the batch left behind on its way is made again by its halves.
        self._engine.clear_gradients()
        self._engine.take_token_covariances()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch.sequences) == 1:
            log.warning("a sequence of %d tokens does not fit the device's memory", batch.n_tokens)
            total.fail(batch.sequences)
            return
        log.warning("out of memory with %s tokens: halving the batch", tuple(batch.input_ids.shape))
        middle = len(batch.sequences) // 2
        for half in (batch.sequences[:middle], batch.sequences[middle:]):
            self._run(collate(total.prepared.sequences, half, pad=0), total)

    def _forward_backward(self, batch: Batch, total: "UnitSums") -> None:
        self._engine.set_token_mask(batch.token_mask)
        targets = Targets(batch.positions, batch.targets)
        losses = per_sample_loss(self._model, {"input_ids": batch.input_ids, "targets": targets})
        losses.sum().backward()
        total.add(batch.sequences, self._engine.collect_batch(), losses.detach())

    def _count(self, batch: Batch, prepared: PreparedUnit, done: int) -> None:
        progress, n_batches = self._progress, len(prepared.batches)
        progress.batches += 1
        progress.seconds = time.monotonic() - self._started
        progress.n_tokens += batch.n_tokens
        progress.unit = prepared.unit
        progress.unit_samples = len(prepared.columns["status"]) * done // n_batches
        shape = tuple(batch.input_ids.shape)
        log.debug("unit %d: batch %d of %d, %s tokens", prepared.unit, done, n_batches, shape)
        fault_points.reach("batch done")


class UnitSums:
    """A unit's rows as they grow, on the device."""

    def __init__(
        self, prepared: PreparedUnit, engine: GradProjLoraEngine, device: torch.device
    ) -> None:
        n = len(prepared.columns["status"])
        self.prepared, self._engine, self._device = prepared, engine, device
        self.rows = torch.zeros(n, engine.total_proj_dim, device=device)
        self.losses = torch.zeros(n, device=device)
        self._touched: list[np.ndarray] = []
        self._failed: list[np.ndarray] = []
        engine.take_token_covariances()  # a unit that was stopped may have left some
        self.covariances = engine.take_token_covariances()

    def add(self, sequences: np.ndarray, rows: Tensor, losses: Tensor) -> None:
        """Add sequences' rows to their documents'."""
        touched = self.prepared.row_of[sequences]
        # All memory is taken before the first sum: a batch that fails here is tried again, in halves.
        index = send(torch.from_numpy(touched), self._device)
        covariances = self._engine.take_token_covariances()
        self.rows.index_add_(0, index, rows)
        self.losses.index_add_(0, index, losses)
        self._touched.append(touched)
        # Batch by batch, so that the sums are the same bits wherever a unit was stopped and taken up again.
        self.covariances.add(covariances)

    def fail(self, sequences: np.ndarray) -> None:
        """Note that the documents of these sequences did not fit the memory."""
        self._failed.append(self.prepared.row_of[sequences])

    def take_touched(self) -> PartialRows:
        """The sums of the rows touched since the last call."""
        touched = np.unique(np.concatenate([np.empty(0, np.int64), *self._touched]))
        self._touched = []
        index = torch.from_numpy(touched).to(self._device)
        return PartialRows(
            touched,
            self.rows[index].cpu().numpy(),
            self.losses[index].cpu().numpy(),
            self.failed(),
            {k: v.cpu().numpy() for k, v in vars(self.covariances).items()},
        )

    def replay(self, part: PartialRows) -> None:
        """Put saved sums back."""
        index = torch.from_numpy(part.touched.copy()).to(self._device)
        self.rows[index] = torch.from_numpy(part.rows.copy()).to(self._device)
        self.losses[index] = torch.from_numpy(part.losses.copy()).to(self._device)
        self._failed = [part.failed]
        self.covariances = TokenCovariances(
            **{k: torch.from_numpy(v.copy()).to(self._device) for k, v in part.covariances.items()}
        )

    def failed(self) -> np.ndarray:
        """Rows of documents that did not fit the memory."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self._failed]))


class ProjectedUnit:
    """A unit whose batches have been given to the device. Made where they were; ``on_host`` may run in another thread.

    Args:
        total: the unit's sums; nothing is added to them any more.
        settings: the run's.
        stats: what the record will say of the computation.
        begun: the device's mark before the first batch, where it runs behind the host.
    """

    def __init__(
        self,
        total: UnitSums,
        settings: UnitSettings,
        stats: dict[str, Any],
        begun: torch.cuda.Event | None = None,
    ) -> None:
        self._total, self._settings, self._stats, self._begun = total, settings, stats, begun
        sums = total.covariances
        self._tensors = [total.rows, total.losses, sums.a.float(), sums.s.float(), sums.n_tokens]
        self._computed = record_event(total.rows.device)

    def on_host(self) -> UnitRows:
        """Fetch, divide, judge and encode the rows; fill the columns."""
        total, settings, stats = self._total, self._settings, self._stats
        columns, prepared = total.prepared.columns, total.prepared
        fetched = fetch(self._tensors, self._computed)
        on_device = seconds_between(self._begun, self._computed)
        if on_device is not None:
            stats |= {"seconds": on_device, "finished_at": time.time()}
        rows, losses, a, s, n_tokens = (tensor.numpy() for tensor in fetched)
        columns["status"][total.failed()] = STATUS["out_of_memory"]
        targets = np.maximum(columns["n_tokens"], 1).astype(np.float32)
        if settings.batch.loss_reduction == "mean":
            rows /= targets[:, None]
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)).astype(np.float32)
        ok = columns["status"] == STATUS["ok"]
        columns["status"][ok & ~np.isfinite(norms)] = STATUS["non_finite"]
        ok = columns["status"] == STATUS["ok"]
        stored, scale = encode_rows(rows, settings.layout.proj_dtype)
        zero = np.isin(columns["status"], (STATUS["empty"], STATUS["no_target"]))
        stored[~(ok | zero)] = nan_rows((1, 1), settings.layout.proj_dtype)
        columns["loss"][:] = np.where(ok, losses / targets, np.nan)
        columns["grad_norm"][:] = np.where(ok | zero, norms, np.nan)
        columns["row_scale"][:] = np.where(ok | zero, scale, 1.0)
        stats |= {
            "real_tokens": sum(map(len, prepared.sequences)),
            "computed_tokens": sum(
                len(b) * len(prepared.sequences[b[0]]) for b in prepared.batches
            ),
            "covariance_tokens": int(n_tokens),
        }
        record = UnitRecord(
            prepared.unit,
            prepared.start,
            settings.identity,
            None,
            columns,
            stats,
            {"a": a, "s": s},
        )
        return UnitRows(record, stored if (ok | zero).any() else None)
