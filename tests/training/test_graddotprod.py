"""GradDotProd: inner products match plain autograd, and training is as without the engine."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers.graddotprod import (
    IDS,
    LENGTHS,
    VAL_LENGTHS,
    assert_close,
    assert_same_gradients,
    gradients_of,
    loss_of,
    run_batch,
    trained,
)
from helpers.models import Experts, ragged_batch, small_model
from helpers.references import dot_products_by_autograd
from torch import nn

from gradproj.errors import ModelError
from gradproj.training.graddotprod import hooks, inner_products
from gradproj.training.graddotprod.engine import GradDotProdEngine
from gradproj.training.graddotprod.inner_products import OuterProducts, Vector
from gradproj.training.graddotprod.layer_rules import find_dot_layers

CASES = {
    "gpt2": ("gpt2", {}),  # tied, Conv1D, positions looked up once for all samples
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),  # RMS norms, grouped queries, untied, a padding row
    "llama_tied": ("llama_tied", {}),  # biases in attention
    "gpt_neox": ("gpt_neox", {}),  # biases everywhere
    "qwen3": ("qwen3", {}),  # norms of queries and keys
    "gemma3": ("gemma3", {}),  # a scaled embedding, norms of 1 + weight
}


@pytest.mark.parametrize("case", CASES)
def test_inner_products_match_autograd_and_grad_is_the_training_batch_gradient(case):
    family, changes = CASES[case]
    model = small_model(family, **changes)
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    loss_of(model, *train).backward()
    wanted = gradients_of(model)
    model.zero_grad()
    dots, sizes = dot_products_by_autograd(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        products = run_batch(engine, model, *train)
    assert_same_gradients(model, wanted)
    assert engine.parameter_names == [name for name, _ in model.named_parameters()]
    assert products["sample_id"].tolist() == IDS
    assert_close(products["per_parameter"], dots, sizes)
    torch.testing.assert_close(products["total"].double(), dots.sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("way", ["samples", "pairs", "product"])
def test_every_way_to_an_inner_product_matches_explicit_gradients(way, onednn, monkeypatch):
    monkeypatch.setattr(OuterProducts, "way", lambda *_: way)
    monkeypatch.setitem(inner_products.TILE_VALUES, "cpu", 23)
    if onednn:
        monkeypatch.setattr(inner_products, "MIN_ONEDNN_FLOPS", 0)
    left, right = torch.randn(5, 7, 13), torch.randn(5, 7, 11)
    each = torch.einsum("nsl,nsr->nlr", left.double(), right.double())
    gradient, dots = OuterProducts(left, right).sums(3, scale=1.7)
    torch.testing.assert_close(gradient.double(), 1.7 * each[:3].sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dots.double(), (each[:3] * each[3:].sum(0)).sum((1, 2)), rtol=1e-4, atol=1e-4
    )


def test_cheapest_way_is_chosen_by_shapes():
    def way(n_train, length, left, right, n_validation=1):
        n = n_train + n_validation
        return OuterProducts(torch.empty(n, length, left), torch.empty(n, length, right)).way(
            n_train
        )

    assert way(4, 512, 768, 3072, 2) == "samples"  # long samples: a look at each gradient is cheap
    assert way(2, 64, 768, 3072) == "pairs"  # few tokens, a large weight
    assert way(512, 8, 128, 512, 128) == "product"  # so many short ones that neither is


def test_no_tile_exceeds_its_size(monkeypatch):
    made = []
    product = inner_products._product
    monkeypatch.setattr(
        inner_products, "_product", lambda *args: made.append(product(*args)) or made[-1]
    )
    monkeypatch.setitem(inner_products.TILE_VALUES, "cpu", 512)
    monkeypatch.setattr(OuterProducts, "way", lambda *_: "samples")
    model = small_model("gpt2")
    with GradDotProdEngine(model, ragged_batch(VAL_LENGTHS)) as engine:
        run_batch(engine, model, *ragged_batch(LENGTHS))
    assert made
    assert max(tile.numel() for tile in made) <= 512


def test_inner_product_depends_on_the_samples_own_tokens_only():
    model = small_model("llama_tied")
    (ids, labels), validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    with GradDotProdEngine(model, validation, loss_reduction="sum") as engine:

        def dots(rows, width):
            engine.attach_train_batch(ids[rows], labels[rows], 0, rows)
            x, y = engine.prepare_forward_input(ids[rows, :width], labels[rows, :width])
            (loss_of(model, x, y) * (y[:, 1:] != -100).sum()).backward()
            engine.prepare_gradients()
            return engine.aggregate_and_log()["total"]

        together, alone = dots([0, 1, 2, 3], 21), dots([0], 9)
        turned = dots([3, 0], 21)
    torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(turned, together[[3, 0]], rtol=1e-4, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reduction_accumulation_and_loss_scale_are_divided_out(reduction):
    model = small_model("gpt2")
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    dots, _ = dot_products_by_autograd(model, *train, validation)
    n_targets = (train[1][:, 1:] != -100).sum()
    with GradDotProdEngine(
        model, validation, loss_reduction=reduction, accumulation=4, loss_scale=lambda: 8.0
    ) as engine:
        engine.attach_train_batch(*train, 0, IDS)
        x, y = engine.prepare_forward_input(*train)
        n_joined = (y[:, 1:] != -100).sum() if reduction == "sum" else 1
        (loss_of(model, x, y) * n_joined * 8 / 4).backward()
        engine.prepare_gradients()
        products = engine.aggregate_and_log()
    weight = (n_targets if reduction == "sum" else 1) / 4
    torch.testing.assert_close(products["total"].double(), dots.sum(1) * weight, rtol=1e-4, atol=0)
    got = gradients_of(model)
    model.zero_grad()
    (loss_of(model, *train) * weight * 8).backward()
    assert_same_gradients(model, got)


@pytest.mark.parametrize("form", ["mapping", "function", "ids alone", "labels one ahead"])
def test_validation_data_may_be_mapping_function_ids_or_shifted_labels(form):
    model = small_model("gpt2")
    train, (ids, labels) = ragged_batch(LENGTHS), ragged_batch([12, 12], seed=5)
    with GradDotProdEngine(model, (ids, labels)) as engine:
        wanted = run_batch(engine, model, *train)["total"]
    model.zero_grad()
    given = {
        "mapping": {"input_ids": ids, "labels": labels},
        "function": lambda: (ids, labels),
        "ids alone": ids,
    }
    if form != "labels one ahead":
        with GradDotProdEngine(model, given[form]) as engine:
            products = run_batch(engine, model, *train)["total"]
    else:
        ahead = [nn.functional.pad(y[:, 1:], (0, 1), value=-100) for y in (train[1], labels)]
        with GradDotProdEngine(model, (ids, ahead[1]), labels_shifted=True) as engine:
            engine.attach_train_batch(train[0], ahead[0], 0, IDS)
            x, y = engine.prepare_forward_input(train[0], ahead[0])
            logits = model(input_ids=x, use_cache=False).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
            engine.prepare_gradients()
            products = engine.aggregate_and_log()["total"]
    torch.testing.assert_close(products, wanted, rtol=1e-4, atol=0)


class AddsInPlace(nn.Module):
    """A model that writes into layer outputs, looks up positions once and flattens its tokens."""

    def __init__(self, n_dims=1):
        super().__init__()
        self.n_dims = n_dims
        self.tokens, self.places = nn.Embedding(101, 8), nn.Embedding(32, 8)
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 101)

    def forward(self, input_ids, labels, use_cache=False):
        places = torch.arange(input_ids.shape[1])
        x = self.tokens(input_ids).add_(self.places(places if self.n_dims == 1 else places[None]))
        x = self.layer(x.flatten(0, 1)).unflatten(0, input_ids.shape).add_(x).tanh_()
        logits = self.head(self.norm(x).mul_(2))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("n_dims", [1, 2])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, [24, 24, 24, 24]]
)  # 24 positions are a multiple of 6 samples
def test_inner_products_match_autograd_when_a_model_writes_into_layer_outputs(n_dims, lengths):
    torch.manual_seed(0)
    model = AddsInPlace(n_dims)
    train, validation = ragged_batch(lengths), ragged_batch([24, 7], seed=5)
    dots, sizes = dot_products_by_autograd(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        assert_close(run_batch(engine, model, *train)["per_parameter"], dots, sizes)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_equal_regular_training_with_accumulation_and_clipping(family):
    regular, _ = trained(False, family=family)
    watched, _ = trained(True, family=family)
    for (name, want), got in zip(regular.named_parameters(), watched.parameters(), strict=True):
        assert (got - want).norm() < 1e-5 * want.norm(), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_no_value():
    _, plain = trained(True)
    _, checkpointed = trained(True, checkpointing=True)
    for sample_id, value in plain.shapley_values.items():
        assert checkpointed.shapley_values[sample_id] == pytest.approx(value, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointed_block_keeps_no_layer_input():
    model = small_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    seen = []
    inner = model.model.layers[1].mlp.down_proj
    handle = inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with GradDotProdEngine(model, ragged_batch(VAL_LENGTHS)) as engine:
        train = ragged_batch(LENGTHS)
        engine.attach_train_batch(*train, 0, IDS)
        joined = engine.prepare_forward_input(*train)
        loss = loss_of(model, *joined)
        input_of_layer = weakref.ref(seen.pop())
        gc.collect()
        assert input_of_layer() is None
        loss.backward()
        engine.prepare_gradients()
    handle.remove()


def test_gradients_and_inner_products_keep_their_direction_under_bfloat16_autocast():
    model = small_model("gpt2")
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, *train)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    dots, sizes = dot_products_by_autograd(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        engine.attach_train_batch(*train, 0, IDS)
        joined = engine.prepare_forward_input(*train)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *joined)
        loss.backward()
        engine.prepare_gradients()
        products = engine.aggregate_and_log()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert torch.cosine_similarity(got, wanted, dim=0) > 0.999
    assert ((products["total"] - dots.sum(1)).abs() < 0.05 * sizes.sum(1)).all()


def test_layers_called_twice_sum_their_calls():
    model = small_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    dots, sizes = dot_products_by_autograd(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        products = run_batch(engine, model, *train)
    assert_close(products["per_parameter"], dots, sizes)


def test_frozen_parameters_take_no_part():
    model = small_model("gpt2")
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    dots, sizes = dot_products_by_autograd(model, *train, validation)
    names = [name for name, _ in model.named_parameters()]
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
    with GradDotProdEngine(model, validation) as engine:
        products = run_batch(engine, model, *train)
    kept = [names.index(name) for name in engine.parameter_names]
    assert 0 < len(kept) < len(names) - 10
    assert_close(products["per_parameter"], dots[:, kept], sizes[:, kept])
    assert model.transformer.wte.weight.grad is None
    assert model.transformer.h[1].mlp.c_fc.weight.requires_grad


def hooks_of(model):
    return [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]


def test_detach_restores_the_model_and_evaluations_change_nothing():
    model = small_model("gpt2")
    before = hooks_of(model), [p.requires_grad for p in model.parameters()]
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    engine = GradDotProdEngine(model, validation).attach()
    plain = run_batch(engine, model, *train)["total"]
    engine.attach_train_batch(*train, 0, IDS)
    joined = engine.prepare_forward_input(*train)
    with torch.no_grad():
        loss_of(model, *validation)
    loss_of(model, *joined).backward()
    engine.prepare_gradients()
    engine.detach_for_evaluation()
    assert not engine.is_attached
    assert (hooks_of(model), [p.requires_grad for p in model.parameters()]) == before
    loss_of(model, *train).backward()
    engine.reattach_after_evaluation()
    model.zero_grad()
    torch.testing.assert_close(run_batch(engine, model, *train)["total"], plain, rtol=0, atol=0)
    engine.detach()
    assert (hooks_of(model), [p.requires_grad for p in model.parameters()]) == before


class TurnsTokensRound(AddsInPlace):
    def forward(self, input_ids, labels, use_cache=False):
        self.layer(self.tokens(input_ids).transpose(0, 1))


def test_layer_with_unknown_sample_dimension_is_rejected():
    model = TurnsTokensRound()
    with (
        GradDotProdEngine(model, ragged_batch(VAL_LENGTHS)) as engine,
        pytest.raises(
            ModelError,
            match=r"a Linear works on \(25, 6\) positions in a batch of 6 samples of 25 tokens",
        ),
    ):
        run_batch(engine, model, *ragged_batch(LENGTHS))


class LooksLikeANorm(nn.LayerNorm):
    """A layer norm whose weight acts twice, so that the layer norm's rule is wrong for it."""

    def forward(self, x):
        return super().forward(x) * self.weight


