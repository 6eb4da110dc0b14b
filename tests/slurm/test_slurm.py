"""Both batch files under a real Slurm: disturbed in every way, wrong flags, cancelled."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster, processes_with, wait_until
from conftest import BATCHES_A_START, N_SAMPLES, ROWS_PER_UNIT, SETTINGS
from helpers.buckets import copy_into
from helpers.gate import Gate
from helpers.jobs import arrays_of, assert_same_bits, flags
from helpers.launches import arrays_in_bucket
from helpers.shell import ROOT

from gradproj.__main__ import main
from gradproj.coordinator.heartbeats import read_heartbeats
from gradproj.storage.object_path import path_of

pytestmark = pytest.mark.slurm

JOB, ARRAY = "project_pile.sbatch", "project_pile_array.sbatch"
ON_TWO_NODES = {JOB: "--nodes=2", ARRAY: "--array=0-2"}
"""Three elements for two nodes: one waits until another leaves its node, or until all is done."""
PREEMPT = [
    "sbatch",
    "--partition=high",
    "--nodes=2",
    "--gpus-per-node=8",
    "--output=/dev/null",
    "--wrap=sleep 1",
]
"""A job that preempts the jobs on both nodes."""
LONG_S = 600
"""Time for a job's next step, a start of several Python processes, on a busy machine."""


