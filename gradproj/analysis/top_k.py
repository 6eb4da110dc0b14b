"""The highest scores of a stream of scores, and whose they are, in memory for a few times as many."""

import torch
from torch import Tensor

from gradproj.distributed import World

_LOWEST = torch.finfo(torch.float32).min
_LEAST_WAITING = 1024


class TopK:
    """The ``k`` highest scores of each query so far; equal ones by sample id.

    Most blocks of a long scan hold nothing better than what is known. So a processor only looks which scores are above
    the last that counts, and lets these few wait until there are enough to sort. A GPU, which would have to wait for
    the number of these few, sorts every block instead.
    """

    def __init__(self, n_queries: int, k: int, device: torch.device) -> None:
        self.k = k
        self._ids = torch.full((n_queries, k), -1, dtype=torch.int64, device=device)
        self._values = torch.full((n_queries, k), -torch.inf, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_waiting = 0
        self._last = -torch.inf

    def add(self, first: int, values: Tensor) -> None:
        """Scores ``(Q, n)`` of the samples ``first, first + 1, ...``, which follow those before; NaN is no score."""
        if not self.k:
            return
        if values.device.type == "cpu":
            self._add_better(first, values)
        else:
            self.add_sorting(first, values)

    def _add_better(self, first: int, values: Tensor) -> None:
        full = self._last > -torch.inf
        if full:
            better = values > self._values[:, -1:]
            if not better.any():
                return
        else:
            # Nothing is known to be too low yet. What is below the k-th of this block alone is.
            values = values.clamp(min=_LOWEST).masked_fill(values.isnan(), -torch.inf)
            kth = values.topk(min(self.k, values.shape[1]), sorted=False).values.amin(
                1, keepdim=True
            )
            better = values >= kth.clamp(min=_LOWEST)
        query, column = better.nonzero(as_tuple=True)
        self._waiting.append((query, column + first, values[query, column]))
        self._n_waiting += len(query)
        if not full or self._n_waiting >= max(4 * self._values.numel(), _LEAST_WAITING):
            self._settle()

    def add_sorting(self, first: int, values: Tensor) -> None:
        """As ``add``, without asking the device for anything: the way of a GPU."""
        ids = torch.arange(first, first + values.shape[1], device=values.device)
        absent = values.isnan()
        self._merge(
            torch.where(absent, -1, ids), values.clamp(min=_LOWEST).masked_fill(absent, -torch.inf)
        )

    def found(self) -> tuple[Tensor, Tensor]:
        """``(ids, values)``, each ``(Q, k)``, the highest first; -1 where there were fewer scores."""
        self._settle()
        return self._ids, self._values

    def joined(self, world: World) -> "TopK":
        """The best of all ranks."""
        ids, values = self.found()
        if world.size == 1:
            return self
        whole = TopK(len(values), self.k, values.device)
        for rank_ids, rank_values in world.gather((ids.cpu(), values.cpu())):
            whole._merge(rank_ids.to(ids.device), rank_values.to(ids.device))
        return whole

    def _merge(self, ids: Tensor, values: Tensor) -> None:
        """Scores of every query, ``(Q, n)``."""
        values, order = torch.cat([self._values, values], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        self._values = values[:, : self.k]
        self._ids = torch.cat([self._ids, ids], dim=1).gather(1, order[:, : self.k])

    def _settle(self) -> None:
        """Sort what waits: by query, then by score, then by age, which is the order of ids."""
        if not self._waiting:
            return
        n_queries = len(self._values)
        known = (
            torch.arange(n_queries).repeat_interleave(self.k),
            self._ids.flatten(),
            self._values.flatten(),
        )
        query, ids, values = (torch.cat(parts) for parts in zip(known, *self._waiting, strict=True))
        order = values.argsort(descending=True, stable=True)
        order = order[query[order].argsort(stable=True)]
        count = query.bincount(minlength=n_queries)
        kept = order[(count.cumsum(0) - count)[:, None] + torch.arange(self.k)]
        self._ids, self._values = ids[kept], values[kept]
        self._last = float(self._values[:, -1].min())
        self._waiting, self._n_waiting = [], 0
