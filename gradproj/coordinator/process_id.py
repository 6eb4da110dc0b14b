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
    """Start time of the process in kernel ticks. It differs when a pid is reused."""
    machine: str = ""
    """``/etc/machine-id``. Two machines may share a host name."""
    pid_space: str = ""
    """PID namespace in which ``pid`` is valid. Each container of a machine has its own."""

    @classmethod
    def this_process(cls, job_id: str, generation: int, rank: int) -> "Owner":
        pid = os.getpid()
        return cls(
            job_id,
            generation,
            rank,
            socket.gethostname(),
            _read_text("/proc/sys/kernel/random/boot_id"),
            pid,
            process_start(pid) or 0,
            _read_text("/etc/machine-id"),
            _pid_namespace(),
        )

    @property
    def name(self) -> str:
        """File name stem of the process's heartbeat, and name of its scratch directory."""
        safe = re.sub(r"[^\w.-]", "_", f"{self.job_id}-{self.host}")
        return f"{safe}-{self.rank:05d}-{self.pid}-{self.pid_start}"

    def is_gone(self, observer: "Owner") -> bool:
        """Return whether ``observer`` can tell at once that this process has ended.

        True for an earlier start of the observer's own job, wherever it ran, and for a process of
        the observer's machine that no longer runs. False whenever there is doubt.
        """
        if self.job_id == observer.job_id and self.generation < observer.generation:
            return True
        if (self.host, self.machine) != (observer.host, observer.machine):
            return False
        if self.boot_id != observer.boot_id:
            # The machine has rebooted since. Without a machine id, it may instead be another
            # machine of the same host name.
            return "" not in (self.machine, self.boot_id, observer.boot_id)
        if self.pid_space != observer.pid_space or not self.pid_start:
            return False
        return process_start(self.pid) != self.pid_start and not _is_hidden(self.pid)

    def is_alive(self, observer: "Owner") -> bool:
        """Return whether ``observer`` sees this process running, on the observer's own machine."""
        places = [(o.host, o.machine, o.boot_id, o.pid_space) for o in (self, observer)]
        return places[0] == places[1] and process_start(self.pid) == self.pid_start


def process_start(pid: int) -> int | None:
    """Return when a running process started, in ticks since boot.

    None if the process is not visible, or is a zombie.
    """
    fields = _stat_fields(pid)
    return None if not fields or fields[0] in ("Z", "X") else int(fields[19])


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` from the state on; empty if it is not visible."""
    # The command's name stands in parentheses and may hold spaces and parentheses: fields are
    # counted from the last closing one.
    return _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _is_hidden(pid: int) -> bool:
    """Return whether a process of this pid runs though /proc does not show it (``hidepid``)."""
    if _stat_fields(pid):
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):  # no such process, or no possible pid
        return False
    except PermissionError:  # another user's process
        return True
    return True


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_text(path: str) -> str:
    try:
        # A process may have any bytes in its name.
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
