"""A unit's rows on the device: summed over a document's sequences, then finished and encoded."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.coordinator.partial_rows import PartialRows
from gradproj.engine.capture import TokenCovariances
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.job.head_sums import HeadSums
from gradproj.job.hidden_sums import HiddenSums
from gradproj.job.unit_reader import PreparedUnit
from gradproj.kernels.device_copy import to_device
from gradproj.store.row_encoder import RowEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchResult:
    """Results of a batch of N sequences, on its device."""

    rows: Tensor
    """``(N, D)`` float32: gradients of the summed losses."""
    losses: Tensor
    """``(N,)`` float32, summed nats."""
    states: Tensor | None = None
    """``(N, d)``: parts of the hidden states, if the store has any."""
    head_ids: Tensor | None = None
    """``(N, m)`` int64, with ``head_values`` ``(N, m, k)``: the head rows, if it has any."""
    head_values: Tensor | None = None
    covariances: TokenCovariances | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all that there is by name, as ``of_tensors`` takes it."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return found | (vars(self.covariances) if self.covariances is not None else {})

    @classmethod
    def of_tensors(cls, found: dict[str, Tensor]) -> "BatchResult":
        sums = {name: found[name] for name in ("a", "s", "n_tokens") if name in found}
        rest: dict[str, Any] = {k: value for k, value in found.items() if k not in sums}
        return cls(**rest, covariances=TokenCovariances(**sums) if sums else None)

    def halves(self) -> "tuple[BatchResult, BatchResult]":
        """Return the results of the first and the other sequences; the sums are in the first."""
        n, found = len(self.losses) // 2, self.tensors()
        each = {name: found[name] for name in found if name not in ("a", "s", "n_tokens")}
        first, second = (
            BatchResult.of_tensors({name: value[part] for name, value in each.items()})
            for part in (slice(n), slice(n, None))
        )
        return replace(first, covariances=self.covariances), second


class UnitSums:
    """The rows of a unit while its batches run.

    The row of a document whose last sequence has run is finished and encoded at once. Only those of
    documents with sequences left (windows in other batches) are kept as float32 sums.

    ``encoder`` is the store's; ``loss_reduction`` is ``mean`` or ``sum``. ``head`` sums the head
    rows and ``hidden`` the hidden states, if the store has any.
    """

    def __init__(
        self,
        prepared: PreparedUnit,
        engine: GradProjLoraEngine,
        encoder: RowEncoder,
        loss_reduction: str,
        device: torch.device,
        head: HeadSums | None = None,
        hidden: HiddenSums | None = None,
    ) -> None:
        n = len(prepared.columns["status"])
        self.prepared, self._encoder, self._device = prepared, encoder, device
        self.head, self.hidden = head, hidden
        self._divides = loss_reduction == "mean"
        # A document without a target token has a row of zeros.
        zeros, _ = encoder.encode(torch.zeros(1, engine.total_proj_dim, device=device))
        self.stored = zeros.view(torch.uint8).repeat(n, 1)
        """``(n, bytes of a stored row)``."""
        self.row_scale = torch.ones(n, device=device)
        self.norms = torch.zeros(n, device=device)
        self.losses = torch.zeros(n, device=device)
        """Summed nats."""
        self._left = np.bincount(prepared.row_of, minlength=n)  # sequences of each document
        self._open: dict[int, Tensor] = {}  # sums (D,) of documents of which some have run
        self._touched: list[np.ndarray] = []
        self._failed: list[np.ndarray] = []
        engine.take_token_covariances()  # drop those of an interrupted unit
        self.covariances = engine.take_token_covariances()

    def add(self, sequences: np.ndarray, result: BatchResult) -> None:
        """Add what a batch of sequences ``(N,)`` gave to that of their documents."""
        if self.head is not None and result.head_ids is not None:
            # First, since it can run out of memory and be repeated; the rest counts sequences.
            assert result.head_values is not None
            self.head.add(sequences, result.head_ids, result.head_values)
        row_of = self.prepared.row_of[sequences]
        touched, place = np.unique(row_of, return_inverse=True)
        left = self._left[touched] - np.bincount(place)
        # Allocate everything before the state changes: a batch that fails is retried in halves.
        index = self._index(row_of)
        sums = self._summed(touched, place, result.rows)
        opened = {int(touched[at]): sums[at].clone() for at in np.flatnonzero(left).tolist()}
        ended = np.flatnonzero(left == 0)
        if len(ended) < len(touched):
            sums = sums.index_select(0, self._index(ended))
        finished = self._finished(touched[ended], sums)
        self._put(touched[ended], *finished)
        self.losses.index_add_(0, index, result.losses)
        if self.hidden is not None and result.states is not None:
            self.hidden.add(index, result.states)
        self._left[touched] = left
        self._keep_open(opened)
        self._touched.append(touched)
        if self.covariances is not None and result.covariances is not None:
            # Batch by batch, so that a unit that was interrupted and continued has the same bits.
            self.covariances.add(result.covariances)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(numbers), self._device)

    def _summed(self, touched: np.ndarray, place: np.ndarray, rows: Tensor) -> Tensor:
        """Return the documents' sums ``(len(touched), D)``, those so far included."""
        sums = rows.new_zeros(len(touched), rows.shape[1])
        for at, number in enumerate(touched.tolist()):
            if number in self._open:
                sums[at] = self._open[number]
        return sums.index_add_(0, self._index(place), rows)

    def _finished(self, numbers: np.ndarray, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the encoded rows of whole documents, their scales and their norms."""
        if self._divides:
            targets = np.maximum(self.prepared.columns["n_tokens"][numbers], 1)
            sums = sums / self._index(targets.astype(np.float32))[:, None]
        norms = torch.linalg.vector_norm(sums, dim=1, dtype=torch.float64)
        stored, row_scale = self._encoder.encode(sums)
        return stored.view(torch.uint8), row_scale, norms.float()

    def _put(self, numbers: np.ndarray, stored: Tensor, row_scale: Tensor, norms: Tensor) -> None:
        index = self._index(numbers)
        self.stored.index_copy_(0, index, stored)
        self.row_scale.index_copy_(0, index, row_scale)
        self.norms.index_copy_(0, index, norms)

    def fail(self, sequences: np.ndarray) -> None:
        """Note that the document of a sequence did not fit the device's memory."""
        n_tokens = len(self.prepared.sequences[sequences[0]])
        log.warning("a sequence of %d tokens does not fit the device's memory", n_tokens)
        self._failed.append(self.prepared.row_of[sequences])
        np.subtract.at(self._left, self.prepared.row_of[sequences], 1)
        self._keep_open({})

    def _keep_open(self, more: dict[int, Tensor]) -> None:
        """Keep the sums of documents with sequences left."""
        self._open = {n: x for n, x in (self._open | more).items() if self._left[n]}

    def take_touched(self) -> PartialRows:
        """Return what changed since the last call: finished rows, and sums of unfinished ones."""
        touched = np.unique(np.concatenate([np.empty(0, np.int64), *self._touched]))
        self._touched = []
        is_open = np.isin(touched, np.fromiter(self._open, np.int64, len(self._open)))
        finished, unfinished = touched[~is_open], touched[is_open]
        sums = [self._open[number].cpu() for number in unfinished.tolist()]
        return PartialRows(
            finished,
            self.stored[self._index(finished)].cpu().numpy(),
            unfinished,
            torch.stack(sums).numpy() if sums else np.empty((0, 0), np.float32),
            {name: getattr(self, name).cpu().numpy() for name in ("row_scale", "norms", "losses")},
            self.failed(),
            {k: v.cpu().numpy() for k, v in vars(self.covariances).items()}
            if self.covariances is not None
            else {},
            {} if self.head is None else self.head.take_new(),
            {} if self.hidden is None else self.hidden.take(touched),
        )

    def replay(self, part: PartialRows, n_batches: int) -> None:
        """Restore what was saved after the unit's first ``n_batches``."""
        self.stored[self._index(part.finished.copy())] = self._on_device(part.stored)
        for name, values in part.by_row.items():
            getattr(self, name).copy_(self._on_device(values))
        left = [np.empty(0, np.int64), *self.prepared.batches[n_batches:]]
        row_of = self.prepared.row_of[np.concatenate(left)]
        self._left = np.bincount(row_of, minlength=len(self._left))
        sums = zip(part.unfinished.tolist(), self._on_device(part.sums), strict=True)
        self._keep_open(dict(sums))
        self._failed = [part.failed]
        if self.head is not None:
            self.head.replay(part.head)
        if self.hidden is not None:
            self.hidden.replay(part.hidden)
        if part.covariances:
            saved = {name: self._on_device(value) for name, value in part.covariances.items()}
            self.covariances = TokenCovariances(**saved)

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.copy()).to(self._device)

    def failed(self) -> np.ndarray:
        """Return the rows of documents that did not fit the device's memory."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self._failed]))
