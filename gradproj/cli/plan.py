"""The command ``plan``: all checks of the job, and estimates of disk, memory and time."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.distributed import choose_device
from gradproj.errors import StoreError
from gradproj.files import existing_ancestor
from gradproj.flags import Flags, flag
from gradproj.job.allocation import dimension_lines
from gradproj.job.config import parse_run
from gradproj.job.plan import make_plan
from gradproj.job.shown_documents import show_documents
from gradproj.job.summary import memory_lines, plan_lines
from gradproj.storage.object_path import in_bucket
from gradproj.storage.probe import check_conditional_writes
from gradproj.store import ProjectionStore
from gradproj.store.layout import UNITS_DIR
from gradproj.store.metadata import store_exists
from gradproj.store.unit_record import list_records


@dataclass(frozen=True, kw_only=True)
class PlanArgs(Flags, title="plan"):
    """Flags of ``plan`` alone."""

    show: int = flag(
        "Print the tokens of so many documents, the first, with the targets of the loss marked.",
        0,
        minimum=0,
    )


def plan_command(argv: list[str]) -> None:
    """Check the job's flags and print the plan; writes nothing."""
    about = (
        "With the job's flags: make every check that precedes the job, and estimate disk and "
        "memory (and the time left, once units are committed). Writes nothing, but in a bucket an "
        "object that it deletes again, to see whether conditional writes work."
    )
    config, args = parse_run(argv, "gradproj plan", PlanArgs, description=about)
    device, warning = choose_device(config.job.device, 0)
    output = config.output
    _check_writable(output)
    plan = make_plan(config)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    n_recorded = len(np.intersect1d(plan.wanted, list_records(output / UNITS_DIR)))
    memory = memory_lines(plan, device)
    if in_bucket(output):
        memory.append(f"bucket        {output} takes conditional writes, and these credentials")
    lines = [*plan_lines(plan, n_recorded), *memory, f"device        {device}"]
    if store_exists(output):
        with ProjectionStore(output) as store:
            lines += dimension_lines(store)
    if args.show:
        lines += ["", *show_documents(plan, args.show)]
    print("\n".join(lines))


def _check_writable(output: Path) -> None:
    """Raise ``StoreError`` if the folder could not be made or written to; does not make it."""
    if in_bucket(output):
        check_conditional_writes(output)
        return
    folder = existing_ancestor(output)
    if not folder.is_dir():
        raise StoreError(f"--output_dir {output}: {folder} is a file; give a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(
            f"--output_dir {output}: {folder} is not writable for you; fix its permissions "
            "or choose another folder"
        )
