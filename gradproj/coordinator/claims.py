"""Claims: files that say which process is working on a unit, and the rules by which one is stale.

``claims/00000012.3`` is the third takeover of unit 12's claim. A claim is made by an exclusive link, so of
several processes one wins; a stale claim is taken over by making the next number, and a claim is given
back by making a next number that says so. Nothing is deleted before the unit is committed.
Clocks and file times of different machines are never compared.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gradproj.store.files import publish_exclusively, write_file_durably

STALE_AFTER_S = 600.0
"""A foreign owner whose heartbeat has not moved for so long, by our own clock, is taken for dead."""

_CLAIM = re.compile(r"(\d{8,}|merge)\.(\d+)")


@dataclass(frozen=True)
class Owner:
    """The process behind a claim or a heartbeat."""

    job_id: str
    generation: int
    rank: int
    host: str
    boot_id: str
    pid: int
    pid_start: int
    """Start time of the process in the kernel's ticks: a reused pid has another."""

    @classmethod
    def this_process(cls, job_id: str, generation: int, rank: int) -> "Owner":
        pid = os.getpid()
        return cls(job_id, generation, rank, socket.gethostname(), boot_id(), pid, process_start(pid) or 0)

    @property
    def name(self) -> str:
        """The heartbeat's file name without its ending."""
        safe = re.sub(r"[^\w.-]", "_", f"{self.job_id}-{self.host}")
        return f"{safe}-{self.rank:05d}-{self.pid}-{self.pid_start}"

    def is_gone(self, observer: "Owner") -> bool:
        """Whether ``observer`` knows at once, without waiting, that this process has ended."""
        if self.job_id == observer.job_id and self.generation < observer.generation:
            return True
        if self.boot_id != observer.boot_id:
            # The same host under another boot has restarted; of other hosts nothing is known.
            return self.host == observer.host and self.boot_id != "" and observer.boot_id != ""
        return self.host == observer.host and process_start(self.pid) != self.pid_start


def boot_id() -> str:
    """The kernel's name for this boot of this machine; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Start time of a living process in ticks since boot; None if there is no such process, or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name stands in parentheses and may hold spaces: fields are counted from behind it.
    fields = text.rsplit(")", 1)[1].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


@dataclass(frozen=True)
class Claim:
    """A claim as found on disk."""

    unit: str
    number: int
    owner: Owner | None
    """None where the claim was given back, or the file cannot be read as a claim."""
    released: bool = False


@dataclass
class ClaimBoard:
    """The claims of one store, as one process sees them.

    Args:
        folder: ``OUTPUT/claims``.
        scratch: this process's own folder for files not published yet.
        owner: this process.
        heartbeat_of: an owner's heartbeat counter, or None where it has no heartbeat.
    """

    folder: Path
    scratch: Path
    owner: Owner
    heartbeat_of: Callable[[Owner], int | None]
    _seen: dict[tuple[str, int], tuple[int | None, float]] = field(default_factory=dict)
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

    def try_claim(self, unit: str) -> bool:
        """Claim a unit that nobody has, or whose claim is stale. False: it is somebody's."""
        number = self._newest(unit)
        if number is not None and not self.is_stale(self.read(unit, number)):
            return False
        mine = 0 if number is None else number + 1
        if not self._publish(unit, mine, asdict(self.owner)):
            return False
        self._mine[unit] = mine
        return True

    def _newest(self, unit: str) -> int | None:
        number = None
        # Takeovers are rare: the numbers are probed one after the other.
        while (self.folder / f"{unit}.{0 if number is None else number + 1}").exists():
            number = 0 if number is None else number + 1
        return number

    def owns(self, unit: str) -> bool:
        """Whether this process's claim is still the newest one."""
        return unit in self._mine and self._newest(unit) == self._mine[unit]

    def give_back(self, unit: str) -> None:
        """Let others have a unit that is not committed, unless it has been taken over meanwhile."""
        number = self._mine.pop(unit, None)
        if number is not None:
            self._publish(unit, number + 1, {"released": True})

    def give_back_all(self) -> None:
        """Give back every claim of this process."""
        for unit in list(self._mine):
            self.give_back(unit)

    def forget(self, unit: str) -> None:
        """Delete the claims of a unit that is committed: its record speaks for it from now on."""
        number = self._mine.pop(unit, None)
        for old in range(-1 if number is None else number, -1, -1):
            (self.folder / f"{unit}.{old}").unlink(missing_ok=True)

    def _publish(self, unit: str, number: int, content: dict) -> bool:
        temporary = self.scratch / f"claim-{unit}-{number}"
        write_file_durably(temporary, [json.dumps(content).encode()])
        return publish_exclusively(temporary, self.folder / f"{unit}.{number}")

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
        beat = None if claim.owner is None else self.heartbeat_of(claim.owner)
        key, now = (claim.unit, claim.number), time.monotonic()
        before = self._seen.get(key)
        if before is None or before[0] != beat:
            self._seen[key] = (beat, now)
            return False
        return now - before[1] >= STALE_AFTER_S
