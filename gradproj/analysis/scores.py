"""Scores of a store's documents: all of them, the highest and lowest, and self-influence.

Every scan streams, so memory does not grow with the store, except for the ``(Q, N)`` result of
``score``.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.prepared_queries import PreparedQueries, self_products
from gradproj.analysis.row_blocks import SampleFilter
from gradproj.analysis.scan import Rows, Scan, ScanOptions, query_tensor
from gradproj.analysis.score_blocks import Blocks, on_host, score_blocks
from gradproj.analysis.score_types import SELF_SCORES
from gradproj.analysis.top_k import TopK
from gradproj.analysis.watch import present_watch
from gradproj.distributed import World
from gradproj.errors import ConfigError
from gradproj.formatting import html_table
from gradproj.kernels.device_copy import to_device
from gradproj.store import ProjectionStore

_QUERIES_SHOWN = 8
"""Of a table in a notebook."""


@dataclass(frozen=True)
class TopDocuments:
    """Documents at one end of the scores, the outermost first; ties in order of sample ids."""

    ids: Rows
    """``(Q, k)`` int64 sample ids."""
    scores: Rows
    """``(Q, k)`` float32."""
    n_scored: int
    """Documents with a score. If they are fewer than requested, k equals ``n_scored``."""

    def _repr_html_(self) -> str:
        shown = range(min(len(self.ids), _QUERIES_SHOWN))
        columns = [x[n].tolist() for n in shown for x in (self.ids, self.scores)]
        headings = [f"query {n}: {what}" for n in shown for what in ("id", "score")]
        caption = f"{self.n_scored:,} documents scored"
        caption += f"; {len(self.ids):,} queries" if len(self.ids) > len(shown) else ""
        return html_table(headings, zip(*columns, strict=True), caption)


def score(
    query_rows: Rows,
    store: ProjectionStore,
    out: np.ndarray | None = None,
    **options: Unpack[ScanOptions],
) -> Rows:
    """Score every document for every query. ``MEANINGS`` and ``SIGN`` describe the scores.

    Args:
        query_rows: ``(Q, D)`` or ``(D,)``, with the store's row layout, or only the chosen layers.
        store: finished or not.
        out: ``(Q, N)`` float32 to write into and return, such as a memory map.
        **options: see ``ScanOptions``.

    Returns:
        ``(Q, N)`` float32, or ``(G, N)`` of G sets; NaN for documents without a row (missing,
        empty, failed, of another domain); a tensor on the queries' device if they are a tensor.

    Raises:
        ConfigError: an unknown score, layer or domain, or rows of another width.
        StoreError: a preconditioner of another store, or a store without what the score needs.
    """
    queries, sets = query_tensor(query_rows), options.get("sets")
    shape = (len(queries if sets is None else sets), len(store))
    scores = np.empty(shape, np.float32) if out is None else out
    if scores.shape != shape or scores.dtype != np.float32:
        raise ConfigError(f"out is {scores.dtype} {scores.shape}; these scores are float32 {shape}")
    for ids, values in iter_scores(queries, store, **options):
        scores[:, int(ids[0]) : int(ids[-1]) + 1] = values
    return _like(scores, query_rows) if out is None else out


def iter_scores(
    query_rows: Rows, store: ProjectionStore, **options: Unpack[ScanOptions]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``score`` block by block: ``(ids (n,) int64, scores (Q, n) float32)`` in id order."""
    scan = Scan.alone(store, options, "score")
    blocks = score_blocks(scan, scan.prepare_queries(query_rows))
    for first, values in on_host(blocks, scan.device):
        yield np.arange(first, first + values.shape[1], dtype=np.int64), values


def top_k(
    query_rows: Rows, store: ProjectionStore, k: int = 20, **options: Unpack[ScanOptions]
) -> TopDocuments:
    """Return the ``k`` highest-scoring documents of each query. Arguments: see ``score``."""
    return top_and_bottom(query_rows, store, k, 0, **options)[0]


def bottom_k(
    query_rows: Rows, store: ProjectionStore, k: int = 20, **options: Unpack[ScanOptions]
) -> TopDocuments:
    """Return the ``k`` lowest-scoring documents of each query. Arguments: see ``score``."""
    return top_and_bottom(query_rows, store, 0, k, **options)[1]


def top_and_bottom(
    query_rows: Rows,
    store: ProjectionStore,
    n_top: int = 20,
    n_bottom: int = 20,
    **options: Unpack[ScanOptions],
) -> tuple[TopDocuments, TopDocuments]:
    """Return both ends of the scores from one scan.

    Raises:
        ConfigError: more documents requested than the store has samples, or as for ``score``.
    """
    for k in (n_top, n_bottom):
        if not 0 <= k <= len(store):
            raise ConfigError(f"{k:,} documents requested; {store.path} has {len(store):,}")
    scan = Scan.of(store, options)
    return both_ends_of(scan, scan.prepare_queries(query_rows), n_top, n_bottom, query_rows)


