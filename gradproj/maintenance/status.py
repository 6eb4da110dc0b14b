"""``python -m gradproj status``: how far a store is, from its records, claims and heartbeats; no model, no torch.

It writes nothing, and answers in bounded time: of a large store that is not merged yet, the rows of some units are
counted, and it says of how many.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator.failure import FAILED_NAME
from gradproj.coordinator.merge import ranges_of
from gradproj.coordinator.process_id import Owner
from gradproj.errors import ConfigError
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.liveness import ClaimedUnit, Speed, read_activity
from gradproj.maintenance.row_counts import rows_by_status

COMPLETE, FAILED, INCOMPLETE = 0, 1, 3
"""Exit codes; 2 is a user's mistake, as everywhere."""

COUNT_FOR_S = 1.0
"""How long rows of units that are not merged are counted, unless all are asked for."""


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What to look at and how to say it."""

    output: str = field(
        metadata={"flag": "OUTPUT", "positional": True, "help": "the job's --output_dir"}
    )
    as_json: bool = field(
        default=False, metadata={"flag": "json", "help": "one JSON object for scripts"}
    )
    rows: bool | None = field(
        default=None,
        metadata={
            "help": "count rows by status: of all units, or not at all (default: as many as a second allows)"
        },
    )
    watch: float = field(
        default=0.0,
        metadata={
            "help": "seconds between two looks at the heartbeats, which show whether other hosts' ranks live"
        },
    )

    def __post_init__(self) -> None:
        if self.watch < 0:
            raise ConfigError(f"--watch must be at least 0 seconds, got {self.watch:g}")


@dataclass(frozen=True)
class PartialUnit:
    """Rows of a unit that was not finished; the next one to claim it goes on from there."""

    unit: int
    n_batches: int
    n_bytes: int
    folder: str


@dataclass(frozen=True)
class Status:
    """How far a store is. ``asdict`` of it is what ``--json`` prints."""

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
    """What is known of it: ``alive``, ``silent`` or ``unknown``."""
    partial: list[PartialUnit]
    speed: Speed
    watched_s: float
    """How long the heartbeats were watched."""
    by_status: dict[str, int] | None
    """Rows by status; None where they were not asked for."""
    n_units_counted: int
    """Committed units whose rows ``by_status`` counts; all of them, unless that would have taken long."""
    failed: dict[str, Any] | None
    """``failed.json``: the mistake that ended the job's last start, as the job wrote it; None once it is complete."""
    problems: list[str]

    @property
    def exit_code(self) -> int:
        """0 complete, 1 not and the last start failed, 3 not yet."""
        if self.complete:
            return COMPLETE
        return INCOMPLETE if self.failed is None else FAILED


def read_status(path: str | Path, *, rows: bool | None = None, watch_s: float = 0) -> Status:
    """How far the store at OUTPUT is; writes nothing.

    Args:
        path: OUTPUT.
        rows: count rows by status, which reads the record of every unit that is not merged: True, False, or None
            for as many as ``COUNT_FOR_S`` allows.
        watch_s: look twice at the heartbeats, so many seconds apart.

    Raises:
        StoreError: there is no job's output there.
    """
    output = read_output(path)
    missing, committed = output.missing, output.committed
    complete = not len(missing) and output.is_merged
    activity = read_activity(output, missing, watch_s)
    problems: list[str] = []
    by_status, n_counted = None, 0
    if rows is not False:
        by_status, n_counted = rows_by_status(
            output, COUNT_FOR_S if rows is None else None, problems
        )
    return Status(
        output=str(output.path),
        complete=complete,
        merged=output.is_merged,
        n_units=len(output.wanted),
        n_committed=len(committed),
        missing_units=ranges_of(missing),
        n_samples=output.n_samples_in(output.wanted),
        n_committed_samples=output.n_samples_in(committed),
        claimed=activity.claimed,
        merging=activity.merging,
        merging_process=activity.merging_process,
        partial=_partial_units(output, missing),
        speed=activity.speed,
        watched_s=watch_s,
        by_status=by_status,
        n_units_counted=n_counted,
        failed=None if complete else _failure(output),
        problems=problems,
    )


def _partial_units(output: Output, missing: np.ndarray) -> list[PartialUnit]:
    found, wanted = [], set(missing.tolist())
    for folder in sorted((output.path / "partial").glob("*/")):
        if not folder.name.isdigit() or int(folder.name) not in wanted:
            continue
        try:
            sizes = {file.name: file.stat().st_size for file in folder.glob("*-*.safetensors")}
        except FileNotFoundError:  # committed while we look
            continue
        if sizes:
            n_batches = max(int(re.split("[-.]", name)[1]) for name in sizes)
            found.append(PartialUnit(int(folder.name), n_batches, sum(sizes.values()), str(folder)))
    return found


def _failure(output: Output) -> dict[str, Any] | None:
    path = output.path / FAILED_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return {"error": f"what failed is not known: {path.name} cannot be read ({error})"}
    return content if isinstance(content, dict) else {"error": str(content)}
