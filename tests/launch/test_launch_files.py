"""Launch scripts: each parses, passes existing flags, and reports an error in one line."""

import itertools
import os
import re
import shlex
import tomllib

import pytest
from helpers.shell import ROOT, run_bash, stub
from torch.distributed.run import get_args_parser

from gradproj.cli.index import IndexConfig
from gradproj.cli.query.config import QueryConfig
from gradproj.cli.slurm import SlurmConfig
from gradproj.corpus.prepare_config import PrepareConfig
from gradproj.flags import parse
from gradproj.job.config import run_config
from gradproj.maintenance.status import StatusConfig
from gradproj.training import TokenizerConfig, TrainConfig

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.s*"), ROOT / ".ci" / "run"])
IDS = [str(path.relative_to(ROOT)) for path in SCRIPTS]

CHECKS = {
    "prepare": lambda argv: parse(argv, "prepare", PrepareConfig),
    "tokenizer": lambda argv: parse(argv, "tokenizer", TokenizerConfig),
    "train": lambda argv: parse(argv, "train", TrainConfig),
    "query": lambda argv: parse(argv, "query", QueryConfig),
    "status": lambda argv: parse(argv, "status", StatusConfig),
    "index": lambda argv: parse(argv, "index", IndexConfig),
    "slurm": lambda argv: parse(argv, "slurm", SlurmConfig),
    "plan": lambda argv: run_config(argv, "plan"),
    "run": lambda argv: run_config(argv, "run"),
}
"""Command -> the parser of its flags, which refuses unknown ones."""

JOB_FLAGS = "--shards tars --model dir --output_dir out"


def commands_in(path):
    """Return ``(command, its words)`` of every call of gradproj, with variables filled in."""
    text = re.sub(r"^\s*#.*$", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    calls = re.findall(r"-m gradproj(?: |\.)(\w+)([^\n|;&>)]*)", text)
    return [
        (name, shlex.split(filled(words, "" if name in ("index", "slurm") else JOB_FLAGS)))
        for name, words in calls
        if name in CHECKS
    ]


def filled(text, arguments=""):
    text = re.sub(r'"\$\{?(@|JOB(_FLAGS)?\[@\])\}?"', arguments, text)
    return re.sub(r"\$\{?\w+(:-\w+)?\}?", "1", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_bash_parses_every_script(path):
    assert run_bash("-n", path).stderr == ""


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_no_script_names_a_path_of_one_machine(path):
    text = path.read_text().replace("#!/usr/bin/env bash", "")
    assert re.findall(r"/(?:home|root|work|tmp|usr|opt|mnt|srv|var|etc|data|scratch)\b", text) == []
    assert "://" not in text.replace("http://127.0.0.1:", "")


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        (
            "launch/demo.sh",
            ["prepare", "tokenizer", "train", "status", "plan", "run", "status", "query"],
        ),
        ("launch/common.sh", ["plan"]),
        ("launch/one_node.sh", ["run"]),
        ("launch/multi_node.sh", ["run"]),
        ("slurm/common.sh", ["run", "slurm", "plan"]),
        ("slurm/index_pile.sbatch", ["index"]),
    ],
)
def test_every_command_in_a_script_has_only_known_flags(name, commands):
    found = commands_in(ROOT / name)
    assert [command for command, _ in found][: len(commands)] == commands
    for command, words in found:
        CHECKS[command](words)


@pytest.mark.parametrize("name", ["launch/one_node.sh", "launch/multi_node.sh"])
def test_torchrun_gets_known_flags_and_forwards_signals(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    (words,) = re.findall(r"-m torch\.distributed\.run (.*) -m gradproj\.run", text)
    given = get_args_parser().parse_args([*shlex.split(filled(words)), "script.py"])
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(given.signals_to_handle.split(","))
    assert given.standalone == (name == "launch/one_node.sh")


def test_ci_calls_the_test_script_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "bash launch/test.sh"
    assert all(os.access(path, os.X_OK) for path in SCRIPTS if path.parent.name != "slurm")


# ---- Set-up


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('case "$2" in *version_info*) exit 1;; *platform*) echo 3.9.2;; esac',
         r"gradproj: Python 3\.11 or newer is needed; here there is: .*old=3\.9\.2\. "
         "Install one, or name it: PYTHON="),
        ('case "$2" in *ensurepip*) exit 1;; *platform*) echo 3.12.1;; esac',
         r"old cannot make virtual environments: .* apt install old-venv"),
        ("exit 1", r"Python 3\.11 or newer is needed; here there is: none\."),
    ],
)  # fmt: skip
def test_unsuitable_python_is_one_clear_line(tmp_path, body, message):
    python = stub(tmp_path, "old", body)
    done = run_bash(
        ROOT / "launch/setup.sh", cwd=tmp_path, PYTHON=python, GRADPROJ_VENV=tmp_path / "venv"
    )
    assert done.returncode == 2
    assert re.fullmatch(f"gradproj: .*|{message}.*", done.stderr.strip())
    assert re.search(message, done.stderr)


def fake_venv(folder, body="", ours=""):
    """An environment whose Python notes what it is asked, then does ``body``."""
    stub(folder / "bin", "python", f'echo "$*" >>"{folder}/calls"\n{body}')
    if ours:
        (folder / "made-by-gradproj-launch").write_text(ours)
    return folder


def test_foreign_environment_is_used_and_not_changed(tmp_path):
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


