"""Common passages of a document and a query, word for word, the rarest first.

A passage is a longest run of tokens that both hold. It is found by its rarest n-gram of the text
score, whose document frequency it shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.text.frequencies import Frequencies
from gradproj.text.index import TextIndex
from gradproj.text.ngrams import MAX_N
from gradproj.text.scores import QueryText

MOST_PASSAGES = 3


@dataclass(frozen=True)
class Passage:
    """Tokens that a document and a query have in common, one after the other."""

    tokens: np.ndarray
    """``(S,)``."""
    n_documents: int
    """Documents that hold its rarest n-gram of 1 to 4 tokens, as the text index counts them."""


@dataclass(frozen=True)
class _Ngrams:
    """The n-grams of a text with their places."""

    hashes: np.ndarray
    last: np.ndarray
    """Position of an n-gram's last token."""
    n: np.ndarray

    @classmethod
    def of(cls, text: QueryText) -> "_Ngrams":
        """Return the n-grams of a text that count, in the order of ``ngram_hashes``."""
        ends = np.flatnonzero(text.ends)
        sizes = np.minimum(MAX_N, ends + 1)
        n = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1
        return cls(text.hashes(), np.repeat(ends, sizes), n)


def common_passages(
    query: QueryText, document: np.ndarray, frequencies: Frequencies, most: int = MOST_PASSAGES
) -> list[Passage]:
    """Return at most ``most`` passages, the rarest first, that do not overlap in the document.

    Those of a single token come last: a digit or a bracket says little of where a text comes from.
    One that comes several times is returned once. ``document`` are its tokens ``(S,)``. Of a query
    with a prompt, a passage is in the completion, but for up to three tokens of the n-gram that
    found it.
    """
    asked, held = _Ngrams.of(query), _Ngrams.of(QueryText(document))
    shared = np.flatnonzero(np.isin(held.hashes, asked.hashes))
    counts = frequencies.counts(held.hashes[shared])
    n = held.n[shared]
    order = np.lexsort((held.last[shared], -n, counts, n == 1))
    passages: dict[bytes, Passage] = {}
    taken = np.zeros(len(document), bool)
    for number in order.tolist():
        at = shared[number]
        stop, start = int(held.last[at]) + 1, int(held.last[at] + 1 - held.n[at])
        if taken[start:stop].any():
            continue
        in_query = int(asked.last[np.argmax(asked.hashes == held.hashes[at])]) + 1
        begin, end = in_query - (stop - start), in_query
        while end < len(query.ids) and stop < len(document) and not taken[stop]:
            if query.ids[end] != document[stop]:
                break
            stop, end = stop + 1, end + 1
        while begin > 0 and query.ends[begin - 1] and start > 0 and not taken[start - 1]:
            if query.ids[begin - 1] != document[start - 1]:
                break
            start, begin = start - 1, begin - 1
        taken[start:stop] = True
        passage = Passage(document[start:stop], int(counts[number]))
        passages.setdefault(passage.tokens.tobytes(), passage)
        if len(passages) == most:
            break
    return list(passages.values())


def passages_of(
    index: TextIndex, query: QueryText, ids: Sequence[int] | np.ndarray
) -> dict[int, list[Passage]]:
    """Return the passages of some of a store's documents with a query, by sample id."""
    chosen = np.unique(np.asarray(ids, dtype=np.int64))
    documents = index.files.tokens_at(chosen)
    return {
        sample_id: common_passages(query, document, index.frequencies)
        for sample_id, document in zip(chosen.tolist(), documents, strict=True)
    }
