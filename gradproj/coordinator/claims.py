"""Claims: files that say which process is working on a unit, and the rules by which one is stale.

``claims/00000012.3`` is the third takeover of unit 12's claim. A claim is made by an exclusive link, so of
several processes one wins; a stale claim is taken over by making the next number, and a claim is given
back by making a next number that says so. Nothing is deleted before the unit is committed.
Clocks and file times of different machines are never compared.

A claim only says who should work on a unit. What keeps an owner that stood still from publishing after its claim
was taken over is the fence (``scratch``): the new owner takes the old one's unpublished files away before it begins.
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gradproj.coordinator import fault_points
from gradproj.coordinator.fencing import fence, make_scratch_again
from gradproj.coordinator.process_id import Owner
from gradproj.files import publish_exclusively, write_file_durably

STALE_AFTER_S = 600.0
"""A foreign owner whose heartbeat has not moved for so long, by our own clock, is taken for dead..."""
CONFIRM_AFTER_S = 60.0
"""...if it has not moved so long after that was first noticed either: had this process or the file system stood
still itself, the others need a moment to show that they live."""
ALIVE_FOR_S = 60.0
"""An owner whose heartbeat has moved within this time is at work."""

_CLAIM = re.compile(r"(\d{8,}|merge)\.(\d+)")


@dataclass(frozen=True)
class Claim:
    """A claim as found on disk."""

    unit: str
    number: int
    owner: Owner | None
    """None where the claim was given back, or the file cannot be read as a claim."""
    released: bool = False


@dataclass
class _Sighting:
    """What was last seen of a claim's owner."""

    beat: int | None
    since: float
    """Of our clock: when this beat was first seen."""
    has_moved: bool = False
    suspected_at: float | None = None


