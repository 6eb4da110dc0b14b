"""Fused experts and routers: rows are those of every sample's own gradient."""

import copy
import functools

import numpy as np
import pytest
import torch
from helpers.experts import slow_experts
from helpers.models import MIXTURES, ragged_batch, small_model
from helpers.references import (
    gradient_of,
    relative_error,
    row_by_autograd,
    sample_loss,
    whole_gradients,
)
from helpers.whole_gradients import kfac_scores

from gradproj.engine.basis import eigenbasis
from gradproj.engine.batching import Batch
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.projection import draw_signs, projection_matrix
from gradproj.engine.whole_gradients import WholeGradients
from gradproj.errors import MixedSamplesError, ModelError
from gradproj.store.basis import DAMPING

LENGTHS = [9, 21, 2, 14]
ENGINE = {"proj_rank_total": 24, "proj_rank_min": 3}


def engine_of(model, **options):
    return GradProjLoraEngine(model, **{**ENGINE, "freeze_weights": True, **options})


def rows_of(model, engine, ids, labels):
    per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
    return engine.collect_batch()


@pytest.fixture(scope="module")
def mixture():
    return small_model("qwen3_moe")


@pytest.mark.parametrize("family", MIXTURES)
def test_rows_of_separate_experts_are_the_projected_gradients(family):
    """Those of joint ones: ``test_families.py``."""
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    with engine_of(model, proj_layers="experts", experts="separate") as engine:
        assert not engine.only_alone
        rows = rows_of(model, engine, ids, labels)
    for n, length in enumerate(LENGTHS):
        want = row_by_autograd(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5


def test_experts_that_drop_tokens_run_alone_and_are_named(mixture):
    mixture.model.layers[1].mlp.capacity_factor = 1.25
    with engine_of(mixture) as engine:
        del mixture.model.layers[1].mlp.capacity_factor
        assert "layers.1.mlp.capacity_factor = 1.25 drops tokens" in engine.only_alone
        with pytest.raises(MixedSamplesError, match="capacity_factor"):
            rows_of(mixture, engine, *ragged_batch(LENGTHS))


def test_experts_that_compute_something_else_are_refused_by_name(mixture, monkeypatch):
    experts = mixture.model.layers[1].mlp.experts
    forward = type(experts).forward
    monkeypatch.setattr(type(experts), "forward", lambda *args: 2 * forward(*args))
    with pytest.raises(ModelError, match=r"another way .* adding -"):
        engine_of(mixture).attach()
    assert "forward" not in vars(experts)


def test_forward_of_a_module_s_own_is_back_after_the_last_engine(mixture):
    experts = mixture.model.layers[1].mlp.experts
    experts.forward = own = functools.partial(type(experts).forward, experts)  # as of an offloader
    try:
        with engine_of(mixture):
            with engine_of(mixture, experts="separate"):
                pass
            assert experts.forward is not own
        assert experts.forward is own
    finally:
        del experts.forward


# --- curvature ---


def routed_tokens(model, ids, labels):
    """Return projection -> ``(a, g)`` of all experts side by side, over the target tokens."""
    slow = copy.deepcopy(model).double().requires_grad_(True)
    found = {}
    for tokens, targets in zip(ids, labels, strict=True):
        seen = slow_experts(slow)
        length = int((targets != -100).sum())
        sample_loss(slow, tokens[:length]).backward()
        for name, routed in seen.items():
            a, g = routed.side_by_side(4)
            n_slots = len(a) // length
            found.setdefault(name, []).append((a[:-n_slots], g[:-n_slots]))
    return {n: [torch.cat(x) for x in zip(*pairs, strict=True)] for n, pairs in found.items()}


def batch_of_targets():
    ids, labels = ragged_batch(LENGTHS)
    mask = labels != -100
    for row, length in zip(mask, LENGTHS, strict=True):
        row[length - 1] = False  # predicts nothing
    return ids, labels, mask


@pytest.fixture(scope="module")
def tokens(mixture):
    return routed_tokens(mixture, *batch_of_targets()[:2])


FULL = {"proj_layers": "experts", "proj_kind": "orthonormal", "proj_rank_total": 10**4}


def covariances_of(engine, model):
    """Return layer -> ``(A, S)`` of the batch, as a job's pilot makes them of sums."""
    ids, labels, mask = batch_of_targets()
    engine.set_token_mask(mask)
    rows_of(model, engine, ids, labels)
    sums, at, found = engine.take_token_covariances(), [0, 0], {}
    for name, matrices in engine.projection_matrices.items():
        pair = []
        for side, (flat, p) in enumerate(zip((sums.a, sums.s), matrices, strict=True)):
            k = len(p)
            pair.append(flat[at[side] : at[side] + k * k].view(k, k) / sums.n_tokens)
            at[side] += k * k
        found[name] = pair
    return found


def explicit_factors(layer, a, g, n_tokens):
    """Return K-FAC's ``(A, S)``, whose product is that of sums over the routed tokens' number."""
    n_routed = len(a)
    if layer.expert is None:
        a = a @ torch.cat([torch.diag(signs.double()) for signs in layer.signs])
    else:
        a = a.view(len(a), 4, -1)[:, layer.expert]
        g = g * (a != 0).any(dim=1, keepdim=True)
        n_routed /= 4  # as if the tokens were shared out evenly
    return a.T @ a / n_routed, g.T @ g / n_tokens


def projection_of(layer):
    """Return the name of a layer's projection of all experts."""
    parts = layer.name.split(".")
    return layer.name if layer.expert is None else ".".join([*parts[:-2], parts[-1]])


@pytest.mark.parametrize("experts", ["joint", "separate"])
def test_kfac_at_full_width_is_that_of_the_explicit_gradients(mixture, tokens, experts):
    ids, labels, mask = batch_of_targets()
    with engine_of(mixture, **FULL, experts=experts, token_covariances=True) as engine:
        covariances = covariances_of(engine, mixture)
    basis = {n: [eigenbasis(x.numpy())[0] for x in pair] for n, pair in covariances.items()}
    matrices = engine.projection_matrices
    with engine_of(mixture, **FULL, experts=experts, matrices=matrices, basis=basis) as engine:
        rows = rows_of(mixture, engine, ids, labels).double()
    factors, gradients = {}, [{} for _ in ids]
    every = [whole_gradients(mixture, ids[n, :length]) for n, length in enumerate(LENGTHS)]
    for layer in engine.targets:
        a, g = tokens[projection_of(layer)]
        factors[layer.name] = explicit_factors(layer, a, g, int(mask.sum()))
        for into, whole in zip(gradients, every, strict=True):
            gradient = gradient_of(layer, whole)
            if layer.expert is None:
                gradient = gradient @ torch.cat([torch.diag(s.double()) for s in layer.signs])
            into[layer.name] = gradient
    want = kfac_scores(factors, gradients, gradients, DAMPING)
    assert relative_error(rows @ rows.T, want) < 1e-4


@pytest.mark.parametrize("experts", ["joint", "separate"])
def test_whole_gradients_are_those_that_rows_project(mixture, experts):
    ids, labels, mask = batch_of_targets()
    with engine_of(mixture, experts=experts) as engine:
        rows = rows_of(mixture, engine, ids, labels)
    found = {}
    positions = mask.flatten().nonzero()[:, 0]
    targets = labels[:, 1:][mask[:, :-1]]
    with WholeGradients(mixture, engine.targets) as whole:
        whole.run(
            Batch(ids, positions, targets, mask, np.arange(4), sum(LENGTHS)),
            lambda n, batch: found.update({n: batch.gradients()}),
        )
    parts = [
        (layer.p_o @ found[n] @ layer.p_i.T).flatten(1) for n, layer in enumerate(engine._layers)
    ]
    assert relative_error(torch.cat(parts, dim=1), rows) < 1e-5


# --- one block of all experts ---


def inner_products(gradients, widths, n_draws, signed):
    """Return estimates of ``<x, y>`` by one block of all experts, for seeds 0 to ``n_draws``."""
    n_i, n_o = widths
    k_i, k_o = 4, 4
    estimates = []
    for seed in range(n_draws):
        p_i = projection_matrix("rademacher", seed, "layer", "i", k_i, n_i).double()
        p_o = projection_matrix("rademacher", seed, "layer", "o", k_o, n_o).double()
        signs = draw_signs(seed, "layer", len(gradients[0]), n_i).double()
        signs = signs if signed else torch.ones_like(signs)
        x, y = (p_o @ (g * signs[:, None]).sum(0) @ p_i.T for g in gradients)
        estimates.append((x * y).sum())
    estimates = torch.stack(estimates)
    return estimates.mean(), estimates.std() / n_draws**0.5


def test_inner_products_of_joint_blocks_are_unbiased_for_the_experts_side_by_side(mixture):
    ids, _ = ragged_batch([21])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = whole_gradients(mixture, ids[0])[name].double()
    # As if the experts' gradients were alike.
    gradients = found, found + found.roll(1, dims=0)
    want = (gradients[0] * gradients[1]).sum()
    of_the_sum = (gradients[0].sum(0) * gradients[1].sum(0)).sum()
    widths = gradients[0].shape[2], gradients[0].shape[1]
    mean, error = inner_products(gradients, widths, 2000, signed=True)
    assert abs(mean - want) < 2 * error < 0.1 * want
    # Without signs they would be those of the sum of the experts' gradients.
    assert abs(of_the_sum - want) > 4 * error
    mean, error = inner_products(gradients, widths, 2000, signed=False)
    assert abs(mean - of_the_sum) < 2 * error
