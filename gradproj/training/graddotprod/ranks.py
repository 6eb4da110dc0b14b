"""What averages gradients over the ranks where an engine makes them itself."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Reducer:
    """In the place of DistributedDataParallel's own; a process without a process group is rank 0 of 1."""

    def __init__(self, module: nn.Module) -> None:
        self._wrapper = module if isinstance(module, DistributedDataParallel) else None
        self._group: Any = self._wrapper.process_group if self._wrapper is not None else None
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(self._group) if together else 1
        self.rank = dist.get_rank(self._group) if together else 0

    def hold(self) -> None:
        """Keep DistributedDataParallel from waiting for gradients that autograd will not make.

        Said again in each forward pass: of the wrapper through which it came, if the model was wrapped later, and
        because ``no_sync`` has forgotten it at its end.
        """
        self._wrapper = (
            getattr(DistributedDataParallel, "_active_ddp_module", None) or self._wrapper
        )
        if self._wrapper is not None:
            self._wrapper.require_backward_grad_sync = False

    def release(self) -> None:
        """Let it work again."""
        if self._wrapper is not None:
            self._wrapper.require_backward_grad_sync = True

    def means(
        self, parameters: list[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with its gradient's mean over the ranks; a rank without one gives zeros."""
        mine = [gradients[p] if p in gradients else torch.zeros_like(p) for p in parameters]
        mine = [gradient.to(p.dtype) for gradient, p in zip(mine, parameters, strict=True)]
        for work in [
            dist.all_reduce(gradient, group=self._group, async_op=True) for gradient in mine
        ]:
            work.wait()
        yield from (
            (p, gradient.div_(self.size)) for p, gradient in zip(parameters, mine, strict=True)
        )

    def of_all(self, value: Any) -> list[Any]:
        """Every rank's value, in the ranks' order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values
