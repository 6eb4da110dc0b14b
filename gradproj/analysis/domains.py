"""What a store's domains have to do with each other: mean gradients, their cosines and influences, facts of each."""

from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.row_blocks import Block
from gradproj.analysis.scan import SELF_SCORES, Scan, ScanOptions
from gradproj.errors import ConfigError
from gradproj.store import ProjectionStore

RANK_ROWS = 256
"""Rows of a domain, drawn at random, whose effective rank is taken; fewer where they would not fit ``DRAWN_BYTES``."""
DRAWN_BYTES = 2**29
LEAST_RANK_ROWS = 16
_CACHED_ROWS = 32
_NO_HASH = np.uint64(2**64 - 1)
DOMAIN_SCORES = (*SELF_SCORES, "cosine")
"""Scores whose mean over pairs of documents comes from one vector per domain."""


@dataclass(frozen=True)
class DomainMatrix:
    """Domains of a store, in its order; NaN where a domain has no row. G domains, W values of the layers asked for."""

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
    """``(G,)``: exponential of the entropy of the spectrum of at most ``RANK_ROWS`` rows, drawn at random and scaled to
    length 1: between 1 (all alike) and their number."""
    n_drawn: np.ndarray
    """``(G,)`` int64: how many rows those are."""
    mean: np.ndarray
    """``(G, W)``: mean row."""
    cosine: np.ndarray
    """``(G, G)``: of the mean rows."""
    influence: np.ndarray
    """``(G, G)``: mean score of the documents of the column's domain for those of the row's domain as queries, over all
    pairs; symmetric, in the unit of the score that was asked for."""
    score: str
    """What ``influence`` is a mean of."""
    n_read: int
    """Rows that were read, those of documents without a domain too; fewer than status ok says where shards are gone."""


def domain_matrix(store: ProjectionStore, **how: Unpack[ScanOptions]) -> DomainMatrix:
    """Means of every domain in one scan, in ``G W`` float64 values (2 G W for cosine) and the rows drawn for the ranks.

    Args:
        store: finished or not; documents without a domain or a row take no part.
        **how: see ``ScanOptions``; the score is kfac, preconditioned, dot or cosine.

    Raises:
        ConfigError: another score, or a store that has no domains.
        StoreError: a store without what the score needs, or with documents of domains that it does not name.
    """
    asked = Scan.alone(store, how, "domain_matrix", DOMAIN_SCORES)
    sums = DomainSums(asked)
    for block in asked.blocks():
        sums.add(block)
    return sums.matrix()


