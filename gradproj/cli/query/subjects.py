"""Subjects of the lists of an answer."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Subjects:
    """Subjects of the lists of an answer: queries, or sets of them."""

    names: list[str]
    n_tokens: np.ndarray
    """``(G,)``: target tokens."""
    loss: np.ndarray
    """``(G,)``: mean nats per target token."""
    excerpts: list[str]
    """One line each; empty for a set of several queries."""
    n_queries: np.ndarray | None = None
    """``(G,)``: queries of each set; None for single queries."""
