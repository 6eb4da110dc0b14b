"""Outputs deleted or replaced under a running job: real processes, one clear line."""

import os
import shutil
import signal

import pytest
from helpers.gate import Gate
from helpers.jobs import PATIENCE_S, assert_same_bits, run_job, start_at_gate
from helpers.outputs import tree_of

from gradproj.maintenance.verify import verify

SETTINGS = {
    "proj_rank_total": 24,
    "proj_rank_min": 3,
    "batch_size": 4,
    "max_length": 48,
    "rows_per_shard": 16,
}


class Jobs:
    """Starts jobs that are suspended after some batches."""

    def __init__(self, folder):
        self.folder, self.running = folder, {}

    def start(self, batches, **settings):
        """Start a job and suspend it (``kill -STOP``) after this many batches."""
        gate = Gate(self.folder / f"gate-{len(self.running)}", batches)
        job = start_at_gate(gate, **SETTINGS | settings)
        self.running[job] = gate
        job.send_signal(signal.SIGSTOP)
        return job

    def go_on(self, job):
        """Resume a job; return its exit code and output."""
        self.running[job].open()
        job.send_signal(signal.SIGCONT)
        errors = job.communicate(timeout=PATIENCE_S)[1]
        return (
            job.returncode,
            [line for line in errors.splitlines() if line.startswith("gradproj:")],
            errors,
        )


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path)
    yield jobs
    for job in jobs.running:
        job.kill()
        job.communicate()


def lasting(output):
    """Return the content of an output, without heartbeats of running processes."""
    beats = os.fspath(output / "heartbeats")
    return {path: what for path, what in tree_of(output).items() if not path.startswith(beats)}


def test_job_that_hung_writes_nothing_into_a_new_store(tmp_path, corpus, model_dir, jobs):
    output, where = tmp_path / "out", {"shards": corpus, "model": model_dir}
    others = {**SETTINGS, **where, "proj_rank_total": 12}
    old = jobs.start(3, output_dir=output, **where)
    shutil.rmtree(output)
    new = jobs.start(14, output_dir=output, **others)
    there = lasting(output)
    assert 2 <= len(list((output / "units").iterdir())) < 13
    code, lines, errors = jobs.go_on(old)
    assert (code, len(lines)) == (2, 1), errors
    assert (
        f"{output} was replaced while this job ran: it now holds a store with other settings"
        in lines[0]
    )
    assert lasting(output) == there
    assert jobs.go_on(new)[0] == 0
    assert verify(output).exit_code == 0
    run_job(1, output_dir=tmp_path / "undisturbed", **others)
    assert_same_bits(output, tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("deleted", "way_out"),
    [("", "if it is lost, start over"), ("projections.zarr", "delete the output and start over")],
)
def test_deleted_directory_ends_a_running_job_with_one_line(
    tmp_path, corpus, model_dir, jobs, deleted, way_out
):
    output = tmp_path / "out"
    job = jobs.start(6, shards=corpus, model=model_dir, output_dir=output)
    shutil.rmtree(output / deleted)
    code, lines, errors = jobs.go_on(job)
    assert (code, len(lines)) == (2, 1), errors
    assert f"{output / deleted} was deleted while this job ran" in lines[0]
    assert way_out in lines[0]
    assert "Traceback" not in errors
    assert not (output / deleted).exists()
