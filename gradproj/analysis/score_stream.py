"""Scores of all documents as a stream, and what is kept of it: both ends, or a file of all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradproj.analysis.score_blocks import Blocks, on_host
from gradproj.analysis.score_file import ScoresFile
from gradproj.analysis.scores import TopDocuments, add_all, both_ends
from gradproj.analysis.top_k import TopK
from gradproj.distributed import World

Ends = tuple[TopDocuments, TopDocuments]
"""The documents with the highest and with the lowest scores, as numpy arrays."""


@dataclass(frozen=True)
class Part:
    """Scores for some of the queries, or sets of them: one scan."""

    n_scores: int
    blocks: Callable[[], Blocks]
    """Begins the scan: this rank's share of the samples, in order."""


@dataclass(frozen=True)
class ScoreStream:
    """Scores of all documents of a store, in bounded memory, by gradients, text or both."""

    parts: Sequence[Part]
    n_samples: int
    world: World
    device: torch.device

    @property
    def n_scores(self) -> int:
        """Scores of a document: of all queries, or of all sets."""
        return sum(part.n_scores for part in self.parts)

    def ends(self, n_top: int, n_bottom: int, path: Path | None = None) -> Ends:
        """Return both ends of the scores, on every rank.

        With a path, every score is written to a file, and the documents are ranked from there.

        Raises:
            StoreError: there is no room for the file, or it cannot be created.
        """
        if path is not None:
            return self._save(path, n_top, n_bottom)
        ends = []
        for part in self.parts:
            top, bottom = (TopK(part.n_scores, k, self.device) for k in (n_top, n_bottom))
            n_scored = add_all(part.blocks(), top, bottom)
            ends.append(both_ends(top, bottom, n_scored, np.empty(0), self.world))
        best, worst = (concatenate(end) for end in zip(*ends, strict=True))
        return best, worst

    def _save(self, path: Path, n_top: int, n_bottom: int) -> Ends:
        world, shape = self.world, (self.n_scores, self.n_samples)
        unfinished = world.broadcast(ScoresFile.create(path, shape) if world.rank == 0 else None)
        with ScoresFile(path, unfinished, shape) as file:
            for query, first, values in self._numbered_blocks():
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

    def _numbered_blocks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield ``(first query, first sample, scores (q, n))``."""
        query = 0
        for part in self.parts:
            for first, values in on_host(part.blocks(), self.device):
                yield query, first, values
            query += part.n_scores


def concatenate(parts: Sequence[TopDocuments]) -> TopDocuments:
    """Join the documents of consecutive queries."""
    ids, scores = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "scores")
    )
    return TopDocuments(ids, scores, parts[0].n_scored)
