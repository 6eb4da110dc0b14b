"""A unit's hidden states while its batches run: summed over a document's sequences."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.batching import Batch
from gradproj.engine.hidden_states import pooling_weights, summed_states
from gradproj.kernels.device_copy import to_device


class HiddenSums:
    """The hidden states of a unit's documents, on the device.

    Args:
        kind: ``mean`` or ``last``, as ``--hidden_state``.
        width: values of a hidden state.
        row_of: ``(n_sequences,)`` int64, ascending: the document of a sequence.
        lengths: tokens of each sequence.
        n_tokens: ``(n_documents,)`` targets of each document.
        device: of the sums.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        row_of: np.ndarray,
        lengths: Sequence[int],
        n_tokens: np.ndarray,
        device: torch.device,
    ) -> None:
        self._kind, self._device = kind, device
        self._sums = torch.zeros(len(n_tokens), width, device=device)
        is_last = np.append(row_of[1:] != row_of[:-1], True)[: len(row_of)]
        self._last = np.where(is_last, np.asarray(lengths, dtype=np.int64) - 1, -1)
        divisor = np.maximum(n_tokens, 1).astype(np.float32)
        self._divisor = to_device(torch.from_numpy(divisor), device) if kind == "mean" else None

    @contextmanager
    def watching(self, model: nn.Module, batch: Batch) -> Iterator[list[Tensor]]:
        """Yield a list that gets the batch's part of the sums, ``(N, d)``, when the model runs."""
        last = to_device(torch.from_numpy(self._last[batch.sequences]), self._device)
        with summed_states(model, pooling_weights(self._kind, batch.token_mask, last)) as states:
            yield states

    def add(self, index: Tensor, states: Tensor) -> None:
        """Add sequences' parts ``(N, d)`` to those of their documents, ``index (N,)``."""
        self._sums.index_add_(0, index, states)

    def finished(self) -> Tensor:
        """Return ``(n_documents, d)`` float16; NaN for a state that float16 does not hold."""
        states = self._sums if self._divisor is None else self._sums / self._divisor[:, None]
        states = states.half()
        return states.masked_fill(~states.isfinite().all(dim=1, keepdim=True), torch.nan)

    def take(self, documents: np.ndarray) -> dict[str, np.ndarray]:
        """Return the sums of some documents, as ``replay`` takes them."""
        index = torch.from_numpy(documents).to(self._device)
        return {"documents": documents, "sums": self._sums[index].cpu().numpy()}

    def replay(self, saved: dict[str, np.ndarray]) -> None:
        """Restore what ``take`` returned."""
        index = torch.from_numpy(saved["documents"].copy()).to(self._device)
        self._sums[index] = torch.from_numpy(saved["sums"].copy()).to(self._device)
