"""What a stranger starts: every script parses, passes flags that exist, and says what is wrong in one line."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from gradproj.commands import IndexConfig, PrepareFlags
from gradproj.config import run_config
from gradproj.flags import parse
from gradproj.query import QueryConfig
from gradproj.status import StatusConfig
from gradproj.training import TokenizerConfig, TrainConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"])
SBATCH = ROOT / "slurm" / "project_pile.sbatch"
IDS = [str(path.relative_to(ROOT)) for path in SCRIPTS]

CHECKS = {
    "prepare": lambda argv: parse(argv, "prepare", PrepareFlags),
    "tokenizer": lambda argv: parse(argv, "tokenizer", TokenizerConfig),
    "train": lambda argv: parse(argv, "train", TrainConfig),
    "query": lambda argv: parse(argv, "query", QueryConfig),
    "status": lambda argv: parse(argv, "status", StatusConfig),
    "index": lambda argv: parse(argv, "index", IndexConfig),
    "plan": lambda argv: run_config(argv, "plan"),
    "run": lambda argv: run_config(argv, "run"),
}
"""Command -> the parser of its flags, which refuses unknown ones."""

JOB_FLAGS = "--shards tars --model dir --output_dir out"


def commands_in(path):
    """``(command, its words)`` of every call of gradproj, as a shell would split them, with variables filled in."""
    text = re.sub(r"^\s*#.*$", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    calls = re.findall(r"-m gradproj(?: |\.)(\w+)([^\n|;&>]*)", text)
    return [
        (name, shlex.split(filled(words, "" if name == "index" else JOB_FLAGS)))
        for name, words in calls
        if name in CHECKS
    ]


def filled(text, arguments=""):
    text = re.sub(r'"\$\{?(@|JOB(_FLAGS)?\[@\])\}?"', arguments, text)
    return re.sub(r"\$\{?\w+(:-\w+)?\}?", "1", text)


def run_bash(*words, path=None, cwd=ROOT, **env):
    environment = {
        "HOME": str(cwd),
        "PATH": path or os.environ["PATH"],
        **{k: str(v) for k, v in env.items()},
    }
    return subprocess.run(
        ["bash", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def stub(folder, name, body):
    """An executable that stands in for a program."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_bash_can_parse_every_script(path):
    assert run_bash("-n", path).stderr == ""


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_no_script_names_a_path_of_one_machine(path):
    text = path.read_text().replace("#!/usr/bin/env bash", "")
    assert re.findall(r"/(?:home|root|work|tmp|usr|opt|mnt|srv|var|etc|data|scratch)\b", text) == []
    assert "://" not in text


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("launch/demo.sh", ["prepare", "tokenizer", "train", "status", "plan", "run", "status", "query"]),
        ("launch/one_node.sh", ["plan", "run"]),
        ("launch/multi_node.sh", ["plan", "run"]),
        ("slurm/project_pile.sbatch", ["plan", "run", "status"]),
        ("slurm/index_pile.sbatch", ["index"]),
    ],
)
def test_every_command_in_a_script_has_only_known_flags(name, commands):
    found = commands_in(ROOT / name)
    assert [command for command, _ in found][: len(commands)] == commands
    for command, words in found:
        CHECKS[command](words)


@pytest.mark.parametrize("name", ["launch/one_node.sh", "launch/multi_node.sh", "slurm/project_pile.sbatch"])
def test_torchrun_gets_known_flags_and_hands_signals_on(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    (words,) = re.findall(r"-m torch\.distributed\.run (.*) -m gradproj\.run", text)
    given = get_args_parser().parse_args([*shlex.split(filled(words)), "script.py"])
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(given.signals_to_handle.split(","))
    assert given.standalone == (name == "launch/one_node.sh")


def test_the_ci_calls_exactly_the_test_script():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "bash launch/test.sh"
    assert all(os.access(path, os.X_OK) for path in SCRIPTS if path.suffix != ".sbatch")


# ---- Set-up


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('case "$2" in *version_info*) exit 1;; *platform*) echo 3.9.2;; esac',
         r"gradproj: Python 3\.11 or newer is needed; here there is: .*old=3\.9\.2\. Install one, or name it: PYTHON="),
        ('case "$2" in *ensurepip*) exit 1;; *platform*) echo 3.12.1;; esac',
         r"old cannot make virtual environments: .* apt install old-venv"),
        ("exit 1", r"Python 3\.11 or newer is needed; here there is: none\."),
    ],
)  # fmt: skip
def test_a_python_that_will_not_do_is_one_clear_line(tmp_path, body, message):
    python = stub(tmp_path, "old", body)
    done = run_bash(ROOT / "launch/setup.sh", cwd=tmp_path, PYTHON=python, GRADPROJ_VENV=tmp_path / "venv")
    assert done.returncode == 2
    assert re.fullmatch(f"gradproj: .*|{message}.*", done.stderr.strip())
    assert re.search(message, done.stderr)


