"""Documents as their tokens, in pieces for threads."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_N = 4
"""Tokens of the longest n-gram."""


@dataclass(frozen=True)
class Documents:
    """Token ids of several documents, one after the other."""

    tokens: np.ndarray
    """``(T,)`` uint32."""
    ends: np.ndarray
    """``(n + 1,)`` int64: document i is ``tokens[ends[i] : ends[i + 1]]``."""

    @classmethod
    def of(cls, documents: Sequence[np.ndarray]) -> "Documents":
        """Join documents, each ``(S,)`` of any integer type."""
        ends = np.zeros(len(documents) + 1, np.int64)
        np.cumsum([len(document) for document in documents], out=ends[1:])
        tokens = np.concatenate([np.empty(0, np.uint32), *documents]).astype(np.uint32)
        return cls(tokens, ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, span: slice) -> "Documents":
        start, stop, _ = span.indices(len(self))
        return Documents(self.tokens, self.ends[start : stop + 1])

    def pieces(self, n: int) -> list["Documents"]:
        """Split into at most ``n`` runs of documents with about equally many tokens."""
        first, last = int(self.ends[0]), int(self.ends[-1])
        wanted = np.linspace(first, last, n + 1)[1:-1]
        cuts = np.unique([0, *np.searchsorted(self.ends, wanted), len(self)]).tolist()
        return [self[a:b] for a, b in pairwise(cuts)]


def thread_pool() -> tuple[ThreadPoolExecutor, int]:
    """Return threads for the compiled loops, which hold no lock, and their number."""
    n_threads = len(os.sched_getaffinity(0))
    return ThreadPoolExecutor(n_threads), n_threads
