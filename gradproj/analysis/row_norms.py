"""Norms of rows that need no row: from the scales of sign rows, or from a column of the store.

Sign rows have values of one size in each layer. In an eigenbasis the norm of a row in the
curvature's metric is the norm of the row itself, which the job recorded. That is the norm of a
dense row, but not of a row of int2 or int4, which is up to a third smaller after encoding.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from gradproj.analysis.eigenbasis import has_weighted_rows
from gradproj.analysis.packed_rows import numbers_of, scales_of
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.row_blocks import chosen_layers
from gradproj.store import Band, ProjectionStore

_ROWS_PER_BLOCK = 2**16


class RowNorms(Protocol):
    """Squares ``r C^-1 r`` of a store's rows r."""

    def of_band(self, band: Band, scales: np.ndarray | None) -> np.ndarray:
        """Return those of a band's rows over the squares of their ``row_scale``, ``(n,)`` float64.

        ``scales (n, L)`` are the chosen layers' factors of packed rows.
        """

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first sample's id and the squares ``(n,)`` float64 of all rows, in order."""


class SignNorms:
    """From the scales, since all values of a layer have the size of its scale.

    Args:
        store: its rows are signs.
        layers: names of the layers.
        traces: each layer's ``r C^-1 r`` for a row of values 1 and -1.
    """

    def __init__(
        self, store: ProjectionStore, layers: Sequence[str], traces: Sequence[float]
    ) -> None:
        self._store, self._numbers = store, numbers_of(store, layers)
        self._traces = np.array(traces)

    def of_band(self, band: Band, scales: np.ndarray | None) -> np.ndarray:
        assert scales is not None
        return np.square(scales, dtype=np.float64) @ self._traces

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for ids, headers, row_scale in self._store.scan_stored(_ROWS_PER_BLOCK, layers=()):
            scales = scales_of(headers, self._numbers) * row_scale[:, None]
            yield int(ids[0]), np.square(scales, dtype=np.float64) @ self._traces


class ColumnNorms:
    """From the column ``grad_norm`` of dense rows."""

    def __init__(self, store: ProjectionStore) -> None:
        self._store = store

    def of_band(self, band: Band, scales: np.ndarray | None) -> np.ndarray:
        return self._squares(band.first, band.last) / np.square(band.row_scale, dtype=np.float64)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(self._store), _ROWS_PER_BLOCK):
            yield first, self._squares(first, min(first + _ROWS_PER_BLOCK, len(self._store)))

    def _squares(self, first: int, last: int) -> np.ndarray:
        return np.square(self._store.column("grad_norm", first, last), dtype=np.float64)


class GivenNorms:
    """Those of an earlier scan: ``r C^-1 r``, ``(N,)``."""

    def __init__(self, squares: np.ndarray) -> None:
        self._all = squares

    def of_band(self, band: Band, scales: np.ndarray | None) -> np.ndarray:
        squares = self._all[band.first : band.last].astype(np.float64)
        return squares / np.square(band.row_scale, dtype=np.float64)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, self._all.astype(np.float64)


def norms_without_rows(
    store: ProjectionStore, layers: list[str], preconditioner: Preconditioner | None
) -> RowNorms | None:
    """Return norms in this metric (None: the Euclidean one); None if they need the rows."""
    if store.layout.encoding == "signs":
        widths = {x.name: float(x.slice_end - x.slice_start) for x in store.layers}
        plain = [widths[name] for name in layers]
        traces = plain if preconditioner is None else preconditioner.traces()
        return None if traces is None else SignNorms(store, layers, traces)
    is_recorded = store.layout.encoding == "dense" and layers == chosen_layers(store, None)
    if is_recorded and has_weighted_rows(store) and preconditioner and preconditioner.is_identity:
        return ColumnNorms(store)
    return None
