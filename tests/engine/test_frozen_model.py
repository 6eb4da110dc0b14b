"""A frozen model computes the same with faster modules, and is restored."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import FAMILIES, ragged_batch, small_model
from torch import nn

from gradproj.engine.frozen_model import FrozenModel
from gradproj.kernels.onednn import linear, uses_onednn

IDS, _ = ragged_batch([40, 40])


def input_gradient(model):
    """Logits and the gradient of their sum of squares at the embedded tokens."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
    return logits.detach(), gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_model_keeps_outputs_and_input_gradients(family):
    model = small_model(family)
    want_logits, want_gradient = input_gradient(model)
    frozen = FrozenModel(model)
    logits, gradient = input_gradient(model)
    frozen.undo()
    torch.testing.assert_close(
        logits, want_logits, rtol=1e-5, atol=1e-5 * want_logits.abs().max().item()
    )
    scale = want_gradient.abs().max().item()
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_restores_flags_modes_and_methods(family):
    model = small_model(family).train()
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    frozen = FrozenModel(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert any("forward" in vars(m) for m in model.modules())
    frozen.undo()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    want, got = want_and_own_gradient(model)
    assert torch.equal(got, want)


def want_and_own_gradient(model):
    """A weight's gradient twice: training goes on as it would have."""
    weight = list(model.parameters())[-1]
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, weight)[0])
    return gradients


def test_module_with_its_own_forward_keeps_it():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: 2 * x
    frozen = FrozenModel(model)
    assert torch.equal(model(torch.ones(1, 8)), 2 * torch.ones(1, 8))
    frozen.undo()
    assert "forward" in vars(model[0])


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (0, 24)])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch_linear(shape, transposed, bias):
    torch.manual_seed(0)
    x, b = torch.randn(shape), torch.randn(10) if bias else None
    weight = torch.randn(24, 10).t() if transposed else torch.randn(10, 24)
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


def test_onednn_can_be_turned_off():
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(x, weight)
        assert torch.equal(linear(x, weight), torch.full((2, 4), 8.0))
