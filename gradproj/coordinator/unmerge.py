"""Unmerges units whose record was deleted, before the job computes them again.

Records are authoritative as long as their store and shards exist; a job refuses to start on records
without them. ``verify --repair`` deletes the record of a damaged unit, which makes it a missing
unit. Then the store is not complete any more, and readers must not see the unit's rows as merged.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from gradproj.coordinator import fault_points
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.merge import (
    MERGE_CLAIM,
    MergeInterrupted,
    is_complete,
    is_merged,
    merge_publisher,
    ranges_of,
    release_merge,
    wanted_units,
    write_metadata,
)
from gradproj.errors import StoreError
from gradproj.formatting import count, ranges_text
from gradproj.storage.folders import touch_folder
from gradproj.storage.publish import Outdated, Publisher
from gradproj.store.column_reader import read_column_chunk
from gradproj.store.hidden_states import sharded_layouts
from gradproj.store.layout import METADATA_NAME, STATUS, STORE_NAME, UNITS_DIR, StoreLayout
from gradproj.store.metadata import read_attributes, read_layout, store_exists
from gradproj.store.unit_record import list_records, list_shards, read_record, record_name
from gradproj.store.writer import update_attributes, without_merger, write_column_block


def check_records_have_store(output: Path) -> None:
    """Check that an output with records has a store.

    Raises:
        StoreError: the store was deleted, and with it the shards.
    """
    # In this order: the store is on disk before anything is recorded.
    recorded = list_records(output / UNITS_DIR)
    if len(recorded) and not store_exists(output):
        raise StoreError(
            f"{output} holds the records of {count(len(recorded), 'unit')} but no {STORE_NAME}: "
            "their rows are gone. Restore that folder and start again; if it is lost, delete the "
            "whole output and start over"
        )


def check_records_have_shards(output: Path) -> None:
    """Check that the shards of committed units exist. Lists two directories, whatever their size.

    Raises:
        StoreError: some shards were deleted, or the record of a unit without a shard is torn.
    """
    lost = _units_without_shard(output)
    if lost:
        # NFS caches listings for up to a minute, so this one may lack another machine's commits.
        # Changing the directory from this machine makes NFS list it again.
        for layout in sharded_layouts(read_layout(output / STORE_NAME)):
            touch_folder(output / STORE_NAME / layout.array)
        lost = _units_without_shard(output)
    if lost:
        units = ranges_text(ranges_of(np.array(lost, np.int64)))
        arrays = [layout.array for layout in sharded_layouts(read_layout(output / STORE_NAME))]
        raise StoreError(
            f"{output}: {count(len(lost), 'committed unit')} without a shard in "
            f"{STORE_NAME}/{' or '.join(reversed(arrays))}: {units}. Restore the files, or give "
            f"these units up with `python -m gradproj verify {output} --repair`: this command then "
            "computes them again, and nothing else"
        )


def _units_without_shard(output: Path) -> list[int]:
    """Return committed units that have rows and no shard."""
    store = output / STORE_NAME
    # Records first: a unit committed meanwhile publishes its shard before its record.
    recorded = np.intersect1d(
        list_records(output / UNITS_DIR), wanted_units(read_attributes(store))
    )
    lost: set[int] = set()
    for layout in sharded_layouts(read_layout(store)):
        lost.update(np.setdiff1d(recorded, list_shards(store / layout.array)).tolist())
    return [unit for unit in sorted(lost) if _has_rows(output / record_name(unit))]


def _has_rows(record: Path) -> bool:
    try:
        return read_record(record).shard is not None
    except FileNotFoundError:  # repaired since the folder was listed
        return False


def unmerge_missing_units(output: Path, claims: ClaimBoard) -> None:
    """Mark a store with missing units as not complete, and those units' merged rows as missing.

    Also writes ``metadata.json`` if it is not a copy of the attributes. Waits for a running merge.
    """
    while _is_outdated(output):
        if not claims.try_claim(MERGE_CLAIM):
            time.sleep(claims.commits.pace.merge_wait_s)
            continue
        try:
            with suppress(Outdated, MergeInterrupted):  # another process merges: look again
                _unmerge(output, merge_publisher(output, claims))
        finally:
            release_merge(output, claims)
    # A process may have died between marking the store as complete and deleting its merge claim.
    if is_merged(output) and MERGE_CLAIM in claims.current() and claims.try_claim(MERGE_CLAIM):
        release_merge(output, claims)


def _is_outdated(output: Path) -> bool:
    store = output / STORE_NAME
    return (
        (is_merged(output) and not is_complete(output))
        or next(_merged_blocks(store, read_layout(store), _lost_units(output)), None) is not None
        or _read_metadata(output) != without_merger(read_attributes(store))
    )


def _unmerge(output: Path, publisher: Publisher) -> None:
    store = output / STORE_NAME
    # First of all: whatever happens next, the next merge now writes every column again.
    if is_merged(output) and not is_complete(output):
        n_records = len(list_records(output / UNITS_DIR))
        update_attributes(store, {"complete": False, "units_recorded": n_records}, publisher)
    mark_as_missing(store, read_layout(store), _lost_units(output), publisher)
    write_metadata(output, publisher)
    fault_points.reach("merge undone")


def mark_as_missing(
    store: Path, layout: StoreLayout, units: Sequence[int] | np.ndarray, publisher: Publisher
) -> None:
    """Mark units' merged rows as missing: readers then take them from the records, if there are."""
    for block, status in list(_merged_blocks(store, layout, np.asarray(units, np.int64))):
        write_column_block(store, layout, block, {"status": status}, publisher)


def _lost_units(output: Path) -> np.ndarray:
    wanted = wanted_units(read_attributes(output / STORE_NAME))
    return np.setdiff1d(wanted, list_records(output / UNITS_DIR))


def _merged_blocks(
    store: Path, layout: StoreLayout, units: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks whose status column has rows of these units, and the column without them."""
    units = units[units < layout.n_units]  # a stray record may be of any number
    blocks = units * layout.rows_per_shard // layout.column_rows
    for block in np.unique(blocks).tolist():
        merged = _merged_status(store, layout, block)
        if merged is None:
            continue
        status, start = merged.copy(), block * layout.column_rows
        for unit in units[blocks == block].tolist():
            first, last = layout.unit_range(unit)
            status[first - start : last - start] = STATUS["missing"]
        if (status != merged).any():
            yield block, status


def _merged_status(store: Path, layout: StoreLayout, block: int) -> np.ndarray | None:
    """Read a block of the status column; None if it was never merged or is torn."""
    start, stop = layout.column_block_range(block)
    try:
        status = read_column_chunk(store, layout, "status", block)
    except StoreError:  # a torn chunk; the next merge replaces it
        return None
    return None if status is None else status[: stop - start]


def _read_metadata(output: Path) -> object:
    try:
        return json.loads((output / METADATA_NAME).read_text())
    except (OSError, ValueError):
        return None
