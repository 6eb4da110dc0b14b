"""Everything that is known of a store's domains, in one object: for the table, the figure, the page and JSON."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproj.analysis import MEANINGS, SIGN, DomainMatrix, domain_matrix
from gradproj.analysis.row_blocks import chosen_layers
from gradproj.analysis.scan import ScanOptions
from gradproj.errors import StoreError
from gradproj.report.distributions import RowCounts, count_rows
from gradproj.report.number_format import listed
from gradproj.store import ProjectionStore

KEYS = {
    "domains[].documents": "documents of the domain in the corpus; null where the corpus index does not say",
    "domains[].rows": "documents that have a gradient; all figures below are of them",
    "domains[].missing": "documents still to be computed; null where that is not known",
    "domains[].lost": "documents that are recorded to have a gradient, and whose row is damaged or gone",
    "domains[].without_row": "documents that were seen and have no gradient, by the store's status",
    "domains[].tokens": "target tokens of the rows",
    "domains[].loss": "mean nats per target token",
    "domains[].mean_norm": "mean norm of the rows",
    "domains[].norm_of_mean": "norm of the mean row: beside mean_norm it says how far the rows agree",
    "domains[].effective_rank": "exponential of the entropy of the spectrum of effective_rank_rows rows, drawn at "
    "random and scaled to length 1: between 1 (all alike) and their number",
    "domains[].effective_rank_rows": "how many rows those are",
    "cosine": "cosines of the domains' mean rows; lines and columns in the order of domains",
    "influence": "mean score of the column's documents for the line's documents as queries, over all pairs, on the "
    "diagonal those of a document with itself too; symmetric",
    "order": "positions in domains along which neighbours are alike, as the table and the figure show them",
    "mean_rows": "file with the mean rows, numpy (domains, values) float32, values layer by layer as in layers",
    "null": "no number: the domain has no row",
}


@dataclass(frozen=True)
class DomainFacts:
    """A store's domains."""

    output: str
    n_samples: int
    matrix: DomainMatrix
    counts: RowCounts
    order: list[int]
    """Domains along which neighbours are alike."""
    how: ScanOptions
    """What the scan was told."""
    layers: list[str]
    missing_ranges: list[tuple[int, int]]

    @property
    def score(self) -> str:
        return self.matrix.score

    @property
    def norm_of_mean(self) -> np.ndarray:
        """``(G,)``."""
        return np.linalg.norm(self.matrix.mean, axis=1)

    @property
    def n_rows(self) -> int:
        """Documents that have a gradient."""
        return self.counts.total("ok")

    @property
    def n_lost(self) -> int:
        """Documents that are recorded to have a gradient, and whose row is not there."""
        return max(0, self.n_rows - self.matrix.n_read)

    def largest(self, most: int) -> list[int]:
        """Return the domains with the most rows, at most ``most`` of them, in order."""
        by_size = sorted(self.shown, key=lambda i: -self.matrix.n_rows[i])
        return sorted(by_size[:most], key=self.order.index)

    @property
    def shown(self) -> list[int]:
        """Domains that have a row, in order."""
        return [i for i in self.order if self.matrix.n_rows[i]]


