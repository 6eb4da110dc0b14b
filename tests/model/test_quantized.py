"""Quantized checkpoints: rows of layers that stay packed, what is dequantized, what is refused."""

import importlib.util
import re
import shutil

import pytest
import torch
from helpers.models import make_model, ragged_batch
from helpers.quantized import (
    PACKED,
    SIZES,
    TORCHAO,
    quantize,
    quantize_fp8,
    with_settings,
    write_gguf,
)
from helpers.references import relative_error, sample_loss
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gradproj import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.selection import find_layers
from gradproj.engine.sharded_blocks import load_in_blocks
from gradproj.errors import ConfigError, ModelError
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import (
    load_model,
    load_model_config,
    load_shards,
    loading_notes,
    model_quantization,
    model_skeleton,
)
from gradproj.model.packed_layers import PackedLinear, pack_quantized
from gradproj.model.quantized import packed_bytes
from gradproj.model.tokenizer_loading import load_tokenizer

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
    for module in list(model.modules()):
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


def test_model_of_ones_own_is_packed_in_place(quantized):
    theirs = AutoModelForCausalLM.from_pretrained(quantized("nf4"), device_map={"": "cpu"})
    with pytest.raises(ModelError, match="cannot project"):
        rows_of(theirs)
    want = rows_of(load_model(files_of(quantized("nf4")), CPU))[1]
    assert torch.equal(rows_of(pack_quantized(theirs))[1], want)


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
        if not dequantize:
            form = model_quantization(files), getattr(torch, dtype)
            assert abs(packed_bytes(model_skeleton(files), *form) / sizes[0] - 1) < 0.15
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


def cosines(path, plain, **options):
    """Return the cosines of three documents' rows with those of the model before quantization."""
    rows, want = (
        rows_of(load_model(files, CPU))[1] for files in (files_of(path, **options), files_of(plain))
    )
    return torch.cosine_similarity(rows, want)


@pytest.mark.parametrize(("kind", "least"), [("nf4", 0.9), ("fp4", 0.8), ("int8", 0.999)])
def test_checkpoint_quantized_on_load_has_the_rows_of_one_that_its_library_quantized(
    kind, least, plain, quantized
):
    files = files_of(plain, quantize=kind)
    theirs = load_model(files_of(quantized(kind)), CPU)
    assert f"to bitsandbytes {kind}, on load" in loading_notes(files)[0]
    model = load_model(files, CPU)
    assert torch.equal(rows_of(model)[1], rows_of(theirs)[1])
    low = load_model(files_of(plain, quantize=kind, model_dtype="bfloat16"), CPU)
    names = ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj")
    assert all(torch.equal(*(m.get_submodule(n).weight for m in (low, model))) for n in names)
    assert low.get_input_embeddings().weight.dtype == torch.bfloat16
    assert cosines(plain, plain, quantize=kind).min() > least


@pytest.mark.parametrize(("kind", "least"), [("F32", 1 - 1e-5), ("Q8_0", 0.999), ("Q4_0", 0.8)])
def test_gguf_file_is_a_model_with_its_tokenizer(kind, least, plain, tmp_path):
    pytest.importorskip("gguf", reason="the quantized extra is not installed")
    path = write_gguf(plain, tmp_path / "model.gguf", kind)
    files = files_of(path)
    assert loading_notes(files) == ["quantized     GGUF: weights are dequantized on load"]
    tokenizer, theirs = (load_tokenizer(each) for each in (files, files_of(plain)))
    assert tokenizer("the of and to in").input_ids == theirs("the of and to in").input_ids
    assert load_model_config(files).vocab_size == load_model_config(files_of(plain)).vocab_size
    assert widths_of(model_skeleton(files)) == widths_of(load_model(files, CPU))
    assert cosines(path, plain).min() > least


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_dequantized_to_its_exact_values(dtype, plain, tmp_path):
    exact = quantize_fp8(plain, tmp_path / "fp8")
    files = files_of(tmp_path / "fp8", model_dtype=dtype)
    assert loading_notes(files) == ["quantized     fp8: weights are dequantized on load"]
    found = dict(load_model(files, CPU).named_parameters())
    assert found.keys() == exact.keys()
    for name, weight in found.items():
        assert weight.dtype == getattr(torch, dtype)
        # From float8 to bfloat16 transformers rounds the scale first.
        torch.testing.assert_close(weight.float(), exact[name], rtol=1e-2, atol=0)
        assert dtype == "bfloat16" or torch.equal(weight, exact[name])


