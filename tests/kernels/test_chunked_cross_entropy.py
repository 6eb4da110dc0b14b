"""The chunked cross entropy against torch's own over full logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradproj.kernels.chunked_cross_entropy import SLICE_VALUES, TokenLoss

N_TOKENS, WIDTH, VOCAB = 37, 24, 301


@pytest.fixture(autouse=True)
def _many_slices(monkeypatch):
    # 64 words of the vocabulary and 16 tokens at once: five slices, three rounds.
    monkeypatch.setitem(SLICE_VALUES, "cpu", 64 * 16)
    monkeypatch.setattr("gradproj.kernels.chunked_cross_entropy.MAX_TOKENS", 16)


def case(scale: float = 1.0, bias: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias).to(dtype).requires_grad_(False)
    hidden = (scale * torch.randn(N_TOKENS, WIDTH)).to(dtype).requires_grad_()
    # Every slice has a target, the first and the last word of the vocabulary among them.
    tokens = torch.linspace(0, VOCAB - 1, N_TOKENS).round().long()
    return hidden, head, tokens


def full_logits_loss(hidden, head, tokens, softcap=None):
    bias = None if head.bias is None else head.bias.double()
    logits = F.linear(hidden.double(), head.weight.double(), bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, tokens, reduction="none")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_losses_and_gradients_equal_those_of_full_logits(scale, bias, softcap):
    hidden, head, tokens = case(scale, bias)
    weights = torch.linspace(0.5, 2.0, N_TOKENS)
    ours = TokenLoss.apply(hidden, head, tokens, softcap)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), hidden)
    want = full_logits_loss(hidden, head, tokens, softcap)
    (wanted_gradient,) = torch.autograd.grad((want * weights).sum(), hidden)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_gradients_are_close_to_full_precision():
    hidden, head, tokens = case(dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(TokenLoss.apply(hidden, head, tokens, None).sum(), hidden)
    (want,) = torch.autograd.grad(full_logits_loss(hidden, head, tokens).sum(), hidden)
    assert gradient.dtype == torch.bfloat16
    assert F.cosine_similarity(gradient.float().flatten(), want.float().flatten(), dim=0) > 0.9999


def test_token_with_non_finite_hidden_state_affects_no_other():
    hidden, head, tokens = case()
    with torch.no_grad():
        hidden[3] = torch.nan
    losses = TokenLoss.apply(hidden, head, tokens, None)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    others = torch.arange(N_TOKENS) != 3
    assert losses[3].isnan()
    assert gradient[3].isnan().all()
    assert losses[others].isfinite().all()
    assert gradient[others].isfinite().all()


def test_no_tokens_give_no_losses_and_zero_gradients():
    hidden, head, tokens = case()
    empty = hidden[:0]
    losses = TokenLoss.apply(empty, head, tokens[:0], None)
    assert losses.shape == (0,)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert gradient.eq(0).all()


def test_losses_without_gradients_are_equal():
    hidden, head, tokens = case()
    with torch.no_grad():
        evaluated = TokenLoss.apply(hidden, head, tokens, None)
    assert torch.equal(evaluated, TokenLoss.apply(hidden, head, tokens, None))