@dataclass
class ClaimBoard:
    """The claims of one store, as one process sees them. Its threads may use it together.

    Args:
        folder: ``OUTPUT/claims``.
        scratch: this process's own folder for files not published yet; those of other processes lie beside it.
        owner: this process.
        heartbeat_of: an owner's heartbeat counter, or None where it has no heartbeat.
        check: asked when the scratch folder has gone; its error says that OUTPUT has, too, or is another one.
        forget_heartbeat_of: deletes the heartbeat of an owner whose claim was taken over; one that lives writes anew.
    """

    folder: Path
    scratch: Path
    owner: Owner
    heartbeat_of: Callable[[Owner], int | None]
    check: Callable[[], None] = lambda: None
    forget_heartbeat_of: Callable[[Owner], None] = lambda owner: None
    _seen: dict[tuple[str, int], _Sighting] = field(default_factory=dict)
    _mine: dict[str, int] = field(default_factory=dict)

    def current(self) -> dict[str, int]:
        """Unit's name -> number of its newest claim."""
        newest: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = _CLAIM.fullmatch(entry.name)
                if match and int(match[2]) >= newest.get(match[1], 0):
                    newest[match[1]] = int(match[2])
        return newest

    # --- claiming ---

    def try_claim(self, unit: str) -> bool:
        """Claim a unit that nobody has, or whose claim is stale. False: it is somebody's."""
        number = self._newest(unit)
        if number is not None and not self.is_stale(self.read(unit, number)):
            return False
        mine = 0 if number is None else number + 1
        if not self._publish(unit, mine, asdict(self.owner)):
            return False
        fault_points.reach("claim published")
        self._fence_older(unit, mine)
        # Not before: a claim that is given back says that the owners before it are fenced.
        self._mine[unit] = mine
        return True

    def _newest(self, unit: str) -> int | None:
        number = None
        # Takeovers are rare: the numbers are probed one after the other.
        while (self.folder / f"{unit}.{0 if number is None else number + 1}").exists():
            number = 0 if number is None else number + 1
        return number

    def _fence_older(self, unit: str, mine: int) -> None:
        """After this, an older owner publishes nothing that it had prepared, dead or asleep.

        Not only the last one: that one may have died after its takeover and before it fenced the one before. But
        who gave the unit back has nothing of it prepared any more, and goes on undisturbed with what else it has.
        """
        for number in range(mine - 1, -1, -1):
            claim = self.read(unit, number)
            if claim.released:
                return
            if claim.owner is not None and claim.owner != self.owner:
                fence(self.scratch.parent / claim.owner.name, self.scratch, self.owner, self.check)
                self.forget_heartbeat_of(claim.owner)
                fault_points.reach("old owner fenced")

    def owns(self, unit: str) -> bool:
        """Whether this process's claim is still the newest one."""
        return unit in self._mine and self._newest(unit) == self._mine[unit]

    # --- letting go ---

    def release(self, unit: str) -> None:
        """Let others have a unit that is not committed, unless it has been taken over meanwhile."""
        number = self._mine.pop(unit, None)
        if number is not None and self._newest(unit) == number:
            self._publish(unit, number + 1, {"released": True})
            fault_points.reach("claim given back")

    def give_back_all(self) -> None:
        """Give back every claim of this process."""
        for unit in list(self._mine):
            self.release(unit)

    def delete(self, unit: str) -> None:
        """Delete the claims of something that is done: it speaks for itself from now on."""
        self._mine.pop(unit, None)
        with os.scandir(self.folder) as entries:
            matches = [_CLAIM.fullmatch(entry.name) for entry in entries]
        numbers = sorted(int(match[2]) for match in matches if match and match[1] == unit)
        # The newest last: as long as it is there, whoever counts up to it finds it taken.
        for number in numbers:
            (self.folder / f"{unit}.{number}").unlink(missing_ok=True)
        fault_points.reach("claims removed")

    def _publish(self, unit: str, number: int, content: dict) -> bool:
        temporary = self.scratch / f"claim-{unit}-{number}"
        while True:
            try:
                write_file_durably(temporary, [json.dumps(content).encode()])
                return publish_exclusively(temporary, self.folder / f"{unit}.{number}")
            except FileNotFoundError:
                # Fenced by another process, which has taken over some unit. Of this one the number decides.
                make_scratch_again(self.scratch, self.owner, self.check)
                if not self.folder.is_dir():
                    raise

    # --- others' ---

    def read(self, unit: str, number: int) -> Claim:
        """A claim's content."""
        try:
            content = json.loads((self.folder / f"{unit}.{number}").read_text())
            if content == {"released": True}:
                return Claim(unit, number, None, released=True)
            return Claim(unit, number, Owner(**content))
        except (OSError, ValueError, TypeError):
            return Claim(unit, number, None)

    def is_stale(self, claim: Claim) -> bool:
        """By the rules: given back, gone, or with a heartbeat that stood still for ``STALE_AFTER_S`` of our clock."""
        if claim.released:
            return True
        if claim.owner == self.owner:
            return False
        if claim.owner is not None and claim.owner.is_gone(self.owner):
            return True
        sighting, now = self._look(claim)
        if now - sighting.since < STALE_AFTER_S:
            return False
        if sighting.suspected_at is None:
            sighting.suspected_at = now
        return now - sighting.suspected_at >= CONFIRM_AFTER_S

    def is_at_work(self, claim: Claim) -> bool:
        """Whether the owner's heartbeat has been seen to move, and lately."""
        sighting, now = self._look(claim)
        return sighting.has_moved and now - sighting.since < ALIVE_FOR_S

    def is_silent(self, claim: Claim, seconds: float) -> bool:
        """Whether nothing is known of the owner, and its heartbeat has not moved for so long."""
        if claim.released or (claim.owner is not None and claim.owner.is_alive(self.owner)):
            return False
        sighting, now = self._look(claim)
        return now - sighting.since >= seconds

    def _look(self, claim: Claim) -> tuple[_Sighting, float]:
        beat = None if claim.owner is None else self.heartbeat_of(claim.owner)
        key, now = (claim.unit, claim.number), time.monotonic()
        sighting = self._seen.get(key)
        # One that has gone is no sign of life: it goes with whatever claim of its owner is taken over first.
        if sighting is None or (beat is not None and sighting.beat != beat):
            sighting = self._seen[key] = _Sighting(beat, now, has_moved=sighting is not None)
        return sighting, now
