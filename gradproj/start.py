"""The job's start: rank 0 checks everything and makes the store while the others wait."""

import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from gradproj.capture import draw_matrices, place_widths
from gradproj.config import RunConfig
from gradproj.coordinator.claims import Owner
from gradproj.coordinator.merge import write_metadata
from gradproj.coordinator.units import FOLDERS, sweep
from gradproj.corpus.index import CorpusIndex, list_tars, load_index, save_index
from gradproj.dist import JobName, Process, from_rank_0, wait_for_all
from gradproj.errors import GradprojError, ReportedError
from gradproj.identity import check_identity
from gradproj.model import fetch, model_skeleton
from gradproj.plan import INDEX_NAME, Plan, attributes_of, make_plan, versions
from gradproj.store.files import explain_os_errors, write_and_replace
from gradproj.store.layout import STORE_NAME
from gradproj.store.writer import StoreExists, create_store, pack_matrices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What every rank knows once the job has started."""

    plan: Plan
    owner: Owner


def start_job(config: RunConfig, process: Process) -> Job:
    """Check, make or open the store, and agree on it with all ranks.

    Raises:
        GradprojError: on rank 0, what a user can mend; printed there, once.
        ReportedError: on the other ranks, for the same reason.
    """
    failure: GradprojError | None = None
    shared: tuple[Plan, JobName] | None = None
    if process.rank == 0:
        try:
            plan = make_plan(config)
            name = JobName.from_environment()
            make_output(plan, Owner.this_process(name.job_id, name.generation, 0))
            # The index can be large, and lies in the output now: the others read it there.
            shared = (replace(plan, index=cast(CorpusIndex, None)), name)
        except GradprojError as error:
            # Before the others learn of it: torchrun ends rank 0 as soon as one of them has left.
            print(f"gradproj: {error}", file=sys.stderr, flush=True)
            failure = error
    shared = from_rank_0(shared)
    if shared is None:
        raise ReportedError(str(failure or ""))
    plan, name = shared
    plan = replace(plan, files=_files_of_this_node(plan, process), index=_index_of(plan))
    return Job(plan, Owner.this_process(name.job_id, name.generation, process.rank))


def _files_of_this_node(plan: Plan, process: Process) -> Any:
    """One rank of a node downloads, the others find it done."""
    files = fetch(plan.config.model) if process.local_rank == 0 else None
    wait_for_all()
    return files or fetch(plan.config.model, may_download=False)


def _index_of(plan: Plan) -> CorpusIndex:
    index = load_index(plan.output / INDEX_NAME)
    shards = plan.config.corpus.shards
    return index if shards.endswith(".json") else index.relocated(list_tars(shards))


def make_output(plan: Plan, owner: Owner) -> None:
    """Make OUTPUT, its folders, the frozen index and the empty store, or find them there."""
    output = plan.output
    with explain_os_errors(output):
        for folder in FOLDERS:
            (output / folder).mkdir(parents=True, exist_ok=True)
    sweep(output, owner)
    if not (output / INDEX_NAME).exists():
        save_index(plan.index, output / INDEX_NAME)
    if not (output / STORE_NAME).exists():
        # The matrices depend on names and shapes alone, so no weights are needed for them.
        config = plan.config.projection
        drawn = {w.name: draw_matrices(config, w) for w in place_widths(model_skeleton(plan.files), config)}
        matrices = {name: (p_i.numpy(), p_o.numpy()) for name, (p_i, p_o) in drawn.items()}
        try:
            create_store(
                output / STORE_NAME, plan.layout, attributes_of(plan), pack_matrices(plan.layers, matrices)
            )
        except StoreExists:
            check_identity(
                output / STORE_NAME, plan.identity
            )  # another job was faster; its store must be the one we want
    write_metadata(output)
    flags = {**plan.config.as_flags(), "rows_per_shard": plan.layout.rows_per_shard, "versions": versions()}
    text = json.dumps(flags, indent=2, default=list) + "\n"
    write_and_replace(output / "run_config.json", [text.encode()])


def log_to_file(output: Path, rank: int, verbose: bool) -> None:
    """This rank's log: ``logs/rank-00000.log``, appended to by every start."""
    handler = logging.FileHandler(output / "logs" / f"rank-{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("gradproj")
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False


def prepare_torch(config: RunConfig) -> None:
    """Threads and determinism of this process."""
    if config.job.threads:
        torch.set_num_threads(config.job.threads)
    # TF32 would change rows in the fourth digit, and which products use it differs by GPU.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if config.job.deterministic:
        torch.use_deterministic_algorithms(True)


def matrices_on(device: torch.device, packed: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The store's matrices as tensors."""
    return {
        name: tuple(torch.from_numpy(np.array(p)).to(device) for p in pair) for name, pair in packed.items()
    }
