"""``failed.json``: the mistake that ended a job, for whoever decides whether to queue it again."""

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gradproj.coordinator.process_id import Owner
from gradproj.errors import GradprojError, OtherSettingsError, StoreError
from gradproj.files import write_and_replace
from gradproj.store.layout import STORE_NAME

FAILED_NAME = "failed.json"
"""The last mistake of any job on the store. A Slurm job has a mark of its own beside it, which no other job overwrites
and a full disk has room for: ``logs/slurm-70_1.failed``. Its batch script asks for that one."""


def note_failure(output: Path, owner: Owner, error: GradprojError) -> None:
    """Write what a user has to mend; nothing where there is no store (then nothing was begun).

    A job that was refused because the store has other settings has nothing to do with it: the store and whoever works
    on it are well, so only a Slurm job's own mark says that it is not to be queued again.
    """
    if not (output / STORE_NAME).is_dir():
        return
    content = {
        "error": str(error),
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "job_id": owner.job_id,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "owner": asdict(owner),
    }
    with suppress(
        OSError, StoreError
    ):  # the mistake may be a full disk; it is said on standard error as well
        for mark in _own_mark(output, owner.job_id):
            mark.touch()
        if isinstance(error, OtherSettingsError):
            return
        write_and_replace(output / FAILED_NAME, [(json.dumps(content, indent=2) + "\n").encode()])


def clear_failure(output: Path, job_id: str = "") -> None:
    """A start of this job went well: what failed before is mended.

    But not what another element of the same Slurm array has failed of: nobody has mended anything since.
    """
    for mark in _own_mark(output, job_id):
        mark.unlink(missing_ok=True)
    array, failed = job_id.rpartition("_")[0], _failed_job(output)
    if (
        job_id.startswith("slurm-")
        and array
        and failed != job_id
        and failed.rpartition("_")[0] == array
    ):
        return
    forget_failure(output)


def forget_failure(output: Path) -> None:
    """Nothing is left of what failed, whosever it was: the store is complete."""
    (output / FAILED_NAME).unlink(missing_ok=True)


def _own_mark(output: Path, job_id: str) -> list[Path]:
    return [output / "logs" / f"{job_id}.failed"] if job_id.startswith("slurm-") else []


def _failed_job(output: Path) -> str:
    try:
        return str(json.loads((output / FAILED_NAME).read_text())["job_id"])
    except (OSError, ValueError, TypeError, KeyError):  # none, or one that nobody can read
        return ""
