"""The documents with the highest and the lowest scores, for one damping or several."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradproj.analysis import Preconditioner, TopDocuments, top_and_bottom
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import Scan, ScanOptions
from gradproj.analysis.score_blocks import score_blocks
from gradproj.analysis.score_file import ScoresFile
from gradproj.analysis.top_k import TopK
from gradproj.store import ProjectionStore

_QUERIES_AT_ONCE_BYTES = 2**30
"""Of queries in float64; more are asked in several scans."""


@dataclass(frozen=True)
class Ranking:
    """Both ends of the scores of all queries, by one damping."""

    damping: float | str | None
    """As it was asked for; None where the score has none."""
    top: TopDocuments
    bottom: TopDocuments


def rank_documents(
    rows: np.ndarray,
    store: ProjectionStore,
    n_top: int,
    n_bottom: int,
    how: ScanOptions,
    curvature: Preconditioner | None,
    dampings: Sequence[float | str],
) -> list[Ranking]:
    """Scan the store, once for all dampings; for each where the documents' own norms depend on it, as relatif's do.

    Args:
        rows: ``(Q, D)``.
        store: whose documents are scored.
        n_top: documents at the upper end, for each query.
        n_bottom: at the lower.
        how: score, layers, domains, device, progress, together.
        curvature: what the score needs; None: a score without damping.
        dampings: as many answers.
    """
    if curvature is None:
        return [Ranking(None, *_in_parts(rows, store, n_top, n_bottom, how))]
    if len(dampings) > 1 and how["score"] != "relatif":
        return _all_at_once(rows, store, n_top, n_bottom, how, curvature, dampings)
    found = []
    for damping in dampings:
        damped: ScanOptions = {**how, "preconditioner": curvature, "damping": damping}
        found.append(Ranking(damping, *_in_parts(rows, store, n_top, n_bottom, damped)))
    return found


def _all_at_once(
    rows: np.ndarray,
    store: ProjectionStore,
    n_top: int,
    n_bottom: int,
    how: ScanOptions,
    curvature: Preconditioner,
    dampings: Sequence[float | str],
) -> list[Ranking]:
    """Each damping makes queries of its own, ``q C^-1``, whose scores are inner products."""
    chosen = curvature.for_layers(how["layers"] or curvature.layers)
    spans = {layer.name: slice(layer.slice_start, layer.slice_end) for layer in store.layers}
    found: list[list[tuple[TopDocuments, ...]]] = [[] for _ in dampings]
    for part in parts_of(rows, len(dampings)):
        values = np.concatenate([rows[part, spans[name]] for name in chosen.layers], axis=1)
        queries = torch.from_numpy(values).double()
        turned = np.concatenate([chosen.with_damping(d).solve(queries).numpy() for d in dampings])
        ends = _in_parts(turned, store, n_top, n_bottom, {**how, "score": "dot"})
        for number, of_one in enumerate(found):
            own = slice(number * len(queries), (number + 1) * len(queries))
            of_one.append(tuple(TopDocuments(e.ids[own], e.scores[own], e.n_scored) for e in ends))
    return [
        Ranking(damping, *(_joined(end) for end in zip(*of_one, strict=True)))
        for damping, of_one in zip(dampings, found, strict=True)
    ]


def rank_and_save_scores(
    rows: np.ndarray,
    store: ProjectionStore,
    n_top: int,
    n_bottom: int,
    how: ScanOptions,
    curvature: Preconditioner | None,
    damping: float | str,
    path: Path,
) -> Ranking:
    """As ``rank_documents`` for one damping, with every score in a file; the ends are then taken from there.

    Raises:
        StoreError: there is no room for the file, or it cannot be made.
    """
    if curvature is not None:
        how = {**how, "preconditioner": curvature, "damping": damping}
    world, shape = scan_world(how.get("together", False)), (len(rows), len(store))
    unfinished = world.broadcast(ScoresFile.create(path, shape) if world.rank == 0 else None)
    with ScoresFile(path, unfinished, shape) as file:
        for part in parts_of(rows):
            asked = Scan.of(store, how)
            for block in score_blocks(asked, asked.question(rows[part])):
                file.write(part.start, block.first, block.values.cpu().numpy())
        file.finish()
        world.barrier()  # every rank has written its part
        ends = _ends_of(file, shape, n_top, n_bottom) if world.rank == 0 else None
        if world.rank == 0:
            file.publish()
    return Ranking(None if curvature is None else damping, *world.broadcast(ends))


def _ends_of(
    file: ScoresFile, shape: tuple[int, int], n_top: int, n_bottom: int
) -> tuple[TopDocuments, TopDocuments]:
    best = {
        sign: TopK(shape[0], k, torch.device("cpu")) for sign, k in ((1, n_top), (-1, n_bottom))
    }
    n_scored = 0
    for first, values in file.blocks():
        n_scored += int((~np.isnan(values).any(axis=0)).sum())
        for sign, found in best.items():
            found.add(first, torch.from_numpy(sign * values))

    def result(sign: int, wanted: int) -> TopDocuments:
        ids, values = (end[:, : min(wanted, n_scored)].numpy() for end in best[sign].found())
        return TopDocuments(ids, sign * values, n_scored)

    return result(1, n_top), result(-1, n_bottom)


def parts_of(rows: np.ndarray, times: int = 1) -> Iterator[slice]:
    """As many queries at a time as one scan takes, where each is asked so many times over."""
    step = max(1, _QUERIES_AT_ONCE_BYTES // (8 * times * rows.shape[1]))
    for first in range(0, len(rows), step):
        yield slice(first, min(first + step, len(rows)))


def _in_parts(
    rows: np.ndarray, store: ProjectionStore, n_top: int, n_bottom: int, how: ScanOptions
) -> tuple[TopDocuments, TopDocuments]:
    found = [top_and_bottom(rows[part], store, n_top, n_bottom, **how) for part in parts_of(rows)]
    top, bottom = (_joined(end) for end in zip(*found, strict=True))
    return top, bottom


def _joined(parts: Sequence[TopDocuments]) -> TopDocuments:
    ids, scores = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "scores")
    )
    return TopDocuments(ids, scores, parts[0].n_scored)


def in_common(answers: Sequence[Ranking]) -> np.ndarray:
    """``(n, n)``: which share of the documents at the upper end two answers have in common, mean over the queries.

    Of the lower end where no upper one was asked for.
    """
    lists = [(a.top if a.top.ids.shape[1] else a.bottom).ids for a in answers]
    shares = np.ones((len(lists), len(lists)))
    for i, one in enumerate(lists):
        for j, other in enumerate(lists):
            both = [
                len(np.intersect1d(a, b)) / max(len(a), 1) for a, b in zip(one, other, strict=True)
            ]
            shares[i, j] = np.mean(both)
    return shares
