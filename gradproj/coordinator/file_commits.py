"""Commits on a file system: scratch folders, exclusive links, fences.

All files of a unit are complete in the owner's scratch directory before the owner checks for the
last time that it still holds the claim. From then on, a process that takes the unit over deletes
the files, so a late publication fails.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.coordinator import fault_points
from gradproj.coordinator.commits import Check, Commits, UnitRows
from gradproj.coordinator.fencing import (
    OWNER_FILE,
    fence,
    make_scratch,
    read_owner,
    recreate_scratch,
    remove_scratch,
)
from gradproj.coordinator.heartbeats import ON_DISK
from gradproj.coordinator.process_id import Owner
from gradproj.files import (
    explain_os_errors,
    file_sum,
    fsync_dir,
    publish_exclusively,
    replace_atomically,
    write_file_durably,
)
from gradproj.storage.publish import FilePublisher
from gradproj.store.hidden_states import hidden_layout, sharded_layouts
from gradproj.store.layout import SCRATCH_DIR, UNITS_DIR, StoreLayout
from gradproj.store.unit_record import UnitRecord, encode_record, record_name
from gradproj.store.writer import shard_chunks


@dataclass(frozen=True)
class _Shard:
    """A shard file of a unit that is being committed."""

    temporary: Path
    final: Path
    written: dict[str, int]
    """Its size and checksum, by ``file_sum``."""
    stamp: tuple[int, ...]


class FileCommits(Commits):
    """Commits of one process on a file system that all processes share."""

    def __init__(self, output: Path, owner: Owner) -> None:
        super().__init__(output, owner)
        self.scratch = output / SCRATCH_DIR / owner.name
        self.publisher = FilePublisher(self.scratch)
        self.pace = ON_DISK

    def begin(self) -> None:
        make_scratch(self.scratch, self.owner)

    def end(self) -> None:
        remove_scratch(self.scratch)
        fault_points.reach("scratch removed")

    def create(self, final: Path, content: bytes, check: Check) -> bool:
        while True:
            try:
                return self.publisher.create(final, [content])
            except FileNotFoundError:
                # Another process has fenced this one because of some unit. Whether this name is
                # still free is decided by the link, so try again.
                recreate_scratch(self.scratch, self.owner, check)
                if not final.parent.is_dir():
                    raise

    def append(self, final: Path, content: bytes, check: Check) -> None:
        while True:
            # Either directory may disappear at any moment: a process that commits the unit deletes
            # the first, a fence the second.
            check()
            try:
                with explain_os_errors(final.parent):
                    final.parent.mkdir(exist_ok=True)
                    fsync_dir(final.parent.parent)
                make_scratch(self.scratch, self.owner)
                self.publisher.create(final, [content])
                return
            except FileNotFoundError:
                if not final.parent.parent.is_dir():
                    raise

    def fence(self, old: Owner, check: Check) -> None:
        fence(self.scratch.parent / old.name, self.scratch, self.owner, check)

    def was_fenced(self) -> bool:
        return not self.scratch.is_dir()

    # --- a unit ---

    def commit(
        self, rows: UnitRows, layout: StoreLayout, may_publish: Callable[[], bool], check: Check
    ) -> bool:
        while True:
            try:
                return self._commit(rows, layout, may_publish)
            except FileNotFoundError:
                # Fenced: another process considered this one dead. Perhaps it took over another
                # unit only, so try again and check this claim.
                recreate_scratch(self.scratch, self.owner, check)

    def _commit(self, rows: UnitRows, layout: StoreLayout, may_publish: Callable[[], bool]) -> bool:
        record, shards = rows.record, []
        record_file = self.scratch / f"record-{record.unit}"
        if rows.hidden is not None and (hidden := hidden_layout(layout)) is not None:
            shards.append(self._write_shard(record.unit, rows.hidden, hidden, f"-{hidden.array}"))
            record.hidden = shards[-1].written
        if rows.stored is not None:
            shards.append(self._write_shard(record.unit, rows.stored, layout))
            record.shard = shards[-1].written
            fault_points.reach("shard written")
        write_file_durably(record_file, [encode_record(record)])
        fault_points.reach("record written")
        published = False
        if may_publish():
            published = all(self._publish_shard(shard) for shard in shards)
            published = published and self._publish_record(record, record_file, shards)
        for shard in shards:
            shard.temporary.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)
        return published

    def _write_shard(
        self, unit: int, stored: np.ndarray, layout: StoreLayout, suffix: str = ""
    ) -> _Shard:
        temporary = self.scratch / f"shard-{unit}{suffix}"
        written = write_file_durably(temporary, shard_chunks(stored, layout))
        final = self.output / layout.shard_name(unit)
        return _Shard(temporary, final, written, _stamp(temporary))

    def _publish_shard(self, shard: _Shard) -> bool:
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
        self, record: UnitRecord, temporary: Path, shards: Sequence[_Shard]
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

    # --- leftovers ---

    def forget(self, unit: int) -> None:
        pass

    def give_up(self, units: list[int], layout: StoreLayout) -> None:
        with explain_os_errors(self.output / UNITS_DIR):
            for unit in units:
                (self.output / record_name(unit)).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                fsync_dir(self.output / UNITS_DIR)

    def clean_up(self, unit: int, layout: StoreLayout) -> None:
        for each in sharded_layouts(layout):
            path = self.output / each.shard_name(unit)
            with explain_os_errors(path.parent):
                path.unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    fsync_dir(path.parent)

    def orphans(self, layout: StoreLayout, identity: str) -> list[int]:
        return []  # a shard without a record is replaced

    def remove_leftovers(self, committed: set[int]) -> set[str]:
        gone = set()
        for scratch in (self.output / SCRATCH_DIR).glob("*/"):
            # Hidden or without an owner file: half made, or half deleted.
            if scratch.name.startswith(".") or not (scratch / OWNER_FILE).exists():
                shutil.rmtree(scratch, ignore_errors=True)
                continue
            with suppress(OSError, ValueError, TypeError):
                owner = read_owner(scratch)
                if owner.is_gone(self.owner):
                    remove_scratch(scratch)
                    gone.add(owner.name)
        return gone


def _stamp(path: Path) -> tuple[int, ...]:
    """Identify a file without reading it: device, inode, size."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size
