"""What plain text says, on tokens: BM25 and n-grams in common. No model."""

from collections.abc import Sequence

import numpy as np

NGRAM = 4


def bm25(documents: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """``(Q, N)`` float32 of BM25 (bm25s' default variant, Lucene's) over token ids ``(N, S)`` and ``(Q, S)``."""
    # On use: an extra.
    import bm25s

    index = bm25s.BM25()
    index.index([[str(token) for token in ids] for ids in documents.tolist()], show_progress=False)
    # A word that comes twice in a query counts twice; tokens that no document has count nothing.
    found = [index.get_scores([str(token) for token in ids]) for ids in queries.tolist()]
    return np.stack(found).astype(np.float32)


def ngram_overlap(documents: np.ndarray, queries: np.ndarray, n: int = NGRAM) -> np.ndarray:
    """``(Q, N)`` float32: distinct n-grams of the query that the document has as well."""
    of_documents = [ngrams(ids, n) for ids in documents.tolist()]
    return np.array(
        [
            [len(own & theirs) for theirs in of_documents]
            for own in (ngrams(q, n) for q in queries.tolist())
        ],
        np.float32,
    )


def ngrams(ids: Sequence[int], n: int) -> set[tuple[int, ...]]:
    """The distinct n-grams of a text."""
    return set(zip(*(ids[i:] for i in range(n)), strict=False))
