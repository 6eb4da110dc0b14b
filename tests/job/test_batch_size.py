"""``--batch_tokens auto``: what is measured, which measurement wins, and that it is kept."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import assert_same_bits, flags, run_job
from helpers.models import make_model, small_model

from gradproj.engine.batching import BatchConfig
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import StoreError
from gradproj.job import batch_size
from gradproj.job.batch_size import (
    Trial,
    choose,
    recorded_batch_tokens,
    resolve_batch_tokens,
    try_batches,
)
from gradproj.job.config import run_config
from gradproj.job.plan import BATCH_FILE
from gradproj.storage.publish import FilePublisher

SETTINGS = {"proj_rank_total": 16, "proj_rank_min": 2, "max_length": 24, "rows_per_shard": 16}


def trials_of(*rates):
    return [Trial(24 * 2**n, 24 * 2**n / rate, 2**n) for n, rate in enumerate(rates)]


@pytest.mark.parametrize(
    ("rates", "want"),
    [
        ((100, 200, 300), 96),
        ((100, 200, 205), 48),  # 2.5 % more is not worth twice the memory
        ((100, 99, 98), 24),
        ((), 24),  # not even one sequence fits: it is tried, and its document gets its status
    ],
)
def test_smallest_batch_near_the_best_rate_is_chosen(rates, want):
    assert choose(trials_of(*rates), 24) == want


@pytest.fixture
def engine():
    model = small_model("llama").requires_grad_(False)
    with GradProjLoraEngine(model, freeze_weights=True, token_covariances=True) as engine:
        yield engine


def sizes_tried(monkeypatch, engine, most=64, reserved=0):
    tried = []

    def loss(model, ids):
        tried.append(tuple(ids.shape))
        if ids.shape[0] > most:
            raise torch.OutOfMemoryError("no")
        return per_sample_loss(model, ids)

    monkeypatch.setattr(batch_size, "per_sample_loss", loss)
    monkeypatch.setattr(batch_size, "MAX_TOKENS", 8 * 24)
    monkeypatch.setattr(batch_size, "_has_levelled_off", lambda trials: False)
    return try_batches(engine.module, engine, 24, reserved, 1), tried


def test_trials_double_batches_of_the_longest_sequences(engine, monkeypatch):
    trials, tried = sizes_tried(monkeypatch, engine)
    assert tried == [(n, 24) for n in (1, 2, 4, 8) for _ in range(2)]
    assert [trial.tokens for trial in trials] == [24, 48, 96, 192]


def test_batch_that_does_not_fit_ends_the_trials_and_leaves_nothing_behind(engine, monkeypatch):
    trials, tried = sizes_tried(monkeypatch, engine, most=3)
    assert [trial.tokens for trial in trials] == [24, 48]
    assert tried[-1] == (4, 24)
    sums = engine.take_token_covariances()
    assert sums.n_tokens == 0
    assert sums.a.eq(0).all()
    per_sample_loss(engine.module, torch.ones(1, 5, dtype=torch.int64)).sum().backward()
    assert len(engine.collect_batch()) == 1


def test_trials_stop_before_the_memory_limit(engine, monkeypatch):
    monkeypatch.setattr(batch_size.HostMemory, "free", lambda self: 3 * 2**20)
    monkeypatch.setattr(batch_size.HostMemory, "peak", lambda self: 2**20)
    trials, _ = sizes_tried(monkeypatch, engine, reserved=2**20 + 1)
    assert [trial.tokens for trial in trials] == [24]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"batch_tokens": "8"}', '{"batch_tokens": 0}'])
def test_damaged_batch_file_is_named(tmp_path, text):
    (tmp_path / BATCH_FILE).write_text(text)
    with pytest.raises(StoreError, match=r"batch\.json holds no number of batch_tokens; delete it"):
        recorded_batch_tokens(tmp_path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    return {
        "shards": make_corpus(root / "tars", mixed_documents(40)),
        "model": make_model(root / "model"),
        **SETTINGS,
    }


@dataclass
class Settings:
    batch: BatchConfig


def waiting_rank(inputs, tmp_path, rank, pending=(1,)):
    """A rank as ``resolve_batch_tokens`` needs it."""
    config = run_config(flags(**inputs, output_dir=tmp_path, batch_tokens="auto"), "test")
    settings = Settings(config.batch)
    plan = SimpleNamespace(output=tmp_path, unit_settings=settings, unit_bytes=lambda: 1024)
    (tmp_path / "scratch").mkdir(exist_ok=True)
    job = SimpleNamespace(
        plan=plan, owner=SimpleNamespace(rank=rank), n_neighbours=1, lockstep=None
    )
    commits = SimpleNamespace(publisher=FilePublisher(tmp_path / "scratch"))
    return job, SimpleNamespace(pending=lambda: pending, commits=commits)


def settle(monkeypatch, job, queue, measured, stopping=lambda: False):
    monkeypatch.setattr(batch_size, "try_batches", lambda *args: measured.pop())
    return resolve_batch_tokens(job, queue, None, None, stopping).batch.batch_tokens


def test_rank_0_measures_once_and_later_starts_reuse_it(inputs, tmp_path, monkeypatch, capsys):
    measured = [trials_of(100, 200)]
    for rank in (0, 0, 1):
        assert settle(monkeypatch, *waiting_rank(inputs, tmp_path, rank), measured) == 48
    assert measured == []
    assert "batches       48 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / BATCH_FILE).read_text())["trials"][1]["tokens"] == 48


def test_first_published_measurement_wins(inputs, tmp_path, monkeypatch):
    def slower(*args):
        (tmp_path / BATCH_FILE).write_text('{"batch_tokens": 777}')
        return trials_of(100)

    monkeypatch.setattr(batch_size, "try_batches", slower)
    job, queue = waiting_rank(inputs, tmp_path, 0)
    assert resolve_batch_tokens(job, queue, None, None, lambda: False).batch.batch_tokens == 777


def test_other_ranks_stop_waiting_when_stopped_or_without_units(inputs, tmp_path, monkeypatch):
    nothing_left = waiting_rank(inputs, tmp_path, 1, pending=())
    assert settle(monkeypatch, *nothing_left, []) == 24
    assert settle(monkeypatch, *waiting_rank(inputs, tmp_path, 1), [], stopping=lambda: True) == 24
    monkeypatch.setattr(batch_size, "WAIT_FOR_RANK_0_S", 0.0)
    assert settle(monkeypatch, *waiting_rank(inputs, tmp_path, 1), [trials_of(100, 200)]) == 48


def test_auto_gives_the_bits_of_a_job_with_the_measured_number(inputs, tmp_path):
    run_job(2, **inputs, output_dir=tmp_path / "auto", batch_tokens="auto")
    number = recorded_batch_tokens(tmp_path / "auto")
    assert json.loads((tmp_path / "auto/run_config.json").read_text())["batch_tokens"] == "auto"
    run_job(1, **inputs, output_dir=tmp_path / "told", batch_tokens=number)
    assert not (tmp_path / "told" / BATCH_FILE).exists()
    assert_same_bits(tmp_path / "auto", tmp_path / "told")
