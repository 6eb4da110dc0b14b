"""A unit through the engine: batches that do not fit, gradients that are not finite."""

import numpy as np
import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.faults import fake_owner
from helpers.jobs import flags
from helpers.models import make_model

from gradproj.coordinator.file_commits import FileCommits
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.partial_rows import PartialLog
from gradproj.engine import run_batch
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadBasis
from gradproj.engine.loss import per_sample_loss
from gradproj.job import unit_reader
from gradproj.job.config import run_config
from gradproj.job.head_sums import HeadSums
from gradproj.job.plan import make_plan
from gradproj.job.unit_projector import UnitProjector
from gradproj.job.unit_reader import UnitReader
from gradproj.job.unit_sums import UnitSums
from gradproj.kernels.memory import is_out_of_memory
from gradproj.model.loading import load_model
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store.layout import STATUS
from gradproj.store.row_encoder import RowEncoder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("projector")
    settings = {
        "shards": make_corpus(root / "tars", mixed_documents(16)),
        "model": make_model(root / "model"),
        "output_dir": root / "out",
        "proj_dtype": "float32",
        "long_documents": "windows",
        "max_length": 24,
        "batch_size": 6,
    }
    plan = make_plan(run_config(flags(**settings), "test"), progress=False)
    model = load_model(plan.files, torch.device("cpu"))
    return plan, model, UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)


def test_token_ids_are_held_in_parts_as_texts_are(parts, tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "tars", [{"input_ids": [5] * 9}] * 8)
    files = {"shards": corpus, "model": parts[0].config.model.model, "output_dir": tmp_path / "out"}
    plan = make_plan(run_config(flags(**files), "test"), progress=False)
    reader, held = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings), []
    tokenize = reader._tokenize
    monkeypatch.setattr(reader, "_tokenize", lambda d: held.append(len(d)) or tokenize(d))
    monkeypatch.setattr(unit_reader, "_CHARACTERS_AT_ONCE", 20)
    assert len(reader.read(0).sequences) == 8
    assert held == [3, 3, 2]


def project(parts, tmp_path, head=None):
    plan, model, reader = parts
    with GradProjLoraEngine.from_config(model, plan.config.projection) as engine:
        encoder = RowEncoder(plan.layout, plan.layers)
        unit = UnitProjector(model, engine, plan.unit_settings, encoder, RankProgress(), head=head)
        partial = PartialLog(tmp_path / "partial", FileCommits(tmp_path, fake_owner(0)), "key")
        return unit.project(reader.read(0), partial).on_host()


def loss_that_fails(most, after_backward=False, message="out of memory"):
    """``per_sample_loss`` on a device that runs out of memory above ``most`` sequences."""

    def loss(model, batch, **options):
        ids = batch["input_ids"]
        if ids.shape[0] > most:
            if after_backward:
                per_sample_loss(model, batch, **options).sum().backward()
            raise torch.OutOfMemoryError(message)
        return per_sample_loss(model, batch, **options)

    return loss


@pytest.mark.parametrize("after_backward", [False, True])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_batch_is_halved_until_it_fits(parts, tmp_path, monkeypatch, most, after_backward):
    want = project(parts, tmp_path)
    monkeypatch.setattr(run_batch, "per_sample_loss", loss_that_fails(most, after_backward))
    got = project(parts, tmp_path)
    np.testing.assert_array_equal(got.record.columns["status"], want.record.columns["status"])
    np.testing.assert_allclose(got.stored, want.stored, rtol=1e-3, atol=1e-5)
    assert got.record.stats["covariance_tokens"] == want.record.stats["covariance_tokens"]
    for name in ("a", "s"):
        np.testing.assert_allclose(
            got.record.token_covariances[name],
            want.record.token_covariances[name],
            rtol=1e-3,
            atol=1e-3,
        )


