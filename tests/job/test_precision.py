"""The job reports how far its precision is from float32, and warns if it breaks down."""

import numpy as np
import pytest
import torch
from helpers.jobs import run_job
from helpers.models import VOCAB, make_model, small_model
from helpers.outputs import SETTINGS

from gradproj.engine.batching import BatchConfig
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.job import precision
from gradproj.job.precision import check_precision
from gradproj.job.unit_reader import PreparedUnit
from gradproj.model.sequences import TokenSequence

BATCH = BatchConfig(max_length=64)


def unit_of(lengths):
    generator = np.random.default_rng(0)
    sequences = [
        TokenSequence.of(generator.integers(3, VOCAB, n), owner=number)
        for number, n in enumerate(lengths)
    ]
    return PreparedUnit(0, 0, {}, sequences, [])


def checked(model, unit):
    model = model.bfloat16().requires_grad_(False)
    with GradProjLoraEngine(
        model, "mlp,attn", freeze_weights=True, token_covariances=True
    ) as engine:
        result = check_precision(model, engine, unit, BATCH)
        assert engine.take_token_covariances().n_tokens == 0
    return result


def calm_model():
    model = small_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2 if parameter.dim() >= 2 else 1)
    return model


def sharp_model():
    """Attention logits so large that their rounding turns one token's attention into another's."""
    model = calm_model()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(300)
            block.self_attn.k_proj.weight.mul_(300)
    return model


def test_sound_model_has_one_line_and_no_warning():
    line, warning = checked(calm_model(), unit_of([20, 30, 9, 40, 50]))
    assert not warning
    assert float(line.split()[6]) > 0.999
    assert line.endswith("of 4 documents")


def test_failing_model_is_a_warning_with_figure_and_way_out():
    line, warning = checked(sharp_model(), unit_of([20, 30, 9, 40, 50]))
    assert warning
    assert line.startswith("bfloat16 rows have a cosine of 0.")
    assert "bfloat16 breaks down in this model. See python -m gradproj diagnose" in line
    assert line.endswith("or give --model_dtype float32")


def test_rows_not_finite_in_bfloat16_only_are_a_warning():
    model = calm_model()
    inner = model.model.norm.forward
    model.model.norm.forward = lambda x: (
        inner(x) * (torch.inf if model.model.norm.weight.dtype == torch.bfloat16 else 1)
    )
    line, warning = checked(model, unit_of([20, 30]))
    assert warning
    assert line.startswith(
        "2 of 2 bfloat16 rows are not finite, in float32 they are: bfloat16 breaks down"
    )


def test_precision_check_restores_the_models_bits():
    model = sharp_model().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checked(model, unit_of([20]))
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before[name])


def test_precision_check_names_diagnose_when_float32_does_not_fit(monkeypatch):
    monkeypatch.setattr(precision, "available_host_bytes", lambda: 1000)
    line, warning = checked(calm_model(), unit_of([20]))
    assert (line, warning) == (
        "bfloat16 is not checked: no memory for float32 weights; "
        "python -m gradproj diagnose does it",
        False,
    )


def test_documents_without_rows_are_not_checked():
    assert checked(calm_model(), unit_of([])) == (
        "bfloat16 is not checked: the first documents make no row",
        False,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_job_reports_precision_once_and_only_for_a_lower_one(dtype, job, tmp_path):
    model = make_model(tmp_path / "sharp", initializer_range=1.0)
    settings = {**SETTINGS, "shards": job.corpus, "model": model, "model_dtype": dtype}
    done = run_job(1, output_dir=tmp_path / "out", **settings)
    warnings = done.stderr.count("bfloat16 breaks down in this model")
    assert warnings == (1 if dtype == "bfloat16" else 0)
    assert ("\nWARNING: " in f"\n{done.stderr}") == (dtype == "bfloat16")
