"""Shared weights, look-alikes of Linear, changes in place, tokens in another order."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import ragged_batch, small_model
from helpers.references import relative_error
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.layers import rule_for
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import MixedSamplesError, ModelError

LENGTHS = [9, 21, 2, 14]
ENGINE = {"proj_rank_total": 24, "proj_rank_min": 3, "freeze_weights": True}

_SIZES = dict(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_attention_heads=4, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
UNUSUAL = {
    # The attention and MLP of one block are used by another, by names of their own.
    "zamba": dict(
        num_hidden_layers=3, layers_block_type=["hybrid", "mamba", "hybrid"], n_mamba_heads=2,
        mamba_d_state=4, mamba_dt_rank=4, num_key_value_heads=4, attention_hidden_size=64,
        max_position_embeddings=64, use_mamba_kernels=False,
    ),
    "falcon": dict(num_hidden_layers=2, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    # Clamps the outputs of three target layers in place.
    "olmo": dict(num_hidden_layers=2, clip_qkv=0.5, max_position_embeddings=64),
    "olmoe": dict(num_hidden_layers=2, clip_qkv=0.5, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def unusual_model(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**_SIZES, **UNUSUAL[model_type])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    return model.eval()


def row_in_float64(model, engine, tokens):
    """Return a sample's row from whole weight gradients by autograd, in a model of its own."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    model.set_experts_implementation("eager")  # the grouped products take no float64
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    F.cross_entropy(logits[:-1].double(), tokens[1:], reduction="sum").backward()
    parts = []
    for name, (p_i, p_o) in engine.projection_matrices.items():
        gradient = model.get_submodule(name).weight.grad
        parts.append((p_o.double() @ gradient @ p_i.double().T).flatten())
    return torch.cat(parts)


def rows_of(model, ids, labels, **options):
    with GradProjLoraEngine(model, **{**ENGINE, **options}) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        return engine.collect_batch(), engine


def assert_rows_are_autograds(model, **options):
    ids, labels = ragged_batch(LENGTHS)
    before = copy.deepcopy(model)
    rows, engine = rows_of(model, ids, labels, **options)
    for n, length in enumerate(LENGTHS):
        want = row_in_float64(before, engine, ids[n, :length])
        assert want.norm() > 0
        assert relative_error(rows[n], want) < 1e-5
    return engine


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("model_type", UNUSUAL)
def test_rows_of_unusual_models_are_autograds(model_type, freeze):
    layers = {"zamba": "attn,feed_forward", "olmoe": "attn"}.get(model_type, "mlp,attn")
    assert_rows_are_autograds(unusual_model(model_type), proj_layers=layers, freeze_weights=freeze)
