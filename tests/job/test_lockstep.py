"""Ranks of a group side by side: batches that come out uneven, or do not fit one rank's memory."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from helpers.forked_ranks import call_as_two_ranks
from helpers.models import make_model
from helpers.references import projected_gradient_by_autograd, relative_error

from gradproj import GradProjLoraEngine
from gradproj.distributed import Process
from gradproj.distributed.model_group import ModelGroup
from gradproj.engine.batching import collate
from gradproj.engine.run_batch import run_batch
from gradproj.job.lockstep import Lockstep
from gradproj.job.shutdown import StopRequest
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model
from gradproj.model.sequences import TokenSequence

CPU = torch.device("cpu")
WIDTHS = {"proj_rank_total": 16, "proj_rank_min": 2, "freeze_weights": True}


def fail_above(model, most, backward):
    """Let the second block run out of memory for more than ``most`` samples. Returns its hooks."""

    def fail(*_):
        raise torch.OutOfMemoryError("none left")

    def before(module, args):
        if len(args[0]) > most and not backward:
            fail()

    def after(module, args, output):
        if len(output) > most and backward and output.requires_grad:
            output.register_hook(fail)

    block = model.model.layers[1]
    return block.register_forward_pre_hook(before), block.register_forward_hook(after)


STEPS = {
    "the first rank has nothing left in the last rounds": ([[0, 1], [2, 3, 4, 5, 6]], False),
    "in the backward pass": ([[0, 1, 2, 3], [4, 5, 6, 7, 8]], True),
    "no batch for the second rank": ([[0, 1, 2]], True),
}
"""Batches of sequences, and whether the second rank runs out of memory going backward."""
SEQUENCES = [TokenSequence.of(np.arange(n) % 7 + n) for n in range(4, 13)]


def run_steps(rank, folder):
    torch.set_num_threads(1)
    ranks = SimpleNamespace(store=dist.FileStore(f"{folder}/store", 2))
    lockstep = Lockstep(ModelGroup(Process(rank, 2, rank, 2), 2, ranks, CPU), CPU, StopRequest())
    files = fetch(ModelConfig(model=f"{folder}/model"))
    model = lockstep.load(files)
    with lockstep.group.watch(), GradProjLoraEngine(model, **WIDTHS) as engine:
        lockstep.rehearse(model, engine)
        results = [run_step(rank, lockstep, model, engine, *step) for step in STEPS.values()]
    if rank == 0:
        check(results, load_model(files, CPU))
    dist.destroy_process_group()


def run_step(rank, lockstep, model, engine, batches, backward):
    hooks = fail_above(model, 2, backward) if rank == 1 else ()

    def run(chosen):
        return {"rows": run_batch(model, engine, collate(SEQUENCES, chosen))[0]}

    mine = np.array(batches[rank]) if rank < len(batches) else None
    parts = lockstep.run_in_halves(model, engine, mine, run)
    for hook in hooks:
        hook.remove()
    return [part for each in lockstep.collect(parts, len(batches)) for part in each]


def check(results, plain):
    engine = GradProjLoraEngine(plain, **WIDTHS)
    for (batches, _), parts in zip(STEPS.values(), results, strict=True):
        assert [n for part in parts for n in part[0]] == [n for batch in batches for n in batch]
        for chosen, found in parts:
            for n, row in zip(chosen, found["rows"], strict=True):
                tokens = torch.from_numpy(SEQUENCES[n].ids)
                want = projected_gradient_by_autograd(plain, engine, tokens)
                assert relative_error(row, want) < 1e-5
    assert [len(parts) for parts in results] == [1 + 3, 1 + 3, 1]


def test_rows_of_a_step_are_autograds_though_one_rank_runs_out_of_memory(tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=5)
    call_as_two_ranks(run_steps, str(tmp_path))
