"""Heartbeats, which every rank writes every few seconds, and the rule by which one has stopped.

Clocks and file times of different machines are never compared. An observer only notes that a
heartbeat has changed, and times how long it has not by its own monotonic clock.
"""

import json
import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradproj.coordinator.process_id import Owner
from gradproj.errors import StoreError
from gradproj.storage.publish import overwrite

INTERVAL_S = 5.0
"""Time between two heartbeats. Shorter at first, so that a short job shows its speed too."""
TICK_S = 1.0

STALE_AFTER_S = 600.0
"""A process of another machine is suspected dead when its heartbeat has not moved for this long."""
CONFIRM_AFTER_S = 60.0
"""A suspected process is given this much longer. If the observer itself, or the file system, hung
for ten minutes, every other process looks dead and needs a moment to write a heartbeat."""


@dataclass(frozen=True)
class Pace:
    """Times between writes and looks at an output, in seconds. In a bucket each has its price."""

    beat_every_s: float
    """Between two heartbeats of a process."""
    moving_for_s: float
    """For which a heartbeat that has moved shows a process at work."""
    silent_after_s: float
    """Without a sign of life after which a process is named, while others wait for it."""
    wait_s: tuple[float, float]
    """First and longest pause between two checks of other processes' claims, with no unit free."""
    merge_wait_s: float
    """Between two checks whether another process's merge is done."""
    ask_every_s: float
    """Between two looks whether a claim is still this process's, during a merge."""
    line_every_s: float
    """Between two lines of progress."""
    refresh_every_s: float
    """Between two updates of the progress on a terminal."""


ON_DISK = Pace(
    beat_every_s=INTERVAL_S,
    moving_for_s=60.0,
    # Most ranks that are waited for finish their last unit sooner.
    silent_after_s=30.0,
    wait_s=(0.1, 5.0),
    merge_wait_s=0.5,
    ask_every_s=0.0,
    line_every_s=10.0,
    refresh_every_s=1.0,
)
IN_BUCKET = Pace(
    beat_every_s=60.0,
    moving_for_s=180.0,
    silent_after_s=150.0,
    wait_s=(1.2, 30.0),
    merge_wait_s=6.0,
    ask_every_s=5.0,
    line_every_s=60.0,
    refresh_every_s=60.0,
)


@dataclass
class RankProgress:
    """Work of a rank since it started. Written by the main loop, read by the heartbeat thread."""

    batches: int = 0
    """The counter that other processes watch. It moves with every batch and every merge step."""
    samples: int = 0
    n_tokens: int = 0
    units: int = 0
    unit: int = -1
    """The unit being computed, -1 = none."""
    unit_samples: int = 0
    """Samples of that unit that are computed."""
    seconds: float = 0.0
    """Time since the loop began."""


# --- writing ---


@dataclass
class Heartbeat:
    """Writes ``heartbeats/NAME.json`` from its own thread, and deletes it on exit."""

    folder: Path
    owner: Owner
    progress: RankProgress
    pace: Pace = ON_DISK
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        self.write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        delete_heartbeat(self.folder, self.owner)

    def _run(self) -> None:
        waited, alive_s = 0.0, 0.0
        while not self._stop.wait(TICK_S):
            waited, alive_s = waited + TICK_S, alive_s + TICK_S
            if waited >= min(self.pace.beat_every_s, alive_s / 5):
                self.write()
                waited = 0.0

    def write(self) -> None:
        """Write the heartbeat now."""
        content = {"owner": asdict(self.owner), "progress": asdict(self.progress)}
        # A full disk must not end the rank from this thread: the commit will raise it.
        with suppress(OSError, StoreError):
            overwrite(self.folder / f"{self.owner.name}.json", json.dumps(content).encode())


def delete_heartbeat(folder: Path, owner: Owner) -> None:
    """Delete a process's heartbeat. A process that still runs writes it again within seconds."""
    with suppress(OSError, StoreError):  # the directory is read-only: one stray file
        (folder / f"{owner.name}.json").unlink(missing_ok=True)


# --- reading ---


