"""Queries prepared for multiplication with rows, and sets of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.query_sets import QuerySets
from gradproj.store.head_rows import HeadQueries


@dataclass(frozen=True)
class PreparedQueries:
    """Queries ready to be multiplied with rows."""

    weights: Tensor
    """``(Q, W)`` float32, of magnitude at most 2."""
    scales: Tensor
    """``(Q,)`` float64: the factor by which each query was divided."""
    divisor: str | None
    """See ``ScoreType.divisor``."""
    preconditioner: Preconditioner | None
    """If there is a divisor: gives a row's score with itself; None for its squared norm."""
    head: HeadQueries | None = None
    """Head rows, whose scores are added."""
    sets: QuerySets | None = None
    """If the rows are those of sets: gives the sets' scores."""

    @classmethod
    def joined(cls, parts: Sequence["PreparedQueries"]) -> "PreparedQueries":
        """Return the rows of several, one after the other."""
        heads = [part.head for part in parts if part.head is not None]
        head = None
        if heads:
            ids, values = (
                np.concatenate([getattr(h, n) for h in heads]) for n in ("ids", "values")
            )
            head = HeadQueries(ids, values)
        weights, scales = (torch.cat([getattr(p, n) for p in parts]) for n in ("weights", "scales"))
        return replace(parts[0], weights=weights, scales=scales, head=head)

    @property
    def n_scores(self) -> int:
        """Scores of a document: of each query, or of each set."""
        if self.sets is None:
            return len(self.weights)
        return len(self.weights) // self.sets.n_rows * len(self.sets)

    @property
    def has_norms(self) -> bool:
        """True if a score is divided by a norm of the row, so that the row's scale cancels."""
        return self.divisor is not None

    def scores_of(self, rows: Tensor) -> Tensor:
        """Return the scores ``(Q, n)`` float32 of rows ``(n, W)``."""
        return self.finish(self.weights @ rows.T, self.norms_of(rows))

    def norms_of(self, rows: Tensor) -> Tensor | None:
        """Return by what the products of rows ``(n, W)`` are divided, ``(n,)``; None for 1."""
        if self.divisor is None:
            return None
        if self.preconditioner is not None:
            return self.preconditioner.self_products(rows).sqrt()
        # In float64, which the square of no float32 value overflows.
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)

    def finish(
        self, products: Tensor, norms: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        """Turn products ``(Q, n)`` of weights and rows into scores.

        They are divided by ``norms (n,)`` and multiplied by ``row_scale (n,)``.
        """
        values = products.double() * self.scales[:, None]
        if norms is not None:
            values = torch.where(norms == 0, 0.0, values / norms)
        return (values if row_scale is None else values * row_scale).float()


def self_products(rows: Tensor, preconditioner: Preconditioner | None) -> Tensor:
    """Return ``r C^-1 r`` of every row, ``(n,)``; without a preconditioner, the squared norm."""
    if preconditioner is None:
        return rows.square().sum(dim=1)
    return preconditioner.self_products(rows)
