"""Quantized checkpoints: rows of layers that stay packed, what is dequantized, what is refused."""

import sys

import pytest
import torch
from helpers.models import make_model, ragged_batch
from helpers.quantized import (
    PACKED,
    SIZES,
    TORCHAO,
    library_config,
    quantize,
    quantize_fp8,
    with_settings,
    write_gguf,
)
from helpers.references import relative_error, sample_loss
from torch import nn
from transformers import AutoModelForCausalLM

from gradproj import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.projection import ProjectionConfig, place_widths
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError, ModelError
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import (
    load_model,
    load_model_config,
    load_tokenizer,
    loading_notes,
    model_skeleton,
)
from gradproj.model.quantized import PackedLinear

CPU = torch.device("cpu")
CONFIG = ProjectionConfig(layers="mlp,attn", rank_total=24, rank_min=2)
LENGTHS = [17, 9, 17]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("plain") / "model", **SIZES)


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="the quantized extra is not installed")


def files_of(path, **options):
    return fetch(ModelConfig(model=str(path), **options))


def rows_of(model):
    ids, labels = ragged_batch(LENGTHS)
    engine = GradProjLoraEngine.from_config(model, CONFIG)
    with engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        return engine, engine.collect_batch()


def dequantized_by_library(folder):
    """Return the model as its library dequantizes it, in float32, without gradproj."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}
    )
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if type(weight).__module__.startswith("torchao"):
            module.weight = nn.Parameter(weight.dequantize().float())
    return model if any_torchao(folder) else model.dequantize(torch.float32).float()


def any_torchao(folder):
    return "torchao" in (folder / "config.json").read_text()


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """Return ``folder(kind)``; each checkpoint is made once. Skips without its library."""
    made = {}

    def folder(kind):
        library = "torchao" if kind in TORCHAO else "bitsandbytes"
        pytest.importorskip(library, reason="the quantized extra is not installed")
        if kind not in made:
            source, of = plain, kind
            if kind == "GPT-2 nf4":  # its layers are transformers' Conv1D
                source, of = make_model(tmp_path_factory.mktemp("gpt2"), "gpt2", n_embd=64), "nf4"
            made[kind] = quantize(source, tmp_path_factory.mktemp("quantized") / "model", of)
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", [*PACKED, "GPT-2 nf4", *TORCHAO])
def test_rows_of_packed_layers_are_those_of_the_dequantized_model_by_autograd(kind, quantized):
    folder = quantized(kind)
    files = files_of(folder)
    model = load_model(files, CPU)
    packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    engine, rows = rows_of(model)
    assert packed == [target.name for target in engine.targets]
    assert widths_of(model_skeleton(files)) == widths_of(model)
    reference, ids = dequantized_by_library(folder), ragged_batch(LENGTHS)[0]
    weights = [reference.get_submodule(name).weight.requires_grad_() for name in packed]
    for n, length in enumerate(LENGTHS):
        gradients = torch.autograd.grad(sample_loss(reference, ids[n, :length]), weights)
        matrices = engine.projection_matrices.values()
        want = [
            (p_o.double() @ gradient.double() @ p_i.double().T).flatten()
            for gradient, (p_i, p_o) in zip(gradients, matrices, strict=True)
        ]
        assert relative_error(rows[n], torch.cat(want)) < 1e-5


def widths_of(model):
    return [(t.name, t.widths) for t in find_layers(model, CONFIG.patterns)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "Int8WeightOnly"])
def test_dequantized_on_load_has_the_same_rows_in_more_memory(kind, dtype, quantized):
    rows, sizes, dtypes = [], [], set()
    for dequantize in (False, True):
        files = files_of(quantized(kind), dequantize=dequantize, model_dtype=dtype)
        model = load_model(files, CPU)
        assert ("stay packed" in loading_notes(files)[0]) is not dequantize
        sizes.append(sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
        dtypes |= {p.dtype for p in model.parameters()}
        rows.append(rows_of(model)[1])
    assert torch.equal(*rows)
    assert sizes[0] < 0.85 * sizes[1]
    assert dtypes == {getattr(torch, dtype)}


def test_model_that_uses_a_packed_weight_in_another_way_is_refused(quantized):
    model = load_model(files_of(quantized("nf4")), CPU)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + (x @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
    with pytest.raises(ModelError, match=r"uses the weight of .*layers.0.mlp.up_proj.*another way"):
        rows_of(model)
