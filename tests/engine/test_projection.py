"""Projected widths and projection matrices."""

import numpy as np
import pytest
import torch
from helpers.models import small_model

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.projection import (
    PROJECTIONS,
    JobProjectionConfig,
    ProjectionConfig,
    choose_ki_ko,
    projection_matrix,
)
from gradproj.errors import ConfigError

KINDS = sorted(PROJECTIONS)


def best_split_by_trying_all(n_i, n_o, total, least):
    tried = [
        (round((1 + 2 / i) * (1 + 2 / o), 12), i * n_i + o * n_o, (i, o))
        for i in range(min(least, n_i), n_i + 1)
        for o in range(min(least, n_o), n_o + 1)
        if i * o <= total
    ]
    return min(tried)[2]


@pytest.mark.parametrize("n_i", [1, 3, 5, 16, 30])
@pytest.mark.parametrize("n_o", [1, 4, 17, 40])
@pytest.mark.parametrize(("total", "least"), [(256, 8), (64, 8), (100, 3), (1, 1), (37, 2)])
def test_choose_ki_ko_minimises_the_variance_within_the_budget(n_i, n_o, total, least):
    if min(least, n_i) * min(least, n_o) > total:
        pytest.skip("no split fits; the error has its own test")
    assert choose_ki_ko(n_i, n_o, total, least) == best_split_by_trying_all(n_i, n_o, total, least)


def test_wide_layers_get_a_square_split_of_the_whole_budget():
    assert choose_ki_ko(768, 2304, 256, 8) == (16, 16)
    assert choose_ki_ko(768, 3072, 4096, 8) == (64, 64)


def test_too_small_budget_names_possible_settings():
    with pytest.raises(
        ConfigError, match=r"at least --proj_rank_total 64, or at most --proj_rank_min 7"
    ):
        choose_ki_ko(768, 768, 50, 8)


@pytest.mark.parametrize(
    "wrong", [(0, 5, 256, 8), (5, 0, 256, 8), (64, 64, 0, 8), (64, 64, 256, 0)]
)
def test_zero_width_or_budget_is_rejected(wrong):
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        choose_ki_ko(*wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_of_p_transposed_p_is_the_identity(kind):
    total = torch.zeros(12, 12)
    for seed in range(3000):
        p = projection_matrix(kind, seed, "h.0.mlp", "i", 4, 12)
        total += p.T @ p
    # Entries of P^T P have standard deviation at most sqrt(2 * n / k) / 2; 3000 draws leave 0.02.
    torch.testing.assert_close(total / 3000, torch.eye(12), atol=0.09, rtol=0)


def test_orthonormal_rows_are_orthogonal_and_square_ones_lose_nothing():
    p = projection_matrix("orthonormal", 1, "x", "i", 8, 8)
    torch.testing.assert_close(p @ p.T, torch.eye(8), atol=1e-5, rtol=0)
    wide = projection_matrix("orthonormal", 1, "x", "i", 8, 32)
    torch.testing.assert_close(wide @ wide.T, torch.eye(8) * 4, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_depends_on_each_part_of_its_key_alone(kind):
    p = projection_matrix(kind, 1, "h.0.mlp", "i", 4, 10)
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state().clone()
    assert torch.equal(p, projection_matrix(kind, 1, "h.0.mlp", "i", 4, 10))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(p, projection_matrix(kind, 2, "h.0.mlp", "i", 4, 10))
    assert not torch.equal(p, projection_matrix(kind, 1, "h.1.mlp", "i", 4, 10))
    assert not torch.equal(p, projection_matrix(kind, 1, "h.0.mlp", "o", 4, 10))
    assert not torch.equal(p[:, :10], projection_matrix(kind, 1, "h.0.mlp", "i", 4, 11)[:, :10])


def test_matrices_of_version_1_do_not_change():
    # A store made last year must be continued with the same matrices: these signs are the format.
    p = projection_matrix("rademacher", 42, "transformer.h.0.mlp.c_fc", "i", 2, 8)
    assert (p * 2**0.5).round().int().tolist() == EXPECTED_SIGNS


EXPECTED_SIGNS = [[-1, 1, 1, -1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, -1, -1]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank_total": 0}, "--proj_rank_total must be at least 1, got 0"),
        ({"rank_min": 0}, "--proj_rank_min must be at least 1"),
        ({"kind": "fourier"}, "--proj_kind is 'fourier'; choose one of"),
        ({"layers": " , "}, "--proj_layers is empty"),
    ],
)
def test_wrong_setting_names_its_flag(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ProjectionConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "width"), [(ProjectionConfig, 256), (JobProjectionConfig, 4096)]
)
def test_layers_that_no_pattern_names_keep_what_their_job_or_training_run_keeps(settings, width):
    config = settings(rank_total="c_fc:64,-c_proj", layers="mlp,attn")
    model = small_model("gpt2")
    engine = GradProjLoraEngine.from_config(model, config)
    shapes = [(p_i.shape[1], p_o.shape[1]) for p_i, p_o in engine.projection_matrices.values()]
    values = [stop - start for start, stop in engine.slice_ranges.values()]
    assert sorted(set(values)) == [64, min(width, min(i * o for i, o in shapes))], shapes
