"""Facts of a store's domains, which the table, the PNG, the page and the JSON show."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproj.analysis import MEANINGS, SIGN, DomainMatrix, domain_matrix
from gradproj.analysis.row_blocks import chosen_layers
from gradproj.analysis.scan import ScanOptions
from gradproj.errors import StoreError
from gradproj.report.distributions import RowCounts, count_rows
from gradproj.report.number_format import json_numbers
from gradproj.store import ProjectionStore

KEYS = {
    "domains[].documents": "documents of the domain in the corpus; null if unknown",
    "domains[].rows": "documents that have a gradient; the figures below are of these",
    "domains[].missing": "documents not computed yet; null if unknown",
    "domains[].lost": "documents recorded as having a gradient whose row is damaged or gone",
    "domains[].without_row": "processed documents without a gradient, by the store's status",
    "domains[].tokens": "target tokens of the rows",
    "domains[].loss": "mean nats per target token",
    "domains[].mean_norm": "mean norm of the rows",
    "domains[].norm_of_mean": "norm of the mean row: closer to mean_norm if the rows agree",
    "domains[].effective_rank": "exponential of the entropy of the spectrum of effective_rank_rows "
    "rows, drawn at random and scaled to length 1: from 1 (all parallel) to their number",
    "domains[].effective_rank_rows": "number of rows that effective_rank is of",
    "cosine": "cosines of the domains' mean rows; rows and columns in the order of domains",
    "influence": "mean score of the column's documents for the row's documents as queries, over "
    "all pairs, on the diagonal including each document with itself; symmetric",
    "order": "positions in domains, similar ones side by side, as in the table and the figure",
    "mean_rows": "file with the mean rows: numpy (domains, values) float32, in the order of layers",
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
    """Domains, similar ones side by side."""
    options: ScanOptions
    """Arguments of the scan."""
    layers: list[str]
    missing_ranges: list[tuple[int, int]]

    @property
    def score(self) -> str:
        return self.matrix.score

    @property
    def norm_of_mean(self) -> np.ndarray:
        return np.linalg.norm(self.matrix.mean, axis=1)

    @property
    def n_rows(self) -> int:
        """Number of documents that have a gradient."""
        return self.counts.total("ok")

    @property
    def n_lost(self) -> int:
        """Number of documents recorded as having a gradient whose row is gone."""
        return max(0, self.n_rows - self.matrix.n_read)

    def largest(self, most: int) -> list[int]:
        """Return up to ``most`` domains with the most rows, in the order of ``order``."""
        by_size = sorted(self.shown, key=lambda i: -self.matrix.n_rows[i])
        return sorted(by_size[:most], key=self.order.index)

    @property
    def shown(self) -> list[int]:
        """Domains that have a row, in the order of ``order``."""
        return [i for i in self.order if self.matrix.n_rows[i]]


def by_similarity(cosine: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Order domains so that similar ones are neighbours; those without a row come last.

    Args:
        cosine: ``(G, G)``, symmetric; NaN for a domain without a row.
        sizes: ``(G,)`` rows; the end with more of them comes first.

    Returns:
        A permutation of the domains: the order of the Fiedler vector of the graph whose edge
        weights are the cosines less the smallest of them.
    """
    present = np.flatnonzero((sizes > 0) & np.isfinite(np.diagonal(cosine)))
    absent = [i for i in range(len(sizes)) if i not in set(present.tolist())]
    if len(present) < 3:
        return [*sorted(present.tolist(), key=lambda i: (-sizes[i], i)), *absent]
    edges = cosine[np.ix_(present, present)]
    edges = edges - edges.min()
    np.fill_diagonal(edges, 0)
    _, vectors = np.linalg.eigh(np.diag(edges.sum(axis=1)) - edges)
    place = vectors[:, 1]
    if (place * sizes[present]).sum() > 0:
        place = -place
    return [*present[np.argsort(place, kind="stable")].tolist(), *absent]


def lost_text(n_lost: int, output: str) -> str:
    """Return the message on recorded rows that cannot be read; empty if there are none."""
    if not n_lost:
        return ""
    return f"{n_lost:,} rows are recorded and cannot be read: python -m gradproj verify {output}"


def check_any_row_is_readable(n_read: int, counts: RowCounts, store: ProjectionStore) -> None:
    """Raise ``StoreError`` if rows are recorded and none of them can be read."""
    if counts.total("ok") and not n_read:
        lost = lost_text(counts.total("ok"), str(store.path.parent))
        raise StoreError(f"{store.path} is damaged: all {lost}")


def domain_facts(store: ProjectionStore, options: ScanOptions) -> DomainFacts:
    """Scan the columns and the rows of a store that has domains."""
    # Before the scan: rows that a running job adds meanwhile must not count as lost.
    counts = count_rows(store)
    return facts_from_matrix(store, domain_matrix(store, **options), options, counts)


def facts_from_matrix(
    store: ProjectionStore, matrix: DomainMatrix, options: ScanOptions, counts: RowCounts
) -> DomainFacts:
    """Combine a finished matrix with the counts."""
    check_any_row_is_readable(matrix.n_read, counts, store)
    return DomainFacts(
        output=str(store.path.parent),
        n_samples=len(store),
        matrix=matrix,
        counts=counts,
        order=by_similarity(matrix.cosine, matrix.n_rows),
        options=options,
        layers=chosen_layers(store, options.get("layers")),
        missing_ranges=store.missing_ranges() if counts.total("missing") else [],
    )


def as_json(facts: DomainFacts, store: ProjectionStore, mean_rows: str) -> dict[str, Any]:
    """Return the content of ``domains.json``; ``mean_rows`` names the file of the mean rows."""
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
        "damping": facts.options.get("damping"),
        "layers": [{"name": name, "shape": widths[name]} for name in facts.layers],
        "domains": [_domain(facts, i) for i in range(len(matrix.names))],
        "order": facts.order,
        "cosine": json_numbers(matrix.cosine),
        "influence": json_numbers(matrix.influence),
        "mean_rows": mean_rows,
        "keys": KEYS,
    }


def _domain(facts: DomainFacts, i: int) -> dict[str, Any]:
    matrix, counts = facts.matrix, facts.counts
    figures = (matrix.loss, matrix.grad_norm, facts.norm_of_mean, matrix.effective_rank)
    loss, norm, of_mean, rank = json_numbers([figure[i] for figure in figures])
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
