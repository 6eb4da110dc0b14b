"""Progress of a store, from its records, claims and heartbeats. Needs no model and no torch.

It writes nothing and answers in bounded time: of a large store that is not merged yet, it counts
the rows of some units and says of how many.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator.merge import ranges_of
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import read_unit
from gradproj.errors import StoreError
from gradproj.flags import Flags, as_in, flag
from gradproj.job.recorded_args import ReadingArgs, output_flag
from gradproj.maintenance.checks import MergedColumns
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.liveness import ClaimedUnit, Speed, read_activity
from gradproj.store.hidden_states import sharded_layouts
from gradproj.store.layout import FAILED_NAME, PARTIAL_DIR, STATUS
from gradproj.store.reader import ProjectionStore
from gradproj.store.unit_record import record_name

COMPLETE, FAILED, INCOMPLETE = 0, 1, 3
"""Exit codes. 2 is a user's error, as for every command."""

COUNT_FOR_S = 1.0
"""Time to spend on counting rows of unmerged units, unless the user asks for all."""


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Flags, title="status"):
    """Which output to read, and how to print it."""

    output: str = output_flag()
    as_json: bool = flag("Print one JSON object.", False, name="json")
    rows: bool | None = flag(
        "Count rows by status in all units, or in none; default: as many units as one second "
        "allows.",
        None,
    )
    watch_s: float = flag(
        "Read the heartbeats twice, this many seconds apart: shows whether ranks on other hosts "
        "are alive.",
        0.0,
        minimum=0,
        renamed_from="watch",
        default_text="0 = read once",
    )
    anonymous: bool = as_in(ReadingArgs, "anonymous")


@dataclass(frozen=True)
class PartialUnit:
    """Saved rows of an unfinished unit. The next process that claims it continues from there."""

    unit: int
    n_batches: int
    n_bytes: int
    folder: str


@dataclass(frozen=True)
class Status:
    """Progress of a store. ``asdict`` of it is what ``--json`` prints."""

    output: str
    complete: bool
    """Every wanted unit is committed and merged."""
    merged: bool
    n_units: int
    n_committed: int
    missing_units: list[list[int]]
    """``[first, last + 1]`` ranges of wanted units without a record, claimed or not."""
    n_samples: int
    """Documents of wanted units."""
    n_committed_samples: int
    claimed: list[ClaimedUnit]
    merging: Owner | None
    merging_process: str | None
    """State of that process: ``alive``, ``silent`` or ``unknown``."""
    partial: list[PartialUnit]
    speed: Speed
    watched_s: float
    """Time for which the heartbeats were watched."""
    by_status: dict[str, int] | None
    """Rows by status; None if they were not counted."""
    n_units_counted: int
    """Committed units that ``by_status`` covers. All of them, unless the time ran out."""
    failed: dict[str, Any] | None
    """Content of ``failed.json``, the error that ended the last start; None if complete."""
    problems: list[str]

    @property
    def exit_code(self) -> int:
        """0 if complete, 1 if incomplete and the last start failed, else 3."""
        if self.complete:
            return COMPLETE
        return INCOMPLETE if self.failed is None else FAILED


def read_status(path: str | Path, *, rows: bool | None = None, watch_s: float = 0) -> Status:
    """Read the progress of a store; writes nothing.

    Args:
        path: output directory.
        rows: count rows by status, which reads the record of every unmerged unit. None counts as
            many units as ``COUNT_FOR_S`` allows.
        watch_s: read the heartbeats twice, this many seconds apart.

    Raises:
        StoreError: the directory is no job's output.
    """
    output = read_output(path)
    missing, committed = output.missing, output.committed
    activity = read_activity(output, missing, watch_s)
    problems: list[str] = []
    by_status, n_counted = None, 0
    if rows is not False:
        most_s = COUNT_FOR_S if rows is None else None
        by_status, n_counted = _rows_by_status(output, most_s, problems)
    return Status(
        output=str(output.path),
        complete=output.is_complete,
        merged=output.is_merged,
        n_units=len(output.wanted),
        n_committed=len(committed),
        missing_units=ranges_of(missing),
        n_samples=output.layout.n_samples_in(output.wanted),
        n_committed_samples=output.layout.n_samples_in(committed),
        claimed=activity.claimed,
        merging=activity.merging,
        merging_process=activity.merging_process,
        partial=_partial_units(output, missing),
        speed=activity.speed,
        watched_s=watch_s,
        by_status=by_status,
        n_units_counted=n_counted,
        failed=None if output.is_complete else _failure(output),
        problems=problems,
    )


