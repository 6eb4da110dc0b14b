"""Commits in a bucket: a put-if-absent decides, and processes that come later help.

A bucket has no renames, no locks and nothing that could be fenced. So claims only advise who should
work, and the first shard of a unit's rows that gets its name decides what the unit is. Before its
shard a process publishes everything else of the unit under a name with the shard's checksum. So
every process that finds a shard can finish its unit, and none can finish it in another way.

Nothing of a unit is ever deleted. A repair replaces its record and its shards by marks of its own,
and only these, not free names, can be replaced from then on: whatever a process began before the
repair is refused. README.md has the argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np

from gradproj.coordinator import fault_points
from gradproj.coordinator.commits import Check, Commits, UnitRows
from gradproj.coordinator.heartbeats import IN_BUCKET
from gradproj.coordinator.process_id import Owner
from gradproj.errors import StoreError
from gradproj.files import crc32c
from gradproj.storage.folders import delete_tree, read_or_none
from gradproj.storage.object_path import ObjectPath, names_in
from gradproj.storage.probe import PROBE_DIR
from gradproj.storage.publish import PREPARED_DIR, ObjectPublisher, Outdated
from gradproj.storage.stored_object import one_buffer
from gradproj.store.hidden_states import hidden_layout, sharded_layouts
from gradproj.store.layout import UNITS_DIR, StoreLayout
from gradproj.store.unit_record import (
    MIN_RECORD_BYTES,
    decode_record,
    encode_record,
    given_up_mark,
    is_given_up,
    list_given_up,
    list_shards,
    record_name,
)
from gradproj.store.writer import free_shard, shard_chunks


@dataclass(frozen=True)
class _Slot:
    """Place of a unit's objects, which a process may fill: free names, or a repair's marks."""

    unit: int
    layout: StoreLayout
    identity: str
    mark: bytes
    """In place of the record; empty if there was nothing."""

    def shard(self, stored: np.ndarray, layout: StoreLayout) -> bytes:
        """Return a shard. With a mark it differs from every shard that was given up.

        So a repair that was carried out late cannot take it for one of those, even with the same
        rows. The mark is between the chunks and their index, where readers do not look.
        """
        return one_buffer(shard_chunks(stored, layout, before_index=self.mark))

    def free(self, layout: StoreLayout) -> bytes:
        """Return what is in place of the shard of an array; empty = nothing."""
        return free_shard(layout, self.mark) if self.mark else b""

    @property
    def suffix(self) -> str:
        """End of the names of what is prepared with these settings, since that repair."""
        return "." + blake2b(self.identity.encode() + self.mark, digest_size=8).hexdigest()

    def prepared_name(self, shard: bytes) -> str:
        """Name what is prepared for a shard."""
        return f"{self.unit:08d}.{len(shard)}-{crc32c(shard):08x}{self.suffix}"


class ObjectCommits(Commits):
    """Commits of one process in a bucket."""

    publisher: ObjectPublisher

    def __init__(self, output: Path, owner: Owner) -> None:
        super().__init__(output, owner)
        self.publisher = ObjectPublisher()
        self.pace = IN_BUCKET

    def begin(self) -> None:
        pass

    def end(self) -> None:
        pass

    def create(self, final: Path, content: bytes, check: Check) -> bool:
        return self.publisher.create(final, [content])

    def append(self, final: Path, content: bytes, check: Check) -> None:
        check()
        self.publisher.create(final, [content])

    def fence(self, old: Owner, check: Check) -> None:
        pass

    def was_fenced(self) -> bool:
        return False

    # --- a unit ---

    def commit(
        self, rows: UnitRows, layout: StoreLayout, may_publish: Callable[[], bool], check: Check
    ) -> bool:
        record, hidden, shard = rows.record, b"", b""
        # Before the claim is asked for: what a repair that has taken it over since leaves is not
        # for this process.
        mark = self._mark(record.unit)
        if mark is None:
            return False
        slot = _Slot(record.unit, layout, record.identity, mark)
        if rows.hidden is not None and (of_hidden := hidden_layout(layout)) is not None:
            hidden = slot.shard(rows.hidden, of_hidden)
            record.hidden = _sum_of(hidden)
        if rows.stored is not None:
            shard = slot.shard(rows.stored, layout)
            record.shard = _sum_of(shard)
        fault_points.reach("shard written")
        mine = encode_record(record)
        fault_points.reach("record written")
        if not may_publish():
            return False
        chosen = self._decide(slot, shard, mine, hidden)
        if chosen is None or not self._publish_hidden(slot, chosen):
            return False
        return self._publish_record(slot, chosen[0]) and chosen[0] == mine

    def _mark(self, unit: int) -> bytes | None:
        """Return what is in place of the unit's record, empty = nothing; None if it is there.

        To readers an object too small for a record is none, whatever it holds.
        """
        content = read_or_none(self.output / record_name(unit)) or b""
        return content if len(content) < MIN_RECORD_BYTES else None

    def _decide(
        self, slot: _Slot, shard: bytes, record: bytes, hidden: bytes
    ) -> tuple[bytes, bytes] | None:
        """Publish the shard unless there is one. What was prepared for that one is the unit.

        Returns:
            The unit's record and its shard of hidden states; None if it is committed already, or
            was given up meanwhile.
        """
        final, free = self.output / slot.layout.shard_name(slot.unit), slot.free(slot.layout)
        if shard:
            # Another process may have prepared the very same rows: then it is that unit.
            path = self.output / PREPARED_DIR / slot.prepared_name(shard)
            parts = [len(record).to_bytes(8, "little"), record, hidden]
            prepared = self.publisher.publish_or_read(path, one_buffer(parts))
            found: bytes | None = self.publisher.publish_or_read(final, shard, free)
            fault_points.reach("shard published")
        else:
            found = read_or_none(final)
        if found is None or found == free:  # no process has rows of this unit, as far as is known
            return record, hidden
        if found != shard:
            theirs = read_or_none(self.output / PREPARED_DIR / slot.prepared_name(found))
            # In this order: what was prepared is deleted once the record exists.
            if theirs is None:
                self._lost(slot, final)
                return None
            prepared = theirs
        return _split(prepared)

    def _lost(self, slot: _Slot, shard: Path) -> None:
        """Check that a shard of which nothing was prepared is there because this one came late.

        Raises:
            StoreError: it belongs to no unit.
        """
        if self._mark(slot.unit) == slot.mark:
            self.forget(slot.unit)  # of other shards than that; the next start would rely on it
            raise StoreError(
                f"{shard} belongs to no unit: it has no record, and none was prepared. Start "
                "again: the start gives it up, and the unit is computed again"
            )

    def _publish_hidden(self, slot: _Slot, chosen: tuple[bytes, bytes]) -> bool:
        """Publish the hidden states that belong to a record. False if this process came late."""
        of_hidden = hidden_layout(slot.layout)
        if not chosen[1] or of_hidden is None:
            return True
        final = self.output / of_hidden.shard_name(slot.unit)
        if self.publisher.publish_or_read(final, chosen[1], slot.free(of_hidden)) == chosen[1]:
            return True
        self._lost(slot, final)
        return False

    def _publish_record(self, slot: _Slot, record: bytes) -> bool:
        """Publish the record that belongs to the published shard."""
        final = self.output / record_name(slot.unit)
        there = self.publisher.publish_or_read(final, record, slot.mark)
        fault_points.reach("record published")
        if there == record or not there or is_given_up(there):
            return there == record
        ours, theirs = decode_record(record, final), decode_record(there, final)
        # Another record of the same rows comes from a process that had computed them too, and
        # prepared them again after the commit. A unit without rows is decided by its record.
        if None in (ours.shard, theirs.shard) or theirs.shard == ours.shard:
            return False
        shard = read_or_none(self.output / slot.layout.shard_name(slot.unit))
        if shard is not None and _sum_of(shard) == theirs.shard:  # repaired, and committed since
            return False
        raise StoreError(
            f"{final} does not belong to the unit's shard. `python -m gradproj verify "
            f"{self.output} --repair` gives both up; then start again"
        )

    def forget(self, unit: int) -> None:
        self._delete_prepared(lambda other: other == unit)

    # --- given up ---

    def give_up(self, units: list[int], layout: StoreLayout) -> None:
        for unit in units:
            path = cast(ObjectPath, self.output / record_name(unit))
            if unit >= layout.n_units:  # a stray record
                path.delete()
                continue
            try:
                content, version = path.read_versioned()
            except FileNotFoundError:
                content, version = b"", None
            # Unlike all others: no process gives up the same record, or nothing, twice.
            name = self.owner.name.encode() + content
            mark = given_up_mark(blake2b(name, digest_size=8).hexdigest())
            # First of all, and only if it still is what was read: from now on no record can be
            # published for the shards that are there. Those of the rows are last, so that a
            # process that finds their mark finds all others.
            self.publisher.replace_version(path, version, mark)
            publisher = self.publisher.guarded(partial(self._check_mark, unit, mark))
            for each in sharded_layouts(layout):
                publisher.replace(self.output / each.shard_name(unit), [free_shard(each, mark)])
            self.forget(unit)

    def _check_mark(self, unit: int, mark: bytes) -> None:
        """Check that no other process has given the unit up since, and no unit is committed."""
        if self._mark(unit) != mark:
            raise Outdated(str(self.output / record_name(unit)))

    def clean_up(self, unit: int, layout: StoreLayout) -> None:
        pass

    def orphans(self, layout: StoreLayout, identity: str) -> list[int]:
        # In this order: what is prepared goes once there is a record.
        arrays = [self.output / each.shard_name(0) for each in sharded_layouts(layout)]
        shards = {unit for path in arrays for unit in list_shards(path.parent).tolist()}
        names = names_in(self.output / PREPARED_DIR)
        given_up, recorded = list_given_up(self.output / UNITS_DIR)
        orphans = []
        for unit in sorted((shards | given_up) - recorded):
            if unit >= layout.n_units:
                continue
            mark = self._mark(unit) if unit in given_up else b""
            if mark is None:  # committed since
                continue
            slot = _Slot(unit, layout, identity, mark)
            start = f"{unit:08d}."
            if not any(n.startswith(start) and n.endswith(slot.suffix) for n in names):
                final = self.output / layout.shard_name(unit)
                if not (mark and _has_content(final, slot.free(layout))):
                    orphans.append(unit)
        return orphans

    # --- leftovers ---

    def remove_leftovers(self, committed: set[int]) -> set[str]:
        self._delete_prepared(committed.__contains__)
        delete_tree(self.output / PROBE_DIR)
        return set()

    def _delete_prepared(self, wanted: Callable[[int], bool]) -> None:
        for name in names_in(self.output / PREPARED_DIR):
            unit = name.partition(".")[0]
            if unit.isdigit() and wanted(int(unit)):
                (self.output / PREPARED_DIR / name).unlink(missing_ok=True)


def _has_content(path: Path, content: bytes) -> bool:
    meta = cast(ObjectPath, path).meta()
    return meta is not None and meta["size"] == len(content) and read_or_none(path) == content


def _sum_of(data: bytes) -> dict[str, int]:
    return {"bytes": len(data), "crc32c": crc32c(data)}


def _split(prepared: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(prepared[:8], "little")
    return prepared[8:end], prepared[end:]
