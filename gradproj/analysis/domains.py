"""Mean gradients of a store's domains, their cosines and influences, and outlier documents."""

from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.eigenbasis import has_weighted_rows
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.prepared_queries import self_products
from gradproj.analysis.row_blocks import Block
from gradproj.analysis.scan import Scan, ScanOptions
from gradproj.analysis.score_types import DOMAIN_SCORES, SCORES
from gradproj.errors import ConfigError
from gradproj.formatting import html_table
from gradproj.store import ProjectionStore

RANK_ROWS = 256
"""Most rows of a domain in the estimate of its effective rank; fewer to fit ``RANK_BYTES``."""
RANK_BYTES = 2**29
MIN_RANK_ROWS = 16
_CACHED_ROWS = 32
_MOST_SHOWN = 24
"""Domains of which a notebook shows matrices."""
_NO_HASH = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class DomainMatrix:
    """Statistics of G domains in store order; NaN for a domain without rows.

    W is the number of values of the chosen layers.
    """

    names: list[str]
    n_rows: np.ndarray
    """``(G,)`` int64: documents that have a row."""
    n_tokens: np.ndarray
    """``(G,)`` int64: their target tokens."""
    loss: np.ndarray
    """``(G,)``: mean nats per target token."""
    grad_norm: np.ndarray
    """``(G,)``: mean norm of the rows."""
    effective_rank: np.ndarray
    """``(G,)``: exponential of the entropy of the spectrum of a random sample of rows, each scaled
    to length 1 (plain gradients, as for the cosines); between 1 (all alike) and the number of
    rows in the sample."""
    n_drawn: np.ndarray
    """``(G,)`` int64: rows drawn for that sample, at most ``RANK_ROWS``."""
    mean: np.ndarray
    """``(G, W)``: mean row."""
    cosine: np.ndarray
    """``(G, G)``: cosines of the mean rows; of rows weighted in an eigenbasis, of the plain
    gradients that they stand for."""
    influence: np.ndarray
    """``(G, G)``: mean score over all pairs of a query from the row's domain and a document from
    the column's; symmetric, in the unit of the score."""
    score: str
    """The score that ``influence`` averages."""
    n_read: int
    """Rows that were read, including documents without a domain. Fewer than the documents of
    status ok if shards are gone."""

    def _repr_html_(self) -> str:
        numbers = list(map(str, range(len(self.names))))
        facts = self.n_rows, self.n_tokens, self.loss, self.grad_norm, self.effective_rank
        headings = ("", "domain", "rows", "tokens", "loss", "norm", "effective rank")
        tables = [html_table(headings, zip(numbers, self.names, *facts, strict=True))]
        if len(numbers) <= _MOST_SHOWN:
            for title, values in (
                ("cosines", self.cosine),
                (f"influence by {self.score}", self.influence),
            ):
                rows = [(number, *row) for number, row in zip(numbers, values, strict=True)]
                tables.append(html_table(["", *numbers], rows, title))
        return "".join(tables)


def domain_matrix(store: ProjectionStore, **options: Unpack[ScanOptions]) -> DomainMatrix:
    """Compute the statistics of every domain in one scan.

    Memory: ``G W`` float64 values (twice that for cosine), and the rows sampled for ranks.

    Args:
        store: finished or not; documents without a domain or a row are left out.
        **options: see ``ScanOptions``; the score is kfac, preconditioned, dot or cosine.

    Raises:
        ConfigError: another score, or a store without domains.
        StoreError: a store without what the score needs, or with domain numbers it does not name.
    """
    scan = Scan.alone(store, options, "domain_matrix", DOMAIN_SCORES)
    sums = DomainSums(scan)
    for block in scan.reduced_blocks():
        sums.add(block)
    return sums.matrix()


@dataclass(frozen=True)
class Overview:
    """A store's domains and its documents with the largest self-influence."""

    domains: DomainMatrix | None
    """None for a store without domains."""
    ids: np.ndarray
    """``(k,)`` int64: documents in descending order of self-influence; empty for cosine, by which
    every document scores 1 with itself."""
    self_influence: np.ndarray
    """``(k,)`` float32: their self-influence."""
    n_read: int
    """Rows that were read. Fewer than the documents of status ok if shards are gone."""


