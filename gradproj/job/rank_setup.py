"""Everything that a rank makes once, before its first unit: model, engine, batch size, checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.progress import ProgressDisplay
from gradproj.coordinator.units import UnitQueue
from gradproj.engine.batching import fit_padding
from gradproj.engine.compile import compiler_errors_explained
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadBasis, check_head
from gradproj.engine.loss import chunk_verdict
from gradproj.engine.matrix_file import matrices_digest
from gradproj.engine.warm_up import compile_now
from gradproj.errors import ModelError
from gradproj.job.batch_size import resolve_batch_tokens
from gradproj.job.group_projector import GroupProjector
from gradproj.job.lockstep import load_job_model
from gradproj.job.precision import check_precision
from gradproj.job.shutdown import StopRequest
from gradproj.job.startup import Job
from gradproj.job.summary import (
    print_compiled,
    print_padding,
    print_precision,
    print_start,
    print_unchecked,
)
from gradproj.job.unit_projector import ProjectedUnit, UnitProjector
from gradproj.job.unit_reader import PreparedUnit, UnitReader
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store import ProjectionStore
from gradproj.store.array_digests import check_digests
from gradproj.store.row_encoder import RowEncoder

PRECISION_DOCUMENTS = 16


@dataclass(frozen=True)
class Rank:
    """A rank that is ready to compute units."""

    reader: UnitReader
    projector: UnitProjector
    queue: UnitQueue | None
    """None for a member of a group, whose leader has it."""
    save_interval: int
    """``--proj_save_interval``."""
    basis: str
    """Digest of the rows' basis."""

    def project(self, unit: PreparedUnit) -> ProjectedUnit | None:
        """Project a unit, continuing from its partial rows. None if a stop was requested."""
        assert self.queue is not None
        partial = self.queue.partial_log(unit.unit, unit.key(self.reader.settings, self.basis))
        return self.projector.project(unit, partial, self.save_interval)


@contextmanager
def set_up_rank(
    job: Job,
    queue: UnitQueue | None,
    device: torch.device,
    stop: StopRequest,
    progress: RankProgress,
) -> Iterator[Rank]:
    """Load the model, attach the engine, compile, measure the batch size and check the precision.

    Rank 0 prints what it finds and shows the job's progress until the context ends.
    """
    plan, options = job.plan, job.plan.config.job
    is_first = job.owner.rank == 0
    tokenizer = load_tokenizer(plan.files)
    model = job.model
    if model is None:
        model = load_job_model(plan.files, device, options.offload, job.lockstep)
    chunked = chunk_verdict(model)
    if is_first:
        print_start(plan, device, chunked)
    with ProjectionStore(plan.output) as store:
        check_digests(store)
        engine = GradProjLoraEngine.from_config(
            model,
            plan.config.projection.of_layers(plan.layers),
            store.projection_matrices,
            options.gradient_checkpointing,
            options.compile,
            store.basis,
        )
        is_old = store.attributes["format_version"] == 1
        basis = matrices_digest(store.basis, plan.layers) if store.basis else ""
        head = HeadBasis.of_store(store, device)
    display = ProgressDisplay(plan.output, plan.layout, plan.wanted, job.owner, visible=is_first)
    stop.drain()
    with compiler_errors_explained(), engine, display:
        if engine.only_alone and (plan.config.batch.batch_size > 1 or options.compile):
            raise ModelError(engine.only_alone)
        if is_first and engine.unchecked:
            print_unchecked(engine.unchecked)
        if options.compile:
            seconds = compile_now(model, engine, plan.config.batch.max_length)
            if is_first:
                print_compiled(seconds)
        settings = resolve_batch_tokens(job, queue, model, engine, stop)
        batch = fit_padding(model, settings.batch)
        if is_first and batch != settings.batch:
            print_padding(plan, is_old)
        settings = replace(settings, batch=batch)
        reader = UnitReader(plan.index, tokenizer, settings, stop)
        if queue is not None and is_first:
            in_blocks = job.lockstep is not None or options.offload
            report_precision(queue, model, engine, reader, in_blocks)
        encoder = RowEncoder(plan.layout, plan.layers)
        with_head = None
        if head is not None and plan.head is not None:
            check_head(model)
            with_head, basis = (head, plan.head), basis + head.digest()
        hidden = plan.config.store.hidden_state
        made = model, engine, settings, encoder, progress
        projector = (
            UnitProjector(*made, stop, with_head, hidden)
            if job.lockstep is None
            else GroupProjector(job.lockstep, *made, with_head, hidden)
        )
        yield Rank(reader, projector, queue, options.proj_save_interval, basis)


def report_precision(
    queue: UnitQueue,
    model: nn.Module,
    engine: GradProjLoraEngine,
    reader: UnitReader,
    in_blocks: bool,
) -> None:
    """Compare a few documents' rows with their float32 rows if the model has a lower precision.

    Not if its weights are fetched block by block, since they cannot be converted in place.
    """
    pending = queue.pending()
    if in_blocks and next(model.parameters()).dtype != torch.float32:
        print_precision("not checked, since blocks are fetched (see gradproj diagnose)", False)
    elif next(model.parameters()).dtype != torch.float32 and len(pending):
        unit, settings = int(pending[0]), reader.settings
        start, stop = settings.layout.unit_range(unit)
        few = reader.read_samples(unit, start, min(start + PRECISION_DOCUMENTS, stop))
        if few is not None:
            print_precision(*check_precision(model, engine, few, settings.batch))