def _rows_by_status(
    output: Output, most_s: float | None, problems: list[str]
) -> tuple[dict[str, int], int]:
    """Count the rows of committed units by status.

    Args:
        output: of the job. The records of unmerged units are read.
        most_s: stop after this many seconds; None to count all units.
        problems: receives a line for each unit whose rows cannot be counted.

    Returns:
        ``(rows by status, number of committed units they cover)``.
    """
    committed, missing, layout = output.committed, output.missing, output.layout
    counts = np.zeros(256, np.int64)
    n_counted = len(committed)
    if output.is_complete:
        with ProjectionStore(output.path) as store:
            by_name = store.status_counts()
            counts[[STATUS[name] for name in by_name]] = list(by_name.values())
    else:
        merged, n_counted = MergedColumns(output), 0
        started = time.monotonic()
        # In random order, so that the first units counted are not all of one domain.
        for unit in np.random.default_rng(0).permutation(committed).tolist():
            if most_s is not None and time.monotonic() - started > most_s:
                break
            try:
                # If only the merge is outstanding, check the records: the merge depends on them.
                status = merged.status(unit) if len(missing) else None
                if status is None:
                    status = _recorded_status(output, unit)
                counts += np.bincount(status, minlength=256)
                n_counted += 1
            except (StoreError, OSError, ValueError, KeyError) as error:
                problems.append(f"rows of unit {unit} cannot be counted: {error}")
        counts[STATUS["missing"]] += layout.n_samples_in(missing)
        # Units without a selected document have no record; only the merge writes their rows.
        n_wanted = layout.n_samples_in(output.wanted)
        counts[STATUS["not_selected"]] += layout.n_samples - n_wanted
    return {name: int(counts[code]) for name, code in STATUS.items() if counts[code]}, n_counted


def _recorded_status(output: Output, unit: int) -> np.ndarray:
    """Return the statuses in a unit's record.

    Raises:
        StoreError: the record is damaged or of another store, or its shard is missing.
    """
    record = read_unit(output.path, unit, output.identity_hash)
    for layout in sharded_layouts(output.layout):
        shard = output.path / layout.shard_name(unit)
        if record.shard_of(layout) is not None and not shard.exists():
            raise StoreError(f"{output.path / record_name(unit)} has no shard: {shard} is missing")
    return record.columns["status"]


def _partial_units(output: Output, missing: np.ndarray) -> list[PartialUnit]:
    partial, wanted = [], set(missing.tolist())
    for folder in sorted((output.path / PARTIAL_DIR).glob("*/")):
        if not folder.name.isdigit() or int(folder.name) not in wanted:
            continue
        try:
            sizes = {file.name: file.stat().st_size for file in folder.glob("*-*.safetensors")}
        except FileNotFoundError:  # committed since the directory was listed
            continue
        if sizes:
            unit, n_bytes = int(folder.name), sum(sizes.values())
            n_batches = max(int(re.split("[-.]", name)[1]) for name in sizes)
            partial.append(PartialUnit(unit, n_batches, n_bytes, str(folder)))
    return partial


def _failure(output: Output) -> dict[str, Any] | None:
    path = output.path / FAILED_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return {"error": f"the cause of the failure is unknown: cannot read {path.name} ({error})"}
    return content if isinstance(content, dict) else {"error": str(content)}