def both_ends_of(
    scan: Scan, queries: PreparedQueries, n_top: int, n_bottom: int, like: Rows
) -> tuple[TopDocuments, TopDocuments]:
    """Return both ends of the scores of prepared queries, of the type of ``like``."""
    n_queries = queries.n_scores
    top, bottom = TopK(n_queries, n_top, scan.device), TopK(n_queries, n_bottom, scan.device)
    n_scored = add_all(score_blocks(scan, queries), top, bottom)
    return both_ends(top, bottom, n_scored, like, scan.world)


def add_all(blocks: Blocks, top: TopK, bottom: TopK) -> Tensor:
    """Add the blocks to both ends and return the number of documents with a score.

    Never waits for the device, so the result is a tensor there. A watch may ask for what was found
    so far.
    """
    n_scored = torch.zeros((), dtype=torch.int64, device=top.device)
    watch = present_watch()
    # This rank's alone: a collective here would wait for ranks that nobody watches.
    so_far = functools.partial(both_ends, top, bottom, n_scored, np.empty(0), World())
    for first, values in blocks:
        # A NaN for one query only (an infinite row) removes the document for all queries, so that
        # all have equally many.
        no_score = values.isnan().any(dim=0)
        values = values.masked_fill_(no_score, torch.nan)
        n_scored += no_score.logical_not().sum()
        top.add(first, values)
        if bottom.k:
            bottom.add(first, -values)
        if watch is not None:
            watch.found(so_far)
    return n_scored


def both_ends(
    top: TopK, bottom: TopK, n_scored: Tensor, query_rows: Rows, world: World
) -> tuple[TopDocuments, TopDocuments]:
    """Merge all ranks' ends; the results are of the type of the query rows."""
    total = int(world.sum(n_scored))

    def result(best: TopK, sign: int) -> TopDocuments:
        ids, values = (x[:, : min(best.k, total)] for x in best.merged(world).result())
        return TopDocuments(_like(ids, query_rows), _like(sign * values, query_rows), total)

    return result(top, 1), result(bottom, -1)


def self_influence(
    store: ProjectionStore, out: np.ndarray | None = None, **options: Unpack[ScanOptions]
) -> np.ndarray:
    """Score each document with itself: how far training more on it lowers its own loss.

    Args:
        store: finished or not.
        out: ``(N,)`` float32 to write into and return, such as a memory map.
        **options: see ``ScanOptions``; the score is kfac, preconditioned or dot (squared norm).

    Returns:
        ``(N,)`` float32, 0 or more; NaN for documents without a row.
    """
    values = np.empty(len(store), np.float32) if out is None else out
    if values.shape != (len(store),) or values.dtype != np.float32:
        raise ConfigError(
            f"out is {values.dtype} {values.shape}; the result is float32 {(len(store),)}"
        )
    scan = Scan.alone(store, options, "self_influence", SELF_SCORES)
    for first, block in on_host(_self_scores(scan), scan.device):
        values[first : first + len(block)] = block
    return values


def _self_scores(scan: Scan) -> Iterator[tuple[int, Tensor]]:
    for first, ok, products in self_products_of_blocks(scan):
        factors = scan.row_factors(first, first + len(ok))
        if factors is not None:
            products = (products.double() * factors.square()).float()
        yield first, torch.where(to_device(torch.from_numpy(ok), scan.device), products, torch.nan)


def self_products_of_blocks(scan: Scan) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Yield first id, ``ok (n,)`` and ``r C^-1 r (n,)`` float32 of the stored rows, by blocks."""
    if scan.norms is None:
        preconditioner = scan.row_preconditioner()
        for block in scan.blocks():
            yield block.first, block.ok, self_products(block.rows, preconditioner)
        return
    sample_filter = SampleFilter(scan.store, scan.options.get("domains"))
    for first, squares in scan.norms.blocks():
        ok = sample_filter(first, scan.store.column("status", first, first + len(squares)))
        yield first, ok, to_device(torch.from_numpy(squares.astype(np.float32)), scan.device)


def _like(values: np.ndarray | Tensor, example: Rows) -> Rows:
    """Return a tensor on the example's device if that is a tensor, else a numpy array."""
    if isinstance(example, Tensor):
        return torch.as_tensor(values).to(example.device)
    return values.cpu().numpy() if isinstance(values, Tensor) else values
