"""Signals and the launcher's death, during a long batch or the imports of real jobs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time

import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.gate import Gate
from helpers.jobs import (
    DRAIN_S,
    ORPHAN_S,
    Job,
    Scene,
    assert_same_bits,
    job_command,
    processes_with,
    run_job,
)

SETTINGS = {
    "proj_rank_total": 24,
    "proj_rank_min": 3,
    "batch_size": 2,
    "max_length": 48,
    "rows_per_shard": 16,
}
FOR_EVER_S = 600
BATCHES_DONE = 3
"""Batches of a unit that are done at the signal; a unit has eight or more."""

SLOW_IMPORT = f"""
import importlib.util, os, sys, time

class Slow:
    def find_spec(name, path=None, target=None):
        if name == "torch" and "RANK" in os.environ:
            return importlib.util.spec_from_loader(name, Slow)

    def create_module(spec):
        return None

    def exec_module(module):
        open(os.path.join(os.path.dirname(__file__), str(os.getpid()) + ".0"), "w").close()
        time.sleep({FOR_EVER_S})

sys.meta_path.insert(0, Slow)
"""
"""Code that a rank's Python runs first. The launcher imports torch as usual."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("signals")
    corpus = make_corpus(folder / "tars", mixed_documents(64))
    scene = Scene(corpus, model_dir, SETTINGS, folder / "undisturbed")
    run_job(1, **scene.flags(scene.undisturbed))
    return scene


class SlowImports(Gate):
    """Ranks that start in its environment never finish importing; they wait for the test there."""

    def __init__(self, folder):
        super().__init__(folder, batches=0)
        (folder / "sitecustomize.py").write_text(SLOW_IMPORT)


@pytest.fixture
def start(scene, tmp_path):
    """Start torchrun with two ranks, wait until both wait at a gate, and end them afterwards."""
    started = []

    def start(gate):
        environment = {"PYTHONPATH": gate.python_path}
        job = Job(scene, tmp_path / "out", ranks=2, environment=environment)
        started.append(job)
        gate.wait_for(2, job.is_running, job.log_text)
        return job

    yield start
    for job in started:
        job.end()


def test_ranks_in_a_long_batch_exit_soon_after_their_launchers_death(start, tmp_path):
    job = start(Gate(tmp_path / "gate", BATCHES_DONE, deaf=True))
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait_until_gone(ORPHAN_S)


def test_importing_ranks_exit_soon_after_their_launchers_death(start, tmp_path):
    job = start(SlowImports(tmp_path / "imports"))
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait_until_gone(ORPHAN_S)


def test_ctrl_c_during_imports_ends_all_ranks_with_one_line(start, tmp_path):
    job = start(SlowImports(tmp_path / "imports"))
    os.killpg(job.process.pid, signal.SIGINT)
    job.wait_until_gone(DRAIN_S)
    printed = job.log.read_text()
    assert (
        printed.count(
            "gradproj: stopped by SIGINT before the first unit; run the same command to continue\n"
        )
        == 1
    )
    assert "KeyboardInterrupt" not in printed
    assert "gradproj/run.py" not in printed


def claims_held(output):
    """Return the newest claims that were not released."""
    newest = {}
    for path in (output / "claims").iterdir():
        unit, number = path.name.split(".")
        newest[unit] = max(newest.get(unit, (-1, None)), (int(number), path))
    return [p.name for _, p in newest.values() if json.loads(p.read_text()) != {"released": True}]


def saved_batches(output):
    """Return the number of batches saved in ``partial/`` for each unit."""
    names = [path.relative_to(output / "partial") for path in (output / "partial").glob("*/*")]
    return {
        int(name.parts[0]): int(re.fullmatch(r"000000-(\d{6})\..*", name.name)[1]) for name in names
    }


def assert_drained(output, ranks):
    """Check that each rank saved its finished batches and released all its claims."""
    assert processes_with(str(output)) == []
    assert claims_held(output) == []
    assert [*(output / "tmp").iterdir(), *(output / "heartbeats").iterdir()] == []
    assert list(saved_batches(output).values()) == [BATCHES_DONE] * ranks


def test_ctrl_c_saves_finished_rows_and_the_same_command_resumes(scene, start, tmp_path):
    output = tmp_path / "out"
    job = start(Gate(tmp_path / "gate", BATCHES_DONE))
    os.killpg(job.process.pid, signal.SIGINT)
    job.wait_until_gone(DRAIN_S)
    printed = job.log.read_text()
    assert printed.count("gradproj: SIGINT: stopping after the batch in flight") == 1
    assert re.search(
        r"Stopped \(SIGINT\): \d of 4 units are committed; run the same command to continue",
        printed,
    )
    assert "gradproj/run.py" not in printed, "a traceback"
    assert_drained(output, ranks=2)

    saved = saved_batches(output)
    run_job(1, **scene.flags(output), verbose=True)
    log = (output / "logs" / "rank-00000.log").read_text()
    for unit, batches in saved.items():
        first = re.search(rf"unit {unit}: batch (\d+) of", log)
        assert int(first[1]) == batches + 1, f"unit {unit} was computed again"
    assert_same_bits(output, scene.undisturbed)


@pytest.fixture
def start_alone(scene, tmp_path):
    """Start one rank without a launcher, wait until it is in a batch, and end it afterwards."""
    started = []

    def start(gate):
        command = job_command(1, **scene.flags(tmp_path / "out"))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        rank = subprocess.Popen(command, env=gate.environment, **pipes)
        started.append(rank)
        gate.wait_for(1, lambda: rank.poll() is None, lambda: rank.communicate()[0])
        return rank

    yield start
    for rank in started:
        rank.kill()
        rank.wait()


def test_signal_repeated_at_once_counts_as_one(start_alone, tmp_path):
    gate = Gate(tmp_path / "gate", BATCHES_DONE, deaf=True)
    rank = start_alone(gate)
    for _ in range(2):
        rank.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    gate.open()
    printed, _ = rank.communicate(timeout=DRAIN_S)
    assert rank.returncode == 128 + signal.SIGUSR1
    assert (
        "Stopped (SIGUSR1): 0 of 4 units are committed; run the same command to continue" in printed
    )
    assert_drained(tmp_path / "out", ranks=1)


def test_second_signal_after_3_s_ends_the_job_at_once(start_alone, tmp_path):
    rank = start_alone(Gate(tmp_path / "gate", BATCHES_DONE, deaf=True))
    rank.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(4)
    # A busy machine may have delivered the first one late: then the next is still too early.
    for _ in range(int(ORPHAN_S)):
        rank.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(1)
            break
    assert rank.returncode == 128 + signal.SIGTERM
