"""Units of work: which are left, which this process claims, and how one is committed.

A unit is committed by exclusive publications, first of its shard (and of that of its hidden states,
if there are any), last of its record. The record is the commit; everything before it can be lost
without harm. All files are complete in the owner's scratch directory before the owner checks for
the last time that it still holds the claim. From then on, a process that takes the unit over
deletes the files, so a late publication fails.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.coordinator import fault_points
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.fencing import make_scratch, recreate_scratch, remove_scratch
from gradproj.coordinator.heartbeats import delete_heartbeat, heartbeat_counter
from gradproj.coordinator.partial_rows import PartialLog, partial_folder
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.progress import WaitNotice
from gradproj.coordinator.store_guard import StoreGuard
from gradproj.errors import StoreError
from gradproj.files import (
    file_sum,
    fsync_dir,
    publish_exclusively,
    replace_atomically,
    write_file_durably,
)
from gradproj.store.hidden_states import hidden_layout
from gradproj.store.layout import CLAIMS_DIR, HEARTBEATS_DIR, SCRATCH_DIR, UNITS_DIR, StoreLayout
from gradproj.store.unit_record import (
    UnitRecord,
    encode_record,
    list_records,
    read_record,
    record_name,
)
from gradproj.store.writer import shard_chunks

log = logging.getLogger(__name__)

WAIT_S = (0.1, 5.0)
"""First and longest pause between two checks of other processes' claims, once no unit is free."""
STOP_CHECK_S = 0.2
"""Time between two checks for a stop request during a pause."""


@dataclass(frozen=True)
class UnitRows:
    """A computed unit in host memory, ready to be committed."""

    record: UnitRecord
    stored: np.ndarray | None
    """``(n, D)`` encoded rows; None if no row of the unit is stored."""
    hidden: np.ndarray | None = None
    """``(n, d)`` float16 hidden states; None without, or if no row of the unit is stored."""


@dataclass(frozen=True)
class _Shard:
    """A shard file of a unit that is being committed."""

    temporary: Path
    final: Path
    written: dict[str, int]
    """Its size and checksum, by ``file_sum``."""
    stamp: tuple[int, ...]


