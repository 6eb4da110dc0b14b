"""What one scan of a store shows at once: its domains' matrix, and the documents that stand out by self-influence."""

from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch

from gradproj.analysis.domains import DOMAIN_SCORES, DomainMatrix, DomainSums
from gradproj.analysis.scan import SELF_SCORES, Scan, ScanOptions, self_products
from gradproj.store import ProjectionStore


@dataclass(frozen=True)
class Overview:
    """A store at a glance."""

    domains: DomainMatrix | None
    """None where the store has none."""
    ids: np.ndarray
    """``(k,)`` int64: documents with the largest self-influence, the largest first; none for cosine (all have 1)."""
    self_influence: np.ndarray
    """``(k,)`` float32: theirs."""
    n_read: int
    """Rows that were read; fewer than status ok says where shards are gone."""


def overview(store: ProjectionStore, k: int = 20, **how: Unpack[ScanOptions]) -> Overview:
    """Both in one scan, in bounded memory: a large store's rows take long to read, so they are read once.

    Args:
        store: finished or not.
        k: documents wanted; fewer where fewer have a row.
        **how: see ``ScanOptions``; the score is kfac, preconditioned, dot or cosine.

    Raises:
        ConfigError: another score.
        StoreError: a store without what the score needs.
    """
    asked = Scan.alone(store, how, "overview", DOMAIN_SCORES)
    sums = DomainSums(asked) if store.domains else None
    preconditioner, has_own = asked.for_rows(), asked.score in SELF_SCORES
    ids, values, n_read = np.empty(0, np.int64), np.empty(0, np.float32), 0
    for block in asked.blocks():
        if sums is not None:
            sums.add(block)
        else:
            norms = torch.linalg.vector_norm(block.ok_rows(), dim=1, dtype=torch.float64)
            n_read += int(torch.isfinite(norms).sum())
        if has_own:
            found = self_products(block.ok_rows(), preconditioner)
            there = (
                torch.isfinite(found).cpu().numpy()
            )  # a shard may be gone whose rows are recorded as ok
            ids = np.concatenate([ids, block.ids()[there]])
            values = np.concatenate([values, found.cpu().numpy()[there]])
            order = np.argsort(-values, kind="stable")[:k]
            ids, values = ids[order], values[order]
    domains = None if sums is None else sums.matrix()
    return Overview(domains, ids, values, n_read if domains is None else domains.n_read)