def test_rows_are_summed_once_when_collecting_runs_out_of_memory(parts, tmp_path, monkeypatch):
    want = project(parts, tmp_path)
    collect, failed = GradProjLoraEngine.collect_batch, []

    def collect_once_too_much(self, *args):
        rows = collect(self, *args)
        if not failed:
            failed.append(True)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return rows

    monkeypatch.setattr(GradProjLoraEngine, "collect_batch", collect_once_too_much)
    got = project(parts, tmp_path)
    assert failed
    assert got.record.stats["covariance_tokens"] == want.record.stats["covariance_tokens"]
    np.testing.assert_allclose(got.stored, want.stored, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("failing", [(HeadSums, "_encode"), (UnitSums, "_finished")])
def test_rows_of_a_unit_with_head_rows_are_summed_once(parts, tmp_path, monkeypatch, failing, call):
    files = {"shards": parts[0].config.corpus.shards, "model": parts[0].config.model.model}
    files |= {"output_dir": tmp_path / "out", "max_length": 24, "batch_size": 6}
    form = {"long_documents": "windows", "proj_rank_total": 64, "head_rows": "4x4"}
    config = run_config(flags(**files, **form, dense_rows=False), "test")
    plan, model = make_plan(config, progress=False), parts[1]
    reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    torch.manual_seed(0)
    width = model.get_output_embeddings().in_features
    basis = HeadBasis(torch.randn(plan.head.k, width), torch.ones(plan.head.vocabulary))

    def rows():
        return project((plan, model, reader), tmp_path, (basis, plan.head))

    want, method, calls = rows(), getattr(*failing), []
    assert (want.record.columns["status"] == STATUS["ok"]).all()

    def fails_once(self, *args):
        calls.append(args)
        if len(calls) == call:
            raise torch.OutOfMemoryError("out of memory")
        return method(self, *args)

    monkeypatch.setattr(*failing, fails_once)
    got = rows()
    assert len(calls) > call
    for name in ("status", "loss", "grad_norm"):
        np.testing.assert_allclose(got.record.columns[name], want.record.columns[name], rtol=1e-3)
    segment = slice(plan.head.stored_start, plan.head.stored_end)
    # Values near zero and between two steps of a scale may fall on either side.
    assert (got.stored != want.stored).mean() < 0.02
    assert (got.stored[:, segment] != want.stored[:, segment]).mean() < 0.02


def test_document_that_does_not_fit_alone_gets_status_7_and_others_their_rows(
    parts, tmp_path, monkeypatch
):
    want = project(parts, tmp_path)

    def loss(model, batch, **options):
        if batch["input_ids"].shape[1] == 24:
            raise torch.OutOfMemoryError("out of memory")
        return per_sample_loss(model, batch, **options)

    monkeypatch.setattr(run_batch, "per_sample_loss", loss)
    got = project(parts, tmp_path)
    failed = got.record.columns["status"] == STATUS["out_of_memory"]
    assert 0 < failed.sum() < 16
    assert np.isnan(got.stored[failed]).all()
    assert np.isnan(got.record.columns["loss"][failed]).all()
    np.testing.assert_allclose(got.stored[~failed], want.stored[~failed], rtol=1e-3, atol=1e-5)


def test_other_errors_are_not_treated_as_out_of_memory(parts, tmp_path, monkeypatch):
    def loss(model, batch, **options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(run_batch, "per_sample_loss", loss)
    with pytest.raises(RuntimeError, match="shapes differ"):
        project(parts, tmp_path)


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_out_of_memory_is_recognised_for_each_library(error, want):
    assert is_out_of_memory(error) is want


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_gives_a_nan_row_with_status_5(parts, tmp_path, monkeypatch, bad):
    want = project(parts, tmp_path)

    def loss(model, batch, **options):
        losses = per_sample_loss(model, batch, **options)
        weights = torch.ones_like(losses)
        weights[0] = bad
        return losses * weights

    monkeypatch.setattr(run_batch, "per_sample_loss", loss)
    got = project(parts, tmp_path)
    status = got.record.columns["status"]
    spoilt = status == STATUS["non_finite"]
    assert 0 < spoilt.sum() < 16
    assert np.isnan(got.stored[spoilt]).all()
    np.testing.assert_allclose(got.stored[~spoilt], want.stored[~spoilt], rtol=1e-3, atol=1e-5)
    assert np.isfinite(got.record.token_covariances["s"]).all()
