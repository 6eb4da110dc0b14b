"""Summarises a store's columns: counts by domain and status, histograms, the largest norms.

Columns are read in blocks and a histogram counts values by a float's leading bits. Memory does not
grow with the number of documents, and a quantile is right to 0.4 %.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.coordinator.merge import wanted_units
from gradproj.corpus.index_file import load_index
from gradproj.corpus.tar.paths import INDEX_NAME
from gradproj.errors import CorpusError
from gradproj.store import STATUS, ProjectionStore

_BLOCK_ROWS = 2**18
_UNMERGED_UNITS = 32
"""Units a block, while columns come from records: the reader caches 64 of them."""
_DROPPED_BITS = 15
_N_BINS = (0x7F800000 >> _DROPPED_BITS) + 1
HISTOGRAM_COLUMNS = ("loss", "grad_norm")


@dataclass(frozen=True)
class RowCounts:
    """Counts of a store's documents by domain and status, for G domains."""

    by_status: np.ndarray
    """``(G + 1, 8)`` int64 by status code; the last row counts documents without a domain."""
    n_documents: list[int | None]
    """Documents of each domain in the corpus of the store; None if unknown."""
    is_wanted: list[bool]
    """One flag a domain: False if ``--domains`` left it out."""

    @property
    def n_rows(self) -> np.ndarray:
        """``(G,)``: documents that have a gradient."""
        return self.by_status[:-1, STATUS["ok"]]

    def total(self, status: str) -> int:
        """Return the number of documents of a status over all domains."""
        return int(self.by_status[:, STATUS[status]].sum())

    def n_missing(self, domain: int) -> int | None:
        """Return the number of a domain's documents not computed yet; None if unknown."""
        if not self.total("missing") or not self.is_wanted[domain]:
            return 0
        n_documents = self.n_documents[domain]
        return None if n_documents is None else n_documents - int(self.by_status[domain, 1:].sum())

    def without_row(self, domain: int) -> dict[str, int]:
        """Return the number of a domain's processed documents without a gradient, by status."""
        counts = ((name, code, int(self.by_status[domain, code])) for name, code in STATUS.items())
        return {name: n for name, code, n in counts if n and code > STATUS["ok"]}


def count_rows(store: ProjectionStore) -> RowCounts:
    """Count every document by domain and status."""
    n_domains, n_status = len(store.domains), len(STATUS)
    counts = np.zeros((n_domains + 1) * n_status, np.int64)
    is_wanted = _wanted_rows(store)
    for first, last, values in _blocks(store, ("domain",)):
        status, domain = values["status"].astype(np.int64), values["domain"].astype(np.int64)
        if is_wanted is not None:
            units = np.arange(first, last) // store.layout.rows_per_shard
            status[(status == STATUS["missing"]) & ~is_wanted[units]] = STATUS["not_selected"]
        store.check_domains(domain)
        domain[domain < 0] = n_domains
        counts += np.bincount(domain * n_status + status, minlength=len(counts))
    selected = store.attributes.get("identity", {}).get("--domains") or store.domains
    flags = [name in selected for name in store.domains]
    return RowCounts(counts.reshape(n_domains + 1, n_status), _documents_of(store), flags)


def _wanted_rows(store: ProjectionStore) -> np.ndarray | None:
    """Return ``(n_units,)`` bool; None if the job computes every unit."""
    if "wanted_units" not in store.attributes:
        return None
    is_wanted = np.zeros(store.layout.n_units, bool)
    is_wanted[wanted_units(store.attributes)] = True
    return None if is_wanted.all() else is_wanted


def _documents_of(store: ProjectionStore) -> list[int | None]:
    """Count documents by domain from the output's corpus index; None each if unknown."""
    unknown: list[int | None] = [None] * len(store.domains)
    try:
        index = load_index(store.path.parent / INDEX_NAME)
    except (CorpusError, OSError):
        return unknown  # not the job's store, which has an index
    tars = [tar for tar in index.tars if tar.start_id < len(store)]
    if sum(tar.n_samples for tar in tars) != len(store):
        return unknown  # --max_samples ends within a tar
    totals = dict.fromkeys(store.domains, 0)
    for tar in tars:
        for name, n in tar.domain_counts.items():
            totals[name] = totals.get(name, 0) + n
    return [totals[name] for name in store.domains]


