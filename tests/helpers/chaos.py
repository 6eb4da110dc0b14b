"""Kill jobs at random moments until their store is complete, then check the store."""

import json
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from helpers.jobs import (
    DRAIN_S,
    ORPHAN_S,
    Job,
    Scene,
    assert_same_bits,
    processes_with,
    run_job,
)

from gradproj import ProjectionStore
from gradproj.coordinator.merge import is_merged
from gradproj.maintenance.verify import verify
from gradproj.store.layout import STORE_NAME
from gradproj.store.unit_record import list_records

T = TypeVar("T")

SIGNALS = {"KILL": 0.5, "TERM": 0.28, "INT": 0.11, "USR1": 0.11}
TARGETS = {"worker": 0.45, "launcher": 0.25, "job": 0.3}
MOMENTS = {"start": 0.2, "loop": 0.3, "records": 0.35, "merge": 0.15}
"""When a signal is sent: after the launch, once a rank works, after some new records, during the
merge. Besides, half of the jobs that are shutting down get a second kill ("leaving")."""

RANKS = {1: {1: 0.3, 2: 0.4, 3: 0.15, 4: 0.15}, 2: {2: 1.0}}
"""Concurrent jobs -> probabilities of their world sizes. Imports dominate a start's time."""

PATIENCE_S = 900.0
"""A job that makes no progress for this long hangs."""


@dataclass(frozen=True)
class Kill:
    """One signal to one worker, one launcher or one whole job."""

    signal: str
    target: str
    moment: str
    ranks: int
    jobs: int


