"""Identifies a process across hosts, boots and containers, and tells whether it still runs."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path


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
    machine: str = ""
    """The operating system's name for the machine: machines may share a host name."""
    pid_space: str = ""
    """The namespace in which ``pid`` counts: containers of one machine have their own."""

    @classmethod
    def this_process(cls, job_id: str, generation: int, rank: int) -> "Owner":
        pid, host = os.getpid(), socket.gethostname()
        start = process_start(pid) or 0
        return cls(job_id, generation, rank, host, boot_id(), pid, start, machine_id(), pid_space())

    @property
    def name(self) -> str:
        """The heartbeat's file name without its ending."""
        safe = re.sub(r"[^\w.-]", "_", f"{self.job_id}-{self.host}")
        return f"{safe}-{self.rank:05d}-{self.pid}-{self.pid_start}"

    def is_gone(self, observer: "Owner") -> bool:
        """Whether ``observer`` knows at once, without waiting, that this process has ended."""
        if self.job_id == observer.job_id and self.generation < observer.generation:
            return True
        if (self.host, self.machine) != (observer.host, observer.machine):
            return False
        if self.boot_id != observer.boot_id:
            # This machine has restarted since. Without a name of its own it may be another of the same host name.
            return "" not in (self.machine, self.boot_id, observer.boot_id)
        if self.pid_space != observer.pid_space or not self.pid_start:
            return False
        return process_start(self.pid) != self.pid_start and not _is_hidden(self.pid)

    def is_alive(self, observer: "Owner") -> bool:
        """Whether ``observer`` knows at once that this process lives: on its own machine."""
        places = [(o.host, o.machine, o.boot_id, o.pid_space) for o in (self, observer)]
        return places[0] == places[1] and process_start(self.pid) == self.pid_start


def machine_id() -> str:
    """The machine's name for itself, which outlives a restart; empty where there is none."""
    return _first_line("/etc/machine-id")


def boot_id() -> str:
    """The kernel's name for this boot of this machine; empty where there is none."""
    return _first_line("/proc/sys/kernel/random/boot_id")


def pid_space() -> str:
    """The kernel's name for the namespace of this process's pid; empty where there is none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Start time of a living process in ticks since boot; None if it is not to be seen, or a zombie."""
    fields = _status_of(pid)
    return None if not fields or fields[0] in ("Z", "X") else int(fields[19])


def _status_of(pid: int) -> list[str]:
    """The kernel's word on a process, from its state on; empty where it is not to be seen."""
    try:
        # The command's name stands in parentheses and may hold spaces: fields are counted from behind it.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _is_hidden(pid: int) -> bool:
    """Whether this pid is somebody's though /proc does not show it, as where users see only their own processes."""
    if _status_of(pid):
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):  # nobody's, or a number that no pid can have
        return False
    except PermissionError:  # another user's
        return True
    return True
