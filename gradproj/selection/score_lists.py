"""Documents of score lists, best first, by thresholds: no list of all documents is ever sorted.

A list's scores are in a file. The threshold of a selection is found by counting: in a first pass
over the scores the upper 16 bits of their order, in a second one the lower 16 bits of those at the
boundary. A third pass collects the documents.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.analysis.row_blocks import SampleFilter
from gradproj.store import ProjectionStore

_BLOCK_ROWS = 2**20
"""Documents read at a time."""
_BINS = 2**16


@dataclass(frozen=True)
class Chosen:
    """Documents of a list, best first; of equal scores, the lower id comes first."""

    ids: np.ndarray
    """``(n,)`` int64."""
    scores: np.ndarray
    """``(n,)`` float32."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice | np.ndarray) -> "Chosen":
        return Chosen(self.ids[part], self.scores[part])

    def pairs(self) -> list[tuple[int, float]]:
        """Return ``(id, score)`` of each."""
        return list(zip(self.ids.tolist(), self.scores.tolist(), strict=True))


_Block = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids, keys and weights of documents."""
Weights = Callable[[int, int], np.ndarray]
"""``(first, last)`` -> what each of these documents takes of a budget, ``(n,)`` int64."""


def one_each(first: int, last: int) -> np.ndarray:
    """Return weights of a budget that counts documents."""
    return np.ones(last - first, np.int64)


def target_tokens(store: ProjectionStore) -> Weights:
    """Return weights of a budget that counts the documents' target tokens."""
    return lambda first, last: store.column("n_tokens", first, last).astype(np.int64)


class ScoreLists:
    """Lists of scores in a ``.npy`` file, and the documents that may be chosen of them.

    In memory: a byte for each document, and 12 for each chosen one while it is sorted.

    Args:
        path: ``(L, N)`` float32, NaN for documents without a score.
        allowed: ``(N,)`` bool; documents that a list has no score of are taken out of it. A caller
            may take out more at any time.
        bottom: the lowest scores are the best.
    """

    def __init__(self, path: Path, allowed: np.ndarray, bottom: bool = False) -> None:
        self._values = np.load(path, mmap_mode="r", allow_pickle=False)
        self._flip = np.uint32(0 if bottom else 0xFFFFFFFF)
        self.allowed = allowed
        for number in range(len(self)):
            for first, last in self._spans():
                allowed[first:last] &= ~np.isnan(self._values[number, first:last])

    def __len__(self) -> int:
        return len(self._values)

    def first(
        self,
        number: int,
        budget: int,
        weights: Weights = one_each,
        after: tuple[int, float] | None = None,
    ) -> Chosen:
        """Return the longest beginning of a list whose weights are at most ``budget`` together.

        Args:
            number: the list's.
            budget: in the unit of the weights.
            weights: of the documents.
            after: begin after this document of the list, ``(id, score)``.
        """

        def blocks() -> Iterator[_Block]:
            return self._blocks(number, after, weights)

        high, left = _bin_at(budget, ((keys >> 16, w) for _, keys, w in blocks()))
        low, left = _bin_at(left, (_low_bits_of(block, high) for block in blocks()))
        threshold = (high << 16) + low
        ids, keys = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for block_ids, block_keys, block_weights in blocks():
            # Of the documents at the threshold, those of the lowest ids that the budget allows.
            ties = np.flatnonzero(block_keys == threshold)
            total = np.cumsum(block_weights[ties])
            n_ties = int(np.searchsorted(total, left, side="right"))
            left = -1 if n_ties < len(ties) else left - int(total[-1:].sum())
            take = block_keys < threshold
            take[ties[:n_ties]] = True
            ids.append(block_ids[take])
            keys.append(block_keys[take])
        found = np.concatenate(ids)
        # Stable, and the ids ascend, so ties are in their order.
        found = found[np.argsort(np.concatenate(keys), kind="stable")]
        return Chosen(found, np.asarray(self._values[number][found], np.float32))

    def ranked(self, number: int, step: int) -> Iterator[tuple[int, float]]:
        """Yield ``(id, score)`` of a list, best first, without those taken out meanwhile.

        ``step`` documents are read and sorted at a time.
        """
        last = None
        while pairs := self.first(number, step, after=last).pairs():
            for sample_id, score in pairs:
                if self.allowed[sample_id]:
                    yield sample_id, score
            last = pairs[-1]

    def _keys(self, scores: np.ndarray) -> np.ndarray:
        """Return uint32 keys in int64 whose ascending order is that of the list."""
        bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
        ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
        return (ascending ^ self._flip).astype(np.int64)

    def _spans(self) -> Iterator[tuple[int, int]]:
        n = self._values.shape[1]
        return ((first, min(first + _BLOCK_ROWS, n)) for first in range(0, n, _BLOCK_ROWS))

    def _blocks(
        self, number: int, after: tuple[int, float] | None, weights: Weights
    ) -> Iterator[_Block]:
        """Yield ids, keys and weights of the documents that may be chosen, in the order of ids."""
        for first, last in self._spans():
            ids = first + np.flatnonzero(self.allowed[first:last])
            keys = self._keys(np.asarray(self._values[number, first:last], np.float32)[ids - first])
            if after is not None:
                key = self._keys(np.array([after[1]], np.float32))[0]
                later = (keys > key) | ((keys == key) & (ids > after[0]))
                ids, keys = ids[later], keys[later]
            yield ids, keys, weights(first, last)[ids - first]


def _bin_at(budget: int, parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Return the bin in which the running sum of weights exceeds a budget, and what is left there.

    The last bin, if it never does.
    """
    sums = np.zeros(_BINS, np.int64)
    for bins, weights in parts:
        sums += np.bincount(bins, weights, _BINS).astype(np.int64)
    before = np.cumsum(sums) - sums
    number = int(np.searchsorted(before + sums, budget, side="right"))
    number = min(number, _BINS - 1)
    return number, budget - int(before[number])


def _low_bits_of(block: _Block, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower bits of the keys with these upper bits, and their weights."""
    _, keys, weights = block
    at = (keys >> 16) == high
    return keys[at] & 0xFFFF, weights[at]


def allowed_documents(
    store: ProjectionStore, domains: list[str] | None, left_out: np.ndarray
) -> np.ndarray:
    """Return ``(N,)`` bool: documents with a row, of these domains, that are not left out.

    ``left_out`` holds sample ids.
    """
    allowed, is_scored = np.zeros(len(store), bool), SampleFilter(store, domains)
    for first in range(0, len(store), _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, len(store))
        allowed[first:last] = is_scored(first, store.column("status", first, last))
    allowed[left_out] = False
    return allowed
