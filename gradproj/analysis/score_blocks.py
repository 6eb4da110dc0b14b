"""Stream score blocks over a store; the basis of ``score``, ``top_k`` and rankings."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.prepared_queries import PreparedQueries
from gradproj.analysis.row_blocks import SampleFilter, as_tensor, progress_bar, rank_range
from gradproj.analysis.row_norms import RowNorms
from gradproj.analysis.scan import Scan
from gradproj.kernels.device_copy import record_event, to_device, to_host
from gradproj.kernels.onednn import linear
from gradproj.store import Band
from gradproj.store.head_rows import HeadQueries

if TYPE_CHECKING:
    from gradproj.analysis.packed_products import PackedProducts

_TILE_VALUES = 2**17
"""Values decoded at a time: half a megabyte, which stays in a core's cache until multiplied."""
_BLOCK_SCORES = 2**12
_ROWS_AT_ONCE = 256
_ONEDNN_QUERIES = 6
"""Fewest queries for which oneDNN's products outweigh the cost of calling it."""


Blocks = Iterator[tuple[int, Tensor]]
"""Consecutive samples: the first one's id, and their scores ``(Q, n)`` float32 on the device; NaN
for samples without a row or of other domains."""


def score_blocks(scan: Scan, queries: PreparedQueries) -> Blocks:
    """Yield this process's share of the samples in order, reading each byte of a row once."""
    # Tiles suit the caches of a CPU; a GPU needs long blocks.
    by_tiles = scan.device.type == "cpu" and _parts_fit_tiles(scan, queries)
    head = None if queries.head is None else _head_scores(scan, queries, queries.head)
    for first, values in (_score_tiles if by_tiles else _score_rows)(scan, queries):
        if head is not None:
            values += head(first, first + values.shape[1])
        factors = None if queries.has_norms else scan.row_factors(first, first + values.shape[1])
        values = values if factors is None else (values.double() * factors).float()
        yield first, values if queries.sets is None else queries.sets.scores(values)


def _head_scores(
    scan: Scan, queries: PreparedQueries, head_queries: HeadQueries
) -> Callable[[int, int], Tensor]:
    """Return the function from ``[first, last)`` to the head rows' scores ``(Q, n)``."""
    # It compiles, and loads a compiler.
    from gradproj.analysis.head_scores import HeadScorer, equal_factors

    store, head = scan.store, scan.store.head
    assert head is not None
    scorer, factors = HeadScorer(head_queries, head.segment), None
    if scan.options.get("head_sum") == "equal":
        is_scored = SampleFilter(store, scan.options.get("domains"))

        def of_layers(first: int, last: int) -> np.ndarray:
            rows = store.rows(np.arange(first, last), scan.layers, missing="nan")
            rows_there = to_device(torch.from_numpy(rows), scan.device)
            return queries.scores_of(rows_there).cpu().numpy()

        def reduced(first: int, last: int) -> np.ndarray | None:
            factors = scan.row_factors(first, last)
            return None if factors is None else factors.cpu().numpy()

        factors = equal_factors(scorer, store, is_scored, of_layers, reduced)

    def scores(first: int, last: int) -> Tensor:
        values = scorer.scores(head.stored(first, last))
        values = values if factors is None else (values * factors).astype(np.float32)
        return to_device(torch.from_numpy(np.ascontiguousarray(values)), scan.device)

    return scores


