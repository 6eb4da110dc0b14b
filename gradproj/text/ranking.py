"""Rankings of a store's documents by text, and by a gradient score and text together."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.ranking import Ranker, Ranking, query_parts, save_and_rank
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import Scan
from gradproj.analysis.score_blocks import on_host, score_blocks
from gradproj.analysis.score_types import SCORES
from gradproj.distributed import World
from gradproj.text.scores import QueryText, TextScan, rank_blocks

TEXT = "text"
WITH_TEXT = tuple(f"{name}+{TEXT}" for name in SCORES)
"""A gradient score and text together."""
MEANING = (
    "shared n-grams of 1 to 4 tokens: the sum of their counts in query and document times the cube "
    "of ln(documents / documents that hold it + 1); 0 or more, comparable within a query only"
)
MEANING_WITH = (
    "z-scores of {} and of text, added: each less its mean over the documents compared, divided by "
    "its standard deviation; comparable within a query only"
)


@dataclass(frozen=True)
class TextRanker:
    """Ranks the documents of a store by text."""

    scan: TextScan
    n_top: int
    n_bottom: int

    def rank(self, queries: Sequence[QueryText]) -> Ranking:
        return Ranking(None, *self.scan.rank(queries, self.n_top, self.n_bottom))

    def rank_and_save(self, queries: Sequence[QueryText], path: Path) -> Ranking:
        """Write every score to a file too, as ``Ranker.rank_and_save`` does."""
        blocks = ((0, first, values) for first, values in self.scan.blocks(queries))
        shape, world = (len(queries), len(self.scan.store)), scan_world(self.scan.together)
        return Ranking(None, *save_and_rank(path, shape, blocks, self.n_top, self.n_bottom, world))


@dataclass(frozen=True)
class HybridRanker:
    """Ranks documents by the sum of two z-scores, of a gradient score and of text.

    Means and deviations are known after all documents. Until then the scores, 8 bytes for each
    query and document, are in a file without a name, which the system deletes whatever happens.
    """

    gradients: Ranker
    text: TextScan

    def rank(
        self, rows: np.ndarray, queries: Sequence[QueryText], damping: float | str
    ) -> Ranking:
        """Rank for query rows ``(Q, D)`` and the same queries' tokens."""
        ends = []
        for part in query_parts(rows):
            blocks = self._blocks(rows[part], queries[part], damping)
            tensors = ((first, torch.from_numpy(values)) for first, values in blocks)
            n_top, n_bottom = self.gradients.n_top, self.gradients.n_bottom
            ends.append(
                rank_blocks(
                    tensors, part.stop - part.start, n_top, n_bottom, self.text.together
                )
            )
        top, bottom = (concatenate(end) for end in zip(*ends, strict=True))
        return Ranking(self._named(damping), top, bottom)

    def rank_and_save(
        self, rows: np.ndarray, queries: Sequence[QueryText], damping: float | str, path: Path
    ) -> Ranking:
        """Write every score to a file too, as ``Ranker.rank_and_save`` does."""
        blocks = (
            (part.start, first, values)
            for part in query_parts(rows)
            for first, values in self._blocks(rows[part], queries[part], damping)
        )
        shape, world = (len(rows), len(self.text.store)), scan_world(self.text.together)
        ranker = self.gradients
        ends = save_and_rank(path, shape, blocks, ranker.n_top, ranker.n_bottom, world)
        return Ranking(self._named(damping), *ends)

    def _named(self, damping: float | str) -> float | str | None:
        return damping if self.gradients.preconditioner is not None else None

    def _blocks(
        self, rows: np.ndarray, queries: Sequence[QueryText], damping: float | str
    ) -> Iterator[tuple[int, np.ndarray]]:
        scan = Scan.of(self.text.store, self.gradients.damped_by(damping))
        scores = on_host(score_blocks(scan, scan.prepare_queries(rows)), scan.device)
        folder = self.text.index.files.folder
        with tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None) as file:
            yield from sums_of_z_scores(scores, self.text.blocks(queries), scan.world, file)
