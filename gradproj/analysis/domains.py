"""What a store's domains have to do with each other: mean gradients, their cosines and influences, facts of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.question import SELF_SCORES, Asked, How
from gradproj.errors import ConfigError
from gradproj.store import ProjectionStore

RANK_ROWS = 256
"""Rows of a domain, drawn at random, whose effective rank is taken."""


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
    mean: np.ndarray
    """``(G, W)``: mean row."""
    cosine: np.ndarray
    """``(G, G)``: of the mean rows."""
    influence: np.ndarray
    """``(G, G)``: score of an average document of the column's domain for an average query of the row's domain;
    symmetric, in the unit of the score that was asked for."""


def domain_matrix(store: ProjectionStore, **how: Unpack[How]) -> DomainMatrix:
    """Means of every domain in one scan, in ``G W`` float64 values and the rows drawn for the ranks.

    Args:
        store: finished or not; documents without a domain or a row take no part.
        **how: see ``How``; the score is kfac, preconditioned or dot.

    Raises:
        ConfigError: another score, or a store that has no domains.
        StoreError: a store without what the score needs.
    """
    if not store.domains:
        raise ConfigError(f"{store.path} has no domains: its documents name none")
    asked = Asked.alone(store, how, "domain_matrix", SELF_SCORES)
    sums = _Sums(len(store.domains), asked.width, asked.device)
    for block in asked.blocks():
        first, last = block.first, block.first + len(block.ok)
        columns = {name: store.column(name, first, last)[block.ok] for name in ("domain", "loss", "n_tokens")}
        sums.add(block.ids(), block.ok_rows(), columns)
    count = sums.count
    mean = torch.where(count[:, None] > 0, sums.rows / count[:, None], torch.nan).cpu()
    turned = mean if asked.preconditioner is None else asked.preconditioner.solve(mean)
    unit = mean / mean.norm(dim=1, keepdim=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        loss, grad_norm = sums.loss / sums.n_tokens, sums.norm / count.cpu().numpy()
    return DomainMatrix(
        names=list(store.domains),
        n_rows=count.cpu().numpy(),
        n_tokens=sums.n_tokens,
        loss=loss,
        grad_norm=grad_norm,
        effective_rank=np.array([drawn.effective_rank() for drawn in sums.drawn]),
        mean=mean.numpy(),
        cosine=(unit @ unit.T).numpy(),
        influence=(turned @ mean.T).numpy(),
    )


class _Sums:
    """Everything that is summed by domain while the rows stream by."""

    def __init__(self, n_domains: int, width: int, device: torch.device) -> None:
        self.count = torch.zeros(n_domains, dtype=torch.int64, device=device)
        self.rows = torch.zeros(n_domains, width, dtype=torch.float64, device=device)
        self.norm, self.loss = np.zeros(n_domains), np.zeros(n_domains)
        self.n_tokens = np.zeros(n_domains, np.int64)
        self.drawn = [_Drawn(width) for _ in range(n_domains)]

    def add(self, ids: np.ndarray, rows: Tensor, columns: dict[str, np.ndarray]) -> None:
        finite = torch.isfinite(rows).all(dim=1)  # a shard may be gone whose rows are recorded as ok
        keep = finite.cpu().numpy() & (columns["domain"] >= 0)
        ids, rows = ids[keep], rows[torch.from_numpy(keep).to(rows.device)]
        domain = columns["domain"][keep].astype(np.int64)
        where = torch.from_numpy(domain).to(rows.device)
        self.rows.index_add_(0, where, rows.double())
        self.count += torch.bincount(where, minlength=len(self.count))
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
        tokens = columns["n_tokens"][keep]
        np.add.at(self.norm, domain, norms)
        np.add.at(self.loss, domain, columns["loss"][keep].astype(np.float64) * tokens)
        np.add.at(self.n_tokens, domain, tokens)
        for number in np.unique(domain).tolist():
            here = np.flatnonzero(domain == number)
            self.drawn[number].add(ids[here], rows, here)


class _Drawn:
    """Rows drawn at random from a stream of unknown length: those whose ids have the smallest hashes."""

    def __init__(self, width: int) -> None:
        self._hashes = np.empty(0, np.uint64)
        self._rows = torch.empty(0, width)

    def add(self, ids: np.ndarray, rows: Tensor, here: np.ndarray) -> None:
        """Samples ``ids``, whose rows are ``rows[here]``."""
        hashes = _hash(ids)
        if len(self._hashes) == RANK_ROWS:
            wanted = hashes < self._hashes.max()
            hashes, here = hashes[wanted], here[wanted]
        if not len(here):
            return
        new = rows[torch.from_numpy(here).to(rows.device)].cpu()
        self._hashes = np.concatenate([self._hashes, hashes])
        order = np.argsort(self._hashes)[:RANK_ROWS]
        self._rows = torch.cat([self._rows, new])[torch.from_numpy(order)]
        self._hashes = self._hashes[order]

    def effective_rank(self) -> float:
        rows = self._rows.double()
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
