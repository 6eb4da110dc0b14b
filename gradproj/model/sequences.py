"""Token sequences and the targets in them: what documents and queries become."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np

TRUNCATE_SIDES = ("right", "left")


@dataclass(frozen=True, eq=False, slots=True)
class TokenSequence:
    """Tokens that run through the model together, with a loss on some of them.

    The row of a document is the sum over its sequences of ``factor`` times the gradient of the
    loss, summed over the targets.
    """

    ids: np.ndarray
    """``(S,)`` int64."""
    is_target: np.ndarray
    """``(S,)`` bool. The first token has no predecessor and is never a target."""
    factor: float = 1.0
    owner: int = 0
    """Number of the document."""
    places: np.ndarray | None = None
    """``(S,)`` int64: each token's place among all of its document, if they were asked for."""

    @classmethod
    def of(
        cls, ids: Sequence[int] | np.ndarray, factor: float = 1.0, owner: int = 0, first: int = 1
    ) -> Self:
        """Return a sequence whose targets are the tokens from ``first`` (at least 1) on."""
        ids = np.asarray(ids, dtype=np.int64)
        return cls(ids, np.arange(len(ids)) >= max(1, first), factor, owner)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_targets(self) -> int:
        return int(np.count_nonzero(self.is_target))

    def owned_by(self, owner: int) -> Self:
        return replace(self, owner=owner)

    def part(self, start: int, stop: int) -> Self:
        """Return the tokens ``[start, stop)``; the first of them is no target."""
        # Copies, or a part would keep all tokens of a long document in memory.
        ids, is_target = self.ids[start:stop].copy(), self.is_target[start:stop].copy()
        is_target[:1] = False
        places = None if self.places is None else self.places[start:stop].copy()
        return replace(self, ids=ids, is_target=is_target, places=places)


def split_long(
    sequence: TokenSequence,
    max_length: int,
    long_documents: str,
    truncate_side: str = "right",
    bos: int | None = None,
) -> list[TokenSequence]:
    """Return a document's parts of at most ``max_length`` tokens that have a target.

    ``truncate`` keeps one part, and cuts the document at ``truncate_side``; at the left, a first
    token ``bos`` stays. Windows overlap by one token: each starts with the last token of the
    previous one, so that every target stays one.
    """
    n = len(sequence)
    if long_documents == "windows":
        starts = range(0, n - 1, max_length - 1)
        parts = [sequence.part(start, start + max_length) for start in starts]
    elif truncate_side == "right" or n <= max_length:
        parts = [sequence.part(0, max_length)]
    elif sequence.ids[0] == bos:
        kept = np.r_[0, n - max_length + 1 : n]
        places = None if sequence.places is None else sequence.places[kept]
        ids, is_target = sequence.ids[kept], sequence.is_target[kept]
        parts = [replace(sequence, ids=ids, is_target=is_target, places=places)]
    else:
        parts = [sequence.part(n - max_length, n)]
    return [part for part in parts if part.is_target.any()]


def join_windows(windows: Sequence[TokenSequence]) -> TokenSequence:
    """Return a document's sequences as one, without the token that a window repeats."""
    ids, is_target = [windows[0].ids], [windows[0].is_target]
    for last, window in pairwise(windows):
        # One after a left-out window, or of a preference's second answer, repeats nothing.
        first = int(last.ids[-1] == window.ids[0])
        ids.append(window.ids[first:])
        is_target.append(window.is_target[first:])
    return replace(windows[0], ids=np.concatenate(ids), is_target=np.concatenate(is_target))


def targets_by_owner(sequences: Sequence[TokenSequence], n_owners: int) -> np.ndarray:
    """Return the number of targets of each owner's sequences, ``(n_owners,)`` int64."""
    counts = np.zeros(n_owners, np.int64)
    np.add.at(counts, [s.owner for s in sequences], [s.n_targets for s in sequences])
    return counts
