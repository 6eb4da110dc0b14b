"""The command ``status``: the progress of a job, as text or JSON."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from gradproj.coordinator.heartbeats import CONFIRM_AFTER_S, STALE_AFTER_S
from gradproj.coordinator.process_id import Owner
from gradproj.flags import parse
from gradproj.formatting import bounded, count, human_seconds, ranges_text
from gradproj.job.recorded_args import ReadingArgs
from gradproj.maintenance.liveness import SILENT, UNKNOWN, ClaimedUnit, Speed
from gradproj.maintenance.status import Status, StatusConfig, read_status
from gradproj.store.layout import FAILED_NAME

MAX_CLAIMS_SHOWN = 32
_RECLAIMED_AFTER = f"{human_seconds(STALE_AFTER_S + CONFIRM_AFTER_S)} of silence"


def status_command(argv: list[str]) -> int:
    """Print the status of an output and return the exit code."""
    about = (
        "Show the progress of a job from its output directory; writes nothing. Exit code 0: "
        "complete; 3: incomplete; 1: incomplete, and the last start ended with an error "
        "(failed.json); 2: no store there."
    )
    (config,) = parse(argv, "gradproj status", StatusConfig, description=about)
    ReadingArgs(anonymous=config.anonymous).apply()
    status = read_status(config.output, rows=config.rows, watch_s=config.watch_s)
    print(
        json.dumps(asdict(status), indent=2) if config.as_json else "\n".join(status_lines(status))
    )
    return status.exit_code


def status_lines(status: Status) -> list[str]:
    """Return the status as lines of text."""
    n_missing = sum(b - a for a, b in status.missing_units)
    running = [c for c in status.claimed if not c.is_over and c.process != SILENT]
    silent = [c for c in status.claimed if c.process == SILENT]
    over = [c for c in status.claimed if c.is_over]
    n_claimed = len(running) + len(silent)
    percent = 100 * status.n_committed_samples / max(status.n_samples, 1)
    lines = [
        f"units         {status.n_units:,}: {status.n_committed:,} committed, {n_claimed:,} "
        f"claimed, {n_missing - n_claimed:,} left",
        f"documents     {status.n_committed_samples:,} of {status.n_samples:,} committed "
        f"({percent:.1f} %)",
    ]
    if status.by_status is not None:
        lines.append(f"rows          {_rows_text(status)}")
    if status.speed.n_ranks and status.missing_units:
        lines.append(f"speed         {_speed_text(status.speed)}")
    for label, claims in (("running", running), ("silent", silent), ("stale", over)):
        texts = [f"{label:<13} {_claim_text(claim, status.watched_s)}" for claim in claims]
        lines += bounded(texts, MAX_CLAIMS_SHOWN, "              and {:,} more")
    if status.partial:
        n_bytes = sum(p.n_bytes for p in status.partial)
        units = ranges_text([[p.unit, p.unit + 1] for p in status.partial])
        lines.append(
            f"partial       saved rows of unfinished units {units} ({n_bytes / 1e6:.1f} MB) in "
            f"{Path(status.partial[0].folder).parent}"
        )
    if status.merging is not None:
        liveness = _liveness_text(status.merging_process or UNKNOWN, status.watched_s)
        lines.append(f"merging       {_owner_text(status.merging)}{liveness}")
    if status.failed is not None:
        lines += _failure_lines(status)
    lines += [f"problem       {problem}" for problem in status.problems]
    return [*lines, f"complete      {_verdict(status)}"]


def _rows_text(status: Status) -> str:
    counts = ", ".join(f"{n:,} {name}" for name, n in (status.by_status or {}).items())
    if status.n_units_counted < status.n_committed:
        counts += (
            f" (of {status.n_units_counted:,} of {status.n_committed:,} committed units; "
            "--rows counts all)"
        )
    return counts


def _speed_text(speed: Speed) -> str:
    left = "" if speed.left_s is None else f"; about {human_seconds(speed.left_s)} left"
    unknown = f", {speed.n_unknown:,} of them by their last report" if speed.n_unknown else ""
    return (
        f"{speed.samples_per_s:,.1f} documents/s, {speed.tokens_per_s:,.0f} tokens/s by "
        f"{count(speed.n_ranks, 'rank')}{unknown}{left}"
    )


def _liveness_text(process: str, watched_s: float) -> str:
    silent = f"; no heartbeat in {watched_s:g} s, reclaimed by the job after {_RECLAIMED_AFTER}"
    return {
        "alive": "",
        "gone": " (process exited; will be reclaimed by the job)",
        "stale": " (heartbeat stopped; will be reclaimed by the job)",
        SILENT: silent,
        UNKNOWN: "; this host cannot tell whether it is alive (--watch_s 15 shows it)",
    }[process]


def _claim_text(claimed: ClaimedUnit, watched_s: float) -> str:
    done = (
        "no progress reported yet"
        if claimed.n_done is None
        else f"{claimed.n_done:,} of {claimed.n_samples:,} documents"
    )
    by = (
        f"an unreadable claim, {claimed.claim}"
        if claimed.owner is None
        else _owner_text(claimed.owner)
    )
    liveness = "" if claimed.owner is None else _liveness_text(claimed.process, watched_s)
    return f"unit {claimed.unit}: {done}, by {by}, since {claimed.since or 'just now'}{liveness}"


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
        units = ranges_text(status.missing_units)
        return f"no, {count(n_missing, 'unit')} missing: {units}{_next_step(status)}"
    return f"no, every unit is committed {_merge_verdict(status)}"


def _next_step(status: Status) -> str:
    n_ranks, n_unknown = status.speed.n_ranks, status.speed.n_unknown
    if n_ranks > n_unknown:
        return ""
    if n_ranks:
        return "; this host cannot tell whether a rank is at work (--watch_s 15 shows it)"
    if status.failed is not None:
        return "; fix the error, then run the job's command again"
    return "; run the job's command again to resume"


def _merge_verdict(status: Status) -> str:
    """Return the obstacle to the merge, or the command that merges."""
    if status.merging is not None and status.merging_process != SILENT:
        return "and being merged"
    if status.merging is not None:
        return (
            "but the process that merges has no heartbeat; the job's command reclaims the merge "
            f"after {_RECLAIMED_AFTER}"
        )
    if status.problems:
        return (
            f"but cannot be merged; `python -m gradproj verify {status.output} --repair` deletes "
            "damaged units, which the job's command then recomputes"
        )
    if status.failed is not None:
        return "but not merged; fix the error, then run the job's command again"
    return f"but not merged; `python -m gradproj merge {status.output}` merges them"