def test_the_environment_of_another_checkout_is_not_changed(tmp_path):
    maker = tmp_path / "their checkout"
    (maker / "launch").mkdir(parents=True)
    (maker / "launch/setup.sh").touch()
    ours = f"3.11.7 in {maker}\n1 2\nextra dev\n"
    venv = fake_venv(tmp_path / "venv", ours=ours)
    done = run_bash(ROOT / "launch/setup.sh", GRADPROJ_VENV=venv)
    assert done.returncode == 2
    assert f"{venv} was made by the checkout {maker}: name another folder" in done.stderr
    assert (venv / "made-by-gradproj-launch").read_text() == ours
    assert (venv / "bin/python").exists()


def test_set_up_runs_again_only_after_a_change(tmp_path):
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
    assert set_up("dev")[1], "a failed installation counted as finished"


@pytest.mark.parametrize(
    ("failing", "code"), [("none", 0), ("ruff check", 1), ("mypy", 1), ("pytest", 1)]
)
def test_test_script_fails_with_any_check_and_ends_with_the_line_of_pytest(tmp_path, failing, code):
    body = (
        f'case "$*" in "-m {failing}"*) exit 1;; esac\n'
        '[[ $* != *pytest* ]] || echo "3 passed in 0.1s"'
    )
    body = body.replace("exit 1;;", '[[ $* == *pytest* ]] && echo "1 failed in 0.1s"; exit 1;;')
    done = run_bash(
        ROOT / "launch/test.sh", "-x", GRADPROJ_VENV=fake_venv(tmp_path / "venv", body), CI="true"
    )
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] in ("3 passed in 0.1s", "1 failed in 0.1s")
    calls = (tmp_path / "venv" / "calls").read_text().splitlines()
    assert calls[-1] == "-m pytest -x"
    assert {"-m ruff check .", "-m ruff format --check gradproj tests", "-m mypy"} <= set(calls)


def test_demo_refuses_unknown_arguments_and_has_help():
    done = run_bash(ROOT / "launch/demo.sh", "--modle", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown argument --modle" in done.stderr
    assert "--shards needs a value" in run_bash(ROOT / "launch/demo.sh", "--shards").stderr
    assert "From nothing to an answer" in run_bash(ROOT / "launch/demo.sh", "--help").stdout


def test_launch_file_ends_when_plan_refuses(tmp_path):
    python = stub(
        tmp_path,
        "python",
        'echo "$*" >>calls; [[ $* != *plan* ]] || { echo "gradproj: no" >&2; exit 2; }',
    )
    for name in ("one_node", "multi_node"):
        done = run_bash(
            ROOT / f"launch/{name}.sh",
            "--shards",
            "x",
            cwd=tmp_path,
            PYTHON=python,
            NODES=2,
            HEAD="a",
        )
        assert (done.returncode, done.stderr) == (2, "gradproj: no\n")
    assert "torch.distributed.run" not in (tmp_path / "calls").read_text()
    python = stub(tmp_path, "python", 'echo "$*" >>calls')
    done = run_bash(ROOT / "launch/multi_node.sh", "--shards", "x", cwd=tmp_path, PYTHON=python)
    assert done.returncode == 2
    assert "set NODES (how many machines) and HEAD" in done.stderr


@pytest.mark.parametrize(
    ("user", "sudo", "apt", "calls", "message"),
    [
        (0, 1, 0, ["update -q", "install -y --no-install-recommends slurm-wlm munge"], ""),
        (1000, 0, 0, ["update -q", "install -y --no-install-recommends slurm-wlm munge"], ""),
        (1000, 1, 0, [], "sudo apt-get install -y --no-install-recommends slurm-wlm munge"),
        (0, 1, 1, ["update -q"], "apt-get update failed, see above; then: apt-get install -y"),
    ],
)
def test_slurm_test_installs_slurm_or_prints_the_command(tmp_path, user, sudo, apt, calls, message):
    bin_dir = tmp_path / "bin"
    stub(bin_dir, "apt-get", f'echo "$*" >>"{tmp_path}/calls"; exit {apt}')
    stub(bin_dir, "sudo", f'[[ $1 != -n ]] || exit {sudo}; "$@"')
    venv = fake_venv(tmp_path / "venv", 'case "$*" in *find_daemons*) exit 1;; esac')
    # Bash's own variables for the user cannot be set.
    script = (ROOT / "launch" / "test_slurm.sh").read_text().replace("EUID", str(user))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "test_slurm.sh").write_text(script)
    (tmp_path / "launch" / "setup.sh").symlink_to(ROOT / "launch" / "setup.sh")
    (tmp_path / "calls").touch()
    path = f"{bin_dir}:{os.environ['PATH']}"
    done = run_bash(
        tmp_path / "launch" / "test_slurm.sh", "-x", path=path, cwd=tmp_path, GRADPROJ_VENV=venv
    )
    assert (tmp_path / "calls").read_text().splitlines() == calls, done.stderr
    assert (done.returncode, message in done.stderr) == (2 if message else 0, True)
    assert ("-m pytest -m slurm tests/slurm -x" in (venv / "calls").read_text()) == (not message)


def test_oldest_versions_are_the_lower_bounds_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *itertools.chain(*project["optional-dependencies"].values()),
    ]
    bounds = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=(\S+)$", "\n".join(required), re.M))
    text = (ROOT / "launch/oldest.txt").read_text()
    oldest = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.M))
    # pip would try every boto3, which moto needs, until one goes with this botocore.
    assert oldest.pop("boto3") == oldest["botocore"]
    # Tools of lint and types do not run there, and kronfluence is not in the tests' extra.
    assert oldest.keys() == bounds.keys() - {"mypy", "ruff", "kronfluence"}
    for name, version in oldest.items():
        padded = f"{bounds[name]}.0.0".split(".")
        assert version.split(".") == padded[: len(version.split("."))], name
