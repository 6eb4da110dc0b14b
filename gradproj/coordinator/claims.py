"""Claims: files that name the process working on a unit, and the rules by which one is stale.

``claims/00000012.3`` is the third successor of unit 12's first claim. A claim is published under a
name that must be free, so one of several claimants gets it. A stale claim is taken over by
publishing the next number, and a claim is released by publishing a next number that is marked as a
release. No claim file is deleted before the unit is committed.

A claim only decides who should work on a unit. What keeps an owner that hung from doing harm after
its claim was taken over depends on the place of the output (``Commits``).
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gradproj.coordinator import fault_points
from gradproj.coordinator.commits import Check, Commits
from gradproj.coordinator.heartbeats import HeartbeatWatch, Sighting
from gradproj.coordinator.process_id import Owner
from gradproj.errors import StoreError
from gradproj.storage.object_path import names_in

_CLAIM = re.compile(r"(\d{8,}|merge)\.(\d+)")


@dataclass(frozen=True)
class Claim:
    """A claim as found on disk."""

    unit: str
    number: int
    owner: Owner | None
    """None if the claim was released, or if its file cannot be read as a claim."""
    released: bool = False


@dataclass
class ClaimBoard:
    """The claims of one store, as one process sees them. Its threads may share it.

    Args:
        folder: ``OUTPUT/claims``.
        commits: how this process publishes.
        heartbeat_of: returns a process's heartbeat counter, None if it has no heartbeat.
        check: raises if the whole output was deleted or replaced.
        delete_heartbeat_of: deletes the heartbeat of a process whose claim was taken over. A
            process that still runs writes it again.
    """

    folder: Path
    commits: Commits
    heartbeat_of: Callable[[Owner], int | None]
    check: Check = lambda: None
    delete_heartbeat_of: Callable[[Owner], None] = lambda owner: None
    _watch: HeartbeatWatch = field(default_factory=HeartbeatWatch)
    _mine: dict[str, int] = field(default_factory=dict)

    @property
    def owner(self) -> Owner:
        """This process."""
        return self.commits.owner

    def current(self) -> dict[str, int]:
        """Return the number of the newest claim of each claimed unit."""
        newest: dict[str, int] = {}
        for unit, number in self._list():
            newest[unit] = max(number, newest.get(unit, 0))
        return newest

    def _list(self) -> list[tuple[str, int]]:
        matches = [_CLAIM.fullmatch(name) for name in names_in(self.folder)]
        return [(match[1], int(match[2])) for match in matches if match]

    # --- claiming ---

    def try_claim(self, unit: str) -> bool:
        """Claim a free or stale unit. Returns False if another process holds it."""
        number = self._newest(unit)
        if number is not None and not self.is_stale(self.read(unit, number)):
            return False
        mine = 0 if number is None else number + 1
        if not self._publish(unit, mine, asdict(self.owner)):
            return False
        fault_points.reach("claim published")
        self._fence_older(unit, mine)
        # Not before the fence: a released claim promises that all owners before it are fenced, and
        # only claims noted here are released.
        self._mine[unit] = mine
        return True

    def _newest(self, unit: str) -> int | None:
        number = None
        # Takeovers are rare, so probing the numbers in turn is cheaper than listing the directory.
        while (self.folder / f"{unit}.{0 if number is None else number + 1}").is_file():
            number = 0 if number is None else number + 1
        return number

    def _fence_older(self, unit: str, mine: int) -> None:
        """Fence every earlier owner of a unit, so that none can publish what it has prepared.

        Not only the last one: it may have died after its takeover and before it fenced the owner
        before it. An owner that released the unit has nothing of it prepared and is left alone.
        """
        for number in range(mine - 1, -1, -1):
            claim = self.read(unit, number)
            if claim.released:
                return
            if claim.owner is not None and claim.owner != self.owner:
                self.commits.fence(claim.owner, self.check)
                self.delete_heartbeat_of(claim.owner)
                fault_points.reach("old owner fenced")

    def owns(self, unit: str) -> bool:
        """Return whether this process's claim is still the newest one."""
        return unit in self._mine and self._newest(unit) == self._mine[unit]

    # --- letting go ---

    def release(self, unit: str) -> None:
        """Release an uncommitted unit, unless another process has taken it over."""
        number = self._mine.pop(unit, None)
        if number is not None and self._newest(unit) == number:
            self._publish(unit, number + 1, {"released": True})
            fault_points.reach("claim released")

    def release_all(self) -> None:
        """Release every claim of this process."""
        for unit in list(self._mine):
            self.release(unit)

    def delete(self, unit: str) -> None:
        """Delete all claims of a finished unit; its record now marks it as done."""
        self._mine.pop(unit, None)
        # The newest goes last: while it exists, a process that probes the numbers finds it.
        for number in sorted(number for name, number in self._list() if name == unit):
            (self.folder / f"{unit}.{number}").unlink(missing_ok=True)
        fault_points.reach("claims removed")

    def _publish(self, unit: str, number: int, content: dict) -> bool:
        final = self.folder / f"{unit}.{number}"
        return self.commits.create(final, json.dumps(content).encode(), self.check)

    # --- claims of other processes ---

    def read(self, unit: str, number: int) -> Claim:
        """Read a claim."""
        try:
            content = json.loads((self.folder / f"{unit}.{number}").read_text())
            if content == {"released": True}:
                return Claim(unit, number, None, released=True)
            return Claim(unit, number, Owner(**content))
        except (OSError, StoreError, ValueError, TypeError):
            return Claim(unit, number, None)

    def is_stale(self, claim: Claim) -> bool:
        """Return whether a claim may be taken over.

        It may if it was released, if its owner is known to be gone, or if the owner's heartbeat
        has stood still for ``STALE_AFTER_S`` and ``CONFIRM_AFTER_S`` of this process's clock.
        """
        if claim.released:
            return True
        if claim.owner == self.owner:
            return False
        if claim.owner is not None and claim.owner.is_gone(self.owner):
            return True
        return self._look(claim).is_stale()

    def is_at_work(self, claim: Claim) -> bool:
        """Return whether the owner's heartbeat was seen to move recently."""
        return self._look(claim).is_moving(self.commits.pace.moving_for_s)

    def is_silent(self, claim: Claim, seconds: float) -> bool:
        """Return whether the owner is not known to run, and its heartbeat has stood still."""
        if claim.released or (claim.owner is not None and claim.owner.is_alive(self.owner)):
            return False
        return self._look(claim).still_s >= seconds

    def _look(self, claim: Claim) -> Sighting:
        counter = None if claim.owner is None else self.heartbeat_of(claim.owner)
        return self._watch.look((claim.unit, claim.number), counter)
