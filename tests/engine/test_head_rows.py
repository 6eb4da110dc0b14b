"""Sparse head rows against the head's weight gradients by autograd in float64."""

import numpy as np
import pytest
import torch
from helpers.models import VOCAB, small_model
from helpers.references import sample_loss

from gradproj.engine.batching import collate as collate_sequences
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import (
    INPUT_DAMPING,
    HeadBasis,
    HeadConfig,
    check_head,
    draw_head_matrices,
    encode_head,
    head_loss,
    sum_windows,
)
from gradproj.engine.run_batch import run_batch
from gradproj.errors import ConfigError, ModelError
from gradproj.job.head_sums import HeadSums
from gradproj.kernels.head_gradients import HeadMoments, HeadRows
from gradproj.model.sequences import TokenSequence
from gradproj.store.head_rows import HeadSegment, decode_head

LENGTHS = (9, 14, 5, 20, 2, 11)
DAMPING = 0.03


def collate(chosen, numbers):
    return collate_sequences([TokenSequence.of(tokens) for tokens in chosen], numbers)


def sequences(seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, n) for n in LENGTHS]


def head_gradient(model, tokens):
    """Return one sample's gradient of the head's weight, ``(V, H)`` float64."""
    weight = model.get_output_embeddings().weight
    captured = {}

    def hook(module, args, output):
        captured["h"] = args[0].detach()
        output.retain_grad()
        captured["logits"] = output

    # By the head's own input and output: a tied weight's gradient has the embedding's share too.
    handle = model.get_output_embeddings().register_forward_hook(hook)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    sample_loss(model, torch.from_numpy(tokens)).backward()
    model.zero_grad()
    model.requires_grad_(False)
    handle.remove()
    assert weight.shape[0] == VOCAB
    return captured["logits"].grad[0].double().T @ captured["h"][0].double()


def moments_of(model, p, chosen):
    moments = HeadMoments(p, VOCAB)
    head_loss(model, collate(chosen, np.arange(len(chosen))), moments)
    assert moments.n_tokens == sum(len(tokens) - 1 for tokens in chosen)
    return moments.hidden / moments.n_tokens, moments.logits / moments.n_tokens


def basis_of(model, k, chosen, kind="orthonormal"):
    head = model.get_output_embeddings()
    p, rotation = draw_head_matrices(kind, 7, k, head.in_features)
    return HeadBasis.fit(*moments_of(model, p, chosen), p, rotation, DAMPING)


