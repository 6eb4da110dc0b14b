"""``verify --repair``: damaged units become missing ones, and columns and sums are merged again from sound records.

The order survives a kill at any point, and a second repair goes on from there: the store is marked not complete,
the records go, the columns are merged without them, the shards go last. Until its shard goes a unit's claim is held,
so that no job commits it in between.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.merge import write_metadata
from gradproj.coordinator.units import unit_claim
from gradproj.files import explain_os_errors, fsync_dir
from gradproj.maintenance.checks import MergedColumns, check_unit
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.merge import HeldMerge, claim_holder, merge_lock
from gradproj.maintenance.verify import (
    DAMAGED,
    INCOMPLETE,
    SOUND,
    Damage,
    Verification,
)
from gradproj.store.unit_record import record_name
from gradproj.store.writer import update_attributes


@dataclass
class Repair:
    """What was done about the damage that was found. ``asdict`` of it is a part of ``--json``."""

    output: str
    units: list[int] = field(default_factory=list)
    """Units without a record and a shard now, for the job to compute again."""
    n_samples: int = 0
    """Documents of those units that the job wants: all that was lost."""
    merged: bool = False
    """Columns, sums, statistics and metadata were made again."""
    recovered: list[int] = field(default_factory=list)
    """Units that another process has put right since they were found damaged."""
    held: dict[int, str] = field(default_factory=dict)
    """Units left as they are -> the process that works on them, or may."""
    left: list[Damage] = field(default_factory=list)
    """Damage that is still there."""
    complete: bool = False
    """The store is whole as it is now."""

    @property
    def exit_code(self) -> int:
        """1 where damage is left, 3 where the job has units to compute, 0 where all is sound and complete."""
        if self.left:
            return DAMAGED
        return SOUND if self.complete else INCOMPLETE


def repair(found: Verification) -> Repair:
    """Take away what is damaged, so that the job's next start computes exactly that and nothing else.

    A unit that a living process has claimed, or a process of another host of which nothing is known, is left.

    Args:
        found: of ``verify``. Each unit is checked again under its claim before anything of it is removed; but not for
            rows that are wrong under right checksums, whose units are named in it.

    Raises:
        StoreError: another process is merging, or OUTPUT cannot be written.
    """
    output = read_output(found.output)
    done = Repair(found.output)
    damaged = sorted(found.damaged_units | found.wrong_units)
    columns = any(d.kind == "columns" for d in found.damage)
    metadata = any(d.path == str(output.path / "metadata.json") for d in found.damage)
    if damaged or columns or metadata:
        with merge_lock(output, "repair") as held:
            _remove_damaged(output, held, damaged, found.wrong_units, columns, done)
    done.left = [d for d in found.damage if not _is_gone(d, done, output)]
    after = read_output(found.output)
    done.complete = not len(after.missing) and after.is_merged
    return done


def _remove_damaged(
    output: Output,
    held: HeldMerge,
    damaged: list[int],
    wrong: set[int],
    columns: bool,
    done: Repair,
) -> None:
    merged, claims = MergedColumns(output), held.queue.claims
    for unit in damaged:
        held.progress.batches += 1
        if not claims.try_claim(unit_claim(unit)):
            done.held[unit] = claim_holder(claims, unit_claim(unit))
        elif unit in wrong or any(
            d.kind == "unit" for d in check_unit(output, unit, merged).damage
        ):
            done.units.append(unit)
        else:
            done.recovered.append(unit)
    done.n_samples = sum(output.n_documents(unit) for unit in done.units)
    if done.units or columns:
        _merge_again(output, held, columns, merged, done)
    else:
        write_metadata(output.path, held.queue.scratch)


def _merge_again(
    output: Output, held: HeldMerge, columns: bool, merged: MergedColumns, done: Repair
) -> None:
    scratch, claims = held.queue.scratch, held.queue.claims
    # Before anything goes: from here on a job that finds every unit recorded merges again.
    update_attributes(output.store, {"complete": False}, scratch)
    write_metadata(output.path, scratch)
    known = any(merged.knows(unit) for unit in done.units)
    _remove((output.path / record_name(unit) for unit in done.units), output.path / "units")
    # A merge reads all records, so it has to wait where a damaged one must be left.
    if (columns or known or output.is_merged) and not done.held:
        held.merge()
        done.merged = True
    shards = output.store / "projections"
    owned = (unit for unit in done.units if _still_ours(claims, unit))
    _remove((output.path / output.layout.shard_name(unit) for unit in owned), shards)


def _still_ours(claims: ClaimBoard, unit: int) -> bool:
    # A merge can take so long that a job of another host takes the claim over, and commits.
    return claims.owns(unit_claim(unit))


def _remove(paths: Iterable[Path], folder: Path) -> None:
    """Remove files, those that are there, and flush their folder."""
    with explain_os_errors(folder):
        for path in paths:
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            fsync_dir(folder)


def _is_gone(damage: Damage, done: Repair, output: Output) -> bool:
    if damage.kind in ("unit", "rows"):
        return damage.unit in done.units or damage.unit in done.recovered
    if damage.kind == "columns":
        return done.merged
    return damage.path == str(output.path / "metadata.json")
