"""Marks of a Slurm job: empty files in ``logs/`` by which its ranks tell its batch script what was.

On disk and in a bucket alike. Each job, and each element of an array, has marks of its own
(``logs/slurm-70_1.failed``), which no other job sets, and for which a full disk has room.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradproj.coordinator.process_id import Owner
from gradproj.errors import StoreError
from gradproj.storage.publish import replace
from gradproj.store.layout import LOGS_DIR

FAILED = "failed"
"""A rank ended with an error that the user has to fix."""
PROGRESS = "progress"
"""A rank has committed a unit in this start."""
IDLE = "idle"
"""The last start ended without a new unit. Set by the batch script (``maintenance/requeue.py``)."""


@dataclass(frozen=True)
class SlurmMarks:
    """The marks of a job on its output. Of a job without Slurm none is ever set."""

    output: Path
    job_id: str
    """Its name, of ``JobName``."""

    def has(self, mark: str) -> bool:
        """Return whether a mark is set: one request in a bucket."""
        return self._of_slurm() and self._path(mark).is_file()

    def set(self, mark: str) -> None:
        """Set a mark, unless it is set already."""
        if self._of_slurm() and not self.has(mark):
            replace(self._path(mark), [])

    def clear(self, *marks: str) -> None:
        """Delete marks, set or not."""
        for mark in marks if self._of_slurm() else ():
            self._path(mark).unlink(missing_ok=True)

    def _path(self, mark: str) -> Path:
        return self.output / LOGS_DIR / f"{self.job_id}.{mark}"

    def _of_slurm(self) -> bool:
        return self.job_id.startswith("slurm-")


def note_progress(output: Path, owner: Owner) -> None:
    """Note that a rank has committed a unit. What prevents it shows at the next commit."""
    with suppress(OSError, StoreError):
        SlurmMarks(output, owner.job_id).set(PROGRESS)
