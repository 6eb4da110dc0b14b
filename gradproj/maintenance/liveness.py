"""Claims and heartbeats of a store, and which of their processes are known to run or to have ended.

Clocks of different machines are never compared. Known at once are only the processes of this
machine, and that earlier starts of a job have ended. Whether processes of other machines run shows
when their heartbeats are watched.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from gradproj.coordinator.claims import Claim, ClaimBoard
from gradproj.coordinator.heartbeats import (
    ON_DISK,
    STALE_AFTER_S,
    HeartbeatWatch,
    Pace,
    RankProgress,
    heartbeat_counter,
    read_heartbeats,
    read_stamped_heartbeats,
)
from gradproj.coordinator.merge import MERGE_CLAIM
from gradproj.coordinator.opening import commits_of
from gradproj.coordinator.process_id import Owner
from gradproj.maintenance.job_output import Output
from gradproj.store.layout import CLAIMS_DIR, HEARTBEATS_DIR

ALIVE, GONE, STALE, SILENT, UNKNOWN = "alive", "gone", "stale", "silent", "unknown"
"""State of a process. ``gone``: its machine or a newer start of its job shows that it has ended.
``stale``: watched for ``STALE_AFTER_S`` without a heartbeat. ``silent``: watched for
``SILENT_BEATS`` without one. ``unknown``: on another machine and not watched for that long."""

SILENT_BEATS = 2
"""A live process writes a heartbeat within the time of so many."""


@dataclass(frozen=True)
class ClaimedUnit:
    """A unit that is claimed and not committed."""

    unit: int
    n_samples: int
    n_done: int | None
    """Documents of it that are computed. None if the rank's last heartbeat names another unit (a
    rank reads one unit ahead)."""
    owner: Owner | None
    """None if the claim's file cannot be read."""
    process: str
    """``alive``, ``gone``, ``stale``, ``silent`` or ``unknown``."""
    since: str
    """When it was claimed, ISO 8601, by the clock of the file system."""
    claim: str
    """Path of the claim's file."""

    @property
    def is_over(self) -> bool:
        """Return whether a job on this store takes the unit over at once."""
        return self.process in (GONE, STALE)


@dataclass(frozen=True)
class Speed:
    """Sums over the ranks that may be computing."""

    n_ranks: int
    n_unknown: int
    """Ranks of other machines among them, counted by their last heartbeat."""
    samples_per_s: float
    tokens_per_s: float
    left_s: float | None


@dataclass(frozen=True)
class Activity:
    """Processes at work on a store."""

    claimed: list[ClaimedUnit]
    """Missing units that are claimed, in unit order."""
    merging: Owner | None
    merging_process: str | None
    """State of the merging process, as for a claim."""
    speed: Speed


def read_activity(output: Output, missing: np.ndarray, watch_s: float = 0) -> Activity:
    """Read claims and heartbeats; writes nothing.

    Args:
        output: of the job.
        missing: wanted units without a record.
        watch_s: read the heartbeats twice, this many seconds apart, to see which of them move.
    """
    observer = Owner.this_process("status", 0, 0)
    watch = _watch_heartbeats(output, observer, watch_s)
    beats = dict(read_heartbeats(output.path / HEARTBEATS_DIR))
    claims = _current_claims(output, observer)
    owners = [*beats, *(c.owner for c in claims if c.owner is not None)]
    state_of = Liveness(observer, owners, watch, commits_of(output.path, observer).pace)
    beats = {owner: beat for owner, beat in beats.items() if state_of(owner) not in (GONE, STALE)}
    running = {owner: beat for owner, beat in beats.items() if state_of(owner) != SILENT}
    wanted = set(missing.tolist())
    claimed = [_claimed_unit(output, c, beats, state_of) for c in claims if c.unit != MERGE_CLAIM]
    merger = next((c.owner for c in claims if c.unit == MERGE_CLAIM), None)
    if merger is not None and state_of(merger) in (GONE, STALE):
        merger = None
    return Activity(
        claimed=[c for c in claimed if c.unit in wanted],
        merging=merger,
        merging_process=None if merger is None else state_of(merger),
        speed=_speed(output, missing, running, state_of),
    )