def read_heartbeats(folder: Path) -> list[tuple[Owner, RankProgress]]:
    """Return all heartbeats in ``folder``, those of dead processes included."""
    beats = (_read(path) for path in sorted(folder.glob("*.json")))
    return [beat for beat in beats if beat is not None]


def read_stamped_heartbeats(folder: Path) -> list[tuple[Owner, RankProgress, tuple[int, int]]]:
    """Return all heartbeats, each with a stamp that changes whenever its process writes."""
    stamped = []
    for owner, beat in read_heartbeats(folder):
        with suppress(FileNotFoundError):  # its process has just ended
            # The file's time is compared with itself only: it does not matter whose clock set it.
            mtime_ns = (folder / f"{owner.name}.json").stat().st_mtime_ns
            stamped.append((owner, beat, (beat.batches, mtime_ns)))
    return stamped


def heartbeat_counter(folder: Path, owner: Owner) -> int | None:
    """Return a process's batch counter; None if it has no readable heartbeat."""
    beat = _read(folder / f"{owner.name}.json")
    return None if beat is None else beat[1].batches


def _read(path: Path) -> tuple[Owner, RankProgress] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Owner(**content["owner"]), RankProgress(**content["progress"])
    except (OSError, StoreError, ValueError, TypeError, KeyError):
        return None


# --- has it moved? ---


@dataclass
class Sighting:
    """State of one heartbeat at the observer's last look. Times are of the observer's clock."""

    beat: object
    since: float
    """When this beat was first seen."""
    seen_at: float
    """When the observer last looked."""
    has_moved: bool = False
    """An earlier beat was seen before this one."""
    suspected_at: float | None = None

    @property
    def still_s(self) -> float:
        """Time for which the heartbeat has been seen not to move."""
        return self.seen_at - self.since

    def is_moving(self, for_s: float) -> bool:
        """Return whether the heartbeat was seen to move within this time (a ``Pace``'s)."""
        return self.has_moved and self.still_s < for_s

    def is_stale(self) -> bool:
        """Return whether the process counts as dead: suspected, and suspected again later."""
        if self.still_s < STALE_AFTER_S:
            return False
        if self.suspected_at is None:
            self.suspected_at = self.seen_at
        return self.seen_at - self.suspected_at >= CONFIRM_AFTER_S


class HeartbeatWatch:
    """Notes when heartbeats move, as one observer sees them from look to look."""

    def __init__(self) -> None:
        self._sightings: dict[Hashable, Sighting] = {}

    def look(self, key: Hashable, beat: object | None) -> Sighting:
        """Note a heartbeat's current value; None if it does not exist.

        A heartbeat seen for the first time counts from now, and has not moved yet. One that has
        disappeared is no sign of life: a process that takes over a claim deletes it.
        """
        now, sighting = time.monotonic(), self._sightings.get(key)
        if sighting is None or (beat is not None and sighting.beat != beat):
            sighting = Sighting(beat, since=now, seen_at=now, has_moved=sighting is not None)
            self._sightings[key] = sighting
        sighting.seen_at = now
        return sighting

    def last(self, key: Hashable) -> Sighting | None:
        """Return what the last look found; None if there was none."""
        return self._sightings.get(key)


class LiveRanks:
    """Reads the heartbeats of processes that are known to live.

    A heartbeat of another machine may be left by a dead process. It counts once it was seen to
    move, until it has stood still for the pace's ``moving_for_s``.
    """

    def __init__(self, folder: Path, observer: Owner, pace: Pace = ON_DISK) -> None:
        self._folder, self._observer, self._pace = folder, observer, pace
        self._watch = HeartbeatWatch()

    def read(self) -> list[tuple[Owner, RankProgress]]:
        """Return the current heartbeats of live processes."""
        alive = []
        for owner, beat, stamp in read_stamped_heartbeats(self._folder):
            sighting = self._watch.look(owner, stamp)
            moving = sighting.is_moving(self._pace.moving_for_s)
            moving = moving and not owner.is_gone(self._observer)
            if owner.is_alive(self._observer) or moving:
                alive.append((owner, beat))
        return alive
