"""``python -m gradproj merge``: the job's final merge, at any time and under the same claim."""

import os
import socket
from typing import Any

from gradproj.coordinator.claims import ClaimBoard, Owner
from gradproj.coordinator.merge import MERGE_CLAIM, merge
from gradproj.coordinator.output import Output, count
from gradproj.coordinator.units import UnitQueue
from gradproj.errors import StoreError
from gradproj.store.files import explain_os_errors


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
    with explain_os_errors(output.path / "claims"):
        (output.path / "claims").mkdir(exist_ok=True)
    owner = Owner.this_process(f"merge-{socket.gethostname()}-{os.getpid()}", 0, 0)
    queue = UnitQueue(output.path, output.layout, output.identity_hash, output.wanted, owner)
    try:
        if not queue.claims.try_claim(MERGE_CLAIM):
            raise StoreError(_busy(output, queue.claims))
        try:
            return merge(output.path)
        finally:
            queue.claims.forget(MERGE_CLAIM)
    finally:
        queue.give_back()


def _busy(output: Output, claims: ClaimBoard) -> str:
    number = claims.current().get(MERGE_CLAIM)
    owner = None if number is None else claims.read(MERGE_CLAIM, number).owner
    if owner is None:
        return f"{output.path} has just been claimed for a merge by another process; ask for its status"
    return (
        f"{output.path} is being merged by rank {owner.rank} on {owner.host} (pid {owner.pid}, job {owner.job_id}); "
        f"wait for it. If that process is known to be gone, delete {output.path / 'claims' / f'{MERGE_CLAIM}.{number}'}"
    )
