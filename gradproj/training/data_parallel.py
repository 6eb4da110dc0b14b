"""Data-parallel training: ranks from a loop's own information, gradients averaged over them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradproj.distributed import World, has_process_group
from gradproj.errors import ConfigError


def world_of(ddp_info: Any) -> World:
    """Return the ranks that train, from ``ddp_info`` as ``GhostEngineManager`` takes it."""
    if ddp_info is None:
        return World.current()
    if isinstance(ddp_info, World):
        return ddp_info
    rank, world_size = _entry(ddp_info, "rank"), _entry(ddp_info, "world_size")
    if rank is None or world_size is None:
        raise ConfigError(
            f"ddp_info is {ddp_info!r}: give None, or rank and world_size (ddp_rank and "
            "ddp_world_size will do)"
        )
    if int(world_size) > 1 and not has_process_group():
        raise ConfigError(
            f"ddp_info names {world_size} ranks, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group() first"
        )
    return World(int(rank), int(world_size))


def _entry(info: Any, name: str) -> Any:
    for key in (name, f"ddp_{name}"):
        value = info.get(key) if isinstance(info, Mapping) else getattr(info, key, None)
        if value is not None:
            return value
    return None


def totals(world: World, *values: float) -> list[float]:
    """Return each value's sum over all ranks, added in float64."""
    return world.sum(torch.tensor(values, dtype=torch.float64)).tolist()


class GradientAverager:
    """Averages gradients over the ranks, where an engine and not autograd makes them.

    It takes over from DistributedDataParallel's own reducer, which would wait for ever.
    """

    def __init__(self, module: nn.Module) -> None:
        self._wrapper = module if isinstance(module, DistributedDataParallel) else None
        self.world = World.current(None if self._wrapper is None else self._wrapper.process_group)

    def suspend_ddp(self) -> None:
        """Keep DistributedDataParallel from waiting for gradients that autograd will not make.

        Call it in each forward pass: the model may have been wrapped after the engine was made, and
        ``no_sync`` resets the flag at its end.
        """
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        self._wrapper = active or self._wrapper
        if self._wrapper is not None:
            self._wrapper.require_backward_grad_sync = False

    def resume_ddp(self) -> None:
        if self._wrapper is not None:
            self._wrapper.require_backward_grad_sync = True

    def means(
        self, parameters: list[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield every parameter with its mean gradient; a rank without one contributes zeros."""
        local = [gradients[p] if p in gradients else torch.zeros_like(p) for p in parameters]
        local = [gradient.to(p.dtype) for gradient, p in zip(local, parameters, strict=True)]
        group = self.world.group
        for work in [torch_dist.all_reduce(each, group=group, async_op=True) for each in local]:
            work.wait()
        for parameter, gradient in zip(parameters, local, strict=True):
            yield parameter, gradient.div_(self.world.size)
