"""Ranks that answer one question together: each scans its share of the units, and all get the whole answer."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from gradproj.errors import ConfigError
from gradproj.store import ProjectionStore


@dataclass(frozen=True)
class Share:
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, together: bool) -> "Share":
        """What ``torch.distributed`` says, where the ranks are to work together; else all of it alone.

        Raises:
            ConfigError: together, and ``torch.distributed`` is not initialised.
        """
        if not together:
            return cls()
        if not (torch_dist.is_available() and torch_dist.is_initialized()):
            raise ConfigError(
                "together=True needs ranks that torch.distributed joins: start them by torchrun and call "
                "torch.distributed.init_process_group() first, or leave it out"
            )
        return cls(torch_dist.get_rank(), torch_dist.get_world_size())

    def samples(self, store: ProjectionStore) -> tuple[int, int]:
        """``[start, stop)`` of this rank's samples: whole units, since those are files."""
        n_units, height = store.layout.n_units, store.layout.rows_per_shard
        first, last = (n_units * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return first * height, min(last * height, len(store))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, on this one's device."""
        if self.world_size == 1:
            return tensor
        device = torch.device("cuda" if torch_dist.get_backend() == "nccl" else "cpu")
        summed = tensor.to(device, copy=True)
        torch_dist.all_reduce(summed)
        return summed.to(tensor.device)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, which is that of their samples."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(values, value)
        return values
