"""Commits in a bucket: a put-if-absent decides, and processes that come later help.

A bucket has no renames, no locks and nothing that could be fenced. So claims only advise who should
work, and the first shard of a unit's rows that gets its name decides what the unit is. Before its
shard a process publishes everything else of the unit under a name with the shard's checksum. So
every process that finds a shard can finish its unit, and none can finish it in another way.
README.md has the argument.
"""

from collections.abc import Callable
from pathlib import Path

from gradproj.coordinator import fault_points
from gradproj.coordinator.commits import Check, Commits, UnitRows
from gradproj.coordinator.heartbeats import Pace
from gradproj.coordinator.process_id import Owner
from gradproj.errors import StoreError
from gradproj.files import crc32c
from gradproj.storage.folders import delete_tree, read_or_none
from gradproj.storage.object_path import names_in
from gradproj.storage.probe import PROBE_DIR
from gradproj.storage.publish import PREPARED_DIR, ObjectPublisher
from gradproj.store.hidden_states import hidden_layout, sharded_layouts
from gradproj.store.layout import StoreLayout
from gradproj.store.unit_record import decode_record, encode_record, record_name
from gradproj.store.writer import shard_chunks


class ObjectCommits(Commits):
    """Commits of one process in a bucket."""

    def __init__(self, output: Path, owner: Owner) -> None:
        super().__init__(output, owner)
        self.publisher = ObjectPublisher()
        self.pace = Pace(slower=12.0)

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
        if rows.hidden is not None and (of_hidden := hidden_layout(layout)) is not None:
            hidden = b"".join(shard_chunks(rows.hidden, of_hidden))
            record.hidden = _sum_of(hidden)
        if rows.stored is not None:
            shard = b"".join(shard_chunks(rows.stored, layout))
            record.shard = _sum_of(shard)
        fault_points.reach("shard written")
        mine = encode_record(record)
        fault_points.reach("record written")
        if not may_publish():
            return False
        chosen = self._decide(record.unit, layout, shard, mine, hidden)
        if chosen is None or not self._publish_hidden(record.unit, layout, chosen):
            return False
        return self._publish_record(record.unit, chosen[0]) and chosen[0] == mine

    def _decide(
        self, unit: int, layout: StoreLayout, shard: bytes, record: bytes, hidden: bytes
    ) -> tuple[bytes, bytes] | None:
        """Publish the shard unless there is one. What was prepared for that one is the unit.

        Returns:
            The unit's record and its shard of hidden states; None if it is committed already.
        """
        final, publish = self.output / layout.shard_name(unit), self.publisher.publish_or_read
        if shard:
            path = self._prepared(unit, shard)
            # Another process may have prepared the very same rows: then it is that unit.
            prepared = publish(path, len(record).to_bytes(8, "little") + record + hidden)
            found: bytes | None = publish(final, shard)
            fault_points.reach("shard published")
        else:
            found = read_or_none(final)
        if found is None:  # no process has rows of this unit, as far as is known
            return record, hidden
        if found != shard:
            theirs = read_or_none(self._prepared(unit, found))
            # In this order: what was prepared is deleted once the record exists.
            if theirs is None and not self._is_recorded(unit):
                raise self._of_no_unit(final)
            if theirs is None:
                return None
            prepared = theirs
        return _split(prepared)

    def _publish_hidden(self, unit: int, layout: StoreLayout, chosen: tuple[bytes, bytes]) -> bool:
        """Publish the hidden states that belong to a record. False if the unit is committed."""
        of_hidden = hidden_layout(layout)
        if not chosen[1] or of_hidden is None:
            return True
        final = self.output / of_hidden.shard_name(unit)
        if self.publisher.publish_or_read(final, chosen[1]) == chosen[1]:
            return True
        if not self._is_recorded(unit):
            raise self._of_no_unit(final)
        return False

    def _publish_record(self, unit: int, record: bytes) -> bool:
        """Publish the record that belongs to the published shard."""
        final = self.output / record_name(unit)
        there = self.publisher.publish_or_read(final, record)
        fault_points.reach("record published")
        if there == record:
            return True
        ours, theirs = decode_record(record, final), decode_record(there, final)
        # Another record of the same rows comes from a process that had computed them too, and
        # prepared them again after the commit. A unit without rows is decided by its record.
        if None in (ours.shard, theirs.shard) or theirs.shard == ours.shard:
            return False
        raise StoreError(
            f"{final} does not belong to the unit's shard. `python -m gradproj verify "
            f"{self.output} --repair` deletes both; then start again"
        )

    def _is_recorded(self, unit: int) -> bool:
        return (self.output / record_name(unit)).is_file()

    def _of_no_unit(self, shard: Path) -> StoreError:
        return StoreError(
            f"{shard} belongs to no unit: it has no record, and none was prepared. `python -m "
            f"gradproj verify {self.output} --repair` deletes it; then start again"
        )

    def _prepared(self, unit: int, shard: bytes) -> Path:
        name = f"{unit:08d}.{len(shard)}-{crc32c(shard):08x}"
        return self.output / PREPARED_DIR / name

    def forget(self, unit: int) -> None:
        self._delete_prepared(lambda other: other == unit)

    # --- leftovers ---

    def give_up(self, unit: int, layout: StoreLayout) -> None:
        # The shards first: one without a record and without anything prepared would be nobody's,
        # while a record without its shard is found at the next start, whatever happens here.
        self.forget(unit)
        for each in sharded_layouts(layout):
            (self.output / each.shard_name(unit)).unlink(missing_ok=True)

    def clean_up(self, unit: int, layout: StoreLayout) -> None:
        pass

    def orphans(self, units: list[int], layout: StoreLayout) -> list[int]:
        # In this order: shards were seen, what is prepared goes once there is a record.
        names = names_in(self.output / PREPARED_DIR)
        prepared = {name.partition(".")[0] for name in names}
        return [u for u in units if f"{u:08d}" not in prepared and not self._is_recorded(u)]

    def remove_leftovers(self, committed: set[int]) -> set[str]:
        self._delete_prepared(committed.__contains__)
        delete_tree(self.output / PROBE_DIR)
        return set()

    def _delete_prepared(self, wanted: Callable[[int], bool]) -> None:
        for name in names_in(self.output / PREPARED_DIR):
            unit = name.partition(".")[0]
            if unit.isdigit() and wanted(int(unit)):
                (self.output / PREPARED_DIR / name).unlink(missing_ok=True)


def _sum_of(data: bytes) -> dict[str, int]:
    return {"bytes": len(data), "crc32c": crc32c(data)}


def _split(prepared: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(prepared[:8], "little")
    return prepared[8:end], prepared[end:]
