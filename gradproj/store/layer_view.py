"""Views of a store: one layer as a lazy array, and one sample's columns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """A document's columns, decoded, and optionally its text."""

    sample_id: int
    key: str
    domain: str | None
    loss: float
    """Mean nats per target token."""
    n_tokens: int
    """Target tokens."""
    status: str
    grad_norm: float
    tar: int
    text: str | None = None


class LayerView:
    """One layer of a store as a lazy array ``(N, k_o, k_i)`` float32.

    ``read`` returns the layer's values ``(n, k_o * k_i)`` of the given sample ids, and ``scan``
    turns ``(rows_per_block, start, stop)`` into blocks ``(ids, values)``, in order.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        read: Callable[[Sequence[int] | np.ndarray], np.ndarray],
        scan: Callable[[int | None, int, int | None], Iterator[tuple[np.ndarray, np.ndarray]]],
    ) -> None:
        self.shape = shape
        self._read, self._scan = read, scan

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Return ``(k_o, k_i)`` for one sample id, ``(n, k_o, k_i)`` for a slice or several ids.

        Raises:
            StoreError: see ``ProjectionStore.rows``.
        """
        if isinstance(ids, (int, np.integer)):
            # A range resolves negative ids and raises IndexError.
            return self[[range(len(self))[ids]]][0]
        if isinstance(ids, slice):
            ids = np.arange(*ids.indices(len(self)))
        return self._reshape(self._read(ids))

    def scan(
        self, rows_per_block: int | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ``(ids (n,), values (n, k_o, k_i))``; see ``ProjectionStore.scan``."""
        for ids, rows in self._scan(rows_per_block, start, stop):
            yield ids, self._reshape(rows)

    def _reshape(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(len(rows), *self.shape[1:])