def all_rows(model, basis, chosen, n_rows=None):
    rows = []
    for tokens in chosen:
        sink = HeadRows(basis.matrix, basis.scale, n_rows)
        head_loss(model, collate([tokens], np.array([0])), sink)
        rows.append(sink.all() if n_rows is None else sink.largest())
    return rows


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_scores_of_all_rows_at_full_width_are_the_kfac_influence_of_the_head(family):
    model = small_model(family).double().requires_grad_(False)
    chosen = sequences()
    gradients = torch.stack([head_gradient(model, tokens) for tokens in chosen])
    model.float()
    head = model.get_output_embeddings()
    basis = basis_of(model, head.in_features, chosen)
    rows = torch.cat(all_rows(model, basis, chosen)).flatten(1).double()
    a, s = moments_of(model, torch.eye(head.in_features), chosen)
    a += INPUT_DAMPING * a.diagonal().mean() * torch.eye(len(a))
    s += DAMPING * s.square().sum() / s.sum()
    solved = (gradients / s[:, None]) @ torch.linalg.inv(a)
    want = gradients.flatten(1) @ solved.flatten(1).T
    torch.testing.assert_close(rows @ rows.T, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("n_together", [1, 3, 6])
def test_losses_layers_and_head_rows_are_the_same_in_any_batch(n_together):
    model, chosen = small_model("gpt2").requires_grad_(False), sequences()
    basis = basis_of(model, 8, chosen)
    with GradProjLoraEngine(model, freeze_weights=True) as engine:
        for first in range(0, len(chosen), n_together):
            numbers = np.arange(first, first + n_together)
            sink = HeadRows(basis.matrix, basis.scale, 5)
            batch = collate(chosen, numbers)
            rows, losses = run_batch(model, engine, batch, True, sink)
            plain_rows, plain_losses = run_batch(model, engine, batch, True)
            torch.testing.assert_close(rows, plain_rows, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(losses, plain_losses)
            for n, ids, values in zip(numbers, *sink.largest(), strict=True):
                (want,) = all_rows(model, basis, chosen[n : n + 1])
                order = want[0].norm(dim=1).argsort(descending=True)[:5]
                assert torch.equal(ids, order)
                torch.testing.assert_close(values, want[0, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "k"), [(65536, 16), (65537, 12), (2**24 + 1, 8)])
def test_rows_are_encoded_as_signs_and_half_octaves_and_decoded_by_numpy(vocabulary, k):
    torch.manual_seed(0)
    segment = HeadSegment(n_rows=4, k=k, vocabulary=vocabulary)
    ids = torch.tensor([[vocabulary - 1, 0, 300], [1, 2, 3]])
    values = torch.randn(2, 3, k) * torch.tensor([1e-3, 1.0, 40.0])[:, None]
    values[1, 2] = 0
    stored = encode_head(ids, values, segment).numpy()
    assert stored.shape == (2, segment.n_bytes)
    assert stored.dtype == np.uint8
    decoded = decode_head(stored, segment)
    got = decoded.values(k)
    scale = values.abs().mean(dim=2)
    for n, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        assert decoded.ids[n, j] == ids[n, j]
        assert np.array_equal(got[n, j] > 0, values[n, j].numpy() >= 0)
        assert abs(np.log2(decoded.scale[n, j] / scale[n, j].item())) <= 0.2501
    assert not decoded.scale[:, 3].any()
    assert decoded.scale[1, 2] == 0
    assert np.isnan(decode_head(np.full_like(stored, 255), segment).scale).all()


def test_windows_of_a_document_are_added_by_token():
    ids = torch.tensor([[5, 2, 9], [2, 7, 5]])
    values = torch.arange(12.0).reshape(2, 3, 2) - 4
    got_ids, got_values = sum_windows(ids, values, 3)
    dense = torch.zeros(10, 2).index_add(0, ids.flatten(), values.flatten(0, 1))
    order = dense.norm(dim=1).argsort(descending=True)[:3]
    assert torch.equal(got_ids[0], order)
    torch.testing.assert_close(got_values[0], dense[order])


@pytest.mark.parametrize("n_together", [1, 2, 6])
def test_a_unit_has_one_encoded_row_a_document_whatever_its_batches(n_together):
    model, chosen = small_model("gpt2").requires_grad_(False), sequences()
    basis, segment = basis_of(model, 8, chosen), HeadSegment(6, 8, VOCAB)
    parts: list[dict[str, np.ndarray]] = []
    row_of, divisor = np.array([0, 1, 1, 2, 4, 1]), np.array([8, 27, 19, 1, 1], np.float32)
    sums = HeadSums(basis, segment, row_of, divisor)
    for first in reversed(range(0, len(chosen), n_together)):
        saved, sums = sums.take_new(), HeadSums(basis, segment, row_of, divisor)
        parts.append(saved)
        for part in parts:  # stopped after every batch, and continued
            sums.replay(part)
        numbers, sink = np.arange(first, first + n_together), sums.sink()
        head_loss(model, collate(chosen, numbers), sink)
        sums.add(numbers, *sink.largest())
    decoded, rows = decode_head(sums.stored.numpy(), segment), all_rows(model, basis, chosen)
    for document in (0, 1, 2, 4):
        mine = np.flatnonzero(row_of == document)
        want = torch.stack([rows[n][0] for n in mine]).sum(dim=0) / divisor[document]
        order = want.norm(dim=1).argsort(descending=True)[:6]
        assert np.array_equal(decoded.ids[document], order)
        want_stored = encode_head(order[None], want[order][None], segment).numpy()
        assert (want_stored[0] != sums.stored[document].numpy()).mean() < 0.05
    assert not decoded.scale[3].any()


def test_shapes_are_parsed_or_refused():
    assert HeadConfig().segment(VOCAB) is None
    assert HeadConfig(head_rows="64x16").segment(VOCAB, 9) == HeadSegment(64, 16, VOCAB, 9)
    for text in ("64", "0x4", "64x64x2", "-1x4", ""):
        with pytest.raises(ConfigError, match="--head_rows is"):
            HeadConfig(head_rows=text)


def test_models_without_head_rows_are_refused_by_name():
    with pytest.raises(ModelError, match=r"logits are its head's own output: logits .* differ"):
        check_head(small_model("cohere").eval())
    model = small_model("gpt2").eval().requires_grad_(False)
    engine = GradProjLoraEngine(model, "mlp,lm_head", freeze_weights=True)
    with engine, pytest.raises(ModelError, match="both name the vocabulary head"):
        check_head(model)
