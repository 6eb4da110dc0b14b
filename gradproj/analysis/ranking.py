"""Highest- and lowest-scoring documents, for one damping or several."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import Scan, ScanOptions
from gradproj.analysis.score_blocks import score_blocks
from gradproj.analysis.score_file import ScoresFile
from gradproj.analysis.score_types import SCORES
from gradproj.analysis.scores import TopDocuments, top_and_bottom
from gradproj.analysis.top_k import TopK
from gradproj.store import ProjectionStore

_QUERY_BYTES_PER_SCAN = 2**30
"""Most bytes of queries in float64; more queries take several scans."""


@dataclass(frozen=True)
class Ranking:
    """Both ends of the scores of all queries, by one damping."""

    damping: float | str | None
    """The value requested; None for a score without damping."""
    top: TopDocuments
    bottom: TopDocuments


def rank_documents(
    rows: np.ndarray,
    store: ProjectionStore,
    n_top: int,
    n_bottom: int,
    options: ScanOptions,
    preconditioner: Preconditioner | None,
    dampings: Sequence[float | str],
) -> list[Ranking]:
    """Rank the documents in one scan for all dampings, or one scan each for relatif.

    Args:
        rows: ``(Q, D)``.
        store: documents to score.
        n_top: documents at the upper end, for each query.
        n_bottom: documents at the lower end.
        options: score, layers, domains, device, progress, together.
        preconditioner: what the score needs; None for a score without damping.
        dampings: one ranking is returned for each.
    """
    if preconditioner is None:
        return [Ranking(None, *_scan_in_parts(rows, store, n_top, n_bottom, options))]
    if len(dampings) > 1 and SCORES[options["score"]].is_inner_product:
        return _rank_in_one_scan(rows, store, n_top, n_bottom, options, preconditioner, dampings)
    # Each damping changes the documents' own norms, so that nothing can be shared between scans.
    rankings = []
    for damping in dampings:
        damped: ScanOptions = {**options, "preconditioner": preconditioner, "damping": damping}
        rankings.append(Ranking(damping, *_scan_in_parts(rows, store, n_top, n_bottom, damped)))
    return rankings


def _rank_in_one_scan(
    rows: np.ndarray,
    store: ProjectionStore,
    n_top: int,
    n_bottom: int,
    options: ScanOptions,
    preconditioner: Preconditioner,
    dampings: Sequence[float | str],
) -> list[Ranking]:
    """Score ``q C^-1`` of every damping by inner products, as if they were further queries."""
    chosen = preconditioner.for_layers(options["layers"] or preconditioner.layers)
    spans = {layer.name: slice(layer.slice_start, layer.slice_end) for layer in store.layers}
    parts: list[list[tuple[TopDocuments, ...]]] = [[] for _ in dampings]
    for part in query_parts(rows, len(dampings)):
        values = np.concatenate([rows[part, spans[name]] for name in chosen.layers], axis=1)
        queries = torch.from_numpy(values).double()
        solved = np.concatenate([chosen.with_damping(d).solve(queries).numpy() for d in dampings])
        ends = _scan_in_parts(solved, store, n_top, n_bottom, {**options, "score": "dot"})
        for number, ends_of_damping in enumerate(parts):
            span = slice(number * len(queries), (number + 1) * len(queries))
            ends_of_damping.append(
                tuple(TopDocuments(end.ids[span], end.scores[span], end.n_scored) for end in ends)
            )
    return [
        Ranking(damping, *(_concatenate(end) for end in zip(*ends, strict=True)))
        for damping, ends in zip(dampings, parts, strict=True)
    ]


def rank_and_save_scores(
    rows: np.ndarray,
    store: ProjectionStore,
    n_top: int,
    n_bottom: int,
    options: ScanOptions,
    preconditioner: Preconditioner | None,
    damping: float | str,
    path: Path,
) -> Ranking:
    """Write every score to a file and rank the documents from there, for one damping.

    Args: see ``rank_documents``.

    Raises:
        StoreError: there is no room for the file, or it cannot be created.
    """
    if preconditioner is not None:
        options = {**options, "preconditioner": preconditioner, "damping": damping}
    world, shape = scan_world(options.get("together", False)), (len(rows), len(store))
    unfinished = world.broadcast(ScoresFile.create(path, shape) if world.rank == 0 else None)
    with ScoresFile(path, unfinished, shape) as file:
        for part in query_parts(rows):
            scan = Scan.of(store, options)
            for block in score_blocks(scan, scan.prepare_queries(rows[part])):
                file.write(part.start, block.first, block.values.cpu().numpy())
        file.finish()
        world.barrier()  # rank 0 reads what every rank has written
        ends = _ends_of(file, shape, n_top, n_bottom) if world.rank == 0 else None
        if world.rank == 0:
            file.publish()
    return Ranking(None if preconditioner is None else damping, *world.broadcast(ends))


def _ends_of(
    file: ScoresFile, shape: tuple[int, int], n_top: int, n_bottom: int
) -> tuple[TopDocuments, TopDocuments]:
    cpu = torch.device("cpu")
    top, bottom = TopK(shape[0], n_top, cpu), TopK(shape[0], n_bottom, cpu)
    n_scored = 0
    for first, values in file.blocks():
        n_scored += int((~np.isnan(values).any(axis=0)).sum())
        top.add(first, torch.from_numpy(values))
        bottom.add(first, torch.from_numpy(-values))

    def result(best: TopK, sign: int) -> TopDocuments:
        ids, values = (x[:, : min(best.k, n_scored)].numpy() for x in best.result())
        return TopDocuments(ids, sign * values, n_scored)

    return result(top, 1), result(bottom, -1)


def query_parts(rows: np.ndarray, copies: int = 1) -> Iterator[slice]:
    """Yield the spans of queries that one scan takes if each stands for ``copies`` queries."""
    step = max(1, _QUERY_BYTES_PER_SCAN // (8 * copies * rows.shape[1]))
    for first in range(0, len(rows), step):
        yield slice(first, min(first + step, len(rows)))


def _scan_in_parts(
    rows: np.ndarray, store: ProjectionStore, n_top: int, n_bottom: int, options: ScanOptions
) -> tuple[TopDocuments, TopDocuments]:
    ends = [
        top_and_bottom(rows[part], store, n_top, n_bottom, **options) for part in query_parts(rows)
    ]
    top, bottom = (_concatenate(end) for end in zip(*ends, strict=True))
    return top, bottom


def _concatenate(parts: Sequence[TopDocuments]) -> TopDocuments:
    ids, scores = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "scores")
    )
    return TopDocuments(ids, scores, parts[0].n_scored)


def overlap(rankings: Sequence[Ranking]) -> np.ndarray:
    """Return the fraction of documents that two rankings share, ``(n, n)``, mean over queries.

    Compares the upper ends, or the lower ones if no upper end was requested.
    """
    lists = [(r.top if r.top.ids.shape[1] else r.bottom).ids for r in rankings]
    fractions = np.ones((len(lists), len(lists)))
    for i, one in enumerate(lists):
        for j, other in enumerate(lists):
            fractions[i, j] = np.mean(
                [
                    len(np.intersect1d(a, b)) / max(len(a), 1)
                    for a, b in zip(one, other, strict=True)
                ]
            )
    return fractions
