"""Rankings of a store's documents by a gradient score and text together."""

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gradproj.analysis.ranking import Ranker, Ranking
from gradproj.analysis.score_blocks import Blocks, on_host
from gradproj.analysis.score_stream import Part, ScoreStream
from gradproj.analysis.score_types import SCORES
from gradproj.files import explain_os_errors
from gradproj.storage.contents import scratch_folder
from gradproj.text.scores import QueryText, TextScan
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
        ends = self.stream(rows, queries, damping).ends(ranker.n_top, ranker.n_bottom, path)
        return Ranking(damping if ranker.preconditioner is not None else None, *ends)

    def stream(
        self, rows: np.ndarray, queries: Sequence[QueryText], damping: float | str
    ) -> ScoreStream:
        """Return all documents' scores for query rows ``(Q, D)`` and the same queries' tokens."""
        gradients = self.gradients.stream(rows, damping)
        place = scratch_folder(self.text.index.files.folder)
        spans = self.gradients.parts(rows)

        def blocks(part: Part, span: slice) -> Blocks:
            scores = on_host(part.blocks(), gradients.device)
            others = self.text.blocks(queries[span])
            with explain_os_errors(place), tempfile.TemporaryFile(dir=place) as file:
                for first, values in sums_of_z_scores(scores, others, gradients.world, file):
                    yield first, torch.from_numpy(values)

        parts = [
            Part(part.n_scores, functools.partial(blocks, part, span))
            for part, span in zip(gradients.parts, spans, strict=True)
        ]
        return replace(gradients, parts=parts, device=torch.device("cpu"))
