"""The command ``slurm``: a Slurm job's batch script asks it before and after each start."""

import sys
from contextlib import suppress
from dataclasses import dataclass

from gradproj.cli.status import status_lines
from gradproj.distributed import JobName
from gradproj.errors import ConfigError, StoreError
from gradproj.flags import Flags, flag, parse
from gradproj.job.recorded_args import output_flag
from gradproj.maintenance.requeue import begin_start, end_start
from gradproj.maintenance.status import read_status
from gradproj.storage.object_path import path_of


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(Flags, title="slurm"):
    """The job's output, and how its ranks ended."""

    output: str = output_flag()
    ended: int | None = flag(
        "The ranks have ended with this code; without it, they are about to start.",
        None,
        metavar="CODE",
    )
    drained: bool = flag("The batch script received a signal to stop.", False)


def slurm_command(argv: list[str]) -> int:
    """Print one line for the job's log, the status before it on standard error."""
    about = (
        "Whether a Slurm job has anything to start, or is queued again: slurm/common.sh asks. Exit "
        "code 0: it ends well; 3: it starts, or is queued again; 1: it ends, and is not queued "
        "again; 2: the output cannot be read."
    )
    (config,) = parse(argv, "gradproj slurm", SlurmConfig, description=about)
    job_id = JobName.from_environment().job_id
    if not job_id.startswith("slurm-"):
        raise ConfigError("gradproj slurm is for a Slurm job's batch script: there is no job here")
    output = path_of(config.output)
    if config.ended is None:
        verdict = begin_start(output, job_id)
    else:
        verdict = end_start(output, job_id, config.ended, config.drained)
        with suppress(StoreError):  # there is no store yet
            print("\n".join(status_lines(read_status(output))), file=sys.stderr)
    print(verdict.reason)
    return verdict.exit_code
