"""What the merged columns say of units whose record has gone is taken back, before the job computes them again.

Records are the truth. A damaged unit becomes a missing one by the loss of its record (``verify --repair`` deletes it);
then the store is not complete any more, and no reader may go on seeing the unit's rows as merged.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradproj.coordinator import faults
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.merge import (
    MERGE_CLAIM,
    WAIT_S,
    is_complete,
    is_merged,
    release_merge,
    wanted_units,
    write_metadata,
)
from gradproj.store.layout import COLUMNS, STATUS, STORE_NAME, StoreLayout
from gradproj.store.mapping import map_file
from gradproj.store.opening import read_attributes, read_layout
from gradproj.store.records import list_records
from gradproj.store.writer import update_attributes, write_column_block


def take_back(output: Path, claims: ClaimBoard) -> None:
    """Mark a store with missing units as not complete, and those units' merged rows as missing.

    Also writes ``metadata.json`` where it is not a copy of the attributes. Waits for a merge that is running.
    """
    while _is_overtaken(output):
        if not claims.try_claim(MERGE_CLAIM):
            time.sleep(WAIT_S)
            continue
        try:
            _take_back(output, claims.scratch)
        finally:
            release_merge(output, claims)
    if is_merged(output) and MERGE_CLAIM in claims.current() and claims.try_claim(MERGE_CLAIM):
        release_merge(output, claims)  # of a process that died between the merge's last word and this


def _is_overtaken(output: Path) -> bool:
    return (
        (is_merged(output) and not is_complete(output))
        or next(_blocks_with_lost_units(output), None) is not None
        or _read_metadata(output) != read_attributes(output / STORE_NAME)
    )


def _take_back(output: Path, scratch: Path) -> None:
    store = output / STORE_NAME
    # First of all: whatever happens after this, the next merge writes every column again.
    if is_merged(output) and not is_complete(output):
        n_records = len(list_records(output / "units"))
        update_attributes(store, {"complete": False, "units_recorded": n_records}, scratch)
    layout = read_layout(store)
    for block, status in list(_blocks_with_lost_units(output)):
        write_column_block(store, layout, block, {"status": status}, scratch)
    write_metadata(output, scratch)
    faults.at("merge taken back")


def _blocks_with_lost_units(output: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks whose status column knows units without a record, each with the column as it has to be."""
    store = output / STORE_NAME
    layout = read_layout(store)
    missing = np.setdiff1d(wanted_units(read_attributes(store)), list_records(output / "units"))
    blocks = missing * layout.rows_per_shard // layout.column_rows
    for block in np.unique(blocks).tolist():
        merged = _merged_status(store, layout, block)
        if merged is None:
            continue
        status, start = merged.copy(), block * layout.column_rows
        for unit in missing[blocks == block].tolist():
            first, last = layout.unit_range(unit)
            status[first - start : last - start] = STATUS["missing"]
        if (status != merged).any():
            yield block, status


def _merged_status(store: Path, layout: StoreLayout, block: int) -> np.ndarray | None:
    """A block of the status column; None where it was never merged, or is torn: a merge writes it anew."""
    data = map_file(store / "status" / f"c.{block}")
    start, stop = layout.column_block_range(block)
    dtype = COLUMNS["status"][0]
    if data is None or len(data) != dtype.itemsize * layout.column_rows:
        return None
    return np.frombuffer(data, dtype)[: stop - start]


def _read_metadata(output: Path) -> object:
    try:
        return json.loads((output / "metadata.json").read_text())
    except (OSError, ValueError):
        return None
