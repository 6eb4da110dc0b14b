"""``query --by``: groups of documents instead of single documents."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradproj.analysis.document_groups import DocumentGroups, GroupScores
from gradproj.distributed import World
from gradproj.errors import ConfigError
from gradproj.flags import Flags, flag
from gradproj.query.field_column import groups_by_field
from gradproj.store import ProjectionStore

DOMAIN = "domain"


@dataclass(frozen=True, kw_only=True)
class GroupArgs(Flags, title="groups of documents"):
    """By what documents are grouped."""

    by: str = flag(
        "Score groups of documents, by mean and standard error, instead of single documents: "
        "domain, or a field of the documents, such as meta.source. A field is read from the "
        "documents once and kept in OUTPUT/columns. --top_k and --bottom_k then count groups.",
        "",
        metavar="domain|FIELD",
    )
    by_documents: int = flag("With --by: documents listed for each group.", 3, minimum=0)

    def check_groups(self, *others: str) -> None:
        """Raise ``ConfigError`` for flags that do not go with groups; empty ones are not given."""
        given = [other for other in others if other]
        if self.by and given:
            raise ConfigError(f"--by scores groups of documents: leave {given[0]} out")
        if not self.by and self.by_documents != GroupArgs.by_documents:
            raise ConfigError("--by_documents requires --by domain or --by FIELD")

    def groups(
        self, store: ProjectionStore, shards: str, world: World, note: Callable[[str], None]
    ) -> DocumentGroups:
        """Return the groups of ``--by``; raises as ``groups_by_field``."""
        if self.by == DOMAIN:
            return DocumentGroups.of_domains(store)
        return groups_by_field(store, self.by, shards, world, note)


@dataclass(frozen=True)
class Grouped:
    """Scores of groups, and how many of them are listed."""

    by: str
    damping: float | str | None
    scores: GroupScores
    n_top: int
    n_bottom: int

    def ends(self, query: int) -> dict[str, np.ndarray]:
        """Return the numbers of the groups at either end, the outermost first; none twice."""
        order = self.scores.order(query)
        top = order[: self.n_top]
        return {"top": top, "bottom": order[len(top) :][::-1][: self.n_bottom]}

    def listed_ids(self) -> list[int]:
        """Return the ids of the documents that are listed with their groups."""
        ids = self.scores.ids
        listed = [
            ids[query, numbers]
            for query in range(len(ids))
            for numbers in self.ends(query).values()
        ]
        return sorted({int(i) for some in listed for i in some.flat if i >= 0})