def by_similarity(cosine: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Domains along the direction in which neighbours are most alike; those without a row come last.

    Args:
        cosine: ``(G, G)``, symmetric; NaN where a domain has no row.
        sizes: ``(G,)`` rows; the end that has more of them comes first.

    Returns:
        Every domain's number once. The order is that of the Fiedler vector of the graph whose edges are the cosines,
        counted from the least of them.
    """
    there = np.flatnonzero((sizes > 0) & np.isfinite(np.diagonal(cosine)))
    absent = [i for i in range(len(sizes)) if i not in set(there.tolist())]
    if len(there) < 3:
        return [*sorted(there.tolist(), key=lambda i: (-sizes[i], i)), *absent]
    edges = cosine[np.ix_(there, there)]
    edges = edges - edges.min()
    np.fill_diagonal(edges, 0)
    _, vectors = np.linalg.eigh(np.diag(edges.sum(axis=1)) - edges)
    place = vectors[:, 1]
    if (place * sizes[there]).sum() > 0:
        place = -place
    return [*there[np.argsort(place, kind="stable")].tolist(), *absent]


def lost_text(n_lost: int, output: str) -> str:
    """What is said of rows that are recorded and not there; empty of none."""
    if not n_lost:
        return ""
    return f"{n_lost:,} rows are recorded and cannot be read: python -m gradproj verify {output}"


def refuse_nothing(n_read: int, counts: RowCounts, store: ProjectionStore) -> None:
    """Nothing can be said of a store that has recorded rows and holds none of them; ``StoreError``."""
    if counts.total("ok") and not n_read:
        raise StoreError(
            f"{store.path} is damaged: all {lost_text(counts.total('ok'), str(store.path.parent))}"
        )


def find_facts(store: ProjectionStore, how: ScanOptions) -> DomainFacts:
    """One scan of the rows and one of the columns.

    Raises:
        ConfigError: a store without domains, an unknown layer, a damping without an inverse.
        StoreError: what the score needs is not there.
    """
    counts = count_rows(store)  # first: what a job that goes on adds meanwhile is not lost
    return facts_of(store, domain_matrix(store, **how), how, counts)


def facts_of(
    store: ProjectionStore, matrix: DomainMatrix, how: ScanOptions, counts: RowCounts
) -> DomainFacts:
    """What goes with a matrix that is there already."""
    refuse_nothing(matrix.n_read, counts, store)
    return DomainFacts(
        output=str(store.path.parent),
        n_samples=len(store),
        matrix=matrix,
        counts=counts,
        order=by_similarity(matrix.cosine, matrix.n_rows),
        how=how,
        layers=chosen_layers(store, how.get("layers")),
        missing_ranges=store.missing_ranges() if counts.total("missing") else [],
    )


def as_json(facts: DomainFacts, store: ProjectionStore, mean_rows: str) -> dict[str, Any]:
    """``domains.json``; ``mean_rows`` names the file with the mean rows."""
    matrix, counts = facts.matrix, facts.counts
    widths = {layer.name: [layer.k_o, layer.k_i] for layer in store.layers}
    return {
        "output": facts.output,
        "gradproj": importlib.metadata.version("gradproj"),
        "n_documents": facts.n_samples,
        "n_rows": facts.n_rows,
        "n_missing": counts.total("missing"),
        "n_lost": facts.n_lost,
        "damage": lost_text(facts.n_lost, facts.output) or None,
        "missing_ids": [list(span) for span in facts.missing_ranges],
        "score": facts.score,
        "meaning": MEANINGS[facts.score],
        "sign": SIGN,
        "damping": facts.how.get("damping"),
        "layers": [{"name": name, "shape": widths[name]} for name in facts.layers],
        "domains": [_domain(facts, i) for i in range(len(matrix.names))],
        "order": facts.order,
        "cosine": listed(matrix.cosine),
        "influence": listed(matrix.influence),
        "mean_rows": mean_rows,
        "keys": KEYS,
    }


def _domain(facts: DomainFacts, i: int) -> dict[str, Any]:
    matrix, counts = facts.matrix, facts.counts
    loss, norm, of_mean, rank = listed(
        [matrix.loss[i], matrix.grad_norm[i], facts.norm_of_mean[i], matrix.effective_rank[i]]
    )
    return {
        "name": matrix.names[i],
        "documents": counts.n_documents[i],
        "rows": int(matrix.n_rows[i]),
        "missing": counts.n_missing(i),
        "lost": max(0, int(counts.n_rows[i] - matrix.n_rows[i])),
        "without_row": counts.without_row(i),
        "tokens": int(matrix.n_tokens[i]),
        "loss": loss,
        "mean_norm": norm,
        "norm_of_mean": of_mean,
        "effective_rank": rank,
        "effective_rank_rows": int(matrix.n_drawn[i]),
    }
