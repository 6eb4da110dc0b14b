"""Parts of tokens in models of several kinds: of which position they are, and what they add to."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.experts import slow_experts
from helpers.models import small_model

from gradproj import GradProjLoraEngine
from gradproj.engine import token_parts
from gradproj.engine.batching import BatchConfig
from gradproj.engine.token_parts import pulled_back, split_texts, token_products
from gradproj.model.sequences import TokenSequence

IDS = [5, 9, 3, 40, 77, 12, 9]


def engine_of(model, **settings):
    return GradProjLoraEngine(
        model, proj_rank_total=16, proj_rank_min=4, freeze_weights=True, **settings
    )


def matrices_of(engine, n, seed=0):
    """Return random weights ``(n, D)`` of whole rows, and by layer."""
    weights = torch.randn(n, engine.total_proj_dim, generator=torch.Generator().manual_seed(seed))
    columns = {name: slice(*span) for name, span in engine.slice_ranges.items()}
    return weights.double(), pulled_back(weights, columns, None)


def split(model, engine, sequences, matrices, n):
    owners = 1 + max(each.owner for each in sequences)
    chosen = [np.arange(n)] * owners
    return split_texts(model, engine, sequences, matrices, chosen, BatchConfig(batch_size=4))


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "mixtral", "zamba2", "qwen3_next"])
def test_parts_belong_to_the_positions_before_a_target_and_sum_to_the_row(family):
    model = small_model(family)
    engine = engine_of(model, include_embeddings=True)
    weights, matrices = matrices_of(engine, 2)
    whole = [TokenSequence.of(IDS, owner=0), TokenSequence.of(IDS[:4], 2.0, owner=1)]
    first = TokenSequence(np.array(IDS), np.arange(len(IDS)) == 2, 1.0, 2)
    found = split(model, engine, [*whole, first], matrices, 2)
    for parts, layers, row, sequence in zip(
        found.parts, found.layers, found.rows, [*whole, first], strict=True
    ):
        assert parts.shape == (2, len(sequence))
        want = weights.numpy() @ row.astype(np.float64)
        scale = 1e-5 * np.abs(parts).sum(axis=1).max()
        np.testing.assert_allclose(parts.sum(axis=1), want, rtol=1e-5, atol=scale)
        np.testing.assert_allclose(layers.sum(axis=1), want, rtol=1e-5, atol=scale)
    # The loss of token 2 is of what the positions 0 and 1 compute, and of no later one.
    assert (np.abs(found.parts[2][:, :2]) > 0).all()
    assert not found.parts[2][:, 2:].any()


def test_the_model_runs_within_turns_alone():
    model, turns = small_model("gpt2"), [0, 0]
    engine = engine_of(model)
    _, matrices = matrices_of(engine, 1)

    @contextmanager
    def turn():
        turns[:] = turns[0] + 1, turns[1] + 1
        yield
        turns[0] -= 1

    depths = []
    model.transformer.register_forward_pre_hook(lambda *_: depths.append(turns[0]))
    sequences = [TokenSequence.of(IDS, owner=0), TokenSequence.of(IDS[:4], owner=1)]
    chosen, batch = [np.arange(1)] * 2, BatchConfig(batch_size=2, max_padding=0.5)
    split_texts(model, engine, sequences, matrices, chosen, batch, turn)
    assert turns[1] >= 2
    assert set(depths) == {1}


def test_part_of_a_token_is_the_sum_over_the_experts_that_it_is_routed_to():
    model = small_model("mixtral").double()
    engine = engine_of(small_model("mixtral"), proj_layers="down_proj,gate_up_proj")
    _, matrices = matrices_of(engine, 1)
    found = split(engine.module, engine, [TokenSequence.of(IDS)], matrices, 1)
    seen = slow_experts(model)
    ids = torch.tensor(IDS)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    F.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
    want = np.zeros(len(IDS))
    for target in engine.targets:
        p_i, p_o = (p.double() for p in engine.projection_matrices[target.name])
        a, g = seen[target.name].side_by_side(target.module.n_experts)
        a = a * target.signs.flatten()  # D_e side by side
        a = a.view(len(a), target.module.n_experts, -1).sum(dim=1) @ p_i.T
        k = matrices[target.name][0].double().view(len(p_o), len(p_i))
        of_slots = ((g @ p_o.T @ k) * a).sum(dim=1)
        want += of_slots.view(len(IDS), -1).sum(dim=1).detach().numpy()
    np.testing.assert_allclose(found.parts[0][0], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_products_of_a_long_text_are_computed_some_matrices_at_a_time(monkeypatch):
    a, g, matrices = torch.randn(50, 3), torch.randn(50, 4), torch.randn(7, 12)
    want = torch.einsum("so,moi,si->ms", g, matrices.view(7, 4, 3), a).double()
    monkeypatch.setattr(token_parts, "_VALUES_AT_ONCE", 2 * 50 * 3)
    torch.testing.assert_close(token_products(a, g, matrices), want, rtol=1e-5, atol=1e-5)
