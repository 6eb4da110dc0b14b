"""Causal attention in bfloat16 on a CPU, against torch's own in float32."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import FAMILIES, ragged_batch, small_model
from helpers.references import relative_error
from torch import nn
from transformers import AttentionInterface, FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.frozen_model import FrozenModel
from gradproj.engine.loss import per_sample_loss
from gradproj.kernels import cpu_attention
from gradproj.kernels.cpu_attention import ATTENDS, SDPA, attend


def tensors(length, heads=4, key_heads=4, n=2, width=8):
    """Query, key and value as models hand them over: a transposed view each."""
    torch.manual_seed(0)
    return [
        torch.randn(n, length, h, width).bfloat16().transpose(1, 2).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def layer():
    module = nn.Module()
    setattr(module, ATTENDS, True)
    return module


def with_gradients(out, inputs):
    torch.manual_seed(1)
    weights = torch.randn(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_output_and_gradients_match_exact_attention(length, key_heads, scaling):
    inputs = tensors(length, key_heads=key_heads)
    got = with_gradients(attend(layer(), *inputs, None, scaling=scaling)[0], inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = F.scaled_dot_product_attention(*exact, is_causal=True, scale=scaling, enable_gqa=True)
    want = with_gradients(out.transpose(1, 2), exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        # With one token the gradients of query and key are zero up to the output's rounding.
        assert (a.double() - b).norm() <= 0.01 * max(b.norm(), want[0].norm())


@pytest.mark.parametrize(
    "settings",
    [
        {"is_causal": False},
        {"dropout": 0.5},
        {"attention_mask": torch.zeros(70, 70).bfloat16()},
        {"dtype": torch.float32},
    ],
    ids=["not-causal", "dropout", "mask", "float32"],
)
def test_other_attention_is_left_to_transformers(settings, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_Causal", None)
    dtype = settings.pop("dtype", torch.bfloat16)
    mask = settings.pop("attention_mask", None)
    inputs = [x.to(dtype) for x in tensors(70)]
    outs = []
    for function in (attend, sdpa_attention_forward):
        torch.manual_seed(2)
        outs.append(function(layer(), *inputs, mask, **settings)[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_every_family_are_as_accurate_as_with_torchs_attention(family, monkeypatch):
    ids, labels = ragged_batch([40, 23])
    batch = {"input_ids": ids, "labels": labels}

    def rows(dtype):
        model = small_model(family).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.3 if parameter.dim() >= 2 else 1)
        with GradProjLoraEngine(model, freeze_weights=True) as engine:
            per_sample_loss(model, batch).sum().backward()
            return engine.collect_batch()

    exact, ours = rows(torch.float32), rows(torch.bfloat16)
    monkeypatch.setattr("gradproj.engine.frozen_model.fits", lambda parameter: False)
    torchs = rows(torch.bfloat16)
    assert relative_error(ours, exact) <= 1.3 * relative_error(torchs, exact) + 1e-3


def test_frozen_model_uses_it_in_bfloat16_only_and_restores_transformers():
    registered = AttentionInterface()["sdpa"]
    for dtype, expected in ((torch.bfloat16, True), (torch.float32, False)):
        model = small_model("llama").to(dtype)
        before = [sorted(vars(part)) for part in model.modules()]
        frozen = FrozenModel(model)
        assert AttentionInterface()["sdpa"] is (attend if expected else registered)
        assert all(getattr(part, ATTENDS, False) == expected for part in model.modules())
        assert model.config._attn_implementation == "sdpa"
        frozen.undo()
        assert AttentionInterface()["sdpa"] is registered
        assert [sorted(vars(part)) for part in model.modules()] == before


def test_sdpa_is_restored_when_the_last_of_two_models_is_unfrozen():
    registered = AttentionInterface()["sdpa"]
    first, second = (FrozenModel(small_model("llama").bfloat16()) for _ in range(2))
    first.undo()
    first.undo()  # twice does no harm
    assert AttentionInterface()["sdpa"] is attend
    second.undo()
    assert AttentionInterface()["sdpa"] is registered


def test_sdpa_wrapped_by_another_library_does_not_recurse():
    registered = AttentionInterface()["sdpa"]
    inputs = [x.float() for x in tensors(5)]
    expected = registered(layer(), *inputs, None)[0]
    SDPA.begin()
    AttentionInterface.register("sdpa", lambda *args, **settings: attend(*args, **settings))
    SDPA.end()
    for _ in range(2):
        SDPA.begin()
        assert torch.equal(AttentionInterface()["sdpa"](layer(), *inputs, None)[0], expected)
        SDPA.end()
    AttentionInterface.register("sdpa", registered)  # the wrapper is removed
    SDPA.begin()
    assert AttentionInterface()["sdpa"] is attend
    SDPA.end()
    assert AttentionInterface()["sdpa"] is registered


def test_falcon_attends_to_no_later_token_in_bfloat16():
    """Its attention compares the config's name of the implementation."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).bfloat16().eval()
    ids = torch.randint(3, 64, (1, 12))
    padded = torch.cat([ids, torch.full((1, 12), 5)], dim=1)
    with GradProjLoraEngine(model, "lm_head", freeze_weights=True) as engine:
        rows = []
        for batch in (ids, padded):
            labels = torch.full_like(batch, -100)
            labels[:, :12] = ids
            per_sample_loss(model, {"input_ids": batch, "labels": labels}).sum().backward()
            rows.append(engine.collect_batch())
    assert relative_error(rows[1], rows[0]) < 0.02