@dataclass(frozen=True)
class Histogram:
    """Counts of non-negative numbers by their leading bits."""

    counts: np.ndarray
    """``(_N_BINS,)`` int64."""

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """Return the ``q`` quantile to 0.4 %; NaN if empty."""
        if not self.n:
            return float("nan")
        upto = np.cumsum(self.counts)
        at = int(np.searchsorted(upto, q * self.n, side="left"))
        at = max(at, int(np.flatnonzero(self.counts)[0]))
        before = int(upto[at]) - int(self.counts[at])
        low, high = _edges(np.array([at, at + 1]))
        return float(low + (high - low) * (q * self.n - before) / self.counts[at])

    def between(self, edges: np.ndarray) -> np.ndarray:
        """Return ``(len(edges) - 1,)`` counts; values are taken to be uniform within a bin."""
        upto = np.concatenate([[0], np.cumsum(self.counts)])
        return np.diff(np.interp(edges, _edges(np.arange(_N_BINS + 1)), upto))


def _edges(bins: np.ndarray) -> np.ndarray:
    """Return the lower edge of each bin."""
    clipped = np.minimum(bins.astype(np.int64) << _DROPPED_BITS, 0x7F7FFFFF)
    return clipped.astype(np.uint32).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Distributions:
    """Losses and norms of the documents that have a gradient."""

    groups: dict[str, list[Histogram]]
    """Column -> a histogram for each requested group of domains."""
    largest_ids: np.ndarray
    """``(k,)`` int64 sample ids of the largest norms, largest first."""
    largest_norms: np.ndarray
    """``(k,)`` float32."""


def distributions(store: ProjectionStore, groups: Sequence[Sequence[int]], k: int) -> Distributions:
    """Read the columns once, and keep the ``k`` documents with the largest norms.

    ``groups`` are the domain codes of each histogram; -1 is no domain. A code is in at most one.
    """
    group_of = np.full(len(store.domains) + 1, len(groups), np.int64)  # -1 is the last
    for number, codes in enumerate(groups):
        group_of[list(codes)] = number
    counts = {name: np.zeros((len(groups) + 1) * _N_BINS, np.int64) for name in HISTOGRAM_COLUMNS}
    ids, norms = np.empty(0, np.int64), np.empty(0, np.float32)
    for first, _, values in _blocks(store, ("domain", *HISTOGRAM_COLUMNS)):
        ok = values["status"] == STATUS["ok"]
        group = group_of[values["domain"][ok]]
        for name, total in counts.items():
            column = values[name][ok]
            finite = np.isfinite(column)
            bits = np.maximum(column[finite], np.float32(0)).view(np.uint32)
            bins = ((bits & 0x7FFFFFFF) >> _DROPPED_BITS).astype(np.int64)  # -0.0 is 0
            places, n_values = np.unique(group[finite] * _N_BINS + bins, return_counts=True)
            total[places] += n_values
        norm = np.where(np.isfinite(values["grad_norm"]), values["grad_norm"], -1)[ok]
        ids = np.concatenate([ids, first + np.flatnonzero(ok)])
        norms = np.concatenate([norms, norm])
        order = np.argsort(-norms, kind="stable")[:k]
        ids, norms = ids[order], norms[order]
    histograms = {
        name: [Histogram(part) for part in total.reshape(-1, _N_BINS)[: len(groups)]]
        for name, total in counts.items()
    }
    return Distributions(histograms, ids, norms)


def _blocks(
    store: ProjectionStore, names: Sequence[str]
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Yield ``(start, stop, {column: values})``; the status is always among the columns."""
    height = _BLOCK_ROWS
    if not store.attributes.get("complete"):
        height = min(height, _UNMERGED_UNITS * store.layout.rows_per_shard)
    for first in range(0, len(store), height):
        last = min(first + height, len(store))
        yield first, last, {name: store.column(name, first, last) for name in ("status", *names)}
