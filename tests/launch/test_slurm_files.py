"""The Slurm files: their requests to Slurm, and when they requeue a job.

srun, scontrol and Python are stubs here; ``tests/slurm`` runs the same files in a real Slurm.
"""

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.jobs import PATIENCE_S
from helpers.shell import ROOT, run_bash, stub
from torch.distributed.run import get_args_parser

from gradproj.coordinator.process_id import Owner
from gradproj.distributed import JobName
from gradproj.job.startup import log_to_file
from gradproj.run import commit


def run_sbatch(
    folder, step="", plan=0, complete=False, starts=1, flags=(), file="project_pile.sbatch", **env
):
    """Run the batch script; the last start's result, and what was queued again."""
    bin_dir, out = folder / "bin", folder / "out"
    stub(bin_dir, "srun", f'cd "{folder}"\nprintf "%s\\n" "$@" >srun\n{step}')
    stub(bin_dir, "sleep", '[[ $1 == 60 ]] || exec "$(PATH=${PATH#*:} command -v sleep)" "$@"')
    stub(bin_dir, "scontrol", f'[[ $1 == requeue ]] && echo "$2" >>"{folder}/requeued"; echo node1')
    status = "[[ -e out/complete ]]; exit $((3 * $?))" if not complete else "exit 0"
    python = stub(
        bin_dir,
        "python",
        f'cd "{folder}"; case "$*" in *plan*) exit {plan};; *status*) {status};; esac',
    )
    (out / "logs").mkdir(parents=True, exist_ok=True)
    job = {
        "SLURM_JOB_ID": 7,
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": 1,
        "SLURM_SUBMIT_DIR": ROOT,
    }
    for _ in range(starts):
        (folder / "requeued").unlink(missing_ok=True)
        done = run_bash(
            ROOT / "slurm" / file, *flags, path=f"{bin_dir}:{os.environ['PATH']}", cwd=folder,
            **{**job, "PYTHON": python, "OUTPUT_DIR": out, **env},
        )  # fmt: skip
    queued = folder / "requeued"
    return done, queued.read_text().split() if queued.exists() else []


def in_log(job, line):
    return f'echo "2026-01-01 00:00:00,000 INFO {line}" >>out/logs/rank-00000-slurm-{job}.log'


ELEMENT = {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 3}
"""The last element of an array, whose job id is the whole array's."""

NEW_UNIT = in_log("7", "unit 12 committed: x")
DRAIN = "trap 'exit 1' USR1; kill -USR1 $PPID; for _ in {1..50}; do sleep 0.1; done"
FAILED = "touch out/failed.json out/logs/slurm-%s.failed"


