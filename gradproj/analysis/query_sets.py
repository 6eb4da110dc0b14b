"""Sets of queries: a document's score for a set is the mean or the maximum over its queries.

A mean takes one row, since scores are linear in the query, and a maximum the rows of all queries
of the set. The mean score for a control set, one more row, is subtracted from either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gradproj.errors import ConfigError

AGGREGATES = ("none", "mean", "max")
CONTROL = -1
"""The set of a query that belongs to the control set."""
_SOLVED_BYTES = 2**29
"""Most bytes of queries that are solved at a time, in float64."""


@dataclass(frozen=True)
class QuerySets:
    """Which set each query belongs to, and how a set is scored.

    Raises:
        ConfigError: an unknown aggregate, or a set without a query.
    """

    names: list[str]
    """Of the G sets."""
    of_query: np.ndarray
    """``(Q,)`` int64: the number of each query's set, or ``CONTROL``."""
    aggregate: str = "mean"
    """mean, max, or none: every query is a set of its own."""
    unit: bool = True
    """Scale each query to unit length in the score's own metric first, ``q / sqrt(q C^-1 q)``."""
    weights: np.ndarray | None = None
    """``(Q,)``, above 0: what each query counts in its set, of unit length or not; default 1."""

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise ConfigError(
                f"aggregate is {self.aggregate!r}; choose one of {', '.join(AGGREGATES)}"
            )
        sizes, names = self.sizes, len(self.names)
        if len(sizes) != names or not names or not sizes.all() or self.of_query.min() < CONTROL:
            raise ConfigError("every set needs a query, and every query one of the named sets")
        if self.aggregate == "none" and (sizes > 1).any():
            raise ConfigError("aggregate none takes one query for each set; take mean or max")

    @classmethod
    def of_groups(
        cls,
        groups: list[str],
        n_control: int = 0,
        aggregate: str = "mean",
        unit: bool = True,
        weights: np.ndarray | None = None,
    ) -> "QuerySets":
        """Return a set for each distinct name of ``groups``, in order of appearance.

        ``groups`` names the set of every query; ``n_control`` queries of the control set follow.
        """
        names = list(dict.fromkeys(groups))
        number = {name: i for i, name in enumerate(names)}
        of_query = [number[name] for name in groups] + [CONTROL] * n_control
        return cls(names, np.array(of_query, np.int64), aggregate, unit, weights)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def sizes(self) -> np.ndarray:
        """``(G,)`` int64: queries of each set."""
        return np.bincount(self.of_query[self.of_query != CONTROL], minlength=len(self.names))

    @cached_property
    def order(self) -> np.ndarray:
        """``(Q,)`` int64: the queries set by set, those of the control set last."""
        return np.argsort(
            np.where(self.of_query == CONTROL, len(self), self.of_query), kind="stable"
        )

    @cached_property
    def row_of(self) -> np.ndarray:
        """``(Q,)`` int64: the row that each query adds to; in ``order`` it never falls."""
        row = np.where(self.of_query == CONTROL, len(self), self.of_query)
        if self.aggregate != "max":
            return row
        row = np.empty(len(self.of_query), np.int64)
        row[self.order] = np.minimum(np.arange(len(row)), self.n_rows - 1)
        return row

    @property
    def n_control(self) -> int:
        return int((self.of_query == CONTROL).sum())

    @property
    def n_rows(self) -> int:
        """Rows that are multiplied with documents, the control set's last."""
        n = int(self.sizes.sum()) if self.aggregate == "max" else len(self)
        return n + (self.n_control > 0)

    def factors(
        self, queries: np.ndarray, lengths: np.ndarray, is_weighted: bool = True
    ) -> np.ndarray:
        """Return what these queries ``(m,)`` of these lengths count in their rows, float64.

        ``is_weighted`` says that the queries' values are multiplied by their weights already.
        """
        factors = 1 / np.bincount(self.row_of)[self.row_of[queries]]
        if self.weights is not None and (self.unit or not is_weighted):
            factors *= self.weights[queries]
        if not self.unit:
            return factors
        return np.divide(factors, lengths, out=np.zeros_like(factors), where=lengths > 0)

    def scores(self, values: Tensor) -> Tensor:
        """Return the sets' scores ``(G, n)`` from those of the rows ``(R, n)``.

        With several times R rows, the sets' scores by the first R come first.
        """
        if len(values) > self.n_rows:
            return torch.cat([self.scores(part) for part in values.split(self.n_rows)])
        of_sets = values.gather(0, self.rows_that_count(values))
        return of_sets - values[-1] if self.n_control else of_sets

    def rows_that_count(self, values: Tensor) -> Tensor:
        """Return the number of the row that each set's score is from, ``(G, n)`` int64.

        ``values`` are scores of the rows ``(R, n)``; the control set's are subtracted from all.
        """
        if self.aggregate != "max":
            return torch.arange(len(self), device=values.device)[:, None].expand(
                -1, values.shape[1]
            )
        sizes = self.sizes.tolist()
        starts, of_sets = np.cumsum([0, *sizes[:-1]]).tolist(), values[: sum(sizes)].split(sizes)
        best = [x.argmax(dim=0) + first for x, first in zip(of_sets, starts, strict=True)]
        return torch.stack(best)

    def rows(
        self, solve: Callable[[np.ndarray], tuple[Tensor, np.ndarray]], width: int
    ) -> Iterator[Tensor]:
        """Yield the rows that are multiplied with documents, ``(r, W)`` float64, in order.

        ``solve`` returns, for the numbers of some queries, ``q C^-1 (m, W)`` float64 and their
        lengths ``(m,)``.
        """
        step = max(1, _SOLVED_BYTES // (8 * width))
        open_row, last = -1, torch.empty(0)
        for first in range(0, len(self.order), step):
            chosen = self.order[first : first + step]
            solved, lengths = solve(chosen)
            factors = self.factors(chosen, lengths)
            numbers = self.row_of[chosen]
            sums = solved.new_zeros(int(numbers[-1] - numbers[0]) + 1, width)
            index = torch.from_numpy(numbers - numbers[0])
            sums.index_add_(0, index, solved * torch.from_numpy(factors)[:, None])
            if open_row == numbers[0]:
                sums[0] += last
            elif open_row >= 0:
                yield last[None]
            if len(sums) > 1:
                yield sums[:-1]
            open_row, last = int(numbers[-1]), sums[-1]
        yield last[None]
