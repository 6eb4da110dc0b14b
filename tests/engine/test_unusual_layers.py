"""Shared weights, look-alikes of Linear, changes in place, tokens in another order."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import UNUSUAL, Experts, ragged_batch, small_model
from helpers.references import relative_error
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from gradproj.engine.capture import BatchCapture
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.layers import rule_for
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import MixedSamplesError, ModelError

LENGTHS = [9, 21, 2, 14]
ENGINE = {"proj_rank_total": 24, "proj_rank_min": 3, "freeze_weights": True}


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
    layers = {"zamba": "attn,feed_forward"}.get(model_type, "mlp,attn")
    assert_rows_are_autograds(small_model(model_type), proj_layers=layers, freeze_weights=freeze)


def test_weight_of_two_modules_is_one_layer_named_by_the_first():
    model = small_model("zamba")
    every = GradProjLoraEngine(model, proj_layers="attn", **ENGINE)
    names = ["model.layers.0.shared_transf.self_attn.q_proj", "model.layers.2.shared_transf"]
    assert names[0] in every.slice_ranges
    assert not any(name.startswith(names[1]) for name in every.slice_ranges)
    # Whichever module is named, the layer is the weight with all its uses.
    second = GradProjLoraEngine(model, proj_layers=f"{names[1]}.self_attn.q_proj", **ENGINE)
    assert list(second.slice_ranges) == names[:1]
    assert list(second.targets[0].uses) == [names[0], f"{names[1]}.self_attn.q_proj"]


def test_token_covariances_sum_over_all_uses_of_a_weight():
    model = small_model("zamba").requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    ids, _ = ragged_batch([7, 7])
    engine = GradProjLoraEngine(model, proj_layers="q_proj", token_covariances=True, **ENGINE)
    with engine:
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()
        got = engine.take_token_covariances()
    ((p_i, p_o),) = engine.projection_matrices.values()
    inputs, outputs = [], []
    for module in engine.targets[0].uses.values():
        module.register_forward_hook(lambda m, a, out: inputs.append(a[0]) or outputs.append(out))
    model.get_input_embeddings().weight.requires_grad_(True)
    gradients = torch.autograd.grad(per_sample_loss(model, ids).sum(), outputs)
    assert len(inputs) == 2
    for got_flat, p, values in ((got.a, p_i, inputs), (got.s, p_o, gradients)):
        want = sum((x.flatten(0, 1) @ p.T).T @ (x.flatten(0, 1) @ p.T) for x in values)
        torch.testing.assert_close(got_flat.float(), want.flatten(), rtol=1e-4, atol=1e-5)


class PositionsFirst(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class TwiceUsed(nn.Module):
    """Uses its layer's weight a second time, without the layer."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x) + F.linear(x * x, self.inner.weight)


def model_with_mlp(kind):
    model = small_model("llama")
    torch.manual_seed(1)
    for block in model.model.layers:
        block.mlp = kind(32)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Experts, PositionsFirst])
def test_tokens_in_another_order_are_refused_in_batches_and_exact_alone(kind, dtype):
    model = model_with_mlp(kind).to(dtype)
    ids, _ = ragged_batch([6] * 6)  # as many samples as tokens, so that no shape shows the order
    layers = "experts" if kind is Experts else "inner"
    with GradProjLoraEngine(model, proj_layers=layers, **ENGINE) as engine:
        with pytest.raises(
            MixedSamplesError,
            match=rf"layers\.[01]\.mlp\.{layers}.*cannot be separated.*batch_size 1",
        ):
            per_sample_loss(model, ids)
        per_sample_loss(model, ids[:1]).sum().backward()
        row = engine.collect_batch()[0]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert relative_error(row, row_in_float64(model, engine, ids[0])) < tolerance


def test_layers_in_the_batchs_order_beside_experts_are_exact():
    assert_rows_are_autograds(model_with_mlp(Experts), proj_layers="gate,attn")


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trainable"])
def test_weight_that_is_used_in_another_way_is_refused(freeze):
    model = model_with_mlp(TwiceUsed)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.inner.*another way.*adding -mlp$"):
        GradProjLoraEngine(
            model, proj_layers="mlp", **{**ENGINE, "freeze_weights": freeze}
        ).attach()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.model.layers[0].mlp.inner._forward_hooks


def test_gradient_that_is_nan_hides_no_other_layers_fault():
    model = model_with_mlp(TwiceUsed)
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    with q_proj.register_hook(lambda gradient: gradient * torch.nan):
        engine = GradProjLoraEngine(model, proj_layers="mlp,attn", **ENGINE)
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.inner.*adding -mlp$") as error:
            engine.attach()
    assert "q_proj" not in str(error.value)


def test_row_that_is_nan_where_the_gradient_is_finite_is_refused(monkeypatch):
    parts_of = BatchCapture.parts_of

    def spoiled(capture, *args):
        parts = parts_of(capture, *args)
        return {i: part * torch.nan if i == 0 else part for i, part in parts.items()}

    monkeypatch.setattr(BatchCapture, "parts_of", spoiled)
    with pytest.raises(ModelError, match=r"layers\.0\..*another way"):
        GradProjLoraEngine(small_model("llama"), **ENGINE).attach()


class OwnLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(5, 7)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x @ self.weight.mT + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Transposed(OwnLinear):
    def forward(self, x):
        return x @ self.weight


class Router(OwnLinear):
    def forward(self, x):
        return super().forward(x).topk(1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layer_counts_as_linear_if_it_computes_what_linear_does(device):
    with torch.device(device):
        for layer in (FalconLinear(7, 5), FalconLinear(7, 5, bias=False), OwnLinear()):
            assert rule_for(layer).type_name == "Linear"
            assert rule_for(layer).widths(layer) == (7, 5)
        for layer in (Scaled(7, 5), Transposed(), Router(), nn.LayerNorm(7)):
            assert rule_for(layer) is None


@pytest.mark.parametrize(
    "message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"]
)
def test_check_without_memory_is_refused(message, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    engine = GradProjLoraEngine(small_model("gpt2"), **ENGINE)
    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(ModelError, match=r"^cpu has no memory to check the model.*free memory"):
        engine.attach()
    assert not engine.is_attached
    monkeypatch.undo()
    with engine.attach():
        assert engine.unchecked == ""


def test_model_that_needs_more_than_token_ids_says_why_it_is_unchecked():
    model = small_model("gpt2")

    def refuse(module, args, kwargs):
        raise ValueError("give pixels")

    with model.register_forward_pre_hook(refuse, with_kwargs=True):
        model.transformer.register_forward_pre_hook(refuse, with_kwargs=True)
        with GradProjLoraEngine(model, **ENGINE) as engine:
            assert engine.unchecked == "ValueError('give pixels')"


def test_check_at_the_start_changes_nothing():
    model = small_model("gpt2").train()
    model.lm_head.weight.requires_grad_(False)
    ids, labels = ragged_batch([9, 4])
    model(input_ids=ids, labels=labels).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    with GradProjLoraEngine(model, **{**ENGINE, "freeze_weights": False}):
        assert model.training
        assert all(module.training for module in model.modules())
        assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
