"""``failed.json``: the last error that ended a job on the store.

A Slurm job has a mark of its own besides (``slurm_marks.py``), which its batch script reads.
"""

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.slurm_marks import FAILED, SlurmMarks
from gradproj.errors import GradprojError, OtherSettingsError, StoreError
from gradproj.storage.publish import replace
from gradproj.store.layout import FAILED_NAME
from gradproj.store.metadata import store_exists


def note_failure(output: Path, owner: Owner, error: GradprojError) -> None:
    """Write ``failed.json``. Without a store nothing is written, since nothing was begun.

    A job that was refused because the store has other settings does not concern the store or the
    jobs working on it. Then only a Slurm job's own mark is set, so that it is not requeued.
    """
    if not store_exists(output):
        return
    content = {
        "error": str(error),
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "job_id": owner.job_id,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "owner": asdict(owner),
    }
    # The error may be a full disk. It is printed on standard error as well.
    with suppress(OSError, StoreError):
        SlurmMarks(output, owner.job_id).set(FAILED)
        if isinstance(error, OtherSettingsError):
            return
        replace(output / FAILED_NAME, [(json.dumps(content, indent=2) + "\n").encode()])


def clear_failure(output: Path, job_id: str = "") -> None:
    """Delete the failure notes after a successful start of ``job_id``.

    The failure of another element of the same Slurm array stays: nobody has fixed its cause yet.
    """
    SlurmMarks(output, job_id).clear(FAILED)
    array, failed = job_id.rpartition("_")[0], _failed_job(output)
    is_other_element = failed != job_id and failed.rpartition("_")[0] == array
    if not (job_id.startswith("slurm-") and array and is_other_element):
        delete_failure(output)


def delete_failure(output: Path) -> None:
    """Delete ``failed.json``, whichever job wrote it."""
    (output / FAILED_NAME).unlink(missing_ok=True)


def _failed_job(output: Path) -> str:
    try:
        return str(json.loads((output / FAILED_NAME).read_text())["job_id"])
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is unreadable
        return ""