class UnitQueue:
    """The units of one store, as one process works through them.

    The output's ``FOLDERS`` exist. ``identity`` is the hash of the settings that rows depend on,
    ``wanted`` are the units to be computed, sorted, and ``stopping`` is asked between units.
    """

    def __init__(
        self,
        output: Path,
        layout: StoreLayout,
        identity: str,
        wanted: Sequence[int] | np.ndarray,
        owner: Owner,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.output, self.layout, self.identity, self.owner = output, layout, identity, owner
        self.wanted = np.asarray(wanted, dtype=np.int64)
        self._stopping = stopping
        self.scratch = output / SCRATCH_DIR / owner.name
        self.guard = StoreGuard(output, identity)
        make_scratch(self.scratch, owner)
        self.claims = ClaimBoard(
            output / CLAIMS_DIR,
            self.scratch,
            owner,
            lambda other: heartbeat_counter(output / HEARTBEATS_DIR, other),
            self.guard.check_folders,
            lambda other: delete_heartbeat(output / HEARTBEATS_DIR, other),
        )
        self._notice = WaitNotice(self.claims)

    # --- which ---

    def is_recorded(self, unit: int) -> bool:
        """Return whether the unit is committed."""
        return (self.output / record_name(unit)).exists()

    def pending(self) -> np.ndarray:
        """Return the wanted units without a record, sorted."""
        return np.setdiff1d(self.wanted, list_records(self.output / UNITS_DIR), assume_unique=True)

    def take(self) -> Iterator[int]:
        """Claim one unit after the other until none is left for this process.

        Each process tries the units in an order of its own, so that they seldom compete. Once all
        units are recorded or claimed, it waits until its own job's claims are recorded and no stale
        claim is left: if a rank dies late, another one is still there to compute its unit.
        """
        seed = np.frombuffer(self.owner.name.encode(), dtype=np.uint8)
        order, wait_s = np.random.default_rng(seed), WAIT_S[0]
        while not self._stopping():
            self.guard.check_folders()
            pending = self.pending()
            taken = 0
            for unit in order.permutation(pending).tolist():
                if self._stopping():
                    return
                if self._claim(unit):
                    taken += 1
                    yield unit
            if taken:
                wait_s = WAIT_S[0]
            elif self._waits_for_others():
                if self.owner.rank == 0:  # once per job
                    self._notice.show(unit_claim(unit) for unit in pending.tolist())
                self._pause(wait_s)
                wait_s = min(2 * wait_s, WAIT_S[1])
            else:
                return

    def _claim(self, unit: int) -> bool:
        if self.is_recorded(unit):
            return False
        self.guard.check()
        if not self.claims.try_claim(unit_claim(unit)):
            return False
        if self.is_recorded(unit):
            # Committed between the two checks, and its claim deleted.
            self.claims.delete(unit_claim(unit))
            return False
        return True

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, STOP_CHECK_S))

    def _waits_for_others(self) -> bool:
        """Return whether this process may still have to compute a pending unit.

        Not while another job is seen at work on each of them. A job that is not may be dead, which
        shows only after some time.
        """
        newest = self.claims.current()
        for unit in self.pending().tolist():
            number = newest.get(unit_claim(unit))
            if number is None:
                return True
            claim = self.claims.read(unit_claim(unit), number)
            foreign = claim.owner is not None and claim.owner.job_id != self.owner.job_id
            if not foreign or self.claims.is_stale(claim) or not self.claims.is_at_work(claim):
                return True
        return False

    def partial_log(self, unit: int, key: str) -> PartialLog:
        """Return the saved rows of an unfinished unit."""
        return PartialLog(
            partial_folder(self.output, unit),
            self.scratch,
            key,
            self.owner,
            self.guard.check_folders,
        )

    # --- commit ---

    def commit(self, rows: UnitRows) -> bool:
        """Write a unit to disk.

        Returns:
            Whether this process committed it. False if another process has committed it, or has
            taken the claim over.

        Raises:
            StoreError: the disk is full or read-only, or permission is denied; or the output was
                deleted, or replaced by another store. Nothing committed is lost.
        """
        unit = rows.record.unit
        while True:
            try:
                committed = self._commit(rows)
                break
            except FileNotFoundError:
                # Fenced: another process considered this one dead. Perhaps it took over another
                # unit only, so try again and check this claim.
                recreate_scratch(self.scratch, self.owner, self.guard.check_folders)
        if self.is_recorded(unit):
            shutil.rmtree(partial_folder(self.output, unit), ignore_errors=True)
            fault_points.reach("partial removed")
            self.claims.delete(unit_claim(unit))
        else:
            self.claims.release(unit_claim(unit))
        return committed

    def _commit(self, rows: UnitRows) -> bool:
        record, shards = rows.record, []
        record_file = self.scratch / f"record-{record.unit}"
        if rows.hidden is not None and (hidden := hidden_layout(self.layout)) is not None:
            shards.append(self._write_shard(record.unit, rows.hidden, hidden))
            record.hidden = shards[-1].written
        if rows.stored is not None:
            shards.append(self._write_shard(record.unit, rows.stored, self.layout))
            record.shard = shards[-1].written
            fault_points.reach("shard written")
        write_file_durably(record_file, [encode_record(record)])
        fault_points.reach("record written")
        self.guard.check_folders()
        published = False
        if not self.is_recorded(record.unit) and self.claims.owns(unit_claim(record.unit)):
            published = all(self._publish_shard(shard) for shard in shards)
            published = published and self._publish_record(record, record_file, shards)
        for shard in shards:
            shard.temporary.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)
        return published

    def _write_shard(self, unit: int, stored: np.ndarray, layout: StoreLayout) -> "_Shard":
        of_rows = layout.array == self.layout.array
        temporary = self.scratch / f"shard-{unit}{'' if of_rows else f'-{layout.array}'}"
        written = write_file_durably(temporary, shard_chunks(stored, layout))
        final = self.output / layout.shard_name(unit)
        return _Shard(temporary, final, written, _stamp(temporary))

    def _publish_shard(self, shard: "_Shard") -> bool:
        temporary, final = shard.temporary, shard.final
        if final.exists():
            # Left by an owner that died between shard and record, or by a damaged unit whose record
            # was deleted. Without a record it has no meaning, and every older owner is fenced.
            replace_atomically(temporary, final)
            published = True
        else:
            published = publish_exclusively(temporary, final)
        fault_points.reach("shard published")
        return published

    def _publish_record(
        self, record: UnitRecord, temporary: Path, shards: Sequence["_Shard"]
    ) -> bool:
        final = self.output / record_name(record.unit)
        if not publish_exclusively(temporary, final):
            return False
        fault_points.reach("record published")
        if all(_stamp(x.final) == x.stamp or file_sum(x.final) == x.written for x in shards):
            return True
        # Fencing and exclusive names rule this out. This check is for file systems that guarantee
        # neither.
        final.unlink()
        fsync_dir(final.parent)
        return False

    @contextmanager
    def deletions_explained(self) -> Iterator[None]:
        """Raise a ``StoreError`` instead if a file is missing because its directory was deleted."""
        try:
            yield
        except FileNotFoundError:
            self.guard.check_folders()
            raise

    def release(self) -> None:
        """Release the claims of uncommitted units and delete this process's unpublished files."""
        try:
            # In another store, the same claim names may be another process's.
            self.guard.check()
            self.claims.release_all()
        except StoreError as error:
            # The commit has raised it already, and claims of a dead process become free as well.
            log.warning("claims stay until they are found stale: %s", error)
        remove_scratch(self.scratch)
        fault_points.reach("scratch removed")


def unit_claim(unit: int) -> str:
    """Return the name of a unit's claims."""
    return f"{unit:08d}"


def _stamp(path: Path) -> tuple[int, ...]:
    """Identify a file without reading it: device, inode, size."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size


def read_unit(output: Path, unit: int, identity: str) -> UnitRecord:
    """Read a unit's record and check that it belongs to this store.

    Raises:
        StoreError: it is damaged, or was made with other settings.
    """
    path = output / record_name(unit)
    record = read_record(path)
    if record.identity != identity or record.unit != unit:
        raise StoreError(
            f"{path} belongs to another store (unit {record.unit}, settings {record.identity}). "
            f"`python -m gradproj verify {output} --repair` deletes it, and the job's next run "
            "computes the unit again"
        )
    return record
