"""Highest- and lowest-scoring documents, for one damping or several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gradproj.analysis.norm_cache import with_self_influences
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.prepared_queries import PreparedQueries
from gradproj.analysis.scan import Rows, Scan, ScanOptions
from gradproj.analysis.score_blocks import score_blocks
from gradproj.analysis.score_stream import Part, ScoreStream, concatenate
from gradproj.analysis.score_types import SCORES
from gradproj.analysis.scores import TopDocuments, both_ends_of, top_and_bottom
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
        ends = self.stream(rows, damping).ends(self.n_top, self.n_bottom, path)
        return Ranking(damping if self.preconditioner is not None else None, *ends)

    def stream(
        self, rows: np.ndarray, damping: float | str, parts: Sequence[slice] | None = None
    ) -> ScoreStream:
        """Return all documents' scores for these queries, by default in its own parts."""
        scan, sets = Scan.of(self.store, self.damped_by(damping)), self.options.get("sets")

        def part_of(part: slice) -> Part:
            n_scores = part.stop - part.start if sets is None else len(sets)
            return Part(n_scores, lambda: score_blocks(scan, prepared(part)))

        def prepared(part: slice) -> PreparedQueries:
            return scan.prepare_queries(rows[part], self.head_of(part))

        made = [part_of(part) for part in parts or self.parts(rows)]
        return ScoreStream(made, len(self.store), scan.world, scan.device)

    def damped_by(self, damping: float | str) -> ScanOptions:
        """Return the options of a scan with this damping of the preconditioner."""
        if self.preconditioner is None:
            return self.options
        return with_self_influences(self.store, self._with_damping(damping), self.note)

    def without_scan(self, damping: float | str) -> Scan:
        """Return the options of this process alone, to score rows in memory."""
        return Scan.of(self.store, {**self._with_damping(damping), "together": False})

    def _with_damping(self, damping: float | str) -> ScanOptions:
        if self.preconditioner is None:
            return self.options
        return {**self.options, "preconditioner": self.preconditioner, "damping": damping}

    def head_of(self, part: slice) -> HeadQueries | None:
        """Return the head rows of some queries."""
        head = self.options.get("head")
        return None if head is None else head[part]

    def parts(self, rows: np.ndarray, copies: int = 1) -> list[slice]:
        """Return the spans of queries that one scan takes; all, if they are of sets."""
        if self.options.get("sets") is not None:
            return [slice(0, len(rows))]
        return list(query_parts(rows, copies))

    def _rank_in_one_scan(
        self, rows: np.ndarray, preconditioner: Preconditioner, dampings: Sequence[float | str]
    ) -> list[Ranking]:
        """Score ``q C^-1`` of every damping by inner products, as if they were further queries."""
        chosen = preconditioner.for_layers(self.options["layers"] or preconditioner.layers)
        scan = Scan.of(self.store, self.damped_by(dampings[0]))
        scans = [replace(scan, preconditioner=chosen.with_damping(c)) for c in dampings]
        parts: list[list[tuple[TopDocuments, ...]]] = [[] for _ in dampings]
        for part in self.parts(rows, len(dampings)):
            prepared = PreparedQueries.joined(
                [x.prepare_queries(rows[part], self.head_of(part)) for x in scans]
            )
            ends = both_ends_of(scan, prepared, self.n_top, self.n_bottom, rows)
            n_scores = prepared.n_scores // len(dampings)
            for number, ends_of_damping in enumerate(parts):
                span = slice(number * n_scores, (number + 1) * n_scores)
                ends_of_damping.append(
                    tuple(TopDocuments(x.ids[span], x.scores[span], x.n_scored) for x in ends)
                )
        return [
            Ranking(damping, *(concatenate(end) for end in zip(*ends, strict=True)))
            for damping, ends in zip(dampings, parts, strict=True)
        ]

    def _scan(self, rows: np.ndarray, options: ScanOptions) -> tuple[TopDocuments, TopDocuments]:
        ends = []
        for part in self.parts(rows):
            of_part: ScanOptions = {**options, "head": self.head_of(part)}
            ends.append(
                top_and_bottom(rows[part], self.store, self.n_top, self.n_bottom, **of_part)
            )
        top, bottom = (concatenate(end) for end in zip(*ends, strict=True))
        return top, bottom


def query_parts(rows: np.ndarray, copies: int = 1) -> Iterator[slice]:
    """Yield the spans of queries that one scan takes if each stands for ``copies`` queries."""
    step = max(1, _QUERY_BYTES_PER_SCAN // (8 * copies * rows.shape[1]))
    for first in range(0, len(rows), step):
        yield slice(first, min(first + step, len(rows)))


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
