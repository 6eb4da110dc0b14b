"""What a store hands out: one layer as a lazy array, one sample's facts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradproj.store.layout import LayerSlice

if TYPE_CHECKING:
    from gradproj.store.reader import ProjectionStore


@dataclass(frozen=True)
class Sample:
    """What a store knows of one document besides its row."""

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
    """One layer of a store as a lazy array ``(N, k_o, k_i)``."""

    def __init__(self, store: "ProjectionStore", layer: LayerSlice) -> None:
        self._store = store
        self._layer = layer
        self.shape = (len(store), layer.k_o, layer.k_i)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """float32: ``(k_o, k_i)`` for one sample id, ``(n, k_o, k_i)`` for a slice or several ids.

        Raises:
            StoreError: as ``ProjectionStore.rows`` does.
        """
        if isinstance(ids, (int, np.integer)):
            return self[[range(len(self))[ids]]][
                0
            ]  # the range knows negative ones, and raises IndexError
        wanted = np.arange(*ids.indices(len(self))) if isinstance(ids, slice) else ids
        return self._shaped(self._store.rows(wanted, [self._layer.name]))

    def scan(
        self, rows_per_block: int | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As ``ProjectionStore.scan``, with values ``(n, k_o, k_i)``."""
        for ids, rows in self._store.scan(rows_per_block, [self._layer.name], start, stop):
            yield ids, self._shaped(rows)

    def _shaped(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(len(rows), *self.shape[1:])
