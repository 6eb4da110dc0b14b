"""Memory of a batch, counted without values, beside what torch's allocator gives a real one."""

import math
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from helpers.models import make_model

from gradproj.engine.batching import BatchConfig
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.targets import Targets
from gradproj.job.memory import batch_bytes
from gradproj.job.weights import gpu_weight_bytes, host_weight_bytes
from gradproj.model.block_shards import blocks_of
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model, model_skeleton

N, LENGTH = 12, 60


def allocated(model, projection, checkpointing):
    """Return the allocator's peak during a batch."""
    ids = torch.arange(N * LENGTH).view(N, LENGTH).remainder(50)
    targets = Targets.from_labels(ids)
    engine = GradProjLoraEngine.from_config(model, projection, None, checkpointing)
    with torch.profiler.profile(profile_memory=True) as profile, engine:
        losses = per_sample_loss(model, {"input_ids": ids, "targets": targets}, causal=False)
        losses.sum().backward()
        engine.collect_batch()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


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
