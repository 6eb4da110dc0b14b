"""The answer of a query command: rankings or groups, and facts about the documents listed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gradproj.analysis.ranking import Ranking
from gradproj.cli.query.groups import Grouped
from gradproj.cli.query.notebook import answer_html
from gradproj.cli.query.rescore import FirstStage
from gradproj.cli.query.subjects import Subjects
from gradproj.cli.query.summary import Summary
from gradproj.query.token_scores import TokenScores
from gradproj.store import ProjectionStore
from gradproj.store.layer_view import Sample

Columns = dict[str, dict[tuple[int, int], float]]
"""Title of a column of scores -> (number of the query, sample id) -> value."""


@dataclass(frozen=True)
class Match:
    """A passage that a document shares with a query."""

    text: str
    n_documents: int
    """Documents that hold its rarest n-gram."""
    n_tokens: int


Matches = dict[tuple[int, int], list[Match]]
"""(number of the query, sample id) -> the passages, the rarest first."""


@dataclass(frozen=True)
class Answer:
    """Rankings of all queries, or groups of documents."""

    summary: Summary
    queries: Subjects
    rankings: list[Ranking]
    """One per damping; none of groups."""
    samples: dict[int, Sample]
    """The listed documents; empty on ranks other than 0."""
    first_stage: FirstStage | None = None
    """Of a rescored answer, on rank 0."""
    columns: Columns = field(default_factory=dict)
    """Further columns of the ranked documents; empty on ranks other than 0."""
    matches: Matches | None = None
    """Passages that each ranked document shares with the query; None if it was not asked for."""
    grouped: Grouped | None = None
    """Set with ``--by``."""
    tokens: TokenScores | None = None
    """Set with ``--tokens``, on rank 0."""

    def _repr_html_(self) -> str:
        return answer_html(self)

    @property
    def dampings(self) -> list[float | str | None]:
        """The values requested; None for a score without damping."""
        if self.grouped is not None:
            return [self.grouped.damping]
        return [ranking.damping for ranking in self.rankings]


def listed_ids(rankings: Sequence[Ranking], grouped: Grouped | None) -> list[int]:
    """Return the ids of the documents that an answer lists, each once."""
    if grouped is not None:
        return grouped.listed_ids()
    ends = [end for ranking in rankings for end in (ranking.top, ranking.bottom)]
    return sorted({int(i) for end in ends for i in np.asarray(end.ids).flat})


def describe(
    store: ProjectionStore, ids: Sequence[int], read_text: Callable[[int], str] | None
) -> dict[int, Sample]:
    """Return the columns of documents, with the beginnings of their texts if wanted."""
    samples = {sample.sample_id: sample for sample in store.samples(ids)}
    if read_text is None:
        return samples
    return {i: replace(s, text=read_text(i)) for i, s in samples.items()}