@pytest.mark.parametrize(
    ("settings", "queued", "code", "message"),
    [
        (dict(step=f"{NEW_UNIT}; touch out/complete"), False, 0, "complete; 1 units by this job"),
        (dict(step="exit 1", complete=True), False, 0, "complete already"),
        (dict(plan=2, starts=3), False, 2, "cannot run as it is (code 2); it is not queued again"),
        (dict(step="exit 1"), False, 1, "without a new unit; it is not queued again"),
        (dict(step="exit 137"), False, 1, "without a new unit; it is not queued again"),
        (dict(step=f"{NEW_UNIT}; exit 1"), True, 1, "1 units in this start: queued again"),
        (dict(step=DRAIN), True, 1, "0 units in this start: queued again"),
        (dict(step="exit 143"), True, 1, "0 units in this start: queued again"),
        (dict(step="exit 138"), True, 1, "0 units in this start: queued again"),
        (dict(step=f"{NEW_UNIT}; {FAILED % 7}; exit 1"), False, 1, "an error that you can fix"),
        (dict(step=f"{NEW_UNIT}; {FAILED % 71}; exit 1"), True, 1, "1 units in this start: queued"),
        (dict(step=f"{NEW_UNIT}; kill -TERM $PPID; sleep 0.2"), False, 1, "ended by scancel or by"),
        (dict(step=DRAIN, starts=2), False, 1, "two starts in a row ended without a new unit"),
        (dict(step=f"{NEW_UNIT}; {DRAIN}", starts=3), True, 1, "1 units in this start: queued"),
        (dict(step="exit 0"), False, 0, "nothing is left to start; other jobs are at work on"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["project_pile.sbatch", "project_pile_array.sbatch"])
def test_batch_job_is_requeued_only_if_that_helps(tmp_path, file, settings, queued, code, message):
    done, was_queued = run_sbatch(tmp_path, **settings, file=file)
    assert message in done.stdout, done.stdout + done.stderr
    assert (done.returncode, was_queued) == (code, ["7"] if queued else [])


@pytest.mark.parametrize(
    ("step", "queued", "message"),
    [
        (in_log("7_3", "unit 12 committed: x"), ["7_3"], "job 7_3, start 1: not complete; 1 units"),
        (in_log("7_30", "unit 12 committed: x"), [], "without a new unit; it is not queued again"),
        (in_log("7", "unit 12 committed: x"), [], "without a new unit; it is not queued again"),
        (
            f"{in_log('7_3', 'unit 1 committed: x')}; {FAILED % '7_3'}",
            [],
            "an error that you can fix",
        ),
        (f"{in_log('7_3', 'unit 1 committed: x')}; {FAILED % '7_30'}", ["7_3"], "queued again"),
        ("exit 143", ["7_3"], "queued again"),
    ],
)
def test_array_element_is_requeued_alone_for_its_own_units(tmp_path, step, queued, message):
    step += "; exit 1"
    done, was_queued = run_sbatch(tmp_path, step, file="project_pile_array.sbatch", **ELEMENT)
    assert message in done.stdout, done.stdout + done.stderr
    assert was_queued == queued


def test_failure_of_an_earlier_start_is_ignored(tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    run_bash("-c", FAILED % 7, cwd=tmp_path)
    assert run_sbatch(tmp_path, f"{NEW_UNIT}; exit 1")[1] == ["7"]


@pytest.mark.parametrize("env", [{}, ELEMENT], ids=["job", "element"])
def test_batch_job_counts_units_from_the_logs_of_its_ranks(tmp_path, monkeypatch, env):
    """The file's name and its line, as the job itself writes them."""
    for name, value in {"SLURM_JOB_ID": 7, **env}.items():
        monkeypatch.setenv(name, str(value))
    owner = Owner.this_process(JobName.from_environment().job_id, 0, 0)
    (tmp_path / "out" / "logs").mkdir(parents=True)
    root, handlers = logging.getLogger("gradproj"), list(logging.getLogger("gradproj").handlers)
    log_to_file(tmp_path / "out", owner, verbose=False)
    rows = SimpleNamespace(record=SimpleNamespace(unit=12, stats={}))
    done = SimpleNamespace(on_host=lambda: rows)
    for accepted in (True, False):
        commit(SimpleNamespace(commit=lambda rows, accepted=accepted: accepted), done)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    (log,) = (tmp_path / "out" / "logs").iterdir()
    written = log.read_text()
    log.unlink()
    step = f"cat >>out/logs/{log.name} <<'END'\n{written}END\nexit 1"
    done, _ = run_sbatch(tmp_path, step, **env)
    assert "not complete; 1 units in this start" in done.stdout, written


@pytest.mark.parametrize("flags", [["--output_dir", "elsewhere"], ["--output_dir=elsewhere"]])
def test_output_dir_flag_overrides_the_setting(tmp_path, flags):
    step = NEW_UNIT.replace("out/logs", "elsewhere/logs") + "; exit 1"
    done, was_queued = run_sbatch(tmp_path, step, flags=flags)
    assert "output elsewhere" in done.stdout
    assert was_queued


def test_output_in_a_bucket_is_refused_and_not_queued_again(tmp_path):
    done, was_queued = run_sbatch(tmp_path, flags=["--output_dir", "s3://bucket/out"])
    assert (done.returncode, was_queued) == (2, [])
    assert "an output in a bucket is for gradproj.run outside of Slurm" in done.stdout
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize(
    ("file", "starts"), [("project_pile.sbatch", 2), ("project_pile_array.sbatch", 2)]
)
def test_torchrun_gets_known_flags_and_a_new_rendezvous_per_start(tmp_path, file, starts):
    meetings = []
    for start in range(starts):
        run_sbatch(tmp_path, file=file, SLURM_RESTART_COUNT=start, RANKS_PER_NODE=2)
        words = (tmp_path / "srun").read_text().split("\n")[:-1]
        assert "--export=ALL" in words
        given = get_args_parser().parse_args(
            words[words.index(str(ROOT / "slurm" / "torchrun.py")) + 1 :]
        )
        assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(given.signals_to_handle.split(","))
        assert (given.nproc_per_node, given.training_script) == ("2", "gradproj.run")
        meetings.append("standalone" if given.standalone else (given.rdzv_endpoint, given.rdzv_id))
    wanted = [("node1:20007", "7-0"), ("node1:20007", "7-1")]
    assert meetings == (wanted if file == "project_pile.sbatch" else ["standalone"] * 2)


@pytest.mark.parametrize("file", ["project_pile.sbatch", "project_pile_array.sbatch"])
def test_missing_checkout_or_python_is_reported(tmp_path, file):
    done, queued = run_sbatch(tmp_path, file=file, SLURM_SUBMIT_DIR=tmp_path)
    assert (done.returncode, queued) == (2, [])
    assert (
        f"{tmp_path} has no slurm/common.sh: call sbatch in the checkout, or say where that is"
        in done.stdout
    )
    done, queued = run_sbatch(
        tmp_path, file=file, SLURM_SUBMIT_DIR=tmp_path, CHECKOUT=ROOT, PYTHON="none"
    )
    assert (done.returncode, queued) == (2, [])
    assert "there is no Python at none: bash launch/setup.sh makes it, or set PYTHON" in done.stdout


@pytest.mark.parametrize("name", ["project_pile.sbatch", "project_pile_array.sbatch"])
def test_batch_files_request_what_requeueing_needs(name):
    options = re.findall(r"^#SBATCH (\S+)", (ROOT / "slurm" / name).read_text(), flags=re.M)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@180", "--ntasks-per-node=1"} <= set(
        options
    )
    is_array = "array" in name
    assert ("--nodes=1" in options, "--output=gradproj-%A_%a.log" in options) == (
        is_array,
        is_array,
    )


def test_exit_code_of_torchrun_tells_the_signal():
    command = [
        sys.executable,
        ROOT / "slurm" / "torchrun.py",
        "--standalone",
        "--nproc-per-node=1",
        "--no-python",
        "sleep",
        "60",
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    until = time.monotonic() + PATIENCE_S
    while not children.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    child.terminate()
    assert child.wait(PATIENCE_S) == 128 + 15, child.stderr.read()