def fake_venv(folder, body="", ours=""):
    """An environment whose Python notes what it is asked, then does ``body``."""
    stub(folder / "bin", "python", f'echo "$*" >>"{folder}/calls"\n{body}')
    if ours:
        (folder / "made-by-gradproj-launch").write_text(ours)
    return folder


def test_an_environment_that_is_not_ours_is_used_but_never_changed(tmp_path):
    venv = fake_venv(tmp_path / "venv")
    done = run_bash(ROOT / "launch/setup.sh", GRADPROJ_VENV=venv)
    assert done.returncode == 0
    assert "as it is (not made by this script)" in done.stdout
    assert "pip" not in (venv / "calls").read_text()
    lacking = fake_venv(tmp_path / "lacking", "exit 1")
    done = run_bash(ROOT / "launch/setup.sh", GRADPROJ_VENV=lacking)
    assert done.returncode == 2
    assert "was not made by this script, and gradproj cannot be imported in it" in done.stderr
    assert (lacking / "bin/python").exists()


def test_a_finished_set_up_is_not_done_again_and_a_changed_one_is(tmp_path):
    body = 'case "$*" in *platform*) echo 3.12.1;; *install*) exit "${PIP_CODE:-0}";; esac'
    venv = fake_venv(tmp_path / "venv", body, ours=f"3.12.1 in {ROOT}\nanother pyproject\n")

    def set_up(*words, **env):
        (venv / "calls").write_text("")
        done = run_bash(ROOT / "launch/setup.sh", *words, GRADPROJ_VENV=venv, **env)
        return done, "pip install" in (venv / "calls").read_text()

    assert set_up()[1]
    assert not set_up()[1]
    assert set_up("dev")[1]
    assert not set_up("dev")[1]
    assert not set_up()[1]
    stamp = venv / "made-by-gradproj-launch"
    stamp.write_text(stamp.read_text().replace("extra dev\n", ""))
    failed, _ = set_up("dev", PIP_CODE=1)
    assert failed.returncode == 2
    assert "pip could not install the packages" in failed.stderr
    assert set_up("dev")[1], "a failed installation was taken for a finished one"


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("ruff check", 1), ("mypy", 1), ("pytest", 1)])
def test_the_test_script_fails_with_any_check_and_ends_with_pytest_s_line(tmp_path, failing, code):
    body = f'case "$*" in "-m {failing}"*) exit 1;; esac\n[[ $* != *pytest* ]] || echo "3 passed in 0.1s"'
    body = body.replace("exit 1;;", '[[ $* == *pytest* ]] && echo "1 failed in 0.1s"; exit 1;;')
    done = run_bash(
        ROOT / "launch/test.sh", "-x", GRADPROJ_VENV=fake_venv(tmp_path / "venv", body), CI="true"
    )
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] in ("3 passed in 0.1s", "1 failed in 0.1s")
    calls = (tmp_path / "venv" / "calls").read_text().splitlines()
    assert calls[-1] == "-m pytest -x"
    assert {"-m ruff check .", "-m ruff format --check gradproj tests", "-m mypy"} <= set(calls)


