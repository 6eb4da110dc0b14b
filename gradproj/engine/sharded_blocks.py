"""Blocks whose weights are on a device only while they run: fetched from other ranks, or the host.

Two buffers on the device hold two whole blocks: the one that runs, and the next one, which is being
fetched. A weight is a view of its block's buffer for good, so that what autograd has saved of a
forward pass is right again when its block is back for the backward pass. Weights are frozen: they
have no gradient that would have to be summed over the ranks.
"""

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradproj.distributed.model_group import ModelGroup
from gradproj.engine.layers import unwrap
from gradproj.errors import ModelError
from gradproj.kernels.memory import is_out_of_memory
from gradproj.model.block_shards import N_BUFFERS, BlockShards, set_weight
from gradproj.model.checkpoint import ModelFiles
from gradproj.model.loading import check_causal, load_shards


class Fetch(Protocol):
    """A way to put a block's bytes together. Returns what waits until they are there."""

    def __call__(self, content: Tensor, share: Tensor, /) -> Callable[[], Any]: ...


def load_in_blocks(
    files: ModelFiles, device: torch.device, group: ModelGroup | None
) -> tuple[nn.Module, "ShardedBlocks"]:
    """Load a model whose blocks' weights are in parts in the ranks of a group.

    Without a group they are in this rank's host memory. Collective over the group.

    Raises:
        ModelError: as ``load_model``; or transformers marks no block of the model.
    """
    if group is None:
        on_cuda = device.type == "cuda"
        model, shards = load_shards(files, 0, 1, torch.device("cpu"), pinned=on_cuda)
        fetch: Fetch = _FromHost(device) if on_cuda else copied
    else:
        model, shards = load_shards(files, group.rank, group.size, device)
        fetch = group.gather
    blocks = ShardedBlocks(model, shards, device, fetch, together=group is not None)
    model = model.to(device)
    check_causal(files, model)
    return model, blocks


class _FromHost:
    """Copies whole blocks from page-locked host memory, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __call__(self, content: Tensor, share: Tensor) -> Callable[[], Any]:
        self._stream.wait_stream(torch.cuda.current_stream(content.device))
        with torch.cuda.stream(self._stream):
            content.copy_(share, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return lambda: torch.cuda.current_stream(content.device).wait_event(copied)


def copied(content: Tensor, share: Tensor) -> Callable[[], Any]:
    """Copy a whole block, and return a wait that is over."""
    content.copy_(share)
    return lambda: None


class ShardedBlocks:
    """Hooks that have each block's weights in their buffer when the block runs, either way.

    A pass is one forward pass of the model, and its backward pass if there is one. All ranks of a
    group run their passes in the same order: in each, they fetch the same blocks.

    Args:
        model: without memory for the weights of its blocks.
        shards: this rank's share of them.
        device: where the model runs.
        fetch: puts a block's shares together.
        together: other ranks take part in every fetch.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: BlockShards,
        device: torch.device,
        fetch: Fetch,
        together: bool = False,
    ) -> None:
        self._blocks, self._shares, self._fetch = shards.blocks, shards.shares, fetch
        self._together = together
        largest = max(block.n_bytes for block in self._blocks)
        self._buffers = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(N_BUFFERS)
        ]
        self._held: list[int | None] = [None] * N_BUFFERS
        self._waits: list[Callable[[], Any]] = [lambda: None] * N_BUFFERS
        self._fetched: list[int] = []
        self._whole: list[int] | None = None
        self._failure: Any = None
        """Error of the last forward pass."""
        for number, block in enumerate(self._blocks):
            users = set()
            for weight in block.weights:
                if weight.name not in shards.missing:
                    set_weight(model, weight.name, weight.view(self._content(number)))
                    users.add(model.get_submodule(weight.name.rpartition(".")[0]))
            self._hook(model.get_submodule(block.name), number, users)
        inner = unwrap(model)
        body = getattr(inner, "base_model", inner)  # run alone by per_sample_loss
        body.register_forward_pre_hook(self._open)
        body.register_forward_hook(self._close, always_call=True)

    @property
    def n_bytes(self) -> int:
        """Bytes of this rank's shares and of its buffers."""
        return sum(len(x) for x in (*self._shares, *self._buffers))

    # --- passes ---

    def begin(self) -> None:
        """Begin a pass that ``complete`` or ``give_up`` will end."""
        self._fetched, self._held, self._failure = [], [None] * N_BUFFERS, None

    def complete(self) -> None:
        """End a pass that went through. The first one is what ``give_up`` repeats.

        Raises:
            ModelError: it took other blocks than the first.
        """
        if self._whole is None:
            self._whole = list(self._fetched)
        if self._fetched != self._whole:
            raise ModelError(
                "--ranks_per_model: the model does not run its blocks in the same order in every "
                "batch, so its ranks cannot fetch them together; leave the flag out"
            )

    def give_up(self) -> None:
        """End a pass that failed here: fetch the rest of its blocks, as the other ranks do."""
        assert self._whole is not None
        for number in self._whole[len(self._fetched) :]:
            self._start(number)
        self.begin()

    def _open(self, module: nn.Module, args: tuple) -> None:
        if self._together and self._failure is not None and is_out_of_memory(self._failure):
            # A check at the start took it for its answer, and the others may be in the middle of
            # that pass. (An error in the model's code is that of all ranks, at the same place.)
            raise ModelError(
                f"{type(module).__name__} had too little memory in the checks at the start, and "
                "ranks that share a model cannot go on from there: give a smaller --max_length, or "
                "more ranks"
            )
        self.begin()

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        # Called after an error too.
        self._failure = sys.exc_info()[1] if output is None else None

    # --- blocks ---

    def _hook(self, block: nn.Module, number: int, users: set[nn.Module]) -> None:
        """Fetch the block before it runs. ``users`` are its modules that have weights."""

        def before(module: nn.Module, args: tuple) -> None:
            self._hold(number)
            self._start(number + 1)

        def inside(module: nn.Module, args: tuple) -> None:
            if self._held[number % N_BUFFERS] != number:
                raise ModelError(
                    f"--ranks_per_model and --offload: {self._blocks[number].name} runs in parts "
                    f"({type(module).__name__}), and its weights are there only while it runs as a "
                    "whole; leave the flag out"
                )

        def before_backward(gradients: Any) -> None:
            self._hold(number)
            self._start(number - 1)

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            for x in tree_leaves(output):
                if isinstance(x, Tensor) and x.requires_grad:
                    # A view that the model changes in place later gets another node; what it is a
                    # view of keeps its own.
                    nodes = x.grad_fn, None if x._base is None else x._base.grad_fn
                    for node in nodes:
                        if node is not None:
                            node.register_prehook(before_backward)

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
        for module in users - {block}:
            module.register_forward_pre_hook(inside)

    def _hold(self, number: int) -> None:
        """Return when the block's weights are in its buffer, in the order of the device."""
        self._start(number)
        self._waits[number % N_BUFFERS]()
        self._waits[number % N_BUFFERS] = lambda: None

    def _start(self, number: int) -> None:
        """Begin to fetch a block, if there is such a block and its buffer has another."""
        place = number % N_BUFFERS
        if not 0 <= number < len(self._blocks) or self._held[place] == number:
            return
        self._waits[place]()  # the fetch before, if nothing has waited for it
        self._fetched.append(number)
        self._held[place] = number
        self._waits[place] = self._fetch(self._content(number), self._shares[number])

    def _content(self, number: int) -> Tensor:
        return self._buffers[number % N_BUFFERS][: self._blocks[number].n_bytes]
