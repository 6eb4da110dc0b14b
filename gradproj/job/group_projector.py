"""A unit whose batches the ranks of a group run side by side."""

import numpy as np
from torch import Tensor, nn

from gradproj.coordinator import fault_points
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadBasis
from gradproj.engine.run_batch import clear_failed
from gradproj.job.lockstep import Lockstep
from gradproj.job.unit_projector import UnitProjector
from gradproj.job.unit_reader import PreparedUnit, UnitSettings
from gradproj.job.unit_sums import BatchResult, UnitSums
from gradproj.kernels.memory import is_out_of_memory
from gradproj.store.head_rows import HeadSegment
from gradproj.store.row_encoder import RowEncoder


class GroupProjector(UnitProjector):
    """Runs a unit through the model that a group of ranks holds.

    The leader's ``project`` is that of a rank with a model of its own; the members ``follow``. Each
    rank runs every G-th batch, and the leader adds what all computed, in the order of the batches:
    so the rows have the same bits for every G.
    """

    def __init__(
        self,
        lockstep: Lockstep,
        model: nn.Module,
        engine: GradProjLoraEngine,
        settings: UnitSettings,
        encoder: RowEncoder,
        progress: RankProgress,
        head: tuple[HeadBasis, HeadSegment] | None = None,
        hidden: str = "none",
    ) -> None:
        made = model, engine, settings, encoder, progress
        super().__init__(*made, lambda: lockstep.stops, head, hidden)
        self._lockstep, self._width = lockstep, lockstep.group.size
        lockstep.rehearse(self._model, self._engine)

    def _begin(self, prepared: PreparedUnit, done: int) -> None:
        self._lockstep.announce((prepared, done))

    def follow(self) -> None:
        """Run this rank's batches of the leader's units, until it has no more."""
        while (unit := self._lockstep.announce()) is not None:
            prepared, done = unit
            total, n_batches = self._sums_of(prepared), len(prepared.batches)
            for first in range(done, n_batches, self._width):
                last = min(first + self._width, n_batches)
                self._run(prepared, range(first, last), total)
                fault_points.reach("batch done")
                if last < n_batches and self._stopping():
                    break

    def wait(self) -> None:
        """Keep the members in touch."""
        self._lockstep.wait()

    def close(self) -> None:
        """Tell the members that there are no more units."""
        self._lockstep.announce(None)

    def _run(self, prepared: PreparedUnit, numbers: range, total: UnitSums) -> None:
        rank = self._lockstep.group.rank
        mine = prepared.batches[numbers[rank]] if rank < len(numbers) else None

        def run(sequences: np.ndarray) -> dict[str, Tensor]:
            return self._forward_backward(total, sequences).tensors()

        parts = self._lockstep.run_in_halves(self._model, self._engine, mine, run)
        for computed in self._lockstep.collect(parts, len(numbers)):
            for sequences, found in computed:
                result = None if found is None else BatchResult.of_tensors(found)
                self._add(total, sequences, result)

    def _add(self, total: UnitSums, sequences: np.ndarray, result: BatchResult | None) -> None:
        """Add a part; in halves if this rank, which did not compute it, has too little memory."""
        if result is None:
            total.fail(sequences)
            return
        try:
            total.add(sequences, result)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        clear_failed(self._engine)
        if len(sequences) == 1:
            total.fail(sequences)
            return
        middle = len(sequences) // 2
        for half, part in zip(np.split(sequences, [middle]), result.halves(), strict=True):
            self._add(total, half, part)