class Liveness:
    """Tells the state of a process from all claims and heartbeats.

    Args:
        observer: this process.
        owners: of all claims and heartbeats.
        watch: heartbeats seen so far, by owner; empty if none were watched.
        pace: of the heartbeats.
    """

    def __init__(
        self, observer: Owner, owners: Iterable[Owner], watch: HeartbeatWatch, pace: Pace = ON_DISK
    ) -> None:
        self._observer, self._watch, self._pace = observer, watch, pace
        self._newest: dict[str, int] = {}
        for owner in owners:
            self._newest[owner.job_id] = max(owner.generation, self._newest.get(owner.job_id, 0))

    def __call__(self, owner: Owner | None) -> str:
        if owner is None:
            return UNKNOWN
        if owner.generation < self._newest.get(owner.job_id, 0) or owner.is_gone(self._observer):
            return GONE
        sighting = self._watch.last(owner)
        if owner.is_alive(self._observer) or (sighting is not None and sighting.has_moved):
            return ALIVE
        if sighting is not None and sighting.still_s >= STALE_AFTER_S:
            return STALE
        if sighting is not None and sighting.still_s >= SILENT_BEATS * self._pace.beat_every_s:
            return SILENT
        return UNKNOWN


def _watch_heartbeats(output: Output, observer: Owner, seconds: float) -> HeartbeatWatch:
    """Look twice at the heartbeats of all owners of heartbeats and claims."""
    watch, folder = HeartbeatWatch(), output.path / HEARTBEATS_DIR
    if seconds <= 0:
        return watch
    claimed = {c.owner for c in _current_claims(output, observer) if c.owner is not None}
    before = {owner: stamp for owner, _, stamp in read_stamped_heartbeats(folder)}
    for owner in {*before, *claimed}:
        watch.look(owner, before.get(owner))
    time.sleep(seconds)
    after = {owner: stamp for owner, _, stamp in read_stamped_heartbeats(folder)}
    for owner in {*before, *claimed, *after}:
        watch.look(owner, None)  # so that a heartbeat that appeared meanwhile counts as moved
        watch.look(owner, after.get(owner))
    return watch


def _current_claims(output: Output, observer: Owner) -> list[Claim]:
    """Return the newest claim of everything that is claimed and not released, by name."""
    folder, beats = output.path / CLAIMS_DIR, output.path / HEARTBEATS_DIR
    if not folder.is_dir():
        return []
    board = ClaimBoard(
        folder, commits_of(output.path, observer), lambda other: heartbeat_counter(beats, other)
    )
    claims = [board.read(name, number) for name, number in sorted(board.current().items())]
    return [claim for claim in claims if not claim.released]


def _claimed_unit(
    output: Output, claim: Claim, beats: dict[Owner, RankProgress], state_of: Liveness
) -> ClaimedUnit:
    unit, owner = int(claim.unit), claim.owner
    beat = beats.get(owner) if owner is not None else None
    start, stop = output.layout.unit_range(unit) if unit < output.layout.n_units else (0, 0)
    path = output.path / CLAIMS_DIR / f"{claim.unit}.{claim.number}"
    return ClaimedUnit(
        unit=unit,
        n_samples=stop - start,
        n_done=beat.unit_samples if beat is not None and beat.unit == unit else None,
        owner=owner,
        process=state_of(owner),
        since=_time_of(path),
        claim=str(path),
    )


def _time_of(path: Path) -> str:
    try:
        modified = datetime.fromtimestamp(path.stat().st_mtime)
    except FileNotFoundError:  # committed or released since the directory was listed
        return ""
    return modified.astimezone().isoformat(timespec="seconds")


def _speed(
    output: Output, missing: np.ndarray, beats: dict[Owner, RankProgress], state_of: Liveness
) -> Speed:
    height, wanted = output.layout.rows_per_shard, set(missing.tolist())
    samples_per_s = tokens_per_s = 0.0
    left = output.layout.n_samples_in(missing)
    for progress in beats.values():
        if progress.seconds > 0:
            # Samples since the rank's start: its finished units, and its running one.
            n_samples = progress.units * height
            if progress.unit_samples < height:
                n_samples += progress.unit_samples
            samples_per_s += n_samples / progress.seconds
            tokens_per_s += progress.n_tokens / progress.seconds
            if progress.unit in wanted:
                left -= progress.unit_samples
    return Speed(
        n_ranks=len(beats),
        n_unknown=sum(state_of(owner) == UNKNOWN for owner in beats),
        samples_per_s=samples_per_s,
        tokens_per_s=tokens_per_s,
        left_s=left / samples_per_s if samples_per_s else None,
    )