@dataclass
class Submitted:
    """A submitted job or array."""

    cluster: Cluster
    folder: Path
    """Folder of its logs; ``out`` in it is its output."""
    number: str
    elements: list[str]
    """The array's elements as Slurm names them, or the job alone."""
    ranks: int
    """Number of ranks of each."""
    gate: Gate
    """Holds its ranks until the test has done what it does to a running job."""
    output: Path
    """A folder, or an address in a bucket."""

    def log(self, element: str) -> str:
        path = self.folder / f"gradproj-{element}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        return "\n".join(f"--- {e}: {self.cluster.state(e)}\n{self.log(e)}" for e in self.elements)

    def units(self, element: str = "*") -> list[int]:
        """Return the units that it has committed, in all its starts."""
        texts = [path.read_text() for path in self.output.glob(f"logs/rank-*-slurm-{element}.log")]
        return [
            int(unit) for text in texts for unit in re.findall(r" unit (\d+) committed: ", text)
        ]

    def restarts(self) -> int:
        return sum(map(self.cluster.restarts, self.elements))

    def running(self) -> list[str]:
        return [e for e in self.elements if self.cluster.state(e) == "RUNNING"]

    def wait_at_gate(self, *elements: str) -> None:
        """Return when all ranks of these wait at the gate in their present start."""
        for element in elements:
            self._wait(
                f"{self.ranks} ranks of {element} at the gate",
                lambda e=element: self._ranks_at_gate(e) == self.ranks,
            )

    def wait_for_gate(self, starts: int) -> None:
        """Return when all ranks have come to the gate in each of so many starts of this job."""
        # In a bucket heartbeats come once a minute. The gate's folder is the test's, on this disk.
        came = f"*.{BATCHES_A_START}"
        self._wait(
            f"{self.ranks} ranks at the gate in start {starts}",
            lambda: len(list(self.gate.folder.glob(came))) >= starts * self.ranks,
        )

    def _ranks_at_gate(self, element: str) -> int:
        start = (f"slurm-{element}", self.cluster.restarts(element))
        return sum(
            (owner.job_id, owner.generation // 1000) == start and beat.batches == BATCHES_A_START
            for owner, beat in read_heartbeats(self.output / "heartbeats")
        )

    def wait_for_restarts(self, n: int) -> None:
        self._wait(f"{n} restarts", lambda: self.restarts() >= n)

    def wait_for_end(self) -> list[str]:
        """Return the elements' final states; check that no process is left."""
        ended = {"COMPLETED", "FAILED", "CANCELLED"}
        self._wait("its end", lambda: {self.cluster.state(e) for e in self.elements} <= ended)
        wait_until("no process", lambda: not processes_with(str(self.output)))
        return [self.cluster.state(e) for e in self.elements]

    def _wait(self, what: str, holds: Callable[[], object]) -> None:
        wait_until(f"{what} (job {self.number})", holds, LONG_S, self.logs)


def submit(
    cluster,
    inputs,
    folder,
    file,
    option,
    ranks=1,
    wrong=None,
    shards=None,
    secret=None,
    **environment,
):
    """Submit a batch file unchanged, with settings in the environment; ``wrong`` adds flags.

    ``secret`` is what only the environment of ``sbatch`` holds: its command line has the names.
    """
    folder.mkdir()
    gate = Gate(folder / "gate", BATCHES_A_START)
    environment = {
        "PATH": os.environ["PATH"],
        "SLURM_CONF": cluster.environment["SLURM_CONF"],
        "OMP_NUM_THREADS": 1,
        "HF_HUB_OFFLINE": 1,
        "PYTHON": sys.executable,
        "RANKS_PER_NODE": ranks,
        "HEAD_HOST": "127.0.0.1",
        "SHARDS": shards or inputs.shards,
        "MODEL": inputs.model,
        "OUTPUT_DIR": folder / "out",
        "PYTHONPATH": gate.python_path,
        **environment,
    }
    exported = ",".join([*(f"{k}={v}" for k, v in environment.items()), *(secret or {})])
    number = cluster(
        "sbatch",
        "--parsable",
        f"--chdir={folder}",
        f"--export={exported}",
        option,
        ROOT / "slurm" / file,
        *flags(**{**SETTINGS, **(wrong or {})}),
        cwd=ROOT,
        secret=secret,
    )
    name, _, value = option.partition("=")
    if name == "--array":
        elements, nodes = [f"{number}_{i}" for i in range(1 + int(value.rpartition("-")[2]))], 1
    else:
        elements, nodes = [number], int(value)
    output = path_of(environment["OUTPUT_DIR"])
    return Submitted(cluster, folder, number, elements, nodes * ranks, gate, output)


def disturb_job(job):
    """Send USR1 to the batch shell (as before the time limit), preempt, requeue, lose a node."""
    cluster, number = job.cluster, job.number
    for n, words in enumerate(
        [
            ["scancel", "--batch", "--signal=USR1", number],
            PREEMPT,
            ["scontrol", "requeue", number],
            ["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test"],
        ]
    ):
        job.wait_at_gate(number)
        cluster(*words)
        job.wait_for_restarts(n + 1)


def disturb_array(array):
    """Disturb each element in another way; one gets TERM in its ranks but not its batch shell."""
    cluster, (first, second, third) = array.cluster, array.elements
    array.wait_at_gate(first, second)
    cluster("scancel", "--batch", "--signal=USR1", first)
    cluster("scancel", "--signal=TERM", second)
    array.wait_for_restarts(2)
    array.wait_at_gate(third)
    cluster(*PREEMPT)
    array.wait_for_restarts(4)
    wait_until("two elements at work", lambda: len(array.running()) == 2, instead=array.logs)
    requeued, lost = array.running()
    array.wait_at_gate(requeued, lost)
    node = cluster.show(lost)["NodeList"]
    cluster("scontrol", "requeue", requeued)
    cluster("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    array.wait_for_restarts(6)


@pytest.mark.parametrize(
    ("file", "disturb"), [(JOB, disturb_job), (ARRAY, disturb_array)], ids=[JOB, ARRAY]
)
def test_job_stopped_preempted_requeued_and_losing_a_node_gives_the_same_bits(
    cluster, inputs, tmp_path, file, disturb
):
    job = submit(cluster, inputs, tmp_path / "job", file, ON_TWO_NODES[file])
    disturb(job)
    job.gate.open()
    assert set(job.wait_for_end()) == {"COMPLETED"}, job.logs()
    assert_same_bits(job.output, inputs.want)
    assert Counter(job.units()) == dict.fromkeys(range(N_SAMPLES // ROWS_PER_UNIT), 1), (
        "each unit by one of them"
    )
    verified = subprocess.run(
        [sys.executable, "-m", "gradproj", "verify", job.output], capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    for element in job.elements:
        starts = [int(n) for n in re.findall(r" start (\d+): nodes ", job.log(element))]
        assert starts == list(range(1, cluster.restarts(element) + 2)), job.log(element)
    assert "told to stop (USR1): saving" in job.logs()
    assert "complete" in job.log(job.elements[-1]).splitlines()[-1]


def test_job_without_a_shared_disk_goes_on_after_a_crash_and_a_drain(
    cluster, inputs, tmp_path, bucket, s3_server
):
    """Tars and output lie in a bucket. The ranks are killed (-9); then the script gets USR1."""
    copy_into(inputs.shards, path_of(f"{bucket}/tars"))
    job = submit(
        cluster, inputs, tmp_path / "job", JOB, ON_TWO_NODES[JOB], secret=s3_server.environment,
        shards=f"{bucket}/tars", OUTPUT_DIR=f"{bucket}/out", RESTARTS=0,
    )  # fmt: skip
    (number,) = job.elements
    job.wait_for_gate(1)
    ranks = [line for line in processes_with(str(job.output)) if " -u -m gradproj.run" in line]
    assert len(ranks) == 2, ranks
    for line in ranks:
        os.kill(int(line.split()[0]), signal.SIGKILL)
    job.wait_for_restarts(1)
    assert "not complete, with new units in this start: queued again" in job.log(number)
    job.wait_for_gate(2)
    cluster("scancel", "--batch", "--signal=USR1", number)
    job.wait_for_restarts(2)
    job.gate.open()
    assert job.wait_for_end() == ["COMPLETED"], job.logs()
    assert arrays_in_bucket(job.output) == arrays_of(inputs.want)
    assert main(["verify", str(job.output)]) == 0
    assert job.log(number).splitlines()[-1].endswith("complete")
    assert s3_server.environment["AWS_SECRET_ACCESS_KEY"] not in job.log(number)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith("s3:")) == []


def test_user_error_ends_the_job_with_one_line_and_no_requeue(cluster, inputs, tmp_path):
    jobs = {
        (file, wrong): submit(
            cluster,
            inputs,
            tmp_path / f"{n}{wrong}",
            file,
            option,
            wrong={wrong: tmp_path / "none"},
        )
        for n, (file, option) in enumerate([(JOB, "--nodes=1"), (ARRAY, "--array=0-0")])
        for wrong in ("proj_rank_totl", "model")
    }
    for (_, wrong), job in jobs.items():
        assert job.wait_for_end() == ["FAILED"], job.logs()
        assert (job.restarts(), job.output.exists()) == (0, False)
        log = job.log(job.elements[0])
        said = [line for line in log.splitlines() if re.match(r"gradproj: (?!\d{4}-)", line)]
        assert len(said) == 1, log
        assert (
            "--proj_rank_total" if wrong == "proj_rank_totl" else str(tmp_path / "none")
        ) in said[0]
        assert "Traceback" not in log
        assert log.splitlines()[-1].endswith(
            "the job cannot run as it is (code 2); it is not queued again"
        )


def test_error_found_during_the_run_is_not_requeued(cluster, inputs, tmp_path):
    """Change the tars under an array. Each element tells its own failure from the others'."""
    tars = shutil.copytree(inputs.shards, tmp_path / "tars")
    array = submit(cluster, inputs, tmp_path / "job", ARRAY, "--array=0-1", shards=tars, RESTARTS=0)
    array.wait_at_gate(*array.elements)
    for tar in tars.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:1024])
    array.gate.open()
    assert array.wait_for_end() == ["FAILED", "FAILED"], array.logs()
    assert array.restarts() == 0
    for element in array.elements:
        log = array.log(element)
        assert re.search(r"^gradproj: (?!\d{4}-).*\.tar", log, re.M), log
        assert "ended by an error that you can fix" in log.splitlines()[-1], log


def test_cancelled_job_leaves_no_process_and_is_not_requeued(cluster, inputs, tmp_path):
    jobs = [
        submit(cluster, inputs, tmp_path / JOB, JOB, "--nodes=1", ranks=2),
        submit(cluster, inputs, tmp_path / ARRAY, ARRAY, "--array=0-0"),
    ]
    for job in jobs:
        job.wait_at_gate(job.elements[0])
        assert processes_with(str(job.output))
    cluster("scancel", *(job.number for job in jobs))
    for job in jobs:
        assert job.wait_for_end() == ["CANCELLED"], job.logs()
        assert job.restarts() == 0
        assert "told to end (TERM)" in job.logs()


@pytest.mark.parametrize("file", [JOB, ARRAY, "index_pile.sbatch"])
def test_batch_files_are_accepted_unchanged_by_nodes_with_8_gpus(cluster, file):
    said = cluster("sbatch", "--test-only", "--partition=whole", ROOT / "slurm" / file, cwd=ROOT)
    assert "to start at" in said
    too_much = cluster(
        "sbatch",
        "--test-only",
        "--partition=whole",
        "--gpus-per-node=9",
        ROOT / "slurm" / file,
        check=False,
    )
    assert "Requested node configuration is not available" in too_much
