"""Runs the job's final merge from a command, under the merge's own claim."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress
from gradproj.coordinator.merge import MERGE_CLAIM, MergeInterrupted, merge, release_merge
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import UnitQueue
from gradproj.errors import StoreError
from gradproj.files import explain_os_errors
from gradproj.formatting import count
from gradproj.maintenance.job_output import Output
from gradproj.storage.publish import Outdated
from gradproj.store.layout import CLAIMS_DIR, HEARTBEATS_DIR


def merge_now(output: Output) -> dict[str, Any]:
    """Merge the existing records, unless another process is merging.

    Returns:
        The statistics, as in ``projection_stats.json``.

    Raises:
        StoreError: another process is merging, a record is damaged, or fewer records exist than
            the last merge used.
    """
    earlier = output.attributes.get("units_recorded", 0)
    if len(output.recorded) < earlier:
        raise StoreError(
            f"{output.path / 'units'} holds {count(len(output.recorded), 'record')}, but the last "
            f"merge used {earlier:,}: merging now would empty columns. Restore the records, or run "
            "the job's command again to recompute their units"
        )
    with merge_lock(output, "merge") as lock:
        return lock.merge()


@dataclass(frozen=True)
class MergeLock:
    """The merge's claim, held by a command. Its heartbeat shows that the command runs."""

    output: Path
    queue: UnitQueue
    """Queue of this process, which may claim units too."""
    progress: RankProgress
    """The command must move its counter as long as it works."""

    def merge(self) -> dict[str, Any]:
        """Merge the existing records and return the statistics."""
        return merge(self.output, self.queue.claims, progress=self.progress)


@contextmanager
def merge_lock(output: Output, command: str) -> Iterator[MergeLock]:
    """Hold the merge's claim, as a process named after ``command``.

    Raises:
        StoreError: another process holds it, or took it over because this one hung.
    """
    with explain_os_errors(output.path / CLAIMS_DIR):
        (output.path / CLAIMS_DIR).mkdir(exist_ok=True)
    # Each call has a name, and so a scratch directory, of its own: a process that takes over a unit
    # released by one call may fence that call's name.
    name = f"{command}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    owner, progress = Owner.this_process(name, 0, 0), RankProgress()
    queue = UnitQueue(output.path, output.layout, output.identity_hash, output.wanted, owner)
    try:
        if not queue.claims.try_claim(MERGE_CLAIM):
            raise StoreError(
                f"{output.path} is being merged by {claim_holder(queue.claims, MERGE_CLAIM)}"
            )
        try:
            with Heartbeat(output.path / HEARTBEATS_DIR, owner, progress, queue.commits.pace):
                yield MergeLock(output.path, queue, progress)
        except (MergeInterrupted, Outdated, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and not queue.commits.was_fenced():
                raise
            raise StoreError(
                f"{output.path}: another process has taken the merge over from this one. Run "
                f"`python -m gradproj status {output.path}`"
            ) from error
        finally:
            release_merge(output.path, queue.claims)
    finally:
        queue.release()


def claim_holder(claims: ClaimBoard, name: str) -> str:
    """Describe the process that holds a claim, and what to do about it."""
    number = claims.current().get(name)
    owner = None if number is None else claims.read(name, number).owner
    if owner is None:
        return "another process, which has just claimed it or just finished; run `gradproj status`"
    return (
        f"rank {owner.rank} on {owner.host} (pid {owner.pid}, job {owner.job_id}); wait for it. If "
        f"that process is known to be gone, delete {claims.folder / f'{name}.{number}'}"
    )
