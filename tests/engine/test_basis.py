"""Rows in a basis: the transformation of each layer, and the eigenbasis of a covariance."""

import numpy as np
import pytest
import torch
from helpers.models import ragged_batch, small_model
from helpers.references import projected_gradient_by_autograd, relative_error

from gradproj.engine.basis import eigenbasis
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import ConfigError
from gradproj.store.basis import DAMPING

LENGTHS = [9, 5]
SETTINGS = {"proj_rank_total": "down_proj:48,24", "proj_rank_min": 3, "freeze_weights": True}


def random_basis(engine, seed=0):
    torch.manual_seed(seed)
    return {
        name: (torch.randn(len(p_i), len(p_i)), torch.randn(len(p_o), len(p_o)))
        for name, (p_i, p_o) in engine.projection_matrices.items()
    }


def test_rows_are_the_projected_gradients_of_single_samples_in_the_basis():
    model, (ids, labels) = small_model("llama"), ragged_batch(LENGTHS)
    plain = GradProjLoraEngine(model, **SETTINGS)
    basis = random_basis(plain)
    widths = {k.shape for pair in plain.projection_matrices.values() for k in pair}
    assert len(widths) > 3  # layers of several shapes
    with GradProjLoraEngine(model, **SETTINGS, basis=basis) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        rows = engine.collect_batch()
    for n, length in enumerate(LENGTHS):
        row = projected_gradient_by_autograd(model, plain, ids[n, :length])
        for name, (start, stop) in engine.slice_ranges.items():
            r_i, r_o = (r.double() for r in basis[name])
            want = r_o @ row[start:stop].view(len(r_o), len(r_i)) @ r_i.T
            assert relative_error(rows[n, start:stop], want.flatten()) < 1e-5


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_basis_that_does_not_fit_a_layer_is_rejected_by_its_name(wrong):
    model = small_model("llama")
    basis = random_basis(GradProjLoraEngine(model, **SETTINGS))
    name = next(iter(basis))
    r_i, r_o = basis.pop(name)
    if wrong == "shape":
        basis[name] = r_i[:-1], r_o
    with pytest.raises(ConfigError, match=f"the basis of layer {name} is"):
        GradProjLoraEngine(model, **SETTINGS, basis=basis)


@pytest.mark.parametrize("n_tokens", [100, 3, 1])
def test_eigenbasis_makes_a_covariance_diagonal_and_equal_up_to_damping(n_tokens):
    """Also with fewer tokens than directions, of which most then have no variance."""
    x = np.random.default_rng(0).normal(size=(n_tokens, 8)) * np.arange(1, 9) ** 2
    covariance = x.T @ x / n_tokens
    r, values = eigenbasis(covariance)
    assert r.dtype == np.float32
    exact = np.sort(np.linalg.eigvalsh(covariance).clip(0))
    np.testing.assert_allclose(np.sort(values), exact, atol=1e-9 * exact[-1])
    whitened = r.astype(np.float64) @ covariance @ r.astype(np.float64).T
    want = np.diag(values / (values + DAMPING * values.mean()))
    np.testing.assert_allclose(whitened, want, atol=1e-5)


def test_eigenbasis_of_nothing_is_the_identity():
    r, values = eigenbasis(np.zeros((4, 4)))
    np.testing.assert_array_equal(r, np.eye(4))
    np.testing.assert_array_equal(values, np.zeros(4))
