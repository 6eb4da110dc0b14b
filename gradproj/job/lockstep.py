"""Ranks that share a model run their passes together, batch beside batch."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.distributed import Process, Rendezvous
from gradproj.distributed.model_group import ModelGroup
from gradproj.engine.batching import Batch, collate
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.run_batch import clear_failed, run_batch
from gradproj.engine.sharded_blocks import ShardedBlocks, load_in_blocks
from gradproj.job.shutdown import StopRequest
from gradproj.kernels.memory import is_out_of_memory
from gradproj.model.checkpoint import ModelFiles
from gradproj.model.loading import load_model
from gradproj.model.sequences import TokenSequence

T = TypeVar("T")

Part = tuple[np.ndarray, dict[str, Tensor] | None]
"""Sequences of a batch, and by name what they gave; None for one that does not fit the memory."""

log = logging.getLogger(__name__)


def load_job_model(
    files: ModelFiles, device: torch.device, offload: bool, lockstep: "Lockstep | None"
) -> nn.Module:
    """Load a job's model: whole on the device, or its blocks in the host's memory or in parts."""
    if lockstep is not None:
        return lockstep.load(files)
    return load_in_blocks(files, device, None)[0] if offload else load_model(files, device)


class Lockstep:
    """A group's ranks, each with its part of the model.

    In a round each rank runs a batch forward and backward, or a small one for nothing, so that all
    fetch the same blocks. After it they tell each other what is left, and whether one was asked to
    stop. ``stop`` is this rank's.
    """

    def __init__(self, group: ModelGroup, device: torch.device, stop: StopRequest) -> None:
        self.group, self._device, self._stop = group, device, stop
        self.stops = False
        """A rank was asked to stop, as all of them know since they last agreed."""
        self._blocks: ShardedBlocks | None = None

    @classmethod
    def join(
        cls,
        ranks_per_model: int,
        process: Process,
        ranks: Rendezvous,
        device: torch.device,
        stop: StopRequest,
    ) -> "Lockstep | None":
        """Return this rank's group; None if it has a model of its own."""
        group = ModelGroup.join(ranks_per_model, process, ranks, device)
        return None if group is None else cls(group, device, stop)

    def load(self, files: ModelFiles) -> nn.Module:
        """Load the model, of whose blocks each rank has its part."""
        model, self._blocks = load_in_blocks(files, self._device, self.group)
        return model

    # --- passes ---

    def rehearse(self, model: nn.Module, engine: GradProjLoraEngine) -> None:
        """Run one small batch, by which the ranks learn the order of a pass."""
        self.blocks.begin()
        self._run_for_nothing(model, engine)
        self.blocks.complete()

    def run_pass(self, engine: GradProjLoraEngine, run: Callable[[], None]) -> None:
        """Run a pass that all ranks run.

        Raises:
            torch.OutOfMemoryError: in all of them, if one has too little memory.
        """
        fits, _ = self._attempt(engine, run)
        if self.agree(not fits):
            raise torch.OutOfMemoryError("a rank of the group has too little memory for a batch")

    def _attempt(self, engine: GradProjLoraEngine, run: Callable[[], T]) -> tuple[bool, T | None]:
        """Run a pass; return whether it fits the memory here, and what it gave."""
        self.blocks.begin()
        try:
            result = run()
            self.blocks.complete()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True, result
        # Outside of the except block, so that the error holds no tensors any more.
        clear_failed(engine)
        self.blocks.give_up()
        return False, None

    @property
    def blocks(self) -> ShardedBlocks:
        assert self._blocks is not None, "load() comes first"
        return self._blocks

    def run_in_halves(
        self,
        model: nn.Module,
        engine: GradProjLoraEngine,
        batch: np.ndarray | None,
        run: Callable[[np.ndarray], T],
    ) -> list[tuple[np.ndarray, T | None]]:
        """Run each rank's batch, as ``run_in_halves`` does, until no rank has a part of its left.

        Args:
            model: the group's, with ``engine`` attached.
            engine: what a failed attempt left in it is dropped.
            batch: this rank's sequences ``(N,)``; None if it has none.
            run: computes some of them.
        """
        left = [] if batch is None else [batch]
        done: list[tuple[np.ndarray, T | None]] = []
        while True:
            part = left.pop() if left else None
            if part is None:
                self._attempt(engine, functools.partial(self._run_for_nothing, model, engine))
            else:
                fits, result = self._attempt(engine, functools.partial(run, part))
                if fits or len(part) == 1:
                    done.append((part, result))
                else:
                    log.warning("out of memory with %d sequences: halving the batch", len(part))
                    left += [part[len(part) // 2 :], part[: len(part) // 2]]
            if not self.agree(bool(left)):
                return done

    def _run_for_nothing(self, model: nn.Module, engine: GradProjLoraEngine) -> Any:
        tokens = TokenSequence.of(np.zeros(2, dtype=np.int64), owner=0)
        run_batch(model, engine, self._small_batch(tokens))
        engine.take_token_covariances()

    def _small_batch(self, tokens: TokenSequence) -> Batch:
        return collate([tokens], np.zeros(1, dtype=np.int64)).to(self._device)

    # --- agreement ---

    def agree(self, mine: bool) -> bool:
        """Return whether ``mine`` is true in any rank; a stop of one becomes one of all."""
        answers = self.group.exchange(mine, self._stop())
        self.stops = bool(answers[:, 1].any())
        if self.stops:
            self._stop.request("a rank of its group was asked to stop")
        return bool(answers[:, 0].any())

    def announce(self, value: Any = None) -> Any:
        """Return the leader's value. The members wait for it, and learn of each other's stops."""
        if self.group.is_leader:
            self.agree(True)
        else:
            while not self.agree(False):
                pass
        return self.group.from_leader(value)

    def wait(self) -> None:
        """Let the leader, which has nothing to announce yet, keep the members in touch."""
        self.agree(False)

    # --- results ---

    def collect(self, parts: list[Part], n_with_batch: int) -> Iterator[list[Part]]:
        """Yield the parts of the first ``n_with_batch`` ranks to the leader, in their order.

        The members send theirs, and yield nothing.
        """
        group = self.group
        if group.is_leader:
            yield parts
            for rank in range(1, n_with_batch):
                tensors, named = group.receive(rank, self._device)
                rest = iter(tensors)
                yield [
                    (sequences, None if names is None else {name: next(rest) for name in names})
                    for sequences, names in named
                ]
        elif group.rank < n_with_batch:
            named = [(sequences, x if x is None else list(x)) for sequences, x in parts]
            group.send([tensor for _, x in parts if x for tensor in x.values()], named)