def on_host(
    blocks: Iterable[tuple[int, Tensor]], device: torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """Copy blocks ``(first id, values)`` to the host, each after the next one was launched.

    So a GPU has work while the host waits for a result.
    """
    before: tuple[int, Tensor, torch.cuda.Event | None] | None = None
    for first, values in blocks:
        current = first, values, record_event(device)
        if before is not None:
            yield before[0], to_host([before[1]], before[2])[0].numpy()
        before = current
    if before is not None:
        yield before[0], to_host([before[1]], before[2])[0].numpy()


def scores_at(scan: Scan, queries: PreparedQueries, ids: np.ndarray) -> np.ndarray:
    """Return the scores ``(Q, m)`` of some documents alone, from their decoded rows."""
    scores_of, parts = RowScores(scan, queries), []
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        chosen = ids[start : start + _ROWS_AT_ONCE]
        rows = scan.store.rows(chosen, scan.layers, missing="nan")
        layers, head, factors = scores_of(to_device(torch.from_numpy(rows), scan.device), chosen)
        values = ((layers + head) * factors).float()
        parts.append(values if queries.sets is None else queries.sets.scores(values))
    return torch.cat(parts, dim=1).cpu().numpy()


class RowScores:
    """Scores of rows in memory, by what makes them up."""

    def __init__(self, scan: Scan, queries: PreparedQueries) -> None:
        self._scan, self._queries = scan, queries
        self._head = None if queries.head is None else _head_scores(scan, queries, queries.head)

    def __call__(self, rows: Tensor, ids: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores of layers and head, and what both are multiplied by.

        Args:
            rows: ``(m, W)`` float32 of the chosen layers, on the device.
            ids: of these documents, whose head rows are read from the store.

        Returns:
            ``(Q, m)``, ``(Q, m)`` and ``(m,)``, float64 on the device: the score is the product of
            the sum and the factor. The head's is 0 without head rows, the factor 1 with norms.
        """
        layers = self._queries.scores_of(rows).double()
        head, factors = torch.zeros_like(layers), layers.new_ones(len(ids))
        for place, i in enumerate(ids.tolist()):
            if self._head is not None:
                head[:, place] = self._head(i, i + 1)[:, 0]
            known = None if self._queries.has_norms else self._scan.row_factors(i, i + 1)
            if known is not None:
                factors[place] = known[0]
        return layers, head, factors


def _parts_fit_tiles(scan: Scan, queries: PreparedQueries) -> bool:
    """Return whether each tile holds whole parts of the preconditioner that norms need."""
    if scan.norms is not None or not queries.has_norms:
        return True
    if scan.store.layout.is_packed:
        return False
    if queries.preconditioner is None:
        return True
    parts, width = queries.preconditioner.by_part(), scan.store.layout.chunk_width
    return width == scan.store.dim or all(stop - start == width for start, stop, _ in parts)


def _score_rows(scan: Scan, queries: PreparedQueries) -> Blocks:
    for block in scan.blocks():
        values = queries.scores_of(block.rows)
        if not block.ok.all():
            ok = to_device(torch.from_numpy(block.ok), scan.device)
            values = torch.where(ok, values, torch.nan)
        yield block.first, values


def _score_tiles(scan: Scan, queries: PreparedQueries) -> Blocks:
    store, (start, stop) = scan.store, rank_range(scan.store, scan.world)
    sample_filter = SampleFilter(store, scan.options.get("domains"))
    products = _products_of(scan, queries)
    height = scan.options.get("rows_per_block")
    # One band has few scores if there are few queries, so that several bands make up a block.
    most = height or max(1, _BLOCK_SCORES // len(queries.weights))
    with progress_bar(store, scan.progress_label, start, stop) as bar:
        bands: list[tuple[np.ndarray, Tensor, Tensor, Tensor]] = []
        first, n_rows = start, 0
        for band in store.scan_bands(height, scan.scanned_layers, start, stop):
            ok = sample_filter(band.first, band.status) & band.has_rows
            scale = torch.from_numpy(band.row_scale)
            bands.append((ok, scale, *products.of(band, bool(ok.any()))))
            n_rows += len(ok)
            bar.update(len(ok))
            if n_rows >= most:
                yield first, _merge_bands(queries, *zip(*bands, strict=True))
                bands, first, n_rows = [], first + n_rows, 0
        if bands:
            yield first, _merge_bands(queries, *zip(*bands, strict=True))


def _products_of(scan: Scan, queries: PreparedQueries) -> "TileProducts | PackedProducts":
    norms = scan.norms if queries.has_norms else None
    if not scan.store.layout.is_packed:
        return TileProducts(queries, scan.store.layout.proj_dtype, norms)
    # Only for packed rows: it compiles, and loads a compiler.
    from gradproj.analysis.packed_products import PackedProducts

    return PackedProducts(scan.store, scan.layers, queries.weights, norms)


def _merge_bands(
    queries: PreparedQueries,
    ok: tuple[np.ndarray, ...],
    row_scale: tuple[Tensor, ...],
    products: tuple[Tensor, ...],
    squares: tuple[Tensor, ...],
) -> Tensor:
    """Return the scores ``(Q, n)`` of consecutive bands."""
    merged = torch.cat(products).T
    if queries.has_norms:
        values = queries.finish(merged, torch.cat(squares).sqrt())
    else:
        values = queries.finish(merged, row_scale=torch.cat(row_scale))
    absent = ~np.concatenate(ok)
    if absent.any():
        values[:, torch.from_numpy(absent)] = torch.nan
    return values


class TileProducts:
    """Multiply queries with stored rows on a CPU, decoding one tile at a time into its cache.

    Rows' scales are applied to the scores rather than to the values, except where products of the
    values with each other are needed.
    """

    def __init__(
        self, queries: PreparedQueries, proj_dtype: str, norms: RowNorms | None = None
    ) -> None:
        self._queries, self._proj_dtype, self._norms = queries, proj_dtype, norms
        self._n_queries = len(queries.weights)
        # float16 rows were scaled to one size when stored. For the other dtypes, the squares of
        # small values would underflow in float32.
        self._norm_dtype = torch.float32 if proj_dtype == "float16" else torch.float64
        needed = queries.preconditioner if norms is None else None
        parts = [] if needed is None else needed.by_part()
        self._inverses = {(start, stop): inverse for start, stop, inverse in parts}
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._buffer = torch.empty(0)

    def of(self, band: Band, needed: bool) -> tuple[Tensor, Tensor]:
        """Return products ``(n, Q)`` and squared norms ``(n,)`` float64.

        Both are zero unless ``needed``; the norms also if the scores need none.
        """
        n, scale = len(band.status), torch.from_numpy(band.row_scale)[:, None]
        products, squares = torch.zeros(n, self._n_queries), torch.zeros(n, dtype=torch.float64)
        if not needed:
            return products, squares
        source, cuts = None, []
        has_norms = self._queries.has_norms and self._norms is None
        for column, stored in band.tiles:
            if stored is not source:  # most tiles come in the same array as the one before
                source, cuts = stored, self._cut(stored, column)
            for first, last, values, tile in cuts:
                if tile is not values:
                    tile.copy_(values)
                if self._inverses:
                    # Products of unscaled values may be out of float32's range.
                    tile *= scale
                self._multiply(tile, column + first, column + last, products)
                if has_norms:
                    squares += self._squares(tile, column + first, column + last)
        if self._norms is not None:
            squares = torch.from_numpy(self._norms.of_band(band, None))
        return products, squares

    def _cut(self, stored: np.ndarray, column: int) -> list[tuple[int, int, Tensor, Tensor]]:
        """Return ``(start, stop, stored values, decoded values)`` of each part of a tile."""
        n, width = stored.shape
        step = max(1, _TILE_VALUES // n)
        spans = [(first, min(first + step, width)) for first in range(0, width, step)]
        if self._inverses:
            spans = [
                (start - column, stop - column)
                for start, stop in self._inverses
                if column <= start and stop <= column + width
            ]
        largest = n * max(last - first for first, last in spans)
        if self._proj_dtype != "float32" and len(self._buffer) < largest:
            self._buffer = torch.empty(largest)
        cuts = []
        for first, last in spans:
            values = decoded = as_tensor(stored[:, first:last], self._proj_dtype)
            if values.dtype != torch.float32:
                decoded = self._buffer[: values.numel()].view(values.shape)
            cuts.append((first, last, values, decoded))
        return cuts

    def _squares(self, tile: Tensor, first: int, last: int) -> Tensor:
        """Return the part ``(n,)`` float64 of the squared norms from the values of a tile."""
        if self._inverses:
            return self._inverses[first, last].self_products(tile).double()
        return torch.linalg.vector_norm(tile, dim=1, dtype=self._norm_dtype).double().square()

    def _multiply(self, tile: Tensor, first: int, last: int, products: Tensor) -> None:
        """Add ``tile (n, w)`` times the queries' values ``[first, last)`` to ``products``."""
        few = self._n_queries < _ONEDNN_QUERIES
        weights = self._weights.get((first, last))
        if weights is None:
            weights = self._queries.weights[:, first:last]
            weights = self._weights[first, last] = (weights.T if few else weights).contiguous()
        if few:
            products.addmm_(tile, weights)
        else:
            products += linear(tile, weights)


class Columns:
    """Blocks of scores, taken in pieces of other sizes."""

    def __init__(self, blocks: Iterator[tuple[int, np.ndarray]]) -> None:
        self._blocks, self._first, self._values = blocks, 0, np.empty((0, 0))

    def take(self, first: int, n: int) -> np.ndarray:
        """Return the scores ``(Q, n)`` of the samples from ``first`` on, the next ones."""
        parts = []
        while n:
            if not self._values.shape[1]:
                self._first, self._values = next(self._blocks)
            assert self._first == first, f"scores of sample {self._first}, not {first}"
            part, self._values = self._values[:, :n], self._values[:, n:]
            parts.append(part)
            first, n = first + part.shape[1], n - part.shape[1]
            self._first = first
        return np.concatenate(parts, axis=1)
