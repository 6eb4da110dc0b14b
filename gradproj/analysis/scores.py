"""Scores of a store's documents for queries: all of them, the best and worst, and each document's with itself.

Every scan streams: memory is bounded whatever the store's size, but for ``score``, whose answer is ``(Q, N)``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.scan import (
    SELF_SCORES,
    PreparedQueries,
    Rows,
    Scan,
    ScanOptions,
    queries_of,
    self_products,
)
from gradproj.analysis.score_blocks import on_host, score_blocks
from gradproj.analysis.top_k import TopK
from gradproj.errors import ConfigError
from gradproj.kernels.device_copy import send
from gradproj.store import ProjectionStore


@dataclass(frozen=True)
class TopDocuments:
    """The documents at one end of the scores, the outermost first; equal scores by sample id."""

    ids: Rows
    """``(Q, k)`` int64 sample ids."""
    scores: Rows
    """``(Q, k)`` float32."""
    n_scored: int
    """Documents that have a score; where they are fewer than were asked for, so is k."""


def score(
    query_rows: Rows,
    store: ProjectionStore,
    out: np.ndarray | None = None,
    **how: Unpack[ScanOptions],
) -> Rows:
    """Every document's score for every query; ``MEANINGS`` and ``SIGN`` say what a score is.

    Args:
        query_rows: ``(Q, D)`` or ``(D,)``, of the store's row layout, or as wide as the chosen layers.
        store: finished or not.
        out: ``(Q, N)`` float32 to write into (a memory map, say), which is then given back.
        **how: see ``ScanOptions``.

    Returns:
        ``(Q, N)`` float32, NaN for documents without a row (missing, empty, failed, of another domain); a tensor on
        the queries' device where the queries are one.

    Raises:
        ConfigError: an unknown score, layer or domain, or rows of another width.
        StoreError: a preconditioner of another store, or a store without what the score needs.
    """
    queries = queries_of(query_rows)
    shape = (len(queries), len(store))
    scores = np.empty(shape, np.float32) if out is None else out
    if scores.shape != shape or scores.dtype != np.float32:
        raise ConfigError(f"out is {scores.dtype} {scores.shape}; these scores are float32 {shape}")
    for ids, values in iter_scores(queries, store, **how):
        scores[:, int(ids[0]) : int(ids[-1]) + 1] = values
    return _like(scores, query_rows) if out is None else out


def iter_scores(
    query_rows: Rows, store: ProjectionStore, **how: Unpack[ScanOptions]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``score`` a block of documents at a time: ``(ids (n,) int64, scores (Q, n) float32)``, in order of ids."""
    asked = Scan.alone(store, how, "score")
    blocks = (
        (block.first, block.values) for block in score_blocks(asked, asked.question(query_rows))
    )
    for first, values in on_host(blocks, asked.device):
        yield np.arange(first, first + values.shape[1], dtype=np.int64), values


def top_k(
    query_rows: Rows, store: ProjectionStore, k: int = 20, **how: Unpack[ScanOptions]
) -> TopDocuments:
    """The ``k`` documents with the highest scores for each query, the highest first; arguments as ``score``'s."""
    return top_and_bottom(query_rows, store, k, 0, **how)[0]


def bottom_k(
    query_rows: Rows, store: ProjectionStore, k: int = 20, **how: Unpack[ScanOptions]
) -> TopDocuments:
    """The ``k`` documents with the lowest scores for each query, the lowest first; arguments as ``score``'s."""
    return top_and_bottom(query_rows, store, 0, k, **how)[1]


def top_and_bottom(
    query_rows: Rows,
    store: ProjectionStore,
    n_top: int = 20,
    n_bottom: int = 20,
    **how: Unpack[ScanOptions],
) -> tuple[TopDocuments, TopDocuments]:
    """Both ends of the scores in one scan.

    Raises:
        ConfigError: more documents wanted than the store has samples, or as ``score`` does.
    """
    for wanted in (n_top, n_bottom):
        if not 0 <= wanted <= len(store):
            raise ConfigError(
                f"{wanted:,} documents are asked for; {store.path} has {len(store):,}"
            )
    asked = Scan.of(store, how)
    question = asked.question(query_rows)
    n_queries = len(question.weights)
    top, bottom = TopK(n_queries, n_top, asked.device), TopK(n_queries, n_bottom, asked.device)
    total = int(asked.world.sum(_add_all(asked, question, top, bottom)))

    def result(best: TopK, sign: int, wanted: int) -> TopDocuments:
        ids, values = (found[:, : min(wanted, total)] for found in best.joined(asked.world).found())
        return TopDocuments(_like(ids, query_rows), _like(sign * values, query_rows), total)

    return result(top, 1, n_top), result(bottom, -1, n_bottom)


def _add_all(asked: Scan, question: PreparedQueries, top: TopK, bottom: TopK) -> Tensor:
    """Scan this process's share; the number of documents that have a score. A device is asked for nothing here."""
    n_scored = torch.zeros((), dtype=torch.int64, device=asked.device)
    for block in score_blocks(asked, question):
        # NaN for one query only (an infinite row) is none for the others either: so all have as many.
        no_score = block.values.isnan().any(dim=0)
        values = block.values.masked_fill_(no_score, torch.nan)
        n_scored += no_score.logical_not().sum()
        top.add(block.first, values)
        if bottom.k:
            bottom.add(block.first, -values)
    return n_scored


def self_influence(
    store: ProjectionStore, out: np.ndarray | None = None, **how: Unpack[ScanOptions]
) -> np.ndarray:
    """Each document's score with itself: how much its own loss falls when it is trained on more.

    Args:
        store: finished or not.
        out: ``(N,)`` float32 to write into (a memory map, say).
        **how: see ``ScanOptions``; the score is kfac, preconditioned or dot (the squared norm).

    Returns:
        ``(N,)`` float32, 0 or more; NaN for documents without a row.
    """
    values = np.empty(len(store), np.float32) if out is None else out
    if values.shape != (len(store),) or values.dtype != np.float32:
        raise ConfigError(
            f"out is {values.dtype} {values.shape}; the answer is float32 {(len(store),)}"
        )
    asked = Scan.alone(store, how, "self_influence", SELF_SCORES)
    for first, found in on_host(_own(asked), asked.device):
        values[first : first + len(found)] = found
    return values


def _own(asked: Scan) -> Iterator[tuple[int, Tensor]]:
    """``(first id, (n,) self products)`` of every block, NaN for those that take no part."""
    preconditioner = asked.for_rows()
    for block in asked.blocks():
        ok = send(torch.from_numpy(block.ok), asked.device)
        yield block.first, torch.where(ok, self_products(block.rows, preconditioner), torch.nan)


def _like(values: np.ndarray | Tensor, example: Rows) -> Rows:
    """A tensor on the example's device where that is one, else numpy."""
    if isinstance(example, Tensor):
        return torch.as_tensor(values).to(example.device)
    return values.cpu().numpy() if isinstance(values, Tensor) else values
