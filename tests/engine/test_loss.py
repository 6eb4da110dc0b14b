"""Targets, weights, masks, and models whose logits cannot be made in chunks."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.meta_device import META_DEVICE, waits_of
from helpers.models import FAMILIES, ragged_batch, small_model
from helpers.references import relative_error
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RemBertConfig,
    RemBertForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from gradproj.engine import loss
from gradproj.engine.batching import BatchConfig, collate, fit_padding, plan_batches
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import chunk_verdict, per_sample_loss
from gradproj.engine.run_batch import run_batch
from gradproj.engine.targets import count_targets
from gradproj.errors import ConfigError, ModelError
from gradproj.kernels import transformers_patches
from gradproj.kernels.chunked_cross_entropy import LogitsLoss
from gradproj.kernels.onednn import cache_bfloat16, project
from gradproj.model import properties
from gradproj.model.sequences import TokenSequence

ENGINE = {"proj_rank_total": 24, "proj_rank_min": 3, "freeze_weights": True}
LENGTHS = [9, 21, 2, 14]


def row_in_float64(model, engine, tokens, **inputs):
    """Return one sample's row by autograd in float64, in a copy of the model without gradproj."""
    model = copy.deepcopy(model).double().requires_grad_(True).eval()
    logits = model(input_ids=tokens[None], use_cache=False, **inputs).logits[0]
    weights = [model.get_submodule(target.name).weight for target in engine.targets]
    loss = F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
    row = []
    for target, gradient in zip(engine.targets, torch.autograd.grad(loss, weights), strict=True):
        p_i, p_o = (p.double() for p in engine.projection_matrices[target.name])
        out_by_in = gradient if target.rule.type_name == "Linear" else gradient.T
        row.append((p_o @ out_by_in @ p_i.T).flatten())
    return torch.cat(row)


def test_sample_whose_loss_has_the_weight_0_has_a_zero_row_and_is_in_no_sum():
    model = small_model("llama")
    ids, labels = ragged_batch(LENGTHS)
    mask = labels != -100
    with GradProjLoraEngine(model, **ENGINE, token_covariances=True) as engine:
        engine.set_token_mask(mask)
        losses = per_sample_loss(model, {"input_ids": ids, "labels": labels})
        (losses * torch.tensor([2.0, 0.0, 1.0, 0.5])).sum().backward()
        rows, sums = engine.collect_batch(), engine.take_token_covariances()
        others = [0, 2, 3]
        engine.set_token_mask(mask[others])
        per_sample_loss(
            model, {"input_ids": ids[others], "labels": labels[others]}
        ).sum().backward()
        engine.collect_batch()
        expected = engine.take_token_covariances()
    assert not rows[1].any()
    for n in others:
        want = row_in_float64(model, engine, ids[n, : LENGTHS[n]])
        assert relative_error(rows[n], want) < 1e-5
    assert sums.n_tokens == expected.n_tokens
    assert relative_error(sums.a, expected.a) < 1e-5
    assert relative_error(sums.s, expected.s) < 1e-5


# --- masks, positions and other keys ---


def left_padded(lengths):
    """Return ids, attention mask and position ids of a left-padded batch, and its samples."""
    ids, _ = ragged_batch(lengths)
    samples = [ids[n, :length] for n, length in enumerate(lengths)]
    width = ids.shape[1]
    padded, mask = torch.full_like(ids, 5), torch.zeros_like(ids)
    for n, tokens in enumerate(samples):
        padded[n, width - len(tokens) :] = tokens
        mask[n, width - len(tokens) :] = 1
    return padded, mask, (mask.cumsum(1) - 1).clamp_min(0), samples


