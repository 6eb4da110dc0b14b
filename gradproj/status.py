"""``python -m gradproj status``: how far a store is, from its records, claims and heartbeats; no model, no torch.

Clocks of different machines are never compared: whether a claim's process lives is said only where this machine
knows it, and times are shown as the file system has them.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from gradproj.coordinator.claims import Claim, ClaimBoard, Owner
from gradproj.coordinator.heartbeats import Progress, heartbeat_counter, read_heartbeats
from gradproj.coordinator.merge import MERGE_CLAIM, ranges_of
from gradproj.coordinator.output import Output, count, ranges_text, read_output
from gradproj.coordinator.progress import human_seconds
from gradproj.errors import StoreError
from gradproj.store.reader import ProjectionStore

COMPLETE, INCOMPLETE = 0, 3
"""Exit codes; 2 is a user's mistake, as everywhere."""

MOST_CLAIMS_SHOWN = 32


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What to look at and how to say it."""

    output: str = field(metadata={"flag": "OUTPUT", "positional": True, "help": "the job's --output_dir"})
    as_json: bool = field(default=False, metadata={"flag": "json", "help": "one JSON object for scripts"})
    rows: bool = field(
        default=True,
        metadata={"help": "count rows by status (reads the records that are not merged yet)"},
    )


@dataclass(frozen=True)
class ClaimedUnit:
    """A unit that is claimed and not committed."""

    unit: int
    n_samples: int
    n_done: int | None
    """Documents of it that are computed; None where the rank's last heartbeat was of another unit (it reads ahead)."""
    owner: Owner | None
    """None where the claim's file cannot be read."""
    process: str
    """``alive``, ``gone``, or ``unknown`` (another host's process)."""
    since: str
    """When it was claimed, ISO 8601, by the clock of the file system."""


@dataclass(frozen=True)
class PartialUnit:
    """Rows of a unit that was not finished; the next one to claim it goes on from there."""

    unit: int
    n_batches: int
    n_bytes: int
    folder: str


@dataclass(frozen=True)
class Speed:
    """Sums over the ranks that are computing."""

    n_ranks: int
    samples_per_s: float
    tokens_per_s: float
    left_s: float | None


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
    partial: list[PartialUnit]
    speed: Speed
    by_status: dict[str, int] | None
    """Rows by status; None where they were not asked for or cannot be counted."""
    problems: list[str]

    @property
    def exit_code(self) -> int:
        """0 complete, 3 not."""
        return COMPLETE if self.complete else INCOMPLETE


def read_status(path: str | Path, *, rows: bool = True) -> Status:
    """How far the store at OUTPUT is; writes nothing.

    Args:
        path: OUTPUT.
        rows: count rows by status, which reads the record of every unit that is not merged.

    Raises:
        StoreError: there is no job's output there.
    """
    output, observer = read_output(path), Owner.this_process("status", 0, 0)
    beats = {
        owner: p for owner, p in read_heartbeats(output.path / "heartbeats") if not owner.is_gone(observer)
    }
    claims = _current_claims(output, observer)
    claimed = [_claimed_unit(output, claim, beats, observer) for claim in claims if claim.unit != MERGE_CLAIM]
    missing, problems = output.missing, []
    by_status: dict[str, int] | None = None
    if rows:
        try:
            by_status = _rows_by_status(output)
        except StoreError as error:
            problems.append(f"rows cannot be counted: {error}")
    return Status(
        output=str(output.path),
        complete=not len(missing) and output.is_merged,
        merged=output.is_merged,
        n_units=len(output.wanted),
        n_committed=len(output.committed),
        missing_units=ranges_of(missing),
        n_samples=output.n_samples_in(output.wanted),
        n_committed_samples=output.n_samples_in(output.committed),
        claimed=[c for c in claimed if c.unit in set(missing.tolist())],
        merging=_merging(claims, observer),
        partial=_partial_units(output),
        speed=_speed(output, list(beats.values())),
        by_status=by_status,
        problems=problems,
    )


def _current_claims(output: Output, observer: Owner) -> list[Claim]:
    """The newest claim of everything that is claimed and was not given back, by name."""
    folder, beats = output.path / "claims", output.path / "heartbeats"
    if not folder.is_dir():
        return []
    board = ClaimBoard(folder, folder, observer, lambda other: heartbeat_counter(beats, other))
    claims = [board.read(name, number) for name, number in sorted(board.current().items())]
    return [claim for claim in claims if not claim.released]


def _merging(claims: list[Claim], observer: Owner) -> Owner | None:
    owner = next((claim.owner for claim in claims if claim.unit == MERGE_CLAIM), None)
    return None if owner is None or owner.is_gone(observer) else owner


def _claimed_unit(output: Output, claim: Claim, beats: dict[Owner, Progress], observer: Owner) -> ClaimedUnit:
    unit, owner = int(claim.unit), claim.owner
    beat = beats.get(owner) if owner is not None else None
    start, stop = output.layout.unit_range(unit) if unit < output.layout.n_units else (0, 0)
    process = "unknown"
    if owner is not None and owner.is_gone(observer):
        process = "gone"
    elif owner is not None and owner.boot_id == observer.boot_id and owner.host == observer.host:
        process = "alive"
    return ClaimedUnit(
        unit=unit,
        n_samples=stop - start,
        n_done=beat.unit_samples if beat is not None and beat.unit == unit else None,
        owner=owner,
        process=process,
        since=_time_of(output.path / "claims" / f"{claim.unit}.{claim.number}"),
    )


