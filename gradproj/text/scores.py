"""The n-gram kernel of queries and documents, alone or beside a store.

``K(q, d)`` is the sum over the n-grams w of 1 to 4 tokens of ``c_q(w) c_d(w) ln(N / df(w) + 1)^3``
with counts c in query and document, and the document frequency df among N documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradproj.analysis import QuerySets, TopDocuments
from gradproj.analysis.row_blocks import SampleFilter, progress_bar, rank_range, scan_world
from gradproj.analysis.score_stream import Part, ScoreStream
from gradproj.model.sequences import TokenSequence, join_windows
from gradproj.store import ProjectionStore
from gradproj.text.frequencies import Frequencies, weight_of
from gradproj.text.index import TextIndex
from gradproj.text.ngrams import (
    Documents,
    thread_pool,
)

_BLOCK_SCORES = 2**22
"""Scores computed at a time, in float64: 34 MB."""


@dataclass(frozen=True)
class QueryText:
    """Token ids of a query."""

    ids: np.ndarray
    """``(S,)``, any integer type."""
    is_end: np.ndarray | None = None
    """``(S,)`` bool: n-grams count that end at these tokens; None for all."""

    @classmethod
    def of_windows(cls, windows: Sequence[TokenSequence]) -> "QueryText":
        """Return the text of a query's sequences.

        The n-grams that end at a target count, as those of a completion do; in a text without a
        prompt, all do.
        """
        whole = join_windows(windows)
        return cls(whole.ids, None if whole.is_target[1:].all() else whole.is_target)

    @property
    def ends(self) -> np.ndarray:
        """``(S,)`` bool: the tokens at which n-grams count that end there."""
        return np.ones(len(self.ids), bool) if self.is_end is None else self.is_end

    def hashes(self) -> np.ndarray:
        """Return the hashes of the n-grams that count, with repetitions, uint64."""
        from gradproj.text import loops

        return loops.ngram_hashes(self.ids.astype(np.uint32), self.ends)


class QueryNgrams:
    """The n-grams of several queries, in a table that documents are matched with."""

    def __init__(self, queries: Sequence[QueryText]) -> None:
        from gradproj.text import loops

        found = [np.unique(query.hashes(), return_counts=True) for query in queries]
        hashes, of_query = (
            np.concatenate([hashes for hashes, _ in found]),
            np.repeat(np.arange(len(queries)), [len(hashes) for hashes, _ in found]),
        )
        self.n_queries = len(queries)
        self.hashes, number = np.unique(hashes, return_inverse=True)
        order = np.argsort(number, kind="stable")
        self._queries = of_query[order]
        self._counts = np.concatenate([counts for _, counts in found])[order].astype(np.float64)
        self._starts = np.searchsorted(number[order], np.arange(len(self.hashes) + 1))
        self._table = loops.make_table(self.hashes)

    def weights(self, frequencies: Frequencies) -> np.ndarray:
        """Return ``c_q(w) ln(N / df(w) + 1)^3`` of every query's n-grams, float64."""
        counts = frequencies.counts(self.hashes)
        idf = weight_of(counts, frequencies.n_documents)
        return self._counts * np.repeat(idf, np.diff(self._starts))

    def scores(self, documents: Documents, weights: np.ndarray) -> np.ndarray:
        """Return ``K`` of documents, ``(n, Q)`` float64."""
        from gradproj.text import loops

        scores = np.zeros((len(documents), self.n_queries))
        loops.add_scores(
            documents.tokens, documents.ends, *self._table, self._starts, self._queries, weights,
            scores,
        )  # fmt: skip
        return scores

    def self_scores(self, weights: np.ndarray) -> np.ndarray:
        """Return ``K`` of every query with itself, ``(Q,)`` float64."""
        return np.bincount(self._queries, self._counts * weights, self.n_queries)

    def reassigned(self, row_of: np.ndarray, factors: np.ndarray, n_rows: int) -> np.ndarray:
        """Give each query's n-grams to its row; return what their weights are multiplied by."""
        of_ngram = factors[self._queries]
        self._queries, self.n_queries = row_of[self._queries], n_rows
        return of_ngram

    def document_counts(self, documents: Documents) -> np.ndarray:
        """Return the number of documents that hold each n-gram of ``hashes``, int64."""
        from gradproj.text import loops

        counted = np.zeros(len(self.hashes), np.int64)
        loops.document_counts(documents.tokens, documents.ends, *self._table, counted)
        return counted


