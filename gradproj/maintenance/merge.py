"""``python -m gradproj merge``: the job's final merge, at any time and under the same claim."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.heartbeats import Heartbeat, Progress
from gradproj.coordinator.merge import MERGE_CLAIM, MergeEnded, merge, release_merge
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import UnitQueue
from gradproj.errors import StoreError
from gradproj.files import explain_os_errors
from gradproj.formatting import count
from gradproj.maintenance.job_output import Output


def merge_now(output: Output) -> dict[str, Any]:
    """Merge the records there are; never beside another process that merges.

    Returns:
        The statistics that ``projection_stats.json`` holds.

    Raises:
        StoreError: another process is merging, a record is damaged, or records that an earlier merge used have gone.
    """
    earlier = output.attributes.get("units_recorded", 0)
    if len(output.recorded) < earlier:
        raise StoreError(
            f"{output.path / 'units'} holds {count(len(output.recorded), 'record')}, but the last merge used "
            f"{earlier:,}: merging now would empty columns. Put the records back, or run the job's command again "
            "to compute their units once more"
        )
    with merge_lock(output, "merge") as held:
        return held.merge()


@dataclass(frozen=True)
class HeldMerge:
    """The claim of the merge in a command's hand. While it lasts, a heartbeat says that the command lives."""

    output: Path
    queue: UnitQueue
    """Of this process; it may claim units besides."""
    progress: Progress
    """Its counter is to move as long as the command works."""

    def merge(self) -> dict[str, Any]:
        """Merge the records there are; the statistics."""
        return merge(self.output, self.queue.claims, progress=self.progress)


@contextmanager
def merge_lock(output: Output, command: str) -> Iterator[HeldMerge]:
    """Hold the claim of the merge, as a command of this name.

    Raises:
        StoreError: another process holds it, or took it over from this one because that stood still for so long.
    """
    with explain_os_errors(output.path / "claims"):
        (output.path / "claims").mkdir(exist_ok=True)
    # A name of its own for each call: who takes over what one has given back may take its files away.
    name = f"{command}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    owner, progress = Owner.this_process(name, 0, 0), Progress()
    queue = UnitQueue(output.path, output.layout, output.identity_hash, output.wanted, owner)
    try:
        if not queue.claims.try_claim(MERGE_CLAIM):
            raise StoreError(
                f"{output.path} is being merged by {claim_holder(queue.claims, MERGE_CLAIM)}"
            )
        try:
            with Heartbeat(output.path / "heartbeats", owner, progress):
                yield HeldMerge(output.path, queue, progress)
        except (MergeEnded, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and queue.scratch.is_dir():
                raise
            raise StoreError(
                f"{output.path}: another process has taken the merge over from this one; ask for its status"
            ) from error
        finally:
            release_merge(output.path, queue.claims)
    finally:
        queue.release()


def claim_holder(claims: ClaimBoard, name: str) -> str:
    """Who has claimed something, and what to do about it."""
    number = claims.current().get(name)
    owner = None if number is None else claims.read(name, number).owner
    if owner is None:
        return "another process, just now; ask for its status"
    return (
        f"rank {owner.rank} on {owner.host} (pid {owner.pid}, job {owner.job_id}); wait for it. If that process is "
        f"known to be gone, delete {claims.folder / f'{name}.{number}'}"
    )
