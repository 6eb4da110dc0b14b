"""The job: ``torchrun --nproc_per_node=8 -m gradproj.run --shards ... --output_dir ... --model ...``.

Claim a unit, read it, batch it, run the engine, commit; nothing in the loop is collective.
"""

import functools
import logging
import sys

import torch

from gradproj.background import Background, Writer
from gradproj.config import run_config
from gradproj.coordinator.heartbeats import Heartbeat, Progress
from gradproj.coordinator.merge import finish
from gradproj.coordinator.progress import ProgressDisplay
from gradproj.coordinator.units import UnitQueue
from gradproj.dist import Process, choose_device, start_group
from gradproj.engine import GradProjLoraEngine
from gradproj.errors import exit_code
from gradproj.loss import chunk_verdict
from gradproj.model import load_model, load_tokenizer
from gradproj.projector import UnitProjector
from gradproj.start import Job, log_to_file, matrices_on, prepare_torch, start_job
from gradproj.stopping import StopRequest
from gradproj.store import ProjectionStore
from gradproj.summary import print_end, print_start
from gradproj.unit import UnitReader

log = logging.getLogger("gradproj.run")  # also where this module runs as __main__


def main(argv: list[str] | None = None) -> int:
    """Run one rank of the job; the exit code."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Start, compute, finish."""
    config = run_config(argv, "gradproj.run")
    process = Process.from_environment()
    stop = StopRequest().listen()
    prepare_torch(config)
    with start_group(process):
        device, warning = choose_device(config.job.device, process.local_rank)
        job = start_job(config, process)
    log_to_file(job.plan.output, process.rank, config.job.verbose)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    queue = UnitQueue(
        job.plan.output, job.plan.layout, job.plan.identity_hash, job.plan.wanted, job.owner, stopping=stop
    )
    try:
        compute(job, queue, device, stop)
        complete = finish(job.plan.output, queue.claims, wait=process.rank == 0)
    finally:
        queue.give_back()
    if process.rank == 0:
        print_end(job.plan, complete, stop.reason)
    return 0


def compute(job: Job, queue: UnitQueue, device: torch.device, stop: StopRequest) -> None:
    """Work through the units that this rank can claim."""
    plan, progress = job.plan, Progress()
    heartbeat = Heartbeat(plan.output / "heartbeats", job.owner, progress, stop.on_orphaned)
    heartbeat.start()
    try:
        if not len(queue.pending()):
            return
        tokenizer, model = load_tokenizer(plan.files), load_model(plan.files, device)
        with ProjectionStore(plan.output) as store:
            matrices = matrices_on(device, store.projection_matrices)
        if job.owner.rank == 0:
            print_start(plan, device, chunk_verdict(model))
        reader = UnitReader(plan.index, tokenizer, plan.unit_settings)
        engine = GradProjLoraEngine.from_config(model, plan.config.projection, matrices)
        with engine, progress_display(job), Writer() as writer:
            projector = UnitProjector(model, engine, plan.unit_settings, progress, stop)
            with Background(map(reader.read, queue.take())) as units:
                for prepared in units:
                    partial = queue.partial_log(prepared.unit, prepared.key(plan.unit_settings))
                    rows = projector.project(prepared, partial, plan.config.job.proj_save_interval)
                    if rows is None:
                        break
                    writer.submit(functools.partial(queue.commit, rows))
                    progress.units += 1
                    log.info("unit %d: %s", prepared.unit, rows.record.stats)
    finally:
        heartbeat.stop()


def progress_display(job: Job) -> ProgressDisplay:
    """Rank 0 shows the whole job; the others show nothing."""
    plan = job.plan
    return ProgressDisplay(plan.output, plan.layout, plan.wanted, job.owner, visible=job.owner.rank == 0)


if __name__ == "__main__":
    sys.exit(main())