class SetNgrams:
    """The n-grams of queries with their weights, or of sets of queries.

    The kernel is linear in a query's counts, so a set's mean is one list of weighted n-grams. A
    query's length in the kernel is ``sqrt(K(q, q))``.
    """

    def __init__(
        self,
        queries: Sequence[QueryText],
        frequencies: Frequencies,
        sets: QuerySets | None = None,
    ) -> None:
        self._ngrams, self._sets = QueryNgrams(queries), sets
        self._weights = self._ngrams.weights(frequencies)
        if sets is not None:
            lengths = np.sqrt(self._ngrams.self_scores(self._weights))
            factors = sets.factors(np.arange(len(queries)), lengths, is_weighted=False)
            self._weights *= self._ngrams.reassigned(sets.row_of, factors, sets.n_rows)

    def scores(self, documents: Documents) -> np.ndarray:
        """Return the scores of documents for each query, or each set: ``(Q, n)`` float64."""
        scores = self._ngrams.scores(documents, self._weights).T
        if self._sets is None:
            return scores
        return self._sets.scores(torch.from_numpy(scores)).numpy()


@dataclass(frozen=True)
class ExactFrequencies:
    """Document frequencies of the n-grams of some queries."""

    n_documents: int
    of_queries: np.ndarray
    """``(m,)``, in the order of ``QueryNgrams.hashes``."""

    def counts(self, hashes: np.ndarray) -> np.ndarray:
        assert len(hashes) == len(self.of_queries)
        return self.of_queries


def text_scores(queries: Sequence[QueryText], documents: Sequence[np.ndarray]) -> np.ndarray:
    """Return ``K`` of documents in memory with exact document frequencies, ``(Q, N)`` float64."""
    ngrams, joined = QueryNgrams(queries), Documents.of(documents)
    frequencies = ExactFrequencies(len(documents), ngrams.document_counts(joined))
    return ngrams.scores(joined, ngrams.weights(frequencies)).T


@dataclass(frozen=True)
class TextScan:
    """Scores of all documents of a store by text."""

    store: ProjectionStore
    index: TextIndex
    domains: Sequence[str] | None = None
    """Names of the domains whose documents are scored; default all."""
    together: bool = False
    """Ranks of ``torch.distributed`` share the units."""
    progress: bool = False
    sets: QuerySets | None = None
    """Score sets of the queries instead of each query."""

    def n_scores(self, queries: Sequence[QueryText]) -> int:
        """Scores of a document."""
        return len(queries) if self.sets is None else len(self.sets)

    def blocks(self, queries: Sequence[QueryText]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield this rank's share: ``(first sample id, scores (Q, n) float32)`` in id order.

        Q is the number of queries, or of sets. A document without a row, of another domain, or
        without a token has NaN.
        """
        store, scorer = self.store, SetNgrams(queries, self.index.frequencies, self.sets)
        sample_filter = SampleFilter(store, self.domains)
        world = scan_world(self.together)
        start, stop = rank_range(store, world)
        height, most = store.layout.rows_per_shard, max(1, _BLOCK_SCORES // len(queries))
        label = "text scores" if self.progress and world.rank == 0 else None
        wanted = set(self.index.files.units.tolist())
        pool, n_threads = thread_pool()
        with progress_bar(store, label, start, stop) as bar, pool:
            for first in range(start, stop, height):
                n = min(height, stop - first)
                if first // height not in wanted:
                    yield first, np.full((self.n_scores(queries), n), np.nan, np.float32)
                    continue
                unit = self.index.files.read(first // height)
                ok = sample_filter(first, store.column("status", first, first + n))
                ok &= np.diff(unit.ends) > 0
                for row in range(0, n, most):
                    documents = unit[row : row + most]
                    parts = pool.map(scorer.scores, documents.pieces(n_threads))
                    scores = np.concatenate(list(parts), axis=1).astype(np.float32)
                    scores[:, ~ok[row : row + most]] = np.nan
                    bar.update(scores.shape[1])
                    yield first + row, scores

    def rank(
        self, queries: Sequence[QueryText], n_top: int, n_bottom: int = 0
    ) -> tuple[TopDocuments, TopDocuments]:
        """Return both ends of the scores; ids and scores are numpy arrays ``(Q, k)``."""
        return self.stream(queries).ends(n_top, n_bottom)

    def stream(self, queries: Sequence[QueryText]) -> ScoreStream:
        """Return all documents' scores for these queries."""

        def blocks() -> Iterator[tuple[int, torch.Tensor]]:
            return ((first, torch.from_numpy(values)) for first, values in self.blocks(queries))

        part = Part(self.n_scores(queries), blocks)
        return ScoreStream([part], len(self.store), scan_world(self.together), torch.device("cpu"))

    def scores_at(self, queries: Sequence[QueryText], ids: np.ndarray) -> np.ndarray:
        """Return ``K`` of some documents only, ``(Q, m)`` float64; NaN without a token."""
        documents = Documents.of(self.index.files.tokens_at(ids))
        scores = SetNgrams(queries, self.index.frequencies, self.sets).scores(documents)
        scores[:, np.diff(documents.ends) == 0] = np.nan
        return scores


def text_top_k(
    store: ProjectionStore, index: TextIndex, queries: Sequence[QueryText], k: int
) -> TopDocuments:
    """Return the ``k`` documents of each query with the highest text scores."""
    return TextScan(store, index).rank(queries, k)[0]
