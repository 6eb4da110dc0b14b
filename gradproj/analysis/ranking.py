"""Highest- and lowest-scoring documents, for one damping or several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradproj.analysis.norm_cache import with_self_influences
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.scan import Rows, Scan, ScanOptions
from gradproj.analysis.score_blocks import score_blocks
from gradproj.analysis.score_file import ScoresFile
from gradproj.analysis.score_types import SCORES
from gradproj.analysis.scores import TopDocuments, add_all, both_ends, both_ends_of, top_and_bottom
from gradproj.analysis.top_k import TopK
from gradproj.distributed import World
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import HeadQueries

_QUERY_BYTES_PER_SCAN = 2**30
"""Most bytes of queries in float64; more queries take several scans."""


@dataclass(frozen=True)
class Ranking:
    """Both ends of the scores of all queries, by one damping."""

    damping: float | str | None
    """The value requested; None for a score without damping."""
    top: TopDocuments
    bottom: TopDocuments


@dataclass(frozen=True)
class Ranker:
    """Ranks the documents of a store for query rows ``(Q, D)``."""

    store: ProjectionStore
    n_top: int
    """Documents at the upper end, for each query."""
    n_bottom: int
    """Documents at the lower end, for each query."""
    options: ScanOptions
    """Score, layers, domains, device, progress, together."""
    preconditioner: Preconditioner | None
    """Preconditioner of the score; None for a score without damping."""
    note: Callable[[str], None] = lambda line: None
    """Called with a line for the user if self-influences cannot be kept beside the store."""

    def rank(self, rows: np.ndarray, dampings: Sequence[float | str]) -> list[Ranking]:
        """Rank by each damping, in one scan for all, or one scan each for relatif."""
        if self.preconditioner is None:
            return [Ranking(None, *self._scan(rows, self.options))]
        if len(dampings) > 1 and SCORES[self.options["score"]].is_inner_product:
            return self._rank_in_one_scan(rows, self.preconditioner, dampings)
        # Each damping changes the documents' own norms, so scans have nothing to share.
        return [Ranking(c, *self._scan(rows, self.damped_by(c))) for c in dampings]

    def rank_and_save(self, rows: np.ndarray, damping: float | str, path: Path) -> Ranking:
        """Write every score to a file and rank the documents from there.

        Raises:
            StoreError: there is no room for the file, or it cannot be created.
        """
        scan = Scan.of(self.store, self.damped_by(damping))
        blocks = (
            (part.start, first, values.cpu().numpy())
            for part in query_parts(rows)
            for first, values in score_blocks(
                scan, scan.prepare_queries(rows[part], self.head_of(part))
            )
        )
        shape = len(rows), len(self.store)
        ends = save_and_rank(path, shape, blocks, self.n_top, self.n_bottom, scan.world)
        return Ranking(damping if self.preconditioner is not None else None, *ends)

    def damped_by(self, damping: float | str) -> ScanOptions:
        """Return the options of a scan with this damping of the preconditioner."""
        if self.preconditioner is None:
            return self.options
        options: ScanOptions = {**self.options, "preconditioner": self.preconditioner}
        return with_self_influences(self.store, {**options, "damping": damping}, self.note)

    def head_of(self, part: slice, copies: int = 1) -> HeadQueries | None:
        """Return the head rows of some queries, ``copies`` times one after the other."""
        head = self.options.get("head")
        if head is None:
            return None
        return head[np.tile(np.arange(part.start, part.stop), copies)]

    def _rank_in_one_scan(
        self, rows: np.ndarray, preconditioner: Preconditioner, dampings: Sequence[float | str]
    ) -> list[Ranking]:
        """Score ``q C^-1`` of every damping by inner products, as if they were further queries."""
        chosen = preconditioner.for_layers(self.options["layers"] or preconditioner.layers)
        scan = Scan.of(self.store, self.damped_by(dampings[0]))
        spans = {x.name: slice(x.slice_start, x.slice_end) for x in self.store.layers}
        parts: list[list[tuple[TopDocuments, ...]]] = [[] for _ in dampings]
        for part in query_parts(rows, len(dampings)):
            values = np.concatenate([rows[part, spans[name]] for name in chosen.layers], axis=1)
            queries = torch.from_numpy(values).double()
            solved = torch.cat([chosen.with_damping(c).solve(queries) for c in dampings])
            prepared = scan.prepare_solved(solved, self.head_of(part, len(dampings)))
            ends = both_ends_of(scan, prepared, self.n_top, self.n_bottom, rows)
            for number, ends_of_damping in enumerate(parts):
                span = slice(number * len(queries), (number + 1) * len(queries))
                ends_of_damping.append(
                    tuple(TopDocuments(x.ids[span], x.scores[span], x.n_scored) for x in ends)
                )
        return [
            Ranking(damping, *(concatenate(end) for end in zip(*ends, strict=True)))
            for damping, ends in zip(dampings, parts, strict=True)
        ]

    def _scan(self, rows: np.ndarray, options: ScanOptions) -> tuple[TopDocuments, TopDocuments]:
        ends = []
        for part in query_parts(rows):
            of_part: ScanOptions = {**options, "head": self.head_of(part)}
            ends.append(
                top_and_bottom(rows[part], self.store, self.n_top, self.n_bottom, **of_part)
            )
        top, bottom = (concatenate(end) for end in zip(*ends, strict=True))
        return top, bottom


def save_and_rank(
    path: Path,
    shape: tuple[int, int],
    blocks: Iterator[tuple[int, int, np.ndarray]],
    n_top: int,
    n_bottom: int,
    world: World,
) -> tuple[TopDocuments, TopDocuments]:
    """Write scores to a file and rank the documents from there.

    Args:
        path: the file, which does not exist.
        shape: ``(Q, N)``.
        blocks: this rank's ``(first query, first sample, scores (q, n))``, in order.
        n_top: documents at the upper end, for each query.
        n_bottom: documents at the lower end, for each query.
        world: the ranks that share the scores.

    Returns:
        Both ends, on every rank.

    Raises:
        StoreError: there is no room for the file, or it cannot be created.
    """
    unfinished = world.broadcast(ScoresFile.create(path, shape) if world.rank == 0 else None)
    with ScoresFile(path, unfinished, shape) as file:
        for query, first, values in blocks:
            file.write(query, first, values)
        file.finish()
        world.barrier()  # rank 0 reads what every rank has written
        ends = None
        if world.rank == 0:
            cpu = torch.device("cpu")
            top, bottom = TopK(shape[0], n_top, cpu), TopK(shape[0], n_bottom, cpu)
            n_scored = add_all(file.blocks(), top, bottom)
            ends = both_ends(top, bottom, n_scored, np.empty(0), World())
            file.publish()
    return world.broadcast(ends)


def query_parts(rows: np.ndarray, copies: int = 1) -> Iterator[slice]:
    """Yield the spans of queries that one scan takes if each stands for ``copies`` queries."""
    step = max(1, _QUERY_BYTES_PER_SCAN // (8 * copies * rows.shape[1]))
    for first in range(0, len(rows), step):
        yield slice(first, min(first + step, len(rows)))


def concatenate(parts: Sequence[TopDocuments]) -> TopDocuments:
    """Join the documents of consecutive queries."""
    ids, scores = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "scores")
    )
    return TopDocuments(ids, scores, parts[0].n_scored)


def overlap(rankings: Sequence[Ranking]) -> np.ndarray:
    """Return the fraction of documents that two rankings share, ``(n, n)``, mean over queries.

    Compares the upper ends, or the lower ones if no upper end was requested.
    """
    lists = [(r.top if r.top.ids.shape[1] else r.bottom).ids for r in rankings]
    return np.array([[_shared(one, other) for other in lists] for one in lists])


def _shared(one: Rows, other: Rows) -> float:
    if one is other:
        return 1.0
    pairs = zip(one, other, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / max(len(a), 1) for a, b in pairs]))
