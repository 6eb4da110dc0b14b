"""Products of queries with the codes of packed rows, on a CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.packed_rows import numbers_of, scales_of
from gradproj.analysis.row_norms import RowNorms
from gradproj.kernels.bit_products import BitProducts
from gradproj.store import Band, ProjectionStore


class PackedProducts:
    """Multiply queries with the codes of stored rows, whose values exist nowhere.

    Args:
        store: its rows are packed.
        layers: names of the layers, in the order of the queries' values.
        weights: the queries, ``(Q, W)`` float32.
        norms: if scores are divided by the rows' norms.
    """

    def __init__(
        self,
        store: ProjectionStore,
        layers: Sequence[str],
        weights: Tensor,
        norms: RowNorms | None = None,
    ) -> None:
        self._header_width, self._norms = store.layout.header_width, norms
        self._numbers = numbers_of(store, layers)
        widths = [x.slice_end - x.slice_start for x in store.layers]
        of_layers = [widths[number] for number in self._numbers]
        self._products = BitProducts(weights.numpy(), of_layers, store.layout.bits)

    def of(self, band: Band, needed: bool) -> tuple[Tensor, Tensor]:
        """Return products ``(n, Q)`` and squared norms ``(n,)`` float64, without ``row_scale``.

        Both are zero unless ``needed``; the norms also if the scores need none.
        """
        n = len(band.status)
        products, squares = self._products.zeros(n), np.zeros(n)
        header, scales = np.empty((n, self._header_width), np.uint8), None
        for at, stored in band.tiles if needed else ():
            of_header = min(max(self._header_width - at, 0), stored.shape[1])
            if of_header:
                header[:, at : at + of_header] = stored[:, :of_header]
            if scales is None and at + of_header == self._header_width:
                scales = scales_of(header, self._numbers)
            if scales is not None and of_header < stored.shape[1]:
                first = at + of_header - self._header_width
                self._products.add(stored[:, of_header:], first, scales, products)
        if needed and self._norms is not None:
            squares = self._norms.of_band(band, scales)
        return torch.from_numpy(self._products.by_row(products)), torch.from_numpy(squares)
