"""The READMEs: their Python runs, and the flags, commands, paths and names in them exist.

Tables of flags, scores and faults are compared with the code beside what they describe:
``tests/job`` and ``tests/analysis``.
"""

import contextlib
import importlib
import io
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.jobs import ENVIRONMENT
from helpers.models import ragged_batch, small_model
from helpers.stores import filled, packed
from transformers import TrainingArguments

from gradproj.__main__ import COMMANDS, main
from gradproj.store.layout import STATUS
from gradproj.training import METHODS

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not any(part.startswith(".") or part == "demo" for part in path.relative_to(ROOT).parts[:-1])
)
WITH_PYTHON = [path for path in READMES if re.search(r"^```python$", path.read_text(), re.M)]

OTHER_PROGRAMS = {
    "--array", "--nodes", "--nproc_per_node", "--nnodes", "--standalone", "--no-deps", "--signal",
    "--shutdown-timeout", "--max-restarts", "--bind", "--oldest", "--ntasks", "--requeue",
    "--export",
}  # fmt: skip
"""Flags of sbatch, torchrun, pip and the launch scripts, which READMEs name too."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks_of(text: str, language: str) -> list[str]:
    """Return the fenced blocks whose fence line is exactly the language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def demo(job, tmp_path, monkeypatch):
    """A folder with a finished job in ``demo``, as ``launch/demo.sh`` leaves it.

    Beside its output are stores of signs and of dense rows.
    """
    (tmp_path / "demo").mkdir()
    for encoding in ("signs", "dense"):
        widths = ((2, 3), (3, 5), (1, 7), (4, 6))
        filled(tmp_path / "demo" / encoding, widths=widths, config=packed(encoding))
    for name, target in (("tars", job.corpus), ("model", job.model)):
        (tmp_path / "demo" / name).symlink_to(target)
    shutil.copytree(job.output, tmp_path / "demo" / "out")  # some examples write into it
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_for(folder: Path) -> dict:
    """Names that a README's code takes from its reader's program: model, batches, arguments."""
    model = small_model("gpt2").train()
    ids, labels = ragged_batch([5, 9, 7, 6])
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "ids": ids,
        "labels": labels,
        "batches": [(*ragged_batch([5, 9, 7], seed=i), [i, i + 4, i + 8]) for i in range(4)],
        "dataset": [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)],
        "arguments": TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=2, per_device_train_batch_size=2,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name_of)
def test_python_blocks_run_in_order(path, demo):
    names, methods = names_for(demo), dict(METHODS)
    try:
        for number, block in enumerate(blocks_of(path.read_text(), "python")):
            exec(compile(block, f"{name_of(path)}, block {number + 1}", "exec"), names)
    finally:
        METHODS.clear()
        METHODS.update(methods)


@cache
def flags_of(command: str) -> frozenset[str]:
    """Return the flags that ``gradproj COMMAND --help`` lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help"])
    flags = frozenset(re.findall(r"--[a-z][a-z0-9_-]*", printed.getvalue()))
    assert flags, f"{command} --help lists no flag"
    return flags


def command_lines(text: str) -> list[tuple[str, str]]:
    """Return ``(command, rest of the line)`` for each call of gradproj in a fenced block."""
    shell = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    called = re.findall(r"(?:-m gradproj[ .]|(?:^|\$ )gradproj )([a-z]+)\b([^\n|#]*)", shell, re.M)
    return [(command, rest) for command, rest in called if command in COMMANDS]


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_flags_exist(path):
    text = path.read_text()
    for command, rest in command_lines(text):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", re.sub(r'"[^"]*"', "", rest)))
        assert named <= flags_of(command) | OTHER_PROGRAMS, f"{command}{rest}"
    known = frozenset().union(*map(flags_of, COMMANDS)) | OTHER_PROGRAMS
    for script in (ROOT / "tests/bench").glob("*.py"):  # each has flags of its own
        known |= set(re.findall(r'"(--[a-z][a-z0-9_]*)"', script.read_text()))
    # `--proj_*` names a group of flags.
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]*[a-z0-9](?![\w*-])", text)):
        assert flag in known, flag


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_commands_exist(path):
    for name in re.findall(r"`(?:python -m )?gradproj ([a-z]+)", path.read_text()):
        assert name in COMMANDS, name


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_links_and_paths_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:gradproj|tests|launch|slurm)/[\w./-]+)", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`((?:[\w]+/)*(?:test|bench)_\w+\.py)", text):
        assert any(ROOT.rglob(target)), target


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_dotted_names_exist(path):
    for dotted in set(re.findall(r"`(gradproj(?:\.[A-Za-z_]\w*)+)", path.read_text())):
        module, _, attribute = dotted.rpartition(".")
        try:
            importlib.import_module(dotted)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), dotted


def test_status_codes_of_the_specification_are_the_code_s():
    text = (ROOT / "gradproj/store/README.md").read_text()
    table = re.findall(r"^\| (\d) \| `?(\w+)`? \|", text, re.M)
    assert {name: int(code) for code, name in table} == STATUS


def test_readme_fits_its_bounds():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 100


def test_benchmarks_find_all_that_they_import():
    folder = ROOT / "tests/bench"
    names = ", ".join(sorted(path.stem for path in folder.glob("bench_*.py")))
    script = f"import sys; sys.path.insert(0, {str(folder)!r}); import {names}"
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
