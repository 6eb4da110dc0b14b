"""A map of documents: the plane in which a sample of rows differs most."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.scan import Scan, ScanOptions
from gradproj.analysis.score_types import DOMAIN_SCORES
from gradproj.analysis.watch import ScanProgress
from gradproj.store import STATUS, ProjectionStore

MAX_DOCUMENTS = 2_000
_BLOCK = 2**18


@dataclass(frozen=True)
class DocumentMap:
    """Places of n documents."""

    ids: np.ndarray
    """``(n,)`` int64, ascending."""
    places: np.ndarray
    """``(n, 2)`` float32: the two principal components; distances are those of unit rows."""
    explained: tuple[float, float]
    """The fraction of the squared distances that each component has."""


def document_map(
    store: ProjectionStore, n: int = MAX_DOCUMENTS, seed: int = 0, **options: Unpack[ScanOptions]
) -> DocumentMap:
    """Return the principal components of a random sample of documents.

    The rows are scaled to length 1 in the score's metric, ``r / sqrt(r C^-1 r)``, so that the map
    shows directions and not the few longest gradients. Their inner products are summed layer by
    layer, in memory for ``8 n^2`` bytes and one layer's rows; the components are the two largest
    eigenvectors of the centred products (classical scaling).

    Args:
        store: finished or not.
        n: documents in the sample; fewer if the store has fewer rows.
        seed: of the sample.
        **options: see ``ScanOptions``; the score is kfac, preconditioned, dot or cosine.

    Raises:
        ConfigError: another score, or a negative ``n``.
        StoreError: a store without what the score needs.
    """
    scan = Scan.alone(store, options, "document_map", DOMAIN_SCORES)
    ids = _sampled(store, n, seed)
    products = torch.zeros(len(ids), len(ids), dtype=torch.float64)
    with ScanProgress(len(scan.layers), what="layers") as progress:
        for of_layer in _products_by_layer(scan, ids):
            products += of_layer
            progress.update(1)
    lengths = products.diagonal().clamp(min=0).sqrt()
    # Rows recorded as ok are NaN if their shard is gone.
    there = torch.isfinite(lengths) & (lengths > 0)
    kept = there.nonzero()[:, 0]
    unit = products[kept][:, kept] / (lengths[kept, None] * lengths[kept])
    return _components(ids[kept.numpy()], unit)


def _products_by_layer(scan: Scan, ids: np.ndarray) -> Iterator[Tensor]:
    """Yield ``R C^-1 R^T (n, n)`` float64 of each layer."""
    for name in scan.layers:
        rows = torch.from_numpy(scan.store.rows(ids, [name], missing="nan"))
        solved = rows.double()
        if scan.preconditioner is not None:
            solved = scan.preconditioner.for_layers([name]).solve(solved)
        yield solved @ rows.double().T


def _sampled(store: ProjectionStore, n: int, seed: int) -> np.ndarray:
    """Return ``n`` ids of documents with a row, each set of them as likely, sorted int64."""
    generator = np.random.default_rng(seed)
    ids, keys = np.empty(0, np.int64), np.empty(0)
    for first in range(0, len(store), _BLOCK):
        status = store.column("status", first, min(first + _BLOCK, len(store)))
        found = first + np.flatnonzero(status == STATUS["ok"])
        ids, keys = (
            np.concatenate([ids, found]),
            np.concatenate([keys, generator.random(len(found))]),
        )
        best = np.argsort(keys, kind="stable")[:n]
        ids, keys = ids[best], keys[best]
    return np.sort(ids)


def _components(ids: np.ndarray, products: Tensor) -> DocumentMap:
    places, explained = np.zeros((len(ids), 2), np.float32), [0.0, 0.0]
    if len(ids) > 2:
        mean = products.mean(dim=0)
        centred = products - mean - mean[:, None] + mean.mean()
        values, vectors = torch.linalg.eigh(centred)
        total = float(values.clamp(min=0).sum()) or 1.0
        for axis in range(2):
            value, vector = float(values[-1 - axis]), vectors[:, -1 - axis]
            # A sign of an eigenvector is arbitrary: the largest entry is positive.
            vector = vector * torch.sign(vector[vector.abs().argmax()])
            places[:, axis] = (vector * max(value, 0.0) ** 0.5).numpy()
            explained[axis] = max(value, 0.0) / total
    return DocumentMap(ids, places, (explained[0], explained[1]))
