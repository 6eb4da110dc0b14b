"""The job's start: rank 0 checks everything and makes the store while the other ranks wait."""

import json
import logging
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from gradproj.coordinator import fault_points
from gradproj.coordinator.cleanup import remove_leftovers
from gradproj.coordinator.failure import clear_failure, note_failure
from gradproj.coordinator.heartbeats import read_heartbeats
from gradproj.coordinator.merge import ranges_of
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import UnitQueue
from gradproj.coordinator.unmerge import (
    check_records_have_shards,
    check_records_have_store,
    unmerge_missing_units,
)
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.index_file import INDEX_MODE, index_content, load_index, save_index
from gradproj.corpus.tar.paths import INDEX_NAME
from gradproj.distributed import JobName, Process, Rendezvous, report_errors_from_rank_0
from gradproj.engine.projection import job_matrices
from gradproj.errors import Ended, GradprojError, ReportedError, StoreError
from gradproj.files import explain_os_errors
from gradproj.formatting import clean_lines, count, ranges_text
from gradproj.job.attributes import attributes_of, versions
from gradproj.job.borrowed_basis import borrowed_basis
from gradproj.job.chat_template import keep_chat_template
from gradproj.job.config import RunConfig
from gradproj.job.identity import check_identity, is_untouched
from gradproj.job.lockstep import Lockstep
from gradproj.job.pilot import PilotRanks, help_pilot, run_pilot
from gradproj.job.plan import BATCH_FILE, Plan, make_plan
from gradproj.model.checkpoint import fetch
from gradproj.storage.folders import flush_folder, remove_at_once
from gradproj.storage.log_file import log_file
from gradproj.storage.probe import check_conditional_writes
from gradproj.storage.publish import Publisher
from gradproj.store.array_digests import with_digests
from gradproj.store.layout import (
    FOLDERS,
    HEARTBEATS_DIR,
    LOGS_DIR,
    RUN_CONFIG_NAME,
    SCRATCH_DIR,
    STORE_NAME,
)
from gradproj.store.metadata import read_attributes, store_exists
from gradproj.store.texts import output_index
from gradproj.store.writer import StoreExists, create_store, pack_matrices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The started job, as each rank has it."""

    plan: Plan
    owner: Owner
    n_neighbours: int
    """Ranks of this job on this machine."""
    model: nn.Module | None = None
    """The model on its device, if this rank has loaded it already."""
    lockstep: Lockstep | None = None
    """The ranks that hold the model together; None if this one has its own."""

    @property
    def is_member(self) -> bool:
        """Whether the rank only helps the leader of its group."""
        return self.lockstep is not None and not self.lockstep.group.is_leader


CPU = torch.device("cpu")
HERE = PilotRanks(CPU)


def start_job(
    config: RunConfig,
    process: Process,
    ranks: Rendezvous,
    device: torch.device = CPU,
    lockstep: Lockstep | None = None,
) -> Job:
    """Check the settings, make or open the store, and share the plan with all ranks.

    Rank 0 loads the model on ``device`` if the new store's rows need a basis, together with the
    other ranks of its group if it is in one.

    Raises:
        GradprojError: on rank 0, a user error; printed there, once.
        ReportedError: on the other ranks, for the same reason.
    """
    shared: tuple[Plan, JobName] | None = None
    model: nn.Module | None = None
    exit_code = GradprojError.exit_code
    if process.rank == 0:
        name = JobName.from_environment()
        where = PilotRanks(device, lockstep, None if lockstep is None else ranks)
        try:
            plan, model = _start(config, name, where)
            # The index can be large. The other ranks read it from the output directory.
            shared = (replace(plan, index=cast(CorpusIndex, None)), name)
        except (GradprojError, Ended) as error:
            # Print before the others learn of it: torchrun ends rank 0 as soon as one has left.
            if str(error):
                print(f"gradproj: {clean_lines(str(error))}", file=sys.stderr, flush=True)
            exit_code = error.exit_code
    shared = ranks.from_rank_0(shared)
    if isinstance(shared, Plan):  # of a pilot in which rank 0's group takes part
        if lockstep is not None and lockstep.group.number == 0:
            # Rank 0 would wait for this one, so an error here ends the process.
            with report_errors_from_rank_0(process.rank):
                model = help_pilot(shared, lockstep)
        shared = ranks.from_rank_0()
    if shared is None:
        raise ReportedError(exit_code)
    plan, name = shared
    # One rank of a node downloads the model's files for the others.
    files = fetch(plan.config.model) if process.local_rank == 0 else None
    ranks.wait_for_all("the model's files are here")
    files = files or fetch(plan.config.model, may_download=False)
    plan = replace(plan, files=files, index=output_index(plan.output))
    owner = Owner.this_process(name.job_id, name.generation, process.rank)
    if process.local_rank == 0:
        # Leftovers of dead processes can only be recognised on their own machine.
        remove_leftovers(plan.output, owner)
    return Job(plan, owner, process.local_world_size, model, lockstep)


def _start(config: RunConfig, name: JobName, where: PilotRanks) -> tuple[Plan, nn.Module | None]:
    """Run rank 0's checks and prepare the output directory. Notes failures in ``failed.json``."""
    owner = Owner.this_process(name.job_id, name.generation, 0)
    try:
        check_conditional_writes(config.output)
        plan = make_plan(config)
        model = make_output(plan, owner, where)
    except GradprojError as error:
        with suppress(GradprojError):  # of a bucket that cannot be reached
            note_failure(config.output, owner, error)
        raise
    clear_failure(plan.output, name.job_id)
    return plan, model


