"""The job: ``torchrun --nproc_per_node=8 -m gradproj.run --shards ... --output_dir ... --model ...``.

Claim a unit, read it, batch it, run the engine, commit; nothing in the loop is collective.
"""

from gradproj.distributed import Process, choose_device, launcher_died, launcher_rank, start_group
from gradproj.job.shutdown import Stopped, StopRequest, leave  # isort: split

if __name__ == "__main__":
    # Signals come, and launchers die, also in the seconds that the other imports take.
    early = StopRequest().attend(launcher_rank(), launcher_died)

import functools
import logging
import sys
import time

import torch
from torch import nn

from gradproj.coordinator.failure import note_failure
from gradproj.coordinator.heartbeats import Heartbeat, Progress
from gradproj.coordinator.merge import finish
from gradproj.coordinator.progress import ProgressDisplay
from gradproj.coordinator.store_guard import StoreReplaced
from gradproj.coordinator.units import UnitQueue
from gradproj.engine.batching import BatchConfig
from gradproj.engine.compile import compiler_errors_explained
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import chunk_verdict
from gradproj.engine.warm_up import compile_now
from gradproj.errors import GradprojError, ReportedError, exit_code
from gradproj.job.batch_size import resolve_batch_tokens
from gradproj.job.config import RunConfig, run_config
from gradproj.job.precision import check_precision
from gradproj.job.prefetch import Background, Writer
from gradproj.job.startup import Job, log_to_file, matrices_on, prepare_torch, start_job
from gradproj.job.summary import print_compiled, print_precision, print_result, print_start
from gradproj.job.unit_projector import ProjectedUnit, UnitProjector
from gradproj.job.unit_reader import UnitReader
from gradproj.model.loading import load_model, load_tokenizer
from gradproj.store import ProjectionStore

LET_RANK_0_SPEAK_S = 10.0
PRECISION_DOCUMENTS = 16

log = logging.getLogger("gradproj.run")  # also where this module runs as __main__


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run one rank of the job; the exit code."""
    argv, stop = sys.argv[1:] if argv is None else argv, stop or StopRequest()
    return exit_code(lambda: run(argv, stop.attend(launcher_rank(), launcher_died)))


def run(argv: list[str], stop: StopRequest) -> int:
    """Start, compute, finish."""
    stop.begin()
    process = Process.from_environment()
    config = settings_for_all(argv, process)
    prepare_torch(config)
    with start_group(process):
        device, warning = choose_device(config.job.device, process.local_rank)
        job = start_job(config, process)
    log_to_file(job.plan.output, job.owner, config.job.verbose)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    complete = work(job, device, stop)
    if process.rank == 0:
        print_result(job.plan, complete, stop.reason)
    # A launcher would take another code for a failure, and end the ranks that go on.
    return 0 if process.launched else stop.exit_code


def settings_for_all(argv: list[str], process: Process) -> RunConfig:
    """The settings from the flags; a mistake in them is said by rank 0 alone."""
    try:
        return run_config(argv, "gradproj.run")
    except GradprojError as error:
        if process.rank == 0:
            raise
        # Every rank sees the same mistake. One that left before rank 0 had spoken would have the launcher end it
        # unheard; when rank 0 leaves, the launcher ends this sleep.
        time.sleep(LET_RANK_0_SPEAK_S)
        raise ReportedError from error


def work(job: Job, device: torch.device, stop: StopRequest) -> bool:
    """This rank's share of what is left; whether the store is complete then."""
    plan, progress = job.plan, Progress()
    queue = UnitQueue(
        plan.output, plan.layout, plan.identity_hash, plan.wanted, job.owner, stopping=stop
    )
    with Heartbeat(plan.output / "heartbeats", job.owner, progress):
        try:
            with queue.deletions_explained():
                compute(job, queue, device, stop, progress)
                queue.guard.check()
                wait = job.owner.rank == 0
                return finish(
                    plan.output, queue.claims, wait=wait, stopping=stop, progress=progress
                )
        except GradprojError as error:
            if not isinstance(error, (Stopped, ReportedError, StoreReplaced)):
                note_failure(plan.output, job.owner, error)
            raise
        finally:
            queue.release()


def compute(
    job: Job, queue: UnitQueue, device: torch.device, stop: StopRequest, progress: Progress
) -> None:
    """Work through the units that this rank can claim."""
    plan = job.plan
    if len(queue.pending()):
        tokenizer, model = load_tokenizer(plan.files), load_model(plan.files, device)
        with ProjectionStore(plan.output) as store:
            matrices = matrices_on(device, store.projection_matrices)
        if job.owner.rank == 0:
            print_start(plan, device, chunk_verdict(model))
        projection, own = plan.config.projection, plan.config.job
        engine = GradProjLoraEngine.from_config(
            model, projection, matrices, own.gradient_checkpointing, own.compile
        )
        stop.drain()
        with compiler_errors_explained(), engine, progress_display(job), Writer() as writer:
            if own.compile:
                print_compiled(
                    job.owner.rank, compile_now(model, engine, plan.config.batch.max_length)
                )
            settings = resolve_batch_tokens(job, queue, model, engine, stop)
            stop.drain()
            reader = UnitReader(plan.index, tokenizer, settings, stop)
            report_precision(job, queue, model, engine, reader, settings.batch)
            projector = UnitProjector(model, engine, settings, progress, stop)
            ahead = Background(map(reader.read, queue.take()), check=writer.check)
            with ahead as units, stop.asked_on_error():
                for prepared in units:
                    if prepared is None:
                        break
                    partial = queue.partial_log(prepared.unit, prepared.key(settings))
                    projected = projector.project(prepared, partial, own.proj_save_interval)
                    if projected is None:
                        break
                    writer.submit(functools.partial(commit, queue, projected))
                    progress.units += 1
    stop.drain()
    progress.unit = -1


def report_precision(
    job: Job,
    queue: UnitQueue,
    model: nn.Module,
    engine: GradProjLoraEngine,
    reader: UnitReader,
    batch: BatchConfig,
) -> None:
    """Rank 0 holds a few documents' rows against float32's, where the model has another precision."""
    pending = queue.pending()
    if job.owner.rank == 0 and next(model.parameters()).dtype != torch.float32 and len(pending):
        unit = int(pending[0])
        start, stop = job.plan.layout.unit_range(unit)
        few = reader.read_samples(unit, start, min(start + PRECISION_DOCUMENTS, stop))
        print_precision(*check_precision(model, engine, few, batch))


def commit(queue: UnitQueue, projected: ProjectedUnit) -> None:
    """Put a unit on disk and say so in the log, where the Slurm files count what their job has committed."""
    rows = projected.on_host()
    if queue.commit(rows):
        log.info("unit %d committed: %s", rows.record.unit, rows.record.stats)


def progress_display(job: Job) -> ProgressDisplay:
    """Rank 0 shows the whole job; the others show nothing."""
    plan = job.plan
    return ProgressDisplay(
        plan.output, plan.layout, plan.wanted, job.owner, visible=job.owner.rank == 0
    )


if __name__ == "__main__":
    leave(main(stop=early))
