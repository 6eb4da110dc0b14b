"""The rule of ``slurm/common.sh``: whether a Slurm job is queued again after a start.

It reads the store and the job's marks (``coordinator/slurm_marks.py``), on disk or in a bucket.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from gradproj.coordinator.slurm_marks import FAILED, IDLE, PROGRESS, SlurmMarks
from gradproj.maintenance.job_output import read_output
from gradproj.store.layout import FAILED_NAME, LOGS_DIR
from gradproj.store.metadata import store_exists

ENDED, GAVE_UP, GO_ON = 0, 1, 3
"""Exit codes of the command ``slurm``. 2 is a user's error, as for every command."""
STOPPED = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1)}
"""Exit codes of ranks that a signal stopped. A preemption may signal them, not the script."""


@dataclass(frozen=True)
class Verdict:
    """The batch script's next step, and why."""

    exit_code: int
    """``ENDED``, ``GAVE_UP`` or ``GO_ON``."""
    reason: str


def begin_start(output: Path, job_id: str) -> Verdict:
    """Return whether there is anything to start, and forget what the last start's ranks met."""
    marks = SlurmMarks(output, job_id)
    (output / LOGS_DIR).mkdir(parents=True, exist_ok=True)
    if marks.has(PROGRESS):  # of a start that was lost with its node, before it was judged
        marks.clear(IDLE)
    marks.clear(FAILED, PROGRESS)
    if _is_complete(output):
        marks.clear(IDLE)
        return Verdict(ENDED, "complete already")
    return Verdict(GO_ON, "units are left")


def end_start(output: Path, job_id: str, code: int, drained: bool = False) -> Verdict:
    """Judge a start whose ranks have ended.

    Args:
        output: of the job; there may be no store yet.
        job_id: its name, of ``JobName``.
        code: exit code of the ranks; that of ``slurm/torchrun.py``.
        drained: the batch script received a signal to stop (preemption, time limit).
    """
    marks = SlurmMarks(output, job_id)
    if _is_complete(output):
        marks.clear(IDLE)
        return Verdict(ENDED, "complete")
    if marks.has(FAILED):
        return Verdict(
            GAVE_UP,
            f"ended by an error that you can fix, see above or {output / FAILED_NAME}; it is not "
            "queued again",
        )
    drained = drained or code in STOPPED
    if code == 0 and not drained:
        marks.clear(IDLE)
        return Verdict(ENDED, "nothing is left to start; other jobs are at work on the rest")
    if marks.has(PROGRESS):
        marks.clear(IDLE)
        return Verdict(GO_ON, "not complete, with new units in this start: queued again")
    if not drained:
        return Verdict(
            GAVE_UP,
            f"ended with code {code} and without a new unit; it is not queued again, see "
            f"{output / LOGS_DIR}",
        )
    if marks.has(IDLE):
        # Otherwise starts without a new unit would follow each other for ever.
        marks.clear(IDLE)
        return Verdict(
            GAVE_UP,
            "two starts in a row ended without a new unit, so it is not queued again: give it more "
            "time (--time), or smaller units (--rows_per_shard, in a new output)",
        )
    marks.set(IDLE)
    return Verdict(GO_ON, "not complete, without a new unit in this start: queued again")


def _is_complete(output: Path) -> bool:
    return store_exists(output) and read_output(output).is_complete
