"""Rankings of a store's documents by text, and by a gradient score and text together."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.analysis import TopDocuments
from gradproj.analysis.ranking import Ranker, Ranking, concatenate, query_parts, save_and_rank
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import Scan
from gradproj.analysis.score_blocks import on_host, score_blocks
from gradproj.analysis.score_types import SCORES
from gradproj.files import explain_os_errors
from gradproj.text.scores import QueryText, TextScan, rank_blocks
from gradproj.text.z_scores import sums_of_z_scores

TEXT = "text"
WITH_TEXT = tuple(f"{name}+{TEXT}" for name in SCORES)
"""A gradient score and text together."""
MEANING = (
    "shared n-grams of 1 to 4 tokens: the sum of their counts in query and document times the cube "
    "of ln(documents / documents that hold it + 1); 0 or more, comparable within a query only"
)
MEANING_WITH_TEXT = (
    "z-scores of both, added: each less its mean over the documents compared, divided by its "
    "standard deviation; comparable within a query only"
)


@dataclass(frozen=True)
class TextRanker:
    """Ranks the documents of a store by text."""

    scan: TextScan
    n_top: int
    """Documents at the upper end, for each query."""
    n_bottom: int
    """Documents at the lower end, for each query."""

    def rank(self, queries: Sequence[QueryText], path: Path | None = None) -> Ranking:
        """Rank for queries, and write every score to a file if a path is given."""
        ends = _rank_parts(
            lambda part: self.scan.blocks(queries[part]), [slice(0, len(queries))], self.scan,
            self.n_top, self.n_bottom, path,
        )  # fmt: skip
        return Ranking(None, *ends)


@dataclass(frozen=True)
class HybridRanker:
    """Ranks documents by the sum of two z-scores, of a gradient score and of text.

    Means and deviations are known after all documents. Until then the scores, 8 bytes for each
    query and document, are in a file without a name, which the system deletes whatever happens.
    """

    gradients: Ranker
    text: TextScan

    def rank(
        self,
        rows: np.ndarray,
        queries: Sequence[QueryText],
        damping: float | str,
        path: Path | None = None,
    ) -> Ranking:
        """Rank for query rows ``(Q, D)`` and the same queries' tokens.

        With a path, every score is written to a file too.
        """
        ranker = self.gradients
        scan = Scan.of(ranker.store, ranker.damped_by(damping))
        folder = self.text.index.files.folder
        place = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())

        def blocks(part: slice) -> Iterator[tuple[int, np.ndarray]]:
            prepared = scan.prepare_queries(rows[part], ranker.head_of(part))
            scores = on_host(score_blocks(scan, prepared), scan.device)
            others = self.text.blocks(queries[part])
            with explain_os_errors(place), tempfile.TemporaryFile(dir=place) as file:
                yield from sums_of_z_scores(scores, others, scan.world, file)

        parts = list(query_parts(rows))
        ends = _rank_parts(blocks, parts, self.text, ranker.n_top, ranker.n_bottom, path)
        return Ranking(damping if ranker.preconditioner is not None else None, *ends)


def _rank_parts(
    blocks_of: Callable[[slice], Iterator[tuple[int, np.ndarray]]],
    parts: Sequence[slice],
    scan: TextScan,
    n_top: int,
    n_bottom: int,
    path: Path | None,
) -> tuple[TopDocuments, TopDocuments]:
    """Rank for queries part by part, or write the scores of all and rank from the file."""
    if path is not None:
        blocks = (
            (part.start, first, values) for part in parts for first, values in blocks_of(part)
        )
        shape, world = (parts[-1].stop, len(scan.store)), scan_world(scan.together)
        return save_and_rank(path, shape, blocks, n_top, n_bottom, world)
    ends = [
        rank_blocks(blocks_of(part), part.stop - part.start, n_top, n_bottom, scan.together)
        for part in parts
    ]
    top, bottom = (concatenate(end) for end in zip(*ends, strict=True))
    return top, bottom
