"""The command ``status``: how far a store is, as text or JSON."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from gradproj.coordinator.failure import FAILED_NAME
from gradproj.coordinator.heartbeats import CONFIRM_AFTER_S, STALE_AFTER_S
from gradproj.coordinator.process_id import Owner
from gradproj.flags import parse
from gradproj.formatting import count, human_seconds, ranges_text
from gradproj.maintenance.liveness import SILENT, UNKNOWN, ClaimedUnit, Speed
from gradproj.maintenance.status import Status, StatusConfig, read_status

MOST_CLAIMS_SHOWN = 32
_TAKEN_OVER_AFTER = f"{human_seconds(STALE_AFTER_S + CONFIRM_AFTER_S)} of that"


def status_command(argv: list[str]) -> int:
    """Print the status of an output; exit code 0 complete, 3 not yet, 1 failed, 2 no store there."""
    about = (
        "How far a store is, from any shell. Exit code 0: complete; 3: not yet; 1: not, and the "
        "last start ended with an error to fix (failed.json); 2: no store there."
    )
    (config,) = parse(argv, "gradproj status", StatusConfig, description=about)
    status = read_status(config.output, rows=config.rows, watch_s=config.watch_s)
    print(
        json.dumps(asdict(status), indent=2) if config.as_json else "\n".join(status_lines(status))
    )
    return status.exit_code


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


def _known_text(process: str, watched_s: float) -> str:
    return {
        "alive": "",
        "gone": ", which has ended: the job takes it over",
        "stale": ", whose heartbeat stands still: the job takes it over",
        SILENT: f"; no sign of life in {watched_s:g} s: the job takes it over after {_TAKEN_OVER_AFTER}",
        UNKNOWN: "; whether it lives is not known here (--watch_s 15 shows it)",
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
        return "; whether anybody works on them is not known here (--watch_s 15 shows it)"
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
