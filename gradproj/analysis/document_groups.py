"""Mean scores of groups of documents, with their standard errors and their best documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.scan import Rows, Scan, ScanOptions
from gradproj.analysis.score_blocks import Blocks, on_host, score_blocks
from gradproj.analysis.top_k import TopK
from gradproj.distributed import World
from gradproj.errors import ConfigError
from gradproj.formatting import html_table, human_bytes
from gradproj.store import ProjectionStore

MAX_BYTES = 2**31
"""Most memory of the sums and best documents of all groups."""
_QUERIES_SHOWN, _GROUPS_SHOWN = 8, 40
"""Of a table in a notebook."""


@dataclass(frozen=True)
class DocumentGroups:
    """Which group each document of a store belongs to."""

    names: list[str]
    by: str
    """Origin of the groups: ``domain``, or a field of the documents."""
    numbers: Callable[[int, int], np.ndarray]
    """``(first, last)`` -> the samples' groups ``(n,)``, integers; -1 for none."""

    @classmethod
    def of_domains(cls, store: ProjectionStore) -> "DocumentGroups":
        """Return the store's domains; ``ConfigError`` if it has none."""
        if not store.domains:
            raise ConfigError(f"{store.path} has no domains: its documents name none")

        def numbers(first: int, last: int) -> np.ndarray:
            found = store.column("domain", first, last)
            store.check_domains(found)
            return found

        return cls(list(store.domains), "domain", numbers)


@dataclass(frozen=True)
class GroupScores:
    """Scores of G groups of documents for Q queries, or sets of queries."""

    names: list[str]
    n_documents: np.ndarray
    """``(G,)`` int64: documents with a score."""
    mean: np.ndarray
    """``(Q, G)`` float64: their mean score; NaN without one."""
    standard_error: np.ndarray
    """``(Q, G)`` float64: of the mean, ``s / sqrt(n)`` with the sample's deviation s; NaN for fewer
    than two documents."""
    ids: np.ndarray
    """``(Q, G, k)`` int64: the documents with the highest scores; -1 where there are fewer."""
    scores: np.ndarray
    """``(Q, G, k)`` float32: their scores."""
    n_scored: int
    """Documents with a score, in a group or in none."""

    def _repr_html_(self) -> str:
        tables = []
        for query in range(min(len(self.mean), _QUERIES_SHOWN)):
            facts = self.mean[query], self.standard_error[query], self.n_documents
            rows = [(self.names[n], *(x[n] for x in facts)) for n in self.order(query).tolist()]
            headings = ("group", "mean", "standard error", "documents")
            tables.append(html_table(headings, rows[:_GROUPS_SHOWN], f"query {query}"))
        return "".join(tables)

    @classmethod
    def joined(cls, parts: Sequence["GroupScores"]) -> "GroupScores":
        """Return the scores of consecutive queries."""
        names = ("mean", "standard_error", "ids", "scores")
        whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(parts[0].names, parts[0].n_documents, **whole, n_scored=parts[0].n_scored)

    def order(self, query: int) -> np.ndarray:
        """Return the groups with a document by descending mean, int64."""
        found = np.flatnonzero(self.n_documents)
        return found[np.argsort(-self.mean[query, found], kind="stable")]


def group_scores(
    query_rows: Rows,
    store: ProjectionStore,
    groups: DocumentGroups | None = None,
    k: int = 3,
    **options: Unpack[ScanOptions],
) -> GroupScores:
    """Score groups of documents in one scan: mean, standard error and the ``k`` best documents.

    Args:
        query_rows: as for ``score``.
        store: finished or not.
        groups: default: the store's domains.
        k: best documents of each group.
        **options: see ``ScanOptions``.

    Raises:
        ConfigError: no domains, or groups and queries whose sums take too much memory.
    """
    scan = Scan.of(store, options)
    prepared = scan.prepare_queries(query_rows)
    chosen = groups or DocumentGroups.of_domains(store)
    blocks = score_blocks(scan, prepared)
    return collect_groups(blocks, prepared.n_scores, scan.device, scan.world, chosen, k)


def collect_groups(
    blocks: Blocks,
    n_scores: int,
    device: torch.device,
    world: World,
    groups: DocumentGroups,
    k: int,
) -> GroupScores:
    """Return the groups' scores from this rank's blocks, on every rank."""
    sums = _GroupSums(n_scores, groups, k)
    for first, values in on_host(blocks, device):
        sums.add(first, torch.from_numpy(values))
    return sums.result(world)


class _GroupSums:
    """Sums over the blocks of a scan, in memory for ``Q G (16 + 12 k)`` bytes."""

    def __init__(self, n_scores: int, groups: DocumentGroups, k: int) -> None:
        n_bytes = n_scores * len(groups.names) * (16 + 12 * k)
        if n_bytes > MAX_BYTES:
            raise ConfigError(
                f"{len(groups.names):,} groups by {groups.by}, for {n_scores:,} queries: their "
                f"sums take {human_bytes(n_bytes)} of memory, and the limit is "
                f"{human_bytes(MAX_BYTES)}: group by a field with fewer values, or give fewer "
                "queries"
            )
        self._groups, self._shape = groups, (n_scores, len(groups.names))
        self._n_scored = torch.zeros((), dtype=torch.int64)
        self._counts = torch.zeros(self._shape[1], dtype=torch.int64)
        self._sums = torch.zeros(self._shape[::-1], dtype=torch.float64)
        self._squares = torch.zeros_like(self._sums)
        self._best = TopK(n_scores * self._shape[1], k, torch.device("cpu"))

    def add(self, first: int, values: Tensor) -> None:
        """Add scores ``(Q, n)`` of the samples ``first, first + 1, ...``; NaN means no score."""
        scored = values.isnan().any(dim=0).logical_not()
        self._n_scored += scored.sum()
        numbers = torch.from_numpy(
            self._groups.numbers(first, first + len(scored)).astype(np.int64)
        )
        chosen = (scored & (numbers >= 0)).nonzero()[:, 0]
        if not len(chosen):
            return
        numbers, values = numbers[chosen], values[:, chosen]
        exact = values.T.double()
        self._counts.index_add_(0, numbers, torch.ones_like(numbers))
        self._sums.index_add_(0, numbers, exact)
        self._squares.index_add_(0, numbers, exact.square_())
        # Only scores that are among the best of their group so far.
        lists = numbers + self._shape[1] * torch.arange(len(values))[:, None]
        self._best.add_entries(lists, chosen + first, values)

    def result(self, world: World) -> GroupScores:
        counts = world.sum(self._counts)
        sums, squares = (world.sum(x).T.numpy() for x in (self._sums, self._squares))
        n = counts.numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = sums / n
            variance = (squares - sums * mean).clip(min=0) / (n - 1)
            error = np.where(n > 1, np.sqrt(variance / n), np.nan)
        ids, scores = (x.view(*self._shape, -1).numpy() for x in self._best.merged(world).result())
        n_scored = int(world.sum(self._n_scored))
        return GroupScores(self._groups.names, n, mean, error, ids, scores, n_scored)
