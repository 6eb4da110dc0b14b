"""Repairs a damaged output: deletes damaged units and merges the rest again.

The order of steps survives a kill at any point, and a second repair continues from there: the store
is marked as not complete, the records are deleted, the columns are merged without them, and the
shards are deleted last. A unit's claim is held until its shard is deleted, so that no job commits
the unit in between.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gradproj.coordinator.merge import merge_publisher, write_metadata
from gradproj.coordinator.opening import commits_of
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import unit_claim
from gradproj.files import explain_os_errors
from gradproj.maintenance.checks import Damage, MergedColumns, check_unit
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.merge import MergeLock, claim_holder, merge_lock
from gradproj.maintenance.verify import DAMAGED, INCOMPLETE, SOUND, Verification
from gradproj.storage.folders import flush_folder
from gradproj.store.layout import METADATA_NAME, UNITS_DIR
from gradproj.store.unit_record import record_name
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
    """Units whose shards, in a bucket, belonged to no record and were deleted."""
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
    here = Owner.this_process("repair", 0, 0)
    orphans = commits_of(output.path, here).orphans(
        verification.shards_without_record, output.layout
    )
    is_damaged = damaged or columns or any(d.path == metadata for d in verification.damage)
    if is_damaged or orphans:
        with merge_lock(output, "repair") as lock:
            if is_damaged:
                _repair(output, lock, damaged, verification.wrong_units, columns, result)
            result.orphans = _delete_orphans(output, lock, orphans)
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


def _delete_orphans(output: Output, lock: MergeLock, units: list[int]) -> list[int]:
    claims, commits = lock.queue.claims, lock.queue.commits
    # Looked at again under the claims: a job may have prepared such a unit meanwhile.
    ours = [unit for unit in units if claims.try_claim(unit_claim(unit))]
    orphans = commits.orphans(ours, output.layout)
    for unit in orphans:
        commits.give_up(unit, output.layout)
    return orphans


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
    for unit in result.units:
        lock.queue.commits.give_up(unit, output.layout)
    were_merged = any(merged.has(unit) for unit in result.units)
    _remove((output.path / record_name(unit) for unit in result.units), output.path / UNITS_DIR)
    # A merge reads all records, so it cannot run while a damaged one of another process remains.
    if (columns or were_merged or output.is_merged) and not result.held:
        lock.merge()
        result.merged = True
    # The merge may take so long that a job of another host takes a claim over and commits.
    for unit in result.units:
        if claims.owns(unit_claim(unit)):
            lock.queue.commits.clean_up(unit, output.layout)


def _remove(paths: Iterable[Path], folder: Path) -> None:
    """Delete those files that exist, and flush their directory."""
    with explain_os_errors(folder):
        for path in paths:
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            flush_folder(folder)