def overview(store: ProjectionStore, k: int = 20, **options: Unpack[ScanOptions]) -> Overview:
    """Compute domain statistics and outliers in one scan and in bounded memory.

    Args:
        store: finished or not.
        k: outliers wanted; fewer are returned if fewer documents have a row.
        **options: see ``ScanOptions``; the score is kfac, preconditioned, dot or cosine.

    Raises:
        ConfigError: another score.
        StoreError: a store without what the score needs.
    """
    scan = Scan.alone(store, options, "overview", DOMAIN_SCORES)
    sums = DomainSums(scan) if store.domains else None
    preconditioner = scan.row_preconditioner()
    ids, values, n_read = np.empty(0, np.int64), np.empty(0, np.float32), 0
    for block in scan.reduced_blocks():
        if sums is not None:
            sums.add(block)
        else:
            norms = torch.linalg.vector_norm(block.ok_rows(), dim=1, dtype=torch.float64)
            n_read += int(torch.isfinite(norms).sum())
        if SCORES[scan.score].is_inner_product:
            products = self_products(block.ok_rows(), preconditioner)
            # Rows recorded as ok read as NaN if their shard is gone.
            finite = torch.isfinite(products).cpu().numpy()
            ids = np.concatenate([ids, block.ids()[finite]])
            values = np.concatenate([values, products.cpu().numpy()[finite]])
            order = np.argsort(-values, kind="stable")[:k]
            ids, values = ids[order], values[order]
    domains = None if sums is None else sums.matrix()
    return Overview(domains, ids, values, n_read if domains is None else domains.n_read)


