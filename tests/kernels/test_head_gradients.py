"""The rows of a vocabulary head's gradient against float64 autograd of one sample at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradproj.kernels.head_gradients import GROUP_VALUES, HeadLoss, HeadMoments, HeadRows

N, LENGTH, WIDTH, VOCAB = 5, 7, 6, 83


@pytest.fixture(autouse=True, params=[2**22, 14 * VOCAB, 3 * VOCAB], ids=["whole", "two", "parts"])
def _groups(request, monkeypatch):
    """All samples at once, two at once, and three tokens of one sample at once."""
    monkeypatch.setitem(GROUP_VALUES, "cpu", request.param)


def case(bias: bool = False):
    """Return hidden states, a head, and targets of samples of unequal lengths."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias).requires_grad_(False)
    hidden = torch.randn(N, LENGTH, WIDTH, requires_grad=True)
    tokens = torch.randint(0, VOCAB, (N, LENGTH))
    for n in range(N):
        tokens[n, LENGTH - n :] = -1
    return hidden, head, tokens


def loss_of(hidden, weight, bias, tokens, softcap):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, tokens, ignore_index=-1, reduction="sum")


def head_gradients(hidden, head, tokens, softcap=None):
    """Return each sample's gradient of the head's weight ``(N, V, H)`` in float64."""
    weight = head.weight.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    losses = [
        loss_of(h.detach().double(), weight, bias, t, softcap)
        for h, t in zip(hidden, tokens, strict=True)
    ]
    return torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])


@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 2.0)])
def test_losses_and_gradients_are_those_of_full_logits(bias, softcap):
    hidden, head, tokens = case(bias)
    losses = HeadLoss.apply(
        hidden, head, tokens, softcap, HeadRows(torch.eye(WIDTH), torch.ones(VOCAB), 1)
    )
    weights = torch.linspace(0.5, 2.0, N)
    (gradient,) = torch.autograd.grad((losses.sum(dim=1) * weights).sum(), hidden)
    bias64 = None if head.bias is None else head.bias.double()
    double = hidden.detach().double().requires_grad_()
    want = torch.stack(
        [
            loss_of(h, head.weight.double(), bias64, t, softcap)
            for h, t in zip(double, tokens, strict=True)
        ]
    )
    (wanted_gradient,) = torch.autograd.grad((want * weights).sum(), double)
    torch.testing.assert_close(losses.sum(dim=1).double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_are_those_of_the_head_gradient_and_the_largest_are_kept(softcap):
    hidden, head, tokens = case()
    matrix, scale = torch.randn(4, WIDTH), torch.rand(VOCAB) + 0.1
    whole, largest = HeadRows(matrix, scale, None), HeadRows(matrix, scale, 3)
    for sink in (whole, largest):
        HeadLoss.apply(hidden, head, tokens, softcap, sink)
    gradients = head_gradients(hidden, head, tokens, softcap)
    want = scale.double()[:, None] * (gradients @ matrix.double().T)
    torch.testing.assert_close(whole.all().double(), want, rtol=1e-4, atol=1e-5)
    ids, values = largest.largest()
    order = want.norm(dim=2).argsort(dim=1, descending=True)[:, :3]
    assert torch.equal(ids, order)
    for n in range(N):
        torch.testing.assert_close(values[n].double(), want[n, ids[n]], rtol=1e-4, atol=1e-5)


def test_moments_are_means_over_the_targets_and_skip_what_is_not_finite():
    hidden, head, tokens = case()
    with torch.no_grad():
        hidden[1, 2] = torch.inf
    p = torch.randn(4, WIDTH)
    moments = HeadMoments(p, VOCAB)
    HeadLoss.apply(hidden, head, tokens, None, moments)
    is_target = tokens >= 0
    is_target[1, 2] = False
    h = hidden.detach().double()[is_target]
    logit_gradients = (h @ head.weight.double().T).softmax(dim=1) - F.one_hot(
        tokens[is_target], VOCAB
    )
    projected = h @ p.double().T
    torch.testing.assert_close(moments.hidden, projected.T @ projected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        moments.logits, logit_gradients.square().sum(dim=0), rtol=1e-5, atol=1e-7
    )


def test_padding_may_hold_anything_and_a_sample_is_the_same_in_any_batch():
    hidden, head, tokens = case()
    with torch.no_grad():
        hidden[tokens < 0] = torch.inf
    matrix, scale = torch.randn(4, WIDTH), torch.ones(VOCAB)

    def rows(chosen):
        sink = HeadRows(matrix, scale, 3)
        HeadLoss.apply(hidden[chosen], head, tokens[chosen], None, sink)
        return sink.largest()

    ids, values = rows(slice(None))
    for n in range(N):
        alone_ids, alone_values = rows(slice(n, n + 1))
        assert torch.equal(ids[n], alone_ids[0])
        torch.testing.assert_close(values[n], alone_values[0])
