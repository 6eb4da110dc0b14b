"""``python -m gradproj status``: how far a store is, from its records, claims and heartbeats; no model, no torch.

It writes nothing, and answers in bounded time: of a large store that is not merged yet, the rows of some units are
counted, and it says of how many.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator.claims import CONFIRM_AFTER_S, STALE_AFTER_S
from gradproj.coordinator.failure import FAILED_NAME
from gradproj.coordinator.merge import ranges_of
from gradproj.coordinator.process_id import Owner
from gradproj.errors import ConfigError
from gradproj.formatting import count, human_seconds, ranges_text
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.liveness import SILENT, UNKNOWN, ClaimedUnit, Speed, read_activity
from gradproj.maintenance.row_counts import rows_by_status

COMPLETE, FAILED, INCOMPLETE = 0, 1, 3
"""Exit codes; 2 is a user's mistake, as everywhere."""

MOST_CLAIMS_SHOWN = 32
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


# --- saying it ---


def status_lines(status: Status) -> list[str]:
    """The status as lines of text."""
    n_missing = sum(b - a for a, b in status.missing_units)
    running = [c for c in status.claimed if not c.is_over and c.process != SILENT]
    silent = [c for c in status.claimed if c.process == SILENT]
    over = [c for c in status.claimed if c.is_over]
    n_claimed = len(running) + len(silent)
    share = 100 * status.n_committed_samples / max(status.n_samples, 1)
    lines = [
        f"units         {status.n_units:,}: {status.n_committed:,} committed, {n_claimed:,} claimed, "
        f"{n_missing - n_claimed:,} left",
        f"documents     {status.n_committed_samples:,} of {status.n_samples:,} committed ({share:.1f} %)",
    ]
    if status.by_status is not None:
        lines.append(f"rows          {_rows_text(status)}")
    if status.speed.n_ranks and status.missing_units:
        lines.append(f"speed         {_speed_text(status.speed)}")
    for label, claims in (("running", running), ("silent", silent), ("stale", over)):
        lines += [
            f"{label:<13} {_claim_text(c, status.watched_s)}" for c in claims[:MOST_CLAIMS_SHOWN]
        ]
        if len(claims) > MOST_CLAIMS_SHOWN:
            lines.append(f"              and {len(claims) - MOST_CLAIMS_SHOWN:,} more")
    if status.partial:
        n_bytes = sum(p.n_bytes for p in status.partial)
        units = ranges_text([[p.unit, p.unit + 1] for p in status.partial])
        lines.append(
            f"partial       saved rows of unfinished units {units} ({n_bytes / 1e6:.1f} MB) in "
            f"{Path(status.partial[0].folder).parent}"
        )
    if status.merging is not None:
        known = _known_text(status.merging_process or UNKNOWN, status.watched_s)
        lines.append(f"merging       {_owner_text(status.merging)}{known}")
    if status.failed is not None:
        lines += _failure_lines(status)
    lines += [f"problem       {problem}" for problem in status.problems]
    return [*lines, f"complete      {_verdict(status)}"]


def _rows_text(status: Status) -> str:
    named = ", ".join(f"{n:,} {name}" for name, n in (status.by_status or {}).items())
    if status.n_units_counted < status.n_committed:
        named += f" (of {status.n_units_counted:,} of {status.n_committed:,} committed units; --rows counts all)"
    return named


def _speed_text(speed: Speed) -> str:
    left = "" if speed.left_s is None else f"; about {human_seconds(speed.left_s)} left"
    unknown = f", {speed.n_unknown:,} of them by their last word" if speed.n_unknown else ""
    return (
        f"{speed.samples_per_s:,.1f} documents/s, {speed.tokens_per_s:,.0f} tokens/s by "
        f"{count(speed.n_ranks, 'rank')}{unknown}{left}"
    )


_TAKEN_OVER_AFTER = f"{human_seconds(STALE_AFTER_S + CONFIRM_AFTER_S)} of that"


def _known_text(process: str, watched_s: float) -> str:
    return {
        "alive": "",
        "gone": ", which has ended: the job takes it over",
        "stale": ", whose heartbeat stands still: the job takes it over",
        SILENT: f"; no sign of life in {watched_s:g} s: the job takes it over after {_TAKEN_OVER_AFTER}",
        UNKNOWN: "; whether it lives is not known here (--watch 15 shows it)",
    }[process]


def _claim_text(claimed: ClaimedUnit, watched_s: float) -> str:
    done = (
        "nothing reported yet"
        if claimed.n_done is None
        else f"{claimed.n_done:,} of {claimed.n_samples:,} documents"
    )
    by = (
        f"an unreadable claim, {claimed.claim}"
        if claimed.owner is None
        else _owner_text(claimed.owner)
    )
    known = "" if claimed.owner is None else _known_text(claimed.process, watched_s)
    return f"unit {claimed.unit}: {done}, by {by}, since {claimed.since or 'just now'}{known}"


def _owner_text(owner: Owner) -> str:
    return f"rank {owner.rank} on {owner.host} (pid {owner.pid}, job {owner.job_id})"


def _failure_lines(status: Status) -> list[str]:
    failed = status.failed or {}
    about = ", ".join(
        f"{name} {failed[key]}"
        for key, name in (("job_id", "job"), ("when", "at"))
        if key in failed
    )
    first, *rest = str(failed.get("error", "unknown")).splitlines() or ["unknown"]
    where = os.path.join(status.output, FAILED_NAME)
    return [
        f"failed        {first}",
        *(f"              {line}" for line in rest),
        f"              {where}{f': {about}' if about else ''}",
    ]


def _verdict(status: Status) -> str:
    if status.complete:
        return "yes"
    if status.missing_units:
        n_missing = sum(b - a for a, b in status.missing_units)
        return f"no, {count(n_missing, 'unit')} missing: {ranges_text(status.missing_units)}{_way_on(status)}"
    return f"no, every unit is committed {_merge_verdict(status)}"


def _way_on(status: Status) -> str:
    n_ranks, n_unknown = status.speed.n_ranks, status.speed.n_unknown
    if n_ranks > n_unknown:
        return ""
    if n_ranks:
        return "; whether anybody works on them is not known here (--watch 15 shows it)"
    if status.failed is not None:
        return "; mend what failed, then run the job's command again"
    return "; run the job's command again to go on"


def _merge_verdict(status: Status) -> str:
    """What is in the way of the merge, or what to do for it."""
    if status.merging is not None and status.merging_process != SILENT:
        return "and being merged"
    if status.merging is not None:
        return f"but whoever merges shows no life; the job's command takes it over after {_TAKEN_OVER_AFTER}"
    if status.problems:
        return (
            f"but cannot be merged; `python -m gradproj verify {status.output} --repair` turns damaged units into "
            "missing ones, which the job's command then computes again"
        )
    if status.failed is not None:
        return "but not merged; mend what failed, then run the job's command again"
    return f"but not merged; `python -m gradproj merge {status.output}` ends it"


def status_of(config: StatusConfig) -> int:
    """Print the status that was asked for; the exit code."""
    status = read_status(config.output, rows=config.rows, watch_s=config.watch)
    print(
        json.dumps(asdict(status), indent=2) if config.as_json else "\n".join(status_lines(status))
    )
    return status.exit_code