def make_output(plan: Plan, owner: Owner, where: PilotRanks = HERE) -> nn.Module | None:
    """Make the output directory, its folders, the frozen index and the empty store if missing.

    Returns the model if a new store's basis was measured with it, ``where`` a pilot runs.
    """
    output, model = plan.output, None
    check_records_have_store(output)
    with explain_os_errors(output):
        if store_exists(output):
            _remove_store_of_other_settings(plan, owner)
        for folder in FOLDERS:
            (output / folder).mkdir(parents=True, exist_ok=True)
        flush_folder(output)
        flush_folder(output.absolute().parent)
    fault_points.reach("folders made")
    queue = UnitQueue(output, plan.layout, plan.identity_hash, plan.wanted, owner)
    publisher = queue.commits.publisher
    if not store_exists(output):
        _publish_index(plan, publisher)
        model = _publish_store(plan, publisher, where)
    elif not (output / INDEX_NAME).is_file():
        _publish_index(plan, publisher)
    elif load_index(output / INDEX_NAME).tars != plan.index.tars:
        # The same corpus (its fingerprint is part of the identity), moved or touched: record the
        # tars' paths and times as they are now.
        save_index(plan.index, output / INDEX_NAME, replace_existing=True)
    keep_chat_template(output, plan.chat_template, publisher)
    check_records_have_shards(output)
    # Before a unit is given up: readers never take old columns for the rows of its next shard.
    unmerge_missing_units(output, queue.claims)
    orphans = queue.give_up_orphans()
    if orphans:
        units = ranges_text(ranges_of(np.array(orphans, np.int64)))
        log.warning(
            "%s had shards without a record that belong to no process: they are computed again "
            "(%s)",
            count(len(orphans), "unit"),
            units,
        )
    fault_points.reach("metadata published")
    flags = plan.config.as_flags()
    flags |= {"rows_per_shard": plan.layout.rows_per_shard, "versions": versions()}
    text = json.dumps(flags, indent=2, default=list) + "\n"
    publisher.replace(output / RUN_CONFIG_NAME, [text.encode()])
    return model


def _remove_store_of_other_settings(plan: Plan, owner: Owner) -> None:
    """Delete a store that never had a row; ``make_plan`` has refused all others.

    Raises:
        StoreError: another job may be about to compute its first unit there.
    """
    output = plan.output
    if read_attributes(output / STORE_NAME)["identity_hash"] == plan.identity_hash:
        return
    if not is_untouched(output):  # another job computed rows since
        check_identity(output / STORE_NAME, plan.identity)
    others = [other for other, _ in read_heartbeats(output / HEARTBEATS_DIR)]
    at_work = [other for other in others if not other.is_gone(owner)]
    if at_work:
        raise StoreError(
            f"cannot replace {output / STORE_NAME}, which was made with other settings and has no "
            f"row: process {at_work[0].pid} of {at_work[0].host} works on it, or died there. Wait "
            "for its end, run with its settings, or give --output_dir a new path"
        )
    (output / BATCH_FILE).unlink(missing_ok=True)
    (output / SCRATCH_DIR).mkdir(exist_ok=True)
    away = output / SCRATCH_DIR / f".{owner.name}.empty"  # hidden: a leftover if this process dies
    remove_at_once(output / STORE_NAME, away)
    fault_points.reach("empty store removed")


def _publish_index(plan: Plan, publisher: Publisher) -> None:
    """Freeze the index; an existing one must be of the same corpus.

    This precedes the store, whose identity holds the index's fingerprint, so that no store is made
    beside another index.
    """
    if not publisher.create(plan.output / INDEX_NAME, index_content(plan.index), INDEX_MODE):
        save_index(plan.index, plan.output / INDEX_NAME)  # raises if they differ
    fault_points.reach("index published")


def _publish_store(plan: Plan, publisher: Publisher, where: PilotRanks) -> nn.Module | None:
    """Make the empty store. If another job was faster, its store must have our identity.

    Returns the model if the pilot has loaded it.
    """
    store, model = plan.output / STORE_NAME, None
    attributes, arrays = {**attributes_of(plan), "store_id": new_store_id()}, {}
    # The matrices depend on names and shapes, or on a file, so they need no weights.
    chosen = job_matrices(plan.config.projection, plan.layers)
    try:
        if source := plan.config.projection.basis_from:
            basis = borrowed_basis(source, plan.output, plan.layers, chosen, plan.identity)
            arrays, attributes["basis"] = basis.arrays, basis.attribute
        elif plan.config.projection.basis == "eigen":
            pilot = run_pilot(plan, chosen, where, published=lambda: store_exists(plan.output))
            arrays, attributes["basis"], model = pilot.arrays, pilot.attribute, pilot.model
        matrices = {name: (p_i.numpy(), p_o.numpy()) for name, (p_i, p_o) in chosen.items()}
        packed = pack_matrices(plan.layers, matrices)
        attributes = with_digests(attributes, arrays)
        create_store(store, plan.layout, attributes, packed, publisher, arrays=arrays)
        fault_points.reach("store published")
    except StoreExists:
        check_identity(store, plan.identity)
    return model


def new_store_id() -> str:
    """Return an id that no other store has, not even one of the same settings."""
    return secrets.token_hex(16)


def log_to_file(output: Path, owner: Owner, verbose: bool) -> None:
    """Append this rank's log to ``logs/rank-00000.log``.

    Under Slurm the job's id is part of the name (``logs/rank-00000-slurm-70_1.log``): jobs of an
    array run on different machines and would overwrite each other's lines.
    """
    job = f"-{owner.job_id}" if owner.job_id.startswith("slurm-") else ""
    handler = log_file(output / LOGS_DIR / f"rank-{owner.rank:05d}{job}.log", owner.name)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("gradproj")
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
