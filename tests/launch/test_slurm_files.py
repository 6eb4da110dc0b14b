"""The Slurm files: their requests to Slurm, and when they requeue a job.

srun, scontrol and Python are stubs here; ``tests/slurm`` runs the same files in a real Slurm.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.jobs import PATIENCE_S
from helpers.shell import ROOT, run_bash, stub
from torch.distributed.run import get_args_parser


def run_sbatch(
    folder,
    step="",
    plan=0,
    begin=(3, "units are left"),
    end=(3, "units are left"),
    starts=1,
    flags=(),
    file="project_pile.sbatch",
    **env,
):
    """Run the batch script; the last start's result, and what was queued again.

    ``begin`` and ``end``: what ``gradproj slurm`` answers; None asks the real one. ``folder/asked``
    has the questions.
    """
    bin_dir = folder / "bin"
    stub(bin_dir, "srun", f'cd "{folder}"\nprintf "%s\\n" "$@" >srun\n{step}')
    stub(bin_dir, "sleep", '[[ $1 == 60 ]] || exec "$(PATH=${PATH#*:} command -v sleep)" "$@"')
    stub(bin_dir, "scontrol", f'[[ $1 == requeue ]] && echo "$2" >>"{folder}/requeued"; echo node1')
    answers = [
        f'exec "{sys.executable}" "$@"'
        if answer is None
        else f'echo "{answer[1]}"; exit {answer[0]}'
        for answer in (end, begin)
    ]
    python = stub(
        bin_dir,
        "python",
        f'cd "{folder}"; case "$*" in "-m gradproj plan"*) exit {plan};; '
        f'"-m gradproj slurm"*) echo "$*" >>asked;; esac\n'
        f'case "$*" in *--ended*) {answers[0]};; *) {answers[1]};; esac',
    )
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
            **{**job, "PYTHON": python, "OUTPUT_DIR": folder / "out", **env},
        )  # fmt: skip
    queued = folder / "requeued"
    return done, queued.read_text().split() if queued.exists() else []


ELEMENT = {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 3}
"""The last element of an array, whose job id is the whole array's."""

DRAIN = "trap 'exit 1' USR1; kill -USR1 $PPID; for _ in {1..50}; do sleep 0.1; done"
BEGIN, CRASHED = ["out"], ["out", "out --ended 1"]


@pytest.mark.parametrize(
    ("settings", "asked", "queued", "code", "message"),
    [
        (dict(begin=(0, "complete already")), BEGIN, False, 0, "complete already"),
        (dict(plan=2), [], False, 2, "cannot run as it is (code 2); it is not queued again"),
        (dict(step="exit 1", end=(0, "complete")), CRASHED, False, 0, "complete"),
        (dict(step="exit 1", end=(1, "no unit")), CRASHED, False, 1, "no unit"),
        (dict(step="exit 1", end=(3, "units: queued again")), CRASHED, True, 1, "queued again"),
        (dict(step="exit 1", end=(2, "")), CRASHED, False, 2, "cannot be read (code 2), see above"),
        (dict(begin=(2, "")), BEGIN, False, 2, "cannot be read (code 2), see above"),
        (dict(step="exit 143"), ["out", "out --ended 143"], True, 1, "units are left"),
        (dict(step=DRAIN), ["out", "out --ended 1 --drained"], True, 1, "told to stop (USR1)"),
        (dict(step=DRAIN, end=(2, "")), ["out", "out --ended 1 --drained"], True, 1,
         "cannot be read now, see above: queued again"),
        (dict(step="kill -TERM $PPID; sleep 0.2"), BEGIN, False, 1, "ended by scancel or by"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["project_pile.sbatch", "project_pile_array.sbatch"])
def test_batch_job_does_what_it_is_told(tmp_path, file, settings, asked, queued, code, message):
    done, was_queued = run_sbatch(tmp_path, **settings, file=file)
    assert message in done.stdout, done.stdout + done.stderr
    assert (done.returncode, was_queued) == (code, ["7"] if queued else [])
    questions = tmp_path / "asked"
    assert (questions.read_text() if asked else "").splitlines() == [
        f"-m gradproj slurm {tmp_path}/{words}" for words in asked
    ]


FIRST_UNIT = f"""\
cd "{ROOT}"
"{sys.executable}" - "$OUTPUT_DIR" <<'END'
import sys
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.slurm_marks import note_progress
from gradproj.distributed import JobName
from gradproj.storage.object_path import path_of
owner = Owner.this_process(JobName.from_environment().job_id, 0, 0)
note_progress(path_of(sys.argv[1]), owner)
END
exit 1"""
"""A step in which a rank commits a unit, under the job's name as it finds it, and crashes."""


def test_output_in_a_bucket_is_queued_again_by_the_same_rule(tmp_path, bucket, s3_server):
    job = {
        "file": "project_pile_array.sbatch",
        "begin": None,
        "end": None,
        "OUTPUT_DIR": f"{bucket}/out",
        "PYTHONPATH": ROOT,
        **s3_server.environment,
        **ELEMENT,
    }
    done, queued = run_sbatch(tmp_path, FIRST_UNIT, **job)
    assert queued == ["7_3"], done.stdout + done.stderr
    assert "job 7_3, start 1: not complete, with new units in this start: queued" in done.stdout
    assert s3_server.secret not in done.stdout + done.stderr
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize("flags", [["--output_dir", "elsewhere"], ["--output_dir=elsewhere"]])
def test_output_dir_flag_overrides_the_setting(tmp_path, flags):
    done, _ = run_sbatch(tmp_path, flags=flags)
    assert "output elsewhere" in done.stdout
    assert "-m gradproj slurm elsewhere" in (tmp_path / "asked").read_text()


def test_address_with_a_secret_is_not_repeated(tmp_path):
    done, _ = run_sbatch(tmp_path, plan=2, OUTPUT_DIR="s3://user:SECRET@bucket/out")
    assert done.returncode == 2
    assert "SECRET" not in done.stdout + done.stderr


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
