"""The job: ``torchrun --nproc_per_node=8 -m gradproj.run --shards S --output_dir O --model M``.

Each rank claims a unit, reads it, projects it and commits it. Nothing in this loop is collective,
but among the ranks that hold one model together (``--ranks_per_model``).
"""

from gradproj.distributed import (
    Process,
    Rendezvous,
    choose_device,
    launcher_died,
    launcher_rank,
    quieten_torch,
)
from gradproj.job.shutdown import StopRequest, leave  # isort: split

from gradproj.store.layout import HEARTBEATS_DIR

if __name__ == "__main__":
    # The imports below take seconds, in which a signal may come or the launcher may die.
    quieten_torch()
    early = StopRequest().attend(launcher_rank(), launcher_died)

import functools
import logging
import sys
from contextlib import ExitStack

import torch

from gradproj.coordinator.failure import note_failure
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress
from gradproj.coordinator.merge import finish
from gradproj.coordinator.slurm_marks import note_progress
from gradproj.coordinator.store_guard import StoreReplaced
from gradproj.coordinator.units import UnitQueue
from gradproj.distributed import report_errors_from_rank_0
from gradproj.errors import GradprojError, ReportedError, exit_code
from gradproj.job.config import run_config
from gradproj.job.lockstep import Lockstep
from gradproj.job.prefetch import Writer, prefetched
from gradproj.job.rank_setup import set_up_rank
from gradproj.job.startup import Job, log_to_file, start_job
from gradproj.job.summary import print_result
from gradproj.job.unit_projector import ProjectedUnit
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.store.zarr_threads import few_zarr_threads

log = logging.getLogger("gradproj.run")  # not __name__, which is __main__ in a job


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run one rank of the job and return its exit code."""
    argv, stop = sys.argv[1:] if argv is None else argv, stop or StopRequest()
    with few_zarr_threads():
        return exit_code(lambda: run(argv, stop.attend(launcher_rank(), launcher_died)))


def run(argv: list[str], stop: StopRequest) -> int:
    """Start, work, report."""
    stop.begin()
    process = Process.from_environment()
    with report_errors_from_rank_0(process.rank, only=True):
        config = run_config(argv, "gradproj run")
    prepare_torch(config.job.threads, config.job.deterministic)
    with ExitStack() as stack:
        with Rendezvous(process) as ranks:
            device, warning = choose_device(config.job.device, process.local_rank)
            join = config.job.ranks_per_model, process, ranks, device, stop
            with report_errors_from_rank_0(process.rank, only=True):
                lockstep = Lockstep.join(*join)
            if lockstep is not None:
                stack.enter_context(lockstep.group.watch())
            job = start_job(config, process, ranks, device, lockstep)
        log_to_file(job.plan.output, job.owner, config.job.verbose)
        if warning:
            print(warning, file=sys.stderr, flush=True)
        complete = (help_leader if job.is_member else compute_and_merge)(job, device, stop)
    if process.rank == 0:
        print_result(job.plan, complete, stop.reason)
    # A launcher would treat any other code as a failure and kill the ranks that still work.
    return 0 if process.launched else stop.exit_code


def help_leader(job: Job, device: torch.device, stop: StopRequest) -> bool:
    """Run batches of the units that the leader of this rank's group computes."""
    assert job.lockstep is not None
    if job.lockstep.announce():
        with set_up_rank(job, None, device, stop, RankProgress()) as rank:
            rank.projector.follow()
    return False


def compute_and_merge(job: Job, device: torch.device, stop: StopRequest) -> bool:
    """Compute units, then merge if all are done. Returns whether the store is complete."""
    plan, progress = job.plan, RankProgress()
    queue = UnitQueue(
        plan.output, plan.layout, plan.identity_hash, plan.wanted, job.owner, stopping=stop
    )
    with Heartbeat(plan.output / HEARTBEATS_DIR, job.owner, progress, queue.commits.pace):
        try:
            with queue.deletions_explained():
                compute(job, queue, device, stop, progress)
                stop.drain()
                progress.unit = -1
                queue.guard.check()
                wait = job.owner.rank == 0
                return finish(
                    plan.output, queue.claims, wait=wait, stopping=stop, progress=progress
                )
        except GradprojError as error:
            if not isinstance(error, (ReportedError, StoreReplaced)):
                note_failure(plan.output, job.owner, error)
            raise
        finally:
            queue.release()


def compute(
    job: Job, queue: UnitQueue, device: torch.device, stop: StopRequest, progress: RankProgress
) -> None:
    """Claim, read, project and commit units until this rank finds none."""
    has_work = len(queue.pending()) > 0
    if job.lockstep is not None:
        job.lockstep.announce(has_work)
    if not has_work:
        return
    with set_up_rank(job, queue, device, stop, progress) as rank, Writer() as writer:

        def check() -> None:
            writer.check()
            rank.projector.wait()

        claimed = queue.take()
        # A thread claims and reads the next unit while the device computes this one.
        read_ahead = prefetched(map(rank.reader.read, claimed), check)
        with read_ahead as units, stop.requested_on_error():
            for unit in units:
                projected = rank.project(unit) if unit is not None else None
                if projected is None:  # a stop was requested
                    break
                # Another thread commits it while the device computes the next one.
                writer.submit(functools.partial(commit, queue, projected))
                progress.units += 1
        rank.projector.close()


def commit(queue: UnitQueue, projected: ProjectedUnit) -> None:
    """Write a unit to the output and log it."""
    rows = projected.on_host()
    if queue.commit(rows):
        log.info("unit %d committed: %s", rows.record.unit, rows.record.stats)
        note_progress(queue.output, queue.owner)


if __name__ == "__main__":
    leave(main(stop=early))