def _time_of(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")
    except FileNotFoundError:  # committed or given back since the folder was listed
        return ""


def _partial_units(output: Output) -> list[PartialUnit]:
    found = []
    for unit in output.missing.tolist():
        folder = output.path / "partial" / f"{unit:08d}"
        try:
            sizes = {file.name: file.stat().st_size for file in folder.glob("*-*.safetensors")}
        except FileNotFoundError:  # committed while we look
            continue
        if sizes:
            n_batches = max(int(re.split("[-.]", name)[1]) for name in sizes)
            found.append(PartialUnit(unit, n_batches, sum(sizes.values()), str(folder)))
    return found


def _speed(output: Output, beats: list[Progress]) -> Speed:
    running = [p for p in beats if p.seconds > 0]
    samples_per_s = sum(_samples_of(output, p) / p.seconds for p in running)
    missing = set(output.missing.tolist())
    computed = sum(p.unit_samples for p in running if p.unit in missing)
    left = output.n_samples_in(output.missing) - computed
    return Speed(
        n_ranks=len(beats),
        samples_per_s=samples_per_s,
        tokens_per_s=sum(p.n_tokens / p.seconds for p in running),
        left_s=left / samples_per_s if samples_per_s else None,
    )


def _samples_of(output: Output, progress: Progress) -> int:
    """Documents that a rank has computed since it started: its finished units and its running one."""
    height = output.layout.rows_per_shard
    return progress.units * height + (progress.unit_samples if progress.unit_samples < height else 0)


def _rows_by_status(output: Output) -> dict[str, int]:
    n_missing = output.n_samples_in(output.missing)
    with ProjectionStore(output.path) as store:
        counts = store.status_counts()
    # Units that no chosen document lies in have no record; only the merge writes what their rows are.
    unwanted = max(0, counts["missing"] - n_missing) if len(output.wanted) < output.layout.n_units else 0
    counts["missing"] -= unwanted
    counts["not_selected"] += unwanted
    return {name: n for name, n in counts.items() if n}


def status_json(status: Status) -> str:
    """The status as one JSON object."""
    return json.dumps(asdict(status), indent=2)


def status_lines(status: Status) -> list[str]:
    """The status as lines of text."""
    n_missing = sum(b - a for a, b in status.missing_units)
    living = [c for c in status.claimed if c.process != "gone"]
    gone = [c for c in status.claimed if c.process == "gone"]
    share = 100 * status.n_committed_samples / max(status.n_samples, 1)
    lines = [
        f"units         {status.n_units:,}: {status.n_committed:,} committed, {len(living):,} claimed, "
        f"{n_missing - len(living):,} left",
        f"documents     {status.n_committed_samples:,} of {status.n_samples:,} committed ({share:.1f} %)",
    ]
    if status.by_status is not None:
        named = ", ".join(f"{n:,} {name}" for name, n in status.by_status.items())
        lines.append(f"rows          {named}")
    if status.speed.n_ranks and status.missing_units:
        lines.append(f"speed         {_speed_text(status.speed)}")
    lines += [f"claimed       {_claim_text(c)}" for c in living[:MOST_CLAIMS_SHOWN]]
    if len(living) > MOST_CLAIMS_SHOWN:
        lines.append(f"              and {len(living) - MOST_CLAIMS_SHOWN:,} more")
    lines += [f"given up      {_claim_text(c)}" for c in gone[:MOST_CLAIMS_SHOWN]]
    if status.partial:
        n_bytes = sum(p.n_bytes for p in status.partial)
        units = ranges_text([[p.unit, p.unit + 1] for p in status.partial])
        lines.append(
            f"partial       saved rows of unfinished units {units} ({n_bytes / 1e6:.1f} MB) in "
            f"{Path(status.partial[0].folder).parent}"
        )
    if status.merging is not None:
        lines.append(f"merging       {_owner_text(status.merging)}")
    lines += [f"problem       {problem}" for problem in status.problems]
    return [*lines, f"complete      {_verdict(status)}"]


def _speed_text(speed: Speed) -> str:
    left = "" if speed.left_s is None else f"; about {human_seconds(speed.left_s)} left"
    return (
        f"{speed.samples_per_s:,.1f} documents/s, {speed.tokens_per_s:,.0f} tokens/s by "
        f"{count(speed.n_ranks, 'rank')}{left}"
    )


def _claim_text(claimed: ClaimedUnit) -> str:
    done = (
        "nothing reported yet"
        if claimed.n_done is None
        else f"{claimed.n_done:,} of {claimed.n_samples:,} documents"
    )
    by = "by an unreadable claim" if claimed.owner is None else f"by {_owner_text(claimed.owner)}"
    ended = ", which has ended: the job takes the unit over" if claimed.process == "gone" else ""
    return f"unit {claimed.unit}: {done}, {by}, since {claimed.since or 'just now'}{ended}"


def _owner_text(owner: Owner) -> str:
    return f"rank {owner.rank} on {owner.host} (pid {owner.pid}, job {owner.job_id})"


def _verdict(status: Status) -> str:
    if status.complete:
        return "yes"
    if status.missing_units:
        n_missing = sum(b - a for a, b in status.missing_units)
        way_on = "" if status.speed.n_ranks else "; run the job's command again to go on"
        return f"no, {count(n_missing, 'unit')} missing: {ranges_text(status.missing_units)}{way_on}"
    return "no, every unit is committed but not merged; `python -m gradproj merge` ends it"


def status_of(config: StatusConfig) -> int:
    """Print the status that was asked for; the exit code."""
    status = read_status(config.output, rows=config.rows)
    print(status_json(status) if config.as_json else "\n".join(status_lines(status)))
    return status.exit_code
