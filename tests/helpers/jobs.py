"""Run jobs as a user does, find their processes, send them signals, compare their stores."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import gradproj.store  # registers bfloat16 with zarr
from gradproj.store.unit_record import list_records

assert gradproj.store


DENSE_ROWS = {
    "encoding": "dense",
    "basis": "random",
    "proj_rank_total": 256,
    "loss_reduction": "mean",
}
"""The job's defaults of format 1, whose rows are compared with plain gradients by most tests."""


def flags(*, dense_rows: bool = True, **settings: Any) -> list[str]:
    """Return keyword arguments as command-line flags; True is a bare flag.

    The flags of a job have those of ``DENSE_ROWS`` that are not given, unless ``dense_rows`` is
    false: its defaults are then today's.
    """
    is_job = {"shards", "output_dir"} <= settings.keys()
    if is_job and dense_rows and "bytes_per_document" not in settings:
        settings = DENSE_ROWS | settings
    given = []
    for name, value in settings.items():
        given += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return given


PATIENCE_S = 300
"""Time for what takes seconds on a quiet machine. After it a test fails; none waits for it."""

SMALL_JOB = {
    "proj_rank_total": 24,
    "proj_rank_min": 3,
    "batch_size": 8,
    "batch_tokens": 300,
    "max_length": 48,
}
"""Flags of the jobs of most tests: narrow rows, short batches."""

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def job_command(ranks: int, **settings: Any) -> list[str]:
    """Return the job's command line: torchrun for several ranks, plain Python for one."""
    module = ["-m", "gradproj.run", *flags(**{"device": "cpu", **settings})]
    if ranks == 1:
        return [sys.executable, *module]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    return [*launcher, *module]


def run_job(
    ranks: int = 1,
    expect: int | None = 0,
    timeout: float = PATIENCE_S,
    fresh_process: bool = False,
    **settings: Any,
) -> subprocess.CompletedProcess:
    """Run the job and check that it exits with ``expect`` (None: any code).

    The ranks are forked from a process that has imported everything. With ``fresh_process`` they
    are new processes, several from torchrun, and so they are if torchrun's exit code is wanted.
    """
    if not fresh_process and (ranks == 1 or expect == 0):
        from helpers.forked_ranks import run_forked

        done = run_forked(job_command(1, **settings)[2:], ranks)
    else:
        done = subprocess.run(
            job_command(ranks, **settings),
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    assert expect is None or done.returncode == expect, (
        f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def start_at_gate(gate: Any, **settings: Any) -> Any:
    """Start a job of one rank and wait until it is at a ``Gate``. Returns a ``ForkedProcess``."""
    from helpers.forked_ranks import ForkedProcess

    job = ForkedProcess(job_command(1, **settings)[2:], job_gate=str(gate.folder))
    gate.wait_for(1, lambda: job.poll() is None, lambda: "".join(job.communicate()))
    return job


def wait_for_a_record(output: Path) -> None:
    """Return when the first unit is committed, which a thread of the job does."""
    until = time.monotonic() + PATIENCE_S
    while not len(list_records(output / "units")):
        assert time.monotonic() < until
        time.sleep(0.005)


def arrays_of(output: Path) -> dict[str, bytes]:
    """Return the bytes of every array of a store, read by plain zarr."""
    group = zarr.open_group(str(output / "projections.zarr"), mode="r")
    return {name: np.ascontiguousarray(array[...]).tobytes() for name, array in group.arrays()}


def assert_same_bits(a: Path, b: Path) -> None:
    """Check that two stores have the same arrays, bit by bit."""
    first, second = arrays_of(a), arrays_of(b)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []


MARK = "GRADPROJ_TEST_JOB"
"""Environment variable in all processes of a job, by which orphans are found."""
HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that the launch scripts have torchrun forward."""

ORPHAN_S = 20.0
"""Workers whose launcher was killed (-9) exit within 5 s; on a busy machine within this time."""
DRAIN_S = 60.0
"""A job exits within this time after a stop signal, also on a busy machine."""


@dataclass(frozen=True)
class Scene:
    """Inputs and settings of jobs, and the output of an undisturbed one."""

    corpus: Path
    model: Path
    settings: dict[str, Any]
    undisturbed: Path

    def flags(self, output: Path) -> dict[str, Any]:
        return {
            "shards": self.corpus,
            "model": self.model,
            "output_dir": output,
            "device": "cpu",
            **self.settings,
        }

    @property
    def n_units(self) -> int:
        return len(list_records(self.undisturbed / "units"))


# --- processes ---


def processes_with(text: str) -> list[int]:
    """Return other processes with ``text`` in their command line or environment; no zombies."""
    pids = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            content = b"".join(
                Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline")
            )
        except OSError:  # exited, or another user's
            continue
        if text.encode() in content and pid != os.getpid():
            pids.append(pid)
    return pids


class Job:
    """One ``torchrun`` of ``gradproj.run`` with its workers."""

    def __init__(
        self,
        scene: Scene,
        output: Path,
        ranks: int,
        restarts: int = 0,
        environment: Mapping[str, str] | None = None,
        logs: Path | None = None,
    ) -> None:
        self.output, self.ranks, self.mark = output, ranks, f"{output}:{uuid.uuid4().hex}"
        self.log = (logs or output.parent) / f"log-{output.name}-{self.mark[-8:]}.txt"
        launcher = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        launcher += ["--shutdown-timeout=60", "--signals-to-handle", HANDLED, "-m", "gradproj.run"]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *launcher,
            *flags(**scene.flags(output)),
        ]
        environment = {**ENVIRONMENT, **(environment or {}), MARK: self.mark}
        self.started = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def pids(self) -> list[int]:
        return processes_with(self.mark)

    def workers(self) -> list[int]:
        """Return the living ranks."""
        return [pid for pid in self.pids() if b"torch.distributed.run" not in _command_line(pid)]

    def is_at_work(self) -> bool:
        """Return whether one of its ranks has a heartbeat."""
        for path in (self.output / "heartbeats").glob("*.json"):
            pid = int(path.stem.split("-")[-2])
            if _parent(pid) == self.process.pid:
                return True
        return False

    def send(self, number: int, target: str, rng: np.random.Generator) -> bool:
        """Signal one worker, torchrun alone or all. Returns False if there is no such process."""
        if target == "launcher":
            pids = [self.process.pid] if self.is_running() else []
        elif target == "worker":
            pids = [int(pid) for pid in rng.permutation(self.workers())[:1]]
        else:
            pids = [int(pid) for pid in rng.permutation(self.pids())]
        sent = sum([_signal(pid, number) for pid in pids])
        while target == "job" and number == signal.SIGKILL and (pids := self.pids()):
            # torchrun was starting another process.
            sent += sum([_signal(pid, number) for pid in pids])
        return sent > 0

    def wait_until_gone(self, seconds: float) -> float:
        """Wait until all its processes have exited. Returns the seconds it took."""
        started = time.monotonic()
        while self.is_running() or self.pids():
            waited = time.monotonic() - started
            assert waited < seconds, (
                f"after {waited:.1f} s there still are {self.pids()}\n{self.log_text()}"
            )
            time.sleep(0.02)
        return time.monotonic() - started

    def log_text(self) -> str:
        return f"--- {self.log}\n{self.log.read_text(errors='replace')[-6000:]}"

    def end(self) -> None:
        """Kill whatever is left of the job."""
        for pid in self.pids():
            _signal(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None
