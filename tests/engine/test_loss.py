"""What is a target, and what the loss does with weights, masks and models that it cannot chunk."""

import copy

import torch
from helpers.models import ragged_batch, small_model
from helpers.references import relative_error
from torch.nn import functional as F

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss

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
        per_sample_loss(model, {"input_ids": ids[others], "labels": labels[others]}).sum().backward()
        engine.collect_batch()
        expected = engine.take_token_covariances()
    assert not rows[1].any()
    for n in others:
        want = row_in_float64(model, engine, ids[n, : LENGTHS[n]])
        assert relative_error(rows[n], want) < 1e-5
    assert sums.n_tokens == expected.n_tokens
    assert relative_error(sums.a, expected.a) < 1e-5
    assert relative_error(sums.s, expected.s) < 1e-5
