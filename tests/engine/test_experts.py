"""Fused experts and routers: rows are those of every sample's own gradient."""

import pytest
import torch
from helpers.models import MIXTURES, ragged_batch, small_model
from helpers.references import relative_error, sample_loss

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss

LENGTHS = [9, 21, 2, 14]
ENGINE = {"proj_rank_total": 24, "proj_rank_min": 3}


def engine_of(model, **options):
    return GradProjLoraEngine(model, **{**ENGINE, "freeze_weights": True, **options})


def rows_of(model, engine, ids, labels):
    per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
    return engine.collect_batch()


def whole_gradients(model, tokens):
    """Return the gradients of all parameters of a sample's loss, by the model's own forward."""
    parameters = dict(model.named_parameters())
    model.requires_grad_(True)
    loss = sample_loss(model, tokens)
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    model.requires_grad_(False)
    return dict(zip(parameters, found, strict=True))


def gradient_of(layer, gradients):
    """Return a layer's gradient ``(n_o, n_i)``, or of all experts side by side."""
    *above, expert, last = layer.name.split(".")
    if layer.expert is not None:
        assert int(expert) == layer.expert
    name = layer.name if layer.expert is None else ".".join([*above, last])
    gradient = gradients.get(name, gradients.get(f"{name}.weight")).double()
    if gradient.dim() == 2:
        return gradient
    # A projection maps the hidden width to the experts' or back.
    by_expert = [g if g.shape == layer.widths[::-1] else g.T for g in gradient]
    assert by_expert[0].shape == layer.widths[::-1] != layer.widths
    return by_expert[layer.expert] if layer.expert is not None else torch.cat(by_expert, dim=1)


def row_by_autograd(model, engine, tokens):
    gradients, row = whole_gradients(model, tokens), []
    for layer in engine.targets:
        p_i, p_o = (p.double() for p in engine.projection_matrices[layer.name])
        if layer.signs is not None:
            p_i = torch.cat([p_i * signs for signs in layer.signs], dim=1)
        row.append((p_o @ gradient_of(layer, gradients) @ p_i.T).flatten())
    return torch.cat(row)


@pytest.mark.parametrize("experts", ["joint", "separate"])
@pytest.mark.parametrize("family", MIXTURES)
def test_rows_alone_and_in_a_batch_are_the_projected_gradients(family, experts):
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    with engine_of(model, experts=experts) as engine:
        assert not engine.only_alone
        rows = rows_of(model, engine, ids, labels)
        alone = [
            rows_of(model, engine, ids[n : n + 1, :length], labels[n : n + 1, :length])[0]
            for n, length in enumerate(LENGTHS)
        ]
    names = {layer.name.rpartition(".")[2] for layer in engine.targets}
    assert names >= {"gate_up_proj", "down_proj", "o_proj"}
    assert names & {"gate", "router"}
    for n, length in enumerate(LENGTHS):
        want = row_by_autograd(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5
        assert relative_error(alone[n], want) < 1e-5
