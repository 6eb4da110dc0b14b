"""The ranks that hold one model together: their collectives, and the end of all when one ends."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gradproj.distributed.process import Process
from gradproj.distributed.rendezvous import COLLECTIVE_TIMEOUT, LOST_PEER, Rendezvous
from gradproj.errors import ConfigError, Ended

if TYPE_CHECKING:
    import numpy as np
    import torch

FOREVER = timedelta(days=365)
SPEAK_S = 2.0
"""Time for the main thread to report why it ends, before a lost rank ends the process."""


class ModelGroup:
    """Consecutive ranks that hold one model. Every method but ``watch`` is collective.

    Each raises ``Ended`` if another rank has exited, and reports it.

    The first of them, the leader, works for all as a rank of its own would. The group is this
    process's default process group: no collective spans several groups. Numbers and messages go
    through gloo, tensors of a device through that device's backend.
    """

    def __init__(self, process: Process, size: int, ranks: Rendezvous, device: "torch.device"):
        import torch.distributed as torch_dist

        self.number, self.rank = divmod(process.rank, size)
        self.size, self.first = size, process.rank - self.rank
        store = torch_dist.PrefixStore(f"model/{self.number}", ranks.store)
        torch_dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
        )
        self.data = None
        if device.type == "cuda":
            self.data = torch_dist.new_group(backend="nccl", timeout=COLLECTIVE_TIMEOUT)
        """The process group of the device's tensors; None for the default one."""
        self._watched = torch_dist.new_group(backend="gloo", timeout=FOREVER)

    @classmethod
    def join(
        cls, size: int, process: Process, ranks: Rendezvous, device: "torch.device"
    ) -> "ModelGroup | None":
        """Return this rank's group of ``size`` ranks; None if each rank has a model of its own.

        Raises:
            ConfigError: the ranks do not come out even.
        """
        if size == 1:
            return None
        if process.world_size % size:
            raise ConfigError(
                f"--ranks_per_model {size}: the job has {process.world_size} ranks, which is no "
                "multiple of it; start another number of ranks (torchrun --nproc_per_node)"
            )
        return cls(process, size, ranks, device)

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    # --- collectives ---

    def exchange(self, *numbers: int) -> "np.ndarray":
        """Return every rank's integers, ``(size, n)`` int64. Nothing waits for a device."""
        import torch
        import torch.distributed as torch_dist

        mine = torch.tensor(numbers, dtype=torch.int64)
        every = torch.empty(self.size * len(numbers), dtype=torch.int64)
        with self._needs_all():
            torch_dist.all_gather_single(every, mine)
        return every.view(self.size, len(numbers)).numpy()

    def from_leader(self, value: Any = None) -> Any:
        """Return the leader's value, a pickle, on every rank."""
        import torch.distributed as torch_dist

        values = [value]
        with self._needs_all():
            torch_dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, whole: "torch.Tensor", part: "torch.Tensor") -> Callable[[], None]:
        """Begin to put every rank's part together, in the order of ranks; return what waits for it.

        It begins after all that the device was given so far, which may read ``whole``.
        """
        import torch.distributed as torch_dist

        def wait() -> None:
            with self._needs_all():
                for work in works:
                    work.wait()

        works: list[Any]
        with self._needs_all():
            if self.data is not None:
                gathers = torch_dist.all_gather_single
                works = [gathers(whole, part, group=self.data, async_op=True)]
                return wait
            # gloo's own gather copies everything once more.
            parts = whole.view(self.size, len(part))
            parts[self.rank].copy_(part)
            works = [
                torch_dist.broadcast(each, group_src=rank, async_op=True)
                for rank, each in enumerate(parts)
            ]
        return wait

    def send(self, tensors: "Sequence[torch.Tensor]", message: Any = None) -> None:
        """Send tensors of the device, and a message, to the leader, which calls ``receive``."""
        import torch
        import torch.distributed as torch_dist

        forms = [(tuple(x.shape), x.dtype) for x in tensors]
        with self._needs_all():
            torch_dist.send_object_list([(forms, message)], dst=0)
            for tensor in tensors:
                if tensor.numel():
                    content = tensor.contiguous().view(-1).view(torch.uint8)
                    torch_dist.send(content, group_dst=0, group=self.data)

    def receive(self, rank: int, device: "torch.device") -> "tuple[list[torch.Tensor], Any]":
        """Return what a rank of the group sends to this one, the leader."""
        import torch
        import torch.distributed as torch_dist

        header: list[Any] = [None]
        with self._needs_all():
            torch_dist.recv_object_list(header, src=rank)
            (forms, message), tensors = header[0], []
            for shape, dtype in forms:
                tensor = torch.empty(shape, dtype=dtype, device=device)
                if tensor.numel():
                    content = tensor.view(-1).view(torch.uint8)
                    torch_dist.recv(content, group_src=rank, group=self.data)
                tensors.append(tensor)
        return tensors, message

    # --- the end ---

    @contextmanager
    def watch(self) -> Iterator[None]:
        """End this process when another of the group ends without having left the context.

        A thread of each rank waits for a farewell, which a rank sends when it leaves in order. A
        process that dies closes its connections, also if this one waits inside a library for a
        collective with it. An error of this context's body is no farewell, so it ends the group.
        """
        import torch
        import torch.distributed as torch_dist

        others = range(1, self.size) if self.is_leader else (0,)
        for other in others:
            threading.Thread(
                target=self._wait_for_farewell, args=(other,), name="model group", daemon=True
            ).start()
        yield
        for other in others:
            with suppress(RuntimeError):  # it has left
                torch_dist.send(torch.ones(1), group_dst=other, group=self._watched)

    @contextmanager
    def _needs_all(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error).lower() for words in LOST_PEER):
                raise
            self._report("another rank")  # it, or the launcher, reports why
            raise Ended from error

    def _wait_for_farewell(self, other: int) -> None:
        import torch
        import torch.distributed as torch_dist

        try:
            torch_dist.recv(torch.zeros(1), group_src=other, group=self._watched)
        except RuntimeError:
            time.sleep(SPEAK_S)
            self._report(f"rank {self.first + other}")
            os._exit(1)

    def _report(self, who: str) -> None:
        if self.is_leader:
            line = f"{who} that shares a model with rank {self.first} has ended: its group ends"
            print(f"gradproj: {line}", file=sys.stderr, flush=True)