class DomainSums:
    """Sums by domain over the blocks of a scan.

    Args:
        scan: the scan whose blocks ``add`` receives, in order.

    Raises:
        ConfigError: the store has no domains.
    """

    def __init__(self, scan: Scan) -> None:
        store, width = scan.store, scan.width
        if not store.domains:
            raise ConfigError(f"{store.path} has no domains: its documents name none")
        self._scan, self._store = scan, store
        n = len(store.domains)
        self._count = np.zeros(n, np.int64)
        self._rows = torch.zeros(n, width, dtype=torch.float64, device=scan.device)
        # The mean cosine over all pairs is the inner product of the mean directions.
        by_direction = SCORES[scan.score].divisor == "norms"
        self._directions = torch.zeros_like(self._rows) if by_direction else None
        self._plain = None
        if has_weighted_rows(store):
            self._plain = Preconditioner.unweighted(store, scan.layers)
        self._norm, self._loss = np.zeros(n), np.zeros(n)
        self._n_tokens = np.zeros(n, np.int64)
        n_rank_rows = max(MIN_RANK_ROWS, min(RANK_ROWS, RANK_BYTES // (4 * width * n)))
        self._rank_rows = [_RowSample(width, min(n_rank_rows, RANK_ROWS)) for _ in range(n)]
        self._hash_limits = np.full(n, _NO_HASH)
        self._n_read = 0

    def add(self, block: Block) -> None:
        """Add the next block of the scan."""
        first, last = block.first, block.first + len(block.ok)
        columns = {
            name: self._store.column(name, first, last)[block.ok]
            for name in ("domain", "loss", "n_tokens")
        }
        ids, rows, domain = block.ids(), block.ok_rows(), columns["domain"].astype(np.int64)
        self._store.check_domains(domain)
        norms = self._add_rows(rows, domain).cpu().numpy()
        self._n_read += int(np.isfinite(norms).sum())
        keep = np.isfinite(norms) & (domain >= 0)
        tokens, loss = columns["n_tokens"][keep], columns["loss"][keep].astype(np.float64)
        n_domains = len(self._rank_rows)
        self._norm += np.bincount(domain[keep], norms[keep], n_domains)
        self._loss += np.bincount(domain[keep], loss * tokens, n_domains)
        self._n_tokens += np.bincount(domain[keep], tokens, n_domains).astype(np.int64)
        self._count += np.bincount(domain[keep], minlength=n_domains)
        hashes = _hash(ids)
        sampled = np.flatnonzero(keep & (hashes < self._hash_limits[domain]))
        for number in np.unique(domain[sampled]).tolist():
            chosen = sampled[domain[sampled] == number]
            self._hash_limits[number] = self._rank_rows[number].add(hashes[chosen], rows, chosen)

    def _add_rows(self, rows: Tensor, domain: np.ndarray) -> Tensor:
        """Sum the finite rows that have a domain; return the norms of all, ``(n,)`` float64."""
        # Few rows at a time on a CPU, so that its cache holds them through all steps.
        size = _CACHED_ROWS if rows.device.type == "cpu" else max(len(rows), 1)
        norms = []
        for first in range(0, len(rows), size):
            exact = rows[first : first + size].double()
            norm, numbers = torch.linalg.vector_norm(exact, dim=1), domain[first : first + size]
            norms.append(norm)
            # Rows recorded as ok read as NaN if their shard is gone.
            keep = torch.isfinite(norm).cpu().numpy() & (numbers >= 0)
            if not keep.all():
                chosen = torch.from_numpy(np.flatnonzero(keep)).to(rows.device)
                exact, norm, numbers = exact[chosen], norm[chosen], numbers[keep]
            index = torch.from_numpy(numbers).to(rows.device)
            self._rows.index_add_(0, index, exact)
            if self._directions is not None:
                length = norm if self._plain is None else self._plain.self_products(exact).sqrt()
                exact /= torch.where(length > 0, length, 1.0)[:, None]
                self._directions.index_add_(0, index, exact)
        return torch.cat(norms) if norms else rows.new_zeros(0, dtype=torch.float64)

    def matrix(self) -> DomainMatrix:
        """Return the statistics of the blocks added so far."""
        scan, count = self._scan, torch.from_numpy(self._count)[:, None]
        mean = torch.where(count > 0, self._rows.cpu() / count, torch.nan)
        left = right = mean
        if self._directions is not None:
            left = right = torch.where(count > 0, self._directions.cpu() / count, torch.nan)
        if scan.preconditioner is not None:
            left = scan.preconditioner.solve(left)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss, grad_norm = self._loss / self._n_tokens, self._norm / self._count
        return DomainMatrix(
            names=list(self._store.domains),
            n_rows=self._count,
            n_tokens=self._n_tokens,
            loss=loss,
            grad_norm=grad_norm,
            effective_rank=np.array(
                [sample.effective_rank(self._plain) for sample in self._rank_rows]
            ),
            n_drawn=np.array([len(sample) for sample in self._rank_rows], np.int64),
            mean=mean.numpy(),
            cosine=_cosines(mean, self._plain).numpy(),
            influence=(left @ right.T).numpy(),
            score=scan.score,
            n_read=self._n_read,
        )


class _RowSample:
    """Random sample from a stream of unknown length: the rows whose ids have the lowest hashes."""

    def __init__(self, width: int, size: int) -> None:
        self._width = width
        self._hashes = np.full(size, _NO_HASH)
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return int((self._hashes != _NO_HASH).sum())

    def add(self, hashes: np.ndarray, rows: Tensor, chosen: np.ndarray) -> np.uint64:
        """Offer the rows ``rows[chosen]`` with these hashes.

        Returns the hash from which on no row can enter the sample any more.
        """
        size = len(self._hashes)
        smallest = np.argsort(np.concatenate([self._hashes, hashes]), kind="stable")[:size]
        new = smallest[smallest >= size] - size
        is_free = np.ones(size, bool)
        is_free[smallest[smallest < size]] = False
        free = np.flatnonzero(is_free)[: len(new)]
        if self._rows is None:
            self._rows = torch.zeros(size, self._width)
        source = torch.from_numpy(chosen[new]).to(rows.device)
        self._rows[torch.from_numpy(free)] = rows[source].cpu()
        self._hashes[free] = hashes[new]
        return self._hashes.max()

    def effective_rank(self, plain: Preconditioner | None) -> float:
        if self._rows is None:
            return float("nan")
        rows = self._rows.double()
        rows = rows[rows.norm(dim=1) > 0]  # unused places are zero
        if not len(rows):
            return float("nan")
        weights = torch.linalg.eigvalsh(_cosines(rows, plain)).clamp(min=0)
        weights = weights[weights > 0] / weights.sum()
        return float(torch.exp(-(weights * weights.log()).sum()))


def _cosines(rows: Tensor, plain: Preconditioner | None) -> Tensor:
    """Return the cosines ``(n, n)`` of rows or, by ``plain``, of the gradients they stand for."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    if plain is None:
        return unit @ unit.T
    products = plain.solve(unit) @ unit.T
    norms = products.diagonal().sqrt()
    return products / norms[:, None] / norms


def _hash(ids: np.ndarray) -> np.ndarray:
    """Return splitmix64 of the ids: a fixed shuffle, so the sample needs no seed or block size."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
