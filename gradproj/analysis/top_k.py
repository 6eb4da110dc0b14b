"""Running top-k over a stream of scores, in memory for a few times k scores."""

import torch
from torch import Tensor

from gradproj.distributed import World

_LOWEST = torch.finfo(torch.float32).min
_MIN_PENDING = 1024


class TopK:
    """The ``k`` highest scores of each query so far; ties in order of sample ids.

    Most blocks of a long scan hold no score above the current k-th. On a CPU only the scores above
    it are selected, and sorted once there are enough of them. Selecting would make a GPU wait for
    their number, so there every block is sorted.
    """

    def __init__(self, n_queries: int, k: int, device: torch.device) -> None:
        self.k, self.device = k, device
        self._ids = torch.full((n_queries, k), -1, dtype=torch.int64, device=device)
        self._values = torch.full((n_queries, k), -torch.inf, device=device)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_pending = 0
        self._lowest_kth = -torch.inf

    def add(self, first: int, values: Tensor) -> None:
        """Add scores ``(Q, n)`` of the samples ``first, first + 1, ...``; NaN means no score.

        Blocks come in the order of their samples.
        """
        if not self.k:
            return
        if values.device.type == "cpu":
            self._add_selected(first, values)
        else:
            self.add_sorting(first, values)

    def _add_selected(self, first: int, values: Tensor) -> None:
        is_full = self._lowest_kth > -torch.inf
        if is_full:
            selected = values > self._values[:, -1:]
            if not selected.any():
                return
        else:
            # There is no k-th score yet, but scores below the k-th of this block cannot count.
            values = values.clamp(min=_LOWEST).masked_fill(values.isnan(), -torch.inf)
            kth = values.topk(min(self.k, values.shape[1]), sorted=False).values.amin(
                1, keepdim=True
            )
            selected = values >= kth.clamp(min=_LOWEST)
        query, column = selected.nonzero(as_tuple=True)
        self._pending.append((query, column + first, values[query, column]))
        self._n_pending += len(query)
        if not is_full or self._n_pending >= max(4 * self._values.numel(), _MIN_PENDING):
            self._sort_pending()

    def add_entries(self, queries: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add scores ``(m, n)`` of samples ``ids (n,)``, each for its own one of many queries.

        ``queries (m, n)`` int64 says which. On a CPU. Calls come in the order of the samples.
        """
        if not self.k:
            return
        selected = values > self._values[:, -1][queries]
        row, column = selected.nonzero(as_tuple=True)
        if not len(row):
            return
        self._pending.append((queries[row, column], ids[column], values[row, column]))
        self._n_pending += len(row)
        if self._n_pending >= max(4 * self._values.numel(), _MIN_PENDING):
            self._sort_pending()

    def add_sorting(self, first: int, values: Tensor) -> None:
        """Add like ``add``, without waiting for the device: the variant for a GPU."""
        ids = torch.arange(first, first + values.shape[1], device=values.device)
        absent = values.isnan()
        self._merge(
            torch.where(absent, -1, ids), values.clamp(min=_LOWEST).masked_fill(absent, -torch.inf)
        )

    def result(self) -> tuple[Tensor, Tensor]:
        """Return ``(ids, values)``, each ``(Q, k)``, in descending order; id -1 for no score."""
        self._sort_pending()
        return self._ids, self._values

    def merged(self, world: World) -> "TopK":
        """Return the top k of all ranks' streams."""
        ids, values = self.result()
        if world.size == 1:
            return self
        whole = TopK(len(values), self.k, values.device)
        for rank_ids, rank_values in world.gather((ids.cpu(), values.cpu())):
            whole._merge(rank_ids.to(ids.device), rank_values.to(ids.device))
        return whole

    def _merge(self, ids: Tensor, values: Tensor) -> None:
        """Merge scores of every query, ``(Q, n)``, whose ids are above all earlier ones."""
        values, order = torch.cat([self._values, values], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        self._values = values[:, : self.k]
        self._ids = torch.cat([self._ids, ids], dim=1).gather(1, order[:, : self.k])

    def _sort_pending(self) -> None:
        """Sort by query, then score; a stable sort leaves ties in order of ids."""
        if not self._pending:
            return
        n_queries = len(self._values)
        current = (
            torch.arange(n_queries).repeat_interleave(self.k),
            self._ids.flatten(),
            self._values.flatten(),
        )
        parts = zip(current, *self._pending, strict=True)
        query, ids, values = (torch.cat(part) for part in parts)
        order = values.argsort(descending=True, stable=True)
        order = order[query[order].argsort(stable=True)]
        count = query.bincount(minlength=n_queries)
        best = order[(count.cumsum(0) - count)[:, None] + torch.arange(self.k)]
        self._ids, self._values = ids[best], values[best]
        self._lowest_kth = float(self._values[:, -1].min())
        self._pending, self._n_pending = [], 0
