"""The command ``plan``: every check the job makes, and what the job will take."""

import os
import sys
from pathlib import Path

import numpy as np

from gradproj.distributed import choose_device
from gradproj.errors import StoreError
from gradproj.files import existing_ancestor
from gradproj.job.config import run_config
from gradproj.job.plan import make_plan
from gradproj.job.summary import plan_lines
from gradproj.store.unit_record import list_records


def plan_command(argv: list[str]) -> None:
    """``python -m gradproj plan`` with the job's flags: every check the job makes, and what it will take."""
    config = run_config(argv, "gradproj plan")
    device, warning = choose_device(config.job.device, 0)
    output = Path(config.job.output_dir)
    _check_writable(output)
    plan = make_plan(config)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    n_recorded = len(np.intersect1d(plan.wanted, list_records(output / "units")))
    print("\n".join([*plan_lines(plan, n_recorded), f"device        {device}"]))


def _check_writable(output: Path) -> None:
    """Refuse a folder that could not be made or written to, without making it."""
    folder = existing_ancestor(output)
    if not folder.is_dir():
        raise StoreError(f"--output_dir {output}: {folder} is a file; give a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(
            f"--output_dir {output}: {folder} is not writable for you; mend its permissions or choose another folder"
        )