def test_the_demo_refuses_unknown_words_and_explains_itself():
    done = run_bash(ROOT / "launch/demo.sh", "--modle", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown argument --modle" in done.stderr
    assert "--shards needs a value" in run_bash(ROOT / "launch/demo.sh", "--shards").stderr
    assert "From nothing to an answer" in run_bash(ROOT / "launch/demo.sh", "--help").stdout


def test_a_launch_file_ends_with_the_plan_s_refusal(tmp_path):
    python = stub(
        tmp_path, "python", 'echo "$*" >>calls; [[ $* != *plan* ]] || { echo "gradproj: no" >&2; exit 2; }'
    )
    for name in ("one_node", "multi_node"):
        done = run_bash(
            ROOT / f"launch/{name}.sh", "--shards", "x", cwd=tmp_path, PYTHON=python, NODES=2, HEAD="a"
        )
        assert (done.returncode, done.stderr) == (2, "gradproj: no\n")
    assert "torch.distributed.run" not in (tmp_path / "calls").read_text()
    python = stub(tmp_path, "python", 'echo "$*" >>calls')
    done = run_bash(ROOT / "launch/multi_node.sh", "--shards", "x", cwd=tmp_path, PYTHON=python)
    assert done.returncode == 2
    assert "set NODES (how many machines) and HEAD" in done.stderr


# ---- Slurm's requeue rule, with stand-ins for srun, scontrol and Python


def run_sbatch(folder, step="", plan=0, complete=False, starts=1, flags=()):
    """Run the batch script; the last start's result, and whether it was queued again."""
    bin_dir, out = folder / "bin", folder / "out"
    stub(bin_dir, "srun", f'cd "{folder}"\n{step}')
    stub(bin_dir, "sleep", '[[ $1 == 60 ]] || exec "$(PATH=${PATH#*:} command -v sleep)" "$@"')
    stub(bin_dir, "scontrol", f'[[ $1 == requeue ]] && echo "$*" >>"{folder}/requeued"; echo node1')
    python = stub(
        bin_dir, "python", f'case "$*" in *plan*) exit {plan};; *status*) exit {0 if complete else 3};; esac'
    )
    (out / "units").mkdir(parents=True, exist_ok=True)
    for _ in range(starts):
        (folder / "requeued").unlink(missing_ok=True)
        done = run_bash(
            SBATCH, *flags, path=f"{bin_dir}:{os.environ['PATH']}", cwd=folder, PYTHON=python, OUTPUT_DIR=out,
            SLURM_JOB_ID=7, SLURM_JOB_NODELIST="node1", SLURM_JOB_NUM_NODES=1,
        )  # fmt: skip
    return done, (folder / "requeued").exists()


NEW_UNIT = "touch out/units/$RANDOM$RANDOM.safetensors"
DRAIN = "trap 'exit 1' USR1; kill -USR1 $PPID; for _ in {1..50}; do sleep 0.1; done"


@pytest.mark.parametrize(
    ("settings", "queued", "code", "message"),
    [
        (dict(complete=True, step=NEW_UNIT), False, 0, "complete; 1 units in this start"),
        (dict(plan=2, starts=20), False, 2, "cannot run as it is (code 2); it is not queued again"),
        (dict(step="exit 1"), False, 1, "without a new unit; it is not queued again"),
        (dict(step=f"{NEW_UNIT}; exit 1"), True, 1, "1 units in this start: queued again"),
        (dict(step=DRAIN), True, 1, "0 units in this start: queued again"),
        (dict(step="mkdir -p out/partial; sleep 0.05; touch out/partial/x; exit 1"), True, 1, "queued again"),
        (dict(step=f"{NEW_UNIT}; touch out/failed.json; exit 1"), False, 1, "failed.json; it is not queued again"),
        (dict(step=f"{NEW_UNIT}; kill -TERM $PPID; sleep 0.2"), False, 1, "ended by scancel or by Slurm"),
        (dict(step=DRAIN, starts=2), False, 1, "two starts in a row ended without a new unit"),
        (dict(step=f"{NEW_UNIT}; {DRAIN}", starts=3), True, 1, "queued again"),
    ],
)  # fmt: skip
def test_the_batch_job_is_queued_again_only_where_that_helps(tmp_path, settings, queued, code, message):
    done, was_queued = run_sbatch(tmp_path, **settings)
    assert message in done.stdout, done.stdout + done.stderr
    assert (done.returncode, was_queued) == (code, queued)


@pytest.mark.parametrize("flags", [["--output_dir", "elsewhere"], ["--output_dir=elsewhere"]])
def test_the_batch_job_looks_at_the_output_that_its_flags_name(tmp_path, flags):
    done, was_queued = run_sbatch(
        tmp_path, NEW_UNIT.replace("touch out", "mkdir elsewhere/units; touch elsewhere"), flags=flags
    )
    assert "output elsewhere" in done.stdout
    assert was_queued


def test_the_batch_file_asks_slurm_for_what_its_rule_needs():
    options = set(re.findall(r"^#SBATCH (\S+)", SBATCH.read_text(), flags=re.M))
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@180", "--ntasks-per-node=1"} <= options
