"""Scores of a store's documents, a block at a time: what every answer to a question is made of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.row_blocks import SampleFilter, as_tensor, progress_bar, rank_range
from gradproj.analysis.scan import PreparedQueries, Scan
from gradproj.kernels.device_copy import fetch, record_event, send
from gradproj.kernels.onednn import linear
from gradproj.store import Band

_TILE_VALUES = 2**17
"""Decoded at a time: half a megabyte, which stays in a core's own cache until it is multiplied."""
_BLOCK_SCORES = 2**12
_ONEDNN_QUERIES = 6
"""From as many on its products are worth what calling them costs."""


@dataclass(frozen=True)
class ScoreBlock:
    """Consecutive samples of a store with their scores."""

    first: int
    """The first sample's id."""
    values: Tensor
    """``(Q, n)`` float32 on the device; NaN for samples that take no part or have no row."""


def score_blocks(asked: Scan, question: PreparedQueries) -> Iterator[ScoreBlock]:
    """This process's share of the samples in order, each byte of a row read once."""
    # Tiles are for a processor's caches; a GPU wants long blocks.
    by_tiles = asked.device.type == "cpu" and _parts_fit_tiles(asked, question)
    return _by_tiles(asked, question) if by_tiles else _by_blocks(asked, question)


def on_host(
    blocks: Iterable[tuple[int, Tensor]], device: torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """The same blocks ``(first id, values)`` on the host, each after the next was given to the device.

    So a GPU has always something to do while the host waits for what it has done.
    """
    before: tuple[int, Tensor, torch.cuda.Event | None] | None = None
    for first, values in blocks:
        now = first, values, record_event(device)
        if before is not None:
            yield before[0], fetch([before[1]], before[2])[0].numpy()
        before = now
    if before is not None:
        yield before[0], fetch([before[1]], before[2])[0].numpy()


def _parts_fit_tiles(asked: Scan, question: PreparedQueries) -> bool:
    """Whether each tile holds whole parts of the preconditioner, where a norm needs those."""
    if question.divisor is None:
        return True
    parts, width = question.divisor.by_part(), asked.store.layout.chunk_width
    return width == asked.store.dim or all(stop - start == width for start, stop, _ in parts)


def _by_blocks(asked: Scan, question: PreparedQueries) -> Iterator[ScoreBlock]:
    for block in asked.blocks():
        values = question.of_rows(block.rows)
        if not block.ok.all():
            values = torch.where(send(torch.from_numpy(block.ok), asked.device), values, torch.nan)
        yield ScoreBlock(block.first, values)


def _by_tiles(asked: Scan, question: PreparedQueries) -> Iterator[ScoreBlock]:
    store, (start, stop) = asked.store, rank_range(asked.store, asked.world)
    takes_part = SampleFilter(store, asked.how.get("domains"))
    products = TileProducts(question, store.layout.proj_dtype)
    height = asked.how.get("rows_per_block")
    # A band's own scores are few where queries are few; what is done with them is done for several bands at once.
    most = height or max(1, _BLOCK_SCORES // len(question.weights))
    with progress_bar(store, asked.label, start, stop) as bar:
        parts: list[_Part] = []
        n_rows = 0
        for band in store.scan_bands(height, asked.scanned_layers, start, stop):
            ok = takes_part(band.first, band.status) & band.has_rows
            parts.append(
                _Part(
                    band.first,
                    ok,
                    torch.from_numpy(band.row_scale),
                    *products.of(band, bool(ok.any())),
                )
            )
            n_rows += len(ok)
            bar.update(len(ok))
            if n_rows >= most:
                yield _joined(question, parts)
                parts, n_rows = [], 0
        if parts:
            yield _joined(question, parts)


@dataclass(frozen=True)
class _Part:
    """What is known of a band after its tiles: which samples take part, their scales, products and squared norms."""

    first: int
    ok: np.ndarray
    row_scale: Tensor
    products: Tensor
    squares: Tensor


def _joined(question: PreparedQueries, parts: list[_Part]) -> ScoreBlock:
    products = torch.cat([part.products for part in parts]).T
    if question.has_norms:
        values = question.finished(products, torch.cat([part.squares for part in parts]).sqrt())
    else:
        values = question.finished(products, scale=torch.cat([part.row_scale for part in parts]))
    absent = ~np.concatenate([part.ok for part in parts])
    if absent.any():
        values[:, torch.from_numpy(absent)] = torch.nan
    return ScoreBlock(parts[0].first, values)


class TileProducts:
    """Multiplies queries with stored rows on a processor: a tile is decoded into the cache and used there.

    Rows' scales are applied to the scores, not to the values, but where these are multiplied with one another.
    """

    def __init__(self, question: PreparedQueries, proj_dtype: str) -> None:
        self._question, self._proj_dtype = question, proj_dtype
        self._n_queries = len(question.weights)
        # float16 rows have been brought to one size when they were stored. Of the others small values' squares would
        # be lost in float32.
        self._norm_dtype = torch.float32 if proj_dtype == "float16" else torch.float64
        self._inverses = {}
        if question.divisor is not None:
            self._inverses = {
                (start, stop): inverse for start, stop, inverse in question.divisor.by_part()
            }
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._buffer = torch.empty(0)

    def of(self, band: Band, wanted: bool) -> tuple[Tensor, Tensor]:
        """``(n, Q)`` products and, where scores are divided by norms, their squares ``(n,)`` float64; if wanted."""
        n, scale = len(band.status), torch.from_numpy(band.row_scale)[:, None]
        products, squares = torch.zeros(n, self._n_queries), torch.zeros(n, dtype=torch.float64)
        if not wanted:
            return products, squares
        source, cuts, has_norms = None, [], self._question.has_norms
        for at, stored in band.tiles:
            if stored is not source:  # the next tile comes mostly in the same array
                source, cuts = stored, self._cut(stored, at)
            for first, last, values, tile in cuts:
                if tile is not values:
                    tile.copy_(values)
                if (
                    self._inverses
                ):  # of rows as they are stored their products may be out of float32's reach
                    tile *= scale
                self._multiply(tile, at + first, at + last, products)
                if has_norms:
                    squares += self._squares(tile, at + first, at + last)
        return products, squares

    def _cut(self, stored: np.ndarray, at: int) -> list[tuple[int, int, Tensor, Tensor]]:
        """Where each part of a tile begins and ends, its stored values, and where they are decoded."""
        n, width = stored.shape
        step = max(1, _TILE_VALUES // n)
        ends = [(first, min(first + step, width)) for first in range(0, width, step)]
        if self._inverses:
            ends = [(a - at, b - at) for a, b in self._inverses if at <= a and b <= at + width]
        most = n * max(last - first for first, last in ends)
        if self._proj_dtype != "float32" and len(self._buffer) < most:
            self._buffer = torch.empty(most)
        cuts = []
        for first, last in ends:
            values = as_tensor(stored[:, first:last], self._proj_dtype)
            decoded = values.dtype == torch.float32
            cuts.append(
                (
                    first,
                    last,
                    values,
                    values if decoded else self._buffer[: values.numel()].view(values.shape),
                )
            )
        return cuts

    def _squares(self, tile: Tensor, first: int, last: int) -> Tensor:
        """``(n,)`` float64: what the values ``[first, last)`` add to the rows' squared norms."""
        if self._inverses:
            return self._inverses[first, last].self_products(tile).double()
        return torch.linalg.vector_norm(tile, dim=1, dtype=self._norm_dtype).double().square()

    def _multiply(self, tile: Tensor, first: int, last: int, products: Tensor) -> None:
        """Add ``tile (n, w)`` times the queries' values ``[first, last)`` to ``products (n, Q)``."""
        few = self._n_queries < _ONEDNN_QUERIES
        weights = self._weights.get((first, last))
        if weights is None:
            weights = self._question.weights[:, first:last]
            weights = self._weights[first, last] = (weights.T if few else weights).contiguous()
        if few:
            products.addmm_(tile, weights)
        else:
            products += linear(tile, weights)