@dataclass
class Tally:
    """Signals and starts so far, over all stores. Shared by the threads of two jobs."""

    most: int
    kills: list[Kill] = field(default_factory=list)
    starts: Counter = field(default_factory=Counter)
    """World size -> launches."""
    stores: int = 0
    gone_s: dict[str, float] = field(
        default_factory=lambda: {"launcher killed": 0.0, "stop signal": 0.0}
    )
    """Longest times until all processes had exited."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kill: Kill) -> None:
        with self._lock:
            self.kills.append(kill)

    def is_over(self) -> bool:
        return len(self.kills) >= self.most

    def table(self, seed: int, seconds: float) -> str:
        lines = [
            f"{len(self.kills)} kills, {sum(self.starts.values())} starts, "
            f"{self.stores} stores completed, {seconds / 60:.1f} min, seed {seed}"
        ]
        lines.append("            " + "".join(f"{target:>10}" for target in TARGETS) + "       all")
        for name in SIGNALS:
            row = [sum(k.signal == name and k.target == t for k in self.kills) for t in TARGETS]
            lines.append(f"  SIG{name:<7}" + "".join(f"{n:>10}" for n in [*row, sum(row)]))
        for title, of in (("moments", "moment"), ("ranks", "ranks"), ("jobs at once", "jobs")):
            counts = Counter(getattr(k, of) for k in self.kills)
            lines.append(
                f"  kills by {title}: " + ", ".join(f"{k}: {n}" for k, n in sorted(counts.items()))
            )
        lines.append(
            "  starts by ranks: " + ", ".join(f"{k}: {n}" for k, n in sorted(self.starts.items()))
        )
        lines.append(
            "  longest until gone: " + ", ".join(f"{k} {s:.1f} s" for k, s in self.gone_s.items())
        )
        return "\n".join(lines)


def choose(rng: np.random.Generator, weights: dict[T, float]) -> T:
    values = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(values), p=values / values.sum()))]


class Killer:
    """Starts and kills jobs on one store until it is complete."""

    def __init__(
        self, scene: Scene, output: Path, tally: Tally, rng: np.random.Generator, jobs: int
    ) -> None:
        self._scene, self._output, self._tally, self._rng = scene, output, tally, rng
        self._jobs, self._start_s = jobs, 6.0
        self.ended_in_order = False
        """True if the last start ended without a signal."""

    def run(self) -> "Killer":
        while not merged(self._output):
            ranks, restarts = (
                choose(self._rng, RANKS[self._jobs]),
                choose(self._rng, {0: 0.3, 3: 0.7}),
            )
            self._tally.starts[ranks] += 1
            job = Job(self._scene, self._output, ranks, restarts)
            try:
                self._torment(job)
            finally:
                job.end()
        return self

    def _torment(self, job: Job) -> None:
        self.ended_in_order = True
        while not self._tally.is_over() and self._wait_for(job, moment := self._choose_moment()):
            name = choose(self._rng, SIGNALS)
            if name == "INT" and not job.workers():
                # While torchrun imports, a module's bare `except:` may swallow a
                # KeyboardInterrupt (2 of 70).
                name = "TERM"
            kill = Kill(name, choose(self._rng, TARGETS), moment, job.ranks, self._jobs)
            if not job.send(getattr(signal, f"SIG{kill.signal}"), kill.target, self._rng):
                continue
            self._tally.add(kill)
            self.ended_in_order = False
            if kill.target == "worker":
                continue  # torchrun restarts all, or the others finish, or the job ends
            self._check_shutdown(job, kill)
            return
        job.wait_until_gone(PATIENCE_S)
        if self.ended_in_order:
            assert job.process.returncode == 0, job.log_text()
            assert self._jobs > 1 or merged(self._output), job.log_text()

    def _check_shutdown(self, job: Job, kill: Kill) -> None:
        """Check that the job exits in time, even if a process is killed on its way out."""
        sent = time.monotonic()
        killed = kill.signal == "KILL"
        if self._rng.random() < 0.5:
            time.sleep(self._rng.uniform(0, 1))
            # Not a second stop signal to all: after a few seconds that ends a job at once.
            target = (
                "worker"
                if killed
                else choose(self._rng, {"worker": 0.5, "launcher": 0.3, "job": 0.2})
            )
            if job.send(signal.SIGKILL, target, self._rng):
                self._tally.add(Kill("KILL", target, "leaving", job.ranks, self._jobs))
                if target == "launcher":
                    killed, sent = True, time.monotonic()
        job.wait_until_gone((ORPHAN_S if killed else DRAIN_S) - (time.monotonic() - sent))
        cause = "launcher killed" if killed else "stop signal"
        self._tally.gone_s[cause] = max(self._tally.gone_s[cause], time.monotonic() - sent)

    def _choose_moment(self) -> str:
        left = self._scene.n_units - n_records(self._output)
        if left == 0:
            return choose(self._rng, {"merge": 0.5, "start": 0.5})
        if left > self._scene.n_units / 2:
            return choose(self._rng, {name: p for name, p in MOMENTS.items() if name != "merge"})
        return choose(self._rng, {**MOMENTS, "merge": 0.8})

    def _wait_for(self, job: Job, moment: str) -> bool:
        """Wait for the moment to kill. Returns False if the job ended first."""
        rng = self._rng
        if moment == "start":
            return self._sleep(job, rng.uniform(0, self._start_s))
        if moment == "merge":
            seen = set(merge_claims(self._output))
            return self._until(job, lambda: set(merge_claims(self._output)) - seen) and self._sleep(
                job, rng.uniform(0, 0.15)
            )
        since = time.monotonic()
        if not self._until(job, job.is_at_work):
            return False
        if since - job.started < 0.1:
            self._start_s = 0.5 * self._start_s + 0.5 * (time.monotonic() - job.started)
        if moment == "loop":
            return self._sleep(job, rng.uniform(0, 2.0))
        wanted = n_records(self._output) + int(rng.integers(1, 40))
        return self._until(job, lambda: n_records(self._output) >= wanted) and self._sleep(
            job, rng.uniform(0, 0.02)
        )

    def _until(self, job: Job, condition: Callable[[], Any]) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while job.is_running():
            if condition():
                return True
            assert time.monotonic() < deadline, f"the job makes no progress\n{job.log_text()}"
            time.sleep(0.003)
        return False

    def _sleep(self, job: Job, seconds: float) -> bool:
        until = time.monotonic() + seconds
        return self._until(job, lambda: time.monotonic() >= until)


def merged(output: Path) -> bool:
    return (output / STORE_NAME / "zarr.json").exists() and is_merged(output)


def n_records(output: Path) -> int:
    return len(list_records(output / "units")) if (output / "units").is_dir() else 0


def merge_claims(output: Path) -> list[str]:
    return [path.name for path in (output / "claims").glob("merge.*")]


# --- checks ---


def fill_under_kills(
    scene: Scene, output: Path, tally: Tally, rng: np.random.Generator, jobs: int
) -> None:
    """Fill a store with one or two jobs under kills, then compare it with an undisturbed one."""
    killers = [Killer(scene, output, tally, child, jobs) for child in rng.spawn(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(killer.run) for killer in killers]
        done = [one.result() for one in running]
    in_order = jobs == 1 and done[0].ended_in_order
    assert_as_undisturbed(scene, output, in_order)
    tally.stores += 1


def assert_as_undisturbed(scene: Scene, output: Path, ended_in_order: bool = True) -> None:
    """Check that the finished store equals an undisturbed job's and that no other file is left.

    If the last process was killed too, the next start cleans up.
    """
    assert processes_with(str(output)) == []
    if not ended_in_order:
        run_job(1, timeout=PATIENCE_S, **scene.flags(output))
    for folder in ("claims", "tmp", "partial", "heartbeats"):
        assert [str(path) for path in (output / folder).rglob("*") if path.is_file()] == [], folder
    assert [str(path) for path in output.rglob("*.tmp")] == []
    assert list_records(output / "units").tolist() == list(range(scene.n_units))
    assert_same_bits(output, scene.undisturbed)
    with ProjectionStore(output) as store, ProjectionStore(scene.undisturbed) as wanted:
        assert [s.key for s in store.samples(range(store.layout.n_samples))] == [
            s.key for s in wanted.samples(range(wanted.layout.n_samples))
        ]
    assert statistics(output) == statistics(scene.undisturbed)
    verification = verify(output)
    assert verification.exit_code == 0, verification.damage


def statistics(output: Path) -> dict[str, Any]:
    """Return ``projection_stats.json`` without times."""
    return {
        k: v
        for k, v in json.loads((output / "projection_stats.json").read_text()).items()
        if k != "timing"
    }


def discard(output: Path) -> None:
    shutil.rmtree(output)
    for log in output.parent.glob(f"log-{output.name}-*.txt"):
        log.unlink()
