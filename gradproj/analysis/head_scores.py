"""Scores of sparse head rows: a document's few rows against the queries' of the same tokens."""

from collections.abc import Callable

import numpy as np

from gradproj.analysis.row_blocks import SampleFilter
from gradproj.errors import ConfigError, StoreError
from gradproj.kernels.entry_products import add_entry_products
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import SCALES, HeadQueries, HeadSegment

_RUNS, _RUN_LENGTH = 32, 64
"""Runs of samples, and samples of each, that deviations are measured on."""


class HeadScorer:
    """Scores documents' head segments for all queries: ``sum_v scale_v <x_v, sign_v>``.

    The queries' rows are sorted by token, so that a document's row meets those of its token, and no
    others, in one piece of memory.
    """

    def __init__(self, queries: HeadQueries, segment: HeadSegment) -> None:
        n_queries, n_rows, k = queries.values.shape
        if k != segment.k:
            raise ConfigError(
                f"the queries' head rows have {k} values, those of the store {segment.k}: project "
                "them with the store's own settings"
            )
        self._segment, self._n_queries = segment, n_queries
        ids, values = queries.ids.ravel(), queries.values.reshape(-1, k)
        order = np.argsort(ids, kind="stable")
        self._first = np.searchsorted(ids[order], np.arange(segment.vocabulary + 1))
        self._owner = (order // n_rows).astype(np.int32)
        self._values = np.ascontiguousarray(values[order], np.float32)

    def scores(self, stored: np.ndarray) -> np.ndarray:
        """Return ``(Q, n)`` float32 of segments ``(n, n_bytes)`` uint8; NaN without a row."""
        segment = self._segment
        entries = stored.reshape(len(stored), segment.n_rows, segment.entry_bytes)
        out = np.zeros((len(stored), self._n_queries), np.float32)
        found = self._first, self._owner, self._values
        add_entry_products(entries, segment.id_bytes, SCALES, *found, out)
        return out.T


def equal_factors(
    scorer: HeadScorer,
    store: ProjectionStore,
    is_scored: SampleFilter,
    layer_scores: Callable[[int, int], np.ndarray],
    factors_of: Callable[[int, int], np.ndarray | None],
) -> np.ndarray:
    """Return what gives the head's scores the standard deviation of the layers', ``(Q, 1)``.

    Deviations are measured on up to 2,048 samples, in runs at equal steps over the store, so that
    every rank finds the same. Of these, only samples count that are scored and whose rows can be
    read. ``layer_scores`` returns the scores of ``[first, last)``, ``(Q, n)``; ``factors_of`` what
    they are multiplied by there, ``(n,)``.

    Raises:
        StoreError: fewer than two samples count.
    """
    assert store.head is not None
    layers, head = [], []
    n_runs = min(_RUNS, -(-len(store) // _RUN_LENGTH))
    for first in np.linspace(0, max(0, len(store) - _RUN_LENGTH), n_runs).astype(int).tolist():
        last = min(first + _RUN_LENGTH, len(store))
        ok = is_scored(first, store.column("status", first, last))
        factors = factors_of(first, last)
        by = 1.0 if factors is None else factors[ok]
        layers.append(layer_scores(first, last)[:, ok] * by)
        head.append(scorer.scores(store.head.stored(first, last))[:, ok] * by)
    of_both = [np.concatenate(parts, axis=1) for parts in (layers, head)]
    known = np.isfinite(of_both).all(axis=(0, 1))  # a lost row has no score
    if known.sum() < 2:
        raise StoreError(
            f"{store.path}: {known.sum()} of {known.size} sampled documents of these domains have "
            "a row that can be read, too few for the deviation of their scores: take --head_sum "
            "plain, leave --domains out, or see the damage by `gradproj verify`"
        )
    of_layers, of_head = (scores[:, known].std(axis=1, keepdims=True) for scores in of_both)
    return np.divide(of_layers, of_head, out=np.zeros_like(of_head), where=of_head > 0)
