"""Memory of a batch, counted without values, beside what torch's allocator gives a real one."""

import math
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.corpora import make_corpus
from helpers.jobs import flags
from helpers.models import make_model

from gradproj.engine.batching import BatchConfig
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.targets import Targets
from gradproj.job.config import run_config
from gradproj.job.memory import batch_bytes
from gradproj.job.plan import make_plan
from gradproj.job.summary import model_bytes
from gradproj.job.unit_reader import UnitReader
from gradproj.job.unit_sums import BatchResult, UnitSums
from gradproj.job.weights import gpu_weight_bytes, host_weight_bytes
from gradproj.model.block_shards import blocks_of
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model, model_skeleton
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store.row_encoder import RowEncoder

N, LENGTH = 12, 60


def allocated(model, projection, checkpointing):
    """Return the allocator's peak during a batch."""

    def run_batch():
        losses = per_sample_loss(model, {"input_ids": ids, "targets": targets}, causal=False)
        losses.sum().backward()
        engine.collect_batch()

    ids = torch.arange(N * LENGTH).view(N, LENGTH).remainder(50)
    targets = Targets.from_labels(ids)
    engine = GradProjLoraEngine.from_config(model, projection, None, checkpointing)
    with engine:
        return max(allocations(run_batch))


def allocations(run):
    """Return the bytes that torch's allocator has given out after each of its events in a call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    return list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


FAMILIES = {
    "gpt2": {},
    "llama": {},
    "gemma2": {},
    "cohere": {"vocab_size": 16_000},  # plain logits, which take most of it
    "olmoe": {},
    "lfm2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_bytes_of_a_batch_are_those_that_a_real_one_allocates(
    family, checkpointing, tmp_path
):
    files = fetch(ModelConfig(model=str(make_model(tmp_path, family, **FAMILIES[family]))))
    projection = ProjectionConfig(rank_total=16, rank_min=2)
    model = load_model(files, torch.device("cpu"))
    allocated(model, projection, checkpointing)  # measures the model, and warms torch up
    want = allocated(model, projection, checkpointing)
    batch = BatchConfig(max_length=LENGTH, batch_tokens=N * LENGTH + 1)
    assert batch_bytes(files, projection, batch, checkpointing) == pytest.approx(want, rel=0.15)


@pytest.mark.parametrize("init", ["", "random"])
@pytest.mark.parametrize("offload", [True, False])
def test_memory_of_weights_in_blocks_is_where_they_are(tmp_path, init, offload):
    n_ranks, folder = (1 if offload else 2), make_model(tmp_path, num_hidden_layers=5)
    model = ModelConfig(model=str(folder), init=init)
    job = SimpleNamespace(ranks_per_model=n_ranks, offload=offload)
    plan = SimpleNamespace(files=fetch(model), config=SimpleNamespace(job=job, model=model))
    skeleton = model_skeleton(plan.files)
    whole = sum(x.nbytes for x in (*skeleton.parameters(), *skeleton.buffers()))
    blocks = blocks_of(skeleton, n_ranks)
    share = sum(block.n_bytes for block in blocks) // n_ranks
    pinned = sum(2 ** math.ceil(math.log2(block.n_bytes)) for block in blocks)
    rest = whole - sum(w.shape.numel() * 4 for block in blocks for w in block.weights)
    buffers = 2 * max(block.n_bytes for block in blocks)
    on_gpu, on_cpu = (host_weight_bytes(plan, torch.device(x), whole) for x in ("cuda", "cpu"))
    assert gpu_weight_bytes(plan, whole) == rest + buffers + (0 if offload else share)
    assert on_cpu == (whole + share if init else rest + share + buffers)  # random: made whole
    kept = pinned if offload else 0
    assert on_gpu == (whole if init else rest) + kept


def plan_of(tmp_path, family, **settings):
    corpus = make_corpus(tmp_path / "tars", [{"input_ids": [5] * 60}] * 32)
    settings |= {"shards": corpus, "model": make_model(tmp_path / "model", family)}
    given = flags(**settings, output_dir=tmp_path / "out", basis="random", rows_per_shard=32)
    return make_plan(run_config(given, "test"), progress=False)


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "mamba"])
def test_counted_bytes_of_weights_are_those_of_a_loaded_model(family, tmp_path):
    plan = plan_of(tmp_path, family)
    model = load_model(plan.files, torch.device("cpu"))
    weights = [*model.parameters(), *model.buffers()]
    held = {weight.data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    assert model_bytes(plan) == pytest.approx(sum(held.values()), rel=0.15)


@pytest.mark.parametrize(
    "settings",
    [{"encoding": "signs"}, {"encoding": "dense"}, {"long_documents": "windows"}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_counted_bytes_of_a_units_rows_are_those_that_its_sums_allocate(settings, tmp_path):
    plan = plan_of(tmp_path, "llama", max_length=24, **settings)
    reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    prepared, encoder = reader.read(0), RowEncoder(plan.layout, plan.layers)
    _, firsts = np.unique(prepared.row_of, return_index=True)  # of windows two are left
    batch = BatchResult(torch.rand(len(firsts), plan.layout.dim), torch.rand(len(firsts)))

    def first_sequences():
        sums = UnitSums(prepared, engine, encoder, "sum", torch.device("cpu"))
        sums.add(firsts, batch)
        return sums

    model = load_model(plan.files, torch.device("cpu"))
    with GradProjLoraEngine(model, proj_rank_total=plan.config.projection.rank_total) as engine:
        held = allocations(first_sequences)[-1]
    # Stored rows are there three times (the unit before, a copy), the open sums once.
    assert held + 2 * 32 * plan.row_bytes == pytest.approx(plan.unit_bytes(), rel=0.15)
