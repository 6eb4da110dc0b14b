"""The weights of a model's blocks as bytes, of which a rank keeps its share; and how they load.

A block is what transformers marks for checkpointing: one layer of the stack. The weights that it
alone has lie one after the other in the bytes of the block, of which each of G ranks holds one of G
equal parts.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading
from transformers.modeling_layers import GradientCheckpointingLayer

from gradproj.errors import ModelError
from gradproj.kernels.memory import return_free_memory
from gradproj.model.packed_layers import PackedLinear

N_BUFFERS = 2
"""Blocks on the device at a time: the one that runs and the next one, which is being fetched."""

ALIGNMENT = 256
"""Bytes. Kernels choose their path by it, and a model's own tensors are aligned so too."""
TRIM_AFTER = 2**25
"""Bytes of loaded weights after which memory is given back: freed ones leave gaps in the heap."""


@dataclass(frozen=True)
class BlockWeight:
    """A weight's place in the bytes of its block."""

    name: str
    """Dotted name in the model."""
    shape: torch.Size
    dtype: torch.dtype
    start: int

    @property
    def end(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize

    def view(self, content: Tensor) -> Tensor:
        """Return the weight as a view of its block's bytes; it counts no writes to them."""
        return content[self.start : self.end].view(self.dtype).view(self.shape).data


@dataclass(frozen=True)
class Block:
    """A block's weights, and the bytes that they take together."""

    name: str
    weights: list[BlockWeight]
    n_bytes: int
    """A multiple of the number of ranks."""


def blocks_of(model: nn.Module, n_ranks: int) -> list[Block]:
    """Return a model's blocks in its order, with the weights that no other module has.

    Raises:
        ModelError: transformers marks no block of the model.
    """
    layers = _outermost_blocks(model)
    if not layers:
        raise ModelError(
            f"--ranks_per_model and --offload: transformers marks no block of "
            f"{type(model).__name__}, so its weights cannot be fetched block by block; leave them "
            "out"
        )
    users: dict[int, set[str]] = {}
    for name, weight in _weights_of(model):
        users.setdefault(id(weight), set()).add(name)
    blocks = []
    for name, layer in layers.items():
        weights, end = [], 0
        for own_name, weight in _weights_of(layer):
            if len(users[id(weight)]) > 1:
                continue
            weights.append(BlockWeight(f"{name}.{own_name}", weight.shape, weight.dtype, end))
            end = -(-weights[-1].end // ALIGNMENT) * ALIGNMENT
        step = ALIGNMENT * n_ranks
        blocks.append(Block(name, weights, -(-end // step) * step))
    return blocks


def _weights_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and packed weights by their names, each name of a shared one too."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, PackedLinear):
            yield from part.named_buffers(name)


def _outermost_blocks(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return found


@dataclass(frozen=True)
class PlacedBytes:
    """Memory of a model's weights in a rank."""

    whole: int
    """All weights and buffers."""
    rest: int
    """Those that are in no block, or in several."""
    share: int
    """This rank's part of the blocks."""
    pinned: int
    """Its bytes in page-locked memory, where torch rounds each block up to a power of two."""
    buffers: int
    """Of the blocks that are put together at a time."""


def placed_bytes(model: nn.Module, n_ranks: int) -> PlacedBytes:
    """Return the memory of a model, which may be on the meta device, in each of ``n_ranks``."""
    blocks = blocks_of(model, n_ranks)
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    in_blocks = sum(weight.end - weight.start for block in blocks for weight in block.weights)
    shares = [block.n_bytes // n_ranks for block in blocks]
    pinned = sum(1 << (n_bytes - 1).bit_length() for n_bytes in shares if n_bytes)
    buffers = N_BUFFERS * max(block.n_bytes for block in blocks)
    return PlacedBytes(whole, whole - in_blocks, sum(shares), pinned, buffers)


class BlockShards:
    """A rank's share of the bytes of every block, in host memory or on a device.

    Args:
        blocks: of the model.
        rank: this rank's place among the ``n_ranks`` that share the model.
        n_ranks: 1 if the rank keeps all bytes.
        device: where they are kept.
        pinned: keep them in page-locked host memory, for copies to a GPU.
    """

    def __init__(
        self,
        blocks: list[Block],
        rank: int,
        n_ranks: int,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        self.blocks, self._rank = blocks, rank
        self.shares = [
            torch.empty(
                block.n_bytes // n_ranks, dtype=torch.uint8, device=device, pin_memory=pinned
            )
            for block in blocks
        ]
        """``(n_bytes / n_ranks,)`` uint8 of each block."""
        self._places = {
            weight.name: (i, weight) for i, b in enumerate(blocks) for weight in b.weights
        }
        self.missing = set(self._places)
        """Names of weights that were not put yet."""

    def put(self, name: str, value: Tensor) -> bool:
        """Copy this rank's share of a weight. False if the weight is none of a block's, or not of
        the dtype that the block has room for: it is to be kept whole.
        """
        number, weight = self._places.get(name, (0, None))
        if weight is None or value.shape != weight.shape or value.dtype != weight.dtype:
            return False
        share = self.shares[number]
        first = self._rank * len(share)  # of the block's bytes that are kept here
        start, end = max(weight.start, first), min(weight.end, first + len(share))
        if start < end:
            content = value.detach().contiguous().view(-1).view(torch.uint8)
            part = content[start - weight.start : end - weight.start]
            share[start - first : end - first].copy_(part)
        self.missing.discard(name)
        return True

    def check_taken(self, model: nn.Module) -> None:
        """Raise ``ModelError`` if a block's weights stayed in the model, of another dtype."""
        weights = dict(_weights_of(model))
        kept = [name for name in sorted(self.missing) if weights[name].dim() > 1]
        if kept:
            raise ModelError(
                f"--ranks_per_model and --offload: {kept[0]} has another dtype "
                f"({weights[kept[0]].dtype}) than the model, and would stay whole on each device; "
                "leave the flag out"
            )

    def take_from(self, model: nn.Module) -> None:
        """Put a model's weights and leave tensors without memory in their place."""
        for name, weight in list(_weights_of(model)):
            if not weight.is_meta and self.put(name, weight):
                set_weight(model, name, torch.empty_like(weight, device="meta"))


def set_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a weight of the model by a frozen one."""
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    if own_name in module._buffers:  # of a packed layer
        module._buffers[own_name] = value
        return
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[own_name] = parameter


@contextmanager
def taken_while_loading(shards: BlockShards) -> Iterator[None]:
    """While transformers loads a checkpoint, keep of each weight of a block this rank's share only.

    transformers renames, converts and merges a checkpoint's tensors into a weight, and sets it in
    the model; it is replaced there by a tensor without memory.
    """
    loader: Any = core_model_loading
    since_trim = [0]
    original, is_set = loader.set_param_for_module, loader.is_env_variable_true

    @functools.wraps(original)
    def set_share(model: nn.Module, name: str, *args: object, **kwargs: object) -> None:
        original(model, name, *args, **kwargs)
        weight = dict(model.get_submodule(name.rpartition(".")[0]).named_parameters(recurse=False))
        value = weight.get(name.rpartition(".")[2])
        if value is not None and not value.is_meta and shards.put(name, value):
            set_weight(model, name, torch.empty_like(value, device="meta"))
            since_trim[0] += value.nbytes
            if since_trim[0] > TRIM_AFTER:
                since_trim[0] = 0
                return_free_memory()

    def is_set_or_sequential(name: str) -> bool:
        # Threads would convert weights ahead of their turn, in the end all of them.
        return name == "HF_DEACTIVATE_ASYNC_LOAD" or is_set(name)

    loader.set_param_for_module, loader.is_env_variable_true = set_share, is_set_or_sequential
    try:
        yield
    finally:
        loader.set_param_for_module, loader.is_env_variable_true = original, is_set
        return_free_memory()
