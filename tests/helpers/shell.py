"""Run shell scripts, with stubs for the programs that they call."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_bash(*words, path=None, cwd=ROOT, **env):
    environment = {
        "HOME": str(cwd),
        "PATH": path or os.environ["PATH"],
        **{k: str(v) for k, v in env.items()},
    }
    return subprocess.run(
        ["bash", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def stub(folder, name, body):
    """Write an executable that replaces a program."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path
