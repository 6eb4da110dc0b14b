"""Blocks whose weights are fetched while they run, and shares of them."""

import copy

import pytest
import torch
from helpers.models import make_model, ragged_batch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from gradproj import GradProjLoraEngine, per_sample_loss
from gradproj.distributed.model_group import ModelGroup
from gradproj.engine.sharded_blocks import ShardedBlocks, copied, load_in_blocks
from gradproj.errors import Ended, ModelError
from gradproj.model.block_shards import BlockShards, blocks_of, placed_bytes
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model, load_shards
from gradproj.model.packed_layers import PackedLinear

CPU = torch.device("cpu")
IDS, LABELS = ragged_batch([12, 7, 9])
DEPTH = {"gpt2": "n_layer"}
"""Family -> its name for the number of layers, if it is unusual."""


def files_of(folder, family, **changes):
    changes |= {} if family == "zamba" else {DEPTH.get(family, "num_hidden_layers"): 5}
    return fetch(ModelConfig(model=str(make_model(folder, family, **changes))))


def rows_of(model, **settings):
    widths = {"proj_rank_total": 16, "proj_rank_min": 2, "freeze_weights": True}
    with GradProjLoraEngine(model, **widths, **settings) as engine:
        per_sample_loss(model, {"input_ids": IDS, "labels": LABELS}).sum().backward()
        return engine.collect_batch()


@pytest.mark.parametrize(
    "family",
    ["gpt2", "llama_tied", "gemma2", "zamba", "cohere", "falcon", "gpt_oss", "mamba2"],
)
def test_rows_have_the_bits_of_the_whole_model(tmp_path, family):
    files = files_of(tmp_path, family)
    whole, (fetched, blocks) = load_model(files, CPU), load_in_blocks(files, CPU, None)
    for checkpointing in (False, True):
        want = rows_of(whole, gradient_checkpointing=checkpointing)
        assert torch.equal(rows_of(fetched, gradient_checkpointing=checkpointing), want)
    placed = placed_bytes(whole, 1)
    assert blocks.n_bytes == placed.share + placed.buffers


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "zamba"])
def test_shares_are_the_checkpoint_whoever_put_them_together(tmp_path, family, n_ranks):
    files = files_of(tmp_path, family)
    whole = AutoModelForCausalLM.from_pretrained(files.model_dir)
    loaded = [load_shards(files, rank, n_ranks, CPU) for rank in range(n_ranks)]
    for model, shards in loaded:
        in_blocks = {weight.name for block in shards.blocks for weight in block.weights}
        assert in_blocks
        for name, weight in model.named_parameters():
            assert weight.is_meta == (name in in_blocks)
            assert weight.is_meta or torch.equal(weight, whole.get_parameter(name))
    placed, n_bytes = placed_bytes(whole, n_ranks), sum(w.nbytes for w in whole.parameters())
    assert placed.whole == n_bytes + sum(buffer.nbytes for buffer in whole.buffers())
    assert placed.share == sum(map(len, loaded[0][1].shares))
    assert 0 <= placed.rest + n_ranks * placed.share - placed.whole < 0.3 * placed.whole  # gaps
    for number, block in enumerate(loaded[0][1].blocks):
        content = torch.cat([shards.shares[number] for _, shards in loaded])
        assert len(content) == block.n_bytes
        for weight in block.weights:
            assert torch.equal(weight.view(content), whole.get_parameter(weight.name))


def packed(layer):
    """A layer that keeps whole numbers of its weight and a scale, as a quantized one does."""
    scale = layer.weight.abs().amax() / 127
    parts = {"codes": (layer.weight / scale).round().to(torch.int8), "scale": scale}
    shape = layer.out_features, layer.in_features
    return PackedLinear(shape, parts, lambda x: x["codes"] * x["scale"], layer.bias)


def test_weights_that_stay_packed_are_in_the_blocks(tmp_path):
    whole = load_model(files_of(tmp_path, "llama"), CPU)
    for name, layer in list(whole.model.named_modules()):
        if isinstance(layer, nn.Linear):
            whole.model.set_submodule(name, packed(layer))
    fetched = copy.deepcopy(whole)
    shards = BlockShards(blocks_of(fetched, 1), 0, 1, CPU)
    shards.take_from(fetched)
    assert fetched.model.layers[1].mlp.up_proj.packed_codes.is_meta
    ShardedBlocks(fetched, shards, CPU, copied)
    # A weight is unpacked into new memory, whose place may change a sum's rounding.
    got, want = rows_of(fetched), rows_of(whole)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("together", [True, False])
def test_a_failed_pass_is_not_followed_by_another_of_several_ranks(tmp_path, together):
    model, blocks = load_in_blocks(files_of(tmp_path, "llama"), CPU, None)
    want, blocks._together = model(IDS).logits, together

    def fail(*_):
        raise torch.OutOfMemoryError("none left")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(IDS)
    hook.remove()
    if not together:
        assert torch.equal(model(IDS).logits, want)
        return
    with pytest.raises(ModelError, match="too little memory in the checks at the start"):
        model(IDS)


def test_a_rank_that_is_lost_in_a_check_is_not_taken_for_its_answer(tmp_path, monkeypatch, capsys):
    model, blocks = load_in_blocks(files_of(tmp_path, "llama"), CPU, None)
    group = object.__new__(ModelGroup)
    group.rank, group.size, group.first, group.data = 0, 1, 0, None
    blocks._fetch = group.gather

    def lose(*args, **kwargs):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:29500")

    monkeypatch.setattr(torch.distributed, "broadcast", lose)
    with pytest.raises(Ended):
        GradProjLoraEngine(model, freeze_weights=True).attach()
    assert "another rank that shares a model with rank 0 has ended" in capsys.readouterr().err


def test_outputs_of_blocks_may_be_views_that_are_changed_in_place(tmp_path, monkeypatch):
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda *args, **kwargs: forward(*args, **kwargs)[..., :]
    )
    files = files_of(tmp_path, "llama")
    models = load_model(files, CPU), load_in_blocks(files, CPU, None)[0]
    for model in models:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: output.mul_(0.5))
    want, got = map(rows_of, models)
    assert torch.equal(got, want)


def test_blocks_that_run_in_parts_are_refused_by_name(tmp_path, monkeypatch):
    forward = LlamaModel.forward

    def changed(model, *args, **kwargs):
        model.layers[0].self_attn.q_proj(torch.ones(1, 1, 32))
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", changed)
    with pytest.raises(ModelError, match=r"model\.layers\.0 runs in parts \(Linear\)"):
        load_in_blocks(files_of(tmp_path, "llama"), CPU, None)


def test_passes_that_run_other_blocks_are_refused(tmp_path):
    model, blocks = load_in_blocks(files_of(tmp_path, "llama"), CPU, None)
    with torch.no_grad():
        for n_layers in (5, 3):
            model.model.config.num_hidden_layers = n_layers
            blocks.begin()
            model(IDS)
            if n_layers == 5:
                blocks.complete()
    with pytest.raises(ModelError, match="not run its blocks in the same order"):
        blocks.complete()


def test_a_model_without_marked_blocks_is_refused():
    with pytest.raises(ModelError, match="transformers marks no block of Sequential"):
        blocks_of(nn.Sequential(nn.Linear(2, 2)), 2)