class DomainSums:
    """Everything that is summed by domain while blocks of rows stream by.

    Args:
        asked: the scan, whose blocks are given to ``add`` one after the other.

    Raises:
        ConfigError: the store has no domains.
    """

    def __init__(self, asked: Scan) -> None:
        store, width = asked.store, asked.width
        if not store.domains:
            raise ConfigError(f"{store.path} has no domains: its documents name none")
        self._asked, self._store = asked, store
        n = len(store.domains)
        self._count = np.zeros(n, np.int64)
        self._rows = torch.zeros(n, width, dtype=torch.float64, device=asked.device)
        # A mean cosine over pairs is the inner product of the mean directions.
        self._directions = torch.zeros_like(self._rows) if asked.score == "cosine" else None
        self._norm, self._loss = np.zeros(n), np.zeros(n)
        self._n_tokens = np.zeros(n, np.int64)
        most = max(LEAST_RANK_ROWS, min(RANK_ROWS, DRAWN_BYTES // (4 * width * n)))
        self._drawn = [_Drawn(width, min(most, RANK_ROWS)) for _ in range(n)]
        self._limits = np.full(n, _NO_HASH)
        self._n_read = 0

    def add(self, block: Block) -> None:
        """The next block of the scan."""
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
        n_domains = len(self._drawn)
        self._norm += np.bincount(domain[keep], norms[keep], n_domains)
        self._loss += np.bincount(domain[keep], loss * tokens, n_domains)
        self._n_tokens += np.bincount(domain[keep], tokens, n_domains).astype(np.int64)
        self._count += np.bincount(domain[keep], minlength=n_domains)
        hashes = _hash(ids)
        drawn = np.flatnonzero(keep & (hashes < self._limits[domain]))
        for number in np.unique(domain[drawn]).tolist():
            here = drawn[domain[drawn] == number]
            self._limits[number] = self._drawn[number].add(hashes[here], rows, here)

    def _add_rows(self, rows: Tensor, domain: np.ndarray) -> Tensor:
        """Sum the rows that are finite and of a domain; the norms of all, ``(n,)`` float64."""
        # A few at a time on a processor, whose cache then holds them from the first step to the last.
        size = _CACHED_ROWS if rows.device.type == "cpu" else max(len(rows), 1)
        norms = []
        for first in range(0, len(rows), size):
            exact = rows[first : first + size].double()
            norm, of_these = torch.linalg.vector_norm(exact, dim=1), domain[first : first + size]
            norms.append(norm)
            # A shard may be gone whose rows are recorded as ok.
            keep = torch.isfinite(norm).cpu().numpy() & (of_these >= 0)
            if not keep.all():
                chosen = torch.from_numpy(np.flatnonzero(keep)).to(rows.device)
                exact, norm, of_these = exact[chosen], norm[chosen], of_these[keep]
            where = torch.from_numpy(of_these).to(rows.device)
            self._rows.index_add_(0, where, exact)
            if self._directions is not None:
                exact /= torch.where(norm > 0, norm, 1.0)[:, None]
                self._directions.index_add_(0, where, exact)
        return torch.cat(norms) if norms else rows.new_zeros(0, dtype=torch.float64)

    def matrix(self) -> DomainMatrix:
        """What the blocks so far come to."""
        asked, count = self._asked, torch.from_numpy(self._count)[:, None]
        mean = torch.where(count > 0, self._rows.cpu() / count, torch.nan)
        left = right = mean
        if self._directions is not None:
            left = right = torch.where(count > 0, self._directions.cpu() / count, torch.nan)
        elif asked.preconditioner is not None:
            left = asked.preconditioner.solve(mean)
        unit = mean / mean.norm(dim=1, keepdim=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss, grad_norm = self._loss / self._n_tokens, self._norm / self._count
        return DomainMatrix(
            names=list(self._store.domains),
            n_rows=self._count,
            n_tokens=self._n_tokens,
            loss=loss,
            grad_norm=grad_norm,
            effective_rank=np.array([drawn.effective_rank() for drawn in self._drawn]),
            n_drawn=np.array([len(drawn) for drawn in self._drawn], np.int64),
            mean=mean.numpy(),
            cosine=(unit @ unit.T).numpy(),
            influence=(left @ right.T).numpy(),
            score=asked.score,
            n_read=self._n_read,
        )


class _Drawn:
    """Rows drawn at random from a stream of unknown length: those whose ids have the smallest hashes."""

    def __init__(self, width: int, most: int) -> None:
        self._width = width
        self._hashes = np.full(most, _NO_HASH)
        self._kept: Tensor | None = None

    def __len__(self) -> int:
        return int((self._hashes != _NO_HASH).sum())

    def add(self, hashes: np.ndarray, rows: Tensor, here: np.ndarray) -> np.uint64:
        """Samples with these hashes, whose rows are ``rows[here]``; the hash above which none is drawn any more."""
        most = len(self._hashes)
        smallest = np.argsort(np.concatenate([self._hashes, hashes]), kind="stable")[:most]
        new = smallest[smallest >= most] - most
        is_free = np.ones(most, bool)
        is_free[smallest[smallest < most]] = False
        free = np.flatnonzero(is_free)[: len(new)]
        if self._kept is None:
            self._kept = torch.zeros(most, self._width)
        self._kept[torch.from_numpy(free)] = rows[torch.from_numpy(here[new]).to(rows.device)].cpu()
        self._hashes[free] = hashes[new]
        return self._hashes.max()

    def effective_rank(self) -> float:
        if self._kept is None:
            return float("nan")
        rows = self._kept.double()  # a place that nobody has taken is zero
        rows = rows[rows.norm(dim=1) > 0]
        if not len(rows):
            return float("nan")
        unit = rows / rows.norm(dim=1, keepdim=True)
        shares = torch.linalg.eigvalsh(unit @ unit.T).clamp(min=0)
        shares = shares[shares > 0] / shares.sum()
        return float(torch.exp(-(shares * shares.log()).sum()))


def _hash(ids: np.ndarray) -> np.ndarray:
    """splitmix64: a fixed shuffle of the 64-bit numbers, so that the draw depends on no block size and no seed."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