def test_fp8_weights_that_do_not_come_out_even_in_blocks_are_refused(plain, tmp_path):
    quantize_fp8(plain, tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    tensors, name = load_file(path), "model.layers.0.mlp.up_proj.weight"
    # 100 rows have four scales, of 32 rows each but the last: not of 25, as transformers reads it.
    tensors[name] = tensors[name].view(torch.uint8)[:100].view(torch.float8_e4m3fn)
    assert len(tensors[f"{name}_scale_inv"]) == 4
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{re.escape(name)} \(100, 64\) .* blocks of \(32, 32\)"):
        load_model(files_of(tmp_path / "fp8"), CPU)


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_on_a_packed_base_has_the_rows_of_one_on_the_dequantized_base(
    dora, quantized, tmp_path
):
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    base = AutoModelForCausalLM.from_pretrained(quantized("nf4"), device_map={"": "cpu"})
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=False,
        use_dora=dora,
    )
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    engines, rows = [], []
    for dequantize in (False, True):
        files = files_of(tmp_path / "adapter", dequantize=dequantize)
        assert loading_notes(files)[0].startswith("quantized     bitsandbytes nf4")
        engine, of_it = rows_of(load_model(files, CPU))
        engines.append(engine)
        rows.append(of_it)
    names = [target.name for target in engines[0].targets]
    assert "model.layers.0.self_attn.q_proj.base_layer" in names
    assert "model.layers.0.self_attn.q_proj.lora_A.default" in names
    assert torch.equal(*rows)
    merged = load_model(files_of(tmp_path / "adapter"), CPU, merged=True)
    assert not any(isinstance(module, PackedLinear) for module in merged.modules())


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            {},
            "by gptq.*cannot dequantize.*--quantize",
        ),
        ({"load_in_4bit": True}, {"quantize": "int8"}, r"quantized already \(bitsandbytes fp4\)"),
        ({"quant_method": "unheard"}, {}, "quantized by unheard.*save a dequantized copy"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_a_way_out(
    settings, options, message, plain, tmp_path
):
    folder = with_settings(plain, tmp_path / "model", settings)
    shutil.copy(plain / "model.safetensors", folder)
    with pytest.raises(ModelError, match=message):
        loading_notes(files_of(folder, **options))


@pytest.mark.parametrize(
    ("package", "name", "options"),
    [
        ("bitsandbytes", "nf4", {}),
        ("bitsandbytes", "model", {"quantize": "nf4"}),
        ("gguf", "model.gguf", {}),
    ],
)
def test_missing_package_is_named_with_the_extra(
    package, name, options, plain, tmp_path, monkeypatch
):
    shutil.copytree(plain, tmp_path / "model")
    with_settings(plain, tmp_path / "nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    shutil.copy(plain / "model.safetensors", tmp_path / "nf4")
    (tmp_path / "model.gguf").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(ModelError, match=rf"{package}, which is not.*'gradproj\[quantized\]'"):
        loading_notes(files_of(tmp_path / name, **options))


def test_shares_of_a_dequantized_model_are_those_of_its_values(plain, tmp_path):
    exact = quantize_fp8(plain, tmp_path / "fp8")
    _, shards = load_shards(files_of(tmp_path / "fp8"), 0, 1, CPU)
    shared = {
        weight.name: weight.view(share)
        for block, share in zip(shards.blocks, shards.shares, strict=True)
        for weight in block.weights
    }
    assert "model.layers.1.mlp.up_proj.weight" in shared
    assert all(torch.equal(value, exact[name]) for name, value in shared.items())


@pytest.mark.parametrize("kind", ["nf4", "int8", *TORCHAO[:1]])
def test_packed_weights_are_fetched_in_blocks_as_they_are(kind, quantized):
    files = files_of(quantized(kind))
    model, blocks = load_in_blocks(files, CPU, None)
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed == {
        weight.name.rpartition(".")[0]
        for block in blocks._blocks
        for weight in block.weights
        if ".packed_" in weight.name
    }
    # A weight is unpacked into new memory, whose place may change a sum's rounding.
    assert relative_error(rows_of(model)[1], rows_of(load_model(files, CPU))[1]) < 1e-5


def test_random_weights_are_not_quantized(plain):
    with pytest.raises(ConfigError, match="--quantize nf4 is for the weights of a checkpoint"):
        ModelConfig(model=str(plain), init="random", quantize="nf4")


def test_path_that_is_no_gguf_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"absent\.gguf: no such file"):
        files_of(tmp_path / "absent.gguf")
