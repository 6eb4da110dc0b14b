"""Units: which are left, which this process works on, and how one is committed.

A unit is committed by two exclusive publications, the shard first and the record after it. The record is the
commit; everything before it can be lost without harm.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gradproj.coordinator.claims import ClaimBoard, Owner
from gradproj.coordinator.heartbeats import heartbeat_counter
from gradproj.coordinator.partial import PartialLog
from gradproj.errors import StoreError
from gradproj.store.files import (
    explain_os_errors,
    file_sum,
    fsync_dir,
    publish_exclusively,
    replace_atomically,
    write_file_durably,
)
from gradproj.store.layout import StoreLayout
from gradproj.store.records import UnitRecord, encode_record, list_records, read_record, record_name
from gradproj.store.writer import shard_chunks

FOLDERS = ("units", "claims", "heartbeats", "partial", "tmp", "logs")
"""What the job keeps in OUTPUT beside the store."""

WAIT_S = (0.1, 5.0)
"""First and longest pause between two looks at the claims of others, once nothing is left to claim."""


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
        self.scratch = output / "tmp" / owner.name
        with explain_os_errors(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            (self.scratch / "owner.json").write_text(json.dumps(asdict(owner)))
        self.claims = ClaimBoard(
            output / "claims",
            self.scratch,
            owner,
            lambda other: heartbeat_counter(output / "heartbeats", other),
        )

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
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, WAIT_S[1])
            else:
                return

    def _claim(self, unit: int) -> bool:
        if self.is_recorded(unit) or not self.claims.try_claim(unit_claim(unit)):
            return False
        if self.is_recorded(unit):
            # Committed between the two questions; the claim that spoke for it is gone.
            self.claims.forget(unit_claim(unit))
            return False
        return True

    def _waits_for_others(self) -> bool:
        """Whether a unit may still come back to this process."""
        newest = self.claims.current()
        for unit in self.pending().tolist():
            number = newest.get(unit_claim(unit))
            if number is None:
                return True
            claim = self.claims.read(unit_claim(unit), number)
            if claim.owner is None or claim.owner.job_id == self.owner.job_id or self.claims.is_stale(claim):
                return True
        return False

    def partial_log(self, unit: int, key: str) -> PartialLog:
        """The saved rows of a unit that was not finished."""
        return PartialLog(self.output / "partial" / f"{unit:08d}", self.scratch, key)

    # --- commit ---

    def commit(self, rows: UnitRows) -> bool:
        """Put a unit on disk. False: another process has committed it, or has taken the claim over.

        Raises:
            StoreError: the disk is full, read-only, or not ours; nothing committed is lost.
        """
        unit = rows.record.unit
        if rows.stored is not None:
            temporary = self.scratch / f"shard-{unit}"
            rows.record.shard = write_file_durably(temporary, shard_chunks(rows.stored, self.layout))
            if not self._publish_shard(unit, temporary):
                return False
        committed = self._publish_record(rows.record)
        shutil.rmtree(self.output / "partial" / f"{unit:08d}", ignore_errors=True)
        self.claims.forget(unit_claim(unit))
        return committed

    def _publish_shard(self, unit: int, temporary: Path) -> bool:
        final = self.output / self.layout.shard_name(unit)
        if self.is_recorded(unit) or not self.claims.owns(unit_claim(unit)):
            temporary.unlink()
            return False
        # Kept under a second name: publishing takes the first one away.
        spare = temporary.with_suffix(".spare")
        os.link(temporary, spare)
        try:
            if not publish_exclusively(temporary, final):
                # An owner died between shard and record. Without a record its shard counts for nothing.
                replace_atomically(spare, final)
        finally:
            spare.unlink(missing_ok=True)
        return True

    def _publish_record(self, record: UnitRecord) -> bool:
        temporary = self.scratch / f"record-{record.unit}"
        final = self.output / record_name(record.unit)
        write_file_durably(temporary, [encode_record(record)])
        if not publish_exclusively(temporary, final):
            return False
        if (
            record.shard is not None
            and file_sum(self.output / self.layout.shard_name(record.unit)) != record.shard
        ):
            # An old owner woke up and put its own shard there in between: neither is to be trusted.
            final.unlink()
            fsync_dir(final.parent)
            return False
        return True

    def give_back(self) -> None:
        """Release what is claimed and not committed, and take this process's own files away."""
        self.claims.give_back_all()
        shutil.rmtree(self.scratch, ignore_errors=True)


def unit_claim(unit: int) -> str:
    """A unit's name among the claims."""
    return f"{unit:08d}"


def sweep(output: Path, observer: Owner) -> int:
    """Delete the unpublished files of processes that are known to be gone; how many folders went."""
    swept = 0
    for folder in (output / "tmp").glob("*/"):
        try:
            owner = Owner(**json.loads((folder / "owner.json").read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if owner.is_gone(observer):
            shutil.rmtree(folder, ignore_errors=True)
            (output / "heartbeats" / f"{owner.name}.json").unlink(missing_ok=True)
            swept += 1
    return swept


def read_unit(output: Path, unit: int, identity: str) -> UnitRecord:
    """A unit's record, checked to belong to this store.

    Raises:
        StoreError: damaged, or made with other settings.
    """
    path = output / record_name(unit)
    record = read_record(path)
    if record.identity != identity or record.unit != unit:
        raise StoreError(f"{path} belongs to another store (unit {record.unit}, settings {record.identity})")
    return record
