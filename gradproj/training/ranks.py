"""The processes that train one model together, through ``torch.distributed``; alone, all of it is nothing."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradproj.distributed import Process
from gradproj.errors import ConfigError

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, ddp_info: Any) -> "Ranks":
        """From whatever a loop has: None (what ``torch.distributed`` says), a mapping, or an object.

        Raises:
            ConfigError: it names no rank or no world size, or several ranks that ``torch.distributed`` does not join.
        """
        joined = torch_dist.is_available() and torch_dist.is_initialized()
        if ddp_info is None:
            return cls(torch_dist.get_rank(), torch_dist.get_world_size()) if joined else cls()
        rank, world_size = _named(ddp_info, "rank"), _named(ddp_info, "world_size")
        if rank is None or world_size is None:
            raise ConfigError(
                f"ddp_info is {ddp_info!r}: give None, or rank and world_size (ddp_rank and ddp_world_size will do)"
            )
        ranks = cls(int(rank), int(world_size))
        if ranks.world_size > 1 and not joined:
            raise ConfigError(
                f"ddp_info names {ranks.world_size} ranks, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() first"
            )
        return ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            torch_dist.barrier()

    def total(self, *values: float) -> list[float]:
        """Each value's sum over all ranks."""
        if self.world_size == 1:
            return list(values)
        device = torch.device("cuda" if torch_dist.get_backend() == "nccl" else "cpu")
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        torch_dist.all_reduce(sums)
        return sums.tolist()

    def share(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the ranks."""
        if self.world_size == 1:
            return model
        # Buffers of causal language models are constants.
        return DistributedDataParallel(model, forward_sync_buffers=False)


def _named(info: Any, name: str) -> Any:
    for key in (name, f"ddp_{name}"):
        value = info.get(key) if isinstance(info, Mapping) else getattr(info, key, None)
        if value is not None:
            return value
    return None


@contextlib.contextmanager
def start_ranks(process: Process, device: torch.device) -> Iterator[Ranks]:
    """The ranks that a launcher started, joined while this context lasts; a process that nobody launched is alone."""
    if process.world_size == 1:
        yield Ranks()
        return
    torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield Ranks(process.rank, process.world_size)
    # Not after an error: the other ranks may wait in an exchange that this one would wait for in turn.
    torch_dist.destroy_process_group()


def without_exchange(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """For all batches of a step but the last: the ranks' gradients are exchanged once a step."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
