"""Scores of all documents as a stream, and what is kept of it: both ends, groups, a file of all."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from gradproj.analysis.document_groups import DocumentGroups, GroupScores, collect_groups
from gradproj.analysis.score_blocks import Blocks, on_host
from gradproj.analysis.score_file import ScoresFile
from gradproj.analysis.scores import TopDocuments, add_all, both_ends
from gradproj.analysis.top_k import TopK
from gradproj.distributed import World

T = TypeVar("T")
_Collect = Callable[[Blocks, int, torch.device, World], T]
"""Blocks of this rank, scores of a document, device and ranks -> what every rank gets."""
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

        def collect(blocks: Blocks, n_scores: int, device: torch.device, world: World) -> Ends:
            top, bottom = (TopK(n_scores, k, device) for k in (n_top, n_bottom))
            n_scored = add_all(blocks, top, bottom)
            return both_ends(top, bottom, n_scored, np.empty(0), world)

        best, worst = (
            concatenate(end) for end in zip(*self._collected(collect, path), strict=True)
        )
        return best, worst

    def groups(self, groups: DocumentGroups, k: int, path: Path | None = None) -> GroupScores:
        """Return mean, standard error and ``k`` best documents of each group, on every rank.

        With a path, every document's score is written to a file too; raises as ``ends`` does.
        """
        collect = functools.partial(collect_groups, groups=groups, k=k)
        return GroupScores.joined(self._collected(collect, path))

    def _collected(self, collect: _Collect[T], path: Path | None) -> list[T]:
        """Return what is collected from each part, or from the file of all scores."""
        if path is None:
            return [
                collect(part.blocks(), part.n_scores, self.device, self.world)
                for part in self.parts
            ]
        world, shape = self.world, (self.n_scores, self.n_samples)
        unfinished = world.broadcast(ScoresFile.create(path, shape) if world.rank == 0 else None)
        with ScoresFile(path, unfinished, shape) as file:
            for query, first, values in self._numbered_blocks():
                file.write(query, first, values)
            file.finish()
            world.barrier()  # rank 0 reads what every rank has written
            collected = None
            if world.rank == 0:
                collected = collect(file.blocks(), shape[0], torch.device("cpu"), World())
                file.publish()
        return [world.broadcast(collected)]

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