@pytest.mark.parametrize(
    "layer", [LooksLikeANorm(6), nn.GroupNorm(2, 6), nn.PReLU(6), nn.BatchNorm1d(6)], ids=str
)
def test_layer_that_only_resembles_a_norm_is_rejected(layer):
    with pytest.raises(ModelError, match=type(layer).__name__):
        find_dot_layers(layer)


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6)], ids=str
)
def test_norm_is_recognised_by_trial_without_side_effects(layer):
    before = torch.random.get_rng_state()
    (found_layer,) = find_dot_layers(layer)
    assert set(found_layer.kinds.values()) == {Vector}
    assert all(p.grad is None and p.requires_grad for p in layer.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weight_of_two_layers_has_one_gradient_of_both_uses():
    model = small_model("llama")
    first, second = (block.self_attn.q_proj for block in model.model.layers)
    second.weight = first.weight
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    loss_of(model, *train).backward()
    wanted = gradients_of(model)
    model.zero_grad()
    dots, sizes = dot_products_by_autograd(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        products = run_batch(engine, model, *train)
    assert_same_gradients(model, wanted)
    assert_close(products["per_parameter"], dots, sizes)


def test_inner_product_that_is_nan_hides_no_other_layers_fault(monkeypatch):
    dots = hooks.DotBatch.dots

    def spoiled(batch, parameters):
        found = dots(batch, parameters)
        found[:, 0] = torch.nan
        return found

    monkeypatch.setattr(hooks.DotBatch, "dots", spoiled)
    model = small_model("llama")
    model.model.layers[0].mlp = Experts(32)
    engine = GradDotProdEngine(model, ragged_batch(VAL_LENGTHS, seed=5))
    with pytest.raises(ModelError, match=r"GradDotProd: model\.layers\.0\.mlp\.experts\.0\.weight"):
        engine.attach()


def test_check_without_memory_is_refused(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hooks, "per_sample_loss", full)
    engine = GradDotProdEngine(small_model("gpt2"), ragged_batch(VAL_LENGTHS, seed=5))
    with pytest.raises(ModelError, match="no memory to check the model"):
        engine.attach()
    assert not engine.is_attached


def test_layer_that_gets_tokens_in_another_order_is_refused_unless_frozen():
    model = small_model("llama")
    model.model.layers[0].mlp = Experts(32)
    validation = ragged_batch(VAL_LENGTHS, seed=5)
    engine = GradDotProdEngine(model, validation)
    with pytest.raises(ModelError, match=r"mlp\.experts\.0\.weight.*another order.*freeze"):
        engine.attach()
    assert not engine.is_attached
    model.model.layers[0].mlp.experts.requires_grad_(False)
    with GradDotProdEngine(model, validation) as engine:
        run_batch(engine, model, *ragged_batch(LENGTHS))


def test_fused_experts_are_refused_unless_frozen():
    model, validation = small_model("qwen3_moe"), ragged_batch(VAL_LENGTHS, seed=5)
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj \(Qwen3MoeExperts\).*Freeze"):
        GradDotProdEngine(model, validation)
    for block in model.model.layers:
        block.mlp.requires_grad_(False)
    with GradDotProdEngine(model, validation) as engine:
        assert run_batch(engine, model, *ragged_batch(LENGTHS))["total"].isfinite().all()
