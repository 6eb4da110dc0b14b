"""Heartbeats: every rank says every few seconds how far it is, for people and for other processes' claims."""

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gradproj.coordinator.claims import ALIVE_FOR_S
from gradproj.coordinator.process_id import Owner

INTERVAL_S = 5.0
"""Between two heartbeats; less in a rank's first seconds, so that a short job shows its speed too."""
TICK_S = 1.0


@dataclass
class Progress:
    """What a rank has done since it started. Written by the loop, read by the heartbeat's thread."""

    batches: int = 0
    """The counter that others watch: it moves as long as the rank works, on batches or on a merge."""
    samples: int = 0
    n_tokens: int = 0
    units: int = 0
    unit: int = -1
    """The unit being computed, -1 = none."""
    unit_samples: int = 0
    """How many of its samples are done."""
    seconds: float = 0.0
    """Time since the loop began."""


@dataclass
class Heartbeat:
    """Writes ``heartbeats/NAME.json`` from a thread of its own, and removes it on leaving.

    Args:
        folder: ``OUTPUT/heartbeats``.
        owner: this process.
        progress: read at every beat.
    """

    folder: Path
    owner: Owner
    progress: Progress
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        self.write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):  # a folder turned read-only, which the commit has met and said
            self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.owner.name}.json"

    def _run(self) -> None:
        waited, alive_s = 0.0, 0.0
        while not self._stop.wait(TICK_S):
            waited, alive_s = waited + TICK_S, alive_s + TICK_S
            if waited >= min(INTERVAL_S, alive_s / 5):
                self.write()
                waited = 0.0

    def write(self) -> None:
        """Say now how far this rank is."""
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(
                json.dumps({"owner": asdict(self.owner), "progress": asdict(self.progress)})
            )
            os.replace(temporary, self._path)
        except OSError:
            # A full disk must not end the rank from here: the commit meets it and says so.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def read_heartbeats(folder: Path) -> list[tuple[Owner, Progress]]:
    """All heartbeats there are, of living ranks and of dead ones."""
    found = []
    for path in sorted(folder.glob("*.json")):
        beat = _read(path)
        if beat is not None:
            found.append(beat)
    return found


def heartbeat_stamps(folder: Path) -> dict[Owner, tuple[int, int]]:
    """For every owner something that changes as long as its process writes; to be compared with itself only."""
    return {owner: stamp for owner, _, stamp in _read_stamped(folder)}


def _read_stamped(folder: Path) -> list[tuple[Owner, Progress, tuple[int, int]]]:
    # A file's own time is compared with no other clock: whatever clock it is of, a change says that somebody wrote.
    found = []
    for owner, beat in read_heartbeats(folder):
        with suppress(FileNotFoundError):  # its process has just ended
            found.append(
                (owner, beat, (beat.batches, (folder / f"{owner.name}.json").stat().st_mtime_ns))
            )
    return found


@dataclass
class _Sign:
    """What was last seen of a heartbeat."""

    stamp: tuple[int, int]
    since: float
    """Of our clock: when it was first seen like this."""
    has_moved: bool = False


class RanksAtWork:
    """The heartbeats of ranks that are known to live, as one process sees them from look to look.

    One of another machine is left behind by a rank that died, until it is seen to move; and again once it has stood
    still for ``ALIVE_FOR_S``.

    Args:
        folder: ``OUTPUT/heartbeats``.
        observer: this process.
    """

    def __init__(self, folder: Path, observer: Owner) -> None:
        self._folder, self._observer = folder, observer
        self._signs: dict[Owner, _Sign] = {}

    def look(self) -> list[tuple[Owner, Progress]]:
        """The heartbeats as they are now of those that live."""
        now, known, alive = time.monotonic(), self._signs, []
        self._signs = {}
        for owner, beat, stamp in _read_stamped(self._folder):
            sign = known.get(owner)
            if sign is None or sign.stamp != stamp:
                sign = _Sign(stamp, now, has_moved=sign is not None)
            self._signs[owner] = sign
            moves = sign.has_moved and now - sign.since < ALIVE_FOR_S
            if owner.is_alive(self._observer) or (moves and not owner.is_gone(self._observer)):
                alive.append((owner, beat))
        return alive


def forget_heartbeat(folder: Path, owner: Owner) -> None:
    """Delete an owner's heartbeat; one that lives writes its own again within seconds."""
    with suppress(OSError):  # a folder turned read-only: it is one file more
        (folder / f"{owner.name}.json").unlink(missing_ok=True)


def heartbeat_counter(folder: Path, owner: Owner) -> int | None:
    """An owner's counter of batches, or None where it has no heartbeat."""
    beat = _read(folder / f"{owner.name}.json")
    return None if beat is None else beat[1].batches


def _read(path: Path) -> tuple[Owner, Progress] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Owner(**content["owner"]), Progress(**content["progress"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
