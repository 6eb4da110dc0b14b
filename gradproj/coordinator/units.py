"""Units of work: which are left, which this process claims, and how one is committed.

A unit is committed by exclusive publications, first of its shards, last of its record. The record
is the commit; everything before it can be lost without harm (``Commits``).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from gradproj.coordinator import fault_points
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.commits import UnitRows
from gradproj.coordinator.heartbeats import delete_heartbeat, heartbeat_counter
from gradproj.coordinator.opening import commits_of
from gradproj.coordinator.partial_rows import PartialLog, partial_folder
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.progress import WaitNotice
from gradproj.coordinator.store_guard import StoreGuard
from gradproj.errors import StoreError
from gradproj.storage.folders import delete_tree, read_ahead
from gradproj.storage.object_path import in_bucket
from gradproj.storage.publish import Outdated
from gradproj.store.layout import CLAIMS_DIR, HEARTBEATS_DIR, UNITS_DIR, StoreLayout
from gradproj.store.unit_record import (
    UnitRecord,
    is_recorded,
    list_records,
    read_record,
    record_name,
)

log = logging.getLogger(__name__)

STOP_CHECK_S = 0.2
"""Time between two checks for a stop request during a pause."""


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
        self.commits = commits_of(output, owner)
        self.guard = StoreGuard(output, identity)
        self.commits.begin()
        self.claims = ClaimBoard(
            output / CLAIMS_DIR,
            self.commits,
            lambda other: heartbeat_counter(output / HEARTBEATS_DIR, other),
            self.guard.check_folders,
            lambda other: delete_heartbeat(output / HEARTBEATS_DIR, other),
        )
        self._notice = WaitNotice(self.claims)

    # --- which ---

    def is_recorded(self, unit: int) -> bool:
        """Return whether the unit is committed."""
        return is_recorded(self.output, unit)

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
        order, waits_s = np.random.default_rng(seed), self.commits.pace.wait_s
        wait_s = waits_s[0]
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
                wait_s = waits_s[0]
            elif self._waits_for_others():
                if self.owner.rank == 0:  # once per job
                    self._notice.show(unit_claim(unit) for unit in pending.tolist())
                self._pause(wait_s)
                wait_s = min(2 * wait_s, waits_s[1])
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
            partial_folder(self.output, unit), self.commits, key, self.guard.check_folders
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

        def may_publish() -> bool:
            self.guard.check_folders()
            return not self.is_recorded(unit) and self.claims.owns(unit_claim(unit))

        committed = self.commits.commit(rows, self.layout, may_publish, self.guard.check_folders)
        if self.is_recorded(unit):
            delete_tree(partial_folder(self.output, unit))
            self.commits.forget(unit)
            fault_points.reach("partial removed")
            self.claims.delete(unit_claim(unit))
        else:
            self.claims.release(unit_claim(unit))
        return committed

    def give_up_orphans(self) -> list[int]:
        """Make units computable again whose shards nobody can commit or replace.

        Such shards are left by a repair that was killed, or their record was deleted by hand.

        Returns:
            The units. Not those that another process has claimed: it may be doing the same.
        """
        units, given_up = self.commits.orphans(self.layout, self.identity), []
        claimed = [unit for unit in units if self.claims.try_claim(unit_claim(unit))]
        # What was seen before the claims may have been another process's work.
        units = self.commits.orphans(self.layout, self.identity) if claimed else []
        for unit in sorted(set(units) & set(claimed)):
            with suppress(Outdated):
                self.commits.give_up([unit], self.layout)
                given_up.append(unit)
        for unit in claimed:
            self.claims.release(unit_claim(unit))
        return given_up

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
        self.commits.end()


def unit_claim(unit: int) -> str:
    """Return the name of a unit's claims."""
    return f"{unit:08d}"


def read_unit(output: Path, unit: int, identity: str) -> UnitRecord:
    """Read a unit's record and check that it belongs to this store.

    Raises:
        StoreError: it is damaged, or was made with other settings.
    """
    path = output / record_name(unit)
    try:
        record = read_record(path)
    except FileNotFoundError:
        if in_bucket(path) or not path.is_file():
            raise
        raise StoreError(
            f"{path} is no record but the mark of a unit that was given up in a bucket, copied by "
            f"another program than gradproj. `python -m gradproj verify {output} --repair` deletes "
            "it, and the job's next run computes the unit again"
        ) from None
    if record.identity != identity or record.unit != unit:
        raise StoreError(
            f"{path} belongs to another store (unit {record.unit}, settings {record.identity}). "
            f"`python -m gradproj verify {output} --repair` deletes it, and the job's next run "
            "computes the unit again"
        )
    return record


def read_units(output: Path, units: Sequence[int], identity: str) -> Iterator[UnitRecord]:
    """Yield units' records in order, as ``read_unit`` returns them."""
    return read_ahead(lambda unit: read_unit(output, unit, identity), units, output)
