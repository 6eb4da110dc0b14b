"""The job's loop on a GPU: it never waits, and a batch that does not fit is halved."""

import contextlib
import logging
import time

import numpy as np
import pytest
import torch
from helpers.models import VOCAB, small_model
from helpers.units import project_unit, unit_of
from transformers import GPT2Config, GPT2LMHeadModel

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.job.batch_size import try_batches
from gradproj.job.unit_projector import UnitSums
from gradproj.store.layout import STATUS

pytestmark = pytest.mark.gpu

ENGINE = {"freeze_weights": True, "token_covariances": True}


@contextlib.contextmanager
def waiting_is_an_error():
    """torch raises where it would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def several_batches():
    lengths = np.random.default_rng(0).integers(2, 30, 40)
    return unit_of(lengths, VOCAB, batch_size=8, batch_tokens=128)


def rows_of(projected):
    return projected.on_host().stored


def worst_error(got, want):
    """The largest ``|row - wanted| / |wanted|``."""
    return float((np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max())


# --- waiting ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_no_batch_waits_for_the_gpu(gpu, tmp_path, family, dtype):
    model = small_model(family).to(dtype)
    with GradProjLoraEngine(model.to("cpu"), **ENGINE) as engine:
        want = rows_of(project_unit(model, engine, several_batches(), tmp_path))
    with GradProjLoraEngine(model.to(gpu), **ENGINE) as engine:
        project_unit(
            model, engine, several_batches(), tmp_path
        )  # what is asked once, and libraries' own start
        torch.cuda.synchronize(gpu)
        with waiting_is_an_error():
            projected = project_unit(model, engine, several_batches(), tmp_path)
        got = rows_of(projected)
    if dtype == torch.float32:
        assert worst_error(got, want) <= 1e-4


def test_added_wait_in_the_loop_is_an_error(gpu, tmp_path, monkeypatch):
    model, add = small_model("llama").to(gpu), UnitSums.add

    def add_and_wait(self, sequences, result):
        result.losses.sum().item()
        add(self, sequences, result)

    with GradProjLoraEngine(model, **ENGINE) as engine:
        project_unit(model, engine, several_batches(), tmp_path)
        monkeypatch.setattr(UnitSums, "add", add_and_wait)
        with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
            project_unit(model, engine, several_batches(), tmp_path)


def test_unit_seconds_are_gpu_time_not_submission_time(gpu, tmp_path, monkeypatch):
    model, add = small_model("llama").to(gpu), UnitSums.add
    slow = torch.ones(2**13, 2**13, device=gpu)

    def add_slowly(self, sequences, result):
        for _ in range(20):
            torch.mm(slow, slow)
        add(self, sequences, result)

    monkeypatch.setattr(UnitSums, "add", add_slowly)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        torch.cuda.synchronize(gpu)
        started = time.perf_counter()
        projected = project_unit(model, engine, several_batches(), tmp_path)
        given = time.perf_counter() - started
        torch.cuda.synchronize(gpu)
        computed = time.perf_counter() - started
        seconds = projected.on_host().record.stats["seconds"]
    assert given < 0.9 * computed
    assert 0.9 * computed <= seconds <= computed


# --- memory ---


@pytest.fixture(scope="module")
def larger(gpu):
    """A model whose batches take hundreds of megabytes, far above the allocator's granularity."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=512, n_layer=4, n_head=8, vocab_size=8192, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False).to(gpu)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        yield model, engine


def test_batch_is_halved_until_it_fits_the_gpu(larger, memory, tmp_path, caplog):
    model, engine = larger
    lengths = [1024] * 31
    small, large = (unit_of(lengths, 8192, n, 1024 * n) for n in (4, 32))
    want = rows_of(project_unit(model, engine, small, tmp_path))
    with_small = memory.reserved_by(lambda: project_unit(model, engine, small, tmp_path))
    with_large = memory.reserved_by(lambda: project_unit(model, engine, large, tmp_path))
    assert with_large > 2 * with_small
    memory.limit((with_small + with_large) // 2)
    with caplog.at_level(logging.WARNING, "gradproj"):
        got = project_unit(model, engine, large, tmp_path).on_host()
    assert "halving the batch" in caplog.text
    assert (got.record.columns["status"] == STATUS["ok"]).all()
    assert worst_error(got.stored, want) <= 1e-4
    assert got.record.stats["covariance_tokens"] == 32 * 1023


def test_document_that_does_not_fit_alone_gets_status_7_and_others_their_rows(
    larger, memory, tmp_path
):
    model, engine = larger
    lengths = [1024, *[64] * 15]
    unit, short = unit_of(lengths, 8192, 1), unit_of(lengths[1:], 8192, 1)
    want = rows_of(project_unit(model, engine, unit, tmp_path))
    with_short = memory.reserved_by(lambda: project_unit(model, engine, short, tmp_path))
    with_long = memory.reserved_by(lambda: project_unit(model, engine, unit, tmp_path))
    assert with_long > with_short + 2**26
    memory.limit(with_short + (with_long - with_short) // 4)
    got = project_unit(model, engine, unit_of(lengths, 8192, 1), tmp_path).on_host()
    assert got.record.columns["status"].tolist() == [STATUS["out_of_memory"], *[STATUS["ok"]] * 15]
    assert np.isnan(got.stored[0]).all()
    assert worst_error(got.stored[1:], want[1:]) <= 1e-4


def test_batch_size_trials_end_at_the_memory_limit(gpu, larger, memory):
    model, engine = larger
    held = torch.cuda.memory_allocated(gpu)
    memory.limit(held + 2**30)
    trials = try_batches(model, engine, 1024, 0, 1)
    assert trials
    assert all(0 < trial.bytes < 2**30 for trial in trials)
    assert torch.cuda.memory_allocated(gpu) <= held + 2**24
