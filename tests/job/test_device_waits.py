"""The job's loop never waits for its device. It runs on one whose values cannot be read."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import flags
from helpers.meta_device import META_DEVICE, waits_of, watched
from helpers.models import FAMILIES, VOCAB, make_model, ragged_batch, small_model
from helpers.references import relative_error
from helpers.units import project_unit, unit_of
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, masking_utils

import gradproj.run
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.units import UnitQueue
from gradproj.distributed import Process, Rendezvous
from gradproj.engine import capture, loss
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadBasis
from gradproj.engine.loss import per_sample_loss
from gradproj.job import lockstep, rank_setup, unit_projector
from gradproj.job.config import run_config
from gradproj.job.shutdown import StopRequest
from gradproj.job.startup import start_job
from gradproj.job.unit_projector import UnitProjector, UnitSums
from gradproj.kernels import onednn
from gradproj.kernels.transformers_patches import one_sequence_a_row
from gradproj.model.loading import load_model
from gradproj.store.head_rows import HeadSegment


def remember(p):
    """Replace ``cache_bfloat16``, whose one comparison reads the device before the first unit."""
    onednn._IN_BFLOAT16[p] = p.to(torch.bfloat16), p._version


def some_unit():
    """A unit of several batches."""
    lengths = np.random.default_rng(0).integers(2, 30, 12)
    return unit_of(lengths, VOCAB, batch_size=4, batch_tokens=64)


@pytest.fixture
def waits_of_a_unit(tmp_path, monkeypatch):
    """``(model, chunked, **engine's) -> waits in the loop over a unit's batches``."""
    monkeypatch.setattr(capture, "cache_bfloat16", remember)

    def run(model, chunked=True, form=None, **settings):
        model = model.requires_grad_(False).to(META_DEVICE)
        # Both are measured before the first unit.
        monkeypatch.setattr(unit_projector, "chunk_verdict", lambda model: (chunked, ""))
        unit, done = some_unit(), []
        with GradProjLoraEngine(
            model, freeze_weights=True, token_covariances=True, **settings
        ) as engine:
            waits = waits_of(
                lambda: done.append(project_unit(model, engine, unit, tmp_path, **(form or {})))
            )
        assert waits or (done and len(unit.batches) > 3)
        return waits

    return run


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_batch_waits_for_the_device(family, waits_of_a_unit):
    assert waits_of_a_unit(small_model(family), include_embeddings=family != "opt") == []


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_batch_waits_in_bfloat16_nor_with_plain_logits_nor_checkpointing(
    family, waits_of_a_unit
):
    assert waits_of_a_unit(small_model(family).to(torch.bfloat16)) == []
    assert waits_of_a_unit(small_model(family), chunked=False) == []
    assert waits_of_a_unit(small_model(family), gradient_checkpointing=True) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_no_batch_waits_for_experts(family, waits_of_a_unit):
    if family == "gpt_oss" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("transformers 5.18 itself makes tensors of the host's numbers in each layer")
    model = small_model(family).to(torch.bfloat16)
    # llama4's body is the whole model.
    assert waits_of_a_unit(model, chunked=family != "llama4") == []


@pytest.mark.parametrize("encoding", ["signs", "int4"])
def test_no_batch_waits_with_a_basis_and_packed_rows(encoding, waits_of_a_unit):
    model = small_model("llama")
    widths = GradProjLoraEngine(model).projection_matrices.items()
    basis = {name: (torch.eye(len(p_i)), torch.eye(len(p_o))) for name, (p_i, p_o) in widths}
    form = {"encoding": encoding}
    assert waits_of_a_unit(model, form=form, basis=basis) == []


def test_no_batch_waits_with_head_rows(waits_of_a_unit):
    model = small_model("gpt2")
    width = model.get_output_embeddings().in_features
    basis = HeadBasis(*(x.to(META_DEVICE) for x in (torch.randn(8, width), torch.ones(VOCAB))))
    assert waits_of_a_unit(model, form={"head": (basis, HeadSegment(4, 8, VOCAB))}) == []


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_no_batch_waits_with_hidden_states(kind, waits_of_a_unit):
    assert waits_of_a_unit(small_model("gpt2"), form={"hidden": kind}) == []


ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 2.0},
    "linear": {"factor": 2.0},
}


@pytest.mark.parametrize("kind", sorted(ROPES))
def test_no_batch_waits_with_stretched_positions(kind, waits_of_a_unit):
    settings = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        **ROPES[kind],
    }
    assert waits_of_a_unit(small_model("llama", rope_parameters=settings)) == []


def biogpt():
    """Scales its token embedding by one of Python's numbers."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING["biogpt"](
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=1,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_lookup_scaled_by_a_number_does_not_wait(waits_of_a_unit):
    model = small_model("llama")
    model.get_input_embeddings().embed_scale = 5.0
    assert waits_of_a_unit(model, include_embeddings=True) == []


def test_lookup_scaled_by_a_number_is_exact():
    model, ids = biogpt(), torch.arange(5, 17)
    with GradProjLoraEngine(model, "embed_tokens", freeze_weights=True) as engine:
        per_sample_loss(model, ids[None]).sum().backward()
        row = engine.collect_batch()[0]
        # The tied head is the same weight: the lookup's share is what a head of its own leaves.
        embedding = model.get_input_embeddings()
        looked_up = embedding(ids).detach().requires_grad_()
        loss = own_loss_of_embedded(model, looked_up, ids)
        gradient = torch.zeros_like(embedding.weight, dtype=torch.float64)
        gradient.index_add_(
            0, ids, torch.autograd.grad(loss, looked_up)[0].double() * embedding.embed_scale
        )
        p_i, p_o = (p.double() for p in engine.projection_matrices[engine.targets[0].name])
    assert relative_error(row, (p_o @ gradient.T @ p_i.T).flatten()) < 1e-5


def own_loss_of_embedded(model, embedded, ids):
    logits = model(inputs_embeds=embedded[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "truth": lambda x: 1 if (x > 0).all() else 0,
    "tolist": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "to the host without waiting": lambda x: torch.empty(x.shape).copy_(x, non_blocking=True),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "isfinite": lambda x: bool(torch.isfinite(x).all()),
    "choice by a mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.__setitem__(x > 0, x[:1]),
    "unique": lambda x: x.unique(),
    "a number as a tensor": lambda x: x * torch.tensor(2.0, device=x.device),
    "a list as an index": lambda x: x[[0]],
    "a host's index": lambda x: x[torch.zeros(1, dtype=torch.int64)],
    "a copy that blocks": lambda x: torch.zeros(3).pin_memory().to(x.device),
    "a copy of ordinary memory": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
}


@pytest.mark.parametrize("name", sorted(WAITS))
def test_added_wait_in_the_loop_is_detected(name, waits_of_a_unit, monkeypatch):
    add = UnitSums.add

    def add_and_wait(self, sequences, result):
        WAITS[name](result.losses)
        add(self, sequences, result)

    monkeypatch.setattr(UnitSums, "add", add_and_wait)
    assert waits_of_a_unit(small_model("llama"))


def test_wait_inside_the_model_is_detected(waits_of_a_unit, monkeypatch):
    monkeypatch.setattr(loss, "one_sequence_a_row", nullcontext)
    assert waits_of_a_unit(small_model("llama"))


def test_non_blocking_copy_of_pinned_memory_is_no_wait():
    assert waits_of(lambda: torch.zeros(3).pin_memory().to(META_DEVICE, non_blocking=True)) == []


# --- the job itself ---


def test_job_waits_for_its_device_once_a_unit_in_the_writer_thread(tmp_path, monkeypatch):
    settings = {
        "shards": make_corpus(tmp_path / "tars", mixed_documents(48)),
        "model": make_model(tmp_path / "model"),
        "output_dir": tmp_path / "out",
        "rows_per_shard": 16,
        "batch_size": 4,
        "max_length": 24,
        "device": "cpu",
    }
    waits, fetched_by, project = [], [], UnitProjector.project

    def watched_project(*args):
        with watched(waits):
            return project(*args)

    def to_host(tensors, computed):
        fetched_by.append(threading.current_thread().name)
        return [torch.zeros(x.shape, dtype=x.dtype) for x in tensors]

    monkeypatch.setattr(capture, "cache_bfloat16", remember)
    monkeypatch.setattr(
        lockstep, "load_model", lambda files, device: load_model(files, "cpu").to(META_DEVICE)
    )
    monkeypatch.setattr(rank_setup, "chunk_verdict", lambda model: (True, "as it is known"))
    monkeypatch.setattr(rank_setup, "fit_padding", lambda model, batch: batch)
    monkeypatch.setattr(unit_projector, "chunk_verdict", lambda model: (True, ""))
    monkeypatch.setattr(UnitProjector, "project", watched_project)
    monkeypatch.setattr(unit_projector, "to_host", to_host)
    process = Process.from_environment()
    with Rendezvous(process) as ranks:
        job = start_job(run_config(flags(**settings), "test"), process, ranks)
    plan, progress = job.plan, RankProgress()
    queue = UnitQueue(plan.output, plan.layout, plan.identity_hash, plan.wanted, job.owner)
    gradproj.run.compute(job, queue, META_DEVICE, StopRequest(), progress)
    assert waits == []
    assert progress.batches > 3 * progress.units == 9
    assert len(fetched_by) == 3
    assert {name.partition("_")[0] for name in fetched_by} == {"writer"}


# --- packed rows in transformers ---


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("chunked", [True, False])
def test_rows_have_the_bits_of_transformers_own_packing_check(family, chunked, monkeypatch):
    model, (ids, labels) = small_model(family), ragged_batch([9, 14, 3])

    def rows():
        with GradProjLoraEngine(model, freeze_weights=True) as engine:
            per_sample_loss(
                model, {"input_ids": ids, "labels": labels}, chunked=chunked
            ).sum().backward()
            return engine.collect_batch()

    without_check = rows()
    monkeypatch.setattr(loss, "one_sequence_a_row", nullcontext)
    assert torch.equal(without_check, rows())


def test_packing_is_still_detected_in_other_threads_and_calls():
    packed, seen = torch.tensor([[0, 1, 0, 1, 2]]), []

    def find():
        seen.append(masking_utils.find_packed_sequence_indices(packed))

    find()
    with one_sequence_a_row():
        other = threading.Thread(target=find)
        other.start()
        other.join()
        assert masking_utils.find_packed_sequence_indices(packed) is None
    find()
    assert [x.tolist() for x in seen] == [[[0, 0, 1, 1, 1]]] * 3
