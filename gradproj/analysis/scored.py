"""Scores of a store's documents, a block at a time: what every answer to a question is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.blocks import TakesPart, as_tensor, progress_bar
from gradproj.analysis.question import Asked, Question
from gradproj.products import linear
from gradproj.store import Band
from gradproj.transfer import send

_TILE_VALUES = 2**17
"""Decoded at a time: half a megabyte, which stays in a core's own cache until it is multiplied."""
_ONEDNN_QUERIES = 6
"""From as many on its products are worth what calling them costs."""


@dataclass(frozen=True)
class Scored:
    """Consecutive samples of a store with their scores."""

    first: int
    """The first sample's id."""
    values: Tensor
    """``(Q, n)`` float32 on the device; NaN for samples that take no part or have no row."""


def scored(asked: Asked, question: Question) -> Iterator[Scored]:
    """This process's share of the samples in order, each byte of a row read once."""
    # Tiles are for a processor's caches. A GPU wants long blocks, and so does a norm that needs whole layers.
    by_tiles = asked.device.type == "cpu" and question.divisor is None
    return _by_tiles(asked, question) if by_tiles else _by_blocks(asked, question)


def _by_blocks(asked: Asked, question: Question) -> Iterator[Scored]:
    for block in asked.blocks():
        values = question.of_rows(block.rows)
        if not block.ok.all():
            values = torch.where(send(torch.from_numpy(block.ok), asked.device), values, torch.nan)
        yield Scored(block.first, values)


def _by_tiles(asked: Asked, question: Question) -> Iterator[Scored]:
    store, (start, stop) = asked.store, asked.share.samples(asked.store)
    takes_part = TakesPart(store, asked.how.get("domains"))
    products = TileProducts(question, store.layout.proj_dtype)
    height = asked.how.get("rows_per_block")
    with progress_bar(store, asked.label, start, stop) as bar:
        for band in store.scan_bands(height, asked.scanned_layers, start, stop):
            ok = takes_part(band.first, band.status)
            if band.has_rows and ok.any():
                values = products.scores(band)
                if not ok.all():
                    values[:, torch.from_numpy(~ok)] = torch.nan
            else:
                values = torch.full((len(question.weights), len(ok)), torch.nan)
            yield Scored(band.first, values)
            bar.update(len(ok))


class TileProducts:
    """Multiplies queries with stored rows on a processor: a tile is decoded into the cache and used there.

    Rows' scales are applied to the scores, not to the values.
    """

    def __init__(self, question: Question, proj_dtype: str) -> None:
        self._question, self._proj_dtype = question, proj_dtype
        self._n_queries = len(question.weights)
        self._with_norms = question.score == "cosine"
        # float16 rows have been brought to one size when they were stored. Of the others small values' squares would
        # be lost in float32.
        self._norm_dtype = torch.float32 if proj_dtype == "float16" else torch.float64
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._buffer = torch.empty(0)

    def scores(self, band: Band) -> Tensor:
        """``(Q, n)`` float32 scores of a band that has rows."""
        n = len(band.status)
        products, squares = torch.zeros(n, self._n_queries), torch.zeros(n, dtype=torch.float64)
        source, cuts = None, []
        for at, stored in band.tiles:
            if stored is not source:  # the next tile comes mostly in the same array
                source, cuts = stored, self._cut(stored)
            for first, width, values, tile in cuts:
                if tile is not values:
                    tile.copy_(values)
                self._multiply(tile, at + first, width, products)
                if self._with_norms:
                    squares += torch.linalg.vector_norm(tile, dim=1, dtype=self._norm_dtype).double().square()
        if self._with_norms:
            return self._question.finished(products.T, squares.sqrt())
        return self._question.finished(products.T, scale=torch.from_numpy(band.row_scale))

    def _cut(self, stored: np.ndarray) -> list[tuple[int, int, Tensor, Tensor]]:
        """Where each part of a tile begins, its width, its stored values, and where they are decoded."""
        n, width = stored.shape
        step = max(1, _TILE_VALUES // n)
        if self._proj_dtype != "float32" and len(self._buffer) < n * min(step, width):
            self._buffer = torch.empty(n * min(step, width))
        cuts = []
        for first in range(0, width, step):
            values = as_tensor(stored[:, first : first + step], self._proj_dtype)
            decoded = values.dtype == torch.float32
            tile = values if decoded else self._buffer[: values.numel()].view(values.shape)
            cuts.append((first, values.shape[1], values, tile))
        return cuts

    def _multiply(self, tile: Tensor, at: int, width: int, products: Tensor) -> None:
        """Add ``tile (n, w)`` times the queries' values from ``at`` on to ``products (n, Q)``."""
        weights = self._weights.get((at, width))
        if weights is None:
            weights = self._question.weights[:, at : at + width].contiguous()
            self._weights[at, width] = weights
        if self._n_queries < _ONEDNN_QUERIES:
            products.addmm_(tile, weights.T)
        else:
            products += linear(tile, weights)