@pytest.mark.parametrize("given", [(), ("labels",), ("position_ids",), ("position_ids", "labels")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_left_padded_batch_gives_the_rows_of_the_samples_alone(family, given):
    model = small_model(family)
    ids, mask, positions, samples = left_padded(LENGTHS)
    more = {"position_ids": positions, "labels": ids.masked_fill(mask == 0, -100)}
    batch = {"input_ids": ids, "attention_mask": mask} | {key: more[key] for key in given}
    with GradProjLoraEngine(model, **ENGINE) as engine:
        losses = per_sample_loss(model, batch)
        losses.sum().backward()
        rows = engine.collect_batch()
    for n, tokens in enumerate(samples):
        assert relative_error(rows[n], row_in_float64(model, engine, tokens)) < 1e-5
        alone = per_sample_loss(model, tokens[None])
        torch.testing.assert_close(losses[n], alone[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_positions_counted_from_the_mask_are_exact_in_float64(family, chunked):
    model = small_model(family).double().requires_grad_(False)
    ids, mask, _, samples = left_padded(LENGTHS)
    weight = [p for p in model.base_model.parameters() if p.dim() == 2][-1].requires_grad_(True)
    for n, tokens in enumerate(samples):
        batch = {"input_ids": ids, "attention_mask": mask}
        losses = per_sample_loss(model, batch, chunked=chunked)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        want = F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        row, alone = (torch.autograd.grad(x, weight)[0] for x in (losses[n], want))
        assert relative_error(row, alone) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_padding_on_the_right_and_gaps_keep_the_models_own_positions(family, monkeypatch):
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    mask = (labels != -100).long()
    mask[1, 3] = 0

    def rows():
        with GradProjLoraEngine(model, **ENGINE) as engine:
            batch = {"input_ids": ids, "attention_mask": mask}
            per_sample_loss(model, batch).sum().backward()
            return engine.collect_batch()

    ours = rows()
    monkeypatch.setattr(loss, "counts_padding", lambda model: False)
    assert torch.equal(ours, rows())


def test_models_that_count_padding_on_the_left():
    counts = {family: properties.counts_padding(small_model(family)) for family in FAMILIES}
    assert [family for family in counts if not counts[family]] == ["opt"]  # from its mask
    shape = dict(vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(intermediate_size=48, is_decoder=True)
    for pad in (0, 1):  # they count from the padding token's id on
        roberta = RobertaForCausalLM(RobertaConfig(**shape, pad_token_id=pad))
        assert not properties.counts_padding(roberta)
    bloom = BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    assert not properties.counts_padding(BloomForCausalLM(bloom))  # takes no position ids


class NamelessGPT2(nn.Module):
    """A model that does not say which of its modules is the embedding."""

    def __init__(self):
        super().__init__()
        self.inside = small_model("gpt2")

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        return self.inside(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )


def test_left_padded_batch_of_a_model_that_names_no_embedding():
    model = NamelessGPT2().eval()
    ids, mask, _, samples = left_padded(LENGTHS)
    losses = per_sample_loss(model, {"input_ids": ids, "attention_mask": mask})
    for n, tokens in enumerate(samples):
        alone = per_sample_loss(model, tokens[None])
        torch.testing.assert_close(losses[n], alone[0], rtol=1e-5, atol=0)


def test_left_padding_of_a_model_without_position_ids_is_refused():
    config = BartConfig(
        vocab_size=101, d_model=32, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=48, max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForCausalLM(config).eval()
    ids, mask, _, _ = left_padded(LENGTHS)
    with pytest.raises(ConfigError, match=r"BartForCausalLM computes.*on the right"):
        per_sample_loss(model, {"input_ids": ids, "attention_mask": mask})
    right = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    losses = per_sample_loss(model, right)
    for n, length in enumerate(LENGTHS):
        alone = per_sample_loss(model, right["input_ids"][n : n + 1, :length])
        torch.testing.assert_close(losses[n : n + 1], alone, rtol=1e-5, atol=1e-5)


def test_left_padded_batch_does_not_wait_for_its_device(monkeypatch):
    # Eager: for SDPA transformers itself asks the device whether the mask hides anything.
    model = small_model("gpt2", attn_implementation="eager").requires_grad_(False).to(META_DEVICE)
    monkeypatch.setattr(loss, "counts_padding", lambda model: True)  # measured before
    ids, mask, _, _ = left_padded(LENGTHS)
    targets = loss.Targets.from_labels(ids, mask)
    on_device = loss.Targets(targets.positions.to("meta"), targets.tokens.to("meta"))
    batch = {"input_ids": ids.to("meta"), "attention_mask": mask.to("meta"), "targets": on_device}
    shifted = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, inputs: shifted.append("position_ids" in inputs), with_kwargs=True
    )
    waits = waits_of(lambda: per_sample_loss(model, batch, chunked=True, causal=False))
    assert shifted == [True]
    # Older releases of transformers make a number for the mask on the host.
    inputs = {"input_ids": ids.to("meta"), "attention_mask": mask.to("meta")}
    positions = torch.zeros_like(inputs["input_ids"])
    assert waits == waits_of(lambda: model(**inputs, position_ids=positions, use_cache=False))


def test_rows_are_searched_for_packed_sequences_only_with_the_callers_position_ids():
    model, searched = small_model("gpt2"), []
    ids, mask, positions, _ = left_padded(LENGTHS)
    model.transformer.register_forward_pre_hook(
        lambda *_: searched.append(not transformers_patches._STATE.one_sequence_a_row)
    )
    batch = {"input_ids": ids, "attention_mask": mask}
    per_sample_loss(model, batch)
    assert not searched[-1]
    per_sample_loss(model, batch | {"position_ids": positions})
    assert searched[-1]


def test_targets_that_the_mask_hides_are_not_counted():
    model = small_model("llama")
    ids, mask, _, samples = left_padded(LENGTHS)
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    per_sample_loss(model, batch).sum().backward()
    assert count_targets(model, labels).tolist() == [len(tokens) - 1 for tokens in samples]
    elsewhere = labels.to("meta")  # only their number is read
    assert count_targets(model, elsewhere).tolist() == [len(tokens) - 1 for tokens in samples]


def test_position_ids_reach_the_model_in_both_ways_to_the_logits():
    model = small_model("gpt2").requires_grad_(False)
    ids, _ = ragged_batch([12, 12])
    positions = torch.arange(20, 32).expand(2, 12)
    for chunked in (True, False):
        losses = per_sample_loss(
            model, {"input_ids": ids, "position_ids": positions}, chunked=chunked
        )
        for n in range(2):
            logits = model(input_ids=ids[n : n + 1], position_ids=positions[:1]).logits[0]
            want = F.cross_entropy(logits[:-1], ids[n, 1:], reduction="sum")
            torch.testing.assert_close(losses[n], want, rtol=1e-5, atol=0)


def test_key_that_the_loss_would_ignore_is_rejected():
    model = small_model("llama")
    ids, _ = ragged_batch([9, 9])
    with pytest.raises(ConfigError, match="does not use sample_id: a batch has input_ids, atten"):
        per_sample_loss(model, {"input_ids": ids, "sample_id": torch.arange(2)})
    with pytest.raises(ConfigError, match=r"Llama.* takes no token_type_ids"):
        per_sample_loss(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    with pytest.raises(ConfigError, match="got no input_ids"):
        per_sample_loss(model, {"labels": ids})


def test_input_that_the_model_would_ignore_is_rejected():
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)).eval()
    ids = torch.arange(8)[None]
    with pytest.raises(ConfigError, match="takes no position_ids; leave it out"):
        per_sample_loss(model, {"input_ids": ids, "position_ids": ids})


def test_mask_that_does_not_tell_targets_needs_labels():
    model = small_model("llama")
    ids, _ = ragged_batch([9, 9])
    mask = torch.ones(9, 9).tril().bool().expand(2, 1, 9, 9)
    with pytest.raises(ConfigError, match=r"\(2, 1, 9, 9\) does not say which .* give labels"):
        per_sample_loss(model, {"input_ids": ids, "attention_mask": mask})
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    torch.testing.assert_close(per_sample_loss(model, batch), per_sample_loss(model, ids))


# --- models that are not causal ---


def bert(**settings):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return BertLMHeadModel(BertConfig(**shape, vocab_size=101, **settings)).eval()


def test_bidirectional_model_is_rejected_unless_asked_for():
    model = bert()
    ids, _ = ragged_batch([9, 9])
    with pytest.raises(ModelError, match=r"BertLMHeadModel is not causal.*causal=False"):
        per_sample_loss(model, ids)
    with pytest.raises(ModelError, match="is not causal"):
        per_sample_loss(model.train(), ids)
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    with GradProjLoraEngine(model, "attention", **ENGINE) as engine:
        per_sample_loss(model, ids, causal=False).sum().backward()
        rows = engine.collect_batch()
    for n in range(2):
        assert relative_error(rows[n], row_in_float64(model, engine, ids[n])) < 1e-5


def test_bidirectional_model_that_hides_its_special_tokens_is_rejected():
    config = XLMConfig(vocab_size=101, emb_dim=32, n_layers=1, n_heads=2, pad_index=7)
    with pytest.raises(ModelError, match="XLMWithLMHeadModel is not causal"):
        per_sample_loss(XLMWithLMHeadModel(config).eval(), torch.arange(20, 30)[None])


def test_bidirectional_architecture_made_a_decoder_works():
    model = bert(is_decoder=True)
    ids, labels = ragged_batch(LENGTHS)
    with GradProjLoraEngine(model, "attention", **ENGINE) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        rows = engine.collect_batch()
    want = row_in_float64(model, engine, ids[0, : LENGTHS[0]])
    assert relative_error(rows[0], want) < 1e-5


# --- whether the logits may be made in chunks ---


class ScaledLlama(LlamaForCausalLM):
    """A head whose logits are multiplied by a learned scale."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.scale
        return out


def test_verdict_on_chunked_logits_follows_the_weights():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = ScaledLlama(LlamaConfig(**shape, vocab_size=101)).eval()
    ids, labels = ragged_batch(LENGTHS)
    checkpoint = {name: value.clone() for name, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        for scale in (1.0, 3.0, 1.0):
            for each in (model, plain):
                each.load_state_dict(checkpoint | {"scale": torch.tensor(scale)})
            assert chunk_verdict(model)[0] == (scale == 1.0)
            per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
            rows = engine.collect_batch()
            want = row_in_float64(plain, engine, ids[0, : LENGTHS[0]])
            assert relative_error(rows[0], want) < 1e-5


def test_verdict_on_chunked_logits_follows_a_number_of_the_model():
    model = small_model("cohere", logit_scale=1.0)
    ids, _ = ragged_batch([12, 12])
    for model.logit_scale in (1.0, 0.25, 1.0):
        logits = model(input_ids=ids, use_cache=False).logits
        want = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").sum(dim=1)
        assert chunk_verdict(model)[0] == (model.logit_scale == 1.0)
        torch.testing.assert_close(per_sample_loss(model, ids), want, rtol=1e-5, atol=0)


def test_verdict_is_measured_again_for_another_number_in_the_config(monkeypatch):
    model, calls = small_model("gemma2"), []
    monkeypatch.setattr(loss, "softcap_of", lambda model: calls.append(1) or 3.0)
    for model.config.final_logit_softcapping in (3.0, 3.0, 2.0, 3.0):
        chunk_verdict(model)
    assert len(calls) == 3


def test_verdict_is_measured_once_while_the_weights_stay(monkeypatch):
    model = small_model("llama")
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    chunk_verdict(model)
    n_probes = len(calls)
    chunk_verdict(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.train().eval()
    chunk_verdict(model)
    assert len(calls) == n_probes > 0
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    chunk_verdict(model)
    model.to(torch.bfloat16)
    chunk_verdict(model)
    assert len(calls) == 3 * n_probes


def test_bfloat16_copy_of_a_matrix_follows_the_matrix():
    p = torch.tensor([[0.5, -0.5], [0.5, 0.5]])
    cache_bfloat16(p)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    p.mul_(3)
    torch.testing.assert_close(project(x, p), x.float() @ p.T)


def test_head_of_another_width_than_the_body_falls_back_to_the_models_own_logits():
    torch.manual_seed(0)
    config = RemBertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, input_embedding_size=16, output_embedding_size=40, is_decoder=True,
    )  # fmt: skip
    model = RemBertForCausalLM(config).eval()
    assert chunk_verdict(model) == (
        False, "the model's head takes 40 values a token, its body gives 32"
    )  # fmt: skip
    ids, labels = ragged_batch(LENGTHS)
    with GradProjLoraEngine(model, "attention", **ENGINE) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        rows = engine.collect_batch()
    for n, length in enumerate(LENGTHS):
        assert relative_error(rows[n], row_in_float64(model, engine, ids[n, :length])) < 1e-5


def test_body_that_cannot_run_alone_falls_back_to_the_models_own_logits():
    model = small_model("llama")
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs.pop("position_ids"), with_kwargs=True
    )
    allowed, why = chunk_verdict(model)
    assert not allowed
    assert why.startswith("the model's body cannot run alone (KeyError")


def test_want_of_memory_is_no_verdict_on_the_body():
    model = small_model("llama")
    passes = []

    def fill(module, args):
        passes.append(module)
        if len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(fill)
    with pytest.raises(torch.OutOfMemoryError):
        chunk_verdict(model)
    assert chunk_verdict(model)[0]


# --- padding that changes a model's output ---


def sparse_attention():
    """Sparse attention: which of equal scores are among the top k depends on the length."""
    settings = dict(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        first_k_dense_replace=2, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_topk=8,
        index_n_heads=2, index_head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return DeepseekV32ForCausalLM(DeepseekV32Config(**settings)).eval()


def long_rope():
    """Other rotary frequencies as soon as a batch is longer than 16 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4, "original_max_position_embeddings": 16, "factor": 4.0,
    }  # fmt: skip
    return small_model("llama", rope_parameters=rope)


@pytest.mark.parametrize("make", [sparse_attention, long_rope])
def test_model_whose_output_depends_on_padding_is_batched_without(make):
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2)
    lengths = [12, 20, 12, 30, 15, 20]
    settings = BatchConfig(max_length=40)
    fitted = fit_padding(model, settings)
    assert fitted == replace(settings, max_padding=0.0)
    ids, _ = ragged_batch(lengths)
    sequences = [TokenSequence.of(ids[n, :length]) for n, length in enumerate(lengths)]
    batches = plan_batches(lengths, 256, 8192, fitted.max_padding)
    assert [len(batch) for batch in batches] == [1, 2, 1, 2]
    padded_error = 0.0
    with GradProjLoraEngine(model, "mlp,o_proj", **ENGINE) as engine:
        rows = {}
        for chosen in batches:
            made, _ = run_batch(model, engine, collate(sequences, chosen))
            rows |= dict(zip(chosen.tolist(), made, strict=True))
        together, _ = run_batch(model, engine, collate(sequences, np.arange(6)))
    for n, length in enumerate(lengths):
        want = row_in_float64(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5
        padded_error = max(padded_error, relative_error(together[n], want))
    assert padded_error > 1e-2


def test_choice_among_positions_counts_although_no_tie_shows():
    model = sparse_attention()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name:
                parameter.zero_()  # attention has no effect on the output
    settings = BatchConfig(max_length=40)
    assert fit_padding(model, settings).max_padding == 0
    assert fit_padding(model, BatchConfig(max_length=6)).max_padding > 0, "all positions are chosen"


@pytest.mark.parametrize(("max_length", "pads"), [(16, True), (20, False)])
def test_only_lengths_that_batches_have_count(max_length, pads):
    fitted = fit_padding(long_rope(), BatchConfig(max_length=max_length))
    assert (fitted.max_padding > 0) == pads
    fitted = fit_padding(long_rope(), BatchConfig(max_length=40), longest=max_length)
    assert (fitted.max_padding > 0) == pads


def test_rounding_of_a_deep_model_in_bfloat16_is_not_taken_for_padding():
    model = small_model("llama", num_hidden_layers=40).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def flip(module, args, output):  # as kernels that differ by length do
        flipped = torch.rand(output.shape, generator=generator) < 0.5
        return torch.where(flipped, output * (1 + 2**-7), output)

    for layer in model.model.layers:
        layer.register_forward_hook(flip)
    settings = BatchConfig(max_length=40)
    assert fit_padding(model, settings) is settings
    sparse = sparse_attention().to(torch.bfloat16)
    assert fit_padding(sparse, settings).max_padding == 0


def test_check_of_padding_without_memory_gives_up_padding(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(properties, "_output", no_memory)
    assert fit_padding(small_model("gpt2"), BatchConfig(max_length=40)).max_padding == 0


def test_model_with_fewer_positions_than_its_config_says_is_refused():
    model = small_model("gpt2")
    model.transformer.wpe = torch.nn.Embedding(40, model.config.n_embd)
    settings = BatchConfig(max_length=40)
    assert fit_padding(model, settings) is settings
    with pytest.raises(ModelError, match=r"cannot run a sequence of \d+ tokens.*--max_length"):
        fit_padding(model, BatchConfig(max_length=model.config.n_positions))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_does_not_see_its_padding_is_padded(family, dtype):
    settings = BatchConfig(max_length=64)
    assert fit_padding(small_model(family).to(dtype), settings) is settings


# --- precision ---


@pytest.mark.parametrize("chunked", [True, False])
def test_rows_over_a_large_vocabulary_agree_with_float64(chunked):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=49152)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
        # What all rows of a head have in common cancels in a softmax's gradient.
        model.lm_head.weight.add_(torch.randn(16) * (1 if chunked else 10))
    ids = torch.randint(0, 49152, (2, 20))
    with GradProjLoraEngine(model, **ENGINE) as engine:
        per_sample_loss(model, ids, chunked=chunked).sum().backward()
        rows = engine.collect_batch()
    for n in range(2):
        assert relative_error(rows[n], row_in_float64(model, engine, ids[n])) < 1e-5


def test_loss_from_logits_is_float64s_for_likely_and_unlikely_tokens():
    logits = torch.zeros(3, 5000).index_fill(1, torch.tensor([7]), 15.0)
    logits[1] = torch.randn(5000) * 4
    tokens = torch.tensor([7, 3, 8])
    given, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses = LogitsLoss.apply(given, tokens)
    expected = F.cross_entropy(exact, tokens, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    weights = torch.tensor([1.0, 2.0, 0.0])
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    for n in range(2):
        assert relative_error(given.grad[n], exact.grad[n]) < 1e-6
    assert not given.grad[2].any()
