"""Who works on a store: its claims and heartbeats, and which of their processes are known to live or to have ended.

Clocks of different machines are never compared. What is known at once is what this machine knows of its own processes,
and that a job's older starts have ended. Of other hosts' processes nothing is known until their heartbeats are watched.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from gradproj.coordinator.claims import STALE_AFTER_S, Claim, ClaimBoard
from gradproj.coordinator.heartbeats import (
    INTERVAL_S,
    Progress,
    heartbeat_counter,
    heartbeat_stamps,
    read_heartbeats,
)
from gradproj.coordinator.merge import MERGE_CLAIM
from gradproj.coordinator.process_id import Owner
from gradproj.maintenance.job_output import Output

ALIVE, GONE, STALE, SILENT, UNKNOWN = "alive", "gone", "stale", "silent", "unknown"
"""What is known of a process. ``gone`` by its machine or its job's newer start, ``stale`` by the rule of ten minutes
without a heartbeat, ``silent`` where it was watched for ``SILENT_AFTER_S`` and wrote nothing, ``unknown`` on another
host that was not watched for so long."""

SILENT_AFTER_S = 2 * INTERVAL_S
"""Whoever lives has written a heartbeat within this time."""


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
    """``alive``, ``gone``, ``stale``, ``silent`` or ``unknown``."""
    since: str
    """When it was claimed, ISO 8601, by the clock of the file system."""
    claim: str
    """The claim's file."""

    @property
    def is_over(self) -> bool:
        """Whether the next job on this store takes the unit over at once, or could by now."""
        return self.process in (GONE, STALE)


@dataclass(frozen=True)
class Speed:
    """Sums over the ranks that are computing, as far as is known."""

    n_ranks: int
    n_unknown: int
    """How many of them are on other hosts, and counted by their last heartbeat without knowing that they live."""
    samples_per_s: float
    tokens_per_s: float
    left_s: float | None


@dataclass(frozen=True)
class Activity:
    """What is going on at a store."""

    claimed: list[ClaimedUnit]
    """In unit order; those whose unit is missing."""
    merging: Owner | None
    merging_process: str | None
    """What is known of it, as of a claim's."""
    speed: Speed


def read_activity(output: Output, missing: np.ndarray, watch_s: float = 0) -> Activity:
    """Claims and heartbeats as they are now; writes nothing.

    Args:
        output: OUTPUT.
        missing: wanted units without a record.
        watch_s: look at the heartbeats twice, so many seconds apart, to see which of them move.
    """
    observer = Owner.this_process("status", 0, 0)
    moved = _watch(output, observer, watch_s)
    beats = dict(read_heartbeats(output.path / "heartbeats"))
    claims = _current_claims(output, observer)
    judge = Liveness(
        observer, [*beats, *(c.owner for c in claims if c.owner is not None)], moved, watch_s
    )
    known = {owner: beat for owner, beat in beats.items() if judge(owner) not in (GONE, STALE)}
    running = {owner: beat for owner, beat in known.items() if judge(owner) != SILENT}
    wanted = set(missing.tolist())
    claimed = [_claimed_unit(output, c, known, judge) for c in claims if c.unit != MERGE_CLAIM]
    merger = next((c.owner for c in claims if c.unit == MERGE_CLAIM), None)
    if merger is not None and judge(merger) in (GONE, STALE):
        merger = None
    return Activity(
        claimed=[c for c in claimed if c.unit in wanted],
        merging=merger,
        merging_process=None if merger is None else judge(merger),
        speed=_speed(output, missing, running, judge),
    )


class Liveness:
    """What is known of a process, from the claims and heartbeats of all."""

    def __init__(
        self, observer: Owner, owners: Iterable[Owner], moved: dict[Owner, bool], watched_s: float
    ) -> None:
        """``moved`` says of each owner that was watched for ``watched_s`` whether its heartbeat did."""
        self._observer, self._moved, self._watched_s = observer, moved, watched_s
        self._newest: dict[str, int] = {}
        for owner in owners:
            self._newest[owner.job_id] = max(owner.generation, self._newest.get(owner.job_id, 0))

    def __call__(self, owner: Owner | None) -> str:
        if owner is None:
            return UNKNOWN
        if owner.generation < self._newest.get(owner.job_id, 0) or owner.is_gone(self._observer):
            return GONE
        if owner.is_alive(self._observer) or self._moved.get(owner):
            return ALIVE
        if self._moved.get(owner) is False:
            if self._watched_s >= STALE_AFTER_S:
                return STALE
            if self._watched_s >= SILENT_AFTER_S:
                return SILENT
        return UNKNOWN


def _watch(output: Output, observer: Owner, seconds: float) -> dict[Owner, bool]:
    """Whether each owner of a heartbeat or a claim wrote its heartbeat between two looks."""
    if seconds <= 0:
        return {}
    folder = output.path / "heartbeats"
    claimed = {
        claim.owner for claim in _current_claims(output, observer) if claim.owner is not None
    }
    first = heartbeat_stamps(folder)
    time.sleep(seconds)
    then = heartbeat_stamps(folder)
    return {o: o in then and then[o] != first.get(o) for o in {*first, *claimed, *then}}


def _current_claims(output: Output, observer: Owner) -> list[Claim]:
    """The newest claim of everything that is claimed and was not given back, by name."""
    folder, beats = output.path / "claims", output.path / "heartbeats"
    if not folder.is_dir():
        return []
    board = ClaimBoard(folder, folder, observer, lambda other: heartbeat_counter(beats, other))
    claims = [board.read(name, number) for name, number in sorted(board.current().items())]
    return [claim for claim in claims if not claim.released]


def _claimed_unit(
    output: Output, claim: Claim, beats: dict[Owner, Progress], judge: Liveness
) -> ClaimedUnit:
    unit, owner = int(claim.unit), claim.owner
    beat = beats.get(owner) if owner is not None else None
    start, stop = output.layout.unit_range(unit) if unit < output.layout.n_units else (0, 0)
    path = output.path / "claims" / f"{claim.unit}.{claim.number}"
    return ClaimedUnit(
        unit=unit,
        n_samples=stop - start,
        n_done=beat.unit_samples if beat is not None and beat.unit == unit else None,
        owner=owner,
        process=judge(owner),
        since=_time_of(path),
        claim=str(path),
    )


def _time_of(path: Path) -> str:
    try:
        return (
            datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")
        )
    except FileNotFoundError:  # committed or given back since the folder was listed
        return ""


def _speed(
    output: Output, missing: np.ndarray, beats: dict[Owner, Progress], judge: Liveness
) -> Speed:
    running = [p for p in beats.values() if p.seconds > 0]
    samples_per_s = sum(_samples_of(output, p) / p.seconds for p in running)
    wanted = set(missing.tolist())
    computed = sum(p.unit_samples for p in running if p.unit in wanted)
    left = output.n_samples_in(missing) - computed
    return Speed(
        n_ranks=len(beats),
        n_unknown=sum(judge(owner) == UNKNOWN for owner in beats),
        samples_per_s=samples_per_s,
        tokens_per_s=sum(p.n_tokens / p.seconds for p in running),
        left_s=left / samples_per_s if samples_per_s else None,
    )


def _samples_of(output: Output, progress: Progress) -> int:
    """Documents that a rank has computed since it started: its finished units and its running one."""
    height = output.layout.rows_per_shard
    return progress.units * height + (
        progress.unit_samples if progress.unit_samples < height else 0
    )
