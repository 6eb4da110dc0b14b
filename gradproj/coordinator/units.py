"""Units: which are left, which this process works on, and how one is committed.

A unit is committed by two exclusive publications, the shard first and the record after it. The record is the
commit; everything before it can be lost without harm. Both files lie finished in the owner's scratch folder before
it asks for the last time whether the unit is still its own: from then on, a process that takes the unit over takes
the files away.
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
from gradproj.coordinator.fencing import make_scratch, make_scratch_again, remove_scratch
from gradproj.coordinator.heartbeats import forget_heartbeat, heartbeat_counter
from gradproj.coordinator.partial_rows import PartialLog, partial_folder
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.store_guard import StoreGuard
from gradproj.coordinator.waiting import WaitNotice
from gradproj.errors import StoreError
from gradproj.files import (
    file_sum,
    fsync_dir,
    publish_exclusively,
    replace_atomically,
    write_file_durably,
)
from gradproj.store.layout import StoreLayout
from gradproj.store.unit_record import (
    UnitRecord,
    encode_record,
    list_records,
    read_record,
    record_name,
)
from gradproj.store.writer import shard_chunks

log = logging.getLogger(__name__)

FOLDERS = ("units", "claims", "heartbeats", "partial", "tmp", "logs")
"""What the job keeps in OUTPUT beside the store."""

WAIT_S = (0.1, 5.0)
"""First and longest pause between two looks at the claims of others, once nothing is left to claim."""
STOP_LOOK_S = 0.2
"""Between two looks during a pause whether the job is to stop."""


@dataclass(frozen=True)
class UnitRows:
    """A finished unit on the host, ready to be committed."""

    record: UnitRecord
    stored: np.ndarray | None
    """``(n, D)`` encoded rows, or None where no row of the unit is stored."""


class UnitQueue:
    """The units of one store as one process works through them.

    Args:
        output: OUTPUT; its folders exist.
        layout: of the store.
        identity: hash of the settings that rows depend on.
        wanted: units to be computed, sorted.
        owner: this process.
        stopping: asked between units; true once the job is to end early.
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
        self.scratch = scratch_of(output, owner)
        self.guard = StoreGuard(output, identity)
        make_scratch(self.scratch, owner)
        self.claims = ClaimBoard(
            output / "claims",
            self.scratch,
            owner,
            lambda other: heartbeat_counter(output / "heartbeats", other),
            self.guard.check_folders,
            lambda other: forget_heartbeat(output / "heartbeats", other),
        )
        self._notice = WaitNotice(self.claims)

    # --- which ---

    def is_recorded(self, unit: int) -> bool:
        """Whether the unit is committed."""
        return (self.output / record_name(unit)).exists()

    def pending(self) -> np.ndarray:
        """Wanted units without a record, sorted."""
        return np.setdiff1d(self.wanted, list_records(self.output / "units"), assume_unique=True)

    def take(self) -> Iterator[int]:
        """Claim one unit after the other until nothing is left for this process to do.

        Each process walks in an order of its own, so that they seldom meet. Once all units are recorded or
        claimed, it stays until its own job's claims are recorded and no stale claim is left: a rank that dies
        late leaves its unit to those that are still here.
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
                if self.owner.rank == 0:  # one of each job will do
                    self._notice.say(unit_claim(unit) for unit in pending.tolist())
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
            # Committed between the two questions; the claim that spoke for it is gone.
            self.claims.delete(unit_claim(unit))
            return False
        return True

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, STOP_LOOK_S))

    def _waits_for_others(self) -> bool:
        """Whether a unit may still come back to this process.

        Not where another job is seen at work on it. One that is not may be dead: that shows after a while.
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
        """The saved rows of a unit that was not finished."""
        return PartialLog(
            partial_folder(self.output, unit),
            self.scratch,
            key,
            self.owner,
            self.guard.check_folders,
        )

    # --- commit ---

    def commit(self, rows: UnitRows) -> bool:
        """Put a unit on disk. False: another process has committed it, or has taken the claim over.

        Raises:
            StoreError: the disk is full, read-only, or not ours; nothing committed is lost. Or what lay on it was
                deleted, or replaced by another store.
        """
        unit = rows.record.unit
        while True:
            try:
                committed = self._commit(rows)
                break
            except FileNotFoundError:
                # Fenced: another process held this one for dead. Perhaps not because of this unit, so ask again.
                make_scratch_again(self.scratch, self.owner, self.guard.check_folders)
        if self.is_recorded(unit):
            shutil.rmtree(partial_folder(self.output, unit), ignore_errors=True)
            fault_points.reach("partial removed")
            self.claims.delete(unit_claim(unit))
        else:
            self.claims.release(unit_claim(unit))
        return committed

    def _commit(self, rows: UnitRows) -> bool:
        record, shard, stamp = rows.record, self.scratch / f"shard-{rows.record.unit}", None
        record_file = self.scratch / f"record-{record.unit}"
        if rows.stored is not None:
            record.shard = write_file_durably(shard, shard_chunks(rows.stored, self.layout))
            stamp = _stamp(shard)
            fault_points.reach("shard written")
        write_file_durably(record_file, [encode_record(record)])
        fault_points.reach("record written")
        self.guard.check_folders()
        published = False
        if not self.is_recorded(record.unit) and self.claims.owns(unit_claim(record.unit)):
            published = stamp is None or self._publish_shard(record.unit, shard)
            published = published and self._publish_record(record, record_file, stamp)
        shard.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)
        return published

    def _publish_shard(self, unit: int, temporary: Path) -> bool:
        final = self.output / self.layout.shard_name(unit)
        if final.exists():
            # Left by an owner that died between shard and record, or by a damaged unit whose record was deleted.
            # Without a record it counts for nothing, and every older owner is fenced.
            replace_atomically(temporary, final)
            published = True
        else:
            published = publish_exclusively(temporary, final)
        fault_points.reach("shard published")
        return published

    def _publish_record(
        self, record: UnitRecord, temporary: Path, shard: tuple[int, ...] | None
    ) -> bool:
        final = self.output / record_name(record.unit)
        if not publish_exclusively(temporary, final):
            return False
        fault_points.reach("record published")
        published = self.output / self.layout.shard_name(record.unit)
        if shard is not None and _stamp(published) != shard and file_sum(published) != record.shard:
            # The fence and the exclusive names forbid it; a file system that keeps neither is still found out.
            final.unlink()
            fsync_dir(final.parent)
            return False
        return True

    @contextmanager
    def deletions_explained(self) -> Iterator[None]:
        """What is not found because a part of OUTPUT has been deleted comes out as a ``StoreError`` that names it."""
        try:
            yield
        except FileNotFoundError:
            self.guard.check_folders()
            raise

    def release(self) -> None:
        """Release what is claimed and not committed, and take this process's own files away."""
        try:
            self.guard.check()  # what this process has claimed may be another's in another store
            self.claims.give_back_all()
        except StoreError as error:
            # Which the commit has met and said; a dead owner's claims are free as well.
            log.warning("claims stay until they are found stale: %s", error)
        remove_scratch(self.scratch)
        fault_points.reach("scratch removed")


def unit_claim(unit: int) -> str:
    """A unit's name among the claims."""
    return f"{unit:08d}"


def scratch_of(output: Path, owner: Owner) -> Path:
    """Where a process keeps what it has not published yet."""
    return output / "tmp" / owner.name


def _stamp(path: Path) -> tuple[int, ...]:
    """Tells one file from another without reading it: device, inode, size."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size


def read_unit(output: Path, unit: int, identity: str) -> UnitRecord:
    """A unit's record, checked to belong to this store.

    Raises:
        StoreError: damaged, or made with other settings.
    """
    path = output / record_name(unit)
    record = read_record(path)
    if record.identity != identity or record.unit != unit:
        raise StoreError(
            f"{path} belongs to another store (unit {record.unit}, settings {record.identity}). `python -m gradproj "
            f"verify {output} --repair` turns it into a missing unit, which the job computes again"
        )
    return record
