"""Loops over documents that hash, count and score their n-grams, and the counters of a sketch.

An n-gram is a run of 1 to ``MAX_N`` token ids of one document. Its hash is built from the last
token backwards, so every n-gram's hash extends that of its own end: a document's n-gram can occur
in a query only if its ends do, which is how the loops stop early. Hashes have 64 bits; among the
10^11 n-grams of a corpus of 10^8 documents, 1 in 10^8 equals a given query's by chance.

Functions import this module when they run a loop: it loads a compiler, for which commands that read
no text need not wait.
"""

import numpy as np

from gradproj.kernels.compiled import compiled
from gradproj.text.ngrams import MAX_N

N_PLACES = 3
"""Counters of an n-gram."""
N_SEGMENTS = 64
"""Parts of the table; all counters of an n-gram lie in one, so threads can share the parts."""
_EMPTY = np.uint64(0)
_MULTIPLIERS = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
_M0, _M1, _M2 = _MULTIPLIERS
_ONE, _SHIFT = np.uint64(1), np.uint64(31)
_SEGMENT_SHIFT, _STEP_SHIFT, _ODD = np.uint64(58), np.uint64(29), np.uint64(1)
_LARGEST = np.uint32(2**32 - 1)


@compiled()
def _extended(value: np.uint64, token: np.uint32) -> np.uint64:
    """Return the hash of the n-gram that has ``token`` in front of the one hashed to ``value``."""
    # The finalizer of splitmix64.
    value = (value + np.uint64(token) + _ONE) * _M0
    value = (value ^ (value >> _SHIFT)) * _M1
    value = (value ^ (value >> _SHIFT)) * _M2
    value ^= value >> _SHIFT
    return value if value != _EMPTY else _ONE  # 0 marks an empty place of a table


