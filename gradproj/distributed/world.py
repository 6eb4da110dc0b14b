"""Collectives of the ranks of a process group."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def has_process_group() -> bool:
    import torch.distributed as torch_dist

    return torch_dist.is_available() and torch_dist.is_initialized()


@dataclass(frozen=True)
class World:
    """The processes of a ``torch.distributed`` group, and this process's place among them.

    Every method but ``current`` is collective: all ranks call it, in the same order. A single
    process gets back what it gave. Nothing in the job's loop uses it.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    """A ``ProcessGroup``; None for the default one."""

    @classmethod
    def current(cls, group: Any = None) -> "World":
        """Return the ranks of the initialised process group, or one process without it."""
        import torch.distributed as torch_dist

        if not has_process_group():
            return cls()
        return cls(torch_dist.get_rank(group), torch_dist.get_world_size(group), group)

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of every rank's tensor, on this one's device."""
        import torch
        import torch.distributed as torch_dist

        if self.size == 1:
            return tensor
        device = torch.device("cuda" if torch_dist.get_backend(self.group) == "nccl" else "cpu")
        summed = tensor.to(device, copy=True)
        torch_dist.all_reduce(summed, group=self.group)
        return summed.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks."""
        import torch.distributed as torch_dist

        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch_dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        import torch.distributed as torch_dist

        if self.size == 1:
            return value
        first = 0 if self.group is None else torch_dist.get_global_rank(self.group, 0)
        values = [value]
        torch_dist.broadcast_object_list(values, src=first, group=self.group)
        return values[0]

    def barrier(self) -> None:
        import torch.distributed as torch_dist

        if self.size > 1:
            torch_dist.barrier(self.group)
