"""A unit's head rows while they are computed: encoded as soon as a document is complete."""

import numpy as np
import torch
from torch import Tensor

from gradproj.engine.head_rows import WINDOW_ROWS, HeadBasis, encode_head, sum_windows
from gradproj.kernels.device_copy import to_device
from gradproj.kernels.head_gradients import HeadRows
from gradproj.store.head_rows import HeadSegment


class HeadSums:
    """Head rows of a unit's documents, on the device.

    A document of one sequence is encoded at once. Of a longer one, each window keeps
    ``WINDOW_ROWS`` times as many rows as are stored; they are added by token when the last window
    is there, in the windows' order, and the largest sums are stored.

    Args:
        basis: on the device.
        segment: form of the stored rows.
        row_of: ``(n_sequences,)`` int64, the document of a sequence.
        divisor: ``(n_documents,)`` float32: what a document's gradient is divided by.
    """

    def __init__(
        self, basis: HeadBasis, segment: HeadSegment, row_of: np.ndarray, divisor: np.ndarray
    ) -> None:
        self._basis, self._segment, self._row_of = basis, segment, row_of
        self._device = basis.matrix.device
        shape = len(divisor), segment.n_bytes
        self.stored = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        """``(n_documents, n_bytes)``: encoded rows; unused entries for incomplete documents."""
        self._factors = to_device(torch.from_numpy(1 / divisor), self._device)
        self._n_windows = np.bincount(row_of, minlength=len(divisor))
        self._keeps_more = bool((self._n_windows > 1).any())
        self._windows: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        self._done: set[int] = set()  # documents of several windows that are encoded
        self._encoded: list[np.ndarray] = []
        self._new_windows: list[int] = []

    def sink(self) -> HeadRows:
        """Return what takes the rows of one batch."""
        n_rows = self._segment.n_rows * (WINDOW_ROWS if self._keeps_more else 1)
        return HeadRows(self._basis.matrix, self._basis.scale, n_rows)

    def add(self, sequences: np.ndarray, ids: Tensor, values: Tensor) -> None:
        """Take ``HeadRows.largest()`` of a batch of sequences.

        It may be called again for the same sequences, as when a batch is retried in halves.
        """
        documents, n_rows = self._row_of[sequences], self._segment.n_rows
        is_whole = self._n_windows[documents] == 1
        if is_whole.any():
            whole = to_device(torch.from_numpy(np.flatnonzero(is_whole)), self._device)
            self._encode(documents[is_whole], ids[whole, :n_rows], values[whole, :n_rows])
        for place in np.flatnonzero(~is_whole):
            # A copy, or the whole batch would stay.
            self._add_window(int(sequences[place]), ids[place].clone(), values[place].clone())

    def _add_window(self, sequence: int, ids: Tensor, values: Tensor) -> None:
        document = int(self._row_of[sequence])
        if document in self._done:
            return
        windows = self._windows.setdefault(document, {})
        if sequence not in windows:
            self._new_windows.append(sequence)
        windows[sequence] = ids, values
        if len(windows) == self._n_windows[document]:
            parts = [windows[number] for number in sorted(windows)]
            all_ids, all_values = (torch.stack(x) for x in zip(*parts, strict=True))
            summed = sum_windows(all_ids, all_values, self._segment.n_rows)
            self._encode(np.array([document]), *summed)
            # Only now: if memory ran out above, the windows are needed again.
            del self._windows[document]
            self._done.add(document)

    def _encode(self, documents: np.ndarray, ids: Tensor, values: Tensor) -> None:
        index = to_device(torch.from_numpy(documents), self._device)
        values = values * self._factors[index, None, None]
        self.stored.index_copy_(0, index, encode_head(ids, values, self._segment))
        self._encoded.append(documents)

    def write_into(self, stored: Tensor) -> None:
        """Copy the segments to their place in whole stored rows, ``(n_documents, bytes)`` uint8."""
        stored[:, self._segment.stored_start : self._segment.stored_end] = self.stored

    def take_new(self) -> dict[str, np.ndarray]:
        """Return what changed since the last call: encoded documents, and windows of others."""
        documents = np.unique(np.concatenate([np.empty(0, np.int64), *self._encoded]))
        index = torch.from_numpy(documents).to(self._device)
        open_windows = [n for n in self._new_windows if int(self._row_of[n]) in self._windows]
        self._encoded, self._new_windows = [], []
        found = {"documents": documents, "stored": self.stored[index].cpu().numpy()}
        found["windows"] = np.array(open_windows, np.int64)
        if open_windows:
            parts = [self._windows[int(self._row_of[n])][n] for n in open_windows]
            ids, values = (torch.stack(x).cpu().numpy() for x in zip(*parts, strict=True))
            found |= {"ids": ids, "values": values}
        return found

    def replay(self, saved: dict[str, np.ndarray]) -> None:
        """Restore what ``take_new`` returned."""
        index = torch.from_numpy(saved["documents"].copy()).to(self._device)
        self.stored[index] = torch.from_numpy(saved["stored"].copy()).to(self._device)
        for document in saved["documents"].tolist():
            self._windows.pop(document, None)
        for number, sequence in enumerate(saved["windows"].tolist()):
            ids, values = (
                torch.from_numpy(saved[name][number].copy()).to(self._device)
                for name in ("ids", "values")
            )
            self._windows.setdefault(int(self._row_of[sequence]), {})[sequence] = ids, values