@compiled()
def ngram_hashes(tokens: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """Return the hashes of all n-grams that end where ``is_end``, with repetitions, uint64."""
    hashes = np.empty(MAX_N * len(tokens), np.uint64)
    n_hashes = 0
    for last in range(len(tokens)):
        if not is_end[last]:
            continue
        value = _EMPTY
        for at in range(last, max(last - MAX_N, -1), -1):
            value = _extended(value, tokens[at])
            hashes[n_hashes] = value
            n_hashes += 1
    return hashes[:n_hashes]


@compiled()
def distinct_hashes(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the hashes of the n-grams of each document, each once per document, uint64."""
    hashes = np.empty(MAX_N * (ends[-1] - ends[0]), np.uint64)
    n_hashes = 0
    seen = np.empty(0, np.uint64)
    for document in range(len(ends) - 1):
        begin, end = ends[document], ends[document + 1]
        size = 16
        while size < 2 * MAX_N * (end - begin):
            size *= 2
        if len(seen) < size:
            seen = np.empty(size, np.uint64)
        seen[:size] = _EMPTY
        mask = np.uint64(size - 1)
        for last in range(begin, end):
            value = _EMPTY
            for at in range(last, max(last - MAX_N, begin - 1), -1):
                value = _extended(value, tokens[at])
                place = value & mask
                while seen[place] != _EMPTY and seen[place] != value:
                    place = (place + _ONE) & mask
                if seen[place] == _EMPTY:
                    seen[place] = value
                    hashes[n_hashes] = value
                    n_hashes += 1
    return hashes[:n_hashes]


@compiled()
def make_table(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash table ``(keys, numbers)`` from each of the distinct hashes to its number."""
    size = 16
    while size < 2 * len(hashes):
        size *= 2
    keys, numbers = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    mask = np.uint64(size - 1)
    for number in range(len(hashes)):
        place = hashes[number] & mask
        while keys[place] != _EMPTY:
            place = (place + _ONE) & mask
        keys[place], numbers[place] = hashes[number], number
    return keys, numbers


@compiled()
def _count_known(
    tokens: np.ndarray,
    begin: int,
    end: int,
    keys: np.ndarray,
    numbers: np.ndarray,
    counts: np.ndarray,
    found: np.ndarray,
) -> int:
    """Count a document's n-grams that a table knows; list those with a count and return how many.

    ``counts`` is all zero before; ``found`` has room for every n-gram of the table.
    """
    mask = np.uint64(len(keys) - 1)
    n_found = 0
    for last in range(begin, end):
        value = _EMPTY
        for at in range(last, max(last - MAX_N, begin - 1), -1):
            value = _extended(value, tokens[at])
            place = value & mask
            while keys[place] != _EMPTY and keys[place] != value:
                place = (place + _ONE) & mask
            if keys[place] == _EMPTY:
                break  # a longer n-gram that ends here is not known either
            number = numbers[place]
            if counts[number] == 0:
                found[n_found] = number
                n_found += 1
            counts[number] += 1
    return n_found


@compiled()
def document_counts(
    tokens: np.ndarray, ends: np.ndarray, keys: np.ndarray, numbers: np.ndarray, counted: np.ndarray
) -> None:
    """Add to ``counted`` the number of documents that hold each n-gram of a table."""
    counts, found = np.zeros(len(counted), np.int64), np.empty(len(counted), np.int64)
    for document in range(len(ends) - 1):
        n_found = _count_known(
            tokens, ends[document], ends[document + 1], keys, numbers, counts, found
        )
        for number in found[:n_found]:
            counts[number] = 0
            counted[number] += 1


@compiled()
def add_scores(
    tokens: np.ndarray,
    ends: np.ndarray,
    keys: np.ndarray,
    numbers: np.ndarray,
    starts: np.ndarray,
    queries: np.ndarray,
    weights: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Add to ``scores (n, Q)`` each document's count of an n-gram times the queries' weights of it.

    N-gram i of the table has the weights ``weights[starts[i] : starts[i + 1]]`` for ``queries`` of
    the same places.
    """
    n_known = len(starts) - 1
    counts, found = np.zeros(n_known, np.int64), np.empty(n_known, np.int64)
    for document in range(len(ends) - 1):
        n_found = _count_known(
            tokens, ends[document], ends[document + 1], keys, numbers, counts, found
        )
        for number in found[:n_found]:
            count, counts[number] = counts[number], 0
            for at in range(starts[number], starts[number + 1]):
                scores[document, queries[at]] += count * weights[at]


@compiled()
def _places(value: np.uint64, n_places: np.uint64) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Return the first counter of a hash's segment, and its first place and step in there."""
    base = (value >> _SEGMENT_SHIFT) * n_places
    return base, value, (value >> _STEP_SHIFT) | _ODD


@compiled()
def count_hashes(table: np.ndarray, hashes: np.ndarray, first: int, stop: int) -> None:
    """Count the n-grams of the segments ``[first, stop)``."""
    n_places = np.uint64(len(table) // N_SEGMENTS)
    mask = n_places - _ODD
    for value in hashes:
        if not first <= np.int64(value >> _SEGMENT_SHIFT) < stop:
            continue
        base, place, step = _places(value, n_places)
        smallest = _LARGEST
        for i in range(N_PLACES):
            smallest = min(smallest, table[base + ((place + np.uint64(i) * step) & mask)])
        if smallest == _LARGEST:
            continue
        for i in range(N_PLACES):
            at = base + ((place + np.uint64(i) * step) & mask)
            table[at] = max(table[at], smallest + np.uint32(1))


@compiled()
def smallest_counts(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return the count of each hash, int64."""
    n_places = np.uint64(len(table) // N_SEGMENTS)
    mask = n_places - _ODD
    counts = np.empty(len(hashes), np.int64)
    for number in range(len(hashes)):
        base, place, step = _places(hashes[number], n_places)
        smallest = _LARGEST
        for i in range(N_PLACES):
            smallest = min(smallest, table[base + ((place + np.uint64(i) * step) & mask)])
        counts[number] = smallest
    return counts
