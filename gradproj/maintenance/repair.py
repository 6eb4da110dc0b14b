"""Repairs a damaged output: gives damaged units up and merges the rest again.

The order of steps survives a kill at any point, and a second repair continues from there: the store
is marked as not complete and the units' merged rows as missing, the records are taken away, the
columns are merged without them, and on disk the shards are deleted last. A unit's claim is held
until then, so that no job commits the unit in between.
"""

from dataclasses import dataclass, field

from gradproj.coordinator.merge import merge_publisher, write_metadata
from gradproj.coordinator.opening import commits_of
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import unit_claim
from gradproj.coordinator.unmerge import mark_as_missing
from gradproj.maintenance.checks import Damage, MergedColumns, check_unit
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.merge import MergeLock, claim_holder, merge_lock
from gradproj.maintenance.verify import DAMAGED, INCOMPLETE, SOUND, Verification
from gradproj.store.layout import METADATA_NAME
from gradproj.store.writer import update_attributes


@dataclass
class Repair:
    """Result of a repair. ``asdict`` of it is a part of ``--json``."""

    output: str
    units: list[int] = field(default_factory=list)
    """Units whose record and shard were deleted, for the job to compute again."""
    n_samples: int = 0
    """Documents of those units that the job wants; nothing else is lost."""
    merged: bool = False
    """Columns, sums, statistics and metadata were made again."""
    recovered: list[int] = field(default_factory=list)
    """Units that another process has committed again since they were found damaged."""
    held: dict[int, str] = field(default_factory=dict)
    """Units left as they are -> the process that holds their claim."""
    orphans: list[int] = field(default_factory=list)
    """Units that were given up because their shards, in a bucket, belonged to no record."""
    left: list[Damage] = field(default_factory=list)
    """Damage that remains."""
    complete: bool = False
    """Every wanted unit is committed and merged."""

    @property
    def exit_code(self) -> int:
        """1 if damage remains, 3 if units are missing or not merged, 0 if sound and complete."""
        if self.left:
            return DAMAGED
        return SOUND if self.complete else INCOMPLETE


def repair(verification: Verification) -> Repair:
    """Delete damaged units, so that the job's next start computes exactly those again.

    A unit is left alone if a running process has claimed it, or a process of another host that may
    be running.

    Args:
        verification: of the output. A unit is checked again under its claim before anything of it
            is deleted, except for wrong rows under right checksums.

    Raises:
        StoreError: another process is merging, or the output cannot be written.
    """
    output = read_output(verification.output)
    result = Repair(verification.output)
    damaged = sorted(verification.damaged_units | verification.wrong_units)
    columns = any(d.kind == "columns" for d in verification.damage)
    metadata = str(output.path / METADATA_NAME)
    here = commits_of(output.path, Owner.this_process("repair", 0, 0))
    orphans = here.orphans(output.layout, output.identity_hash)
    is_damaged = damaged or columns or any(d.path == metadata for d in verification.damage)
    if is_damaged or orphans:
        with merge_lock(output, "repair") as lock:
            if is_damaged:
                _repair(output, lock, damaged, verification.wrong_units, columns, result)
            result.orphans = lock.queue.give_up_orphans() if orphans else []
    repaired = {*result.units, *result.recovered}
    for damage in verification.damage:
        if damage.kind in ("unit", "rows"):
            is_repaired = damage.unit in repaired
        elif damage.kind == "columns":
            is_repaired = result.merged
        else:
            is_repaired = damage.path == metadata
        if not is_repaired:
            result.left.append(damage)
    result.complete = read_output(verification.output).is_complete
    return result


def _repair(
    output: Output,
    lock: MergeLock,
    damaged: list[int],
    wrong: set[int],
    columns: bool,
    result: Repair,
) -> None:
    merged, claims = MergedColumns(output), lock.queue.claims
    for unit in damaged:
        lock.progress.batches += 1
        if not claims.try_claim(unit_claim(unit)):
            result.held[unit] = claim_holder(claims, unit_claim(unit))
        elif unit in wrong or any(
            d.kind == "unit" for d in check_unit(output, unit, merged).damage
        ):
            result.units.append(unit)
        else:
            result.recovered.append(unit)
    result.n_samples = sum(output.n_documents(unit) for unit in result.units)
    if result.units or columns:
        _remove_and_merge(output, lock, columns, merged, result)
    else:
        write_metadata(output.path, merge_publisher(output.path, claims))


def _remove_and_merge(
    output: Output, lock: MergeLock, columns: bool, merged: MergedColumns, result: Repair
) -> None:
    claims = lock.queue.claims
    publisher = merge_publisher(output.path, claims)
    # Before anything is deleted: from now on a job that finds every unit recorded merges again.
    update_attributes(output.store, {"complete": False}, publisher)
    write_metadata(output.path, publisher)
    were_merged = any(merged.has(unit) for unit in result.units)
    # A running job may compute these units again at once, should this process be killed.
    mark_as_missing(output.store, output.layout, result.units, publisher)
    lock.queue.commits.give_up(result.units, output.layout)
    # A merge reads all records, so it cannot run while a damaged one of another process remains.
    if (columns or were_merged or output.is_merged) and not result.held:
        lock.merge()
        result.merged = True
    # The merge may take so long that a job of another host takes a claim over and commits.
    for unit in result.units:
        if claims.owns(unit_claim(unit)):
            lock.queue.commits.clean_up(unit, output.layout)
