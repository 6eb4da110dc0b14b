"""Rows, matrices and peak memory on a GPU, compared with the CPU."""

import pytest
import torch
from helpers.models import FAMILIES, ragged_batch, small_model
from transformers import GPT2Config, GPT2LMHeadModel

from gradproj.engine.compile import check_compiler
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import ConfigError

pytestmark = pytest.mark.gpu

LENGTHS = [40, 33, 17, 9, 4, 2]
FLOAT32_ERROR = 1e-4
BFLOAT16_ERROR = 3e-2
"""Of rows in bfloat16 to those in float32, of models with weights as they start: 0.01 on a CPU."""


def rows_on(device, model, **settings):
    """``(rows, token covariances)`` of a ragged batch, on the host."""
    ids, labels = (x.to(device) for x in ragged_batch(LENGTHS))
    model = model.to(device)
    with GradProjLoraEngine(
        model, freeze_weights=True, token_covariances=True, **settings
    ) as engine:
        engine.set_token_mask(torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100)
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        rows, sums = engine.collect_batch().cpu(), engine.take_token_covariances()
    return rows, (sums.a.cpu(), sums.s.cpu(), sums.n_tokens.cpu())


def worst_error(got, want):
    """The largest ``|row - wanted| / |wanted|``."""
    got, want = got.double(), want.double()
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_equal_those_of_the_cpu(gpu, family):
    settings = {"include_embeddings": family != "opt"}
    rows, sums = rows_on(gpu, small_model(family), **settings)
    wanted, wanted_sums = rows_on("cpu", small_model(family), **settings)
    assert worst_error(rows, wanted) <= FLOAT32_ERROR
    for got, want in zip(sums[:2], wanted_sums[:2], strict=True):
        assert worst_error(got[None], want[None]) <= FLOAT32_ERROR
    assert sums[2] == wanted_sums[2] == sum(LENGTHS) - len(LENGTHS)


def usual_model(family):
    """Weights of the size that training starts with."""
    model = small_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.div_(5)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16_rows_are_near_float32_rows(gpu, family):
    rows, _ = rows_on(gpu, usual_model(family).to(torch.bfloat16))
    wanted, _ = rows_on("cpu", usual_model(family))
    assert worst_error(rows, wanted) <= BFLOAT16_ERROR


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_rows_equal_those_of_the_cpu(gpu, family):
    try:
        check_compiler("cuda")
    except ConfigError as error:
        pytest.skip(str(error))
    torch.compiler.reset()
    rows, sums = rows_on(gpu, small_model(family), compiled=True)
    wanted, wanted_sums = rows_on("cpu", small_model(family))
    assert worst_error(rows, wanted) <= FLOAT32_ERROR
    for got, want in zip(sums[:2], wanted_sums[:2], strict=True):
        assert worst_error(got[None], want[None]) <= FLOAT32_ERROR


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "orthonormal"])
def test_matrices_have_the_bits_of_the_cpu(gpu, kind):
    there = GradProjLoraEngine(small_model("llama").to(gpu), proj_kind=kind).projection_matrices
    here = GradProjLoraEngine(small_model("llama"), proj_kind=kind).projection_matrices
    assert list(there) == list(here)
    for name, pair in here.items():
        for on_gpu, on_cpu in zip(there[name], pair, strict=True):
            assert on_gpu.device == gpu
            assert torch.equal(on_gpu.cpu(), on_cpu)


def test_rows_take_half_the_memory_of_the_bare_backward_pass(gpu, memory):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False).to(gpu)
    ids = torch.randint(0, model.config.vocab_size, (8, 512), device=gpu)

    def frozen_backward():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    def rows():
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()

    frozen_backward()  # libraries take their workspaces
    stock = memory.peak_of(frozen_backward)
    peaks = {}
    for checkpointing in (False, True):
        settings = {"freeze_weights": True, "token_covariances": True}
        with GradProjLoraEngine(model, gradient_checkpointing=checkpointing, **settings) as engine:
            rows()
            peaks[checkpointing] = memory.peak_of(rows)
    assert peaks[False] <= 0.5 * stock
    assert peaks[True] < peaks[False]
