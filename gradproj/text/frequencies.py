"""Document frequencies of n-grams: a count sketch of fixed size, and the weight made from them."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gradproj.text.ngrams import Documents

MIN_COUNTERS = 2**16
_TOKENS_AT_ONCE = 2**20
"""Tokens of which a thread keeps the hashes, 32 bytes for each; a longer document is one piece."""


class Frequencies(Protocol):
    """Document frequencies of a corpus."""

    @property
    def n_documents(self) -> int: ...

    def counts(self, hashes: np.ndarray) -> np.ndarray:
        """Return the number of documents ``(m,)`` that hold the n-grams of these hashes."""


def weight_of(counts: np.ndarray, n_documents: int) -> np.ndarray:
    """Return ``ln(N / df + 1)^3`` of document frequencies ``(m,)``, float64.

    An n-gram of no document counts as one of one document.
    """
    return np.log(n_documents / np.maximum(counts, 1) + 1) ** 3


def n_counters(n_tokens: int, most_bytes: int) -> int:
    """Return the size of a sketch of a corpus: a power of two, 8 to 16 counters a token at most.

    ``most_bytes`` limits it.
    """
    wanted = max(MIN_COUNTERS, 8 * n_tokens)
    return 2 ** min((wanted - 1).bit_length(), max(MIN_COUNTERS, most_bytes // 4).bit_length() - 1)


@dataclass(frozen=True)
class FrequencySketch:
    """Counters that several n-grams share; an n-gram's count is the smallest of its own.

    A count is never too small. With C counters and M counts in total (4 per token at most) it is
    too large by more than ``e M N_PLACES / C`` for less than ``e^-3 = 5 %`` of the n-grams, by the
    bound of the count-min sketch (Cormode and Muthukrishnan 2005); only the smallest counters are
    raised (conservative update, Estan and Varghese 2002), so that it is far less in practice.
    """

    table: np.ndarray
    """``(C,)`` uint32."""
    n_documents: int
    """Documents of the whole corpus."""

    def counts(self, hashes: np.ndarray) -> np.ndarray:
        from gradproj.text import loops

        return loops.smallest_counts(self.table, hashes)

    def add(self, documents: Documents, pool: ThreadPoolExecutor, n_threads: int) -> None:
        """Count the n-grams of further documents. The result does not depend on the threads."""
        from gradproj.text.loops import N_SEGMENTS, count_hashes, distinct_hashes

        n_tokens = int(documents.ends[-1] - documents.ends[0])
        pieces = documents.pieces(max(n_threads, -(-n_tokens // _TOKENS_AT_ONCE)))
        edges = [N_SEGMENTS * i // n_threads for i in range(n_threads + 1)]

        def count(thread: int) -> None:
            for part in hashes:
                count_hashes(self.table, part, edges[thread], edges[thread + 1])

        for start in range(0, len(pieces), n_threads):
            chosen = pieces[start : start + n_threads]
            hashes = list(pool.map(lambda piece: distinct_hashes(piece.tokens, piece.ends), chosen))
            list(pool.map(count, range(n_threads)))

    def error_quantiles(self, quantiles: Iterable[float]) -> list[int]:
        """Return quantiles of the counts of n-grams that no document holds, which should be 0."""
        absent = np.random.default_rng(0).integers(1, 2**64, 2**16, np.uint64)
        return np.quantile(self.counts(absent), list(quantiles), method="higher").tolist()
